//! Whether an output is right.
//!
//! Allowed is twice the error of standard attention, and on top of it a floor for where that happens to be exact:
//!
//! - one rounding of the largest element when it is stored: u · max |output|, with the unit roundoff of the output's type;
//! - five standard deviations of what rounding in f32, and of o to the dtype, does to the least exact element
//!   ([`crate::reference::rounding`] has the formulas). They hold at the size of the terms, which may cancel: a row that
//!   sees one key has dP = δ, so its dq is their rounding, and the oracle's is 0.
//!
//! Five, because the largest of some hundred thousand normal errors is at about 4.5.

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

/// Judges one output; `floor` is from [`floor`].
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

/// What is allowed on top of twice standard attention's error; see the module.
pub(super) fn floor(tensor: &str, dtype: DType, expected: &[f64], deviation: f64) -> f64 {
    let stored = if matches!(tensor, "o" | "dq" | "dk" | "dv") { dtype } else { DType::F32 };
    let size = expected.iter().filter(|x| x.is_finite()).fold(0.0f64, |m, x| m.max(x.abs()));
    stored.epsilon() * size + 5.0 * deviation
}
