//! AVX-512 (F, BW, DQ, VL): 32 registers of 16 lanes; the tile of 3 vectors × 8 rows keeps 24 accumulators.

use crate::simd::Simd;
use std::arch::x86_64::*;

/// The AVX-512 instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Avx512;

impl Simd for Avx512 {
    const LANES: usize = 16;
    const PANEL: usize = 3;
    const ROWS: usize = 8;
    type F = __m512;

    crate::simd::compile_large!("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: the CPU has AVX-512 (contract of `Simd`); so for every block in this file.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        // SAFETY: as above; `p` is valid for 16 elements.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: __m512) {
        // SAFETY: as above; `p` is valid for 16 elements.
        unsafe { _mm512_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above. VMAXPS returns its second operand when either is NaN.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn exp2(x: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { exp2_by::<7>(x, &EXP2) }
    }
    #[inline(always)]
    unsafe fn any_gt(a: __m512, b: __m512) -> bool {
        // SAFETY: as above.
        unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) != 0 }
    }
    #[inline(always)]
    unsafe fn replace_neg_inf(x: __m512, y: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let inf = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(x, _mm512_set1_ps(f32::NEG_INFINITY));
            _mm512_mask_mov_ps(x, inf, y)
        }
    }
    #[inline(always)]
    unsafe fn sum(x: __m512) -> f32 {
        // SAFETY: as above.
        unsafe { _mm512_reduce_add_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const half::f16) -> __m512 {
        // SAFETY: as above; `p` is valid for 16 elements of two bytes.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const half::bf16) -> __m512 {
        // SAFETY: as above; `p` is valid for 16 elements of two bytes. A bf16 is the upper half of an f32.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(p: *const half::bf16) -> [__m512; 2] {
        // SAFETY: as above; `p` is valid for 32 elements of two bytes. The lower half of each dword is the even one.
        unsafe {
            let both = _mm512_loadu_si512(p.cast());
            let odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)), _mm512_castsi512_ps(odd)]
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const f32) {
        // SAFETY: a prefetch does not access memory.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_write(p: *const f32) {
        // SAFETY: a prefetch does not access memory.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // SAFETY: the caller's pointers cover 16 rows of 16 elements.
        unsafe {
            let mut r = [_mm512_setzero_ps(); 16];
            for (i, r) in r.iter_mut().enumerate() {
                *r = _mm512_loadu_ps(src.add(i * src_stride));
            }
            transpose_16x16(&mut r);
            for (i, r) in r.iter().enumerate() {
                _mm512_storeu_ps(dst.add(i * dst_stride), *r);
            }
        }
    }
    #[inline(always)]
    unsafe fn sums(src: *const f32) -> __m512 {
        // SAFETY: the caller's pointer covers 16 vectors. Each step adds halves of two vectors into one.
        unsafe {
            let mut quads = [_mm512_setzero_ps(); 4];
            for (i, quad) in quads.iter_mut().enumerate() {
                let mut pairs = [_mm512_setzero_pd(); 2];
                for (j, pair) in pairs.iter_mut().enumerate() {
                    let a = _mm512_loadu_ps(src.add((4 * i + 2 * j) * 16));
                    let b = _mm512_loadu_ps(src.add((4 * i + 2 * j + 1) * 16));
                    let sum = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                    *pair = _mm512_castps_pd(sum);
                }
                let [a, b] = pairs;
                let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
                *quad = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
            }
            // Vector i now has, in each lane of 128 bits, a quarter of the sums 4i .. 4i + 4.
            let [a, b, c, d] = quads;
            let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
            let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd))
        }
    }
}

/// Coefficients of 2^r on [0, 1), highest degree first (minimax with value 1 at 0; in f32 the error is 6e−8).
const EXP2: [f32; 7] =
    [2.161_292e-4, 1.246_784_6e-3, 9.675_452e-3, 5.548_528_3e-2, 2.402_293_1e-1, 6.931_470_6e-1, 1.0];

/// 2^x = 2^⌊x⌋ · 2^(x − ⌊x⌋), the second factor by a polynomial. VREDUCEPS gives the fraction (0 for ±∞), VSCALEFPS
/// takes the floor itself and rounds into the subnormals, to 0 and to ∞ as it should; both keep NaN.
///
/// # Safety
/// The CPU has AVX-512 F and DQ.
#[inline(always)]
pub(crate) unsafe fn exp2_by<const N: usize>(x: __m512, coefficients: &[f32; N]) -> __m512 {
    // SAFETY: register-only operations.
    unsafe {
        let r = _mm512_reduce_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(x);
        let mut p = _mm512_set1_ps(coefficients[0]);
        for c in &coefficients[1..] {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
        }
        _mm512_scalef_ps(p, x)
    }
}

/// Transposes 16 vectors of 16 dwords in registers.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline(always)]
pub(crate) unsafe fn transpose_16x16(r: &mut [__m512; 16]) {
    // SAFETY: register-only operations; the CPU has AVX-512F.
    unsafe {
        let mut t = [_mm512_setzero_ps(); 16];
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        let pd = |x: __m512| _mm512_castps_pd(x);
        for i in 0..4 {
            let (a, b, c, d) = (pd(t[4 * i]), pd(t[4 * i + 1]), pd(t[4 * i + 2]), pd(t[4 * i + 3]));
            r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
            r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
            r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
            r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
        }
        // r[4i + j] holds column 4·lane128 + j of rows 4i..4i+4; gather the 128-bit lanes.
        for j in 0..4 {
            let lo = _mm512_shuffle_f32x4::<0x88>(r[j], r[4 + j]);
            let hi = _mm512_shuffle_f32x4::<0xdd>(r[j], r[4 + j]);
            let lo2 = _mm512_shuffle_f32x4::<0x88>(r[8 + j], r[12 + j]);
            let hi2 = _mm512_shuffle_f32x4::<0xdd>(r[8 + j], r[12 + j]);
            t[j] = _mm512_shuffle_f32x4::<0x88>(lo, lo2);
            t[8 + j] = _mm512_shuffle_f32x4::<0xdd>(lo, lo2);
            t[4 + j] = _mm512_shuffle_f32x4::<0x88>(hi, hi2);
            t[12 + j] = _mm512_shuffle_f32x4::<0xdd>(hi, hi2);
        }
        *r = t;
    }
}

crate::arch::compile_kernels!(crate::engine::Fma<Avx512, T>, crate::engine::Fma<Avx512, T>, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");
