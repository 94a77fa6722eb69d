//! The softmax of a row that arrives block by block, and merging of results over disjoint sets of keys.
//!
//! Both rest on the same identity (paper, section 3.1): with m = max s and ℓ = Σ exp(s − m), two parts of a row
//! combine by rescaling each with exp(its max − common max). [`OnlineSoftmax`] does it for scores, one block
//! after the other; [`AttentionState`] for finished outputs, in any order.
//!
//! Written for reading, and used by the oracle; executors do the same with vectors. What happens at the edges:
//! a row without a key, or with nothing but scores of −∞, has sum 0, o = 0 and lse = −∞; a NaN among the scores,
//! or +∞ (whose softmax is ∞/∞), makes the row NaN.

use num_traits::Float;

/// Running maximum and sum of exponentials of a row of scores (m and ℓ of the paper's Algorithm 1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OnlineSoftmax<T = f32> {
    /// Largest score so far; −∞ before the first. NaNs are left out here and show in the sum.
    pub row_max: T,
    /// Σ exp(score − row_max) so far.
    pub row_sum: T,
}

impl<T: Float> Default for OnlineSoftmax<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Float> OnlineSoftmax<T> {
    /// No scores yet.
    pub fn new() -> Self {
        OnlineSoftmax { row_max: T::neg_infinity(), row_sum: T::zero() }
    }

    /// Takes in a block of scores (natural-log units) and replaces each by exp(score − new maximum). Returns the
    /// factor by which everything summed with the old maximum must be multiplied: so
    /// `o = o * factor + scores · V` (Algorithm 1, lines 10–12, with the division by ℓ left to the end).
    #[must_use = "what was accumulated so far must be rescaled by it"]
    pub fn update(&mut self, scores: &mut [T]) -> T {
        let old_max = self.row_max;
        self.row_max = scores.iter().fold(old_max, |m, &s| m.max(s));
        // While everything is −∞, subtracting the maximum would give NaN; any finite shift gives exp(−∞) = 0.
        let shift = shift(self.row_max);
        let factor = (old_max - shift).exp();
        let mut sum = T::zero();
        for s in scores {
            *s = (*s - shift).exp();
            sum = sum + *s;
        }
        self.row_sum = self.row_sum * factor + sum;
        factor
    }

    /// Log-sum-exp of all scores so far: row_max + ln(row_sum); −∞ if there was none above −∞.
    pub fn lse(&self) -> T {
        self.row_max + self.row_sum.ln()
    }

    /// What the accumulated row is multiplied by in the end: 1 / row_sum, or 0 for a row that saw nothing.
    pub fn inverse_sum(&self) -> T {
        if self.row_sum == T::zero() { T::zero() } else { self.row_sum.recip() }
    }
}

fn shift<T: Float>(max: T) -> T {
    if max == T::neg_infinity() { T::zero() } else { max }
}

/// Attention of one query over some set of keys: enough to merge it with the result over other keys.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionState {
    /// The output row over these keys, `[head_dim_v]`.
    pub o: Vec<f32>,
    /// Log-sum-exp (natural) of the scores of these keys; −∞ if there are none, and then o is 0.
    pub lse: f32,
}

impl AttentionState {
    /// Attention over no keys: merging it changes nothing.
    pub fn identity(head_dim_v: usize) -> Self {
        AttentionState { o: vec![0.0; head_dim_v], lse: f32::NEG_INFINITY }
    }

    /// Makes this the attention over both sets of keys, which must be disjoint. A sink logit may count in one.
    pub fn merge(&mut self, other: &AttentionState) {
        merge(&mut self.o, &mut self.lse, &other.o, other.lse);
    }
}

/// Makes (o, lse) the attention over its own keys and those of (other_o, other_lse): each output is weighted by
/// its share exp(lse − common lse) of the softmax's denominator. Associative and commutative (up to rounding),
/// with (0, −∞) as identity. The rows have equal lengths.
pub fn merge(o: &mut [f32], lse: &mut f32, other_o: &[f32], other_lse: f32) {
    let shift = shift(lse.max(other_lse));
    let (own, other) = ((*lse - shift).exp(), (other_lse - shift).exp());
    let sum = own + other;
    let inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
    let (own, other) = (own * inverse, other * inverse);
    for (x, y) in o.iter_mut().zip(other_o) {
        *x = own * *x + other * y;
    }
    *lse = if sum == 0.0 { f32::NEG_INFINITY } else { shift + sum.ln() };
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Softmax of the whole row in f64, times the values.
    fn attend(scores: &[f64], values: &[f64]) -> (f64, f64) {
        let m = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if m == f64::NEG_INFINITY {
            return (0.0, m);
        }
        let sum: f64 = scores.iter().map(|s| (s - m).exp()).sum();
        let o: f64 = scores.iter().zip(values).map(|(s, v)| (s - m).exp() * v).sum();
        (o / sum, m + sum.ln())
    }

    fn state(scores: &[f64], values: &[f64]) -> AttentionState {
        let (o, lse) = attend(scores, values);
        AttentionState { o: vec![o as f32], lse: lse as f32 }
    }

    fn merged(a: &AttentionState, b: &AttentionState) -> AttentionState {
        let mut c = a.clone();
        c.merge(b);
        c
    }

    fn close(a: &AttentionState, b: &AttentionState) -> bool {
        let lse = a.lse == b.lse || (a.lse - b.lse).abs() <= 2e-6 * a.lse.abs().max(1.0);
        lse && a.o.iter().zip(&b.o).all(|(x, y)| (x - y).abs() <= 1e-5)
    }

    /// Rows of (score, value); about one score in four is −∞.
    fn row(len: usize) -> impl Strategy<Value = Vec<(f64, f64)>> {
        let score = prop_oneof![3 => -60.0..60.0f64, 1 => Just(f64::NEG_INFINITY)];
        prop::collection::vec((score, -2.0..2.0f64), 0..len)
    }

    proptest! {
        #[test]
        fn blocks_give_the_softmax_of_the_whole_row(row in row(40), cuts in prop::collection::vec(0..40usize, 3)) {
            let (scores, values): (Vec<f64>, Vec<f64>) = row.into_iter().unzip();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(scores.len())).collect();
            cuts.extend([0, scores.len()]);
            cuts.sort_unstable();
            let (mut softmax, mut o) = (OnlineSoftmax::<f64>::new(), 0.0);
            for w in cuts.windows(2) {
                let mut block = scores[w[0]..w[1]].to_vec();
                o *= softmax.update(&mut block);
                o += block.iter().zip(&values[w[0]..w[1]]).map(|(p, v)| p * v).sum::<f64>();
            }
            o *= softmax.inverse_sum();
            let (expected, lse) = attend(&scores, &values);
            prop_assert!((o - expected).abs() < 1e-13);
            prop_assert!(softmax.lse() == lse || (softmax.lse() - lse).abs() < 1e-13);
        }

        #[test]
        fn merge_is_associative_and_equals_the_unsplit_row(a in row(8), b in row(8), c in row(8)) {
            let all: Vec<_> = a.iter().chain(&b).chain(&c).copied().collect();
            let state = |row: &[(f64, f64)]| {
                let (s, v): (Vec<f64>, Vec<f64>) = row.iter().copied().unzip();
                state(&s, &v)
            };
            let (a, b, c, all) = (state(&a), state(&b), state(&c), state(&all));
            let left = merged(&merged(&a, &b), &c);
            let right = merged(&a, &merged(&b, &c));
            prop_assert!(close(&left, &right), "{left:?} {right:?}");
            prop_assert!(close(&left, &all), "{left:?} {all:?}");
            prop_assert!(close(&merged(&a, &b), &merged(&b, &a)));
        }
    }

    #[test]
    fn identity_is_exact() {
        let a = AttentionState { o: vec![0.1, -7.3], lse: 1.7 };
        let id = AttentionState::identity(2);
        assert_eq!(merged(&a, &id), a);
        assert_eq!(merged(&id, &a), a);
        assert_eq!(merged(&id, &id), id);
    }

    #[test]
    fn nan_reaches_the_row_and_infinite_scores_are_nan() {
        let nan = AttentionState { o: vec![f32::NAN], lse: f32::NAN };
        for other in [AttentionState::identity(1), AttentionState { o: vec![1.0], lse: 0.5 }] {
            for x in [merged(&nan, &other), merged(&other, &nan)] {
                assert!(x.o[0].is_nan() && x.lse.is_nan());
            }
        }
        // A NaN in a value leaves lse alone.
        let mut x = AttentionState { o: vec![f32::NAN, 1.0], lse: 0.5 };
        x.merge(&AttentionState { o: vec![1.0, 1.0], lse: 0.5 });
        assert!(x.o[0].is_nan() && x.o[1] == 1.0 && x.lse.is_finite());

        for blocks in [
            [&mut [f32::NAN, 1.0][..], &mut [2.0]],
            [&mut [1.0][..], &mut [f32::NAN]],
            [&mut [f32::NAN][..], &mut [f32::NEG_INFINITY]],
            [&mut [f32::INFINITY][..], &mut [0.0]],
            [&mut [0.0][..], &mut [f32::INFINITY]],
        ] {
            let mut softmax = OnlineSoftmax::<f32>::new();
            for block in blocks {
                let _ = softmax.update(block);
            }
            assert!(softmax.lse().is_nan() && softmax.inverse_sum().is_nan(), "{softmax:?}");
        }
    }

    #[test]
    fn a_row_of_minus_infinity_saw_nothing() {
        let mut softmax = OnlineSoftmax::<f32>::default();
        let mut block = [f32::NEG_INFINITY; 3];
        assert_eq!(softmax.update(&mut block), 0.0);
        assert_eq!(block, [0.0; 3]);
        assert_eq!((softmax.lse(), softmax.inverse_sum()), (f32::NEG_INFINITY, 0.0));
        assert_eq!(softmax.update(&mut [3.0]), 0.0);
        assert_eq!((softmax.lse(), softmax.inverse_sum()), (3.0, 1.0));
    }
}
