//! Masks and score mods inside the kernels: expressions evaluated over whole vectors of scores.
//!
//! ```text
//! compile:  expression → values, each as often as it varies (strip, lane, row, element) → instructions, registers
//! perform:  instructions of the strip once; then for each block of rows:
//!               for each instruction: a loop over the block (1024 elements)
//!               write the result where the kernel wants it
//! ```
//!
//! The kernels keep scores transposed in strips of some keys × `L` queries, where `L` is the number of lanes of a
//! vector (4, 8 or 16): the score of key k and query q is at `k · L + q`. Everything on this path is inlined into the
//! caller, so that the loops are compiled for the instruction set of the caller.

mod compile;
mod dropper;
mod execute;
mod gather;
mod grads;
mod program;
#[cfg(test)]
mod tests;

use crate::simd::Simd;
use compile::{Wanted, compile};
use execute::{block_rows, hide, run, update, write};
use flashattn_spec::expr::{Env, Evaluator, ExprError, Traced};
use gather::Transpose;
use grads::TableGrads;
use program::{Code, Update};
use std::marker::PhantomData;
use std::ops::Range;

pub use dropper::Dropper;
pub use execute::Scratch;

/// Where a strip of scores is: `rows` keys from `kv0` on, `L` queries from `q0` on, of one head. Positions count
/// from the start of the sequence. Queries beyond `seqlen_q` may be there as padding; what is computed for them has
/// no meaning. Keys beyond `seqlen_k` must not.
#[derive(Clone, Copy, Debug)]
pub struct Strip {
    /// Which sequence.
    pub batch: i32,
    /// Which query head.
    pub head: i32,
    /// First query.
    pub q0: i32,
    /// First key.
    pub kv0: i32,
    /// Queries of the sequence.
    pub seqlen_q: i32,
    /// Keys of the sequence.
    pub seqlen_k: i32,
    /// First query of the sequence in the packed order.
    pub q_start: i32,
    /// First key of the sequence in the packed order.
    pub kv_start: i32,
    /// Keys in the strip.
    pub rows: usize,
}

impl Strip {
    /// The place of its first element.
    fn env(&self) -> Env {
        Env {
            batch: self.batch,
            head: self.head,
            q: self.q0,
            kv: self.kv0,
            seqlen_q: self.seqlen_q,
            seqlen_k: self.seqlen_k,
            q_start: self.q_start,
            kv_start: self.kv_start,
        }
    }
}

/// What to do with a strip. Slices hold `rows · L` elements.
#[derive(Debug)]
pub enum Task<'a, 'g> {
    /// Scores become modified scores, −∞ where hidden.
    Apply {
        /// Scaled scores s.
        scores: &'a mut [f32],
        /// Whether some element may be hidden: else the mask is not evaluated.
        masked: bool,
    },
    /// As `Apply`, and the derivative of each modified score with respect to the score; 0 where hidden.
    ApplyWithDerivative {
        /// Scaled scores s.
        scores: &'a mut [f32],
        /// Written with ∂ score_mod(s) / ∂s.
        derivative: &'a mut [f32],
        /// Whether some element may be hidden.
        masked: bool,
    },
    /// Values become 0 where hidden.
    ZeroMasked {
        /// Any values.
        values: &'a mut [f32],
    },
    /// Adds each element's part to the gradients of the tables that ask for one. Sums in a fixed order; padding is
    /// left out, and so is what has gradient 0.
    TableGrads {
        /// Scaled scores s, before the score mod.
        scores: &'a [f32],
        /// Gradient of the loss with respect to the modified scores; 0 where hidden.
        d_scores: &'a [f32],
        /// Gradients in the order of `AttentionProblem::grad_tables`, each as long as its table.
        grads: &'a mut [&'g mut [f32]],
    },
}

/// The mask and the score mod of a problem, compiled.
#[derive(Clone, Debug)]
pub struct ScoreProgram {
    /// The score mod and its derivative, for the scalar path.
    score_mod: Option<[Traced; 2]>,
    mask: Option<Traced>,
    value: Option<Code>,
    /// Its result is the derivative.
    with_derivative: Option<Code>,
    visible: Option<Code>,
    table_grads: Option<TableGrads>,
    registers: usize,
    scale: f32,
}

impl ScoreProgram {
    /// Compiles the score mod (of type Float) and the mask (of type Bool) of a lowered problem. `scale` is the
    /// softmax scale, by which a score mod multiplies scores first; without a score mod scores stay unscaled.
    ///
    /// # Errors
    /// [`ExprError`] if tables are not those of the expression, or its derivative grows too large.
    pub fn new(score_mod: Option<&Traced>, mask: Option<&Traced>, scale: f32) -> Result<Self, ExprError> {
        let mut program = ScoreProgram {
            score_mod: None,
            mask: mask.cloned(),
            value: None,
            with_derivative: None,
            visible: None,
            table_grads: None,
            registers: 0,
            scale,
        };
        if let Some(Traced { expr, tables }) = score_mod {
            expr.check_tables(tables)?;
            let gradients = expr.gradients(|slot| tables[slot.index()].wants_grad())?;
            let derivative = [Wanted { node: gradients.d_score, dense: false }];
            program.value = Some(compile(expr, tables, scale, Some(expr.root()), &[]));
            program.with_derivative =
                Some(compile(&gradients.program, tables, scale, Some(gradients.value), &derivative));
            program.table_grads = TableGrads::new(&gradients, tables, scale);
            program.score_mod =
                Some([expr.clone(), expr.d_score()?].map(|expr| Traced { expr, tables: tables.clone() }));
        }
        if let Some(Traced { expr, tables }) = mask {
            expr.check_tables(tables)?;
            program.visible = Some(compile(expr, tables, scale, Some(expr.root()), &[]));
        }
        let codes = [&program.value, &program.with_derivative, &program.visible].map(Option::as_ref);
        let codes = codes.into_iter().chain([program.table_grads.as_ref().map(|t| &t.code)]);
        program.registers = codes.flatten().map(|c| c.registers).max().unwrap_or(0);
        Ok(program)
    }

    /// Whether there is a score mod.
    pub fn has_score_mod(&self) -> bool {
        self.score_mod.is_some()
    }

    /// Whether there is a mask.
    pub fn has_mask(&self) -> bool {
        self.mask.is_some()
    }

    /// Whether some table asks for a gradient, and the score mod depends on it.
    pub fn has_table_grads(&self) -> bool {
        self.table_grads.is_some()
    }

    /// Whether the mask shows the strip's first element: for paths that go element by element.
    pub fn visible(&self, at: &Strip) -> bool {
        self.mask.as_ref().is_none_or(|m| scalar(m, at, 0.0) != 0.0)
    }

    /// The modified score of the strip's first element and its derivative.
    pub fn modified(&self, at: &Strip, score: f32) -> (f32, f32) {
        match &self.score_mod {
            Some([value, derivative]) => {
                let score = score * self.scale;
                (scalar(value, at, score), scalar(derivative, at, score))
            }
            None => (score, 1.0),
        }
    }

    /// Does a task on a strip of `S::LANES` queries.
    ///
    /// Inlined, so that it is compiled for the instruction set of the calling function; and large (some 70 KiB of
    /// code), so to be called from few places.
    ///
    /// # Safety
    /// The CPU has the instructions of `S`.
    #[inline(always)]
    pub unsafe fn perform<S: Simd>(&self, at: &Strip, task: Task<'_, '_>, scratch: &mut Scratch) {
        match S::LANES {
            4 => self.perform_lanes::<4, BySimd<S>>(at, task, scratch),
            8 => self.perform_lanes::<8, BySimd<S>>(at, task, scratch),
            _ => self.perform_lanes::<16, BySimd<S>>(at, task, scratch),
        }
    }

    #[inline(always)]
    fn perform_lanes<const L: usize, T: Transpose>(
        &self,
        at: &Strip,
        mut task: Task<'_, '_>,
        scratch: &mut Scratch,
    ) {
        scratch.reserve(self.registers);
        if let (Task::ApplyWithDerivative { derivative, .. }, None) = (&mut task, &self.score_mod) {
            derivative.fill(1.0);
        }
        // Loops around one call of `run`, which is large.
        for pass in [Pass::Score, Pass::Mask] {
            let Some(code) = self.code(&task, pass) else { continue };
            let (mut row, mut once) = (0, true);
            while row < at.rows {
                let rows = if once { 0 } else { block_rows::<L>().min(at.rows - row) };
                let block = row * L..(row + rows) * L;
                run::<L, T>(code, once, at, row, rows, task.scores(pass, block.clone()), scratch);
                if !once {
                    self.finish::<L, T>(code, at, block, &mut task, scratch);
                }
                once = false;
                row += rows;
            }
        }
    }

    fn code(&self, task: &Task<'_, '_>, pass: Pass) -> Option<&Code> {
        match (task, pass) {
            (Task::Apply { .. }, Pass::Score) => self.value.as_ref(),
            (Task::ApplyWithDerivative { .. }, Pass::Score) => self.with_derivative.as_ref(),
            (Task::TableGrads { .. }, Pass::Score) => self.table_grads.as_ref().map(|t| &t.code),
            (Task::Apply { masked, .. } | Task::ApplyWithDerivative { masked, .. }, Pass::Mask)
                if *masked =>
            {
                self.visible.as_ref()
            }
            (Task::ZeroMasked { .. }, Pass::Mask) => self.visible.as_ref(),
            _ => None,
        }
    }

    /// Takes what a block has given to where the task wants it.
    #[inline(always)]
    fn finish<const L: usize, T: Transpose>(
        &self,
        code: &Code,
        at: &Strip,
        block: Range<usize>,
        task: &mut Task<'_, '_>,
        scratch: &Scratch,
    ) {
        let (data, hidden, derivative) = match task {
            Task::Apply { scores, .. } => (&mut scores[block.clone()], f32::NEG_INFINITY, None),
            Task::ApplyWithDerivative { scores, derivative, .. } => {
                (&mut scores[block.clone()], f32::NEG_INFINITY, Some(&mut derivative[block.clone()]))
            }
            Task::ZeroMasked { values } => (&mut values[block.clone()], 0.0, None),
            Task::TableGrads { scores, d_scores, grads } => {
                let lanes = at.seqlen_q.saturating_sub(at.q0).clamp(0, L as i32) as usize;
                let values = scratch.values(&scores[block.clone()]);
                if let Some(tables) = &self.table_grads {
                    tables.accumulate::<L, T>(values, lanes, &d_scores[block], grads);
                }
                return;
            }
        };
        if let Update::Hide(a, b) = code.update {
            hide(data, hidden, a, b, scratch.values(&[]));
            if let Some(derivative) = derivative {
                hide(derivative, 0.0, a, b, scratch.values(&[]));
            }
            return;
        }
        if let (Some(derivative), [result]) = (derivative, code.results.as_slice()) {
            write(derivative, scratch.values(data).view(*result));
        }
        update::<L>(data, code.update, scratch.values(&[]));
    }
}

/// [`Transpose`] of an instruction set that the CPU has: [`ScoreProgram::perform`] asks its caller for that.
struct BySimd<S>(PhantomData<S>);

impl<S: Simd> Transpose for BySimd<S> {
    #[inline(always)]
    fn transpose(from: &[u32], stride: usize, to: &mut [u32], to_stride: usize) {
        let end = |stride: usize| (S::LANES - 1) * stride + S::LANES;
        assert!(from.len() >= end(stride) && to.len() >= end(to_stride));
        // SAFETY: both blocks are inside their slices, f32 has the layout of u32, and the CPU has the instructions.
        unsafe { S::transpose(from.as_ptr().cast(), stride, to.as_mut_ptr().cast(), to_stride) }
    }
}

/// Score mod and mask are two programs, run one after the other.
#[derive(Clone, Copy)]
enum Pass {
    Score,
    Mask,
}

impl Task<'_, '_> {
    /// The scores of a block, if the pass reads any.
    fn scores(&self, pass: Pass, block: Range<usize>) -> &[f32] {
        match (self, pass) {
            (Task::Apply { scores, .. } | Task::ApplyWithDerivative { scores, .. }, Pass::Score) => {
                &scores[block]
            }
            (Task::TableGrads { scores, .. }, _) => &scores[block],
            _ => &[],
        }
    }
}

/// A scalar evaluation in f32.
fn scalar(traced: &Traced, at: &Strip, score: f32) -> f32 {
    // `ScoreProgram::new` has checked the tables.
    let evaluator = Evaluator::<f32>::new(&traced.expr, &traced.tables);
    evaluator.map_or(f32::NAN, |mut e| e.eval(&at.env(), score).as_float())
}
