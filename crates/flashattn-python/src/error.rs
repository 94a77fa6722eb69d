//! [`Error`]: why a call was refused, and which Python exception says so.

use flashattn::ProblemError;
use flashattn::spec::expr::ExprError;
use flashattn::spec::io::IoError;
use flashattn::spec::mask::MaskError;
use flashattn::spec::score_mod::ScoreModError;
use pyo3::PyErr;
use pyo3::exceptions::{PyMemoryError, PyNotImplementedError, PyRuntimeError, PyTypeError, PyValueError};

/// Why a call was refused; nothing has been written to the caller's arrays.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument has the wrong value: `ValueError`.
    #[error("{0}")]
    Value(String),
    /// An argument has the wrong type, element type or device: `TypeError`.
    #[error("{0}")]
    Type(String),
    /// It is not there yet: `NotImplementedError`.
    #[error("{0}")]
    NotImplemented(String),
    /// What a Python function of the caller's raised.
    #[error(transparent)]
    Python(#[from] PyErr),
    /// What the facade says.
    #[error(transparent)]
    Attention(#[from] flashattn::Error),
    /// What the IO model says.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The options, which our own Python code writes, cannot be read.
    #[error("options: {0}")]
    Options(#[from] serde_json::Error),
}

impl From<ExprError> for Error {
    fn from(error: ExprError) -> Self {
        Error::Attention(error.into())
    }
}

impl From<ProblemError> for Error {
    fn from(error: ProblemError) -> Self {
        Error::Attention(error.into())
    }
}

/// Operands of the wrong type in an expression, wherever the error passed on its way.
fn is_type_error(error: &flashattn::Error) -> bool {
    use flashattn::Error as E;
    matches!(
        error,
        E::Expr(ExprError::Type { .. })
            | E::Problem(
                ProblemError::DType { .. }
                    | ProblemError::Mask(MaskError::Expr(ExprError::Type { .. }) | MaskError::NotBool { .. })
                    | ProblemError::ScoreMod(
                        ScoreModError::Expr(ExprError::Type { .. }) | ScoreModError::NotFloat { .. }
                    )
            )
    )
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let text = match error {
            Error::Python(error) => return error,
            ref other => other.to_string(),
        };
        match error {
            Error::Type(_) => PyTypeError::new_err(text),
            Error::NotImplemented(_) => PyNotImplementedError::new_err(text),
            Error::Attention(flashattn::Error::Unsupported { .. }) => PyNotImplementedError::new_err(text),
            Error::Attention(flashattn::Error::OutOfMemory { .. }) => PyMemoryError::new_err(text),
            Error::Attention(flashattn::Error::Cuda { .. }) => PyRuntimeError::new_err(text),
            Error::Attention(error) if is_type_error(&error) => PyTypeError::new_err(text),
            _ => PyValueError::new_err(text),
        }
    }
}
