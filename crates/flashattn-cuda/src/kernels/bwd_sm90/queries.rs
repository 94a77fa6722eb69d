//! dQ by a kernel of its own: queries outside and keys inside, as in the forward pass.
//!
//! S and dP are computed a second time, seven products instead of five; but nothing is added up across blocks, which at head_dim
//! 256 costs more than that (L2 adds about 2 TB/s), takes memory, zeros and a pass over dQ, and comes in no fixed order.
//!
//! ```text
//! as many blocks as multiprocessors; each takes items (128 queries, head, batch) from a counter:
//!   producers (two threads):  Q, dO; then for each visible n_block: K; and V; each into stages of its own
//!   a warp beside them:       the sinks' gradients from their tiles' sums
//!   consumers (two warpgroups, 64 queries each):
//!     the gradients of tables from their exact sums, if they have such; then for each n_block:
//!       S = Q·Kᵀ, dP = dO·Vᵀ                     (S issued before, dP behind the dQ of the block before)
//!       dS = exp2(scale·S − lse) ∘ (dP − D)      in registers: it is the next product's operand
//!       dQ += dS·K
//!   dQ·scale
//! ```

use std::f32::consts::LOG2_E;
use std::ops::Range;

use ptx::build::{Address, Builder, Half, Reg};
use ptx::instr::WgmmaShape;
use ptx::{B32, Fragment, Kernel, Mbarrier, Pipeline, PipelineState, Target, TileLayout, WgmmaA, build};

use super::elements::{Formula, Given, place};
use super::exact::Exact;
use super::output::Rows;
use super::postprocess::sum_sinks;
use super::work::{Loads, Sequence, Work, tell_or_hear};
use super::{BwdConfig, CONSUMERS, Params, superaccumulator};
use crate::kernels::philox::Kept;
use crate::kernels::program::{Element, ProgramEmitter};

/// Queries of an item.
const ROWS: u32 = BwdConfig::QUERIES;

impl BwdConfig {
    fn item_q(&self) -> TileLayout {
        self.layout(ROWS, self.head_dim, false)
    }

    fn item_d_o(&self) -> TileLayout {
        self.layout(ROWS, self.head_dim_v, false)
    }

    fn block_k(&self) -> TileLayout {
        self.layout(self.tile_n(), self.head_dim, false)
    }

    fn block_v(&self) -> TileLayout {
        self.layout(self.tile_n(), self.head_dim_v, false)
    }

    /// Stages of K and of V. K stays until dQ has been added to, V only for dP.
    fn key_stages(&self) -> [u32; 2] {
        // Barriers, numbers, and what is lost to alignment are less than 2 KiB.
        let room = Target::Sm90a.shared_limit() - self.item_q().bytes() - self.item_d_o().bytes() - 2048;
        let (k, v) = (self.block_k().bytes(), self.block_v().bytes());
        if 3 * k + 2 * v <= room { [3, 2] } else { [2, 1] }
    }
}

/// Shared memory and barriers.
struct Shared<'k> {
    q: Address<'k, u32>,
    d_o: Address<'k, u32>,
    k: Address<'k, u32>,
    v: Address<'k, u32>,
    item: Address<'k, u32>,
    /// For each stage of K which block it is (bit 31: seen in part).
    block: Address<'k, u32>,
    /// Told ahead of Q, so that dO comes at the same time.
    item_pipeline: Pipeline<'k>,
    q_pipeline: Pipeline<'k>,
    do_pipeline: Pipeline<'k>,
    k_pipeline: Pipeline<'k>,
    v_pipeline: Pipeline<'k>,
}

impl<'k> Shared<'k> {
    const ITEM_BYTES: u32 = 48;

    fn new(k: &'k Builder, config: &BwdConfig) -> Self {
        let (align, warps, [k_stages, v_stages]) = (TileLayout::ALIGN, 4 * CONSUMERS, config.key_stages());
        Shared {
            q: k.shared("q", config.item_q().bytes(), align),
            d_o: k.shared("do", config.item_d_o().bytes(), align),
            k: k.shared("k", config.block_k().bytes() * k_stages, align),
            v: k.shared("v", config.block_v().bytes() * v_stages, align),
            item: k.shared("item", 2 * Self::ITEM_BYTES, 16),
            block: k.shared("block", 4 * k_stages, 16),
            item_pipeline: Pipeline::new(k, "item", 2, warps + 1, 1),
            q_pipeline: Pipeline::new(k, "q", 1, warps, 1),
            do_pipeline: Pipeline::new(k, "do", 1, warps, 1),
            k_pipeline: Pipeline::new(k, "k", k_stages, warps, 1),
            v_pipeline: Pipeline::new(k, "v", v_stages, warps, 1),
        }
    }

    fn pipelines(&self) -> [Pipeline<'k>; 5] {
        [self.item_pipeline, self.q_pipeline, self.do_pipeline, self.k_pipeline, self.v_pipeline]
    }
}

/// Queries of a head, the same in all threads of a block.
struct Item<'k> {
    /// Whether there is one: past the last item a number stands for none.
    exists: Reg<'k, u32>,
    /// Blocks of keys.
    blocks: Reg<'k, u32>,
    /// Which [`ROWS`] of its sequence.
    number: Reg<'k, u32>,
    head: Reg<'k, u32>,
    batch: Reg<'k, u32>,
    sequence: Sequence<'k>,
    /// Of a band the first block; of a list the first run and one past the last.
    from: Reg<'k, u32>,
    to: Reg<'k, u32>,
}

pub(super) fn emit<H: Half>(config: &BwdConfig) -> Kernel {
    build(&config.name("_queries"), Target::Sm90a, 128 * (1 + CONSUMERS), |k| {
        let params = Params::new(k, config);
        let shared = Shared::new(k, config);
        let work = Work::new(k, config, &params);
        k.if_(k.tid(0).eq(0), || {
            shared.pipelines().into_iter().for_each(|pipeline| pipeline.init(k));
            k.fence_mbarrier_init();
        });
        k.sync_threads();
        let warp = k.warp();
        let (few, many) = config.registers();
        let items = Items { work: &work };
        k.if_else(
            (warp >> 2).eq(0),
            || {
                k.lower_registers(few);
                let one = k.lane().eq(0);
                k.if_(warp.eq(0) & one, || items.load(&shared, Loads::Queries));
                k.if_(warp.eq(1) & one, || items.load(&shared, Loads::Gradients));
                if let Some([_, d_sinks, sums]) = params.sinks {
                    k.if_(warp.eq(2), || {
                        k.for_(k.ctaid(0), params.heads_q, k.nctaid(0), |head| {
                            sum_sinks(&work, head, d_sinks, sums);
                        });
                    });
                }
            },
            || {
                k.raise_registers(many);
                // In the shadow of the first loads.
                add_table_sums(k, &params);
                Consumer::<H>::new(&items, &shared, warp).run();
            },
        );
    })
}

/// Adds what the main kernel summed up exactly to the gradients of tables: by the consumers of all blocks, of which this is one.
fn add_table_sums<'k>(k: &'k Builder, params: &Params<'k>) {
    const THREADS: u32 = 128 * CONSUMERS;
    for &(sums, gradient) in &params.table_sums {
        let elements = sums.dims.into_iter().flatten().fold(k.var(1u32), |a, b| a * b);
        let first = k.ctaid(0) * THREADS + (k.tid(0) - 128);
        k.for_(first, elements, k.nctaid(0) * THREADS, |i| {
            let sum = superaccumulator::total(i.mad_wide(sums.bytes, sums.data));
            let to = i.mad_wide(4, gradient).address();
            to.store(to.load::<f32>() + sum);
        });
        k.sync_warp();
    }
}

/// What a launch has to do.
struct Items<'a, 'k> {
    work: &'a Work<'a, 'k>,
}

impl<'k> Items<'_, 'k> {
    /// Items of each head and sequence: those of the longest.
    fn each(&self) -> Reg<'k, u32> {
        (self.work.params.seqlen_q + (ROWS - 1)) / ROWS
    }

    /// The item with this number: groups of heads, so that their K and V stay in L2; within a group the last rows of all its heads
    /// first, as those are the longest under a causal mask.
    fn item(&self, number: Reg<'k, u32>) -> Item<'k> {
        let Work { k, params, .. } = *self.work;
        let (heads, each) = (params.heads_q * params.batch, self.each());
        let exists = number.lt(heads * each);
        let group = params.head_group * self.work.group();
        let (first, inside) = (number / (group * each) * group, number % (group * each));
        let size = (heads - first).min(group);
        let head_and_batch = exists.select(first + inside % size, 0u32);
        let (batch, head) = (head_and_batch / params.heads_q, head_and_batch % params.heads_q);
        let number = each - 1 - inside / size;
        let item = Item {
            exists: exists.select(1u32, 0u32),
            blocks: k.var(0u32),
            number,
            head,
            batch,
            sequence: self.work.sequence(batch),
            from: k.var(0u32),
            to: k.var(0u32),
        };
        k.if_(exists, || match params.query_rows {
            None => {
                let [from, to] = self.band(&item);
                item.from.set(from);
                item.to.set(to);
                item.blocks.set(to - from);
            }
            Some([rows, _]) => {
                let row = (batch * params.heads_q + head) * each + number;
                let [first, count, blocks, _] = row.mad_wide(16, rows).address().load_vec::<u32, 4>();
                item.from.set(first);
                item.to.set(first + count);
                item.blocks.set(blocks);
            }
        });
        item
    }

    /// First row of the item and one past its last.
    fn rows(&self, item: &Item<'k>) -> [Reg<'k, u32>; 2] {
        let first = item.number * ROWS;
        [first, (first + ROWS).min(item.sequence.seqlen_q)]
    }

    /// First block of keys that some row sees under a band, and one past the last.
    fn band(&self, item: &Item<'k>) -> [Reg<'k, u32>; 2] {
        let Work { k, config, params } = *self.work;
        let Sequence { seqlen_q, seqlen_k, .. } = item.sequence;
        let [first, end] = self.rows(item);
        let shift = (seqlen_k - seqlen_q).bits::<i32>();
        let clamp = |key: Reg<'k, i32>| key.max(0).bits::<u32>().min(seqlen_k);
        let [left, right] = params.band;
        let from = left.map(|left| clamp(first.bits::<i32>() + shift - left));
        let to = right.map(|right| clamp(end.bits::<i32>() + shift + right.min(1 << 30)));
        let (from, to) = (from.unwrap_or(k.var(0u32)), to.unwrap_or(seqlen_k));
        // Of a sequence shorter than the longest some items have no rows.
        let any = first.lt(seqlen_q) & from.lt(to);
        let tile_n = config.tile_n();
        let from = from / tile_n;
        [from, any.select((to + (tile_n - 1)) / tile_n, from)]
    }

    /// Runs `body` for each block of keys of the item; bit 31 of what it gets: some row sees a part of the keys only.
    fn each_block(&self, item: &Item<'k>, body: impl Fn(Reg<'k, u32>, Reg<'k, u32>)) {
        let Work { k, config, params } = *self.work;
        let tile_n = config.tile_n();
        let Sequence { seqlen_q, seqlen_k, .. } = item.sequence;
        let partial = |partial: Reg<'k, bool>| partial.select(0x8000_0000u32, 0u32);
        match params.query_rows {
            None => {
                let [first, end] = self.rows(item);
                let signed = |r: Reg<'k, u32>| r.bits::<i32>();
                let shift = signed(seqlen_k - seqlen_q);
                let [left, right] = params.band;
                k.for_(item.from, item.to, 1u32, |n_block| {
                    let key = n_block * tile_n;
                    let mut some = (key + tile_n).gt(seqlen_k);
                    if let Some(right) = right {
                        some = some
                            | (signed(first) + shift + right.min(1 << 30)).lt(signed(key + (tile_n - 1)));
                    }
                    if let Some(left) = left {
                        some = some | (signed(end) - 1 + shift - left).gt(signed(key));
                    }
                    body(n_block, partial(some));
                });
            }
            Some([_, runs]) => k.for_(item.from, item.to, 1u32, |run| {
                let [begin, end] = run.mad_wide(8, runs).address().load_vec::<u32, 2>();
                k.for_(begin & 0x7fff_ffff, end, 1u32, |n_block| {
                    // The mask's schedule does not look at what is past the end.
                    let ragged = partial((n_block * tile_n + tile_n).gt(seqlen_k));
                    body(n_block, (begin & 0x8000_0000) | ragged);
                });
            }),
        }
    }

    /// Tells the consumers and the other producer.
    fn tell(&self, shared: &Shared<'k>, slot: Reg<'k, u32>, item: &Item<'k>) {
        let (s, at) = (&item.sequence, shared.item + slot * Shared::ITEM_BYTES);
        at.store_vec([item.exists, item.blocks, item.number, item.head]);
        at.at(16).store_vec([item.batch, s.tile, item.from, item.to]);
        if self.work.config.varlen {
            at.at(32).store_vec([s.seqlen_q, s.seqlen_k, s.q_row, s.kv_row]);
        }
    }

    /// What the producer told.
    fn told(&self, shared: &Shared<'k>, slot: Reg<'k, u32>) -> Item<'k> {
        let Work { k, config, params } = *self.work;
        let at = shared.item + slot * Shared::ITEM_BYTES;
        let [exists, blocks, number, head] = at.load_vec::<u32, 4>();
        let [batch, tile, from, to] = at.at(16).load_vec::<u32, 4>();
        let [seqlen_q, seqlen_k, q_row, kv_row] = if config.varlen {
            at.at(32).load_vec::<u32, 4>()
        } else {
            let zero = k.var(0u32);
            [params.seqlen_q, params.seqlen_k, zero, zero]
        };
        let sequence = Sequence { seqlen_q, seqlen_k, q_row, kv_row, tile };
        Item { exists, blocks, number, head, batch, sequence, from, to }
    }

    /// A producer, one thread. The first takes items, tells the others, and loads Q and K; the second, of another warp, dO and V.
    fn load(&self, shared: &Shared<'k>, what: Loads) {
        let Work { k, config, params } = *self.work;
        let [map_q, map_k, map_v, map_do] = params.maps;
        let (once, once_layout, once_to, once_map) = match what {
            Loads::Queries => (shared.q_pipeline, config.item_q(), shared.q, map_q),
            Loads::Gradients => (shared.do_pipeline, config.item_d_o(), shared.d_o, map_do),
        };
        let (pipeline, layout, to, map) = match what {
            Loads::Queries => (shared.k_pipeline, config.block_k(), shared.k, map_k),
            Loads::Gradients => (shared.v_pipeline, config.block_v(), shared.v, map_v),
        };
        for map in [once_map, map] {
            k.prefetch_tensor_map(map);
        }
        let (items, item_state) = (shared.item_pipeline, shared.item_pipeline.start(k));
        let (once_state, state) = (once.start(k), pipeline.start(k));
        let all = self.each() * params.heads_q * params.batch;
        let take = || self.work.take(all);
        let next = (what == Loads::Queries).then(|| k.var(take()));
        k.loop_(|| {
            let taken = next.map(|next| {
                let item = self.item(next);
                // Asked for now, so that it is there when this item has been loaded.
                k.if_(item.exists.ne(0), || next.set(take()));
                item
            });
            let (slot, tell) = (item_state.index, |item: &_| self.tell(shared, item_state.index, item));
            let item = tell_or_hear(k, items, item_state, taken, tell, || self.told(shared, slot));
            k.break_if(item.exists.eq(0));
            item_state.advance();
            k.if_(item.blocks.ne(0), || {
                let batch = self.work.batch(item.batch);
                let row = item.sequence.q_row + item.number * ROWS;
                // The maps' boxes are the main kernel's.
                let parts = 0..ROWS / config.tile_m;
                let at = |part: u32| [row + part * config.tile_m, item.head, batch];
                // Room for it there is only when the item before is done; until then it comes into L2.
                for part in parts.clone() {
                    self.work.each_panel(once_layout, at(part), |_, at| k.tma_prefetch(once_map, at));
                }
                once.producer_acquire(k, once_state, once_layout.bytes());
                let full = once.full(once_state);
                for part in parts {
                    self.work.each_panel(once_layout, at(part), |panel, at| {
                        let inside = panel * once_layout.panel_bytes() + part * config.tile_m * 128;
                        k.tma_load(once_to.at(inside as i32), once_map, at, full);
                    });
                }
                once_state.phase.set(once_state.phase ^ 1);
                let head = item.head / self.work.group();
                self.each_block(&item, |n_block, partial| {
                    pipeline.producer_wait(k, state);
                    if what == Loads::Queries {
                        (shared.block + state.index * 4).store(n_block | partial);
                    }
                    let full: Mbarrier<'k> = pipeline.full(state);
                    full.arrive_expect_tx(k, layout.bytes());
                    let at = [item.sequence.kv_row + n_block * config.tile_n(), head, batch];
                    self.work.panels(layout, to + state.index * layout.bytes(), map, at, full);
                    state.advance();
                });
            });
        });
    }
}

/// A consumer warpgroup: its place and its operands.
struct Consumer<'a, 'k, H> {
    k: &'k Builder,
    config: &'a BwdConfig,
    params: &'a Params<'k>,
    items: &'a Items<'a, 'k>,
    shared: &'a Shared<'k>,
    lane: Reg<'k, u32>,
    /// Which consumer, from 0.
    group: Reg<'k, u32>,
    /// −lse in base 2, and D, of the thread's two rows.
    minus_lse: [Reg<'k, f32>; 2],
    delta: [Reg<'k, f32>; 2],
    /// S, then P; dP, then dS; and that as an operand.
    s: Fragment<'k>,
    dp: Fragment<'k>,
    ds: Vec<[Reg<'k, H>; 4]>,
    /// What dropout keeps of P, if there is any.
    kept: Kept<'k>,
    dq: Fragment<'k>,
}

impl<'a, 'k, H: Half> Consumer<'a, 'k, H> {
    fn new(items: &'a Items<'a, 'k>, shared: &'a Shared<'k>, warp: Reg<'k, u32>) -> Self {
        let Work { k, config, params } = *items.work;
        let columns = config.tile_n();
        Consumer {
            k,
            config,
            params,
            items,
            shared,
            lane: k.lane(),
            group: (warp >> 2) - 1,
            minus_lse: [k.reg(), k.reg()],
            delta: [k.reg(), k.reg()],
            s: Fragment::new(k, columns),
            dp: Fragment::new(k, columns),
            ds: (0..columns / 16).map(|_| [k.reg(), k.reg(), k.reg(), k.reg()]).collect(),
            kept: Kept::new(k, if config.dropout { columns } else { 0 }),
            dq: Fragment::new(k, config.head_dim.next_multiple_of(16)),
        }
    }

    fn run(&self) {
        let (k, shared) = (self.k, self.shared);
        let item_state = shared.item_pipeline.start(k);
        // Of one stage only the phase changes.
        let (q_state, do_state) = (shared.q_pipeline.start(k), shared.do_pipeline.start(k));
        let (k_state, v_state) = (shared.k_pipeline.start(k), shared.v_pipeline.start(k));
        let block = k.var(0u32);
        let plain = !self.config.programs();
        let few = self.config.key_stages()[0] == 2;
        // Whether there are registers for the next block's dP beside this one's dS, and its V is there by then.
        let early = !few && self.s.registers.len() * 5 / 2 + self.dq.registers.len() <= 208;
        k.loop_(|| {
            shared.item_pipeline.consumer_wait(k, item_state);
            let item = self.items.told(shared, item_state.index);
            k.break_if(item.exists.eq(0));
            self.stats(&item);
            for &r in &self.dq.registers {
                r.set(0.0);
            }
            let left = k.var(item.blocks);
            k.if_(left.ne(0), || {
                shared.q_pipeline.consumer_wait(k, q_state);
                shared.k_pipeline.consumer_wait(k, k_state);
                self.scores(k_state.index);
                shared.do_pipeline.consumer_wait(k, do_state);
                shared.v_pipeline.consumer_wait(k, v_state);
                self.d_probabilities(v_state.index);
                if plain {
                    k.wgmma_wait(1);
                    self.probabilities();
                }
                k.loop_(|| {
                    block.set(k_state.index);
                    self.keep(item_state, block);
                    k.wgmma_wait(0);
                    shared.v_pipeline.consumer_release(k, v_state.index, self.lane);
                    self.d_scores(item_state, block);
                    k_state.advance();
                    v_state.advance();
                    left.set(left - 1);
                    k.break_if(left.eq(0));
                    shared.k_pipeline.consumer_wait(k, k_state);
                    if !few {
                        self.scores(k_state.index);
                    }
                    self.d_queries(block);
                    if few {
                        // Its place is needed for the block after the next.
                        self.scores(k_state.index);
                        k.wgmma_wait(1);
                        shared.k_pipeline.consumer_release(k, block, self.lane);
                    }
                    if early {
                        shared.v_pipeline.consumer_wait(k, v_state);
                        self.d_probabilities(v_state.index);
                    }
                    if plain {
                        k.wgmma_wait(u8::from(!few) + u8::from(early));
                        self.probabilities();
                    }
                    if !few {
                        k.wgmma_wait(u8::from(early));
                        shared.k_pipeline.consumer_release(k, block, self.lane);
                    }
                    if !early {
                        shared.v_pipeline.consumer_wait(k, v_state);
                        self.d_probabilities(v_state.index);
                    }
                });
                for pipeline in [shared.q_pipeline, shared.do_pipeline] {
                    pipeline.consumer_release(k, k.var(0u32), self.lane);
                }
                q_state.phase.set(q_state.phase ^ 1);
                do_state.phase.set(do_state.phase ^ 1);
                self.d_queries(block);
                k.wgmma_wait(0);
                shared.k_pipeline.consumer_release(k, block, self.lane);
            });
            let item = self.items.told(shared, item_state.index);
            k.sync_warp();
            shared.item_pipeline.consumer_release(k, item_state.index, self.lane);
            item_state.advance();
            self.write(&item);
        });
    }

    /// The first of the thread's two rows in its sequence; the other is eight further.
    fn row(&self, item: &Item<'k>) -> Reg<'k, u32> {
        item.number * ROWS + self.group * 64 + Fragment::row(self.k)
    }

    /// Reads what preprocessing wrote of the thread's rows. Of a row past the end P is 0.
    fn stats(&self, item: &Item<'k>) {
        let (k, tile_m) = (self.k, self.config.tile_m);
        let first = self.row(item);
        for half in 0..2usize {
            let row = first + 8 * half as u32;
            self.minus_lse[half].set(f32::NEG_INFINITY);
            self.delta[half].set(0.0);
            k.if_(row.lt(item.sequence.seqlen_q), || {
                let tile = self.items.work.tile(&item.sequence, item.head, row / tile_m);
                let stats = tile.mad_wide(self.config.stats_bytes(), self.params.stats);
                let at = (row % tile_m).mad_wide(4, stats).address();
                self.minus_lse[half].set(at.load::<f32>());
                self.delta[half].set(at.at(4 * tile_m as i32).load::<f32>());
            });
        }
    }

    fn shape(&self, columns: u32, transpose_b: bool) -> WgmmaShape {
        self.config.shape(columns, false, transpose_b)
    }

    /// Issues d = rows·blockᵀ as a group: `rows` the warpgroup's of an item's tile.
    fn product(
        &self,
        d: &Fragment<'k>,
        (rows, rows_layout): (Address<'k, u32>, TileLayout),
        (block, block_layout): (Address<'k, u32>, TileLayout),
        dim: u32,
    ) {
        let a = rows_layout.k_major(rows + self.group * (64 * 128));
        let b = block_layout.k_major(block);
        self.k.wgmma_fence();
        for step in 0..dim.div_ceil(16) {
            let a = WgmmaA::<B32>::Shared(a.step(step));
            self.k.wgmma(self.shape(d.columns(), false), &d.registers, a, b.step(step), step != 0);
        }
        self.k.wgmma_commit();
    }

    /// Issues S = Q·Kᵀ.
    fn scores(&self, stage: Reg<'k, u32>) {
        let (config, shared) = (self.config, self.shared);
        let block = shared.k + stage * config.block_k().bytes();
        self.product(&self.s, (shared.q, config.item_q()), (block, config.block_k()), config.head_dim);
    }

    /// Issues dP = dO·Vᵀ.
    fn d_probabilities(&self, stage: Reg<'k, u32>) {
        let (config, shared) = (self.config, self.shared);
        let block = shared.v + stage * config.block_v().bytes();
        self.product(&self.dp, (shared.d_o, config.item_d_o()), (block, config.block_v()), config.head_dim_v);
    }

    /// Issues dQ += dS·K.
    fn d_queries(&self, stage: Reg<'k, u32>) {
        let (k, layout) = (self.k, self.config.block_k());
        let b = layout.mn_major(self.shared.k + stage * layout.bytes());
        k.wgmma_fence();
        for (step, operand) in self.ds.iter().enumerate() {
            let a = WgmmaA::Registers(operand);
            k.wgmma(self.shape(self.dq.columns(), true), &self.dq.registers, a, b.step(step as u32), true);
        }
        k.wgmma_commit();
    }

    /// S to P. What a row does not see is taken out of dS.
    fn probabilities(&self) {
        let scale = self.params.scale * LOG2_E;
        for (i, &s) in self.s.registers.iter().enumerate() {
            s.set(s.fma(scale, self.minus_lse[Fragment::half(i)]).exp2());
        }
    }

    /// What the producer told of a block: its number, with bit 31.
    fn about(&self, block: Reg<'k, u32>) -> Reg<'k, u32> {
        (self.shared.block + block * 4).load()
    }

    /// The thread's first key in a block.
    fn key(&self, block: Reg<'k, u32>) -> Reg<'k, u32> {
        (self.about(block) & 0x7fff_ffff) * self.config.tile_n() + Fragment::column(self.k)
    }

    /// What dropout keeps of a block, which needs nothing of its scores.
    fn keep(&self, item: PipelineState<'k>, block: Reg<'k, u32>) {
        if let Some(dropout) = &self.params.dropout {
            let item = self.items.told(self.shared, item.index);
            let place = place(self.items.work, &item.sequence, item.batch, item.head);
            dropout.keep(&self.kept, &place, self.row(&item), self.key(block));
        }
    }

    /// dP to dS, rounded as an operand.
    fn d_scores(&self, item: PipelineState<'k>, block: Reg<'k, u32>) {
        let k = self.k;
        let item = || self.items.told(self.shared, item.index);
        let partial = self.about(block).ge(0x8000_0000);
        if self.config.programs() {
            self.elements(&item(), self.key(block), partial);
        } else {
            for (i, (&p, &dp)) in self.s.registers.iter().zip(&self.dp.registers).enumerate() {
                let delta = self.delta[Fragment::half(i)];
                if self.config.dropout {
                    let ds = p * -delta;
                    k.when(self.kept.at(i), || ds.set(p.fma(dp, ds)));
                    dp.set(ds);
                } else {
                    dp.set((dp - delta) * p);
                }
            }
            k.if_(partial, || self.hide(&item(), self.key(block), &self.dp, 0.0));
        }
        for (step, registers) in self.ds.iter().enumerate() {
            for (&register, value) in registers.iter().zip(self.dp.a_operand::<H>(k, step)) {
                register.set(value);
            }
        }
    }

    /// `value` where a row does not see the key; `key`: the thread's first.
    fn hide(&self, item: &Item<'k>, key: Reg<'k, u32>, fragment: &Fragment<'k>, value: f32) {
        let (k, params, sequence) = (self.k, self.params, &item.sequence);
        if let Some((program, _)) = &self.config.mask_program {
            let place = place(self.items.work, sequence, item.batch, item.head);
            let mut emitter = ProgramEmitter::new(k, program, &params.mask_tables, place);
            self.each(0..fragment.registers.len(), item, key, |i, element| {
                let visible = emitter.bool(element);
                fragment.registers[i].set(visible.select(fragment.registers[i], value));
            });
        }
        // A row sees the keys from `from` to `to`, counted from the thread's first.
        let [row, first] = [self.row(item), key].map(|r| r.bits::<i32>());
        let end = sequence.seqlen_k.bits::<i32>() - first;
        let shift = (sequence.seqlen_k - sequence.seqlen_q).bits::<i32>() - first;
        let diagonals = [row + shift, row + 8 + shift];
        let [left, right] = params.band;
        let from = left.map(|left| diagonals.map(|diagonal| diagonal - left));
        let to =
            diagonals.map(|diagonal| right.map_or(end, |right| end.min(diagonal + right.min(1 << 30) + 1)));
        for (i, &register) in fragment.registers.iter().enumerate() {
            let (half, offset) = (Fragment::half(i), Fragment::column_offset(i) as i32);
            let mut visible = to[half].gt(offset);
            if let Some(from) = from {
                visible = visible & from[half].le(offset);
            }
            register.set(visible.select(register, value));
        }
    }

    /// Runs `body` for each of these registers, whole fours, with its place.
    fn each(
        &self,
        registers: Range<usize>,
        item: &Item<'k>,
        key: Reg<'k, u32>,
        mut body: impl FnMut(usize, &Element<'k>),
    ) {
        let [row, key] = [self.row(item), key].map(|r| r.bits::<i32>());
        let rows = [row, row + 8];
        let mut keys: Vec<Reg<'k, i32>> = Vec::new();
        let first = registers.start / 2;
        for i in registers {
            let (row, column) = (Fragment::half(i), i / 4 * 2 + i % 2);
            if column - first == keys.len() {
                keys.push(key + Fragment::column_offset(i) as i32);
            }
            body(i, &Element { row, column, q: rows[row], kv: keys[column - first], kv_offset: None });
        }
    }

    /// dS from S and dP with a score mod or a mask's program.
    fn elements(&self, item: &Item<'k>, key: Reg<'k, u32>, partial: Reg<'k, bool>) {
        let (k, config, params) = (self.k, self.config, self.params);
        for &s in &self.s.registers {
            s.set(s * params.scale);
        }
        k.if_(partial, || self.hide(item, key, &self.s, f32::NEG_INFINITY));
        let place = place(self.items.work, &item.sequence, item.batch, item.head);
        let some = |registers| {
            let mut formula = Formula::new(k, config, params, place);
            self.each(registers, item, key, |i, element| {
                let (score, dp) = (self.s.registers[i], self.dp.registers[i]);
                let [minus_lse, delta] = [self.minus_lse, self.delta].map(|stats| stats[element.row]);
                let kept = config.dropout.then(|| self.kept.at(i));
                dp.set(formula.terms(element, &Given { score, dp, minus_lse, delta, kept }).dx);
            });
        };
        let all = self.s.registers.len();
        if params.table_sums.len() < 2 {
            return some(0..all);
        }
        // Of programs that learn several tables, which are long and read much, ptxas would have too much in hand at a time. It does
        // not see that each branch is taken.
        for first in (0..all).step_by(4) {
            k.if_(item.exists.ne(0), || some(first..first + 4));
        }
    }

    /// dQ of the queries that exist.
    fn write(&self, item: &Item<'k>) {
        let (k, config, params, work) = (self.k, self.config, self.params, self.items.work);
        let rows = Rows {
            tensor: params.dq,
            batch: work.batch(item.batch),
            head: item.head,
            start: item.sequence.q_row,
            origin: item.number * ROWS + self.group * 64,
            rows: item.sequence.seqlen_q,
            column: k.var(0u32),
            last_column: 0,
            dim: config.head_dim,
        };
        rows.write::<H>(k, &self.dq, Some(params.d_scale()));
        if config.repair {
            let exact = Exact::<H>::new(work, item.sequence, item.batch);
            exact.repair_queries(item.head, &rows, &self.dq);
        }
    }
}
