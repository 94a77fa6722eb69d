//! Gradients of tables: learned biases and slopes.

use super::compile::{Wanted, compile};
use super::execute::{BLOCK, CHUNK, Values, multiply};
use super::gather::{Offsets, Transpose, place};
use super::program::{Arg, Axis, Code, Spread, axes};
use flashattn_spec::expr::{Gradients, Table};

/// One load of a table that asks for a gradient.
#[derive(Clone, Debug)]
struct Part {
    /// Index into the gradients given.
    table: usize,
    axes: Vec<Axis<Arg>>,
    /// Where the derivative is.
    derivative: Arg,
}

/// The derivatives of a score mod with respect to table elements.
#[derive(Clone, Debug)]
pub(super) struct TableGrads {
    pub code: Code,
    parts: Vec<Part>,
}

impl TableGrads {
    /// `None` if no table asks for a gradient, or the score mod depends on none that does.
    pub fn new(gradients: &Gradients, tables: &[Table], scale: f32) -> Option<Self> {
        let (mut wanted, mut loads) = (Vec::new(), Vec::new());
        for grad in &gradients.tables {
            let slot = grad.slot.index();
            let axes = axes(&tables[slot], grad.index);
            wanted.extend(axes.iter().map(|a| Wanted { node: a.index, dense: true }));
            wanted.push(Wanted { node: grad.derivative, dense: false });
            let table = tables[..slot].iter().filter(|t| t.wants_grad()).count();
            loads.push((table, axes));
        }
        if loads.is_empty() {
            return None;
        }
        let code = compile(&gradients.program, tables, scale, None, &wanted);
        // As many results as were wanted, in that order.
        let mut results = code.results.iter().copied();
        let parts = loads.into_iter().filter_map(|(table, axes)| {
            let axes = axes.iter().zip(&mut results);
            let axes = axes.map(|(a, index)| Axis { index, last: a.last, stride: a.stride }).collect();
            Some(Part { table, axes, derivative: results.next()? })
        });
        let parts = parts.collect();
        Some(TableGrads { code, parts })
    }

    /// Adds the part of a block of up to [`super::execute::block_rows`] rows, for the first `lanes` queries.
    #[inline(always)]
    pub fn accumulate<const L: usize, T: Transpose>(
        &self,
        values: Values<'_>,
        lanes: usize,
        d_scores: &[f32],
        grads: &mut [&mut [f32]],
    ) {
        for part in &self.parts {
            let mut products = [0.0f32; BLOCK * CHUNK];
            let products = &mut products[..d_scores.len()];
            products.copy_from_slice(d_scores);
            multiply(products, values.view(part.derivative));
            part.scatter::<L, T>(values, lanes, products.as_chunks().0, &mut *grads[part.table]);
        }
    }
}

impl Part {
    /// Adds each row's products for the first `lanes` lanes to the elements that they belong to.
    #[inline(always)]
    fn scatter<const L: usize, T: Transpose>(
        &self,
        values: Values<'_>,
        lanes: usize,
        products: &[[f32; L]],
        grad: &mut [f32],
    ) {
        let rows = products.len();
        let offsets = Offsets::<L>::new(&self.axes, rows, values);
        if self.axes.iter().all(|a| a.index.spread == Spread::Uniform) {
            let mut sums = [0.0f32; L];
            for product in products {
                for l in 0..L {
                    sums[l] += product[l];
                }
            }
            grad[offsets.lanes[0]] += sums[..lanes].iter().sum::<f32>();
            return;
        }
        let full = self.axes.iter().find(|a| a.index.spread == Spread::Full);
        let mut r = 0;
        while r < rows {
            // Where keys lie side by side in the table, whole runs of a query's are added.
            if let Some(stride) = offsets.stride
                && full.is_none()
                && r + L <= rows
                && offsets.contiguous(r)
            {
                let mut transposed = [[0u32; L]; L];
                let from = bytemuck::cast_slice(products[r..r + L].as_flattened());
                T::transpose(from, L, transposed.as_flattened_mut(), L);
                for (l, products) in transposed[..lanes].iter().enumerate() {
                    let at = offsets.lanes[0] + offsets.rows[r] + l * stride;
                    for (to, &x) in grad[at..at + L].iter_mut().zip(products) {
                        *to += f32::from_bits(x);
                    }
                }
                r += L;
                continue;
            }
            for (l, product) in products[r][..lanes].iter().enumerate() {
                let mut at = offsets.lanes[l] + offsets.rows[r];
                if full.is_some() {
                    let full = self.axes.iter().filter(|a| a.index.spread == Spread::Full);
                    let place = full.map(|a| place(values.view(a.index).at(r * L + l), a.last, a.stride));
                    at += place.sum::<usize>();
                }
                grad[at] += product;
            }
            r += 1;
        }
    }
}
