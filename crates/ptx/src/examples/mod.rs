//! Numbered kernels that teach the builder, each a step up from the one before.
//!
//! | | kernel | new in it |
//! |---|---|---|
//! | 1 | [`vector_add`] | parameters, indices, predication |
//! | 2 | [`reduction`] | a builder loop, shuffles, shared memory, a barrier, an atomic |
//! | 3 | [`softmax`] | vector loads, the special-function unit, online rescaling |
//! | 4 | [`gemm_mma`] | swizzled tiles, cp.async in stages, ldmatrix, tensor cores (Ampere and later) |
//! | 5 | [`gemm_wgmma`] | TMA, mbarriers, descriptors, asynchronous products (Hopper) |
//! | 6 | [`gemm_persistent`] | warp specialisation, a pipeline, clusters and multicast, a tile scheduler |
//!
//! `tests/examples.rs` runs each in the emulator against plain Rust and gives each to ptxas; `docs/ptx.md` walks
//! through them.

mod level_1_vector_add;
mod level_2_reduction;
mod level_3_softmax;
mod level_4_gemm_mma;
mod level_5_gemm_wgmma;
mod level_6_gemm_persistent;

pub use level_1_vector_add::vector_add;
pub use level_2_reduction::reduction;
pub use level_3_softmax::softmax;
pub use level_4_gemm_mma::{MmaConfig, gemm_mma};
pub use level_5_gemm_wgmma::{WgmmaConfig, gemm_wgmma};
pub use level_6_gemm_persistent::{PersistentConfig, gemm_persistent};
