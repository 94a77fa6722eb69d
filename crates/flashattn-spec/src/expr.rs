//! The small expression language in which masks and score mods are written.
//!
//! A mask says whether query `q` may see key `kv`; a score mod changes the scaled score between the product
//! `Q·Kᵀ` and the softmax (arXiv 2205.14135, Algorithm 0, lines 1 and 2). Both are functions of one element of
//! the score matrix, so both are an [`Expr`]: data, not code. Hence every executor can run it in its own way,
//! the kernel cache can hash it, the backward pass can differentiate it, and the block schedule can bound it
//! over a whole block.
//!
//! It is written as a closure over [`Term`]s, which [`Expr::trace`] runs once to record what it does:
//!
//! ```
//! # use flashattn_spec::expr::{Expr, Table};
//! let slope = Table::per_head(vec![0.5, 0.25])?;
//! let alibi = Expr::trace(|s, ix| s - (ix.q - ix.kv).abs() * slope[ix.head])?;
//! assert_eq!(alibi.expr.to_string(), "score - abs(q - kv) * t0[head]");
//!
//! let causal = Expr::trace_mask(|ix| ix.kv.le(ix.diagonal()))?;
//! assert_eq!(causal.expr.to_string(), "kv <= q + seqlen_k - seqlen_q");
//! # Ok::<(), flashattn_spec::expr::ExprError>(())
//! ```
//!
//! # Meaning
//!
//! Three types: `Float`, `Int` (i32) and `Bool`. Nothing traps: integer arithmetic wraps, `x / 0` and `x % 0` are
//! 0 for integers, shifts use the low five bits of the amount, a table index outside its dimension is clamped to
//! the edge. Integer division and remainder round towards minus infinity, so that `q / 64` is a chunk number even
//! for the negative positions left of the first key. Float constants are f32 (what a kernel can hold); float
//! arithmetic is that of the executor: f64 in the oracle, f32 elsewhere. `min` and `max` return NaN if an operand
//! is NaN; `floor` of a NaN is 0 and saturates at the limits of i32.
//!
//! # Reading order
//!
//! This file (the data), `build` (types, simplification), `trace` (closures), `table`, `eval` (the meaning,
//! as a program), `bounds` and `interval`, `derive` (derivatives), `display`.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

mod bounds;
mod build;
mod derive;
mod display;
mod error;
mod eval;
mod interval;
mod table;
#[cfg(test)]
mod tests;
mod trace;

pub use bounds::{Block, Bounder, Bounds};
pub use build::Builder;
pub use derive::{Gradients, TableGrad};
pub use error::ExprError;
pub use eval::{Env, Evaluator, Real, Value};
pub use table::{Table, TableData};
pub use trace::{Index, Term, Traced};

/// The most nodes that one traced or combined [`Expr`] may have; its [`Gradients`] may have up to 65535.
pub const MAX_NODES: usize = 4096;

/// The type of a value.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Type {
    /// A real number; f64 in the oracle, f32 in the other executors.
    Float,
    /// A 32-bit signed integer; arithmetic wraps.
    Int,
    /// A truth value.
    Bool,
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Float => "float",
            Self::Int => "int",
            Self::Bool => "bool",
        })
    }
}

/// What an expression can know of the place of a score; all are [`Type::Int`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Var {
    /// Which sequence of the batch.
    Batch,
    /// Which query head.
    Head,
    /// Which query, counted from the start of its own sequence.
    Q,
    /// Which key, counted from the start of its own sequence.
    Kv,
    /// How many queries this sequence has.
    SeqlenQ,
    /// How many keys this sequence has.
    SeqlenK,
    /// First query of this sequence in the packed order: `cu_seqlens_q[batch]`, or `batch * seqlen_q` when dense.
    QStart,
    /// First key of this sequence in the packed order: `cu_seqlens_k[batch]`, or `batch * seqlen_k` when dense.
    KvStart,
}

impl Var {
    /// Every variable, in the order of its discriminant.
    pub const ALL: [Self; 8] = [
        Self::Batch,
        Self::Head,
        Self::Q,
        Self::Kv,
        Self::SeqlenQ,
        Self::SeqlenK,
        Self::QStart,
        Self::KvStart,
    ];
}

/// Operations on one value.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum UnOp {
    /// `-x` (Int wraps).
    Neg,
    /// `|x|` (Int wraps: `abs(i32::MIN) = i32::MIN`).
    Abs,
    /// Logical not of a Bool.
    Not,
    /// `2^x`, Float.
    Exp2,
    /// Base-2 logarithm, Float: NaN below zero, −∞ at zero.
    Log2,
    /// Hyperbolic tangent, Float.
    Tanh,
    /// Int to the nearest Float; Bool to 0 or 1.
    ToFloat,
    /// Float to the largest Int not above it; saturates; NaN gives 0.
    Floor,
}

/// Operations on two values of one type.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum BinOp {
    /// Sum.
    Add,
    /// Difference.
    Sub,
    /// Product.
    Mul,
    /// Quotient; for Int rounded down, `x / 0 = 0` and `i32::MIN / -1 = i32::MIN`.
    Div,
    /// Int: `x - y * (x / y)`, which has the sign of `y`; `x % 0 = 0`.
    Rem,
    /// The lesser; NaN if either is NaN (IEEE 754 `minimum`).
    Min,
    /// The greater; NaN if either is NaN (IEEE 754 `maximum`).
    Max,
    /// `<` on numbers; false if either is NaN.
    Lt,
    /// `<=` on numbers; false if either is NaN.
    Le,
    /// `==`; false if either is NaN.
    Eq,
    /// `!=`; true if either is NaN.
    Ne,
    /// Logical and.
    And,
    /// Logical or.
    Or,
    /// Bitwise and of Ints.
    BitAnd,
    /// Bitwise or of Ints.
    BitOr,
    /// Bitwise exclusive or of Ints.
    BitXor,
    /// Shift left of an Int by the low five bits of another.
    Shl,
    /// Arithmetic shift right of an Int by the low five bits of another.
    Shr,
}

impl BinOp {
    /// Whether `a op b` equals `b op a`.
    pub fn is_commutative(self) -> bool {
        use BinOp::*;
        matches!(self, Add | Mul | Min | Max | Eq | Ne | And | Or | BitAnd | BitOr | BitXor)
    }

    /// Whether the result is a Bool.
    pub fn is_predicate(self) -> bool {
        use BinOp::*;
        matches!(self, Lt | Le | Eq | Ne | And | Or)
    }
}

/// Where a [`Node`] is in its program.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NodeId(pub u16);

impl NodeId {
    /// As an index into [`Program::nodes`].
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// Which table a [`Node::Load`] reads: an index into the tables given for evaluation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Slot(pub u16);

impl Slot {
    /// As an index into the list of tables.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// One operation; operands are earlier nodes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Node {
    /// The scaled score, a Float.
    Score,
    /// A variable, an Int.
    Var(Var),
    /// A constant, as the bits of an f32 (so that nodes can be hashed).
    Float(u32),
    /// A constant.
    Int(i32),
    /// A constant.
    Bool(bool),
    /// An element of a table; indices that the table does not have are `Int(0)`.
    Load {
        /// Which table.
        table: Slot,
        /// Where in it; each an Int, clamped to its dimension.
        index: [NodeId; 4],
    },
    /// An operation on one value.
    Unary(UnOp, NodeId),
    /// An operation on two values.
    Binary(BinOp, NodeId, NodeId),
    /// `Select(c, a, b)`: `a` where the Bool `c` holds, else `b`.
    Select(NodeId, NodeId, NodeId),
}

impl Node {
    /// The nodes that this one reads, in order.
    pub fn operands(&self) -> impl Iterator<Item = NodeId> + use<> {
        let (list, used) = match *self {
            Self::Load { index, .. } => (index, 4),
            Self::Unary(_, a) => ([a; 4], 1),
            Self::Binary(_, a, b) => ([a, b, a, a], 2),
            Self::Select(c, a, b) => ([c, a, b, a], 3),
            _ => ([NodeId(0); 4], 0),
        };
        list.into_iter().take(used)
    }

    /// The same operation on other operands.
    fn map_operands(self, f: impl Fn(NodeId) -> NodeId) -> Self {
        match self {
            Self::Load { table, index } => Self::Load { table, index: index.map(f) },
            Self::Unary(op, a) => Self::Unary(op, f(a)),
            Self::Binary(op, a, b) => Self::Binary(op, f(a), f(b)),
            Self::Select(c, a, b) => Self::Select(f(c), f(a), f(b)),
            leaf => leaf,
        }
    }
}

/// What a node's value can change with: a set of [`Var`]s, and whether it holds the score.
///
/// Executors use it to compute once per row what does not change along the row.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Deps(u16);

impl Deps {
    const SCORE: Self = Self(1 << Var::ALL.len());
    const ALL: Self = Self(u16::MAX);

    fn var(var: Var) -> Self {
        Self(1 << var as u16)
    }

    fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether it changes with `var`.
    pub fn contains(self, var: Var) -> bool {
        self.intersects(Self::var(var))
    }

    /// Whether it changes with the score.
    pub fn contains_score(self) -> bool {
        self.intersects(Self::SCORE)
    }

    /// Whether it is the same everywhere (for given tables).
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// Which nodes to compute again when only some variables have changed; kept while the same ones change, as in the
/// inner loop over keys.
struct Changes<P> {
    last: Option<P>,
    vars: Deps,
    stale: Vec<u16>,
}

impl<P: Copy> Changes<P> {
    fn new() -> Self {
        Self { last: None, vars: Deps::default(), stale: Vec::new() }
    }

    /// The nodes whose value may differ between the last place and this one, in order.
    fn update<V: PartialEq>(
        &mut self,
        program: &Program,
        place: &P,
        get: impl Fn(&P, Var) -> V,
        always: Deps,
    ) -> &[u16] {
        let vars = match self.last.replace(*place) {
            None => Deps::ALL,
            Some(last) => (Var::ALL.into_iter().filter(|&v| get(&last, v) != get(place, v)))
                .fold(always, |deps, v| deps.union(Deps::var(v))),
        };
        if vars != self.vars {
            let stale = |deps: &Deps| vars == Deps::ALL || deps.intersects(vars);
            self.stale.clear();
            self.stale.extend((0..).zip(program.deps()).filter(|(_, deps)| stale(deps)).map(|(i, _)| i));
            self.vars = vars;
        }
        &self.stale
    }
}

#[derive(PartialEq, Eq, Hash, Debug)]
struct ProgramData {
    nodes: Box<[Node]>,
    types: Box<[Type]>,
    deps: Box<[Deps]>,
    slots: Box<[Type]>,
    roots: Box<[NodeId]>,
}

/// A finished expression graph with one or more results ("roots").
///
/// Nodes are in topological order, without duplicates and without any that no root needs; well typed by
/// construction ([`Builder`]). Cheap to clone. Two programs are equal when they have the same structure, whatever
/// the order in which they were written and whatever data their tables hold.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Program(Arc<ProgramData>);

impl Program {
    /// Every node, operands before users.
    pub fn nodes(&self) -> &[Node] {
        &self.0.nodes
    }

    /// The results.
    pub fn roots(&self) -> &[NodeId] {
        &self.0.roots
    }

    /// The type of each node.
    pub fn types(&self) -> &[Type] {
        &self.0.types
    }

    /// What each node's value can change with.
    pub fn deps(&self) -> &[Deps] {
        &self.0.deps
    }

    /// The element type (Float or Int) of each table that evaluation takes, by [`Slot`].
    pub fn table_slots(&self) -> &[Type] {
        &self.0.slots
    }

    /// Whether any result can change with `var`.
    pub fn depends_on(&self, var: Var) -> bool {
        self.nodes().contains(&Node::Var(var))
    }

    /// Whether the score occurs in it.
    pub fn uses_score(&self) -> bool {
        self.nodes().contains(&Node::Score)
    }

    /// Fails unless `tables` has one table of the right element type for each slot.
    pub fn check_tables(&self, tables: &[Table]) -> Result<(), ExprError> {
        let slots = self.table_slots();
        if tables.len() != slots.len() {
            return Err(ExprError::TableCount { got: tables.len(), expected: slots.len() });
        }
        for (slot, (table, &expected)) in tables.iter().zip(slots).enumerate() {
            if table.ty() != expected {
                return Err(ExprError::TableType { slot, got: table.ty(), expected });
            }
        }
        Ok(())
    }
}

/// A finished expression: a [`Program`] with exactly one root, which is its last node.
///
/// A score mod has type Float, a mask has type Bool.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Expr(Program);

impl Expr {
    /// The result; always the last node.
    pub fn root(&self) -> NodeId {
        self.roots()[0]
    }

    /// The type of the result.
    pub fn ty(&self) -> Type {
        self.types()[self.root().index()]
    }

    /// The constant that this is, if it is one.
    pub fn as_const(&self) -> Option<Value> {
        match self.nodes()[self.root().index()] {
            Node::Float(bits) => Some(Value::Float(f32::from_bits(bits).into())),
            Node::Int(x) => Some(Value::Int(x)),
            Node::Bool(x) => Some(Value::Bool(x)),
            _ => None,
        }
    }

    /// Whether this is a constant.
    pub fn is_const(&self) -> bool {
        self.as_const().is_some()
    }

    /// Whether this is the score mod that changes nothing.
    pub fn is_identity(&self) -> bool {
        self.nodes() == [Node::Score]
    }
}

/// An [`Expr`] can be used wherever a [`Program`] is wanted.
impl Deref for Expr {
    type Target = Program;

    fn deref(&self) -> &Program {
        &self.0
    }
}
