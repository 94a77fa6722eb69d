//! Masks and score mods inside kernels: an expression of the spec, emitted for the elements of a fragment.
//!
//! Each node is emitted once for each place where its value can differ: what depends on neither query nor key once, what
//! depends on the query once for each of the thread's two rows, what depends on the key once a column, the rest once an
//! element. Meanings are those of [`flashattn_spec::expr`], in f32.

use std::collections::HashMap;
use std::f32::consts::LOG2_E;

use flashattn_spec::expr::{BinOp, Node, NodeId, Program, Type, UnOp, Var};
use ptx::Builder;
use ptx::build::{Compare, Reg, Value};
use ptx::instr::{self, Cache, Order};

/// What a kernel knows of a captured table.
#[derive(Clone, Copy, Debug)]
pub struct TableArgs<'k> {
    /// Its elements, row-major, in global memory.
    pub data: Reg<'k, u64>,
    /// Bytes of an element.
    pub bytes: u32,
    /// Its dimensions; `None` for one of size 1, whose index is always 0.
    pub dims: [Option<Reg<'k, u32>>; 4],
}

/// The variables of the sequence and head at hand; the same for all elements of a work tile.
#[derive(Clone, Copy, Debug)]
pub struct Place<'k> {
    /// Sequence of the batch.
    pub batch: Reg<'k, i32>,
    /// Query head.
    pub head: Reg<'k, i32>,
    /// Queries of the sequence.
    pub seqlen_q: Reg<'k, i32>,
    /// Keys of the sequence.
    pub seqlen_k: Reg<'k, i32>,
    /// First query of the sequence in the packed order.
    pub q_start: Reg<'k, i32>,
    /// First key of the sequence in the packed order.
    pub kv_start: Reg<'k, i32>,
}

/// Where an element lies: which of the thread's rows, which of its columns, and both indices.
#[derive(Clone, Copy, Debug)]
pub struct Element<'k> {
    /// Which of the thread's rows.
    pub row: usize,
    /// Which of the thread's columns.
    pub column: usize,
    /// Query index in its sequence.
    pub q: Reg<'k, i32>,
    /// Key index in its sequence.
    pub kv: Reg<'k, i32>,
    /// By how much it is more than column 0's, where that is a constant.
    pub kv_offset: Option<u32>,
}

/// A score mod at one element.
pub struct GradientsAt<'k> {
    /// Its value.
    pub value: Reg<'k, f32>,
    /// Its derivative with respect to the score.
    pub d_score: Reg<'k, f32>,
    /// For each table that wants a gradient: where it is added to, and the derivative.
    pub tables: Vec<(Reg<'k, u64>, Reg<'k, f32>)>,
}

/// Of each table gradient of a program of gradients the four nodes of the index, and the derivative's.
fn table_roots(program: &Program) -> &[[NodeId; 5]] {
    program.roots().get(2..).map_or(&[], |roots| roots.as_chunks().0)
}

/// Of each table gradient of a program of gradients the index.
pub fn table_indices(program: &Program) -> impl Iterator<Item = [NodeId; 4]> {
    table_roots(program).iter().map(|&[a, b, c, d, _]| [a, b, c, d])
}

/// By what the element of a table differs to which a gradient is added, among the elements of a sequence and head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spread {
    /// By query.
    pub q: bool,
    /// By key.
    pub kv: bool,
}

/// The spread of each table gradient of a program, given which dimensions of its table have more than one index.
pub fn spreads(program: &Program, shapes: &[[bool; 4]]) -> Vec<Spread> {
    let spread = |(roots, shape): (&[NodeId; 5], &[bool; 4])| {
        let mut spread = Spread { q: false, kv: false };
        for (node, _) in roots.iter().zip(shape).filter(|(_, several)| **several) {
            let deps = program.deps()[node.index()];
            spread.q |= deps.contains(Var::Q) || deps.contains_score();
            spread.kv |= deps.contains(Var::Kv) || deps.contains_score();
        }
        spread
    };
    table_roots(program).iter().zip(shapes).map(spread).collect()
}

/// A score mod `score ± factor·by`, as ALiBi: with `score = scale·s` it is `scale·(s ± (factor / scale)·by)`, where the division
/// is one for all elements, and `scale` is left to whoever multiplies next.
#[derive(Clone, Copy, Debug)]
pub struct Slope {
    /// The same for all elements of a work tile.
    factor: NodeId,
    by: NodeId,
    minus: bool,
}

impl Slope {
    /// The program as such, if it is one.
    pub fn of(program: &Program) -> Option<Self> {
        let at = |id: NodeId| (program.nodes()[id.index()], program.deps()[id.index()]);
        let (is_score, free) = (|id| at(id).0 == Node::Score, |id| !at(id).1.contains_score());
        let (product, minus) = match at(*program.roots().first()?).0 {
            Node::Binary(BinOp::Sub, score, product) if is_score(score) => (product, true),
            Node::Binary(BinOp::Add, a, b) if is_score(a) => (b, false),
            Node::Binary(BinOp::Add, a, b) if is_score(b) => (a, false),
            _ => return None,
        };
        let Node::Binary(BinOp::Mul, a, b) = at(product).0 else { return None };
        let uniform = |id: NodeId| {
            let deps = at(id).1;
            free(id) && !deps.contains(Var::Q) && !deps.contains(Var::Kv)
        };
        let (factor, by) = if uniform(a) { (a, b) } else { (b, a) };
        (uniform(factor) && free(by) && program.types()[product.index()] == Type::Float).then_some(Slope {
            factor,
            by,
            minus,
        })
    }
}

/// A value of one of the language's types.
#[derive(Clone, Copy, Debug)]
enum Val<'k> {
    Float(Reg<'k, f32>),
    Int(Reg<'k, i32>),
    Bool(Reg<'k, bool>),
}

/// Emits one program for the elements of a fragment.
pub struct ProgramEmitter<'a, 'k> {
    k: &'k Builder,
    program: &'a Program,
    tables: &'a [TableArgs<'k>],
    place: Place<'k>,
    /// Whether lengths are below 2²², so that f32 holds sums of four indices.
    small: bool,
    /// Whether a node's value is needed, rather than taken as a float from those below it.
    needed: Vec<bool>,
    /// As `values`, of integers as floats.
    floats: HashMap<(NodeId, Option<usize>, Option<usize>), Reg<'k, f32>>,
    /// [`Slope::factor`], over the scale and with its sign.
    factor: Option<Reg<'k, f32>>,
    /// Values by node, row (if it depends on the query) and column (if on the key); none that depend on the score.
    values: HashMap<(NodeId, Option<usize>, Option<usize>), Val<'k>>,
}

impl<'a, 'k> ProgramEmitter<'a, 'k> {
    /// For this program with these tables, in its order of slots.
    pub fn new(k: &'k Builder, program: &'a Program, tables: &'a [TableArgs<'k>], place: Place<'k>) -> Self {
        let needed = vec![true; program.nodes().len()];
        let (values, floats) = (HashMap::new(), HashMap::new());
        ProgramEmitter { k, program, tables, place, small: false, needed, floats, factor: None, values }
    }

    /// Converts sums and differences of indices to floats before they differ by element, as conversions take the units that
    /// exponentials take: ALiBi's |q − k| is then one subtraction. Only right if all lengths are below 2²².
    pub fn with_small_indices(mut self, small: bool) -> Self {
        self.small = small;
        if small {
            self.need_only(self.program.roots());
        }
        self
    }

    fn need_only(&mut self, nodes: &[NodeId]) {
        self.needed = vec![false; self.program.nodes().len()];
        nodes.iter().for_each(|&node| self.need(node));
    }

    /// Marks a node and those that it is computed from.
    fn need(&mut self, id: NodeId) {
        if std::mem::replace(&mut self.needed[id.index()], true) {
            return;
        }
        match self.program.nodes()[id.index()] {
            Node::Unary(UnOp::ToFloat, a) if self.linear(a) => self.need_floats(a),
            Node::Unary(_, a) => self.need(a),
            Node::Binary(_, a, b) => [a, b].into_iter().for_each(|node| self.need(node)),
            Node::Select(a, b, c) => [a, b, c].into_iter().for_each(|node| self.need(node)),
            Node::Load { index, .. } => index.into_iter().for_each(|node| self.need(node)),
            Node::Score | Node::Var(_) | Node::Float(_) | Node::Int(_) | Node::Bool(_) => {}
        }
    }

    /// The same for a node whose float is put together from those below it.
    fn need_floats(&mut self, id: NodeId) {
        match self.program.nodes()[id.index()] {
            Node::Unary(_, a) if self.by_element(id) => self.need_floats(a),
            Node::Binary(_, a, b) if self.by_element(id) => {
                [a, b].into_iter().for_each(|node| self.need_floats(node));
            }
            _ => self.need(id),
        }
    }

    fn by_element(&self, id: NodeId) -> bool {
        let deps = self.program.deps()[id.index()];
        deps.contains(Var::Q) && deps.contains(Var::Kv)
    }

    /// Whether a node is of few indices, added, subtracted, or their distance.
    fn linear(&self, id: NodeId) -> bool {
        /// How many; `None` if there is anything else.
        fn indices(program: &Program, id: NodeId) -> Option<usize> {
            match program.nodes()[id.index()] {
                Node::Var(Var::Q | Var::Kv | Var::SeqlenQ | Var::SeqlenK) => Some(1),
                Node::Int(x) if x.unsigned_abs() < 1 << 22 => Some(1),
                Node::Unary(UnOp::Neg | UnOp::Abs, a) => indices(program, a),
                Node::Binary(BinOp::Add | BinOp::Sub, a, b) => {
                    Some(indices(program, a)? + indices(program, b)?)
                }
                _ => None,
            }
        }
        self.small && self.by_element(id) && indices(self.program, id).is_some_and(|count| count <= 4)
    }

    /// By how much a sum of indices grows from key to key; `None` if that is not the same everywhere.
    fn growth(&self, id: NodeId) -> Option<i32> {
        match self.program.nodes()[id.index()] {
            Node::Var(Var::Kv) => Some(1),
            Node::Unary(UnOp::Neg, a) => Some(-self.growth(a)?),
            Node::Binary(BinOp::Add, a, b) => Some(self.growth(a)? + self.growth(b)?),
            Node::Binary(BinOp::Sub, a, b) => Some(self.growth(a)? - self.growth(b)?),
            _ => (!self.program.deps()[id.index()].contains(Var::Kv)).then_some(0),
        }
    }

    /// An integer as a float: [`ProgramEmitter::with_small_indices`].
    fn index_float(
        &mut self,
        id: NodeId,
        element: &Element<'k>,
        own: &HashMap<NodeId, Val<'k>>,
    ) -> Reg<'k, f32> {
        if self.by_element(id) {
            // All columns from the first: a register a row, where one a column would be as many again as the scores.
            if let (Some(growth), Some(offset)) = (self.growth(id), element.kv_offset) {
                let (at, column) = ((id, Some(element.row), Some(0)), element.column);
                if let Some(&first) = self.floats.get(&at) {
                    return if offset == 0 { first } else { first + (growth * offset as i32) as f32 };
                }
                if column == 0 {
                    let first = self.sum_float(id, element, own);
                    self.floats.insert(at, first);
                    return first;
                }
            }
        }
        self.sum_float(id, element, own)
    }

    /// The same from the floats of what is added.
    fn sum_float(
        &mut self,
        id: NodeId,
        element: &Element<'k>,
        own: &HashMap<NodeId, Val<'k>>,
    ) -> Reg<'k, f32> {
        if self.by_element(id) {
            match self.program.nodes()[id.index()] {
                Node::Unary(UnOp::Abs, a) => return self.index_float(a, element, own).abs(),
                Node::Unary(_, a) => return -self.index_float(a, element, own),
                Node::Binary(op, a, b) => {
                    let [a, b] = [a, b].map(|node| self.index_float(node, element, own));
                    return if op == BinOp::Add { a + b } else { a - b };
                }
                _ => {}
            }
        }
        let deps = self.program.deps()[id.index()];
        let row = deps.contains(Var::Q).then_some(element.row);
        let column = deps.contains(Var::Kv).then_some(element.column);
        if let Some(&float) = self.floats.get(&(id, row, column)) {
            return float;
        }
        let first = self.floats.get(&(id, row, Some(0))).copied();
        let float = match (self.program.nodes()[id.index()], first, element.kv_offset) {
            (Node::Var(Var::Kv), Some(first), Some(offset)) => first + offset as f32,
            _ => self.to_float(own[&id]),
        };
        self.floats.insert((id, row, column), float);
        float
    }

    /// The program's first root at an element, as a float. `score` is the scaled score.
    pub fn float(&mut self, element: &Element<'k>, score: Reg<'k, f32>) -> Reg<'k, f32> {
        let value = self.root(element, Some(score));
        self.to_float(value)
    }

    /// What is to be multiplied by the scale, of a program that is this [`Slope`] and a score not multiplied yet.
    pub fn add_slope(
        &mut self,
        slope: Slope,
        element: &Element<'k>,
        score: Reg<'k, f32>,
        inverse_scale: Reg<'k, f32>,
    ) -> Reg<'k, f32> {
        if self.factor.is_none() {
            self.need_only(&[slope.factor, slope.by]);
        }
        let own = self.values(element, None);
        let factor = match self.factor {
            Some(factor) => factor,
            None => {
                let factor = self.to_float(own[&slope.factor]) * inverse_scale;
                if slope.minus { -factor } else { factor }
            }
        };
        self.factor = Some(factor);
        self.to_float(own[&slope.by]).fma(factor, score)
    }

    /// The program's first root at an element, as a truth value.
    pub fn bool(&mut self, element: &Element<'k>) -> Reg<'k, bool> {
        let value = self.root(element, None);
        self.to_bool(value)
    }

    /// A score mod's value and derivatives at an element, of a program made by [`flashattn_spec::expr::Expr::gradients`];
    /// `grads` are the gradients of the tables that want one, by their place in the program.
    pub fn gradients(
        &mut self,
        element: &Element<'k>,
        score: Reg<'k, f32>,
        grads: &[TableArgs<'k>],
    ) -> GradientsAt<'k> {
        let own = self.values(element, Some(score));
        let (first, tables) = (self.program.roots(), table_roots(self.program));
        let tables = tables.iter().zip(grads).map(|(&[a, b, c, d, derivative], grad)| {
            let at = self.table_offset(grad, [a, b, c, d].map(|i| own[&i]));
            (at, self.to_float(own[&derivative]))
        });
        let tables = tables.collect();
        GradientsAt { value: self.to_float(own[&first[0]]), d_score: self.to_float(own[&first[1]]), tables }
    }

    fn root(&mut self, element: &Element<'k>, score: Option<Reg<'k, f32>>) -> Val<'k> {
        self.values(element, score)[&self.program.roots()[0]]
    }

    /// Every node's value.
    fn values(&mut self, element: &Element<'k>, score: Option<Reg<'k, f32>>) -> HashMap<NodeId, Val<'k>> {
        // Nodes are in topological order, so one pass suffices; those that depend on the score are kept for this element.
        let program = self.program;
        let mut own: HashMap<NodeId, Val<'k>> = HashMap::new();
        for (i, deps) in program.deps().iter().enumerate() {
            let id = NodeId(i as u16);
            if !self.needed[i] {
                continue;
            }
            if let Node::Unary(UnOp::ToFloat, a) = program.nodes()[i]
                && self.linear(a)
            {
                let value = self.index_float(a, element, &own);
                own.insert(id, Val::Float(value));
                continue;
            }
            let row = deps.contains(Var::Q).then_some(element.row);
            let column = deps.contains(Var::Kv).then_some(element.column);
            if deps.contains_score() {
                let value = self.node(id, element, score, &own);
                own.insert(id, value);
            } else if let Some(&value) = self.values.get(&(id, row, column)) {
                own.insert(id, value);
            } else {
                let value = self.node(id, element, score, &own);
                self.values.insert((id, row, column), value);
                own.insert(id, value);
            }
        }
        own
    }

    fn node(
        &self,
        id: NodeId,
        element: &Element<'k>,
        score: Option<Reg<'k, f32>>,
        own: &HashMap<NodeId, Val<'k>>,
    ) -> Val<'k> {
        let k = self.k;
        match self.program.nodes()[id.index()] {
            // A mask has no score: the spec lets none be traced.
            Node::Score => Val::Float(score.unwrap_or_else(|| k.var(0.0))),
            Node::Var(var) => Val::Int(match var {
                Var::Batch => self.place.batch,
                Var::Head => self.place.head,
                Var::Q => element.q,
                Var::Kv => element.kv,
                Var::SeqlenQ => self.place.seqlen_q,
                Var::SeqlenK => self.place.seqlen_k,
                Var::QStart => self.place.q_start,
                Var::KvStart => self.place.kv_start,
            }),
            Node::Float(bits) => Val::Float(k.var(f32::from_bits(bits))),
            Node::Int(x) => Val::Int(k.var(x)),
            Node::Bool(x) => Val::Bool(k.var(x)),
            Node::Load { table, index } => {
                let at = self.table_offset(&self.tables[table.index()], index.map(|i| own[&i]));
                match self.program.table_slots()[table.index()] {
                    Type::Float => Val::Float(load(at)),
                    _ => Val::Int(load(at)),
                }
            }
            Node::Unary(op, a) => self.unary(op, own[&a]),
            Node::Binary(op, a, b) => self.binary(op, own[&a], own[&b]),
            Node::Select(c, a, b) => {
                let c = self.to_bool(own[&c]);
                match (own[&a], own[&b]) {
                    (Val::Int(a), Val::Int(b)) => Val::Int(c.select(a, b)),
                    (Val::Bool(a), Val::Bool(b)) => Val::Bool((c & a) | (!c & b)),
                    (a, b) => Val::Float(c.select(self.to_float(a), self.to_float(b))),
                }
            }
        }
    }

    /// Address of a table's element; indices are clamped to the edge.
    fn table_offset(&self, table: &TableArgs<'k>, index: [Val<'k>; 4]) -> Reg<'k, u64> {
        let mut offset: Option<Reg<'k, u32>> = None;
        for (dim, index) in table.dims.iter().zip(index) {
            let Some(dim) = dim else { continue };
            let index = self.to_int(index).max(0).bits::<u32>().min(*dim - 1);
            offset = Some(match offset {
                None => index,
                Some(offset) => offset * *dim + index,
            });
        }
        match offset {
            None => table.data,
            Some(offset) => offset.mad_wide(table.bytes, table.data),
        }
    }

    fn to_float(&self, value: Val<'k>) -> Reg<'k, f32> {
        match value {
            Val::Float(x) => x,
            Val::Int(x) => x.to_f32(),
            Val::Bool(x) => x.select(1.0, 0.0),
        }
    }

    fn to_int(&self, value: Val<'k>) -> Reg<'k, i32> {
        match value {
            Val::Float(x) => self.k.result(instr::S32_F32_FLOOR, &[x.operand()]),
            Val::Int(x) => x,
            Val::Bool(x) => x.select(1, 0),
        }
    }

    fn to_bool(&self, value: Val<'k>) -> Reg<'k, bool> {
        match value {
            Val::Float(x) => x.ne(0.0),
            Val::Int(x) => x.ne(0),
            Val::Bool(x) => x,
        }
    }

    fn unary(&self, op: UnOp, a: Val<'k>) -> Val<'k> {
        match (op, a) {
            (UnOp::Neg, Val::Int(x)) => Val::Int(-x),
            (UnOp::Neg, x) => Val::Float(-self.to_float(x)),
            (UnOp::Abs, Val::Int(x)) => Val::Int(x.abs()),
            (UnOp::Abs, x) => Val::Float(self.to_float(x).abs()),
            (UnOp::Not, x) => Val::Bool(!self.to_bool(x)),
            (UnOp::Exp2, x) => Val::Float(self.to_float(x).exp2()),
            (UnOp::Log2, x) => Val::Float(self.to_float(x).log2()),
            (UnOp::Tanh, x) => Val::Float(tanh(self.to_float(x))),
            (UnOp::ToFloat, x) => Val::Float(self.to_float(x)),
            (UnOp::Floor, x) => Val::Int(self.to_int(x)),
        }
    }

    fn binary(&self, op: BinOp, a: Val<'k>, b: Val<'k>) -> Val<'k> {
        match (a, b) {
            (Val::Int(a), Val::Int(b)) => self.ints(op, a, b),
            (Val::Bool(a), Val::Bool(b)) => Val::Bool(match op {
                BinOp::And => a & b,
                BinOp::Or => a | b,
                BinOp::Eq => !(a ^ b),
                _ => a ^ b,
            }),
            (a, b) => self.floats(op, self.to_float(a), self.to_float(b)),
        }
    }

    fn floats(&self, op: BinOp, a: Reg<'k, f32>, b: Reg<'k, f32>) -> Val<'k> {
        let two = |row| self.k.result(row, &[a.operand(), b.operand()]);
        Val::Float(match op {
            BinOp::Add => a + b,
            BinOp::Sub => a - b,
            BinOp::Mul => a * b,
            BinOp::Div => two(instr::DIV_FULL_F32),
            BinOp::Min => two(instr::MIN_NAN_F32),
            BinOp::Max => two(instr::MAX_NAN_F32),
            _ => return Val::Bool(comparison(op, a, b)),
        })
    }

    fn ints(&self, op: BinOp, a: Reg<'k, i32>, b: Reg<'k, i32>) -> Val<'k> {
        let bitwise = |row| self.k.result::<i32>(row, &[a.operand(), b.operand()]);
        let amount = || b.bits::<u32>() & 31;
        Val::Int(match op {
            BinOp::Add => a + b,
            BinOp::Sub => a - b,
            BinOp::Mul => a * b,
            BinOp::Div => floor_div(a, b),
            BinOp::Rem => b.eq(0).select(0, a - b * floor_div(a, b)),
            BinOp::Min => a.min(b),
            BinOp::Max => a.max(b),
            BinOp::BitAnd => bitwise(instr::AND_B32),
            BinOp::BitOr => bitwise(instr::OR_B32),
            BinOp::BitXor => bitwise(instr::XOR_B32),
            BinOp::Shl => (a.bits::<u32>() << amount()).bits(),
            BinOp::Shr => a >> amount(),
            _ => return Val::Bool(comparison(op, a, b)),
        })
    }
}

fn load<'k, T: ptx::types::Scalar>(at: Reg<'k, u64>) -> Reg<'k, T> {
    let [value] = at.address().load_as(Order::Weak, Cache::ReadOnly);
    value
}

fn comparison<'k, T: Compare>(op: BinOp, a: Reg<'k, T>, b: Reg<'k, T>) -> Reg<'k, bool>
where
    Reg<'k, T>: Value<'k, T>,
{
    match op {
        BinOp::Lt => a.lt(b),
        BinOp::Le => a.le(b),
        BinOp::Eq => a.eq(b),
        _ => a.ne(b),
    }
}

/// Quotient rounded towards minus infinity; 0 for a zero divisor.
fn floor_div<'k>(a: Reg<'k, i32>, b: Reg<'k, i32>) -> Reg<'k, i32> {
    // PTX's own quotient of i32::MIN and −1 is unspecified; −a wraps as the spec wants.
    let minus = b.eq(-1);
    let safe = (minus.select(1, b).eq(0)).select(1, minus.select(1, b));
    let dividend = minus.select(-a, a);
    let quotient = dividend / safe;
    let remainder = dividend - quotient * safe;
    let low = remainder.ne(0) & (remainder.lt(0) ^ safe.lt(0));
    b.eq(0).select(0, low.select(quotient - 1, quotient))
}

/// tanh to about 1e-7 absolute, of one exponential and one reciprocal: the hardware's own is good to 2⁻¹¹ only, which a
/// soft cap of 30 would turn into 0.015 of a score.
fn tanh(x: Reg<'_, f32>) -> Reg<'_, f32> {
    let e = (x * (2.0 * LOG2_E)).exp2();
    ((e + 1.0).rcp()).fma(-2.0, 1.0)
}
