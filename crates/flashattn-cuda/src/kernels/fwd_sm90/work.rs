//! Which tile comes next, which blocks it sees, and the producer that loads them.

use std::f32::consts::LOG2_E;

use ptx::build::{Address, Builder, Reg};
use ptx::instr::{AtomOp, Order};
use ptx::{Mbarrier, Pipeline, PipelineState, TileLayout};

use super::repair::RowEnd;
use super::{FwdConfig, MaskKind, Params, Shared};

/// A tile of work, the same in all threads of a block.
pub(super) struct WorkTile<'k> {
    /// Its number plus 1, or 0 if there is none: past the last tile a number stands for none.
    pub exists: Reg<'k, u32>,
    /// How many blocks of keys it sees.
    pub blocks: Reg<'k, u32>,
    pub m_block: Reg<'k, u32>,
    /// Query head; KV head if the heads of a group are packed.
    pub head: Reg<'k, u32>,
    pub batch: Reg<'k, u32>,
    /// Lengths of the sequence, and where it begins in packed tensors (0 in others).
    pub seqlen_q: Reg<'k, u32>,
    pub seqlen_k: Reg<'k, u32>,
    pub q_row: Reg<'k, u32>,
    pub kv_row: Reg<'k, u32>,
    /// Its blocks.
    pub blocks_at: Blocks<'k>,
}

/// Where a tile's blocks come from.
#[derive(Clone, Copy)]
pub(super) enum Blocks<'k> {
    /// One stretch.
    Band(Band<'k>),
    /// A list: the first run and one past the last.
    Runs([Reg<'k, u32>; 2]),
}

/// Blocks of keys that a tile sees, in one stretch.
#[derive(Clone, Copy)]
pub(super) struct Band<'k> {
    /// One past the last.
    pub n_block_max: Reg<'k, u32>,
    /// Those that all its rows see in whole.
    pub whole_min: Reg<'k, u32>,
    pub whole_max: Reg<'k, u32>,
}

/// What a launch has to do.
pub(super) struct Work<'a, 'k> {
    pub k: &'k Builder,
    pub config: &'a FwdConfig,
    pub params: &'a Params<'k>,
    pub m_blocks: Reg<'k, u32>,
    /// Those that tiles are counted by: of a sequence, and of all.
    sequence_heads: Reg<'k, u32>,
    pub heads: Reg<'k, u32>,
    pub tiles: Reg<'k, u32>,
}

/// Room in shared memory for what the producer tells of a tile.
pub(super) const TOLD_BYTES: u32 = 48;

impl<'a, 'k> Work<'a, 'k> {
    pub fn new(k: &'k Builder, config: &'a FwdConfig, params: &'a Params<'k>) -> Self {
        let g = config.packed_heads;
        let rows = if g > 1 { params.seqlen_q * g } else { params.seqlen_q };
        let m_blocks = (rows + (config.tile_m() - 1)) / config.tile_m();
        let sequence_heads = if g > 1 { params.heads_kv } else { params.heads_q };
        let heads = sequence_heads * params.batch;
        Work { k, config, params, m_blocks, sequence_heads, heads, tiles: heads * m_blocks }
    }

    /// Rows that so many queries take: those of all packed heads.
    pub fn rows(&self, queries: Reg<'k, u32>) -> Reg<'k, u32> {
        if self.config.packed_heads > 1 { queries * self.config.packed_heads } else { queries }
    }

    /// Which query a row is.
    pub fn query(&self, row: Reg<'k, u32>) -> Reg<'k, u32> {
        if self.config.packed_heads > 1 { row / self.config.packed_heads } else { row }
    }

    /// Which query head a row of the tile belongs to.
    pub fn head(&self, tile: &WorkTile<'k>, row: Reg<'k, u32>) -> Reg<'k, u32> {
        let g = self.config.packed_heads;
        if g > 1 { tile.head * g + row % g } else { tile.head }
    }

    /// The tile's KV head.
    pub fn head_kv(&self, tile: &WorkTile<'k>) -> Reg<'k, u32> {
        if self.config.packed_heads > 1 {
            return tile.head;
        }
        tile.head / (self.params.heads_q / self.params.heads_kv)
    }

    /// The tile with this number: groups of heads, so that their K and V stay in L2; within a group the last rows of all
    /// its heads first, as those are the longest under a causal mask.
    pub fn tile(&self, number: Reg<'k, u32>) -> WorkTile<'k> {
        let (k, params) = (self.k, self.params);
        let exists = number.lt(self.tiles);
        let width = params.head_group * self.m_blocks;
        let (group, inside) = (number / width, number % width);
        let first = group * params.head_group;
        let size = (self.heads - first).min(params.head_group);
        let m_block = self.m_blocks - 1 - inside / size;
        let head_and_batch = exists.select(first + inside % size, 0u32);
        let (batch, head) = (head_and_batch / self.sequence_heads, head_and_batch % self.sequence_heads);
        let (mut lengths, mut rows) = ([params.seqlen_q, params.seqlen_k], [k.var(0u32), k.var(0u32)]);
        if let Some(cu_seqlens) = params.cu_seqlens {
            rows = cu_seqlens.map(|cu| batch.mad_wide(4, cu).address().load());
            let ends = cu_seqlens.map(|cu| batch.mad_wide(4, cu).address().at(4).load::<u32>());
            lengths = [ends[0] - rows[0], ends[1] - rows[1]];
        }
        let ([seqlen_q, seqlen_k], [q_row, kv_row]) = (lengths, rows);
        let (blocks_at, blocks) = match params.rows {
            None => {
                let (band, blocks) = self.band(m_block, seqlen_q, seqlen_k);
                (Blocks::Band(band), blocks)
            }
            Some([rows, _]) => {
                let row = exists.select((batch * params.heads_q + head) * self.m_blocks + m_block, 0u32);
                let [first, count, blocks, _] = row.mad_wide(16, rows).address().load_vec::<u32, 4>();
                (Blocks::Runs([first, first + count]), blocks)
            }
        };
        let exists = exists.select(number + 1, 0u32);
        WorkTile { exists, blocks, m_block, head, batch, seqlen_q, seqlen_k, q_row, kv_row, blocks_at }
    }

    /// A tile in the words in which it is told.
    fn words(&self, tile: &WorkTile<'k>) -> Vec<Reg<'k, u32>> {
        let [a, b, c] = match tile.blocks_at {
            Blocks::Band(band) => [band.n_block_max, band.whole_min, band.whole_max],
            Blocks::Runs([first, end]) => [first, end, end],
        };
        let mut words = vec![tile.exists, tile.blocks, tile.m_block, tile.head, tile.batch, a, b, c];
        if self.config.varlen {
            words.extend([tile.seqlen_q, tile.seqlen_k, tile.q_row, tile.kv_row]);
        }
        words
    }

    /// A tile from `words` taken one after the other.
    fn tile_of(&self, mut word: impl FnMut() -> Reg<'k, u32>) -> WorkTile<'k> {
        let [exists, blocks, m_block, head, batch, a, b, c] = std::array::from_fn(|_| word());
        let blocks_at = match self.config.mask {
            MaskKind::Band { .. } => Blocks::Band(Band { n_block_max: a, whole_min: b, whole_max: c }),
            MaskKind::Blocks => Blocks::Runs([a, b]),
        };
        let [seqlen_q, seqlen_k, q_row, kv_row] = if self.config.varlen {
            std::array::from_fn(|_| word())
        } else {
            let zero = self.k.var(0u32);
            [self.params.seqlen_q, self.params.seqlen_k, zero, zero]
        };
        WorkTile { exists, blocks, m_block, head, batch, seqlen_q, seqlen_k, q_row, kv_row, blocks_at }
    }

    /// Registers for a tile, to be set.
    pub fn unset(&self) -> WorkTile<'k> {
        self.tile_of(|| self.k.reg())
    }

    /// Gives a tile another's values.
    pub fn set(&self, to: &WorkTile<'k>, from: &WorkTile<'k>) {
        for (register, value) in self.words(to).into_iter().zip(self.words(from)) {
            register.set(value);
        }
    }

    /// Tells the other warps: the divisions above take hundreds of cycles, which the producer has.
    fn tell(&self, shared: &Shared<'k>, stage: PipelineState<'k>, tile: &WorkTile<'k>) {
        let to = self.told_at(shared, stage);
        for (i, words) in self.words(tile).as_chunks::<4>().0.iter().enumerate() {
            to.at(16 * i as i32).store_vec(*words);
        }
    }

    /// What the producer told.
    pub fn told(&self, shared: &Shared<'k>, stage: PipelineState<'k>) -> WorkTile<'k> {
        let from = self.told_at(shared, stage);
        let quads = if self.config.varlen { 3 } else { 2 };
        let words: Vec<_> = (0..quads).flat_map(|i| from.at(16 * i).load_vec::<u32, 4>()).collect();
        let mut words = words.into_iter();
        self.tile_of(|| words.next().unwrap_or_else(|| self.k.var(0u32)))
    }

    fn told_at(&self, shared: &Shared<'k>, stage: PipelineState<'k>) -> Address<'k, u32> {
        if self.config.q_stages() > 1 { shared.tile + stage.index * TOLD_BYTES } else { shared.tile }
    }

    /// Rows `first .. end` of the tile see keys from `diagonal(row) − left` to `diagonal(row) + right`.
    fn band(
        &self,
        m_block: Reg<'k, u32>,
        seqlen_q: Reg<'k, u32>,
        seqlen_k: Reg<'k, u32>,
    ) -> (Band<'k>, Reg<'k, u32>) {
        let (k, config) = (self.k, self.config);
        let (tile_m, tile_n) = (config.tile_m(), config.tile_n);
        let signed = |r: Reg<'k, u32>| r.bits::<i32>();
        let first = m_block * tile_m;
        let rows = self.rows(seqlen_q);
        let end = (first + tile_m).min(rows);
        // Of a sequence shorter than the longest some tiles have no rows.
        let any = first.lt(rows);
        let [first_diagonal, last_diagonal] =
            [first, end - 1].map(|row| signed(self.query(row) + seqlen_k - seqlen_q));
        let blocks = |keys: Reg<'k, i32>| keys.max(0).bits::<u32>() / tile_n;
        let up = (tile_n - 1) as i32;
        let all = signed(seqlen_k);
        let (mut n_block_min, mut n_block_max) = (k.var(0u32), blocks(all + up));
        let (mut whole_min, mut whole_max) = (k.var(0u32), blocks(all));
        if let Some(right) = self.params.band[1] {
            n_block_max = n_block_max.min(blocks(saturating_add(last_diagonal + 1, right) + up));
            whole_max = whole_max.min(blocks(saturating_add(first_diagonal + 1, right)));
        }
        if let Some(left) = self.params.band[0] {
            n_block_min = blocks(first_diagonal - left).min(n_block_max);
            whole_min = blocks(last_diagonal - left + up);
        }
        let blocks = any.select(n_block_max.max(n_block_min) - n_block_min, 0u32);
        (Band { n_block_max, whole_min, whole_max }, blocks)
    }

    /// How many of the tile's blocks, from the right, `rows` of its rows from `row` on do not see; at least one is left.
    pub fn hidden(&self, tile: &WorkTile<'k>, band: &Band<'k>, row: Reg<'k, u32>, rows: u32) -> Reg<'k, u32> {
        let end = (row + rows).min(self.rows(tile.seqlen_q));
        let end = if self.config.packed_heads > 1 { self.query(end - 1) + 1 } else { end };
        let seen = (end + tile.seqlen_k - tile.seqlen_q).bits::<i32>();
        let seen = self.params.band[1].map_or(seen, |right| saturating_add(seen, right));
        let n_block_max = (seen.max(0).bits::<u32>() + (self.config.tile_n - 1)) / self.config.tile_n;
        (band.n_block_max - n_block_max.min(band.n_block_max)).min(tile.blocks - 1)
    }

    /// Where [`WorkTile::exists`] of the tile that the block had before this one is kept (0: there was none).
    pub fn before(&self, exists: Reg<'k, u32>) -> Address<'k, u64> {
        exists.mad_wide(4, self.params.counter).address()
    }

    /// The first producer, one thread: takes tiles, tells the others, and loads Q and K. K and V have a producer each, so
    /// that neither waits for the other's stages: K runs ahead into the next tile while V's last block is in use.
    pub fn load_q_and_k(&self, shared: &Shared<'k>) {
        let (k, config, params) = (self.k, self.config, self.params);
        for map in params.maps {
            k.prefetch_tensor_map(map);
        }
        let (q_state, k_state) = (shared.q_pipeline.start(k), shared.k_pipeline.start(k));
        // The counter goes back to zero by itself: each block takes one number too many, and `inc` wraps after the last.
        let limit = self.tiles + (k.nctaid(0) - 1);
        let take = || params.counter.address().atom(AtomOp::Inc, limit, Order::Relaxed);
        let (next, last) = (k.var(take()), k.var(0u32));
        k.loop_(|| {
            let tile = self.tile(next);
            let done = tile.exists.eq(0);
            // Asked for now, so that it is there when this tile has been loaded.
            k.if_(!done, || next.set(take()));
            // Tiles without blocks are not for the consumers: `write_nothing`.
            k.if_(done | tile.blocks.ne(0), || {
                shared.q_pipeline.producer_wait(k, q_state);
                k.when(!done, || self.before(tile.exists).store(last));
                last.set(tile.exists);
                self.tell(shared, q_state, &tile);
                let full = shared.q_pipeline.full(q_state);
                full.arrive_expect_tx(k, done.select(0u32, config.q().bytes()));
                k.if_(!done, || {
                    let row = tile.q_row + tile.m_block * config.tile_m();
                    let to = shared.q + q_state.index * config.q().bytes();
                    let (head, batch) = (tile.head, self.batch(&tile));
                    if config.packed_heads > 1 {
                        let at = [k.var(0u32), self.query(row), head, batch];
                        self.panels(config.q(), to, params.maps[0], at, full);
                    } else {
                        self.panels(config.q(), to, params.maps[0], [row, head, batch], full);
                    }
                });
                q_state.advance();
            });
            k.break_if(done);
            self.each_block(&tile, |n_block, partial| {
                shared.k_pipeline.producer_wait(k, k_state);
                if let Some(partial) = partial {
                    (shared.block + k_state.index * 4).store(n_block | partial);
                }
                self.load_block(
                    &tile,
                    n_block,
                    config.k(),
                    shared.k,
                    shared.k_pipeline,
                    k_state,
                    params.maps[1],
                );
            });
        });
    }

    /// The second producer, one thread of another warp: loads V.
    pub fn load_v(&self, shared: &Shared<'k>) {
        let (k, config, params) = (self.k, self.config, self.params);
        let (q_state, v_state) = (shared.q_pipeline.start(k), shared.v_pipeline.start(k));
        k.loop_(|| {
            shared.q_pipeline.consumer_wait(k, q_state);
            let tile = self.told(shared, q_state);
            shared.q_pipeline.consumer_release(k, q_state.index, k.var(0u32));
            k.break_if(tile.exists.eq(0));
            q_state.advance();
            self.each_block(&tile, |n_block, _| {
                shared.v_pipeline.producer_wait(k, v_state);
                self.load_block(
                    &tile,
                    n_block,
                    config.v(),
                    shared.v,
                    shared.v_pipeline,
                    v_state,
                    params.maps[2],
                );
            });
        });
    }

    /// A warp of its own: rows that see no key get zeros. Block `i` looks at each tile whose number is `i` more than a
    /// multiple of the blocks; it needs no word from the others.
    pub fn write_nothing(&self) {
        let (k, config, params) = (self.k, self.config, self.params);
        let lane = k.lane();
        k.for_(k.ctaid(0), self.tiles, k.nctaid(0), |number| {
            let tile = self.tile(number);
            let first = tile.m_block * config.tile_m();
            let rows = self.rows(tile.seqlen_q).min(first + config.tile_m());
            k.if_(tile.blocks.eq(0) & first.lt(rows), || {
                let [o, lse] = self.outputs(&tile);
                let end = RowEnd::new(params, k.var(f32::NEG_INFINITY), k.var(0.0), self.sink(&tile));
                k.for_(first, rows, 1u32, |row| {
                    k.when(lane.eq(0), || (lse + self.in_lse(row) * 4).address().store(end.lse));
                    let at = (o + (self.in_o(row) + lane.to_u64()) * 2).address();
                    for i in 0..config.head_dim_v.div_ceil(32) {
                        let inside = (lane + 32 * i).lt(config.head_dim_v);
                        k.when(inside, || at.at(64 * i as i32).store(k.var(0u16)));
                    }
                });
            });
        });
    }

    /// Where row 0 of the tile's sequence and head (the first of packed ones) lies in o, and where in lse: bytes.
    pub fn outputs(&self, tile: &WorkTile<'k>) -> [Reg<'k, u64>; 2] {
        let (params, batch) = (self.params, self.batch(tile).to_u64());
        let (head, row) = (self.rows(tile.head).to_u64(), tile.q_row.to_u64());
        let [by_batch, by_row, by_head] = params.o_strides;
        let o = batch * by_batch + head * by_head + row * by_row;
        let lse = batch * params.lse_strides[0] + head * params.lse_strides[1] + row;
        [o * 2 + params.o, lse * 4 + params.lse]
    }

    /// How far a row's o lies from that of row 0, in elements.
    pub fn in_o(&self, row: Reg<'k, u32>) -> Reg<'k, u64> {
        let [_, by_row, by_head] = self.params.o_strides;
        self.in_output(row, by_head, |query| query * by_row)
    }

    /// The same in lse.
    pub fn in_lse(&self, row: Reg<'k, u32>) -> Reg<'k, u64> {
        self.in_output(row, self.params.lse_strides[1], |query| query)
    }

    fn in_output(
        &self,
        row: Reg<'k, u32>,
        by_head: Reg<'k, u64>,
        by_query: impl Fn(Reg<'k, u64>) -> Reg<'k, u64>,
    ) -> Reg<'k, u64> {
        let query = by_query(self.query(row).to_u64());
        let g = self.config.packed_heads;
        if g > 1 { query + (row % g).to_u64() * by_head } else { query }
    }

    /// The sink logit of the tile's head, in base 2.
    pub fn sink(&self, tile: &WorkTile<'k>) -> Option<Reg<'k, f32>> {
        self.params.sinks.map(|sinks| tile.head.mad_wide(4, sinks).address().load::<f32>() * LOG2_E)
    }

    /// Runs `body` for each block of the tile, the last first; from a list also with whether it is seen in part (bit 31).
    fn each_block(&self, tile: &WorkTile<'k>, body: impl Fn(Reg<'k, u32>, Option<Reg<'k, u32>>)) {
        let k = self.k;
        let down = |from: Reg<'k, u32>, to: Reg<'k, u32>, partial: Option<Reg<'k, u32>>| {
            let n_block = k.var(from);
            k.loop_(|| {
                k.break_if(n_block.eq(to));
                n_block.set(n_block - 1);
                body(n_block, partial);
            });
        };
        match tile.blocks_at {
            Blocks::Band(band) => down(band.n_block_max, band.n_block_max - tile.blocks, None),
            Blocks::Runs([first, end]) => {
                let run = k.var(end);
                k.loop_(|| {
                    k.break_if(run.eq(first));
                    run.set(run - 1);
                    let at =
                        run.mad_wide(8, self.params.rows.map_or(self.params.o, |[_, runs]| runs)).address();
                    let [begin, end] = at.load_vec::<u32, 2>();
                    down(end, begin & 0x7fff_ffff, Some(begin & 0x8000_0000));
                });
            }
        }
    }

    pub fn batch(&self, tile: &WorkTile<'k>) -> Reg<'k, u32> {
        if self.config.varlen { self.k.var(0u32) } else { tile.batch }
    }

    /// A block of K or V into its next stage.
    #[allow(clippy::too_many_arguments)] // what it loads, and where to
    fn load_block(
        &self,
        tile: &WorkTile<'k>,
        n_block: Reg<'k, u32>,
        layout: TileLayout,
        to: Address<'k, u32>,
        pipeline: Pipeline<'k>,
        state: PipelineState<'k>,
        map: Address<'k, u64>,
    ) {
        let full = pipeline.full(state);
        full.arrive_expect_tx(self.k, layout.bytes());
        let row = tile.kv_row + n_block * self.config.tile_n;
        let head_kv = self.head_kv(tile);
        self.panels(layout, to + state.index * layout.bytes(), map, [row, head_kv, self.batch(tile)], full);
        state.advance();
    }

    /// Asks for all panels of a tile; `at`: its coordinates but for the column.
    fn panels<const N: usize>(
        &self,
        layout: TileLayout,
        to: Address<'k, u32>,
        map: Address<'k, u64>,
        at: [Reg<'k, u32>; N],
        on: Mbarrier<'k>,
    ) {
        let at = at.map(|r| r.bits::<i32>());
        for panel in 0..layout.panels() {
            let column = self.k.var((panel * layout.panel_columns()) as i32);
            let to = to.at((panel * layout.panel_bytes()) as i32);
            let at: Vec<_> = [column].into_iter().chain(at).collect();
            self.k.tma_load(to, map, &at, on);
        }
    }
}

/// `a + b` for `b ≥ 0`, at most 2³⁰: an unbounded window does not wrap.
fn saturating_add<'k>(a: Reg<'k, i32>, b: Reg<'k, i32>) -> Reg<'k, i32> {
    a + b.min(1 << 30)
}
