//! A problem made ready for evaluation: its expressions, their derivatives and dropout.

use super::dense::threads_for;
use crate::expr::{Env, Evaluator, Gradients, Real, Slot};
use crate::lower::Lowered;
use crate::mask::MaskError;
use crate::philox;
use crate::problem::{AttentionProblem, ProblemError, Sequence};
use crate::score_mod::ScoreModError;

pub(super) struct Prepared<'a> {
    pub problem: &'a AttentionProblem,
    pub lowered: Lowered,
    gradients: Option<Gradients>,
}

impl<'a> Prepared<'a> {
    pub fn new(problem: &'a AttentionProblem) -> Result<Self, ProblemError> {
        problem.validate()?;
        let lowered = problem.lower()?;
        let gradients = match &lowered.score_mod {
            None => None,
            Some(t) => {
                let wanted = |slot: Slot| t.tables[slot.index()].wants_grad();
                Some(t.expr.gradients(wanted).map_err(ScoreModError::Expr)?)
            }
        };
        Ok(Prepared { problem, lowered, gradients })
    }

    /// Elements of the score matrices of all sequences and heads.
    pub fn scores(&self) -> usize {
        let p = self.problem;
        let sequences = (0..p.batch).map(|b| p.sequence(b));
        sequences.map(|s| s.seqlen_q * s.seqlen_k).sum::<usize>() * p.heads_q
    }

    /// Threads to use for this many matrix products.
    pub fn threads(&self, products: f64) -> usize {
        let d = (self.problem.head_dim + self.problem.head_dim_v) as f64 / 2.0;
        threads_for(products * d * self.scores() as f64)
    }

    /// An evaluator of the mask, if there is one.
    pub fn mask(&self) -> Result<Option<Evaluator<'_>>, ProblemError> {
        let Some(t) = &self.lowered.mask else { return Ok(None) };
        Ok(Some(Evaluator::new(&t.expr, &t.tables).map_err(MaskError::Expr)?))
    }

    /// An evaluator of the score mod, if there is one.
    pub fn score_mod<F: Real>(&self) -> Result<Option<ModEvaluator<'_, F>>, ProblemError> {
        let (Some(t), Some(gradients)) = (&self.lowered.score_mod, &self.gradients) else { return Ok(None) };
        let evaluator = Evaluator::new(&gradients.program, &t.tables).map_err(ScoreModError::Expr)?;
        Ok(Some(ModEvaluator { evaluator, gradients, lowered: &self.lowered }))
    }

    /// z: 0 if dropped, else 1 / (1 − p).
    pub fn kept(&self, batch: usize, head: usize, q: usize, kv: usize) -> f64 {
        match self.problem.dropout {
            None => 1.0,
            Some(d) => {
                let keep = philox::keep(d.seed, batch as u32, head as u32, q as u32, kv as u32, d.p);
                if keep { 1.0 / (1.0 - f64::from(d.p)) } else { 0.0 }
            }
        }
    }

    /// Sums for the gradients of all tables that want one.
    pub fn table_sums(&self) -> Vec<Vec<f64>> {
        self.lowered.grad_tables().map(|t| vec![0.0; t.data().len()]).collect()
    }
}

/// The place of a score, as expressions see it.
pub(super) fn env(s: &Sequence, batch: usize, head: usize, q: usize, kv: usize) -> Env {
    let [batch, head, q, kv] = [batch, head, q, kv].map(|x| x as i32);
    let [seqlen_q, seqlen_k, q_start, kv_start] =
        [s.seqlen_q, s.seqlen_k, s.q_start, s.kv_start].map(|x| x as i32);
    Env { batch, head, q, kv, seqlen_q, seqlen_k, q_start, kv_start }
}

/// A score mod with its derivatives.
pub(super) struct ModEvaluator<'a, F: Real> {
    evaluator: Evaluator<'a, F>,
    gradients: &'a Gradients,
    lowered: &'a Lowered,
}

impl<F: Real> ModEvaluator<'_, F> {
    pub fn value(&mut self, env: &Env, x: F) -> F {
        self.evaluator.run(env, x)[self.gradients.value.index()].as_float()
    }

    /// ∂s/∂x; calls `table` with (which of the tables that want a gradient, where in it, the derivative) for each load.
    pub fn derivatives(&mut self, env: &Env, x: F, mut table: impl FnMut(usize, usize, F)) -> F {
        let values = self.evaluator.run(env, x);
        let tables = self.lowered.score_mod.as_ref().map_or(&[][..], |t| &t.tables);
        for grad in &self.gradients.tables {
            let slot = grad.slot.index();
            let index = tables[..slot].iter().filter(|t| t.wants_grad()).count();
            let at = tables[slot].offset(grad.index.map(|i| values[i.index()].as_int()));
            table(index, at, values[grad.derivative.index()].as_float());
        }
        values[self.gradients.d_score.index()].as_float()
    }

    /// From ds to dx; adds to the tables' gradients.
    pub fn backward(&mut self, env: &Env, x: F, ds: F, sums: &mut [Vec<f64>]) -> F {
        let add = |table: usize, at: usize, derivative: F| sums[table][at] += (ds * derivative).to_f64();
        ds * self.derivatives(env, x, add)
    }
}
