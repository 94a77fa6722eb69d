//! GPU kernels as Rust functions: a typed builder of PTX, judged by a verifier, an emulator and ptxas.
//!
//! ```text
//!   Rust function ──build──► Kernel ──verify──► ok / errors with the kernel's source line
//!                              │
//!                              ├──emit────► PTX text ──► the driver compiles it on first use
//!                              │                  └────assemble──► ptxas: registers, spills, warnings
//!                              └──emulate─► the launch on a CPU: results, races, deadlocks, bytes moved
//! ```
//!
//! Start with [`build`](mod@build), then the numbered [`examples`], then [`instr`], the one table of
//! instructions. The crate knows nothing of attention and needs neither a GPU nor a toolkit.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

pub mod assemble;
pub mod build;
pub mod emit;
pub mod emulate;
pub mod examples;
pub mod fp8;
pub mod hopper;
pub mod instr;
pub mod kernel;
pub mod pipeline;
pub mod tile;
pub mod types;
pub mod verify;

pub use assemble::assemble;
pub use build::{Address, Builder, Reg, Value, build};
pub use emit::emit;
pub use hopper::{Mbarrier, WgmmaA};
pub use instr::Target;
pub use kernel::{Kernel, Swizzle, TensorElement, TensorMap};
pub use pipeline::{Pipeline, PipelineState};
pub use tile::{Descriptor, Fragment, TileLayout};
pub use types::{B32, BF16x2, F16x2};
pub use verify::verify;
