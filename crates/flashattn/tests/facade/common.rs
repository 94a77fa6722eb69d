//! Seeded inputs, and comparison with the f64 oracle.

use flashattn::spec::{Inputs, reference};
use flashattn::{Attention, DType, Element, Shape, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::StandardNormal;

/// A tensor of normal numbers.
pub fn tensor<T: Element>(shape: [usize; 4], seed: u64) -> Tensor<T> {
    let mut rng = StdRng::seed_from_u64(seed);
    let data = (0..shape.iter().product())
        .map(|_| {
            let x: f32 = rng.sample(StandardNormal);
            T::from_f32(x)
        })
        .collect();
    Tensor::new(data, shape).unwrap()
}

/// Relative to the larger of 1 and the expected number; equal infinities are equal.
pub fn assert_close(name: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (i, (&x, &y)) in got.iter().zip(expected).enumerate() {
        let x = f64::from(x);
        let close = x == y || (x - y).abs() <= tolerance * y.abs().max(1.0);
        assert!(close, "{name}[{i}] is {x}, the oracle says {y}");
    }
}

fn f32s<T: Element>(x: &[T]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

/// Forward and backward of random tensors of these shapes, compared with the oracle.
pub fn check<T: Element>(
    attention: &Attention,
    sinks: Option<&[f32]>,
    q: [usize; 4],
    k: [usize; 4],
    dv: usize,
) {
    use flashattn::AsView;
    let v = [k[0], k[1], k[2], dv];
    let shape = Shape::of(q, k, v).unwrap();
    let problem = attention.problem::<T>(shape).unwrap();
    let (q, k, v) = (tensor::<T>(q, 1), tensor::<T>(k, 2), tensor::<T>(v, 3));
    let d_o = tensor::<T>(problem.o_shape(), 4);
    let d_lse: Vec<f32> = (0..problem.lse_len()).map(|i| (i as f32).sin()).collect();
    let inputs =
        Inputs { q: q.to_view("q").unwrap(), k: k.to_view("k").unwrap(), v: v.to_view("v").unwrap(), sinks };
    let tolerance = if T::DTYPE == DType::F32 { 2e-5 } else { 0.05 };

    let expected = reference::forward(&problem, &inputs).unwrap();
    let output = attention.forward_with_lse(&q, &k, &v).unwrap();
    assert_close("o", &f32s(output.o.data()), &expected.o, tolerance);
    assert_close("lse", &output.lse, &expected.lse, tolerance);

    let expected = reference::backward(&problem, &inputs, d_o.to_view("do").unwrap(), Some(&d_lse)).unwrap();
    let got = attention.backward(&q, &k, &v, &output, &d_o, Some(&d_lse)).unwrap();
    let tolerance = 4.0 * tolerance;
    assert_close("dq", &f32s(got.dq.data()), &expected.dq, tolerance);
    assert_close("dk", &f32s(got.dk.data()), &expected.dk, tolerance);
    assert_close("dv", &f32s(got.dv.data()), &expected.dv, tolerance);
    assert_close("d_sinks", &got.d_sinks.unwrap_or_default(), &expected.d_sinks, tolerance);
    assert_eq!(got.d_tables.len(), expected.d_tables.len());
    for ((table, got), expected) in got.d_tables.iter().zip(&expected.d_tables) {
        assert!(table.wants_grad());
        assert_close("d_table", got, expected, tolerance);
    }
}
