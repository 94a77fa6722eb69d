//! Random combinations of everything, for as long as one likes.

use super::options::{masks, score_mods};
use super::{Case, InputKind, Layout};
use crate::element::DType;
use crate::problem::{AttentionProblem, Dropout};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// `n` cases that depend on `seed` and their number only. A name says what its case is made of; to have case `i` of
/// seed `s` again, ask for `random_cases(s, i + 1)` and take the last.
pub fn random_cases(seed: u64, n: usize) -> Vec<Case> {
    (0..n).map(|i| random_case(seed, i)).collect()
}

fn length(rng: &mut StdRng) -> usize {
    match rng.random_range(0..20) {
        0 => 0,
        1..=3 => 1,
        4..=8 => rng.random_range(2..40),
        9..=17 => rng.random_range(40..200),
        _ => rng.random_range(200..450),
    }
}

fn head_dim(rng: &mut StdRng) -> usize {
    match rng.random_range(0..10) {
        0..=5 => *[16, 32, 64, 96, 128].choose(rng).unwrap_or(&64),
        6..=8 => rng.random_range(1..130),
        _ => rng.random_range(130..520),
    }
}

fn random_case(seed: u64, index: usize) -> Case {
    let rng = &mut StdRng::seed_from_u64(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(index as u64));
    let dtype = [DType::F32, DType::F16, DType::Bf16][rng.random_range(0..3)];
    let heads_kv = rng.random_range(1..4);
    let mut p = AttentionProblem::new(
        rng.random_range(1..4),
        length(rng),
        heads_kv * rng.random_range(1..4),
        head_dim(rng),
        dtype,
    );
    (p.heads_kv, p.seqlen_k) = (heads_kv, length(rng));
    if rng.random_bool(0.3) {
        p.head_dim_v = head_dim(rng);
    }
    if rng.random_bool(0.3) {
        let mut offsets = || {
            let mut cu = vec![0];
            (0..p.batch).for_each(|b| cu.push(cu[b] + length(rng).min(200) as i32));
            cu
        };
        let (q, k) = (offsets(), offsets());
        p = p.with_varlen(&q, &k);
    }
    p.sinks = rng.random_bool(0.3);
    if rng.random_bool(0.25) {
        p.dropout = Some(Dropout { p: rng.random_range(0.0..0.9), seed: rng.random() });
    }
    if rng.random_bool(0.25) {
        p.softmax_scale = Some(rng.random_range(-0.3..0.5));
    }
    let mut mask_name = "full";
    if rng.random_bool(0.7) {
        let mut list = masks(&p);
        (mask_name, p.mask) = list.swap_remove(rng.random_range(0..list.len()));
    }
    let mut mod_name = "none";
    if rng.random_bool(0.5) {
        let mut list = score_mods(&p, rng.random());
        (mod_name, p.score_mod) = list.swap_remove(rng.random_range(0..list.len()));
    }
    let name = format!(
        "random/{seed}/{index}: {dtype} batch {} heads {}:{} {}x{} d {}:{} {mask_name} {mod_name}{}{}{}{}",
        p.batch,
        p.heads_q,
        p.heads_kv,
        p.seqlen_q,
        p.seqlen_k,
        p.head_dim,
        p.head_dim_v,
        if p.varlen.is_some() { " packed" } else { "" },
        if p.sinks { " sinks" } else { "" },
        p.dropout.map_or(String::new(), |d| format!(" dropout {:.2}", d.p)),
        p.softmax_scale.map_or(String::new(), |s| format!(" scale {s:.2}")),
    );
    Case {
        name,
        problem: p,
        seed: rng.random(),
        layout: *Layout::ALL.choose(rng).unwrap_or(&Layout::Dense),
        input: if rng.random_bool(0.1) { InputKind::Large } else { InputKind::Normal },
        d_lse: rng.random_bool(0.4),
        backward: true,
    }
}
