//! Writing expressions as closures.
//!
//! [`Expr::trace`] runs the closure once. Its arguments are [`Term`]s: ids of nodes in a [`Builder`] that lives in
//! a thread-local for as long as the closure runs, so that a `Term` can be `Copy` and take the usual operators.
//! The lifetime of a `Term` is a brand: it ties the term to its closure, so it cannot get out of it.

use super::{BinOp, Builder, Expr, ExprError, MAX_NODES, Node, NodeId, Slot, Table, Type, UnOp, Var};
use std::cell::RefCell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Add, BitAnd, BitOr, BitXor, Div, Mul, Neg, Not, Rem, Shl, Shr, Sub};

/// A value inside the closure of [`Expr::trace`]: score, variable, constant, or what was computed from them.
///
/// Operators: `+ - * / %` and unary `-` on numbers; `& | ^ !` on Bools and on Ints; `<< >>` on Ints; all with f32
/// or i32 on either side. Comparisons are methods ([`Term::lt`] and so on), as Rust's own must return a `bool`.
/// A type error is remembered and returned by `trace`.
///
/// A term cannot leave its closure:
///
/// ```compile_fail
/// # use flashattn_spec::expr::Expr;
/// let mut kept = None;
/// Expr::trace(|s, ix| { kept = Some(ix.q); s });
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Term<'t> {
    id: NodeId,
    /// Invariant in `'t`, and neither `Send` nor `Sync`.
    brand: PhantomData<*mut &'t ()>,
}

/// The place of a score, as [`Term`]s: one for each [`Var`].
#[derive(Clone, Copy, Debug)]
pub struct Index<'t> {
    /// Which sequence of the batch.
    pub batch: Term<'t>,
    /// Which query head.
    pub head: Term<'t>,
    /// Which query of its sequence.
    pub q: Term<'t>,
    /// Which key of its sequence.
    pub kv: Term<'t>,
    /// How many queries the sequence has.
    pub seqlen_q: Term<'t>,
    /// How many keys the sequence has.
    pub seqlen_k: Term<'t>,
    /// First query of the sequence in the packed order.
    pub q_start: Term<'t>,
    /// First key of the sequence in the packed order.
    pub kv_start: Term<'t>,
}

impl<'t> Index<'t> {
    /// The key that stands at the query's own position when the last query is aligned with the last key:
    /// `q + seqlen_k - seqlen_q`. Causal is `kv <= diagonal`.
    pub fn diagonal(&self) -> Term<'t> {
        self.q + self.seqlen_k - self.seqlen_q
    }

    /// The query in the packed order of all sequences, to index a per-token table.
    pub fn q_token(&self) -> Term<'t> {
        self.q_start + self.q
    }

    /// The key in the packed order of all sequences, to index a per-token table.
    pub fn kv_token(&self) -> Term<'t> {
        self.kv_start + self.kv
    }
}

/// A finished expression and the tables that its closure captured, by [`Slot`].
#[derive(Clone, Debug)]
pub struct Traced {
    /// The expression.
    pub expr: Expr,
    /// Its tables.
    pub tables: Vec<Table>,
}

impl fmt::Display for Traced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.expr.fmt(f)
    }
}

struct Arena {
    builder: Builder,
    tables: Vec<Table>,
    error: Option<ExprError>,
}

thread_local! {
    static ARENA: RefCell<Option<Arena>> = const { RefCell::new(None) };
}

/// Takes the arena away when the closure has ended, even by a panic.
struct Guard;

impl Guard {
    fn enter() -> Result<Self, ExprError> {
        ARENA.with_borrow_mut(|arena| match arena {
            Some(_) => Err(ExprError::NestedTrace),
            None => {
                *arena = Some(Arena { builder: Builder::new(), tables: Vec::new(), error: None });
                Ok(Self)
            }
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        ARENA.take();
    }
}

/// Runs `f` on the arena. After an error, or with no arena, the id that comes back means nothing; `trace` fails.
fn record(f: impl FnOnce(&mut Arena) -> Result<NodeId, ExprError>) -> NodeId {
    ARENA.with_borrow_mut(|arena| match arena {
        Some(arena) if arena.error.is_none() => f(arena).unwrap_or_else(|error| {
            arena.error = Some(error);
            NodeId(0)
        }),
        _ => NodeId(0),
    })
}

/// The slot of `table`, shared by all its clones.
fn slot_of(builder: &mut Builder, tables: &mut Vec<Table>, table: &Table) -> Result<Slot, ExprError> {
    if let Some(slot) = tables.iter().position(|t| t.is_same(table)) {
        return Ok(Slot(slot as u16));
    }
    tables.push(table.clone());
    builder.slot(table.ty())
}

fn finish(builder: &Builder, tables: &[Table], root: NodeId) -> Traced {
    let (program, kept) = builder.program(&[root], true);
    let tables = kept.iter().map(|s| tables[s.index()].clone()).collect();
    Traced { expr: Expr(program), tables }
}

fn run(ty: Type, f: impl for<'t> FnOnce(Term<'t>, Index<'t>) -> NodeId) -> Result<Traced, ExprError> {
    let _guard = Guard::enter()?;
    let var = |v| Term::record(Node::Var(v));
    let index = Index {
        batch: var(Var::Batch),
        head: var(Var::Head),
        q: var(Var::Q),
        kv: var(Var::Kv),
        seqlen_q: var(Var::SeqlenQ),
        seqlen_k: var(Var::SeqlenK),
        q_start: var(Var::QStart),
        kv_start: var(Var::KvStart),
    };
    let root = f(Term::record(Node::Score), index);
    let root = record(|arena| match (ty, arena.builder.ty(root)?) {
        (Type::Float, Type::Int) => arena.builder.push(Node::Unary(UnOp::ToFloat, root)),
        (ty, got) if ty == got => Ok(root),
        (Type::Float, got) => Err(result_error(got, "a number as the result of a score mod")),
        (_, got) => Err(result_error(got, "a bool as the result of a mask")),
    });
    ARENA.with_borrow(|arena| match arena {
        Some(Arena { error: Some(error), .. }) => Err(error.clone()),
        Some(arena) => Ok(finish(&arena.builder, &arena.tables, root)),
        // `_guard` is alive and a nested trace does not start, so the arena is there.
        None => Err(ExprError::NestedTrace),
    })
}

fn result_error(got: Type, expected: &'static str) -> ExprError {
    ExprError::Type { op: "trace".into(), got: got.to_string(), expected }
}

impl Expr {
    /// Records a score mod: a closure from the scaled score and its place to the new score (a number).
    ///
    /// # Errors
    /// [`ExprError::Type`] for operands or a result of the wrong type, [`ExprError::TooManyNodes`],
    /// [`ExprError::IndexCount`], [`ExprError::NestedTrace`].
    pub fn trace<F>(f: F) -> Result<Traced, ExprError>
    where
        F: for<'t> FnOnce(Term<'t>, Index<'t>) -> Term<'t>,
    {
        run(Type::Float, |s, ix| f(s, ix).id)
    }

    /// Records a mask: a closure from a place to whether the query may see the key (a Bool).
    ///
    /// # Errors
    /// As for [`Expr::trace`].
    pub fn trace_mask<F>(f: F) -> Result<Traced, ExprError>
    where
        F: for<'t> FnOnce(Index<'t>) -> Term<'t>,
    {
        run(Type::Bool, |_, ix| f(ix).id)
    }
}

impl Traced {
    /// The mask that lets pass what both let pass.
    ///
    /// # Errors
    /// [`ExprError::Type`] if either is no mask, [`ExprError::TooManyNodes`].
    pub fn and(&self, other: &Self) -> Result<Self, ExprError> {
        self.with(other, |b, x, y| b.push(Node::Binary(BinOp::And, x, y)))
    }

    /// The mask that lets pass what either lets pass.
    ///
    /// # Errors
    /// [`ExprError::Type`] if either is no mask, [`ExprError::TooManyNodes`].
    pub fn or(&self, other: &Self) -> Result<Self, ExprError> {
        self.with(other, |b, x, y| b.push(Node::Binary(BinOp::Or, x, y)))
    }

    /// The mask that lets pass what this one does not.
    ///
    /// # Errors
    /// [`ExprError::Type`] if this is no mask.
    pub fn not(&self) -> Result<Self, ExprError> {
        match self.expr.ty() {
            Type::Bool => self.with(self, |b, x, _| b.push(Node::Unary(UnOp::Not, x))),
            ty => Err(ExprError::Type { op: "not".into(), got: ty.to_string(), expected: "a mask" }),
        }
    }

    /// This score mod applied to the result of `inner`.
    ///
    /// # Errors
    /// [`ExprError::Type`] if `inner` is no score mod, [`ExprError::TooManyNodes`].
    pub fn compose(&self, inner: &Self) -> Result<Self, ExprError> {
        if inner.expr.ty() != Type::Float {
            let got = inner.expr.ty().to_string();
            return Err(ExprError::Type { op: "compose".into(), got, expected: "a score mod" });
        }
        let (mut builder, mut tables) = (Builder::new(), Vec::new());
        let score = inner.import_into(&mut builder, &mut tables, None)?;
        let root = self.import_into(&mut builder, &mut tables, Some(score))?;
        Ok(finish(&builder, &tables, root))
    }

    fn with(
        &self,
        other: &Self,
        f: impl FnOnce(&mut Builder, NodeId, NodeId) -> Result<NodeId, ExprError>,
    ) -> Result<Self, ExprError> {
        let (mut builder, mut tables) = (Builder::new(), Vec::new());
        let a = self.import_into(&mut builder, &mut tables, None)?;
        let b = other.import_into(&mut builder, &mut tables, None)?;
        let root = f(&mut builder, a, b)?;
        Ok(finish(&builder, &tables, root))
    }

    fn import_into(
        &self,
        builder: &mut Builder,
        tables: &mut Vec<Table>,
        score: Option<NodeId>,
    ) -> Result<NodeId, ExprError> {
        self.expr.check_tables(&self.tables)?;
        let slots = self.tables.iter().map(|t| slot_of(builder, tables, t));
        let slots = slots.collect::<Result<Vec<_>, _>>()?;
        Ok(builder.import(&self.expr, &slots, score)?[self.expr.root().index()])
    }
}

impl<'t> Term<'t> {
    const fn new(id: u16) -> Self {
        Self { id: NodeId(id), brand: PhantomData }
    }

    /// Every term there can be: `std::ops::Index` must return a reference, and this is where it points.
    const ALL: &'t [Self; MAX_NODES] = &{
        let mut all = [Self::new(0); MAX_NODES];
        let mut i = 0;
        while i < MAX_NODES {
            all[i] = Self::new(i as u16);
            i += 1;
        }
        all
    };

    fn record(node: Node) -> Self {
        Self { id: record(|arena| arena.builder.push(node)), brand: PhantomData }
    }

    fn unary(self, op: UnOp) -> Self {
        Self::record(Node::Unary(op, self.id))
    }

    fn binary(self, op: BinOp, other: impl Into<Self>) -> Self {
        Self::record(Node::Binary(op, self.id, other.into().id))
    }

    /// `|x|`.
    pub fn abs(self) -> Self {
        self.unary(UnOp::Abs)
    }

    /// The lesser; NaN if either is NaN.
    pub fn min(self, other: impl Into<Self>) -> Self {
        self.binary(BinOp::Min, other)
    }

    /// The greater; NaN if either is NaN.
    pub fn max(self, other: impl Into<Self>) -> Self {
        self.binary(BinOp::Max, other)
    }

    /// `2^x`.
    pub fn exp2(self) -> Self {
        self.unary(UnOp::Exp2)
    }

    /// Base-2 logarithm.
    pub fn log2(self) -> Self {
        self.unary(UnOp::Log2)
    }

    /// `e^x`, as `2^(x · log2 e)`.
    pub fn exp(self) -> Self {
        (self * std::f32::consts::LOG2_E).exp2()
    }

    /// Natural logarithm, as `log2(x) · ln 2`.
    pub fn ln(self) -> Self {
        self.log2() * std::f32::consts::LN_2
    }

    /// Hyperbolic tangent.
    pub fn tanh(self) -> Self {
        self.unary(UnOp::Tanh)
    }

    /// The largest Int not above this.
    pub fn floor(self) -> Self {
        self.unary(UnOp::Floor)
    }

    /// As a Float; a Bool is 0 or 1.
    pub fn to_float(self) -> Self {
        self.unary(UnOp::ToFloat)
    }

    /// `self < other`.
    pub fn lt(self, other: impl Into<Self>) -> Self {
        self.binary(BinOp::Lt, other)
    }

    /// `self <= other`.
    pub fn le(self, other: impl Into<Self>) -> Self {
        self.binary(BinOp::Le, other)
    }

    /// `self > other`.
    pub fn gt(self, other: impl Into<Self>) -> Self {
        other.into().lt(self)
    }

    /// `self >= other`.
    pub fn ge(self, other: impl Into<Self>) -> Self {
        other.into().le(self)
    }

    /// `self == other`.
    pub fn eq(self, other: impl Into<Self>) -> Self {
        self.binary(BinOp::Eq, other)
    }

    /// `self != other`.
    pub fn ne(self, other: impl Into<Self>) -> Self {
        self.binary(BinOp::Ne, other)
    }

    /// `if_true` where this Bool holds, else `if_false`.
    pub fn select(self, if_true: impl Into<Self>, if_false: impl Into<Self>) -> Self {
        Self::record(Node::Select(self.id, if_true.into().id, if_false.into().id))
    }
}

impl From<f32> for Term<'_> {
    fn from(x: f32) -> Self {
        Self { id: record(|arena| arena.builder.float(x)), brand: PhantomData }
    }
}

impl From<i32> for Term<'_> {
    fn from(x: i32) -> Self {
        Self::record(Node::Int(x))
    }
}

impl From<bool> for Term<'_> {
    fn from(x: bool) -> Self {
        Self::record(Node::Bool(x))
    }
}

impl Neg for Term<'_> {
    type Output = Self;
    fn neg(self) -> Self {
        self.unary(UnOp::Neg)
    }
}

impl Not for Term<'_> {
    type Output = Self;
    fn not(self) -> Self {
        self.unary(UnOp::Not)
    }
}

macro_rules! operator {
    ($op:ident, $method:ident, $($other:ty),*) => {
        impl<'t> $op for Term<'t> {
            type Output = Self;
            fn $method(self, other: Self) -> Self {
                self.binary(BinOp::$op, other)
            }
        }
        $(
            impl<'t> $op<$other> for Term<'t> {
                type Output = Self;
                fn $method(self, other: $other) -> Self {
                    self.binary(BinOp::$op, other)
                }
            }
            impl<'t> $op<Term<'t>> for $other {
                type Output = Term<'t>;
                fn $method(self, other: Term<'t>) -> Term<'t> {
                    Term::from(self).binary(BinOp::$op, other)
                }
            }
        )*
    };
}
operator!(Add, add, f32, i32);
operator!(Sub, sub, f32, i32);
operator!(Mul, mul, f32, i32);
operator!(Div, div, f32, i32);
operator!(Rem, rem, i32);
operator!(BitAnd, bitand, i32, bool);
operator!(BitOr, bitor, i32, bool);
operator!(BitXor, bitxor, i32, bool);
operator!(Shl, shl, i32);
operator!(Shr, shr, i32);

impl Table {
    fn load<'t>(&self, index: &[Term<'t>]) -> &'t Term<'t> {
        let id = record(|arena| {
            let (got, expected) = (index.len(), self.shape().len());
            if got != expected {
                return Err(ExprError::IndexCount { got, expected });
            }
            let zero = arena.builder.push(Node::Int(0))?;
            let mut ids = [zero; 4];
            for (id, term) in ids.iter_mut().zip(index) {
                *id = term.id;
            }
            let table = slot_of(&mut arena.builder, &mut arena.tables, self)?;
            arena.builder.push(Node::Load { table, index: ids })
        });
        // A builder has at most MAX_NODES nodes, so the id is in range.
        Term::ALL.get(id.index()).unwrap_or(&Term::ALL[0])
    }
}

macro_rules! index {
    ($ty:ty, $index:ident => $list:expr) => {
        /// The element at that place, inside the closure of [`Expr::trace`].
        impl<'t> std::ops::Index<$ty> for Table {
            type Output = Term<'t>;
            fn index(&self, $index: $ty) -> &Term<'t> {
                self.load(&$list)
            }
        }
    };
}
index!(Term<'t>, i => [i]);
index!((Term<'t>, Term<'t>), i => [i.0, i.1]);
index!((Term<'t>, Term<'t>, Term<'t>), i => [i.0, i.1, i.2]);
index!((Term<'t>, Term<'t>, Term<'t>, Term<'t>), i => [i.0, i.1, i.2, i.3]);
