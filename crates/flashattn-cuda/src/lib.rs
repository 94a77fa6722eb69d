//! Attention on NVIDIA GPUs. At present: the forward kernel and its plans ([`plan`]), which the emulator runs, and the thin
//! layer that compiles and launches kernels of the [`ptx`] crate.
//!
//! [`Device`] → [`Module::load`] (verify, emit, the driver's compiler) → [`Module::launch`] on a [`Stream`] with typed
//! [`Arg`]s; [`timing`] measures. The driver is loaded at run time: without one, [`Device::open`] returns
//! [`Error::NoDriver`], and nothing of CUDA is needed to build.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

pub mod config;
mod device;
mod driver;
mod error;
pub mod kernels;
mod launch;
mod memory;
mod module;
pub mod plan;
pub mod stage;
mod tensor_map;
pub mod timing;

pub use device::{Device, Event, Properties, Stream};
pub use error::{Error, Version};
pub use launch::{Arg, Launch};
pub use memory::Buffer;
pub use module::{Attributes, Module};
pub use tensor_map::TensorMap;
