//! [`Error`]: everything that can be refused, in one type.

use crate::Device;
use flashattn_cpu::plan::CpuError;
use flashattn_spec::ProblemError;
use flashattn_spec::expr::ExprError;
use flashattn_spec::mask::MaskError;
use flashattn_spec::score_mod::ScoreModError;
use flashattn_spec::tensor::ViewError;

/// Why a call was refused. Each message names the argument, what was got and what was expected; nothing has
/// been written to the caller's memory.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option, or a tensor's shape, is wrong.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// A view does not fit its memory.
    #[error("{name}: {source}")]
    View {
        /// The tensor.
        name: &'static str,
        /// What is wrong with it.
        source: ViewError,
    },
    /// An array of another crate cannot be viewed as it is.
    #[error("{name}: an array of shape {shape:?} with strides {strides:?} {reason}")]
    Layout {
        /// The tensor.
        name: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides, in elements.
        strides: Vec<isize>,
        /// What is wrong, and what to do.
        reason: &'static str,
    },
    /// The expression of the mask or of the score mod cannot be compiled.
    #[error("mask or score mod: {0}")]
    Expr(#[from] ExprError),
    /// The device cannot do it (yet).
    #[error("{feature} is not supported on {executor}")]
    Unsupported {
        /// What was asked for.
        feature: String,
        /// The device.
        executor: Device,
    },
    /// The device refused for a reason of its own.
    #[error("{executor}: {reason}")]
    Refused {
        /// The device.
        executor: Device,
        /// Why.
        reason: String,
    },
    /// The GPU or its driver refused, or a tensor on it does not fit; or a kernel failed.
    #[cfg(feature = "cuda")]
    #[error("{executor}: {error}")]
    Cuda {
        /// The device.
        executor: Device,
        /// Why.
        error: Box<flashattn_cuda::Error>,
    },
    /// The memory of a result cannot be had.
    #[error("{name} of shape {shape:?} needs {bytes} bytes, which could not be allocated")]
    OutOfMemory {
        /// The result.
        name: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// Its size.
        bytes: usize,
    },
}

impl From<MaskError> for Error {
    fn from(error: MaskError) -> Self {
        Error::Problem(error.into())
    }
}

impl From<ScoreModError> for Error {
    fn from(error: ScoreModError) -> Self {
        Error::Problem(error.into())
    }
}

impl From<CpuError> for Error {
    fn from(error: CpuError) -> Self {
        match error {
            CpuError::Problem(error) => Error::Problem(error),
            CpuError::Expr(error) => Error::Expr(error),
            CpuError::Unsupported { feature } => Error::Unsupported { feature, executor: Device::Cpu },
            // Reasons that the executor may come to have.
            other => Error::Refused { executor: Device::Cpu, reason: other.to_string() },
        }
    }
}

#[cfg(feature = "cuda")]
impl Error {
    /// What the GPU executor says, with the device that it was asked of.
    pub(crate) fn cuda(executor: Device) -> impl Fn(flashattn_cuda::Error) -> Error {
        use flashattn_cuda::plan::PlanError;
        move |error| match error {
            flashattn_cuda::Error::Problem(error) => Error::Problem(error),
            flashattn_cuda::Error::View { name, source } => Error::View { name, source },
            flashattn_cuda::Error::Plan(PlanError::Unsupported { feature, got, expected, .. }) => {
                let feature = format!("{}: {got} (expected {expected})", feature.name());
                Error::Unsupported { feature, executor }
            }
            error => Error::Cuda { executor, error: error.into() },
        }
    }
}

/// A shape is not the expected one.
pub(crate) fn shape_error(name: &'static str, got: &[usize], expected: &[usize]) -> Error {
    Error::Problem(ProblemError::Shape { name, got: got.to_vec(), expected: expected.to_vec() })
}
