//! Attention forward on Hopper: FlashAttention-2's algorithm 1 (Dao 2023) as FlashAttention-3 (Shah et al. 2024,
//! algorithm 2) spreads it over warpgroups.
//!
//! ```text
//! as many blocks as multiprocessors; each takes work tiles (m_block, head, batch) from a counter:
//!   producers (two threads):  Q, then for each visible n_block, from the right: K; and V; each into stages of its own
//!   a warp beside them:       zeros for the rows of tiles that see no key
//!   consumer (a warpgroup for 64 rows), over the blocks of all its tiles as one stream:
//!     S = Q·Kᵀ of the first block; score mod, mask; online softmax; P
//!     for each further block, of this tile or the next:
//!         issue S' = Q·K'ᵀ, issue O += P·V                          (tensor cores)
//!         score mod, mask, online softmax of S' while O += P·V runs   (exponent unit); P'
//!         where S' begins a tile: O / l and lse of the tile before; otherwise O to the new reference, if there is one
//!     O += P·V of the last block; O / l, lse
//!     rows that are not finite, of all its tiles, once more: `repair.rs`
//! ```
//!
//! Departures, and why; what each brought on an H100 is in `benches/record/h100-sxm/README.md`:
//! 1. *Ping-pong*: named barriers let one warpgroup issue its products while the other is in its softmax.
//! 2. *A kept reference*: any reference of the exponents gives the exact result, as the division by l takes it out again. bf16
//!    and f32 reach to 2¹²⁷, so the first block's is kept (the largest of a sample of its scores will do) until a sum passes
//!    2²⁴; then the next block's maxima are looked at. What a single block overshoots overflows, shows, and is repaired. So most
//!    blocks look for no maximum, and their exponentials begin at once. P in f16 reaches to 2¹⁶ only: a block whose sums pass 2¹⁵
//!    goes to a new reference before it is rounded. Score mods may grow without bound: what a sample of each block shows to have
//!    grown by 2⁶⁴ moves the reference.
//! 3. *One stream of blocks*: the tensor cores do not wait where tiles meet. ptxas keeps the loop's state in uniform registers
//!    only while no vote, loop or repair stands in it, so all that is rare comes after it.
//! 4. *Q in registers* where they suffice: half of QKᵀ's reads of shared memory are gone. Elsewhere Q has two stages, if they fit.
//! 5. *Tiles from a counter*, longest first: causal tiles differ in length, so no fixed assignment is even.
//! 6. *O by whole sectors*: neighbouring threads exchange columns, so that each store fills 32 bytes of a row.
//! 7. A warpgroup leaves out the blocks that a causal mask hides from all its rows, where blocks are narrow enough.
//! 8. Scores are kept in base 2: `scale·log2(e)` goes into the one multiply-add before `ex2`.
//! 9. *Query heads of a group in one tile*, where a single head does not fill it: row r of a KV head is query r / g of its head
//!    r % g, so that each block of K and V is loaded once for all g. TMA brings Q in this order, by a fifth dimension. (Not yet
//!    measured.)

mod consumer;
mod repair;
mod work;

use flashattn_spec::expr::Program;
use ptx::build::{Address, Builder, Half, Reg};
use ptx::instr::Element;
use ptx::{BF16x2, F16x2, Kernel, Pipeline, Target, TensorMap, TileLayout, build};

use super::philox::Dropout;
use super::program::TableArgs;
use consumer::Consumer;
use repair::GlobalTensor;
use work::Work;

/// How the kernel finds the blocks of keys that a tile of queries sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MaskKind {
    /// `diagonal − left ≤ key ≤ diagonal + right`, computed; a side that is false has no bound. The causal mask has
    /// `right` with a parameter of 0.
    Band {
        /// Whether the left side is bounded.
        left: bool,
        /// Whether the right side is bounded.
        right: bool,
    },
    /// A list from the spec's `BlockSchedule`, with the mask's program for the blocks seen in part.
    Blocks,
}

/// Which dimensions of a table have more than one index: the others cost nothing.
pub type TableShape = [bool; 4];

/// Everything the emitted kernel depends on: equal configs give equal PTX.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FwdConfig {
    /// Element type of q, k, v, o: bf16 or f16.
    pub element: Element,
    /// Elements of a row of q and k, at most 256.
    pub head_dim: u32,
    /// Elements of a row of v and o, at most 256.
    pub head_dim_v: u32,
    /// Consumer warpgroups: each takes 64 rows of q.
    pub consumers: u32,
    /// Keys of a block: a multiple of 16.
    pub tile_n: u32,
    /// Stages of the K and of the V pipeline.
    pub stages: u32,
    /// Q as register fragments (in shared memory otherwise).
    pub q_in_registers: bool,
    /// Visible blocks.
    pub mask: MaskKind,
    /// The mask, with [`MaskKind::Blocks`], and its tables.
    pub mask_program: Option<(Program, Vec<TableShape>)>,
    /// The score mod and its tables.
    pub score_mod: Option<(Program, Vec<TableShape>)>,
    /// Whether scores are multiplied by the scale before anything else: needed by a score mod (unless it is one multiply-add) and by
    /// a scale that is not positive (a maximum of scaled scores is the scaled maximum for a positive one only).
    pub prescaled: bool,
    /// Whether all lengths are below 2²², with a score mod: its indices then are floats early (`ProgramEmitter::with_small_indices`).
    pub small_indices: bool,
    /// Whether probabilities are dropped out.
    pub dropout: bool,
    /// Whether a sink logit joins each row's denominator.
    pub sinks: bool,
    /// Whether sequences are packed.
    pub varlen: bool,
    /// Query heads whose rows share a tile: 1; or all of a group, a divisor of the tile's rows, with a [`MaskKind::Band`] and
    /// none of score mod, dropout, sinks and varlen.
    pub packed_heads: u32,
}

/// Shared memory of a block, less what barriers and numbers take.
const SHARED_BYTES: u32 = 226 << 10;

/// Byte strides of a tensor's seqlen, heads and batch dimensions.
pub type Stride = [u64; 3];

impl FwdConfig {
    /// Rows of a work tile.
    pub const fn tile_m(&self) -> u32 {
        64 * self.consumers
    }

    /// Stages of Q: in registers it leaves its memory at once; otherwise the next tile's Q arrives in a second place, if
    /// there is room for one.
    pub(super) fn q_stages(&self) -> u32 {
        let kv = self.stages * (self.k().bytes() + self.v().bytes());
        if self.q_in_registers || kv + 2 * self.q().bytes() > SHARED_BYTES { 1 } else { 2 }
    }

    /// Whether some warpgroups of a tile see fewer blocks than others, on the right, so that leaving these out is worth it.
    pub(super) fn hides_blocks(&self) -> bool {
        matches!(self.mask, MaskKind::Band { right: true, .. }) && self.consumers > 1 && self.tile_n <= 64
    }

    pub(super) fn q(&self) -> TileLayout {
        TileLayout::new(self.tile_m(), self.head_dim.next_multiple_of(64), self.element)
    }

    pub(super) fn k(&self) -> TileLayout {
        TileLayout::new(self.tile_n, self.head_dim.next_multiple_of(64), self.element)
    }

    pub(super) fn v(&self) -> TileLayout {
        TileLayout::new(self.tile_n, self.head_dim_v.next_multiple_of(64), self.element)
    }

    /// Tensor maps of q, k and v: `shapes` are (head_dim, seqlen, heads, batch).
    pub fn tensor_maps(&self, shapes: [[u64; 4]; 3], strides: [Stride; 3]) -> [TensorMap; 3] {
        let layouts = [self.q(), self.k(), self.v()];
        let mut maps = [0, 1, 2].map(|i| layouts[i].tensor_map(layouts[i].rows, &shapes[i], &strides[i]));
        if self.packed_heads > 1 {
            // (head_dim, head of the group, seqlen, KV head, batch): the box's rows are in the tile's order.
            let (g, [d, n, h, b], [sn, sh, sb]) = (u64::from(self.packed_heads), shapes[0], strides[0]);
            // The stride of a single KV head means nothing, and may be too large.
            let by_group = if h > g { g * sh } else { 16 };
            let q = self.q();
            maps[0] = q.tensor_map(self.packed_heads, &[d, g, n, h / g, b], &[sh, sn, by_group, sb]);
            maps[0].tile[2] = q.rows / self.packed_heads;
        }
        maps
    }

    /// Registers a thread of the producer and of a consumer (`setmaxnreg`).
    fn registers(&self) -> (u8, u8) {
        match self.consumers {
            1 => (56, 240),
            2 => (40, 232),
            3 => (32, 160),
            _ => (24, 112),
        }
    }

    fn name(&self) -> String {
        let element = if self.element == Element::F16 { "f16" } else { "bf16" };
        let mask = match self.mask {
            MaskKind::Band { left: false, right: false } => "full",
            MaskKind::Band { left: false, right: true } => "causal",
            MaskKind::Band { .. } => "local",
            MaskKind::Blocks => "blocks",
        };
        let name = format!("flash_fwd_sm90_{element}_{}_{}_{mask}", self.head_dim, self.head_dim_v);
        if self.packed_heads > 1 { format!("{name}_packed{}", self.packed_heads) } else { name }
    }
}

/// Parameters that a launch gives, in this order: tensor maps `q`, `k`, `v`; then as the fields here (those of options
/// only where the config has them; of a table its address and the sizes of its dimensions that are not 1).
struct Params<'k> {
    /// Tensor maps.
    pub maps: [Address<'k, u64>; 3],
    /// Output, and lse in f32.
    pub o: Reg<'k, u64>,
    pub lse: Reg<'k, u64>,
    /// One u32, zero before the launch and after it; then one for each tile.
    pub counter: Reg<'k, u64>,
    /// Of batch, row and head of o, and of batch and head of lse, in elements.
    pub o_strides: [Reg<'k, u64>; 3],
    pub lse_strides: [Reg<'k, u64>; 2],
    /// Lengths; the longest, if packed.
    pub seqlen_q: Reg<'k, u32>,
    pub seqlen_k: Reg<'k, u32>,
    pub heads_q: Reg<'k, u32>,
    pub heads_kv: Reg<'k, u32>,
    pub batch: Reg<'k, u32>,
    /// (head, sequence) pairs that walk along together.
    pub head_group: Reg<'k, u32>,
    /// softmax_scale.
    pub scale: Reg<'k, f32>,
    /// Reach of the band to the left and right.
    pub band: [Option<Reg<'k, i32>>; 2],
    /// For each (sequence, head, m_block) four u32: first run, runs, blocks, 0; and the runs as two u32 each: first block
    /// (bit 31: seen in part), one past the last.
    pub rows: Option<[Reg<'k, u64>; 2]>,
    pub mask_tables: Vec<TableArgs<'k>>,
    pub score_tables: Vec<TableArgs<'k>>,
    pub dropout: Option<Dropout<'k>>,
    /// f32 by query head.
    pub sinks: Option<Reg<'k, u64>>,
    /// cu_seqlens of q and k (i32).
    pub cu_seqlens: Option<[Reg<'k, u64>; 2]>,
    /// q, k and v, to repair from: of each the address and the strides of batch, row and head, in elements.
    pub inputs: [GlobalTensor<'k>; 3],
}

impl<'k> Params<'k> {
    fn new(k: &'k Builder, config: &FwdConfig) -> Self {
        let maps = ["q", "k", "v"].map(|name| k.param_tensor_map(name));
        let [o, lse, counter] = ["o", "lse", "counter"].map(|name| k.param_ptr(name));
        let o_strides = ["o_batch", "o_row", "o_head"].map(|name| k.param_ptr(name));
        let lse_strides = ["lse_batch", "lse_head"].map(|name| k.param_ptr(name));
        let [seqlen_q, seqlen_k, heads_q, heads_kv, batch, head_group] =
            ["seqlen_q", "seqlen_k", "heads_q", "heads_kv", "batch", "head_group"]
                .map(|name| k.param_u32(name));
        let scale = k.param_f32("scale");
        let band = match config.mask {
            MaskKind::Band { left, right } => {
                [left.then(|| k.param_s32("window_left")), right.then(|| k.param_s32("window_right"))]
            }
            MaskKind::Blocks => [None, None],
        };
        let rows = (config.mask == MaskKind::Blocks).then(|| ["rows", "runs"].map(|name| k.param_ptr(name)));
        let mask_tables = tables(k, "mask", &config.mask_program);
        let score_tables = tables(k, "score", &config.score_mod);
        let dropout = config.dropout.then(|| Dropout::param(k));
        let sinks = config.sinks.then(|| k.param_ptr("sinks"));
        let cu_seqlens =
            config.varlen.then(|| ["cu_seqlens_q", "cu_seqlens_k"].map(|name| k.param_ptr(name)));
        let inputs = ["q", "k", "v"].map(|name| GlobalTensor {
            data: k.param_ptr(&format!("{name}_data")),
            strides: ["batch", "row", "head"].map(|dim| k.param_ptr(&format!("{name}_{dim}"))),
        });
        Params {
            maps,
            o,
            lse,
            counter,
            o_strides,
            lse_strides,
            seqlen_q,
            seqlen_k,
            heads_q,
            heads_kv,
            batch,
            head_group,
            scale,
            band,
            rows,
            mask_tables,
            score_tables,
            dropout,
            sinks,
            cu_seqlens,
            inputs,
        }
    }
}

fn tables<'k>(k: &'k Builder, of: &str, program: &Option<(Program, Vec<TableShape>)>) -> Vec<TableArgs<'k>> {
    let shapes = program.iter().flat_map(|(_, shapes)| shapes);
    let table = |(i, shape): (usize, &TableShape)| TableArgs {
        data: k.param_ptr(&format!("{of}_table{i}")),
        bytes: 4,
        dims: [0, 1, 2, 3].map(|d| shape[d].then(|| k.param_u32(&format!("{of}_table{i}_dim{d}")))),
    };
    shapes.enumerate().map(table).collect()
}

/// Shared memory and barriers.
pub(super) struct Shared<'k> {
    pub q: Address<'k, u32>,
    pub k: Address<'k, u32>,
    pub v: Address<'k, u32>,
    /// The work tile that Q belongs to.
    pub tile: Address<'k, u32>,
    /// For each stage of K which block it is (bit 31: seen in part).
    pub block: Address<'k, u32>,
    pub q_pipeline: Pipeline<'k>,
    pub k_pipeline: Pipeline<'k>,
    pub v_pipeline: Pipeline<'k>,
}

/// Kernel for q, k, v as bf16 or f16; see the file's header. Grid: as many blocks as run at once.
pub fn flash_fwd_sm90(config: &FwdConfig) -> Kernel {
    match config.element {
        Element::F16 => emit::<F16x2>(config),
        _ => emit::<BF16x2>(config),
    }
}

fn emit<H: Half>(config: &FwdConfig) -> Kernel {
    build(&config.name(), Target::Sm90a, 128 * (1 + config.consumers), |k| {
        let params = Params::new(k, config);
        let (align, warps) = (TileLayout::ALIGN, 4 * config.consumers);
        let shared = Shared {
            q: k.shared("q", config.q().bytes() * config.q_stages(), align),
            k: k.shared("k", config.k().bytes() * config.stages, align),
            v: k.shared("v", config.v().bytes() * config.stages, align),
            tile: k.shared("tile", work::TOLD_BYTES * config.q_stages(), 16),
            block: k.shared("block", 4 * config.stages, 16),
            q_pipeline: Pipeline::new(k, "q", config.q_stages(), warps + 1, 1),
            k_pipeline: Pipeline::new(k, "k", config.stages, warps, 1),
            v_pipeline: Pipeline::new(k, "v", config.stages, warps, 1),
        };
        let work = Work::new(k, config, &params);
        k.if_(k.tid(0).eq(0), || {
            for pipeline in [shared.q_pipeline, shared.k_pipeline, shared.v_pipeline] {
                pipeline.init(k);
            }
            k.fence_mbarrier_init();
        });
        k.sync_threads();
        let warp = k.warp();
        let (few, many) = config.registers();
        k.if_else(
            (warp >> 2).eq(0),
            || {
                k.lower_registers(few);
                let one = k.lane().eq(0);
                k.if_(warp.eq(0) & one, || work.load_q_and_k(&shared));
                k.if_(warp.eq(1) & one, || work.load_v(&shared));
                k.if_(warp.eq(2), || work.write_nothing());
            },
            || {
                k.raise_registers(many);
                Consumer::<H>::new(&work, &shared, warp).run();
            },
        );
    })
}
