//! The tensors of one call: what an executor is given and what it fills, checked against the problem.

use crate::element::Element;
use crate::problem::{AttentionProblem, ProblemError};
use crate::tensor::{View, ViewMut};

/// What the forward pass reads. Shapes as in [`AttentionProblem`].
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, T> {
    /// Queries `[batch, seqlen_q, heads_q, head_dim]`.
    pub q: View<'a, T>,
    /// Keys `[batch, seqlen_k, heads_kv, head_dim]`.
    pub k: View<'a, T>,
    /// Values `[batch, seqlen_k, heads_kv, head_dim_v]`.
    pub v: View<'a, T>,
    /// Sink logits `[heads_q]`, in natural-log units like scores; given exactly when the problem has sinks.
    pub sinks: Option<&'a [f32]>,
}

/// What the forward pass writes; every element is overwritten.
#[derive(Debug)]
pub struct Outputs<'a, T> {
    /// Output `[batch, seqlen_q, heads_q, head_dim_v]`.
    pub o: ViewMut<'a, T>,
    /// Log-sum-exp of each row's scores (natural log), dense `[batch, heads_q, seqlen_q]`
    /// (`[heads_q, total_q]` when packed). −∞ where a row sees nothing.
    pub lse: &'a mut [f32],
}

/// What the backward pass reads besides the forward's inputs.
#[derive(Clone, Copy, Debug)]
pub struct GradInputs<'a, T> {
    /// The forward's output.
    pub o: View<'a, T>,
    /// The forward's lse.
    pub lse: &'a [f32],
    /// Gradient of the loss with respect to o, of o's shape.
    pub d_o: View<'a, T>,
    /// Gradient with respect to lse, if the loss uses it; laid out like lse.
    pub d_lse: Option<&'a [f32]>,
}

/// What the backward pass writes; every element is overwritten.
#[derive(Debug)]
pub struct Gradients<'a, T> {
    /// Gradient of q.
    pub dq: ViewMut<'a, T>,
    /// Gradient of k, summed over the query heads of a group.
    pub dk: ViewMut<'a, T>,
    /// Gradient of v, summed over the query heads of a group.
    pub dv: ViewMut<'a, T>,
    /// Gradient of the sink logits `[heads_q]`; given exactly when the problem has sinks.
    pub d_sinks: Option<&'a mut [f32]>,
    /// Gradients of the score mod's tables that ask for one ([`crate::expr::Table::with_grad`]), in the order
    /// of [`AttentionProblem::grad_tables`], each as long as its table.
    pub d_tables: Vec<&'a mut [f32]>,
}

fn shape(name: &'static str, got: [usize; 4], expected: [usize; 4]) -> Result<(), ProblemError> {
    if got == expected {
        return Ok(());
    }
    Err(ProblemError::Shape { name, got: got.to_vec(), expected: expected.to_vec() })
}

fn length(name: &'static str, got: usize, expected: usize) -> Result<(), ProblemError> {
    if got == expected {
        return Ok(());
    }
    Err(ProblemError::Shape { name, got: vec![got], expected: vec![expected] })
}

fn optional(name: &'static str, got: Option<usize>, expected: Option<usize>) -> Result<(), ProblemError> {
    let word = |x: Option<usize>| if x.is_some() { "given" } else { "absent" };
    match (got, expected) {
        (Some(got), Some(expected)) => length(name, got, expected),
        (None, None) => Ok(()),
        _ => Err(ProblemError::Presence { name, got: word(got), expected: word(expected) }),
    }
}

fn dtype<T: Element>(problem: &AttentionProblem) -> Result<(), ProblemError> {
    if T::DTYPE == problem.dtype {
        return Ok(());
    }
    Err(ProblemError::DType { name: "q, k, v", got: T::DTYPE, expected: problem.dtype })
}

impl<T: Element> Inputs<'_, T> {
    /// Checks shapes, dtype and presence against the problem.
    pub fn check(&self, problem: &AttentionProblem) -> Result<(), ProblemError> {
        dtype::<T>(problem)?;
        shape("q", self.q.shape(), problem.q_shape())?;
        shape("k", self.k.shape(), problem.k_shape())?;
        shape("v", self.v.shape(), problem.v_shape())?;
        optional("sinks", self.sinks.map(<[f32]>::len), problem.sinks.then_some(problem.heads_q))
    }
}

impl<T: Element> Outputs<'_, T> {
    /// Checks shapes against the problem.
    pub fn check(&self, problem: &AttentionProblem) -> Result<(), ProblemError> {
        shape("o", self.o.shape(), problem.o_shape())?;
        length("lse", self.lse.len(), problem.lse_len())
    }
}

impl<T: Element> GradInputs<'_, T> {
    /// Checks shapes against the problem.
    pub fn check(&self, problem: &AttentionProblem) -> Result<(), ProblemError> {
        shape("o", self.o.shape(), problem.o_shape())?;
        shape("do", self.d_o.shape(), problem.o_shape())?;
        length("lse", self.lse.len(), problem.lse_len())?;
        self.d_lse.map_or(Ok(()), |x| length("dlse", x.len(), problem.lse_len()))
    }
}

impl<T: Element> Gradients<'_, T> {
    /// Checks shapes and presence against the problem.
    pub fn check(&self, problem: &AttentionProblem) -> Result<(), ProblemError> {
        shape("dq", self.dq.shape(), problem.q_shape())?;
        shape("dk", self.dk.shape(), problem.k_shape())?;
        shape("dv", self.dv.shape(), problem.v_shape())?;
        let sinks = self.d_sinks.as_ref().map(|x| x.len());
        optional("dsinks", sinks, problem.sinks.then_some(problem.heads_q))?;
        let tables = problem.grad_tables();
        length("d_tables", self.d_tables.len(), tables.len())?;
        for (got, table) in self.d_tables.iter().zip(&tables) {
            length("d_tables[i]", got.len(), table.data().len())?;
        }
        Ok(())
    }
}
