//! The corpus of cases that every executor must pass, and the [`Runner`] that puts it to them.
//!
//! "Correct" means: for each output, the largest error against the f64 oracle is at most twice that of standard
//! attention ([`crate::reference::standard`]) in the same dtype on the same inputs, plus a floor of what rounding does
//! (written down in `judge` and `reference::rounding`). A NaN fails, except where the oracle's result is not finite: there, and only there,
//! the executor's must not be finite either. Every element of every output must be written, and nothing else.
//!
//! A new executor implements [`Executor`] and runs [`corpus`], and [`random_cases`] for as long as one likes:
//!
//! ```
//! use flashattn_spec::suite::{Runner, StandardExecutor, corpus};
//!
//! let report = Runner::new().filter("window").run(&StandardExecutor, &corpus()[..200]);
//! assert!(report.all_passed(), "{report}");
//! ```
//!
//! Files: `corpus` and `random` make the cases from `options`, `memory` lays tensors out, `judge` compares, `run` runs.

mod corpus;
mod judge;
mod memory;
mod options;
mod random;
mod run;
#[cfg(test)]
mod tests;

use crate::args::{GradInputs, Gradients, Inputs, Outputs};
use crate::element::Element;
use crate::problem::{AttentionProblem, ProblemError};
use crate::reference::standard::{standard_backward, standard_forward};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

pub use corpus::corpus;
pub use memory::Layout;
pub use random::random_cases;
pub use run::Runner;

/// Why an executor did not give a result.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ExecError {
    /// It does not have this yet; the case counts as skipped, and the report says so.
    #[error("{feature} is not supported")]
    Unsupported {
        /// What it does not have.
        feature: String,
    },
    /// It should have worked; the case fails.
    #[error("{0}")]
    Failed(String),
}

impl From<ProblemError> for ExecError {
    fn from(error: ProblemError) -> Self {
        ExecError::Failed(error.to_string())
    }
}

/// Something that computes attention.
pub trait Executor {
    /// What it is and what it runs on, for the report.
    fn device(&self) -> String;

    /// Computes o and lse.
    ///
    /// # Errors
    /// [`ExecError`]; outputs may hold anything then.
    fn forward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<T>,
        outputs: &mut Outputs<T>,
    ) -> Result<(), ExecError>;

    /// Computes the gradients. `grad_inputs` holds what [`Executor::forward`] gave for the same inputs.
    ///
    /// # Errors
    /// [`ExecError`]; gradients may hold anything then.
    fn backward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<T>,
        grad_inputs: &GradInputs<T>,
        gradients: &mut Gradients<T>,
    ) -> Result<(), ExecError>;
}

/// Standard attention as an executor: the yardstick measured against itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct StandardExecutor;

impl Executor for StandardExecutor {
    fn device(&self) -> String {
        "cpu, standard attention".to_owned()
    }

    fn forward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<T>,
        outputs: &mut Outputs<T>,
    ) -> Result<(), ExecError> {
        Ok(standard_forward(problem, inputs, outputs)?)
    }

    fn backward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<T>,
        grad_inputs: &GradInputs<T>,
        gradients: &mut Gradients<T>,
    ) -> Result<(), ExecError> {
        Ok(standard_backward(problem, inputs, grad_inputs, gradients)?)
    }
}

/// What a case's tensors hold. All are drawn from the normal distribution with deviation 1, by the case's seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputKind {
    /// Nothing else.
    Normal,
    /// Queries are 30 times as large, so that almost all of a row's weight is on one key.
    Large,
    /// Keys grow along their sequence, 400-fold, in every other head, and shrink in the others: exponents far beyond what a
    /// float holds on either side of a row's first, whichever end an executor begins at.
    Growing,
    /// A few rows of this tensor hold a NaN (V: or ∞), which may reach the rows that see them and no others.
    NotFinite(Place),
}

/// Where a NaN is put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In queries.
    Q,
    /// In keys.
    K,
    /// In values.
    V,
    /// In the gradient of the output.
    Do,
}

/// One test: a problem and how its tensors are made.
#[derive(Clone, Debug)]
pub struct Case {
    /// Unique in its list; parts are separated by `/`.
    pub name: String,
    /// What is to be computed.
    pub problem: AttentionProblem,
    /// Seed of the tensors' values.
    pub seed: u64,
    /// How tensors lie in memory.
    pub layout: Layout,
    /// What they hold.
    pub input: InputKind,
    /// Whether the loss has a gradient through lse.
    pub d_lse: bool,
    /// Whether the backward pass is run too.
    pub backward: bool,
}

/// An output that is wrong.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    /// The case.
    pub name: String,
    /// The output, or `forward` or `backward` if there is no result.
    pub tensor: String,
    /// Largest error against the oracle; infinite (null in JSON) if not a number.
    pub error: f64,
    /// Largest error allowed.
    pub allowed: f64,
    /// Where, and what was got and expected.
    pub detail: String,
}

/// A case that the executor refused.
#[derive(Clone, Debug, Serialize)]
pub struct Skip {
    /// The case.
    pub name: String,
    /// What the executor does not have.
    pub feature: String,
}

/// How near an executor came to what is allowed, for one output.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Worst {
    /// Largest error divided by what is allowed; above 1 is a failure.
    pub ratio: f64,
    /// In which case.
    pub case: String,
}

/// Result of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// [`Executor::device`].
    pub device: String,
    /// Cases run, `passed + failed + skipped`.
    pub cases: usize,
    /// Cases whose outputs are all right.
    pub passed: usize,
    /// Cases with an output that is not.
    pub failed: usize,
    /// Cases that the executor refused as unsupported.
    pub skipped: usize,
    /// What is wrong, at most one entry for each output of a case.
    pub failures: Vec<Failure>,
    /// What was skipped.
    pub skips: Vec<Skip>,
    /// For each output (o, lse, dq, dk, dv, dsinks, dtables): where the executor was least accurate.
    pub worst: BTreeMap<String, Worst>,
}

impl Report {
    /// Whether there were cases, and every one of them was run and is right.
    pub fn all_passed(&self) -> bool {
        self.cases > 0 && self.passed == self.cases
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { device, cases, passed, failed, skipped, .. } = self;
        writeln!(f, "{device}: {passed} of {cases} cases passed, {failed} failed, {skipped} skipped")?;
        for Failure { name, tensor, error, allowed, detail } in &self.failures {
            writeln!(f, "  FAILED {name}: {tensor}: error {error:.3e}, allowed {allowed:.3e}: {detail}")?;
        }
        for Skip { name, feature } in &self.skips {
            writeln!(f, "  skipped {name}: {feature}")?;
        }
        for (tensor, Worst { ratio, case }) in &self.worst {
            writeln!(f, "  {tensor}: at most {ratio:.2} of what is allowed ({case})")?;
        }
        Ok(())
    }
}
