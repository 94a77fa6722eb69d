//! Whether an output is right.
//!
//! Allowed is twice the error of standard attention, and on top of it a floor for what luck can do where there are
//! few elements or where standard attention happens to be exact. With u the unit roundoff of the dtype and u₃₂
//! that of f32, the floor is
//!
//! - 4 u · max |output|: two units in the last place of the largest element (for o, a sum over all keys, 5 u; for lse: 8 u₃₂ · max(1, |lse|));
//! - for gradients besides, 2 u₃₂ · max |lse| · max |output|: the backward pass gets lse in f32, and its rounding is a
//!   relative error of every probability exp(s − lse), as is that of s;
//! - for dq and dk besides, 48 u₃₂ · the size of the terms that cancel in dS = P ∘ (dP − δ): a row that sees one key
//!   has dP = δ, so its gradient is the rounding of their difference. The size is that of scale · (dO·v) · k, as
//!   dropout enlarges it, for typical rows, for dk times √(queries a key) over keys, which is how independent roundings add up;
//! - for dq and dk besides, 6 u · the size of the same terms with o in the place of v: δ = rowsum(dO ∘ o) is made from
//!   an o that the forward pass has rounded to the dtype;
//! - for dsinks and dtables besides, (4 u + 16 u₃₂) · √Σ summand²: each summand rounded a few times.

use super::Failure;
use crate::element::DType;

/// The error of one output, and what is allowed.
pub(super) struct Verdict {
    pub error: f64,
    pub allowed: f64,
    detail: String,
}

impl Verdict {
    pub fn is_right(&self) -> bool {
        self.error <= self.allowed
    }

    /// Error over what is allowed.
    pub fn ratio(&self) -> f64 {
        if self.error == 0.0 { 0.0 } else { self.error / self.allowed }
    }

    pub fn failure(self, name: &str, tensor: &str) -> Failure {
        let Verdict { error, allowed, detail } = self;
        Failure { name: name.to_owned(), tensor: tensor.to_owned(), error, allowed, detail }
    }
}

/// Distance of a result from the oracle's: infinite unless both or neither are finite. An lse of −∞ says that the
/// row saw nothing, so it must be there exactly where it should be.
fn distance(tensor: &str, got: f64, expected: f64) -> f64 {
    let saw_nothing = |x| tensor == "lse" && x == f64::NEG_INFINITY;
    if got.is_finite() != expected.is_finite() || saw_nothing(got) != saw_nothing(expected) {
        f64::INFINITY
    } else if got.is_finite() {
        (got - expected).abs()
    } else {
        0.0
    }
}

/// Largest distance, and where.
fn largest(tensor: &str, got: &[f64], expected: &[f64]) -> (f64, usize) {
    let distances = got.iter().zip(expected).map(|(&g, &e)| distance(tensor, g, e)).enumerate();
    distances.fold((0.0, 0), |worst, (i, d)| if d > worst.0 { (d, i) } else { worst })
}

/// Judges one output; `floor` is from [`Sizes::floor`].
pub(super) fn judge(tensor: &str, got: &[f64], expected: &[f64], standard: &[f64], floor: f64) -> Verdict {
    if got.len() != expected.len() {
        let detail = format!("has {} elements, expected {}", got.len(), expected.len());
        return Verdict { error: f64::INFINITY, allowed: floor, detail };
    }
    let (error, at) = largest(tensor, got, expected);
    // Where standard attention overflows its dtype there is no yardstick; other executors need not.
    let yardstick = standard.iter().zip(expected).map(|(&s, &e)| distance(tensor, s, e));
    let allowed = 2.0 * yardstick.filter(|d| d.is_finite()).fold(0.0, f64::max) + floor;
    let detail = match got.get(at) {
        None => String::new(),
        Some(got) => format!("element {at} is {got:e}, expected {:e}", expected[at]),
    };
    Verdict { error, allowed, detail }
}

/// Sizes of a case's tensors, for the floors.
pub(super) struct Sizes {
    pub dtype: DType,
    /// |softmax_scale|.
    pub scale: f64,
    /// 1 / (1 − dropout probability).
    pub kept: f64,
    /// Root mean squares.
    pub q: f64,
    pub k: f64,
    pub v: f64,
    pub o: f64,
    pub d_o: f64,
    pub head_dim_v: usize,
    /// Query rows that a key's gradient sums over.
    pub queries_per_key: usize,
    pub seqlen_k: usize,
    /// Largest finite |lse|.
    pub lse: f64,
}

pub(super) fn max_abs(x: &[f64]) -> f64 {
    x.iter().filter(|x| x.is_finite()).fold(0.0, |m, x| m.max(x.abs()))
}

impl Sizes {
    /// See the module.
    pub fn floor(&self, tensor: &str, expected: &[f64], rss: &[f64]) -> f64 {
        let (u, u32) = (self.dtype.epsilon(), DType::F32.epsilon());
        // What is added up in dX, without the probability.
        let ds = self.scale * self.kept * self.d_o * self.v * (self.head_dim_v as f64).sqrt();
        let delta = 6.0 * u * self.scale * self.d_o * self.o * (self.head_dim_v as f64).sqrt();
        let sum = ((self.queries_per_key as f64).sqrt() / self.seqlen_k.max(1) as f64).max(1.0);
        let (size, lse) = (max_abs(expected), 2.0 * u32 * self.lse);
        match tensor {
            "o" => 5.0 * u * size,
            "lse" => 8.0 * u32 * size.max(1.0),
            "dq" => (4.0 * u + lse) * size + (48.0 * u32 * ds + delta) * self.k,
            "dk" => (4.0 * u + lse) * size + (48.0 * u32 * ds + delta) * self.q * sum,
            "dv" => (4.0 * u + lse) * size,
            _ => (4.0 * u32 + lse) * size + (4.0 * u + 16.0 * u32 + lse) * max_abs(rss),
        }
    }
}

/// Root mean square of the finite elements.
pub(super) fn rms(x: &[f64]) -> f64 {
    let (n, sum) = x.iter().filter(|x| x.is_finite()).fold((0usize, 0.0), |(n, s), x| (n + 1, s + x * x));
    (sum / n.max(1) as f64).sqrt()
}
