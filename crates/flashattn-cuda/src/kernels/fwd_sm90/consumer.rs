//! A consumer warpgroup: 64 rows of queries.

use std::f32::consts::LOG2_E;

use ptx::build::{Address, Builder, Half, Reg};
use ptx::instr::{Accumulator, Element, WgmmaShape};
use ptx::{B32, Fragment, PipelineState, WgmmaA};

use super::repair::RowEnd;
use super::work::{Blocks, Work, WorkTile};
use super::{FwdConfig, Params, Shared};
use crate::kernels::fragment::Scores;
use crate::kernels::philox::Kept;
use crate::kernels::program::{Place, Slope};

/// Statistics of the thread's two rows, in base 2: the reference that exponents are taken against (once any key was
/// seen), and this thread's share of the row sum.
struct OnlineSoftmax<'k> {
    reference: [Reg<'k, f32>; 2],
    row_sum: [Reg<'k, f32>; 2],
    /// Whether the next block's row maxima are looked at.
    look: Reg<'k, bool>,
    /// Whether a row of the warp has a new reference, and the root of what O is to be multiplied by then.
    moved: Reg<'k, bool>,
    factor: [Reg<'k, f32>; 2],
}

/// A tile whose scores are all in P, and the statistics of its rows: the next tile takes their registers before O is written.
struct Finished<'k> {
    tile: WorkTile<'k>,
    reference: [Reg<'k, f32>; 2],
    row_sum: [Reg<'k, f32>; 2],
}

/// A consumer warpgroup: its place and its operands.
pub(super) struct Consumer<'a, 'k, H> {
    pub(super) k: &'k Builder,
    pub(super) config: &'a FwdConfig,
    pub(super) params: &'a Params<'k>,
    pub(super) work: &'a Work<'a, 'k>,
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
    /// Blocks of the tile, from the right, that none of this warpgroup's rows see, where there may be such.
    hidden: Option<Reg<'k, u32>>,
    /// Q, by k step; empty if Q stays in shared memory.
    q: Vec<[Reg<'k, H>; 4]>,
    o: Fragment<'k>,
    s: Fragment<'k>,
    p: Vec<[Reg<'k, H>; 4]>,
    /// What dropout keeps of P, if there is any.
    kept: Kept<'k>,
    softmax: OnlineSoftmax<'k>,
    /// Zero as long as all that was written is finite, NaN from then on.
    broken: Reg<'k, f32>,
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
            scale: match (config.prescaled, config.score_mod.is_some()) {
                (false, _) => params.scale * LOG2_E,
                (true, false) => k.var(1.0),
                (true, true) => k.var(LOG2_E),
            },
            lane: k.lane(),
            group,
            row: group * 64 + Fragment::row(k),
            column: Fragment::column(k),
            n_block: k.reg(),
            partial: k.reg(),
            hidden: config.hides_blocks().then(|| k.var(0u32)),
            q: fragments(if config.q_in_registers { config.head_dim.div_ceil(16) } else { 0 }),
            o: Fragment::new(k, config.head_dim_v.next_multiple_of(16)),
            s: Fragment::new(k, config.tile_n),
            p: fragments(config.tile_n / 16),
            kept: Kept::new(k, if config.dropout { config.tile_n } else { 0 }),
            softmax: OnlineSoftmax {
                reference: [k.reg(), k.reg()],
                row_sum: [k.reg(), k.reg()],
                look: k.reg(),
                moved: k.reg(),
                factor: [k.reg(), k.reg()],
            },
            broken: k.var(0.0),
        }
    }

    /// The algorithm, as one stream of blocks: a tile's first scores are computed beside the last values of the tile
    /// before, so that the tensor cores do not wait where tiles meet.
    pub fn run(&self) {
        let (k, config, shared) = (self.k, self.config, self.shared);
        let (q_state, k_state, v_state) =
            (shared.q_pipeline.start(k), shared.k_pipeline.start(k), shared.v_pipeline.start(k));
        // The last warpgroup lets the first begin.
        k.if_(self.group.eq(config.consumers - 1), || self.pass_turn());
        let (tile, left) = (self.work.unset(), k.reg::<u32>());
        let pair = || [k.reg(), k.reg()];
        let done = Finished { tile: self.work.unset(), reference: pair(), row_sum: pair() };
        self.next_tile(&tile, [q_state, k_state], left);
        k.if_(tile.exists.ne(0), || {
            self.pass_over_values(v_state);
            self.clear();
            shared.k_pipeline.consumer_wait(k, k_state);
            self.next_block(&tile, k_state);
            k.wgmma_fence();
            self.scores(q_state, k_state);
            k.wgmma_commit();
            self.keep(&tile);
            k.wgmma_wait(0);
            shared.k_pipeline.consumer_release(k, k_state.index, self.lane);
            k_state.advance();
            self.modify_and_mask(&tile);
            self.exponentiate();
            self.probabilities();
            let switch = k.reg::<bool>();
            k.loop_(|| {
                left.set(left - 1);
                switch.set(left.eq(0));
                k.if_(switch, || {
                    self.work.set(&done.tile, &tile);
                    for half in 0..2 {
                        done.reference[half].set(self.softmax.reference[half]);
                        done.row_sum[half].set(self.softmax.row_sum[half]);
                    }
                    if !config.q_in_registers {
                        shared.q_pipeline.consumer_release(k, q_state.index, self.lane);
                    }
                    q_state.advance();
                    self.next_tile(&tile, [q_state, k_state], left);
                });
                k.break_if(tile.exists.eq(0));
                shared.k_pipeline.consumer_wait(k, k_state);
                self.next_block(&tile, k_state);
                self.wait_turn();
                k.wgmma_fence();
                self.scores(q_state, k_state);
                k.wgmma_commit();
                shared.v_pipeline.consumer_wait(k, v_state);
                // Without this second fence ptxas serialises (C7519).
                k.wgmma_fence();
                self.values(v_state);
                k.wgmma_commit();
                self.pass_turn();
                self.keep(&tile);
                k.wgmma_wait(1);
                shared.k_pipeline.consumer_release(k, k_state.index, self.lane);
                k_state.advance();
                self.modify_and_mask(&tile);
                self.exponentiate();
                k.wgmma_wait(0);
                shared.v_pipeline.consumer_release(k, v_state.index, self.lane);
                v_state.advance();
                self.probabilities();
                k.if_else(
                    switch,
                    || {
                        self.pass_over_values(v_state);
                        self.write(&done);
                        self.clear();
                    },
                    || self.rescale(),
                );
            });
            shared.v_pipeline.consumer_wait(k, v_state);
            k.wgmma_fence();
            self.values(v_state);
            k.wgmma_commit();
            k.wgmma_wait(0);
            self.write(&done);
            k.if_(self.broken.ne(0.0).any(), || self.repair(done.tile.exists));
        });
    }

    /// Waits for the next tile, or for the end; takes its Q, if that goes to registers.
    fn next_tile(&self, tile: &WorkTile<'k>, [q_state, k_state]: [PipelineState<'k>; 2], left: Reg<'k, u32>) {
        let (k, shared) = (self.k, self.shared);
        shared.q_pipeline.consumer_wait(k, q_state);
        self.work.set(tile, &self.work.told(shared, q_state));
        k.if_(tile.exists.ne(0), || {
            if self.config.q_in_registers {
                self.take_q();
                shared.q_pipeline.consumer_release(k, q_state.index, self.lane);
            }
            for r in self.softmax.row_sum {
                r.set(0.0);
            }
            for r in self.softmax.reference {
                r.set(f32::NEG_INFINITY);
            }
            self.softmax.look.set(true);
            if let Blocks::Band(band) = tile.blocks_at {
                self.n_block.set(band.n_block_max);
            }
            left.set(tile.blocks);
            if let (Some(hidden), Blocks::Band(band)) = (self.hidden, tile.blocks_at) {
                let row = tile.m_block * self.config.tile_m() + self.group * 64;
                hidden.set(self.work.hidden(tile, &band, row, 64));
                left.set(left - hidden);
                self.n_block.set(self.n_block - hidden);
                k.for_(0u32, hidden, 1u32, |_| {
                    shared.k_pipeline.consumer_wait(k, k_state);
                    shared.k_pipeline.consumer_release(k, k_state.index, self.lane);
                    k_state.advance();
                    self.wait_turn();
                    self.pass_turn();
                });
            }
        });
    }

    /// Leaves out V of the blocks that none of this warpgroup's rows see.
    fn pass_over_values(&self, v_state: PipelineState<'k>) {
        let (k, shared) = (self.k, self.shared);
        if let Some(hidden) = self.hidden {
            k.for_(0u32, hidden, 1u32, |_| {
                shared.v_pipeline.consumer_wait(k, v_state);
                shared.v_pipeline.consumer_release(k, v_state.index, self.lane);
                v_state.advance();
            });
        }
    }

    fn clear(&self) {
        for &r in &self.o.registers {
            r.set(0.0);
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
    fn scores(&self, q_stage: PipelineState<'k>, stage: PipelineState<'k>) {
        let (k, config) = (self.k, self.config);
        let keys = config.k().k_major(self.shared.k + stage.index * config.k().bytes());
        let q = if config.q_stages() > 1 {
            self.shared.q + q_stage.index * config.q().bytes()
        } else {
            self.shared.q
        };
        let queries = config.q().k_major(q + self.group * (64 * 128));
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
            q: signed(self.work.query(tile.m_block * self.config.tile_m() + self.row)),
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
            let slope = Slope::of(program).filter(|_| !config.prescaled);
            let slope = slope.map(|slope| (slope, params.scale.rcp()));
            scores.modify(program, &params.score_tables, config.small_indices, slope);
        }
        let end = (tile.seqlen_k.bits::<i32>() - scores.kv).min(i32::MAX);
        let Blocks::Band(_) = tile.blocks_at else {
            let in_part = self.partial | (self.n_block * config.tile_n + config.tile_n).gt(tile.seqlen_k);
            if let Some((program, _)) = &config.mask_program {
                scores.mask(program, &params.mask_tables, in_part);
            }
            k.if_(in_part, || scores.limit(None, [end; 2]));
            return;
        };
        k.if_(self.partial, || {
            // Query i sees from i + shift − left to i + shift + right.
            let shift = (tile.seqlen_k - tile.seqlen_q).bits::<i32>() - scores.kv;
            let rows = if config.packed_heads > 1 {
                let other = self.work.query(tile.m_block * config.tile_m() + self.row + 8);
                [scores.q, other.bits()].map(|query| query + shift)
            } else {
                [0, 8].map(|further| scores.q + further + shift)
            };
            let to = rows.map(|diagonal| match params.band[1] {
                Some(right) => end.min(diagonal + 1 + right.min(1 << 30)),
                None => end,
            });
            let from = params.band[0].map(|left| rows.map(|diagonal| diagonal - left));
            scores.limit(from, to);
        });
    }

    /// S to exp2(scale·S − reference), with the sums of its rows.
    ///
    /// Any reference gives the exact result, as the division by the row sum takes it out again, as long as nothing
    /// overflows. bf16 reaches as far as f32: the first maximum is kept until a sum passes 2²⁴, and rows in which a single
    /// block jumps beyond that by more than 2¹⁰³ end with a sum or an O that is not finite, and are repaired. P in f16
    /// reaches to 2¹⁶ only: a block that has sums beyond 2¹⁵ goes to a new reference before it is rounded, as does O; where the
    /// reference is small P is large, so that no more of it is lost to 2⁻²⁴ than with the largest score as the reference.
    fn exponentiate(&self) {
        let (k, scale) = (self.k, self.scale);
        let OnlineSoftmax { reference, row_sum, look, moved, .. } = &self.softmax;
        let f16 = H::ELEMENT == Element::F16;
        moved.set(*look);
        // A score mod can make scores grow along the keys by any amount: ALiBi does, towards the diagonal. What two columns of
        // sixteen show to all rows of the warp is enough, as neighbours differ by less than the 2⁶³ left.
        if self.config.score_mod.is_some() {
            let grown = self.sample(2).map(|(half, most)| most.fma(scale, -reference[half]).gt(64.0));
            let [a, b] = grown;
            moved.set(*moved | (a | b).any());
        }
        k.if_(*moved, || {
            let row_max = [k.reg(), k.reg()];
            let set = |found: [Reg<'k, f32>; 2]| (0..2).for_each(|half| row_max[half].set(found[half]));
            if self.config.score_mod.is_some() {
                set(self.row_max(1));
            } else {
                // Any score that the row sees is as good a reference as the largest, within what may be exceeded; −∞ is none, to
                // which products of what is sampled may overflow while others do not.
                set(self.row_max((self.s.registers.len() / 16).max(1)));
                let [a, b] = row_max.map(|most| most.eq(f32::NEG_INFINITY));
                k.if_(self.partial | (a | b).any(), || set(self.row_max(1)));
            }
            self.refer_to(row_max);
        });
        let base = [0, 1].map(|half| {
            let nothing = reference[half].eq(f32::NEG_INFINITY);
            nothing.select(0.0, -reference[half])
        });
        let sums = if f16 { [k.var(0.0), k.var(0.0)] } else { *row_sum };
        for (i, &s) in self.s.registers.iter().enumerate() {
            let half = Fragment::half(i);
            s.set(s.fma(scale, base[half]).exp2());
            sums[half].set(sums[half] + s);
        }
        look.set(false);
        if f16 {
            let nothing = reference.map(|reference| reference.eq(f32::NEG_INFINITY));
            let [a, b] = [0, 1].map(|half| {
                row_sum[half].set(row_sum[half] + sums[half]);
                sums[half].gt(32768.0) | nothing[half]
            });
            k.if_((a | b).any(), || self.lower_block(nothing));
            return;
        }
        let [a, b] = [0, 1].map(|half| {
            row_sum[half].gt(f32::from_bits(0x4b80_0000)) | reference[half].eq(f32::NEG_INFINITY)
        });
        // A branch, so that ptxas leaves the exponentials before the wait for O += P·V.
        k.if_((a | b).any(), || {
            k.sync_warp();
            look.set(true);
        });
    }

    /// The block's exponentials to a new reference, their largest, where that is more than 1; and O, as if the block had been
    /// looked at before.
    fn lower_block(&self, nothing: [Reg<'k, bool>; 2]) {
        let OnlineSoftmax { reference, row_sum, look, moved, factor } = &self.softmax;
        look.set((nothing[0] | nothing[1]).any());
        let most = self.s.reduce_rows(|a, b| a.max(b));
        let roots = [0, 1].map(|half| {
            let rise = most[half].max(1.0).log2();
            let root = (rise * -0.5).exp2();
            reference[half].set(reference[half] + rise);
            row_sum[half].set(row_sum[half] * root * root);
            factor[half].set(moved.select(factor[half], 1.0) * root);
            root
        });
        for (i, &s) in self.s.registers.iter().enumerate() {
            let root = roots[Fragment::half(i)];
            s.set(s * root * root);
        }
        moved.set(true);
    }

    /// The largest of the thread's own scores in one column of each `step`th pair, by row.
    fn sample(&self, step: usize) -> [(usize, Reg<'k, f32>); 2] {
        [0, 1].map(|half| {
            let some = self.s.registers.chunks(4).step_by(step).map(|chunk| chunk[2 * half]);
            (half, some.reduce(|a, b| a.max(b)).unwrap_or(self.s.registers[0]))
        })
    }

    /// The largest of every `step`th pair of scores of the block in the thread's rows, in base 2.
    fn row_max(&self, step: usize) -> [Reg<'k, f32>; 2] {
        let some = self.s.registers.chunks(4).step_by(step).flatten().copied().collect();
        Fragment { registers: some }.reduce_rows(|a, b| a.max(b)).map(|most| most * self.scale)
    }

    /// Exponents from here on are taken against these maxima, or against where the rows' sums have come to.
    fn refer_to(&self, row_max: [Reg<'k, f32>; 2]) {
        let OnlineSoftmax { reference, row_sum, factor, .. } = &self.softmax;
        for half in 0..2 {
            let share = row_sum[half].max(1.0);
            let pair = share.max(share.shfl_bfly(1));
            let level = reference[half] + pair.max(pair.shfl_bfly(2)).log2();
            let new = level.max(row_max[half]);
            // Of a row that has seen nothing yet there is nothing to rescale (and −∞ − −∞ is no number).
            let nothing = new.eq(f32::NEG_INFINITY);
            // In two halves: 2⁻¹²⁷ is no normal number, while a sum may be 2¹²⁷.
            factor[half].set(nothing.select(1.0, ((reference[half] - new) * 0.5).exp2()));
            reference[half].set(new);
            row_sum[half].set(row_sum[half] * factor[half] * factor[half]);
        }
    }

    /// What dropout keeps of the block, which needs nothing of its scores.
    fn keep(&self, tile: &WorkTile<'k>) {
        if let Some(dropout) = &self.params.dropout {
            self.place(tile).keep(&self.kept, dropout);
        }
    }

    /// P, dropped out and rounded.
    fn probabilities(&self) {
        if self.config.dropout {
            for (i, &p) in self.s.registers.iter().enumerate() {
                p.set(self.kept.at(i).select(p, 0.0));
            }
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
                let factor = self.softmax.factor[Fragment::half(i)];
                o.set(o * factor * factor);
            }
        });
    }

    /// O / l and lse of the rows that exist.
    fn write(&self, done: &Finished<'k>) {
        let (k, config, params, tile) = (self.k, self.config, self.params, &done.tile);
        let [o, lse] = self.work.outputs(tile);
        let sink = self.work.sink(tile);
        // The thread's columns in bytes: in fours, even threads have some of the first eight of sixteen, odd ones of the second.
        let wide = ((self.lane & 1) << 4) + ((self.lane & 2) << 2);
        let [wide, narrow] = [wide, self.column << 1].map(|bytes| bytes.to_u64());
        for half in 0..2 {
            let row = tile.m_block * config.tile_m() + self.row + 8 * half as u32;
            let share = done.row_sum[half];
            let pair = share + share.shfl_bfly(1);
            // Made infinite from 2¹²⁰ on, where its reciprocal is no normal number soon.
            let sum = (pair + pair.shfl_bfly(2)) * 256.0 * (1.0 / 256.0);
            let end = RowEnd::new(params, done.reference[half], sum, sink);
            self.broken.set(sum.fma(0.0, self.broken));
            let of_half = self.o.registers.iter().enumerate().filter(|&(i, _)| Fragment::half(i) == half);
            let registers: Vec<_> = of_half
                .map(|(_, &o)| {
                    self.broken.set(o.fma(0.0, self.broken));
                    o * end.inverse
                })
                .collect();
            let exists = row.lt(self.work.rows(tile.seqlen_q));
            // The four threads of a row hold the same; the one with column 0 writes.
            k.when(self.column.eq(0) & exists, || (lse + self.work.in_lse(row) * 4).address().store(end.lse));
            let at = o + self.work.in_o(row) * 2;
            let [wide, narrow] = [wide, narrow].map(|column| (at + column).address());
            for (i, columns) in registers.chunks(4).enumerate() {
                let first = 16 * i as u32;
                if first + 16 <= config.head_dim_v {
                    self.store_wide(wide.at(2 * first as i32), columns, exists);
                } else {
                    for (j, pair) in columns.chunks(2).enumerate() {
                        self.store_narrow(narrow, first + 8 * j as u32, [pair[0], pair[1]], exists);
                    }
                }
            }
        }
    }

    /// Two columns of each of two times eight, in four threads: neighbours exchange two of theirs, so that each has four columns in
    /// a row and the store fills whole sectors.
    fn store_wide(&self, at: Address<'k, u64>, columns: &[Reg<'k, f32>], exists: Reg<'k, bool>) {
        let k = self.k;
        let [first, second] = [0, 2].map(|i| k.pack::<H>(columns[i], columns[i + 1]).bits::<B32>());
        let odd = (self.lane & 1).ne(0);
        let got = odd.select(first, second).shfl_bfly(1);
        let (low, high) = (odd.select(got, first), odd.select(second, got));
        k.when(exists, || at.store_vec([low, high]));
    }

    /// The thread's two of the eight columns from `first` on.
    fn store_narrow(
        &self,
        at: Address<'k, u64>,
        first: u32,
        columns: [Reg<'k, f32>; 2],
        exists: Reg<'k, bool>,
    ) {
        let (k, pair) = (self.k, self.k.pack::<H>(columns[0], columns[1]));
        let at = at.at(2 * first as i32);
        let left = self.config.head_dim_v.saturating_sub(first);
        if left >= 8 {
            k.when(exists, || at.store(pair));
            return;
        }
        // The last columns; of an odd number the last alone.
        k.when((self.column + 1).lt(left) & exists, || at.store(pair));
        if left % 2 == 1 {
            k.when(self.column.eq(left - 1) & exists, || at.store(half_bits::<H>(columns[0])));
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
