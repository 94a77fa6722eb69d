//! The ptx crate's numbered examples on a GPU: each checked against plain Rust at a ragged size, then timed at a large
//! one, whose result is checked too.
//!
//! `cargo run --release -p flashattn-cuda --example levels [OUT.json]`. Regime: back-to-back launches of 150 ms on random
//! inputs, median of three loops. Peers in the same regime: `benches/peers/gpu_gemm.py`.

use flashattn_cuda::{Arg, Buffer, Device, Launch, Module, Stream, TensorMap, timing};
use half::bf16;
use ptx::Kernel;
use ptx::examples::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let device = Device::open(0)?;
    let gpu = Gpu { stream: device.stream()?, device };
    let rows = [
        gpu.vector_add()?,
        gpu.reduction()?,
        gpu.softmax()?,
        gpu.gemm_mma()?,
        gpu.gemm_wgmma()?,
        gpu.gemm_persistent()?,
    ];
    let properties = gpu.device.properties();
    let report =
        json!({ "device": properties.name, "driver": properties.driver.to_string(), "levels": rows });
    if let Some(path) = std::env::args().nth(1) {
        std::fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}

struct Gpu {
    device: Device,
    stream: Stream,
}

/// What a level's figure counts.
enum Work {
    Bytes(f64),
    Flops(f64),
}

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

impl Gpu {
    /// Compiles, launches on NaN-filled outputs, lets `check` look, and times.
    fn level(
        &self,
        level: u32,
        kernel: &Kernel,
        grid: [u32; 3],
        args: &[Arg<'_>],
        work: Work,
        check: impl Fn() -> Result<(), Failure>,
    ) -> Result<Value, Failure> {
        let module = Module::load(&self.device, kernel)?;
        let launch = |stream: &Stream| {
            // SAFETY: each caller's arguments have the sizes that its kernel's documentation asks for, and live until
            // the stream has been waited for by the checks' reads.
            unsafe { module.launch(stream, &Launch::new(grid), args) }
        };
        launch(&self.stream)?;
        check()?;
        let timing = timing::sustained(&self.stream, launch)?;
        let (figure, unit) = match work {
            Work::Bytes(bytes) => (bytes / timing.median_ms / 1e6, "GB/s"),
            Work::Flops(flops) => (flops / timing.median_ms / 1e9, "TFLOP/s"),
        };
        let attributes = module.attributes();
        println!(
            "level {level} {:<16} {:9.4} ms {figure:7.0} {unit}, {} registers, {} bytes spilled",
            kernel.name, timing.median_ms, attributes.registers, attributes.local_bytes
        );
        Ok(
            json!({ "level": level, "kernel": kernel.name, "ms": timing.median_ms, "figure": figure, "unit": unit,
                   "registers": attributes.registers, "local_bytes": attributes.local_bytes }),
        )
    }

    fn vector_add(&self) -> Result<Value, Failure> {
        let n = 100_000_003;
        let (a, b) = (random(n, 1), random(n, 2));
        let (da, db) = (self.device.upload(&self.stream, &a)?, self.device.upload(&self.stream, &b)?);
        let c = self.unwritten(4 * n)?;
        let args = [Arg::Buffer(&da, 0), Arg::Buffer(&db, 0), Arg::Buffer(&c, 0), Arg::U32(n as u32)];
        let grid = [n.div_ceil(256) as u32, 1, 1];
        self.level(1, &vector_add(), grid, &args, Work::Bytes(12.0 * n as f64), || {
            let c: Vec<f32> = c.read(&self.stream)?;
            agree((0..n).all(|i| c[i] == a[i] + b[i]))
        })
    }

    fn reduction(&self) -> Result<Value, Failure> {
        let n = 100_000_003;
        let x = random(n, 3);
        let dx = self.device.upload(&self.stream, &x)?;
        let sum = self.device.upload(&self.stream, &[0f32])?;
        let blocks = self.device.properties().multiprocessors * 8;
        let args = [Arg::Buffer(&dx, 0), Arg::Buffer(&sum, 0), Arg::U32(n as u32)];
        self.level(2, &reduction(), [blocks, 1, 1], &args, Work::Bytes(4.0 * n as f64), || {
            let got = f64::from(sum.read::<f32>(&self.stream)?[0]);
            let exact: f64 = x.iter().map(|&x| f64::from(x)).sum();
            agree((got - exact).abs() < 1.0)
        })
    }

    fn softmax(&self) -> Result<Value, Failure> {
        let (rows, columns) = (10_007, 4_100);
        let x = random(rows * columns, 4);
        let dx = self.device.upload(&self.stream, &x)?;
        let y = self.unwritten(4 * rows * columns)?;
        let args = [Arg::Buffer(&dx, 0), Arg::Buffer(&y, 0), Arg::U32(columns as u32)];
        let work = Work::Bytes(8.0 * (rows * columns) as f64);
        self.level(3, &softmax(), [rows as u32, 1, 1], &args, work, || {
            let y: Vec<f32> = y.read(&self.stream)?;
            for (x, y) in x.chunks(columns).zip(y.chunks(columns)) {
                let sum: f64 = x.iter().map(|&x| f64::from(x).exp()).sum();
                let close = |(&x, &y): (&f32, &f32)| {
                    let exact = f64::from(x).exp() / sum;
                    (f64::from(y) - exact).abs() <= 1e-5 * exact
                };
                agree(x.iter().zip(y).all(close))?;
            }
            Ok(())
        })
    }

    fn gemm_mma(&self) -> Result<Value, Failure> {
        let kernel = gemm_mma(&MmaConfig { stages: 3 });
        let run = |size: [usize; 3]| {
            let gemm = Gemm::new(self, size)?;
            let mut args = gemm.buffers.each_ref().map(|buffer| Arg::Buffer(buffer, 0)).to_vec();
            args.extend(gemm.sizes());
            let grid = [size[0].div_ceil(128) as u32, size[1].div_ceil(128) as u32, 1];
            self.level(4, &kernel, grid, &args, gemm.work(), || gemm.check(&self.stream))
        };
        run([1111, 2056, 968])?;
        run([8192; 3])
    }

    fn gemm_wgmma(&self) -> Result<Value, Failure> {
        let config = WgmmaConfig { tile_n: 128, stages: 4 };
        let kernel = gemm_wgmma(&config);
        let run = |size: [usize; 3]| {
            let gemm = Gemm::new(self, size)?;
            let maps = gemm.maps(&config.tensor_maps(size[0] as u64, size[1] as u64, size[2] as u64))?;
            let mut args: Vec<_> = maps.iter().map(Arg::TensorMap).collect();
            args.push(Arg::Buffer(&gemm.buffers[2], 0));
            args.extend(gemm.sizes());
            let grid = [size[0].div_ceil(128) as u32, size[1].div_ceil(128) as u32, 1];
            self.level(5, &kernel, grid, &args, gemm.work(), || gemm.check(&self.stream))
        };
        run([1111, 2056, 968])?;
        run([8192; 3])
    }

    fn gemm_persistent(&self) -> Result<Value, Failure> {
        let config = PersistentConfig::H100;
        let kernel = gemm_persistent(&config);
        let blocks = self.device.properties().multiprocessors / config.cluster * config.cluster;
        let run = |size: [usize; 3]| {
            let gemm = Gemm::new(self, size)?;
            let maps = gemm.maps(&config.tensor_maps(size[0] as u64, size[1] as u64, size[2] as u64))?;
            let mut args: Vec<_> = maps.iter().map(Arg::TensorMap).collect();
            args.extend(gemm.sizes());
            self.level(6, &kernel, [blocks, 1, 1], &args, gemm.work(), || gemm.check(&self.stream))
        };
        run([1111, 2056, 968])?;
        run([8192; 3])
    }

    /// A buffer of NaNs.
    fn unwritten(&self, bytes: usize) -> Result<Buffer, Failure> {
        let buffer = self.device.alloc(bytes)?;
        buffer.fill(&self.stream, 0xff)?;
        Ok(buffer)
    }
}

fn agree(holds: bool) -> Result<(), Failure> {
    if holds { Ok(()) } else { Err("the GPU's result differs from plain Rust's".into()) }
}

/// A product: a (m × k) and b (n × k) random, c (m × n) of NaNs.
struct Gemm {
    size: [usize; 3],
    a: Vec<bf16>,
    b: Vec<bf16>,
    buffers: [Buffer; 3],
}

impl Gemm {
    fn new(gpu: &Gpu, size: [usize; 3]) -> Result<Gemm, Failure> {
        let [m, n, k] = size;
        let round = |x: Vec<f32>| x.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
        let (a, b) = (round(random(m * k, 6)), round(random(n * k, 7)));
        let upload = |x: &[bf16]| gpu.device.upload(&gpu.stream, x);
        let buffers = [upload(&a)?, upload(&b)?, gpu.unwritten(2 * m * n)?];
        Ok(Gemm { size, a, b, buffers })
    }

    fn maps(&self, maps: &[ptx::TensorMap]) -> Result<Vec<TensorMap>, Failure> {
        maps.iter().zip(&self.buffers).map(|(map, buffer)| Ok(TensorMap::new(map, buffer, 0)?)).collect()
    }

    fn sizes(&self) -> [Arg<'static>; 3] {
        self.size.map(|x| Arg::U32(x as u32))
    }

    fn work(&self) -> Work {
        Work::Flops(self.size.iter().map(|&x| x as f64).product::<f64>() * 2.0)
    }

    /// That every element was written; the value of some 20,000, spread over the whole.
    fn check(&self, stream: &Stream) -> Result<(), Failure> {
        let [m, n, k] = self.size;
        let c: Vec<bf16> = self.buffers[2].read(stream)?;
        agree(c.iter().all(|x| !x.is_nan()))?;
        for at in (0..m * n).step_by((m * n / 20_000).max(1) | 1) {
            let (i, j) = (at / n, at % n);
            let product = |l: usize| self.a[i * k + l].to_f64() * self.b[j * k + l].to_f64();
            let (exact, got) = ((0..k).map(product).sum::<f64>(), c[at].to_f64());
            agree((got - exact).abs() <= exact.abs() / 250.0 + 1e-3)?;
        }
        Ok(())
    }
}
