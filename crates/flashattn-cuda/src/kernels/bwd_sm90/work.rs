//! Which item comes next, which blocks of queries see its keys, and the producer that loads them.

use ptx::build::{Address, Builder, Reg};
use ptx::instr::{AtomOp, Order};
use ptx::{Mbarrier, Pipeline, PipelineState, TileLayout};

use super::{BwdConfig, Params, Shared};

/// A sequence: its lengths, and where it begins in packed tensors (0 in others) and among the tiles of queries.
#[derive(Clone, Copy)]
pub(super) struct Sequence<'k> {
    pub seqlen_q: Reg<'k, u32>,
    pub seqlen_k: Reg<'k, u32>,
    pub q_row: Reg<'k, u32>,
    pub kv_row: Reg<'k, u32>,
    pub tile: Reg<'k, u32>,
}

/// A block of keys of a KV head, the same in all threads of a block.
pub(super) struct WorkItem<'k> {
    /// Whether there is one: past the last item a number stands for none.
    pub exists: Reg<'k, u32>,
    /// Blocks of queries, over all heads of the group.
    pub blocks: Reg<'k, u32>,
    pub n_block: Reg<'k, u32>,
    pub head_kv: Reg<'k, u32>,
    pub batch: Reg<'k, u32>,
    pub sequence: Sequence<'k>,
    /// Parity of the round of K and V. Consumers have no register to count it in.
    pub round: Reg<'k, u32>,
}

/// What a producer loads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Loads {
    /// K, Q and the stats.
    Queries,
    /// V and dO.
    Gradients,
}

/// A block of queries of an item's list.
pub(super) struct Block<'k> {
    pub m_block: Reg<'k, u32>,
    pub head: Reg<'k, u32>,
    /// Bit 31: some row sees a part of the keys only.
    partial: Reg<'k, u32>,
}

/// A block of queries of a head.
pub(super) struct QueryBlock<'k> {
    pub m_block: Reg<'k, u32>,
    pub head: Reg<'k, u32>,
    pub batch: Reg<'k, u32>,
}

/// An item as both producers get it: the one that has `taken` it tells it, while the consumers are at the item before; the other
/// hears of it.
pub(super) fn tell_or_hear<'k, T>(
    k: &'k Builder,
    items: Pipeline<'k>,
    state: PipelineState<'k>,
    taken: Option<T>,
    tell: impl FnOnce(&T),
    told: impl FnOnce() -> T,
) -> T {
    if let Some(item) = taken {
        items.producer_wait(k, state);
        tell(&item);
        items.full(state).arrive(k);
        return item;
    }
    items.consumer_wait(k, state);
    let item = told();
    items.consumer_release(k, state.index, k.var(0u32));
    item
}

/// What a launch has to do.
pub(super) struct Work<'a, 'k> {
    pub k: &'k Builder,
    pub config: &'a BwdConfig,
    pub params: &'a Params<'k>,
}

impl<'a, 'k> Work<'a, 'k> {
    pub fn new(k: &'k Builder, config: &'a BwdConfig, params: &'a Params<'k>) -> Self {
        Work { k, config, params }
    }

    /// Blocks of keys of the longest sequence.
    pub fn n_blocks(&self) -> Reg<'k, u32> {
        (self.params.seqlen_k + (self.config.tile_n() - 1)) / self.config.tile_n()
    }

    /// Query heads of a KV head.
    pub fn group(&self) -> Reg<'k, u32> {
        self.params.heads_q / self.params.heads_kv
    }

    pub fn sequence(&self, batch: Reg<'k, u32>) -> Sequence<'k> {
        let (k, params, tile_m) = (self.k, self.params, self.config.tile_m);
        match params.cu_seqlens {
            None => Sequence {
                seqlen_q: params.seqlen_q,
                seqlen_k: params.seqlen_k,
                q_row: k.var(0u32),
                kv_row: k.var(0u32),
                tile: batch * ((params.seqlen_q + (tile_m - 1)) / tile_m),
            },
            Some(cu_seqlens) => {
                let [q, kv] = cu_seqlens.map(|cu| {
                    let at = batch.mad_wide(4, cu).address();
                    [at.load::<u32>(), at.at(4).load::<u32>()]
                });
                // A tile more for each sequence is room enough for its last, ragged one.
                let tile = q[0] / tile_m + batch;
                Sequence { seqlen_q: q[1] - q[0], seqlen_k: kv[1] - kv[0], q_row: q[0], kv_row: kv[0], tile }
            }
        }
    }

    /// The block of queries that belongs to a block of the grid: the last first, against the main kernel's order. So it begins
    /// with the dQ' and dO that came into L2 last, and those that it leaves there are the first to be taken.
    pub fn query_block(&self) -> QueryBlock<'k> {
        let m_blocks = (self.params.seqlen_q + (self.config.tile_m - 1)) / self.config.tile_m;
        let number = self.k.nctaid(0) - 1 - self.k.ctaid(0);
        let (m_block, pair) = (number % m_blocks, number / m_blocks);
        QueryBlock { m_block, head: pair % self.params.heads_q, batch: pair / self.params.heads_q }
    }

    /// Index into the tensors' batch dimension.
    pub fn batch(&self, batch: Reg<'k, u32>) -> Reg<'k, u32> {
        if self.config.varlen { self.k.var(0u32) } else { batch }
    }

    /// Number of a (head, m_block of a sequence) among all tiles of queries.
    pub fn tile(&self, sequence: &Sequence<'k>, head: Reg<'k, u32>, m_block: Reg<'k, u32>) -> Reg<'k, u32> {
        head * self.params.tiles + sequence.tile + m_block
    }

    /// The item with this number, in this round of K and V: groups of heads, so that their Q and dO stay in L2; within a group the
    /// first keys of all its heads first, as those are seen by the most queries under a causal mask.
    fn item(&self, number: Reg<'k, u32>, round: Reg<'k, u32>) -> WorkItem<'k> {
        let params = self.params;
        let (heads, n_blocks) = (params.heads_kv * params.batch, self.n_blocks());
        let exists = number.lt(heads * n_blocks);
        let width = params.head_group * n_blocks;
        let (group, inside) = (number / width, number % width);
        let first = group * params.head_group;
        let size = (heads - first).min(params.head_group);
        let n_block = inside / size;
        let head_and_batch = exists.select(first + inside % size, 0u32);
        let (batch, head_kv) = (head_and_batch / params.heads_kv, head_and_batch % params.heads_kv);
        let sequence = self.sequence(batch);
        let item = WorkItem {
            exists: exists.select(1u32, 0u32),
            blocks: self.k.var(0u32),
            n_block,
            head_kv,
            batch,
            sequence,
            round,
        };
        self.k.if_(exists, || {
            let blocks = item.blocks;
            match params.rows {
                None => {
                    let [from, to] = self.band(&item);
                    blocks.set((to - from) * self.group());
                }
                Some(_) => self.each_head(&item, |head| {
                    blocks.set(blocks + self.row(&item, head).at(8).load::<u32>());
                }),
            }
        });
        item
    }

    fn each_head(&self, item: &WorkItem<'k>, body: impl FnOnce(Reg<'k, u32>)) {
        let group = self.group();
        let first = item.head_kv * group;
        self.k.for_(first, first + group, 1u32, body);
    }

    /// The list of blocks of an item and query head.
    fn row(&self, item: &WorkItem<'k>, head: Reg<'k, u32>) -> Address<'k, u64> {
        let row = (item.batch * self.params.heads_q + head) * self.n_blocks() + item.n_block;
        row.mad_wide(16, self.params.rows.map_or(self.params.stats, |[rows, _]| rows)).address()
    }

    /// First block of queries that sees keys of the item under a band, and one past the last.
    fn band(&self, item: &WorkItem<'k>) -> [Reg<'k, u32>; 2] {
        let (k, tile_m, tile_n) = (self.k, self.config.tile_m, self.config.tile_n());
        let Sequence { seqlen_q, seqlen_k, .. } = item.sequence;
        let first = item.n_block * tile_n;
        let end = (first + tile_n).min(seqlen_k);
        let shift = (seqlen_k - seqlen_q).bits::<i32>();
        let [left, right] = self.params.band;
        // Row i sees from i + shift − left to i + shift + right.
        let from = right.map(|right| first.bits::<i32>() - shift - right.min(1 << 30));
        let to = left.map(|left| end.bits::<i32>() - shift + left.min(1 << 30));
        let clamp = |row: Reg<'k, i32>| row.max(0).bits::<u32>().min(seqlen_q);
        let from = from.map_or(k.var(0u32), clamp);
        let to = to.map_or(seqlen_q, clamp);
        let any = from.lt(to) & first.lt(seqlen_k);
        let from = from / tile_m;
        [from, any.select((to + (tile_m - 1)) / tile_m, from)]
    }

    /// Runs `body` for each block of queries of the item.
    pub fn each_block(&self, item: &WorkItem<'k>, body: impl Fn(Block<'k>)) {
        let k = self.k;
        match self.params.rows {
            None => {
                let [from, to] = self.band(item);
                self.each_head(item, |head| k.for_(from, to, 1u32, |m| body(self.banded(item, head, m))));
            }
            Some([_, runs]) => self.each_head(item, |head| {
                let [first, count] = self.row(item, head).load_vec::<u32, 2>();
                k.for_(first, first + count, 1u32, |run| {
                    let [begin, end] = run.mad_wide(8, runs).address().load_vec::<u32, 2>();
                    let (partial, keys) = (begin & 0x8000_0000, item.n_block * self.config.tile_n());
                    let ragged = (keys + self.config.tile_n()).gt(item.sequence.seqlen_k);
                    k.for_(begin & 0x7fff_ffff, end, 1u32, |m_block| {
                        // The mask's schedule does not look at what is past the ends.
                        let end = m_block * self.config.tile_m + self.config.tile_m;
                        let ragged = ragged | end.gt(item.sequence.seqlen_q);
                        let partial = partial | ragged.select(0x8000_0000u32, 0u32);
                        body(Block { m_block, head, partial })
                    });
                });
            }),
        }
    }

    /// A block of queries under a band.
    fn banded(&self, item: &WorkItem<'k>, head: Reg<'k, u32>, m_block: Reg<'k, u32>) -> Block<'k> {
        let (tile_m, tile_n) = (self.config.tile_m, self.config.tile_n());
        let Sequence { seqlen_q, seqlen_k, .. } = item.sequence;
        let signed = |r: Reg<'k, u32>| r.bits::<i32>();
        let (row, key) = (m_block * tile_m, item.n_block * tile_n);
        let diagonal = signed(row + seqlen_k - seqlen_q);
        let mut partial = (row + tile_m).gt(seqlen_q) | (key + tile_n).gt(seqlen_k);
        if let Some(right) = self.params.band[1] {
            partial = partial | (diagonal + right.min(1 << 30)).lt(signed(key + (tile_n - 1)));
        }
        if let Some(left) = self.params.band[0] {
            partial = partial | (diagonal + (tile_m as i32 - 1) - left).gt(signed(key));
        }
        Block { m_block, head, partial: partial.select(0x8000_0000u32, 0u32) }
    }

    /// Tells the consumers and the other producer.
    fn tell(&self, shared: &Shared<'k>, slot: Reg<'k, u32>, item: &WorkItem<'k>) {
        let (s, at) = (&item.sequence, shared.item + slot * Shared::ITEM_BYTES);
        at.store_vec([item.exists, item.blocks, item.n_block, item.head_kv]);
        at.at(16).store_vec([item.batch, s.tile]);
        at.at(24).store(item.round);
        if self.config.varlen {
            at.at(32).store_vec([s.seqlen_q, s.seqlen_k, s.q_row, s.kv_row]);
        }
    }

    /// What the producer told.
    pub fn told(&self, shared: &Shared<'k>, slot: Reg<'k, u32>) -> WorkItem<'k> {
        let at = shared.item + slot * Shared::ITEM_BYTES;
        let [exists, blocks, n_block, head_kv] = at.load_vec::<u32, 4>();
        let [batch, tile] = at.at(16).load_vec::<u32, 2>();
        let round = at.at(24).load();
        let [seqlen_q, seqlen_k, q_row, kv_row] = if self.config.varlen {
            at.at(32).load_vec::<u32, 4>()
        } else {
            let zero = self.k.var(0u32);
            [self.params.seqlen_q, self.params.seqlen_k, zero, zero]
        };
        let sequence = Sequence { seqlen_q, seqlen_k, q_row, kv_row, tile };
        WorkItem { exists, blocks, n_block, head_kv, batch, sequence, round }
    }

    /// A producer, one thread. The first takes items, tells the others, and loads K and Q with the stats; the second, of
    /// another warp, V and dO. Two have half as much to keep in registers, and neither waits for the other's stages.
    pub fn load(&self, shared: &Shared<'k>, what: Loads) {
        let (k, config, params) = (self.k, self.config, self.params);
        let (once, layout, to, map) = match what {
            Loads::Queries => (shared.k_pipeline, config.k(), shared.k, params.maps[1]),
            Loads::Gradients => (shared.v_pipeline, config.v(), shared.v, params.maps[2]),
        };
        let (pipeline, stage_layout, stages, stage_map) = match what {
            Loads::Queries => (shared.q_pipeline, config.q(), shared.q, params.maps[0]),
            Loads::Gradients => (shared.do_pipeline, config.d_o(), shared.d_o, params.maps[3]),
        };
        for map in [map, stage_map] {
            k.prefetch_tensor_map(map);
        }
        let (items, item_state) = (shared.item_pipeline, shared.item_pipeline.start(k));
        let (once_state, state) = (once.start(k), pipeline.start(k));
        let stats_bytes = config.stats_bytes();
        let next = (what == Loads::Queries).then(|| k.var(self.take(self.items())));
        k.loop_(|| {
            let taken = next.map(|next| {
                let item = self.item(next, once_state.phase);
                // Asked for now, so that it is there when this item has been loaded.
                k.if_(item.exists.ne(0), || next.set(self.take(self.items())));
                item
            });
            let (slot, tell) = (item_state.index, |item: &_| self.tell(shared, item_state.index, item));
            let item = tell_or_hear(k, items, item_state, taken, tell, || self.told(shared, slot));
            k.break_if(item.exists.eq(0));
            item_state.advance();
            let batch = self.batch(item.batch);
            k.if_(item.blocks.ne(0), || {
                let row = item.sequence.kv_row + item.n_block * config.tile_n();
                let at = [row, item.head_kv, batch];
                // Room for it there is only when the item before is done; until then it comes into L2.
                self.each_panel(layout, at, |_, at| k.tma_prefetch(map, at));
                once.producer_acquire(k, once_state, layout.bytes());
                self.panels(layout, to, map, at, once.full(once_state));
                once_state.phase.set(once_state.phase ^ 1);
                self.each_block(&item, |block| {
                    let queries = [item.sequence.q_row + block.m_block * config.tile_m, block.head, batch];
                    pipeline.producer_wait(k, state);
                    let full = pipeline.full(state);
                    match what {
                        Loads::Gradients => full.arrive_expect_tx(k, stage_layout.bytes()),
                        Loads::Queries => {
                            let tile = self.tile(&item.sequence, block.head, block.m_block);
                            let about = [block.m_block | block.partial, block.head, tile, k.var(0u32)];
                            (shared.block + state.index * 16).store_vec(about);
                            full.arrive_expect_tx(k, stage_layout.bytes() + stats_bytes);
                            let to = shared.stats + state.index * stats_bytes;
                            k.bulk_load(to, tile.mad_wide(stats_bytes, params.stats), stats_bytes, full);
                        }
                    }
                    let to = stages + state.index * stage_layout.bytes();
                    self.panels(stage_layout, to, stage_map, queries, full);
                    state.advance();
                });
            });
        });
    }

    /// Items of the launch.
    fn items(&self) -> Reg<'k, u32> {
        self.params.heads_kv * self.params.batch * self.n_blocks()
    }

    /// The next item's number, of so many. The counter goes back to zero by itself: each block takes one number too many, and
    /// `inc` wraps after the last.
    pub fn take(&self, items: Reg<'k, u32>) -> Reg<'k, u32> {
        let limit = items + (self.k.nctaid(0) - 1);
        self.params.counter.address().atom(AtomOp::Inc, limit, Order::Relaxed)
    }

    /// Asks for all panels of a tile.
    pub fn panels(
        &self,
        layout: TileLayout,
        to: Address<'k, u32>,
        map: Address<'k, u64>,
        at: [Reg<'k, u32>; 3],
        on: Mbarrier<'k>,
    ) {
        self.each_panel(layout, at, |panel, at| {
            self.k.tma_load(to.at((panel * layout.panel_bytes()) as i32), map, at, on);
        });
    }

    /// Runs `body` for each panel of a tile with its box.
    pub fn each_panel(
        &self,
        layout: TileLayout,
        at: [Reg<'k, u32>; 3],
        body: impl Fn(u32, &[Reg<'k, i32>; 4]),
    ) {
        let [row, head, batch] = at.map(|r| r.bits::<i32>());
        for panel in 0..layout.panels() {
            let column = self.k.var((panel * layout.panel_columns()) as i32);
            body(panel, &[column, row, head, batch]);
        }
    }
}
