//! On a GPU: `cargo test --release -p flashattn-cuda -- --ignored --nocapture --test-threads 1`. The example kernels,
//! compiled by the driver, give what they should; errors are typed; times are plausible.

use flashattn_cuda::{Arg, Buffer, Device, Error, Launch, Module, Stream, TensorMap, timing};
use half::bf16;
use ptx::examples::*;
use ptx::{Kernel, Target, build};
use rand::{Rng, SeedableRng, rngs::SmallRng};

fn open() -> (Device, Stream) {
    let device = Device::open(0).expect("a GPU");
    let stream = device.stream().expect("a stream");
    (device, stream)
}

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn properties_are_those_of_a_gpu() {
    let (device, _) = open();
    println!("{:?}", device.properties());
    let properties = device.properties();
    assert!(
        !properties.name.is_empty() && properties.l2_bytes > 1 << 20 && properties.memory_bytes > 1 << 30
    );
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn vectors_are_added() {
    let (device, stream) = open();
    let n = 100_003;
    let (a, b) = (random(n, 1), random(n, 2));
    let (da, db) = (device.upload(&stream, &a).expect("a"), device.upload(&stream, &b).expect("b"));
    let c = device.alloc(4 * n).expect("c");
    c.fill(&stream, 0xff).expect("fill");
    let module = Module::load(&device, &vector_add()).expect("compiles");
    println!("{:?} {}", module.attributes(), module.log());
    assert!(module.attributes().registers > 0 && module.attributes().local_bytes == 0);
    let args = [Arg::Buffer(&da, 0), Arg::Buffer(&db, 0), Arg::Buffer(&c, 0), Arg::U32(n as u32)];
    for dependent in [false, true] {
        let launch = Launch { grid: [n.div_ceil(256) as u32, 1, 1], dependent };
        // SAFETY: the kernel reads and writes n elements of buffers of n, which live until `read` has waited.
        unsafe { module.launch(&stream, &launch, &args) }.expect("launches");
    }
    // By the default stream's handle, as a caller would give its own.
    // SAFETY: the default stream always lives.
    let own = unsafe { device.stream_from_raw(device.default_stream().raw()) };
    stream.synchronize().expect("runs");
    let c: Vec<f32> = c.read(&own).expect("reads");
    assert!((0..n).all(|i| c[i] == a[i] + b[i]));
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn wrong_uses_are_refused() {
    let (device, stream) = open();
    let buffer = device.alloc(1024).expect("memory");
    let map = WgmmaConfig { tile_n: 96, stages: 3 }.tensor_maps(64, 64, 64)[0].clone();
    let error = TensorMap::new(&map, &buffer, 0).expect_err("8192 bytes are not in it");
    assert!(matches!(error, Error::Range { bytes: 1024, end: 8192, .. }), "{error}");
    let error = TensorMap::new(&map, &buffer, 8).expect_err("not aligned");
    assert!(matches!(error, Error::TensorMap(_)), "{error}");
    let error = buffer.write(&stream, &[0f32; 257]).expect_err("too long");
    assert!(matches!(error, Error::Range { end: 1028, .. }), "{error}");
    let error = buffer.read::<[u8; 3]>(&stream).expect_err("no whole number");
    assert!(matches!(error, Error::Elements { size: 3, .. }), "{error}");
    let error = device.alloc(1 << 50).expect_err("too much");
    assert!(
        matches!(&error, Error::Driver { call: "cuMemAlloc", name, .. } if name == "CUDA_ERROR_OUT_OF_MEMORY"),
        "{error}"
    );
    let module = Module::load(&device, &vector_add()).expect("compiles");
    // SAFETY: refused before it reaches the GPU.
    let error = unsafe { module.launch(&stream, &Launch::new([1, 1, 1]), &[]) }.expect_err("no arguments");
    assert!(matches!(error, Error::ArgumentCount { got: 0, expected: 4, .. }), "{error}");
    let broken = build("broken", Target::Sm80, 64, |k| k.bar_sync(16, 64));
    let error = Module::load(&device, &broken).expect_err("breaks a rule");
    assert!(matches!(error, Error::Verify(_)), "{error}");
}

/// A product on the GPU: a and b random, c of NaNs.
struct Gemm {
    size: [usize; 3],
    a: Vec<bf16>,
    b: Vec<bf16>,
    buffers: [Buffer; 3],
}

impl Gemm {
    fn new(device: &Device, stream: &Stream, [m, n, k]: [usize; 3]) -> Gemm {
        let round = |x: Vec<f32>| x.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
        let (a, b) = (round(random(m * k, 6)), round(random(n * k, 7)));
        let c = device.alloc(2 * m * n).expect("c");
        c.fill(stream, 0xff).expect("fill");
        let upload = |x: &[bf16]| device.upload(stream, x).expect("memory");
        let buffers = [upload(&a), upload(&b), c];
        Gemm { size: [m, n, k], a, b, buffers }
    }

    fn sizes(&self) -> [Arg<'static>; 3] {
        self.size.map(|x| Arg::U32(x as u32))
    }

    /// Every element of small products, some of large ones.
    fn check(&self, stream: &Stream) {
        let [m, n, k] = self.size;
        let c: Vec<bf16> = self.buffers[2].read(stream).expect("reads");
        assert!(c.iter().all(|x| !x.is_nan()), "not every element is written");
        for at in (0..m * n).step_by((m * n / 100_000).max(1) | 1) {
            let (i, j) = (at / n, at % n);
            let product = |l: usize| self.a[i * k + l].to_f64() * self.b[j * k + l].to_f64();
            let (exact, got) = ((0..k).map(product).sum::<f64>(), c[at].to_f64());
            assert!((got - exact).abs() <= exact.abs() / 250.0 + 1e-3, "({i}, {j}): {got} {exact}");
        }
    }
}

fn report(module: &Module, kernel: &Kernel) {
    println!("{}: {:?}, {} bytes of shared memory", module.name(), module.attributes(), kernel.shared_bytes);
    assert_eq!(module.attributes().local_bytes, 0, "{} spills", module.name());
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn products_by_mma() {
    let (device, stream) = open();
    let kernel = gemm_mma(&MmaConfig { stages: 3 });
    let module = Module::load(&device, &kernel).expect("compiles");
    report(&module, &kernel);
    let gemm = Gemm::new(&device, &stream, [200, 136, 328]);
    let [a, b, c] = &gemm.buffers;
    let [m, n, k] = gemm.sizes();
    let args = [Arg::Buffer(a, 0), Arg::Buffer(b, 0), Arg::Buffer(c, 0), m, n, k];
    // SAFETY: the buffers have the sizes given, and live until `check` has waited.
    unsafe { module.launch(&stream, &Launch::new([2, 2, 1]), &args) }.expect("launches");
    gemm.check(&stream);
}

#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn products_by_wgmma_and_tma() {
    let (device, stream) = open();
    let config = WgmmaConfig { tile_n: 96, stages: 3 };
    let kernel = gemm_wgmma(&config);
    let module = Module::load(&device, &kernel).expect("compiles");
    report(&module, &kernel);
    let gemm = Gemm::new(&device, &stream, [200, 136, 328]);
    let [a, b, c] = &gemm.buffers;
    let maps = config.tensor_maps(200, 136, 328);
    let [a, b] = [(&maps[0], a), (&maps[1], b)].map(|(map, at)| TensorMap::new(map, at, 0).expect("a map"));
    let [m, n, k] = gemm.sizes();
    let args = [Arg::TensorMap(&a), Arg::TensorMap(&b), Arg::Buffer(c, 0), m, n, k];
    // SAFETY: the buffers have the sizes given, and live until `check` has waited.
    unsafe { module.launch(&stream, &Launch::new([2, 2, 1]), &args) }.expect("launches");
    gemm.check(&stream);
}

#[test]
#[ignore = "needs an NVIDIA GPU of the Hopper generation"]
fn products_by_persistent_clusters_and_their_time() {
    let (device, stream) = open();
    let config = PersistentConfig::H100;
    let kernel = gemm_persistent(&config);
    let module = Module::load(&device, &kernel).expect("compiles");
    report(&module, &kernel);
    let blocks = device.properties().multiprocessors / config.cluster * config.cluster;
    for size in [[700, 520, 200], [8192, 8192, 8192]] {
        let gemm = Gemm::new(&device, &stream, size);
        let [m, n, k] = size.map(|x| x as u64);
        let maps = config.tensor_maps(m, n, k);
        let maps: Vec<_> = maps
            .iter()
            .zip(&gemm.buffers)
            .map(|(map, at)| TensorMap::new(map, at, 0).expect("a map"))
            .collect();
        let mut args: Vec<_> = maps.iter().map(Arg::TensorMap).collect();
        args.extend(gemm.sizes());
        let launch = |stream: &Stream| {
            // SAFETY: the buffers have the sizes given, and live until `check` has waited.
            unsafe { module.launch(stream, &Launch::new([blocks, 1, 1]), &args) }
        };
        launch(&stream).expect("launches");
        gemm.check(&stream);
        let cold = timing::cold(&stream, 20, launch).expect("runs");
        let sustained = timing::sustained(&stream, launch).expect("runs");
        let tflops = |ms: f64| 2.0 * (m * n * k) as f64 / ms / 1e9;
        for (regime, timing) in [("cold", cold), ("sustained", sustained)] {
            println!("{size:?} {regime}: {timing:?}, {:.0} TFLOP/s", tflops(timing.median_ms));
            assert!(
                timing.min_ms > 0.0 && timing.min_ms <= timing.median_ms && timing.median_ms <= timing.max_ms
            );
            assert!(tflops(timing.median_ms) < 1100.0, "faster than the hardware");
        }
    }
}
