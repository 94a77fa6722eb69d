//! Results: [`Output`] of the forward pass and [`Gradients`] of the backward pass.

use crate::error::{Error, shape_error};
use crate::tensor::Tensor;
use flashattn_spec::Element;
use flashattn_spec::expr::Table;
use flashattn_spec::softmax::merge;

/// What the forward pass gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Output<T> {
    /// Output `[batch, seqlen_q, heads_q, head_dim_v]`.
    pub o: Tensor<T>,
    /// Log-sum-exp of each row's scores (natural logarithm), of [`Output::lse_shape`]; −∞ where a query sees
    /// no key.
    pub lse: Vec<f32>,
}

impl<T: Element> Output<T> {
    /// `[batch, heads_q, seqlen_q]`; `[1, heads_q, total_q]` when packed.
    pub fn lse_shape(&self) -> [usize; 3] {
        let [batch, seqlen, heads, _] = self.o.shape();
        [batch, heads, seqlen]
    }

    /// Makes this the attention over its own keys and those of `other`: how results over parts of the keys
    /// become one (split-KV, several devices). The two sets of keys must be disjoint, and a sink may count in
    /// one of them only.
    ///
    /// ```
    /// # use flashattn::{Attention, View};
    /// let q = [0.3f32, -0.2, 0.5, 0.1]; // [batch 1, seqlen_q 2, heads 1, head_dim 2]
    /// let (k, v) = ([0.1f32, 0.7, -0.4, 0.2, 0.9, -0.6], [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0]); // 3 keys
    /// let attention = Attention::new();
    /// let q = View::new(&q, [1, 2, 1, 2])?;
    /// let over = |keys: std::ops::Range<usize>| {
    ///     let shape = [1, keys.len(), 1, 2];
    ///     let elements = keys.start * 2..keys.end * 2;
    ///     let (k, v) = (View::new(&k[elements.clone()], shape)?, View::new(&v[elements], shape)?);
    ///     Ok::<_, Box<dyn std::error::Error>>(attention.forward_with_lse(&q, &k, &v)?)
    /// };
    /// let mut merged = over(0..2)?;
    /// merged.merge(&over(2..3)?)?;
    /// let whole = over(0..3)?;
    /// assert!(merged.o.data().iter().zip(whole.o.data()).all(|(a, b)| (a - b).abs() < 1e-5));
    /// assert!(merged.lse.iter().zip(&whole.lse).all(|(a, b)| (a - b).abs() < 1e-5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Rounded to `T`; to merge many parts of a 16-bit type, [`crate::merge`] rows in f32 instead.
    ///
    /// # Errors
    /// [`flashattn_spec::ProblemError::Shape`] unless both have the same shape.
    pub fn merge(&mut self, other: &Output<T>) -> Result<(), Error> {
        let shape = self.o.shape();
        if other.o.shape() != shape {
            return Err(shape_error("other.o", &other.o.shape(), &shape));
        }
        let [batch, seqlen, heads, d] = shape;
        let rows = self.o.data().len().checked_div(d).unwrap_or(0);
        for (name, lse) in [("lse", &self.lse), ("other.lse", &other.lse)] {
            if lse.len() != rows {
                return Err(shape_error(name, &[lse.len()], &[batch, heads, seqlen]));
            }
        }
        let to_f32 = |row: &[T], buffer: &mut Vec<f32>| {
            buffer.clear();
            buffer.extend(row.iter().map(|x| x.to_f32()));
        };
        let (mut a, mut b) = (Vec::with_capacity(d), Vec::with_capacity(d));
        // (`d` is 0 only without rows, and chunks of 0 do not exist.)
        let others = other.o.data().chunks_exact(d.max(1));
        for (i, (own, other_row)) in self.o.data_mut().chunks_exact_mut(d.max(1)).zip(others).enumerate() {
            // Rows of o are ordered (batch, position, head), those of lse (batch, head, position).
            let (head, token) = (i % heads, i / heads);
            let at = (token / seqlen * heads + head) * seqlen + token % seqlen;
            to_f32(own, &mut a);
            to_f32(other_row, &mut b);
            merge(&mut a, &mut self.lse[at], &b, other.lse[at]);
            own.iter_mut().zip(&a).for_each(|(to, &x)| *to = T::from_f32(x));
        }
        Ok(())
    }
}

/// What the backward pass gives.
#[derive(Clone, Debug)]
pub struct Gradients<T> {
    /// Gradient of q.
    pub dq: Tensor<T>,
    /// Gradient of k, summed over the query heads that share a KV head.
    pub dk: Tensor<T>,
    /// Gradient of v, summed over the query heads that share a KV head.
    pub dv: Tensor<T>,
    /// Gradient of the sink logits `[heads_q]`, if there are any.
    pub d_sinks: Option<Vec<f32>>,
    /// The tables made [`Table::with_grad`] that the score mods read, each with its gradient, row-major.
    pub d_tables: Vec<(Table, Vec<f32>)>,
}

impl<T> Gradients<T> {
    /// The gradient of a table: that very one (or a clone), as it was given to the score mod.
    pub fn of_table(&self, table: &Table) -> Option<&[f32]> {
        self.d_tables.iter().find(|(t, _)| t.is_same(table)).map(|(_, gradient)| gradient.as_slice())
    }
}
