//! Level 4: a matrix product on any tensor core since Ampere.
//!
//! A block computes a tile of C. Tiles of A and B come through shared memory by `cp.async`, several stages ahead;
//! `ldmatrix` takes fragments out of it, `mma` multiplies them. Rows of a tile are 128 bytes and their 16-byte chunks
//! are xored with the row ([`TileLayout`]), so that neither the copies nor `ldmatrix` meet in a bank.

use crate::build::{Address, Builder, Reg};
use crate::instr::Element;
use crate::{BF16x2, Kernel, Target, TileLayout, build};

/// Sizes of [`gemm_mma`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MmaConfig {
    /// Stages of shared memory: 3 hide the latency of global memory at 32 KiB each.
    pub stages: u32,
}

const TILE: u32 = 128;
const DEPTH: u32 = 64;
const THREADS: u32 = 256;
/// A warp's part of the tile.
const WARP_M: u32 = 64;
const WARP_N: u32 = 32;

/// `c = a·bᵀ` in bf16 with f32 sums: a is m × k, b is n × k, c is m × n, each dense and 16-byte aligned; n and k are
/// multiples of 8. Grid: `(m / 128, n / 128)`, rounded up.
pub fn gemm_mma(config: &MmaConfig) -> Kernel {
    let layout = TileLayout::new(TILE, DEPTH, Element::BF16);
    build("gemm_mma", Target::Sm80, THREADS, |k| {
        let (a, b, c) = (k.param_ptr("a"), k.param_ptr("b"), k.param_ptr("c"));
        let (m, n, depth) = (k.param_u32("m"), k.param_u32("n"), k.param_u32("k"));
        let tiles = [
            k.shared("a tiles", layout.bytes() * config.stages, TileLayout::ALIGN),
            k.shared("b tiles", layout.bytes() * config.stages, TileLayout::ALIGN),
        ];
        let (tid, lane) = (k.tid(0), k.lane());
        let (first_m, first_n) = (k.ctaid(0) * TILE, k.ctaid(1) * TILE);

        // A thread copies one 16-byte chunk of every 32nd row; the row's last bits, and so the swizzle, stay the same.
        let (row, chunk) = (tid >> 3, tid & 7);
        let to = row * 128 + ((chunk ^ (row & 7)) << 4);
        let load = |block: Reg<'_, u32>, stage: Reg<'_, u32>| {
            let column = block * DEPTH + chunk * 8;
            for (tile, from, first, rows) in [(tiles[0], a, first_m, m), (tiles[1], b, first_n, n)] {
                for i in 0..TILE / 32 {
                    let row = first + row + i * 32;
                    // Outside the matrix nothing is read and the tile gets zeros.
                    let inside = row.lt(rows) & column.lt(depth);
                    let from = row.mad_wide(depth, column.to_u64()) * 2 + from;
                    let to = (tile + to + stage).at((i * 32 * 128) as i32);
                    k.cp_async(to, from, 16, inside.select(16u32, 0u32));
                }
            }
        };

        let blocks = (depth + (DEPTH - 1)) / DEPTH;
        for stage in 0..config.stages - 1 {
            let block = k.var(stage);
            k.if_(block.lt(blocks), || load(block, k.var(stage * layout.bytes())));
            k.cp_async_commit();
        }

        let warp = tid >> 5;
        let (warp_m, warp_n) = ((warp & 1) * WARP_M, (warp >> 1) * WARP_N);
        let sums: Vec<[Reg<'_, f32>; 4]> = (0..WARP_M / 16 * (WARP_N / 8))
            .map(|_| [k.var(0.0), k.var(0.0), k.var(0.0), k.var(0.0)])
            .collect();
        // ldmatrix: each lane gives the address of one row of 16 bytes. For A the matrices are (rows 0–7, 8–15) × (chunk
        // 0, 1), for B chunk first, as mma wants its fragments.
        let a_row = (warp_m + (lane & 15)) * 128;
        let b_row = (warp_n + (lane & 7) + ((lane >> 4) << 3)) * 128;
        let (a_chunk, b_chunk) = ((lane >> 4) ^ (lane & 7), ((lane >> 3) & 1) ^ (lane & 7));

        let bytes = layout.bytes();
        let (reading, writing) = (k.var(0u32), k.var((config.stages - 1) * bytes));
        let next = |stage: Reg<'_, u32>| {
            let further = stage + bytes;
            stage.set(further.eq(config.stages * bytes).select(0, further));
        };
        k.for_(0, blocks, 1, |block| {
            k.cp_async_wait((config.stages - 2) as u8);
            // This stage is there for all threads, and all have left the one that is filled next.
            k.sync_threads();
            let ahead = block + (config.stages - 1);
            k.if_(ahead.lt(blocks), || load(ahead, writing));
            k.cp_async_commit();
            for step in 0..DEPTH / 16 {
                let (a_at, b_at) = ((a_chunk ^ (2 * step)) << 4, (b_chunk ^ (2 * step)) << 4);
                let a = fragments(k, tiles[0] + reading + a_row + a_at, WARP_M / 16);
                let b = fragments(k, tiles[1] + reading + b_row + b_at, WARP_N / 16);
                for (i, a) in a.iter().enumerate() {
                    for (j, b) in b.iter().flat_map(|b| [&b[..2], &b[2..]]).enumerate() {
                        k.mma(Element::BF16, 16, sums[i * (WARP_N / 8) as usize + j], a, b);
                    }
                }
            }
            next(reading);
            next(writing);
        });

        for i in 0..WARP_M / 16 {
            for half in 0..2 {
                let row = first_m + warp_m + (lane >> 2) + (16 * i + 8 * half);
                for j in 0..WARP_N / 8 {
                    let column = first_n + warp_n + ((lane & 3) << 1) + 8 * j;
                    let sum = sums[(i * (WARP_N / 8) + j) as usize];
                    store(k, row.lt(m) & column.lt(n), row.mad_wide(n, column.to_u64()) * 2 + c, {
                        [sum[2 * half as usize], sum[2 * half as usize + 1]]
                    });
                }
            }
        }
    })
}

/// Fragments of 16 rows each, one below the other.
fn fragments<'k>(k: &'k Builder, row: Address<'k, u32>, count: u32) -> Vec<[Reg<'k, BF16x2>; 4]> {
    (0..count).map(|i| k.ldmatrix_x4(row.at((i * 16 * 128) as i32), false)).collect()
}

fn store<'k>(k: &'k Builder, inside: Reg<'k, bool>, at: Reg<'k, u64>, [low, high]: [Reg<'k, f32>; 2]) {
    let pair = k.pack::<BF16x2>(low, high);
    k.when(inside, || at.address().store(pair));
}
