//! Rows of gradients from fragments to global memory.

use ptx::Fragment;
use ptx::build::{Address, Builder, Half, Reg};

use super::consumer::Consumer;
use super::exact::Exact;
use super::work::WorkItem;
use super::{BwdConfig, Split};
use crate::kernels::global::{GlobalTensor, half_bits};

/// What a thread's fragment is written to.
pub(super) struct Rows<'k> {
    pub tensor: GlobalTensor<'k>,
    pub batch: Reg<'k, u32>,
    pub head: Reg<'k, u32>,
    /// Where the sequence begins in the tensor, which of its rows is the fragment's first, and how many it has.
    pub start: Reg<'k, u32>,
    pub origin: Reg<'k, u32>,
    pub rows: Reg<'k, u32>,
    /// The fragment's first column (of the thread's warpgroup), and the largest that this can be.
    pub column: Reg<'k, u32>,
    pub last_column: u32,
    /// Columns of the tensor.
    pub dim: u32,
}

impl<'k> Rows<'k> {
    /// Writes the fragment, multiplied by `factor`.
    pub fn write<H: Half>(&self, k: &'k Builder, fragment: &Fragment<'k>, factor: Option<Reg<'k, f32>>) {
        let (thread, first) = (Fragment::column(k), self.origin + Fragment::row(k));
        for half in 0..2usize {
            let row = first + 8 * half as u32;
            k.if_(row.lt(self.rows), || {
                let at = self.tensor.at([self.batch, self.start + row, self.head, self.column + thread]);
                let registers = (0..fragment.registers.len()).step_by(2);
                for i in registers.filter(|&i| Fragment::half(i) == half) {
                    let pair = [0, 1].map(|next| {
                        let value = fragment.registers[i + next];
                        factor.map_or(value, |factor| value * factor)
                    });
                    self.pair::<H>(k, at, thread, Fragment::column_offset(i), pair);
                }
            });
        }
    }

    /// Two neighbouring columns, as far as they exist.
    fn pair<H: Half>(
        &self,
        k: &'k Builder,
        at: Address<'k, u64>,
        thread: Reg<'k, u32>,
        offset: u32,
        [low, high]: [Reg<'k, f32>; 2],
    ) {
        let at = at.at(2 * offset as i32);
        let packed = k.pack::<H>(low, high);
        if self.last_column + offset + 8 <= self.dim {
            return at.store(packed);
        }
        if self.last_column == 0 && offset >= self.dim {
            return;
        }
        let column = self.column + thread + offset;
        k.when((column + 1).lt(self.dim), || at.store(packed));
        if self.dim % 2 == 1 {
            k.when(column.eq(self.dim - 1), || at.store(half_bits::<H>(low)));
        }
    }
}

impl BwdConfig {
    /// First column of a warpgroup's half of `columns` in all, and the largest that it can be.
    pub(super) fn half_of<'k>(&self, group: Reg<'k, u32>, columns: u32, halved: bool) -> (Reg<'k, u32>, u32) {
        let half = if halved { columns / 2 } else { 0 };
        (group * half, half)
    }
}

impl<'k, H: Half> Consumer<'_, 'k, H> {
    /// dK and dV of the keys that exist.
    pub(super) fn write(&self, item: &WorkItem<'k>) {
        let (k, config, params) = (self.k, self.config, self.params);
        let halved = config.split == Split::Columns;
        let keys = if halved { k.var(0u32) } else { self.group * 64 };
        let origin = item.n_block * config.tile_n() + keys;
        let rows = |tensor: GlobalTensor<'k>, dim: u32, columns: u32| {
            let (column, last_column) = config.half_of(self.group, columns, halved);
            Rows {
                tensor,
                batch: self.work.batch(item.batch),
                head: item.head_kv,
                start: item.sequence.kv_row,
                origin,
                rows: item.sequence.seqlen_k,
                column,
                last_column,
                dim,
            }
        };
        let dk = rows(params.dk, config.head_dim, config.k().columns);
        let dv = rows(params.dv, config.head_dim_v, config.v().columns);
        dk.write::<H>(k, &self.dk, Some(params.scale));
        dv.write::<H>(k, &self.dv, params.dropout.as_ref().map(|dropout| dropout.keep_scale));
        if config.repair {
            let exact = Exact::<H>::new(self.work, item.sequence, item.batch);
            exact.repair_keys(item.head_kv, [&dk, &dv], [&self.dk, &self.dv]);
        }
    }
}
