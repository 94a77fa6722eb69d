//! Rows of O that are not finite, once more and exactly.
//!
//! Two things break rows that should be finite. In a block that a row sees in part its hidden keys have P = 0; but their values
//! take part in O += P·V, and 0 · ∞ and 0 · NaN are NaN (so do values of the next sequence, past the end of a packed one). And
//! a row whose scores jump far above the reference that is kept (`Consumer::exponentiate`) overflows. To look at each block
//! would cost each block; what went wrong shows in the result, and costs a multiply-add for each register of O:
//!
//! ```text
//! if no element or sum that the thread has written is NaN or ∞: done        (always, but for such inputs)
//! for each tile that the block has had (a chain through global memory), each of the warp's 16 rows that has one:
//!     reference and sum by the definition, over the keys that the row sees, and no others;  lse
//!     for each key that the row sees:  s = q·k; score mod; p = exp2(s − reference); o += p·v
//!         until each broken column is broken again: then what was seen broke it
//!     write the broken columns
//! ```
//!
//! It is slow: a warp goes through the keys one by one.

use std::f32::consts::{LN_2, LOG2_E};

use ptx::build::{Address, Half, Reg};

use super::Params;
use super::consumer::{Consumer, half_bits};
use super::work::WorkTile;
use crate::kernels::program::{Element, ProgramEmitter};

/// A tensor of the caller's in global memory.
#[derive(Clone, Copy)]
pub(super) struct GlobalTensor<'k> {
    pub data: Reg<'k, u64>,
    /// Of batch, row and head, in elements.
    pub strides: [Reg<'k, u64>; 3],
}

impl<'k> GlobalTensor<'k> {
    /// Address of a row's element `column`, of two bytes.
    fn at(&self, [batch, row, head, column]: [Reg<'k, u32>; 4]) -> Address<'k, u64> {
        let [by_batch, by_row, by_head] = self.strides;
        let wide = |r: Reg<'k, u32>| r.to_u64();
        let element = wide(batch) * by_batch + wide(row) * by_row + wide(head) * by_head + wide(column);
        (element * 2 + self.data).address()
    }
}

/// What a row ended with.
#[derive(Clone, Copy)]
pub(super) struct RowEnd<'k> {
    reference: Reg<'k, f32>,
    /// What O is multiplied by.
    pub inverse: Reg<'k, f32>,
    pub lse: Reg<'k, f32>,
}

impl<'k> RowEnd<'k> {
    /// Of a row with this reference and sum, both in base 2; and with its head's sink.
    pub fn new(
        params: &Params<'k>,
        reference: Reg<'k, f32>,
        sum: Reg<'k, f32>,
        sink: Option<Reg<'k, f32>>,
    ) -> Self {
        let (mut all, mut base, mut factor) = (sum, reference, None);
        if let Some(sink) = sink {
            // The sink is one more key without a value.
            let most = reference.max(sink);
            let zero = most.eq(f32::NEG_INFINITY).select(0.0, most);
            let old = (reference - zero).exp2();
            all = sum.fma(old, (sink - zero).exp2());
            (base, factor) = (most, Some(old));
        }
        let nothing = all.eq(0.0);
        let mut inverse = nothing.select(0.0, all.rcp());
        for scale in [factor, params.dropout.as_ref().map(|dropout| dropout.keep_scale)].into_iter().flatten()
        {
            inverse = inverse * scale;
        }
        let lse = nothing.select(f32::NEG_INFINITY, (base + all.log2()) * LN_2);
        RowEnd { reference, inverse, lse }
    }
}

/// A row of a warp, the same in all its lanes.
struct Row<'k> {
    /// Index of its query in the sequence.
    query: Reg<'k, u32>,
    /// The lane's columns of q.
    q: Vec<Reg<'k, f32>>,
}

impl<'k, H: Half> Consumer<'_, 'k, H> {
    /// Computes broken rows of the warp again, in all tiles that its block has had, by `exists` of the last.
    pub fn repair(&self, last: Reg<'k, u32>) {
        let k = self.k;
        // What other lanes have written is read.
        k.sync_warp();
        let next = k.var(last);
        k.loop_(|| {
            k.break_if(next.eq(0));
            let tile = self.work.tile(next - 1);
            let first = tile.m_block * self.config.tile_m() + (k.warp() - 4) * 16;
            let rows = self.work.rows(tile.seqlen_q);
            k.for_(first, rows.min(first + 16), 1u32, |row| self.repair_row(&tile, row));
            next.set(self.work.before(next).load::<u32>());
        });
    }

    /// Each lane takes every 32nd column.
    fn repair_row(&self, tile: &WorkTile<'k>, row: Reg<'k, u32>) {
        let (k, config, params, lane) = (self.k, self.config, self.params, self.lane);
        let [o, lse] = self.work.outputs(tile);
        let lse = (lse + self.work.in_lse(row) * 4).address();
        let value = lse.load::<f32>();
        // Its sum was not finite; −∞ is that of a row without keys.
        let all = (value * 0.0).ne(0.0) & value.ne(f32::NEG_INFINITY);
        let o = (o + (self.work.in_o(row) + lane.to_u64()) * 2).address();
        let exponent = if H::ELEMENT == ptx::instr::Element::F16 { 0x7c00 } else { 0x7f80 };
        let written = self.columns(o, config.head_dim_v).into_iter().enumerate();
        let broken: Vec<_> = written
            .map(|(i, bits)| {
                let inside = lane.lt(config.head_dim_v - 32 * i as u32);
                ((bits.to_u32() & exponent).eq(exponent) | all) & inside
            })
            .collect();
        let any = broken.iter().copied().reduce(|a, b| a | b).unwrap_or_else(|| k.var(false));
        k.if_(any.any(), || {
            let (query, head) = (self.work.query(row), self.work.head(tile, row));
            let q = params.inputs[0].at([self.work.batch(tile), query + tile.q_row, head, lane]);
            let q: Vec<_> =
                self.columns(q, config.head_dim).into_iter().map(|bits| self.float(bits)).collect();
            let row = Row { query, q };
            let end = self.sum_row(tile, &row);
            k.when(lane.eq(0), || lse.store(end.lse));
            let base = end.reference.eq(f32::NEG_INFINITY).select(0.0, end.reference);
            let sums: Vec<_> = broken.iter().map(|_| k.var(0.0f32)).collect();
            let add = |score: Reg<'k, f32>, key, at| {
                let p = self.dropped_out(tile, &row, key, (score - base).exp2());
                for (sum, bits) in sums.iter().zip(self.columns(params.inputs[2].at(at), config.head_dim_v)) {
                    sum.set(p.fma(self.float(bits), *sum));
                }
            };
            self.each_key(tile, &row, add, || {
                // Until each broken column is broken again: then what was seen broke it.
                let open = sums.iter().zip(&broken).map(|(&sum, &broken)| broken & (sum * 0.0).eq(0.0));
                let open = open.reduce(|a, b| a | b).unwrap_or_else(|| k.var(false));
                !open.any()
            });
            for (i, (&sum, &broken)) in sums.iter().zip(&broken).enumerate() {
                // Of keys whose scores are all −∞ nothing is taken.
                let value = end.inverse.eq(0.0).select(0.0, sum * end.inverse);
                let bits = half_bits::<H>(value);
                k.when(broken, || o.at(64 * i as i32).store(bits));
            }
        });
    }

    /// The row's reference, its largest score, and sum by the definition.
    fn sum_row(&self, tile: &WorkTile<'k>, row: &Row<'k>) -> RowEnd<'k> {
        let k = self.k;
        let (most, sum) = (k.var(f32::NEG_INFINITY), k.var(0.0f32));
        let add = |score: Reg<'k, f32>, _, _| {
            let new = most.max(score);
            let base = new.eq(f32::NEG_INFINITY).select(0.0, new);
            sum.set(sum.fma((most - base).exp2(), (score - base).exp2()));
            most.set(new);
        };
        self.each_key(tile, row, add, || sum.ne(sum).any());
        RowEnd::new(self.params, most, sum, self.work.sink(tile))
    }

    /// Runs `body` for each key that the row sees, with its score in base 2 and its place (and that of the lane's first
    /// column) in k and v, until `done`.
    fn each_key(
        &self,
        tile: &WorkTile<'k>,
        row: &Row<'k>,
        body: impl FnOnce(Reg<'k, f32>, Reg<'k, u32>, [Reg<'k, u32>; 4]),
        done: impl FnOnce() -> Reg<'k, bool>,
    ) {
        let (k, params) = (self.k, self.params);
        let head_kv = self.work.head_kv(tile);
        let key = k.var(0u32);
        k.loop_(|| {
            k.break_if(key.ge(tile.seqlen_k));
            k.if_(self.sees(tile, row.query, key), || {
                let at = [self.work.batch(tile), key + tile.kv_row, head_kv, self.lane];
                body(self.score(tile, row, key, params.inputs[1].at(at)), key, at);
            });
            key.set(key + 1);
            k.break_if(done());
        });
    }

    /// Elements 32·i of a row of `dim` from the lane's own on; 0 past the end.
    fn columns(&self, at: Address<'k, u64>, dim: u32) -> Vec<Reg<'k, u16>> {
        let k = self.k;
        let column = |i: u32| {
            let at = at.at(64 * i as i32);
            if 32 * (i + 1) <= dim {
                return at.load();
            }
            let value = k.var(0u16);
            k.when(self.lane.lt(dim - 32 * i), || value.set(at.load::<u16>()));
            value
        };
        (0..dim.div_ceil(32)).map(column).collect()
    }

    fn float(&self, bits: Reg<'k, u16>) -> Reg<'k, f32> {
        match H::ELEMENT {
            ptx::instr::Element::F16 => bits.f16_to_f32(),
            _ => (bits.to_u32() << 16).bits(),
        }
    }

    /// Whether the mask shows a key of the sequence to a query.
    fn sees(&self, tile: &WorkTile<'k>, query: Reg<'k, u32>, key: Reg<'k, u32>) -> Reg<'k, bool> {
        let (k, params) = (self.k, self.params);
        let (q, kv) = (query.bits::<i32>(), key.bits::<i32>());
        if let Some((program, _)) = &self.config.mask_program {
            let element = Element { row: 0, column: 0, q, kv, kv_offset: None };
            let place = self.place(tile).place;
            return ProgramEmitter::new(k, program, &params.mask_tables, place).bool(&element);
        }
        let diagonal = q + (tile.seqlen_k - tile.seqlen_q).bits::<i32>();
        let [left, right] = params.band;
        let after = left.map(|left| kv.ge(diagonal - left));
        let before = right.map(|right| kv.le(diagonal + right.min(1 << 30)));
        after.into_iter().chain(before).reduce(|a, b| a & b).unwrap_or_else(|| k.var(true))
    }

    /// The score of a key that the row sees, in base 2.
    fn score(
        &self,
        tile: &WorkTile<'k>,
        row: &Row<'k>,
        key: Reg<'k, u32>,
        at: Address<'k, u64>,
    ) -> Reg<'k, f32> {
        let (k, config, params) = (self.k, self.config, self.params);
        let mut score = k.var(0.0f32);
        for (&q, bits) in row.q.iter().zip(self.columns(at, config.head_dim)) {
            score = q.fma(self.float(bits), score);
        }
        for bits in [16, 8, 4, 2, 1] {
            score = score + score.shfl_bfly(bits);
        }
        if let Some((program, _)) = &config.score_mod {
            score = score * params.scale;
            let element = Element { row: 0, column: 0, q: row.query.bits(), kv: key.bits(), kv_offset: None };
            let mut emitter = ProgramEmitter::new(k, program, &params.score_tables, self.place(tile).place);
            return emitter.float(&element, score) * LOG2_E;
        }
        if config.prescaled {
            score = score * (params.scale * LOG2_E);
        }
        score * self.scale
    }

    /// A key's p, or 0 if it is dropped.
    fn dropped_out(
        &self,
        tile: &WorkTile<'k>,
        row: &Row<'k>,
        key: Reg<'k, u32>,
        p: Reg<'k, f32>,
    ) -> Reg<'k, f32> {
        let Some(dropout) = &self.params.dropout else { return p };
        dropout.keeps(&self.place(tile).place, row.query, key).select(p, 0.0)
    }
}
