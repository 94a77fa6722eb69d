//! What rounding in f32, and of o to the dtype, does to each result of attention computed as any executor computes it:
//! the standard deviation of the error, from the operands and their sums, not from the results. It is the floor of
//! what is asked of an executor where standard attention happens to be exact. Much of it is where terms cancel: a row
//! that sees one key has `dp = δ`, so its ds is rounding, of the size of dp and not of the difference.
//!
//! Norms are Euclidean, errors independent of each other. One rounding has the mean square ρ² = 0.18 u² of the number
//! (an error even within ±u 2^e, of a number m 2^e with 1 ≤ m < 2 as likely as its logarithm); ρ₃₂ is that of f32, ρ
//! that of the dtype. A sum of n products added one by one has n partial sums, whose squares are n/2 times that of the
//! terms on average: with the products' own roundings it has the error ρ₃₂² c(n) ‖terms‖², c(n) = 1 + n/2. Sums over
//! keys or queries are not so long: a good executor adds up blocks, here of at most 64.
//!
//! ```text
//! scores    ε²_ij  = ρ₃₂² (c(d) (scale ‖q_i∘k_j‖ ∂s/∂x)² + s_ij²)                 relative error of exp(s_ij)
//! p         π²_ij  = ε²_ij + ρ₃₂² lse_i²                                          of exp(s_ij − lse_i), in backward
//! dp        η²_ij  = ρ₃₂² (c(dv) ‖z_ij do_i∘v_j‖² + dlse_i²)
//! δ         η²_i   = (ρ₃₂² c(dv) + ρ²) ‖do_i∘o_i‖² + ρ² Σ_j (z_ij p_ij dp_ij)²    the same for a whole row
//! (δ = do·o is made from an o that was rounded to the dtype, and so were the probabilities that it is made of.)
//!
//! o_i       Σ_j p_ij² (ε² (z_ij v_j − o_i)² + ρ₃₂² c(keys) z_ij² v_j²)
//! lse_i     Σ_j p_ij² ε² + ρ₃₂² lse_i²
//! dv_j      Σ_i z_ij² p_ij² (π² + ρ₃₂² c(queries)) do_i²
//! dq_i      scale² Σ_j (dx_ij² (π² + ρ₃₂² c(keys)) + w_ij² η²_ij) k_j²  +  scale² η²_i (Σ_j w_ij k_j)²     w = p ∂s/∂x
//! dk_j      scale² Σ_i (dx_ij² (π² + ρ₃₂² c(queries)) + w_ij² (η²_ij + η²_i)) q_i²
//! dsink     Σ_i e^(2(sink − lse_i)) ((dlse_i − δ_i)² (ρ₃₂² (c(queries) + sink²) + (that of lse_i)) + η²_i)
//! dtable    Σ_ij (ds_ij² (π² + ρ₃₂² c(terms)) + p_ij² η²_ij) (∂s/∂t)²  +  Σ_i η²_i (Σ_j p_ij ∂s/∂t)²
//! ```

use super::dense::{Dense, matrix_mut, parallel, product_transposed};
use super::prepared::env;
use super::{Oracle, check_output_gradients};
use crate::args::Inputs;
use crate::element::{DType, Element};
use crate::problem::{AttentionProblem, ProblemError};
use crate::tensor::View;
use ndarray::{Array1, Array2, Array4};
use std::collections::HashMap;

/// The largest deviation of any element of each result. Where tensors are not finite they count as 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Deviations {
    pub o: f64,
    pub lse: f64,
    pub dq: f64,
    pub dk: f64,
    pub dv: f64,
    pub sinks: f64,
    /// For each of [`AttentionProblem::grad_tables`].
    pub tables: Vec<f64>,
}

/// Variance of an element of a table's gradient, apart from the error of adding it up: so many terms, whose squares
/// add up to `squares`.
#[derive(Clone, Copy, Default)]
struct TableElement {
    variance: f64,
    terms: f64,
    squares: f64,
}

/// What one thread has found: variances, the largest or of each element.
struct Found {
    o: f64,
    lse: f64,
    dq: f64,
    dk: Array4<f64>,
    dv: Array4<f64>,
    sinks: Vec<f64>,
    tables: Vec<Vec<TableElement>>,
}

fn finite(x: f64) -> f64 {
    if x.is_finite() { x } else { 0.0 }
}

fn max<'a>(x: impl IntoIterator<Item = &'a f64>) -> f64 {
    x.into_iter().fold(0.0, |max, &x| max.max(x))
}

/// The deviations of the results of [`super::forward`] and [`super::backward`] for the same arguments.
///
/// # Errors
/// If the problem is invalid or a tensor does not fit it.
pub(crate) fn deviations<T: Element>(
    problem: &AttentionProblem,
    inputs: &Inputs<T>,
    d_o: View<T>,
    d_lse: Option<&[f32]>,
) -> Result<Deviations, ProblemError> {
    let oracle = Oracle::new(problem, inputs)?;
    check_output_gradients(problem, &d_o, d_lse)?;
    // Squares, as all that follows: ρ₃₂², ρ² and c(n).
    let [rho32, rho] = [DType::F32, problem.dtype].map(|dtype| 0.18 * dtype.epsilon().powi(2));
    let chain = |n: usize| 1.0 + n as f64 / 2.0;
    let blocks = |n: usize| chain(n.min(64));
    let plain = |x: View<T>| Dense::new(&x, |x: T| finite(x.to_f64()));
    let square = |x: View<T>| Dense::new(&x, |x: T| finite(x.to_f64()).powi(2));
    let ([k, v, d_o1], [q2, k2, v2, d_o2]) =
        ([inputs.k, inputs.v, d_o].map(plain), [inputs.q, inputs.k, inputs.v, d_o].map(square));
    let found = || Found {
        o: 0.0,
        lse: 0.0,
        dq: 0.0,
        dk: Array4::zeros(problem.k_shape()),
        dv: Array4::zeros(problem.v_shape()),
        sinks: vec![0.0; problem.heads_q],
        tables: problem.grad_tables().iter().map(|t| vec![TableElement::default(); t.data().len()]).collect(),
    };
    let (group, all) = (problem.group(), |_, _| true);
    let workers = oracle.workers(12.0, found)?;
    let workers = parallel(workers, oracle.blocks(), |worker, (b, rows)| {
        let sequence = problem.sequence(b);
        let (batch, kv) = (sequence.batch, oracle.kv_rows(&sequence));
        let q = sequence.q_row + rows.start..sequence.q_row + rows.end;
        let (over_keys, over_queries) = (blocks(sequence.seqlen_k), blocks(sequence.seqlen_q * group));
        oracle.each_head(worker, b, &rows, |found, head, block, mut score_mod| {
            let kv_head = head / group;
            let (to_q, to_kv) = ((batch, q.clone(), head), (batch, kv.clone(), kv_head));
            let zeros = |n| Array2::<f64>::zeros((rows.len(), n));
            let zp = block.zp.mapv(finite);
            let (mut o, d) = (zeros(problem.head_dim_v), problem.head_dim);
            v.add_product(1.0, zp.view(), to_kv.clone(), all, o.view_mut());
            let product = |a: &Dense<f64>, b: &Dense<f64>| {
                product_transposed(1.0, a.rows(batch, q.clone(), head), b.rows(batch, kv.clone(), kv_head))
            };
            let (qk2, dov2, dp) = (product(&q2, &k2), product(&d_o2, &v2), product(&d_o1, &v));
            // Variances as weights of v², v and 1 (o), do² (dv), k² and k (dq), q² (dk).
            let [mut of_v2, mut of_v, mut of_do2, mut of_k2, mut w_k, mut of_q2] =
                [(); 6].map(|()| zeros(sequence.seqlen_k));
            let (mut of_1, mut of_delta) =
                (Array1::<f64>::zeros(rows.len()), Array1::<f64>::zeros(rows.len()));
            for i in 0..rows.len() {
                let at = problem.lse_start(&sequence, head) + rows.start + i;
                let d_lse = d_lse.map_or(0.0, |x| finite(f64::from(x[at])));
                let d_o2 = d_o2.rows(batch, q.start + i..q.start + i + 1, head);
                let doo2: f64 = d_o2.iter().zip(o.row(i)).map(|(d, o)| d * o * o).sum();
                let terms = || zp.row(i).into_iter().zip(dp.row(i)).map(|(zp, dp)| zp * dp);
                let (delta, terms2) = (terms().sum::<f64>(), terms().map(|x| x * x).sum::<f64>());
                of_delta[i] = (rho32 * chain(problem.head_dim_v) + rho) * doo2 + rho * terms2;
                let lse = finite(block.lse[i]);
                let mut of_lse = rho32 * lse * lse;
                let mut tables: HashMap<(usize, usize), f64> = HashMap::new();
                for j in (0..kv.len()).filter(|&j| block.sees(i, j)) {
                    let (p, z) = (finite(block.p[[i, j]]), oracle.prepared.kept(b, head, rows.start + i, j));
                    // (An element that is not visible enough to have a probability has no error, either.)
                    if p == 0.0 {
                        continue;
                    }
                    let ds = p * (z * dp[[i, j]] - delta + d_lse);
                    let of_dp = rho32 * (chain(problem.head_dim_v) * z * z * dov2[[i, j]] + d_lse * d_lse);
                    let mut loads = Vec::new();
                    let derivative = match &mut score_mod {
                        None => 1.0,
                        Some(mods) => {
                            let env = env(&sequence, b, head, rows.start + i, j);
                            finite(mods.derivatives(&env, block.x[[i, j]], |table, at, x: f64| {
                                loads.push((table, at, finite(x)));
                            }))
                        }
                    };
                    let s = p.ln() + lse;
                    let of_x = chain(d) * oracle.scale.powi(2) * qk2[[i, j]] * derivative.powi(2);
                    let of_s = rho32 * (of_x + s * s);
                    let of_p = of_s + rho32 * lse * lse;
                    of_lse += p * p * of_s;
                    of_v2[[i, j]] = p * p * z * z * (of_s + rho32 * over_keys);
                    of_v[[i, j]] = p * p * z * of_s;
                    of_1[i] += p * p * of_s;
                    of_do2[[i, j]] = z * z * p * p * (of_p + rho32 * over_queries);
                    let (w2, dx2) = ((p * derivative).powi(2), (ds * derivative).powi(2));
                    of_k2[[i, j]] = dx2 * (of_p + rho32 * over_keys) + w2 * of_dp;
                    w_k[[i, j]] = p * derivative;
                    of_q2[[i, j]] = dx2 * (of_p + rho32 * over_queries) + w2 * (of_dp + of_delta[i]);
                    for (table, at, derivative) in loads {
                        let to = &mut found.tables[table][at];
                        to.variance += (ds * ds * of_p + p * p * of_dp) * derivative.powi(2);
                        to.terms += 1.0;
                        to.squares += (ds * derivative).powi(2);
                        *tables.entry((table, at)).or_default() += p * derivative;
                    }
                }
                for ((table, at), w) in tables {
                    found.tables[table][at].variance += of_delta[i] * w * w;
                }
                found.lse = found.lse.max(of_lse);
                if let Some(sinks) = oracle.sinks {
                    let sink = finite(f64::from(sinks[head]));
                    let p2 = finite((2.0 * (sink - lse)).exp());
                    let of_p = rho32 * (over_queries + sink * sink) + of_lse;
                    found.sinks[head] += p2 * ((d_lse - delta).powi(2) * of_p + of_delta[i]);
                }
            }
            let [mut o_v2, mut o_v] = [(); 2].map(|()| zeros(problem.head_dim_v));
            v2.add_product(1.0, of_v2.view(), to_kv.clone(), all, o_v2.view_mut());
            v.add_product(1.0, of_v.view(), to_kv.clone(), all, o_v.view_mut());
            let of_o = &o_v2 - &(2.0 * &o * o_v) + &(&o * &o * of_1.insert_axis(ndarray::Axis(1)));
            found.o = found.o.max(max(&of_o));
            let [mut dq_k2, mut dq_k] = [(); 2].map(|()| zeros(d));
            k2.add_product(1.0, of_k2.view(), to_kv.clone(), all, dq_k2.view_mut());
            k.add_product(1.0, w_k.view(), to_kv, all, dq_k.view_mut());
            let of_dq = dq_k2 + &(&dq_k * &dq_k * of_delta.insert_axis(ndarray::Axis(1)));
            found.dq = found.dq.max(max(&of_dq));
            let dk = matrix_mut(&mut found.dk, batch, kv.clone(), kv_head);
            q2.add_product(1.0, of_q2.t(), to_q.clone(), all, dk);
            let dv = matrix_mut(&mut found.dv, batch, kv.clone(), kv_head);
            d_o2.add_product(1.0, of_do2.t(), to_q, all, dv);
        });
    });
    let mut found = workers.into_iter().map(|w| w.results);
    let Some(mut total) = found.next() else { unreachable!("there is at least one worker") };
    for other in found {
        (total.o, total.lse, total.dq) =
            (total.o.max(other.o), total.lse.max(other.lse), total.dq.max(other.dq));
        total.dk += &other.dk;
        total.dv += &other.dv;
        total.sinks.iter_mut().zip(other.sinks).for_each(|(a, b)| *a += b);
        for (a, b) in total.tables.iter_mut().flatten().zip(other.tables.into_iter().flatten()) {
            a.variance += b.variance;
            a.terms += b.terms;
            a.squares += b.squares;
        }
    }
    let of_table = |t: &TableElement| t.variance + rho32 * (1.0 + t.terms / 2.0) * t.squares;
    let scale = oracle.scale.abs();
    Ok(Deviations {
        o: total.o.sqrt(),
        lse: total.lse.sqrt(),
        dq: scale * total.dq.sqrt(),
        dk: scale * max(&total.dk).sqrt(),
        dv: max(&total.dv).sqrt(),
        sinks: max(&total.sinks).sqrt(),
        tables: total.tables.iter().map(|t| t.iter().map(of_table).fold(0.0, f64::max).sqrt()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One query and one key of one element: ds is 0, and its error as large as dp = do · v is.
    #[test]
    fn one_key_by_hand() {
        let data = [[1.0f32], [5.0], [3.0], [2.0]];
        let [q, k, v, d_o] = [0, 1, 2, 3].map(|i| View::new(&data[i], [1; 4]).unwrap());
        let problem = AttentionProblem::new(1, 1, 1, 1, DType::F32);
        let inputs = Inputs { q, k, v, sinks: None };
        let got = deviations(&problem, &inputs, d_o, None).unwrap();
        let rho = 0.18f64.sqrt() * DType::F32.epsilon();
        // s = lse = 5, p = 1, o = 3, and c(1) = 1.5.
        let (epsilon, pi) = (1.5 * 25.0 + 25.0, 1.5 * 25.0 + 25.0 + 25.0);
        let (of_dp, of_delta) = (1.5 * 36.0, 2.5 * 36.0 + 36.0);
        for (name, got, expected) in [
            ("o", got.o, 1.5 * 9.0),
            ("lse", got.lse, epsilon + 25.0),
            ("dv", got.dv, (pi + 1.5) * 4.0),
            ("dq", got.dq, (of_dp + of_delta) * 25.0),
            ("dk", got.dk, of_dp + of_delta),
        ] {
            let expected: f64 = rho * f64::sqrt(expected);
            assert!((got / expected - 1.0).abs() < 1e-9, "{name}: {got}, by hand {expected}");
        }
        assert!(got.tables.is_empty() && got.sinks == 0.0);
    }
}
