//! AVX2 with FMA and F16C: 16 registers of 8 lanes; the tile of 3 vectors × 4 rows keeps 12 accumulators and
//! leaves room for the two vectors and the broadcast.

use super::EXP2;
use crate::simd::Simd;
use std::arch::x86_64::*;

/// The AVX2 instruction set, with FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub struct Avx2;

impl Simd for Avx2 {
    const LANES: usize = 8;
    const PANEL: usize = 3;
    const ROWS: usize = 4;
    type F = __m256;

    crate::simd::compile_large!("avx2,fma,f16c");

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        // SAFETY: the CPU has AVX2, FMA and F16C (contract of `Simd`); so for every block in this file.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        // SAFETY: as above; `p` is valid for 8 elements.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: __m256) {
        // SAFETY: as above; `p` is valid for 8 elements.
        unsafe { _mm256_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above. VMAXPS returns its second operand when either is NaN.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn exp2(x: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe {
            // VMINPS(hi, x) keeps NaN. At 128 the fraction is 0 and the exponent that of infinity.
            let x = _mm256_min_ps(_mm256_set1_ps(128.0), x);
            // NaN becomes 0x8000_0000, which the shift drops.
            let n = _mm256_cvtps_epi32(x);
            let r = _mm256_sub_ps(x, _mm256_cvtepi32_ps(n));
            let mut p = _mm256_set1_ps(EXP2[0]);
            for c in &EXP2[1..] {
                p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
            }
            // p · 2^n by its exponent: exact where the result is normal; below, also for −∞, it is flushed.
            let y = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32::<23>(n));
            let tiny = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(-126.0));
            _mm256_andnot_ps(tiny, _mm256_castsi256_ps(y))
        }
    }
    #[inline(always)]
    unsafe fn any_gt(a: __m256, b: __m256) -> bool {
        // SAFETY: as above.
        unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) != 0 }
    }
    #[inline(always)]
    unsafe fn replace_neg_inf(x: __m256, y: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe {
            let inf = _mm256_cmp_ps::<_CMP_EQ_OQ>(x, _mm256_set1_ps(f32::NEG_INFINITY));
            _mm256_blendv_ps(x, y, inf)
        }
    }
    #[inline(always)]
    unsafe fn sum(x: __m256) -> f32 {
        // SAFETY: as above.
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const half::f16) -> __m256 {
        // SAFETY: as above; `p` is valid for 8 elements of two bytes.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const half::bf16) -> __m256 {
        // SAFETY: as above; `p` is valid for 8 elements of two bytes. A bf16 is the upper half of an f32.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(p: *const half::bf16) -> [__m256; 2] {
        // SAFETY: as above; `p` is valid for 16 elements of two bytes. The lower half of each dword is the even one.
        unsafe {
            let both = _mm256_loadu_si256(p.cast());
            let odd = _mm256_and_si256(both, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(both)), _mm256_castsi256_ps(odd)]
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
        // SAFETY: as above; the caller's pointers cover 8 rows of 8 elements.
        unsafe {
            // All is read before anything is written: the block may be transposed in place.
            let (low, high) = (four_columns(src, src_stride), four_columns(src.add(4), src_stride));
            for (i, x) in low.into_iter().chain(high).enumerate() {
                _mm256_storeu_ps(dst.add(i * dst_stride), x);
            }
        }
    }
}

/// Columns 0..4 of 8 rows.
///
/// # Safety
/// The CPU has AVX2; `src` is valid for 4 elements of each row.
#[inline(always)]
unsafe fn four_columns(src: *const f32, stride: usize) -> [__m256; 4] {
    // SAFETY: the caller's contract.
    unsafe {
        // A register takes row i and, in its upper half, row i + 4: halves need not be exchanged afterwards.
        let mut r = [_mm256_setzero_ps(); 4];
        for (i, r) in r.iter_mut().enumerate() {
            let low = _mm256_castps128_ps256(_mm_loadu_ps(src.add(i * stride)));
            *r = _mm256_insertf128_ps::<1>(low, _mm_loadu_ps(src.add((i + 4) * stride)));
        }
        let (a, b) = (_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpackhi_ps(r[0], r[1]));
        let (c, d) = (_mm256_unpacklo_ps(r[2], r[3]), _mm256_unpackhi_ps(r[2], r[3]));
        [
            _mm256_shuffle_ps::<0x44>(a, c),
            _mm256_shuffle_ps::<0xee>(a, c),
            _mm256_shuffle_ps::<0x44>(b, d),
            _mm256_shuffle_ps::<0xee>(b, d),
        ]
    }
}

crate::arch::compile_kernels!(crate::engine::Fma<Avx2, T>, crate::engine::Fma<Avx2, T>, "avx2,fma,f16c");
