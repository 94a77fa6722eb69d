//! Random expressions: bounds hold every value, derivatives agree with finite differences, and rebuilding or
//! simplifying changes nothing.

use super::*;
use crate::expr::eval;
use rand::rngs::SmallRng as Rng;
use rand::{Rng as _, SeedableRng};

const CASES: u64 = 3000;

struct Random {
    rng: Rng,
    builder: Builder,
    tables: Vec<Table>,
    /// What there is to choose operands from.
    pool: [Vec<NodeId>; 3],
}

impl Random {
    fn new(seed: u64) -> Self {
        Self::with(seed, float)
    }

    fn with(seed: u64, float: fn(&mut Rng) -> f32) -> Self {
        let mut rng = Rng::seed_from_u64(seed);
        let (mut builder, mut tables) = (Builder::new(), Vec::new());
        for _ in 0..4 {
            let dims: Vec<usize> = (0..rng.random_range(1..=4)).map(|_| rng.random_range(1..4)).collect();
            let n = dims.iter().product();
            let table = if rng.random::<bool>() {
                Table::f32(&dims, (0..n).map(|_| float(&mut rng)).collect())
            } else {
                Table::i32(&dims, (0..n).map(|_| int(&mut rng)).collect())
            };
            tables.push(table.unwrap());
            builder.slot(tables[tables.len() - 1].ty()).unwrap();
        }
        let mut random = Self { rng, builder, tables, pool: Default::default() };
        random.keep(Node::Score);
        Var::ALL.into_iter().for_each(|v| random.keep(Node::Var(v)));
        random.keep(Node::Bool(true));
        for _ in 0..3 {
            let (x, i) = (float(&mut random.rng), int(&mut random.rng));
            random.keep(Node::Float(x.to_bits()));
            random.keep(Node::Int(i));
        }
        random
    }

    fn keep(&mut self, node: Node) {
        let id = self.builder.push(node).unwrap();
        self.pool[self.builder.ty(id).unwrap() as usize].push(id);
    }

    fn pick(&mut self, ty: Type) -> NodeId {
        let pool = &self.pool[ty as usize];
        // Later ones more often, so that expressions grow deep.
        let i = self.rng.random_range(0..pool.len()).max(self.rng.random_range(0..pool.len()));
        pool[i]
    }

    fn grow(&mut self, smooth: bool) {
        use {BinOp::*, Type::*, UnOp::*};
        let choose = |rng: &mut Rng, ops: &[BinOp]| ops[rng.random_range(0..ops.len())];
        let node = match self.rng.random_range(0..if smooth { 5 } else { 9 }) {
            0 => {
                let op = [Neg, Abs, Exp2, Log2, Tanh][self.rng.random_range(0..5)];
                Node::Unary(op, self.pick(Float))
            }
            1 | 2 => {
                let op = choose(&mut self.rng, &[Add, Sub, Mul, Div, Min, Max]);
                Node::Binary(op, self.pick(Float), self.pick(Float))
            }
            3 => Node::Select(self.pick(Bool), self.pick(Float), self.pick(Float)),
            4 => {
                let op = choose(&mut self.rng, &[Lt, Le, Eq, Ne]);
                let ty = if self.rng.random::<bool>() { Float } else { Int };
                Node::Binary(op, self.pick(ty), self.pick(ty))
            }
            5 => {
                let all = [Add, Sub, Mul, Div, Rem, Min, Max, BitAnd, BitOr, BitXor, Shl, Shr];
                let op = choose(&mut self.rng, &all);
                Node::Binary(op, self.pick(Int), self.pick(Int))
            }
            6 => match self.rng.random_range(0..4) {
                0 => Node::Unary(Floor, self.pick(Float)),
                1 => Node::Unary(ToFloat, self.pick(Int)),
                2 => Node::Unary([Neg, Abs][self.rng.random_range(0..2)], self.pick(Int)),
                _ => Node::Select(self.pick(Bool), self.pick(Int), self.pick(Int)),
            },
            7 => match self.rng.random_range(0..3) {
                0 => Node::Unary(Not, self.pick(Bool)),
                1 => Node::Unary(ToFloat, self.pick(Bool)),
                _ => {
                    let op = choose(&mut self.rng, &[And, Or, Eq, Ne]);
                    Node::Binary(op, self.pick(Bool), self.pick(Bool))
                }
            },
            _ => {
                let table = Slot(self.rng.random_range(0..4));
                Node::Load { table, index: std::array::from_fn(|_| self.pick(Int)) }
            }
        };
        self.keep(node);
    }

    fn expr(&mut self, ty: Type) -> Expr {
        let root = self.pick(ty);
        self.builder.finish(root).unwrap()
    }

    fn env(&mut self, block: &Block) -> Env {
        let mut get = |v| {
            let (lo, hi) = block.get(v);
            self.rng.random_range(lo..=hi)
        };
        Env {
            batch: get(Var::Batch),
            head: get(Var::Head),
            q: get(Var::Q),
            kv: get(Var::Kv),
            seqlen_q: get(Var::SeqlenQ),
            seqlen_k: get(Var::SeqlenK),
            q_start: get(Var::QStart),
            kv_start: get(Var::KvStart),
        }
    }

    fn block(&mut self) -> Block {
        let mut range = || {
            let lo = int(&mut self.rng);
            let size = [0, 1, 3, 20][self.rng.random_range(0..4)];
            (lo, lo.saturating_add(size))
        };
        Block {
            batch: range(),
            head: range(),
            q: range(),
            kv: range(),
            seqlen_q: range(),
            seqlen_k: range(),
            q_start: range(),
            kv_start: range(),
        }
    }
}

fn float(rng: &mut Rng) -> f32 {
    match rng.random_range(0..12) {
        0 => f32::NAN,
        1 => f32::INFINITY,
        2 => f32::NEG_INFINITY,
        3 => [1e30, -1e30, 1e-30, f32::MAX, f32::MIN_POSITIVE][rng.random_range(0..5)],
        4..7 => rng.random_range(-3..4) as f32,
        _ => (rng.random::<f32>() - 0.5) * 8.0,
    }
}

fn int(rng: &mut Rng) -> i32 {
    match rng.random_range(0..16) {
        0 => [i32::MIN, i32::MAX, 1 << 24, (1 << 24) + 1, -(1 << 30)][rng.random_range(0..5)],
        1..8 => rng.random_range(-4..5),
        _ => rng.random_range(0..100),
    }
}

#[test]
fn bounds_hold_every_value() {
    let (mut decided, mut seen) = (0, 0);
    for seed in 0..CASES {
        let mut random = Random::new(seed);
        (0..random.rng.random_range(5..60)).for_each(|_| random.grow(false));
        for ty in [Type::Float, Type::Int, Type::Bool, Type::Bool] {
            let expr = random.expr(ty);
            let tables = random.tables.clone();
            let mut bounder = Bounder::new(&expr, &tables);
            let mut exact = Evaluator::<f64>::new(&expr, &tables).unwrap();
            let mut single = Evaluator::<f32>::new(&expr, &tables).unwrap();
            for _ in 0..3 {
                let block = random.block();
                let bounds = bounder.bounds(&block);
                assert_eq!(bounds, expr.bounds(&block, &tables), "what is kept from the last block is stale");
                seen += 1;
                decided += u32::from(bounds != Bounds::any(ty));
                for _ in 0..12 {
                    let (env, score) = (random.env(&block), float(&mut random.rng));
                    let value = exact.eval(&env, score.into());
                    let context = || format!("seed {seed}: {expr}\n{block:?}\n{env:?} score {score}");
                    assert!(bounds.contains(value), "{value:?} outside {bounds:?}\n{}", context());
                    let value = match single.eval(&env, score) {
                        Value::Float(x) => Value::Float(x.into()),
                        Value::Int(x) => Value::Int(x),
                        Value::Bool(x) => Value::Bool(x),
                    };
                    assert!(bounds.contains(value), "f32: {value:?} outside {bounds:?}\n{}", context());
                }
            }
        }
    }
    // Bounds that always say "anything" would pass the above.
    assert!(decided * 2 > seen, "{decided} of {seen}");
}

#[test]
fn what_an_evaluator_keeps_is_never_stale() {
    for seed in 0..CASES {
        let mut random = Random::new(seed);
        (0..random.rng.random_range(5..40)).for_each(|_| random.grow(false));
        let expr = random.expr(Type::Float);
        let tables = random.tables.clone();
        let mut evaluator = Evaluator::<f64>::new(&expr, &tables).unwrap();
        let (mut env, mut score) = (here(2, 3), 0.5);
        for _ in 0..20 {
            match random.rng.random_range(0..6) {
                0 => env.batch ^= 1,
                1 => env.q += 1,
                2 => env.kv_start -= 1,
                3 => score += 0.25,
                4 => {}
                _ => env.kv += 1,
            }
            let (got, want) = (evaluator.eval(&env, score), expr.eval(&env, &tables, score).unwrap());
            assert_eq!(
                got.as_f64().to_bits(),
                want.as_f64().to_bits(),
                "seed {seed}: {expr}\n{env:?} {score}"
            );
        }
    }
}

#[test]
fn int_bounds_hold_every_value_of_small_ranges() {
    use BinOp::*;
    let ops = [Add, Sub, Mul, Div, Rem, Min, Max, Lt, Le, Eq, Ne, BitAnd, BitOr, BitXor, Shl, Shr];
    let spans: Vec<(i32, i32)> = (-5..6).flat_map(|lo| [0, 1, 2, 6].map(|n| (lo, lo + n))).collect();
    for op in ops {
        let mut b = Builder::new();
        let (q, kv) = (b.push(Node::Var(Var::Q)).unwrap(), b.push(Node::Var(Var::Kv)).unwrap());
        let root = b.push(Node::Binary(op, q, kv)).unwrap();
        let expr = b.finish(root).unwrap();
        let mut bounder = Bounder::new(&expr, &[]);
        let mut evaluator = Evaluator::<f64>::new(&expr, &[]).unwrap();
        for &q in &spans {
            for &kv in &spans {
                let bounds = bounder.bounds(&Block { q, kv, ..Block::at(&Env::default()) });
                let (mut lo, mut hi) = (f64::INFINITY, f64::NEG_INFINITY);
                for x in q.0..=q.1 {
                    for y in kv.0..=kv.1 {
                        let value = evaluator.eval(&Env { q: x, kv: y, ..Env::default() }, 0.0);
                        assert!(bounds.contains(value), "{op:?} {x} {y}: {value:?} outside {bounds:?}");
                        (lo, hi) = (lo.min(value.as_f64()), hi.max(value.as_f64()));
                    }
                }
                // These are not only safe but exact.
                match bounds {
                    Bounds::Int { lo: a, hi: b } if matches!(op, Add | Sub | Mul | Min | Max) => {
                        assert_eq!((a.into(), b.into()), (lo, hi), "{op:?} {q:?} {kv:?}");
                    }
                    Bounds::Int { lo: a, hi: b } if op == Div && kv.0 * kv.1 > 0 => {
                        assert_eq!((a.into(), b.into()), (lo, hi), "{op:?} {q:?} {kv:?}");
                    }
                    Bounds::Bool { can_be_false, can_be_true } => {
                        assert_eq!(
                            (can_be_false, can_be_true),
                            (lo == 0.0, hi == 1.0),
                            "{op:?} {q:?} {kv:?}"
                        );
                    }
                    _ => {}
                }
            }
        }
    }
}

/// A copy of the table with one element moved by `step`.
fn nudge(table: &Table, offset: usize, step: f32) -> Table {
    let TableData::F32(mut data) = table.data().clone() else { panic!("a table of floats") };
    data[offset] += step;
    Table::f32(table.shape(), data).unwrap()
}

/// Whether the slopes to the left and the right agree (no kink, no pole) and are moderate; then their mean.
fn slope(left: f64, middle: f64, right: f64, h: f64) -> Option<f64> {
    let (a, b) = ((middle - left) / h, (right - middle) / h);
    let mean = (a + b) / 2.0;
    (mean.is_finite() && mean.abs() < 1e4 && (a - b).abs() <= 1e-3 * (1.0 + mean.abs())).then_some(mean)
}

#[test]
fn derivatives_agree_with_finite_differences() {
    let (mut scores, mut loads) = (0, 0);
    for seed in 0..CASES {
        let mut random = Random::with(seed, |rng| rng.random_range(-16..17) as f32 / 4.0);
        (0..6).for_each(|_| random.grow(false));
        (0..random.rng.random_range(3..20)).for_each(|_| random.grow(true));
        // Twice, so that the score gets into most of them.
        for _ in 0..2 {
            let (score, other) = (random.builder.push(Node::Score).unwrap(), random.pick(Type::Float));
            random.keep(Node::Binary(BinOp::Mul, score, other));
            random.grow(true);
        }
        let expr = random.expr(Type::Float);
        let tables = random.tables.clone();
        let gradients = expr.gradients(|_| true).unwrap();
        let d_score = expr.d_score().unwrap();
        let env = random.env(&Block::at(&here(2, 3)));
        let score = f64::from(random.rng.random::<f32>() * 4.0 - 2.0);
        let at = |tables: &[Table], s| expr.eval(&env, tables, s).unwrap().as_f64();
        let mut evaluator = Evaluator::<f64>::new(&gradients.program, &tables).unwrap();
        let values = evaluator.run(&env, score);
        let value = |id: NodeId| values[id.index()].as_f64();
        let same = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan());
        assert!(same(value(gradients.value), at(&tables, score)), "seed {seed}: {expr}");
        let alone = d_score.eval(&env, &tables, score).unwrap().as_f64();
        assert!(same(value(gradients.d_score), alone), "seed {seed}: {expr}\n{d_score}");

        let close = |got: f64, want: f64| (got - want).abs() <= 4e-3 * (1.0 + want.abs());
        let h = 1e-5;
        let (left, right) = (at(&tables, score - h), at(&tables, score + h));
        if expr.uses_score()
            && let Some(want) = slope(left, at(&tables, score), right, h)
        {
            scores += 1;
            assert!(close(alone, want), "seed {seed}: {expr}\n{d_score}\ngot {alone}, expected {want}");
        }
        // Several loads may read one element: the table's gradient is the sum.
        let mut sums = std::collections::HashMap::new();
        for grad in &gradients.tables {
            let offset = tables[grad.slot.index()].offset(grad.index.map(|i| values[i.index()].as_int()));
            *sums.entry((grad.slot, offset)).or_insert(0.0) += value(grad.derivative);
        }
        for (&(slot, offset), &got) in &sums {
            let h = 1.0 / 1024.0;
            let moved = |step| {
                let mut tables = tables.clone();
                tables[slot.index()] = nudge(&tables[slot.index()], offset, step);
                at(&tables, score)
            };
            if let Some(want) = slope(moved(-h), at(&tables, score), moved(h), h.into()) {
                loads += 1;
                assert!(close(got, want), "seed {seed}: {expr}\nslot {slot:?}: got {got}, expected {want}");
            }
        }
    }
    assert!(scores > 500 && loads > 100, "{scores} {loads}");
}

#[test]
fn simplification_changes_no_value() {
    // The same nodes evaluated one by one, without any builder.
    for seed in 0..CASES {
        let mut random = Random::new(seed);
        let mut rng = Rng::seed_from_u64(seed ^ 0xabcd);
        // A tree with many constants, so that identities apply, as (expression, value in f64) pairs.
        let (q, kv) = (rng.random_range(-5..6), rng.random_range(-5..6));
        let (score, env) = (f64::from(rng.random_range(-3..4)), here(q, kv));
        let mut pool: Vec<(NodeId, Value)> = Vec::new();
        let leaf = |b: &mut Builder, node, value| (b.push(node).unwrap(), value);
        pool.push(leaf(&mut random.builder, Node::Score, Value::Float(score)));
        pool.push(leaf(&mut random.builder, Node::Var(Var::Q), Value::Int(q)));
        pool.push(leaf(&mut random.builder, Node::Var(Var::Kv), Value::Int(kv)));
        for i in [-1, 0, 1, 2] {
            pool.push(leaf(&mut random.builder, Node::Int(i), Value::Int(i)));
            let float = Node::Float((i as f32).to_bits());
            pool.push(leaf(&mut random.builder, float, Value::Float(i.into())));
        }
        for x in [false, true] {
            pool.push(leaf(&mut random.builder, Node::Bool(x), Value::Bool(x)));
        }
        use {BinOp::*, UnOp::*};
        let unary = [Neg, Abs, Not, ToFloat, Floor];
        let binary =
            [Add, Sub, Mul, Div, Rem, Min, Max, Lt, Le, Eq, Ne, And, Or, BitAnd, BitOr, BitXor, Shl, Shr];
        for _ in 0..60 {
            let mut pick = || pool[rng.random_range(0..pool.len())];
            let ((a, x), (b, y), (c, z)) = (pick(), pick(), pick());
            let (node, value) = match rng.random_range(0..5) {
                0 => {
                    let op = unary[rng.random_range(0..unary.len())];
                    (Node::Unary(op, a), eval::unary(op, x))
                }
                1 => (Node::Select(c, a, b), if z.as_bool() { x } else { y }),
                _ => {
                    let op = binary[rng.random_range(0..binary.len())];
                    // Only operands of one type, so that the plain value needs no promotion.
                    if std::mem::discriminant(&x) != std::mem::discriminant(&y) {
                        continue;
                    }
                    (Node::Binary(op, a, b), eval::binary(op, x, y))
                }
            };
            if matches!(node, Node::Select(..)) && std::mem::discriminant(&x) != std::mem::discriminant(&y) {
                continue;
            }
            if matches!((node, x), (Node::Unary(Not, _), Value::Int(_))) {
                continue;
            }
            let bitwise = matches!(node, Node::Binary(BitAnd | BitOr | BitXor, ..));
            if bitwise && matches!(x, Value::Bool(_)) {
                continue;
            }
            let Ok(id) = random.builder.push(node) else {
                continue;
            };
            pool.push((id, value));
        }
        for &(id, want) in &pool {
            let expr = random.builder.finish(id).unwrap();
            let got = expr.eval(&env, &random.tables, score).unwrap();
            let (a, b) = (got.as_f64(), want.as_f64());
            let same = (a.is_nan() && b.is_nan()) || (a - b).abs() <= 1e-5 * b.abs() || a == b;
            let typed = std::mem::discriminant(&got) == std::mem::discriminant(&want);
            assert!(same && typed, "seed {seed}: {expr} is {got:?}, not {want:?}, at {env:?}, score {score}");
        }
    }
}

#[test]
fn rebuilding_changes_nothing() {
    for seed in 0..CASES {
        let mut random = Random::new(seed);
        (0..random.rng.random_range(5..60)).for_each(|_| random.grow(false));
        let expr = random.expr(Type::Float);
        let identity = Expr::trace(|s, _| s).unwrap();
        let traced = Traced { expr, tables: random.tables.clone() };
        let (first, second) = (traced.compose(&identity).unwrap(), identity.compose(&traced).unwrap());
        assert_eq!(first.expr, second.expr);
        assert_eq!(first.expr, first.compose(&identity).unwrap().expr);
        assert_eq!(first.to_string(), second.to_string());
        // Topological, no duplicates, root last.
        let nodes = first.expr.nodes();
        for (i, node) in nodes.iter().enumerate() {
            assert!(node.operands().all(|o| o.index() < i) && !nodes[..i].contains(node));
        }
        assert_eq!(first.expr.root().index(), nodes.len() - 1);
    }
}
