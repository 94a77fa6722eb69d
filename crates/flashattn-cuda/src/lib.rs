//! Attention on NVIDIA GPUs: kernels written with the [`ptx`] crate, compiled by the driver. At present on Hopper.
//!
//! [`Forward`] and [`Backward`] are the passes: made for an [`AttentionProblem`](flashattn_spec::AttentionProblem) on a
//! [`Device`], put into a [`Stream`] with the caller's tensors ([`ForwardArgs`], [`BackwardArgs`]: owned [`Buffer`]s or another
//! library's pointers) as often as one likes, from any thread. Below them lie [`plan`] and [`stage`], which turn a problem into
//! launches and which the emulator runs too, and the thin layer over the driver: [`Module::load`] (verify, emit, the driver's compiler) → [`Module::launch`] with
//! typed [`Arg`]s; [`timing`] measures. The driver is loaded at run time: without one, [`Device::open`] returns
//! [`Error::NoDriver`], and nothing of CUDA is needed to build.
//!
//! ```no_run
//! use flashattn_cuda::{Device, DeviceSlice, DeviceView, Forward, ForwardArgs};
//! use flashattn_spec::{AttentionProblem, DType, mask::Mask};
//!
//! let device = Device::open(0)?;
//! let mut problem = AttentionProblem::new(1, 4096, 16, 128, DType::Bf16);
//! problem.mask = Mask::Causal;
//! let forward = Forward::new(&device, &problem)?;
//! # let (stream, address) = (std::ptr::null_mut(), [0u64; 5]);
//! // Tensors and the stream of another library: addresses, shapes, strides in elements.
//! let (shape, strides) = (problem.q_shape(), [4096 * 16 * 128, 16 * 128, 128, 1]);
//! // SAFETY: they live, and are ours to use, until the stream's work has ended.
//! let stream = unsafe { device.stream_from_raw(stream) };
//! let view = |address| unsafe { DeviceView::from_raw(0, address, DType::Bf16, shape, strides) };
//! let lse = unsafe { DeviceSlice::from_raw(0, address[4], problem.lse_len()) };
//! let [q, k, v, o] = [0, 1, 2, 3].map(|i| view(address[i]));
//! forward.run(&stream, &ForwardArgs { q: q?, k: k?, v: v?, o: o?, lse, sinks: None })?;
//! # Ok::<(), flashattn_cuda::Error>(())
//! ```
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

mod backward;
mod bind;
mod cache;
pub mod config;
mod device;
mod driver;
mod error;
mod forward;
mod host;
pub mod kernels;
mod launch;
mod memory;
mod module;
pub mod plan;
pub mod stage;
mod tensor_map;
pub mod timing;
mod views;

pub use backward::{Backward, BackwardArgs};
pub use bind::Workspace;
pub use cache::KernelConfig;
pub use device::{Device, Event, Properties, Stream};
pub use error::{Error, Version};
pub use forward::{Forward, ForwardArgs};
pub use host::CudaExecutor;
pub use launch::{Arg, Launch};
pub use memory::Buffer;
pub use module::{Attributes, Module};
pub use tensor_map::TensorMap;
pub use views::{DeviceSlice, DeviceView};
