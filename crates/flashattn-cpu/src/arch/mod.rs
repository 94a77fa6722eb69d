//! The instruction sets, their detection, and the compiled kernels of each.

use crate::{backward, decode, forward};
use flashattn_spec::{AttentionProblem, Element};
use std::any::Any;
use std::fmt;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
pub mod amx;
#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
#[cfg(target_arch = "aarch64")]
pub mod neon;
pub mod scalar;
#[cfg(test)]
mod tests;

/// Coefficients of 2^r on [−1/2, 1/2], highest degree first (minimax, relative error 2e−8 at degree 6).
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) const EXP2: [f32; 7] =
    [1.535_336_2e-4, 1.339_887_5e-3, 9.618_437e-3, 5.550_332_4e-2, 2.402_264_8e-1, 6.931_472e-1, 1.0];

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
        let mut all = vec![Isa::Scalar];
        #[cfg(target_arch = "aarch64")]
        all.push(Isa::Neon); // a part of the target's baseline
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                all.push(Isa::Avx2);
            }
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
#[derive(Clone, Copy)]
pub struct Kernels<T: 'static> {
    /// [`forward::tile`].
    pub forward:
        unsafe fn(&forward::Context<'_, T>, &forward::Target<T>, forward::Task, &mut forward::Workspace),
    /// [`forward::Workspace::new`].
    pub forward_workspace: fn(&AttentionProblem, usize) -> forward::Workspace,
    /// Queries of a panel of the forward pass.
    pub panel: usize,
    /// For a few queries a head; on the vector unit.
    pub decode: Decode<T>,
    /// [`forward::prepare`], f32 slots of a prepared chunk and keys of a chunk, if K and V are to be prepared once.
    pub prepare: Option<Prepare<T>>,
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
        backward::Panel,
        backward::DqParts,
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

/// How K and V are prepared once for all queries.
#[derive(Clone, Copy)]
pub struct Prepare<T: 'static> {
    /// [`forward::prepare`].
    pub chunk: unsafe fn(&forward::Context<'_, T>, usize, usize, usize),
    /// f32 slots of a prepared chunk.
    pub len: fn(&AttentionProblem) -> (usize, usize),
    /// Keys of a chunk.
    pub keys: usize,
}

/// The kernels for a few queries a head.
#[derive(Clone, Copy)]
pub struct Decode<T: 'static> {
    /// [`decode::task`].
    pub task: unsafe fn(&forward::Context<'_, T>, &decode::Task, *mut f32, &mut decode::Workspace),
    /// [`decode::merge`].
    pub merge: unsafe fn(&forward::Context<'_, T>, &forward::Target<T>, usize, usize, decode::Parts),
    /// [`decode::Workspace::new`].
    pub workspace: fn(&AttentionProblem) -> decode::Workspace,
}

/// Makes `fn kernels<T>() -> Kernels<T>` for an engine, each kernel compiled with the given features.
macro_rules! compile_kernels {
    ($engine:ty, $vector:ty $(, $feature:literal)?) => {
        /// The kernels compiled for this instruction set.
        pub(crate) fn kernels<T: flashattn_spec::Element>() -> $crate::arch::Kernels<T> {
            use $crate::engine::Engine;
            use $crate::{backward, decode, forward};
            $(#[target_feature(enable = $feature)])?
            unsafe fn decode_task<T: flashattn_spec::Element>(
                cx: &forward::Context<'_, T>,
                task: &decode::Task,
                part: *mut f32,
                ws: &mut decode::Workspace,
            ) {
                // SAFETY: the contract is the same.
                unsafe { decode::task::<$vector>(cx, task, part, ws) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn decode_merge<T: flashattn_spec::Element>(
                cx: &forward::Context<'_, T>,
                out: &forward::Target<T>,
                batch: usize,
                kv_head: usize,
                parts: decode::Parts,
            ) {
                // SAFETY: the contract is the same.
                unsafe { decode::merge::<$vector>(cx, out, batch, kv_head, parts) }
            }
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
                at: backward::Panel,
                parts: backward::DqParts,
                out: &backward::Target<T>,
                ws: &mut backward::Workspace,
            ) {
                // SAFETY: the contract is the same.
                unsafe { backward::reduce::<$engine>(problem, at, parts, out, ws) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn prepare<T: flashattn_spec::Element>(
                cx: &forward::Context<'_, T>,
                batch: usize,
                kv_head: usize,
                start: usize,
            ) {
                // SAFETY: the contract is the same.
                unsafe { forward::prepare::<$engine>(cx, batch, kv_head, start) }
            }
            $crate::arch::Kernels {
                decode: $crate::arch::Decode {
                    task: decode_task::<T>,
                    merge: decode_merge::<T>,
                    workspace: decode::Workspace::new::<$vector>,
                },
                prepare: <$engine>::PREPARE.then_some($crate::arch::Prepare {
                    chunk: prepare::<T>,
                    len: forward::prepared_len::<$engine>,
                    keys: <$engine>::FORWARD.chunk,
                }),
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

/// The kernels for an element type on an instruction set that [`Isa::available`] lists; `None` for a type that there
/// are no kernels for (f64).
///
/// They are compiled here, once for each type: were this function's own body generic, every crate that calls it would
/// compile them again.
pub fn kernels<T: Element>(isa: Isa) -> Option<Kernels<T>> {
    let all: [&dyn Any; 3] = [&f32_kernels(isa), &f16_kernels(isa), &bf16_kernels(isa)];
    all.into_iter().find_map(|k| k.downcast_ref::<Kernels<T>>().copied())
}

fn f32_kernels(isa: Isa) -> Kernels<f32> {
    vector_kernels(isa)
}

fn f16_kernels(isa: Isa) -> Kernels<half::f16> {
    vector_kernels(isa)
}

fn bf16_kernels(isa: Isa) -> Kernels<half::bf16> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => amx::kernels(),
        _ => vector_kernels(isa),
    }
}

/// The kernels on vector units; for an instruction set that another architecture has, the scalar ones.
fn vector_kernels<T: Element>(isa: Isa) -> Kernels<T> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx | Isa::Avx512 => avx512::kernels(),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::kernels(),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::kernels(),
        _ => scalar::kernels(),
    }
}
