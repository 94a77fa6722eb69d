//! Bounds of an expression over a block of the score matrix, by interval analysis.
//!
//! This is how the block schedule learns, without looking at each element, that a mask is false all over a block
//! (skip it), true all over it (no masking work), or undecided. Bounds are always safe: whatever value an executor
//! computes at a place in the block lies inside them, in f32 as in f64 and with the approximate exponential,
//! logarithm and tangent of a GPU. They are exact for the usual masks, in which each variable occurs once on
//! either side of a comparison.

use super::eval::binary;
use super::interval::{Interval, binary_bounds, unary_bounds};
use super::{Changes, Deps, Env, Expr, Node, NodeId, Program, Table, Type, Value, Var};

/// A box of places: an inclusive range `(lo, hi)` for each variable.
///
/// ```
/// # use flashattn_spec::expr::{Block, Env};
/// let here = Env { seqlen_q: 512, seqlen_k: 512, ..Env::default() };
/// let block = Block { q: (128, 255), kv: (0, 63), ..Block::at(&here) };
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Block {
    /// [`Var::Batch`].
    pub batch: (i32, i32),
    /// [`Var::Head`].
    pub head: (i32, i32),
    /// [`Var::Q`].
    pub q: (i32, i32),
    /// [`Var::Kv`].
    pub kv: (i32, i32),
    /// [`Var::SeqlenQ`].
    pub seqlen_q: (i32, i32),
    /// [`Var::SeqlenK`].
    pub seqlen_k: (i32, i32),
    /// [`Var::QStart`].
    pub q_start: (i32, i32),
    /// [`Var::KvStart`].
    pub kv_start: (i32, i32),
}

impl Block {
    /// The block that holds one place only.
    pub fn at(env: &Env) -> Self {
        let point = |x| (x, x);
        Self {
            batch: point(env.batch),
            head: point(env.head),
            q: point(env.q),
            kv: point(env.kv),
            seqlen_q: point(env.seqlen_q),
            seqlen_k: point(env.seqlen_k),
            q_start: point(env.q_start),
            kv_start: point(env.kv_start),
        }
    }

    /// The range of one variable.
    pub fn get(&self, var: Var) -> (i32, i32) {
        match var {
            Var::Batch => self.batch,
            Var::Head => self.head,
            Var::Q => self.q,
            Var::Kv => self.kv,
            Var::SeqlenQ => self.seqlen_q,
            Var::SeqlenK => self.seqlen_k,
            Var::QStart => self.q_start,
            Var::KvStart => self.kv_start,
        }
    }
}

/// What values an expression may take.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Bounds {
    /// A Float from `lo` to `hi` inclusive, or a NaN if `nan`.
    Float {
        /// The least value.
        lo: f64,
        /// The greatest value.
        hi: f64,
        /// Whether it may be a NaN.
        nan: bool,
    },
    /// An Int from `lo` to `hi` inclusive.
    Int {
        /// The least value.
        lo: i32,
        /// The greatest value.
        hi: i32,
    },
    /// A Bool.
    Bool {
        /// Whether it may be false.
        can_be_false: bool,
        /// Whether it may be true.
        can_be_true: bool,
    },
}

impl Bounds {
    /// A Bool that is true at every place of the block.
    pub fn is_always(&self) -> bool {
        matches!(self, Self::Bool { can_be_false: false, .. })
    }

    /// A Bool that is false at every place of the block.
    pub fn is_never(&self) -> bool {
        matches!(self, Self::Bool { can_be_true: false, .. })
    }

    /// Whether the value is within these bounds (and of their type).
    pub fn contains(&self, value: Value) -> bool {
        match (*self, value) {
            (Self::Float { lo, hi, nan }, Value::Float(x)) => (lo <= x && x <= hi) || (nan && x.is_nan()),
            (Self::Int { lo, hi }, Value::Int(x)) => lo <= x && x <= hi,
            (Self::Bool { can_be_true, .. }, Value::Bool(true)) => can_be_true,
            (Self::Bool { can_be_false, .. }, Value::Bool(false)) => can_be_false,
            _ => false,
        }
    }

    pub(super) fn any(ty: Type) -> Self {
        match ty {
            Type::Float => Self::Float { lo: f64::NEG_INFINITY, hi: f64::INFINITY, nan: true },
            Type::Int => Self::Int { lo: i32::MIN, hi: i32::MAX },
            Type::Bool => Self::truth(true, true),
        }
    }

    pub(super) fn truth(can_be_false: bool, can_be_true: bool) -> Self {
        Self::Bool { can_be_false, can_be_true }
    }

    /// The only value, if there is only one.
    fn point(self) -> Option<Value> {
        match self {
            Self::Float { lo, hi, nan: false } if lo == hi => Some(Value::Float(lo)),
            Self::Int { lo, hi } if lo == hi => Some(Value::Int(lo)),
            Self::Bool { can_be_false: false, .. } => Some(Value::Bool(true)),
            Self::Bool { can_be_true: false, .. } => Some(Value::Bool(false)),
            _ => None,
        }
    }

    fn exactly(value: Value) -> Self {
        match value {
            Value::Float(x) => Interval { lo: x, hi: x, nan: x.is_nan() }.into(),
            Value::Int(x) => Self::Int { lo: x, hi: x },
            Value::Bool(x) => Self::truth(!x, x),
        }
    }

    /// An Int; an end outside of i32 means that it may have wrapped to anything.
    pub(super) fn int(lo: i64, hi: i64) -> Self {
        match (i32::try_from(lo), i32::try_from(hi)) {
            (Ok(lo), Ok(hi)) => Self::Int { lo, hi },
            _ => Self::any(Type::Int),
        }
    }

    fn union(self, other: Self) -> Self {
        match (self, other) {
            (Self::Int { lo: a, hi: b }, Self::Int { lo: c, hi: d }) => {
                Self::Int { lo: a.min(c), hi: b.max(d) }
            }
            (
                Self::Bool { can_be_false: a, can_be_true: b },
                Self::Bool { can_be_false: c, can_be_true: d },
            ) => Self::truth(a || c, b || d),
            _ => {
                let (a, b) = (Interval::from(self), Interval::from(other));
                Interval { lo: a.lo.min(b.lo), hi: a.hi.max(b.hi), nan: a.nan || b.nan }.into()
            }
        }
    }
}

/// The most table elements looked at for one load; beyond it the extent of the whole table is taken.
const SCAN: usize = 1 << 16;

/// Bounds a program over many blocks without allocating.
///
/// Like [`super::Evaluator`], it computes again only what depends on a variable whose range has changed.
pub struct Bounder<'a> {
    program: &'a Program,
    tables: &'a [Table],
    bounds: Vec<Bounds>,
    changes: Changes<Block>,
}

impl<'a> Bounder<'a> {
    /// For this program with these tables. A load from a table that is missing or of the wrong type has the bounds
    /// of its type.
    pub fn new(program: &'a Program, tables: &'a [Table]) -> Self {
        let bounds = program.types().iter().map(|&ty| Bounds::any(ty)).collect();
        Self { program, tables, bounds, changes: Changes::new() }
    }

    /// The bounds of the program's first result over this block. The score may be anything.
    pub fn bounds(&mut self, block: &Block) -> Bounds {
        let Self { program, tables, bounds, changes } = self;
        for &i in changes.update(program, block, Block::get, Deps::default()) {
            let i = usize::from(i);
            bounds[i] = compute(&program.nodes()[i], program.types()[i], tables, bounds, block);
        }
        bounds[program.roots()[0].index()]
    }
}

fn compute(node: &Node, ty: Type, tables: &[Table], bounds: &[Bounds], block: &Block) -> Bounds {
    let of = |id: NodeId| bounds[id.index()];
    match *node {
        Node::Score => Bounds::any(Type::Float),
        Node::Var(var) => {
            let (a, b) = block.get(var);
            Bounds::Int { lo: a.min(b), hi: a.max(b) }
        }
        Node::Float(bits) => Bounds::exactly(Value::Float(f32::from_bits(bits).into())),
        Node::Int(x) => Bounds::exactly(Value::Int(x)),
        Node::Bool(x) => Bounds::exactly(Value::Bool(x)),
        Node::Load { table, index } => match tables.get(table.index()) {
            Some(table) if table.ty() == ty => load(table, index.map(of)),
            _ => Bounds::any(ty),
        },
        Node::Unary(op, a) => unary_bounds(op, of(a)),
        Node::Binary(op, a, b) => match (of(a).point(), of(b).point()) {
            // On integers, nothing is lost by computing; on floats, the executor's rounding would be.
            (Some(a @ Value::Int(_)), Some(b @ Value::Int(_))) => Bounds::exactly(binary(op, a, b)),
            _ => binary_bounds(op, of(a), of(b)),
        },
        Node::Select(c, a, b) => match of(c).point() {
            Some(Value::Bool(true)) => of(a),
            Some(_) => of(b),
            None => of(a).union(of(b)),
        },
    }
}

/// The extent of the part of a table that may be read.
fn load(table: &Table, index: [Bounds; 4]) -> Bounds {
    let range = index.map(|i| match i {
        Bounds::Int { lo, hi } => (lo, hi),
        _ => (i32::MIN, i32::MAX),
    });
    let extent = table.extent(range.map(|r| r.0), range.map(|r| r.1), SCAN);
    match table.ty() {
        Type::Int => Bounds::Int { lo: extent.lo as i32, hi: extent.hi as i32 },
        _ => Interval { lo: extent.lo, hi: extent.hi, nan: extent.nan }.into(),
    }
}

impl Expr {
    /// The bounds over one block. For many blocks, a [`Bounder`] is quicker.
    pub fn bounds(&self, block: &Block, tables: &[Table]) -> Bounds {
        Bounder::new(self, tables).bounds(block)
    }
}
