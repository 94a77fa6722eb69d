use super::*;
use crate::element::DType;
use crate::expr::{Env, Evaluator};
use proptest::prelude::*;
use proptest::sample::select;

/// What the named masks mean, element by element and without expressions.
pub(crate) fn is_visible(mask: &Mask, problem: &AttentionProblem, [batch, head, q, kv]: [usize; 4]) -> bool {
    let s = problem.sequence(batch);
    let diagonal = (q + s.seqlen_k) as i64 - s.seqlen_q as i64;
    let key = kv as i64;
    match mask {
        Mask::Full => true,
        Mask::Causal => key <= diagonal,
        Mask::Local { left, right } => {
            left.is_none_or(|l| diagonal - key <= i64::try_from(l).unwrap_or(i64::MAX))
                && right.is_none_or(|r| key - diagonal <= i64::try_from(r).unwrap_or(i64::MAX))
        }
        Mask::Chunked { size } => {
            // The diagonal is negative left of the first key; there is no key in such a chunk.
            diagonal >= 0 && diagonal as usize / size == kv / size
        }
        Mask::PrefixLm { prefix } => kv < prefix[batch.min(prefix.len() - 1)] || key <= diagonal,
        Mask::Document { q_ids, kv_ids } => q_ids[s.q_start + q] == kv_ids[s.kv_start + kv],
        Mask::Block(mask) => {
            let (block_q, block_kv) = mask.block_size();
            mask.is_visible(batch, head, q / block_q, kv / block_kv).unwrap()
        }
        Mask::Custom(traced) => {
            let value = traced.expr.eval(&env(problem, [batch, head, q, kv]), &traced.tables, 0.0).unwrap();
            value == Value::Bool(true)
        }
        Mask::And(masks) => masks.iter().all(|m| is_visible(m, problem, [batch, head, q, kv])),
        Mask::Or(masks) => masks.iter().any(|m| is_visible(m, problem, [batch, head, q, kv])),
    }
}

fn env(problem: &AttentionProblem, [batch, head, q, kv]: [usize; 4]) -> Env {
    let s = problem.sequence(batch);
    let [batch, head, q, kv] = [batch, head, q, kv].map(|x| x as i32);
    let [seqlen_q, seqlen_k] = [s.seqlen_q, s.seqlen_k].map(|x| x as i32);
    let [q_start, kv_start] = [s.q_start, s.kv_start].map(|x| x as i32);
    Env { batch, head, q, kv, seqlen_q, seqlen_k, q_start, kv_start }
}

/// A small problem without a mask: dense or packed, with empty sequences and unequal lengths.
pub(crate) fn problem() -> impl Strategy<Value = AttentionProblem> {
    let lengths = prop_oneof![1 => Just(0usize), 9 => 0..60usize];
    let sequences = prop::collection::vec((lengths.clone(), lengths), 1..4);
    (sequences, 1..4usize, any::<bool>()).prop_map(|(sequences, heads, packed)| {
        let mut problem = AttentionProblem::new(sequences.len(), sequences[0].0, heads, 8, DType::F32);
        problem.seqlen_k = sequences[0].1;
        if packed {
            let offsets = |lengths: &mut dyn Iterator<Item = usize>| -> Vec<i32> {
                let ends = lengths.scan(0, |end, n| {
                    *end += n as i32;
                    Some(*end)
                });
                std::iter::once(0).chain(ends).collect()
            };
            let q = offsets(&mut sequences.iter().map(|s| s.0));
            let k = offsets(&mut sequences.iter().map(|s| s.1));
            problem = problem.with_varlen(&q, &k);
        }
        problem
    })
}

/// Ids of documents that are runs of tokens; what the runs are called is arbitrary, but no two alike.
fn documents(tokens: usize, shortest: usize) -> impl Strategy<Value = Arc<[i32]>> {
    let lengths = prop::collection::vec(shortest..30, tokens);
    let names = Just((-3..tokens as i32).collect::<Vec<_>>());
    (lengths, prop_oneof![names.clone(), names.prop_shuffle()]).prop_map(move |(lengths, names)| {
        let runs = lengths.into_iter().zip(names);
        runs.flat_map(|(length, name)| std::iter::repeat_n(name, length)).take(tokens).collect()
    })
}

/// A named mask that fits the problem.
pub(crate) fn named(problem: &AttentionProblem) -> impl Strategy<Value = Mask> + use<> {
    let (b, h, sq, sk) = (problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_k);
    let side = || prop_oneof![1 => Just(None), 1 => Just(Some(usize::MAX)), 6 => (0..50usize).prop_map(Some)];
    let block = (select(vec![1, b]), select(vec![1, h]), 1..20usize, 1..20usize, any::<u64>());
    prop_oneof![
        Just(Mask::Full),
        Just(Mask::Causal),
        (side(), side()).prop_map(|(left, right)| Mask::Local { left, right }),
        prop_oneof![9 => 1..40usize, 1 => Just(usize::MAX)].prop_map(Mask::chunked),
        prop::collection::vec(0..80usize, 1).prop_map(|p| Mask::prefix_lm(&p)),
        prop::collection::vec(0..80usize, b).prop_map(|p| Mask::prefix_lm(&p)),
        documents(problem.total_q().max(problem.total_k()), 1).prop_map({
            // Self-attention, but for the tokens that one side has more.
            let (q, k) = (problem.total_q(), problem.total_k());
            move |ids| Mask::Document { q_ids: ids[..q].into(), kv_ids: ids[..k].into() }
        }),
        (documents(problem.total_q(), 4), documents(problem.total_k(), 4))
            .prop_map(|(q_ids, kv_ids)| Mask::Document { q_ids, kv_ids }),
        block.prop_map(move |(b, h, block_q, block_kv, seed)| {
            let shape = [b, h, sq.div_ceil(block_q), sk.div_ceil(block_kv)];
            let mut state = seed | 1;
            let visible = move |_, _, _, _| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                state >> 63 == 0
            };
            Mask::Block(BlockMask::from_fn(shape, block_q, block_kv, visible).unwrap())
        }),
    ]
}

/// A document mask without any order in its ids.
fn scattered(problem: &AttentionProblem) -> impl Strategy<Value = Mask> + use<> {
    let ids = |tokens| prop::collection::vec(0..5i32, tokens);
    (ids(problem.total_q()), ids(problem.total_k()))
        .prop_map(|(q, k)| Mask::Document { q_ids: q.into(), kv_ids: k.into() })
}

/// Conditions that no named mask expresses.
pub(crate) fn custom() -> impl Strategy<Value = Mask> {
    let slopes = Table::per_head(vec![0.5, 1.5, 0.1]).unwrap();
    select(vec![
        Mask::custom(|ix| ((ix.q * 3 + ix.kv * 5) % 7).lt(3)).unwrap(),
        Mask::custom(|ix| (ix.kv % 4).eq(0) | ix.kv.ge(ix.diagonal() - 3)).unwrap(),
        Mask::custom(|ix| (ix.kv + ix.head * 5).le(ix.q + ix.batch * 2)).unwrap(),
        Mask::custom(|ix| (ix.q % 2).ne(ix.kv % 2)).unwrap(),
        Mask::custom(|ix| !ix.kv.eq(ix.q)).unwrap(),
        Mask::custom(|ix| ((ix.q - ix.kv).abs().to_float() * slopes[ix.head]).lt(9.7)).unwrap(),
    ])
}

/// Named masks, custom ones, and what `and` and `or` make of them.
pub(crate) fn any_mask(problem: &AttentionProblem) -> impl Strategy<Value = Mask> + use<> {
    let leaf = prop_oneof![6 => named(problem), 2 => custom(), 1 => scattered(problem)];
    leaf.prop_recursive(2, 6, 3, |inner| {
        let list = prop::collection::vec(inner, 1..4).boxed();
        prop_oneof![list.clone().prop_map(Mask::And), list.prop_map(Mask::Or)]
    })
}

pub(crate) fn with_mask<S: Strategy<Value = Mask>>(
    mask: impl Fn(&AttentionProblem) -> S,
) -> impl Strategy<Value = AttentionProblem> {
    problem().prop_flat_map(move |problem| {
        mask(&problem).prop_map(move |mask| AttentionProblem { mask, ..problem.clone() })
    })
}

proptest! {
    #[test]
    fn expressions_mean_what_the_masks_say(problem in with_mask(any_mask)) {
        problem.validate().unwrap();
        let Some(traced) = problem.mask.lower().unwrap() else {
            // Nothing to evaluate: the element-wise meaning must be "visible" throughout.
            for b in 0..problem.batch {
                let s = problem.sequence(b);
                for (q, kv) in (0..s.seqlen_q).flat_map(|q| (0..s.seqlen_k).map(move |kv| (q, kv))) {
                    prop_assert!(is_visible(&problem.mask, &problem, [b, 0, q, kv]));
                }
            }
            return Ok(());
        };
        let mut evaluator = Evaluator::<f64>::new(&traced.expr, &traced.tables).unwrap();
        for b in 0..problem.batch {
            let s = problem.sequence(b);
            for h in 0..problem.heads_q {
                for (q, kv) in (0..s.seqlen_q).flat_map(|q| (0..s.seqlen_k).map(move |kv| (q, kv))) {
                    let place = [b, h, q, kv];
                    let got = evaluator.eval(&env(&problem, place), 0.0);
                    prop_assert_eq!(got, Value::Bool(is_visible(&problem.mask, &problem, place)), "{:?}", place);
                }
            }
        }
    }
}

fn text(mask: Mask) -> String {
    mask.lower().unwrap().unwrap().to_string()
}

#[test]
fn lowered() {
    assert_eq!(text(Mask::causal()), "kv <= q + seqlen_k - seqlen_q");
    assert_eq!(text(Mask::causal().and(Mask::full()).and(Mask::And(vec![]))), text(Mask::causal()));
    for all in [
        Mask::Full,
        Mask::Local { left: None, right: None },
        Mask::window(usize::MAX, MAX_INDEX),
        Mask::causal().or(Mask::full()),
        Mask::custom(|_| true.into()).unwrap(),
    ] {
        assert!(all.lower().unwrap().is_none(), "{all:?}");
    }
}

#[test]
fn kernels_are_keyed_by_the_condition_and_not_by_its_data() {
    let key = |mask: &Mask| mask.lower().unwrap().unwrap().expr;
    assert_eq!(key(&Mask::document(&[0, 0, 1])), key(&Mask::document(&[4, 2, 2, 2])));
    assert_eq!(key(&Mask::document(&[0])), key(&Mask::document(&[])));
    assert_eq!(key(&Mask::prefix_lm(&[3])), key(&Mask::prefix_lm(&[8])));
    assert_eq!(
        key(&Mask::causal().and(Mask::document(&[3]))),
        key(&Mask::causal().and(Mask::document(&[4, 5])))
    );
    assert_ne!(key(&Mask::chunked(8)), key(&Mask::chunked(9)));
    assert_eq!(Mask::document(&[0, 1]).lower().unwrap().unwrap().tables.len(), 1, "shared by q and kv");
}

#[test]
fn wrong_masks_name_what_is_wrong() {
    let refuse = |mask: Mask, text: &str| {
        let mut problem = AttentionProblem::new(2, 16, 4, 8, DType::F32);
        problem.seqlen_k = 24;
        problem.mask = mask;
        let error = problem.validate().unwrap_err().to_string();
        assert_eq!(error, format!("mask: {text}"));
    };
    refuse(Mask::chunked(0), "chunk size is 0, expected at least 1");
    refuse(Mask::causal().and(Mask::chunked(0)), "chunk size is 0, expected at least 1");
    refuse(Mask::prefix_lm(&[1, 2, 3]), "prefix has 3 entries, expected 1 or batch = 2");
    refuse(Mask::document(&[0; 32]), "kv_ids has 32 entries, expected total_k = 48");
    refuse(Mask::document(&[0; 16]), "q_ids has 16 entries, expected total_q = 32");
    refuse(Mask::Or(vec![]), "the `or` of no masks hides everything; expected at least one mask");
    refuse(
        Mask::Block(BlockMask::new([1, 2, 2, 3], 8, 8, &[1; 12]).unwrap()),
        "block mask has shape [1, 2, 2, 3], expected [2, 4, 2, 3] (batch and heads_q may be 1) \
         for blocks of 8 queries x 8 keys",
    );
    let score = Expr::trace(|s, _| s * 2.0).unwrap();
    refuse(Mask::Custom(score), "a custom mask must give a Bool, got float");
    let mut missing = Expr::trace_mask(|ix| ix.kv.gt(table(&[1], vec![3]).unwrap()[ix.q])).unwrap();
    missing.tables.clear();
    refuse(Mask::Custom(missing), "the expression takes 1 tables, got 0");

    let error = BlockMask::new([1, 1, 2, 3], 8, 8, &[1; 5]).unwrap_err();
    assert_eq!(error.to_string(), "block mask has 5 entries, expected those of shape [1, 1, 2, 3]");
    assert_eq!(BlockMask::new([1; 4], 0, 8, &[1]), Err(MaskError::Zero { name: "block_q" }));
    assert!(BlockMask::new([usize::MAX, 2, 1, 1], 8, 8, &[1]).is_err(), "no overflow");
    assert!(matches!(Mask::custom(|ix| ix.q + 1), Err(MaskError::Expr(ExprError::Type { .. }))));
}
