//! The forward kernel passes the corpus in the emulator.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

use flashattn_cuda::kernels::{FwdConfig, flash_fwd_sm90};
use flashattn_cuda::plan::{Argument, Feature, ForwardPlan, PlanError, Strides, Tensor};
use flashattn_spec::suite::{Case, ExecError, Executor, Layout, Report, Runner, corpus};
use flashattn_spec::{AttentionProblem, DType, Element, GradInputs, Gradients, Inputs, Outputs};
use ptx::Kernel;
use ptx::emulate::{Arg, Launch, Memory, emulate};

/// Blocks of a launch: more than one, so that tiles are shared out, and few, so that a block has several.
const GRID: u32 = 3;

/// Runs a problem's forward pass in the emulator.
#[derive(Default)]
struct Emulator {
    kernels: Mutex<HashMap<FwdConfig, Arc<Kernel>>>,
}

impl Emulator {
    fn kernel(&self, config: &FwdConfig) -> Result<Arc<Kernel>, ExecError> {
        if let Some(kernel) = self.kernels.lock().unwrap().get(config) {
            return Ok(kernel.clone());
        }
        let kernel = Arc::new(flash_fwd_sm90(config));
        ptx::verify(&kernel).map_err(failed)?;
        self.kernels.lock().unwrap().insert(config.clone(), kernel.clone());
        Ok(kernel)
    }
}

fn failed(error: impl std::fmt::Display) -> ExecError {
    ExecError::Failed(error.to_string())
}

fn refused(error: PlanError) -> ExecError {
    match error {
        PlanError::Unsupported { .. } => ExecError::Unsupported { feature: error.to_string() },
        PlanError::Problem(_) => failed(error),
    }
}

impl Executor for Emulator {
    fn device(&self) -> String {
        "flash_fwd_sm90, emulated".to_owned()
    }

    fn forward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<T>,
        outputs: &mut Outputs<T>,
    ) -> Result<(), ExecError> {
        inputs.check(problem)?;
        outputs.check(problem)?;
        let (q, k, v, o) = (inputs.q, inputs.k, inputs.v, outputs.o.as_view());
        let strides = Strides { q: q.strides(), k: k.strides(), v: v.strides(), o: o.strides() };
        let plan = ForwardPlan::new(problem, &strides).map_err(refused)?;
        for (tensor, view) in [(Tensor::Q, q), (Tensor::K, k), (Tensor::V, v), (Tensor::O, o)] {
            plan.check_address(tensor, view.data().as_ptr().addr() as u64).map_err(refused)?;
        }
        if plan.tiles == 0 {
            return Ok(());
        }
        let kernel = self.kernel(&plan.config)?;
        let mut memory = Memory::new();
        let [q_buffer, k_buffer, v_buffer] =
            [("q", q), ("k", k), ("v", v)].map(|(name, view)| memory.upload(name, view.data()));
        // Outputs keep what they held, so that the suite sees what was not written, and what should not have been.
        let o_buffer = memory.upload("o", o.data());
        let lse_buffer = memory.upload("lse", outputs.lse);
        let counter = memory.upload("counter", &[0u32]);
        let sinks = memory.upload("sinks", inputs.sinks.unwrap_or(&[]));
        let uploads: Vec<_> = plan.uploads.iter().map(|up| memory.upload(&up.name, up.bytes())).collect();
        let buffer = |tensor| match tensor {
            Tensor::Q => q_buffer,
            Tensor::K => k_buffer,
            Tensor::V => v_buffer,
            Tensor::O => o_buffer,
            Tensor::Lse => lse_buffer,
            Tensor::Sinks => sinks,
            Tensor::Counter => counter,
            Tensor::Upload(i) => uploads[i],
        };
        let args = plan.arguments.iter().map(|argument| match argument.clone() {
            Argument::U32(x) => Arg::U32(x),
            Argument::S32(x) => Arg::S32(x),
            Argument::F32(x) => Arg::F32(x),
            Argument::U64(x) => Arg::U64(x),
            Argument::Address(tensor) => Arg::Buffer(buffer(tensor), 0),
            Argument::TensorMap(map, tensor) => Arg::TensorMap(map, buffer(tensor), 0),
        });
        let mut hasher = DefaultHasher::new();
        bytemuck::cast_slice::<T, u8>(q.data()).hash(&mut hasher);
        let launch = Launch {
            grid: [plan.grid(GRID), 1, 1],
            args: args.collect(),
            shared_bytes: kernel.shared_bytes,
            seed: hasher.finish(),
            ..Launch::default()
        };
        emulate(&kernel, &mut memory, &launch).map_err(failed)?;
        if memory.read::<u32>(counter).map_err(failed)? != [0] {
            return Err(ExecError::Failed("the tile counter is not back at 0".to_owned()));
        }
        outputs.o.data_mut().copy_from_slice(&memory.read::<T>(o_buffer).map_err(failed)?);
        outputs.lse.copy_from_slice(&memory.read::<f32>(lse_buffer).map_err(failed)?);
        Ok(())
    }

    fn backward<T: Element>(
        &self,
        _: &AttentionProblem,
        _: &Inputs<T>,
        _: &GradInputs<T>,
        _: &mut Gradients<T>,
    ) -> Result<(), ExecError> {
        Err(ExecError::Unsupported { feature: Feature::Gradients.name().to_owned() })
    }
}

#[test]
fn the_corpus_in_the_emulator() {
    let filter = std::env::var("CASE").unwrap_or_default();
    let mut cases = Vec::new();
    for mut case in corpus() {
        case.backward = false;
        if !case.name.contains(&filter) {
            continue;
        }
        cases.push(case);
    }
    let executor = Emulator::default();
    let time = std::time::Instant::now();
    let mut last = (time, String::new());
    let mut times = vec![];
    let report = Runner::new()
        .on_progress(|_, _, name| {
            times.push((last.0.elapsed(), std::mem::replace(&mut last.1, name.to_owned())));
            last.0 = std::time::Instant::now();
        })
        .run(&executor, &cases);
    println!("{report}");
    times.sort();
    for (t, n) in times.iter().rev().take(30) {
        println!("{t:?} {n}")
    }
    println!("{:?}, {} kernels", time.elapsed(), executor.kernels.lock().unwrap().len());
}
