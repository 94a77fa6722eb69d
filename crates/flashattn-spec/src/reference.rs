//! The f64 oracle: what every executor's result is compared with. And, in [`standard`], attention as it is usually
//! written (the paper's Algorithm 0), which tells how large an error is to be expected in each dtype.
//!
//! For each sequence, head and query, over the keys j that the mask shows (and no others, so that a NaN at a
//! hidden key reaches nothing):
//!
//! ```text
//! x_j = scale · q·k_j        s_j = score_mod(x_j)        lse = ln(Σ_j exp s_j + exp sink)
//! p_j = exp(s_j − lse)       z_j = kept_j / (1 − p_drop)       o = Σ_j z_j p_j v_j
//! ```
//!
//! Backward (paper, appendix B.2, with dropout, sinks and a gradient dlse through lse besides):
//!
//! ```text
//! dv_j = Σ_i z_ij p_ij do_i              dp_ij = z_ij do_i·v_j           δ_i = Σ_j p_ij dp_ij
//! ds_ij = p_ij (dp_ij − δ_i + dlse_i)    dx_ij = ds_ij ∂s/∂x             dtable[..] = Σ_ij ds_ij ∂s/∂table[..]
//! dq_i = scale Σ_j dx_ij k_j             dk_j = scale Σ_i dx_ij q_i      dsink = Σ_i exp(sink − lse_i) (dlse_i − δ_i)
//! ```
//!
//! A row that sees no key, or only scores of −∞, has o = 0 and lse = −∞ (or the sink), and adds to no gradient but
//! the sink's. A visible score of NaN or +∞ makes its row NaN.
//!
//! It is computed in blocks of 32 queries, so that memory stays linear in the sequence length.

mod dense;
mod prepared;
pub(crate) mod rounding;
mod row;
pub mod standard;
#[cfg(test)]
mod tests;

use crate::args::Inputs;
use crate::element::Element;
use crate::expr::{Evaluator, Var};
use crate::problem::{AttentionProblem, ProblemError, Sequence};
use crate::softmax::OnlineSoftmax;
use crate::tensor::View;
use dense::{Dense, matrix_mut, parallel, product_transposed};
use ndarray::{Array2, Array4};
use prepared::{ModEvaluator, Prepared, env};
use std::ops::Range;

pub use row::{Row, forward_rows};

/// Queries that are worked on at a time.
const ROWS: usize = 32;

/// Result of the oracle's forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Forward {
    /// Output, dense, of [`AttentionProblem::o_shape`].
    pub o: Vec<f64>,
    /// Log-sum-exp, natural, laid out as [`crate::Outputs::lse`].
    pub lse: Vec<f64>,
}

/// Result of the oracle's backward pass; tensors are dense.
#[derive(Clone, Debug, PartialEq)]
pub struct Backward {
    /// Gradient of q, of [`AttentionProblem::q_shape`].
    pub dq: Vec<f64>,
    /// Gradient of k, of [`AttentionProblem::k_shape`].
    pub dk: Vec<f64>,
    /// Gradient of v, of [`AttentionProblem::v_shape`].
    pub dv: Vec<f64>,
    /// Gradient of the sinks; empty if the problem has none.
    pub d_sinks: Vec<f64>,
    /// Gradients of [`AttentionProblem::grad_tables`].
    pub d_tables: Vec<Vec<f64>>,
}

/// Attention in f64.
///
/// # Errors
/// If the problem is invalid or the inputs do not fit it.
pub fn forward<T: Element>(problem: &AttentionProblem, inputs: &Inputs<T>) -> Result<Forward, ProblemError> {
    let oracle = Oracle::new(problem, inputs)?;
    let [_, n, heads, d] = problem.o_shape();
    let workers = oracle.workers(2.0, Vec::new)?;
    let workers = parallel(workers, oracle.blocks(), |worker, (b, rows)| {
        let sequence = problem.sequence(b);
        oracle.each_head(worker, b, &rows, |results, head, block, _| {
            let mut o = Array2::zeros((rows.len(), d));
            let kv = (sequence.batch, oracle.kv_rows(&sequence), head / problem.group());
            oracle.v.add_product(1.0, block.zp.view(), kv, |i, j| block.sees(i, j), o.view_mut());
            results.push((b, rows.start, head, o, block.lse));
        });
    });
    let mut o = vec![0.0; problem.o_shape().iter().product()];
    let mut lse = vec![0.0; problem.lse_len()];
    for (b, start, head, block, block_lse) in workers.into_iter().flat_map(|w| w.results) {
        let sequence = problem.sequence(b);
        for (i, row) in block.rows().into_iter().enumerate() {
            let at = ((sequence.batch * n + sequence.q_row + start + i) * heads + head) * d;
            o[at..at + d].iter_mut().zip(row).for_each(|(to, x)| *to = *x);
        }
        let at = problem.lse_start(&sequence, head) + start;
        lse[at..at + block_lse.len()].copy_from_slice(&block_lse);
    }
    Ok(Forward { o, lse })
}

/// Gradients in f64, of a loss whose gradients with respect to o and lse are `d_o` and `d_lse`. Computes the
/// forward pass itself, in f64.
///
/// # Errors
/// If the problem is invalid or a tensor does not fit it.
pub fn backward<T: Element>(
    problem: &AttentionProblem,
    inputs: &Inputs<T>,
    d_o: View<T>,
    d_lse: Option<&[f32]>,
) -> Result<Backward, ProblemError> {
    let oracle = Oracle::new(problem, inputs)?;
    check_output_gradients(problem, &d_o, d_lse)?;
    let d_o = Dense::new(&d_o, T::to_f64);
    let zeros = |shape: [usize; 4]| Array4::<f64>::zeros(shape);
    let workers = oracle.workers(5.0, || Sums {
        dq: zeros(problem.q_shape()),
        dk: zeros(problem.k_shape()),
        dv: zeros(problem.v_shape()),
        sinks: vec![0.0; if problem.sinks { problem.heads_q } else { 0 }],
        tables: oracle.prepared.table_sums(),
    })?;
    let workers = parallel(workers, oracle.blocks(), |worker, (b, rows)| {
        let sequence = problem.sequence(b);
        let (batch, kv) = (sequence.batch, oracle.kv_rows(&sequence));
        let q = sequence.q_row + rows.start..sequence.q_row + rows.end;
        oracle.each_head(worker, b, &rows, |sums, head, block, mut score_mod| {
            let kv_head = head / problem.group();
            let sees = |i, j| block.sees(i, j);
            let sees_transposed = |j, i| block.sees(i, j);
            let (to_q, to_kv) = ((batch, q.clone(), head), (batch, kv.clone(), kv_head));
            let mut dv = matrix_mut(&mut sums.dv, batch, kv.clone(), kv_head);
            d_o.add_product(1.0, block.zp.t(), to_q.clone(), sees_transposed, dv.view_mut());

            let dp = product_transposed(
                1.0,
                d_o.rows(batch, q.clone(), head),
                oracle.v.rows(batch, kv.clone(), kv_head),
            );
            let mut dx = Array2::zeros(dp.dim());
            for i in 0..rows.len() {
                let seen = || (0..kv.len()).filter(|&j| block.sees(i, j));
                let delta: f64 = seen().map(|j| block.zp[[i, j]] * dp[[i, j]]).sum();
                let at = problem.lse_start(&sequence, head) + rows.start + i;
                let d_lse = d_lse.map_or(0.0, |x| f64::from(x[at]));
                for j in seen() {
                    let z = oracle.prepared.kept(b, head, rows.start + i, j);
                    let ds = block.p[[i, j]] * (z * dp[[i, j]] - delta + d_lse);
                    dx[[i, j]] = match &mut score_mod {
                        None => ds,
                        Some(mods) => {
                            let env = env(&sequence, b, head, rows.start + i, j);
                            mods.backward(&env, block.x[[i, j]], ds, &mut sums.tables)
                        }
                    };
                }
                if let Some(sinks) = oracle.sinks
                    && block.lse[i] != f64::NEG_INFINITY
                {
                    let p = (f64::from(sinks[head]) - block.lse[i]).exp();
                    sums.sinks[head] += p * (d_lse - delta);
                }
            }
            let mut dq = matrix_mut(&mut sums.dq, batch, q.clone(), head);
            oracle.k.add_product(oracle.scale, dx.view(), to_kv, sees, dq.view_mut());
            let mut dk = matrix_mut(&mut sums.dk, batch, kv.clone(), kv_head);
            oracle.q.add_product(oracle.scale, dx.t(), to_q, sees_transposed, dk.view_mut());
        });
    });
    let mut sums = workers.into_iter().map(|w| w.results);
    let Some(mut total) = sums.next() else { unreachable!("there is at least one worker") };
    sums.for_each(|other| total.add(other));
    let dense = |a: Array4<f64>| a.into_raw_vec_and_offset().0;
    let (dq, dk, dv) = (dense(total.dq), dense(total.dk), dense(total.dv));
    Ok(Backward { dq, dk, dv, d_sinks: total.sinks, d_tables: total.tables })
}

fn check_output_gradients<T: Element>(
    problem: &AttentionProblem,
    d_o: &View<T>,
    d_lse: Option<&[f32]>,
) -> Result<(), ProblemError> {
    let (o_shape, lse_len) = (problem.o_shape(), problem.lse_len());
    if d_o.shape() != o_shape {
        let (got, expected) = (d_o.shape().to_vec(), o_shape.to_vec());
        return Err(ProblemError::Shape { name: "do", got, expected });
    }
    match d_lse {
        Some(x) if x.len() != lse_len => {
            Err(ProblemError::Shape { name: "dlse", got: vec![x.len()], expected: vec![lse_len] })
        }
        _ => Ok(()),
    }
}

/// What one thread has added up.
struct Sums {
    dq: Array4<f64>,
    dk: Array4<f64>,
    dv: Array4<f64>,
    sinks: Vec<f64>,
    tables: Vec<Vec<f64>>,
}

impl Sums {
    fn add(&mut self, other: Sums) {
        self.dq += &other.dq;
        self.dk += &other.dk;
        self.dv += &other.dv;
        let own = self.sinks.iter_mut().chain(self.tables.iter_mut().flatten());
        for (a, b) in own.zip(other.sinks.iter().chain(other.tables.iter().flatten())) {
            *a += b;
        }
    }
}

/// Problem and inputs.
struct Oracle<'a> {
    prepared: Prepared<'a>,
    scale: f64,
    q: Dense<f64>,
    k: Dense<f64>,
    v: Dense<f64>,
    sinks: Option<&'a [f32]>,
}

/// A thread's evaluators, and what it has found so far.
struct Worker<'a, R> {
    mask: Option<Evaluator<'a>>,
    score_mod: Option<ModEvaluator<'a, f64>>,
    results: R,
}

/// The softmax of a block of rows; matrices are `[rows, keys]`, and 0 where nothing is visible.
struct Block<'a> {
    visible: &'a Array2<bool>,
    /// Whether the row has a visible score above −∞.
    live: Vec<bool>,
    /// Scaled scores, before the score mod.
    x: Array2<f64>,
    /// Probabilities.
    p: Array2<f64>,
    /// Probabilities after dropout.
    zp: Array2<f64>,
    lse: Vec<f64>,
}

impl Block<'_> {
    fn sees(&self, i: usize, j: usize) -> bool {
        self.live[i] && self.visible[[i, j]]
    }
}

impl<'a> Oracle<'a> {
    fn new<T: Element>(problem: &'a AttentionProblem, inputs: &Inputs<'a, T>) -> Result<Self, ProblemError> {
        let prepared = Prepared::new(problem)?;
        inputs.check(problem)?;
        let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(|x| Dense::new(&x, T::to_f64));
        Ok(Oracle { prepared, scale: f64::from(problem.scale()), q, k, v, sinks: inputs.sinks })
    }

    /// One worker a thread, for that many matrix products.
    fn workers<R>(&self, products: f64, results: impl Fn() -> R) -> Result<Vec<Worker<'_, R>>, ProblemError> {
        let worker = |_| {
            let (mask, score_mod) = (self.prepared.mask()?, self.prepared.score_mod()?);
            Ok(Worker { mask, score_mod, results: results() })
        };
        (0..self.prepared.threads(products)).map(worker).collect()
    }

    /// (sequence, its queries) in blocks.
    fn blocks(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        (0..self.prepared.problem.batch).flat_map(|b| {
            let n = self.prepared.problem.sequence(b).seqlen_q;
            (0..n).step_by(ROWS).map(move |start| (b, start..n.min(start + ROWS)))
        })
    }

    fn kv_rows(&self, sequence: &Sequence) -> Range<usize> {
        sequence.kv_row..sequence.kv_row + sequence.seqlen_k
    }

    /// Calls `then` with the softmax of these queries for each head.
    fn each_head<R>(
        &self,
        worker: &mut Worker<'_, R>,
        b: usize,
        rows: &Range<usize>,
        mut then: impl FnMut(&mut R, usize, Block<'_>, Option<&mut ModEvaluator<'_, f64>>),
    ) {
        let sequence = self.prepared.problem.sequence(b);
        let mut visible = Array2::from_elem((rows.len(), sequence.seqlen_k), true);
        let mask = self.prepared.lowered.mask.as_ref();
        for head in 0..self.prepared.problem.heads_q {
            if let Some(mask_evaluator) = &mut worker.mask
                && (head == 0 || mask.is_some_and(|m| m.expr.depends_on(Var::Head)))
            {
                for ((i, j), seen) in visible.indexed_iter_mut() {
                    *seen = mask_evaluator.eval(&env(&sequence, b, head, rows.start + i, j), 0.0).as_bool();
                }
            }
            let block = self.block(&mut worker.score_mod, b, rows, head, &visible);
            then(&mut worker.results, head, block, worker.score_mod.as_mut());
        }
    }

    fn block<'v>(
        &self,
        score_mod: &mut Option<ModEvaluator<'_, f64>>,
        b: usize,
        rows: &Range<usize>,
        head: usize,
        visible: &'v Array2<bool>,
    ) -> Block<'v> {
        let sequence = self.prepared.problem.sequence(b);
        let q_rows = sequence.q_row + rows.start..sequence.q_row + rows.end;
        let q = self.q.rows(sequence.batch, q_rows, head);
        let k = self.k.rows(sequence.batch, self.kv_rows(&sequence), head / self.prepared.problem.group());
        let x = product_transposed(self.scale, q, k);
        let mut block = Block {
            visible,
            live: Vec::new(),
            p: Array2::zeros(x.dim()),
            zp: Array2::zeros(x.dim()),
            x,
            lse: Vec::new(),
        };
        let mut scores = Vec::new();
        for i in 0..rows.len() {
            let seen = || (0..sequence.seqlen_k).filter(|&j| visible[[i, j]]);
            scores.clear();
            scores.extend(seen().map(|j| match score_mod {
                None => block.x[[i, j]],
                Some(mods) => mods.value(&env(&sequence, b, head, rows.start + i, j), block.x[[i, j]]),
            }));
            let live = scores.iter().any(|&s| s != f64::NEG_INFINITY);
            let mut softmax = OnlineSoftmax::new();
            let _ = softmax.update(&mut self.sinks.map_or(vec![], |s| vec![f64::from(s[head])]));
            let _ = softmax.update(&mut scores);
            block.live.push(live);
            block.lse.push(softmax.lse());
            if live {
                for (j, exp) in seen().zip(&scores) {
                    block.p[[i, j]] = exp * softmax.inverse_sum();
                    block.zp[[i, j]] = block.p[[i, j]] * self.prepared.kept(b, head, rows.start + i, j);
                }
            }
        }
        block
    }
}
