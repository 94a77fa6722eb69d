//! The backward kernels pass the corpus in the emulator, and ptxas takes every config that the corpus asks for.
//!
//! o and lse come from the oracle. Tensors that the kernels cannot take are staged by `copy_rows`, and f32 cases run as bf16;
//! what is refused then is refused for its head dimension. `CASE=part-of-a-name` runs some cases.

mod emulated;

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

use emulated::{GRID, copy, failed, refused, with_dropout};
use flashattn_cuda::kernels::{BwdConfig, flash_bwd_sm90, flash_bwd_sm90_preprocess, flash_bwd_sm90_queries};
use flashattn_cuda::plan::{Argument, BackwardPlan, Feature, GradStrides, GradTensor, PlanError, Strides};
use flashattn_cuda::stage::{GradLayout, Location, StagedBackward};
use flashattn_spec::expr::Table;
use flashattn_spec::mask::Mask;
use flashattn_spec::reference;
use flashattn_spec::score_mod::ScoreMod;
use flashattn_spec::suite::{Case, ExecError, Executor, Report, Runner, corpus, random_cases};
use flashattn_spec::{
    AttentionProblem, DType, Dropout, Element, GradInputs, Gradients, Inputs, Outputs, View, ViewMut, philox,
};
use half::bf16;
use ptx::Kernel;
use ptx::emulate::{Arg, Launch, Memory, emulate};
use rand::{Rng, SeedableRng, rngs::SmallRng};

/// The kernels of a config, in the order of their launches.
type Kernels = Arc<[Kernel; 3]>;

/// Runs a problem's backward pass in the emulator.
#[derive(Default)]
struct Emulator {
    kernels: Mutex<HashMap<BwdConfig, Kernels>>,
    deterministic: bool,
    /// Adds to what the gradients hold.
    accumulate: bool,
    /// Another interleaving of the warps.
    seed: u64,
}

fn kernels(config: &BwdConfig) -> [Kernel; 3] {
    [flash_bwd_sm90_preprocess(config), flash_bwd_sm90(config), flash_bwd_sm90_queries(config)]
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
        let written = [&gradients.dq, &gradients.dk, &gradients.dv].map(|view| view.as_view());
        let views: [View<'_, T>; 8] = std::array::from_fn(|i| if i < 5 { read[i] } else { written[i - 5] });
        let [q, k, v, o, d_o, dq, dk, dv] = views.map(|view| view.strides());
        let strides = GradStrides { forward: Strides { q, k, v, o }, d_o, dq, dk, dv };
        // Memory begins as the caller's does in its 16 bytes, so that the addresses' alignment is tested too.
        let offsets = views.map(|view| view.data().as_ptr().addr() as u64 % 16);
        let layout = GradLayout {
            d_lse: given.d_lse.is_some(),
            accumulate: self.accumulate,
            ..GradLayout::new(strides, offsets)
        };
        let staged = StagedBackward::new(problem, &layout, self.deterministic).map_err(refused)?;
        let plan = &staged.backward;
        let kernels = self.kernels(&plan.config)?;
        let mut memory = Memory::new();
        let mut buffers = HashMap::new();
        let tensors = [G::Q, G::K, G::V, G::O, G::DO, G::DQ, G::DK, G::DV];
        // Outputs keep what they held, so that the suite sees what was not written, and what should not have been.
        for ((tensor, view), offset) in tensors.into_iter().zip(views).zip(offsets) {
            let before = vec![T::from_f32(f32::NAN); offset as usize / size_of::<T>()];
            let buffer = memory.upload(&format!("{tensor:?}"), &[&before, view.data()].concat());
            buffers.insert(tensor, (buffer, offset));
        }
        let floats = [
            (G::Lse, Some(given.lse)),
            (G::DLse, given.d_lse),
            (G::Sinks, inputs.sinks),
            (G::DSinks, gradients.d_sinks.as_deref()),
        ];
        let tables = gradients.d_tables.iter().enumerate().map(|(i, table)| (G::DTable(i), Some(&**table)));
        for (tensor, data) in floats.into_iter().chain(tables) {
            let data = data.unwrap_or(&[]);
            let zeros = vec![0f32; data.len()];
            let data = if plan.zeroed.contains(&tensor) { &zeros } else { data };
            buffers.insert(tensor, (memory.upload(&format!("{tensor:?}"), data), 0));
        }
        // NaN in the gaps of staged tensors: nothing of them may reach a result.
        let mut words = vec![u32::MAX; staged.workspace as usize / 4];
        for &(tensor, bytes) in plan.workspace.iter().filter(|(tensor, _)| plan.zeroed.contains(tensor)) {
            let Location::Workspace(offset) = staged.place(tensor) else { continue };
            words[offset as usize / 4..][..bytes / 4].fill(0);
        }
        let workspace = memory.upload("workspace", &words);
        for (i, up) in plan.uploads.iter().enumerate() {
            buffers.insert(G::Upload(i), (memory.upload(&up.name, up.bytes()), 0));
        }
        buffers.insert(G::Counter, (memory.upload("counter", &[0u32]), 0));
        let place = |tensor: GradTensor| match staged.place(tensor) {
            Location::Caller => buffers[&tensor],
            Location::Workspace(offset) => (workspace, offset),
        };
        let args = plan.arguments.iter().map(|argument| match argument.clone() {
            Argument::U32(x) => Arg::U32(x),
            Argument::S32(x) => Arg::S32(x),
            Argument::F32(x) => Arg::F32(x),
            Argument::U64(x) => Arg::U64(x),
            Argument::Address(tensor) => Arg::Buffer(place(tensor).0, place(tensor).1),
            Argument::TensorMap(map, tensor) => Arg::TensorMap(map, place(tensor).0, place(tensor).1),
        });
        let args: Vec<Arg> = args.collect();
        for step in &staged.before {
            copy(step, &mut memory, buffers[&step.tensor], place(step.tensor))?;
        }
        let mut hasher = DefaultHasher::new();
        (self.seed, bytemuck::cast_slice::<T, u8>(inputs.q.data())).hash(&mut hasher);
        let grids = plan.grids(GRID);
        for (kernel, grid) in kernels.iter().zip(grids).filter(|&(_, grid)| grid > 0) {
            let launch = Launch {
                grid: [grid, 1, 1],
                args: args.clone(),
                shared_bytes: kernel.shared_bytes,
                seed: hasher.finish(),
                ..Launch::default()
            };
            emulate(kernel, &mut memory, &launch).map_err(failed)?;
        }
        if memory.read::<u32>(buffers[&G::Counter].0).map_err(failed)? != [0] {
            return Err(ExecError::Failed("the counter of items is not back at 0".to_owned()));
        }
        for step in &staged.after {
            copy(step, &mut memory, buffers[&step.tensor], place(step.tensor))?;
        }
        let results = [&mut gradients.dq, &mut gradients.dk, &mut gradients.dv];
        for (tensor, view) in [G::DQ, G::DK, G::DV].into_iter().zip(results) {
            let (buffer, offset) = buffers[&tensor];
            let data = memory.read::<T>(buffer).map_err(failed)?;
            view.data_mut().copy_from_slice(&data[offset as usize / size_of::<T>()..]);
        }
        if let Some(d_sinks) = &mut gradients.d_sinks {
            d_sinks.copy_from_slice(&memory.read::<f32>(buffers[&G::DSinks].0).map_err(failed)?);
        }
        for (i, table) in gradients.d_tables.iter_mut().enumerate() {
            table.copy_from_slice(&memory.read::<f32>(buffers[&G::DTable(i)].0).map_err(failed)?);
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
fn run(executor: &(impl Executor + Sync), cases: &[Case]) -> Report {
    let mut shares = [Vec::new(), Vec::new()];
    cases.iter().enumerate().for_each(|(i, case)| shares[i % 2].push(case.clone()));
    let [report, other] = std::thread::scope(|scope| {
        shares
            .map(|share| scope.spawn(move || Runner::new().run(executor, &share)))
            .map(|thread| thread.join().expect("runs to its end"))
    });
    let report = report.merge(other);
    println!("{report}");
    assert!(report.failed == 0 && report.cases == cases.len());
    let allowed = |feature: &str| feature.starts_with(Feature::HeadDim.name());
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

#[test]
fn dropout_at_every_head_dimension_in_the_emulator() {
    let cases: Vec<Case> = with_dropout(cases()).collect();
    run(&Emulator::default(), &cases);
    run(&Emulator { deterministic: true, ..Emulator::default() }, &cases);
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
            let numbers =
                gradients.d_sinks.iter().map(|x| &**x).chain(gradients.d_tables.iter().map(|x| &**x));
            (bytes, numbers.map(|x| x.iter().map(|x| x.to_bits()).collect()).collect::<Vec<Vec<u32>>>())
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
    // Every kind of option; and of each a part, since blocks that wait for each other are emulated on one thread; but all that learn
    // tables.
    cases.retain(|case| !too_wide(case));
    let learns = |case: &Case| !case.problem.grad_tables().is_empty();
    let part = cases.iter().enumerate().filter(|&(i, case)| i % 5 == 0 || learns(case));
    let mut chosen: Vec<Case> = part.map(|(_, case)| case.clone()).collect();
    // Tables learn what is not finite, too.
    for case in cases.iter().filter(|case| case.name.starts_with("not-finite")).step_by(3) {
        let mut case = case.clone();
        case.name += "/learned";
        case.problem.score_mod = every_spread(&case.problem);
        chosen.push(case);
    }
    let report = run(&Twice(Emulator { deterministic: true, ..Emulator::default() }), &chosen);
    assert!(report.all_passed());
}

/// A score mod that learns four tables, whose elements differ from pair to pair, by query, by key, and by head alone.
fn every_spread(p: &AttentionProblem) -> ScoreMod {
    let (h, m, n) = (p.heads_q, p.seqlen_q, p.seqlen_k);
    let learned = |dims: &[usize]| {
        let data = (0..dims.iter().product()).map(|i: usize| (i as f32 * 0.7).sin() * 0.3).collect();
        Table::f32(dims, data).and_then(Table::with_grad).expect("dimensions that fit the data")
    };
    let relative = learned(&[h, 33]);
    let relative =
        ScoreMod::custom(|s, ix| s + relative[(ix.head, (ix.diagonal() - ix.kv).min(16).max(-16) + 16)]);
    ScoreMod::Chain(vec![
        relative.expect("a float"),
        ScoreMod::bias(learned(&[1, h, m, 1])),
        ScoreMod::bias(learned(&[1, 1, 1, n])),
        ScoreMod::Alibi(learned(&[h])),
    ])
}

/// Gradients of tables, as a deterministic plan computes them, of dense q, k, v and dO.
fn table_gradients(p: &AttentionProblem, data: &[Vec<bf16>; 4], seed: u64) -> Vec<Vec<f32>> {
    let shapes = [p.q_shape(), p.k_shape(), p.v_shape(), p.o_shape()];
    let [q, k, v, d_o] = [0, 1, 2, 3].map(|i| View::new(&data[i], shapes[i]).expect("dense"));
    let inputs = Inputs { q, k, v, sinks: None };
    let mut tensors = shapes.map(|shape| vec![bf16::ZERO; shape.into_iter().product()]);
    let mut lse = vec![0.0; p.lse_len()];
    let emulator = Emulator { deterministic: true, seed, ..Emulator::default() };
    let [dq, dk, dv, o] = &mut tensors;
    let view = ViewMut::new(o, shapes[3]).expect("dense");
    emulator.forward(p, &inputs, &mut Outputs { o: view, lse: &mut lse }).expect("runs");
    let given = GradInputs { o: View::new(o, shapes[3]).expect("dense"), lse: &lse, d_o, d_lse: None };
    let mut tables: Vec<Vec<f32>> =
        p.grad_tables().iter().map(|table| vec![0.0; table.data().len()]).collect();
    let mut gradients = Gradients {
        dq: ViewMut::new(dq, shapes[0]).expect("dense"),
        dk: ViewMut::new(dk, shapes[1]).expect("dense"),
        dv: ViewMut::new(dv, shapes[2]).expect("dense"),
        d_sinks: None,
        d_tables: tables.iter_mut().map(|table| &mut **table).collect(),
    };
    emulator.backward(p, &inputs, &given, &mut gradients).expect("runs");
    tables
}

/// Three sequences that differ in dO alone: huge, minus the same, and tiny. What is left is the tiny one's gradient to the last bit.
#[test]
fn gradients_of_tables_cancel_exactly_in_deterministic_plans() {
    let rng = &mut SmallRng::seed_from_u64(8);
    for head_dim in [64, 128] {
        let mut one = AttentionProblem::new(1, 150, 2, head_dim, DType::Bf16);
        (one.seqlen_k, one.heads_kv, one.mask) = (170, 1, Mask::Causal);
        one.score_mod = every_spread(&one);
        let mut three = one.clone();
        three.batch = 3;
        let mut draw = |shape: [usize; 4], scale: f32| -> Vec<bf16> {
            let len = shape.into_iter().product();
            (0..len).map(|_| bf16::from_f32(rng.random_range(-1.0..1.0f32) * scale)).collect()
        };
        let [q, k, v] = [one.q_shape(), one.k_shape(), one.v_shape()].map(|shape| draw(shape, 1.0));
        let huge = draw(one.o_shape(), 2f32.powi(100));
        let minus = huge.iter().map(|&x| -x).collect();
        let tiny = draw(one.o_shape(), 2f32.powi(-100));
        let bits = |tables: Vec<Vec<f32>>| tables.concat().into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let alone = bits(table_gradients(&one, &[q.clone(), k.clone(), v.clone(), tiny.clone()], 0));
        assert!(alone.iter().any(|&bits| bits != 0));
        let thrice = [q, k, v].map(|x| x.repeat(3));
        let [q, k, v] = thrice;
        let all = [q, k, v, [huge, minus, tiny].concat()];
        for seed in 0..3 {
            assert!(bits(table_gradients(&three, &all, seed)) == alone, "head_dim {head_dim}, seed {seed}");
        }
    }
}

/// Each pass a second time, added to what the gradients then hold; the first one's results are left.
struct Adding(Emulator);

/// Elements of the views, and the numbers.
fn values<T: Element>(gradients: &Gradients<T>) -> Vec<f32> {
    let views = [&gradients.dq, &gradients.dk, &gradients.dv].map(|view| view.as_view());
    let rows = views.iter().flat_map(|view| rows(view.shape()).flat_map(|[i, j, k]| view.row(i, j, k)));
    let numbers = gradients.d_sinks.iter().flat_map(|x| x.iter());
    rows.map(|x| x.to_f32())
        .chain(numbers.copied())
        .chain(gradients.d_tables.iter().flat_map(|x| x.iter().copied()))
        .collect()
}

/// Sets what [`values`] gives.
fn set<T: Element>(gradients: &mut Gradients<T>, values: &[f32]) {
    let mut values = values.iter();
    let mut next = || *values.next().expect("as many as there are");
    for view in [&mut gradients.dq, &mut gradients.dk, &mut gradients.dv] {
        for [i, j, k] in rows(view.shape()) {
            view.row_mut(i, j, k).iter_mut().for_each(|x| *x = T::from_f32(next()));
        }
    }
    let numbers = gradients.d_sinks.iter_mut().flat_map(|x| x.iter_mut());
    numbers.for_each(|x| *x = next());
    gradients.d_tables.iter_mut().flat_map(|x| x.iter_mut()).for_each(|x| *x = next());
}

impl Executor for Adding {
    fn device(&self) -> String {
        format!("{}, added up", self.0.device())
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
        self.0.backward(problem, inputs, given, gradients)?;
        let plain = values(gradients);
        let old: Vec<f32> = (0..plain.len()).map(|i| (i as f32 * 0.37).sin()).collect();
        set(gradients, &old);
        Emulator { accumulate: true, deterministic: self.0.deterministic, ..Emulator::default() }
            .backward(problem, inputs, given, gradients)?;
        let sums = values(gradients);
        set(gradients, &plain);
        // Orders of sums differ from run to run: a rounding of the gradient, one of the sum, one of what was there.
        let near = |((sum, plain), old): ((&f32, &f32), &f32)| {
            let allowed = 2.0 * problem.dtype.epsilon() as f32 * (plain.abs() + old.abs()) + 1e-4;
            let expected = plain + old;
            sum.is_nan() && expected.is_nan() || *sum == expected || (sum - expected).abs() <= allowed
        };
        match sums.iter().zip(&plain).zip(&old).position(|all| !near(all)) {
            None => Ok(()),
            Some(at) => {
                let (plain, old, sum) = (plain[at], old[at], sums[at]);
                Err(ExecError::Failed(format!("element {at}: {plain} added to {old} gives {sum}")))
            }
        }
    }
}

#[test]
fn gradients_are_added_to_what_is_there() {
    let mut cases: Vec<Case> = cases().into_iter().filter(|case| case.problem.dtype != DType::F32).collect();
    cases.retain(|case| !too_wide(case));
    let learning = cases.iter().filter(|case| !case.problem.grad_tables().is_empty()).step_by(4);
    let exact: Vec<Case> = learning.cloned().collect();
    let adding = Adding(Emulator { deterministic: true, ..Emulator::default() });
    assert!(run(&adding, &exact).all_passed());
    let cases: Vec<Case> = cases.into_iter().step_by(13).collect();
    let report = Runner::new().run(&Adding(Emulator::default()), &cases);
    println!("{report}");
    assert!(report.all_passed());
    let has = |what: fn(&AttentionProblem) -> bool| cases.iter().any(|case| what(&case.problem));
    assert!(has(|p| p.sinks) && has(|p| !p.grad_tables().is_empty()) && has(|p| p.dtype == DType::F16));
}

/// A query drops the only key whose dO·v is infinite, and nothing of that reaches its gradients or the key's.
#[test]
fn what_is_dropped_overflows_in_the_emulator() {
    for (d, deterministic) in [(64, false), (64, true), (256, false)] {
        overflow_of_what_is_dropped(d, deterministic);
    }
}

fn overflow_of_what_is_dropped(d: usize, deterministic: bool) {
    let (n, seed, p) = (160, 5, 0.5);
    let mut problem = AttentionProblem::new(1, n, 1, d, DType::Bf16);
    problem.dropout = Some(Dropout { p, seed });
    let (i, j) = (100, (0..n).rfind(|&j| !philox::keep(seed, 0, 0, 100, j as u32, p)).expect("drops half"));
    let tensor = |turn: f32, huge: Option<usize>| -> Vec<bf16> {
        let value = |at: usize| if huge == Some(at) { 1e20 } else { (at as f32 * turn).sin() };
        (0..n * d).map(|at| bf16::from_f32(value(at))).collect()
    };
    let [q, k, v, d_o] = [(0.71, None), (0.37, None), (1.3, Some(j * d)), (0.53, Some(i * d))]
        .map(|(turn, huge)| tensor(turn, huge));
    let shape = problem.q_shape();
    let view = |data| View::new(data, shape).expect("as long as the shape says");
    let inputs = Inputs { q: view(&q), k: view(&k), v: view(&v), sinks: None };
    let forward = reference::forward(&problem, &inputs).expect("a valid problem");
    let o: Vec<bf16> = forward.o.iter().map(|&x| bf16::from_f64(x)).collect();
    let lse: Vec<f32> = forward.lse.iter().map(|&x| x as f32).collect();
    let given = GradInputs { o: view(&o), lse: &lse, d_o: view(&d_o), d_lse: None };
    let expected = reference::backward(&problem, &inputs, view(&d_o), None).expect("a valid problem");
    let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![bf16::NAN; n * d]);
    let [dq_view, dk_view, dv_view] =
        [&mut dq, &mut dk, &mut dv].map(|x| ViewMut::new(x, shape).expect("as long"));
    let mut gradients =
        Gradients { dq: dq_view, dk: dk_view, dv: dv_view, d_sinks: None, d_tables: Vec::new() };
    let emulator = Emulator { deterministic, ..Default::default() };
    emulator.backward(&problem, &inputs, &given, &mut gradients).expect("runs");
    for (name, got, want) in [("dq", dq, expected.dq), ("dk", dk, expected.dk), ("dv", dv, expected.dv)] {
        for (row, (got, want)) in got.chunks(d).zip(want.chunks(d)).enumerate() {
            let most = want.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            for (&got, want) in got.iter().zip(want) {
                let error = (got.to_f64() - want).abs();
                assert!(error <= 0.05 * most + 0.01, "{name}, row {row}: {got} instead of {want}");
            }
        }
    }
}

/// So many keys that dQ is added up at head_dim above 64, too: of these the corpus has none.
fn of_many_keys() -> Vec<Case> {
    let template = cases().into_iter().find(|case| case.name.starts_with("head-dim/"));
    let template = template.unwrap_or_else(|| cases().remove(0));
    let new = |dtype, [m, n]: [usize; 2], [d, dv]: [usize; 2], mask| {
        let mut p = AttentionProblem::new(1, m, 2, d, dtype);
        (p.seqlen_k, p.heads_kv, p.head_dim_v, p.mask) = (n, 1, dv, mask);
        p
    };
    let problems = [
        new(DType::Bf16, [130, 530], [128, 128], Mask::Full),
        new(DType::F16, [150, 1100], [96, 128], Mask::Causal),
        new(DType::Bf16, [100, 1100], [111, 111], Mask::Causal),
        new(DType::Bf16, [70, 1100], [128, 72], Mask::window(600, 40)),
        new(DType::Bf16, [1, 1], [128, 128], Mask::Full).with_varlen(&[0, 33, 100], &[0, 520, 1101]),
    ];
    let named = |(i, problem)| Case { name: format!("many-keys/{i}"), problem, ..template.clone() };
    problems.into_iter().enumerate().map(named).collect()
}

#[test]
fn many_keys_in_the_emulator() {
    let cases = of_many_keys();
    assert!(cases.iter().all(|case| !plan(case, false).expect("plans").config.own_dq));
    run(&Emulator::default(), &cases);
}

/// So many that blocks of keys take turns in a deterministic plan: several blocks of queries, and of keys that wait for each other.
fn in_turns() -> Vec<Case> {
    let template = of_many_keys().remove(0);
    let new = |[m, n]: [usize; 2], [d, dv]: [usize; 2], mask| {
        let mut p = AttentionProblem::new(1, m, 2, d, DType::Bf16);
        (p.seqlen_k, p.heads_kv, p.head_dim_v, p.mask) = (n, 1, dv, mask);
        p
    };
    let mut dropped = new([140, 1090], [72, 80], Mask::Full);
    dropped.dropout = Some(Dropout { p: 0.3, seed: 3 });
    let mut sinks = new([300, 1100], [64, 40], Mask::Full);
    (sinks.sinks, sinks.dtype) = (true, DType::F16);
    let problems = [
        new([270, 1150], [64, 64], Mask::Full),
        new([90, 1100], [111, 111], Mask::Full),
        new([600, 4200], [64, 64], Mask::Causal),
        new([410, 4130], [128, 72], Mask::Causal),
        // Some sequences are empty, some shorter than a block.
        new([1, 1], [64, 64], Mask::Causal)
            .with_varlen(&[0, 170, 170, 190, 500], &[0, 4100, 4150, 4160, 4530]),
        dropped,
        sinks,
    ];
    let named = |(i, problem)| Case { name: format!("turns/{i}"), problem, ..template.clone() };
    problems.into_iter().enumerate().map(named).collect()
}

#[test]
fn turns_in_the_emulator() {
    let cases = in_turns();
    assert!(cases.iter().all(|case| plan(case, true).expect("plans").config.turns));
    let emulator = || Emulator { deterministic: true, ..Emulator::default() };
    assert!(run(&Twice(emulator()), &cases).all_passed());
    // What is told begins at zero there, too.
    assert!(run(&Adding(emulator()), &cases[..2]).all_passed());
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
    let cases = cases().into_iter().filter(|case| case.problem.dtype != DType::F32);
    for case in cases.chain(with_dropout(self::cases())).chain(of_many_keys()).chain(in_turns()) {
        // Of f16, which differs in the types of a few instructions, what has neither mask program nor score mod.
        let few = |config: &BwdConfig| config.mask_program.is_none() && config.score_mod.is_none();
        // Of deterministic plans those with sums or turns that others do not have.
        for deterministic in [false, true] {
            match plan(&case, deterministic) {
                Ok(plan) if case.problem.dtype == DType::F16 && !few(&plan.config) => {}
                Ok(plan) if deterministic && plan.config.table_grads.is_empty() && !plan.config.turns => {}
                Ok(plan) => drop(configs.insert(plan.config)),
                Err(PlanError::Unsupported { feature: Feature::HeadDim, .. }) => {}
                Err(error) => panic!("{}: {error}", case.name),
            }
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
