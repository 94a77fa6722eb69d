//! FlashAttention on CPUs: exact attention, forward and backward, in blocks that fit the caches, for everything that
//! [`flashattn_spec::AttentionProblem`] can say. The results do not depend on the number of threads.
//!
//! Reading order: [`forward`] and [`backward`] (the algorithms, written once), [`engine`] (what they need of a matrix
//! unit) with [`gemm`] and [`simd`] (the vector unit, any instruction set), [`arch`] (one file an instruction set;
//! `amx` is the tile unit), [`decode`] (a few queries), [`mods`] (masks and score mods), [`plan`] (threads).
//!
//! Nothing here prints, exits or panics on a caller's data. Unsafe code is the kernels': [`plan::Plan`] checks shapes and
//! strides against the problem and picks kernels that the CPU can run; that is what their safety rests on.

pub mod arch;
pub mod backward;
pub mod decode;
pub mod engine;
pub mod executor;
pub mod forward;
pub mod gemm;
pub mod math;
pub mod memory;
pub mod mods;
pub mod plan;
pub mod simd;

pub use arch::Isa;
pub use executor::CpuExecutor;
pub use plan::{CpuError, Options, Plan};
