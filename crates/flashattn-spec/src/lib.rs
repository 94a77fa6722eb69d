//! What attention means, for every executor: the problem and its validation, the expression language of masks
//! and score mods, block schedules, online softmax, dropout, the f64 oracle, the corpus of cases that every
//! executor must pass, and the IO model. No unsafe code.
#![forbid(unsafe_code)]

pub mod args;
pub mod blocks;
pub mod element;
pub mod expr;
pub mod io;
pub mod lower;
pub mod mask;
pub mod philox;
pub mod problem;
pub mod reference;
pub mod score_mod;
pub mod softmax;
pub mod suite;
pub mod tensor;

pub use args::{GradInputs, Gradients, Inputs, Outputs};
pub use element::{DType, Element};
pub use problem::{AttentionProblem, Dropout, ProblemError, Sequence, Varlen};
pub use tensor::{View, ViewError, ViewMut};
