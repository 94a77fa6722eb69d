//! Bounds of the usual masks, and of the unusual.

use super::*;

/// Bounds of a mask over a block with seqlen_q 100, seqlen_k 150, as "never", "always" or "maybe".
fn decide(mask: &Traced, q: (i32, i32), kv: (i32, i32)) -> &'static str {
    let here = Env { batch: 1, seqlen_q: 100, seqlen_k: 150, q_start: 100, kv_start: 150, ..Env::default() };
    let bounds = mask.expr.bounds(&Block { q, kv, ..Block::at(&here) }, &mask.tables);
    match (bounds.is_never(), bounds.is_always()) {
        (true, false) => "never",
        (false, true) => "always",
        _ => "maybe",
    }
}

#[test]
fn bounds_decide_the_usual_masks_exactly() {
    let causal = Expr::trace_mask(|ix| ix.kv.le(ix.diagonal())).unwrap();
    assert_eq!(decide(&causal, (0, 9), (0, 50)), "always");
    assert_eq!(decide(&causal, (0, 9), (0, 51)), "maybe");
    assert_eq!(decide(&causal, (0, 9), (60, 70)), "never");
    assert_eq!(decide(&causal, (0, 9), (59, 70)), "maybe");

    let window = Expr::trace_mask(|ix| {
        let diagonal = ix.diagonal();
        (diagonal - 20).le(ix.kv) & ix.kv.le(diagonal + 5)
    });
    let window = window.unwrap();
    assert_eq!(decide(&window, (0, 9), (39, 55)), "always");
    assert_eq!(decide(&window, (0, 9), (38, 55)), "maybe");
    assert_eq!(decide(&window, (0, 9), (0, 29)), "never");
    assert_eq!(decide(&window, (0, 9), (65, 99)), "never");

    let chunked = Expr::trace_mask(|ix| (ix.q / 16).eq(ix.kv / 16)).unwrap();
    assert_eq!(decide(&chunked, (16, 31), (16, 31)), "always");
    assert_eq!(decide(&chunked, (16, 31), (32, 47)), "never");
    assert_eq!(decide(&chunked, (16, 32), (16, 31)), "maybe");

    let prefix = Table::i32(&[3], vec![5, 80, 7]).unwrap();
    let prefix = Expr::trace_mask(|ix| ix.kv.lt(prefix[ix.batch]) | ix.kv.le(ix.diagonal())).unwrap();
    assert_eq!(decide(&prefix, (0, 9), (60, 79)), "always");
    assert_eq!(decide(&prefix, (0, 9), (60, 80)), "maybe");
    assert_eq!(decide(&prefix, (0, 9), (80, 90)), "never");

    let id_q = Table::i32(&[200], (0..200).map(|i| i / 30).collect()).unwrap();
    let id_k = Table::i32(&[300], (0..300).map(|i| i / 40).collect()).unwrap();
    let document = Expr::trace_mask(|ix| id_q[ix.q_token()].eq(id_k[ix.kv_token()])).unwrap();
    assert_eq!(decide(&document, (20, 49), (10, 49)), "always");
    assert_eq!(decide(&document, (20, 49), (50, 60)), "never");
    assert_eq!(decide(&document, (20, 50), (10, 49)), "maybe");

    let given = Table::i32(&[1, 1, 2, 3], vec![1, 1, 0, 0, 1, 1]).unwrap();
    let given = Expr::trace_mask(|ix| given[(ix.batch, ix.head, ix.q / 50, ix.kv / 50)].ne(0)).unwrap();
    assert_eq!(decide(&given, (0, 49), (0, 99)), "always");
    assert_eq!(decide(&given, (0, 49), (100, 149)), "never");
    assert_eq!(decide(&given, (0, 50), (50, 99)), "always");
    assert_eq!(decide(&given, (0, 49), (50, 149)), "maybe");
}

#[test]
fn bounds_of_large_tables_fall_back_to_the_whole() {
    let n = 1 << 17;
    let table = Table::i32(&[n], (0..n as i32).collect()).unwrap();
    let load = Expr::trace_mask(|ix| table[ix.q].lt(1000)).unwrap();
    assert_eq!(decide(&load, (1000, 60_000), (0, 0)), "never");
    assert_eq!(decide(&load, (1000, 70_000), (0, 0)), "maybe");
}

#[test]
fn bounds_survive_missing_tables_wrapping_and_nan() {
    let table = Table::i32(&[2], vec![1, 1]).unwrap();
    let load = Expr::trace_mask(|ix| table[ix.q].eq(1)).unwrap();
    let block = Block::at(&Env::default());
    assert!(load.expr.bounds(&block, &load.tables).is_always());
    assert!(!load.expr.bounds(&block, &[]).is_always());
    let wraps = Expr::trace_mask(|ix| ix.q.lt(ix.q + 1)).unwrap();
    assert!(!wraps.expr.bounds(&Block { q: (0, i32::MAX), ..block }, &[]).is_always());
    let nans = Table::f32(&[2], vec![1.0, f32::NAN]).unwrap();
    let compare = Expr::trace_mask(|ix| nans[ix.q].le(1.0)).unwrap();
    assert!(compare.expr.bounds(&block, &compare.tables).is_always());
    assert!(!compare.expr.bounds(&Block { q: (0, 1), ..block }, &compare.tables).is_always());
}

#[test]
fn bounds_allow_for_a_lost_subnormal() {
    let tiny = Table::per_head(vec![1e-40]).unwrap();
    let log = Expr::trace(|_, ix| tiny[ix.head].log2()).unwrap();
    let Bounds::Float { lo, hi, .. } = log.expr.bounds(&Block::at(&Env::default()), &log.tables) else {
        panic!("a float")
    };
    assert!(lo == f64::NEG_INFINITY && hi < -100.0, "{lo} {hi}");
}
