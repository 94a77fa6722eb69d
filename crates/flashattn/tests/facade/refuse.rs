//! Bad input: a typed error that names the argument, what was got and what was expected; nothing is written.

use crate::common::tensor;
use flashattn::{
    AsView, Attention, Error, Expr, GradInputs, GradientsMut, Mask, Output, ScoreMod, Shape, Table, Tensor,
    View, ViewMut,
};

const SHAPE: [usize; 4] = [2, 16, 4, 8];

#[track_caller]
fn refuse<T: std::fmt::Debug>(result: Result<T, Error>, text: &str) {
    assert_eq!(result.unwrap_err().to_string(), text);
}

#[track_caller]
fn refuse_option(attention: Attention, text: &str) {
    let shape = Shape::of(SHAPE, SHAPE, SHAPE).unwrap();
    refuse(attention.plan::<f32>(shape), text);
    let x = tensor::<f32>(SHAPE, 1);
    refuse(attention.forward(&x, &x, &x), text);
}

#[test]
fn shapes() {
    let run = |q: [usize; 4], k: [usize; 4], v: [usize; 4]| {
        Attention::new().forward(&tensor::<f32>(q, 1), &tensor(k, 2), &tensor(v, 3))
    };
    refuse(run(SHAPE, [2, 16, 4, 9], SHAPE), "k has shape [2, 16, 4, 9], expected [2, 16, 4, 8]");
    refuse(run(SHAPE, [3, 16, 4, 8], SHAPE), "k has shape [3, 16, 4, 8], expected [2, 16, 4, 8]");
    refuse(run(SHAPE, SHAPE, [2, 17, 4, 8]), "v has shape [2, 17, 4, 8], expected [2, 16, 4, 8]");
    refuse(run(SHAPE, [2, 5, 3, 8], [2, 5, 3, 9]), "heads_q = 4 is not a multiple of heads_kv = 3");
    refuse(run(SHAPE, [2, 5, 0, 8], [2, 5, 0, 8]), "heads_kv is 0, expected at least 1");
    refuse(Tensor::new(vec![0.0f32; 7], [1, 2, 2, 2]), "tensor has shape [7], expected [1, 2, 2, 2]");
    refuse(
        Tensor::<f32>::new(vec![], [usize::MAX, 2, 2, 2]),
        &format!("tensor has shape [0], expected [{}, 2, 2, 2]", usize::MAX),
    );
}

#[test]
fn options() {
    let new = Attention::new;
    refuse_option(new().scale(f32::NAN), "softmax_scale is NaN, expected a finite number");
    refuse_option(new().scale(f32::INFINITY), "softmax_scale is inf, expected a finite number");
    refuse_option(new().dropout(1.0, 0), "dropout probability is 1, expected 0 <= p < 1");
    refuse_option(new().dropout(f32::NAN, 0), "dropout probability is NaN, expected 0 <= p < 1");
    refuse_option(new().softcap(0.0), "score mod: softcap is 0, expected a finite number above 0");
    refuse_option(new().threads(0), "threads is 0, expected at least 1");
    refuse_option(new().sinks(&[0.0; 3]), "sinks has shape [3], expected [4]");
    let expected = "[heads_q = 4] or [batch = 2 or 1, 4]";
    refuse_option(
        new().softcap(1.0).alibi(&[0.5; 5]),
        &format!("score mod: ALiBi slopes has shape [5], expected {expected}"),
    );
    refuse_option(
        new().alibi(&[]),
        "score mod: dimension 0 of a table is 0; it must be from 1 to 2147483647",
    );
    let bias = Table::f32(&[2, 4, 16, 15], vec![0.0; 2 * 4 * 16 * 15]).unwrap();
    refuse_option(
        new().bias(bias),
        "score mod: bias has shape [2, 4, 16, 15], expected [2, 4, 16, 16], where each may be 1",
    );
    refuse_option(
        new().causal().mask(Mask::document(&[0; 31])),
        "mask: q_ids has 31 entries, expected total_q = 32",
    );
}

#[test]
fn closures() {
    let error = Attention::new().mask_fn(|ix| ix.q + ix.kv).causal();
    refuse_option(error, "mask: `trace` takes a bool as the result of a mask, got int");
    // The first of several errors, whatever comes after it.
    let error = Attention::new().score_fn(|_, ix| ix.q.lt(3)).mask_fn(|ix| ix.q).softcap(-1.0);
    refuse_option(error, "score mod: `trace` takes a number as the result of a score mod, got bool");
    let mask = Expr::trace_mask(|ix| ix.q.lt(3)).unwrap();
    refuse_option(
        Attention::new().score_mod(ScoreMod::Custom(mask)),
        "score mod: a custom score mod must give a float, got bool",
    );
}

#[test]
fn packed_sequences() {
    let (q, k) = (tensor::<f32>([1, 10, 2, 8], 1), tensor::<f32>([1, 12, 2, 8], 2));
    let run = |cu_q: &[i32], cu_k: &[i32]| Attention::new().varlen(cu_q, cu_k).forward(&q, &k, &k);
    run(&[0, 4, 10], &[0, 12, 12]).unwrap();
    refuse(run(&[0, 5, 4, 10], &[0, 1, 2, 12]), "cu_seqlens_q: decreases from 5 to 4 at position 2");
    refuse(run(&[0, 4, 11], &[0, 4, 12]), "cu_seqlens_q: ends at 11, expected 10, the rows of q");
    refuse(run(&[0, 4, 10], &[0, 4, 9]), "cu_seqlens_k: ends at 9, expected 12, the rows of k");
    refuse(run(&[0, 4, 10], &[0, 4, i32::MAX]), "seqlen_k is 2147483643, expected at most 1073741823");
    refuse(run(&[0, 4, 10], &[0, 12]), "cu_seqlens_k: has 2 offsets, expected batch + 1 = 3");
    refuse(run(&[-3, 10], &[0, 12]), "cu_seqlens_q: starts at -3, expected 0");
    refuse(run(&[], &[]), "cu_seqlens_q: has 0 offsets, expected batch + 1 = 1");
    let x = tensor::<f32>([2, 5, 2, 8], 1);
    let result = Attention::new().varlen(&[0, 10], &[0, 10]).forward(&x, &x, &x);
    refuse(result, "[batch, total_q] of packed sequences has shape [2, 5], expected [1, 10]");
}

#[test]
fn element_types() {
    let x = tensor::<f64>(SHAPE, 1);
    let error = Attention::new().forward(&x, &x, &x).unwrap_err();
    assert!(matches!(&error, Error::Unsupported { executor: flashattn::Device::Cpu, .. }));
    assert_eq!(error.to_string(), "dtype f64 is not supported on cpu");
}

#[test]
fn views() {
    let mut memory = [0f32; 64];
    let error = |e: flashattn::ViewError| e.to_string();
    assert_eq!(
        View::with_strides(&memory, [2, 4, 2, 4], [32, 8, 4, 2]).map_err(error).unwrap_err(),
        "last stride is 2, expected 1 (rows of head_dim elements must be contiguous)"
    );
    assert_eq!(
        View::new(&memory, [2, 4, 2, 5]).map_err(error).unwrap_err(),
        "shape [2, 4, 2, 5] with strides [40, 10, 5, 1] needs 80 elements, the slice has 64"
    );
    assert_eq!(
        ViewMut::with_strides(&mut memory, [2, 4, 2, 4], [0, 8, 4, 1]).map_err(error).unwrap_err(),
        "strides [0, 8, 4, 1] of output shape [2, 4, 2, 4] overlap; every element needs memory of its own"
    );
}

#[test]
fn a_broadcast_view_is_no_allocation_bomb() {
    // 64 elements of memory that ask for an output of 2^48 bytes.
    let row = [1f32; 64];
    let q = View::with_strides(&row, [1, 1 << 20, 1 << 20, 64], [0, 0, 0, 1]).unwrap();
    let k = View::new(&row, [1, 1, 1, 64]).unwrap();
    refuse(
        Attention::new().forward(&q, &k, &k),
        "o of shape [1, 1048576, 1048576, 64] needs 281474976710656 bytes, which could not be allocated",
    );
    let longer = View::with_strides(&row, [1, 1 << 30, 1, 64], [0, 0, 0, 1]).unwrap();
    refuse(Attention::new().forward(&longer, &k, &k), "seqlen_q is 1073741824, expected at most 1073741823");
}

#[test]
fn wrong_memory_for_a_plan_is_refused_and_not_written() {
    let x = tensor::<f32>(SHAPE, 1);
    let plan = Attention::new().plan::<f32>(Shape::of(SHAPE, SHAPE, SHAPE).unwrap()).unwrap();
    let mut o = Tensor::new(vec![7.0; 1024], SHAPE).unwrap();
    let mut lse = vec![7.0; 127];
    let k = tensor::<f32>([2, 15, 4, 8], 2);
    refuse(plan.forward(&x, &x, &x, &mut o, &mut lse), "lse has shape [127], expected [128]");
    lse.push(7.0);
    refuse(plan.forward(&x, &k, &x, &mut o, &mut lse), "k has shape [2, 15, 4, 8], expected [2, 16, 4, 8]");
    let mut small = Tensor::new(vec![7.0; 1024], [2, 16, 8, 4]).unwrap();
    refuse(
        plan.forward(&x, &x, &x, &mut small, &mut lse),
        "o has shape [2, 16, 8, 4], expected [2, 16, 4, 8]",
    );
    assert!([o.data(), small.data(), &lse].iter().all(|x| x.iter().all(|&x| x == 7.0)));

    let attention = Attention::new();
    let output = attention.forward_with_lse(&x, &x, &x).unwrap();
    refuse(
        attention.backward(&x, &x, &x, &output, &k, None),
        "do has shape [2, 15, 4, 8], expected [2, 16, 4, 8]",
    );
    refuse(
        attention.backward(&x, &x, &x, &output, &x, Some(&[0.0; 3])),
        "dlse has shape [3], expected [128]",
    );
    let short = Output { o: output.o.clone(), lse: vec![0.0; 5] };
    refuse(attention.backward(&x, &x, &x, &short, &x, None), "lse has shape [5], expected [128]");

    let mut memory = vec![7f32; 3 * 1024];
    let mut parts = memory.chunks_exact_mut(1024).map(|m| ViewMut::new(m, SHAPE).unwrap());
    let [dq, dk, dv] = std::array::from_fn(|_| parts.next().unwrap());
    let given = GradInputs {
        o: output.o.to_view("o").unwrap(),
        lse: &output.lse,
        d_o: x.to_view("do").unwrap(),
        d_lse: None,
    };
    let mut table = [7f32; 3];
    let mut wrong = GradientsMut { dq, dk, dv, d_sinks: None, d_tables: vec![&mut table] };
    refuse(plan.backward(&x, &x, &x, &given, &mut wrong), "d_tables has shape [1], expected [0]");
    let mut d_sinks = [7f32; 4];
    wrong.d_tables.clear();
    wrong.d_sinks = Some(&mut d_sinks);
    refuse(plan.backward(&x, &x, &x, &given, &mut wrong), "dsinks is given, the problem expects it absent");
    assert!(memory.iter().all(|&x| x == 7.0));
}
