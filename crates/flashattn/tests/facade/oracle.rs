//! Results of the facade against the f64 oracle, on ragged shapes that cross its options. (The executors are
//! tested on the whole corpus; this is about what the facade makes of its options.)

use crate::common::{assert_close, check, tensor};
use flashattn::{
    AsView, AsViewMut, Attention, Device, GradInputs, GradientsMut, Mask, ScoreMod, Shape, Table, View,
    ViewMut, bf16, f16,
};

#[test]
fn plain_and_grouped_in_every_dtype() {
    let (q, k) = ([2, 37, 6, 40], [2, 53, 2, 40]);
    let attention = Attention::new().causal();
    check::<f32>(&attention, None, q, k, 24);
    check::<bf16>(&attention, None, q, k, 24);
    check::<f16>(&attention, None, q, k, 24);
    check::<f32>(&Attention::new().scale(0.3).threads(1).device(Device::Cpu), None, q, k, 40);
}

#[test]
fn options_compose() {
    let (q, k) = ([2, 45, 4, 16], [2, 61, 2, 16]);
    let slope = Table::per_head(vec![0.5, 0.25, 0.125, 0.0625]).unwrap();
    let bias =
        Table::f32(&[1, 4, 45, 61], (0..4 * 45 * 61).map(|i| (i as f32 * 0.7).sin()).collect()).unwrap();
    let sinks = [0.5, -1.0, 2.0, 0.0];
    let attention = Attention::new()
        .causal()
        .window(20, 7)
        .mask(Mask::chunked(32).or(Mask::window(9, 0)))
        .mask_fn(|ix| (ix.kv % 3).ne(1) | ix.q.lt(10))
        .softcap(5.0)
        .alibi(&[0.1, 0.2, 0.3, 0.4])
        .bias(bias.with_grad().unwrap())
        .score_fn(|s, ix| s - (ix.q - ix.kv).abs() * slope[ix.head])
        .scale(0.4)
        .dropout(0.2, 7)
        .sinks(&sinks);
    check::<f32>(&attention, Some(&sinks), q, k, 24);
}

#[test]
fn packed_sequences() {
    let attention = Attention::new().causal().varlen(&[0, 5, 5, 36, 41], &[0, 9, 12, 12, 50]);
    check::<f32>(&attention, None, [1, 41, 4, 24], [1, 50, 2, 24], 16);
}

#[test]
fn nothing_to_see_and_nothing_at_all() {
    // Queries 0 to 8 stand before the first key.
    check::<f32>(&Attention::new().causal(), None, [1, 20, 2, 8], [1, 11, 1, 8], 8);
    check::<f32>(&Attention::new(), None, [1, 5, 2, 8], [1, 0, 2, 8], 8);
    let none = tensor::<f32>([0, 7, 2, 8], 1);
    assert_eq!(Attention::new().forward(&none, &none, &none).unwrap().shape(), [0, 7, 2, 8]);
}

#[test]
fn score_mods_apply_in_order_and_masks_are_anded() {
    let shape = [1, 9, 1, 8];
    let x = tensor::<f32>(shape, 5);
    let lse = |a: Attention| a.forward_with_lse(&x, &x, &x).unwrap().lse;
    let by_hand = |f: &dyn Fn(f64) -> f64, sees: &dyn Fn(usize, usize) -> bool| -> Vec<f64> {
        let row = |i| x.row(0, i, 0).unwrap();
        let score = |i: usize, j: usize| {
            let dot: f64 = row(i).iter().zip(row(j)).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            f(dot / 8f64.sqrt()).exp()
        };
        (0..9).map(|i| (0..9).filter(|&j| sees(i, j)).map(|j| score(i, j)).sum::<f64>().ln()).collect()
    };
    let all = |_: usize, _: usize| true;
    let cap = |s: f64| 0.5 * (s / 0.5).tanh();
    let cap_first = lse(Attention::new().softcap(0.5).score_fn(|s, _| s * 3.0 + 1.0));
    assert_close("cap first", &cap_first, &by_hand(&|s| cap(s) * 3.0 + 1.0, &all), 1e-5);
    let cap_last = lse(Attention::new().score_fn(|s, _| s * 3.0 + 1.0).score_mod(ScoreMod::softcap(0.5)));
    assert_close("cap last", &cap_last, &by_hand(&|s| cap(s * 3.0 + 1.0), &all), 1e-5);
    let both = lse(Attention::new().window(3, 1).mask_fn(|ix| (ix.kv % 2).eq(0)).causal());
    let sees = |i: usize, j: usize| j <= i && j + 3 >= i && j.is_multiple_of(2);
    assert_close("masks", &both, &by_hand(&|s| s, &sees), 1e-5);
}

#[test]
fn a_plan_runs_on_strided_memory_of_the_caller() {
    // q, k and v are packed in [batch, seqlen, 3, heads, dim]; the others are [batch, heads, seqlen, dim].
    let (b, n, h, d) = (2, 19, 3, 16);
    let shape = [b, n, h, d];
    let qkv = tensor::<f32>([b, n, 3 * h, d], 8);
    let part = |i: usize| {
        View::with_strides(&qkv.data()[i * h * d..], shape, [n * 3 * h * d, 3 * h * d, d, 1]).unwrap()
    };
    let (q, k, v) = (part(0), part(1), part(2));
    let attention = Attention::new().causal();
    let output = attention.forward_with_lse(&q, &k, &v).unwrap();
    let d_o = tensor::<f32>(shape, 9);
    let gradients = attention.backward(&q, &k, &v, &output, &d_o, None).unwrap();

    let plan = attention.plan::<f32>(Shape::of(shape, shape, shape).unwrap()).unwrap();
    let strides = [h * n * d, d, n * d, 1];
    let mut memory = vec![vec![0.0f32; b * n * h * d]; 4];
    let mut lse = vec![0.0; b * h * n];
    let [o, dq, dk, dv] = memory.as_mut_slice() else { unreachable!() };
    let [mut o, dq, dk, dv] = [o, dq, dk, dv].map(|x| ViewMut::with_strides(x, shape, strides).unwrap());
    plan.forward(&q, &k, &v, &mut o, &mut lse).unwrap();
    let given = GradInputs { o: o.as_view(), lse: &lse, d_o: d_o.to_view("do").unwrap(), d_lse: None };
    let mut grads = GradientsMut { dq, dk, dv, d_sinks: None, d_tables: vec![] };
    plan.backward(&q, &k, &v, &given, &mut grads).unwrap();

    assert_eq!(lse, output.lse);
    let [dq, dk, dv] = [&grads.dq, &grads.dk, &grads.dv].map(|x| x.as_view());
    let pairs = [(o.as_view(), &output.o), (dq, &gradients.dq), (dk, &gradients.dk), (dv, &gradients.dv)];
    for (strided, dense) in pairs {
        for (i, head) in (0..b * n).flat_map(|i| (0..h).map(move |head| (i, head))) {
            assert_eq!(Some(strided.row(i / n, i % n, head)), dense.row(i / n, i % n, head));
        }
    }
}

#[test]
fn merged_parts_are_the_whole() {
    let (q, k, v) = (tensor::<f32>([2, 7, 4, 8], 1), tensor([2, 30, 2, 8], 2), tensor([2, 30, 2, 24], 3));
    let attention = Attention::new().softcap(3.0);
    let keys = |x: &flashattn::Tensor<f32>, from: usize, to: usize| {
        let [b, n, h, d] = x.shape();
        let data =
            x.data().chunks_exact(n * h * d).flat_map(|s| s[from * h * d..to * h * d].to_vec()).collect();
        flashattn::Tensor::new(data, [b, to - from, h, d]).unwrap()
    };
    let over = |from, to| attention.forward_with_lse(&q, &keys(&k, from, to), &keys(&v, from, to)).unwrap();
    let mut merged = over(0, 11);
    merged.merge(&over(11, 11)).unwrap();
    merged.merge(&over(11, 30)).unwrap();
    let whole = over(0, 30);
    let f64s = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    assert_close("o", merged.o.data(), &f64s(whole.o.data()), 1e-5);
    assert_close("lse", &merged.lse, &f64s(&whole.lse), 1e-5);
    let other = attention.forward_with_lse(&k, &k, &v).unwrap();
    assert_eq!(
        merged.merge(&other).unwrap_err().to_string(),
        "other.o has shape [2, 30, 2, 24], expected [2, 7, 4, 24]"
    );
}

#[test]
fn plans_go_to_other_threads() {
    let x = tensor::<f32>([1, 5, 2, 8], 1);
    let plan = Attention::new().plan::<f32>(Shape::of(x.shape(), x.shape(), x.shape()).unwrap()).unwrap();
    let here = plan.forward_alloc(&x, &x, &x).unwrap();
    let there = std::thread::scope(|s| s.spawn(|| plan.forward_alloc(&x, &x, &x).unwrap()).join().unwrap());
    assert_eq!(here, there);
    let mut o = tensor::<f32>([1, 5, 2, 8], 2);
    let mut lse = vec![0.0; 10];
    plan.forward(&x, &x, &x, &mut o, &mut lse).unwrap();
    assert_eq!((o.data(), &lse), (here.o.data(), &here.lse), "what was there before does not matter");
    assert!(o.to_view_mut("o").is_ok());
}
