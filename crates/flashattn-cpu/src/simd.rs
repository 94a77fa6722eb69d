//! The dozen vector operations that the kernels need. One file in [`crate::arch`] implements them for each
//! instruction set; the algorithms are generic over [`Simd`] and are compiled once per instruction set, inside
//! a `#[target_feature]` entry point into which everything here is inlined.

use crate::gemm::{Depth, Init, Scalars, Vectors};
use crate::mods::{Dropper, ScoreProgram, Scratch, Strip, Task};

/// A vector instruction set. All methods are `unsafe`: the caller runs on a CPU that has the instructions
/// (see [`crate::arch::Isa::detect`]); pointers must be valid for `LANES` elements, of any alignment.
#[allow(clippy::missing_safety_doc, reason = "one contract for all, stated on the trait")]
pub trait Simd: Copy + Send + Sync + 'static {
    /// f32 elements of a vector.
    const LANES: usize;
    /// Vectors of queries a panel: the microkernel's tile is `PANEL` vectors by `ROWS` rows, all in registers.
    const PANEL: usize;
    /// Rows of the microkernel's tile.
    const ROWS: usize;
    /// A vector of f32.
    type F: Copy;

    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self::F;
    /// Reads a vector.
    unsafe fn load(p: *const f32) -> Self::F;
    /// Writes a vector.
    unsafe fn store(p: *mut f32, x: Self::F);
    /// a + b.
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    /// a − b.
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    /// a · b.
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// a · b + c, fused where the hardware does it.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// max(a, b); where either is NaN the result is `b`, so that an accumulator passed as `a` takes a NaN of `b`.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// 2^x, to about 1 ulp; NaN stays NaN, −∞ gives 0, results below the normal range may flush to 0.
    unsafe fn exp2(x: Self::F) -> Self::F;
    /// Whether any lane of a is greater than that of b.
    unsafe fn any_gt(a: Self::F, b: Self::F) -> bool;
    /// Per lane: where x is −∞, `y`, else x.
    unsafe fn replace_neg_inf(x: Self::F, y: Self::F) -> Self::F;
    /// Sum of the lanes, in a fixed order.
    unsafe fn sum(x: Self::F) -> f32;
    /// Widens `LANES` f16 values.
    unsafe fn load_f16(p: *const half::f16) -> Self::F;
    /// Widens `LANES` bf16 values.
    unsafe fn load_bf16(p: *const half::bf16) -> Self::F;
    /// Widens `2 · LANES` bf16 values: those with even numbers, then those with odd ones, which takes less work than
    /// keeping the order.
    unsafe fn load_bf16_pair(p: *const half::bf16) -> [Self::F; 2];
    /// Asks for the cache line at `p`, any address, to be brought near.
    unsafe fn prefetch(_p: *const f32) {}
    /// The same, to be written.
    unsafe fn prefetch_write(_p: *const f32) {}
    /// [`crate::gemm::product`], compiled for this instruction set once and for all callers.
    unsafe fn product(
        rows: usize,
        vectors: usize,
        depth: Depth,
        a: Scalars,
        b: Vectors<*const f32>,
        c: Vectors<*mut f32>,
        init: Init,
    );
    /// [`ScoreProgram::perform`], compiled once: it is large.
    unsafe fn perform(program: &ScoreProgram, at: &Strip, task: Task<'_, '_>, scratch: &mut Scratch);
    /// [`Dropper::apply`], compiled once.
    unsafe fn drop_out(dropper: &Dropper, at: &Strip, values: &mut [f32]);
    /// Transposes a `LANES` × `LANES` block: element (r, c) at `src[r * src_stride + c]` goes to
    /// `dst[c * dst_stride + r]`.
    unsafe fn transpose(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize);
    /// The sums of each of `LANES` vectors that follow one another.
    #[inline(always)]
    unsafe fn sums(src: *const f32) -> Self::F {
        let mut columns = [0.0f32; 16 * 16];
        // SAFETY: both hold LANES vectors.
        unsafe {
            Self::transpose(src, Self::LANES, columns.as_mut_ptr(), Self::LANES);
            let mut sum = Self::load(columns.as_ptr());
            for j in 1..Self::LANES {
                sum = Self::add(sum, Self::load(columns.as_ptr().add(j * Self::LANES)));
            }
            sum
        }
    }
}

/// The three large methods of [`Simd`], each compiled with the given features.
macro_rules! compile_large {
    ($($feature:literal)?) => {
        $(#[target_feature(enable = $feature)])?
        unsafe fn product(
            rows: usize,
            vectors: usize,
            depth: $crate::gemm::Depth,
            a: $crate::gemm::Scalars,
            b: $crate::gemm::Vectors<*const f32>,
            c: $crate::gemm::Vectors<*mut f32>,
            init: $crate::gemm::Init,
        ) {
            // SAFETY: the contract is the same.
            unsafe { $crate::gemm::product::<Self>(rows, vectors, depth, a, b, c, init) }
        }
        $(#[target_feature(enable = $feature)])?
        unsafe fn perform(
            program: &$crate::mods::ScoreProgram,
            at: &$crate::mods::Strip,
            task: $crate::mods::Task<'_, '_>,
            scratch: &mut $crate::mods::Scratch,
        ) {
            // SAFETY: the contract is the same.
            unsafe { program.perform::<Self>(at, task, scratch) }
        }
        $(#[target_feature(enable = $feature)])?
        unsafe fn drop_out(dropper: &$crate::mods::Dropper, at: &$crate::mods::Strip, values: &mut [f32]) {
            dropper.apply::<{ Self::LANES }>(at, values)
        }
    };
}
pub(crate) use compile_large;
