//! This crate as an executor of the corpus.

use crate::plan::{CpuError, Options, Plan};
use flashattn_spec::suite::{ExecError, Executor};
use flashattn_spec::{AttentionProblem, Element, GradInputs, Gradients, Inputs, Outputs};

/// Runs each problem by a fresh [`Plan`].
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuExecutor {
    /// How to run.
    pub options: Options,
}

impl From<CpuError> for ExecError {
    fn from(error: CpuError) -> Self {
        match error {
            CpuError::Unsupported { feature } => ExecError::Unsupported { feature },
            other => ExecError::Failed(other.to_string()),
        }
    }
}

impl Executor for CpuExecutor {
    fn device(&self) -> String {
        format!("cpu ({})", self.options.isa.unwrap_or_else(crate::arch::Isa::detect))
    }

    fn forward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<'_, T>,
        outputs: &mut Outputs<'_, T>,
    ) -> Result<(), ExecError> {
        Ok(Plan::new(problem, self.options)?.forward(inputs, outputs)?)
    }

    fn backward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<'_, T>,
        given: &GradInputs<'_, T>,
        gradients: &mut Gradients<'_, T>,
    ) -> Result<(), ExecError> {
        Ok(Plan::new(problem, self.options)?.backward(inputs, given, gradients)?)
    }
}
