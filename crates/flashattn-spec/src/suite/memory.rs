//! Tensors in memory: the layouts that callers have, and what may not be touched between their elements.

use crate::element::Element;
use crate::tensor::{View, ViewMut, contiguous_strides};

/// How the tensors of a case lie in memory. Gaps of inputs hold NaN, and those of outputs must stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Row-major `[batch, seqlen, heads, head_dim]`.
    Dense,
    /// Memory is `[batch, heads, seqlen, head_dim]`.
    HeadsFirst,
    /// q, k and v of a token follow one another, as a fused projection leaves them.
    PackedQkv,
    /// Gaps after each head, token and sequence, and an odd address to start from.
    Padded,
    /// All sequences share one k and one v (stride 0); the rest is dense.
    SharedKv,
}

impl Layout {
    /// All of them.
    pub const ALL: [Layout; 5] =
        [Layout::Dense, Layout::HeadsFirst, Layout::PackedQkv, Layout::Padded, Layout::SharedKv];
}

/// Which tensor memory is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Q,
    K,
    V,
    O,
}

/// A tensor in memory of its own.
pub(super) struct Memory<T> {
    data: Vec<T>,
    /// What `data` held at first.
    filled: T,
    offset: usize,
    shape: [usize; 4],
    strides: [usize; 4],
}

impl<T: Element> Memory<T> {
    /// Memory filled with `fill`. `packed` is the width of q, k and v of a token. Outputs are never shared.
    pub fn new(
        shape: [usize; 4],
        layout: Layout,
        role: Role,
        packed: [usize; 3],
        output: bool,
        fill: T,
    ) -> Self {
        let [_, n, h, d] = shape;
        let dense = contiguous_strides(shape);
        let (offset, strides) = match (layout, role) {
            (Layout::HeadsFirst, _) => (0, [h * n * d, d, n * d, 1]),
            (Layout::Padded, _) => {
                let token = h * (d + 3) + 5;
                (3, [n * token + 7, token, d + 3, 1])
            }
            (Layout::PackedQkv, Role::Q | Role::K | Role::V) => {
                let before = role as usize;
                let token = packed.iter().sum();
                (packed[..before].iter().sum(), [n * token, token, d, 1])
            }
            (Layout::SharedKv, Role::K | Role::V) if !output => (0, [0, dense[1], dense[2], 1]),
            _ => (0, dense),
        };
        let last: usize = shape.iter().zip(strides).map(|(n, s)| n.saturating_sub(1) * s).sum();
        // One more row than needed, to see writes past the end.
        let data = vec![fill; offset + last + 1 + d];
        Memory { data, filled: fill, offset, shape, strides }
    }

    pub fn view(&self) -> View<'_, T> {
        let view = View::with_strides(&self.data[self.offset..], self.shape, self.strides);
        view.expect("the memory was made for this shape and these strides")
    }

    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        let view = ViewMut::with_strides(&mut self.data[self.offset..], self.shape, self.strides);
        view.expect("outputs have memory of their own for every element")
    }

    /// Where each row starts, row-major over (batch, token, head).
    fn row_starts(&self) -> impl Iterator<Item = usize> + use<T> {
        let ([batch, n, h, _], [sb, sn, sh, _], offset) = (self.shape, self.strides, self.offset);
        (0..batch).flat_map(move |b| {
            (0..n).flat_map(move |i| (0..h).map(move |k| offset + b * sb + i * sn + k * sh))
        })
    }

    /// Sets every element, row-major.
    pub fn set(&mut self, mut value: impl FnMut() -> T) {
        for start in self.row_starts() {
            self.data[start..start + self.shape[3]].iter_mut().for_each(|x| *x = value());
        }
    }

    /// One row, by its number in row-major order.
    pub fn row_mut(&mut self, row: usize) -> Option<&mut [T]> {
        let start = self.row_starts().nth(row)?;
        Some(&mut self.data[start..start + self.shape[3]])
    }

    /// All elements, row-major.
    pub fn to_f64(&self) -> Vec<f64> {
        let rows = self.row_starts().map(|start| &self.data[start..start + self.shape[3]]);
        rows.flatten().map(|x| x.to_f64()).collect()
    }

    /// Position of the first element of a gap that has been written to.
    pub fn written_gap(&self) -> Option<usize> {
        let mut ours = vec![false; self.data.len()];
        for start in self.row_starts() {
            ours[start..start + self.shape[3]].fill(true);
        }
        let filled = bytemuck::bytes_of(&self.filled);
        (0..ours.len()).find(|&i| !ours[i] && bytemuck::bytes_of(&self.data[i]) != filled)
    }
}
