//! Writing, printing and combining expressions; the other parts are tested in the modules below, on random
//! expressions in `random`.

use super::*;

mod bounds;
mod derive;
mod eval;
mod random;
mod refuse;

fn slopes() -> Table {
    Table::per_head(vec![0.5, 0.25, 2.0]).unwrap()
}

fn show(f: impl for<'t> FnOnce(Term<'t>, Index<'t>) -> Term<'t>) -> String {
    Expr::trace(f).unwrap().to_string()
}

fn show_mask(f: impl for<'t> FnOnce(Index<'t>) -> Term<'t>) -> String {
    Expr::trace_mask(f).unwrap().to_string()
}

fn here(q: i32, kv: i32) -> Env {
    Env { batch: 1, head: 2, q, kv, seqlen_q: 5, seqlen_k: 9, q_start: 5, kv_start: 9 }
}

#[test]
fn prints_readable_maths() {
    let slope = slopes();
    assert_eq!(show(|s, ix| s - (ix.q - ix.kv).abs() * slope[ix.head]), "score - abs(q - kv) * t0[head]");
    assert_eq!(show(|s, _| (s / 30.0).tanh() * 30.0), "tanh(score / 30.0) * 30.0");
    assert_eq!(show(|s, ix| s * (ix.q - ix.kv)), "score * (q - kv)");
    assert_eq!(show(|s, ix| s + ix.q.to_float() / ix.kv.to_float()), "score + float(q) / float(kv)");
    assert_eq!(show(|s, ix| s - (1.0 - (2.0 - ix.q))), "score - (1.0 - (2.0 - q))");
    assert_eq!(show(|s, ix| (s - 1.0 - ix.q) * -2), "(score - 1.0 - q) * -2.0");
    assert_eq!(show(|s, _| -(s.min(0.0)) * 2), "-min(score, 0.0) * 2.0");
    assert_eq!(show(|s, ix| ix.q.eq(ix.kv).select(s, f32::NEG_INFINITY)), "select(q == kv, score, -inf)");
    let c = 64;
    assert_eq!(show_mask(|ix| (ix.q / c).eq(ix.kv / c)), "q / 64 == kv / 64");
    assert_eq!(
        show_mask(|ix| (ix.diagonal() - 3).le(ix.kv) & ix.kv.le(ix.diagonal() + 2)),
        "v0 = q + seqlen_k - seqlen_q; v0 - 3 <= kv && kv <= v0 + 2"
    );
    assert_eq!(
        show_mask(|ix| (ix.q.lt(3) | ix.kv.lt(3)) & !(ix.q.ge(2) & ix.kv.gt(1))),
        "(q < 3 || kv < 3) && !(2 <= q && 1 < kv)"
    );
    assert_eq!(show_mask(|ix| ((ix.q & 3) << 1 ^ ix.kv).ne(ix.q % 7)), "(q & 3) << 1 ^ kv != q % 7");
    let mask = Table::i32(&[1, 1, 2, 2], vec![1, 0, 1, 1]).unwrap();
    assert_eq!(
        show_mask(|ix| mask[(ix.batch, ix.head, ix.q / 128, ix.kv / 64)].ne(0)),
        "t0[batch, head, q / 128, kv / 64] != 0"
    );
}

#[test]
fn prints_shared_parts_once() {
    let mut doubled = 0;
    let text = show(|s, _| {
        let mut x = s + 1.0;
        for _ in 0..100 {
            x = x * x;
            doubled += 1;
        }
        x
    });
    assert_eq!(doubled, 100);
    assert!(text.starts_with("v0 = score + 1.0; v1 = v0 * v0; v2 = v1 * v1; "), "{text}");
    assert!(text.len() < 3000, "{}", text.len());
}

#[test]
fn deep_expressions_neither_overflow_the_stack_nor_panic() {
    let deep = Expr::trace(|s, _| (0..1300).fold(s, |x, i| (x + i as f32).tanh())).unwrap();
    assert!(deep.to_string().len() > 1300 * 6);
    assert!(deep.expr.d_score().unwrap().nodes().len() > 1300);
    let value = deep.expr.eval(&Env::default(), &[], 0.5).unwrap().as_f64();
    assert!((value - 1.0).abs() < 1e-9, "{value}");
}

#[test]
fn simplifies() {
    let same = |s: &str, f: for<'t> fn(Term<'t>, Index<'t>) -> Term<'t>| assert_eq!(show(f), s);
    same("score", |s, _| s + 0.0);
    same("score", |s, _| 0 + s);
    same("score", |s, _| s * 1.0 / 1);
    same("-score", |s, _| 0.0 - s);
    same("-score", |s, _| s * -1.0);
    same("score", |s, _| -(-s));
    same("score", |s, ix| ix.q.eq(ix.q).select(s, 1.0));
    same("score", |s, ix| ix.q.lt(ix.kv).select(s, s));
    same("score * 0.0", |s, _| s * 0.0);
    same("score - score", |s, _| s - s);
    same("score + 6.0", |s, _| s + Term::from(2.0) * 3);
    same("score", |s, ix| s + (ix.q * Term::from(0)).to_float());
    same("select(score < 0.0, 1.0, score)", |s, _| (!s.lt(0.0)).select(s, 1.0));
    let same = |s: &str, f: for<'t> fn(Index<'t>) -> Term<'t>| assert_eq!(show_mask(f), s);
    same("q < kv", |ix| ix.q.lt(ix.kv) & true);
    same("q < kv", |ix| false | ix.q.lt(ix.kv));
    same("false", |ix| ix.q.lt(ix.kv) & false);
    same("true", |ix| true | ix.q.lt(ix.kv));
    same("q <= kv", |ix| !ix.kv.lt(ix.q));
    same("q < kv", |ix| ix.q.lt(ix.kv) & ix.q.lt(ix.kv));
    same("q < kv", |ix| ix.q.lt(ix.kv).eq(true));
    same("q < kv", |ix| ix.q.lt(ix.kv).select(true, false));
    same("q != kv", |ix| !ix.q.eq(ix.kv));
    same("q ^ -1 < 0", |ix| (!ix.q).lt(0));
    same("true", |_| (Term::from(-7) / 2).eq(-4) & (Term::from(-7) % 2).eq(1));
    assert!(Expr::trace_mask(|ix| ix.q.eq(ix.q)).unwrap().expr.is_const());
    assert!(Expr::trace(|s, _| s * 1.0).unwrap().expr.is_identity());
    // A NaN score is neither below nor not below: these must stay.
    same("!(float(q) < float(kv))", |ix| !ix.q.to_float().lt(ix.kv.to_float()));
}

#[test]
fn structure_alone_decides_equality() {
    use std::hash::{BuildHasher, RandomState};
    let (one, two) = (slopes(), Table::per_head(vec![3.0]).unwrap());
    let a = Expr::trace(|s, ix| {
        let unused = two[ix.q] + 1.0;
        let _ = unused * s;
        s * one[ix.head] + two[ix.q]
    });
    let b = Expr::trace(|s, ix| {
        let bias = one[ix.q];
        s * two[ix.head] + bias
    });
    let (a, b) = (a.unwrap(), b.unwrap());
    assert_eq!(a.expr, b.expr);
    let state = RandomState::new();
    assert_eq!(state.hash_one(&a.expr), state.hash_one(&b.expr));
    assert!(a.tables[0].is_same(&one) && a.tables[1].is_same(&two));
    assert!(b.tables[0].is_same(&two) && b.tables[1].is_same(&one));
    // Shared table, by a clone; and another element type.
    let clone = one.clone();
    let c = Expr::trace(|s, ix| s * one[ix.head] + clone[ix.q]).unwrap();
    assert_eq!((c.tables.len(), c.to_string().as_str()), (1, "score * t0[head] + t0[q]"));
    assert_ne!(a.expr, c.expr);
    let ints = Table::i32(&[1], vec![3]).unwrap();
    let floats = Expr::trace_mask(|ix| two[ix.q].lt(one[ix.q])).unwrap();
    let other = Expr::trace_mask(|ix| ints[ix.q].lt(ints[ix.head])).unwrap();
    assert_ne!(floats.expr, other.expr);
    assert_eq!(other.expr.table_slots(), [Type::Int]);
}

#[test]
fn knows_what_it_depends_on() {
    let slope = slopes();
    let alibi = Expr::trace(|s, ix| s - (ix.q - ix.kv).abs() * slope[ix.head]).unwrap().expr;
    assert!(alibi.uses_score() && alibi.depends_on(Var::Head) && !alibi.depends_on(Var::Batch));
    assert_eq!((alibi.ty(), alibi.root().index()), (Type::Float, alibi.nodes().len() - 1));
    let load = alibi.nodes().iter().position(|n| matches!(n, Node::Load { .. })).unwrap();
    let deps = alibi.deps()[load];
    assert!(deps.contains(Var::Head) && !deps.contains(Var::Q) && !deps.contains_score());
}

#[test]
fn combines_masks_and_shares_tables() {
    let ids = Table::i32(&[4], vec![0, 0, 1, 1]).unwrap();
    let flag = Table::i32(&[4], vec![1, 0, 0, 0]).unwrap();
    let document = Expr::trace_mask(|ix| ids[ix.q_token()].eq(ids[ix.kv_token()])).unwrap();
    let global = Expr::trace_mask(|ix| flag[ix.kv].ne(0) | ids[ix.q].eq(7)).unwrap();
    let both = document.or(&global).unwrap();
    let text = "t0[q_start + q] == t0[kv_start + kv] || t1[kv] != 0 || t0[q] == 7";
    assert_eq!(both.to_string(), text);
    assert!(both.tables.len() == 2 && both.tables[0].is_same(&ids) && both.tables[1].is_same(&flag));
    let swapped = global.and(&document).unwrap();
    assert_eq!(swapped.to_string(), "(t0[kv] != 0 || t1[q] == 7) && t1[q_start + q] == t1[kv_start + kv]");
    assert!(swapped.tables[0].is_same(&flag));
    assert_eq!(document.not().unwrap().to_string(), "t0[q_start + q] != t0[kv_start + kv]");
    assert_eq!(document.and(&document).unwrap().expr, document.expr);
    let score = Expr::trace(|s, _| s).unwrap();
    assert!(document.and(&score).is_err() && score.not().is_err() && score.compose(&document).is_err());
}

#[test]
fn composes_score_mods() {
    let slope = slopes();
    let alibi = Expr::trace(|s, ix| s - (ix.q - ix.kv).abs() * slope[ix.head]).unwrap();
    let cap = Expr::trace(|s, _| (s / 30.0).tanh() * 30.0).unwrap();
    let text = "tanh((score - abs(q - kv) * t0[head]) / 30.0) * 30.0";
    assert_eq!(cap.compose(&alibi).unwrap().to_string(), text);
    assert_eq!(
        alibi.compose(&cap).unwrap().to_string(),
        "tanh(score / 30.0) * 30.0 - abs(q - kv) * t0[head]"
    );
    assert_eq!(alibi.compose(&Expr::trace(|s, _| s).unwrap()).unwrap().expr, alibi.expr);
}

#[test]
fn expressions_and_tables_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Traced>();
    shared::<Gradients>();
}
