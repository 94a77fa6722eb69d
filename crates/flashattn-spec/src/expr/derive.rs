//! Derivatives, for the backward pass.
//!
//! Forward mode: each node's derivative is built from those of its operands. (Reverse mode would give all tables in
//! one sweep, but multiplies the unused branch of a `select` by zero, and zero times infinity is a NaN.)
//! Ints and Bools have no derivative. Where a function has a kink, one of its one-sided slopes is taken: `min` and
//! `max` take the first operand's at a tie; `abs` has slope 0 at 0.

use super::{BinOp, Builder, Expr, ExprError, Node, NodeId, Program, Slot, Type, UnOp};
use std::f32::consts::{LN_2, LOG2_E};

/// The value of an expression and its derivatives, as one program, to be computed in one pass.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Gradients {
    /// The nodes of all of them. Its slots are the expression's own, so it takes the same tables.
    pub program: Program,
    /// The value of the expression itself.
    pub value: NodeId,
    /// The derivative with respect to the score.
    pub d_score: NodeId,
    /// The derivatives with respect to the wanted table elements.
    pub tables: Vec<TableGrad>,
}

/// The derivative of an expression with respect to one table element that it reads.
///
/// The gradient of a table is the sum, over all scores and over all `TableGrad`s of its slot, of
/// `upstream * derivative`, added at `index` (clamped as in [`super::Table::offset`]).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TableGrad {
    /// The table.
    pub slot: Slot,
    /// The nodes that say which element.
    pub index: [NodeId; 4],
    /// The derivative, a Float.
    pub derivative: NodeId,
}

impl Expr {
    /// The derivative of this score mod with respect to the score: a Float expression over the same slots.
    ///
    /// # Errors
    /// [`ExprError::TooManyNodes`].
    pub fn d_score(&self) -> Result<Self, ExprError> {
        let (mut builder, ids) = self.reopen()?;
        let score = self.nodes().iter().position(|n| *n == Node::Score);
        let d = match score {
            Some(i) => tangent(&mut builder, self, &ids, i)?,
            None => builder.float(0.0)?,
        };
        builder.finish(d)
    }

    /// The value, the derivative with respect to the score, and those with respect to each element loaded from a
    /// table of floats whose slot is `wanted` (usually: [`super::Table::wants_grad`]).
    ///
    /// # Errors
    /// [`ExprError::TooManyNodes`].
    pub fn gradients(&self, wanted: impl Fn(Slot) -> bool) -> Result<Gradients, ExprError> {
        let (mut builder, ids) = self.reopen()?;
        let mut roots = vec![ids[self.root().index()], builder.float(0.0)?];
        let mut slots = Vec::new();
        for (i, node) in self.nodes().iter().enumerate() {
            match *node {
                Node::Score => roots[1] = tangent(&mut builder, self, &ids, i)?,
                Node::Load { table, index } if self.types()[i] == Type::Float && wanted(table) => {
                    let derivative = tangent(&mut builder, self, &ids, i)?;
                    if builder.float(0.0)? != derivative {
                        slots.push(table);
                        roots.extend(index.map(|i| ids[i.index()]));
                        roots.push(derivative);
                    }
                }
                _ => {}
            }
        }
        let (program, _) = builder.program(&roots, false);
        let roots = program.roots();
        let (value, d_score) = (roots[0], roots[1]);
        let tables = slots.iter().zip(roots[2..].as_chunks::<5>().0);
        let tables = tables.map(|(&slot, &[a, b, c, d, derivative])| TableGrad {
            slot,
            index: [a, b, c, d],
            derivative,
        });
        let tables = tables.collect();
        Ok(Gradients { value, d_score, tables, program })
    }

    /// A builder that holds this expression and has room for its derivatives, and the id of each node there.
    fn reopen(&self) -> Result<(Builder, Vec<NodeId>), ExprError> {
        let mut builder = Builder::with_limit(usize::MAX);
        let slots = self.table_slots().iter().map(|&ty| builder.slot(ty)).collect::<Result<Vec<_>, _>>()?;
        let ids = builder.import(self, &slots, None)?;
        Ok((builder, ids))
    }
}

/// The derivative of the root with respect to node `seed` (a Float leaf); `ids` are the builder's names.
fn tangent(b: &mut Builder, expr: &Expr, ids: &[NodeId], seed: usize) -> Result<NodeId, ExprError> {
    use BinOp::*;
    // `None` is a derivative that is zero by structure; it must not be multiplied by anything.
    let mut tangents: Vec<Option<NodeId>> = vec![None; expr.nodes().len()];
    tangents[seed] = Some(b.float(1.0)?);
    for (i, node) in expr.nodes().iter().enumerate().skip(seed + 1) {
        let d = |i: NodeId| tangents[i.index()];
        if expr.types()[i] != Type::Float || node.operands().all(|i| d(i).is_none()) {
            continue;
        }
        let id = |i: NodeId| ids[i.index()];
        let mut op = |op, x, y| b.push(Node::Binary(op, x, y));
        let result = match *node {
            Node::Unary(un, x) => {
                let (Some(dx), x, y) = (d(x), id(x), ids[i]) else {
                    continue;
                };
                match un {
                    UnOp::Neg => b.push(Node::Unary(UnOp::Neg, dx))?,
                    UnOp::Abs => {
                        let zero = b.float(0.0)?;
                        let minus = b.push(Node::Unary(UnOp::Neg, dx))?;
                        let below = b.push(Node::Binary(Lt, x, zero))?;
                        let above = b.push(Node::Binary(Lt, zero, x))?;
                        let right = b.push(Node::Select(above, dx, zero))?;
                        b.push(Node::Select(below, minus, right))?
                    }
                    UnOp::Exp2 => {
                        let ln2 = b.float(LN_2)?;
                        let slope = b.push(Node::Binary(Mul, y, ln2))?;
                        b.push(Node::Binary(Mul, dx, slope))?
                    }
                    UnOp::Log2 => {
                        let log2e = b.float(LOG2_E)?;
                        let slope = b.push(Node::Binary(Div, log2e, x))?;
                        b.push(Node::Binary(Mul, dx, slope))?
                    }
                    UnOp::Tanh => {
                        let one = b.float(1.0)?;
                        let square = b.push(Node::Binary(Mul, y, y))?;
                        let slope = b.push(Node::Binary(Sub, one, square))?;
                        b.push(Node::Binary(Mul, dx, slope))?
                    }
                    // From or to Int and Bool: flat.
                    UnOp::Not | UnOp::ToFloat | UnOp::Floor => continue,
                }
            }
            Node::Binary(bin, x, y) => {
                let (dx, dy, x, y) = (d(x), d(y), id(x), id(y));
                match (bin, dx, dy) {
                    (Add, Some(dx), Some(dy)) => op(Add, dx, dy)?,
                    (Add | Sub, Some(d), None) | (Add, None, Some(d)) => d,
                    (Sub, Some(dx), Some(dy)) => op(Sub, dx, dy)?,
                    (Sub, None, Some(dy)) => b.push(Node::Unary(UnOp::Neg, dy))?,
                    (Mul, Some(dx), Some(dy)) => {
                        let (left, right) = (op(Mul, dx, y)?, op(Mul, x, dy)?);
                        op(Add, left, right)?
                    }
                    (Mul, Some(dx), None) => op(Mul, dx, y)?,
                    (Mul, None, Some(dy)) => op(Mul, x, dy)?,
                    (Div, Some(dx), None) => op(Div, dx, y)?,
                    (Div, dx, Some(dy)) => {
                        // (dx - (x / y) dy) / y
                        let quotient = op(Mul, ids[i], dy)?;
                        let top = match dx {
                            Some(dx) => op(Sub, dx, quotient)?,
                            None => b.push(Node::Unary(UnOp::Neg, quotient))?,
                        };
                        b.push(Node::Binary(Div, top, y))?
                    }
                    (Min | Max, dx, dy) => {
                        let zero = b.float(0.0)?;
                        let (low, high) = if bin == Min { (x, y) } else { (y, x) };
                        let first = b.push(Node::Binary(Le, low, high))?;
                        b.push(Node::Select(first, dx.unwrap_or(zero), dy.unwrap_or(zero)))?
                    }
                    _ => continue,
                }
            }
            Node::Select(c, x, y) => {
                let zero = b.float(0.0)?;
                let (dx, dy) = (d(x).unwrap_or(zero), d(y).unwrap_or(zero));
                b.push(Node::Select(id(c), dx, dy))?
            }
            _ => continue,
        };
        tangents[i] = Some(result);
    }
    match tangents[expr.root().index()] {
        Some(d) => Ok(d),
        None => b.float(0.0),
    }
}
