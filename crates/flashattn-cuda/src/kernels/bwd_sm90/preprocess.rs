//! What the main kernel needs of each row of queries, and zeros to add dQ to.

use std::f32::consts::LOG2_E;

use ptx::build::{Half, Reg};
use ptx::{Kernel, Target, build};

use super::work::{QueryBlock, Sequence, Work};
use super::{BwdConfig, Params};
use crate::kernels::global::{columns, float, floats};

/// Threads of a block.
const THREADS: u32 = 256;

/// How the threads of a block are laid over the rows of O and dO.
struct Layout {
    /// Whether a thread takes eight columns, or every 32nd.
    wide: bool,
    /// Threads of a row: a power of two.
    share: u32,
    /// Rows of all threads.
    at_once: u32,
    /// How many times these are loaded before the first are used, at most `share`. With the several blocks of a multiprocessor, more than enough
    /// bytes are on their way to keep the memory busy.
    ahead: u32,
}

impl Layout {
    fn new(config: &BwdConfig) -> Layout {
        let wide = BwdConfig::o_bytes(config.head_dim_v) == 16;
        let share = if wide { (config.head_dim_v / 8).next_power_of_two() } else { 32 };
        let at_once = THREADS / share;
        let ahead = if wide { config.tile_m.div_ceil(at_once).min(4).min(share) } else { 1 };
        Layout { wide, share, at_once, ahead }
    }
}

/// A block of queries of a sequence that has some.
struct Tile<'a, 'k> {
    work: &'a Work<'a, 'k>,
    sequence: Sequence<'k>,
    place: QueryBlock<'k>,
    /// Its number.
    tile: Reg<'k, u32>,
    /// Its first row in the sequence.
    first: Reg<'k, u32>,
}

pub(super) fn emit<H: Half>(config: &BwdConfig) -> Kernel {
    build(&config.name("_preprocess"), Target::Sm90, THREADS, |k| {
        let params = Params::new(k, config);
        let work = &Work::new(k, config, &params);
        let place = work.query_block();
        let sequence = work.sequence(place.batch);
        let tile = work.tile(&sequence, place.head, place.m_block);
        let first = place.m_block * config.tile_m;
        let tile = Tile { work, sequence, place, tile, first };
        // Of a sequence shorter than the longest some blocks have no rows.
        k.if_(first.lt(sequence.seqlen_q), || {
            // Before the loads, in whose shadow they are written.
            if let Some(sums) = params.dq_sums {
                tile.zeros(sums);
            }
            tile.stats::<H>();
        });
    })
}

impl<'k> Tile<'_, 'k> {
    /// Zeros to add dQ to.
    fn zeros(&self, sums: Reg<'k, u64>) {
        let Work { k, config, .. } = *self.work;
        let (zero, bytes) = (k.var(0.0f32), config.dq_sum_bytes());
        let at = self.tile.mad_wide(bytes, sums) + (k.tid(0) * 16).to_u64();
        // A multiple of what all threads store at once: 64 rows of at least 16 columns.
        for i in (0..bytes).step_by(16 * THREADS as usize) {
            at.address().at(i as i32).store_vec([zero; 4]);
        }
    }

    /// The stats of all rows, and the sum of what they add to the sink's gradient.
    fn stats<H: Half>(&self) {
        let Work { k, config, params } = *self.work;
        let Layout { wide, share, at_once, ahead } = Layout::new(config);
        let (own, part) = (k.tid(0) >> share.ilog2(), k.tid(0) & (share - 1));
        let last = (self.sequence.seqlen_q - self.first).min(config.tile_m) - 1;
        // No load is under a condition, which would keep it from being issued early: of rows past the last one that one is loaded
        // again, and of columns that there are not the first ones.
        let (dim, pieces) = (config.head_dim_v, config.head_dim_v / 8);
        let column = if wide { part.lt(pieces).select(part * 8, 0u32) } else { part };
        let (batch, head) = (self.work.batch(self.place.batch), self.place.head);
        let first = self.sequence.q_row + self.first;
        let tensors = [params.o, params.d_o].map(|tensor| (tensor, tensor.at([batch, first, head, column])));
        let [by_batch, by_head] = params.lse_strides;
        let lse_at = (batch.to_u64() * by_batch + head.to_u64() * by_head + first.to_u64()) * 4;
        let stats = self.tile.mad_wide(config.stats_bytes(), params.stats);
        let sink_sum = k.var(0.0f32);
        k.for_(0u32, config.tile_m, at_once * ahead, |base| {
            // Of the rows ahead each is finished by one of the threads that share it.
            let finished = own + base + part.min(ahead - 1) * at_once;
            let number = |of| finished.min(last).mad_wide(4, lse_at + of).address().load::<f32>();
            let (lse, d_lse) = (number(params.lse), params.d_lse.map(number));
            let rows = (0..ahead).map(|i| {
                let row = (own + base + i * at_once).min(last);
                tensors.map(|(tensor, at)| -> Vec<Reg<'_, f32>> {
                    let at = tensor.down(at, row);
                    if wide {
                        at.load_vec::<u32, 4>().into_iter().flat_map(floats::<H>).collect()
                    } else {
                        columns(part, at, dim).into_iter().map(float::<H>).collect()
                    }
                })
            });
            let mut delta = k.var(0.0f32);
            for (i, [o, d_o]) in rows.collect::<Vec<_>>().into_iter().enumerate() {
                let mut sum = o.into_iter().zip(d_o).fold(k.var(0.0f32), |sum, (o, d_o)| o.fma(d_o, sum));
                if wide && pieces < share {
                    sum = part.lt(pieces).select(sum, 0.0);
                }
                for bits in [16, 8, 4, 2, 1].into_iter().filter(|&bits| bits < share) {
                    sum = sum + sum.shfl_bfly(bits);
                }
                delta = part.eq(i as u32).select(sum, delta);
            }
            if let Some(d_lse) = d_lse {
                delta = delta - d_lse;
            }
            // exp2(s − ∞) = 0: a row that sees nothing has no gradient, nor has one past the end.
            let nothing = lse.eq(f32::NEG_INFINITY) | finished.gt(last);
            let minus_lse = nothing.select(f32::NEG_INFINITY, lse * -LOG2_E);
            let one = part.lt(ahead);
            if let Some([sinks, ..]) = params.sinks {
                let sink = head.mad_wide(4, sinks).address().load::<f32>();
                let p = sink.fma(LOG2_E, minus_lse).exp2();
                let counts = one & !nothing;
                sink_sum.set(counts.select(p.fma(-delta, sink_sum), sink_sum));
            }
            let at = finished.mad_wide(4, stats).address();
            if let Some(dropout) = &params.dropout {
                delta = delta * dropout.keep_scale.rcp();
            }
            let delta = nothing.select(0.0, delta);
            k.when(one & finished.lt(config.tile_m), || {
                at.store(minus_lse);
                at.at(4 * config.tile_m as i32).store(delta);
            });
        });
        if let Some([.., sums]) = params.sinks {
            // The rows' sums in an order that is always the same.
            const WARPS: u32 = THREADS / 32;
            let parts = k.shared("sums", 4 * WARPS, 4);
            let sum = [16, 8, 4, 2, 1].into_iter().fold(sink_sum, |sum, bits| sum + sum.shfl_bfly(bits));
            let of_warp = parts + k.warp() * 4;
            k.when(k.lane().eq(0), || of_warp.store(sum));
            k.sync_threads();
            k.when(k.tid(0).eq(0), || {
                let parts = (0..WARPS).map(|i| parts.at(4 * i as i32).load::<f32>());
                let total: Reg<'_, f32> = parts.fold(k.var(0.0f32), |sum, part| sum + part);
                self.tile.mad_wide(4, sums).address().store(total);
            });
        }
    }
}
