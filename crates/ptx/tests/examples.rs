//! The numbered examples: verified, taken by ptxas without spills or warnings, equal to the golden text, and right in the
//! emulator under several interleavings.

use half::bf16;
use ptx::emulate::{Arg, Launch, Memory, Report, emulate};
use ptx::examples::*;
use ptx::{Kernel, assemble, emit, verify};
use rand::{Rng, SeedableRng, rngs::SmallRng};

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn launch(kernel: &Kernel, memory: &mut Memory, grid: [u32; 3], args: Vec<Arg>, seed: u64) -> Report {
    let launch = Launch { grid, args, shared_bytes: kernel.shared_bytes, seed, ..Launch::default() };
    emulate(kernel, memory, &launch).unwrap_or_else(|error| panic!("{error}"))
}

fn kernels() -> Vec<Kernel> {
    vec![
        vector_add(),
        reduction(),
        softmax(),
        gemm_mma(&MmaConfig { stages: 3 }),
        gemm_wgmma(&WgmmaConfig { tile_n: 128, stages: 4 }),
        gemm_persistent(&PersistentConfig::H100),
        gemm_persistent(&PersistentConfig { cluster: 2, ..PersistentConfig::H100 }),
        gemm_persistent(&PersistentConfig { consumers: 3, tile_n: 128, stages: 4, cluster: 1, group: 4 }),
    ]
}

#[test]
fn rules_hold() {
    for kernel in kernels() {
        verify(&kernel).unwrap_or_else(|errors| panic!("{errors}"));
    }
}

#[test]
#[ignore = "needs ptxas: bash tools/ptxas.sh"]
fn ptxas_is_content() {
    for kernel in kernels() {
        let report = assemble(&kernel).unwrap_or_else(|error| panic!("{error}"));
        report.check().unwrap_or_else(|error| panic!("{}: {error}", kernel.name));
        println!("{}: {report:?}", kernel.name);
    }
}

/// The text is part of what reviewers read. `UPDATE_GOLDEN=1 cargo test -p ptx --test examples` writes it anew.
#[test]
fn text_is_golden() {
    for kernel in kernels().iter().take(6) {
        let path = format!("{}/tests/golden/{}.ptx", env!("CARGO_MANIFEST_DIR"), kernel.name);
        let text = emit(kernel);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, &text).expect("golden files can be written");
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        let line = golden.lines().zip(text.lines()).position(|(a, b)| a != b);
        assert!(
            golden == text,
            "{path} differs from what is emitted, first in line {:?}",
            line.map(|l| l + 1)
        );
    }
}

#[test]
fn vector_add_adds() {
    let n = 1000;
    let (a, b) = (random(n, 1), random(n, 2));
    let mut memory = Memory::new();
    let (da, db) = (memory.upload("a", &a), memory.upload("b", &b));
    let dc = memory.alloc("c", 4 * n);
    let args = vec![Arg::Buffer(da, 0), Arg::Buffer(db, 0), Arg::Buffer(dc, 0), Arg::U32(n as u32)];
    launch(&vector_add(), &mut memory, [4, 1, 1], args, 1);
    let c: Vec<f32> = memory.read(dc).expect("every element is written");
    assert!((0..n).all(|i| c[i] == a[i] + b[i]));
}

#[test]
fn reduction_sums() {
    let n = 5003;
    let x = random(n, 3);
    let exact: f64 = x.iter().map(|&x| x as f64).sum();
    for seed in 0..3 {
        let mut memory = Memory::new();
        let (dx, sum) = (memory.upload("x", &x), memory.upload("sum", &[0f32]));
        let args = vec![Arg::Buffer(dx, 0), Arg::Buffer(sum, 0), Arg::U32(n as u32)];
        launch(&reduction(), &mut memory, [3, 1, 1], args, seed);
        let got = memory.read::<f32>(sum).expect("written")[0] as f64;
        assert!((got - exact).abs() < 1e-3, "{got} {exact}");
    }
}

#[test]
fn softmax_of_ragged_rows() {
    for (rows, columns) in [(3, 4), (2, 516), (5, 1024)] {
        let mut x = random(rows * columns, 4);
        x.iter_mut().for_each(|x| *x *= 30.0);
        let mut memory = Memory::new();
        let dx = memory.upload("x", &x);
        let dy = memory.alloc("y", 4 * rows * columns);
        let args = vec![Arg::Buffer(dx, 0), Arg::Buffer(dy, 0), Arg::U32(columns as u32)];
        launch(&softmax(), &mut memory, [rows as u32, 1, 1], args, 5);
        let y: Vec<f32> = memory.read(dy).expect("every element is written");
        for (x, y) in x.chunks(columns).zip(y.chunks(columns)) {
            let most = x.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(x as f64));
            let sum: f64 = x.iter().map(|&x| (x as f64 - most).exp()).sum();
            for (&x, &y) in x.iter().zip(y) {
                let exact = (x as f64 - most).exp() / sum;
                assert!((y as f64 - exact).abs() <= 1e-5 * exact + 1e-9, "{y} {exact}");
            }
        }
    }
}

/// Inputs of a product and its result in f64.
struct Gemm {
    size: [usize; 3],
    a: Vec<bf16>,
    b: Vec<bf16>,
}

impl Gemm {
    fn new([m, n, k]: [usize; 3]) -> Self {
        let round = |x: Vec<f32>| x.into_iter().map(bf16::from_f32).collect();
        Gemm { size: [m, n, k], a: round(random(m * k, 6)), b: round(random(n * k, 7)) }
    }

    /// Runs the kernel on memory that holds a, b and an unwritten c, and compares.
    fn check(
        &self,
        kernel: &Kernel,
        grid: [u32; 3],
        seed: u64,
        args: impl Fn([ptx::emulate::Buffer; 3]) -> Vec<Arg>,
    ) {
        let [m, n, k] = self.size;
        let mut memory = Memory::new();
        let buffers =
            [memory.upload("a", &self.a), memory.upload("b", &self.b), memory.alloc("c", 2 * m * n)];
        let mut args = args(buffers);
        args.extend([m, n, k].map(|x| Arg::U32(x as u32)));
        launch(kernel, &mut memory, grid, args, seed);
        let c: Vec<bf16> = memory.read(buffers[2]).expect("every element is written");
        for i in 0..m {
            for j in 0..n {
                let product = |l: usize| self.a[i * k + l].to_f64() * self.b[j * k + l].to_f64();
                let (exact, got) = ((0..k).map(product).sum::<f64>(), c[i * n + j].to_f64());
                // Half a unit of bf16, and f32 sums.
                assert!((got - exact).abs() <= exact.abs() / 250.0 + 1e-4, "({i}, {j}): {got} {exact}");
            }
        }
    }
}

#[test]
fn gemm_mma_multiplies() {
    for (seed, size) in [[200, 136, 328], [7, 8, 72], [130, 264, 64]].into_iter().enumerate() {
        let [m, n, _] = size.map(|x| (x as u32).div_ceil(128));
        Gemm::new(size).check(&gemm_mma(&MmaConfig { stages: 3 }), [m, n, 1], seed as u64, |[a, b, c]| {
            vec![Arg::Buffer(a, 0), Arg::Buffer(b, 0), Arg::Buffer(c, 0)]
        });
    }
}

#[test]
fn gemm_wgmma_multiplies() {
    let config = WgmmaConfig { tile_n: 96, stages: 3 };
    for (seed, size) in [[200, 136, 328], [7, 8, 72], [130, 264, 64]].into_iter().enumerate() {
        let [m, n, k] = size.map(|x| x as u64);
        let grid = [m.div_ceil(128) as u32, n.div_ceil(96) as u32, 1];
        Gemm::new(size).check(&gemm_wgmma(&config), grid, seed as u64, |[a, b, c]| {
            let [map_a, map_b] = config.tensor_maps(m, n, k);
            vec![Arg::TensorMap(map_a, a, 0), Arg::TensorMap(map_b, b, 0), Arg::Buffer(c, 0)]
        });
    }
}

#[test]
fn gemm_persistent_multiplies() {
    let h100 = PersistentConfig::H100;
    let pairs = PersistentConfig { cluster: 2, ..h100 };
    let alone = PersistentConfig { consumers: 3, tile_n: 128, stages: 4, cluster: 1, group: 2 };
    for (seed, (config, size, blocks)) in [
        (h100, [700, 520, 200], 4),
        (pairs, [700, 520, 200], 4),
        (pairs, [90, 264, 72], 2),
        (alone, [500, 300 - 300 % 8, 136], 3),
    ]
    .into_iter()
    .enumerate()
    {
        let [m, n, k] = size.map(|x| x as u64);
        Gemm::new(size).check(&gemm_persistent(&config), [blocks, 1, 1], seed as u64, |buffers| {
            let maps = config.tensor_maps(m, n, k);
            maps.into_iter().zip(buffers).map(|(map, buffer)| Arg::TensorMap(map, buffer, 0)).collect()
        });
    }
}
