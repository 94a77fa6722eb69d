//! Plain Rust on arrays of 4, which LLVM turns into the vectors of the target's baseline (SSE2, NEON, ...): the
//! kernels of any CPU. No fused multiply-add, since without the instruction it is a call into the C library.

use crate::math;
use crate::simd::Simd;
use std::array::from_fn;

/// Plain Rust, on any CPU.
#[derive(Clone, Copy, Debug)]
pub struct Scalar;

impl Simd for Scalar {
    const LANES: usize = 4;
    const PANEL: usize = 2;
    const ROWS: usize = 4;
    type F = [f32; 4];

    crate::simd::compile_large!();

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 4] {
        // SAFETY: `p` is valid for 4 elements.
        unsafe { p.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: [f32; 4]) {
        // SAFETY: `p` is valid for 4 elements.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        from_fn(|i| math::mul_add::<4>(a[i], b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn max(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        // Not `f32::max`, which drops a NaN.
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn exp2(x: [f32; 4]) -> [f32; 4] {
        x.map(math::exp2::<4>)
    }
    #[inline(always)]
    unsafe fn any_gt(a: [f32; 4], b: [f32; 4]) -> bool {
        (a[0] > b[0]) | (a[1] > b[1]) | (a[2] > b[2]) | (a[3] > b[3])
    }
    #[inline(always)]
    unsafe fn replace_neg_inf(x: [f32; 4], y: [f32; 4]) -> [f32; 4] {
        from_fn(|i| if x[i] == f32::NEG_INFINITY { y[i] } else { x[i] })
    }
    #[inline(always)]
    unsafe fn sum(x: [f32; 4]) -> f32 {
        (x[0] + x[2]) + (x[1] + x[3])
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const half::f16) -> [f32; 4] {
        // SAFETY: `p` is valid for 4 elements of two bytes.
        let bits = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        // Not `f16::to_f32`, which asks at run time for an instruction and does not become vector code.
        bits.map(|h| {
            let magnitude = u32::from(h & 0x7fff) << 13;
            // 2¹¹² moves the exponent's bias from 15 to 127, also for subnormal numbers.
            let finite = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
            let special = if magnitude >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
            f32::from_bits(finite.to_bits() | special | u32::from(h & 0x8000) << 16)
        })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const half::bf16) -> [f32; 4] {
        // SAFETY: `p` is valid for 4 elements of two bytes. A bf16 is the upper half of an f32.
        unsafe { p.cast::<[u16; 4]>().read_unaligned() }.map(|h| f32::from_bits(u32::from(h) << 16))
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(p: *const half::bf16) -> [[f32; 4]; 2] {
        // SAFETY: `p` is valid for 8 elements of two bytes.
        let all = unsafe { p.cast::<[half::bf16; 8]>().read_unaligned() };
        [from_fn(|i| all[2 * i].to_f32()), from_fn(|i| all[2 * i + 1].to_f32())]
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // SAFETY: the caller's pointers cover 4 rows of 4 elements.
        unsafe {
            let rows: [[f32; 4]; 4] = from_fn(|r| Self::load(src.add(r * src_stride)));
            let column = |c: usize| rows.map(|row| row[c]);
            for c in 0..4 {
                Self::store(dst.add(c * dst_stride), column(c));
            }
        }
    }
}

crate::arch::compile_kernels!(crate::engine::Fma<Scalar, T>, crate::engine::Fma<Scalar, T>);
