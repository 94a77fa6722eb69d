//! Building programs: types, promotion, simplification, sharing.

use super::eval::{binary, unary};
use super::{BinOp, Deps, Expr, ExprError, MAX_NODES, Node, NodeId, Program, ProgramData};
use super::{Slot, Type, UnOp, Value};
use std::collections::HashMap;
use std::sync::Arc;

/// Builds an expression node by node; what the closures of [`Expr::trace`] drive, and the entry for parsers and
/// bindings to other languages.
///
/// ```
/// # use flashattn_spec::expr::{BinOp, Builder, Node, Var};
/// let mut b = Builder::new();
/// let (q, kv) = (b.push(Node::Var(Var::Q))?, b.push(Node::Var(Var::Kv))?);
/// let root = b.push(Node::Binary(BinOp::Le, kv, q))?;
/// assert_eq!(b.finish(root)?.to_string(), "kv <= q");
/// # Ok::<(), flashattn_spec::expr::ExprError>(())
/// ```
#[derive(Debug)]
pub struct Builder {
    nodes: Vec<Node>,
    types: Vec<Type>,
    deps: Vec<Deps>,
    slots: Vec<Type>,
    ids: HashMap<Node, NodeId>,
    limit: usize,
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// An empty builder, for up to [`MAX_NODES`] nodes.
    pub fn new() -> Self {
        Self::with_limit(MAX_NODES)
    }

    pub(super) fn with_limit(limit: usize) -> Self {
        let (nodes, types, deps) = (Vec::new(), Vec::new(), Vec::new());
        let limit = limit.min(usize::from(u16::MAX));
        Self { nodes, types, deps, slots: Vec::new(), ids: HashMap::new(), limit }
    }

    /// Declares the next table: `Int` for a table of i32, any other type for a table of f32.
    ///
    /// # Errors
    /// [`ExprError::TooManyTables`].
    pub fn slot(&mut self, ty: Type) -> Result<Slot, ExprError> {
        let slot = u16::try_from(self.slots.len()).map_err(|_| ExprError::TooManyTables)?;
        self.slots.push(if ty == Type::Int { Type::Int } else { Type::Float });
        Ok(Slot(slot))
    }

    /// The type of a node.
    ///
    /// # Errors
    /// [`ExprError::UnknownNode`].
    pub fn ty(&self, id: NodeId) -> Result<Type, ExprError> {
        let unknown = ExprError::UnknownNode { got: id.index(), len: self.nodes.len() };
        self.types.get(id.index()).copied().ok_or(unknown)
    }

    /// Adds an operation, or finds or simplifies it; operands are ids that this builder gave.
    ///
    /// An Int beside a Float is promoted; `And`, `Or`, `Ne` and their bitwise kin are chosen by the type.
    ///
    /// # Errors
    /// [`ExprError::Type`], [`ExprError::TooManyNodes`], [`ExprError::UnknownNode`], [`ExprError::UnknownSlot`].
    pub fn push(&mut self, node: Node) -> Result<NodeId, ExprError> {
        match node {
            Node::Score => self.intern(node, Type::Float),
            Node::Float(bits) => {
                // One NaN, so that equal expressions have equal bits on every machine.
                let bits = if f32::from_bits(bits).is_nan() { f32::NAN.to_bits() } else { bits };
                self.intern(Node::Float(bits), Type::Float)
            }
            Node::Var(_) | Node::Int(_) => self.intern(node, Type::Int),
            Node::Bool(_) => self.intern(node, Type::Bool),
            Node::Load { table, index } => {
                let unknown = ExprError::UnknownSlot { got: table.index(), len: self.slots.len() };
                let ty = *self.slots.get(table.index()).ok_or(unknown)?;
                for i in index {
                    self.expect("index", &[i], &[Type::Int], "an int")?;
                }
                self.intern(node, ty)
            }
            Node::Unary(op, a) => self.unary(op, a),
            Node::Binary(op, a, b) => self.binary(op, a, b),
            Node::Select(c, a, b) => self.select(c, a, b),
        }
    }

    pub(super) fn float(&mut self, x: f32) -> Result<NodeId, ExprError> {
        self.push(Node::Float(x.to_bits()))
    }

    fn constant(&mut self, value: Value) -> Result<NodeId, ExprError> {
        match value {
            // Done in f64 and rounded once: for + - * / the same as in f32, and the same on every machine.
            Value::Float(x) => self.float(x as f32),
            Value::Int(x) => self.push(Node::Int(x)),
            Value::Bool(x) => self.push(Node::Bool(x)),
        }
    }

    fn as_const(&self, id: NodeId) -> Option<Value> {
        match self.nodes[id.index()] {
            Node::Float(bits) => Some(Value::Float(f32::from_bits(bits).into())),
            Node::Int(x) => Some(Value::Int(x)),
            Node::Bool(x) => Some(Value::Bool(x)),
            _ => None,
        }
    }

    fn intern(&mut self, node: Node, ty: Type) -> Result<NodeId, ExprError> {
        if let Some(&id) = self.ids.get(&node) {
            return Ok(id);
        }
        if let Node::Binary(op, a, b) = node
            && op.is_commutative()
            && let Some(&id) = self.ids.get(&Node::Binary(op, b, a))
        {
            return Ok(id);
        }
        let too_many = ExprError::TooManyNodes { limit: self.limit };
        let id = u16::try_from(self.nodes.len()).map_err(|_| too_many.clone())?;
        if self.nodes.len() >= self.limit {
            return Err(too_many);
        }
        let deps = match node {
            Node::Score => Deps::SCORE,
            Node::Var(var) => Deps::var(var),
            _ => node.operands().fold(Deps::default(), |deps, i| deps.union(self.deps[i.index()])),
        };
        self.nodes.push(node);
        self.types.push(ty);
        self.deps.push(deps);
        self.ids.insert(node, NodeId(id));
        Ok(NodeId(id))
    }

    /// Fails unless the operands all have one of the types.
    fn expect(
        &self,
        op: &str,
        args: &[NodeId],
        types: &[Type],
        expected: &'static str,
    ) -> Result<(), ExprError> {
        let got = args.iter().map(|&a| self.ty(a)).collect::<Result<Vec<_>, _>>()?;
        if got.iter().all(|ty| types.contains(ty)) {
            return Ok(());
        }
        let got = got.iter().map(Type::to_string).collect::<Vec<_>>().join(", ");
        Err(ExprError::Type { op: op.to_lowercase(), got, expected })
    }

    /// Both operands in one type, Float if either is.
    fn promote(&mut self, a: NodeId, b: NodeId) -> Result<(NodeId, NodeId), ExprError> {
        Ok(match (self.ty(a)?, self.ty(b)?) {
            (Type::Int, Type::Float) => (self.unary(UnOp::ToFloat, a)?, b),
            (Type::Float, Type::Int) => (a, self.unary(UnOp::ToFloat, b)?),
            _ => (a, b),
        })
    }

    fn unary(&mut self, op: UnOp, a: NodeId) -> Result<NodeId, ExprError> {
        let name = format!("{op:?}");
        match op {
            UnOp::Not | UnOp::ToFloat => self.ty(a).map(drop)?,
            _ => self.expect(&name, &[a], &[Type::Float, Type::Int], "a number")?,
        }
        let ty = self.ty(a)?;
        match (op, ty) {
            (UnOp::Not, Type::Int) => {
                let ones = self.push(Node::Int(-1))?;
                return self.binary(BinOp::BitXor, a, ones);
            }
            (UnOp::Not, Type::Float) => self.expect(&name, &[a], &[Type::Bool], "a bool or an int")?,
            (UnOp::Exp2 | UnOp::Log2 | UnOp::Tanh, Type::Int) => {
                let a = self.unary(UnOp::ToFloat, a)?;
                return self.unary(op, a);
            }
            (UnOp::ToFloat, Type::Float) | (UnOp::Floor, Type::Int) => return Ok(a),
            _ => {}
        }
        if let Some(x) = self.as_const(a) {
            return self.constant(unary(op, x));
        }
        match (op, self.nodes[a.index()]) {
            (UnOp::Neg, Node::Unary(UnOp::Neg, x)) | (UnOp::Not, Node::Unary(UnOp::Not, x)) => return Ok(x),
            (UnOp::Abs, Node::Unary(UnOp::Abs, _)) => return Ok(a),
            (UnOp::Abs, Node::Unary(UnOp::Neg, x)) => return self.unary(UnOp::Abs, x),
            (UnOp::Not, Node::Binary(BinOp::Eq, x, y)) => return self.binary(BinOp::Ne, x, y),
            (UnOp::Not, Node::Binary(BinOp::Ne, x, y)) => return self.binary(BinOp::Eq, x, y),
            // Not for floats, where a NaN makes both sides false.
            (UnOp::Not, Node::Binary(BinOp::Lt, x, y)) if self.ty(x)? == Type::Int => {
                return self.binary(BinOp::Le, y, x);
            }
            (UnOp::Not, Node::Binary(BinOp::Le, x, y)) if self.ty(x)? == Type::Int => {
                return self.binary(BinOp::Lt, y, x);
            }
            _ => {}
        }
        let result = match op {
            UnOp::Neg | UnOp::Abs => ty,
            UnOp::Not => Type::Bool,
            UnOp::Exp2 | UnOp::Log2 | UnOp::Tanh | UnOp::ToFloat => Type::Float,
            UnOp::Floor => Type::Int,
        };
        self.intern(Node::Unary(op, a), result)
    }

    fn binary(&mut self, op: BinOp, a: NodeId, b: NodeId) -> Result<NodeId, ExprError> {
        use BinOp::*;
        let (a, b) = self.promote(a, b)?;
        let (ty, other) = (self.ty(a)?, self.ty(b)?);
        let op = match (op, ty) {
            (BitAnd, Type::Bool) => And,
            (BitOr, Type::Bool) => Or,
            (BitXor, Type::Bool) => Ne,
            _ => op,
        };
        let name = format!("{op:?}");
        match op {
            Add | Sub | Mul | Div | Min | Max | Lt | Le => {
                self.expect(&name, &[a, b], &[Type::Float, Type::Int], "two numbers")?;
            }
            Eq | Ne if ty != other => self.expect(&name, &[a, b], &[], "two numbers or two bools")?,
            Eq | Ne => {}
            And | Or => self.expect(&name, &[a, b], &[Type::Bool], "two bools")?,
            BitAnd | BitOr | BitXor => {
                self.expect(&name, &[a, b], &[Type::Int], "two ints or two bools")?;
            }
            Rem | Shl | Shr => self.expect(&name, &[a, b], &[Type::Int], "two ints")?,
        }
        let (x, y) = (self.as_const(a), self.as_const(b));
        if let (Some(x), Some(y)) = (x, y) {
            return self.constant(binary(op, x, y));
        }
        if let Some(id) = self.simplify_const(op, a, b, x, y)? {
            return Ok(id);
        }
        if let Some(id) = self.simplify_structure(op, a, b)? {
            return Ok(id);
        }
        self.intern(Node::Binary(op, a, b), if op.is_predicate() { Type::Bool } else { ty })
    }

    /// Identities with one constant operand. None may hide a NaN, hence no `x * 0.0 = 0.0`.
    fn simplify_const(
        &mut self,
        op: BinOp,
        a: NodeId,
        b: NodeId,
        x: Option<Value>,
        y: Option<Value>,
    ) -> Result<Option<NodeId>, ExprError> {
        use BinOp::*;
        let is = |v: Option<Value>, c: i32| match v {
            Some(Value::Float(f)) => f == f64::from(c),
            Some(Value::Int(i)) => i == c,
            _ => false,
        };
        let int = |v: Option<Value>, c: i32| v == Some(Value::Int(c));
        let bool = |v: Option<Value>, c: bool| v == Some(Value::Bool(c));
        Ok(Some(match op {
            Add | Sub if is(y, 0) => a,
            Add if is(x, 0) => b,
            Sub if is(x, 0) => self.unary(UnOp::Neg, b)?,
            Mul | Div if is(y, 1) => a,
            Mul if is(x, 1) => b,
            Mul if is(y, -1) => self.unary(UnOp::Neg, a)?,
            Mul if is(x, -1) => self.unary(UnOp::Neg, b)?,
            Mul | BitAnd if int(x, 0) => a,
            Mul | BitAnd if int(y, 0) => b,
            Div | Rem | Shl | Shr if int(x, 0) => a,
            Div if int(y, 0) => b,
            Rem if int(y, 0) || int(y, 1) => self.push(Node::Int(0))?,
            BitAnd if int(x, -1) => b,
            BitAnd if int(y, -1) => a,
            BitOr | BitXor if int(x, 0) => b,
            BitOr | BitXor | Shl | Shr if int(y, 0) => a,
            And if bool(x, true) => b,
            And if bool(y, true) => a,
            And if bool(x, false) => a,
            And if bool(y, false) => b,
            Or if bool(x, false) => b,
            Or if bool(y, false) => a,
            Or if bool(x, true) => a,
            Or if bool(y, true) => b,
            Eq if bool(x, true) => b,
            Eq if bool(y, true) => a,
            Ne if bool(x, false) => b,
            Ne if bool(y, false) => a,
            Ne if bool(x, true) => self.unary(UnOp::Not, b)?,
            Ne if bool(y, true) => self.unary(UnOp::Not, a)?,
            Eq if bool(x, false) => self.unary(UnOp::Not, b)?,
            Eq if bool(y, false) => self.unary(UnOp::Not, a)?,
            _ => return Ok(None),
        }))
    }

    /// Identities between operands.
    fn simplify_structure(&mut self, op: BinOp, a: NodeId, b: NodeId) -> Result<Option<NodeId>, ExprError> {
        use BinOp::*;
        let exact = self.ty(a)? != Type::Float;
        Ok(Some(match (op, self.nodes[a.index()], self.nodes[b.index()]) {
            (Min | Max | And | Or | BitAnd | BitOr, ..) if a == b => a,
            (Lt, ..) if a == b => self.push(Node::Bool(false))?,
            (Ne, ..) if a == b && exact => self.push(Node::Bool(false))?,
            (Le | Eq, ..) if a == b && exact => self.push(Node::Bool(true))?,
            (Sub | BitXor, ..) if a == b && exact => self.push(Node::Int(0))?,
            (Add, _, Node::Unary(UnOp::Neg, x)) => self.binary(Sub, a, x)?,
            (Add, Node::Unary(UnOp::Neg, x), _) => self.binary(Sub, b, x)?,
            (Sub, _, Node::Unary(UnOp::Neg, x)) => self.binary(Add, a, x)?,
            _ => return Ok(None),
        }))
    }

    fn select(&mut self, c: NodeId, a: NodeId, b: NodeId) -> Result<NodeId, ExprError> {
        self.expect("select", &[c], &[Type::Bool], "a bool condition")?;
        let (a, b) = self.promote(a, b)?;
        let ty = self.ty(a)?;
        if ty != self.ty(b)? {
            self.expect("select", &[a, b], &[], "two branches of one type")?;
        }
        match (self.nodes[c.index()], self.nodes[a.index()], self.nodes[b.index()]) {
            (Node::Bool(true), ..) => Ok(a),
            (Node::Bool(false), ..) => Ok(b),
            _ if a == b => Ok(a),
            (Node::Unary(UnOp::Not, c), ..) => self.select(c, b, a),
            (_, Node::Bool(true), _) => self.binary(BinOp::Or, c, b),
            (_, _, Node::Bool(false)) => self.binary(BinOp::And, c, a),
            (_, Node::Bool(false), Node::Bool(true)) => self.unary(UnOp::Not, c),
            _ => self.intern(Node::Select(c, a, b), ty),
        }
    }

    /// Adds the nodes of another program, in order, renaming its slots, and the score if `score` is given.
    /// Returns the new id of each of its nodes.
    pub(super) fn import(
        &mut self,
        program: &Program,
        slots: &[Slot],
        score: Option<NodeId>,
    ) -> Result<Vec<NodeId>, ExprError> {
        let mut ids: Vec<NodeId> = Vec::with_capacity(program.nodes().len());
        for node in program.nodes() {
            ids.push(match (node.map_operands(|i| ids[i.index()]), score) {
                (Node::Score, Some(score)) => score,
                (Node::Load { table, index }, _) => {
                    self.push(Node::Load { table: slots[table.index()], index })?
                }
                (node, _) => self.push(node)?,
            });
        }
        Ok(ids)
    }

    /// The expression whose value is `root`, without what it does not need.
    ///
    /// # Errors
    /// [`ExprError::UnknownNode`].
    pub fn finish(&self, root: NodeId) -> Result<Expr, ExprError> {
        self.ty(root)?;
        Ok(Expr(self.program(&[root], false).0))
    }

    /// The program of these roots, its nodes in depth-first order, so that the order of writing leaves no trace.
    /// With `compact`, slots are numbered in that order too, and the old number of each is returned.
    pub(super) fn program(&self, roots: &[NodeId], compact: bool) -> (Program, Vec<Slot>) {
        let mut new: Vec<Option<NodeId>> = vec![None; self.nodes.len()];
        let mut kept: Vec<Slot> = Vec::new();
        let (mut nodes, mut types, mut deps) = (Vec::new(), Vec::new(), Vec::new());
        let mut stack: Vec<NodeId> = roots.iter().rev().copied().collect();
        while let Some(&id) = stack.last() {
            let node = self.nodes[id.index()];
            let depth = stack.len();
            if new[id.index()].is_none() {
                stack.extend(node.operands().filter(|i| new[i.index()].is_none()));
                // First operand first.
                stack[depth..].reverse();
            }
            if stack.len() > depth {
                continue;
            }
            stack.pop();
            if new[id.index()].is_some() {
                continue;
            }
            let mut node = node.map_operands(|i| new[i.index()].unwrap_or(i));
            if let Node::Load { table, .. } = &mut node
                && compact
            {
                let slot = kept.iter().position(|s| s == table).unwrap_or_else(|| {
                    kept.push(*table);
                    kept.len() - 1
                });
                *table = Slot(slot as u16);
            }
            // Never more nodes than `self.nodes`, whose number fits.
            new[id.index()] = Some(NodeId(nodes.len() as u16));
            nodes.push(node);
            types.push(self.types[id.index()]);
            deps.push(self.deps[id.index()]);
        }
        let slots = match compact {
            true => kept.iter().map(|s| self.slots[s.index()]).collect(),
            false => self.slots.as_slice().into(),
        };
        let roots = roots.iter().filter_map(|r| new[r.index()]).collect();
        let (nodes, types, deps) = (nodes.into(), types.into(), deps.into());
        (Program(Arc::new(ProgramData { nodes, types, deps, slots, roots })), kept)
    }
}
