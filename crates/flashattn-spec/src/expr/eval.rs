//! Scalar evaluation: the meaning of the language, in f64 for the oracle and in f32 to test executors against.

use super::{BinOp, Changes, Deps, Expr, ExprError, Node, NodeId, Program, Table, TableData, UnOp, Var};
use std::fmt::Debug;
use std::ops::{Add, Div, Mul, Neg, Sub};

/// The value of one node.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Value<T = f64> {
    /// A Float.
    Float(T),
    /// An Int.
    Int(i32),
    /// A Bool.
    Bool(bool),
}

impl<T: Real> Value<T> {
    /// The truth value; numbers are true unless zero.
    pub fn as_bool(self) -> bool {
        match self {
            Self::Float(x) => x != T::default(),
            Self::Int(x) => x != 0,
            Self::Bool(x) => x,
        }
    }

    /// As a float; a Bool is 0 or 1.
    pub fn as_float(self) -> T {
        match self {
            Self::Float(x) => x,
            Self::Int(x) => T::from_i32(x),
            Self::Bool(x) => T::from_i32(x.into()),
        }
    }

    /// As an f64; a Bool is 0 or 1.
    pub fn as_f64(self) -> f64 {
        match self {
            Self::Float(x) => x.to_f64(),
            Self::Int(x) => x.into(),
            Self::Bool(x) => f64::from(u8::from(x)),
        }
    }

    /// As an Int: a Float is rounded down as by [`UnOp::Floor`], a Bool is 0 or 1.
    pub fn as_int(self) -> i32 {
        match self {
            Self::Float(x) => x.floor_i32(),
            Self::Int(x) => x,
            Self::Bool(x) => x.into(),
        }
    }
}

/// The place of one element of the score matrix: the values of the eight [`Var`]s.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Env {
    /// [`Var::Batch`].
    pub batch: i32,
    /// [`Var::Head`].
    pub head: i32,
    /// [`Var::Q`].
    pub q: i32,
    /// [`Var::Kv`].
    pub kv: i32,
    /// [`Var::SeqlenQ`].
    pub seqlen_q: i32,
    /// [`Var::SeqlenK`].
    pub seqlen_k: i32,
    /// [`Var::QStart`].
    pub q_start: i32,
    /// [`Var::KvStart`].
    pub kv_start: i32,
}

impl Env {
    /// The value of one variable.
    pub fn get(&self, var: Var) -> i32 {
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

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// The float types that can be evaluated in: f32 and f64.
pub trait Real:
    sealed::Sealed
    + Copy
    + Debug
    + Default
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// From a constant or a table element.
    fn from_f32(x: f32) -> Self;
    /// The nearest to an integer.
    fn from_i32(x: i32) -> Self;
    /// Without loss.
    fn to_f64(self) -> f64;
    /// The largest integer not above it; saturates; 0 for NaN.
    fn floor_i32(self) -> i32;
    /// `|x|`.
    fn abs(self) -> Self;
    /// `2^x`.
    fn exp2(self) -> Self;
    /// Base-2 logarithm.
    fn log2(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Whether it is −0 or below (or a NaN with that sign).
    fn is_sign_negative(self) -> bool;
}

macro_rules! real {
    ($t:ty) => {
        impl Real for $t {
            fn from_f32(x: f32) -> Self {
                x.into()
            }
            fn from_i32(x: i32) -> Self {
                x as $t
            }
            fn to_f64(self) -> f64 {
                self.into()
            }
            fn floor_i32(self) -> i32 {
                self.floor() as i32
            }
            fn abs(self) -> Self {
                self.abs()
            }
            fn exp2(self) -> Self {
                self.exp2()
            }
            fn log2(self) -> Self {
                self.log2()
            }
            fn tanh(self) -> Self {
                self.tanh()
            }
            fn is_sign_negative(self) -> bool {
                self.is_sign_negative()
            }
        }
    };
}
real!(f32);
real!(f64);

pub(super) fn unary<T: Real>(op: UnOp, a: Value<T>) -> Value<T> {
    use Value::{Bool, Float, Int};
    match (op, a) {
        (UnOp::Neg, Int(x)) => Int(x.wrapping_neg()),
        (UnOp::Neg, x) => Float(-x.as_float()),
        (UnOp::Abs, Int(x)) => Int(x.wrapping_abs()),
        (UnOp::Abs, x) => Float(x.as_float().abs()),
        (UnOp::Not, x) => Bool(!x.as_bool()),
        (UnOp::Exp2, x) => Float(x.as_float().exp2()),
        (UnOp::Log2, x) => Float(x.as_float().log2()),
        (UnOp::Tanh, x) => Float(x.as_float().tanh()),
        (UnOp::ToFloat, x) => Float(x.as_float()),
        (UnOp::Floor, x) => Int(x.as_int()),
    }
}

pub(super) fn binary<T: Real>(op: BinOp, a: Value<T>, b: Value<T>) -> Value<T> {
    match (a, b) {
        (Value::Int(a), Value::Int(b)) => ints(op, a, b),
        (Value::Bool(a), Value::Bool(b)) => Value::Bool(bools(op, a, b)),
        (a, b) => floats(op, a.as_float(), b.as_float()),
    }
}

fn bools(op: BinOp, a: bool, b: bool) -> bool {
    match op {
        BinOp::And => a && b,
        BinOp::Or => a || b,
        BinOp::Eq => a == b,
        // The builder lets no other operation be applied to Bools.
        _ => a != b,
    }
}

fn floats<T: Real>(op: BinOp, a: T, b: T) -> Value<T> {
    use BinOp::*;
    #[expect(clippy::eq_op, reason = "false for NaN only")]
    let nan = |x: T| !(x == x);
    let pick = |first: bool| if first { a } else { b };
    Value::Float(match op {
        Add => a + b,
        Sub => a - b,
        Mul => a * b,
        Div => a / b,
        // −0 is below +0, as in IEEE 754 `minimum` and `maximum`.
        Min => pick(nan(a) || (!nan(b) && (a < b || (a == b && a.is_sign_negative())))),
        Max => pick(nan(a) || (!nan(b) && (a > b || (a == b && b.is_sign_negative())))),
        Lt => return Value::Bool(a < b),
        Le => return Value::Bool(a <= b),
        Eq => return Value::Bool(a == b),
        // The builder lets no other operation be applied to Floats.
        _ => return Value::Bool(a != b),
    })
}

/// Quotient rounded towards minus infinity; 0 for a zero divisor.
fn floor_div(a: i32, b: i32) -> i32 {
    if b == 0 {
        return 0;
    }
    let quotient = a.wrapping_div(b);
    quotient - i32::from(a.wrapping_rem(b) != 0 && (a < 0) != (b < 0))
}

fn ints<T>(op: BinOp, a: i32, b: i32) -> Value<T> {
    use BinOp::*;
    Value::Int(match op {
        Add => a.wrapping_add(b),
        Sub => a.wrapping_sub(b),
        Mul => a.wrapping_mul(b),
        Div => floor_div(a, b),
        Rem if b == 0 => 0,
        Rem => a.wrapping_sub(b.wrapping_mul(floor_div(a, b))),
        Min => a.min(b),
        Max => a.max(b),
        BitAnd => a & b,
        BitOr => a | b,
        BitXor => a ^ b,
        Shl => a.wrapping_shl(b as u32),
        Shr => a.wrapping_shr(b as u32),
        Lt => return Value::Bool(a < b),
        Le => return Value::Bool(a <= b),
        Eq => return Value::Bool(a == b),
        // The builder lets no other operation be applied to Ints.
        _ => return Value::Bool(a != b),
    })
}

/// Evaluates a program at many places without allocating.
///
/// It remembers the last place, and computes again only what depends on a variable that has changed since: let the
/// key vary fastest.
pub struct Evaluator<'a, T: Real = f64> {
    program: &'a Program,
    tables: &'a [Table],
    values: Vec<Value<T>>,
    changes: Changes<Env>,
}

impl<'a, T: Real> Evaluator<'a, T> {
    /// For this program with these tables.
    ///
    /// # Errors
    /// [`ExprError::TableCount`] and [`ExprError::TableType`] if the tables are not the program's.
    pub fn new(program: &'a Program, tables: &'a [Table]) -> Result<Self, ExprError> {
        program.check_tables(tables)?;
        let values = vec![Value::Int(0); program.nodes().len()];
        Ok(Self { program, tables, values, changes: Changes::new() })
    }

    /// The program's first result at this place.
    pub fn eval(&mut self, env: &Env, score: T) -> Value<T> {
        let root = self.program.roots()[0];
        self.run(env, score)[root.index()]
    }

    /// The value of every node at this place, by [`NodeId::index`].
    pub fn run(&mut self, env: &Env, score: T) -> &[Value<T>] {
        let Self { program, tables, values, changes } = self;
        for &i in changes.update(program, env, Env::get, Deps::SCORE) {
            let i = usize::from(i);
            values[i] = compute(&program.nodes()[i], tables, values, env, score);
        }
        &self.values
    }
}

fn compute<T: Real>(node: &Node, tables: &[Table], values: &[Value<T>], env: &Env, score: T) -> Value<T> {
    let value = |id: NodeId| values[id.index()];
    match *node {
        Node::Score => Value::Float(score),
        Node::Var(var) => Value::Int(env.get(var)),
        Node::Float(bits) => Value::Float(T::from_f32(f32::from_bits(bits))),
        Node::Int(x) => Value::Int(x),
        Node::Bool(x) => Value::Bool(x),
        Node::Load { table, index } => {
            let table = &tables[table.index()];
            let offset = table.offset(index.map(|i| value(i).as_int()));
            match table.data() {
                TableData::F32(data) => Value::Float(T::from_f32(data[offset])),
                TableData::I32(data) => Value::Int(data[offset]),
            }
        }
        Node::Unary(op, a) => unary(op, value(a)),
        Node::Binary(op, a, b) => binary(op, value(a), value(b)),
        Node::Select(c, a, b) => value(if value(c).as_bool() { a } else { b }),
    }
}

impl Expr {
    /// The value in f64 at one place. For many places, an [`Evaluator`] is quicker.
    ///
    /// # Errors
    /// [`ExprError::TableCount`] and [`ExprError::TableType`] if the tables are not this expression's.
    pub fn eval(&self, env: &Env, tables: &[Table], score: f64) -> Result<Value, ExprError> {
        Ok(Evaluator::new(self, tables)?.eval(env, score))
    }
}
