//! Whether results that are about to be timed are right. `flashattn check` is the thorough one; here it is one KV
//! head and the query heads that share it, whole, against the f64 oracle: attention does not look across heads.

use crate::attention::{Given, Layout, Results};
use crate::options::Pass;
use anyhow::{Result, ensure};
use flashattn_spec::{AttentionProblem, DType, Element, View, reference};

/// Largest error of any result over the largest entry of that result.
///
/// # Errors
/// If it is more than a few roundings.
pub fn verify<T: Element>(
    p: &AttentionProblem,
    given: &Given<T>,
    results: &Results<T>,
    pass: Pass,
) -> Result<f64> {
    let (batch, kv_head) = (p.batch - 1, p.heads_kv / 2);
    let heads = kv_head * p.group()..(kv_head + 1) * p.group();
    let part = AttentionProblem { batch: 1, heads_q: p.group(), heads_kv: 1, ..p.clone() };

    let rows = |view: View<T>, heads: std::ops::Range<usize>| -> Vec<T> {
        let [_, n, ..] = view.shape();
        (0..n).flat_map(|i| heads.clone().flat_map(move |h| view.row(batch, i, h).to_vec())).collect()
    };
    let view = |data, shape| given.layout.view(data, shape);
    let inputs = given.inputs(p)?;
    let kv = kv_head..kv_head + 1;
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
        let start = (batch * p.heads_q + heads.start) * p.seqlen_q;
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
        // In 16 bits the probabilities and their gradients are rounded too; in f32 sums of thousands of terms are.
        let allowed = if dtype == DType::F32 { 2e-5 } else { 8.0 * dtype.epsilon() };
        let size = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let mut errors =
            got.iter().zip(&expected).map(|(g, e)| if g == e { 0.0 } else { (g - e).abs() / size });
        // A NaN is an error too, so no plain maximum.
        let error = errors.clone().fold(0.0f64, f64::max);
        ensure!(
            errors.all(|e| e <= allowed) && got.len() == expected.len(),
            "{name} is wrong: error {error:.1e} of the largest entry, allowed {allowed:.1e}; run `flashattn check`"
        );
        worst = worst.max(error);
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flashattn_cpu::plan::{Options, Plan};
    use flashattn_spec::mask::Mask;

    #[test]
    fn finds_what_is_wrong_and_only_that() {
        for layout in [Layout::Bnhd, Layout::Bhnd] {
            let mut p = AttentionProblem::new(2, 77, 6, 24, DType::F32);
            (p.heads_kv, p.seqlen_k, p.mask) = (3, 91, Mask::Causal);
            let given = Given::<f32>::random(&p, layout, 5);
            let mut results = Results::new(&p, true);
            let mut plan = Plan::new(&p, Options::default()).unwrap();
            results.run(&p, &given, Pass::FwdBwd, &mut plan).unwrap();
            assert!(verify(&p, &given, &results, Pass::FwdBwd).unwrap() < 1e-5);
            let wrong = |change: &dyn Fn(&mut Results<f32>), name: &str| {
                let mut changed = results.clone();
                change(&mut changed);
                let error = verify(&p, &given, &changed, Pass::FwdBwd).unwrap_err().to_string();
                assert!(error.starts_with(name), "{error}");
            };
            wrong(&|r| r.o.iter_mut().for_each(|x| *x *= 1.001), "o is wrong");
            wrong(&|r| r.lse.iter_mut().for_each(|x| *x += 0.01), "lse is wrong");
            wrong(&|r| r.dk.iter_mut().for_each(|x| *x = f32::NAN), "dk is wrong");
        }
    }
}
