//! The one tuning table: which tiles the forward kernel takes for which head dimensions.

/// Tiles of the forward kernel for head dimensions up to a limit, and from some number of keys on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Largest head_dim and head_dim_v of this row.
    pub head_dim: u32,
    /// Fewest keys of this row: without a mask, and with one.
    pub keys: [usize; 2],
    /// Consumer warpgroups, 64 rows of q each.
    pub consumers: u32,
    /// Keys of a block.
    pub tile_n: u32,
    /// Stages of the K and of the V pipeline.
    pub stages: u32,
    /// Q as register fragments.
    pub q_in_registers: bool,
}

const fn tiles(
    head_dim: u32,
    keys: [usize; 2],
    [consumers, tile_n, stages]: [u32; 3],
    q_in_registers: bool,
) -> Tiles {
    Tiles { head_dim, keys, consumers, tile_n, stages, q_in_registers }
}

/// Rows by ascending head dimension; a problem takes the first that has room for its larger one and asks for no more keys.
/// Chosen on an H100 SXM (bf16, full and causal, 512 to 16k tokens): `benches/record/h100-sxm/README.md`.
pub const FORWARD_SM90: [Tiles; 5] = [
    // More rows to a block of keys: fewer loads from L2, which is power. Short causal sequences waste more of taller tiles.
    tiles(64, [1536, 6144], [3, 128, 3], false),
    tiles(64, [0, 0], [2, 128, 3], true),
    tiles(128, [1536, 6144], [3, 80, 3], false),
    // Q in registers takes half of QKᵀ's reads from shared memory away; tile_n 128 does not spill.
    tiles(128, [0, 0], [2, 128, 3], true),
    // O alone takes 128 registers, so Q stays in shared memory; of that, 80 keys in two stages would be all that is left,
    // but 64 are faster.
    tiles(256, [0, 0], [2, 64, 2], false),
];

/// The same for kernels with a mask's program, a score mod or dropout. These take registers for each key of a block, so
/// blocks are narrower and Q stays in shared memory: without spills, by ptxas 13.0.
pub const FORWARD_SM90_PROGRAMS: [Tiles; 3] = [
    tiles(64, [0, 0], [2, 80, 3], false),
    tiles(128, [0, 0], [2, 64, 2], false),
    tiles(256, [0, 0], [2, 48, 2], false),
];

/// The row for these head dimensions and keys; `None` if a head dimension is beyond the table. `masked`: with any mask;
/// `programs`: with programs or dropout.
pub fn forward_sm90(head_dims: [usize; 2], keys: usize, masked: bool, programs: bool) -> Option<Tiles> {
    let larger = head_dims[0].max(head_dims[1]);
    let table: &[Tiles] = if programs { &FORWARD_SM90_PROGRAMS } else { &FORWARD_SM90 };
    let fits = |row: &&Tiles| larger <= row.head_dim as usize && keys >= row.keys[usize::from(masked)];
    table.iter().find(fits).copied()
}

/// How many (head, sequence) pairs walk along together: KV heads, of `bytes` of keys and values each, with all `group` query
/// heads that share them. Under a mask tiles differ in length, and the longest of several heads go first; their keys and
/// values should stay in L2 (50 MB) nearly.
pub fn head_group(bytes: u64, group: u64, masked: bool) -> u64 {
    let heads = if masked { ((64 << 20) / bytes.max(1)).clamp(1, 8) } else { 2 };
    (1 << heads.ilog2()) * group
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_the_larger_dimension() {
        assert_eq!(forward_sm90([64, 1], 1536, false, false), Some(FORWARD_SM90[0]));
        assert_eq!(forward_sm90([64, 1], 1535, false, false), Some(FORWARD_SM90[1]));
        assert_eq!(forward_sm90([40, 65], 6143, true, false), Some(FORWARD_SM90[3]));
        assert_eq!(forward_sm90([40, 65], 6144, true, false), Some(FORWARD_SM90[2]));
        assert_eq!(forward_sm90([192, 128], 0, true, true), Some(FORWARD_SM90_PROGRAMS[2]));
        assert_eq!(forward_sm90([257, 8], 1, false, false), None);
        assert_eq!(forward_sm90([8, 257], 1, true, true), None);
    }

    #[test]
    fn every_pair_of_dimensions_fits_in_shared_memory() {
        for d in (8..=256).step_by(8) {
            for dv in (8..=256).step_by(8) {
                // Panels of 64 elements; barriers and the tile's numbers are less than a KiB, alignment as much.
                let wide = |d: usize| d.next_multiple_of(64) as u32 * 2;
                let rows = FORWARD_SM90.iter().chain(&FORWARD_SM90_PROGRAMS);
                for tiles in rows.filter(|row| d.max(dv) <= row.head_dim as usize) {
                    let (q, kv) = (64 * tiles.consumers * wide(d), tiles.tile_n * (wide(d) + wide(dv)));
                    assert!(q + tiles.stages * kv + 2048 <= 227 * 1024, "{d} {dv}");
                }
            }
        }
    }

    #[test]
    fn groups_are_of_whole_kv_heads() {
        assert_eq!(head_group(8 << 20, 1, true), 8);
        assert_eq!(head_group(16 << 20, 4, true), 4 * 4);
        assert_eq!(head_group(1 << 40, 8, true), 8);
        assert_eq!(head_group(0, 1, true), 8);
        assert_eq!(head_group(1 << 40, 3, false), 2 * 3);
    }
}
