//! From an expression to [`Code`]: common subexpressions, spreads, a few fused operations, registers.

use super::program::{Arg, Axis, Code, Instruction, Load, Op, Outer, SCORE, Spread, Update, axes};
use flashattn_spec::expr::{BinOp, Node, NodeId, Program, Table, Type, UnOp, Var};
use std::collections::HashMap;

/// A result that the caller wants.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub node: NodeId,
    /// One value a row may stay so.
    pub dense: bool,
}

/// A value before registers are assigned; arguments are earlier values.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Value {
    op: Op,
    args: Vec<usize>,
}

struct Compiler<'a> {
    program: &'a Program,
    tables: &'a [Table],
    scale: f32,
    values: Vec<Value>,
    spreads: Vec<Spread>,
    loads: Vec<Load<usize>>,
    known: HashMap<Value, usize>,
    nodes: Vec<Option<usize>>,
}

/// Value 0 is the score.
const SCORE_VALUE: usize = 0;

/// Compiles what is needed to update the scores to (or by) node `update`, and to give the wanted nodes. `scale` is
/// the factor from the kernel's scores to the expression's. The tables are the program's own.
pub(super) fn compile(
    program: &Program,
    tables: &[Table],
    scale: f32,
    update: Option<NodeId>,
    wanted: &[Wanted],
) -> Code {
    let mut needed = vec![false; program.nodes().len()];
    wanted.iter().map(|w| w.node).chain(update).for_each(|n| needed[n.index()] = true);
    for (i, node) in program.nodes().iter().enumerate().rev() {
        if needed[i] {
            node.operands().for_each(|o| needed[o.index()] = true);
        }
    }
    let mut c = Compiler {
        program,
        tables,
        scale,
        values: vec![Value { op: Op::Constant(0), args: Vec::new() }],
        spreads: vec![Spread::Full],
        loads: Vec::new(),
        known: HashMap::new(),
        nodes: vec![None; needed.len()],
    };
    for (i, node) in program.nodes().iter().enumerate() {
        if needed[i] {
            c.nodes[i] = Some(c.node(node));
        }
    }
    let update = update.map(|node| {
        let value = c.value(node);
        (program.types()[node.index()], c.expanded(value))
    });
    let results = wanted.iter().map(|w| {
        let value = c.value(w.node);
        if w.dense { value } else { c.expanded(value) }
    });
    let results = results.collect::<Vec<_>>();
    let roots = results.iter().copied().chain(update.map(|u| u.1)).collect::<Vec<_>>();
    let uses = c.fuse(&roots);
    let update = match update {
        None => Update::None,
        Some((Type::Bool, value)) => c.hide(value, &uses),
        Some((_, value)) => c.update(value, &uses),
    };
    c.assign(update, &results)
}

impl Compiler<'_> {
    fn value(&self, node: NodeId) -> usize {
        // Operands come first, so there is one.
        self.nodes[node.index()].unwrap_or(SCORE_VALUE)
    }

    fn push(&mut self, op: Op, args: Vec<usize>, spread: Spread) -> usize {
        let value = Value { op, args };
        if let Some(&id) = self.known.get(&value) {
            return id;
        }
        self.values.push(value.clone());
        self.spreads.push(spread);
        self.known.insert(value, self.values.len() - 1);
        self.values.len() - 1
    }

    /// The value with one element for each element of the strip, if it has one for each row.
    fn expanded(&mut self, value: usize) -> usize {
        match self.spreads[value] {
            Spread::Row => self.push(Op::Expand, vec![value], Spread::Full),
            _ => value,
        }
    }

    fn constant(&mut self, bits: u32) -> usize {
        self.push(Op::Constant(bits), Vec::new(), Spread::Uniform)
    }

    fn as_constant(&self, value: usize) -> Option<u32> {
        match self.values[value].op {
            Op::Constant(bits) if value != SCORE_VALUE => Some(bits),
            _ => None,
        }
    }

    /// An operation on values, each brought to the spread of the result.
    fn operation(&mut self, op: Op, args: &[usize]) -> usize {
        let spreads = || args.iter().map(|&a| self.spreads[a]);
        let query = spreads().any(|s| matches!(s, Spread::Lane | Spread::Full));
        let key = spreads().any(|s| matches!(s, Spread::Row | Spread::Full));
        let spread = Spread::of(query, key);
        let mut args = args.to_vec();
        let commutes = matches!(
            op,
            Op::AddFloat | Op::MulFloat | Op::AddInt | Op::MulInt | Op::And | Op::Or | Op::Xor | Op::Eq
        );
        // The loops are faster when what does not vary comes second.
        if commutes && self.spreads[args[0]].once() && !self.spreads[args[1]].once() {
            args.swap(0, 1);
        }
        if op == Op::MulFloat
            && let Some(y) = self.as_constant(args[1]).map(f32::from_bits)
            && let Value { op: Op::MulFloat, args: inner } = &self.values[args[0]]
            && let Some(x) = self.as_constant(inner[1]).map(f32::from_bits)
            && (x * y).is_normal()
        {
            let (inner, product) = (inner[0], self.constant((x * y).to_bits()));
            return self.operation(op, &[inner, product]);
        }
        let outer = match (args.as_slice(), spread) {
            (&[a, b], Spread::Full) => match (self.spreads[a], self.spreads[b]) {
                (Spread::Lane, Spread::Row) => Outer::of(op, false).map(|o| (o, vec![a, b])),
                (Spread::Row, Spread::Lane) => Outer::of(op, true).map(|o| (o, vec![b, a])),
                _ => None,
            },
            _ => None,
        };
        if let Some((outer, args)) = outer {
            return self.push(Op::Outer(outer), args, spread);
        }
        if spread == Spread::Full {
            args.iter_mut().for_each(|a| *a = self.expanded(*a));
        }
        self.push(op, args, spread)
    }

    fn node(&mut self, node: &Node) -> usize {
        match *node {
            Node::Score if self.scale == 1.0 => SCORE_VALUE,
            Node::Score => {
                let scale = self.constant(self.scale.to_bits());
                self.operation(Op::MulFloat, &[SCORE_VALUE, scale])
            }
            Node::Var(Var::Q) => self.push(Op::Query, Vec::new(), Spread::Lane),
            Node::Var(Var::Kv) => self.push(Op::Key, Vec::new(), Spread::Row),
            Node::Var(var) => self.push(Op::Uniform(var), Vec::new(), Spread::Uniform),
            Node::Float(bits) => self.constant(bits),
            Node::Int(x) => self.constant(x as u32),
            Node::Bool(x) => self.constant(if x { u32::MAX } else { 0 }),
            Node::Load { table, index } => self.load(table.index(), index.map(|n| self.value(n))),
            Node::Unary(op, a) => {
                let op = unary(op, self.program.types()[a.index()]);
                self.operation(op, &[self.value(a)])
            }
            Node::Binary(op, a, b) => {
                let ty = self.program.types()[a.index()];
                let (a, b) = (self.value(a), self.value(b));
                self.binary(op, ty, a, b)
            }
            Node::Select(c, a, b) => {
                self.operation(Op::Select, &[self.value(c), self.value(a), self.value(b)])
            }
        }
    }

    fn binary(&mut self, op: BinOp, ty: Type, a: usize, b: usize) -> usize {
        let constant = self.as_constant(b);
        match (op, ty, constant) {
            // Rounding down is what shifts and masks do.
            (BinOp::Div, Type::Int, Some(n)) if n.is_power_of_two() && n as i32 > 0 => {
                let shift = self.constant(n.trailing_zeros());
                self.operation(Op::Shr, &[a, shift])
            }
            (BinOp::Rem, Type::Int, Some(n)) if n.is_power_of_two() && n as i32 > 0 => {
                let mask = self.constant(n - 1);
                self.operation(Op::And, &[a, mask])
            }
            // A division costs ten multiplications; the reciprocal is off by half an ulp at most.
            (BinOp::Div, Type::Float, Some(n)) if (1e-30..1e30).contains(&f32::from_bits(n).abs()) => {
                let reciprocal = self.constant((1.0 / f32::from_bits(n)).to_bits());
                self.operation(Op::MulFloat, &[a, reciprocal])
            }
            (BinOp::Eq, Type::Bool, _) => {
                let differ = self.operation(Op::Xor, &[a, b]);
                self.operation(Op::Not, &[differ])
            }
            (BinOp::Ne, Type::Int, _) => {
                let equal = self.operation(Op::Eq, &[a, b]);
                self.operation(Op::Not, &[equal])
            }
            _ => self.operation(binary(op, ty), &[a, b]),
        }
    }

    fn load(&mut self, slot: usize, index: [usize; 4]) -> usize {
        let mut axes = axes(&self.tables[slot], index);
        let spreads = || axes.iter().map(|a| self.spreads[a.index]);
        let query = spreads().any(|s| matches!(s, Spread::Lane | Spread::Full));
        let key = spreads().any(|s| matches!(s, Spread::Row | Spread::Full));
        let outer = query && key && !spreads().any(|s| s == Spread::Full);
        if query && key && !outer {
            axes.iter_mut().for_each(|a| a.index = self.expanded(a.index));
        }
        let args = axes.iter().map(|a| a.index).collect();
        self.loads.push(Load { slot, axes, outer });
        // The number makes each load a value of its own; nodes are without duplicates already.
        self.push(Op::Load((self.loads.len() - 1) as u16), args, Spread::of(query, key))
    }

    /// The operands of value `v` if it is such an operation and nobody else needs its result.
    fn only(&self, v: usize, op: Op, uses: &[usize]) -> Option<Vec<usize>> {
        (v != SCORE_VALUE && self.values[v].op == op && uses[v] == 1).then(|| self.values[v].args.clone())
    }

    /// Replaces chains of operations by one where nobody else needs the results between. Returns the number of
    /// uses of each value before.
    fn fuse(&mut self, roots: &[usize]) -> Vec<usize> {
        let mut uses = vec![0; self.values.len()];
        roots.iter().for_each(|&r| uses[r] += 1);
        for v in (1..self.values.len()).rev() {
            if uses[v] > 0 {
                self.values[v].args.iter().for_each(|&a| uses[a] += 1);
            }
        }
        for v in 1..self.values.len() {
            let args = self.values[v].args.clone();
            let only = |k: usize, op: Op| {
                self.only(args[k], op, &uses).filter(|_| self.spreads[args[k]] == self.spreads[v])
            };
            let once = |v: usize| self.spreads[v].once();
            let fused = match self.values[v].op {
                Op::AbsInt => (only(0, Op::Outer(Outer::Sub)).or(only(0, Op::Outer(Outer::SubFrom))))
                    .map(|outer| (Op::Outer(Outer::AbsSub), outer)),
                Op::IntToFloat => {
                    only(0, Op::Outer(Outer::AbsSub)).map(|outer| (Op::Outer(Outer::Distance), outer))
                }
                Op::AddFloat => only(0, Op::MulFloat)
                    .map(|m| (Op::MulAdd, vec![m[0], m[1], args[1]]))
                    .or_else(|| only(1, Op::MulFloat).map(|m| (Op::MulAdd, vec![m[0], m[1], args[0]]))),
                Op::SubFloat => only(1, Op::MulFloat).map(|m| (Op::NegMulAdd, vec![m[0], m[1], args[0]])),
                Op::MulFloat if once(args[1]) => only(0, Op::Tanh)
                    .and_then(|tanh| self.only(tanh[0], Op::MulFloat, &uses))
                    .filter(|m| once(m[1]))
                    .map(|m| (Op::SoftCap, vec![m[0], m[1], args[1]])),
                _ => None,
            };
            if let Some((op, args)) = fused {
                self.values[v] = Value { op, args };
            }
        }
        uses
    }

    /// The score times a constant, if that is what `v` is.
    fn factor(&self, v: usize) -> Option<f32> {
        match &self.values[v] {
            _ if v == SCORE_VALUE => Some(1.0),
            Value { op: Op::MulFloat, args } if args[0] == SCORE_VALUE => {
                self.as_constant(args[1]).map(f32::from_bits)
            }
            _ => None,
        }
    }

    /// Updates the scores to `v`.
    fn update(&self, v: usize, uses: &[usize]) -> Update<usize> {
        if v == SCORE_VALUE {
            return Update::None;
        }
        let Value { op, args } = &self.values[v];
        let add = |score: usize, negative: bool, a: usize, b: Option<usize>| {
            // What is added is read while the scores are written.
            let apart = a != SCORE_VALUE && b != Some(SCORE_VALUE);
            self.factor(score).filter(|_| apart).map(|factor| Update::Add { factor, negative, a, b })
        };
        let update = match op {
            _ if uses[v] != 1 => None,
            Op::AddFloat => add(args[0], false, args[1], None).or_else(|| add(args[1], false, args[0], None)),
            Op::SubFloat => add(args[0], true, args[1], None),
            Op::MulAdd if args[0] == SCORE_VALUE && args[2] != SCORE_VALUE => {
                let factor = self.as_constant(args[1]).map(f32::from_bits);
                factor.map(|factor| Update::Add { factor, negative: false, a: args[2], b: None })
            }
            Op::MulAdd => add(args[2], false, args[0], Some(args[1])),
            Op::NegMulAdd => add(args[2], true, args[0], Some(args[1])),
            Op::SoftCap if args[0] == SCORE_VALUE => Some(Update::SoftCap(args[1], args[2])),
            _ => None,
        };
        update.unwrap_or(Update::Set(v))
    }

    /// Hides scores where `v` does not hold.
    fn hide(&self, v: usize, uses: &[usize]) -> Update<usize> {
        match self.only(v, Op::And, uses) {
            Some(args) => Update::Hide(args[0], Some(args[1])),
            None => Update::Hide(v, None),
        }
    }

    /// Orders the values, leaves out the unused, and gives each a register that nothing alive holds. No
    /// instruction writes a register that it reads.
    fn assign(self, update: Update<usize>, results: &[usize]) -> Code {
        let roots = results.iter().copied().chain(update.operands()).collect::<Vec<_>>();
        let mut used = vec![false; self.values.len()];
        roots.iter().for_each(|&r| used[r] = true);
        for v in (0..self.values.len()).rev() {
            if used[v] {
                self.values[v].args.iter().for_each(|&a| used[a] = true);
            }
        }
        used[SCORE_VALUE] = false;
        let pick = |once: bool| {
            let (used, spreads) = (&used, &self.spreads);
            (0..used.len()).filter(move |&v| used[v] && spreads[v].once() == once)
        };
        let order = pick(true).chain(pick(false)).collect::<Vec<_>>();
        let strip_end = pick(true).count();
        // Position of the last reader. What a block or the caller reads of the strip's values stays.
        let mut last = vec![0; self.values.len()];
        for (at, &v) in order.iter().enumerate() {
            for &a in &self.values[v].args {
                let stays = self.spreads[a].once() && at >= strip_end;
                last[a] = if stays { usize::MAX } else { at };
            }
        }
        roots.iter().for_each(|&r| last[r] = usize::MAX);

        let mut registers = vec![SCORE; self.values.len()];
        let mut free: Vec<u32> = Vec::new();
        let mut count = 0;
        let mut instructions = Vec::with_capacity(order.len());
        for (at, &v) in order.iter().enumerate() {
            registers[v] = free.pop().unwrap_or_else(|| {
                count += 1;
                count - 1
            });
            let value = &self.values[v];
            let arg = |k: usize| {
                let a = value.args.get(k).copied().unwrap_or(SCORE_VALUE);
                Arg { register: registers[a], spread: self.spreads[a] }
            };
            instructions.push(Instruction {
                op: value.op,
                to: registers[v],
                spread: self.spreads[v],
                args: [arg(0), arg(1), arg(2)],
            });
            let mut args = value.args.clone();
            args.sort_unstable();
            args.dedup();
            free.extend(args.iter().filter(|&&a| a != SCORE_VALUE && last[a] == at).map(|&a| registers[a]));
        }
        // A load's registers are those of its values when it runs: they were alive then.
        let arg = |v: usize| Arg { register: registers[v], spread: self.spreads[v] };
        let loads = self.loads.iter().map(|load| {
            let axis = |a: &Axis<usize>| Axis { index: arg(a.index), last: a.last, stride: a.stride };
            Load { slot: load.slot, axes: load.axes.iter().map(axis).collect(), outer: load.outer }
        });
        let block = instructions.split_off(strip_end);
        Code {
            strip: instructions,
            block,
            loads: loads.collect(),
            tables: self.tables.to_vec(),
            update: update.map(arg),
            results: results.iter().map(|&r| arg(r)).collect(),
            registers: count as usize,
        }
    }
}

fn unary(op: UnOp, ty: Type) -> Op {
    match (op, ty) {
        (UnOp::Neg, Type::Int) => Op::NegInt,
        (UnOp::Neg, _) => Op::NegFloat,
        (UnOp::Abs, Type::Int) => Op::AbsInt,
        (UnOp::Abs, _) => Op::AbsFloat,
        (UnOp::Not, _) => Op::Not,
        (UnOp::Exp2, _) => Op::Exp2,
        (UnOp::Log2, _) => Op::Log2,
        (UnOp::Tanh, _) => Op::Tanh,
        (UnOp::ToFloat, Type::Bool) => Op::BoolToFloat,
        (UnOp::ToFloat, _) => Op::IntToFloat,
        (UnOp::Floor, _) => Op::Floor,
    }
}

/// All but the equality of Bools and the inequality of Ints.
fn binary(op: BinOp, ty: Type) -> Op {
    let float = ty == Type::Float;
    let pick = |of_floats: Op, of_ints: Op| if float { of_floats } else { of_ints };
    match op {
        BinOp::Add => pick(Op::AddFloat, Op::AddInt),
        BinOp::Sub => pick(Op::SubFloat, Op::SubInt),
        BinOp::Mul => pick(Op::MulFloat, Op::MulInt),
        BinOp::Div => pick(Op::DivFloat, Op::DivInt),
        BinOp::Rem => Op::RemInt,
        BinOp::Min => pick(Op::MinFloat, Op::MinInt),
        BinOp::Max => pick(Op::MaxFloat, Op::MaxInt),
        BinOp::Lt => pick(Op::LtFloat, Op::LtInt),
        BinOp::Le => pick(Op::LeFloat, Op::LeInt),
        BinOp::Eq => pick(Op::EqFloat, Op::Eq),
        BinOp::Ne => pick(Op::NeFloat, Op::Xor),
        BinOp::And | BinOp::BitAnd => Op::And,
        BinOp::Or | BinOp::BitOr => Op::Or,
        BinOp::BitXor => Op::Xor,
        BinOp::Shl => Op::Shl,
        BinOp::Shr => Op::Shr,
    }
}
