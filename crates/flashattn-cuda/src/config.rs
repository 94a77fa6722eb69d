//! The one tuning table: which tiles the kernels take for which head dimensions.

use crate::kernels::Split;

/// Tiles of the forward kernel for head dimensions up to a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Largest head_dim and head_dim_v of this row.
    pub head_dim: u32,
    /// Consumer warpgroups, 64 rows of q each.
    pub consumers: u32,
    /// Keys of a block.
    pub tile_n: u32,
    /// Stages of the K and of the V pipeline.
    pub stages: u32,
    /// Q as register fragments.
    pub q_in_registers: bool,
}

/// Rows by ascending head dimension; a problem takes the first that has room for its larger one. Chosen among a
/// few tiles on an H100 SXM (bf16, full and causal, 512 to 16k tokens): `benches/record/h100-sxm/README.md`.
pub const FORWARD_SM90: [Tiles; 3] = [
    // The best at 512 tokens of those tried; from 2k tokens on three consumers with 128 keys were faster; whether
    // `repair` fits their registers has not been tried.
    Tiles { head_dim: 64, consumers: 2, tile_n: 128, stages: 3, q_in_registers: true },
    // Q in registers takes half of QKᵀ's reads from shared memory away; tile_n 128 does not spill.
    Tiles { head_dim: 128, consumers: 2, tile_n: 128, stages: 2, q_in_registers: true },
    // O alone takes 128 registers, so Q stays in shared memory; of that, 80 keys in two stages are what is left.
    Tiles { head_dim: 256, consumers: 2, tile_n: 80, stages: 2, q_in_registers: false },
];

/// The same for kernels with a mask's program, a score mod or dropout. These take registers for each key of a block, so
/// blocks are narrower and Q stays in shared memory: without spills, by ptxas 13.0; not yet tuned by measurement.
pub const FORWARD_SM90_PROGRAMS: [Tiles; 3] = [
    Tiles { head_dim: 64, consumers: 2, tile_n: 80, stages: 3, q_in_registers: false },
    Tiles { head_dim: 128, consumers: 2, tile_n: 64, stages: 2, q_in_registers: false },
    Tiles { head_dim: 256, consumers: 2, tile_n: 48, stages: 2, q_in_registers: false },
];

/// Tiles of the backward kernel for head dimensions up to a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackwardTiles {
    /// Largest head_dim and head_dim_v of this row.
    pub head_dim: u32,
    /// Queries of a block.
    pub tile_m: u32,
    /// What the two consumer warpgroups share out, which gives the keys of a block.
    pub split: Split,
    /// Stages of the Q and of the dO pipeline.
    pub stages: u32,
}

/// Rows by ascending head dimension, as in [`FORWARD_SM90`]. By counting registers and bytes of shared memory that the
/// products read; not yet tuned by measurement.
pub const BACKWARD_SM90: [BackwardTiles; 3] = [
    // The largest square that fits: dK and dV take 64 registers, S and dP 128.
    BackwardTiles { head_dim: 64, tile_m: 128, split: Split::Keys, stages: 2 },
    // dK and dV take 128 registers, so S and dP are 32 each; with 80 queries the next block's S would not fit beside dQ.
    BackwardTiles { head_dim: 128, tile_m: 64, split: Split::Keys, stages: 3 },
    // dK and dV of 128 keys would take all registers; shared memory holds two stages of 64 queries.
    BackwardTiles { head_dim: 256, tile_m: 64, split: Split::Columns, stages: 2 },
];

/// The same for kernels with a mask's program, a score mod or dropout, which take registers for each element of S.
pub const BACKWARD_SM90_PROGRAMS: [BackwardTiles; 3] = [
    BackwardTiles { head_dim: 64, tile_m: 64, split: Split::Keys, stages: 3 },
    BackwardTiles { head_dim: 128, tile_m: 64, split: Split::Columns, stages: 3 },
    BackwardTiles { head_dim: 256, tile_m: 64, split: Split::Columns, stages: 2 },
];

/// Part of an H100's L2 (50 MB in two halves) that the keys and values of heads which run at the same time may fill.
const L2_BYTES: u64 = 32 << 20;

/// The row for these head dimensions, and whether there are programs or dropout; `None` if one of them is beyond the table.
pub fn forward_sm90(head_dim: usize, head_dim_v: usize, programs: bool) -> Option<Tiles> {
    let larger = head_dim.max(head_dim_v);
    let table = if programs { FORWARD_SM90_PROGRAMS } else { FORWARD_SM90 };
    table.into_iter().find(|row| larger <= row.head_dim as usize)
}

/// The same for the backward pass; `programs`: how many there are of a mask's program, a score mod, dropout.
pub fn backward_sm90(head_dim: usize, head_dim_v: usize, programs: usize) -> Option<BackwardTiles> {
    let larger = head_dim.max(head_dim_v);
    let table = if programs > 0 { BACKWARD_SM90_PROGRAMS } else { BACKWARD_SM90 };
    // Several together find registers for fewer elements of S only.
    let mut rows = table.into_iter().filter(|row| programs < 2 || row.split == Split::Columns);
    rows.find(|row| larger <= row.head_dim as usize)
}

/// How many (head, sequence) pairs walk along together, so that what they read of K and V stays in L2: a power of two of
/// KV heads, of `bytes` each, with all `group` query heads that share them.
pub fn head_group(bytes: u64, group: u64) -> u64 {
    let fit = L2_BYTES / bytes.max(1);
    (1 << fit.max(1).ilog2().min(16)) * group
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_the_larger_dimension() {
        assert_eq!(forward_sm90(64, 1, false), Some(FORWARD_SM90[0]));
        assert_eq!(forward_sm90(40, 65, false), Some(FORWARD_SM90[1]));
        assert_eq!(forward_sm90(192, 128, true), Some(FORWARD_SM90_PROGRAMS[2]));
        assert_eq!(forward_sm90(257, 8, false), None);
        assert_eq!(forward_sm90(8, 257, true), None);
    }

    #[test]
    fn every_pair_of_dimensions_fits_in_shared_memory() {
        for d in (8..=256).step_by(8) {
            for dv in (8..=256).step_by(8) {
                // Panels of 64 elements; barriers and the tile's numbers are less than a KiB, alignment as much.
                let wide = |d: usize| d.next_multiple_of(64) as u32 * 2;
                for tiles in [false, true].map(|programs| forward_sm90(d, dv, programs).expect("up to 256")) {
                    let (q, kv) = (64 * tiles.consumers * wide(d), tiles.tile_n * (wide(d) + wide(dv)));
                    assert!(q + tiles.stages * kv + 2048 <= 227 * 1024, "{d} {dv}");
                }
            }
        }
    }

    #[test]
    fn backward_rows_are_chosen_by_the_larger_dimension_and_by_programs() {
        assert_eq!(backward_sm90(64, 1, 0), Some(BACKWARD_SM90[0]));
        assert_eq!(backward_sm90(40, 65, 0), Some(BACKWARD_SM90[1]));
        assert_eq!(backward_sm90(64, 64, 1), Some(BACKWARD_SM90_PROGRAMS[0]));
        assert_eq!(backward_sm90(64, 64, 2), Some(BACKWARD_SM90_PROGRAMS[1]));
        assert_eq!(backward_sm90(192, 128, 3), Some(BACKWARD_SM90_PROGRAMS[2]));
        assert_eq!(backward_sm90(257, 8, 0), None);
    }

    #[test]
    fn groups_fill_l2() {
        assert_eq!(head_group(2 << 20, 1), 16);
        assert_eq!(head_group(3 << 20, 4), 8 * 4);
        assert_eq!(head_group(1 << 40, 8), 8);
        assert_eq!(head_group(0, 1), 1 << 16);
    }
}
