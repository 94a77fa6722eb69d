//! Tests of the facade; one binary, as linking is slow.
#![allow(clippy::unwrap_used)]

#[cfg(feature = "ndarray")]
mod arrays;
mod common;
#[cfg(feature = "cuda")]
mod cuda;
mod oracle;
mod refuse;
