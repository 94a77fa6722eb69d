//! Every mask and score mod, made to fit a problem; corpus and random cases choose from these lists.

use crate::expr::Table;
use crate::mask::{BlockMask, Mask};
use crate::problem::AttentionProblem;
use crate::score_mod::ScoreMod;
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::StandardNormal;

/// Names and masks. All are valid for the problem.
pub(super) fn masks(p: &AttentionProblem) -> Vec<(&'static str, Mask)> {
    let local = |left, right| Mask::Local { left, right };
    // Documents of 1 to 40 tokens, some of them of keys or queries only.
    let ids = |n: usize, step: usize| (0..n).map(|i| ((i * step) / 20) as i32).collect::<Vec<i32>>();
    let documents = Mask::Document { q_ids: ids(p.total_q(), 1).into(), kv_ids: ids(p.total_k(), 1).into() };
    let uneven = Mask::Document { q_ids: ids(p.total_q(), 2).into(), kv_ids: ids(p.total_k(), 3).into() };
    let blocks = |bq: usize, bk: usize, batch: usize, heads: usize| {
        let shape = [batch, heads, p.seqlen_q.div_ceil(bq), p.seqlen_k.div_ceil(bk)];
        let visible = |b, h, m, n| (b * 7 + h * 5 + m * 3 + n * n) % 3 != 0;
        Mask::Block(BlockMask::from_fn(shape, bq, bk, visible).expect("block sizes are not 0"))
    };
    let per_sequence: Vec<usize> = (0..p.batch).map(|b| 3 + 17 * b).collect();
    let custom = |m: Result<Mask, _>| m.expect("the condition is a Bool");
    let strided = custom(Mask::custom(|ix| (ix.q % 3).eq(0) | ix.kv.gt(ix.diagonal() - 9)));
    let by_head = custom(Mask::custom(|ix| ((ix.kv + ix.head * 5) % 7).lt(ix.head + 1)));
    let nothing = custom(Mask::custom(|ix| ix.kv.lt(0)));
    let halves = custom(Mask::custom(|ix| ix.kv.ge(ix.seqlen_k / 2).eq(ix.q.ge(ix.seqlen_q / 2))));
    vec![
        ("full", Mask::Full),
        ("causal", Mask::Causal),
        ("window", Mask::window(20, 7)),
        ("window-left", local(Some(33), None)),
        ("window-right", local(None, Some(5))),
        ("window-causal", Mask::window(64, 0)),
        ("diagonal", Mask::window(0, 0)),
        ("chunked", Mask::chunked(24)),
        ("chunked-causal", Mask::chunked(50).and(Mask::Causal)),
        ("prefix-lm", Mask::prefix_lm(&[11])),
        ("prefix-lm-each", if p.batch == 0 { Mask::prefix_lm(&[2]) } else { Mask::prefix_lm(&per_sequence) }),
        ("document", documents.clone()),
        ("document-causal", documents.and(Mask::Causal)),
        ("document-uneven", uneven),
        ("blocks", blocks(16, 32, 1, 1)),
        ("blocks-each", blocks(13, 10, p.batch.max(1), p.heads_q).and(Mask::window(100, 60))),
        ("custom-strided", strided),
        ("custom-by-head", by_head),
        ("custom-halves", halves),
        ("window-or-prefix", Mask::window(9, 0).or(Mask::prefix_lm(&[6]).and(Mask::chunked(70)))),
        ("nothing", nothing),
    ]
}

/// Names and score mods; some learn tables, whose values come from `seed`. All are valid for the problem.
pub(super) fn score_mods(p: &AttentionProblem, seed: u64) -> Vec<(&'static str, ScoreMod)> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut table = |dims: &[usize]| {
        let data = (0..dims.iter().product()).map(|_| rng.sample::<f32, _>(StandardNormal)).collect();
        Table::f32(dims, data).expect("dimensions are at least 1 and fit the data")
    };
    let learned = |t: Table| t.with_grad().expect("a table of floats");
    let custom = |m: Result<ScoreMod, _>| m.expect("the function gives a Float");
    let (b, h, m, n) = (p.batch.max(1), p.heads_q, p.seqlen_q.max(1), p.seqlen_k.max(1));
    // A bias must have the problem's dimensions or 1.
    let slopes: Vec<f32> = (0..h).map(|i| 0.5f32.powf(8.0 * (i + 1) as f32 / h as f32)).collect();
    let alibi = || ScoreMod::alibi(&slopes).expect("one slope for each head");
    let relative = learned(table(&[h, 65]));
    let relative = custom(ScoreMod::custom(|s, ix| {
        s + relative[(ix.head, (ix.diagonal() - ix.kv).min(32).max(-32) + 32)]
    }));
    let holes: Vec<f32> =
        (0..m * n).map(|i| if i % 5 == 0 || (i / n) % 7 == 3 { f32::NEG_INFINITY } else { 0.25 }).collect();
    let holes = Table::f32(&[1, 1, m, n], holes).expect("as many elements as m · n");
    let curve =
        custom(ScoreMod::custom(|s, ix| s + (s * 0.5).abs().min(1.5) * (ix.q - ix.kv).to_float() * 0.01));
    vec![
        ("none", ScoreMod::None),
        ("softcap", ScoreMod::softcap(5.0)),
        ("alibi", alibi()),
        ("alibi-learned", ScoreMod::Alibi(learned(table(&[h])))),
        ("alibi-each-learned", ScoreMod::Alibi(learned(table(&[b, h])))),
        ("bias", ScoreMod::bias(table(&[1, h, m, n]))),
        ("bias-learned", ScoreMod::bias(learned(table(&[1, h, m, n])))),
        ("bias-keys-learned", ScoreMod::bias(learned(table(&[b, 1, 1, n])))),
        ("bias-queries-learned", ScoreMod::bias(learned(table(&[1, h, m, 1])))),
        ("bias-one-learned", ScoreMod::bias(learned(table(&[1, 1, m, n])))),
        ("bias-minus-infinity", ScoreMod::bias(holes)),
        ("relative-learned", relative),
        ("curve", curve.clone()),
        ("alibi-softcap", alibi().then(ScoreMod::softcap(8.0))),
        (
            "chain-learned",
            ScoreMod::softcap(6.0)
                .then(ScoreMod::bias(learned(table(&[1, 1, m, n]))))
                .then(curve)
                .then(ScoreMod::Alibi(learned(table(&[h])))),
        ),
    ]
}
