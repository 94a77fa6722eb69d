//! Interval arithmetic: the bounds of an operation from the bounds of its operands.
//!
//! Ints are bounded exactly, in i64, and wrap to "anything". Floats are bounded for every executor at once: each
//! result is widened by more than the executor may be off (rounding of f32, approximate functions of a GPU, loss
//! of subnormals, overflow), and whether it may be a NaN is tracked apart from the range.

use super::{BinOp, Bounds, Type, UnOp};

/// The Float case of [`Bounds`].
#[derive(Clone, Copy)]
pub(super) struct Interval {
    pub lo: f64,
    pub hi: f64,
    pub nan: bool,
}

impl From<Bounds> for Interval {
    fn from(bounds: Bounds) -> Self {
        match bounds {
            Bounds::Float { lo, hi, nan } => Self { lo, hi, nan },
            // The builder promotes, so this is not reached.
            _ => Self { lo: f64::NEG_INFINITY, hi: f64::INFINITY, nan: true },
        }
    }
}

impl From<Interval> for Bounds {
    fn from(Interval { lo, hi, nan }: Interval) -> Self {
        // A NaN end, or no number at all, says nothing.
        if lo <= hi { Self::Float { lo, hi, nan } } else { Self::any(Type::Float) }
    }
}

/// More than the rounding of one f32 operation, relative.
const ROUNDING: f64 = 1.0 / (1 << 20) as f64;
/// More than the error of `ex2.approx`, `lg2.approx` and `tanh.approx` on a GPU (2⁻¹¹ for the last).
const APPROXIMATION: f64 = 1.0 / (1 << 9) as f64;

impl Interval {
    /// Room for an error of the executor: relative, and the loss of subnormals, and overflow of f32.
    fn widen(self, relative: f64, absolute: f64) -> Self {
        const LIMIT: f64 = f32::MAX as f64;
        let margin = |x: f64| x.abs() * relative + absolute + f64::from(f32::MIN_POSITIVE);
        let (lo, hi) = (self.lo, self.hi);
        let lo = if lo.is_finite() { lo - margin(lo) } else { lo };
        let hi = if hi.is_finite() { hi + margin(hi) } else { hi };
        Self {
            lo: if lo < -LIMIT { f64::NEG_INFINITY } else { lo },
            hi: if hi > LIMIT { f64::INFINITY } else { hi },
            nan: self.nan,
        }
    }

    fn round(self) -> Self {
        self.widen(ROUNDING, 0.0)
    }

    fn is_infinite(self) -> bool {
        self.lo == f64::NEG_INFINITY || self.hi == f64::INFINITY
    }

    fn has_zero(self) -> bool {
        self.lo <= 0.0 && 0.0 <= self.hi
    }

    fn add(self, other: Self) -> Self {
        let opposite = |a: Self, b: Self| a.lo == f64::NEG_INFINITY && b.hi == f64::INFINITY;
        let nan = self.nan || other.nan || opposite(self, other) || opposite(other, self);
        // The sum of opposite infinities at one end: that end is open.
        let end = |x: f64, open: f64| if x.is_nan() { open } else { x };
        let lo = end(self.lo + other.lo, f64::NEG_INFINITY);
        let hi = end(self.hi + other.hi, f64::INFINITY);
        Self { lo, hi, nan }.round()
    }

    fn neg(self) -> Self {
        Self { lo: -self.hi, hi: -self.lo, nan: self.nan }
    }

    fn abs(self) -> Self {
        let (a, b) = (self.lo.abs(), self.hi.abs());
        Self { lo: if self.has_zero() { 0.0 } else { a.min(b) }, hi: a.max(b), nan: self.nan }
    }

    fn mul(self, other: Self) -> Self {
        let zero_times_infinity = |a: Self, b: Self| a.has_zero() && b.is_infinite();
        let nan =
            self.nan || other.nan || zero_times_infinity(self, other) || zero_times_infinity(other, self);
        self.corners(other, nan, |a, b| if a == 0.0 || b == 0.0 { 0.0 } else { a * b })
    }

    fn div(self, other: Self) -> Self {
        if other.has_zero() {
            return Self::from(Bounds::any(Type::Float));
        }
        let nan = self.nan || other.nan || (self.is_infinite() && other.is_infinite());
        if nan {
            return Self::from(Bounds::any(Type::Float));
        }
        self.corners(other, nan, |a, b| a / b)
    }

    fn corners(self, other: Self, nan: bool, f: impl Fn(f64, f64) -> f64) -> Self {
        let (a, b, c, d) = (self.lo, self.hi, other.lo, other.hi);
        let corners = [f(a, c), f(a, d), f(b, c), f(b, d)];
        let lo = corners.into_iter().fold(f64::INFINITY, f64::min);
        let hi = corners.into_iter().fold(f64::NEG_INFINITY, f64::max);
        Self { lo, hi, nan }.round()
    }

    fn exp2(self) -> Self {
        let interval =
            Self { lo: self.lo.exp2(), hi: self.hi.exp2(), nan: self.nan }.widen(APPROXIMATION, 0.0);
        Self { lo: interval.lo.max(0.0), ..interval }
    }

    fn tanh(self) -> Self {
        Self { lo: self.lo.tanh(), hi: self.hi.tanh(), nan: self.nan }.widen(APPROXIMATION, 0.0)
    }

    fn log2(self) -> Self {
        // A subnormal may have been taken for zero.
        let log = |x: f64| {
            if x < f64::from(f32::MIN_POSITIVE) { f64::NEG_INFINITY } else { x.log2() }
        };
        let nan = self.nan || self.lo < 0.0;
        Self { lo: log(self.lo), hi: self.hi.max(f64::from(f32::MIN_POSITIVE)).log2(), nan }
            .widen(APPROXIMATION, APPROXIMATION)
    }

    fn floor(self) -> Bounds {
        let (mut lo, mut hi) = (self.lo.floor() as i32, self.hi.floor() as i32);
        if self.nan {
            (lo, hi) = (lo.min(0), hi.max(0));
        }
        Bounds::Int { lo, hi }
    }

    fn compare(op: BinOp, a: Self, b: Self) -> Bounds {
        let nan = a.nan || b.nan;
        let same = a.lo == a.hi && b.lo == b.hi && a.lo == b.lo;
        let apart = a.hi < b.lo || b.hi < a.lo;
        match op {
            BinOp::Lt => Bounds::truth(a.hi >= b.lo || nan, a.lo < b.hi),
            BinOp::Le => Bounds::truth(a.hi > b.lo || nan, a.lo <= b.hi),
            BinOp::Eq => Bounds::truth(!same || nan, !apart),
            _ => Bounds::truth(!apart, !same || nan),
        }
    }
}

pub(super) fn unary_bounds(op: UnOp, a: Bounds) -> Bounds {
    match (op, a) {
        (UnOp::Not, Bounds::Bool { can_be_false, can_be_true }) => Bounds::truth(can_be_true, can_be_false),
        (UnOp::Neg, Bounds::Int { lo, hi }) => Bounds::int(-i64::from(hi), -i64::from(lo)),
        (UnOp::Abs, Bounds::Int { lo, hi }) => {
            let (a, b) = (i64::from(lo).abs(), i64::from(hi).abs());
            Bounds::int(if lo <= 0 && 0 <= hi { 0 } else { a.min(b) }, a.max(b))
        }
        (UnOp::ToFloat, Bounds::Bool { can_be_false, can_be_true }) => {
            let (lo, hi) = (if can_be_false { 0.0 } else { 1.0 }, if can_be_true { 1.0 } else { 0.0 });
            Interval { lo, hi, nan: false }.into()
        }
        (UnOp::ToFloat, Bounds::Int { lo, hi }) => {
            // Up to 2^24, f32 holds every integer.
            let exact = lo.unsigned_abs().max(hi.unsigned_abs()) <= 1 << 24;
            let interval = Interval { lo: lo.into(), hi: hi.into(), nan: false };
            if exact { interval } else { interval.round() }.into()
        }
        (UnOp::Neg, a) => Interval::from(a).neg().into(),
        (UnOp::Abs, a) => Interval::from(a).abs().into(),
        (UnOp::Exp2, a) => Interval::from(a).exp2().into(),
        (UnOp::Log2, a) => Interval::from(a).log2().into(),
        (UnOp::Tanh, a) => Interval::from(a).tanh().into(),
        (UnOp::Floor, a) => Interval::from(a).floor(),
        (_, a) => a,
    }
}

pub(super) fn binary_bounds(op: BinOp, a: Bounds, b: Bounds) -> Bounds {
    use BinOp::*;
    match (a, b) {
        (Bounds::Int { lo: a, hi: b }, Bounds::Int { lo: c, hi: d }) => {
            int_bounds(op, [a, b].map(i64::from), [c, d].map(i64::from))
        }
        (
            Bounds::Bool { can_be_false: a, can_be_true: b },
            Bounds::Bool { can_be_false: c, can_be_true: d },
        ) => match op {
            And => Bounds::truth(a || c, b && d),
            Or => Bounds::truth(a && c, b || d),
            Eq => Bounds::truth((a && d) || (b && c), (a && c) || (b && d)),
            _ => Bounds::truth((a && c) || (b && d), (a && d) || (b && c)),
        },
        (a, b) => {
            let (a, b) = (Interval::from(a), Interval::from(b));
            let nan = a.nan || b.nan;
            let interval = match op {
                Add => a.add(b),
                Sub => a.add(b.neg()),
                Mul => a.mul(b),
                Div => a.div(b),
                Min => Interval { lo: a.lo.min(b.lo), hi: a.hi.min(b.hi), nan },
                Max => Interval { lo: a.lo.max(b.lo), hi: a.hi.max(b.hi), nan },
                _ => return Interval::compare(op, a, b),
            };
            interval.into()
        }
    }
}

fn int_bounds(op: BinOp, [a, b]: [i64; 2], [c, d]: [i64; 2]) -> Bounds {
    use BinOp::*;
    let corners = |f: &dyn Fn(i64, i64) -> i64| {
        let all = [f(a, c), f(a, d), f(b, c), f(b, d)];
        let (lo, hi) = all.into_iter().fold((i64::MAX, i64::MIN), |(lo, hi), x| (lo.min(x), hi.max(x)));
        Bounds::int(lo, hi)
    };
    // All bits up to the highest that either can have.
    let ones = |x: i64| (1i64 << (64 - x.leading_zeros())) - 1;
    let natural = a >= 0 && c >= 0;
    match op {
        Add => Bounds::int(a + c, b + d),
        Sub => Bounds::int(a - d, b - c),
        Mul => corners(&|x, y| x * y),
        // Monotone in each operand as long as the divisor keeps its sign. The quotient is no larger than `x`.
        Div if c > 0 || d < 0 => corners(&|x, y| (x * y.signum()).div_euclid(y.abs())),
        Div => {
            let most = a.abs().max(b.abs());
            Bounds::int(-most, most)
        }
        // One chunk: the remainder grows with the operand.
        Rem if c == d && c > 0 && a.div_euclid(c) == b.div_euclid(c) => {
            Bounds::int(a.rem_euclid(c), b.rem_euclid(c))
        }
        Rem => Bounds::int((c + 1).min(0), (d - 1).max(0)),
        Min => Bounds::int(a.min(c), b.min(d)),
        Max => Bounds::int(a.max(c), b.max(d)),
        BitAnd if natural => Bounds::int(0, b.min(d)),
        BitAnd if a >= 0 => Bounds::int(0, b),
        BitAnd if c >= 0 => Bounds::int(0, d),
        BitOr if natural => Bounds::int(a.max(c), ones(b.max(d))),
        BitXor if natural => Bounds::int(0, ones(b.max(d))),
        Shl if c >= 0 && d <= 31 => corners(&|x, y| x << y),
        Shr if c >= 0 && d <= 31 => corners(&|x, y| x >> y),
        BitAnd | BitOr | BitXor | Shl | Shr => Bounds::any(Type::Int),
        Lt => Bounds::truth(b >= c, a < d),
        Le => Bounds::truth(b > c, a <= d),
        Eq => Bounds::truth(!(a == b && c == d && a == c), b >= c && d >= a),
        _ => Bounds::truth(b >= c && d >= a, !(a == b && c == d && a == c)),
    }
}
