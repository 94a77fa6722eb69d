//! Single rows of gradients: to look at a few of a result that is too large to be computed again whole.
//!
//! They come from the forward pass' o and lse, as executors compute them, and are as exact as these.

use super::prepared::{ModEvaluator, Prepared, env};
use crate::args::{GradInputs, Inputs};
use crate::element::Element;
use crate::expr::Evaluator;
use crate::problem::{AttentionProblem, ProblemError};

/// Evaluates scores one by one.
struct Scores<'a, T> {
    problem: &'a AttentionProblem,
    prepared: &'a Prepared<'a>,
    inputs: &'a Inputs<'a, T>,
    given: &'a GradInputs<'a, T>,
    mask: Option<Evaluator<'a>>,
    score_mod: Option<ModEvaluator<'a, f64>>,
}

fn dot<T: Element>(a: &[T], b: &[T]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum()
}

fn add<T: Element>(to: &mut [f64], factor: f64, row: &[T]) {
    to.iter_mut().zip(row).for_each(|(to, x)| *to += factor * x.to_f64());
}

impl<'a, T: Element> Scores<'a, T> {
    fn new(
        prepared: &'a Prepared<'a>,
        inputs: &'a Inputs<'a, T>,
        given: &'a GradInputs<'a, T>,
    ) -> Result<Self, ProblemError> {
        let problem = prepared.problem;
        inputs.check(problem)?;
        given.check(problem)?;
        let (mask, score_mod) = (prepared.mask()?, prepared.score_mod()?);
        Ok(Scores { problem, prepared, inputs, given, mask, score_mod })
    }

    /// P after dropout, and the gradient of scale · q·k; none if the query does not see the key.
    fn at(&mut self, b: usize, head: usize, i: usize, j: usize) -> Option<[f64; 2]> {
        let (p, s) = (self.problem, self.problem.sequence(b));
        let (place, row) = (env(&s, b, head, i, j), p.lse_start(&s, head) + i);
        let (lse, d_lse) = (self.given.lse[row], self.given.d_lse.map_or(0.0, |x| x[row]));
        let hidden = self.mask.as_mut().is_some_and(|mask| !mask.eval(&place, 0.0).as_bool());
        if hidden || lse == f32::NEG_INFINITY {
            return None;
        }
        let (at_q, at_k) = ((s.batch, s.q_row + i, head), (s.batch, s.kv_row + j, head / p.group()));
        let row = |view: &crate::View<'a, T>, (b, n, h): (usize, usize, usize)| view.row(b, n, h);
        let d_o = row(&self.given.d_o, at_q);
        let x = dot(row(&self.inputs.q, at_q), row(&self.inputs.k, at_k)) * f64::from(p.scale());
        let score = self.score_mod.as_mut().map_or(x, |mods| mods.value(&place, x));
        let probability = (score - f64::from(lse)).exp();
        let kept = self.prepared.kept(b, head, i, j);
        let delta = dot(row(&self.given.o, at_q), d_o) - f64::from(d_lse);
        let ds = probability * (kept * dot(d_o, row(&self.inputs.v, at_k)) - delta);
        let derivative =
            self.score_mod.as_mut().map_or(1.0, |mods| mods.derivatives(&place, x, |_, _, _| ()));
        Some([kept * probability, ds * derivative])
    }

    fn check(&self, [b, head, i]: [usize; 3], heads: usize, queries: bool) -> Result<usize, ProblemError> {
        let sequence = (b < self.problem.batch).then(|| self.problem.sequence(b));
        let rows = sequence.map_or(0, |s| if queries { s.seqlen_q } else { s.seqlen_k });
        if i < rows && head < heads {
            return Ok(rows);
        }
        let expected = vec![self.problem.batch, heads, rows];
        Err(ProblemError::Shape { name: "a row's place", got: vec![b, head, i], expected })
    }
}

/// Rows of the gradient of q at these places: (sequence, query head, query of the sequence). Time and memory grow with the keys
/// of a row, not with the tensors.
///
/// # Errors
/// If the problem is invalid, the tensors do not fit it, or there is no such row.
pub fn dq_rows<T: Element>(
    problem: &AttentionProblem,
    inputs: &Inputs<T>,
    given: &GradInputs<T>,
    places: &[[usize; 3]],
) -> Result<Vec<Vec<f64>>, ProblemError> {
    let prepared = Prepared::new(problem)?;
    let mut scores = Scores::new(&prepared, inputs, given)?;
    let row = |&[b, head, i]: &[usize; 3]| {
        scores.check([b, head, i], problem.heads_q, true)?;
        let s = problem.sequence(b);
        let mut dq = vec![0.0; problem.head_dim];
        for j in 0..s.seqlen_k {
            if let Some([_, dx]) = scores.at(b, head, i, j) {
                let k = inputs.k.row(s.batch, s.kv_row + j, head / problem.group());
                add(&mut dq, dx * f64::from(problem.scale()), k);
            }
        }
        Ok(dq)
    };
    places.iter().map(row).collect()
}

/// Rows of the gradients of k and v at these places: (sequence, KV head, key of the sequence). Time and memory grow with the
/// queries of a key.
///
/// # Errors
/// As [`dq_rows`].
pub fn dkv_rows<T: Element>(
    problem: &AttentionProblem,
    inputs: &Inputs<T>,
    given: &GradInputs<T>,
    places: &[[usize; 3]],
) -> Result<Vec<[Vec<f64>; 2]>, ProblemError> {
    let prepared = Prepared::new(problem)?;
    let mut scores = Scores::new(&prepared, inputs, given)?;
    let row = |&[b, kv_head, j]: &[usize; 3]| {
        scores.check([b, kv_head, j], problem.heads_kv, false)?;
        let (s, group) = (problem.sequence(b), problem.group());
        let (mut dk, mut dv) = (vec![0.0; problem.head_dim], vec![0.0; problem.head_dim_v]);
        for head in kv_head * group..(kv_head + 1) * group {
            for i in 0..s.seqlen_q {
                if let Some([p, dx]) = scores.at(b, head, i, j) {
                    let (batch, query) = (s.batch, s.q_row + i);
                    add(&mut dk, dx * f64::from(problem.scale()), inputs.q.row(batch, query, head));
                    add(&mut dv, p, given.d_o.row(batch, query, head));
                }
            }
        }
        Ok([dk, dv])
    };
    places.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::mask::Mask;
    use crate::problem::Dropout;
    use crate::reference::{backward, forward};
    use crate::score_mod::ScoreMod;
    use crate::tensor::View;

    #[test]
    fn rows_are_those_of_the_whole() {
        let mut p = AttentionProblem::new(2, 23, 4, 5, DType::F32).with_varlen(&[0, 9, 23], &[0, 31, 48]);
        (p.heads_kv, p.head_dim_v, p.sinks) = (2, 3, true);
        p.mask = Mask::Causal.and(Mask::window(11, 2));
        p.score_mod =
            ScoreMod::Chain(vec![ScoreMod::SoftCap(3.0), ScoreMod::alibi(&[0.1, 0.2, 0.4, 0.8]).unwrap()]);
        p.dropout = Some(Dropout { p: 0.3, seed: 77 });
        let numbers = |n: usize, by: f32| -> Vec<f32> { (0..n).map(|i| (i as f32 * by).sin()).collect() };
        let (q, k, v) = (numbers(23 * 4 * 5, 0.7), numbers(48 * 2 * 5, 1.3), numbers(48 * 2 * 3, 2.9));
        let (d_o, d_lse) = (numbers(23 * 4 * 3, 1.9), numbers(23 * 4, 0.9));
        let inputs = Inputs {
            q: View::new(&q, [1, 23, 4, 5]).unwrap(),
            k: View::new(&k, [1, 48, 2, 5]).unwrap(),
            v: View::new(&v, [1, 48, 2, 3]).unwrap(),
            sinks: Some(&[0.5, -0.5, 1.0, 0.0]),
        };
        let made = forward(&p, &inputs).unwrap();
        let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
        let (o, lse) = (narrow(&made.o), narrow(&made.lse));
        let d_o = View::new(&d_o, [1, 23, 4, 3]).unwrap();
        let o = View::new(&o, [1, 23, 4, 3]).unwrap();
        let given = GradInputs { o, lse: &lse, d_o, d_lse: Some(&d_lse) };
        let whole = backward(&p, &inputs, d_o, Some(&d_lse)).unwrap();
        let same = |row: &[f64], whole: &[f64]| row.iter().zip(whole).all(|(a, b)| (a - b).abs() < 1e-5);
        for (b, head, i) in
            (0..2).flat_map(|b| (0..4).flat_map(move |h| (0..[9, 14][b]).map(move |i| (b, h, i))))
        {
            let at = (([0, 9][b] + i) * 4 + head) * 5;
            let row = &dq_rows(&p, &inputs, &given, &[[b, head, i]]).unwrap()[0];
            assert!(same(row, &whole.dq[at..at + 5]) && row.len() == 5);
        }
        for (b, head, j) in
            (0..2).flat_map(|b| (0..2).flat_map(move |h| (0..[31, 17][b]).map(move |i| (b, h, i))))
        {
            let at = ([0, 31][b] + j) * 2 + head;
            let [dk, dv] = &dkv_rows(&p, &inputs, &given, &[[b, head, j]]).unwrap()[0];
            assert!(same(dk, &whole.dk[at * 5..at * 5 + 5]) && same(dv, &whole.dv[at * 3..at * 3 + 3]));
        }
        assert!(dq_rows(&p, &inputs, &given, &[[0, 0, 9]]).is_err());
        assert!(dkv_rows(&p, &inputs, &given, &[[1, 2, 0]]).is_err());
    }
}
