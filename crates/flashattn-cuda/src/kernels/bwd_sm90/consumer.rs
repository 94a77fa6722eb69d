//! A consumer warpgroup.

use ptx::build::{Address, Builder, Half, Reg};
use ptx::{B32, Descriptor, Fragment, PipelineState, TileLayout, WgmmaA};

use super::elements::Statistics;
use super::work::{Work, WorkItem};
use super::{BwdConfig, CONSUMERS, DqPart, Gradient, Params, Shared, Split};
use crate::kernels::philox::Kept;

/// First of the named barriers, one for each stage and warpgroup: the other warpgroup's dS is there. Two blocks' are
/// never the same, since one warpgroup may say so of a block before the other has waited for the one before.
const SCORES: u32 = 1;

/// The block at hand: nothing of it stays in registers, of which there are none to spare.
#[derive(Clone, Copy)]
pub(super) struct Block<'k> {
    /// Stage of Q.
    pub stage: Reg<'k, u32>,
    /// Stage of dO, and of P and dS.
    pub do_stage: Reg<'k, u32>,
}

/// What the producer told of a block.
pub(super) struct About<'k> {
    pub m_block: Reg<'k, u32>,
    /// Whether some row sees a part of the keys only.
    pub partial: Reg<'k, bool>,
    /// Query head.
    pub head: Reg<'k, u32>,
    /// Number of the tile of queries.
    tile: Reg<'k, u32>,
}

/// What is asked for of a block ahead of its products, which keep shared memory busy: where there are registers for it.
#[derive(Default)]
struct Early<'k> {
    minus_lse: Option<Statistics<'k>>,
    delta: Option<Statistics<'k>>,
    partial: Option<Reg<'k, bool>>,
}

/// A consumer warpgroup: its place and its operands.
pub(super) struct Consumer<'a, 'k, H> {
    pub k: &'k Builder,
    pub config: &'a BwdConfig,
    pub params: &'a Params<'k>,
    pub work: &'a Work<'a, 'k>,
    pub shared: &'a Shared<'k>,
    /// Which item is at hand.
    item: PipelineState<'k>,
    pub lane: Reg<'k, u32>,
    /// Which consumer, from 0.
    pub group: Reg<'k, u32>,
    /// The thread's first key and query in a block: row and column of its transposed scores.
    pub key: Reg<'k, u32>,
    pub query: Reg<'k, u32>,
    /// Sᵀ, then Pᵀ; dPᵀ, then dSᵀ; and both as operands.
    pub s: Fragment<'k>,
    pub dp: Fragment<'k>,
    pub p: Vec<[Reg<'k, H>; 4]>,
    pub ds: Vec<[Reg<'k, H>; 4]>,
    /// What dropout keeps of Pᵀ, if there is any.
    pub kept: Kept<'k>,
    pub dk: Fragment<'k>,
    pub dv: Fragment<'k>,
    dq: Fragment<'k>,
    /// Where dQ' that lies in shared memory is still to be added; 0: nowhere.
    put: Reg<'k, u64>,
    /// The room for it, if blocks take turns.
    dq_state: Option<PipelineState<'k>>,
}

impl<'a, 'k, H: Half> Consumer<'a, 'k, H> {
    pub fn new(work: &'a Work<'a, 'k>, shared: &'a Shared<'k>, warp: Reg<'k, u32>) -> Self {
        let (k, config, params) = (work.k, work.config, work.params);
        let fragments = |steps: u32| (0..steps).map(|_| [k.reg(), k.reg(), k.reg(), k.reg()]).collect();
        let (group, columns) = ((warp >> 2) - 1, config.score_columns());
        let [keys, queries] = match config.split {
            Split::Keys => [group * 64, k.var(0u32)],
            Split::Columns => [k.var(0u32), group * columns],
            Split::Gradients => [k.var(0u32), k.var(0u32)],
        };
        Consumer {
            k,
            config,
            params,
            work,
            shared,
            item: shared.item_pipeline.start(k),
            lane: k.lane(),
            group,
            key: keys + Fragment::row(k),
            query: queries + Fragment::column(k),
            s: Fragment::new(k, columns),
            dp: Fragment::new(k, columns),
            p: fragments(columns / 16),
            ds: fragments(columns / 16),
            kept: Kept::new(k, if config.dropout { columns } else { 0 }),
            dk: Fragment::new(k, config.dk_columns()),
            dv: Fragment::new(k, config.dv_columns()),
            dq: Fragment::new(k, if config.own_dq { 0 } else { config.dq_columns() }),
            put: k.var(0u64),
            dq_state: config.turns.then(|| {
                let state = shared.dq_pipeline.start(k);
                state.index.set(group);
                state
            }),
        }
    }

    /// The algorithm.
    pub fn run(&self) {
        match self.config.split {
            Split::Gradients => self.k.if_else(
                self.group.eq(0),
                || self.one_gradient(Gradient::Values),
                || self.one_gradient(Gradient::Keys),
            ),
            Split::Keys | Split::Columns => self.both_gradients(),
        }
    }

    fn both_gradients(&self) {
        let (k, shared) = (self.k, self.shared);
        // Of one stage only the phase changes, which the producer tells.
        let kv_state = shared.k_pipeline.start(k);
        let state = shared.q_pipeline.start(k);
        // Both pipelines of queries walk in step, if they have as many stages.
        let own = (self.config.do_stages != self.config.stages).then(|| shared.do_pipeline.start(k));
        let do_state = own.unwrap_or(state);
        let stage = k.var(0u32);
        let block = Block { stage, do_stage: own.map_or(stage, |_| k.var(0u32)) };
        let begin = || {
            block.stage.set(state.index);
            if let Some(own) = own {
                block.do_stage.set(own.index);
            }
        };
        // Both at once, where ptxas sees that all threads do the same: between products it does not, and takes all that depends on
        // a stage, descriptors above all, through vector registers.
        let advance = || {
            state.advance();
            if let Some(own) = own {
                own.advance();
            }
        };
        let products = |next: Option<Block<'k>>| {
            if !self.keeps_scores() {
                k.bar_sync(self.scores_barrier(&block, self.group), 128 * CONSUMERS);
            }
            k.wgmma_fence();
            if self.config.split == Split::Columns {
                self.d_values(&block);
            }
            if !self.config.own_dq {
                self.d_queries(&block);
            }
            k.wgmma_commit();
            self.d_keys(&block);
            k.wgmma_commit();
            // Nowhere are more products on their way, and dP's registers are free.
            if let Some(next) = next {
                self.keep(&next);
            }
            k.wgmma_wait(1);
            shared.do_pipeline.consumer_release(k, block.do_stage, self.lane);
            self.put_dq(self.about(&block).tile);
            k.wgmma_wait(0);
            shared.q_pipeline.consumer_release(k, block.stage, self.lane);
        };
        let values = || {
            if self.config.split == Split::Keys && !self.values_early() {
                self.pack_and_issue_values(&block);
            }
        };
        // The scores of a block are issued before the gradients of the one before.
        let ahead = |left: Reg<'k, u32>| {
            shared.q_pipeline.consumer_wait(k, state);
            k.wgmma_fence();
            self.scores(state.index);
            k.wgmma_commit();
            self.keep(&Block { stage: state.index, ..block });
            shared.v_pipeline.consumer_wait(k, kv_state);
            k.loop_(|| {
                begin();
                let early = if self.config.split == Split::Columns && !self.config.programs() {
                    Early {
                        minus_lse: Some(self.all(self.minus_lse(&block))),
                        delta: Some(self.all(self.delta(&block))),
                        partial: Some(self.about(&block).partial),
                    }
                } else {
                    Early::default()
                };
                shared.do_pipeline.consumer_wait(k, do_state);
                k.wgmma_fence();
                self.d_probabilities(&block);
                k.wgmma_commit();
                self.gradients_of_scores(&block, early);
                advance();
                left.set(left - 1);
                k.break_if(left.eq(0));
                shared.q_pipeline.consumer_wait(k, state);
                // After the wait's loop, across which ptxas moves no conversions to where registers are scarce.
                values();
                k.wgmma_fence();
                self.scores(state.index);
                k.wgmma_commit();
                // dV has its operand in registers, which dQ' needs.
                k.wgmma_wait(1);
                products(Some(Block { stage: state.index, ..block }));
            });
            values();
            k.wgmma_wait(0);
            shared.v_pipeline.consumer_release(k, kv_state.index, self.lane);
            products(None);
        };
        self.each_item(&[&self.dk, &self.dv], |item, left| {
            k.if_(left.ne(0), || {
                kv_state.phase.set(item.round);
                shared.k_pipeline.consumer_wait(k, kv_state);
                if self.in_order() {
                    shared.v_pipeline.consumer_wait(k, kv_state);
                    k.loop_(|| {
                        begin();
                        self.block_in_order(&block, state, do_state);
                        advance();
                        left.set(left - 1);
                        k.break_if(left.eq(0));
                    });
                    shared.v_pipeline.consumer_release(k, kv_state.index, self.lane);
                } else {
                    ahead(left);
                }
                shared.k_pipeline.consumer_release(k, kv_state.index, self.lane);
            });
            if !self.config.own_dq {
                k.fence_proxy_async();
                self.add_dq();
                self.finish_adding();
                self.put.set(0u64);
            }
        });
    }

    /// Runs `body` for each item with its number of blocks, and writes the sums then.
    pub fn each_item(&self, sums: &[&Fragment<'k>], body: impl FnOnce(&WorkItem<'k>, Reg<'k, u32>)) {
        let (k, shared) = (self.k, self.shared);
        k.loop_(|| {
            shared.item_pipeline.consumer_wait(k, self.item);
            let item = self.item();
            k.break_if(item.exists.eq(0));
            for &r in sums.iter().flat_map(|sum| &sum.registers) {
                r.set(0.0);
            }
            body(&item, k.var(item.blocks));
            let item = self.item();
            k.sync_warp();
            shared.item_pipeline.consumer_release(k, self.item.index, self.lane);
            self.item.advance();
            self.write(&item, sums);
        });
    }

    /// Whether a block's products follow one after the other, none of the next block's among them: that leaves registers for dS, so
    /// that dK does not read it from shared memory. Odd dimensions and busy producers leave too few. Not with dropout, whose words are
    /// computed beside the products of two blocks.
    fn in_order(&self) -> bool {
        let config = self.config;
        let whole = [config.head_dim, config.head_dim_v].iter().all(|dim| dim % 8 == 0);
        config.split == Split::Keys && whole && !config.busy_producers() && !config.dropout
    }

    /// A block in that order.
    fn block_in_order(&self, block: &Block<'k>, q_state: PipelineState<'k>, do_state: PipelineState<'k>) {
        let (k, shared) = (self.k, self.shared);
        shared.q_pipeline.consumer_wait(k, q_state);
        // As [`Early`].
        let few = self.config.tile_m == 64;
        let minus_lse = few.then(|| self.all(self.minus_lse(block)));
        let About { tile, partial, .. } = self.about(block);
        k.wgmma_fence();
        self.scores(q_state.index);
        k.wgmma_commit();
        shared.do_pipeline.consumer_wait(k, do_state);
        k.wgmma_fence();
        self.d_probabilities(block);
        k.wgmma_commit();
        k.wgmma_wait(1);
        self.probabilities(block, minus_lse);
        let delta = few.then(|| self.all(self.delta(block)));
        k.wgmma_wait(0);
        self.d_scores(block, delta);
        self.hide_all(block, partial, &[&self.s, &self.dp]);
        self.pack(&self.dp, &self.ds);
        let alone = self.keeps_scores();
        if !alone {
            self.store(&self.ds, shared.ds + block.do_stage * self.config.scores().bytes());
        }
        self.pack_and_issue_values(block);
        if !alone {
            self.tell_scores(block);
            k.bar_sync(self.scores_barrier(block, self.group), 128 * CONSUMERS);
            k.wgmma_fence();
            self.d_queries(block);
            k.wgmma_commit();
            k.wgmma_wait(1);
            shared.do_pipeline.consumer_release(k, block.do_stage, self.lane);
            k.wgmma_fence();
        }
        self.d_keys(block);
        k.wgmma_commit();
        k.wgmma_wait(1);
        if alone {
            shared.do_pipeline.consumer_release(k, block.do_stage, self.lane);
        } else {
            self.put_dq(tile);
        }
        k.wgmma_wait(0);
        shared.q_pipeline.consumer_release(k, block.stage, self.lane);
    }

    /// P and dS as operands, and both where the products need them. On entry S and dP are in flight, the older first.
    fn gradients_of_scores(&self, block: &Block<'k>, early: Early<'k>) {
        let (k, config, shared) = (self.k, self.config, self.shared);
        let at = block.do_stage * config.scores().bytes();
        if config.programs() {
            k.wgmma_wait(0);
            self.elements(block);
        } else if self.values_early() {
            k.wgmma_wait(1);
            self.probabilities(block, None);
            self.hide_all(block, self.about(block).partial, &[&self.s]);
            self.pack_and_issue_values(block);
            k.wgmma_wait(1);
            self.d_scores(block, None);
            self.hide_all(block, self.about(block).partial, &[&self.dp]);
        } else {
            k.wgmma_wait(1);
            self.probabilities(block, early.minus_lse);
            k.wgmma_wait(0);
            self.d_scores(block, early.delta);
            let partial = early.partial.unwrap_or_else(|| self.about(block).partial);
            self.hide_all(block, partial, &[&self.s, &self.dp]);
        }
        self.pack(&self.dp, &self.ds);
        if self.keeps_scores() {
            return;
        }
        self.store(&self.ds, shared.ds + at);
        if config.split == Split::Columns {
            self.pack(&self.s, &self.p);
            self.store(&self.p, shared.p + at);
        }
        self.tell_scores(block);
    }

    /// Says that dS is there, and whatever else products read. What was put of the block before is there too, as the fence is the same:
    /// one of its own would wait for it longer than dK takes.
    fn tell_scores(&self, block: &Block<'k>) {
        let k = self.k;
        k.fence_proxy_async();
        k.bar_arrive(self.scores_barrier(block, self.group ^ 1), 128 * CONSUMERS);
        if !self.config.own_dq {
            self.add_dq();
        }
    }

    /// Whether dK takes dS from registers.
    fn dk_from_registers(&self) -> bool {
        self.keeps_scores() || self.in_order()
    }

    /// Whether no product of a warpgroup needs the other's dS, so that it stays in registers.
    fn keeps_scores(&self) -> bool {
        self.config.own_dq && self.config.split == Split::Keys
    }

    /// The barrier at which warpgroup `group` waits for the other's dS.
    pub fn scores_barrier(&self, block: &Block<'k>, group: Reg<'k, u32>) -> Reg<'k, u32> {
        block.do_stage * CONSUMERS + group + SCORES
    }

    /// Whether dV is issued before dS is computed: where there are registers for P as an operand beside S and dP. With dropout dS
    /// needs what is dropped of P, too.
    fn values_early(&self) -> bool {
        let config = self.config;
        config.split == Split::Keys && config.tile_m == 64 && !config.busy_producers() && !config.dropout
    }

    /// Issues dV with P as an operand in registers.
    fn pack_and_issue_values(&self, block: &Block<'k>) {
        self.pack(&self.s, &self.p);
        self.k.wgmma_fence();
        self.d_values(block);
        self.k.wgmma_commit();
    }

    /// What the producer told of a block.
    pub fn about(&self, block: &Block<'k>) -> About<'k> {
        let [m_block, head, tile, _] = (self.shared.block + block.stage * 16).load_vec::<u32, 4>();
        About { m_block: m_block & 0x7fff_ffff, partial: m_block.ge(0x8000_0000), head, tile }
    }

    /// The item at hand.
    pub fn item(&self) -> WorkItem<'k> {
        self.work.told(self.shared, self.item.index)
    }

    /// Stats of a block's rows.
    pub fn stats(&self, block: &Block<'k>) -> Address<'k, u32> {
        self.shared.stats + (block.stage * self.config.stats_bytes() + self.query * 4)
    }

    /// The tile from the warpgroup's half of its columns on, if they are split.
    fn half_columns(&self, tile: Address<'k, u32>, layout: &TileLayout) -> Address<'k, u32> {
        tile + self.group * (layout.panels() / 2 * layout.panel_bytes())
    }

    /// The tile from the warpgroup's rows on, if keys are split; and from its queries.
    fn own_rows(&self, tile: Address<'k, u32>) -> Address<'k, u32> {
        if self.config.split == Split::Keys { tile + self.group * (64 * 128) } else { tile }
    }

    fn product(
        &self,
        d: &Fragment<'k>,
        a: Descriptor<'k>,
        b: Descriptor<'k>,
        [transpose_a, transpose_b]: [bool; 2],
        steps: u32,
        first: bool,
    ) {
        let shape = self.config.shape(d.columns(), transpose_a, transpose_b);
        for step in 0..steps {
            let a = WgmmaA::<B32>::Shared(a.step(step));
            self.k.wgmma(shape, &d.registers, a, b.step(step), !first || step != 0);
        }
    }

    /// Sᵀ-shaped product of a tile of keys and a stage of queries.
    fn transposed_scores(
        &self,
        d: &Fragment<'k>,
        keys: (Address<'k, u32>, TileLayout),
        queries: (Address<'k, u32>, TileLayout),
        dim: u32,
    ) {
        let own = match self.config.split {
            Split::Keys | Split::Gradients => queries.0,
            Split::Columns => queries.0 + self.group * (self.config.score_columns() * 128),
        };
        let (a, b) = (keys.1.k_major(self.own_rows(keys.0)), queries.1.k_major(own));
        self.product(d, a, b, [false, false], dim.div_ceil(16), true);
    }

    /// Issues Sᵀ = K·Qᵀ.
    pub fn scores(&self, stage: Reg<'k, u32>) {
        let (config, shared) = (self.config, self.shared);
        let queries = shared.q + stage * config.q().bytes();
        self.transposed_scores(&self.s, (shared.k, config.k()), (queries, config.q()), config.head_dim);
    }

    /// Issues dPᵀ = V·dOᵀ.
    pub fn d_probabilities(&self, block: &Block<'k>) {
        let (config, shared) = (self.config, self.shared);
        let d_o = shared.d_o + block.do_stage * config.d_o().bytes();
        self.transposed_scores(&self.dp, (shared.v, config.v()), (d_o, config.d_o()), config.head_dim_v);
    }

    /// Issues d += operandᵀ·rows, for dV and dK: `tile` is the operand in shared memory, `operand` in registers.
    fn accumulate(
        &self,
        d: &Fragment<'k>,
        operand: &[[Reg<'k, H>; 4]],
        tile: Address<'k, u32>,
        rows: (Address<'k, u32>, TileLayout),
    ) {
        let (k, config) = (self.k, self.config);
        match config.split {
            Split::Keys if std::ptr::eq(d, &self.dk) && !self.dk_from_registers() => {
                let own = tile + self.group * config.scores().panel_bytes();
                let (a, b) = (config.scores().mn_major(own), rows.1.mn_major(rows.0));
                self.product(d, a, b, [true, true], config.tile_m / 16, false);
            }
            Split::Keys | Split::Gradients => {
                let (b, shape) = (rows.1.mn_major(rows.0), config.shape(d.columns(), false, true));
                for (step, operand) in operand.iter().enumerate() {
                    k.wgmma(shape, &d.registers, WgmmaA::Registers(operand), b.step(step as u32), true);
                }
            }
            Split::Columns => {
                let (a, b) =
                    (config.scores().k_major(tile), rows.1.mn_major(self.half_columns(rows.0, &rows.1)));
                self.product(d, a, b, [false, true], config.tile_m / 16, false);
            }
        }
    }

    /// Issues dV += Pᵀ·dO.
    pub fn d_values(&self, block: &Block<'k>) {
        let (config, shared) = (self.config, self.shared);
        let d_o = shared.d_o + block.do_stage * config.d_o().bytes();
        let p = shared.p + block.do_stage * config.scores().bytes();
        self.accumulate(&self.dv, &self.p, p, (d_o, config.d_o()));
    }

    /// Issues dK += dSᵀ·Q.
    pub fn d_keys(&self, block: &Block<'k>) {
        let (config, shared) = (self.config, self.shared);
        let q = shared.q + block.stage * config.q().bytes();
        let ds = shared.ds + block.do_stage * config.scores().bytes();
        self.accumulate(&self.dk, &self.ds, ds, (q, config.q()));
    }

    /// Issues dQ' = dS·K.
    fn d_queries(&self, block: &Block<'k>) {
        let (config, shared, layout) = (self.config, self.shared, self.config.scores());
        let ds = shared.ds + block.do_stage * layout.bytes();
        let (a, b, steps) = match config.dq_part() {
            DqPart::Queries => (ds + self.group * (64 * 128), shared.k, config.tile_n() / 16),
            DqPart::Columns => (ds, self.half_columns(shared.k, &config.k()), config.tile_n() / 16),
            DqPart::Keys => (ds + self.group * layout.panel_bytes(), self.own_rows(shared.k), 4),
        };
        let transposed = config.split == Split::Columns;
        let a = if transposed { layout.mn_major(a) } else { layout.k_major(a) };
        self.product(&self.dq, a, config.k().mn_major(b), [transposed, true], steps, true);
    }

    /// Puts the warp's dQ' of a tile into shared memory, if it is added up.
    fn put_dq(&self, tile: Reg<'k, u32>) {
        let (k, config) = (self.k, self.config);
        let Some(sums) = self.params.dq_sums else { return };
        let to = self.dq_place() + self.lane * 16;
        if let Some(state) = self.dq_state {
            // Not where to, which `turns.rs` knows.
            self.put.set(1u64);
            self.shared.dq_pipeline.consumer_wait(k, state);
            state.phase.set(state.phase ^ 1);
        } else {
            let part = if config.dq_parts() == 1 { k.var(0u32) } else { self.group };
            let warp = (part * 4 + self.warp()) * config.dq_warp_bytes();
            self.put.set(tile.mad_wide(config.dq_sum_bytes(), sums) + warp.to_u64());
            self.finish_adding();
            k.sync_warp();
        }
        let fours = self.dq.registers.as_chunks::<4>().0.iter().enumerate();
        fours.for_each(|(j, four)| to.at(32 * 16 * j as i32).store_vec(*four));
    }

    /// Adds what lies there to the sums in global memory. Each thread has passed a fence since it put its part.
    fn add_dq(&self) {
        let k = self.k;
        k.sync_warp();
        if let Some(state) = self.dq_state {
            let told = || self.shared.dq_pipeline.consumer_release(k, state.index, self.lane);
            return k.if_(self.put.ne(0), told);
        }
        k.if_(self.lane.eq(0) & self.put.ne(0), || {
            k.bulk_reduce_add_f32(self.put.address(), self.dq_place(), self.config.dq_warp_bytes());
            k.bulk_commit();
        });
    }

    /// The warp's place for dQ' in shared memory.
    fn dq_place(&self) -> Address<'k, u32> {
        self.shared.dq + (self.group * 4 + self.warp()) * self.config.dq_warp_bytes()
    }

    /// Which warp of its warpgroup.
    fn warp(&self) -> Reg<'k, u32> {
        (self.k.tid(0) >> 5) & 3
    }

    /// Waits for the reduction of the block before, if it is on its way, to let go of shared memory.
    fn finish_adding(&self) {
        if self.dq_state.is_none() {
            self.k.when(self.lane.eq(0), || self.k.bulk_wait(0, true));
        }
    }
}
