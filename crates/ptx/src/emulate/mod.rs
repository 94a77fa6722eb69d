//! The emulator: runs a launch on a CPU, strict where hardware is lenient.
//!
//! ```text
//! for each cluster (on threads; or some at a time in turn, with an L2 model):
//!   until all its warps have ended:
//!     complete the asynchronous copies that are due
//!     pick a warp that can run, by the seed; execute some of its instructions
//!       each access to memory is checked against the accesses before it:
//!         in bounds, aligned, written before, ordered (vector clocks), visible (proxy fences)
//! ```
//!
//! What a launch computes is what hardware computes, up to the approximations of `ex2`, `lg2`, `tanh`, `rcp`, `rsqrt` and
//! the sum inside a matrix instruction. What hardware would do only sometimes is an [`Error`] here, every time its
//! order is not given by the kernel's own synchronisation: the checks do not wait for an unlucky interleaving.

mod access;
mod asynchronous;
mod barrier;
mod clocks;
mod cluster;
mod error;
mod execute;
mod faults;
mod global;
mod l2;
mod launch;
mod matrix;
mod mbarrier;
mod memory;
mod program;
mod report;
mod shared;
#[cfg(test)]
mod tests;
mod tma;
mod warp;
mod wgmma;

pub use error::{Error, Place};
pub use launch::{Arg, Launch, emulate};
pub use memory::{Buffer, Memory};
pub use report::{Report, SharedTraffic, Traffic};

/// Instructions that one warp may execute before it is taken to spin for ever.
pub const INSTRUCTION_BUDGET: u64 = 1 << 26;
