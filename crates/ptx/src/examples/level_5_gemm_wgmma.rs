//! Level 5: a matrix product by Hopper's copy engine and asynchronous tensor cores.
//!
//! One warpgroup. One thread asks the copy engine for tiles, several stages ahead; each arrives on an mbarrier. `wgmma`
//! reads both operands from shared memory by descriptors, which come from the same [`TileLayout`] as the tensor maps.

use crate::build::Reg;
use crate::instr::{Accumulator, Element, WgmmaShape};
use crate::{B32, Fragment, Kernel, Pipeline, Target, TileLayout, WgmmaA, build};
use crate::{BF16x2, TensorMap};

/// Sizes of [`gemm_wgmma`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WgmmaConfig {
    /// Columns of a block's tile: a multiple of 16 up to 256. Its rows are 128.
    pub tile_n: u32,
    /// Stages of shared memory.
    pub stages: u32,
}

const TILE_M: u32 = 128;
const DEPTH: u32 = 64;

impl WgmmaConfig {
    fn a(&self) -> TileLayout {
        TileLayout::new(TILE_M, DEPTH, Element::BF16)
    }

    fn b(&self) -> TileLayout {
        TileLayout::new(self.tile_n, DEPTH, Element::BF16)
    }

    /// Tensor maps of a (m × k) and b (n × k), dense.
    pub fn tensor_maps(&self, m: u64, n: u64, k: u64) -> [TensorMap; 2] {
        let map = |layout: TileLayout, rows| layout.tensor_map(layout.rows, &[k, rows], &[2 * k]);
        [map(self.a(), m), map(self.b(), n)]
    }
}

/// `c = a·bᵀ` in bf16 with f32 sums: shapes as in [`gemm_mma`](super::gemm_mma). Grid: `(m / 128, n / tile_n)`, rounded
/// up.
pub fn gemm_wgmma(config: &WgmmaConfig) -> Kernel {
    let (a, b) = (config.a(), config.b());
    build("gemm_wgmma", Target::Sm90a, 128, |k| {
        let (map_a, map_b) = (k.param_tensor_map("a"), k.param_tensor_map("b"));
        let c = k.param_ptr("c");
        let (m, n, depth) = (k.param_u32("m"), k.param_u32("n"), k.param_u32("k"));
        let a_tiles = k.shared("a tiles", a.bytes() * config.stages, TileLayout::ALIGN);
        let b_tiles = k.shared("b tiles", b.bytes() * config.stages, TileLayout::ALIGN);
        let pipeline = Pipeline::new(k, "pipeline", config.stages, 4, 1);
        let (tid, lane) = (k.tid(0), k.lane());
        let (first_m, first_n) = (k.ctaid(0) * TILE_M, k.ctaid(1) * config.tile_n);
        let blocks = (depth + (DEPTH - 1)) / DEPTH;

        let first = tid.eq(0);
        k.if_(first, || {
            pipeline.init(k);
            k.fence_mbarrier_init();
        });
        k.sync_threads();

        let load = |block: Reg<'_, u32>, state: crate::PipelineState<'_>| {
            pipeline.producer_acquire(k, state, a.bytes() + b.bytes());
            let column = (block * DEPTH).bits::<i32>();
            let full = pipeline.full(state);
            k.tma_load(a_tiles + state.index * a.bytes(), map_a, &[column, first_m.bits()], full);
            k.tma_load(b_tiles + state.index * b.bytes(), map_b, &[column, first_n.bits()], full);
            state.advance();
        };
        let producer = pipeline.start(k);
        k.if_(first, || {
            for block in 0..config.stages - 1 {
                let block = k.var(block);
                k.if_(block.lt(blocks), || load(block, producer));
            }
        });

        let shape = WgmmaShape {
            n: config.tile_n,
            a: Element::BF16,
            b: Element::BF16,
            d: Accumulator::F32,
            a_in_registers: false,
            transpose_a: false,
            transpose_b: false,
        };
        // The upper and the lower 64 rows.
        let sums = [Fragment::new(k, config.tile_n), Fragment::new(k, config.tile_n)];
        let halves = [a.k_major(a_tiles), a.k_major(a_tiles.at(64 * 128))];
        let b_tile = b.k_major(b_tiles);
        let consumer = pipeline.start(k);
        k.for_(0, blocks, 1, |block| {
            k.if_(first, || {
                let ahead = block + (config.stages - 1);
                k.if_(ahead.lt(blocks), || load(ahead, producer));
            });
            // `wgmma` needs whole warps; the one thread that loads comes back to its warp here.
            k.sync_warp();
            pipeline.consumer_wait(k, consumer);
            let stage_b = b_tile.advance(consumer.index * b.bytes());
            k.wgmma_fence();
            for (sum, half) in sums.iter().zip(halves) {
                let half = half.advance(consumer.index * a.bytes());
                for step in 0..DEPTH / 16 {
                    let accumulate = if step == 0 { block.ne(0) } else { k.var(true) };
                    let a = WgmmaA::<B32>::Shared(half.step(step));
                    k.wgmma(shape, &sum.registers, a, stage_b.step(step), accumulate);
                }
            }
            k.wgmma_commit();
            k.wgmma_wait(0);
            pipeline.consumer_release(k, consumer.index, lane);
            consumer.advance();
        });

        let (row, column) = (first_m + Fragment::row(k), first_n + Fragment::column(k));
        for (i, sum) in sums.iter().enumerate() {
            for j in (0..sum.registers.len()).step_by(2) {
                let row = row + (64 * i + 8 * Fragment::half(j)) as u32;
                let column = column + Fragment::column_offset(j);
                let pair = k.pack::<BF16x2>(sum.registers[j], sum.registers[j + 1]);
                let at = row.mad_wide(n, column.to_u64()) * 2 + c;
                k.when(row.lt(m) & column.lt(n), || at.address().store(pair));
            }
        }
    })
}
