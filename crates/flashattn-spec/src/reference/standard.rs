//! Standard attention (the paper's Algorithm 0): S = QKᵀ and P = softmax(S) are written to memory as matrices
//! `[batch, heads_q, seqlen_q, seqlen_k]` in the dtype of the tensors, each step reads what the one before wrote,
//! and the backward pass materialises dP and dS, as automatic differentiation of these steps does.
//!
//! It is the yardstick of accuracy (an executor may err at most twice as much) and the baseline of speed, so it is
//! not written badly on purpose: matrix products by a tuned library with f32 accumulation, a softmax that the
//! compiler vectorises, all threads, its buffers kept between calls, masks evaluated once to bools. It departs
//! from what frameworks do only in its favour: GQA does not copy K and V, dropout stores no mask, dP reuses the
//! memory of S when S is no longer needed.

mod rows;
mod visible;

use super::dense::{Dense, parallel};
use super::prepared::Prepared;
use crate::args::{GradInputs, Gradients, Inputs, Outputs};
use crate::element::Element;
use crate::io::Pass;
use crate::problem::{AttentionProblem, ProblemError, Sequence};
use crate::tensor::ViewMut;
use ndarray::{Array2, Axis, Slice};
use rows::{as_f32, columns_f32, dropped, is_live, product_into, round_row, softmax, softmax_backward};
use std::ops::Range;
use visible::Visible;

/// Rows of S that one thread works on at a time.
const ROWS: usize = 64;
/// Columns of P and dS that one thread works on at a time, for dK and dV.
const COLUMNS: usize = 512;

/// Bytes that [`StandardAttention`] needs besides inputs and outputs, of what grows with seqlen_q · seqlen_k: S and
/// P in the forward pass; P, dP and dS in the backward pass, and S too with a score mod; the mask as bytes.
/// (Copies of rows in f32, linear in the sequence lengths, are not counted.)
///
/// # Errors
/// If the problem is invalid.
pub fn standard_extra_bytes(problem: &AttentionProblem, pass: Pass) -> Result<usize, ProblemError> {
    let prepared = Prepared::new(problem)?;
    let matrices = match (pass, &prepared.lowered.score_mod) {
        (Pass::Forward, _) => 2,
        (_, None) => 3,
        (_, Some(_)) => 4,
    };
    let mask = Visible::len(&prepared);
    Ok(matrices * prepared.scores() * problem.dtype.size() + mask)
}

/// Standard attention, forward: see [`StandardAttention`].
///
/// # Errors
/// If the problem is invalid or a tensor does not fit it.
pub fn standard_forward<T: Element>(
    problem: &AttentionProblem,
    inputs: &Inputs<T>,
    outputs: &mut Outputs<T>,
) -> Result<(), ProblemError> {
    StandardAttention::new(problem)?.forward(inputs, outputs)
}

/// Standard attention, backward, computing P again: see [`StandardAttention`].
///
/// # Errors
/// If the problem is invalid or a tensor does not fit it.
pub fn standard_backward<T: Element>(
    problem: &AttentionProblem,
    inputs: &Inputs<T>,
    grad_inputs: &GradInputs<T>,
    gradients: &mut Gradients<T>,
) -> Result<(), ProblemError> {
    StandardAttention::new(problem)?.backward(inputs, grad_inputs, gradients)
}

/// Standard attention with its materialised matrices.
pub struct StandardAttention<'a, T> {
    prepared: Prepared<'a>,
    visible: Visible,
    /// Each `[batch, heads_q, seqlen_q, seqlen_k]`, empty until needed.
    s: Vec<T>,
    p: Vec<T>,
    dp: Vec<T>,
    ds: Vec<T>,
    /// Log-sum-exp of each row, in the order of the rows of S.
    lse: Vec<f32>,
}

/// Some rows of the score matrix of one sequence and head.
struct Chunk {
    b: usize,
    head: usize,
    sequence: Sequence,
    rows: Range<usize>,
}

impl Chunk {
    fn len(&self) -> usize {
        self.rows.len() * self.sequence.seqlen_k
    }

    fn q_rows(&self) -> Range<usize> {
        self.sequence.q_row + self.rows.start..self.sequence.q_row + self.rows.end
    }

    fn kv_rows(&self) -> Range<usize> {
        self.sequence.kv_row..self.sequence.kv_row + self.sequence.seqlen_k
    }
}

/// All rows of S in the order of memory, `rows` at a time.
fn chunks(problem: &AttentionProblem, rows: usize) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for (b, sequence) in (0..problem.batch).map(|b| (b, problem.sequence(b))) {
        for head in 0..problem.heads_q {
            let n = sequence.seqlen_q;
            let ranges = (0..n).step_by(rows.max(1)).map(|start| start..n.min(start + rows));
            chunks.extend(ranges.map(|rows| Chunk { b, head, sequence, rows }));
        }
    }
    chunks
}

/// Cuts memory into pieces of these lengths.
fn cut<X>(mut rest: &mut [X], lengths: impl Iterator<Item = usize>) -> Vec<&mut [X]> {
    let next = |n| {
        let (piece, after) = std::mem::take(&mut rest).split_at_mut(n);
        rest = after;
        piece
    };
    lengths.map(next).collect()
}

impl<'a, T: Element> StandardAttention<'a, T> {
    /// For this problem; evaluates the mask.
    ///
    /// # Errors
    /// If the problem is invalid.
    pub fn new(problem: &'a AttentionProblem) -> Result<Self, ProblemError> {
        let prepared = Prepared::new(problem)?;
        let visible = Visible::new(&prepared)?;
        let [s, p, dp, ds] = [(); 4].map(|()| Vec::new());
        Ok(StandardAttention { prepared, visible, s, p, dp, ds, lse: Vec::new() })
    }

    /// O and lse. Keeps S and P for [`Self::backward`].
    ///
    /// # Errors
    /// If a tensor does not fit the problem; nothing is written then.
    pub fn forward(&mut self, inputs: &Inputs<T>, outputs: &mut Outputs<T>) -> Result<(), ProblemError> {
        let problem = self.prepared.problem;
        inputs.check(problem)?;
        outputs.check(problem)?;
        self.probabilities(inputs)?;
        let v = Dense::new(&inputs.v, T::to_f32);
        let chunks = chunks(problem, ROWS);
        let p = cut(&mut self.p, chunks.iter().map(Chunk::len));
        let results = vec![Vec::new(); self.prepared.threads(1.0)];
        let work = |results: &mut Vec<_>, (c, p): (&Chunk, &mut [T])| {
            let weights = dropped(&self.prepared, c, p);
            let mut o = Array2::zeros((c.rows.len(), problem.head_dim_v));
            let place = (c.sequence.batch, c.kv_rows(), c.head / problem.group());
            let n = c.sequence.seqlen_k;
            let sees = |i, j| self.visible.sees(c, i, j) && is_live(&p[i * n..(i + 1) * n]);
            v.add_product(1.0, weights.view(), place, sees, o.view_mut());
            results.push((c.sequence.batch, c.q_rows().start, c.head, o));
        };
        for (batch, row, head, o) in parallel(results, chunks.iter().zip(p), work).into_iter().flatten() {
            round_rows(&o, &mut outputs.o, batch, row, head);
        }
        let lengths = chunks.iter().map(|c| c.rows.len());
        for (c, lse) in chunks.iter().zip(cut(&mut self.lse, lengths)) {
            let at = problem.lse_start(&c.sequence, c.head) + c.rows.start;
            outputs.lse[at..at + lse.len()].copy_from_slice(lse);
        }
        Ok(())
    }

    /// S = scale · Q Kᵀ, and P = softmax(mask(score_mod(S))).
    fn probabilities(&mut self, inputs: &Inputs<T>) -> Result<(), ProblemError> {
        let problem = self.prepared.problem;
        let (scores, threads) = (self.prepared.scores(), self.prepared.threads(1.0));
        self.s.resize(scores, T::default());
        self.p.resize(scores, T::default());
        self.lse.resize(problem.lse_len(), 0.0);
        let [q, k] = [inputs.q, inputs.k].map(|x| Dense::new(&x, T::to_f32));
        let chunks = chunks(problem, ROWS);
        let lengths = || chunks.iter().map(Chunk::len);

        let jobs = chunks.iter().zip(cut(&mut self.s, lengths()));
        parallel(vec![(); threads], jobs, |_, (c, s)| {
            let k = k.rows(c.sequence.batch, c.kv_rows(), c.head / problem.group());
            product_into(problem.scale(), q.rows(c.sequence.batch, c.q_rows(), c.head), k, s);
        });

        let lse = cut(&mut self.lse, chunks.iter().map(|c| c.rows.len()));
        let jobs = cut(&mut self.s, lengths()).into_iter().zip(cut(&mut self.p, lengths())).zip(lse);
        let mods = (0..threads).map(|_| self.prepared.score_mod()).collect::<Result<_, _>>()?;
        parallel(mods, chunks.iter().zip(jobs), |mods, (c, ((s, p), lse))| {
            let sink = inputs.sinks.map_or(f32::NEG_INFINITY, |x| x[c.head]);
            softmax(&self.visible, mods, c, sink, s, p, lse);
        });
        Ok(())
    }

    /// The gradients. Takes P from the last [`Self::forward`], whose inputs must have been the same; without one,
    /// P is computed.
    ///
    /// # Errors
    /// If a tensor does not fit the problem; nothing is written then.
    pub fn backward(
        &mut self,
        inputs: &Inputs<T>,
        grad_inputs: &GradInputs<T>,
        gradients: &mut Gradients<T>,
    ) -> Result<(), ProblemError> {
        let problem = self.prepared.problem;
        inputs.check(problem)?;
        grad_inputs.check(problem)?;
        gradients.check(problem)?;
        if self.p.len() != self.prepared.scores() || self.p.is_empty() {
            self.probabilities(inputs)?;
        }
        let d_o = Dense::new(&grad_inputs.d_o, T::to_f32);
        self.d_scores(inputs, grad_inputs, &d_o, gradients)?;
        self.d_queries(inputs, &mut gradients.dq);
        self.d_keys_and_values(inputs, &d_o, gradients);
        Ok(())
    }

    /// dP = dO Vᵀ, and dS = P ∘ (dP − rowsum(P ∘ dP) + dlse) taken through the score mod; dsinks and dtables.
    fn d_scores(
        &mut self,
        inputs: &Inputs<T>,
        grad_inputs: &GradInputs<T>,
        d_o: &Dense<f32>,
        gradients: &mut Gradients<T>,
    ) -> Result<(), ProblemError> {
        let (prepared, visible, problem) = (&self.prepared, &self.visible, self.prepared.problem);
        let (scores, threads) = (prepared.scores(), prepared.threads(1.0));
        let chunks = chunks(problem, ROWS);
        let lengths = || chunks.iter().map(Chunk::len);
        // The derivative of a score mod needs S; without one, dP may overwrite it.
        let has_mod = prepared.lowered.score_mod.is_some();
        self.dp.resize(if has_mod { scores } else { 0 }, T::default());
        self.ds.resize(scores, T::default());
        let (s, dp): (&mut [T], &mut [T]) =
            if has_mod { (&mut self.s, &mut self.dp) } else { (&mut [], &mut self.s) };

        let v = Dense::new(&inputs.v, T::to_f32);
        parallel(vec![(); threads], chunks.iter().zip(cut(dp, lengths())), |_, (c, dp)| {
            let v = v.rows(c.sequence.batch, c.kv_rows(), c.head / problem.group());
            product_into(1.0, d_o.rows(c.sequence.batch, c.q_rows(), c.head), v, dp);
            if problem.dropout.is_some() {
                let dropped = dropped(prepared, c, dp).into_owned();
                round_row(dropped.iter(), dp);
            }
        });

        let s = cut(s, chunks.iter().map(|c| if has_mod { c.len() } else { 0 }));
        let jobs = s.into_iter().zip(cut(dp, lengths())).zip(cut(&mut self.p, lengths()));
        let jobs = jobs.zip(cut(&mut self.ds, lengths()));
        let state = |_| Ok((prepared.score_mod()?, prepared.table_sums(), vec![0.0; problem.heads_q]));
        let states = (0..threads).map(state).collect::<Result<Vec<_>, ProblemError>>()?;
        let sums =
            parallel(states, chunks.iter().zip(jobs), |(mods, tables, sinks), (c, (((s, dp), p), ds))| {
                let at = problem.lse_start(&c.sequence, c.head) + c.rows.start;
                let d_lse = grad_inputs.d_lse.map(|x| &x[at..]);
                let mods = mods.as_mut().map(|m| (m, tables));
                let deltas = softmax_backward(visible, mods, c, d_lse, [s, p, dp], ds);
                if let Some(sink) = inputs.sinks.map(|x| x[c.head]) {
                    for (delta, lse) in deltas.into_iter().zip(&grad_inputs.lse[at..]) {
                        let p = if *lse == f32::NEG_INFINITY { 0.0 } else { (sink - lse).exp() };
                        sinks[c.head] += f64::from(p * -delta);
                    }
                }
            });
        let total = |d: &mut [f32], sums: &mut dyn Iterator<Item = &Vec<f64>>| {
            let mut total = vec![0.0; d.len()];
            sums.for_each(|s| total.iter_mut().zip(s).for_each(|(t, s)| *t += s));
            d.iter_mut().zip(total).for_each(|(d, t)| *d = t as f32);
        };
        for (t, d) in gradients.d_tables.iter_mut().enumerate() {
            total(d, &mut sums.iter().map(|s| &s.1[t]));
        }
        if let Some(d) = &mut gradients.d_sinks {
            total(d, &mut sums.iter().map(|s| &s.2));
        }
        Ok(())
    }

    /// dQ = scale · dS K, by rows.
    fn d_queries(&mut self, inputs: &Inputs<T>, dq: &mut ViewMut<T>) {
        let (visible, problem) = (&self.visible, self.prepared.problem);
        let k = Dense::new(&inputs.k, T::to_f32);
        let chunks = chunks(problem, ROWS);
        let jobs = chunks.iter().zip(cut(&mut self.ds, chunks.iter().map(Chunk::len)));
        let results = vec![Vec::new(); self.prepared.threads(1.0)];
        let results = parallel(results, jobs, |results, (c, ds)| {
            let ds = as_f32(ds, c.rows.len(), c.sequence.seqlen_k);
            let mut dq = Array2::zeros((c.rows.len(), problem.head_dim));
            let place = (c.sequence.batch, c.kv_rows(), c.head / problem.group());
            k.add_product(problem.scale(), ds.view(), place, |i, j| visible.sees(c, i, j), dq.view_mut());
            results.push((c.sequence.batch, c.q_rows().start, c.head, dq));
        });
        for (batch, row, head, from) in results.into_iter().flatten() {
            round_rows(&from, dq, batch, row, head);
        }
    }

    /// dK = scale · dSᵀ Q and dV = Pᵀ dO, by columns, summed over the heads of a group.
    fn d_keys_and_values(&self, inputs: &Inputs<T>, d_o: &Dense<f32>, gradients: &mut Gradients<T>) {
        let (visible, problem) = (&self.visible, self.prepared.problem);
        let group = problem.group();
        let q = Dense::new(&inputs.q, T::to_f32);
        let mut jobs = Vec::new();
        let mut start = 0;
        for b in 0..problem.batch {
            let sequence = problem.sequence(b);
            let n = sequence.seqlen_k;
            for kv_head in 0..problem.heads_kv {
                let columns = (0..n).step_by(COLUMNS).map(|j| j..n.min(j + COLUMNS));
                jobs.extend(columns.map(|columns| (b, sequence, kv_head, columns, start)));
                start += group * sequence.seqlen_q * n;
            }
        }
        let results = vec![Vec::new(); self.prepared.threads(1.0)];
        let results =
            parallel(results, jobs.into_iter(), |results, (b, sequence, kv_head, columns, start)| {
                let (m, n) = (sequence.seqlen_q, sequence.seqlen_k);
                let mut dk = Array2::zeros((columns.len(), problem.head_dim));
                let mut dv = Array2::zeros((columns.len(), problem.head_dim_v));
                for (i, head) in (kv_head * group..(kv_head + 1) * group).enumerate() {
                    let c = Chunk { b, head, sequence, rows: 0..m };
                    let at = start + i * m * n..start + (i + 1) * m * n;
                    let place = || (sequence.batch, c.q_rows(), head);
                    let ds = columns_f32(&self.ds[at.clone()], m, n, columns.clone());
                    let p = &self.p[at];
                    let sees = |j: usize, i| visible.sees(&c, i, columns.start + j);
                    q.add_product(problem.scale(), ds.t(), place(), sees, dk.view_mut());
                    let weights = match problem.dropout {
                        None => columns_f32(p, m, n, columns.clone()),
                        Some(_) => {
                            let mut all = dropped(&self.prepared, &c, p).into_owned();
                            all.slice_axis_inplace(Axis(1), Slice::from(columns.clone()));
                            all.into()
                        }
                    };
                    let sees = |j, i| sees(j, i) && is_live(&p[i * n..(i + 1) * n]);
                    d_o.add_product(1.0, weights.t(), place(), sees, dv.view_mut());
                }
                results.push((sequence.batch, sequence.kv_row + columns.start, kv_head, dk, dv));
            });
        for (batch, row, head, dk, dv) in results.into_iter().flatten() {
            round_rows(&dk, &mut gradients.dk, batch, row, head);
            round_rows(&dv, &mut gradients.dv, batch, row, head);
        }
    }
}

/// Writes rows of a result, from row `row` of a tensor.
fn round_rows<T: Element>(from: &Array2<f32>, to: &mut ViewMut<T>, batch: usize, row: usize, head: usize) {
    for (i, from) in from.rows().into_iter().enumerate() {
        round_row(from.iter(), to.row_mut(batch, row + i, head));
    }
}
