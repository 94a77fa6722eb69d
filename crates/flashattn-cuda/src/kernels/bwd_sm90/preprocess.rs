//! What the main kernel needs of each row of queries, and zeros to add dQ to.

use std::f32::consts::LOG2_E;

use ptx::build::{Half, Reg};
use ptx::{Kernel, Target, build};

use super::work::Work;
use super::{BwdConfig, Params};
use crate::kernels::global::{columns, float};

/// Warps of a block.
const WARPS: u32 = 8;

pub(super) fn emit<H: Half>(config: &BwdConfig) -> Kernel {
    build(&config.name("_preprocess"), Target::Sm90, 32 * WARPS, |k| {
        let params = Params::new(k, config);
        let work = Work::new(k, config, &params);
        let place = work.query_block();
        let sequence = work.sequence(place.batch);
        let tile = work.tile(&sequence, place.head, place.m_block);
        let stats = tile.mad_wide(config.stats_bytes(), params.stats);
        let (warp, lane, batch) = (k.warp(), k.lane(), work.batch(place.batch));
        let first = place.m_block * config.tile_m;
        // Of a sequence shorter than the longest some blocks have no rows.
        k.if_(first.lt(sequence.seqlen_q), || {
            let sink_sum = k.var(0.0f32);
            k.for_(warp, config.tile_m, WARPS, |row| {
                let index = first + row;
                let (minus_lse, delta) = (k.var(f32::NEG_INFINITY), k.var(0.0f32));
                k.if_(index.lt(sequence.seqlen_q), || {
                    let at = [batch, sequence.q_row + index, place.head, lane];
                    let [o, d_o] = [params.o.at(at), params.d_o.at(at)]
                        .map(|at| columns(lane, at, config.head_dim_v).into_iter().map(float::<H>));
                    let mut sum = o.zip(d_o).fold(k.var(0.0f32), |sum, (o, d_o)| o.fma(d_o, sum));
                    for bits in [16, 8, 4, 2, 1] {
                        sum = sum + sum.shfl_bfly(bits);
                    }
                    let [by_batch, by_head] = params.lse_strides;
                    let at = batch.to_u64() * by_batch + place.head.to_u64() * by_head;
                    let at = (at + (sequence.q_row + index).to_u64()) * 4;
                    let lse = (at + params.lse).address().load::<f32>();
                    if let Some(d_lse) = params.d_lse {
                        sum = sum - (at + d_lse).address().load::<f32>();
                    }
                    let nothing = lse.eq(f32::NEG_INFINITY);
                    // exp2(s − ∞) = 0: a row that sees nothing has no gradient.
                    minus_lse.set(nothing.select(f32::NEG_INFINITY, lse * -LOG2_E));
                    delta.set(nothing.select(0.0, sum));
                    if let Some([sinks, ..]) = params.sinks {
                        let sink = place.head.mad_wide(4, sinks).address().load::<f32>();
                        let p = sink.fma(LOG2_E, minus_lse).exp2();
                        sink_sum.set(nothing.select(sink_sum, p.fma(-sum, sink_sum)));
                    }
                });
                let at = row.mad_wide(4, stats).address();
                k.when(lane.eq(0), || {
                    at.store(minus_lse);
                    at.at(4 * config.tile_m as i32).store(delta);
                });
            });
            let zero = k.var(0.0f32);
            let bytes = config.dq_sum_bytes();
            let sums = tile.mad_wide(bytes, params.dq_sums);
            k.for_(k.tid(0) * 16, bytes, 32 * WARPS * 16, |at| {
                (sums + at.to_u64()).address().store_vec([zero; 4]);
            });
            if let Some(semaphores) = params.semaphores {
                let zero = k.var(0u32);
                let at = (tile * BwdConfig::SEMAPHORES + k.tid(0)).mad_wide(4, semaphores).address();
                k.when(k.tid(0).lt(BwdConfig::SEMAPHORES), || at.store(zero));
            }
            if let Some([.., sums]) = params.sinks {
                // The rows' sums in an order that is always the same.
                let parts = k.shared("sums", 4 * WARPS, 4);
                k.when(lane.eq(0), || (parts + warp * 4).store(sink_sum));
                k.sync_threads();
                k.when(k.tid(0).eq(0), || {
                    let parts = (0..WARPS).map(|i| parts.at(4 * i as i32).load::<f32>());
                    let total: Reg<'_, f32> = parts.fold(k.var(0.0f32), |sum, part| sum + part);
                    tile.mad_wide(4, sums).address().store(total);
                });
            }
        });
    })
}
