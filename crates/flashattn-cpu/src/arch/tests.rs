//! Every operation of every instruction set of this machine, against scalar arithmetic.

use super::Isa;
use crate::gemm::{BLOCK, Depth, Init, Scalars, Vectors};
use crate::simd::Simd;
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

macro_rules! test_isa {
    ($name:ident: $isa:ident, $simd:ty $(, $feature:literal)?) => {
        #[test]
        fn $name() {
            $(#[target_feature(enable = $feature)])?
            fn check() {
                // SAFETY: for all, the CPU has the instructions, as whoever calls `check` has made sure.
                unsafe {
                    arithmetic::<$simd>();
                    reductions::<$simd>();
                    exp2::<$simd>();
                    widening::<$simd>();
                    transpose::<$simd>();
                    product::<$simd>();
                }
            }
            if Isa::available().contains(&Isa::$isa) {
                #[allow(unused_unsafe, reason = "an instruction set without features is safe to use")]
                // SAFETY: the CPU has the instruction set.
                unsafe {
                    check()
                };
            } else {
                println!("not on this CPU: {}", Isa::$isa);
            }
        }
    };
}

test_isa!(scalar: Scalar, super::scalar::Scalar);
#[cfg(target_arch = "aarch64")]
test_isa!(neon: Neon, super::neon::Neon, "neon");
#[cfg(target_arch = "x86_64")]
test_isa!(avx2: Avx2, super::avx2::Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
test_isa!(avx512: Avx512, super::avx512::Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");

const MAX_LANES: usize = 16;

#[inline(always)]
unsafe fn vector<S: Simd>(lane: impl Fn(usize) -> f32) -> S::F {
    let x: [f32; MAX_LANES] = std::array::from_fn(lane);
    // SAFETY: the CPU has S's instructions (so in all of this file); 16 elements are enough for any.
    unsafe { S::load(x.as_ptr()) }
}

#[inline(always)]
unsafe fn lanes<S: Simd>(x: S::F) -> Vec<f32> {
    let mut y = [0.0; MAX_LANES];
    // SAFETY: as above.
    unsafe { S::store(y.as_mut_ptr(), x) };
    y[..S::LANES].to_vec()
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

const VALUES: [f32; 17] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.1,
    -2.7,
    1.0 + f32::EPSILON,
    1e30,
    -1e-30,
    1e-40,
    f32::MIN_POSITIVE,
    f32::MAX,
    f32::MIN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    -f32::NAN,
];

/// All pairs of [`VALUES`], each in every lane.
#[inline(always)]
unsafe fn arithmetic<S: Simd>() {
    let value = |i: usize| VALUES[i % VALUES.len()];
    let n = VALUES.len();
    for (i, j) in (0..n * n).map(|k| (k / n, k % n)) {
        let (a, b, c) = (|l| value(i + l), |l| value(j + 3 * l), |l| value(i + j + l));
        // SAFETY: as above.
        unsafe {
            let (x, y, z) = (vector::<S>(a), vector::<S>(b), vector::<S>(c));
            let check = |name: &str, got: S::F, expected: &dyn Fn(f32, f32, f32) -> [f32; 2]| {
                for (l, got) in lanes::<S>(got).into_iter().enumerate() {
                    let expected = expected(a(l), b(l), c(l));
                    let ok = expected.iter().any(|&e| same(got, e));
                    assert!(ok, "{name}({:e}, {:e}, {:e}) = {got:e}, not {expected:?}", a(l), b(l), c(l));
                }
            };
            check("splat", S::splat(value(i)), &|_, _, _| [value(i); 2]);
            check("add", S::add(x, y), &|a, b, _| [a + b; 2]);
            check("sub", S::sub(x, y), &|a, b, _| [a - b; 2]);
            check("mul", S::mul(x, y), &|a, b, _| [a * b; 2]);
            check("fma", S::fma(x, y, z), &|a, b, c| [a.mul_add(b, c), a * b + c]);
            check("max", S::max(x, y), &|a, b, _| [if a > b { a } else { b }; 2]);
            let expected = |a, b, _| [if a == f32::NEG_INFINITY { b } else { a }; 2];
            check("replace_neg_inf", S::replace_neg_inf(x, y), &expected);
            let greater = (0..S::LANES).any(|l| a(l) > b(l));
            assert_eq!(S::any_gt(x, y), greater, "{:?} > {:?}", lanes::<S>(x), lanes::<S>(y));
        }
    }
}

/// Each lane counts, once.
#[inline(always)]
unsafe fn reductions<S: Simd>() {
    // SAFETY: as above.
    unsafe {
        let powers = S::sum(vector::<S>(|l| (1u32 << l) as f32));
        assert_eq!(powers, ((1u32 << S::LANES) - 1) as f32);
        for lane in 0..S::LANES {
            let one = vector::<S>(|l| if l == lane { 1.0 } else { 0.0 });
            let nan = vector::<S>(|l| if l == lane { f32::NAN } else { 0.0 });
            assert!(S::any_gt(one, S::splat(0.0)) && !S::any_gt(S::splat(0.0), one));
            assert!(!S::any_gt(nan, S::splat(0.0)) && !S::any_gt(S::splat(0.0), nan));
            assert!(S::sum(nan).is_nan());
        }
    }
}

/// At most 2 ulp off; exact at whole numbers; results below the normal range may be 0.
#[inline(always)]
unsafe fn exp2<S: Simd>() {
    let mut worst = 0.0f64;
    let mut check = |x: [f32; MAX_LANES]| {
        // SAFETY: as above.
        let y = unsafe { lanes::<S>(S::exp2(S::load(x.as_ptr()))) };
        for (x, y) in x.into_iter().zip(y) {
            let exact = f64::from(x).exp2();
            if x.is_nan() {
                assert!(y.is_nan(), "2^NaN = {y:e}");
            } else if exact < f64::from(f32::MIN_POSITIVE) {
                let ok = y == 0.0 || (f64::from(y) - exact).abs() <= 2.0 * f64::from(f32::from_bits(1));
                assert!(ok && y.is_sign_positive(), "2^{x:e} = {y:e}, not {exact:e}");
            } else if x >= 128.0 {
                assert_eq!(y, f32::INFINITY, "2^{x:e}");
            } else if x == x.trunc() {
                assert_eq!(f64::from(y), exact, "2^{x:e}");
            } else {
                let ulp = (exact.log2().floor() - 23.0).exp2();
                let error = (f64::from(y) - exact).abs() / ulp;
                assert!(error <= 2.0, "2^{x:e} = {y:e} is {error} ulp off {exact:e}");
                worst = worst.max(error);
            }
        }
    };
    let step = if cfg!(debug_assertions) { 100_003 } else { 10_007 };
    for bits in (0..=u32::MAX - step * MAX_LANES as u32).step_by(step as usize * MAX_LANES) {
        check(std::array::from_fn(|l| f32::from_bits(bits + l as u32 * step)));
    }
    for i in -10_000..9_000 {
        check(std::array::from_fn(|l| (i as f32 + l as f32 / 16.0 + 0.03) / 64.0));
    }
    for x in VALUES {
        check(std::array::from_fn(|l| if l % 2 == 0 { x } else { -0.5 }));
    }
    for n in -300..300 {
        let x = n as f32;
        check(std::array::from_fn(|l| [x, x.next_up(), x.next_down(), x + 0.5][l % 4]));
    }
    // NaNs of any payload.
    for bits in [0x7f80_0001u32, 0x7fc0_01ff, 0xffff_ffff, 0xff80_0001] {
        check([f32::from_bits(bits); MAX_LANES]);
    }
    println!("exp2: {worst:.3} ulp");
}

#[inline(always)]
unsafe fn widening<S: Simd>() {
    let bits: Vec<u16> = (0..=u16::MAX).collect();
    for bits in bits.chunks_exact(S::LANES) {
        // SAFETY: as above; a chunk is a vector of two-byte elements.
        let (h, b) = unsafe {
            let (h, b) = (S::load_f16(bits.as_ptr().cast()), S::load_bf16(bits.as_ptr().cast()));
            (lanes::<S>(h), lanes::<S>(b))
        };
        for ((&bits, h), b) in bits.iter().zip(h).zip(b) {
            assert!(same(h, f16::from_bits(bits).to_f32()), "f16 {bits:#06x}: {h:e}");
            assert!(same(b, bf16::from_bits(bits).to_f32()), "bf16 {bits:#06x}: {b:e}");
        }
    }
    for bits in bits.chunks_exact(2 * S::LANES) {
        // SAFETY: as above; a chunk is two vectors of two-byte elements.
        let pair = unsafe { S::load_bf16_pair(bits.as_ptr().cast()).map(|x| lanes::<S>(x)) };
        for (i, &bits) in bits.iter().enumerate() {
            let got = pair[i % 2][i / 2];
            assert!(same(got, bf16::from_bits(bits).to_f32()), "of a pair, bf16 {bits:#06x}: {got:e}");
        }
    }
}

#[inline(always)]
unsafe fn transpose<S: Simd>() {
    let l = S::LANES;
    for (from, to) in [(l, l), (l + 3, l + 5)] {
        let src: Vec<f32> = (0..l * from).map(|i| i as f32).collect();
        let mut dst = vec![-1.0f32; l * to];
        // SAFETY: as above; both hold LANES rows of at least LANES elements.
        unsafe { S::transpose(src.as_ptr(), from, dst.as_mut_ptr(), to) };
        for (i, &got) in dst.iter().enumerate() {
            let (c, r) = (i / to, i % to);
            assert_eq!(got, if r < l { src[r * from + c] } else { -1.0 }, "column {c}, row {r}");
        }
    }
    let mut block: Vec<f32> = (0..l * l).map(|i| i as f32).collect();
    // SAFETY: as above; both pointers come from the same mutable one.
    unsafe {
        let p = block.as_mut_ptr();
        S::transpose(p, l, p, l);
    }
    for (i, &got) in block.iter().enumerate() {
        assert_eq!(got, (i % l * l + i / l) as f32, "in place, {i}");
    }
    // SAFETY: as above; the block is LANES vectors.
    let sums = unsafe { lanes::<S>(S::sums(block.as_ptr())) };
    for (vector, got) in block.chunks_exact(l).zip(sums) {
        assert_eq!(got, vector.iter().sum::<f32>(), "small whole numbers have an exact sum");
    }
}

/// Every remainder of rows and vectors, both orders of A, gaps everywhere; cells between C's stay untouched.
#[inline(always)]
unsafe fn product<S: Simd>() {
    let l = S::LANES;
    let mut rng = SmallRng::seed_from_u64(5);
    let mut random = |n: usize| (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect::<Vec<_>>();
    let depths = [(0, 1), (1, 1), (17, 1), (5, 3)].map(|(inner, outer)| Depth { inner, outer });
    for (rows, vectors) in (0..=2 * S::ROWS + 1).flat_map(|r| (1..=2 * S::PANEL + 1).map(move |v| (r, v))) {
        for (depth, by_row) in depths.into_iter().flat_map(|d| [(d, true), (d, false)]) {
            let steps = depth.inner * depth.outer;
            let (row, col) = if by_row { (depth.inner + 2, 1) } else { (1, rows + 2) };
            let outer = (rows + 2) * (depth.inner + 2);
            let a = random(outer * depth.outer);
            let b = random(vectors * (steps + 1) * l);
            let alpha = random(vectors * l);
            let before = random((vectors * (rows + 1) * l).max(1));
            let (b_vector, c_vector) = ((steps + 1) * l, (rows + 1) * l);
            for (i, init) in [Init::Zero, Init::Add, Init::Scale(alpha.as_ptr())].into_iter().enumerate() {
                let mut c = before.clone();
                // SAFETY: as above; the strides stay inside the buffers.
                unsafe {
                    S::product(
                        rows,
                        vectors,
                        depth,
                        Scalars { ptr: a.as_ptr(), row, block: BLOCK * row, col, outer },
                        Vectors { ptr: b.as_ptr(), vector: b_vector, row: l },
                        Vectors { ptr: c.as_mut_ptr(), vector: c_vector, row: l },
                        init,
                    );
                }
                for (at, (&got, &before)) in c.iter().zip(&before).enumerate() {
                    let (v, r, lane) = (at / c_vector, at % c_vector / l, at % l);
                    if r == rows {
                        assert_eq!(got, before, "written beyond {rows} rows of {vectors} vectors");
                        continue;
                    }
                    let factor = [0.0, 1.0, f64::from(alpha[v * l + lane])][i];
                    let mut expected = f64::from(before) * factor;
                    for k in 0..steps {
                        let x = a[r * row + k % depth.inner * col + k / depth.inner * outer];
                        expected += f64::from(x) * f64::from(b[v * b_vector + k * l + lane]);
                    }
                    let error = (f64::from(got) - expected).abs();
                    assert!(
                        error < 2e-6,
                        "({r}, {v}, {lane}) of {rows} × {vectors}, {depth:?}, {init:?}: {error:e}"
                    );
                }
            }
        }
    }
}
