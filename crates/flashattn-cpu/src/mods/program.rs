//! What a mask or score mod becomes: instructions on registers.
//!
//! A *strip* is what a kernel hands over: some keys (rows) × `L` queries (lanes) of one head. Most of an expression
//! does not vary with every element of it, so each value has a [`Spread`], and is computed only as often as it
//! varies: `slope[head]` and `q + seqlen_k − seqlen_q` once a strip, a lookup by key once a row.

use flashattn_spec::expr::{Table, Var};

/// With what a value varies inside a strip, and so what its register holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Spread {
    /// With nothing: one chunk, all elements the same.
    Uniform,
    /// With the query: one chunk, the `L` values over and over.
    Lane,
    /// With the key: one element a row, densely.
    Row,
    /// With both, or with the score: one element for each element of the strip.
    Full,
}

impl Spread {
    pub fn of(query: bool, key: bool) -> Self {
        match (query, key) {
            (false, false) => Self::Uniform,
            (true, false) => Self::Lane,
            (false, true) => Self::Row,
            (true, true) => Self::Full,
        }
    }

    /// Whether a register of this spread is filled once a strip, not once a block.
    pub fn once(self) -> bool {
        matches!(self, Self::Uniform | Self::Lane)
    }
}

/// The register that stands for the scores themselves.
pub(super) const SCORE: u32 = u32::MAX;

/// A register that an instruction reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arg {
    pub register: u32,
    pub spread: Spread,
}

/// What an instruction does. Floats are f32 and Bools all ones or all zeros, in 32 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Op {
    Constant(u32),
    /// A variable that is the same for the whole strip.
    Uniform(Var),
    Query,
    Key,
    /// From one element a row to one for each element.
    Expand,
    NegFloat,
    NegInt,
    AbsFloat,
    AbsInt,
    Not,
    Exp2,
    Log2,
    Tanh,
    IntToFloat,
    BoolToFloat,
    Floor,
    AddFloat,
    SubFloat,
    MulFloat,
    DivFloat,
    MinFloat,
    MaxFloat,
    LtFloat,
    LeFloat,
    EqFloat,
    NeFloat,
    AddInt,
    SubInt,
    MulInt,
    DivInt,
    RemInt,
    MinInt,
    MaxInt,
    LtInt,
    LeInt,
    /// Of Ints or Bools; so are the three of bits.
    Eq,
    And,
    Or,
    Xor,
    Shl,
    Shr,
    Select,
    /// By index into [`Code::loads`].
    Load(u16),
    /// `a · b + c`.
    MulAdd,
    /// `c − a · b`.
    NegMulAdd,
    /// `tanh(a · b) · c`.
    SoftCap,
    /// Of an Int of each lane and one of each row, without expanding the rows.
    Outer(Outer),
}

/// Operations on a lane's Int `q` and a row's Int `k`: what masks and distances are made of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Outer {
    /// `q − k`.
    Sub,
    /// `k − q`.
    SubFrom,
    /// `|q − k|`.
    AbsSub,
    /// `|q − k|` as a Float.
    Distance,
    /// `q < k`.
    Lt,
    /// `q <= k`.
    Le,
    /// `k < q`.
    Gt,
    /// `k <= q`.
    Ge,
    /// `q == k`.
    Eq,
}

impl Outer {
    /// For an operation on (lane, row), or (row, lane) if `swapped`.
    pub fn of(op: Op, swapped: bool) -> Option<Self> {
        Some(match (op, swapped) {
            (Op::SubInt, false) => Self::Sub,
            (Op::SubInt, true) => Self::SubFrom,
            (Op::LtInt, false) => Self::Lt,
            (Op::LeInt, false) => Self::Le,
            (Op::LtInt, true) => Self::Gt,
            (Op::LeInt, true) => Self::Ge,
            (Op::Eq, _) => Self::Eq,
            _ => return None,
        })
    }
}

/// One dimension of a table along which an index, of any representation, moves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis<T> {
    pub index: T,
    /// The largest index.
    pub last: i32,
    /// Elements from one index to the next.
    pub stride: usize,
}

/// The dimensions that matter: those of size 1 are left out.
pub(super) fn axes<T: Copy>(table: &Table, index: [T; 4]) -> Vec<Axis<T>> {
    let (mut axes, mut stride) = (Vec::new(), 1);
    for (dim, index) in table.dims().into_iter().zip(index).rev() {
        if dim > 1 {
            axes.push(Axis { index, last: (dim - 1) as i32, stride });
        }
        stride *= dim;
    }
    axes
}

/// How a load finds its elements.
#[derive(Clone, Debug)]
pub(super) struct Load<T = Arg> {
    /// Which table.
    pub slot: usize,
    pub axes: Vec<Axis<T>>,
    /// The indices vary with the query or with the key, none with both: offsets are sums of one for each lane and
    /// one for each row.
    pub outer: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Instruction {
    pub op: Op,
    pub to: u32,
    pub spread: Spread,
    pub args: [Arg; 3],
}

/// A compiled program.
#[derive(Clone, Debug)]
pub(super) struct Code {
    /// Run once a strip.
    pub strip: Vec<Instruction>,
    /// Run once a block.
    pub block: Vec<Instruction>,
    pub loads: Vec<Load>,
    pub tables: Vec<Table>,
    /// How the scores are updated.
    pub update: Update,
    /// Where the further results are, in the order asked for.
    pub results: Vec<Arg>,
    /// Registers used.
    pub registers: usize,
}

/// The last operation: from old scores s to new ones, in place. Most score mods end in one of these forms.
#[derive(Clone, Copy, Debug)]
pub(super) enum Update<T = Arg> {
    /// There is nothing to update.
    None,
    /// s = a.
    Set(T),
    /// s = factor · s ± a, or ± a · b.
    Add { factor: f32, negative: bool, a: T, b: Option<T> },
    /// s = tanh(a · s) · b, where a and b do not vary inside a strip.
    SoftCap(T, T),
    /// s = −∞ unless a, or a and b.
    Hide(T, Option<T>),
}

impl<T: Copy> Update<T> {
    /// Its operands.
    pub fn operands(self) -> Vec<T> {
        match self {
            Self::None => vec![],
            Self::Set(a) => vec![a],
            Self::SoftCap(a, b) => vec![a, b],
            Self::Add { a, b, .. } | Self::Hide(a, b) => [Some(a), b].into_iter().flatten().collect(),
        }
    }

    pub fn map<U>(self, f: impl Fn(T) -> U) -> Update<U> {
        match self {
            Self::None => Update::None,
            Self::Set(a) => Update::Set(f(a)),
            Self::SoftCap(a, b) => Update::SoftCap(f(a), f(b)),
            Self::Add { factor, negative, a, b } => Update::Add { factor, negative, a: f(a), b: b.map(f) },
            Self::Hide(a, b) => Update::Hide(f(a), b.map(f)),
        }
    }
}
