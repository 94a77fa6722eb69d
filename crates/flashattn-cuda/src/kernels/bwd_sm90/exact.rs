//! Rows of gradients that are not finite, once more and exactly.
//!
//! In a block that a row sees in part its hidden keys have P = dS = 0; but their rows take part in the products, and 0 · ∞ and
//! 0 · NaN are NaN. So do rows past the end of a packed sequence. To look at each block's operands before the products would
//! cost each block; what went wrong shows in the result:
//!
//! ```text
//! if no element of the warp's 16 rows of a gradient is NaN or ∞: done           (always, but for broken inputs)
//! for each of them that has one:
//!     for each pair of query and key that the row takes part in, and no other:  its terms, by the same formulas
//!         until each broken column is broken again: then what was seen broke it
//!     write the broken columns
//! ```

use std::marker::PhantomData;

use ptx::Fragment;
use ptx::build::{Address, Builder, Half, Reg};

use super::elements::{Formula, Given, place};
use super::output::Rows;
use super::work::{Sequence, Work};
use crate::kernels::global::{columns, float, half_bits, not_finite};
use crate::kernels::program::{Element, Place, ProgramEmitter};

/// Pairs of queries and keys of one sequence, by one warp.
pub(super) struct Exact<'a, 'k, H> {
    work: &'a Work<'a, 'k>,
    sequence: Sequence<'k>,
    batch: Reg<'k, u32>,
    lane: Reg<'k, u32>,
    half: PhantomData<H>,
}

/// A query or key: its rows of q and dO, or of k and v, each lane with every 32nd column.
struct Vectors<'k> {
    index: Reg<'k, u32>,
    first: Vec<Reg<'k, f32>>,
    second: Vec<Reg<'k, f32>>,
}

/// Columns of a row of a gradient that are not finite, and their sums anew.
struct Broken<'k> {
    at: Address<'k, u64>,
    columns: Vec<(Reg<'k, bool>, Reg<'k, f32>)>,
}

impl<'a, 'k, H: Half> Exact<'a, 'k, H> {
    pub fn new(work: &'a Work<'a, 'k>, sequence: Sequence<'k>, batch: Reg<'k, u32>) -> Self {
        Exact { work, sequence, batch, lane: work.k.lane(), half: PhantomData }
    }

    /// dK and dV, those of them that the warp has, of its keys that are broken, after they were written.
    pub fn repair_keys(
        &self,
        head_kv: Reg<'k, u32>,
        rows: [&Rows<'k>; 2],
        fragments: [Option<&Fragment<'k>>; 2],
    ) {
        let (k, work) = (self.work.k, self.work);
        let own: Vec<_> = fragments.into_iter().flatten().collect();
        self.each_broken(rows[0], &own, |key| {
            let key = self.key(head_kv, key);
            let [dk, dv] = [0, 1].map(|i| fragments[i].map(|_| self.broken(rows[i], key.index)));
            let each = || dk.iter().chain(&dv);
            let group = work.group();
            let query = k.var(0u32);
            // Queries of all heads of the group, one after the other.
            let all = self.sequence.seqlen_q * group;
            k.loop_(|| {
                k.break_if(query.ge(all));
                let (head, index) =
                    (head_kv * group + query / self.sequence.seqlen_q, query % self.sequence.seqlen_q);
                let place = place(work, &self.sequence, self.batch, head);
                let stats = self.stats(head, index);
                k.if_(self.sees(&place, stats, index, key.index), || {
                    let query = self.query(head, index);
                    let (p, dx) = self.terms(place, stats, &query, &key);
                    if let Some(dv) = &dv {
                        dv.add(p, &query.second);
                    }
                    if let Some(dk) = &dk {
                        dk.add(dx, &query.first);
                    }
                });
                query.set(query + 1);
                let open = each().map(Broken::open).reduce(|a, b| a | b);
                k.break_if(!open.unwrap_or_else(|| k.var(false)).any());
            });
            if let Some(dk) = &dk {
                dk.write::<H>(Some(work.params.d_scale()));
            }
            if let Some(dv) = &dv {
                dv.write::<H>(work.params.dropout.as_ref().map(|dropout| dropout.keep_scale));
            }
        });
    }

    /// dQ of the warp's queries that are broken, after they were written.
    pub fn repair_queries(&self, head: Reg<'k, u32>, rows: &Rows<'k>, fragment: &Fragment<'k>) {
        let (k, work) = (self.work.k, self.work);
        self.each_broken(rows, &[fragment], |index| {
            let query = self.query(head, index);
            let dq = self.broken(rows, index);
            let place = place(work, &self.sequence, self.batch, head);
            let stats = self.stats(head, index);
            let key = k.var(0u32);
            k.loop_(|| {
                k.break_if(key.ge(self.sequence.seqlen_k));
                k.if_(self.sees(&place, stats, index, key), || {
                    let key = self.key(head / work.group(), key);
                    let (_, dx) = self.terms(place, stats, &query, &key);
                    dq.add(dx, &key.first);
                });
                key.set(key + 1);
                k.break_if(!dq.open().any());
            });
            dq.write::<H>(Some(work.params.d_scale()));
        });
    }

    /// Runs `body` for each of the warp's rows (by its number in the sequence) with an element that is not finite.
    fn each_broken(&self, rows: &Rows<'k>, fragments: &[&Fragment<'k>], body: impl FnOnce(Reg<'k, u32>)) {
        let k = self.work.k;
        let broken = [0, 1].map(|half| {
            let sum = k.var(0.0f32);
            let registers = fragments.iter().flat_map(|f| f.registers.iter().enumerate());
            for (_, &x) in registers.filter(|&(i, _)| Fragment::half(i) == half) {
                sum.set(x.fma(0.0, sum));
            }
            sum.ne(0.0)
        });
        k.if_((broken[0] | broken[1]).any(), || {
            // What other lanes have written is read.
            k.sync_warp();
            let broken = broken.map(|broken| broken.ballot().bits::<u32>());
            let first = rows.origin + (k.warp() & 3) * 16;
            k.for_(0u32, 16u32, 1u32, |i| {
                // Row i is in four lanes, as one of their two rows.
                let any = (i.ge(8).select(broken[1], broken[0]) >> ((i & 7) << 2)) & 15;
                let index = first + i;
                k.if_(any.ne(0) & index.lt(rows.rows), || body(index));
            });
        });
    }

    /// The columns of a row that belong to the warp's fragment and are broken.
    fn broken(&self, rows: &Rows<'k>, index: Reg<'k, u32>) -> Broken<'k> {
        let (k, lane) = (self.work.k, self.lane);
        let at = rows.tensor.at([rows.batch, rows.start + index, rows.head, lane]);
        let read = columns(lane, at, rows.dim).into_iter().enumerate();
        let columns = read.map(|(i, bits)| {
            let mut broken = not_finite::<H>(bits);
            if rows.last_column > 0 {
                let column = lane + 32 * i as u32;
                broken = broken & column.ge(rows.column) & column.lt(rows.column + rows.last_column);
            }
            (broken, k.var(0.0f32))
        });
        Broken { at, columns: columns.collect() }
    }

    fn row(&self, at: Address<'k, u64>, dim: u32) -> Vec<Reg<'k, f32>> {
        columns(self.lane, at, dim).into_iter().map(float::<H>).collect()
    }

    fn query(&self, head: Reg<'k, u32>, index: Reg<'k, u32>) -> Vectors<'k> {
        let (params, config) = (self.work.params, self.work.config);
        let at = [self.work.batch(self.batch), self.sequence.q_row + index, head, self.lane];
        let (first, second) = (params.q.at(at), params.d_o.at(at));
        Vectors {
            index,
            first: self.row(first, config.head_dim),
            second: self.row(second, config.head_dim_v),
        }
    }

    fn key(&self, head_kv: Reg<'k, u32>, index: Reg<'k, u32>) -> Vectors<'k> {
        let (params, config) = (self.work.params, self.work.config);
        let at = [self.work.batch(self.batch), self.sequence.kv_row + index, head_kv, self.lane];
        let (first, second) = (params.k.at(at), params.v.at(at));
        Vectors {
            index,
            first: self.row(first, config.head_dim),
            second: self.row(second, config.head_dim_v),
        }
    }

    /// −lse in base 2 and D of a query.
    fn stats(&self, head: Reg<'k, u32>, query: Reg<'k, u32>) -> [Reg<'k, f32>; 2] {
        let (params, config) = (self.work.params, self.work.config);
        let (m_block, row) = (query / config.tile_m, query % config.tile_m);
        let tile = self.work.tile(&self.sequence, head, m_block);
        let at = row.mad_wide(4, tile.mad_wide(config.stats_bytes(), params.stats)).address();
        [at.load(), at.at(4 * config.tile_m as i32).load()]
    }

    /// Whether the mask shows a key to a query that saw more than scores of −∞: the others' dO counts nothing.
    fn sees(
        &self,
        place: &Place<'k>,
        [minus_lse, _]: [Reg<'k, f32>; 2],
        query: Reg<'k, u32>,
        key: Reg<'k, u32>,
    ) -> Reg<'k, bool> {
        let (k, params) = (self.work.k, self.work.params);
        let (q, kv) = (query.bits::<i32>(), key.bits::<i32>());
        let live = minus_lse.ne(f32::NEG_INFINITY);
        if let Some((program, _)) = &self.work.config.mask_program {
            let element = Element { row: 0, column: 0, q, kv, kv_offset: None };
            return live & ProgramEmitter::new(k, program, &params.mask_tables, *place).bool(&element);
        }
        let diagonal = q + (self.sequence.seqlen_k - self.sequence.seqlen_q).bits::<i32>();
        let [left, right] = params.band;
        let after = left.map(|left| kv.ge(diagonal - left));
        let before = right.map(|right| kv.le(diagonal + right.min(1 << 30)));
        after.into_iter().chain(before).fold(live, |a, b| a & b)
    }

    /// P (after dropout) and the gradient of the scaled score of a pair, both but for 1 / (1 − p).
    fn terms(
        &self,
        place: Place<'k>,
        [minus_lse, delta]: [Reg<'k, f32>; 2],
        query: &Vectors<'k>,
        key: &Vectors<'k>,
    ) -> (Reg<'k, f32>, Reg<'k, f32>) {
        let (k, config, params) = (self.work.k, self.work.config, self.work.params);
        let dot = |a: &[Reg<'k, f32>], b: &[Reg<'k, f32>]| {
            let own = a.iter().zip(b).fold(k.var(0.0f32), |sum, (&a, &b)| a.fma(b, sum));
            [16, 8, 4, 2, 1].into_iter().fold(own, |sum, bits| sum + sum.shfl_bfly(bits))
        };
        let score = dot(&query.first, &key.first) * params.scale;
        let dp = dot(&query.second, &key.second);
        let element =
            Element { row: 0, column: 0, q: query.index.bits(), kv: key.index.bits(), kv_offset: None };
        let kept = params.dropout.as_ref().map(|dropout| dropout.keeps(&place, query.index, key.index));
        let mut formula = Formula::new(k, config, params, place);
        let terms = formula.terms(&element, &Given { score, dp, minus_lse, delta, kept });
        (terms.p, terms.dx)
    }
}

impl<'k> Broken<'k> {
    /// Adds `factor` times a row.
    fn add(&self, factor: Reg<'k, f32>, row: &[Reg<'k, f32>]) {
        for (&(_, sum), &x) in self.columns.iter().zip(row) {
            sum.set(factor.fma(x, sum));
        }
    }

    /// Whether a broken column of the lane is still finite.
    fn open(&self) -> Reg<'k, bool> {
        let open = self.columns.iter().map(|&(broken, sum)| broken & (sum * 0.0).eq(0.0));
        open.reduce(|a, b| a | b).unwrap_or_else(|| self.at.reg().builder().var(false))
    }

    fn write<H: Half>(&self, factor: Option<Reg<'k, f32>>) {
        let k: &Builder = self.at.reg().builder();
        for (i, &(broken, sum)) in self.columns.iter().enumerate() {
            let bits = half_bits::<H>(factor.map_or(sum, |factor| sum * factor));
            k.when(broken, || self.at.at(64 * i as i32).store(bits));
        }
    }
}
