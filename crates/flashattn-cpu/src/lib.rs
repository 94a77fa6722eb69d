//! FlashAttention on CPUs.
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
pub mod simd;
pub mod plan;
