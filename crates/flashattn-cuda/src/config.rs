//! The one tuning table: which tiles the kernels take for which head dimensions.

use crate::kernels::Split;

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
pub const FORWARD_SM90: [Tiles; 7] = [
    // More rows to a block of keys: fewer loads from L2, which is power. Short causal sequences waste more of taller tiles.
    tiles(64, [1536, 6144], [3, 128, 3], false),
    tiles(64, [0, 0], [2, 128, 3], true),
    // Panels of 128 columns, as beyond, but accumulators leave room for wider blocks. Narrow ones let warpgroups leave out what is
    // hidden. Chosen at 72.
    tiles(80, [1536, 6144], [3, 96, 3], false),
    tiles(80, [usize::MAX, 1024], [3, 64, 4], false),
    tiles(128, [1536, 6144], [3, 80, 3], false),
    // Q in registers takes half of QKᵀ's reads from shared memory away; tile_n 128 does not spill.
    tiles(128, [0, 0], [2, 128, 3], true),
    // O alone takes 128 registers, so Q stays in shared memory; of that, 80 keys in two stages would be all that is left,
    // but 64 are faster.
    tiles(256, [0, 0], [2, 64, 2], false),
];

/// The same for kernels with a score mod and nothing else that takes registers for each key of a block.
pub const FORWARD_SM90_SCORES: [Tiles; 4] = [
    tiles(64, [1536, 6144], [3, 80, 3], false),
    tiles(64, [0, 0], [2, 128, 3], false),
    tiles(128, [0, 0], [2, 128, 2], false),
    tiles(256, [0, 0], [2, 48, 2], false),
];

/// The same with f16, whose sums of a block take two registers more.
pub const FORWARD_SM90_SCORES_F16: [Tiles; 4] = [
    FORWARD_SM90_SCORES[0],
    FORWARD_SM90_SCORES[1],
    tiles(128, [0, 0], [2, 112, 2], false),
    FORWARD_SM90_SCORES[3],
];

/// The same for kernels whose score mod is one multiply-add (ALiBi): it takes a register a row, so tiles may be nearly as without.
/// Chosen on an H100 among two each (bf16, full and causal, 8k tokens).
pub const FORWARD_SM90_SLOPES: [Tiles; 4] = [
    tiles(64, [1536, 6144], [3, 112, 3], false),
    tiles(64, [0, 0], [2, 128, 3], true),
    tiles(128, [0, 0], [2, 128, 3], true),
    tiles(256, [0, 0], [2, 48, 2], false),
];

/// The same for kernels with a mask's program alone, which few blocks run. Those of 64 and 128 were chosen on an H100 (bf16, documents
/// of 1024 in 8k tokens).
pub const FORWARD_SM90_MASKS: [Tiles; 4] = [
    // Stores of less than whole sectors take registers too.
    tiles(63, [0, 0], [2, 128, 3], false),
    tiles(64, [0, 0], [2, 128, 3], true),
    // Two stages leave room for the next tile's Q, which gains more than a third stage.
    tiles(128, [0, 0], [2, 128, 2], false),
    tiles(256, [0, 0], [2, 48, 2], false),
];

/// The same for kernels with dropout alone, by what ptxas has registers for; not tuned.
pub const FORWARD_SM90_DROPOUT: [Tiles; 4] = [
    tiles(64, [1536, 6144], [3, 96, 3], false),
    tiles(64, [0, 0], [2, 128, 3], true),
    tiles(128, [0, 0], [2, 128, 2], false),
    tiles(256, [0, 0], [2, 64, 2], false),
];

/// The same for kernels whose tiles are the queries of several heads: few, so that tall tiles would be empty. Not tuned.
pub const FORWARD_SM90_PACKED: [Tiles; 3] = [
    tiles(64, [0, 0], [2, 128, 3], true),
    // Places of rows in o and lse take registers too: 128 keys spill.
    tiles(128, [0, 0], [2, 96, 4], true),
    tiles(256, [0, 0], [2, 64, 2], false),
];

/// The same for kernels with two or more of dropout, a mask's program and a score mod: blocks are narrower, without spills by ptxas
/// 13.0.
pub const FORWARD_SM90_PROGRAMS: [Tiles; 3] = [
    tiles(64, [0, 0], [2, 64, 3], false),
    tiles(128, [0, 0], [2, 48, 2], false),
    tiles(256, [0, 0], [2, 48, 2], false),
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
    /// Stages of the Q pipeline.
    pub stages: u32,
    /// Stages of the dO pipeline, and copies of P and dS: at most as many.
    pub do_stages: u32,
    /// Most keys with which dQ has a kernel of its own: without a mask, and with one.
    pub own_dq: [usize; 2],
}

/// Rows by ascending head dimension, as in [`FORWARD_SM90`], chosen as these are.
pub const BACKWARD_SM90: [BackwardTiles; 3] = [
    // The largest square that fits: dK and dV take 64 registers, S and dP 128. Q is let go of last and needed first, so it has
    // a third stage. Of few keys adding dQ up, with its zeros and its pass over the sums, takes longer than S and dP once more.
    backward_tiles(64, 128, Split::Keys, [3, 2], [0, 512]),
    // dK and dV take 128 registers, so S and dP are 32 each; nothing of the next block is issued before this one is done, so that
    // dS stays in registers for dK.
    backward_tiles(128, 64, Split::Keys, [3, 2], [512, 1024]),
    // dK and dV of 128 keys would take all registers; shared memory holds two stages of 64 queries. So narrow blocks would add up
    // more of dQ than L2 can.
    backward_tiles(256, 64, Split::Gradients, [2, 2], ALWAYS),
];

/// The same for kernels with dropout alone, as wide as without; not tuned. Random words take longer than adding dQ up, so that few keys
/// are no reason to compute them twice.
pub const BACKWARD_SM90_DROPOUT: [BackwardTiles; 3] = [
    backward_tiles(64, 128, Split::Keys, [3, 2], [0, 0]),
    backward_tiles(128, 64, Split::Keys, [3, 2], [0, 0]),
    backward_tiles(256, 64, Split::Columns, [2, 2], ALWAYS),
];

/// The same for kernels with a mask's program or a score mod, which take registers for each element of S; not tuned.
pub const BACKWARD_SM90_PROGRAMS: [BackwardTiles; 3] = [
    backward_tiles(64, 64, Split::Keys, [3, 3], [0, 0]),
    backward_tiles(128, 64, Split::Columns, [3, 3], [0, 0]),
    backward_tiles(256, 64, Split::Columns, [2, 2], ALWAYS),
];

/// Most keys with which dQ of a deterministic plan has a kernel of its own, where its blocks of keys could take turns: without a mask,
/// and with one.
pub const DETERMINISTIC_OWN_DQ: [usize; 2] = [1024, 4096];

const ALWAYS: [usize; 2] = [usize::MAX; 2];

const fn backward_tiles(
    head_dim: u32,
    tile_m: u32,
    split: Split,
    [stages, do_stages]: [u32; 2],
    own_dq: [usize; 2],
) -> BackwardTiles {
    BackwardTiles { head_dim, tile_m, split, stages, do_stages, own_dq }
}

/// What a kernel has besides the products, the softmax and a band.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extras {
    /// Nothing that takes registers.
    None,
    /// Query heads that share a tile.
    Packed,
    /// A score mod.
    Score,
    /// A score mod, with f16.
    ScoreF16,
    /// A score mod that is one multiply-add.
    Slope,
    /// A mask's program.
    Mask,
    /// Dropout.
    Dropout,
    /// Several of a mask's program, a score mod and dropout.
    Programs,
}

impl Extras {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Extras::None,
        Extras::Packed,
        Extras::Score,
        Extras::ScoreF16,
        Extras::Slope,
        Extras::Mask,
        Extras::Dropout,
        Extras::Programs,
    ];

    /// The table's rows.
    pub const fn rows(self) -> &'static [Tiles] {
        match self {
            Extras::None => &FORWARD_SM90,
            Extras::Packed => &FORWARD_SM90_PACKED,
            Extras::Score => &FORWARD_SM90_SCORES,
            Extras::ScoreF16 => &FORWARD_SM90_SCORES_F16,
            Extras::Slope => &FORWARD_SM90_SLOPES,
            Extras::Mask => &FORWARD_SM90_MASKS,
            Extras::Dropout => &FORWARD_SM90_DROPOUT,
            Extras::Programs => &FORWARD_SM90_PROGRAMS,
        }
    }
}

/// The row for these head dimensions and keys; `None` if a head dimension is beyond the table. `masked`: with any mask.
pub fn forward_sm90(head_dims: [usize; 2], keys: usize, masked: bool, extras: Extras) -> Option<Tiles> {
    let larger = head_dims[0].max(head_dims[1]);
    // Odd dimensions take registers of their own, which a third warpgroup does not leave.
    let even = head_dims.iter().all(|dim| dim.is_multiple_of(8));
    let fits = |row: &&Tiles| {
        larger <= row.head_dim as usize
            && keys >= row.keys[usize::from(masked)]
            && (row.consumers < 3 || even)
    };
    extras.rows().iter().find(fits).copied()
}

/// The same for the backward pass; `programs`: how many there are of a mask's program and a score mod.
pub fn backward_sm90(
    head_dim: usize,
    head_dim_v: usize,
    programs: usize,
    dropout: bool,
) -> Option<BackwardTiles> {
    let larger = head_dim.max(head_dim_v);
    let table = match (programs, dropout) {
        (0, false) => BACKWARD_SM90,
        (0, true) => BACKWARD_SM90_DROPOUT,
        _ => BACKWARD_SM90_PROGRAMS,
    };
    // Several together find registers for fewer elements of S only.
    let several = programs + usize::from(dropout) > 1;
    let mut rows = table.into_iter().filter(|row| !several || row.split == Split::Columns);
    rows.find(|row| larger <= row.head_dim as usize)
}

/// How many (head, sequence) pairs walk along together: KV heads, of `bytes` of keys and values each, with all `group` query
/// heads that share them. Under a mask tiles differ in length, and the longest of several heads go first: the more heads, the more
/// even. Those whose keys and values stay in L2 (50 MB) may be more.
pub fn head_group(bytes: u64, group: u64, masked: bool) -> u64 {
    let heads = if masked { ((32 << 20) / bytes.max(1)).clamp(16, 32) } else { 2 };
    (1 << heads.ilog2()) * group
}

/// The same for the backward pass: (KV head, sequence) pairs of so many `items` each. Without a mask one after the other is fastest;
/// under one there should be a few items for each multiprocessor, and no more heads than that takes.
pub fn backward_head_group(items: usize, masked: bool) -> usize {
    let heads = if masked { (512 / items.max(1)).clamp(2, 16) } else { 1 };
    1 << heads.ilog2()
}

/// The fewest of these where blocks of keys take turns to add to so many blocks of queries: the items of a head that run at once follow
/// each other at some blocks' distance, and the last of them should not wait for most of its time. More heads find less in L2.
pub fn turns_head_group(m_blocks: usize, masked: bool) -> usize {
    let blocks = if masked { 4000 } else { 400 };
    (blocks / m_blocks.max(1)).clamp(1, 32).next_power_of_two()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_the_larger_dimension() {
        assert_eq!(forward_sm90([64, 8], 1536, false, Extras::None), Some(FORWARD_SM90[0]));
        assert_eq!(forward_sm90([64, 1], 1536, false, Extras::None), Some(FORWARD_SM90[1]));
        assert_eq!(forward_sm90([64, 8], 1535, false, Extras::None), Some(FORWARD_SM90[1]));
        assert_eq!(forward_sm90([40, 65], 6143, true, Extras::None), Some(FORWARD_SM90[5]));
        assert_eq!(forward_sm90([40, 72], 6144, true, Extras::None), Some(FORWARD_SM90[2]));
        assert_eq!(forward_sm90([40, 72], 6143, true, Extras::None), Some(FORWARD_SM90[3]));
        assert_eq!(forward_sm90([40, 72], 1535, false, Extras::None), Some(FORWARD_SM90[5]));
        assert_eq!(forward_sm90([96, 72], 6144, true, Extras::None), Some(FORWARD_SM90[4]));
        assert_eq!(forward_sm90([64, 64], 2000, true, Extras::Score), Some(FORWARD_SM90_SCORES[1]));
        assert_eq!(forward_sm90([192, 128], 0, true, Extras::Programs), Some(FORWARD_SM90_PROGRAMS[2]));
        assert_eq!(forward_sm90([257, 8], 1, false, Extras::None), None);
        assert_eq!(forward_sm90([8, 257], 1, true, Extras::Programs), None);
    }

    #[test]
    fn every_pair_of_dimensions_fits_in_shared_memory() {
        for d in (8..=256).step_by(8) {
            for dv in (8..=256).step_by(8) {
                // Panels of 64 elements; barriers and the tile's numbers are less than a KiB, alignment as much.
                let wide = |d: usize| d.next_multiple_of(64) as u32 * 2;
                let rows = Extras::ALL.into_iter().flat_map(Extras::rows);
                for tiles in rows.filter(|row| d.max(dv) <= row.head_dim as usize) {
                    let (q, kv) = (64 * tiles.consumers * wide(d), tiles.tile_n * (wide(d) + wide(dv)));
                    assert!(q + tiles.stages * kv + 2048 <= 227 * 1024, "{d} {dv}");
                }
            }
        }
    }

    #[test]
    fn groups_are_of_whole_kv_heads() {
        assert_eq!(head_group(1 << 20, 1, true), 32);
        assert_eq!(head_group(3 << 19, 4, true), 16 * 4);
        assert_eq!(head_group(1 << 40, 8, true), 16 * 8);
        assert_eq!(head_group(0, 1, true), 32);
        assert_eq!(head_group(1 << 40, 3, false), 2 * 3);
    }

    #[test]
    fn groups_of_the_backward_pass_are_few() {
        let groups = [16, 64, 100, 128, 1024, 0].map(|items| backward_head_group(items, true));
        assert_eq!(groups, [16, 8, 4, 4, 2, 16]);
        assert_eq!(backward_head_group(64, false), 1);
        let groups =
            [16, 64, 128, 1000, 0].map(|blocks| [false, true].map(|masked| turns_head_group(blocks, masked)));
        assert_eq!(groups, [[32, 32], [8, 32], [4, 32], [1, 4], [32, 32]]);
    }

    #[test]
    fn backward_rows_are_chosen_by_the_larger_dimension_and_by_programs() {
        assert_eq!(backward_sm90(64, 1, 0, false), Some(BACKWARD_SM90[0]));
        assert_eq!(backward_sm90(40, 65, 0, false), Some(BACKWARD_SM90[1]));
        assert_eq!(backward_sm90(64, 64, 0, true), Some(BACKWARD_SM90_DROPOUT[0]));
        assert_eq!(backward_sm90(64, 64, 1, false), Some(BACKWARD_SM90_PROGRAMS[0]));
        assert_eq!(backward_sm90(64, 64, 1, true), Some(BACKWARD_SM90_PROGRAMS[1]));
        assert_eq!(backward_sm90(64, 64, 2, false), Some(BACKWARD_SM90_PROGRAMS[1]));
        assert_eq!(backward_sm90(192, 128, 2, true), Some(BACKWARD_SM90_PROGRAMS[2]));
        assert_eq!(backward_sm90(257, 8, 0, false), None);
    }
}
