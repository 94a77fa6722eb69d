//! Attention backward on Hopper: the paper's algorithm 4 (Dao et al. 2022), keys outside and queries inside, spread over
//! warpgroups as FlashAttention-3 (Shah et al. 2024) does it.
//!
//! ```text
//! preprocess, a block for each (m_block, head, batch):
//!     stats = −lse·log2(e) and D = rowsum(dO ∘ O) − dlse;  dQ' = 0;  a sum for the sink's gradient
//! main, as many blocks as multiprocessors; each takes items (n_block, KV head, batch) from a counter:
//!   producers (two threads):  K, V; then for each query head of the group, for each m_block that sees the keys:
//!                             Q with its stats, and dO, each into stages of its own
//!   consumers (two warpgroups), for each of these:
//!       Sᵀ = K·Qᵀ                               (for when, see 1)
//!       dPᵀ = V·dOᵀ;  Pᵀ = exp2(scale·Sᵀ − lse) meanwhile
//!       dV += Pᵀ·dO;  dSᵀ = Pᵀ ∘ (dPᵀ − D), to shared memory for both
//!       dQ' += dS·K, added to global memory in f32;  dK += dSᵀ·Q
//!     dK·scale, dV
//! postprocess, a block for each (m_block, head, batch):  dQ = scale·dQ'
//! ```
//!
//! With [`BwdConfig::own_dq`] there is no dQ', and the last kernel computes dQ by itself: see `queries.rs`. That is faster at head_dim
//! 256 and gives the same bits in every run; so does dQ' with [`BwdConfig::turns`], see `turns.rs`. Gradients of tables are added up
//! across blocks in any order; where the result shall not depend on it, in sums that do not round (`superaccumulator.rs`), which that
//! kernel rounds first.
//!
//! Departures from FlashAttention-3, and why:
//! 1. *The next block's scores are issued before this block's dQ and dK* where it has to read dS from shared memory for dK, so that
//!    there are products to work on while the warpgroups wait for each other's dS. FlashAttention-3's order, in which dS stays in
//!    registers, is faster where there are enough (`Consumer::in_order`).
//! 2. *Each warp adds its own 16 rows of dQ'* by one bulk reduction from shared memory: its layout is our own, that of the
//!    accumulator's fragments, so that no warp waits for another. It does so after the next block's dS, whose fence it shares. In turns a
//!    thread beside the producers adds a warpgroup's 64 rows, or all 64 of half of the columns.
//! 3. *A group's query heads are looped over* by the item of their KV head: dK and dV need no atomics and are always
//!    deterministic.
//! 4. [`Split::Gradients`]: where dK and dV of 128 keys do not fit in registers, the warpgroups share 64 keys and have a gradient
//!    each, of which `one_gradient.rs` has the algorithm; with programs or dropout half of the columns of both ([`Split::Columns`]).
//!
//! With dropout P and dS are without its 1 / (1 − p), which D loses before and the gradients get at the end.
//!
//! What a row does not see reaches it neither through the products (0 · NaN) nor otherwise: see `exact.rs`.

mod consumer;
mod elements;
mod exact;
mod one_gradient;
mod output;
mod postprocess;
mod preprocess;
mod queries;
pub(crate) mod superaccumulator;
pub(crate) mod turns;
mod work;

use flashattn_spec::expr::Program;
use ptx::build::{Address, Builder, Half, Reg};
use ptx::instr::{Accumulator, Element, WgmmaShape};
use ptx::{BF16x2, F16x2, Kernel, Pipeline, Target, TensorMap, TileLayout, build};

use super::fwd_sm90::{MaskKind, Stride, TableShape};
use super::global::{GlobalTensor, piece};
use super::philox::Dropout;
use super::program::TableArgs;
use consumer::Consumer;
use work::{Loads, Work};

/// Consumer warpgroups.
pub(crate) const CONSUMERS: u32 = 2;

/// What the two consumer warpgroups share out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// The keys: 64 of 128 each, with all columns of dK and dV. P and dS are A operands in registers.
    Keys,
    /// The columns of dK, dV and dQ, half each, of the same 64 keys; and the queries of S and dP. P and dS go through
    /// shared memory.
    Columns,
    /// The gradients of the same 64 keys: one warpgroup has S, P and dV, the other dP, dS and dK. P and dS are A operands in
    /// registers; P goes through shared memory, too. Only where dQ has a kernel of its own, and P and dS take a product each.
    Gradients,
}

/// A warpgroup's gradient with [`Split::Gradients`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gradient {
    Values,
    Keys,
}

/// Which part of a block's dQ a warpgroup has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DqPart {
    /// 64 of 128 queries.
    Queries,
    /// Half of the columns.
    Columns,
    /// All of it, of its own keys: the two are added up.
    Keys,
}

/// A gradient of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TableGrad {
    /// The table's shape.
    pub shape: TableShape,
    /// Which of the gradients given it is added to.
    pub table: usize,
    /// Whether to the table's exact sums first, which are the same whatever the order of their terms; the same of all gradients of
    /// a table.
    pub exact: bool,
}

/// Everything the emitted kernels depend on: equal configs give equal PTX.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BwdConfig {
    /// Element type of the tensors: bf16 or f16.
    pub element: Element,
    /// Elements of a row of q and k, at most 256.
    pub head_dim: u32,
    /// Elements of a row of v and o, at most 256.
    pub head_dim_v: u32,
    /// Queries of a block: 64, or 128 with [`Split::Keys`].
    pub tile_m: u32,
    /// What the warpgroups share out.
    pub split: Split,
    /// Stages of the Q pipeline.
    pub stages: u32,
    /// Stages of the dO pipeline, and copies of P and dS: at most as many.
    pub do_stages: u32,
    /// Visible blocks.
    pub mask: MaskKind,
    /// The mask, with [`MaskKind::Blocks`], and its tables.
    pub mask_program: Option<(Program, Vec<TableShape>)>,
    /// The score mod's value and derivatives ([`flashattn_spec::expr::Expr::gradients`]), and its tables.
    pub score_mod: Option<(Program, Vec<TableShape>)>,
    /// The table gradients of the score mod's program, in its order.
    pub table_grads: Vec<TableGrad>,
    /// Whether probabilities are dropped out.
    pub dropout: bool,
    /// Whether there are sinks, which have a gradient.
    pub sinks: bool,
    /// Whether the loss has a gradient through lse.
    pub d_lse: bool,
    /// Whether sequences are packed.
    pub varlen: bool,
    /// Whether rows of gradients that are not finite are computed again from what they depend on alone.
    pub repair: bool,
    /// Whether dQ has a kernel of its own, instead of being added up across blocks of keys.
    pub own_dq: bool,
    /// Whether blocks of keys take turns to add to dQ', so that its bits do not depend on which comes first. Only where each query that
    /// sees a key sees those before it, and warpgroups have parts of dQ' of their own.
    pub turns: bool,
}

impl BwdConfig {
    /// Keys of a block.
    pub const fn tile_n(&self) -> u32 {
        match self.split {
            Split::Keys => 128,
            Split::Columns | Split::Gradients => 64,
        }
    }

    fn dq_part(&self) -> DqPart {
        match self.split {
            Split::Columns => DqPart::Columns,
            Split::Keys if self.tile_m == 128 => DqPart::Queries,
            Split::Keys if self.head_dim > 64 => DqPart::Columns,
            Split::Keys | Split::Gradients => DqPart::Keys,
        }
    }

    /// Whether P and dS are computed element by element once both products are there, instead of one after the other.
    fn programs(&self) -> bool {
        self.mask_program.is_some() || self.score_mod.is_some()
    }

    /// Registers a thread of the producers and of a consumer (`setmaxnreg`).
    fn registers(&self) -> (u8, u8) {
        if self.busy_producers() { (40, 232) } else { (24, 240) }
    }

    /// Whether the producers have more to keep: lists of blocks, packed sequences, or both ends of a band.
    fn busy_producers(&self) -> bool {
        self.varlen || self.programs() || self.mask == MaskKind::Band { left: true, right: true }
    }

    fn layout(&self, rows: u32, columns: u32, halved: bool) -> TileLayout {
        // Halves are whole panels.
        TileLayout::new(rows, columns.next_multiple_of(if halved { 128 } else { 64 }), self.element)
    }

    fn q(&self) -> TileLayout {
        self.layout(self.tile_m, self.head_dim, self.dq_part() == DqPart::Columns)
    }

    fn k(&self) -> TileLayout {
        self.layout(self.tile_n(), self.head_dim, self.dq_part() == DqPart::Columns)
    }

    fn v(&self) -> TileLayout {
        self.layout(self.tile_n(), self.head_dim_v, self.split == Split::Columns)
    }

    fn d_o(&self) -> TileLayout {
        self.layout(self.tile_m, self.head_dim_v, self.split == Split::Columns)
    }

    /// Pᵀ and dSᵀ; or dS alone with [`Split::Keys`], as it goes into dQ's product. With [`Split::Gradients`] as many bytes for Pᵀ,
    /// as it lies in registers.
    fn scores(&self) -> TileLayout {
        match self.split {
            Split::Keys => TileLayout::new(self.tile_m, self.tile_n(), self.element),
            Split::Columns | Split::Gradients => TileLayout::new(self.tile_n(), self.tile_m, self.element),
        }
    }

    /// How many copies there are of dS and of P.
    fn scores_copies(&self) -> [u32; 2] {
        match self.split {
            Split::Keys => [self.do_stages, 0],
            Split::Columns => [self.do_stages; 2],
            Split::Gradients => [0, self.do_stages],
        }
    }

    /// Columns of a warpgroup's Sᵀ and dPᵀ, of its dK, dV and dQ.
    fn score_columns(&self) -> u32 {
        if self.split == Split::Columns { self.tile_m / 2 } else { self.tile_m }
    }

    fn dk_columns(&self) -> u32 {
        if self.split == Split::Columns { self.k().columns / 2 } else { self.head_dim.next_multiple_of(16) }
    }

    fn dv_columns(&self) -> u32 {
        if self.split == Split::Columns { self.v().columns / 2 } else { self.head_dim_v.next_multiple_of(16) }
    }

    fn dq_columns(&self) -> u32 {
        match self.dq_part() {
            DqPart::Columns => self.k().columns / 2,
            DqPart::Queries | DqPart::Keys => self.head_dim.next_multiple_of(16),
        }
    }

    /// Warpgroups that have a dQ' of their own in a tile's.
    fn dq_parts(&self) -> u32 {
        if self.dq_part() == DqPart::Keys { 1 } else { CONSUMERS }
    }

    /// Bytes of dQ' of a (sequence, head, m_block), if it is added up.
    pub fn dq_sum_bytes(&self) -> u32 {
        self.dq_parts() * self.dq_part_bytes()
    }

    /// Bytes of a warpgroup's part of that.
    fn dq_part_bytes(&self) -> u32 {
        4 * self.dq_warp_bytes()
    }

    /// Bytes of a warp's dQ'.
    fn dq_warp_bytes(&self) -> u32 {
        16 * self.dq_columns() * 4
    }

    /// Queries of an item of the kernel that computes dQ by itself.
    pub const QUERIES: u32 = 64 * CONSUMERS;

    /// Bytes of the stats of a (sequence, head, m_block): −lse in base 2 of its rows, then their D.
    pub const fn stats_bytes(&self) -> u32 {
        2 * 4 * self.tile_m
    }

    /// Bytes that the address and strides of o, with rows of so many elements, are multiples of.
    pub(crate) const fn o_bytes(dim: u32) -> u32 {
        piece(dim, 2)
    }

    /// The same of a gradient.
    pub(crate) const fn gradient_bytes(dim: u32) -> u32 {
        piece(dim, 4)
    }

    /// Tensor maps of q, k, v and do: `shapes` are (head_dim, seqlen, heads, batch).
    pub fn tensor_maps(&self, shapes: [[u64; 4]; 4], strides: [Stride; 4]) -> [TensorMap; 4] {
        let layouts = [self.q(), self.k(), self.v(), self.d_o()];
        [0, 1, 2, 3].map(|i| layouts[i].tensor_map(layouts[i].rows, &shapes[i], &strides[i]))
    }

    fn shape(&self, n: u32, transpose_a: bool, transpose_b: bool) -> WgmmaShape {
        let (a, d) = (self.element, Accumulator::F32);
        WgmmaShape { n, a, b: a, d, a_in_registers: false, transpose_a, transpose_b }
    }

    fn name(&self, part: &str) -> String {
        let element = if self.element == Element::F16 { "f16" } else { "bf16" };
        let mask = match self.mask {
            MaskKind::Band { left: false, right: false } => "full",
            MaskKind::Band { left: false, right: true } => "causal",
            MaskKind::Band { .. } => "local",
            MaskKind::Blocks => "blocks",
        };
        format!("flash_bwd_sm90{part}_{element}_{}_{}_{mask}", self.head_dim, self.head_dim_v)
    }
}

/// Parameters that a launch gives, the same of the three kernels, in this order: tensor maps `q`, `k`, `v`, `do`; then as
/// the fields here (those of options only where the config has them; of a table its address and the sizes of its
/// dimensions that are not 1; of a gradient of one its sums after that).
struct Params<'k> {
    /// Tensor maps.
    pub maps: [Address<'k, u64>; 4],
    pub q: GlobalTensor<'k>,
    pub k: GlobalTensor<'k>,
    pub v: GlobalTensor<'k>,
    pub o: GlobalTensor<'k>,
    pub d_o: GlobalTensor<'k>,
    pub dq: GlobalTensor<'k>,
    pub dk: GlobalTensor<'k>,
    pub dv: GlobalTensor<'k>,
    /// f32, and its gradient, with strides of batch and head in elements.
    pub lse: Reg<'k, u64>,
    pub d_lse: Option<Reg<'k, u64>>,
    pub lse_strides: [Reg<'k, u64>; 2],
    /// dQ', in tiles of [`BwdConfig::dq_sum_bytes`] by (head, tile): for each warpgroup with a part of its own and each of its
    /// warps the fragment, four registers of each lane at a time.
    pub dq_sums: Option<Reg<'k, u64>>,
    /// For each block of keys of each KV head and sequence, if they take turns, [`turns::BYTES`] of zeros: see `turns.rs`.
    pub turns: Option<Reg<'k, u64>>,
    /// In tiles of [`BwdConfig::stats_bytes`]; D with dropout times 1 − p.
    pub stats: Reg<'k, u64>,
    /// One u32, zero before the launch and after it.
    pub counter: Reg<'k, u64>,
    /// Logits and their gradient, f32 by query head; f32 by tile.
    pub sinks: Option<[Reg<'k, u64>; 3]>,
    /// Lengths; the longest, if packed.
    pub seqlen_q: Reg<'k, u32>,
    pub seqlen_k: Reg<'k, u32>,
    pub heads_q: Reg<'k, u32>,
    pub heads_kv: Reg<'k, u32>,
    pub batch: Reg<'k, u32>,
    /// (KV head, sequence) pairs that walk along together.
    pub head_group: Reg<'k, u32>,
    /// Tiles of queries of all sequences of a head.
    pub tiles: Reg<'k, u32>,
    /// softmax_scale.
    pub scale: Reg<'k, f32>,
    /// Reach of the band to the left and right.
    pub band: [Option<Reg<'k, i32>>; 2],
    /// For each (sequence, head, n_block) four u32: first run, runs, blocks, 0; and the runs as two u32 each: first m_block
    /// (bit 31: seen in part), one past the last.
    pub rows: Option<[Reg<'k, u64>; 2]>,
    /// The same for each (sequence, head, item of [`queries`]), of n_blocks; if dQ has a kernel of its own.
    pub query_rows: Option<[Reg<'k, u64>; 2]>,
    pub mask_tables: Vec<TableArgs<'k>>,
    pub score_tables: Vec<TableArgs<'k>>,
    /// Where table gradients are added, in the config's order.
    pub table_grads: Vec<TableArgs<'k>>,
    /// Tables with exact sums: these, and the gradients that they belong to.
    pub table_sums: Vec<(TableArgs<'k>, Reg<'k, u64>)>,
    pub dropout: Option<Dropout<'k>>,
    /// cu_seqlens of q and k (i32).
    pub cu_seqlens: Option<[Reg<'k, u64>; 2]>,
}

impl<'k> Params<'k> {
    /// What dq and dk are multiplied by at the end: dS is computed without dropout's 1 / (1 − p).
    fn d_scale(&self) -> Reg<'k, f32> {
        self.dropout.as_ref().map_or(self.scale, |dropout| self.scale * dropout.keep_scale)
    }

    fn new(k: &'k Builder, config: &BwdConfig) -> Self {
        let maps = ["q", "k", "v", "do"].map(|name| k.param_tensor_map(name));
        let tensors = ["q", "k", "v", "o", "do", "dq", "dk", "dv"];
        let [q, keys, v, o, d_o, dq, dk, dv] = tensors.map(|name| GlobalTensor::param(k, name));
        let pointer = |name: &str| k.param_ptr(name);
        let lse = pointer("lse");
        let d_lse = config.d_lse.then(|| pointer("d_lse"));
        let lse_strides = ["lse_batch", "lse_head"].map(pointer);
        let dq_sums = (!config.own_dq).then(|| pointer("dq_sums"));
        let turns = config.turns.then(|| pointer("turns"));
        let [stats, counter] = ["stats", "counter"].map(pointer);
        let sinks = config.sinks.then(|| ["sinks", "d_sinks", "sink_sums"].map(pointer));
        let names = ["seqlen_q", "seqlen_k", "heads_q", "heads_kv", "batch", "head_group", "tiles"];
        let [seqlen_q, seqlen_k, heads_q, heads_kv, batch, head_group, tiles] =
            names.map(|name| k.param_u32(name));
        let scale = k.param_f32("scale");
        let band = match config.mask {
            MaskKind::Band { left, right } => {
                [left.then(|| k.param_s32("window_left")), right.then(|| k.param_s32("window_right"))]
            }
            MaskKind::Blocks => [None, None],
        };
        let blocks = config.mask == MaskKind::Blocks;
        let rows = blocks.then(|| ["rows", "runs"].map(pointer));
        let query_rows = (blocks && config.own_dq).then(|| ["query_rows", "query_runs"].map(pointer));
        let mask_tables = tables(k, "mask", &config.mask_program);
        let score_tables = tables(k, "score", &config.score_mod);
        // Of one table several elements may be read.
        let count = config.table_grads.iter().map(|grad| grad.table + 1).max().unwrap_or(0);
        let mut table_sums = Vec::new();
        let given: Vec<TableArgs<'_>> = (0..count)
            .map(|i| {
                let grad = config.table_grads.iter().find(|grad| grad.table == i);
                let given = table(k, &format!("d_table{i}"), &grad.map_or([false; 4], |grad| grad.shape));
                if !grad.is_some_and(|grad| grad.exact) {
                    return given;
                }
                let data = pointer(&format!("d_table{i}_sums"));
                let sums = TableArgs { data, bytes: superaccumulator::BYTES, ..given };
                table_sums.push((sums, given.data));
                sums
            })
            .collect();
        let table_grads = config.table_grads.iter().map(|grad| given[grad.table]).collect();
        let dropout = config.dropout.then(|| Dropout::param(k));
        let cu_seqlens = config.varlen.then(|| ["cu_seqlens_q", "cu_seqlens_k"].map(pointer));
        Params {
            maps,
            q,
            k: keys,
            v,
            o,
            d_o,
            dq,
            dk,
            dv,
            lse,
            d_lse,
            lse_strides,
            dq_sums,
            turns,
            stats,
            counter,
            sinks,
            seqlen_q,
            seqlen_k,
            heads_q,
            heads_kv,
            batch,
            head_group,
            tiles,
            scale,
            band,
            rows,
            query_rows,
            mask_tables,
            score_tables,
            table_grads,
            table_sums,
            dropout,
            cu_seqlens,
        }
    }
}

fn table<'k>(k: &'k Builder, name: &str, shape: &TableShape) -> TableArgs<'k> {
    TableArgs {
        data: k.param_ptr(name),
        bytes: 4,
        dims: [0, 1, 2, 3].map(|d| shape[d].then(|| k.param_u32(&format!("{name}_dim{d}")))),
    }
}

fn tables<'k>(k: &'k Builder, of: &str, program: &Option<(Program, Vec<TableShape>)>) -> Vec<TableArgs<'k>> {
    let shapes = program.iter().flat_map(|(_, shapes)| shapes).enumerate();
    shapes.map(|(i, shape)| table(k, &format!("{of}_table{i}"), shape)).collect()
}

/// Shared memory and barriers of the main kernel.
struct Shared<'k> {
    pub k: Address<'k, u32>,
    pub v: Address<'k, u32>,
    pub q: Address<'k, u32>,
    pub d_o: Address<'k, u32>,
    /// dSᵀ by stage, so that one can be written while the other warpgroup still reads the one before; and Pᵀ, with
    /// [`Split::Columns`].
    pub ds: Address<'k, u32>,
    pub p: Address<'k, u32>,
    /// dQ' by warp, if it is added up.
    pub dq: Address<'k, u32>,
    /// Stats by stage of Q.
    pub stats: Address<'k, u32>,
    /// The item at hand and the next.
    pub item: Address<'k, u32>,
    /// For each stage of Q which block it is: m_block (bit 31: seen in part), query head, tile, 0.
    pub block: Address<'k, u32>,
    /// Told ahead of K, so that V and dO come at the same time.
    pub item_pipeline: Pipeline<'k>,
    pub k_pipeline: Pipeline<'k>,
    pub v_pipeline: Pipeline<'k>,
    pub q_pipeline: Pipeline<'k>,
    pub do_pipeline: Pipeline<'k>,
    /// Of dQ', a stage for each warpgroup, if blocks take turns: *full* says that there is room for it, *empty* that it is there.
    pub dq_pipeline: Pipeline<'k>,
}

impl<'k> Shared<'k> {
    /// Bytes of an item.
    const ITEM_BYTES: u32 = 48;

    fn new(k: &'k Builder, config: &BwdConfig) -> Self {
        let (align, warps, stages) = (TileLayout::ALIGN, 4 * CONSUMERS, config.stages);
        let [ds, p] = config.scores_copies().map(|copies| copies * config.scores().bytes());
        // Of gradients shared out K is one warpgroup's, V the other's.
        let kv_warps = if config.split == Split::Gradients { 4 } else { warps };
        let adders = if config.turns { CONSUMERS } else { 0 };
        let dq_bytes = if config.own_dq { 0 } else { warps * config.dq_warp_bytes() };
        Shared {
            k: k.shared("k", config.k().bytes(), align),
            v: k.shared("v", config.v().bytes(), align),
            q: k.shared("q", config.q().bytes() * stages, align),
            d_o: k.shared("do", config.d_o().bytes() * config.do_stages, align),
            ds: k.shared("ds", ds, align),
            p: k.shared("p", p, align),
            dq: k.shared("dq", dq_bytes, 128),
            stats: k.shared("stats", config.stats_bytes() * stages, 128),
            item: k.shared("item", 2 * Self::ITEM_BYTES, 16),
            block: k.shared("block", 16 * stages, 16),
            item_pipeline: Pipeline::new(k, "item", 2, warps + 1 + adders, 1),
            k_pipeline: Pipeline::new(k, "k", 1, kv_warps, 1),
            v_pipeline: Pipeline::new(k, "v", 1, kv_warps, 1),
            q_pipeline: Pipeline::new(k, "q", stages, warps, 1),
            do_pipeline: Pipeline::new(k, "do", config.do_stages, warps, 1),
            dq_pipeline: Pipeline::new(k, "dq", adders, 4, 1),
        }
    }
}

/// The main kernel for tensors of bf16 or f16; see the file's header. Grid: as many blocks as run at once.
pub fn flash_bwd_sm90(config: &BwdConfig) -> Kernel {
    match config.element {
        Element::F16 => emit::<F16x2>(config),
        _ => emit::<BF16x2>(config),
    }
}

/// The kernel before it: stats, zeros. Grid: a block for each (m_block, head, sequence).
pub fn flash_bwd_sm90_preprocess(config: &BwdConfig) -> Kernel {
    match config.element {
        Element::F16 => preprocess::emit::<F16x2>(config),
        _ => preprocess::emit::<BF16x2>(config),
    }
}

/// The kernel after it: dQ, from its sums or by itself. Grid: a block for each (m_block, head, sequence); or as many blocks as run
/// at once.
pub fn flash_bwd_sm90_queries(config: &BwdConfig) -> Kernel {
    match (config.element, config.own_dq) {
        (Element::F16, true) => queries::emit::<F16x2>(config),
        (Element::F16, false) => postprocess::emit::<F16x2>(config),
        (_, true) => queries::emit::<BF16x2>(config),
        (_, false) => postprocess::emit::<BF16x2>(config),
    }
}

fn emit<H: Half>(config: &BwdConfig) -> Kernel {
    build(&config.name(""), Target::Sm90a, 128 * (1 + CONSUMERS), |k| {
        let params = Params::new(k, config);
        let shared = Shared::new(k, config);
        let work = Work::new(k, config, &params);
        k.if_(k.tid(0).eq(0), || {
            shared.item_pipeline.init(k);
            for pipeline in [shared.k_pipeline, shared.v_pipeline, shared.q_pipeline, shared.do_pipeline] {
                pipeline.init(k);
            }
            shared.dq_pipeline.init(k);
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
                k.if_(warp.eq(0) & one, || work.load(&shared, Loads::Queries));
                k.if_(warp.eq(1) & one, || work.load(&shared, Loads::Gradients));
                if let (Some(sums), Some(turns)) = (params.dq_sums, params.turns) {
                    k.if_(warp.ge(2) & one, || work.add_in_turn(&shared, [sums, turns], warp - 2));
                }
            },
            || {
                k.raise_registers(many);
                Consumer::<H>::new(&work, &shared, warp).run();
            },
        );
    })
}
