//! [`Options`]: everything about a call that is no array, as the text (JSON) that Python code writes once for each way
//! of calling. Text, because it is hashable, goes through `torch.compile` and `jax.jit` as a constant, and is the key of
//! the plan cache.
//!
//! Arrays beside q, k and v come as one list, the *extras*: the tables, in order; then, as far as the options have them,
//! cu_seqlens_q and cu_seqlens_k (int32), sinks (float32 `[heads_q]`), and the seed of dropout.

use crate::array::{Array, Kind};
use crate::error::Error;
use flashattn::spec::expr::{BinOp, Builder, Node, NodeId, Slot, TableData, Type, UnOp, Var};
use flashattn::{Attention, DType, Mask, ScoreMod, Table, Traced};
use serde::Deserialize;

/// The options of a call. Score mods apply in the order soft cap, ALiBi, bias, program.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Keys up to the diagonal.
    pub causal: bool,
    /// Keys from so many before the diagonal to so many after it.
    pub window: [Option<usize>; 2],
    /// Factor of q·k.
    pub scale: Option<f32>,
    /// Soft cap of the scores.
    pub softcap: Option<f32>,
    /// Probability of dropout; the seed is an extra.
    pub dropout: Option<f32>,
    /// The table of ALiBi slopes.
    pub alibi: Option<usize>,
    /// The table of a bias `[batch, heads_q, seqlen_q, seqlen_k]`, each of which may be 1.
    pub bias: Option<usize>,
    /// A score mod.
    pub score: Option<Program>,
    /// A mask.
    pub mask: Option<Program>,
    /// For each table, whether it gets a gradient.
    pub tables: Vec<bool>,
    /// Whether sequences are packed.
    pub varlen: bool,
    /// Whether there are sinks.
    pub sinks: bool,
    /// Whether gradients have the same bits in every run, where that is a choice.
    pub deterministic: bool,
}

/// A traced function: operations on the results of earlier ones.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    ops: Vec<Op>,
}

/// One operation; numbers of operands are places in the list.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Op {
    Score,
    Var(VarName),
    /// The bits of an f32: JSON has no infinities.
    Float(u32),
    Int(i32),
    Bool(bool),
    /// An element of a table: which, and where.
    Load(usize, Vec<usize>),
    Un(Unary, usize),
    Bin(Binary, usize, usize),
    /// Condition, if true, if false.
    Select(usize, usize, usize),
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum VarName {
    Batch,
    Head,
    Q,
    Kv,
    SeqlenQ,
    SeqlenK,
    QStart,
    KvStart,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Unary {
    Neg,
    Abs,
    Not,
    Exp2,
    Log2,
    Tanh,
    Float,
    Floor,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Binary {
    Add,
    Sub,
    Mul,
    /// Python's `/`: of floats, always.
    Div,
    /// Python's `//`.
    FloorDiv,
    /// Python's `%`.
    Mod,
    Min,
    Max,
    Lt,
    Le,
    Eq,
    Ne,
    And,
    Or,
    Xor,
    Shl,
    Shr,
}

impl Options {
    /// Reads them.
    pub fn parse(text: &str) -> Result<Self, Error> {
        Ok(serde_json::from_str(text)?)
    }

    /// Attention with these options and arrays, and the tables by number.
    pub fn attention(&self, extras: &[Array]) -> Result<(Attention, Vec<Table>), Error> {
        let optional = [2 * usize::from(self.varlen), self.sinks.into(), self.dropout.is_some().into()];
        let expected = self.tables.len() + optional.iter().sum::<usize>();
        if extras.len() != expected {
            return Err(Error::Value(format!(
                "got {} extra arrays, the options have {expected}",
                extras.len()
            )));
        }
        let (tables, rest) = extras.split_at(self.tables.len());
        let tables = tables.iter().zip(&self.tables).map(|(array, &grad)| table(array, grad));
        let tables = tables.collect::<Result<Vec<_>, _>>()?;
        let mut rest = rest.iter();
        let mut next = || rest.next().ok_or_else(|| Error::Value("an extra array is missing".into()));

        let mut attention = Attention::new().deterministic(self.deterministic);
        if self.causal {
            attention = attention.causal();
        }
        if let [left, right] = self.window
            && (left.is_some() || right.is_some())
        {
            attention = attention.mask(Mask::Local { left, right });
        }
        if let Some(scale) = self.scale {
            attention = attention.scale(scale);
        }
        if let Some(cap) = self.softcap {
            attention = attention.softcap(cap);
        }
        let pick = |i: usize| -> Result<Table, Error> {
            let unknown = || Error::Value(format!("table {i} is used, there are {}", tables.len()));
            tables.get(i).cloned().ok_or_else(unknown)
        };
        if let Some(slopes) = self.alibi {
            attention = attention.score_mod(ScoreMod::Alibi(pick(slopes)?));
        }
        if let Some(bias) = self.bias {
            attention = attention.bias(pick(bias)?);
        }
        if let Some(program) = &self.score {
            attention = attention.score_mod(ScoreMod::Custom(program.build(&tables, Type::Float)?));
        }
        if let Some(program) = &self.mask {
            attention = attention.mask(Mask::Custom(program.build(&tables, Type::Bool)?));
        }
        if self.varlen {
            attention = attention.varlen(next()?.list::<i32>()?, next()?.list::<i32>()?);
        }
        if self.sinks {
            attention = attention.sinks(next()?.list::<f32>()?);
        }
        if let Some(p) = self.dropout {
            attention = attention.dropout(p, seed(next()?)?);
        }
        Ok((attention, tables))
    }
}

/// One int64; or one or two int32, the low half first, as JAX has no 64-bit numbers unless told to.
fn seed(array: &Array) -> Result<u64, Error> {
    let half = |x: i32| u64::from(x.cast_unsigned());
    let seed = match array.kind {
        Kind::I32 => match *array.list::<i32>()? {
            [low] => Some(half(low)),
            [low, high] => Some(half(low) | half(high) << 32),
            _ => None,
        },
        _ => match *array.list::<i64>()? {
            [seed] => Some(seed.cast_unsigned()),
            _ => None,
        },
    };
    seed.ok_or_else(|| Error::Value(format!("the seed has shape {:?}, expected one number", array.shape)))
}

fn table(array: &Array, grad: bool) -> Result<Table, Error> {
    let data = match array.kind {
        Kind::I32 => TableData::I32(array.list::<i32>()?.to_vec()),
        Kind::Element(DType::F32) => TableData::F32(array.list::<f32>()?.to_vec()),
        _ => return Err(Error::Type(format!("{}: a table must be float32 or int32", array.name))),
    };
    // A single number is a list of one.
    let dims = if array.shape.is_empty() { &[1][..] } else { &array.shape };
    let table = Table::new(dims, data)?;
    Ok(if grad { table.with_grad()? } else { table })
}

impl Program {
    fn build(&self, tables: &[Table], ty: Type) -> Result<Traced, Error> {
        let mut building = Building { builder: Builder::new(), tables, slots: Vec::new(), ids: Vec::new() };
        for op in &self.ops {
            let id = building.op(op)?;
            building.ids.push(id);
        }
        let Building { mut builder, slots, ids, .. } = building;
        let Some(&(mut root)) = ids.last() else {
            return Err(Error::Value("a program has no operation".into()));
        };
        // Whether it is a number at all, or a Bool for a mask, is for the facade to say.
        if ty == Type::Float && builder.ty(root)? == Type::Int {
            root = builder.push(Node::Unary(UnOp::ToFloat, root))?;
        }
        let used = slots.iter().map(|&(table, _)| tables[table].clone()).collect();
        Ok(Traced { expr: builder.finish(root)?, tables: used })
    }
}

struct Building<'a> {
    builder: Builder,
    tables: &'a [Table],
    /// The tables used so far, each with its slot.
    slots: Vec<(usize, Slot)>,
    ids: Vec<NodeId>,
}

impl Building<'_> {
    fn id(&self, i: usize) -> Result<NodeId, Error> {
        let later = || Error::Value(format!("operation {} uses operation {i}", self.ids.len()));
        self.ids.get(i).copied().ok_or_else(later)
    }

    fn op(&mut self, op: &Op) -> Result<NodeId, Error> {
        let node = match *op {
            Op::Score => Node::Score,
            Op::Var(name) => Node::Var(var(name)),
            Op::Float(bits) => Node::Float(bits),
            Op::Int(x) => Node::Int(x),
            Op::Bool(x) => Node::Bool(x),
            Op::Load(table, ref index) => return self.load(table, index),
            Op::Un(op, a) => Node::Unary(unary(op), self.id(a)?),
            Op::Bin(op, a, b) => return self.binary(op, self.id(a)?, self.id(b)?),
            Op::Select(c, a, b) => Node::Select(self.id(c)?, self.id(a)?, self.id(b)?),
        };
        Ok(self.builder.push(node)?)
    }

    fn load(&mut self, table: usize, index: &[usize]) -> Result<NodeId, Error> {
        let Some(data) = self.tables.get(table) else {
            return Err(Error::Value(format!("table {table} is used, there are {}", self.tables.len())));
        };
        if index.len() != data.shape().len() {
            let (got, expected) = (index.len(), data.shape().len());
            return Err(Error::Value(format!(
                "a table of {expected} dimensions is indexed by {got} numbers"
            )));
        }
        let slot = match self.slots.iter().find(|(t, _)| *t == table) {
            Some(&(_, slot)) => slot,
            None => {
                let slot = self.builder.slot(data.ty())?;
                self.slots.push((table, slot));
                slot
            }
        };
        let mut ids = [self.builder.push(Node::Int(0))?; 4];
        for (id, &i) in ids.iter_mut().zip(index) {
            *id = self.id(i)?;
        }
        Ok(self.builder.push(Node::Load { table: slot, index: ids })?)
    }

    fn float(&mut self, id: NodeId) -> Result<NodeId, Error> {
        Ok(self.builder.push(Node::Unary(UnOp::ToFloat, id))?)
    }

    fn binary(&mut self, op: Binary, a: NodeId, b: NodeId) -> Result<NodeId, Error> {
        let integers = self.builder.ty(a)? == Type::Int && self.builder.ty(b)? == Type::Int;
        let op = match op {
            Binary::Div => {
                let (a, b) = (self.float(a)?, self.float(b)?);
                return Ok(self.builder.push(Node::Binary(BinOp::Div, a, b))?);
            }
            Binary::FloorDiv if !integers => {
                let quotient = self.binary(Binary::Div, a, b)?;
                let whole = self.builder.push(Node::Unary(UnOp::Floor, quotient))?;
                return self.float(whole);
            }
            Binary::Mod if !integers => {
                let whole = self.binary(Binary::FloorDiv, a, b)?;
                let part = self.builder.push(Node::Binary(BinOp::Mul, whole, b))?;
                return Ok(self.builder.push(Node::Binary(BinOp::Sub, a, part))?);
            }
            Binary::FloorDiv => BinOp::Div,
            Binary::Mod => BinOp::Rem,
            Binary::Add => BinOp::Add,
            Binary::Sub => BinOp::Sub,
            Binary::Mul => BinOp::Mul,
            Binary::Min => BinOp::Min,
            Binary::Max => BinOp::Max,
            Binary::Lt => BinOp::Lt,
            Binary::Le => BinOp::Le,
            Binary::Eq => BinOp::Eq,
            Binary::Ne => BinOp::Ne,
            // Of Bools, too: the builder chooses by type.
            Binary::And => BinOp::BitAnd,
            Binary::Or => BinOp::BitOr,
            Binary::Xor => BinOp::BitXor,
            Binary::Shl => BinOp::Shl,
            Binary::Shr => BinOp::Shr,
        };
        Ok(self.builder.push(Node::Binary(op, a, b))?)
    }
}

fn var(name: VarName) -> Var {
    match name {
        VarName::Batch => Var::Batch,
        VarName::Head => Var::Head,
        VarName::Q => Var::Q,
        VarName::Kv => Var::Kv,
        VarName::SeqlenQ => Var::SeqlenQ,
        VarName::SeqlenK => Var::SeqlenK,
        VarName::QStart => Var::QStart,
        VarName::KvStart => Var::KvStart,
    }
}

fn unary(op: Unary) -> UnOp {
    match op {
        Unary::Neg => UnOp::Neg,
        Unary::Abs => UnOp::Abs,
        Unary::Not => UnOp::Not,
        Unary::Exp2 => UnOp::Exp2,
        Unary::Log2 => UnOp::Log2,
        Unary::Tanh => UnOp::Tanh,
        Unary::Float => UnOp::ToFloat,
        Unary::Floor => UnOp::Floor,
    }
}
