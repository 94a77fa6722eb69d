//! FlashAttention in pure Rust: exact attention, forward and backward, in memory linear in the sequence
//! length (Dao, Fu, Ermon, Rudra, Ré 2022, [arXiv 2205.14135](https://arxiv.org/abs/2205.14135)).
//!
//! Say what you want with [`Attention`], then call it on views over your memory. Tensors are
//! `[batch, seqlen, heads, head_dim]` of f32, f16 or bf16 with any strides whose last is 1.
//!
//! ```
//! use flashattn::{Attention, View};
//!
//! let (batch, seqlen, heads, head_dim) = (2, 77, 4, 64);
//! let shape = [batch, seqlen, heads, head_dim];
//! let data: Vec<f32> = (0..shape.iter().product::<usize>()).map(|i| (i as f32 * 0.37).sin()).collect();
//! let x = View::new(&data, shape)?;
//!
//! let o = Attention::new().causal().forward(&x, &x, &x)?;
//! assert_eq!(o.shape(), shape);
//! // The first query sees the first key alone, so its output is the first value.
//! assert_eq!(o.row(0, 0, 0), Some(x.row(0, 0, 0)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Query heads may share key/value heads (GQA, MQA), and values may have a head_dim of their own:
//!
//! ```
//! # use flashattn::{Attention, View, bf16};
//! # let element = |i: usize| bf16::from_f32((i as f32 * 0.61).cos());
//! # let make = |n: usize| -> Vec<bf16> { (0..n).map(element).collect() };
//! // 9 query heads, 3 KV heads; 5 new queries after 32 keys in the cache.
//! let (q, k, v) = (make(5 * 9 * 64), make(37 * 3 * 64), make(37 * 3 * 40));
//! let (q, k) = (View::new(&q, [1, 5, 9, 64])?, View::new(&k, [1, 37, 3, 64])?);
//! let v = View::new(&v, [1, 37, 3, 40])?;
//! let output = Attention::new().causal().window(16, 0).softcap(30.0).forward_with_lse(&q, &k, &v)?;
//! assert_eq!(output.o.shape(), [1, 5, 9, 40]);
//! assert_eq!(output.lse_shape(), [1, 9, 5]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Masks and score mods can be closures. They run once, to record an expression, which is compiled,
//! differentiated for the backward pass, and bounded over blocks to find out what may be skipped:
//!
//! ```
//! # use flashattn::{Attention, Table, View};
//! # let data = vec![0.5f32; 6 * 2 * 8];
//! # let x = View::new(&data, [1, 6, 2, 8])?;
//! let slope = Table::per_head(vec![0.5, 0.25])?;
//! let alibi = Attention::new()
//!     .score_fn(|s, ix| s - (ix.q - ix.kv).abs() * slope[ix.head])
//!     .mask_fn(|ix| ix.kv.le(ix.q) & (ix.kv % 2).eq(0));
//! assert_eq!(alibi.forward(&x, &x, &x)?.shape(), [1, 6, 2, 8]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Sequences of different lengths, packed one after the other:
//!
//! ```
//! # use flashattn::{Attention, View};
//! # let data: Vec<f32> = (0..12 * 2 * 8).map(|i| (i as f32).sin()).collect();
//! // Three sequences, of 5, 0 and 7 tokens.
//! let x = View::new(&data, [1, 12, 2, 8])?;
//! let cu_seqlens = [0, 5, 5, 12];
//! let o = Attention::new().causal().varlen(&cu_seqlens, &cu_seqlens).forward(&x, &x, &x)?;
//! assert_eq!(o.row(0, 5, 0), Some(x.row(0, 5, 0)), "token 5 is the first of its sequence");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Gradients, for q, k, v and for what else is learned (sinks; tables made [`Table::with_grad`]):
//!
//! ```
//! # use flashattn::{Attention, Table, View};
//! # let make = |n: usize| -> Vec<f32> { (0..n).map(|i| (i as f32 * 0.83).sin()).collect() };
//! # let (q, k, v, d_o) = (make(96), make(48), make(48), make(96));
//! let (q, d_o) = (View::new(&q, [1, 6, 2, 8])?, View::new(&d_o, [1, 6, 2, 8])?);
//! let (k, v) = (View::new(&k, [1, 6, 1, 8])?, View::new(&v, [1, 6, 1, 8])?);
//! let bias = Table::f32(&[1, 2, 6, 6], vec![0.1; 72])?.with_grad()?;
//! let attention = Attention::new().causal().bias(bias.clone()).sinks(&[0.0, -1.0]);
//! let output = attention.forward_with_lse(&q, &k, &v)?;
//! let gradients = attention.backward(&q, &k, &v, &output, &d_o, None)?;
//! assert_eq!(gradients.dk.shape(), k.shape());
//! assert_eq!(gradients.of_table(&bias).map(<[f32]>::len), Some(72));
//! assert_eq!(gradients.d_sinks.map(|x| x.len()), Some(2));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! With the feature `ndarray` (on by default), arrays of that crate are taken as they are; see [`view_of`]
//! for parts of arrays:
//!
#![cfg_attr(feature = "ndarray", doc = "```")]
#![cfg_attr(not(feature = "ndarray"), doc = "```ignore")]
//! # use flashattn::{Attention, Shape};
//! # use ndarray::Array4;
//! let x = Array4::<f32>::from_shape_fn((1, 9, 2, 8), |(_, n, h, d)| ((n * 3 + h * 5 + d) as f32).sin());
//! let attention = Attention::new().causal();
//! let (o, lse) = attention.forward_with_lse(&x, &x, &x)?.into_arrays()?;
//! assert_eq!((o.dim(), lse.dim()), ((1, 9, 2, 8), (1, 2, 9)));
//!
//! // [batch, heads, seqlen, head_dim] arrays: permute the axes of the view. Outputs can be arrays too.
//! let bhnd = Array4::from_shape_fn((1, 2, 9, 8), |(b, h, n, d)| x[(b, n, h, d)]);
//! let view = bhnd.view().permuted_axes([0, 2, 1, 3]);
//! let (mut o2, mut lse2) = (Array4::zeros((1, 9, 2, 8)), [0.0; 18]);
//! attention.plan(Shape::of([1, 9, 2, 8], [1, 9, 2, 8], [1, 9, 2, 8])?)?.forward(
//!     &view, &view, &view, &mut o2, &mut lse2,
//! )?;
//! assert_eq!(o, o2);
//! # Ok::<(), flashattn::Error>(())
//! ```
//!
//! On an NVIDIA GPU the same calls run with [`Device::Cuda`], in bf16 and f16, forward. They copy host tensors there and back;
//! tensors that are on the GPU already, another library's too, go to `Plan::forward_on` with a stream. Nothing of CUDA is
//! needed to build; without a driver the plan is refused:
//!
#![cfg_attr(feature = "cuda", doc = "```")]
#![cfg_attr(not(feature = "cuda"), doc = "```ignore")]
//! # use flashattn::{Attention, Device, Error, View, bf16};
//! # let data = vec![bf16::ONE; 6 * 2 * 64];
//! # let x = View::new(&data, [1, 6, 2, 64])?;
//! match Attention::new().causal().device(Device::Cuda(0)).forward(&x, &x, &x) {
//!     Ok(o) => assert_eq!(o.shape(), x.shape()),
//!     Err(error) => assert!(matches!(error, Error::Cuda { .. }), "no driver, no GPU, or not of this generation"),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! To run many times on one shape, or to write into memory of your own, make a [`Plan`] once. Everything
//! wrong with options, shapes or strides is one [`Error`] that says what was got and what was expected;
//! nothing panics. [`Output::merge`] joins results over parts of the keys.
//!
//! What the names mean in full is in [`spec`]: [`AttentionProblem`] (shapes and semantics), [`Mask`],
//! [`ScoreMod`], [`spec::expr`] (closures), and the f64 oracle that every result is tested against.
#![forbid(unsafe_code)]

#[cfg(feature = "ndarray")]
mod arrays;
mod attention;
mod device;
mod error;
mod output;
mod plan;
mod tensor;

#[cfg(feature = "ndarray")]
pub use arrays::{view_of, view_of_mut};
pub use attention::Attention;
pub use device::{Device, ParseDeviceError};
pub use error::Error;
pub use output::{Gradients, Output};
#[cfg(feature = "cuda")]
pub use plan::gpu::DeviceTensors;
pub use plan::{GradientsMut, Plan, Shape};
pub use tensor::{AsView, AsViewMut, Tensor};

/// NVIDIA GPUs: devices, streams, buffers, views over memory there. With the feature `cuda` (on by default).
#[cfg(feature = "cuda")]
pub use flashattn_cuda as cuda;
pub use flashattn_spec as spec;
pub use flashattn_spec::expr::{Expr, Index, Table, Term, Traced};
pub use flashattn_spec::mask::{BlockMask, Mask};
pub use flashattn_spec::score_mod::ScoreMod;
pub use flashattn_spec::softmax::{AttentionState, merge};
pub use flashattn_spec::{
    AttentionProblem, DType, Element, GradInputs, ProblemError, View, ViewError, ViewMut,
};
pub use half::{bf16, f16};

// The README's code runs as a test.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
