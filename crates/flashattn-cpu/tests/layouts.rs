//! One plan serves tensors of any strides, call after call: a single query's work is cut by how K and V lie in memory.
use flashattn_cpu::{Options, Plan};
use flashattn_spec::{AttentionProblem, DType, Inputs, Outputs, View, ViewMut};

/// Element (n, h, c) of a tensor of either layout.
fn value(n: usize, h: usize, c: usize) -> f32 {
    ((n * 31 + h * 17 + c * 7) % 101) as f32 / 50.0 - 1.0
}

/// The values and strides of a `[1, n, heads, dim]` tensor, heads outside or inside.
fn tensor(shape: [usize; 4], heads_outside: bool) -> (Vec<f32>, [usize; 4]) {
    let [_, n, heads, dim] = shape;
    let strides = if heads_outside {
        [n * heads * dim, dim, n * dim, 1]
    } else {
        [n * heads * dim, heads * dim, dim, 1]
    };
    let mut data = vec![0.0; n * heads * dim];
    for (i, h, c) in (0..n).flat_map(|i| (0..heads).flat_map(move |h| (0..dim).map(move |c| (i, h, c)))) {
        data[i * strides[1] + h * strides[2] + c] = value(i, h, c);
    }
    (data, strides)
}

#[test]
fn a_plan_takes_any_layout_in_turn() {
    let mut problem = AttentionProblem::new(1, 1, 6, 40, DType::F32);
    (problem.heads_kv, problem.seqlen_k) = (3, 700);
    let plan = Plan::new(&problem, Options::default()).expect("a valid problem");
    let mut results = Vec::new();
    for heads_outside in [true, false, true, false] {
        let [(q, q_strides), (k, k_strides), (v, v_strides)] =
            [problem.q_shape(), problem.k_shape(), problem.v_shape()]
                .map(|shape| tensor(shape, heads_outside));
        let view = |data, shape, strides| View::with_strides(data, shape, strides).expect("strides inside");
        let inputs = Inputs {
            q: view(&q, problem.q_shape(), q_strides),
            k: view(&k, problem.k_shape(), k_strides),
            v: view(&v, problem.v_shape(), v_strides),
            sinks: None,
        };
        let (mut o, mut lse) = (vec![0.0f32; 6 * 40], vec![0.0f32; problem.lse_len()]);
        let view = ViewMut::new(&mut o, problem.o_shape()).expect("contiguous");
        plan.forward(&inputs, &mut Outputs { o: view, lse: &mut lse }).expect("tensors that fit");
        results.push([o, lse].concat());
    }
    assert_eq!(results[0], results[2], "the same call gives the same bits");
    assert_eq!(results[1], results[3], "the same call gives the same bits");
    for (i, (a, b)) in results[0].iter().zip(&results[1]).enumerate() {
        assert!((a - b).abs() <= 1e-5 * a.abs().max(1.0), "{i}: {a} with heads outside, {b} inside");
    }
}
