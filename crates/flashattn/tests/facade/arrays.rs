//! Arrays of `ndarray` in and out.

use crate::common::tensor;
use flashattn::{AsView, AsViewMut, Attention, Error, Shape, Tensor, view_of, view_of_mut};
use ndarray::{Array2, Array4, Array5, ArrayD, Axis, s};

fn array(shape: [usize; 4], seed: u64) -> Array4<f32> {
    tensor(shape, seed).into_array().unwrap()
}

#[test]
fn arrays_and_their_parts_are_read_and_written_in_place() {
    let (b, n, h, d) = (2, 13, 3, 8);
    let shape = [b, n, h, d];
    let (q, k, v) = (array(shape, 1), array(shape, 2), array(shape, 3));
    let attention = Attention::new().causal();
    let dense = attention.forward_with_lse(&q, &k, &v).unwrap();
    let plain = [&q, &k, &v].map(|x| Tensor::new(x.iter().copied().collect(), shape).unwrap());
    assert_eq!(dense, attention.forward_with_lse(&plain[0], &plain[1], &plain[2]).unwrap());

    // Permuted, packed, padded and dynamic.
    let q2 = Array4::from_shape_fn((b, h, n, d), |(b, h, n, d)| q[(b, n, h, d)]).permuted_axes([0, 2, 1, 3]);
    let mut kv = Array5::zeros((b, n, 2, h, d));
    kv.index_axis_mut(Axis(2), 0).assign(&k);
    kv.index_axis_mut(Axis(2), 1).assign(&v);
    let k2 = view_of(&kv, |x| x.index_axis_move(Axis(2), 0)).unwrap();
    let v2 = view_of(&kv, |x| x.slice_move(s![.., .., 1, .., ..])).unwrap();
    assert_eq!(k2.strides(), [n * 2 * h * d, 2 * h * d, d, 1]);
    assert_eq!(dense, attention.forward_with_lse(&q2, &k2, &v2).unwrap());
    let dynamic: ArrayD<f32> = v.clone().into_dyn();
    assert_eq!(dense, attention.forward_with_lse(&q2.view(), &k2, &dynamic).unwrap());

    let plan = attention.plan::<f32>(Shape::of(shape, shape, shape).unwrap()).unwrap();
    let mut padded = Array4::from_elem((b, n + 1, h, d + 3), 7f32);
    let mut lse = vec![0.0; b * h * n];
    let mut part = view_of_mut(&mut padded, |x| x.slice_move(s![.., 1.., .., 2..d + 2])).unwrap();
    plan.forward(&q, &k, &v, &mut part, &mut lse).unwrap();
    let (o, o_lse) = dense.into_arrays().unwrap();
    assert_eq!(padded.slice(s![.., 1.., .., 2..d + 2]), o);
    assert_eq!(padded.iter().filter(|&&x| x == 7.0).count(), padded.len() - o.len(), "the rest is untouched");
    assert_eq!(o_lse.as_slice(), Some(lse.as_slice()));

    let mut bhnd = Array4::zeros((b, h, n, d));
    let mut out = bhnd.view_mut().permuted_axes([0, 2, 1, 3]);
    plan.forward(&q, &k, &v, &mut out, &mut lse).unwrap();
    assert_eq!(bhnd.permuted_axes([0, 2, 1, 3]), o);
}

#[test]
fn three_dimensions_are_packed_sequences() {
    let x = array([1, 10, 2, 8], 1);
    let attention = Attention::new().varlen(&[0, 3, 10], &[0, 3, 10]);
    let o = attention.forward(&x, &x, &x).unwrap();
    let packed = x.index_axis(Axis(0), 0);
    assert_eq!(attention.forward(&packed, &packed, &packed).unwrap(), o);
}

#[test]
fn arrays_that_cannot_be_viewed() {
    let x = array([2, 6, 2, 8], 1);
    let refuse = |result: Result<Tensor<f32>, Error>, text: &str| {
        assert_eq!(result.unwrap_err().to_string(), text);
    };
    let attention = Attention::new();
    let gappy = x.slice(s![.., 1.., .., ..]);
    refuse(
        attention.forward(&x, &gappy, &x),
        "k: an array of shape [2, 5, 2, 8] with strides [96, 16, 8, 1] has gaps or repeats between its \
         elements, which cannot be borrowed; make it with view_of / view_of_mut from the array it is part \
         of, or copy it with as_standard_layout()",
    );
    let copied = gappy.as_standard_layout();
    assert!(attention.forward(&x, &copied, &copied).is_ok());
    let transposed = x.view().permuted_axes([0, 1, 3, 2]);
    refuse(
        attention.forward(&transposed, &x, &x),
        "q: an array of shape [2, 6, 8, 2] with strides [96, 16, 1, 8] must have stride 1 in its last \
         dimension; copy it with as_standard_layout()",
    );
    let backwards = x.slice(s![.., ..;-1, .., ..]);
    refuse(
        attention.forward(&x, &x, &backwards),
        "v: an array of shape [2, 6, 2, 8] with strides [96, -16, 8, 1] runs backwards; copy it with \
         as_standard_layout()",
    );
    let flat = Array2::<f32>::zeros((4, 8));
    refuse(
        attention.forward(&flat, &x, &x),
        "q: an array of shape [4, 8] with strides [8, 1] must have 4 dimensions [batch, seqlen, heads, \
         head_dim], or 3 [total, heads, head_dim]",
    );
    let mut o = array([2, 6, 2, 8], 2);
    assert!(matches!(
        o.slice_mut(s![.., 1.., .., ..]).to_view_mut("o"),
        Err(Error::Layout { name: "o", .. })
    ));
    let other = array([2, 6, 2, 8], 3);
    let foreign = [view_of(&x, |_| other.view()), view_of(&other, |_| x.view())];
    assert!(foreign.iter().all(Result::is_err), "not a part of the array");
    assert!(view_of_mut(&mut o, |x| x.slice_move(s![.., ..;-1, .., ..])).is_err());
}

#[test]
fn broadcast_and_empty_arrays() {
    let one = array([1, 6, 2, 8], 1);
    let shared = view_of(&one, |x| x.slice_move(s![0, .., .., ..])).unwrap();
    assert_eq!(shared.shape(), [1, 6, 2, 8]);
    let empty = Array4::<f32>::zeros((2, 0, 2, 8));
    assert_eq!(empty.slice(s![.., .., ..;-1, ..]).to_view("x").unwrap().shape(), [2, 0, 2, 8]);
    let mut empty = empty;
    assert_eq!(empty.to_view_mut("x").unwrap().shape(), [2, 0, 2, 8]);
    assert!(view_of(&one, |x| x.slice_move(s![.., 6.., .., ..])).unwrap().shape().contains(&0));
    let o = Attention::new().forward(&empty, &empty, &empty).unwrap();
    assert_eq!(o.into_array().unwrap().dim(), (2, 0, 2, 8));
}
