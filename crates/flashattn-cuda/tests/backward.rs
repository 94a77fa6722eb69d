//! The backward kernels pass the corpus in the emulator, and ptxas takes every config that the corpus asks for.
//!
//! o and lse come from the oracle. Tensors that TMA cannot take are copied to memory that it can, with NaN between the rows,
//! and f32 cases run as bf16; what is refused then is refused for its head dimension. `CASE=part-of-a-name` runs some cases.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

use flashattn_cuda::kernels::{
    BwdConfig, flash_bwd_sm90, flash_bwd_sm90_postprocess, flash_bwd_sm90_preprocess,
};
use flashattn_cuda::plan::{Argument, BackwardPlan, Feature, GradStrides, GradTensor, PlanError, Strides};
use flashattn_spec::reference;
use flashattn_spec::suite::{Case, ExecError, Executor, Report, Runner, corpus, random_cases};
use flashattn_spec::{
    AttentionProblem, DType, Element, GradInputs, Gradients, Inputs, Outputs, View, ViewMut,
};
use ptx::Kernel;
use ptx::emulate::{Arg, Buffer, Launch, Memory, emulate};

/// Blocks of a launch: more than one, so that items are shared out, and few, so that a block has several.
const GRID: u32 = 3;

/// The kernels of a config, in the order of their launches.
type Kernels = Arc<[Kernel; 3]>;

/// Runs a problem's backward pass in the emulator.
#[derive(Default)]
struct Emulator {
    kernels: Mutex<HashMap<BwdConfig, Kernels>>,
    deterministic: bool,
    /// Another interleaving of the warps.
    seed: u64,
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

fn kernels(config: &BwdConfig) -> [Kernel; 3] {
    [flash_bwd_sm90_preprocess(config), flash_bwd_sm90(config), flash_bwd_sm90_postprocess(config)]
}

impl Emulator {
    fn kernels(&self, config: &BwdConfig) -> Result<Kernels, ExecError> {
        if let Some(kernels) = self.kernels.lock().expect("no thread panics with it").get(config) {
            return Ok(kernels.clone());
        }
        let kernels = Arc::new(kernels(config));
        for kernel in kernels.iter() {
            ptx::verify(kernel).map_err(failed)?;
        }
        self.kernels.lock().expect("no thread panics with it").insert(config.clone(), kernels.clone());
        Ok(kernels)
    }
}

/// Strides of a shape whose rows begin at multiples of 8 elements.
fn staged_strides([_, n, h, d]: [usize; 4]) -> [usize; 4] {
    let row = d.next_multiple_of(8);
    [n * h * row, h * row, row, 1]
}

fn rows([b, n, h, _]: [usize; 4]) -> impl Iterator<Item = [usize; 3]> {
    (0..b).flat_map(move |i| (0..n).flat_map(move |j| (0..h).map(move |k| [i, j, k])))
}

/// A copy of a view with rows of a multiple of 8 elements, and NaN between them.
fn stage<T: Element>(view: &View<T>) -> Vec<T> {
    let (shape, strides) = (view.shape(), staged_strides(view.shape()));
    let mut data = vec![T::from_f32(f32::NAN); shape[0] * strides[0]];
    for [i, j, k] in rows(shape) {
        let at = i * strides[0] + j * strides[1] + k * strides[2];
        data[at..at + shape[3]].copy_from_slice(view.row(i, j, k));
    }
    data
}

/// Where a gradient is computed: in the caller's memory as it is, or, if pairs of columns would not be aligned there, in a copy.
fn output_strides<T>(view: &ViewMut<T>) -> [usize; 4]
where
    T: Element,
{
    let strides = view.strides();
    if strides[..3].iter().all(|stride| stride % 2 == 0) { strides } else { staged_strides(view.shape()) }
}

/// Uploads what a gradient's memory holds, in these strides.
fn upload_output<T: Element>(
    memory: &mut Memory,
    name: &str,
    view: &ViewMut<T>,
    strides: [usize; 4],
) -> Buffer {
    match strides == view.strides() {
        true => memory.upload(name, view.as_view().data()),
        false => memory.upload(name, &stage(&view.as_view())),
    }
}

/// Reads a gradient back.
fn read_output<T: Element>(
    memory: &Memory,
    buffer: Buffer,
    view: &mut ViewMut<T>,
    strides: [usize; 4],
) -> Result<(), ExecError> {
    let data = memory.read::<T>(buffer).map_err(failed)?;
    if strides == view.strides() {
        view.data_mut().copy_from_slice(&data);
        return Ok(());
    }
    let shape = view.shape();
    for [i, j, k] in rows(shape) {
        let at = i * strides[0] + j * strides[1] + k * strides[2];
        view.row_mut(i, j, k).copy_from_slice(&data[at..at + shape[3]]);
    }
    let gap = |at: usize| at % shape[3].next_multiple_of(8).max(1) >= shape[3];
    match (0..data.len()).find(|&at| gap(at) && data[at].to_f32().is_finite()) {
        Some(at) => Err(ExecError::Failed(format!("wrote to element {at} of a gap"))),
        None => Ok(()),
    }
}

impl Executor for Emulator {
    fn device(&self) -> String {
        "flash_bwd_sm90, emulated".to_owned()
    }

    fn forward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<T>,
        outputs: &mut Outputs<T>,
    ) -> Result<(), ExecError> {
        let forward = reference::forward(problem, inputs)?;
        let shape = problem.o_shape();
        for (row, [i, j, k]) in rows(shape).enumerate() {
            let from = &forward.o[row * shape[3]..][..shape[3]];
            let to = outputs.o.row_mut(i, j, k);
            to.iter_mut().zip(from).for_each(|(to, &x)| *to = T::from_f32(x as f32));
        }
        outputs.lse.iter_mut().zip(&forward.lse).for_each(|(to, &x)| *to = x as f32);
        Ok(())
    }

    fn backward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<T>,
        given: &GradInputs<T>,
        gradients: &mut Gradients<T>,
    ) -> Result<(), ExecError> {
        use GradTensor as G;
        inputs.check(problem)?;
        given.check(problem)?;
        gradients.check(problem)?;
        let read = [inputs.q, inputs.k, inputs.v, given.o, given.d_o];
        let [q, k, v, o, d_o] = read.map(|view| staged_strides(view.shape()));
        let [dq, dk, dv] = [&gradients.dq, &gradients.dk, &gradients.dv].map(output_strides);
        let strides = GradStrides { forward: Strides { q, k, v, o }, d_o, dq, dk, dv };
        let plan = BackwardPlan::new(problem, &strides, given.d_lse.is_some(), self.deterministic)
            .map_err(refused)?;
        let kernels = self.kernels(&plan.config)?;
        let mut memory = Memory::new();
        let mut buffers = HashMap::new();
        for (tensor, view) in [G::Q, G::K, G::V, G::O, G::DO].into_iter().zip(&read) {
            buffers.insert(tensor, memory.upload(&format!("{tensor:?}"), &stage(view)));
        }
        let outputs = [(G::DQ, &gradients.dq, dq), (G::DK, &gradients.dk, dk), (G::DV, &gradients.dv, dv)];
        for (tensor, view, strides) in outputs {
            buffers.insert(tensor, upload_output(&mut memory, &format!("{tensor:?}"), view, strides));
        }
        let floats = [
            (G::Lse, Some(given.lse)),
            (G::DLse, given.d_lse),
            (G::Sinks, inputs.sinks),
            (G::DSinks, gradients.d_sinks.as_deref()),
        ];
        for (tensor, data) in floats {
            // What is added to begins at 0; the rest keeps what it held, so that the suite sees what was not written.
            let data = data.unwrap_or(&[]);
            let zeros = vec![0f32; data.len()];
            let data = if plan.zeroed.contains(&tensor) { &zeros } else { data };
            buffers.insert(tensor, memory.upload(&format!("{tensor:?}"), data));
        }
        for (i, table) in gradients.d_tables.iter().enumerate() {
            assert!(plan.zeroed.contains(&G::DTable(i)));
            let zeros = vec![0f32; table.len()];
            buffers.insert(G::DTable(i), memory.upload(&format!("table gradient {i}"), &zeros));
        }
        for &(tensor, bytes) in &plan.workspace {
            buffers.insert(tensor, memory.alloc(&format!("{tensor:?}"), bytes));
        }
        for (i, up) in plan.uploads.iter().enumerate() {
            buffers.insert(G::Upload(i), memory.upload(&up.name, up.bytes()));
        }
        buffers.insert(G::Counter, memory.upload("counter", &[0u32]));
        let args = plan.arguments.iter().map(|argument| match argument.clone() {
            Argument::U32(x) => Arg::U32(x),
            Argument::S32(x) => Arg::S32(x),
            Argument::F32(x) => Arg::F32(x),
            Argument::U64(x) => Arg::U64(x),
            Argument::Address(tensor) => Arg::Buffer(buffers[&tensor], 0),
            Argument::TensorMap(map, tensor) => Arg::TensorMap(map, buffers[&tensor], 0),
        });
        let args: Vec<Arg> = args.collect();
        let mut hasher = DefaultHasher::new();
        (self.seed, bytemuck::cast_slice::<T, u8>(inputs.q.data())).hash(&mut hasher);
        let grids = [plan.query_blocks, plan.grid(GRID), plan.query_blocks];
        for ((i, kernel), grid) in kernels.iter().enumerate().zip(grids).filter(|&(_, grid)| grid > 0) {
            let launch = Launch {
                grid: [grid, 1, 1],
                args: args.clone(),
                shared_bytes: kernel.shared_bytes,
                seed: hasher.finish(),
                // Blocks of a deterministic plan wait for each other.
                resident: if self.deterministic && i == 1 { GRID } else { 1 },
                ..Launch::default()
            };
            emulate(kernel, &mut memory, &launch).map_err(failed)?;
        }
        if memory.read::<u32>(buffers[&G::Counter]).map_err(failed)? != [0] {
            return Err(ExecError::Failed("the counter of items is not back at 0".to_owned()));
        }
        read_output(&memory, buffers[&G::DQ], &mut gradients.dq, dq)?;
        read_output(&memory, buffers[&G::DK], &mut gradients.dk, dk)?;
        read_output(&memory, buffers[&G::DV], &mut gradients.dv, dv)?;
        if let Some(d_sinks) = &mut gradients.d_sinks {
            d_sinks.copy_from_slice(&memory.read::<f32>(buffers[&G::DSinks]).map_err(failed)?);
        }
        for (i, table) in gradients.d_tables.iter_mut().enumerate() {
            table.copy_from_slice(&memory.read::<f32>(buffers[&G::DTable(i)]).map_err(failed)?);
        }
        Ok(())
    }
}

/// The corpus' backward passes.
fn cases() -> Vec<Case> {
    let filter = std::env::var("CASE").unwrap_or_default();
    let mut cases: Vec<Case> = corpus().into_iter().filter(|case| case.backward).collect();
    cases.retain(|case| case.name.contains(&filter));
    assert!(!cases.is_empty(), "no case is named {filter}");
    cases
}

/// f32 as bf16: other tensors than those of the bf16 case of the same name, as each dtype has its own turns of options.
fn as_bf16(mut case: Case) -> Case {
    if case.problem.dtype == DType::F32 {
        case.name += " as bf16";
        case.problem.dtype = DType::Bf16;
    }
    case
}

fn too_wide(case: &Case) -> bool {
    case.problem.head_dim.max(case.problem.head_dim_v) > 256
}

/// Runs cases on two threads and prints the report; any failure fails the test, and any refusal but of the head dimension.
fn run(executor: &Emulator, cases: &[Case]) -> Report {
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
    println!("{report}");
    assert!(report.failed == 0 && report.cases == cases.len());
    let allowed = |feature: &str| {
        feature.starts_with(Feature::HeadDim.name())
            || executor.deterministic && feature.starts_with(Feature::Deterministic.name())
    };
    assert!(report.skips.iter().all(|skip| allowed(&skip.feature)), "{:?}", report.skips);
    report
}

#[test]
fn the_corpus_in_the_emulator() {
    let cases: Vec<Case> = cases().into_iter().map(as_bf16).collect();
    let report = run(&Emulator::default(), &cases);
    assert_eq!(report.skipped, cases.iter().filter(|case| too_wide(case)).count());
}

#[test]
fn random_cases_in_the_emulator() {
    let cases: Vec<Case> =
        random_cases(2027, 150).into_iter().filter(|case| case.backward).map(as_bf16).collect();
    assert!(!cases.is_empty());
    run(&Emulator::default(), &cases);
}

/// A deterministic plan under two interleavings.
struct Twice(Emulator);

impl Executor for Twice {
    fn device(&self) -> String {
        format!("{}, deterministic", self.0.device())
    }

    fn forward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<T>,
        outputs: &mut Outputs<T>,
    ) -> Result<(), ExecError> {
        self.0.forward(problem, inputs, outputs)
    }

    fn backward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<T>,
        given: &GradInputs<T>,
        gradients: &mut Gradients<T>,
    ) -> Result<(), ExecError> {
        let bits = |gradients: &Gradients<T>| {
            let bytes = [&gradients.dq, &gradients.dk, &gradients.dv]
                .map(|view| bytemuck::cast_slice::<T, u8>(view.as_view().data()).to_vec());
            (bytes, gradients.d_sinks.as_ref().map(|d_sinks| d_sinks.to_vec()))
        };
        self.0.backward(problem, inputs, given, gradients)?;
        let first = bits(gradients);
        Emulator { deterministic: true, seed: 1, ..Emulator::default() }
            .backward(problem, inputs, given, gradients)?;
        if first == bits(gradients) { Ok(()) } else { Err(ExecError::Failed("runs differ".to_owned())) }
    }
}

#[test]
fn deterministic_plans_give_the_same_bits() {
    let mut cases: Vec<Case> = cases().into_iter().filter(|case| case.problem.dtype == DType::Bf16).collect();
    // Every kind of option; and of each a part, since blocks that wait for each other are emulated on one thread.
    cases.retain(|case| !too_wide(case) && !case.name.starts_with("not-finite"));
    let cases: Vec<Case> = cases.into_iter().step_by(5).collect();
    let twice = Twice(Emulator { deterministic: true, ..Emulator::default() });
    let report = Runner::new().run(&twice, &cases);
    println!("{report}");
    assert!(report.failed == 0 && report.passed > 0 && report.passed + report.skipped == cases.len());
    // Gradients of tables are refused by name, and nothing else.
    let refused =
        |skip: &flashattn_spec::suite::Skip| skip.feature.starts_with(Feature::Deterministic.name());
    assert!(report.skips.iter().all(refused));
}

/// The plan of dense tensors, as far as TMA takes them.
fn plan(case: &Case, deterministic: bool) -> Result<BackwardPlan, PlanError> {
    let p = &case.problem;
    let [q, k, v, o] = [p.q_shape(), p.k_shape(), p.v_shape(), p.o_shape()].map(staged_strides);
    let strides = GradStrides { forward: Strides { q, k, v, o }, d_o: o, dq: q, dk: k, dv: v };
    BackwardPlan::new(p, &strides, case.d_lse, deterministic)
}

/// No spills, no warnings (such as serialised wgmma), for every config that the corpus asks for.
#[test]
#[ignore = "needs ptxas: bash tools/ptxas.sh"]
fn ptxas_takes_every_config() {
    let mut configs = HashSet::new();
    for case in cases().into_iter().filter(|case| case.problem.dtype != DType::F32) {
        // Of f16, which differs in the types of a few instructions, what has neither mask program nor score mod.
        let few = |config: &BwdConfig| config.mask_program.is_none() && config.score_mod.is_none();
        match plan(&case, false) {
            Ok(plan) if case.problem.dtype == DType::F16 && !few(&plan.config) => {}
            Ok(plan) => drop(configs.insert(plan.config)),
            Err(PlanError::Unsupported { feature: Feature::HeadDim, .. }) => {}
            Err(error) => panic!("{}: {error}", case.name),
        }
    }
    assert!(!configs.is_empty());
    let configs: Vec<BwdConfig> = configs.into_iter().collect();
    let check = |config: &BwdConfig| -> Vec<String> {
        let check = |kernel: &Kernel| {
            let report = ptx::assemble(kernel).and_then(|report| report.check());
            report.err().map(|error| format!("{}: {error}: {config:?}", kernel.name))
        };
        kernels(config).iter().filter_map(check).collect()
    };
    let halves = configs.chunks(configs.len().div_ceil(2));
    let wrong: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            halves.map(|half| scope.spawn(move || half.iter().flat_map(check).collect::<Vec<_>>())).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("runs to its end")).collect()
    });
    println!("{} configs, {} wrong", configs.len(), wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
