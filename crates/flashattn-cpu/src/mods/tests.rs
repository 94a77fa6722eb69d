//! Every task on strips of every width and ragged heights, against the scalar evaluator.

use super::*;
use flashattn_spec::expr::{BinOp, Builder, Expr, Node, NodeId, Slot, Table, Type, UnOp, Value, Var};
use flashattn_spec::mask::{BlockMask, Mask};
use flashattn_spec::score_mod::ScoreMod;
use flashattn_spec::{AttentionProblem, DType, Dropout, philox};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// Strips of a problem with 3 sequences of `SEQLEN_Q` × `SEQLEN_K` and 2 heads: ragged, off any multiple of four,
/// with and without padding lanes, shorter and longer than a block.
fn strips() -> Vec<Strip> {
    let strip = |batch: i32, q0, kv0, rows| Strip {
        batch,
        head: batch % 2,
        q0,
        kv0,
        seqlen_q: SEQLEN_Q,
        seqlen_k: SEQLEN_K,
        q_start: batch * SEQLEN_Q,
        kv_start: batch * SEQLEN_K,
        rows,
    };
    vec![
        strip(0, 0, 0, 1),
        strip(1, 16, 3, 5),
        strip(2, 32, 64, 16),
        strip(0, 48, 7, 37),
        strip(1, 30, 1, 130),
        strip(2, 48, 90, 60),
        strip(0, 0, 5, 0),
    ]
}

const SEQLEN_Q: i32 = 53;
const SEQLEN_K: i32 = 151;

fn problem() -> AttentionProblem {
    let mut p = AttentionProblem::new(3, SEQLEN_Q as usize, 2, 8, DType::F32);
    p.seqlen_k = SEQLEN_K as usize;
    p
}

/// The f64 evaluation of every output at one element: visible, value, derivative, and the largest intermediate,
/// to which errors are relative.
struct Reference<'a> {
    gradients: Option<(flashattn_spec::expr::Gradients, &'a [Table])>,
    mask: Option<&'a Traced>,
}

struct Element {
    visible: bool,
    value: f64,
    derivative: f64,
    /// (slot, offset, derivative) of each load with gradient.
    tables: Vec<(usize, usize, f64)>,
    scale: f64,
}

impl<'a> Reference<'a> {
    fn new(score_mod: Option<&'a Traced>, mask: Option<&'a Traced>) -> Self {
        let gradients = score_mod.map(|t| {
            let wanted = |slot: Slot| t.tables[slot.index()].wants_grad();
            (t.expr.gradients(wanted).unwrap(), t.tables.as_slice())
        });
        Reference { gradients, mask }
    }

    fn at(&self, env: &Env, score: f64) -> Element {
        let visible =
            self.mask.is_none_or(|m| m.expr.eval(env, &m.tables, 0.0).unwrap() == Value::Bool(true));
        let mut e = Element { visible, value: score, derivative: 1.0, tables: Vec::new(), scale: 1.0 };
        if let Some((g, tables)) = &self.gradients {
            let mut evaluator = Evaluator::<f64>::new(&g.program, tables).unwrap();
            let values = evaluator.run(env, score);
            e.value = values[g.value.index()].as_f64();
            e.derivative = values[g.d_score.index()].as_f64();
            for t in &g.tables {
                let offset = tables[t.slot.index()].offset(t.index.map(|i| values[i.index()].as_int()));
                e.tables.push((t.slot.index(), offset, values[t.derivative.index()].as_f64()));
            }
            let sizes = values.iter().map(|v| v.as_f64().abs()).filter(|x| x.is_finite());
            e.scale = sizes.fold(1.0, f64::max);
        }
        e
    }
}

fn close(got: f32, expected: f64, tolerance: f64) -> bool {
    f64::from(got) == expected
        || got.is_nan() && expected.is_nan()
        || (f64::from(got) - expected).abs() <= tolerance
}

struct Plain<const L: usize>;

impl<const L: usize> Transpose for Plain<L> {
    fn transpose(from: &[u32], stride: usize, to: &mut [u32], to_stride: usize) {
        for (r, c) in (0..L * L).map(|i| (i / L, i % L)) {
            to[c * to_stride + r] = from[r * stride + c];
        }
    }
}

/// The one copy of the interpreter for each width, as for a CPU without vectors.
#[inline(never)]
fn plain<const L: usize>(program: &ScoreProgram, at: &Strip, task: Task<'_, '_>, scratch: &mut Scratch) {
    program.perform_lanes::<L, Plain<L>>(at, task, scratch);
}

type Perform = fn(&ScoreProgram, &Strip, Task<'_, '_>, &mut Scratch);

/// As a kernel does it.
#[cfg(target_arch = "x86_64")]
fn avx512() -> Option<Perform> {
    use crate::arch::avx512::Avx512;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn vectors(program: &ScoreProgram, at: &Strip, task: Task<'_, '_>, scratch: &mut Scratch) {
        // SAFETY: who calls this function has made sure of its features.
        unsafe { program.perform::<Avx512>(at, task, scratch) }
    }
    let has = [
        is_x86_feature_detected!("avx512f"),
        is_x86_feature_detected!("avx512bw"),
        is_x86_feature_detected!("avx512dq"),
        is_x86_feature_detected!("avx512vl"),
        is_x86_feature_detected!("fma"),
    ];
    // SAFETY: the CPU has what `vectors` was compiled for.
    has.iter().all(|&x| x).then_some(|p, at, task, scratch| unsafe { vectors(p, at, task, scratch) })
}

#[cfg(not(target_arch = "x86_64"))]
fn avx512() -> Option<Perform> {
    None
}

/// Runs every task on every strip and compares.
fn check<const L: usize>(
    perform: Perform,
    score_mod: Option<&Traced>,
    mask: Option<&Traced>,
    rng: &mut SmallRng,
) {
    let scale = *[1.0f32, 0.73].choose(rng).unwrap();
    let program = ScoreProgram::new(score_mod, mask, scale).unwrap();
    let factor = if score_mod.is_some() { scale } else { 1.0 };
    let reference = Reference::new(score_mod, mask);
    let mut scratch = Scratch::default();
    let name = format!(
        "{} | {}",
        score_mod.map_or("-".into(), |m| m.to_string()),
        mask.map_or("-".into(), |m| m.to_string())
    );
    for at in strips() {
        let n = at.rows * L;
        let raw = (0..n).map(|_| rng.random_range(-3.0f32..3.0)).collect::<Vec<_>>();
        let d_out = (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect::<Vec<_>>();
        let (mut forward, mut unmasked, mut both) = (raw.clone(), raw.clone(), raw.clone());
        let (mut derivative, mut kept) = (vec![f32::NAN; n], raw.clone());
        perform(&program, &at, Task::Apply { scores: &mut forward, masked: true }, &mut scratch);
        perform(&program, &at, Task::Apply { scores: &mut unmasked, masked: false }, &mut scratch);
        let task = Task::ApplyWithDerivative { scores: &mut both, derivative: &mut derivative, masked: true };
        perform(&program, &at, task, &mut scratch);
        perform(&program, &at, Task::ZeroMasked { values: &mut kept }, &mut scratch);

        let tables = score_mod.map_or(&[][..], |m| &m.tables);
        let wanted = tables.iter().filter(|t| t.wants_grad()).collect::<Vec<_>>();
        let mut expected_grads = wanted.iter().map(|t| vec![0.0f64; t.data().len()]).collect::<Vec<_>>();
        let mut grad_scale = 1.0f64;
        let mut d_scores = d_out.clone();
        for r in 0..at.rows {
            for l in 0..L {
                let (i, q) = (r * L + l, at.q0 + l as i32);
                if q >= at.seqlen_q {
                    d_scores[i] = f32::NAN;
                    continue;
                }
                let place = Strip { q0: q, kv0: at.kv0 + r as i32, ..at };
                let e = reference.at(&place.env(), f64::from(raw[i]) * f64::from(factor));
                let tolerance = 2e-5 * e.scale;
                let what = || format!("{name}: {at:?} row {r} lane {l} score {}", raw[i]);
                assert_eq!(program.visible(&place), e.visible, "{}", what());
                let scalar = program.modified(&place, raw[i]);
                assert!(close(scalar.0, e.value, tolerance) && close(scalar.1, e.derivative, tolerance));
                assert!(close(unmasked[i], e.value, tolerance), "{}: {} {}", what(), unmasked[i], e.value);
                if e.visible {
                    assert!(close(forward[i], e.value, tolerance), "{}: {}", what(), forward[i]);
                    assert!(close(both[i], e.value, tolerance), "{}: {}", what(), both[i]);
                    let d = derivative[i];
                    assert!(close(d, e.derivative, tolerance), "{}: {d} {}", what(), e.derivative);
                    assert_eq!(kept[i], raw[i], "{}", what());
                } else {
                    let hidden = [forward[i], both[i], derivative[i], kept[i]];
                    assert_eq!(hidden, [f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0, 0.0], "{}", what());
                    d_scores[i] = 0.0;
                }
                for (slot, offset, d) in e.tables {
                    let table = tables[..slot].iter().filter(|t| t.wants_grad()).count();
                    expected_grads[table][offset] += f64::from(d_scores[i]) * d;
                    grad_scale = grad_scale.max(e.scale);
                }
            }
        }
        let mut grads = wanted.iter().map(|t| vec![0.0f32; t.data().len()]).collect::<Vec<_>>();
        let mut slices = grads.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>();
        let task = Task::TableGrads { scores: &raw, d_scores: &d_scores, grads: &mut slices };
        perform(&program, &at, task, &mut scratch);
        for (got, expected) in grads.iter().flatten().zip(expected_grads.iter().flatten()) {
            let tolerance = 1e-5 * grad_scale * (n as f64).max(1.0).sqrt();
            assert!(close(*got, *expected, tolerance), "{name}: {at:?}: {got} {expected}");
        }
    }
}

fn check_all(score_mod: Option<&Traced>, mask: Option<&Traced>, rng: &mut SmallRng) {
    check::<4>(plain::<4>, score_mod, mask, rng);
    check::<8>(plain::<8>, score_mod, mask, rng);
    check::<16>(plain::<16>, score_mod, mask, rng);
    if let Some(perform) = avx512() {
        check::<16>(perform, score_mod, mask, rng);
    }
}

fn floats(dims: &[usize], rng: &mut SmallRng) -> Table {
    let n = dims.iter().product();
    Table::f32(dims, (0..n).map(|_| rng.random_range(-2.0..2.0)).collect()).unwrap()
}

fn ints(dims: &[usize], below: i32, rng: &mut SmallRng) -> Table {
    let n = dims.iter().product();
    Table::i32(dims, (0..n).map(|_| rng.random_range(-2..below)).collect()).unwrap()
}

#[test]
fn named_masks() {
    let rng = &mut SmallRng::seed_from_u64(1);
    let p = problem();
    let ids = |n: usize, rng: &mut SmallRng| {
        (0..n).map(|i| i as i32 / 40 + rng.random_range(0..2)).collect::<Vec<_>>()
    };
    let (q_ids, kv_ids) = (ids(p.total_q(), rng), ids(p.total_k(), rng));
    let pattern = |b: usize, h: usize, m: usize, n: usize| !(b + h + m * m + n).is_multiple_of(3);
    let masks = [
        Mask::Full,
        Mask::causal(),
        Mask::window(20, 3),
        Mask::Local { left: None, right: Some(5) },
        Mask::Local { left: Some(100), right: None },
        Mask::chunked(32),
        Mask::chunked(23),
        Mask::prefix_lm(&[10, 0, 60]),
        Mask::prefix_lm(&[31]),
        Mask::Document { q_ids: q_ids.into(), kv_ids: kv_ids.into() },
        Mask::Block(BlockMask::from_fn([3, 2, 4, 10], 16, 16, pattern).unwrap()),
        Mask::Block(BlockMask::from_fn([1, 1, 9, 16], 6, 10, pattern).unwrap()),
        Mask::chunked(48).and(Mask::causal()),
        Mask::window(5, 5).or(Mask::prefix_lm(&[4])),
        Mask::custom(|ix| (ix.kv % 7).ne(ix.q % 3) & ix.head.lt(5)).unwrap(),
        Mask::custom(|ix| ix.head.eq(1)).unwrap(),
        Mask::custom(|ix| ix.kv.lt(70)).unwrap(),
        Mask::custom(|ix| ix.q.ge(49)).unwrap(),
    ];
    for mask in masks {
        mask.validate(&p).unwrap();
        check_all(None, mask.lower().unwrap().as_ref(), rng);
    }
}

#[test]
fn named_score_mods() {
    let rng = &mut SmallRng::seed_from_u64(2);
    let p = problem();
    let [b, h, q, k] = [3, 2, SEQLEN_Q as usize, SEQLEN_K as usize];
    let mut bias = |dims: &[usize]| ScoreMod::bias(floats(dims, rng).with_grad().unwrap());
    let mut mods = vec![
        bias(&[b, h, q, k]),
        bias(&[1, h, q, k]),
        bias(&[b, 1, 1, k]),
        bias(&[1, h, q, 1]),
        bias(&[1, 1, 1, 1]),
    ];
    let slopes = Table::per_head(vec![0.5, 0.25]).unwrap().with_grad().unwrap();
    let relative = floats(&[h, 40], rng).with_grad().unwrap();
    let (scale, shift) = (floats(&[b], rng).with_grad().unwrap(), floats(&[h], rng));
    mods.extend([
        ScoreMod::None,
        ScoreMod::softcap(2.5),
        ScoreMod::Alibi(slopes.clone()),
        ScoreMod::softcap(5.0).then(ScoreMod::Alibi(slopes)),
        // Relative position with clamping at both ends; the same table read twice.
        ScoreMod::custom(|s, ix| s + relative[(ix.head, ix.q - ix.kv + 20)] * relative[(ix.head, 3.into())])
            .unwrap(),
        ScoreMod::custom(|s, ix| {
            s * scale[ix.batch] + shift[ix.head] * (ix.kv.to_float() * 0.25).exp2().log2()
        })
        .unwrap(),
        ScoreMod::custom(|s, ix| (ix.q % 3).eq(ix.kv % 3).select(s * s * 0.5, s.max(0.0) + ix.q)).unwrap(),
        ScoreMod::custom(|s, _| s * 0.0 + 1.0).unwrap(),
    ]);
    let window = Mask::window(30, 0).lower().unwrap();
    for m in mods {
        m.validate(&p).unwrap();
        let m = m.lower().unwrap();
        check_all(m.as_ref(), None, rng);
        check_all(m.as_ref(), window.as_ref(), rng);
    }
}

/// A random program: leaves, then operations on what is there.
struct Random<'r> {
    builder: Builder,
    tables: Vec<Table>,
    nodes: Vec<NodeId>,
    rng: &'r mut SmallRng,
}

impl Random<'_> {
    fn any(&mut self, ty: Type) -> NodeId {
        let of_type = |&&n: &&NodeId| self.builder.ty(n).unwrap() == ty;
        let nodes = self.nodes.iter().filter(of_type).copied().collect::<Vec<_>>();
        *nodes.choose(self.rng).unwrap()
    }

    fn push(&mut self, node: Node) -> NodeId {
        let id = self.builder.push(node).unwrap();
        self.nodes.push(id);
        id
    }

    fn leaves(&mut self) {
        for var in Var::ALL {
            self.push(Node::Var(var));
        }
        for x in [0, 1, -1, 2, 7, 16, -3, i32::MIN, i32::MAX] {
            self.push(Node::Int(x));
        }
        self.push(Node::Bool(true));
        for table in self.tables.clone() {
            let slot = self.builder.slot(table.ty()).unwrap();
            for _ in 0..3 {
                let index = [0; 4].map(|_| self.any(Type::Int));
                self.push(Node::Load { table: slot, index });
            }
        }
    }

    /// Exact operations: Ints and Bools.
    fn exact(&mut self) {
        use BinOp::*;
        let (a, b, c, d) =
            (self.any(Type::Int), self.any(Type::Int), self.any(Type::Bool), self.any(Type::Bool));
        let ints = [Add, Sub, Mul, Div, Rem, Min, Max, Lt, Le, Eq, Ne, BitAnd, BitOr, BitXor, Shl, Shr];
        let node = match self.rng.random_range(0..8) {
            0..4 => Node::Binary(*ints.choose(self.rng).unwrap(), a, b),
            4 => Node::Binary(*[And, Or, Eq, Ne].choose(self.rng).unwrap(), c, d),
            5 => Node::Select(c, a, b),
            6 => Node::Unary(*[UnOp::Neg, UnOp::Abs].choose(self.rng).unwrap(), a),
            _ => Node::Unary(UnOp::Not, c),
        };
        self.push(node);
    }

    /// Operations on floats whose result stays small, so that errors do too.
    fn smooth(&mut self) {
        use BinOp::*;
        let [a, b] = [0; 2].map(|_| self.any(Type::Float));
        let c = self.any(Type::Bool);
        let tame = self.push(Node::Unary(UnOp::Tanh, b));
        let one = self.push(Node::Float(1.5f32.to_bits()));
        let positive = self.push(Node::Binary(Add, tame, one));
        let node = match self.rng.random_range(0..9) {
            0..3 => Node::Binary(*[Add, Sub, Min, Max].choose(self.rng).unwrap(), a, b),
            3 => Node::Binary(Mul, a, tame),
            4 => Node::Binary(Div, a, positive),
            5 => Node::Unary(UnOp::Log2, positive),
            6 => Node::Unary(UnOp::Exp2, tame),
            7 => Node::Unary(*[UnOp::Neg, UnOp::Abs].choose(self.rng).unwrap(), a),
            _ => Node::Select(c, a, b),
        };
        self.push(node);
    }

    fn finish(self, root: NodeId) -> Traced {
        Traced { expr: self.builder.finish(root).unwrap(), tables: self.tables }
    }
}

#[test]
fn random_masks() {
    for seed in 0..60 {
        let rng = &mut SmallRng::seed_from_u64(seed);
        let tables = vec![ints(&[5], 40, rng), ints(&[2, 3, 1, 9], 200, rng)];
        let mut random = Random { builder: Builder::new(), tables, nodes: Vec::new(), rng };
        random.leaves();
        (0..40).for_each(|_| random.exact());
        let root = (0..8).map(|_| random.any(Type::Bool)).max().unwrap();
        let mask = random.finish(root);
        check_all(None, Some(&mask), rng);
    }
}

#[test]
fn random_score_mods() {
    for seed in 0..60 {
        let rng = &mut SmallRng::seed_from_u64(seed);
        let tables = vec![
            floats(&[3, 4], rng).with_grad().unwrap(),
            ints(&[7], 40, rng),
            floats(&[2, 5, 1, 30], rng).with_grad().unwrap(),
        ];
        let mut random = Random { builder: Builder::new(), tables, nodes: Vec::new(), rng };
        random.leaves();
        random.push(Node::Score);
        (0..20).for_each(|_| random.exact());
        let truth = random.any(Type::Bool);
        random.push(Node::Unary(UnOp::ToFloat, truth));
        let q = random.push(Node::Var(Var::Q));
        random.push(Node::Unary(UnOp::ToFloat, q));
        (0..20).for_each(|_| random.smooth());
        let root = (0..4).map(|_| random.any(Type::Float)).max().unwrap();
        let score_mod = random.finish(root);
        check_all(Some(&score_mod), None, rng);
    }
}

/// Where rounding decides: comparisons of floats, floor, minima of signed zeros and NaN, the limits of i32.
#[test]
fn special_floats() {
    let rng = &mut SmallRng::seed_from_u64(3);
    let special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        -0.5,
        3e9,
        -3e9,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        2147483500.0,
    ];
    let table = Table::f32(&[special.len()], special.to_vec()).unwrap();
    let div = Expr::trace(|_, ix| table[ix.q % 12] / table[ix.kv % 12]).unwrap();
    check_all(Some(&div), None, rng);
    for op in [BinOp::Min, BinOp::Max, BinOp::Lt, BinOp::Le, BinOp::Eq, BinOp::Ne] {
        let mut b = Builder::new();
        let slot = b.slot(Type::Float).unwrap();
        let zero = b.push(Node::Int(0)).unwrap();
        let n = b.push(Node::Int(special.len() as i32)).unwrap();
        let [x, y] = [Var::Q, Var::Kv].map(|var| {
            let var = b.push(Node::Var(var)).unwrap();
            let i = b.push(Node::Binary(BinOp::Rem, var, n)).unwrap();
            b.push(Node::Load { table: slot, index: [i, zero, zero, zero] }).unwrap()
        });
        let root = b.push(Node::Binary(op, x, y)).unwrap();
        let root = b.push(Node::Unary(UnOp::ToFloat, root)).unwrap();
        // The sign of a zero shows in its reciprocal.
        let one = b.push(Node::Float(1.0f32.to_bits())).unwrap();
        let sign = b.push(Node::Binary(BinOp::Div, one, root)).unwrap();
        for root in [root, sign] {
            let traced = Traced { expr: b.finish(root).unwrap(), tables: vec![table.clone()] };
            check_all(Some(&traced), None, rng);
        }
    }
    let floor = Expr::trace(|_, ix| table[ix.kv % 12].floor().to_float()).unwrap();
    check_all(Some(&floor), None, rng);
    let divisions = Expr::trace_mask(|ix| {
        let (a, b) = (ix.q * 91_234_567, (ix.kv - 75) * 7);
        ((a / b).eq(ix.kv) | (a % b).lt(3))
            ^ (a / 16).lt(a % 16)
            ^ ((a | i32::MIN) / (ix.kv - 75)).lt(5)
            ^ (a % i32::MIN).lt(a / i32::MIN)
    });
    check_all(None, Some(&divisions.unwrap()), rng);
}

fn dropout<const L: usize>() {
    let dropout = Dropout { p: 0.3, seed: 0x1234_5678_9abc };
    let dropper = Dropper::new(dropout);
    for at in strips() {
        let mut values = vec![2.0f32; at.rows * L];
        dropper.apply::<L>(&at, &mut values);
        for (i, &x) in values.iter().enumerate() {
            let (q, kv) = (at.q0 as u32 + (i % L) as u32, at.kv0 as u32 + (i / L) as u32);
            let kept = philox::keep(dropout.seed, at.batch as u32, at.head as u32, q, kv, dropout.p);
            assert_eq!(x, if kept { 2.0 * (1.0 / (1.0 - 0.3)) } else { 0.0 }, "L = {L} {at:?} {i}");
        }
    }
}

#[test]
fn dropout_is_that_of_the_specification() {
    dropout::<4>();
    dropout::<8>();
    dropout::<16>();
}
