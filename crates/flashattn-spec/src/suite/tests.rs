//! The suite judged: a plain flash attention passes, and the same with any of a dozen bugs does not.

use super::*;
use crate::element::DType;
use crate::expr::{Env, Evaluator, Slot};
use crate::philox;
use crate::softmax::OnlineSoftmax;
use std::collections::HashSet;
use std::sync::LazyLock;

static CORPUS: LazyLock<Vec<Case>> = LazyLock::new(corpus);

/// What can be wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Bug {
    CausalOffByOne,
    NoScale,
    NanLeaks,
    LastRowUnwritten,
    WritesPadding,
    Base2Lse,
    NoRescale,
    DropoutNotScaled,
    WrongKvHead,
    SinkForgotten,
    GroupNotSummed,
    DlseForgotten,
    SlowlyWrong,
    SaysZeroForNothing,
    TableGradientTwice,
    Panics,
}

/// FlashAttention row by row, in f32 with blocks of [`KEYS`] keys: what a good executor does, without the speed.
struct Flash {
    bug: Option<Bug>,
}

const KEYS: usize = 32;

fn dot<T: Element>(a: &[T], b: &[T]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a.to_f32() * b.to_f32()).sum()
}

/// What the closure of [`Flash::rows`] is given: the row, its visible keys and their scores.
struct Row<'a> {
    batch: usize,
    head: usize,
    kv_head: usize,
    row: usize,
    kv_row: usize,
    lse_at: usize,
    last: bool,
    keys: &'a [usize],
    hidden: &'a [usize],
    /// Scaled scores before and after the score mod, and the kept-factor of dropout.
    x: &'a [f32],
    s: &'a [f32],
    z: &'a [f32],
    env: &'a dyn Fn(usize) -> Env,
}

impl Flash {
    fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    fn rows<T: Element>(&self, p: &AttentionProblem, inputs: &Inputs<T>, mut f: impl FnMut(Row)) {
        let lowered = p.lower().unwrap();
        let mut mask = lowered.mask.as_ref().map(|t| Evaluator::<f32>::new(&t.expr, &t.tables).unwrap());
        let mut mods = lowered.score_mod.as_ref().map(|t| Evaluator::<f32>::new(&t.expr, &t.tables).unwrap());
        let scale = if self.has(Bug::NoScale) { 1.0 } else { p.scale() };
        for b in 0..p.batch {
            let s = p.sequence(b);
            for head in 0..p.heads_q {
                let kv_head = if self.has(Bug::WrongKvHead) { head % p.heads_kv } else { head / p.group() };
                for i in 0..s.seqlen_q {
                    let env = |j: usize| {
                        let off = usize::from(self.has(Bug::CausalOffByOne) && j > 0);
                        let [batch, head, q, kv] = [b, head, i, j - off].map(|x| x as i32);
                        let [seqlen_q, seqlen_k] = [s.seqlen_q, s.seqlen_k].map(|x| x as i32);
                        let [q_start, kv_start] = [s.q_start, s.kv_start].map(|x| x as i32);
                        Env { batch, head, q, kv, seqlen_q, seqlen_k, q_start, kv_start }
                    };
                    let see = |j: &usize| mask.as_mut().is_none_or(|m| m.eval(&env(*j), 0.0).as_bool());
                    let (keys, hidden): (Vec<_>, Vec<_>) = (0..s.seqlen_k).partition(see);
                    let q = inputs.q.row(s.batch, s.q_row + i, head);
                    let x: Vec<f32> = keys
                        .iter()
                        .map(|&j| scale * dot(q, inputs.k.row(s.batch, s.kv_row + j, kv_head)))
                        .collect();
                    let scores = keys.iter().zip(&x).map(|(&j, &x)| match &mut mods {
                        Some(mods) => mods.eval(&env(j), x).as_float(),
                        None => x,
                    });
                    let z = keys.iter().map(|&j| match p.dropout {
                        None => 1.0,
                        Some(d) => {
                            let [batch, head, q, kv] = [b, head, i, j].map(|x| x as u32);
                            let kept = philox::keep(d.seed, batch, head, q, kv, d.p);
                            let scale = if self.has(Bug::DropoutNotScaled) { 1.0 } else { 1.0 / (1.0 - d.p) };
                            if kept { scale } else { 0.0 }
                        }
                    });
                    f(Row {
                        batch: s.batch,
                        head,
                        kv_head,
                        row: s.q_row + i,
                        kv_row: s.kv_row,
                        lse_at: p.lse_start(&s, head) + i,
                        last: i + 1 == s.seqlen_q,
                        s: &scores.collect::<Vec<_>>(),
                        z: &z.collect::<Vec<_>>(),
                        env: &env,
                        keys: &keys,
                        hidden: &hidden,
                        x: &x,
                    });
                }
            }
        }
    }
}

impl Executor for Flash {
    fn device(&self) -> String {
        "test".to_owned()
    }

    fn forward<T: Element>(
        &self,
        p: &AttentionProblem,
        inputs: &Inputs<T>,
        outputs: &mut Outputs<T>,
    ) -> Result<(), ExecError> {
        if self.has(Bug::Panics) {
            panic!("as it should");
        }
        self.rows(p, inputs, |row| {
            let mut softmax = OnlineSoftmax::<f32>::new();
            let mut o = vec![0.0f32; p.head_dim_v];
            let add = |o: &mut [f32], p: f32, j: usize| {
                let v = inputs.v.row(row.batch, row.kv_row + j, row.kv_head);
                o.iter_mut().zip(v).for_each(|(o, v)| *o += p * v.to_f32());
            };
            for (block, keys) in row.keys.chunks(KEYS).enumerate() {
                let range = block * KEYS..block * KEYS + keys.len();
                let mut scores = row.s[range.clone()].to_vec();
                let factor = softmax.update(&mut scores);
                let factor = if self.has(Bug::NoRescale) && block > 0 { 1.0 } else { factor };
                o.iter_mut().for_each(|o| *o *= factor);
                for ((exp, j), z) in scores.iter().zip(keys).zip(&row.z[range]) {
                    add(&mut o, T::from_f32(exp * z).to_f32(), *j);
                }
            }
            if self.has(Bug::NanLeaks) {
                row.hidden.iter().for_each(|&j| add(&mut o, 0.0, j));
            }
            if let (Some(sinks), false) = (inputs.sinks, self.has(Bug::SinkForgotten)) {
                let factor = softmax.update(&mut [sinks[row.head]]);
                o.iter_mut().for_each(|o| *o *= factor);
            }
            let mut lse = softmax.lse();
            if self.has(Bug::Base2Lse) {
                lse *= std::f32::consts::LOG2_E;
            }
            if self.has(Bug::SaysZeroForNothing) && lse == f32::NEG_INFINITY {
                lse = 0.0;
            }
            outputs.lse[row.lse_at] = lse;
            if !(self.has(Bug::LastRowUnwritten) && row.last) {
                let wrong =
                    if self.has(Bug::SlowlyWrong) { 1.0 + 32.0 * T::DTYPE.epsilon() as f32 } else { 1.0 };
                let to = outputs.o.row_mut(row.batch, row.row, row.head);
                to.iter_mut()
                    .zip(&o)
                    .for_each(|(to, o)| *to = T::from_f32(o * softmax.inverse_sum() * wrong));
            }
        });
        let strides = outputs.o.as_view().strides();
        if self.has(Bug::WritesPadding) && strides[2] > p.head_dim_v && !outputs.o.as_view().data().is_empty()
        {
            outputs.o.data_mut()[p.head_dim_v] = T::from_f32(0.0);
        }
        Ok(())
    }

    fn backward<T: Element>(
        &self,
        p: &AttentionProblem,
        inputs: &Inputs<T>,
        g: &GradInputs<T>,
        gradients: &mut Gradients<T>,
    ) -> Result<(), ExecError> {
        let lowered = p.lower().unwrap();
        let tables = lowered.score_mod.as_ref().map_or(&[][..], |t| &t.tables);
        let wanted = |slot: Slot| tables[slot.index()].wants_grad();
        let derivatives = lowered.score_mod.as_ref().map(|t| t.expr.gradients(wanted).unwrap());
        let mut mods = derivatives.as_ref().map(|d| Evaluator::<f32>::new(&d.program, tables).unwrap());
        let [_, m, _, d] = p.q_shape();
        let [_, n, _, dv] = p.v_shape();
        let zeros = |shape: [usize; 4]| vec![0.0f32; shape.iter().product()];
        let [mut dq, mut dk, mut dv_] = [p.q_shape(), p.k_shape(), p.v_shape()].map(zeros);
        gradients.d_tables.iter_mut().for_each(|t| t.fill(0.0));
        if let Some(d) = &mut gradients.d_sinks {
            d.fill(0.0);
        }
        self.rows(p, inputs, |row| {
            let lse = g.lse[row.lse_at];
            let d_o = g.d_o.row(row.batch, row.row, row.head);
            if lse == f32::NEG_INFINITY {
                return;
            }
            let d_lse = if self.has(Bug::DlseForgotten) { None } else { g.d_lse };
            let delta =
                dot(d_o, g.o.row(row.batch, row.row, row.head)) - d_lse.map_or(0.0, |x| x[row.lse_at]);
            if let (Some(d), Some(sinks)) = (&mut gradients.d_sinks, inputs.sinks) {
                d[row.head] -= (sinks[row.head] - lse).exp() * delta;
            }
            let q = inputs.q.row(row.batch, row.row, row.head);
            for (i, &j) in row.keys.iter().enumerate() {
                let k = inputs.k.row(row.batch, row.kv_row + j, row.kv_head);
                let v = inputs.v.row(row.batch, row.kv_row + j, row.kv_head);
                let prob = (row.s[i] - lse).exp();
                let mut ds = prob * (row.z[i] * dot(d_o, v) - delta);
                if let (Some(mods), Some(grads)) = (&mut mods, &derivatives) {
                    let values = mods.run(&(row.env)(j), row.x[i]);
                    for table in &grads.tables {
                        let slot = table.slot.index();
                        let index = tables[..slot].iter().filter(|t| t.wants_grad()).count();
                        let at = tables[slot].offset(table.index.map(|i| values[i.index()].as_int()));
                        let twice = if self.has(Bug::TableGradientTwice) { 2.0 } else { 1.0 };
                        gradients.d_tables[index][at] +=
                            ds * twice * values[table.derivative.index()].as_float();
                    }
                    ds *= values[grads.d_score.index()].as_float();
                }
                let at = |head: usize, heads: usize, n: usize, i: usize, d: usize| {
                    ((row.batch * n + i) * heads + head) * d
                };
                let ds = T::from_f32(ds).to_f32() * p.scale();
                let to = &mut dq[at(row.head, p.heads_q, m, row.row, d)..][..d];
                to.iter_mut().zip(k).for_each(|(to, k)| *to += ds * k.to_f32());
                let to = &mut dk[at(row.kv_head, p.heads_kv, n, row.kv_row + j, d)..][..d];
                let first = !self.has(Bug::GroupNotSummed) || row.head % p.group() == 0;
                let ds = if first { ds } else { 0.0 };
                to.iter_mut().zip(q).for_each(|(to, q)| *to += ds * q.to_f32());
                let prob = T::from_f32(prob * row.z[i]).to_f32();
                let to = &mut dv_[at(row.kv_head, p.heads_kv, n, row.kv_row + j, dv)..][..dv];
                to.iter_mut().zip(d_o).for_each(|(to, d_o)| *to += prob * d_o.to_f32());
            }
        });
        for (to, from) in [(&mut gradients.dq, dq), (&mut gradients.dk, dk), (&mut gradients.dv, dv_)] {
            let [batch, rows, heads, d] = to.shape();
            let places =
                (0..batch).flat_map(|b| (0..rows).flat_map(move |i| (0..heads).map(move |h| (b, i, h))));
            for ((b, i, h), from) in places.zip(from.chunks(d)) {
                let to = to.row_mut(b, i, h);
                to.iter_mut().zip(from).for_each(|(to, from)| *to = T::from_f32(*from));
            }
        }
        Ok(())
    }
}

#[test]
fn the_corpus_is_what_it_says() {
    let cases = &*CORPUS;
    assert!(cases.len() >= 500, "{}", cases.len());
    let names: HashSet<_> = cases.iter().map(|c| &c.name).collect();
    assert_eq!(names.len(), cases.len(), "names are unique");
    for case in cases.iter().chain(&random_cases(1, 300)) {
        case.problem.validate().unwrap_or_else(|e| panic!("{}: {e}", case.name));
    }
    let again: Vec<String> = random_cases(1, 20).into_iter().map(|c| c.name).collect();
    assert_eq!(again, random_cases(1, 300)[..20].iter().map(|c| c.name.clone()).collect::<Vec<_>>());
    assert!(random_cases(2, 20).iter().zip(again).all(|(c, name)| c.name != name));
}

fn passes(executor: &impl Executor, cases: &[Case]) {
    let report = Runner::new().run(executor, cases);
    assert_eq!(report.passed, cases.len(), "{report}");
    assert!(report.worst.values().all(|w| w.ratio <= 1.0));
}

#[test]
fn standard_attention_passes() {
    // It is measured against itself: what could go wrong shows in a part.
    let part: Vec<Case> = CORPUS.iter().step_by(6).cloned().collect();
    passes(&StandardExecutor, &part);
    passes(&StandardExecutor, &random_cases(3, 30));
}

#[test]
fn flash_attention_passes() {
    // Slow as it is, it is spared the largest.
    let small = |c: &&Case| c.problem.head_dim <= 256 && !c.name.starts_with("long");
    passes(&Flash { bug: None }, &CORPUS.iter().filter(small).cloned().collect::<Vec<_>>());
    passes(&Flash { bug: None }, &random_cases(4, 60));
}

/// Cases among which every bug shows: those of one dtype whose names contain one of the parts.
fn some_cases(dtype: DType, parts: &[&str]) -> Vec<Case> {
    let wanted = |c: &Case| c.problem.dtype == dtype && parts.iter().any(|part| c.name.contains(part));
    CORPUS.iter().filter(|c| wanted(c)).cloned().collect()
}

#[test]
fn every_bug_is_found() {
    // The bug, where it must show, in which output (empty: instead of results), and where it must not.
    let bugs: [(Bug, &[&str], &str, &[&str]); 16] = [
        (Bug::CausalOffByOne, &["size/17x31/causal"], "o", &["size/17x31/full"]),
        (Bug::NoScale, &["head-dim/64-64/full"], "o", &["head-dim/1-1/full"]),
        (Bug::NanLeaks, &["not-finite/v/causal"], "o", &["size/31x33/causal"]),
        (Bug::LastRowUnwritten, &["size/17x31/full", "not-finite/k/window"], "o", &[]),
        (Bug::WritesPadding, &["layout/Padded"], "-", &["layout/Dense"]),
        (Bug::Base2Lse, &["size/17x31/full"], "lse", &[]),
        (Bug::NoRescale, &["size/65x127/full"], "o", &["size/31x33/causal/none"]),
        (Bug::DropoutNotScaled, &["dropout/0.5"], "o", &["dropout/0/"]),
        (Bug::WrongKvHead, &["together/chunked"], "o", &["decode/33/3-3"]),
        (Bug::SinkForgotten, &["sinks/full"], "lse", &["size/17x31/full"]),
        (Bug::GroupNotSummed, &["decode/33/8-2"], "dk", &["decode/33/3-3"]),
        (Bug::DlseForgotten, &["layout/Dense"], "dq", &["dropout/0.1/f"]),
        (Bug::SlowlyWrong, &["size/113x203/full", "size/129x191/full"], "o", &[]),
        (Bug::SaysZeroForNothing, &["mask/nothing"], "lse", &["size/17x31/full"]),
        (Bug::TableGradientTwice, &["score-mod/bias-learned"], "dtables", &["score-mod/softcap"]),
        (Bug::Panics, &["size/1x1/full"], "-", &[]),
    ];
    for dtype in [DType::F32, DType::Bf16] {
        for (bug, shows, tensor, hides) in &bugs {
            let report = Runner::new().run(&Flash { bug: Some(*bug) }, &some_cases(dtype, shows));
            assert!(report.cases > 0, "{bug:?}");
            let found = report.failures.iter().any(|f| f.tensor == *tensor);
            assert!(found, "{bug:?} in {dtype} went unnoticed: {report}");
            let report = Runner::new().run(&Flash { bug: Some(*bug) }, &some_cases(dtype, hides));
            assert_eq!(report.failed, 0, "{bug:?} {report}");
        }
    }
}

/// Has no dropout yet.
struct Partial;

impl Executor for Partial {
    fn device(&self) -> String {
        "partial".to_owned()
    }

    fn forward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<T>,
        outputs: &mut Outputs<T>,
    ) -> Result<(), ExecError> {
        if problem.dropout.is_some() {
            return Err(ExecError::Unsupported { feature: "dropout".to_owned() });
        }
        Flash { bug: None }.forward(problem, inputs, outputs)
    }

    fn backward<T: Element>(
        &self,
        _: &AttentionProblem,
        _: &Inputs<T>,
        _: &GradInputs<T>,
        _: &mut Gradients<T>,
    ) -> Result<(), ExecError> {
        Err(ExecError::Failed("out of memory".to_owned()))
    }
}

#[test]
fn skips_and_failures_are_reported() {
    let mut cases = some_cases(DType::F32, &["dropout/0.1", "decode/300/3-3", "size/1x1/full"]);
    cases[0].problem.dtype = DType::F64;
    let mut calls = Vec::new();
    let runner = Runner::new().on_progress(|done, total, name| calls.push((done, total, name.to_owned())));
    let report = runner.run(&Partial, &cases);
    assert_eq!((report.cases, report.passed, report.failed, report.skipped), (4, 1, 0, 3), "{report}");
    assert_eq!(calls.len(), 5);
    assert_eq!((calls[0].0, calls[0].1, calls[4].0, &calls[4].2[..]), (0, 4, 4, ""));
    let report = Runner::new().filter("size/17x31").run(&Partial, &CORPUS);
    assert_eq!((report.cases, report.failed), (6, 6));
    let json = serde_json::to_value(&report).unwrap();
    for key in ["device", "cases", "passed", "failed", "skipped", "failures", "skips", "worst"] {
        assert!(json.get(key).is_some(), "{key}");
    }
    assert_eq!(json["failures"][0]["detail"], "out of memory");
    assert!(report.to_string().contains("FAILED size/17x31/full/f32: -: error inf"));
    // No case is no success.
    assert!(!Runner::new().filter("nonesuch").run(&StandardExecutor, &CORPUS).all_passed());
    assert!(Runner::new().filter("size/17x31").run(&StandardExecutor, &CORPUS).all_passed());
}
