//! Rows of O that are not finite, once more and exactly.
//!
//! In a block that a row sees in part its hidden keys have P = 0; but their values take part in O += P·V, and 0 · ∞ and
//! 0 · NaN are NaN. So do values of the next sequence, past the end of a packed one. To look at each block's values before
//! the product would cost each block; what went wrong shows in the result, and costs a multiply-add for each register of O:
//!
//! ```text
//! if no element of the warp's rows is NaN or ∞: done                          (always, but for broken inputs)
//! for each of the warp's 16 rows that has one:
//!     for each key that the row sees, and no other:  s = q·k; score mod; p = exp2(s − reference); o += p·v
//!         until each broken column is broken again: then what was seen broke it
//!     write the broken columns
//! ```
//!
//! The row maximum and sum are right in any case: scores of hidden keys are replaced, not multiplied.

use std::f32::consts::LOG2_E;

use ptx::Fragment;
use ptx::build::{Address, Half, Reg};

use super::consumer::{Consumer, half_bits};
use super::work::WorkTile;
use crate::kernels::philox::philox4x32;
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

/// What a row of a thread ended with: its sum (0: nothing seen), and what O is multiplied by at the end.
#[derive(Clone, Copy)]
pub(super) struct RowEnd<'k> {
    pub seen: Reg<'k, f32>,
    pub inverse: Reg<'k, f32>,
}

/// A row of a warp, the same in all its lanes.
struct Row<'k> {
    /// Index in its sequence.
    index: Reg<'k, u32>,
    reference: Reg<'k, f32>,
    inverse: Reg<'k, f32>,
    /// Keys to look at.
    keys: Reg<'k, u32>,
}

impl<'k, H: Half> Consumer<'_, 'k, H> {
    /// Computes the warp's broken rows again, after they were written.
    pub fn repair(&self, tile: &WorkTile<'k>, ends: [RowEnd<'k>; 2]) {
        let (k, config) = (self.k, self.config);
        let broken = [0, 1].map(|half| {
            let sum = k.var(0.0f32);
            for (_, &o) in self.o.registers.iter().enumerate().filter(|&(i, _)| Fragment::half(i) == half) {
                sum.set(o.fma(0.0, sum));
            }
            sum.ne(0.0)
        });
        k.if_((broken[0] | broken[1]).any(), || {
            // What other lanes have written is read.
            k.sync_warp();
            let broken = broken.map(|broken| broken.ballot().bits::<u32>());
            let (seen, inverse) = (ends.map(|end| end.seen), ends.map(|end| end.inverse));
            let first = tile.m_block * config.tile_m() + (k.warp() - 4) * 16;
            k.for_(0u32, 16u32, 1u32, |i| {
                // Row i is in four lanes, as one of their two rows.
                let (upper, owner) = (i.ge(8), (i & 7) << 2);
                let index = first + i;
                let any = (upper.select(broken[1], broken[0]) >> owner) & 15;
                k.if_(any.ne(0) & index.lt(tile.seqlen_q), || {
                    let float = |of: [Reg<'k, f32>; 2]| upper.select(of[1], of[0]).shfl_idx(owner);
                    let keys = float(seen).eq(0.0).select(0u32, tile.seqlen_k);
                    let (reference, inverse) = (float(self.softmax.reference), float(inverse));
                    self.repair_row(tile, &Row { index, reference, inverse, keys });
                });
            });
        });
    }

    /// Each lane takes every 32nd column.
    fn repair_row(&self, tile: &WorkTile<'k>, row: &Row<'k>) {
        let (k, config, params, lane) = (self.k, self.config, self.params, self.lane);
        let Some([q, keys, values]) = params.inputs else { return };
        let batch = if config.varlen { k.var(0u32) } else { tile.batch };
        let head_kv = tile.head / (params.heads_q / params.heads_kv);
        let q = self.columns(q.at([batch, row.index + tile.q_row, tile.head, lane]), config.head_dim);
        let q: Vec<_> = q.into_iter().map(|bits| self.float(bits)).collect();
        let o = GlobalTensor { data: params.o, strides: params.o_strides };
        let o = o.at([batch, row.index + tile.q_row, tile.head, lane]);
        let exponent = if H::ELEMENT == ptx::instr::Element::F16 { 0x7c00 } else { 0x7f80 };
        let written = self.columns(o, config.head_dim_v).into_iter();
        let broken: Vec<_> = written.map(|bits| (bits.to_u32() & exponent).eq(exponent)).collect();
        let sums: Vec<_> = broken.iter().map(|_| k.var(0.0f32)).collect();
        let key = k.var(0u32);
        k.loop_(|| {
            k.break_if(key.ge(row.keys));
            k.if_(self.sees(tile, row.index, key), || {
                let at = [batch, key + tile.kv_row, head_kv, lane];
                let p = self.probability(tile, row, key, &q, keys.at(at));
                for (sum, bits) in sums.iter().zip(self.columns(values.at(at), config.head_dim_v)) {
                    sum.set(p.fma(self.float(bits), *sum));
                }
            });
            key.set(key + 1);
            let open = sums.iter().zip(&broken).map(|(&sum, &broken)| broken & (sum * 0.0).eq(0.0));
            let open = open.reduce(|a, b| a | b).unwrap_or_else(|| k.var(false));
            k.break_if(!open.any());
        });
        for (i, (&sum, &broken)) in sums.iter().zip(&broken).enumerate() {
            let bits = half_bits::<H>(sum * row.inverse);
            k.when(broken, || o.at(64 * i as i32).store(bits));
        }
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

    /// Whether the mask shows a key of the sequence to a row.
    fn sees(&self, tile: &WorkTile<'k>, row: Reg<'k, u32>, key: Reg<'k, u32>) -> Reg<'k, bool> {
        let (k, params) = (self.k, self.params);
        let (q, kv) = (row.bits::<i32>(), key.bits::<i32>());
        if let Some((program, _)) = &self.config.mask_program {
            let element = Element { row: 0, column: 0, q, kv };
            let place = self.place(tile).place;
            return ProgramEmitter::new(k, program, &params.mask_tables, place).bool(&element);
        }
        let diagonal = q + (tile.seqlen_k - tile.seqlen_q).bits::<i32>();
        let [left, right] = params.band;
        let after = left.map(|left| kv.ge(diagonal - left));
        let before = right.map(|right| kv.le(diagonal + right.min(1 << 30)));
        after.into_iter().chain(before).reduce(|a, b| a & b).unwrap_or_else(|| k.var(true))
    }

    /// exp2(score − reference) of a key that the row sees, or 0 if it is dropped.
    fn probability(
        &self,
        tile: &WorkTile<'k>,
        row: &Row<'k>,
        key: Reg<'k, u32>,
        q: &[Reg<'k, f32>],
        at: Address<'k, u64>,
    ) -> Reg<'k, f32> {
        let (k, config, params) = (self.k, self.config, self.params);
        let mut score = k.var(0.0f32);
        for (&q, bits) in q.iter().zip(self.columns(at, config.head_dim)) {
            score = q.fma(self.float(bits), score);
        }
        for bits in [16, 8, 4, 2, 1] {
            score = score + score.shfl_bfly(bits);
        }
        let place = self.place(tile).place;
        if config.prescaled {
            score = score * (params.scale * if config.score_mod.is_some() { 1.0 } else { LOG2_E });
        }
        if let Some((program, _)) = &config.score_mod {
            let element = Element { row: 0, column: 0, q: row.index.bits(), kv: key.bits() };
            let mut emitter = ProgramEmitter::new(k, program, &params.score_tables, place);
            score = emitter.float(&element, score) * LOG2_E;
        }
        let base = row.reference.eq(f32::NEG_INFINITY).select(0.0, -row.reference);
        let p = score.fma(self.scale, base).exp2();
        let Some(dropout) = &params.dropout else { return p };
        let counter = [key >> 2, row.index, place.head.bits(), place.batch.bits()];
        let [a, b, c, d] = philox4x32(counter, dropout.seed);
        let odd = (key & 1).ne(0);
        let word = (key & 2).ne(0).select(odd.select(d, c), odd.select(b, a));
        word.lt(dropout.threshold).select(0.0, p)
    }
}
