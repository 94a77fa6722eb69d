//! What standard attention does with matrices and rows of them.

use super::{Chunk, Visible};
use crate::element::{DType, Element};
use crate::reference::dense::product_transposed;
use crate::reference::prepared::{ModEvaluator, Prepared, env};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, CowArray, Ix2, Slice};
use std::ops::Range;

/// A row-major matrix in f32: the memory itself if it is f32 already.
pub(super) fn as_f32<T: Element>(x: &[T], rows: usize, columns: usize) -> CowArray<'_, f32, Ix2> {
    if T::DTYPE == DType::F32
        && let Ok(view) = ArrayView2::from_shape((rows, columns), bytemuck::cast_slice(x))
    {
        return view.into();
    }
    Array2::from_shape_fn((rows, columns), |(i, j)| x[i * columns + j].to_f32()).into()
}

/// Some columns of a matrix `[m, n]`, in f32.
pub(super) fn columns_f32<T: Element>(
    x: &[T],
    m: usize,
    n: usize,
    columns: Range<usize>,
) -> CowArray<'_, f32, Ix2> {
    if T::DTYPE == DType::F32
        && let Ok(mut view) = ArrayView2::from_shape((m, n), bytemuck::cast_slice(x))
    {
        view.slice_axis_inplace(Axis(1), Slice::from(columns));
        return view.into();
    }
    Array2::from_shape_fn((m, columns.len()), |(i, j)| x[i * n + columns.start + j].to_f32()).into()
}

/// A chunk of P or dP after dropout, each result rounded to the dtype.
pub(super) fn dropped<'x, T: Element>(prepared: &Prepared, c: &Chunk, x: &'x [T]) -> CowArray<'x, f32, Ix2> {
    let mut x = as_f32(x, c.rows.len(), c.sequence.seqlen_k);
    if prepared.problem.dropout.is_some() {
        for ((i, j), x) in x.indexed_iter_mut() {
            let z = prepared.kept(c.b, c.head, c.rows.start + i, j) as f32;
            *x = T::from_f32(*x * z).to_f32();
        }
    }
    x
}

pub(super) fn round_row<'x, T: Element>(from: impl Iterator<Item = &'x f32>, to: &mut [T]) {
    from.zip(to).for_each(|(&from, to)| *to = T::from_f32(from));
}

/// `alpha · a · bᵀ`, rounded to the dtype.
pub(super) fn product_into<T: Element>(alpha: f32, a: ArrayView2<f32>, b: ArrayView2<f32>, out: &mut [T]) {
    let shape = (a.nrows(), b.nrows());
    if T::DTYPE == DType::F32
        && let Ok(mut out) = ArrayViewMut2::from_shape(shape, bytemuck::cast_slice_mut(out))
    {
        return general_mat_mul(alpha, &a, &b.t(), 0.0, &mut out);
    }
    round_row(product_transposed(alpha, a, b).iter(), out);
}

/// P and lse from S, for the rows of a chunk.
pub(super) fn softmax<T: Element>(
    visible: &Visible,
    mods: &mut Option<ModEvaluator<'_, f32>>,
    c: &Chunk,
    sink: f32,
    s: &[T],
    p: &mut [T],
    lse: &mut [f32],
) {
    let n = c.sequence.seqlen_k;
    let mut row = vec![0.0; n];
    for (i, lse) in lse.iter_mut().enumerate() {
        row.iter_mut().zip(&s[i * n..]).for_each(|(to, s)| *to = s.to_f32());
        if let Some(mods) = mods {
            for (j, x) in row.iter_mut().enumerate() {
                *x =
                    T::from_f32(mods.value(&env(&c.sequence, c.b, c.head, c.rows.start + i, j), *x)).to_f32();
            }
        }
        let seen = visible.row(c, i);
        if let Some(seen) = seen {
            row.iter_mut().zip(seen).for_each(|(x, &seen)| *x = if seen { *x } else { f32::NEG_INFINITY });
        }
        let max = row.iter().fold(sink, |m, &x| m.max(x));
        let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
        row.iter_mut().for_each(|x| *x = exp(*x - shift));
        let sum = sum(&row) + (sink - shift).exp();
        *lse = if sum == 0.0 { f32::NEG_INFINITY } else { shift + sum.ln() };
        let inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
        let to = &mut p[i * n..(i + 1) * n];
        to.iter_mut().zip(&row).for_each(|(to, x)| *to = T::from_f32(x * inverse));
        if let (true, Some(seen)) = (sum.is_nan(), seen) {
            to.iter_mut().zip(seen).filter(|x| !x.1).for_each(|x| *x.0 = T::default());
        }
    }
}

/// dS (before the scale) of a chunk; returns `δ − dlse` of each row.
pub(super) fn softmax_backward<T: Element>(
    visible: &Visible,
    mut mods: Option<(&mut ModEvaluator<'_, f32>, &mut Vec<Vec<f64>>)>,
    c: &Chunk,
    d_lse: Option<&[f32]>,
    [s, p, dp]: [&[T]; 3],
    ds: &mut [T],
) -> Vec<f32> {
    let n = c.sequence.seqlen_k;
    let [mut row, mut products] = [vec![0.0; n], vec![0.0; n]];
    let mut deltas = Vec::with_capacity(c.rows.len());
    for i in 0..c.rows.len() {
        let at = i * n..(i + 1) * n;
        let (p, dp) = (&p[at.clone()], &dp[at.clone()]);
        row.iter_mut().zip(dp).for_each(|(to, x)| *to = x.to_f32());
        if let Some(seen) = visible.row(c, i) {
            row.iter_mut().zip(seen).for_each(|(x, &seen)| *x = if seen { *x } else { 0.0 });
        }
        if !is_live(p) {
            row.fill(0.0);
        }
        products.iter_mut().zip(p.iter().zip(&row)).for_each(|(to, (p, dp))| *to = p.to_f32() * dp);
        let delta = sum(&products) - d_lse.map_or(0.0, |x| x[i]);
        deltas.push(delta);
        let ds = &mut ds[at.clone()];
        for ((ds, p), dp) in ds.iter_mut().zip(p).zip(&row) {
            *ds = T::from_f32(p.to_f32() * (dp - delta));
        }
        if let Some(seen) = visible.row(c, i) {
            ds.iter_mut().zip(seen).filter(|x| !x.1).for_each(|x| *x.0 = T::default());
        }
        if let Some((mods, tables)) = &mut mods {
            for (j, (ds, s)) in ds.iter_mut().zip(&s[at]).enumerate() {
                if visible.sees(c, i, j) {
                    let env = env(&c.sequence, c.b, c.head, c.rows.start + i, j);
                    *ds = T::from_f32(mods.backward(&env, s.to_f32(), ds.to_f32(), tables));
                }
            }
        }
    }
    deltas
}

/// Whether a row of P sees anything; if not, NaNs in V or dO are none of its business.
pub(super) fn is_live<T: Element>(p: &[T]) -> bool {
    p.iter().any(|p| p.to_f32() != 0.0)
}

/// Sum in 16 lanes.
fn sum(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut lanes = [0.0; 16];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane += x);
    }
    lanes.iter().chain(rest).sum()
}

/// e^x for x ≤ 0, within 2 units in the last place, 0 below −87; NaN stays NaN. Unlike `f32::exp` a loop over it
/// compiles to vector instructions: x = n ln 2 + r, and a polynomial for e^r.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it leaves the nearest integer in the low bits.
    const LN_2_HIGH: f32 = 0.693_359_4; // 9 bits, so that n times it is exact.
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let small = x < -87.0;
    let x = if small { -87.0 } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut y = 1.0 / 720.0;
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        y = y * r + c;
    }
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    if small { 0.0 } else { y * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate() {
        for i in 0..87_000 {
            let x = -(i as f32) / 1000.0;
            let expected = f64::from(x).exp();
            assert!((f64::from(exp(x)) - expected).abs() <= 2.0 * expected * f64::from(f32::EPSILON), "{x}");
        }
        assert_eq!((exp(0.0), exp(f32::NEG_INFINITY), exp(-1e30)), (1.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }
}
