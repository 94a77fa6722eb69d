//! Rows of gradients from fragments to global memory.

use ptx::Fragment;
use ptx::build::{Address, Builder, Half, Reg};
use ptx::types::B32;

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
    /// Writes the fragment, multiplied by `factor`. By whole warps.
    pub fn write<H: Half>(&self, k: &'k Builder, fragment: &Fragment<'k>, factor: Option<Reg<'k, f32>>) {
        let (thread, first) = (Fragment::column(k), self.origin + Fragment::row(k));
        let wide = BwdConfig::gradient_bytes(self.dim) == 16;
        for half in 0..2usize {
            let row = first + 8 * half as u32;
            let exists = row.lt(self.rows);
            // Of wide stores the thread's columns are eight, else two of eight.
            let own = if wide { thread * 4 } else { thread };
            let column = self.column + own;
            let at = self.tensor.at([self.batch, self.start + row, self.head, column]);
            let pairs = (2 * half..fragment.registers.len()).step_by(4).map(|i| {
                [0, 1].map(|next| {
                    let value = fragment.registers[i + next];
                    factor.map_or(value, |factor| value * factor)
                })
            });
            let pairs: Vec<_> = pairs.collect();
            if wide {
                for (i, fours) in pairs.chunks(4).enumerate() {
                    self.eight::<H>(k, at, column, 32 * i as u32, fours, exists);
                }
            } else {
                k.if_(exists, || {
                    for (i, &pair) in pairs.iter().enumerate() {
                        self.pair::<H>(k, at, column, 8 * i as u32, pair);
                    }
                });
            }
        }
    }

    /// Two columns of each of up to four times eight, in four threads: they are transposed, so that each thread has eight
    /// columns of the row, and stores go out by whole sectors.
    fn eight<H: Half>(
        &self,
        k: &'k Builder,
        at: Address<'k, u64>,
        column: Reg<'k, u32>,
        offset: u32,
        pairs: &[[Reg<'k, f32>; 2]],
        exists: Reg<'k, bool>,
    ) {
        if self.last_column == 0 && offset >= self.dim {
            return;
        }
        let packed = |i: usize| {
            // Columns that there are not: no thread stores them.
            let [low, high] = pairs[i.min(pairs.len() - 1)];
            k.pack::<H>(low, high).bits::<B32>()
        };
        let (odd, upper) = ((k.tid(0) & 1).ne(0), (k.tid(0) & 2).ne(0));
        let [a, b] = [0, 2].map(|i| exchange(odd, 1, packed(i), packed(i + 1)));
        let [[a, c], [b, d]] = [0, 1].map(|i| exchange(upper, 2, a[i], b[i]));
        let inside = self.last_column + offset + 32 <= self.dim;
        let exists = if inside { exists } else { exists & (column + offset).lt(self.dim) };
        k.when(exists, || at.at(2 * offset as i32).store_vec([a, b, c, d]));
    }

    /// Two neighbouring columns, as far as they exist.
    fn pair<H: Half>(
        &self,
        k: &'k Builder,
        at: Address<'k, u64>,
        column: Reg<'k, u32>,
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
        let column = column + offset;
        k.when((column + 1).lt(self.dim), || at.store(packed));
        if self.dim % 2 == 1 {
            k.when(column.eq(self.dim - 1), || at.store(half_bits::<H>(low)));
        }
    }
}

/// Between lanes whose index differs in this bit, which is set in the `upper` of the two: the lower lane gets both first values,
/// the upper both second ones, its own in its own place.
fn exchange<'k>(
    upper: Reg<'k, bool>,
    bit: u32,
    first: Reg<'k, B32>,
    second: Reg<'k, B32>,
) -> [Reg<'k, B32>; 2] {
    let got = upper.select(first, second).shfl_bfly(bit);
    [upper.select(got, first), upper.select(second, got)]
}

impl BwdConfig {
    /// First column of a warpgroup's half of `columns` in all, and the largest that it can be.
    pub(super) fn half_of<'k>(&self, group: Reg<'k, u32>, columns: u32, halved: bool) -> (Reg<'k, u32>, u32) {
        let half = if halved { columns / 2 } else { 0 };
        (group * half, half)
    }
}

impl<'k, H: Half> Consumer<'_, 'k, H> {
    /// dK and dV, those of them that are among the warpgroup's `sums`, of the keys that exist.
    pub(super) fn write(&self, item: &WorkItem<'k>, sums: &[&Fragment<'k>]) {
        let (k, config, params) = (self.k, self.config, self.params);
        let halved = config.split == Split::Columns;
        let keys = if config.split == Split::Keys { self.group * 64 } else { k.var(0u32) };
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
        let own = |fragment: &_| sums.iter().copied().find(|&sum| std::ptr::eq(sum, fragment));
        let own = [own(&self.dk), own(&self.dv)];
        if let Some(sum) = own[0] {
            dk.write::<H>(k, sum, Some(params.d_scale()));
        }
        if let Some(sum) = own[1] {
            dv.write::<H>(k, sum, params.dropout.as_ref().map(|dropout| dropout.keep_scale));
        }
        if config.repair {
            let exact = Exact::<H>::new(self.work, item.sequence, item.batch);
            exact.repair_keys(item.head_kv, [&dk, &dv], own);
        }
    }
}
