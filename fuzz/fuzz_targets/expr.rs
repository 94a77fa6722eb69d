//! Expressions: whatever nodes are pushed, the builder refuses or the result can be printed, evaluated, bounded and
//! differentiated; bounds hold every value; what an evaluator keeps from the last place is never stale.
#![no_main]

use flashattn_fuzz::{Result, Unstructured, traced};
use flashattn_spec::expr::{Block, Bounder, Env, Evaluator, Type, Value, Var};
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});

fn run(u: &mut Unstructured) -> Result<()> {
    let ty = *u.choose(&[Type::Float, Type::Int, Type::Bool])?;
    let Some(traced) = traced(u, ty, false)? else { return Ok(()) };
    let (expr, tables) = (&traced.expr, &traced.tables);
    assert!(!expr.to_string().is_empty());
    let hash = |x: &dyn Fn(&mut DefaultHasher)| {
        let mut hasher = DefaultHasher::new();
        x(&mut hasher);
        hasher.finish()
    };
    let copy = expr.clone();
    assert_eq!(hash(&|h| expr.hash(h)), hash(&|h| copy.hash(h)));
    let d_score = (ty == Type::Float).then(|| expr.d_score().expect("few nodes"));
    let gradients = (ty == Type::Float).then(|| expr.gradients(|_| true).expect("few nodes"));

    let mut bounder = Bounder::new(expr, tables);
    let mut exact = Evaluator::<f64>::new(expr, tables).expect("its own tables");
    let mut single = Evaluator::<f32>::new(expr, tables).expect("its own tables");
    for _ in 0..3 {
        let mut range = || -> Result<(i32, i32)> {
            let lo = if u.ratio(1, 8)? { u.arbitrary()? } else { i32::from(u.arbitrary::<i8>()?) };
            Ok((lo, lo.saturating_add(u.arbitrary::<u8>()?.into())))
        };
        let block = Block {
            batch: range()?,
            head: range()?,
            q: range()?,
            kv: range()?,
            seqlen_q: range()?,
            seqlen_k: range()?,
            q_start: range()?,
            kv_start: range()?,
        };
        let bounds = bounder.bounds(&block);
        for _ in 0..4 {
            let mut get = |var: Var| {
                let (lo, hi) = block.get(var);
                u.int_in_range(lo..=hi)
            };
            let env = Env {
                batch: get(Var::Batch)?,
                head: get(Var::Head)?,
                q: get(Var::Q)?,
                kv: get(Var::Kv)?,
                seqlen_q: get(Var::SeqlenQ)?,
                seqlen_k: get(Var::SeqlenK)?,
                q_start: get(Var::QStart)?,
                kv_start: get(Var::KvStart)?,
            };
            let score = f32::from_bits(u.arbitrary()?);
            let value = exact.eval(&env, score.into());
            assert!(bounds.contains(value), "{expr}: {value:?} outside {bounds:?} at {env:?}");
            let fresh = expr.eval(&env, tables, score.into()).expect("its own tables");
            assert!(same(value, fresh), "{expr}: {value:?} kept, {fresh:?} fresh, at {env:?}");
            let value = match single.eval(&env, score) {
                Value::Float(x) => Value::Float(x.into()),
                Value::Int(x) => Value::Int(x),
                Value::Bool(x) => Value::Bool(x),
            };
            assert!(bounds.contains(value), "{expr} in f32: {value:?} outside {bounds:?} at {env:?}");
            if let (Some(d), Some(g)) = (&d_score, &gradients) {
                let alone = d.eval(&env, tables, score.into()).expect("its own tables");
                let mut all = Evaluator::<f64>::new(&g.program, tables).expect("its own tables");
                assert!(same(all.run(&env, score.into())[g.d_score.index()], alone), "{expr}: {d}");
            }
        }
    }
    Ok(())
}

fn same(a: Value, b: Value) -> bool {
    match (a, b) {
        (Value::Float(a), Value::Float(b)) => a == b || (a.is_nan() && b.is_nan()),
        (a, b) => a == b,
    }
}
