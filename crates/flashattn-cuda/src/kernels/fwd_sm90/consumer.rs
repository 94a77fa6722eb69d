//! A consumer warpgroup: 64 rows of queries.

use std::f32::consts::{LN_2, LOG2_E};

use ptx::build::{Builder, Half, Reg};
use ptx::instr::{Accumulator, Element, WgmmaShape};
use ptx::{B32, Fragment, PipelineState, WgmmaA};

use super::repair::RowEnd;
use super::work::{Blocks, Work, WorkTile};
use super::{FwdConfig, Params, Shared};
use crate::kernels::fragment::Scores;
use crate::kernels::program::Place;

/// Statistics of the thread's two rows, in base 2: the reference that exponents are taken against (once any key was
/// seen), and this thread's share of the row sum.
pub(super) struct OnlineSoftmax<'k> {
    pub reference: [Reg<'k, f32>; 2],
    row_sum: [Reg<'k, f32>; 2],
    /// Whether a row of the warp has a new reference, and by what O is to be multiplied then.
    moved: Reg<'k, bool>,
    factor: [Reg<'k, f32>; 2],
}

/// A consumer warpgroup: its place and its operands.
pub(super) struct Consumer<'a, 'k, H> {
    pub(super) k: &'k Builder,
    pub(super) config: &'a FwdConfig,
    pub(super) params: &'a Params<'k>,
    work: &'a Work<'a, 'k>,
    shared: &'a Shared<'k>,
    /// What scores are multiplied by before `ex2`.
    pub(super) scale: Reg<'k, f32>,
    pub(super) lane: Reg<'k, u32>,
    /// Which consumer, from 0.
    group: Reg<'k, u32>,
    /// The thread's first row in the work tile, and its first column in a fragment.
    row: Reg<'k, u32>,
    column: Reg<'k, u32>,
    /// The block at hand, and whether some row sees a part of it only.
    n_block: Reg<'k, u32>,
    partial: Reg<'k, bool>,
    /// Q, by k step; empty if Q stays in shared memory.
    q: Vec<[Reg<'k, H>; 4]>,
    pub(super) o: Fragment<'k>,
    s: Fragment<'k>,
    p: Vec<[Reg<'k, H>; 4]>,
    pub(super) softmax: OnlineSoftmax<'k>,
}

impl<'a, 'k, H: Half> Consumer<'a, 'k, H> {
    pub fn new(work: &'a Work<'a, 'k>, shared: &'a Shared<'k>, warp: Reg<'k, u32>) -> Self {
        let (k, config, params) = (work.k, work.config, work.params);
        let fragments = |steps: u32| (0..steps).map(|_| [k.reg(), k.reg(), k.reg(), k.reg()]).collect();
        let group = (warp >> 2) - 1;
        Consumer {
            k,
            config,
            params,
            work,
            shared,
            scale: if config.prescaled { k.var(1.0) } else { params.scale * LOG2_E },
            lane: k.lane(),
            group,
            row: group * 64 + Fragment::row(k),
            column: Fragment::column(k),
            n_block: k.reg(),
            partial: k.reg(),
            q: fragments(if config.q_in_registers { config.head_dim.div_ceil(16) } else { 0 }),
            o: Fragment::new(k, config.head_dim_v.next_multiple_of(16)),
            s: Fragment::new(k, config.tile_n),
            p: fragments(config.tile_n / 16),
            softmax: OnlineSoftmax {
                reference: [k.reg(), k.reg()],
                row_sum: [k.reg(), k.reg()],
                moved: k.reg(),
                factor: [k.reg(), k.reg()],
            },
        }
    }

    /// The algorithm.
    pub fn run(&self) {
        let (k, config, shared) = (self.k, self.config, self.shared);
        let (q_state, k_state, v_state) =
            (shared.q_pipeline.start(k), shared.k_pipeline.start(k), shared.v_pipeline.start(k));
        // The last warpgroup lets the first begin.
        k.if_(self.group.eq(config.consumers - 1), || self.pass_turn());
        k.loop_(|| {
            shared.q_pipeline.consumer_wait(k, q_state);
            let tile = self.work.told(shared);
            k.break_if(tile.exists.eq(0));
            let blocks = tile.blocks;
            if config.q_in_registers {
                k.if_(blocks.ne(0), || self.take_q());
                shared.q_pipeline.consumer_release(k, q_state.index, self.lane);
            }
            self.reset(&tile);
            let left = k.var(blocks);
            k.if_(blocks.ne(0), || {
                shared.k_pipeline.consumer_wait(k, k_state);
                self.next_block(&tile, k_state);
                k.wgmma_fence();
                self.scores(k_state);
                k.wgmma_commit();
                k.wgmma_wait(0);
                shared.k_pipeline.consumer_release(k, k_state.index, self.lane);
                k_state.advance();
                self.modify_and_mask(&tile);
                self.exponentiate();
                self.probabilities(&tile);
                k.loop_(|| {
                    left.set(left - 1);
                    k.break_if(left.eq(0));
                    shared.k_pipeline.consumer_wait(k, k_state);
                    self.next_block(&tile, k_state);
                    self.wait_turn();
                    k.wgmma_fence();
                    self.scores(k_state);
                    k.wgmma_commit();
                    shared.v_pipeline.consumer_wait(k, v_state);
                    // Without this second fence ptxas serialises (C7519).
                    k.wgmma_fence();
                    self.values(v_state);
                    k.wgmma_commit();
                    self.pass_turn();
                    k.wgmma_wait(1);
                    shared.k_pipeline.consumer_release(k, k_state.index, self.lane);
                    k_state.advance();
                    self.modify_and_mask(&tile);
                    self.exponentiate();
                    k.wgmma_wait(0);
                    shared.v_pipeline.consumer_release(k, v_state.index, self.lane);
                    v_state.advance();
                    self.probabilities(&tile);
                    self.rescale();
                });
                shared.v_pipeline.consumer_wait(k, v_state);
                k.wgmma_fence();
                self.values(v_state);
                k.wgmma_commit();
                k.wgmma_wait(0);
                shared.v_pipeline.consumer_release(k, v_state.index, self.lane);
                v_state.advance();
            });
            if !config.q_in_registers {
                shared.q_pipeline.consumer_release(k, q_state.index, self.lane);
            }
            q_state.advance();
            self.write(&tile);
        });
    }

    /// Nothing seen yet.
    fn reset(&self, tile: &WorkTile<'k>) {
        for r in self.softmax.row_sum {
            r.set(0.0);
        }
        for r in self.softmax.reference {
            r.set(f32::NEG_INFINITY);
        }
        for &r in &self.o.registers {
            r.set(0.0);
        }
        if let Blocks::Band(band) = tile.blocks_at {
            self.n_block.set(band.n_block_max);
        }
    }

    /// The block that comes with this stage of K.
    fn next_block(&self, tile: &WorkTile<'k>, stage: PipelineState<'k>) {
        match tile.blocks_at {
            Blocks::Band(band) => {
                self.n_block.set(self.n_block - 1);
                self.partial.set(self.n_block.ge(band.whole_max) | self.n_block.lt(band.whole_min));
            }
            Blocks::Runs(_) => {
                let block = (self.shared.block + stage.index * 4).load::<u32>().shfl_idx(0);
                self.n_block.set(block & 0x7fff_ffff);
                self.partial.set(block.ge(0x8000_0000));
            }
        }
    }

    /// Named barrier of this warpgroup's turn at the tensor cores, or of the next one's.
    fn turn(&self, next: bool) -> Reg<'k, u32> {
        if !next {
            return self.group + 1;
        }
        let other = self.group + 2;
        other.gt(self.config.consumers).select(1u32, other)
    }

    fn wait_turn(&self) {
        if self.config.consumers > 1 {
            self.k.bar_sync(self.turn(false), 256);
        }
    }

    fn pass_turn(&self) {
        if self.config.consumers > 1 {
            self.k.bar_arrive(self.turn(true), 256);
        }
    }

    /// Q's fragments out of shared memory: ldmatrix takes 16 rows and two chunks of 8 columns.
    fn take_q(&self) {
        let (k, layout) = (self.k, self.config.q());
        let row = self.group * 64 + ((k.tid(0) >> 5) & 3) * 16 + (self.lane & 15);
        let chunk = ((self.lane >> 4) ^ (self.lane & 7)) << 4;
        let row = self.shared.q + row * 128;
        for (step, registers) in self.q.iter().enumerate() {
            let (panel, inside) = (step as u32 / 4, step as u32 % 4);
            let at = row + (chunk ^ (inside * 32));
            let loaded = k.ldmatrix_x4::<H>(at.at((panel * layout.panel_bytes()) as i32), false);
            for (&register, value) in registers.iter().zip(loaded) {
                register.set(value);
            }
        }
    }

    fn shape(&self, n: u32, transpose_b: bool) -> WgmmaShape {
        WgmmaShape {
            n,
            a: self.config.element,
            b: self.config.element,
            d: Accumulator::F32,
            a_in_registers: false,
            transpose_a: false,
            transpose_b,
        }
    }

    /// Issues S = Q·Kᵀ.
    fn scores(&self, stage: PipelineState<'k>) {
        let (k, config) = (self.k, self.config);
        let keys = config.k().k_major(self.shared.k + stage.index * config.k().bytes());
        let queries = config.q().k_major(self.shared.q + self.group * (64 * 128));
        let shape = self.shape(config.tile_n, false);
        for step in 0..config.head_dim.div_ceil(16) {
            let (b, accumulate) = (keys.step(step), step != 0);
            match self.q.get(step as usize) {
                Some(q) => k.wgmma(shape, &self.s.registers, WgmmaA::Registers(q), b, accumulate),
                None => {
                    let a = WgmmaA::<B32>::Shared(queries.step(step));
                    k.wgmma(shape, &self.s.registers, a, b, accumulate);
                }
            }
        }
    }

    /// Issues O += P·V.
    fn values(&self, stage: PipelineState<'k>) {
        let (k, config) = (self.k, self.config);
        let values = config.v().mn_major(self.shared.v + stage.index * config.v().bytes());
        let shape = self.shape(self.o.columns(), true);
        for (step, p) in self.p.iter().enumerate() {
            k.wgmma(shape, &self.o.registers, WgmmaA::Registers(p), values.step(step as u32), true);
        }
    }

    pub(super) fn place(&self, tile: &WorkTile<'k>) -> Scores<'_, 'k> {
        let signed = |r: Reg<'k, u32>| r.bits::<i32>();
        // Counted over all sequences: packed ones begin where cu_seqlens says.
        let start = |row: Reg<'k, u32>, length: Reg<'k, u32>| {
            signed(if self.config.varlen { row } else { tile.batch * length })
        };
        Scores {
            k: self.k,
            fragment: &self.s,
            q: signed(tile.m_block * self.config.tile_m() + self.row),
            kv: signed(self.n_block * self.config.tile_n + self.column),
            place: Place {
                batch: signed(tile.batch),
                head: signed(tile.head),
                seqlen_q: signed(tile.seqlen_q),
                seqlen_k: signed(tile.seqlen_k),
                q_start: start(tile.q_row, tile.seqlen_q),
                kv_start: start(tile.kv_row, tile.seqlen_k),
            },
        }
    }

    /// S through the score mod; then, in a block that not all rows see in whole, −∞ where a row does not see the key.
    fn modify_and_mask(&self, tile: &WorkTile<'k>) {
        let (k, config, params) = (self.k, self.config, self.params);
        let scores = self.place(tile);
        if config.prescaled {
            let factor = params.scale * if config.score_mod.is_some() { 1.0 } else { LOG2_E };
            for &s in &self.s.registers {
                s.set(s * factor);
            }
        }
        if let Some((program, _)) = &config.score_mod {
            scores.modify(program, &params.score_tables, LOG2_E);
        }
        let end = (tile.seqlen_k.bits::<i32>() - scores.kv).min(i32::MAX);
        let Blocks::Band(_) = tile.blocks_at else {
            k.if_(self.partial | (self.n_block * config.tile_n + config.tile_n).gt(tile.seqlen_k), || {
                if let Some((program, _)) = &config.mask_program {
                    scores.mask(program, &params.mask_tables);
                }
                scores.limit(None, [end; 2]);
            });
            return;
        };
        k.if_(self.partial, || {
            // Row i sees from i + shift − left to i + shift + right.
            let shift = (tile.seqlen_k - tile.seqlen_q).bits::<i32>() - scores.kv;
            let rows = [0, 8].map(|further| scores.q + further + shift);
            let to = rows.map(|diagonal| match params.band[1] {
                Some(right) => end.min(diagonal + 1 + right.min(1 << 30)),
                None => end,
            });
            let from = params.band[0].map(|left| rows.map(|diagonal| diagonal - left));
            scores.limit(from, to);
        });
    }

    /// S to exp2(scale·S − reference), with the sums of its rows; a new reference where a row's maximum needs it.
    fn exponentiate(&self) {
        const GROWTH: f32 = 8.0;
        let (k, scale) = (self.k, self.scale);
        let OnlineSoftmax { reference, row_sum, moved, factor } = &self.softmax;
        let row_max = self.s.reduce_rows(|a, b| a.max(b)).map(|most| most * scale);
        let grown = [0, 1].map(|half| row_max[half].gt(reference[half] + GROWTH));
        moved.set((grown[0] | grown[1]).any());
        k.if_(*moved, || {
            for half in 0..2 {
                let new = reference[half].max(row_max[half]);
                // Of a row that has seen nothing yet there is nothing to rescale (and −∞ − −∞ is no number).
                let nothing = new.eq(f32::NEG_INFINITY);
                factor[half].set(nothing.select(1.0, (reference[half] - new).exp2()));
                reference[half].set(new);
                row_sum[half].set(row_sum[half] * factor[half]);
            }
        });
        let base = [0, 1].map(|half| {
            let nothing = reference[half].eq(f32::NEG_INFINITY);
            nothing.select(0.0, -reference[half])
        });
        for (i, &s) in self.s.registers.iter().enumerate() {
            let half = Fragment::half(i);
            s.set(s.fma(scale, base[half]).exp2());
            row_sum[half].set(row_sum[half] + s);
        }
    }

    /// P, dropped out and rounded.
    fn probabilities(&self, tile: &WorkTile<'k>) {
        if let Some(dropout) = &self.params.dropout {
            self.place(tile).drop_out(dropout.seed, dropout.threshold);
        }
        for (step, registers) in self.p.iter().enumerate() {
            for (&register, value) in registers.iter().zip(self.s.a_operand::<H>(self.k, step)) {
                register.set(value);
            }
        }
    }

    /// O to the new reference.
    fn rescale(&self) {
        self.k.if_(self.softmax.moved, || {
            for (i, &o) in self.o.registers.iter().enumerate() {
                o.set(o * self.softmax.factor[Fragment::half(i)]);
            }
        });
    }

    /// O / l and lse of the rows that exist.
    fn write(&self, tile: &WorkTile<'k>) {
        let (k, config, params) = (self.k, self.config, self.params);
        let batch = if config.varlen { k.var(0u32) } else { tile.batch };
        let [by_batch, by_row, by_head] = params.o_strides;
        let wide = |r: Reg<'k, u32>| r.to_u64();
        let o = wide(batch) * by_batch + wide(tile.head) * by_head + wide(self.column);
        let lse = wide(batch) * params.lse_strides[0] + wide(tile.head) * params.lse_strides[1];
        let sink = params.sinks.map(|sinks| tile.head.mad_wide(4, sinks).address().load::<f32>() * LOG2_E);
        let ends = [0, 1].map(|half| {
            let row = tile.m_block * config.tile_m() + self.row + 8 * half as u32;
            let share = self.softmax.row_sum[half];
            let pair = share + share.shfl_bfly(1);
            let (mut sum, mut reference) = (pair + pair.shfl_bfly(2), self.softmax.reference[half]);
            let (seen, mut factor) = (sum, None);
            if let Some(sink) = sink {
                // The sink is one more key without a value.
                let most = reference.max(sink);
                let base = most.eq(f32::NEG_INFINITY).select(0.0, most);
                let old = (reference - base).exp2();
                sum = sum.fma(old, (sink - base).exp2());
                reference = most;
                factor = Some(old);
            }
            let nothing = sum.eq(0.0);
            let mut inverse = nothing.select(0.0, sum.rcp());
            for scale in
                [factor, params.dropout.as_ref().map(|dropout| dropout.keep_scale)].into_iter().flatten()
            {
                inverse = inverse * scale;
            }
            let value = nothing.select(f32::NEG_INFINITY, (reference + sum.log2()) * LN_2);
            k.if_(row.lt(tile.seqlen_q), || {
                let row = wide(row + tile.q_row);
                let at = ((lse + row) * 4 + params.lse).address();
                // The four threads of a row hold the same; the one with column 0 writes.
                k.when(self.column.eq(0), || at.store(value));
                let at = ((o + row * by_row) * 2 + params.o).address();
                for i in (0..self.o.registers.len()).filter(|&i| i % 2 == 0 && Fragment::half(i) == half) {
                    let offset = Fragment::column_offset(i);
                    let [low, high] = [0, 1].map(|next| self.o.registers[i + next] * inverse);
                    let pair = k.pack::<H>(low, high);
                    let at = at.at(2 * offset as i32);
                    let left = config.head_dim_v.saturating_sub(offset);
                    if left >= 8 {
                        at.store(pair);
                        continue;
                    }
                    // The last columns; of an odd number the last alone.
                    k.when((self.column + 1).lt(left), || at.store(pair));
                    if left % 2 == 1 {
                        k.when(self.column.eq(left - 1), || at.store(half_bits::<H>(low)));
                    }
                }
            });
            RowEnd { seen, inverse }
        });
        if config.repair {
            self.repair(tile, ends);
        }
    }
}

/// The bits of one 16-bit float, rounded.
pub(super) fn half_bits<'k, H: Half>(value: Reg<'k, f32>) -> Reg<'k, u16> {
    match H::ELEMENT {
        Element::F16 => value.to_f16(),
        _ => value.to_bf16(),
    }
}
