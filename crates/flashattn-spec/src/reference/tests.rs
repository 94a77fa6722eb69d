//! The oracle against loops written down from the formulas, and its gradients against finite differences.

use super::*;
use crate::expr::Table;
use crate::io::Pass;
use crate::mask::Mask;
use crate::philox;
use crate::problem::Dropout;
use crate::score_mod::ScoreMod;
use crate::{DType, GradInputs, Gradients, Outputs, View, ViewMut};
use rand::{Rng, SeedableRng, rngs::SmallRng};

/// Tensors of a problem, dense.
#[derive(Clone)]
pub(super) struct Tensors {
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    pub sinks: Option<Vec<f32>>,
    pub d_o: Vec<f64>,
    pub d_lse: Vec<f32>,
}

fn random(rng: &mut SmallRng, shape: [usize; 4]) -> Vec<f64> {
    (0..shape.iter().product()).map(|_| rng.random_range(-1.5..1.5)).collect()
}

impl Tensors {
    pub fn new(p: &AttentionProblem, seed: u64) -> Self {
        let rng = &mut SmallRng::seed_from_u64(seed);
        let [q, k, v, d_o] = [p.q_shape(), p.k_shape(), p.v_shape(), p.o_shape()].map(|s| random(rng, s));
        // Multiples of 1/1024, so that a step of a finite difference is exact in f32.
        let mut floats = |n: usize| -> Vec<f32> {
            (0..n).map(|_| rng.random_range(-1024..1024) as f32 / 1024.0).collect()
        };
        let sinks = p.sinks.then(|| floats(p.heads_q));
        Tensors { q, k, v, sinks, d_o, d_lse: floats(p.lse_len()) }
    }

    pub fn inputs<'a>(&'a self, p: &AttentionProblem) -> Inputs<'a, f64> {
        Inputs {
            q: View::new(&self.q, p.q_shape()).unwrap(),
            k: View::new(&self.k, p.k_shape()).unwrap(),
            v: View::new(&self.v, p.v_shape()).unwrap(),
            sinks: self.sinks.as_deref(),
        }
    }

    fn forward(&self, p: &AttentionProblem) -> Forward {
        forward(p, &self.inputs(p)).unwrap()
    }

    fn backward(&self, p: &AttentionProblem) -> Backward {
        let d_o = View::new(&self.d_o, p.o_shape()).unwrap();
        backward(p, &self.inputs(p), d_o, Some(&self.d_lse)).unwrap()
    }

    /// A scalar with gradients d_o and d_lse.
    fn loss(&self, p: &AttentionProblem) -> f64 {
        let y = self.forward(p);
        let o: f64 = y.o.iter().zip(&self.d_o).map(|(a, b)| a * b).sum();
        // A row that sees nothing has no gradient, and −∞ no difference.
        let lse = y.lse.iter().zip(&self.d_lse).filter(|(a, _)| a.is_finite());
        o + lse.map(|(a, b)| a * f64::from(*b)).sum::<f64>()
    }
}

/// The forward pass, one row after the other, as the formulas say it.
fn naive(p: &AttentionProblem, t: &Tensors) -> Forward {
    let lowered = p.lower().unwrap();
    let inputs = t.inputs(p);
    let [_, n, heads, d_v] = p.o_shape();
    let mut y = Forward { o: vec![0.0; t.d_o.len()], lse: vec![0.0; p.lse_len()] };
    for b in 0..p.batch {
        let s = p.sequence(b);
        for h in 0..heads {
            for i in 0..s.seqlen_q {
                let mut scores = Vec::new();
                for j in 0..s.seqlen_k {
                    let q = inputs.q.row(s.batch, s.q_row + i, h);
                    let k = inputs.k.row(s.batch, s.kv_row + j, h / p.group());
                    let x = f64::from(p.scale()) * q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>();
                    let env = env(&s, b, h, i, j);
                    let eval = |t: &Option<crate::expr::Traced>| {
                        t.as_ref().map(|t| t.expr.eval(&env, &t.tables, x).unwrap())
                    };
                    if eval(&lowered.mask).is_none_or(|m| m.as_bool()) {
                        scores.push((j, eval(&lowered.score_mod).map_or(x, |v| v.as_f64())));
                    }
                }
                let mut sum: f64 = scores.iter().map(|(_, s)| s.exp()).sum();
                sum += t.sinks.as_ref().map_or(0.0, |x| f64::from(x[h]).exp());
                y.lse[p.lse_start(&s, h) + i] = sum.ln();
                let o = ((s.batch * n + s.q_row + i) * heads + h) * d_v;
                for &(j, x) in &scores {
                    let kept = p
                        .dropout
                        .is_none_or(|d| philox::keep(d.seed, b as u32, h as u32, i as u32, j as u32, d.p));
                    let z = if kept { 1.0 / (1.0 - p.dropout.map_or(0.0, |d| f64::from(d.p))) } else { 0.0 };
                    let v = inputs.v.row(s.batch, s.kv_row + j, h / p.group());
                    y.o[o..o + d_v].iter_mut().zip(v).for_each(|(o, v)| *o += z * x.exp() / sum * v);
                }
            }
        }
    }
    y
}

fn tables(values: &[f32], dims: &[usize]) -> Table {
    Table::f32(dims, values.to_vec()).unwrap().with_grad().unwrap()
}

/// Makes a problem from the values of its learned tables.
type Make = Box<dyn Fn(&[f32]) -> AttentionProblem>;

/// A name, values of learned tables, and the problem.
type Named = (&'static str, Vec<f32>, Make);

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 64.0).collect()
}

/// Every option, alone and together.
fn problems() -> Vec<Named> {
    let base = || {
        let mut p = AttentionProblem::new(2, 5, 4, 3, DType::F64);
        (p.seqlen_k, p.heads_kv, p.head_dim_v) = (7, 2, 2);
        p
    };
    let with = move |change: &dyn Fn(&mut AttentionProblem)| {
        let mut p = base();
        change(&mut p);
        p
    };
    let fixed = |p: AttentionProblem| -> Make { Box::new(move |_| p.clone()) };
    let packed = base().with_varlen(&[0, 3, 3, 8, 9], &[0, 4, 6, 6, 13]);
    let custom = |s: f32| ScoreMod::custom(move |x, ix| x * s + (ix.q - ix.kv).to_float() * 0.1).unwrap();
    vec![
        ("plain", vec![], fixed(base())),
        ("negative scale", vec![], fixed(with(&|p| p.softmax_scale = Some(-0.7)))),
        ("zero scale", vec![], fixed(with(&|p| p.softmax_scale = Some(0.0)))),
        ("causal", vec![], fixed(with(&|p| p.mask = Mask::causal()))),
        (
            "causal with rows that see nothing",
            vec![],
            fixed(with(&|p| (p.mask, p.seqlen_q, p.seqlen_k) = (Mask::causal(), 7, 4))),
        ),
        ("window", vec![], fixed(with(&|p| p.mask = Mask::window(1, 1)))),
        ("sinks", vec![], fixed(with(&|p| p.sinks = true))),
        (
            "sinks and rows that see nothing",
            vec![],
            fixed(with(&|p| (p.sinks, p.mask, p.seqlen_q, p.seqlen_k) = (true, Mask::causal(), 7, 4))),
        ),
        ("dropout", vec![], fixed(with(&|p| p.dropout = Some(Dropout { p: 0.3, seed: 7 })))),
        ("no keys", vec![], fixed(with(&|p| p.seqlen_k = 0))),
        ("no keys but sinks", vec![], fixed(with(&|p| (p.seqlen_k, p.sinks) = (0, true)))),
        ("no queries", vec![], fixed(with(&|p| p.seqlen_q = 0))),
        ("no batch", vec![], fixed(with(&|p| p.batch = 0))),
        ("packed", vec![], fixed(packed.clone())),
        ("softcap", vec![], fixed(with(&|p| p.score_mod = ScoreMod::softcap(0.8)))),
        ("custom", vec![], fixed(with(&|p| p.score_mod = custom(1.3)))),
        (
            "alibi with learned slopes",
            values(4),
            Box::new(move |t| with(&|p| p.score_mod = ScoreMod::Alibi(tables(t, &[4])))),
        ),
        (
            "bias of every head",
            values(4 * 5 * 7),
            Box::new(move |t| with(&|p| p.score_mod = ScoreMod::bias(tables(t, &[1, 4, 5, 7])))),
        ),
        (
            "bias of keys",
            values(2 * 7),
            Box::new(move |t| with(&|p| p.score_mod = ScoreMod::bias(tables(t, &[2, 1, 1, 7])))),
        ),
        (
            "everything, packed",
            values(4 + 5 * 7),
            Box::new(move |t| {
                let mut p = packed.clone();
                let bias = ScoreMod::bias(tables(&t[4..], &[1, 1, 5, 7]));
                let alibi = ScoreMod::Alibi(tables(&t[..4], &[4]));
                p.score_mod = bias.then(ScoreMod::softcap(1.5)).then(alibi).then(custom(0.9));
                p.mask = Mask::window(2, 3).or(Mask::chunked(2));
                (p.sinks, p.softmax_scale) = (true, Some(0.9));
                p.dropout = Some(Dropout { p: 0.2, seed: 99 });
                p
            }),
        ),
    ]
}

fn close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!(a == b || (a - b).abs() <= tolerance * (1.0 + b.abs()), "{what}[{i}]: {a}, expected {b}");
    }
}

#[test]
fn forward_equals_the_formulas() {
    for (name, table, problem) in problems() {
        let p = problem(&table);
        let t = Tensors::new(&p, 1);
        let (got, expected) = (t.forward(&p), naive(&p, &t));
        close(name, &got.o, &expected.o, 1e-13);
        close(name, &got.lse, &expected.lse, 1e-13);
    }
}

#[test]
fn many_blocks_and_threads_change_nothing() {
    let mut p = AttentionProblem::new(2, 150, 4, 24, DType::F64);
    (p.seqlen_k, p.heads_kv, p.mask, p.sinks) = (171, 2, Mask::window(100, 3), true);
    let t = Tensors::new(&p, 2);
    let (got, expected) = (t.forward(&p), naive(&p, &t));
    close("o", &got.o, &expected.o, 1e-13);
    close("lse", &got.lse, &expected.lse, 1e-13);
    assert_eq!(t.backward(&p), t.backward(&p), "every sum has a fixed order");
}

/// Derivatives of expressions hold constants that were folded in f32, such as cap · (1 / cap).
const DERIVATIVE: f64 = 1e-7;

/// Fourth-order central difference of `f` at 0.
fn slope(h: f64, f: impl Fn(f64) -> f64) -> f64 {
    (8.0 * (f(h) - f(-h)) - (f(2.0 * h) - f(-2.0 * h))) / (12.0 * h)
}

#[test]
fn gradients_equal_finite_differences() {
    for (name, table, problem) in problems() {
        let p = problem(&table);
        let t = Tensors::new(&p, 3);
        let got = t.backward(&p);
        type Get = fn(&mut Tensors) -> &mut Vec<f64>;
        let tensors: [(&str, &Vec<f64>, Get); 3] =
            [("dq", &got.dq, |t| &mut t.q), ("dk", &got.dk, |t| &mut t.k), ("dv", &got.dv, |t| &mut t.v)];
        for (tensor, got, get) in tensors {
            let expected: Vec<f64> = (0..got.len())
                .map(|i| {
                    slope(1e-3, |h| {
                        let mut t = t.clone();
                        get(&mut t)[i] += h;
                        t.loss(&p)
                    })
                })
                .collect();
            close(&format!("{name}: {tensor}"), got, &expected, DERIVATIVE);
        }
        // Parameters in f32 take steps that f32 can represent.
        let step = 1.0 / 512.0;
        let d_sinks: Vec<f64> = (0..t.sinks.as_ref().map_or(0, Vec::len))
            .map(|i| {
                slope(step, |h| {
                    let mut t = t.clone();
                    t.sinks.as_mut().unwrap()[i] += h as f32;
                    t.loss(&p)
                })
            })
            .collect();
        close(&format!("{name}: dsinks"), &got.d_sinks, &d_sinks, DERIVATIVE);
        let d_table: Vec<f64> = (0..table.len())
            .map(|i| {
                slope(step, |h| {
                    let mut table = table.clone();
                    table[i] += h as f32;
                    t.loss(&problem(&table))
                })
            })
            .collect();
        // Slots are numbered in the order in which the chain reads its tables.
        let lengths: Vec<usize> = p.grad_tables().iter().map(|t| t.data().len()).collect();
        assert_eq!(got.d_tables.iter().map(Vec::len).collect::<Vec<_>>(), lengths, "{name}");
        let mut flat = got.d_tables.clone();
        if lengths.len() == 2 {
            flat.sort_by_key(Vec::len);
        }
        close(&format!("{name}: tables"), &flat.concat(), &d_table, DERIVATIVE);
    }
}

#[test]
fn rows_that_see_nothing() {
    let mut p = AttentionProblem::new(1, 6, 1, 4, DType::F64);
    (p.seqlen_k, p.mask) = (3, Mask::causal());
    let t = Tensors::new(&p, 4);
    let (y, g) = (t.forward(&p), t.backward(&p));
    assert_eq!(y.lse[..3], [f64::NEG_INFINITY; 3]);
    assert_eq!(y.o[..12], [0.0; 12]);
    assert_eq!(g.dq[..12], [0.0; 12]);
    p.sinks = true;
    let t = Tensors { sinks: Some(vec![0.25]), ..t };
    let (y, g) = (t.forward(&p), t.backward(&p));
    assert_eq!((y.lse[0], y.o[0], g.dq[0]), (0.25, 0.0, 0.0));
    // Scores of −∞ are like keys that are not there, even if the keys hold NaN.
    p.score_mod = ScoreMod::bias(tables(&[f32::NEG_INFINITY; 6], &[1, 1, 6, 1]));
    (p.mask, p.sinks) = (Mask::Full, false);
    let mut t = Tensors { sinks: None, ..t };
    t.v[0] = f64::NAN;
    let (y, g) = (t.forward(&p), t.backward(&p));
    assert!(y.lse.iter().all(|&x| x == f64::NEG_INFINITY) && y.o.iter().all(|&x| x == 0.0));
    assert!([&g.dq, &g.dk, &g.dv].iter().all(|x| x.iter().all(|&x| x == 0.0)));
}

#[test]
fn a_nan_reaches_the_rows_that_see_it_and_no_others() {
    let mut p = AttentionProblem::new(1, 8, 1, 4, DType::F64);
    p.mask = Mask::causal();
    let clean = Tensors::new(&p, 5);
    let rows = |x: &[f64]| -> Vec<bool> { x.chunks(4).map(|r| r.iter().any(|x| x.is_nan())).collect() };
    let from = |n: usize| -> Vec<bool> { (0..8).map(|i| i >= n).collect() };
    let only = |n: usize| -> Vec<bool> { (0..8).map(|i| i == n).collect() };

    let mut t = clean.clone();
    t.v[5 * 4 + 1] = f64::NAN;
    let (y, g) = (t.forward(&p), t.backward(&p));
    assert_eq!(rows(&y.o), from(5));
    assert!(y.o.iter().enumerate().all(|(i, x)| x.is_nan() == (i / 4 >= 5 && i % 4 == 1)), "one column");
    assert!(y.lse.iter().all(|x| x.is_finite()));
    assert_eq!(rows(&g.dq), from(5));
    assert_eq!(rows(&g.dv), [false; 8], "dv does not depend on v");
    assert!(rows(&g.dk).iter().all(|&x| x), "rows 5.. see every key");

    let mut t = clean.clone();
    t.k[6 * 4] = f64::NAN;
    let (y, g) = (t.forward(&p), t.backward(&p));
    assert_eq!((rows(&y.o), rows(&g.dq)), (from(6), from(6)));
    assert_eq!(y.lse.iter().map(|x| x.is_nan()).collect::<Vec<_>>(), from(6));

    let mut t = clean.clone();
    t.q[2 * 4] = f64::INFINITY;
    assert_eq!(rows(&t.forward(&p).o), only(2));
    assert_eq!(rows(&t.backward(&p).dk), [true, true, true, false, false, false, false, false]);

    let mut t = clean;
    t.d_o[2 * 4] = f64::NAN;
    let g = t.backward(&p);
    assert_eq!(rows(&g.dq), only(2));
    assert_eq!(rows(&g.dv), [true, true, true, false, false, false, false, false]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let p = AttentionProblem::new(1, 3, 1, 4, DType::F64);
    let t = Tensors::new(&p, 6);
    let d_o = View::new(&t.d_o[..8], [1, 2, 1, 4]).unwrap();
    let refused = backward(&p, &t.inputs(&p), d_o, None).unwrap_err();
    assert_eq!(refused.to_string(), "do has shape [1, 2, 1, 4], expected [1, 3, 1, 4]");
    let d_o = View::new(&t.d_o, p.o_shape()).unwrap();
    let refused = backward(&p, &t.inputs(&p), d_o, Some(&[0.0])).unwrap_err();
    assert_eq!(refused.to_string(), "dlse has shape [1], expected [3]");
    let f32s = AttentionProblem { dtype: DType::F32, ..p.clone() };
    assert!(matches!(forward(&f32s, &t.inputs(&p)), Err(ProblemError::DType { .. })));
}

/// What standard attention gives for tensors rounded to `T`, and the oracle for the same.
fn standard<T: Element>(p: &AttentionProblem, t: &Tensors) -> [(Vec<f64>, Vec<f64>); 7] {
    let p = &AttentionProblem { dtype: T::DTYPE, ..p.clone() };
    let [q, k, v, d_o] =
        [&t.q, &t.k, &t.v, &t.d_o].map(|x| x.iter().map(|&x| T::from_f64(x)).collect::<Vec<T>>());
    let inputs = Inputs {
        q: View::new(&q, p.q_shape()).unwrap(),
        k: View::new(&k, p.k_shape()).unwrap(),
        v: View::new(&v, p.v_shape()).unwrap(),
        sinks: t.sinks.as_deref(),
    };
    let nan = T::from_f64(f64::NAN);
    let mut o = vec![nan; d_o.len()];
    let mut lse = vec![f32::NAN; p.lse_len()];
    let mut attention = standard::StandardAttention::new(p).unwrap();
    let mut outputs = Outputs { o: ViewMut::new(&mut o, p.o_shape()).unwrap(), lse: &mut lse };
    attention.forward(&inputs, &mut outputs).unwrap();
    let d_o = View::new(&d_o, p.o_shape()).unwrap();
    let [mut dq, mut dk, mut dv] = [&q, &k, &v].map(|x| vec![nan; x.len()]);
    let mut d_sinks = vec![f32::NAN; if p.sinks { p.heads_q } else { 0 }];
    let mut d_tables: Vec<_> = p.grad_tables().iter().map(|t| vec![f32::NAN; t.data().len()]).collect();
    let grad_inputs =
        GradInputs { o: View::new(&o, p.o_shape()).unwrap(), lse: &lse, d_o, d_lse: Some(&t.d_lse) };
    let mut gradients = Gradients {
        dq: ViewMut::new(&mut dq, p.q_shape()).unwrap(),
        dk: ViewMut::new(&mut dk, p.k_shape()).unwrap(),
        dv: ViewMut::new(&mut dv, p.v_shape()).unwrap(),
        d_sinks: p.sinks.then_some(&mut d_sinks[..]),
        d_tables: d_tables.iter_mut().map(|t| &mut t[..]).collect(),
    };
    attention.backward(&inputs, &grad_inputs, &mut gradients).unwrap();
    let y = forward(p, &inputs).unwrap();
    let g = backward(p, &inputs, d_o, Some(&t.d_lse)).unwrap();
    let wide = |x: &[T]| x.iter().map(|x| x.to_f64()).collect::<Vec<f64>>();
    let wide32 = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    [
        (wide(&o), y.o),
        (wide32(&lse), y.lse),
        (wide(&dq), g.dq),
        (wide(&dk), g.dk),
        (wide(&dv), g.dv),
        (wide32(&d_sinks), g.d_sinks),
        (wide32(&d_tables.concat()), g.d_tables.concat()),
    ]
}

#[test]
fn standard_attention_equals_the_oracle_up_to_rounding() {
    let mut all: Vec<(&str, AttentionProblem)> =
        problems().into_iter().map(|(name, table, problem)| (name, problem(&table))).collect();
    let mut large = AttentionProblem::new(2, 131, 6, 40, DType::F64);
    (large.seqlen_k, large.heads_kv, large.mask, large.sinks) = (149, 2, Mask::window(100, 3), true);
    all.push(("more than one chunk", large));
    let mut wide = AttentionProblem::new(1, 67, 2, 8, DType::F64);
    (wide.seqlen_k, wide.dropout) = (1100, Some(Dropout { p: 0.25, seed: 3 }));
    all.push(("more than one chunk of columns", wide));
    for (name, p) in all {
        let t = Tensors::new(&p, 8);
        let check = |results: [(Vec<f64>, Vec<f64>); 7], dtype: DType| {
            let names = ["o", "lse", "dq", "dk", "dv", "dsinks", "dtables"];
            for (tensor, (got, expected)) in names.into_iter().zip(results) {
                let tolerance = dtype.epsilon() * if tensor == "dtables" { 100.0 } else { 24.0 };
                close(&format!("{name} {dtype} {tensor}"), &got, &expected, tolerance);
            }
        };
        check(standard::<f32>(&p, &t), DType::F32);
        check(standard::<half::f16>(&p, &t), DType::F16);
        check(standard::<half::bf16>(&p, &t), DType::Bf16);
    }
}

#[test]
fn nans_reach_the_same_places_in_standard_attention() {
    for dropout in [None, Some(Dropout { p: 0.3, seed: 1 })] {
        let mut p = AttentionProblem::new(1, 8, 2, 4, DType::F64);
        (p.mask, p.heads_kv, p.dropout) = (Mask::window(2, 1), 1, dropout);
        let clean = Tensors::new(&p, 9);
        for place in 0..4 {
            for bad in [f64::NAN, f64::INFINITY] {
                let mut t = clean.clone();
                [&mut t.q, &mut t.k, &mut t.v, &mut t.d_o][place][17] = bad;
                for (tensor, (got, expected)) in standard::<f32>(&p, &t).into_iter().enumerate() {
                    let finite = |x: &[f64]| x.iter().map(|x| x.is_finite()).collect::<Vec<_>>();
                    assert_eq!(finite(&got), finite(&expected), "{bad} in input {place}, output {tensor}");
                }
            }
        }
    }
}

#[test]
fn standard_attention_says_what_it_needs() {
    let mut p = AttentionProblem::new(3, 10, 4, 8, DType::Bf16);
    p.seqlen_k = 20;
    let bytes = |p: &AttentionProblem, pass| standard::standard_extra_bytes(p, pass).unwrap();
    let matrix = 3 * 4 * 10 * 20 * 2;
    assert_eq!((bytes(&p, Pass::Forward), bytes(&p, Pass::Backward)), (2 * matrix, 3 * matrix));
    p.mask = Mask::causal();
    p.score_mod = ScoreMod::softcap(1.0);
    assert_eq!(bytes(&p, Pass::Forward), 2 * matrix + 200, "one mask for all");
    assert_eq!(bytes(&p, Pass::ForwardBackward), 4 * matrix + 200);
}
