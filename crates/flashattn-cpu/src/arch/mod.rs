//! The instruction sets, their detection, and the compiled kernels of each.

use crate::memory::Shared;
use crate::{backward, forward};
use flashattn_spec::{AttentionProblem, DType, Element};
use std::fmt;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
pub mod amx;
#[cfg(target_arch = "x86_64")]
pub mod avx512;

/// An instruction set that kernels exist for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, on any CPU.
    Scalar,
    /// 128-bit NEON (aarch64).
    Neon,
    /// 256-bit AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX-512 with AMX tiles for bf16 products.
    Amx,
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        })
    }
}

impl Isa {
    /// The best instruction set of this CPU; found once.
    pub fn detect() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Isa::available().last().copied().unwrap_or(Isa::Scalar))
    }

    /// All instruction sets that this CPU can run, from slowest to fastest.
    pub fn available() -> Vec<Isa> {
        let mut all = vec![];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                all.push(Isa::Avx512);
                if amx::available() {
                    all.push(Isa::Amx);
                }
            }
        }
        all
    }
}

/// The kernels of one instruction set for one element type. Calling one is sound only on a CPU that has the
/// instruction set.
pub struct Kernels<T> {
    /// [`forward::tile`].
    pub forward: unsafe fn(&forward::Context<'_, T>, &forward::Target<T>, forward::Task, &mut forward::Workspace),
    /// [`forward::Workspace::new`].
    pub forward_workspace: fn(&AttentionProblem, usize) -> forward::Workspace,
    /// Queries of a panel of the forward pass.
    pub panel: usize,
    /// [`backward::task`].
    pub backward: unsafe fn(
        &forward::Context<'_, T>,
        &backward::Given<'_, T>,
        &backward::Target<T>,
        &backward::Task,
        &mut backward::Workspace,
    ),
    /// [`backward::reduce`].
    pub reduce: unsafe fn(
        &AttentionProblem,
        usize,
        usize,
        usize,
        (Shared<f32>, usize, usize),
        &backward::Target<T>,
        &mut backward::Workspace,
    ),
    /// [`backward::Workspace::new`].
    pub backward_workspace: fn(&AttentionProblem, usize, bool) -> backward::Workspace,
    /// [`backward::dq_len`].
    pub dq_len: fn(&AttentionProblem, usize) -> usize,
    /// Queries of a panel of the backward pass.
    pub backward_panel: usize,
    /// Keys of a chunk of the backward pass.
    pub backward_chunk: usize,
}

/// Makes `fn kernels<T>() -> Kernels<T>` for an engine, each kernel compiled with the given features.
macro_rules! compile_kernels {
    ($engine:ty $(, $feature:literal)?) => {
        /// The kernels compiled for this instruction set.
        pub fn kernels<T: flashattn_spec::Element>() -> $crate::arch::Kernels<T> {
            use $crate::engine::Engine;
            use $crate::{backward, forward};
            $(#[target_feature(enable = $feature)])?
            unsafe fn forward_tile<T: flashattn_spec::Element>(
                cx: &forward::Context<'_, T>,
                out: &forward::Target<T>,
                task: forward::Task,
                ws: &mut forward::Workspace,
            ) {
                // SAFETY: the contract is the same.
                unsafe { forward::tile::<$engine>(cx, out, task, ws) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn backward_task<T: flashattn_spec::Element>(
                cx: &forward::Context<'_, T>,
                given: &backward::Given<'_, T>,
                out: &backward::Target<T>,
                task: &backward::Task,
                ws: &mut backward::Workspace,
            ) {
                // SAFETY: the contract is the same.
                unsafe { backward::task::<$engine>(cx, given, out, task, ws) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn reduce<T: flashattn_spec::Element>(
                problem: &flashattn_spec::AttentionProblem,
                batch: usize,
                head: usize,
                panel: usize,
                parts: ($crate::memory::Shared<f32>, usize, usize),
                out: &backward::Target<T>,
                ws: &mut backward::Workspace,
            ) {
                // SAFETY: the contract is the same.
                unsafe { backward::reduce::<$engine>(problem, batch, head, panel, parts, out, ws) }
            }
            $crate::arch::Kernels {
                backward: backward_task::<T>,
                reduce: reduce::<T>,
                backward_workspace: backward::Workspace::new::<$engine>,
                dq_len: backward::dq_len::<$engine>,
                backward_panel: backward::panel::<$engine>(),
                backward_chunk: <$engine>::BACKWARD.chunk,
                forward: forward_tile::<T>,
                forward_workspace: forward::Workspace::new::<$engine>,
                panel: forward::panel::<$engine>(),
            }
        }
    };
}
pub(crate) use compile_kernels;

/// The kernels for an element type on an instruction set that [`Isa::available`] lists.
pub fn kernels<T: Element>(isa: Isa) -> Kernels<T> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx if T::DTYPE == DType::Bf16 => amx::kernels::<T>(),
        #[cfg(target_arch = "x86_64")]
        Isa::Amx | Isa::Avx512 => avx512::kernels::<T>(),
        _ => unimplemented!(),
    }
}
