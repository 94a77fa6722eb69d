//! Whether results that are about to be timed are right. `flashattn check` is the thorough one. Here it is one KV head and the
//! query heads that share it, whole, against the f64 oracle, as attention does not look across heads; everything where scores
//! depend on where they are. Of results too large for that, some rows ([`verify_rows`]).

use super::grid::Cell;
use crate::attention::{Given, Layout, Results};
use anyhow::{Result, ensure};
use flashattn_spec::reference::{self, Row, forward_rows};
use flashattn_spec::{AttentionProblem, DType, Element, View};
use rayon::prelude::*;
use std::ops::Range;

/// Largest error of any result over the largest entry of that result.
///
/// # Errors
/// If it is more than a few roundings.
pub fn verify<T: Element>(cell: &Cell, given: &Given<T>, results: &Results<T>) -> Result<f64> {
    let (p, pass) = (&cell.problem, cell.pass);
    let (batches, kv) = if cell.depends_on_place() {
        (0..p.batch, 0..p.heads_kv)
    } else {
        (p.batch - 1..p.batch, p.heads_kv / 2..p.heads_kv / 2 + 1)
    };
    let heads = kv.start * p.group()..kv.end * p.group();
    let (batch, heads_q, heads_kv) = (batches.len(), heads.len(), kv.len());
    let part = AttentionProblem { batch, heads_q, heads_kv, ..p.clone() };

    let rows = |view: View<T>, heads: Range<usize>| -> Vec<T> {
        let [_, n, ..] = view.shape();
        let places = batches.clone().flat_map(|b| (0..n).map(move |i| (b, i)));
        places.flat_map(|(b, i)| heads.clone().flat_map(move |h| view.row(b, i, h).to_vec())).collect()
    };
    let view = |data, shape| given.layout.view(data, shape);
    let inputs = given.inputs(p)?;
    let d_o = if pass.has_backward() { rows(given.d_o(p)?, heads.clone()) } else { Vec::new() };
    let slice = Given {
        layout: Layout::Bnhd,
        q: rows(inputs.q, heads.clone()),
        k: rows(inputs.k, kv.clone()),
        v: rows(inputs.v, kv.clone()),
        d_o,
        ..Given::default()
    };
    let inputs = slice.inputs(&part)?;
    let wide = |x: Vec<T>| -> Vec<f64> { x.into_iter().map(Element::to_f64).collect() };
    let mut all = Vec::new();
    if pass.has_forward() {
        let exact = reference::forward(&part, &inputs)?;
        // Of one sequence the heads are adjacent, and of several they are all.
        let start = (batches.start * p.heads_q + heads.start) * p.seqlen_q;
        let lse = results.lse[start..start + exact.lse.len()].iter().map(|&x| x.into()).collect();
        all.push(("o", wide(rows(view(&results.o, p.o_shape())?, heads.clone())), exact.o, T::DTYPE));
        all.push(("lse", lse, exact.lse, DType::F32));
    }
    if pass.has_backward() {
        let exact = reference::backward(&part, &inputs, slice.d_o(&part)?, None)?;
        all.push(("dq", wide(rows(view(&results.dq, p.q_shape())?, heads)), exact.dq, T::DTYPE));
        all.push(("dk", wide(rows(view(&results.dk, p.k_shape())?, kv.clone())), exact.dk, T::DTYPE));
        all.push(("dv", wide(rows(view(&results.dv, p.v_shape())?, kv)), exact.dv, T::DTYPE));
    }
    let mut worst = 0.0f64;
    for (name, got, expected, dtype) in all {
        worst = worst.max(compare(name, &got, &expected, dtype)?);
    }
    Ok(worst)
}

/// Largest error over the largest entry.
fn compare(name: &str, got: &[f64], expected: &[f64], dtype: DType) -> Result<f64> {
    // In 16 bits the probabilities and their gradients are rounded too; in f32 sums of thousands of terms are.
    let allowed = if dtype == DType::F32 { 2e-5 } else { 8.0 * dtype.epsilon() };
    let size = expected.iter().filter(|x| x.is_finite()).fold(0.0f64, |m, x| m.max(x.abs()));
    let mut errors = got.iter().zip(expected).map(|(g, e)| if g == e { 0.0 } else { (g - e).abs() / size });
    // A NaN is an error too, so no plain maximum.
    let error = errors.clone().fold(0.0f64, f64::max);
    ensure!(
        errors.all(|e| e <= allowed) && got.len() == expected.len(),
        "{name} is wrong: error {error:.1e} of the largest entry, allowed {allowed:.1e}; run `flashattn check`"
    );
    Ok(error)
}

/// Rows that [`verify_rows`] looks at.
pub const ROWS: usize = 24;

/// As [`verify`], of o and lse, by some rows over all sequences and heads: the first, the last, and others between; and every
/// element of both has been written, if they were NaN before.
///
/// # Errors
/// As [`verify`].
pub fn verify_rows<T: Element>(p: &AttentionProblem, given: &Given<T>, results: &Results<T>) -> Result<f64> {
    ensure!(
        !results.o.iter().any(|x| x.to_f32().is_nan()),
        "o has elements that are NaN or were not written"
    );
    ensure!(!results.lse.iter().any(|x| x.is_nan()), "lse has elements that are NaN or were not written");
    let [_, n, heads, _] = p.o_shape();
    // Steps that have no divisor in common with usual sizes.
    let place = |i: usize| match i {
        0 => [0, 0, 0],
        1 => [p.batch - 1, heads - 1, n - 1],
        _ => [i * 7919 % p.batch, i * 104_729 % heads, i * 15_485_863 % n],
    };
    let places: Vec<[usize; 3]> = (0..ROWS).map(place).collect();
    let inputs = given.inputs(p)?;
    let rows = places.par_iter().map(|&place| Ok(forward_rows(p, &inputs, &[place])?));
    let expected: Vec<Row> = rows.collect::<Result<Vec<_>>>()?.concat();
    let o = given.layout.view(&results.o, p.o_shape())?;
    let wide = |row: &[T]| row.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
    let got: Vec<f64> = places.iter().flat_map(|&[b, head, i]| wide(o.row(b, i, head))).collect();
    let exact: Vec<f64> = expected.iter().flat_map(|row| row.o.iter().copied()).collect();
    let lse: Vec<f64> =
        places.iter().map(|&[b, head, i]| results.lse[(b * heads + head) * n + i].into()).collect();
    let exact_lse: Vec<f64> = expected.iter().map(|row| row.lse).collect();
    Ok(compare("o", &got, &exact, T::DTYPE)?.max(compare("lse", &lse, &exact_lse, DType::F32)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Pass;
    use flashattn_cpu::plan::{Options, Plan};
    use flashattn_spec::mask::Mask;

    fn cell(problem: AttentionProblem, pass: Pass) -> Cell {
        Cell { problem, pass, causal: false, mods: String::new() }
    }

    #[test]
    fn finds_what_is_wrong_and_only_that() {
        for layout in [Layout::Bnhd, Layout::Bhnd] {
            let mut p = AttentionProblem::new(2, 77, 6, 24, DType::F32);
            (p.heads_kv, p.seqlen_k, p.mask) = (3, 91, Mask::Causal);
            let given = Given::<f32>::random(&p, layout, 5);
            let mut results = Results::new(&p, true);
            let mut plan = Plan::new(&p, Options::default()).unwrap();
            results.run(&p, &given, Pass::FwdBwd, &mut plan).unwrap();
            let cell = cell(p.clone(), Pass::FwdBwd);
            assert!(verify(&cell, &given, &results).unwrap() < 1e-5);
            assert!(verify_rows(&p, &given, &results).unwrap() < 1e-5);
            let wrong = |change: &dyn Fn(&mut Results<f32>), name: &str| {
                let mut changed = results.clone();
                change(&mut changed);
                let error = verify(&cell, &given, &changed).unwrap_err().to_string();
                assert!(error.starts_with(name), "{error}");
                let rows = verify_rows(&p, &given, &changed).err().map(|error| error.to_string());
                assert_eq!(rows.is_some_and(|text| text.starts_with(name)), !name.starts_with('d'));
            };
            wrong(&|r| r.o.iter_mut().for_each(|x| *x *= 1.001), "o is wrong");
            wrong(&|r| r.lse.iter_mut().for_each(|x| *x += 0.01), "lse is wrong");
            // One element that was not written is found wherever it is.
            let mut changed = results.clone();
            changed.o[777] = f32::NAN;
            assert!(verify_rows(&p, &given, &changed).unwrap_err().to_string().starts_with("o has"));
            wrong(&|r| r.dk.iter_mut().for_each(|x| *x = f32::NAN), "dk is wrong");
        }
    }

    #[test]
    fn heads_that_differ_by_place_are_all_looked_at() {
        let mut p = AttentionProblem::new(2, 31, 4, 8, DType::F32);
        p.score_mod = flashattn_spec::score_mod::ScoreMod::alibi(&[0.1, 0.2, 0.3, 0.4]).unwrap();
        let given = Given::<f32>::random(&p, Layout::Bnhd, 6);
        let mut results = Results::new(&p, true);
        results.run(&p, &given, Pass::FwdBwd, &mut Plan::new(&p, Options::default()).unwrap()).unwrap();
        assert!(verify(&cell(p.clone(), Pass::FwdBwd), &given, &results).unwrap() < 1e-5);
        results.dv[3] += 1.0;
        assert!(verify(&cell(p, Pass::FwdBwd), &given, &results).is_err());
    }
}
