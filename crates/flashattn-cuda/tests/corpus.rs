//! The forward kernel passes the corpus in the emulator, and ptxas takes every config that the corpus asks for.
//!
//! First each case of bf16 and f16 as it is. What the plan refuses is counted by reason, and no other reason than those named
//! may occur. Then the refused ones again, as near as the kernel comes: f32 as bf16, and tensors that TMA cannot take copied
//! to memory that it can, with NaN between the rows. `CASE=part-of-a-name` runs some of the cases.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

use flashattn_cuda::kernels::{FwdConfig, flash_fwd_sm90};
use flashattn_cuda::plan::{Argument, Feature, ForwardPlan, PlanError, Strides, Tensor};
use flashattn_spec::suite::{
    Case, ExecError, Executor, InputKind, Place, Report, Runner, corpus, random_cases,
};
use flashattn_spec::{
    AttentionProblem, DType, Element, GradInputs, Gradients, Inputs, Outputs, View, ViewMut,
};
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
        if let Some(kernel) = self.kernels.lock().expect("no thread panics with it").get(config) {
            return Ok(kernel.clone());
        }
        let kernel = Arc::new(flash_fwd_sm90(config));
        ptx::verify(&kernel).map_err(failed)?;
        self.kernels.lock().expect("no thread panics with it").insert(config.clone(), kernel.clone());
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
        // Memory without elements lies nowhere.
        let tensors = [(Tensor::Q, q), (Tensor::K, k), (Tensor::V, v), (Tensor::O, o)];
        for (tensor, view) in tensors.into_iter().filter(|(_, view)| !view.shape().contains(&0)) {
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
        // Only the first is to be 0.
        let mut words = vec![u32::MAX; plan.counter_bytes() as usize / 4];
        words[0] = 0;
        let counter = memory.upload("counter", &words);
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
        if memory.read::<u32>(counter).map_err(failed)?[0] != 0 {
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

/// The emulator behind copies of the tensors whose rows begin at multiples of 16 bytes.
struct Staged<'a>(&'a Emulator);

/// A copy of a view with rows of a multiple of 8 elements, and NaN between them: the memory and its strides.
fn stage<T: Element>(view: &View<T>) -> (Vec<T>, [usize; 4]) {
    let [b, n, h, d] = view.shape();
    let row = d.next_multiple_of(8);
    let strides = [n * h * row, h * row, row, 1];
    let mut data = vec![T::from_f32(f32::NAN); b * n * h * row];
    for ((i, j), k) in
        (0..b).flat_map(|i| (0..n).map(move |j| (i, j))).flat_map(|ij| (0..h).map(move |k| (ij, k)))
    {
        let at = i * strides[0] + j * strides[1] + k * strides[2];
        data[at..at + d].copy_from_slice(view.row(i, j, k));
    }
    (data, strides)
}

impl Executor for Staged<'_> {
    fn device(&self) -> String {
        format!("{}, staged", self.0.device())
    }

    fn forward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<T>,
        outputs: &mut Outputs<T>,
    ) -> Result<(), ExecError> {
        let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(|view| (stage(&view), view.shape()));
        let (mut o, o_strides) = stage(&outputs.o.as_view());
        let shape = outputs.o.shape();
        {
            let inputs = Inputs {
                q: View::with_strides(&q.0.0, q.1, q.0.1).map_err(failed)?,
                k: View::with_strides(&k.0.0, k.1, k.0.1).map_err(failed)?,
                v: View::with_strides(&v.0.0, v.1, v.0.1).map_err(failed)?,
                sinks: inputs.sinks,
            };
            let o = ViewMut::with_strides(&mut o, shape, o_strides).map_err(failed)?;
            self.0.forward(problem, &inputs, &mut Outputs { o, lse: &mut *outputs.lse })?;
        }
        let computed = View::with_strides(&o, shape, o_strides).map_err(failed)?;
        let [b, n, h, d] = shape;
        for (i, j, k) in (0..b).flat_map(|i| (0..n).flat_map(move |j| (0..h).map(move |k| (i, j, k)))) {
            outputs.o.row_mut(i, j, k).copy_from_slice(computed.row(i, j, k));
        }
        let gap = |at: usize| at % d.next_multiple_of(8).max(1) >= d;
        match (0..o.len()).find(|&at| gap(at) && o[at].to_f32().is_finite()) {
            Some(at) => {
                Err(ExecError::Failed(format!("wrote to element {at} of o, which is none of its own")))
            }
            None => Ok(()),
        }
    }

    fn backward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<T>,
        given: &GradInputs<T>,
        gradients: &mut Gradients<T>,
    ) -> Result<(), ExecError> {
        self.0.backward(problem, inputs, given, gradients)
    }
}

/// The corpus' forward passes.
fn cases() -> Vec<Case> {
    let filter = std::env::var("CASE").unwrap_or_default();
    let mut cases = corpus();
    cases.retain(|case| case.name.contains(&filter));
    assert!(!cases.is_empty(), "no case is named {filter}");
    cases.iter_mut().for_each(|case| case.backward = false);
    cases
}

/// f32 as bf16: other tensors than those of the bf16 case of the same name, as each dtype has its own turns of options.
fn as_bf16(mut case: Case) -> Case {
    if case.problem.dtype == DType::F32 {
        case.name += " as bf16";
        case.problem.dtype = DType::Bf16;
    }
    case.backward = false;
    case
}

/// Runs cases on two threads and prints the report; any failure fails the test.
fn run<E: Executor + Sync>(executor: &E, cases: &[Case]) -> Report {
    let mut shares = [Vec::new(), Vec::new()];
    cases.iter().enumerate().for_each(|(i, case)| shares[i % 2].push(case.clone()));
    let [mut report, other] = std::thread::scope(|scope| {
        shares
            .map(|share| scope.spawn(move || Runner::new().run(executor, &share)))
            .map(|thread| thread.join().expect("runs to its end"))
    });
    report.cases += other.cases;
    report.passed += other.passed;
    report.failed += other.failed;
    report.skipped += other.skipped;
    report.failures.extend(other.failures);
    report.skips.extend(other.skips);
    for (tensor, worst) in other.worst {
        let most = report.worst.entry(tensor).or_default();
        if worst.ratio > most.ratio {
            *most = worst;
        }
    }
    let reasons = reasons(&report);
    let refused = |case: &Case| report.skips.iter().any(|skip| skip.name == case.name);
    // What no copy helps is refused for what it is.
    assert!(
        cases.iter().all(|case| case.problem.head_dim.max(case.problem.head_dim_v) <= 256 || refused(case))
    );
    let large = cases.iter().filter(|case| case.problem.head_dim.max(case.problem.head_dim_v) > 256).count();
    assert!(reasons.get(&Feature::HeadDim).copied().unwrap_or(0) <= large);
    report.skips.sort_by(|a, b| a.name.cmp(&b.name));
    println!("{report}  refused: {reasons:?}");
    assert!(report.failed == 0 && report.cases == cases.len(), "{:?}", report.failures);
    report
}

/// Refused cases by reason.
fn reasons(report: &Report) -> BTreeMap<Feature, usize> {
    let mut counts = BTreeMap::new();
    for skip in &report.skips {
        let reason = Feature::ALL.into_iter().find(|feature| skip.feature.starts_with(feature.name()));
        *counts.entry(reason.unwrap_or_else(|| panic!("{}: {}", skip.name, skip.feature))).or_default() += 1;
    }
    counts
}

fn only(report: &Report, allowed: &[Feature]) {
    assert!(reasons(report).keys().all(|feature| allowed.contains(feature)), "{:?}", reasons(report));
}

#[test]
fn the_corpus_in_the_emulator() {
    let (executor, cases) = (Emulator::default(), cases());
    let report = run(&executor, &cases);
    only(&report, &[Feature::DType, Feature::HeadDim, Feature::Stride, Feature::Address]);
    let again: HashSet<&str> = report.skips.iter().map(|skip| skip.name.as_str()).collect();
    let again: Vec<Case> =
        cases.iter().filter(|case| again.contains(case.name.as_str())).cloned().map(as_bf16).collect();
    let report = run(&Staged(&executor), &again);
    only(&report, &[Feature::HeadDim]);
}

#[test]
fn random_cases_in_the_emulator() {
    let cases: Vec<Case> = random_cases(2026, 200).into_iter().map(as_bf16).collect();
    only(&run(&Staged(&Emulator::default()), &cases), &[Feature::HeadDim]);
}

/// What a row does not see does not reach it, whatever it holds: every kind of case with values, keys and queries that are
/// not finite.
#[test]
fn broken_inputs_in_the_emulator() {
    let mut cases: Vec<Case> = cases().into_iter().filter(|case| case.problem.dtype != DType::F32).collect();
    cases.retain(|case| {
        ["mask/", "together/", "dropout/", "sinks/", "packed/", "head-dim/"]
            .iter()
            .any(|part| case.name.starts_with(part))
    });
    // Every other one, as the two dtypes have the same names with other options.
    let mut cases: Vec<Case> = cases.into_iter().step_by(2).collect();
    for (i, case) in cases.iter_mut().enumerate() {
        let place = [Place::V, Place::V, Place::K, Place::Q][i % 4];
        case.name += &format!(" with {place:?} not finite");
        case.input = InputKind::NotFinite(place);
    }
    only(&run(&Staged(&Emulator::default()), &cases), &[Feature::HeadDim]);
}

/// No spills, no warnings (such as serialised wgmma), for every config that the corpus asks for.
#[test]
#[ignore = "needs ptxas: bash tools/ptxas.sh"]
fn ptxas_takes_every_config() {
    let mut configs = HashSet::new();
    // Of f16, which differs in the types of a few instructions, what has neither mask program nor score mod.
    for case in cases().into_iter().filter(|case| case.problem.dtype != DType::F32) {
        let p = &case.problem;
        let strides = |[_, n, h, d]: [usize; 4]| {
            let row = d.next_multiple_of(8);
            [n * h * row, h * row, row, 1]
        };
        let strides = Strides {
            q: strides(p.q_shape()),
            k: strides(p.k_shape()),
            v: strides(p.v_shape()),
            o: strides(p.o_shape()),
        };
        match ForwardPlan::new(p, &strides) {
            Ok(plan)
                if p.dtype == DType::F16
                    && (plan.config.mask_program.is_some() || plan.config.score_mod.is_some()) => {}
            Ok(plan) => drop(configs.insert(plan.config)),
            Err(PlanError::Unsupported { feature: Feature::HeadDim, .. }) => {}
            Err(error) => panic!("{}: {error}", case.name),
        }
    }
    assert!(!configs.is_empty());
    let configs: Vec<FwdConfig> = configs.into_iter().collect();
    let check = |config: &FwdConfig| {
        let report = ptx::assemble(&flash_fwd_sm90(config)).and_then(|report| report.check());
        report.err().map(|error| format!("{error}: {config:?}"))
    };
    let halves = configs.chunks(configs.len().div_ceil(2));
    let wrong: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = halves
            .map(|half| scope.spawn(move || half.iter().filter_map(check).collect::<Vec<_>>()))
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("runs to its end")).collect()
    });
    println!("{} configs, {} wrong", configs.len(), wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
