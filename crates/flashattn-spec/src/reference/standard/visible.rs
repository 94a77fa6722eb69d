//! The mask, evaluated.

use super::Chunk;
use crate::expr::Var;
use crate::problem::ProblemError;
use crate::reference::prepared::{Prepared, env};

/// Which keys are visible, evaluated: a matrix of bools for each sequence and head that has one of its own.
pub(super) struct Visible {
    matrices: Vec<Vec<bool>>,
    per_batch: bool,
    heads: usize,
}

impl Visible {
    /// Whether it differs by sequence and by head.
    fn differs(prepared: &Prepared) -> (bool, bool) {
        let depends = |var| prepared.lowered.mask.as_ref().is_some_and(|m| m.expr.depends_on(var));
        let per_batch = [Var::Batch, Var::QStart, Var::KvStart].into_iter().any(depends);
        (per_batch || prepared.problem.varlen.is_some(), depends(Var::Head))
    }

    /// (sequence, head) of each matrix.
    fn matrices(prepared: &Prepared) -> Vec<(usize, usize)> {
        if prepared.lowered.mask.is_none() {
            return Vec::new();
        }
        let (per_batch, per_head) = Self::differs(prepared);
        let p = prepared.problem;
        let batch = if per_batch { p.batch } else { p.batch.min(1) };
        let heads = if per_head { p.heads_q } else { 1 };
        (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))).collect()
    }

    /// Bytes of all matrices.
    pub fn len(prepared: &Prepared) -> usize {
        let sizes = Self::matrices(prepared).into_iter().map(|(b, _)| prepared.problem.sequence(b));
        sizes.map(|s| s.seqlen_q * s.seqlen_k).sum()
    }

    pub fn new(prepared: &Prepared) -> Result<Self, ProblemError> {
        let (per_batch, per_head) = Self::differs(prepared);
        let heads = if per_head { prepared.problem.heads_q } else { 1 };
        let mut matrices = Vec::new();
        if let Some(mut mask) = prepared.mask()? {
            for (b, head) in Self::matrices(prepared) {
                let s = prepared.problem.sequence(b);
                let places = (0..s.seqlen_q).flat_map(|i| (0..s.seqlen_k).map(move |j| (i, j)));
                matrices
                    .push(places.map(|(i, j)| mask.eval(&env(&s, b, head, i, j), 0.0).as_bool()).collect());
            }
        }
        Ok(Visible { matrices, per_batch, heads })
    }

    /// The visible keys of row `i` of a chunk; `None` if all are.
    pub fn row(&self, c: &Chunk, i: usize) -> Option<&[bool]> {
        let batch = if self.per_batch { c.b } else { 0 };
        let matrix = self.matrices.get(batch * self.heads + c.head % self.heads)?;
        let at = (c.rows.start + i) * c.sequence.seqlen_k;
        Some(&matrix[at..at + c.sequence.seqlen_k])
    }

    pub fn sees(&self, c: &Chunk, i: usize, j: usize) -> bool {
        self.row(c, i).is_none_or(|row| row[j])
    }
}
