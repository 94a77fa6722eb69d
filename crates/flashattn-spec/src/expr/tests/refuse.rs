//! What is refused, and how.

use super::*;

#[test]
fn refuses_ill_typed_closures() {
    fn err(f: impl for<'t> FnOnce(Term<'t>, Index<'t>) -> Term<'t>) -> String {
        Expr::trace(f).unwrap_err().to_string()
    }
    assert_eq!(err(|s, ix| s + ix.q.lt(1)), "`add` takes two numbers, got float, bool");
    assert_eq!(err(|s, _| s.select(s, s)), "`select` takes a bool condition, got float");
    assert_eq!(
        err(|s, ix| ix.q.lt(1).select(s, true)),
        "`select` takes two branches of one type, got float, bool"
    );
    assert_eq!(err(|s, _| s % 2), "`rem` takes two ints, got float, float");
    assert_eq!(err(|s, _| !s), "`not` takes a bool or an int, got float");
    assert_eq!(err(|s, ix| s + (ix.q & true)), "`bitand` takes two ints or two bools, got int, bool");
    assert_eq!(err(|_, ix| ix.q.lt(ix.kv)), "`trace` takes a number as the result of a score mod, got bool");
    let slope = slopes();
    assert_eq!(err(|s, _| slope[s]), "`index` takes an int, got float");
    assert_eq!(err(|_, ix| slope[(ix.q, ix.kv)]), "a table of 1 dimensions was indexed with 2 indices");
    let mask = Expr::trace_mask(|ix| ix.q + 1).unwrap_err().to_string();
    assert_eq!(mask, "`trace` takes a bool as the result of a mask, got int");
    // The first error is the one reported, and the next trace starts clean.
    assert_eq!(
        err(|s, _| (s & 1) + s.select(s, s)),
        "`bitand` takes two ints or two bools, got float, float"
    );
    assert_eq!(show(|s, _| s), "score");
}

#[test]
fn refuses_what_does_not_fit_or_nest() {
    let big = Expr::trace(|s, _| (0..5000).fold(s, |x, i| (x + i as f32).tanh()));
    assert_eq!(big.unwrap_err(), ExprError::TooManyNodes { limit: MAX_NODES });
    let mut inner = None;
    let outer = Expr::trace(|s, _| {
        inner = Some(Expr::trace(|s, _| s * 2.0));
        s + 1.0
    });
    assert_eq!(outer.unwrap().to_string(), "score + 1.0");
    assert_eq!(inner.unwrap().unwrap_err(), ExprError::NestedTrace);
}

#[test]
fn a_panic_in_the_closure_leaves_nothing_behind() {
    let result = std::panic::catch_unwind(|| Expr::trace(|_, _| panic!("on purpose")));
    assert!(result.is_err());
    assert_eq!(show(|s, _| s + 1.0), "score + 1.0");
}

#[test]
fn refuses_bad_tables() {
    let data = |n| vec![0.0; n];
    assert_eq!(Table::f32(&[], data(1)).unwrap_err(), ExprError::Rank { got: 0 });
    assert_eq!(Table::f32(&[1; 5], data(1)).unwrap_err(), ExprError::Rank { got: 5 });
    assert_eq!(Table::f32(&[2, 0], data(0)).unwrap_err(), ExprError::Dimension { dim: 1, got: 0 });
    assert_eq!(Table::per_head(vec![]).unwrap_err(), ExprError::Dimension { dim: 0, got: 0 });
    let got = 1 << 31;
    assert_eq!(Table::f32(&[got], data(1)).unwrap_err(), ExprError::Dimension { dim: 0, got });
    let wrong = ExprError::DataLength { dims: vec![2, 3], got: 5, expected: 6 };
    assert_eq!(Table::f32(&[2, 3], data(5)).unwrap_err(), wrong);
    let dims = vec![i32::MAX as usize; 4];
    let wrong = ExprError::DataLength { dims: dims.clone(), got: 1, expected: usize::MAX };
    assert_eq!(Table::f32(&dims, data(1)).unwrap_err(), wrong);
    let ints = Table::i32(&[1], vec![1]).unwrap();
    assert_eq!(ints.with_grad().unwrap_err(), ExprError::IntegerGradient);
}

#[test]
fn refuses_the_wrong_tables() {
    let slope = slopes();
    let alibi = Expr::trace(|s, ix| s * slope[ix.head]).unwrap();
    let eval = |tables: &[Table]| alibi.expr.eval(&here(0, 0), tables, 1.0);
    assert_eq!(eval(&[]).unwrap_err(), ExprError::TableCount { got: 0, expected: 1 });
    let ints = Table::i32(&[1], vec![1]).unwrap();
    let wrong = ExprError::TableType { slot: 0, got: Type::Int, expected: Type::Float };
    assert_eq!(eval(&[ints]).unwrap_err(), wrong);
    assert_eq!(eval(&alibi.tables), Ok(Value::Float(2.0)));
}

#[test]
fn builder_refuses_unknown_operands() {
    let mut b = Builder::new();
    let unknown = |got, len| Err(ExprError::UnknownNode { got, len });
    assert_eq!(b.push(Node::Unary(UnOp::Neg, NodeId(3))), unknown(3, 0));
    let q = b.push(Node::Var(Var::Q)).unwrap();
    assert_eq!(b.push(Node::Binary(BinOp::Add, q, NodeId(9))), unknown(9, 1));
    assert_eq!(b.push(Node::Select(NodeId(7), q, q)), unknown(7, 1));
    let load = Node::Load { table: Slot(0), index: [q; 4] };
    assert_eq!(b.push(load), Err(ExprError::UnknownSlot { got: 0, len: 0 }));
    assert_eq!(b.finish(NodeId(1)).unwrap_err(), ExprError::UnknownNode { got: 1, len: 1 });
}
