//! What each operation means.

use super::*;
use crate::expr::eval;

#[test]
fn an_index_outside_is_clamped_and_a_dimension_of_one_is_shared() {
    let table = Table::f32(&[2, 1, 3], vec![0.0, 1.0, 2.0, 10.0, 11.0, 12.0]).unwrap();
    let load = Expr::trace(|_, ix| table[(ix.batch, ix.head, ix.q)]).unwrap();
    let at = |batch, head, q| {
        let env = Env { batch, head, q, ..Env::default() };
        load.expr.eval(&env, &load.tables, 0.0).unwrap().as_f64()
    };
    assert_eq!(at(1, 0, 2), 12.0);
    assert_eq!(at(1, 99, 2), 12.0);
    assert_eq!(at(0, -5, 1), 1.0);
    assert_eq!(at(-1, 0, 0), 0.0);
    assert_eq!(at(7, 0, i32::MAX), 12.0);
    assert_eq!(at(i32::MIN, 0, i32::MIN), 0.0);
}

#[test]
fn integer_arithmetic_never_traps() {
    let eval = |op, a: i32, b: i32| match eval::binary::<f64>(op, Value::Int(a), Value::Int(b)) {
        Value::Int(x) => x,
        other => panic!("{other:?}"),
    };
    for (a, b, quotient, remainder) in
        [(7, 2, 3, 1), (-7, 2, -4, 1), (7, -2, -4, -1), (-7, -2, 3, -1), (5, 0, 0, 0)]
    {
        assert_eq!((eval(BinOp::Div, a, b), eval(BinOp::Rem, a, b)), (quotient, remainder), "{a} {b}");
    }
    assert_eq!((eval(BinOp::Div, i32::MIN, -1), eval(BinOp::Rem, i32::MIN, -1)), (i32::MIN, 0));
    assert_eq!((eval(BinOp::Add, i32::MAX, 1), eval(BinOp::Mul, i32::MAX, 2)), (i32::MIN, -2));
    assert_eq!((eval(BinOp::Shl, 1, 33), eval(BinOp::Shr, -8, 1), eval(BinOp::Shr, -8, -31)), (2, -4, -4));
    let floor = |x: f64| eval::unary(UnOp::Floor, Value::Float(x));
    assert_eq!(
        (floor(-1.5), floor(1e20), floor(f64::NAN)),
        (Value::Int(-2), Value::Int(i32::MAX), Value::Int(0))
    );
}

#[test]
fn min_and_max_follow_ieee_754() {
    let eval = |op, a: f32, b: f32| eval::binary(op, Value::Float(a), Value::Float(b)).as_float();
    for op in [BinOp::Min, BinOp::Max] {
        assert!(eval(op, f32::NAN, 1.0).is_nan() && eval(op, 1.0, f32::NAN).is_nan());
    }
    for (a, b) in [(0.0, -0.0), (-0.0, 0.0)] {
        assert!(eval(BinOp::Min, a, b).is_sign_negative() && eval(BinOp::Max, a, b).is_sign_positive());
    }
    assert_eq!((eval(BinOp::Min, 2.0, 1.0), eval(BinOp::Max, 2.0, 1.0)), (1.0, 2.0));
}

#[test]
fn evaluates_named_mods() {
    let slope = slopes();
    let alibi = Expr::trace(|s, ix| s - (ix.q - ix.kv).abs() * slope[ix.head]).unwrap();
    assert_eq!(alibi.expr.eval(&here(1, 4), &alibi.tables, 10.0), Ok(Value::Float(4.0)));
    let cap = Expr::trace(|s, _| (s / 30.0).tanh() * 30.0).unwrap();
    let value = cap.expr.eval(&here(0, 0), &[], 45.0).unwrap().as_f64();
    assert!((value - 30.0 * 1.5f64.tanh()).abs() < 1e-12);
    let e = Expr::trace(|s, _| s.exp().ln()).unwrap();
    assert!((e.expr.eval(&here(0, 0), &[], 1.5).unwrap().as_f64() - 1.5).abs() < 1e-6);
    let causal = Expr::trace_mask(|ix| ix.kv.le(ix.diagonal())).unwrap();
    for (kv, seen) in [(6, true), (7, true), (8, false)] {
        assert_eq!(causal.expr.eval(&here(3, kv), &[], 0.0), Ok(Value::Bool(seen)), "{kv}");
    }
}
