//! The forward kernel passes the corpus in the emulator, and ptxas takes every config that the corpus asks for.
//!
//! First each case as it is, tensors that TMA cannot take staged by `copy_rows`. What the plan refuses is counted by reason, and
//! no other reason than those named may occur. Then the refused ones of f32 again, as bf16. `CASE=part-of-a-name` runs some
//! of the cases.

mod emulated;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

use emulated::{GRID, copy, failed, refused, with_dropout};
use flashattn_cuda::config::{Extras, FORWARD_SM90, Tiles};
use flashattn_cuda::kernels::{CopyConfig, FwdConfig, MaskKind, copy_rows, flash_fwd_sm90};
use flashattn_cuda::plan::{Argument, Feature, ForwardPlan, PlanError, Strides, Tensor};
use flashattn_cuda::stage::{Layout, Location, StagedPlan};
use flashattn_spec::io::{Device, IoModel, LoopOrder, Pass, Tiling};
use flashattn_spec::mask::Mask;
use flashattn_spec::reference::forward;
use flashattn_spec::score_mod::ScoreMod;
use flashattn_spec::suite::{
    Case, ExecError, Executor, InputKind, Place, Report, Runner, corpus, random_cases,
};
use flashattn_spec::{
    AttentionProblem, DType, Element, GradInputs, Gradients, Inputs, Outputs, View, ViewMut,
};
use half::bf16;
use ptx::Kernel;
use ptx::emulate::{Arg, Launch, Memory, emulate};

/// Runs a problem's forward pass in the emulator.
#[derive(Default)]
struct Emulator {
    /// Instead of the tuning table's choice.
    tiles: Option<Tiles>,
    kernels: Mutex<HashMap<FwdConfig, Arc<Kernel>>>,
    /// Of the last launch: with which config, and what it did.
    last: Mutex<Option<(FwdConfig, ptx::emulate::Report)>>,
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
        // Memory begins as the caller's does in its 16 bytes, so that the addresses' alignment is tested too.
        let offsets = [q, k, v, o].map(|view| view.data().as_ptr().addr() % 16);
        let layout = Layout::new(strides, offsets.map(|offset| offset as u64));
        let staged = StagedPlan::with_tiles(problem, &layout, self.tiles).map_err(refused)?;
        let plan = &staged.forward;
        if plan.tiles == 0 {
            return Ok(());
        }
        let kernel = self.kernel(&plan.config)?;
        let mut memory = Memory::new();
        // Outputs keep what they held, so that the suite sees what was not written, and what should not have been.
        let buffers = [("q", q), ("k", k), ("v", v), ("o", o)].map(|(name, view)| {
            let offset = view.data().as_ptr().addr() % 16;
            let before = vec![T::from_f32(f32::NAN); offset / size_of::<T>()];
            memory.upload(name, &[&before, view.data()].concat())
        });
        let lse_buffer = memory.upload("lse", outputs.lse);
        // Only the first is to be 0.
        let mut words = vec![u32::MAX; plan.counter_bytes() as usize / 4];
        words[0] = 0;
        let counter = memory.upload("counter", &words);
        let sinks = memory.upload("sinks", inputs.sinks.unwrap_or(&[]));
        let uploads: Vec<_> = plan.uploads.iter().map(|up| memory.upload(&up.name, up.bytes())).collect();
        // NaN in the gaps of staged tensors: nothing of them may reach a result.
        let nan = vec![T::from_f32(f32::NAN); staged.workspace as usize / size_of::<T>()];
        let workspace = memory.upload("workspace", &nan);
        let caller = |tensor| match tensor {
            Tensor::Q => (buffers[0], offsets[0] as u64),
            Tensor::K => (buffers[1], offsets[1] as u64),
            Tensor::V => (buffers[2], offsets[2] as u64),
            Tensor::O => (buffers[3], offsets[3] as u64),
            Tensor::Lse => (lse_buffer, 0),
            Tensor::Sinks => (sinks, 0),
            Tensor::Counter => (counter, 0),
            Tensor::Upload(i) => (uploads[i], 0),
        };
        let place = |tensor| match staged.place(tensor) {
            Location::Caller => caller(tensor),
            Location::Workspace(offset) => (workspace, offset),
        };
        let args: Vec<Arg> = plan
            .arguments
            .iter()
            .map(|argument| match argument.clone() {
                Argument::U32(x) => Arg::U32(x),
                Argument::S32(x) => Arg::S32(x),
                Argument::F32(x) => Arg::F32(x),
                Argument::U64(x) => Arg::U64(x),
                Argument::Address(tensor) => Arg::Buffer(place(tensor).0, place(tensor).1),
                Argument::TensorMap(map, tensor) => Arg::TensorMap(map, place(tensor).0, place(tensor).1),
            })
            .collect();
        for step in &staged.before {
            copy(step, &mut memory, caller(step.tensor), place(step.tensor))?;
        }
        let mut hasher = DefaultHasher::new();
        bytemuck::cast_slice::<T, u8>(q.data()).hash(&mut hasher);
        let launch = Launch {
            grid: [plan.grid(GRID), 1, 1],
            args,
            shared_bytes: kernel.shared_bytes,
            seed: hasher.finish(),
            ..Launch::default()
        };
        let report = emulate(&kernel, &mut memory, &launch).map_err(failed)?;
        *self.last.lock().expect("no thread panics with it") = Some((plan.config.clone(), report));
        if memory.read::<u32>(counter).map_err(failed)?[0] != 0 {
            return Err(ExecError::Failed("the tile counter is not back at 0".to_owned()));
        }
        for step in &staged.after {
            copy(step, &mut memory, caller(step.tensor), place(step.tensor))?;
        }
        let o = memory.read::<T>(buffers[3]).map_err(failed)?;
        outputs.o.data_mut().copy_from_slice(&o[offsets[3] / size_of::<T>()..]);
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
        Err(ExecError::Unsupported { feature: "gradients".to_owned() })
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
    let [report, other] = std::thread::scope(|scope| {
        shares
            .map(|share| scope.spawn(move || Runner::new().run(executor, &share)))
            .map(|thread| thread.join().expect("runs to its end"))
    });
    let mut report = report.merge(other);
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
    only(&report, &[Feature::DType, Feature::HeadDim]);
    let f32 = |case: &Case| case.problem.dtype == DType::F32;
    assert!(
        report.skips.iter().filter(|skip| skip.feature.starts_with(Feature::DType.name())).count()
            == cases.iter().filter(|case| f32(case)).count()
    );
    let again: Vec<Case> = cases.into_iter().filter(f32).map(as_bf16).collect();
    let report = run(&executor, &again);
    only(&report, &[Feature::HeadDim]);
}

/// The corpus is too small for the table's rows for many keys, and has each head dimension a few times only: some of its cases on
/// every row.
#[test]
fn every_row_of_the_table_in_the_emulator() {
    let names = [
        "mask/causal",
        "mask/window",
        "growing/",
        "packed/",
        "together/",
        "dropout/",
        "sinks/",
        "not-finite/v",
    ];
    let mut cases = cases();
    cases.retain(|case| {
        names.iter().any(|name| case.name.starts_with(name)) && case.problem.dtype != DType::F32
    });
    let rows = Extras::ALL.map(|extras| extras.rows().iter().map(move |row| (extras, *row)));
    for (i, (extras, tiles)) in rows.into_iter().flatten().enumerate() {
        let fits = |p: &AttentionProblem| {
            let mask = matches!(p.mask, Mask::Custom(_));
            let score_mod = !matches!(p.score_mod, ScoreMod::None);
            p.head_dim.max(p.head_dim_v) <= tiles.head_dim as usize
                && match extras {
                    Extras::None | Extras::Packed => p.dropout.is_none() && !mask && !score_mod,
                    Extras::Score | Extras::ScoreF16 | Extras::Slope => p.dropout.is_none() && !mask,
                    Extras::Mask => p.dropout.is_none() && !score_mod,
                    Extras::Dropout => !mask && !score_mod,
                    Extras::Programs => true,
                }
        };
        let some: Vec<Case> =
            cases.iter().skip(i).step_by(5).filter(|case| fits(&case.problem)).cloned().collect();
        only(&run(&Emulator { tiles: Some(tiles), ..Default::default() }, &some), &[]);
    }
}

/// Rows whose scores run away from the reference that is kept, over more blocks than the corpus has: by slopes far steeper than any
/// model's and of either sign, by keys that grow, and by queries so large that most blocks exceed what f16 holds.
#[test]
fn kept_references_in_the_emulator() {
    let template = corpus().into_iter().find(|case| case.name.starts_with("growing/full"));
    let template = Case { backward: false, ..template.expect("the corpus has growing scores") };
    let mut cases = Vec::new();
    for dtype in [DType::Bf16, DType::F16] {
        for (mask, name) in
            [(Mask::Full, "full"), (Mask::Causal, "causal"), (Mask::window(300, 20), "window")]
        {
            let inputs = [InputKind::Normal, InputKind::Large, InputKind::Growing];
            for (i, input) in inputs.into_iter().enumerate() {
                for alibi in [false, true] {
                    let mut case = template.clone();
                    case.name = format!("{dtype}/{name}/{input:?}/{alibi}");
                    case.problem =
                        AttentionProblem::new(1, 500 + 33 * i, if alibi { 6 } else { 2 }, 64, dtype);
                    case.problem.mask = mask.clone();
                    if alibi {
                        let slopes = [0.004, 0.1, 0.7, 9.0, -0.7, -9.0];
                        case.problem.score_mod = ScoreMod::alibi(&slopes).expect("one for each head");
                    }
                    case.input = input;
                    cases.push(case);
                }
            }
        }
    }
    only(&run(&Emulator::default(), &cases), &[]);
}

/// Short queries of many heads that share their keys and values: rows of one tile.
fn packed_heads() -> Vec<Case> {
    let template = corpus().into_iter().find(|case| case.problem.dtype == DType::Bf16);
    let template = Case { backward: false, ..template.expect("the corpus has bf16") };
    let masks = [
        Mask::Causal,
        Mask::Full,
        Mask::window(90, 3),
        Mask::Local { left: Some(130), right: None },
        Mask::Local { left: None, right: Some(20) },
    ];
    let inputs = [
        InputKind::Normal,
        InputKind::NotFinite(Place::V),
        InputKind::Large,
        InputKind::NotFinite(Place::K),
        InputKind::Growing,
        InputKind::Normal,
        InputKind::NotFinite(Place::Q),
    ];
    let head_dims = [[64, 64], [128, 128], [40, 72], [256, 256], [64, 128], [256, 40], [96, 33], [128, 64]];
    let keys = [300, 37, 517, 1, 128, 0];
    let mut cases = Vec::new();
    for dtype in [DType::Bf16, DType::F16] {
        for group in [2, 4, 8, 16, 64] {
            for queries in [1, 2, 5, 17, 63, 100] {
                let i = cases.len();
                let mut case = template.clone();
                case.seed = i as u64;
                case.input = inputs[i % inputs.len()];
                // Few rows in all, as the reference takes its time.
                let few = group * queries <= 300;
                let (batch, heads_kv) = if few { (1 + i % 2, 1 + i % 3) } else { (1, 1) };
                let p = &mut case.problem;
                let [d, dv] = head_dims[i % head_dims.len()];
                *p = AttentionProblem::new(batch, queries, heads_kv * group, d, dtype);
                (p.heads_kv, p.head_dim_v) = (heads_kv, dv);
                p.seqlen_k = keys[(i + i / 6) % keys.len()];
                p.mask = masks[i % masks.len()].clone();
                case.name = format!("packed heads/{p:?}/{:?}", case.input);
                cases.push(case);
            }
        }
    }
    // Of each warpgroup's rows only the last query sees the last block of 32 keys.
    let mut case = Case { name: "packed heads/hidden blocks".to_owned(), ..template };
    case.problem = AttentionProblem::new(1, 100, 2, 64, DType::Bf16);
    (case.problem.heads_kv, case.problem.seqlen_k, case.problem.mask) = (1, 69, Mask::Causal);
    cases.push(case);
    cases
}

#[test]
fn packed_heads_in_the_emulator() {
    let cases = packed_heads();
    for case in &cases {
        let p = &case.problem;
        let plan = StagedPlan::new(p, &Layout::dense(p)).expect("plans").forward;
        assert_eq!(plan.config.packed_heads as usize, p.group(), "{}", case.name);
    }
    only(&run(&Emulator::default(), &cases), &[]);
    // Tiles of one consumer, and of three, which leave out narrow blocks that they do not see.
    for (consumers, tile_n) in [(1, 128), (3, 32)] {
        let tiles = Tiles { consumers, tile_n, ..FORWARD_SM90[1] };
        let fits = |p: &AttentionProblem| p.head_dim.max(p.head_dim_v) <= 64 && p.heads_q * p.seqlen_q <= 400;
        let some: Vec<Case> = cases.iter().filter(|case| fits(&case.problem)).cloned().collect();
        only(&run(&Emulator { tiles: Some(tiles), ..Default::default() }, &some), &[]);
    }
}

/// What the kernel reads and writes of each tensor is what the IO model counts with the kernel's own tiles, to the byte.
#[test]
fn bytes_are_those_of_the_io_model() {
    let shapes = [
        (2, [300, 300], [4, 2], [64, 64]),
        (1, [130, 517], [3, 1], [128, 72]),
        (1, [700, 260], [2, 2], [256, 96]),
        // Packed heads: a tile in part, and several.
        (1, [5, 300], [8, 2], [64, 64]),
        (2, [3, 300], [16, 1], [128, 72]),
        (1, [63, 300], [16, 2], [64, 64]),
    ];
    let masks = [Mask::Full, Mask::Causal, Mask::window(150, 20), Mask::chunked(128)];
    for (batch, [m, n], [heads, heads_kv], [d, dv]) in shapes {
        for mask in &masks {
            let mut p = AttentionProblem::new(batch, m, heads, d, DType::Bf16);
            (p.heads_kv, p.seqlen_k, p.head_dim_v, p.mask) = (heads_kv, n, dv, mask.clone());
            let tensor = |shape: [usize; 4]| -> Vec<bf16> {
                (0..shape.into_iter().product())
                    .map(|i| bf16::from_f32((i * 37 % 101) as f32 / 50.0 - 1.0))
                    .collect()
            };
            let [q, k, v] = [p.q_shape(), p.k_shape(), p.v_shape()].map(tensor);
            let view = |data, shape| View::new(data, shape).expect("as long as the shape says");
            let inputs = Inputs {
                q: view(&q, p.q_shape()),
                k: view(&k, p.k_shape()),
                v: view(&v, p.v_shape()),
                sinks: None,
            };
            let (mut o, mut lse) = (tensor(p.o_shape()), vec![f32::NAN; p.lse_len()]);
            let o = ViewMut::new(&mut o, p.o_shape()).expect("as long as the shape says");
            let emulator = Emulator::default();
            emulator.forward(&p, &inputs, &mut Outputs { o, lse: &mut lse }).expect("runs");
            let (config, report) =
                emulator.last.into_inner().expect("no thread panicked").expect("was launched");
            let [tile_m, tile_n] = [config.tile_m(), config.tile_n].map(|x| x as usize);
            assert_eq!(config.packed_heads > 1, m < 100 && config.mask != MaskKind::Blocks);
            let tiling = Tiling {
                pack_gqa: config.packed_heads > 1,
                ..Tiling::new(&p, LoopOrder::QOuter, tile_m, tile_n)
            };
            let model = IoModel::flash(&p, &Device::h100(), Pass::Forward, &tiling).expect("a valid problem");
            for name in ["q", "k", "v", "o", "lse"] {
                let (counted, said) = (report.buffers[name], model.tensor(name).expect("the model has it"));
                let counted = [counted.read, counted.written].map(u128::from);
                assert_eq!(
                    counted,
                    [said.read, said.written],
                    "{name}, {mask:?}, {m}x{n}, head_dim {d}, tiles {tile_m}x{tile_n}"
                );
            }
        }
    }
}

/// Products that overflow to −∞ where the first block's scores are sampled, and for other keys do not: these count, whether exp(score)
/// is a number of its own (head 0) or only against a reference (head 1).
#[test]
fn overflow_of_what_is_sampled_in_the_emulator() {
    let [n, heads, d] = [384, 2, 64];
    let problem = AttentionProblem::new(1, n, heads, d, DType::Bf16);
    let shape = problem.q_shape();
    let tensor = |value: &dyn Fn(usize, usize, usize) -> f32| -> Vec<bf16> {
        let at = |i: usize| value(i / (heads * d), i / d % heads, i % d);
        (0..n * heads * d).map(|i| bf16::from_f32(at(i))).collect()
    };
    let q = tensor(&|_, _, c| if c == 0 { 1e20 } else { 1.0 });
    // All even groups of eight keys, from block to block.
    let k = tensor(&|j, head, c| match c {
        0 if j / 8 % 2 == 0 => -3e20,
        1 if head == 1 => -2000.0 - 8.0 * (j / 64) as f32,
        2 => (j % 13) as f32,
        _ => 0.0,
    });
    let v = tensor(&|j, _, c| ((j + 3 * c) % 17) as f32 / 8.0 - (j / 100) as f32);
    let view = |data| View::new(data, shape).expect("as long as the shape says");
    let inputs = Inputs { q: view(&q), k: view(&k), v: view(&v), sinks: None };
    let expected = forward(&problem, &inputs).expect("a valid problem");
    let (mut o, mut lse) = (vec![bf16::NAN; n * heads * d], vec![f32::NAN; problem.lse_len()]);
    let mut outputs =
        Outputs { o: ViewMut::new(&mut o, shape).expect("as long as the shape says"), lse: &mut lse };
    Emulator::default().forward(&problem, &inputs, &mut outputs).expect("runs");
    for (i, (got, want)) in o.iter().zip(&expected.o).enumerate() {
        assert!((f64::from(got.to_f32()) - want).abs() < 0.03, "{i}: {got} instead of {want}");
    }
    for (got, want) in lse.iter().zip(&expected.lse) {
        assert!((f64::from(*got) - want).abs() < 1e-3, "lse {got} instead of {want}");
    }
}

#[test]
fn random_cases_in_the_emulator() {
    let cases: Vec<Case> = random_cases(2026, 200).into_iter().map(as_bf16).collect();
    only(&run(&Emulator::default(), &cases), &[Feature::HeadDim]);
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
    only(&run(&Emulator::default(), &cases), &[Feature::HeadDim]);
}

#[test]
fn dropout_at_every_head_dimension_in_the_emulator() {
    let cases: Vec<Case> = with_dropout(cases()).collect();
    only(&run(&Emulator::default(), &cases), &[Feature::HeadDim]);
}

#[test]
#[ignore = "needs ptxas: bash tools/ptxas.sh"]
fn ptxas_takes_every_copy() {
    for bytes in [2, 4, 8, 16] {
        for add in [None, Some(DType::Bf16), Some(DType::F16), Some(DType::F32).filter(|_| bytes >= 4)] {
            let report = ptx::assemble(&copy_rows(&CopyConfig { bytes, add }));
            report.and_then(|report| report.check()).expect("copies take few registers");
        }
    }
}

/// No spills, no warnings (such as serialised wgmma), for every config that the corpus asks for.
#[test]
#[ignore = "needs ptxas: bash tools/ptxas.sh"]
fn ptxas_takes_every_config() {
    let mut configs = HashSet::new();
    let cases = cases().into_iter().filter(|case| case.problem.dtype != DType::F32);
    for case in cases.chain(with_dropout(self::cases())).chain(packed_heads()) {
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
        // Of many keys tiles are others, of some thousands under a mask, too.
        let [mut some, mut long] = [p.clone(), p.clone()];
        if p.varlen.is_none()
            && matches!(p.mask, Mask::Full | Mask::Causal)
            && matches!(p.score_mod, ScoreMod::None | ScoreMod::SoftCap(_) | ScoreMod::Alibi(_))
        {
            (some.seqlen_k, long.seqlen_k) = (4096, 8192);
        }
        for p in [p, &some, &long] {
            match ForwardPlan::new(p, &strides) {
                Ok(plan) => drop(configs.insert(plan.config)),
                Err(PlanError::Unsupported { feature: Feature::HeadDim, .. }) => {}
                Err(error) => panic!("{}: {error}", case.name),
            }
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
