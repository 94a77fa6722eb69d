//! The fixed cases. Sizes are ragged and pairwise distinct, so that no mix-up of two of them goes unnoticed, and lie
//! around the edges of blocks. Groups are named for what they are about; in each, everything else takes turns.

use super::options::{masks, score_mods};
use super::{Case, InputKind, Layout, Place};
use crate::element::DType;
use crate::mask::Mask;
use crate::problem::{AttentionProblem, Dropout};
use crate::score_mod::ScoreMod;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// (head_dim, head_dim_v).
const HEAD_DIMS: [(usize, usize); 16] = [
    (1, 1),
    (2, 3),
    (8, 8),
    (40, 40),
    (59, 59),
    (64, 64),
    (80, 33),
    (96, 96),
    (111, 111),
    (128, 128),
    (128, 59),
    (192, 192),
    (192, 128),
    (256, 256),
    (512, 512),
    (576, 512),
];

/// (heads_q, heads_kv): MHA, GQA, MQA.
const HEADS: [(usize, usize); 6] = [(2, 2), (4, 2), (3, 1), (6, 2), (1, 1), (5, 5)];

/// (seqlen_q, seqlen_k).
const SIZES: [(usize, usize); 20] = [
    (1, 1),
    (2, 15),
    (15, 2),
    (17, 31),
    (31, 33),
    (33, 17),
    (63, 65),
    (65, 127),
    (97, 129),
    (127, 97),
    (129, 191),
    (191, 63),
    (113, 203),
    (257, 113),
    (64, 64),
    (128, 256),
    (16, 300),
    (300, 257),
    (239, 1),
    (5, 511),
];

/// Takes turns with the options that a group is not about.
#[derive(Default)]
pub(super) struct Builder {
    pub cases: Vec<Case>,
    turn: usize,
}

impl Builder {
    /// The next of a list.
    fn next<T: Copy>(&mut self, list: &[T]) -> T {
        self.turn += 1;
        list[self.turn % list.len()]
    }

    /// A problem with the next sizes of moderate length.
    fn problem(&mut self, dtype: DType) -> AttentionProblem {
        let sizes = self.next(&[(113, 203), (65, 127), (129, 191), (97, 129), (191, 63), (33, 70)]);
        let (heads, dims) = (self.next(&HEADS[..4]), self.next(&[(64, 64), (40, 40), (128, 128), (59, 24)]));
        problem(dtype, sizes, heads, dims)
    }

    /// A packed problem with empty sequences among others.
    fn packed(&mut self, dtype: DType) -> AttentionProblem {
        let q = self.next(&[[0, 37, 37, 130, 141], [0, 1, 66, 66, 100], [0, 0, 97, 98, 161]]);
        let k = self.next(&[[0, 50, 61, 61, 190], [0, 33, 33, 116, 147], [0, 15, 112, 177, 178]]);
        self.problem(dtype).with_varlen(&q, &k)
    }

    pub fn push(&mut self, name: String, problem: AttentionProblem) -> &mut Case {
        let index = self.cases.len();
        let layout = Layout::ALL[index % Layout::ALL.len()];
        let (seed, d_lse) = (1000 + index as u64, index.is_multiple_of(3));
        let name = format!("{name}/{}", problem.dtype);
        self.cases.push(Case {
            name,
            problem,
            seed,
            layout,
            input: InputKind::Normal,
            d_lse,
            backward: true,
        });
        &mut self.cases[index]
    }
}

pub(super) fn problem(
    dtype: DType,
    (seqlen_q, seqlen_k): (usize, usize),
    (heads_q, heads_kv): (usize, usize),
    (head_dim, head_dim_v): (usize, usize),
) -> AttentionProblem {
    let batch = if seqlen_q * seqlen_k > 20_000 { 1 } else { 2 };
    AttentionProblem {
        heads_kv,
        seqlen_k,
        head_dim_v,
        ..AttentionProblem::new(batch, seqlen_q, heads_q, head_dim, dtype)
    }
}

/// All fixed cases, always the same.
pub fn corpus() -> Vec<Case> {
    let mut b = Builder::default();
    for dtype in DTYPES {
        head_dims(&mut b, dtype);
        sizes(&mut b, dtype);
        decode(&mut b, dtype);
        all_masks(&mut b, dtype);
        all_score_mods(&mut b, dtype);
        packed(&mut b, dtype);
        sinks_and_dropout(&mut b, dtype);
        scales_and_inputs(&mut b, dtype);
        not_finite(&mut b, dtype);
        layouts(&mut b, dtype);
        empty(&mut b, dtype);
        together(&mut b, dtype);
        long(&mut b, dtype);
    }
    b.cases
}

fn head_dims(b: &mut Builder, dtype: DType) {
    for (d, dv) in HEAD_DIMS {
        for mask in [Mask::Full, Mask::Causal] {
            let (heads, sizes) = (b.next(&HEADS), b.next(&SIZES[6..13]));
            let mut p = problem(dtype, sizes, heads, (d, dv));
            let name = if matches!(mask, Mask::Full) { "full" } else { "causal" };
            p.mask = mask;
            b.push(format!("head-dim/{d}-{dv}/{name}"), p);
        }
    }
}

fn sizes(b: &mut Builder, dtype: DType) {
    for (m, n) in SIZES {
        for mask in [Mask::Full, Mask::Causal] {
            let heads = b.next(&HEADS);
            let mut p = problem(dtype, (m, n), heads, (64, 64));
            let name = if matches!(mask, Mask::Full) { "full" } else { "causal" };
            p.mask = mask;
            b.push(format!("size/{m}x{n}/{name}"), p);
        }
    }
}

fn decode(b: &mut Builder, dtype: DType) {
    for n in [1, 2, 33, 300, 1023] {
        for heads in [(3, 3), (8, 2), (6, 1)] {
            let mut p = problem(dtype, (1, n), heads, (128, 128));
            p.mask = if b.next(&[true, false]) { Mask::Causal } else { Mask::Full };
            let backward = n < 100;
            b.push(format!("decode/{n}/{}-{}", heads.0, heads.1), p).backward = backward;
        }
    }
    for m in [2, 3, 7] {
        let mut p = problem(dtype, (m, 517), (8, 2), (64, 64));
        (p.mask, p.sinks) = (Mask::Causal, m == 3);
        b.push(format!("decode/speculative-{m}x517"), p);
    }
}

fn all_masks(b: &mut Builder, dtype: DType) {
    for packed in [false, true] {
        let count = masks(&AttentionProblem::new(1, 1, 1, 1, dtype)).len();
        for i in 0..count {
            let mut p = if packed { b.packed(dtype) } else { b.problem(dtype) };
            let (name, mask) = masks(&p).swap_remove(i);
            p.mask = mask;
            b.push(format!("mask/{name}{}", if packed { "/packed" } else { "" }), p);
        }
    }
}

fn all_score_mods(b: &mut Builder, dtype: DType) {
    let count = score_mods(&AttentionProblem::new(1, 1, 1, 1, dtype), 0).len();
    for packed in [false, true] {
        for i in 1..count {
            let mut p = if packed { b.packed(dtype) } else { b.problem(dtype) };
            let (name, score_mod) = score_mods(&p, i as u64).swap_remove(i);
            let (mask, causal) =
                if (i % 2 == 0) ^ packed { (Mask::Causal, "/causal") } else { (Mask::Full, "") };
            (p.score_mod, p.mask) = (score_mod, mask);
            b.push(format!("score-mod/{name}{causal}{}", if packed { "/packed" } else { "" }), p);
        }
    }
}

fn packed(b: &mut Builder, dtype: DType) {
    let offsets: [(&str, &[i32], &[i32]); 6] = [
        ("ragged", &[0, 17, 82, 83, 180], &[0, 33, 64, 191, 206]),
        ("empty", &[0, 0, 31, 31, 97, 97], &[0, 15, 15, 48, 130, 130]),
        ("no-keys", &[0, 5, 70], &[0, 0, 0]),
        ("no-queries", &[0, 0, 0], &[0, 5, 70]),
        ("one", &[0, 129], &[0, 113]),
        ("decode", &[0, 1, 2, 3, 4], &[0, 200, 201, 201, 333]),
    ];
    for (name, q, k) in offsets {
        for mask in [Mask::Full, Mask::Causal, Mask::window(30, 2)] {
            let kind = match mask {
                Mask::Full => "full",
                Mask::Causal => "causal",
                _ => "window",
            };
            let mut p = b.problem(dtype).with_varlen(q, k);
            p.mask = mask;
            b.push(format!("packed/{name}/{kind}"), p);
        }
    }
    // The maxima may be larger than any sequence.
    let mut p = b.packed(dtype);
    (p.seqlen_q, p.seqlen_k, p.mask) = (200, 333, Mask::Causal);
    b.push("packed/loose-maxima".to_owned(), p);
}

fn sinks_and_dropout(b: &mut Builder, dtype: DType) {
    for (name, mask) in [("full", Mask::Full), ("causal", Mask::Causal), ("window", Mask::window(12, 0))] {
        for packed in [false, true] {
            let mut p = if packed { b.packed(dtype) } else { b.problem(dtype) };
            (p.sinks, p.mask) = (true, mask.clone());
            b.push(format!("sinks/{name}{}", if packed { "/packed" } else { "" }), p);
        }
    }
    for (i, p_drop) in [0.0f32, 0.1, 0.5, 0.95].into_iter().enumerate() {
        for packed in [false, true] {
            let mut p = if packed { b.packed(dtype) } else { b.problem(dtype) };
            // The seed's high half counts too.
            let seed = 42 + ((i as u64) << 33) + u64::from(packed);
            (p.dropout, p.sinks) = (Some(Dropout { p: p_drop, seed }), i == 2);
            p.mask = if i % 2 == 1 { Mask::Causal } else { Mask::Full };
            b.push(format!("dropout/{p_drop}{}", if packed { "/packed" } else { "" }), p);
        }
    }
}

fn scales_and_inputs(b: &mut Builder, dtype: DType) {
    for scale in [-0.125, 0.0, 1e-3, 0.3] {
        let mut p = b.problem(dtype);
        p.softmax_scale = Some(scale);
        b.push(format!("scale/{scale}"), p);
    }
    for (name, mask) in [("full", Mask::Full), ("causal", Mask::Causal), ("window", Mask::window(40, 9))] {
        let mut p = b.problem(dtype);
        p.mask = mask.clone();
        b.push(format!("large/{name}"), p).input = InputKind::Large;
        let mut p = b.packed(dtype);
        (p.mask, p.sinks) = (mask, true);
        b.push(format!("large/{name}/packed-sinks"), p).input = InputKind::Large;
    }
    for (name, mask) in [("full", Mask::Full), ("causal", Mask::Causal), ("window", Mask::window(40, 9))] {
        let mut p = b.problem(dtype);
        p.mask = mask.clone();
        b.push(format!("growing/{name}"), p).input = InputKind::Growing;
        let mut p = b.packed(dtype);
        (p.mask, p.sinks) = (mask, true);
        b.push(format!("growing/{name}/packed-sinks"), p).input = InputKind::Growing;
    }
    let mut p = b.problem(dtype);
    p.score_mod = ScoreMod::softcap(30.0);
    b.push("large/softcap".to_owned(), p).input = InputKind::Large;
}

fn not_finite(b: &mut Builder, dtype: DType) {
    let places = [("q", Place::Q), ("k", Place::K), ("v", Place::V), ("do", Place::Do)];
    for (name, place) in places {
        for mask in ["causal", "window", "document", "blocks", "full"] {
            for packed in [false, true] {
                let mut p = if packed { b.packed(dtype) } else { b.problem(dtype) };
                if let Some((_, mask)) = masks(&p).into_iter().find(|(n, _)| *n == mask) {
                    p.mask = mask;
                }
                let name = format!("not-finite/{name}/{mask}{}", if packed { "/packed" } else { "" });
                b.push(name, p).input = InputKind::NotFinite(place);
            }
        }
    }
}

fn layouts(b: &mut Builder, dtype: DType) {
    for layout in Layout::ALL {
        for (name, m, n) in [("self", 111, 111), ("cross", 70, 131)] {
            let heads = b.next(&HEADS);
            let mut p = problem(dtype, (m, n), heads, (64, 64));
            p.mask = Mask::Causal;
            let case = b.push(format!("layout/{layout:?}/{name}"), p);
            (case.layout, case.d_lse) = (layout, true);
        }
    }
}

fn empty(b: &mut Builder, dtype: DType) {
    type Change = fn(&mut AttentionProblem);
    let cases: [(&str, Change); 5] = [
        ("batch", |p| p.batch = 0),
        ("queries", |p| p.seqlen_q = 0),
        ("keys", |p| p.seqlen_k = 0),
        ("keys-but-sinks", |p| (p.seqlen_k, p.sinks) = (0, true)),
        ("everything", |p| (p.batch, p.seqlen_q, p.seqlen_k) = (0, 0, 0)),
    ];
    for (name, change) in cases {
        let mut p = b.problem(dtype);
        change(&mut p);
        b.push(format!("empty/{name}"), p);
    }
    let p = b.problem(dtype).with_varlen(&[0], &[0]);
    b.push("empty/packed".to_owned(), p);
}

/// Several options at a time.
fn together(b: &mut Builder, dtype: DType) {
    let chosen = [
        ("causal", "softcap", true, 0.0),
        ("window", "alibi-learned", true, 0.2),
        ("document-causal", "bias-learned", false, 0.1),
        ("blocks-each", "chain-learned", true, 0.3),
        ("prefix-lm-each", "relative-learned", true, 0.0),
        ("custom-by-head", "bias-minus-infinity", true, 0.1),
        ("chunked-causal", "curve", false, 0.5),
        ("window-or-prefix", "alibi-softcap", true, 0.15),
    ];
    for packed in [false, true] {
        for (mask, score_mod, sinks, drop) in chosen {
            let mut p = if packed { b.packed(dtype) } else { b.problem(dtype) };
            let name = format!("together/{mask}+{score_mod}{}", if packed { "/packed" } else { "" });
            p.softmax_scale = Some(0.11);
            p.sinks = sinks;
            p.dropout = (drop > 0.0).then_some(Dropout { p: drop, seed: 7 });
            if let Some((_, m)) = masks(&p).into_iter().find(|(n, _)| *n == mask) {
                p.mask = m;
            }
            if let Some((_, s)) = score_mods(&p, 5).into_iter().find(|(n, _)| *n == score_mod) {
                p.score_mod = s;
            }
            b.push(name, p).d_lse = true;
        }
    }
}

/// Many blocks in both directions.
fn long(b: &mut Builder, dtype: DType) {
    for (name, mask, sizes, heads) in [
        ("causal", Mask::Causal, (1023, 1025), (2, 1)),
        ("full", Mask::Full, (517, 1200), (2, 2)),
        ("window", Mask::window(256, 0), (1111, 999), (2, 2)),
        ("chunked", Mask::chunked(333).and(Mask::Causal), (800, 1301), (3, 1)),
    ] {
        let mut p = problem(dtype, sizes, heads, (64, 64));
        p.mask = mask;
        b.push(format!("long/{name}"), p);
    }
}
