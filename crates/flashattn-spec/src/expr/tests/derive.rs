//! Derivatives of the usual score mods.

use super::*;

#[test]
fn differentiates_named_mods() {
    let d = |f: for<'t> fn(Term<'t>, Index<'t>) -> Term<'t>| {
        Expr::trace(f).unwrap().expr.d_score().unwrap().to_string()
    };
    assert_eq!(d(|s, _| s), "1.0");
    assert_eq!(d(|_, ix| ix.q.to_float()), "0.0");
    assert_eq!(d(|s, ix| s * 3.0 + ix.q), "3.0");
    assert_eq!(d(|s, ix| ix.q.lt(ix.kv).select(s * 2.0, 7.0)), "select(q < kv, 2.0, 0.0)");
    assert_eq!(d(|s, _| s.max(0.0)), "select(0.0 <= score, 1.0, 0.0)");
    assert_eq!(d(|s, _| s.floor() + s), "1.0");
    // Beyond its pole, the unused branch must not turn the derivative into a NaN.
    let log = Expr::trace(|s, _| s.gt(0.0).select(s.log2(), 0.0)).unwrap();
    assert_eq!(log.expr.d_score().unwrap().eval(&here(0, 0), &[], 0.0), Ok(Value::Float(0.0)));
}

#[test]
fn differentiates_tables() {
    let slope = slopes().with_grad().unwrap();
    let bias = Table::f32(&[1, 1, 2, 2], vec![0.1, 0.2, 0.3, 0.4]).unwrap().with_grad().unwrap();
    let fixed = slopes();
    let traced = Expr::trace(|s, ix| {
        let zero = Term::from(0);
        s * fixed[ix.head] - (ix.q - ix.kv).abs() * slope[ix.head] + bias[(zero, zero, ix.q, ix.kv)]
    });
    let traced = traced.unwrap();
    let gradients = traced.expr.gradients(|slot| traced.tables[slot.index()].wants_grad()).unwrap();
    assert_eq!(gradients.tables.len(), 2);
    let mut evaluator = Evaluator::<f64>::new(&gradients.program, &traced.tables).unwrap();
    let values = evaluator.run(&here(0, 1), 10.0);
    let at = |id: NodeId| values[id.index()].as_f64();
    assert!((at(gradients.value) - (20.0 - 2.0 + f64::from(0.2f32))).abs() < 1e-12);
    assert_eq!(at(gradients.d_score), 2.0);
    for grad in &gradients.tables {
        let (table, index) = (&traced.tables[grad.slot.index()], grad.index.map(&at));
        if table.is_same(&slope) {
            assert_eq!((index, at(grad.derivative)), ([2.0, 0.0, 0.0, 0.0], -1.0));
        } else {
            assert!(table.is_same(&bias));
            assert_eq!((index, at(grad.derivative)), ([0.0, 0.0, 0.0, 1.0], 1.0));
        }
    }
    // A table that only decides has no gradient.
    let decides = Expr::trace(|s, ix| slope[ix.head].lt(1.0).select(s, 0.0)).unwrap();
    assert!(decides.expr.gradients(|_| true).unwrap().tables.is_empty());
}
