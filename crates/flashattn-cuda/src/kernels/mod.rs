//! The kernels: pure functions from a config to a [`ptx::Kernel`].

mod copy;
mod fragment;
mod fwd_sm90;
mod philox;
mod program;

pub use copy::{CopyConfig, CopyLaunch, copy_rows};
pub use fwd_sm90::{FwdConfig, MaskKind, Stride, flash_fwd_sm90};
