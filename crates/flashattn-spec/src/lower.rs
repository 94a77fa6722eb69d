//! From a problem to the two expressions that executors run.

use crate::expr::{Table, Traced};
use crate::problem::{AttentionProblem, ProblemError};

/// What an executor applies to a scaled score: first the score mod, then the mask.
#[derive(Clone, Debug)]
pub struct Lowered {
    /// The score mod, an expression of type Float; `None` if it changes nothing.
    pub score_mod: Option<Traced>,
    /// The mask, an expression of type Bool; `None` if every key is visible.
    pub mask: Option<Traced>,
}

impl Lowered {
    /// The score mod's tables that ask for a gradient, by slot.
    pub fn grad_tables(&self) -> impl Iterator<Item = &Table> {
        self.score_mod.iter().flat_map(|s| &s.tables).filter(|table| table.wants_grad())
    }
}

impl AttentionProblem {
    /// The score mod and the mask as expressions.
    ///
    /// # Errors
    /// What is wrong with either; whether they fit the problem is for [`AttentionProblem::validate`].
    pub fn lower(&self) -> Result<Lowered, ProblemError> {
        Ok(Lowered { score_mod: self.score_mod.lower()?, mask: self.mask.lower()? })
    }

    /// The tables for which the backward pass returns a gradient: those of the lowered score mod that were made
    /// [`Table::with_grad`], in the order of their slots. None if the score mod is invalid.
    pub fn grad_tables(&self) -> Vec<Table> {
        let score_mod = self.score_mod.lower().unwrap_or_default();
        Lowered { score_mod, mask: None }.grad_tables().cloned().collect()
    }
}
