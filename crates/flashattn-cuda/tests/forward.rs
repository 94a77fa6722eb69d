//! The forward pass on a GPU: `cargo test --release -p flashattn-cuda --test forward -- --ignored --nocapture --test-threads 1`.

use std::time::Instant;

use cudarc::driver::sys;
use flashattn_cuda::plan::Tensor;
use flashattn_cuda::{
    Buffer, CudaExecutor, Device, DeviceSlice, DeviceView, Error, Forward, ForwardArgs, Stream, Workspace,
};
use flashattn_spec::mask::Mask;
use flashattn_spec::suite::{Report, Runner, corpus, random_cases};
use flashattn_spec::tensor::contiguous_strides;
use flashattn_spec::{AttentionProblem, DType};
use half::bf16;
use rand::{Rng, SeedableRng, rngs::SmallRng};

fn open() -> (Device, Stream) {
    let device = Device::open(0).expect("a GPU");
    let stream = device.stream().expect("a stream");
    (device, stream)
}

fn random(len: usize, seed: u64) -> Vec<bf16> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..len).map(|_| bf16::from_f32(rng.random_range(-2.0..2.0))).collect()
}

fn problem() -> AttentionProblem {
    let mut p = AttentionProblem::new(2, 301, 4, 64, DType::Bf16);
    (p.heads_kv, p.seqlen_k, p.mask) = (2, 333, Mask::Causal);
    p
}

/// Dense tensors of a problem on a GPU.
struct Tensors {
    problem: AttentionProblem,
    /// Of q, k, v, o, lse.
    buffers: [Buffer; 5],
}

impl Tensors {
    fn new(stream: &Stream, p: &AttentionProblem, seed: u64) -> Tensors {
        let device = stream.device();
        let len = |shape: [usize; 4]| shape.into_iter().product::<usize>();
        let upload = |shape, seed| device.upload(stream, &random(len(shape), seed)).expect("memory");
        let (o, lse) = (device.alloc(2 * len(p.o_shape())), device.alloc(4 * p.lse_len()));
        let (o, lse) = (o.expect("memory"), lse.expect("memory"));
        o.fill(stream, 0xff).expect("fill");
        lse.fill(stream, 0xff).expect("fill");
        let [q, k, v] = [p.q_shape(), p.k_shape(), p.v_shape()];
        let buffers = [upload(q, seed), upload(k, seed + 1), upload(v, seed + 2), o, lse];
        Tensors { problem: p.clone(), buffers }
    }

    fn args(&self) -> ForwardArgs<'_> {
        let p = &self.problem;
        let [q, k, v, o, lse] = &self.buffers;
        let view = |buffer, shape| DeviceView::new(buffer, 0, p.dtype, shape).expect("fits");
        let lse = DeviceSlice::new(lse, 0, p.lse_len()).expect("fits");
        let (q, k, v, o) =
            (view(q, p.q_shape()), view(k, p.k_shape()), view(v, p.v_shape()), view(o, p.o_shape()));
        ForwardArgs { q, k, v, o, lse, sinks: None }
    }

    /// Bits of o and lse.
    fn results(&self, stream: &Stream) -> (Vec<u16>, Vec<u32>) {
        (self.buffers[3].read(stream).expect("reads"), self.buffers[4].read(stream).expect("reads"))
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn the_corpus_on_the_gpu() {
    let mut cases = corpus();
    cases.extend(random_cases(2027, 300));
    cases.iter_mut().for_each(|case| case.backward = false);
    // On threads, as compiling kernels and asking the oracle take the time.
    let shares = cases.chunks(cases.len().div_ceil(8));
    let reports: Vec<Report> = std::thread::scope(|scope| {
        let run = |share| scope.spawn(move || Runner::new().run(&CudaExecutor::new(open().0), share));
        let threads: Vec<_> = shares.map(run).collect();
        threads.into_iter().map(|thread| thread.join().expect("runs to its end")).collect()
    });
    let count = |of: fn(&Report) -> usize| reports.iter().map(of).sum::<usize>();
    let (passed, failed) = (count(|report| report.passed), count(|report| report.failed));
    println!("{passed} passed, {failed} failed, {} refused", count(|report| report.skipped));
    for skip in reports.iter().flat_map(|report| &report.skips) {
        let refused = ["dtype: f32", "head dimension:"].iter().any(|reason| skip.feature.starts_with(reason));
        assert!(refused, "{}: {}", skip.name, skip.feature);
    }
    let failures: Vec<_> = reports.iter().flat_map(|report| &report.failures).collect();
    assert!(failed == 0 && count(|report| report.cases) == cases.len(), "{failures:#?}");
    assert!(passed > cases.len() / 2);
}

#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn threads_and_streams_share_a_plan() {
    let (device, stream) = open();
    let p = problem();
    let forward = Forward::new(&device, &p).expect("plans");
    let alone = |seed| {
        let tensors = Tensors::new(&stream, &p, seed);
        forward.run(&stream, &tensors.args()).expect("runs");
        forward.wait(&stream).expect("right");
        tensors.results(&stream)
    };
    let expected = [10, 20, 30, 40].map(alone);
    std::thread::scope(|scope| {
        for (expected, seed) in expected.iter().zip([10, 20, 30, 40]) {
            let (device, forward, p) = (&device, &forward, &p);
            scope.spawn(move || {
                let stream = device.stream().expect("a stream");
                let tensors = Tensors::new(&stream, p, seed);
                for _ in 0..200 {
                    forward.run(&stream, &tensors.args()).expect("runs");
                }
                forward.wait(&stream).expect("right");
                assert!(tensors.results(&stream) == *expected, "another result beside other streams");
            });
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn runs_are_captured_into_graphs() {
    let (device, stream) = open();
    // One that is staged and one that is not.
    for head_dim in [36, 64] {
        let mut p = problem();
        (p.head_dim, p.head_dim_v) = (head_dim, head_dim);
        let forward = Forward::new(&device, &p).expect("plans");
        let (first, second) = (Tensors::new(&stream, &p, 1), Tensors::new(&stream, &p, 5));
        let args = first.args();
        assert_eq!(forward.staged(&args.layout()).expect("plans").is_empty(), head_dim == 64);
        forward.run(&stream, &second.args()).expect("runs");
        let capturing = device.stream().expect("a stream");
        forward.prepare(&capturing, &args.layout()).expect("prepares");
        capturing.synchronize().expect("waits");
        let handle: sys::CUstream = capturing.raw().cast();
        let (mut graph, mut executable) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the stream lives; thread-local mode: anything but launches by this thread would fail. (In global mode, too, what
        // other tests' threads do meanwhile.)
        unsafe {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            sys::cuStreamBeginCapture_v2(handle, mode).result().expect("begins");
            forward.run(&capturing, &args).expect("is captured");
            sys::cuStreamEndCapture(handle, &mut graph).result().expect("ends");
            // Graphs are made in the current context; ours are current during calls only.
            let mut context = std::ptr::null_mut();
            sys::cuDevicePrimaryCtxRetain(&mut context, 0).result().expect("the device's context");
            sys::cuCtxSetCurrent(context).result().expect("is made current");
            sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result().expect("instantiates");
        }
        // The graph reads what is in the tensors when it runs.
        for (to, from) in first.buffers.iter().zip(&second.buffers).take(3) {
            to.write(&stream, &from.read::<u16>(&stream).expect("reads")).expect("writes");
        }
        for _ in 0..3 {
            // SAFETY: instantiated above; its memory lives.
            unsafe { sys::cuGraphLaunch(executable, handle) }.result().expect("launches");
        }
        forward.wait(&capturing).expect("right");
        assert!(first.results(&capturing) == second.results(&stream));
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
    let p = problem();
    let forward = Forward::new(&device, &p).expect("plans");
    let tensors = Tensors::new(&stream, &p, 3);
    let args = tensors.args();
    let host = vec![bf16::ZERO; args.q.shape().into_iter().product()];
    let strides = contiguous_strides(args.q.shape());
    // SAFETY: refused before any launch.
    let raw = |ordinal, address, shape| unsafe {
        DeviceView::from_raw(ordinal, address, DType::Bf16, shape, strides).expect("a view")
    };
    let refuse = |q| forward.run(&stream, &ForwardArgs { q, ..args }).expect_err("refused");
    let error = refuse(raw(0, host.as_ptr().addr() as u64, args.q.shape()));
    assert!(matches!(error, Error::Pointer { name: "q", .. }), "{error}");
    let error = refuse(raw(0, 0x10, args.q.shape()));
    assert!(matches!(error, Error::Pointer { name: "q", .. }), "{error}");
    let error = refuse(raw(1, args.q.address(), args.q.shape()));
    assert!(matches!(error, Error::OtherDevice { what: "q", got: 1, .. }), "{error}");
    let error = refuse(raw(0, args.q.address() + 1, args.q.shape()));
    assert!(matches!(error, Error::Misaligned { name: "q", expected: 2, .. }), "{error}");
    let error = refuse(raw(0, args.q.address(), [2, 300, 4, 64]));
    assert!(matches!(error, Error::Problem(_)), "{error}");
    let small = Workspace::new(device.alloc(256).expect("memory"), &stream).expect("a workspace");
    let room = device.alloc(tensors.buffers[0].bytes() + 2).expect("memory");
    let q = DeviceView::new(&room, 2, p.dtype, p.q_shape()).expect("fits");
    let shifted = ForwardArgs { q, ..args };
    let expected = forward.workspace_bytes(&shifted.layout()).expect("plans");
    let error = forward.run_with(&stream, &shifted, &small).expect_err("too small");
    assert_eq!(error, Error::Workspace { got: 256, expected });
    // What was refused has changed nothing.
    forward.run_with(&stream, &args, &small).expect("runs");
    forward.wait(&stream).expect("right");
    assert!(tensors.results(&stream).1.iter().all(|&bits| bits != u32::MAX));
}

/// q and o whose second sequence begins beyond 2³¹ elements, taken in place and staged, give what dense ones give.
#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn offsets_beyond_31_bits() {
    let (device, stream) = open();
    for (head_dim, staged) in [(64, vec![]), (36, vec![Tensor::Q, Tensor::K, Tensor::V])] {
        let mut p = problem();
        (p.head_dim, p.head_dim_v) = (head_dim, head_dim);
        let forward = Forward::new(&device, &p).expect("plans");
        let tensors = Tensors::new(&stream, &p, 8);
        forward.run(&stream, &tensors.args()).expect("runs");
        let expected = tensors.results(&stream);
        let sequence = expected.0.len() / 2;
        let far = (1usize << 31) + 8;
        let [q_far, o_far] =
            [(); 2].map(|()| device.alloc(2 * (far + sequence)).expect("8 GB of device memory"));
        let q: Vec<u16> = tensors.buffers[0].read(&stream).expect("reads");
        q_far.write_at(&stream, 0, &q[..sequence]).expect("writes");
        q_far.write_at(&stream, 2 * far as u64, &q[sequence..]).expect("writes");
        let strides = |shape| {
            let [_, n, h, d] = contiguous_strides(shape);
            [far, n, h, d]
        };
        let view = |buffer, shape| {
            DeviceView::with_strides(buffer, 0, p.dtype, shape, strides(shape)).expect("fits")
        };
        let args =
            ForwardArgs { q: view(&q_far, p.q_shape()), o: view(&o_far, p.o_shape()), ..tensors.args() };
        assert_eq!(forward.staged(&args.layout()).expect("plans"), staged);
        forward.run(&stream, &args).expect("runs");
        forward.wait(&stream).expect("right");
        let mut got = vec![0u16; 2 * sequence];
        let (first, second) = got.split_at_mut(sequence);
        o_far.read_at(&stream, 0, first).expect("reads");
        o_far.read_at(&stream, 2 * far as u64, second).expect("reads");
        assert!(got == expected.0);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn host_time_of_a_run() {
    let (device, stream) = open();
    let p = problem();
    let start = Instant::now();
    let forward = Forward::new(&device, &p).expect("plans");
    println!("plan and kernel: {:?} (CUDA_CACHE_DISABLE=1: cold)", start.elapsed());
    let start = Instant::now();
    drop(Forward::new(&device, &p).expect("plans"));
    println!("again, in the same process: {:?}", start.elapsed());
    let sets = [Tensors::new(&stream, &p, 1), Tensors::new(&stream, &p, 2)];
    for changing in [false, true] {
        let mut best = f64::INFINITY;
        for _ in 0..20 {
            stream.synchronize().expect("waits");
            let start = Instant::now();
            // Few enough that the queue of launches does not fill.
            for i in 0..100 {
                forward.run(&stream, &sets[usize::from(changing) * (i % 2)].args()).expect("runs");
            }
            best = best.min(start.elapsed().as_secs_f64() / 100.0);
        }
        println!(
            "host time of a run, addresses {}: {:.2} µs",
            ["same", "other"][usize::from(changing)],
            best * 1e6
        );
        assert!(best < 10e-6);
    }
}
