//! Matrices of the oracle and of standard attention: dense copies of the tensors in the type that is computed in,
//! products in which only visible keys take part, and a loop over all threads.

use crate::element::Element;
use crate::tensor::View;
use ndarray::linalg::general_mat_mul;
use ndarray::{
    Array2, Array4, ArrayBase, ArrayView2, ArrayViewMut2, Axis, Data, DataMut, Ix4, LinalgScalar, Slice,
};
use num_traits::Float;
use std::ops::Range;

/// The type that is computed in: f64 in the oracle, f32 in standard attention.
pub(super) trait Real: Float + LinalgScalar + Send + Sync {}
impl<F: Float + LinalgScalar + Send + Sync> Real for F {}

/// Rows of one head of `[batch, rows, heads, d]` as a matrix `[rows, d]`.
pub(super) fn matrix<F>(
    tensor: &ArrayBase<impl Data<Elem = F>, Ix4>,
    batch: usize,
    rows: Range<usize>,
    head: usize,
) -> ArrayView2<'_, F> {
    let mut view = tensor.index_axis(Axis(0), batch);
    view.slice_axis_inplace(Axis(0), Slice::from(rows));
    view.index_axis_move(Axis(1), head)
}

/// [`matrix`], to write to.
pub(super) fn matrix_mut<F>(
    tensor: &mut ArrayBase<impl DataMut<Elem = F>, Ix4>,
    batch: usize,
    rows: Range<usize>,
    head: usize,
) -> ArrayViewMut2<'_, F> {
    let mut view = tensor.index_axis_mut(Axis(0), batch);
    view.slice_axis_inplace(Axis(0), Slice::from(rows));
    view.index_axis_move(Axis(1), head)
}

/// A tensor `[batch, rows, heads, d]`, converted.
pub(super) struct Dense<F> {
    raw: Array4<F>,
    /// The same with zeros instead of rows that hold a NaN or ∞; absent if there are none.
    clean: Option<Array4<F>>,
    /// (batch, row, head) of those rows.
    not_finite: Vec<(usize, usize, usize)>,
}

impl<F: Real> Dense<F> {
    pub fn new<T: Element>(view: &View<T>, convert: impl Fn(T) -> F) -> Self {
        let [batch, rows, heads, d] = view.shape();
        let mut raw = Array4::zeros((batch, rows, heads, d));
        let mut not_finite = Vec::new();
        let places = (0..batch).flat_map(|b| (0..rows).flat_map(move |i| (0..heads).map(move |h| (b, i, h))));
        for ((b, row, head), mut to) in places.zip(raw.rows_mut()) {
            to.iter_mut().zip(view.row(b, row, head)).for_each(|(to, &x)| *to = convert(x));
            if !to.iter().all(|x| x.is_finite()) {
                not_finite.push((b, row, head));
            }
        }
        let clean = (!not_finite.is_empty()).then(|| {
            let mut clean = raw.clone();
            for &(b, row, head) in &not_finite {
                matrix_mut(&mut clean, b, row..row + 1, head).fill(F::zero());
            }
            clean
        });
        Dense { raw, clean, not_finite }
    }

    /// Rows of one head as a matrix `[rows, d]`.
    pub fn rows(&self, batch: usize, rows: Range<usize>, head: usize) -> ArrayView2<'_, F> {
        matrix(&self.raw, batch, rows, head)
    }

    /// `out += alpha · weights · rows`, where `weights` is `[m, rows]` with zeros at what is not visible. There, a
    /// NaN or ∞ of ours must not get through (0 · NaN = NaN), so such rows are added one by one.
    pub fn add_product(
        &self,
        alpha: F,
        weights: ArrayView2<F>,
        (batch, rows, head): (usize, Range<usize>, usize),
        visible: impl Fn(usize, usize) -> bool,
        mut out: ArrayViewMut2<F>,
    ) {
        let clean = self.clean.as_ref().unwrap_or(&self.raw);
        let clean = matrix(clean, batch, rows.clone(), head);
        general_mat_mul(alpha, &weights, &clean, F::one(), &mut out);
        for &(_, row, _) in
            self.not_finite.iter().filter(|&&(b, i, h)| (b, h) == (batch, head) && rows.contains(&i))
        {
            let j = row - rows.start;
            for i in (0..weights.nrows()).filter(|&i| visible(i, j)) {
                let weight = alpha * weights[[i, j]];
                let row = matrix(&self.raw, batch, row..row + 1, head);
                out.row_mut(i).iter_mut().zip(row).for_each(|(to, &x)| *to = *to + weight * x);
            }
        }
    }
}

/// `alpha · a · bᵀ`.
pub(super) fn product_transposed<F: Real>(alpha: F, a: ArrayView2<F>, b: ArrayView2<F>) -> Array2<F> {
    let mut out = Array2::zeros((a.nrows(), b.nrows()));
    general_mat_mul(alpha, &a, &b.t(), F::zero(), &mut out);
    out
}

/// Threads worth starting for this many multiplications.
pub(super) fn threads_for(flops: f64) -> usize {
    // Starting a thread costs some 20 µs; beyond 16, per-thread accumulators would cost more than they bring.
    let available = std::thread::available_parallelism().map_or(1, |n| n.get().min(16));
    ((flops / 1e6) as usize + 1).min(available)
}

/// Runs `work` on every item, on one thread for each state; returns the states.
/// Which thread takes which item is fixed (round robin), and so is the order of every sum.
pub(super) fn parallel<I: Send, S: Send>(
    states: Vec<S>,
    items: impl Iterator<Item = I>,
    work: impl Fn(&mut S, I) + Sync,
) -> Vec<S> {
    let threads = states.len().max(1);
    let mut shares: Vec<(S, Vec<I>)> = states.into_iter().map(|s| (s, Vec::new())).collect();
    items.enumerate().for_each(|(i, item)| shares[i % threads].1.push(item));
    let run = |(mut state, share): (S, Vec<I>)| {
        share.into_iter().for_each(|item| work(&mut state, item));
        state
    };
    if threads == 1 {
        return shares.into_iter().map(run).collect();
    }
    std::thread::scope(|scope| {
        let handles: Vec<_> = shares.into_iter().map(|share| scope.spawn(|| run(share))).collect();
        let join = |h: std::thread::ScopedJoinHandle<'_, S>| {
            h.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        handles.into_iter().map(join).collect()
    })
}
