//! The backward pass on a GPU: `cargo test --release -p flashattn-cuda --test gradients -- --ignored --nocapture --test-threads 1`.

use std::time::Instant;

use cudarc::driver::sys;
use flashattn_cuda::plan::GradTensor;
use flashattn_cuda::stage::GradLayout;
use flashattn_cuda::{
    Backward, BackwardArgs, Buffer, CudaExecutor, Device, DeviceSlice, DeviceView, Error, Forward,
    ForwardArgs, Stream, Workspace,
};
use flashattn_spec::expr::Table;
use flashattn_spec::mask::Mask;
use flashattn_spec::score_mod::ScoreMod;
use flashattn_spec::suite::{Case, Report, Runner, corpus, random_cases};
use flashattn_spec::{AttentionProblem, DType, Dropout};
use half::bf16;
use rand::{Rng, SeedableRng, rngs::SmallRng};

fn open() -> (Device, Stream) {
    let device = Device::open(0).expect("a GPU");
    let stream = device.stream().expect("a stream");
    (device, stream)
}

fn problem(head_dim: usize) -> AttentionProblem {
    let mut p = AttentionProblem::new(2, 1301, 4, head_dim, DType::Bf16);
    (p.heads_kv, p.seqlen_k, p.mask) = (2, 1333, Mask::Causal);
    p
}

/// Dense tensors of a problem on a GPU, o and lse computed.
struct Tensors {
    problem: AttentionProblem,
    /// Of q, k, v, o, do, dq, dk, dv.
    buffers: [Buffer; 8],
    lse: Buffer,
}

impl Tensors {
    fn new(stream: &Stream, p: &AttentionProblem, seed: u64) -> Tensors {
        let device = stream.device();
        let shapes =
            [p.q_shape(), p.k_shape(), p.v_shape(), p.o_shape(), p.o_shape(), p.q_shape(), p.k_shape()];
        let shapes: [[usize; 4]; 8] = std::array::from_fn(|i| *shapes.get(i).unwrap_or(&p.v_shape()));
        let mut rng = SmallRng::seed_from_u64(seed);
        let buffers = shapes.map(|shape| {
            let len = shape.into_iter().product::<usize>();
            let data: Vec<bf16> = (0..len).map(|_| bf16::from_f32(rng.random_range(-2.0..2.0))).collect();
            device.upload(stream, &data).expect("memory")
        });
        let lse = device.alloc(4 * p.lse_len()).expect("memory");
        let tensors = Tensors { problem: p.clone(), buffers, lse };
        let forward = Forward::new(device, p).expect("plans");
        let BackwardArgs { q, k, v, o, lse, .. } = tensors.args();
        forward.run(stream, &ForwardArgs { q, k, v, o, lse, sinks: None }).expect("runs");
        forward.wait(stream).expect("right");
        tensors
    }

    fn args(&self) -> BackwardArgs<'_> {
        let p = &self.problem;
        let view = |i: usize, shape| DeviceView::new(&self.buffers[i], 0, p.dtype, shape).expect("fits");
        BackwardArgs {
            q: view(0, p.q_shape()),
            k: view(1, p.k_shape()),
            v: view(2, p.v_shape()),
            sinks: None,
            o: view(3, p.o_shape()),
            lse: DeviceSlice::new(&self.lse, 0, p.lse_len()).expect("fits"),
            d_o: view(4, p.o_shape()),
            d_lse: None,
            dq: view(5, p.q_shape()),
            dk: view(6, p.k_shape()),
            dv: view(7, p.v_shape()),
            d_sinks: None,
            d_tables: &[],
            accumulate: false,
        }
    }

    /// Bits of dq, dk and dv.
    fn results(&self, stream: &Stream) -> [Vec<u16>; 3] {
        [5, 6, 7].map(|i| self.buffers[i].read(stream).expect("reads"))
    }
}

/// Runs cases on threads, as compiling kernels and asking the oracle take the time; what is refused must begin with one of
/// these.
fn run(deterministic: bool, cases: &[Case], refusals: &[&str]) {
    let shares = cases.chunks(cases.len().div_ceil(14));
    let run = |share| {
        let executor = CudaExecutor::new(open().0);
        Runner::new().run(&if deterministic { executor.deterministic() } else { executor }, share)
    };
    let report = std::thread::scope(|scope| {
        let threads: Vec<_> = shares.map(|share| scope.spawn(move || run(share))).collect();
        let reports = threads.into_iter().map(|thread| thread.join().expect("runs to its end"));
        reports.fold(Report::default(), Report::merge)
    });
    println!("{report}");
    for skip in &report.skips {
        let refused = refusals.iter().any(|reason| skip.feature.starts_with(reason));
        assert!(refused, "{}: {}", skip.name, skip.feature);
    }
    assert!(report.failed == 0 && report.cases == cases.len() && report.passed > cases.len() / 2);
}

fn cases() -> Vec<Case> {
    let mut cases = corpus();
    cases.extend(random_cases(2027, 300));
    cases.retain(|case| case.backward && case.problem.dtype != DType::F32);
    // `CASE=part-of-a-name` runs some of them.
    let filter = std::env::var("CASE").unwrap_or_default();
    cases.retain(|case| case.name.contains(&filter));
    assert!(!cases.is_empty(), "no case is named {filter}");
    cases
}

#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn the_corpus_on_the_gpu() {
    run(false, &cases(), &["head dimension:"]);
}

#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn a_part_of_the_corpus_deterministic() {
    let some: Vec<Case> = cases().into_iter().step_by(4).collect();
    run(true, &some, &["head dimension:"]);
}

/// The same bits in every run, alone and beside another stream's work, and in every thread.
#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn deterministic_runs_give_the_same_bits() {
    let (device, stream) = open();
    let problems = [64, 128, 256].into_iter().flat_map(|head_dim| {
        let plain = problem(head_dim);
        let mut packed = AttentionProblem::new(2, 1000, 3, head_dim, DType::Bf16)
            .with_varlen(&[0, 700, 1000], &[0, 300, 1900]);
        packed.dropout = Some(Dropout { p: 0.2, seed: 5 });
        let full = AttentionProblem { mask: Mask::Full, ..plain.clone() };
        let long = AttentionProblem { seqlen_q: 4111, seqlen_k: 4444, ..plain.clone() };
        [plain, full, long, packed]
    });
    for p in problems {
        let backward = Backward::new(&device, &p, true).expect("plans");
        let tensors = Tensors::new(&stream, &p, 3);
        let once = |stream: &Stream, tensors: &Tensors| {
            backward.run(stream, &tensors.args()).expect("runs");
            backward.wait(stream).expect("right");
            tensors.results(stream)
        };
        let first = once(&stream, &tensors);
        assert!((0..20).all(|_| once(&stream, &tensors) == first), "{p:?}");
        std::thread::scope(|scope| {
            for _ in 0..3 {
                let (once, device, p, first) = (&once, &device, &p, &first);
                scope.spawn(move || {
                    let stream = device.stream().expect("a stream");
                    let tensors = Tensors::new(&stream, p, 3);
                    assert!((0..20).all(|_| once(&stream, &tensors) == *first), "{p:?}");
                });
            }
        });
    }
}

/// Those of tables, too: a slope for each head, to which all pairs add, and a bias by distance, of which the ends have most.
#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn deterministic_gradients_of_tables_have_the_same_bits() {
    let (device, stream) = open();
    for head_dim in [64, 128, 256] {
        let learned = |dims: &[usize]| {
            let data = (0..dims.iter().product()).map(|i: usize| (i as f32).sin() * 0.1).collect();
            Table::f32(dims, data).and_then(Table::with_grad).expect("a table of floats")
        };
        let relative = learned(&[4, 257]);
        let relative = ScoreMod::custom(|s, ix| {
            s + relative[(ix.head, (ix.diagonal() - ix.kv).min(128).max(-128) + 128)]
        });
        let mut p = problem(head_dim);
        p.score_mod = relative.expect("a float").then(ScoreMod::Alibi(learned(&[4])));
        let tensors = Tensors::new(&stream, &p, 3);
        let lens: Vec<usize> = p.grad_tables().iter().map(|table| table.data().len()).collect();
        let buffers: Vec<Buffer> = lens.iter().map(|&len| device.alloc(4 * len).expect("memory")).collect();
        let slices = buffers.iter().zip(&lens).map(|(buffer, &len)| DeviceSlice::new(buffer, 0, len));
        let slices: Vec<_> = slices.collect::<Result<_, _>>().expect("fit");
        let args = BackwardArgs { d_tables: &slices, ..tensors.args() };
        let once = |deterministic| {
            let backward = Backward::new(&device, &p, deterministic).expect("plans");
            backward.run(&stream, &args).expect("runs");
            backward.wait(&stream).expect("right");
            let read = |buffer: &Buffer| buffer.read::<f32>(&stream).expect("reads");
            buffers.iter().flat_map(read).collect::<Vec<f32>>()
        };
        let bits = |sums: Vec<f32>| sums.into_iter().map(f32::to_bits).collect::<Vec<u32>>();
        let first = once(true);
        let largest = first.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-3 * largest;
        assert!(largest > 0.0 && first.iter().zip(&once(false)).all(near), "head_dim {head_dim}");
        let first = bits(first);
        assert!((0..20).all(|_| bits(once(true)) == first), "head_dim {head_dim}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn runs_are_captured_into_graphs() {
    let (device, stream) = open();
    // One that is staged and one that is not; and added up.
    for (head_dim, accumulate) in [(36, false), (64, false), (64, true)] {
        let p = problem(head_dim);
        let backward = Backward::new(&device, &p, true).expect("plans");
        let tensors = Tensors::new(&stream, &p, 1);
        backward.run(&stream, &tensors.args()).expect("runs");
        backward.wait(&stream).expect("right");
        let once = tensors.results(&stream);
        let args = BackwardArgs { accumulate, ..tensors.args() };
        assert_eq!(backward.staged(&args.layout()).expect("plans").is_empty(), head_dim == 64 && !accumulate);
        let capturing = device.stream().expect("a stream");
        backward.prepare(&capturing, &args.layout()).expect("prepares");
        capturing.synchronize().expect("waits");
        let handle: sys::CUstream = capturing.raw().cast();
        let (mut graph, mut executable) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the stream lives; thread-local mode: anything but launches by this thread would fail. (In global mode, too, what
        // other tests' threads do meanwhile.)
        unsafe {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            sys::cuStreamBeginCapture_v2(handle, mode).result().expect("begins");
            backward.run(&capturing, &args).expect("is captured");
            sys::cuStreamEndCapture(handle, &mut graph).result().expect("ends");
            // Graphs are made in the current context; ours are current during calls only.
            let mut context = std::ptr::null_mut();
            sys::cuDevicePrimaryCtxRetain(&mut context, 0).result().expect("the device's context");
            sys::cuCtxSetCurrent(context).result().expect("is made current");
            sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result().expect("instantiates");
        }
        if !accumulate {
            tensors.buffers[5..].iter().for_each(|buffer| buffer.fill(&capturing, 0xff).expect("fills"));
        }
        for _ in 0..3 {
            // SAFETY: instantiated above; its memory lives.
            unsafe { sys::cuGraphLaunch(executable, handle) }.result().expect("launches");
        }
        backward.wait(&capturing).expect("right");
        let wide = |bits: &u16| bf16::from_bits(*bits).to_f32();
        for (got, once) in tensors.results(&capturing).iter().zip(&once) {
            // 1 + 3 times the gradient; of each sum one rounding.
            let near = |(got, once): (&u16, &u16)| match accumulate {
                true => (wide(got) - 4.0 * wide(once)).abs() <= 0.02 * wide(once).abs(),
                false => got == once,
            };
            assert!(got.iter().zip(once).all(near), "head_dim {head_dim}, accumulate {accumulate}");
        }
        // SAFETY: made above, used no more.
        unsafe {
            sys::cuGraphExecDestroy(executable).result().expect("destroys");
            sys::cuGraphDestroy(graph).result().expect("destroys");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn wrong_tensors_are_refused_before_a_launch() {
    let (device, stream) = open();
    let p = problem(64);
    let backward = Backward::new(&device, &p, false).expect("plans");
    let tensors = Tensors::new(&stream, &p, 3);
    let args = tensors.args();
    let before = tensors.results(&stream);
    let raw = |ordinal, address| {
        // SAFETY: refused before any launch.
        let view = unsafe {
            DeviceView::from_raw(ordinal, address, DType::Bf16, args.dk.shape(), args.dk.strides())
        };
        view.expect("a view")
    };
    let refuse = |args: &BackwardArgs<'_>| backward.run(&stream, args).expect_err("refused");
    let error = refuse(&BackwardArgs { dk: raw(0, 0x10), ..args });
    assert!(matches!(error, Error::Pointer { name: "dk", .. }), "{error}");
    let error = refuse(&BackwardArgs { dk: raw(1, args.dk.address()), ..args });
    assert!(matches!(error, Error::OtherDevice { what: "dk", got: 1, .. }), "{error}");
    let error = refuse(&BackwardArgs { dk: raw(0, args.dk.address() + 1), ..args });
    assert!(matches!(error, Error::Misaligned { name: "dk", expected: 2, .. }), "{error}");
    let error = refuse(&BackwardArgs { dv: args.dq, ..args });
    assert!(matches!(error, Error::Problem(_)) && error.to_string().starts_with("dv"), "{error}");
    let error = refuse(&BackwardArgs { d_sinks: Some(args.lse), ..args });
    assert!(error.to_string().starts_with("dsinks"), "{error}");
    let error = refuse(&BackwardArgs { d_tables: &[args.lse], ..args });
    assert!(error.to_string().starts_with("d_tables"), "{error}");
    let small = Workspace::new(device.alloc(256).expect("memory"), &stream).expect("a workspace");
    let expected = backward.workspace_bytes(&args.layout()).expect("plans");
    let error = backward.run_with(&stream, &args, &small).expect_err("too small");
    assert_eq!(error, Error::Workspace { got: 256, expected });
    assert!(tensors.results(&stream) == before);
}

/// One workspace serves the passes of several plans, in turn.
#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn passes_share_a_workspace() {
    let (device, stream) = open();
    let all = [64, 36, 128].map(|head_dim| {
        let p = problem(head_dim);
        let (forward, backward) = (Forward::new(&device, &p), Backward::new(&device, &p, true));
        let tensors = Tensors::new(&stream, &p, 9);
        (forward.expect("plans"), backward.expect("plans"), tensors)
    });
    let most = all
        .iter()
        .map(|(_, backward, tensors)| backward.workspace_bytes(&tensors.args().layout()).expect("plans"));
    let bytes = most.max().expect("three") as usize + (1 << 24);
    let workspace = Workspace::new(device.alloc(bytes).expect("memory"), &stream).expect("a workspace");
    let mut expected = Vec::new();
    for turn in 0..3 {
        for (i, (pass, backward, tensors)) in all.iter().enumerate() {
            let BackwardArgs { q, k, v, o, lse, .. } = tensors.args();
            let args = ForwardArgs { q, k, v, o, lse, sinks: None };
            pass.run_with(&stream, &args, &workspace).expect("runs");
            backward.run_with(&stream, &tensors.args(), &workspace).expect("runs");
            backward.wait(&stream).expect("right");
            match turn {
                0 => expected.push(tensors.results(&stream)),
                _ => assert!(tensors.results(&stream) == expected[i]),
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn memory_and_host_time() {
    let (device, stream) = open();
    let bytes = |n: usize, accumulate: bool| {
        let p = AttentionProblem::new(1, n, 16, 128, DType::Bf16);
        let layout = GradLayout { accumulate, ..GradLayout::dense(&p) };
        let backward = Backward::new(&device, &p, false).expect("plans");
        let staged = backward.staged(&layout).expect("plans");
        assert_eq!(staged.contains(&GradTensor::DQ), accumulate);
        backward.workspace_bytes(&layout).expect("plans")
    };
    let (short, long) = (bytes(4096, false), bytes(16384, false));
    println!(
        "workspace of 16384 queries of 16 heads of 128: {long} bytes; adding up: {}",
        bytes(16384, true)
    );
    assert!(long <= 4 * short);
    let p = problem(64);
    let backward = Backward::new(&device, &p, false).expect("plans");
    let tensors = Tensors::new(&stream, &p, 1);
    let mut best = f64::INFINITY;
    for _ in 0..20 {
        stream.synchronize().expect("waits");
        let start = Instant::now();
        // Few enough that the queue of launches does not fill.
        (0..50).for_each(|_| backward.run(&stream, &tensors.args()).expect("runs"));
        best = best.min(start.elapsed().as_secs_f64() / 50.0);
    }
    println!("host time of a run: {:.2} µs", best * 1e6);
    assert!(best < 25e-6);
}
