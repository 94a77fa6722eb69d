//! NEON (aarch64, where every CPU has it): 32 registers of 4 lanes; the tile of 3 vectors × 8 rows keeps 24
//! accumulators.

use super::EXP2;
use crate::simd::Simd;
use std::arch::aarch64::*;
use std::arch::asm;

/// The NEON instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Neon;

impl Simd for Neon {
    const LANES: usize = 4;
    const PANEL: usize = 3;
    const ROWS: usize = 8;
    type F = float32x4_t;

    crate::simd::compile_large!("neon");

    #[inline(always)]
    unsafe fn splat(x: f32) -> float32x4_t {
        // SAFETY: the CPU has NEON (contract of `Simd`); so for every block in this file.
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> float32x4_t {
        // SAFETY: as above; `p` is valid for 4 elements.
        unsafe { vld1q_f32(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: float32x4_t) {
        // SAFETY: as above; `p` is valid for 4 elements.
        unsafe { vst1q_f32(p, x) }
    }
    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: as above.
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: as above.
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: as above.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: as above.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: as above. Not FMAX, which also keeps a NaN of `a`.
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    unsafe fn exp2(x: float32x4_t) -> float32x4_t {
        // SAFETY: as above.
        unsafe {
            // FMIN keeps NaN. At 128 the fraction is 0 and the exponent that of infinity.
            let x = vminq_f32(x, vdupq_n_f32(128.0));
            // NaN becomes 0.
            let n = vcvtnq_s32_f32(x);
            let r = vsubq_f32(x, vcvtq_f32_s32(n));
            let mut p = vdupq_n_f32(EXP2[0]);
            for c in &EXP2[1..] {
                p = vfmaq_f32(vdupq_n_f32(*c), p, r);
            }
            // p · 2^n by its exponent: exact where the result is normal; below, also for −∞, it is flushed.
            let y = vreinterpretq_u32_s32(vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32::<23>(n)));
            let tiny = vcltq_f32(x, vdupq_n_f32(-126.0));
            vreinterpretq_f32_u32(vbicq_u32(y, tiny))
        }
    }
    #[inline(always)]
    unsafe fn any_gt(a: float32x4_t, b: float32x4_t) -> bool {
        // SAFETY: as above.
        unsafe { vmaxvq_u32(vcgtq_f32(a, b)) != 0 }
    }
    #[inline(always)]
    unsafe fn replace_neg_inf(x: float32x4_t, y: float32x4_t) -> float32x4_t {
        // SAFETY: as above.
        unsafe { vbslq_f32(vceqq_f32(x, vdupq_n_f32(f32::NEG_INFINITY)), y, x) }
    }
    #[inline(always)]
    unsafe fn sum(x: float32x4_t) -> f32 {
        // SAFETY: as above.
        unsafe { vaddvq_f32(x) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const half::f16) -> float32x4_t {
        // SAFETY: as above; `p` is valid for 4 elements of two bytes. FCVTL only reads and writes the registers
        // named; its intrinsic works on `f16`, which stable Rust does not have.
        unsafe {
            let narrow = vld1_u16(p.cast());
            let wide: float32x4_t;
            asm!(
                "fcvtl {wide:v}.4s, {narrow:v}.4h",
                wide = lateout(vreg) wide,
                narrow = in(vreg) narrow,
                options(pure, nomem, nostack, preserves_flags),
            );
            wide
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const half::bf16) -> float32x4_t {
        // SAFETY: as above; `p` is valid for 4 elements of two bytes. A bf16 is the upper half of an f32.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(p: *const half::bf16) -> [float32x4_t; 2] {
        // SAFETY: as above; `p` is valid for 8 elements of two bytes. The lower half of each word is the even one.
        unsafe {
            let both = vreinterpretq_u32_u16(vld1q_u16(p.cast()));
            let odd = vandq_u32(both, vdupq_n_u32(0xffff_0000));
            [vreinterpretq_f32_u32(vshlq_n_u32::<16>(both)), vreinterpretq_f32_u32(odd)]
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const f32) {
        // SAFETY: a prefetch does not access memory. Its intrinsic is not stable.
        unsafe { asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(readonly, nostack, preserves_flags)) }
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // SAFETY: as above; the caller's pointers cover 4 rows of 4 elements.
        unsafe {
            let row = |r: usize| vld1q_f32(src.add(r * src_stride));
            let (a, b, c, d) = (row(0), row(1), row(2), row(3));
            // Rows 0 and 2 interleaved, then 1 and 3: interleaving the two results gives the columns.
            let (ac, bd) = (vzip1q_f32(a, c), vzip1q_f32(b, d));
            let (ac2, bd2) = (vzip2q_f32(a, c), vzip2q_f32(b, d));
            vst1q_f32(dst, vzip1q_f32(ac, bd));
            vst1q_f32(dst.add(dst_stride), vzip2q_f32(ac, bd));
            vst1q_f32(dst.add(2 * dst_stride), vzip1q_f32(ac2, bd2));
            vst1q_f32(dst.add(3 * dst_stride), vzip2q_f32(ac2, bd2));
        }
    }
}

crate::arch::compile_kernels!(crate::engine::Fma<Neon, T>, crate::engine::Fma<Neon, T>, "neon");
