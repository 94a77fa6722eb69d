//! Level 6: the matrix product as fast as it gets.
//!
//! ```text
//! as many blocks as multiprocessors, in clusters; each cluster walks over tiles of C:
//!   producer (one thread):  for each tile, for each block of k: wait for a free stage; ask for A and a share of B
//!   consumers (warpgroups): for each tile:
//!                               for each block of k: wait for the stage; issue its products; release the one before
//!                               round, through shared memory, to C
//! ```
//!
//! What is new against level 5, and why:
//! 1. *Warp specialisation*: the producer runs ahead of the consumers by itself, over the ends of tiles too, and gives
//!    its registers to them (`setmaxnreg`).
//! 2. *A product in flight*: the stage before is released only when the next product has been issued, so that the tensor
//!    cores never wait for a barrier.
//! 3. *Clusters*, if asked for: neighbours in m need the same B; each loads a share of it and the copy engine delivers it
//!    to all. On an H100 it does not pay (point 4 already has the tiles in L2), and clusters of 4 cost a third.
//! 4. *The order of tiles*: groups of rows walk along n together, so that the tiles in flight share A and B in L2.
//! 5. *C by the copy engine*: rounded into shared memory, stored in the background while the next tile is computed.

use crate::build::{Builder, Reg};
use crate::instr::{Accumulator, Element, WgmmaShape};
use crate::{B32, BF16x2, Fragment, Kernel, Pipeline, Target, TensorMap, TileLayout, WgmmaA, build};

/// Sizes of [`gemm_persistent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PersistentConfig {
    /// Consumer warpgroups; each computes 64 rows of a block's tile.
    pub consumers: u32,
    /// Columns of a block's tile: a multiple of 64 up to 256.
    pub tile_n: u32,
    /// Stages of shared memory.
    pub stages: u32,
    /// Blocks of a cluster, along m: 1, 2 or 4.
    pub cluster: u32,
    /// Cluster rows that walk along n together.
    pub group: u32,
}

const DEPTH: u32 = 64;

impl PersistentConfig {
    /// What was fastest at 8192³ on an H100 (record in `benches/record`).
    pub const H100: PersistentConfig =
        PersistentConfig { consumers: 2, tile_n: 256, stages: 3, cluster: 1, group: 16 };

    /// Rows of a block's tile.
    pub const fn tile_m(&self) -> u32 {
        64 * self.consumers
    }

    fn a(&self) -> TileLayout {
        TileLayout::new(self.tile_m(), DEPTH, Element::BF16)
    }

    fn b(&self) -> TileLayout {
        TileLayout::new(self.tile_n, DEPTH, Element::BF16)
    }

    /// A consumer's part of C.
    fn c(&self) -> TileLayout {
        TileLayout::new(64, self.tile_n, Element::BF16)
    }

    /// Tensor maps of a (m × k), b (n × k) and c (m × n), dense.
    pub fn tensor_maps(&self, m: u64, n: u64, k: u64) -> [TensorMap; 3] {
        [
            self.a().tensor_map(self.tile_m(), &[k, m], &[2 * k]),
            self.b().tensor_map(self.tile_n / self.cluster, &[k, n], &[2 * k]),
            self.c().tensor_map(64, &[n, m], &[2 * n]),
        ]
    }
}

/// `c = a·bᵀ` in bf16 with f32 sums: a is m × k, b is n × k, c is m × n; n and k are multiples of 8. Grid: a multiple of
/// the cluster, at most as many blocks as run at once.
pub fn gemm_persistent(config: &PersistentConfig) -> Kernel {
    let threads = 128 * (1 + config.consumers);
    let (a, b) = (config.a(), config.b());
    build("gemm_persistent", Target::Sm90a, threads, |k| {
        k.cluster([config.cluster, 1, 1]);
        let maps = ["a", "b", "c"].map(|name| k.param_tensor_map(name));
        let (m, n, depth) = (k.param_u32("m"), k.param_u32("n"), k.param_u32("k"));
        let a_tiles = k.shared("a tiles", a.bytes() * config.stages, TileLayout::ALIGN);
        let b_tiles = k.shared("b tiles", b.bytes() * config.stages, TileLayout::ALIGN);
        let c_tiles = k.shared("c tiles", config.c().bytes() * config.consumers, TileLayout::ALIGN);
        let pipeline = Pipeline::new(k, "pipeline", config.stages, 4 * config.consumers, config.cluster);
        let (warp, lane) = (k.warp(), k.lane());
        let rank = if config.cluster == 1 { k.var(0u32) } else { k.cluster_rank() };
        let scheduler = Scheduler::new(k, config, m, n);
        let blocks = (depth + (DEPTH - 1)) / DEPTH;

        k.if_(k.tid(0).eq(0), || {
            pipeline.init(k);
            k.fence_mbarrier_init();
        });
        if config.cluster == 1 {
            k.sync_threads()
        } else {
            k.sync_cluster()
        }

        let producer = || {
            k.lower_registers(if config.consumers == 2 { 24 } else { 32 });
            k.if_(warp.eq(0) & lane.eq(0), || {
                for map in maps {
                    k.prefetch_tensor_map(map);
                }
                let state = pipeline.start(k);
                scheduler.for_each(k, |tile_m, tile_n| {
                    let first_m = ((tile_m * config.cluster + rank) * config.tile_m()).bits::<i32>();
                    let share = config.tile_n / config.cluster;
                    let first_n = (tile_n * config.tile_n + rank * share).bits::<i32>();
                    k.for_(0, blocks, 1, |block| {
                        pipeline.producer_acquire(k, state, a.bytes() + b.bytes());
                        let (column, full) = ((block * DEPTH).bits::<i32>(), pipeline.full(state));
                        k.tma_load(a_tiles + state.index * a.bytes(), maps[0], &[column, first_m], full);
                        let b_tile = b_tiles + state.index * b.bytes();
                        if config.cluster == 1 {
                            k.tma_load(b_tile, maps[1], &[column, first_n], full);
                        } else {
                            let everyone = (1u16 << config.cluster) - 1;
                            let b_share = b_tile + rank * (share * 128);
                            k.tma_load_multicast(b_share, maps[1], &[column, first_n], full, everyone);
                        }
                        state.advance();
                    });
                });
                pipeline.producer_drain(k, state);
            });
        };

        let consumer = || {
            k.raise_registers(if config.consumers == 2 { 240 } else { 160 });
            let group = (warp >> 2) - 1;
            let shape = WgmmaShape {
                n: config.tile_n,
                a: Element::BF16,
                b: Element::BF16,
                d: Accumulator::F32,
                a_in_registers: false,
                transpose_a: false,
                transpose_b: false,
            };
            let sums = Fragment::new(k, config.tile_n);
            let c_tile = c_tiles + group * config.c().bytes();
            let leader = ((warp & 3).eq(0)) & lane.eq(0);
            let a_rows = a.k_major(a_tiles + group * (64 * 128));
            let b_tile = b.k_major(b_tiles);
            let (state, yes) = (pipeline.start(k), k.var(true));
            scheduler.for_each(k, |tile_m, tile_n| {
                let before = k.var(0u32);
                k.for_(0, blocks, 1, |block| {
                    pipeline.consumer_wait(k, state);
                    let (a, b) =
                        (a_rows.advance(state.index * a.bytes()), b_tile.advance(state.index * b.bytes()));
                    let later = block.ne(0);
                    k.wgmma_fence();
                    for step in 0..DEPTH / 16 {
                        let accumulate = if step == 0 { later } else { yes };
                        let a = WgmmaA::<B32>::Shared(a.step(step));
                        k.wgmma(shape, &sums.registers, a, b.step(step), accumulate);
                    }
                    k.wgmma_commit();
                    k.wgmma_wait(1);
                    k.if_(later, || pipeline.consumer_release(k, before, lane));
                    before.set(state.index);
                    state.advance();
                });
                k.wgmma_wait(0);
                pipeline.consumer_release(k, before, lane);

                // The copy engine has read the last tile's C, then all may write; all have written, then it may read.
                k.when(leader, || k.bulk_wait(0, true));
                k.bar_sync(group + 1, 128);
                sums.store::<BF16x2>(k, &config.c(), c_tile, 0);
                k.fence_proxy_async();
                k.bar_sync(group + 1, 128);
                k.if_(leader, || {
                    let row = (tile_m * config.cluster + rank) * config.tile_m() + group * 64;
                    let column = tile_n * config.tile_n;
                    for panel in 0..config.c().panels() {
                        let at = [(column + panel * 64).bits(), row.bits()];
                        k.tma_store(maps[2], &at, c_tile.at((panel * config.c().panel_bytes()) as i32));
                    }
                    k.bulk_commit();
                });
            });
            k.when(leader, || k.bulk_wait(0, true));
        };
        k.if_else((warp >> 2).eq(0), producer, consumer);
    })
}

/// Which tiles a cluster computes, and in which order: see the file's point 4.
struct Scheduler<'k> {
    /// Tiles of clusters along m, and along n.
    tiles: [Reg<'k, u32>; 2],
    first: Reg<'k, u32>,
    step: Reg<'k, u32>,
    group: u32,
}

impl<'k> Scheduler<'k> {
    fn new(k: &'k Builder, config: &PersistentConfig, m: Reg<'k, u32>, n: Reg<'k, u32>) -> Self {
        let rows = config.tile_m() * config.cluster;
        let tiles = [(m + (rows - 1)) / rows, (n + (config.tile_n - 1)) / config.tile_n];
        let (first, step) = (k.ctaid(0) / config.cluster, k.nctaid(0) / config.cluster);
        Scheduler { tiles, first, step, group: config.group }
    }

    fn for_each(&self, k: &'k Builder, body: impl FnOnce(Reg<'k, u32>, Reg<'k, u32>)) {
        let [tiles_m, tiles_n] = self.tiles;
        let width = tiles_n * self.group;
        k.for_(self.first, tiles_m * tiles_n, self.step, |tile| {
            let (group, inside) = (tile / width, tile % width);
            let first = group * self.group;
            let rows = (tiles_m - first).min(self.group);
            body(first + inside % rows, inside / rows);
        });
    }
}
