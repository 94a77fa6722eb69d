//! dQ from its sums, and the gradient of the sinks.

use ptx::build::{Half, Reg};
use ptx::{Fragment, Kernel, Target, build};

use super::exact::Exact;
use super::output::Rows;
use super::work::Work;
use super::{BwdConfig, DqPart, Params};

pub(super) fn emit<H: Half>(config: &BwdConfig) -> Kernel {
    build(&config.name("_postprocess"), Target::Sm90, 128 * config.dq_parts(), |k| {
        let params = Params::new(k, config);
        let Some(sums) = params.dq_sums else { return };
        let work = Work::new(k, config, &params);
        let place = work.query_block();
        let sequence = work.sequence(place.batch);
        let tile = work.tile(&sequence, place.head, place.m_block);
        let group = k.warp() >> 2;
        let first = place.m_block * config.tile_m;
        k.if_(first.lt(sequence.seqlen_q), || {
            let fragment = Fragment::new(k, config.dq_columns());
            // A warp's part, then a lane's four registers at a time.
            let part = k.warp() * config.dq_warp_bytes() + k.lane() * 16;
            let at = (tile.mad_wide(config.dq_sum_bytes(), sums) + part.to_u64()).address();
            for (j, four) in fragment.registers.as_chunks::<4>().0.iter().enumerate() {
                let values = at.at(32 * 16 * j as i32).load_vec::<f32, 4>();
                four.iter().zip(values).for_each(|(to, value)| to.set(value));
            }
            let queries = if config.dq_part() == DqPart::Queries { group * 64 } else { k.var(0u32) };
            let halved = config.dq_part() == DqPart::Columns;
            let (column, last_column) = config.half_of(group, config.k().columns, halved);
            let rows = Rows {
                tensor: params.dq,
                batch: work.batch(place.batch),
                head: place.head,
                start: sequence.q_row,
                origin: first + queries,
                rows: sequence.seqlen_q,
                column,
                last_column,
                dim: config.head_dim,
            };
            rows.write::<H>(k, &fragment, Some(params.d_scale()));
            if config.repair {
                let exact = Exact::<H>::new(&work, sequence, place.batch);
                exact.repair_queries(place.head, &rows, &fragment);
            }
        });
        if let Some([_, d_sinks, sums]) = params.sinks {
            let one = place.m_block.eq(0) & place.batch.eq(0) & k.tid(0).lt(32);
            k.if_(one, || sum_sinks(&work, place.head, d_sinks, sums));
        }
    })
}

/// The gradient of a head's sink: its tiles' sums, in an order that is always the same. By one warp.
pub(super) fn sum_sinks<'k>(
    work: &Work<'_, 'k>,
    head: Reg<'k, u32>,
    d_sinks: Reg<'k, u64>,
    sums: Reg<'k, u64>,
) {
    let (k, params, lane) = (work.k, work.params, work.k.lane());
    let sum = k.var(0.0f32);
    k.for_(0u32, params.batch, 1u32, |batch| {
        let sequence = work.sequence(batch);
        let tiles = (sequence.seqlen_q + (work.config.tile_m - 1)) / work.config.tile_m;
        k.for_(lane, tiles, 32u32, |m_block| {
            let tile = work.tile(&sequence, head, m_block);
            sum.set(sum + tile.mad_wide(4, sums).address().load::<f32>());
        });
    });
    let total = [16, 8, 4, 2, 1].into_iter().fold(sum, |sum, bits| sum + sum.shfl_bfly(bits));
    k.when(lane.eq(0), || head.mad_wide(4, d_sinks).address().store(total));
}
