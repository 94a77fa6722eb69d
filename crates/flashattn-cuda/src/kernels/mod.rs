//! The kernels: pure functions from a config to a [`ptx::Kernel`].

mod bwd_sm90;
mod copy;
mod fragment;
mod fwd_sm90;
mod global;
mod philox;
mod program;

pub use bwd_sm90::{
    BwdConfig, Split, TableGrad, flash_bwd_sm90, flash_bwd_sm90_preprocess, flash_bwd_sm90_queries,
};
pub(crate) use bwd_sm90::{superaccumulator, turns};
pub use copy::{CopyConfig, CopyLaunch, copy_rows};
pub use fwd_sm90::{FwdConfig, MaskKind, Stride, TableShape, flash_fwd_sm90};
pub(crate) use program::{Slope, table_indices};
