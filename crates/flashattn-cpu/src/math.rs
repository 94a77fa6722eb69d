//! `exp2`, `log2` and `tanh` of an f32 without branches, so that a loop over them becomes vector instructions of
//! whatever instruction set its caller is compiled for.
//!
//! All follow IEEE 754: NaN stays NaN, ±∞ and ±0 give the limits. The polynomials are our own minimax fits.
//! `L` is the number of lanes of the caller's vectors; it tells whether there is a fused multiply-add.

use std::f32::consts::{LN_2, LOG2_E};

/// a · b + c, fused where the instruction set that goes with `L` has it; elsewhere `f32::mul_add` would be a
/// call into the C library.
#[inline(always)]
pub(crate) fn mul_add<const L: usize>(a: f32, b: f32, c: f32) -> f32 {
    if L >= 8 || cfg!(target_arch = "aarch64") { a.mul_add(b, c) } else { a * b + c }
}

/// Σ coefficients\[k\] · x^k.
#[inline(always)]
fn polynomial<const L: usize, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = coefficients[N - 1];
    for k in (0..N - 1).rev() {
        sum = mul_add::<L>(sum, x, coefficients[k]);
    }
    sum
}

/// 2^n.
#[inline(always)]
fn power(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) << 23) as u32)
}

/// 2^x = p · 2^n with p about 1, for |x| < 2²².
#[inline(always)]
fn exp2_parts<const L: usize>(x: f32) -> (f32, i32) {
    // Adding 1.5 · 2²³ leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x + ROUND;
    let r = x - (shifted - ROUND);
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    // 2^r − 1 = r · P(r) on [−1/2, 1/2], relative error 2e−9.
    let p = polynomial::<L, 7>(
        r,
        [1.0, LN_2, 0.240_226_48, 0.055_503_324, 0.009_618_437, 0.001_339_887_5, 0.000_153_533_62],
    );
    (p, n)
}

/// 2^x. At most 1 ulp off where the result is normal; subnormal results are rounded, not flushed.
#[inline(always)]
pub(crate) fn exp2<const L: usize>(x: f32) -> f32 {
    // Comparisons let a NaN pass.
    let x = if x < -152.0 { -152.0 } else { x };
    let x = if x > 129.0 { 129.0 } else { x };
    let (p, n) = exp2_parts::<L>(x);
    // In two steps, since 2^n alone may be outside the range of normal numbers.
    let half = n >> 1;
    p * power(half) * power(n.wrapping_sub(half))
}

/// log₂ x. At most 2 ulp off.
#[inline(always)]
pub(crate) fn log2<const L: usize>(x: f32) -> f32 {
    // Subnormals are first scaled by 2²⁴.
    let small = x < f32::MIN_POSITIVE;
    let bits = (if small { x * 16_777_216.0 } else { x }).to_bits() as i32;
    // x = 2^n · m with m in [√½, √2).
    let n = bits.wrapping_sub(0x3f35_04f3) >> 23;
    let m = f32::from_bits(bits.wrapping_sub(n << 23) as u32);
    let n = n.wrapping_sub(if small { 24 } else { 0 }) as f32;
    // ln(1 + f) = f − f²/2 + f³ · P(f), relative error 6e−9.
    let f = m - 1.0;
    let p = polynomial::<L, 8>(
        f,
        [
            0.333_333_3,
            -0.250_008_2,
            0.200_012_27,
            -0.166_233_57,
            0.142_017_57,
            -0.131_601_83,
            0.127_615_78,
            -0.076_344_974,
        ],
    );
    let square = f * f;
    let tail = mul_add::<L>(f * square, p, -0.5 * square);
    // (f + tail) · log₂ e, the whole part of log₂ e apart: f itself is exact.
    const FRACTION: f32 = LOG2_E - 1.0;
    let log = mul_add::<L>(f, FRACTION, tail * FRACTION) + tail + f + n;
    let log = if x < f32::INFINITY { log } else { x };
    let log = if x == 0.0 { f32::NEG_INFINITY } else { log };
    if x < 0.0 { f32::NAN } else { log }
}

/// tanh x. At most 2 ulp off, odd, never beyond ±1.
#[inline(always)]
pub(crate) fn tanh<const L: usize>(x: f32) -> f32 {
    // Beyond this the result rounds to ±1. A comparison lets a NaN pass.
    const LIMIT: f32 = 9.1;
    let magnitude = x.abs();
    let a = if magnitude > LIMIT { LIMIT } else { magnitude };
    // a + a³ · P(a²) below 0.55, relative error 1e−9.
    let y = a * a;
    let p =
        polynomial::<L, 5>(y, [-0.333_333_2, 0.133_325_87, -0.053_852_388, 0.021_072_024, -0.006_274_758]);
    let small = mul_add::<L>(a * y, p, a);
    // Beyond, 1 − 2 / (1 + e²ᵃ), where an error of the exponential hardly counts.
    let (p, n) = exp2_parts::<L>(a * (2.0 * LOG2_E));
    let large = 1.0 - 2.0 / mul_add::<L>(p, power(n), 1.0);
    (if a < 0.55 { small } else { large }).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in units of the last place of the exact value (of the smallest normal below the normal range).
    fn ulps(got: f32, exact: f64) -> f64 {
        let exponent = (exact.abs().log2().floor()).max(-126.0);
        (f64::from(got) - exact).abs() / (exponent - 23.0).exp2()
    }

    /// Every `step`-th f32 of both signs.
    fn sweep(step: usize, mut check: impl FnMut(f32)) {
        for bits in (0..=f32::INFINITY.to_bits()).step_by(step) {
            check(f32::from_bits(bits));
            check(-f32::from_bits(bits));
        }
    }

    fn check<const L: usize>(tolerance: [f64; 3]) {
        let step = if cfg!(debug_assertions) { 1009 } else { 251 };
        let mut worst = [0.0f64; 3];
        let mut see = |i: usize, x: f32, got: f32, exact: f64| {
            let rounded = exact as f32;
            // Where the exact value overflows or is zero or NaN, so must ours; at the edge one ulp is allowed.
            let same = got == rounded || got.is_nan() && rounded.is_nan();
            let error = if same { 0.0 } else { ulps(got, exact) };
            assert!(error <= tolerance[i], "function {i} of {x:e}: {got:e} is {error} ulp off {exact:e}");
            worst[i] = worst[i].max(error);
        };
        sweep(step, |x| {
            see(0, x, exp2::<L>(x), f64::from(x).exp2());
            see(1, x, log2::<L>(x), f64::from(x).log2());
            see(2, x, tanh::<L>(x), f64::from(x).tanh());
        });
        // Denser where attention works: scores of moderate size.
        for i in -400_000..400_000 {
            let x = i as f32 * 3.7e-5;
            see(0, x, exp2::<L>(x), f64::from(x).exp2());
            see(1, x, log2::<L>(x), f64::from(x).log2());
            see(2, x, tanh::<L>(x), f64::from(x).tanh());
        }
        println!("L = {L}: worst errors in ulp of exp2, log2, tanh: {worst:?}");
    }

    #[test]
    fn accurate_with_fused_multiply_add() {
        check::<16>([1.0, 2.0, 2.0]);
    }

    #[test]
    fn accurate_without_fused_multiply_add() {
        check::<4>([1.5, 2.5, 2.0]);
    }

    #[test]
    fn special_values() {
        assert_eq!(exp2::<16>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp2::<16>(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp2::<16>(0.0), 1.0);
        for n in -149..128 {
            assert_eq!(exp2::<16>(n as f32), f64::from(n).exp2() as f32);
        }
        assert_eq!(log2::<16>(0.0), f32::NEG_INFINITY);
        assert_eq!(log2::<16>(-0.0), f32::NEG_INFINITY);
        assert_eq!(log2::<16>(f32::INFINITY), f32::INFINITY);
        assert!(log2::<16>(-1e-40).is_nan() && log2::<16>(f32::NEG_INFINITY).is_nan());
        for n in -149..128 {
            assert_eq!(log2::<16>(f64::from(n).exp2() as f32), n as f32);
        }
        assert_eq!(tanh::<16>(f32::INFINITY), 1.0);
        assert_eq!(tanh::<16>(f32::NEG_INFINITY), -1.0);
        assert!(tanh::<16>(-0.0).is_sign_negative());
        for f in [exp2::<16>, log2::<16>, tanh::<16>] {
            assert!(f(f32::NAN).is_nan() && f(-f32::NAN).is_nan());
        }
    }
}
