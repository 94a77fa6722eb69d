//! Single rows of the oracle's forward pass: to look at a few of a result that is too large to be computed again whole.

use super::prepared::{Prepared, env};
use crate::args::Inputs;
use crate::element::Element;
use crate::problem::{AttentionProblem, ProblemError};
use crate::softmax::OnlineSoftmax;

/// A row of o and its lse, in f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// `[head_dim_v]`.
    pub o: Vec<f64>,
    /// Natural logarithm.
    pub lse: f64,
}

/// The rows of [`forward`](super::forward)'s result at these places: (sequence, query head, query of the sequence). Time and
/// memory grow with the keys of a row, not with the tensors.
///
/// # Errors
/// If the problem is invalid, the inputs do not fit it, or there is no such row.
pub fn forward_rows<T: Element>(
    problem: &AttentionProblem,
    inputs: &Inputs<T>,
    places: &[[usize; 3]],
) -> Result<Vec<Row>, ProblemError> {
    let prepared = Prepared::new(problem)?;
    inputs.check(problem)?;
    let (mut mask, mut score_mod) = (prepared.mask()?, prepared.score_mod::<f64>()?);
    let row = |&[b, head, i]: &[usize; 3]| {
        let queries = if b < problem.batch { problem.sequence(b).seqlen_q } else { 0 };
        if i >= queries || head >= problem.heads_q {
            let expected = vec![problem.batch, problem.heads_q, queries];
            return Err(ProblemError::Shape { name: "a row's place", got: vec![b, head, i], expected });
        }
        let sequence = problem.sequence(b);
        let (batch, kv_head) = (sequence.batch, head / problem.group());
        let q = inputs.q.row(batch, sequence.q_row + i, head);
        let (mut keys, mut scores) = (Vec::new(), Vec::new());
        for j in 0..sequence.seqlen_k {
            let place = env(&sequence, b, head, i, j);
            if mask.as_mut().is_some_and(|mask| !mask.eval(&place, 0.0).as_bool()) {
                continue;
            }
            let k = inputs.k.row(batch, sequence.kv_row + j, kv_head);
            let product: f64 = q.iter().zip(k).map(|(q, k)| q.to_f64() * k.to_f64()).sum();
            let x = product * f64::from(problem.scale());
            keys.push(j);
            scores.push(score_mod.as_mut().map_or(x, |mods| mods.value(&place, x)));
        }
        let live = scores.iter().any(|&s| s != f64::NEG_INFINITY);
        let mut softmax = OnlineSoftmax::new();
        let _ = softmax.update(&mut inputs.sinks.map_or(vec![], |sinks| vec![f64::from(sinks[head])]));
        let _ = softmax.update(&mut scores);
        let mut o = vec![0.0; problem.head_dim_v];
        for (&j, exp) in keys.iter().zip(&scores).filter(|_| live) {
            let p = exp * softmax.inverse_sum() * prepared.kept(b, head, i, j);
            let v = inputs.v.row(batch, sequence.kv_row + j, kv_head);
            o.iter_mut().zip(v).for_each(|(o, v)| *o += p * v.to_f64());
        }
        Ok(Row { o, lse: softmax.lse() })
    };
    places.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::mask::Mask;
    use crate::problem::Dropout;
    use crate::reference::forward;
    use crate::score_mod::ScoreMod;
    use crate::tensor::View;

    #[test]
    fn rows_are_those_of_the_whole() {
        let mut p = AttentionProblem::new(2, 23, 4, 5, DType::F32).with_varlen(&[0, 9, 23], &[0, 31, 48]);
        (p.heads_kv, p.head_dim_v, p.sinks) = (2, 3, true);
        p.mask = Mask::Causal.and(Mask::window(11, 2));
        p.score_mod = ScoreMod::alibi(&[0.1, 0.2, 0.4, 0.8]).unwrap();
        p.dropout = Some(Dropout { p: 0.3, seed: 77 });
        let numbers = |n: usize, by: f32| -> Vec<f32> { (0..n).map(|i| (i as f32 * by).sin()).collect() };
        let (q, k, v) = (numbers(23 * 4 * 5, 0.7), numbers(48 * 2 * 5, 1.3), numbers(48 * 2 * 3, 2.9));
        let inputs = Inputs {
            q: View::new(&q, [1, 23, 4, 5]).unwrap(),
            k: View::new(&k, [1, 48, 2, 5]).unwrap(),
            v: View::new(&v, [1, 48, 2, 3]).unwrap(),
            sinks: Some(&[0.5, -0.5, 1.0, 0.0]),
        };
        let whole = forward(&p, &inputs).unwrap();
        let places: Vec<[usize; 3]> =
            (0..2).flat_map(|b| (0..4).flat_map(move |h| (0..[9, 14][b]).map(move |i| [b, h, i]))).collect();
        for (row, &[b, head, i]) in forward_rows(&p, &inputs, &places).unwrap().iter().zip(&places) {
            let token = [0, 9][b] + i;
            let at = (token * 4 + head) * 3;
            assert!(row.o.iter().zip(&whole.o[at..at + 3]).all(|(a, b)| (a - b).abs() < 1e-12));
            assert!((row.lse - whole.lse[head * 23 + token]).abs() < 1e-12);
        }
        assert!(forward_rows(&p, &inputs, &[[0, 0, 9]]).is_err());
        assert!(forward_rows(&p, &inputs, &[[2, 0, 0]]).is_err());
    }
}
