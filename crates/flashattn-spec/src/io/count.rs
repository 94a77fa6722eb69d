//! The counting itself: one function for each algorithm and pass, each a list of what is read and written.

use super::{Device, Flops, LoopOrder, TensorTraffic};
use crate::blocks::{BlockKind, BlockSchedule};
use crate::expr::{Node, Program, Table, Traced, Var};
use crate::mask::Mask;
use crate::problem::{AttentionProblem, ProblemError};
use crate::score_mod::ScoreMod;
use std::collections::BTreeMap;

/// Row statistics and accumulators are f32.
const F32: u128 = 4;
/// A materialised dropout mask has a byte for each score.
const DROPOUT_MASK: u128 = 1;
/// Tables are f32 or i32.
const TABLE: u128 = 4;

/// The tables of a score mod or a mask.
#[derive(Default)]
struct Tables {
    /// Bytes of all of them.
    bytes: u128,
    /// Bytes of those that the derivative with respect to the score reads.
    in_derivative: u128,
    loads: Loads,
    /// Bytes of those that want a gradient, and the loads from them.
    grad_bytes: u128,
    grad_loads: Loads,
}

impl Tables {
    fn new(traced: &Option<Traced>, is_score_mod: bool) -> Result<Self, ProblemError> {
        let Some(Traced { expr, tables, .. }) = traced else { return Ok(Self::default()) };
        let bytes_of = |wanted: &dyn Fn(usize, &Table) -> bool| -> u128 {
            let wanted = tables.iter().enumerate().filter(|(slot, table)| wanted(*slot, table));
            wanted.map(|(_, table)| table.data().len() as u128 * TABLE).sum()
        };
        let in_derivative = if is_score_mod {
            let derivative = expr.d_score().map_err(crate::score_mod::ScoreModError::from)?;
            let read = |slot| {
                let reads = |node: &Node| matches!(node, Node::Load { table, .. } if table.index() == slot);
                derivative.nodes().iter().any(reads)
            };
            bytes_of(&|slot, _| read(slot))
        } else {
            0
        };
        Ok(Tables {
            bytes: bytes_of(&|_, _| true),
            in_derivative,
            loads: Loads::of(expr, tables, |_| true),
            grad_bytes: bytes_of(&|_, table| table.wants_grad()),
            grad_loads: Loads::of(expr, tables, Table::wants_grad),
        })
    }
}

/// How many elements of tables a tile loads: each load of the expression is one for each score, or for each row, each
/// column or only the tile if that is all that its place in the table depends on.
#[derive(Clone, Copy, Default)]
struct Loads {
    per_score: u128,
    per_row: u128,
    per_column: u128,
    per_tile: u128,
}

impl Loads {
    fn of(program: &Program, tables: &[Table], wanted: impl Fn(&Table) -> bool) -> Self {
        let mut loads = Loads::default();
        for node in program.nodes() {
            let &Node::Load { table, index } = node else { continue };
            let Some(table) = tables.get(table.index()).filter(|table| wanted(table)) else { continue };
            // A dimension of 1 accepts any index.
            let places = || index.iter().zip(table.dims()).filter(|(_, dim)| *dim > 1);
            let on = |var| places().any(|(node, _)| program.deps()[node.index()].contains(var));
            let on_score = places().any(|(node, _)| program.deps()[node.index()].contains_score());
            let count = match (on(Var::Q), on(Var::Kv)) {
                _ if on_score => &mut loads.per_score,
                (true, true) => &mut loads.per_score,
                (true, false) => &mut loads.per_row,
                (false, true) => &mut loads.per_column,
                (false, false) => &mut loads.per_tile,
            };
            *count += 1;
        }
        loads
    }

    /// Bytes of these loads in some tiles.
    fn bytes(&self, tiles: &Tiles) -> u128 {
        TABLE
            * (self.per_score * tiles.scores
                + self.per_row * tiles.rows
                + self.per_column * tiles.columns
                + self.per_tile * tiles.tiles)
    }
}

/// The sizes of a problem, over all sequences and heads.
pub(super) struct Shape {
    /// Bytes of an element.
    size: u128,
    d: u128,
    dv: u128,
    /// Rows of Q.
    rows: u128,
    /// Rows of K and V.
    kv_rows: u128,
    /// Elements of S.
    pub scores: u128,
    /// Heads that stream K and V, over all sequences.
    kv_heads: u128,
    /// The longest sequence's rows of Q that go with one KV head, and of K.
    longest: (u128, u128),
    /// 1 if the problem has it, to be multiplied with.
    masked: u128,
    modded: u128,
    dropout: u128,
    score_mod: Tables,
    mask: Tables,
}

impl Shape {
    pub fn new(problem: &AttentionProblem) -> Result<Self, ProblemError> {
        let lowered = problem.lower()?;
        let wide = |x: usize| x as u128;
        let scores: u128 = match &problem.varlen {
            Some(_) => (0..problem.batch)
                .map(|b| problem.sequence(b))
                .map(|s| wide(s.seqlen_q) * wide(s.seqlen_k))
                .sum(),
            None => wide(problem.batch) * wide(problem.seqlen_q) * wide(problem.seqlen_k),
        };
        Ok(Shape {
            score_mod: Tables::new(&lowered.score_mod, true)?,
            mask: Tables::new(&lowered.mask, false)?,
            size: wide(problem.dtype.size()),
            d: wide(problem.head_dim),
            dv: wide(problem.head_dim_v),
            rows: wide(problem.total_q()) * wide(problem.heads_q),
            kv_rows: wide(problem.total_k()) * wide(problem.heads_kv),
            scores: scores * wide(problem.heads_q),
            kv_heads: wide(problem.batch) * wide(problem.heads_kv),
            longest: (wide(problem.seqlen_q) * wide(problem.group()), wide(problem.seqlen_k)),
            masked: u128::from(!matches!(problem.mask, Mask::Full)),
            modded: u128::from(!matches!(problem.score_mod, ScoreMod::None)),
            dropout: u128::from(problem.dropout.is_some()),
        })
    }
}

/// What has been counted so far.
#[derive(Default)]
pub(super) struct Tally {
    pub flops: Flops,
    pub tensors: Vec<TensorTraffic>,
    /// Most extra memory at a time.
    pub extra: u128,
}

impl Tally {
    fn add(&mut self, name: &'static str, read: u128, written: u128) {
        self.add_cached(name, read, written, 0);
    }

    fn add_cached(&mut self, name: &'static str, read: u128, written: u128, cached: u128) {
        match self.tensors.iter_mut().find(|t| t.name == name) {
            Some(t) => {
                t.read += read;
                t.written += written;
                t.cached += cached;
            }
            None if read + written > 0 => self.tensors.push(TensorTraffic { name, read, written, cached }),
            None => {}
        }
    }

    fn need(&mut self, extra: u128) {
        self.extra = self.extra.max(extra);
    }

    /// All score-sized matrices fit the shared cache: none of them need ever reach slow memory.
    pub fn cache_scores(&mut self) {
        for t in &mut self.tensors {
            if matches!(t.name, "S" | "P" | "dropped P" | "dropout mask" | "dP" | "dS") {
                t.cached = t.read + t.written;
            }
        }
    }
}

/// Some tiles, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tiles {
    pub scores: u128,
    /// Rows of Q, once for each tile that they are part of.
    pub rows: u128,
    /// Rows of K, once for each tile (and each query head).
    columns: u128,
    tiles: u128,
}

impl Tiles {
    fn add(&mut self, other: Tiles) {
        self.scores += other.scores;
        self.rows += other.rows;
        self.columns += other.columns;
        self.tiles += other.tiles;
    }

    fn map(&mut self, f: impl Fn(u128) -> u128) {
        for x in [&mut self.scores, &mut self.rows, &mut self.columns, &mut self.tiles] {
            *x = f(*x);
        }
    }
}

/// How often a schedule touches rows, over all sequences and heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Visits {
    /// All that are computed.
    pub all: Tiles,
    /// Those in which the mask is evaluated.
    partial: Tiles,
    /// Rows of K, once for each tile (of packed heads: once for all of them).
    pub kv: u128,
    /// Rows of Q that are part of any tile.
    pub q_once: u128,
    /// Rows of K that are part of any tile, once for all query heads that share them.
    pub kv_once: u128,
    /// Q blocks of the longest sequence that go with one KV head, and KV blocks.
    pub blocks: (u128, u128),
}

impl Visits {
    /// `packed` is how many query heads share the reading of K and V.
    pub fn count(problem: &AttentionProblem, schedule: &BlockSchedule, packed: usize) -> Self {
        let mut sum = Visits::default();
        if problem.batch > 0 && schedule.distinct() == 1 {
            // All sequences and heads are alike.
            sum.add_kv_head(problem, schedule, packed, 0, 0);
            let times = problem.batch as u128 * problem.heads_kv as u128;
            sum.all.map(|x| x * times);
            sum.partial.map(|x| x * times);
            for x in [&mut sum.kv, &mut sum.q_once, &mut sum.kv_once] {
                *x *= times;
            }
        } else {
            for batch in 0..problem.batch {
                for kv_head in 0..problem.heads_kv {
                    sum.add_kv_head(problem, schedule, packed, batch, kv_head);
                }
            }
        }
        let blocks = |n: usize, tile: usize| n.div_ceil(tile.max(1)) as u128;
        sum.blocks = (
            blocks(problem.seqlen_q, schedule.tile_m()) * (problem.group() / packed.max(1)) as u128,
            blocks(problem.seqlen_k, schedule.tile_n()),
        );
        sum
    }

    fn add_kv_head(
        &mut self,
        problem: &AttentionProblem,
        schedule: &BlockSchedule,
        packed: usize,
        batch: usize,
        kv_head: usize,
    ) {
        let sequence = problem.sequence(batch);
        let (tile_m, tile_n) = (schedule.tile_m(), schedule.tile_n());
        let n_blocks = schedule.n_blocks(batch);
        // How many runs cover each KV block, as differences between neighbours.
        let mut cover: BTreeMap<usize, i64> = BTreeMap::new();
        for member in 0..problem.group() {
            for (m_blocks, runs) in schedule.rows(batch, kv_head * problem.group() + member) {
                let rows = ((m_blocks.end * tile_m).min(sequence.seqlen_q) - m_blocks.start * tile_m) as u128;
                let m_tiles = m_blocks.len() as u128;
                for run in runs {
                    let keys = ((run.n_block_max * tile_n).min(sequence.seqlen_k) - run.n_block_min * tile_n)
                        as u128;
                    let n_tiles = run.n_blocks().len() as u128;
                    let tiles = Tiles {
                        scores: rows * keys,
                        rows: rows * n_tiles,
                        columns: m_tiles * keys,
                        tiles: m_tiles * n_tiles,
                    };
                    self.all.add(tiles);
                    if run.kind == BlockKind::Partial {
                        self.partial.add(tiles);
                    }
                    if member % packed == 0 {
                        self.kv += m_tiles * keys;
                    }
                    *cover.entry(run.n_block_min).or_default() += 1;
                    *cover.entry(run.n_block_max).or_default() -= 1;
                }
                if !runs.is_empty() {
                    self.q_once += rows;
                }
            }
        }
        let (mut depth, mut from) = (0, 0);
        for (n_block, change) in cover {
            if depth > 0 {
                debug_assert!(n_block <= n_blocks);
                self.kv_once += ((n_block * tile_n).min(sequence.seqlen_k) - from * tile_n) as u128;
            }
            depth += change;
            from = n_block;
        }
    }

    /// Only this fraction of the tiles. Rows that any tile may need still count once.
    pub fn scaled(mut self, density: f64) -> Self {
        if density < 1.0 {
            let part = |x: u128| (x as f64 * density).round() as u128;
            self.all.map(part);
            self.partial.map(part);
            self.kv = part(self.kv);
        }
        self
    }
}

pub(super) fn standard_forward(s: &Shape, t: &mut Tally) {
    let matrix = s.scores * s.size;
    // QKᵀ, score mod, mask, softmax, dropout, PV; each line below is a tensor.
    t.add("q", s.rows * s.d * s.size, 0);
    t.add("k", s.kv_rows * s.d * s.size, 0);
    let passes = s.modded + s.masked;
    t.add("S", matrix * (passes + 1), matrix * (1 + passes));
    t.add("score mod tables", s.score_mod.bytes, 0);
    t.add("mask tables", s.mask.bytes, 0);
    t.add("P", matrix, matrix);
    t.add("dropout mask", 0, s.dropout * s.scores * DROPOUT_MASK);
    t.add("dropped P", s.dropout * matrix, s.dropout * matrix);
    t.add("v", s.kv_rows * s.dv * s.size, 0);
    t.add("o", 0, s.rows * s.dv * s.size);

    t.flops.qk += 2 * s.scores * s.d;
    t.flops.pv += 2 * s.scores * s.dv;
    // Scale; maximum, subtraction, exponential, sum, division; dropout's factor.
    t.flops.elementwise += s.scores * (1 + s.modded + s.masked + 5 + s.dropout);
    // A matrix and the one made from it; with dropout P, the dropped P and the dropout mask.
    t.need(2 * matrix + s.dropout * s.scores * DROPOUT_MASK);
}

pub(super) fn standard_backward(s: &Shape, t: &mut Tally) {
    let matrix = s.scores * s.size;
    let (q, k) = (s.rows * s.d * s.size, s.kv_rows * s.d * s.size);
    let (o, v) = (s.rows * s.dv * s.size, s.kv_rows * s.dv * s.size);
    // dV = Pᵀ dO; dP = dO Vᵀ; through dropout; through softmax, P ∘ (dP − rowsum(P ∘ dP)); through the score
    // mod, which reads S again; dQ = dS K; dK = dSᵀ Q. The mask needs no step: where it hides, P and so dS is
    // 0.
    t.add("do", 2 * o, 0);
    t.add("P", matrix * (2 - s.dropout), 0);
    t.add("dropped P", s.dropout * matrix, 0);
    t.add("dv", 0, v);
    t.add("v", v, 0);
    t.add("dropout mask", s.dropout * s.scores * DROPOUT_MASK, 0);
    t.add("dP", matrix * (1 + s.dropout), matrix * (1 + s.dropout));
    t.add("S", s.modded * matrix, 0);
    t.add("score mod tables", s.score_mod.in_derivative, 0);
    t.add("gradients of tables", 0, s.score_mod.grad_bytes);
    t.add("dS", matrix * (2 + s.modded), matrix * (1 + s.modded));
    t.add("k", k, 0);
    t.add("dq", 0, q);
    t.add("q", q, 0);
    t.add("dk", 0, k);

    for (product, width) in
        [(&mut t.flops.dv, s.dv), (&mut t.flops.dp, s.dv), (&mut t.flops.dq, s.d), (&mut t.flops.dk, s.d)]
    {
        *product += 2 * s.scores * width;
    }
    // Dropout's factor; product, sum, subtraction, product; score mod; scale.
    t.flops.elementwise += s.scores * (s.dropout + 4 + s.modded + 1);
    // P, dP and dS; with dropout P, the dropped P, its gradient, and dP in the place of dS; S if a score mod
    // needs it.
    t.need(matrix * (3 + s.modded) + s.dropout * s.scores * DROPOUT_MASK);
}

/// How many bytes of `total` the shared cache can serve, of a stream that needs `once` at least: all the rest
/// if the `working_set` of all processors fits, else as far as `sharers` walk side by side.
fn cached(device: &Device, total: u128, once: u128, working_set: u128, sharers: u128) -> u128 {
    let cache = u128::from(device.shared_cache_bytes);
    let slow = match (cache, working_set <= cache) {
        (0, _) => total,
        (_, true) => once,
        (_, false) => once.max(total.div_ceil(sharers.max(1))),
    };
    total.saturating_sub(slow)
}

/// What the expressions of score mod and mask load, the mask's in partial tiles only.
fn load_tables(s: &Shape, visits: &Visits, device: &Device, t: &mut Tally) {
    for (name, tables, tiles) in
        [("score mod tables", &s.score_mod, &visits.all), ("mask tables", &s.mask, &visits.partial)]
    {
        let read = tables.loads.bytes(tiles);
        t.add_cached(name, read, 0, cached(device, read, tables.bytes.min(read), tables.bytes, 1));
    }
}

pub(super) fn flash_forward(s: &Shape, visits: &Visits, order: LoopOrder, device: &Device, t: &mut Tally) {
    let units = device.units.max(1) as u128;
    load_tables(s, visits, device, t);
    // Scale; maximum, subtraction, exponential, sum; dropout's factor.
    let per_score = 1 + s.modded + s.masked + 4 + s.dropout;
    let (per_visit, per_row);
    match order {
        LoopOrder::KvOuter => {
            // Heads run side by side, the blocks of a head one after the other: what a head revisits is Q, O,
            // ℓ, m.
            let working_set = units.min(s.kv_heads) * s.longest.0 * ((s.d + s.dv) * s.size + 2 * F32);
            let serve = |total, once| cached(device, total, once, working_set, 1);
            let (q, q_once) = (visits.all.rows * s.d * s.size, visits.q_once * s.d * s.size);
            t.add_cached("q", q, 0, serve(q, q_once));
            t.add("k", visits.kv_once * s.d * s.size, 0);
            t.add("v", visits.kv_once * s.dv * s.size, 0);
            // O = 0, ℓ = 0, m = −∞ are written first (line 2).
            for (name, width) in [("o", s.dv * s.size), ("l", F32), ("m", F32)] {
                let (read, written) = (visits.all.rows * width, (visits.all.rows + s.rows) * width);
                t.add_cached(name, read, written, serve(read + written, s.rows * width));
            }
            t.need(s.rows * 2 * F32);
            // Lines 11 and 12: new m (1), two factors (4), new ℓ (3), the old O's and the new one's
            // coefficient (2).
            (per_visit, per_row) = (10 + 3 * s.dv, 0);
        }
        LoopOrder::QOuter => {
            let heads = units.div_ceil(visits.blocks.0.max(1)).min(s.kv_heads);
            let working_set = heads * s.longest.1 * (s.d + s.dv) * s.size;
            t.add("q", visits.q_once * s.d * s.size, 0);
            for (name, width) in [("k", s.d * s.size), ("v", s.dv * s.size)] {
                let (total, once) = (visits.kv * width, visits.kv_once * width);
                let served = cached(device, total, once, working_set, units.min(visits.blocks.0));
                t.add_cached(name, total, 0, served);
            }
            t.add("o", 0, s.rows * s.dv * s.size);
            t.add("lse", 0, s.rows * F32);
            t.need(s.rows * F32);
            // Factor e^(m − m') (2), ℓ (2), O; and at the end O/ℓ and lse = m + log ℓ.
            (per_visit, per_row) = (4 + s.dv, 2 + s.dv);
        }
    }
    t.flops.qk += 2 * visits.all.scores * s.d;
    t.flops.pv += 2 * visits.all.scores * s.dv;
    t.flops.elementwise += visits.all.scores * per_score + visits.all.rows * per_visit + s.rows * per_row;
}

pub(super) fn flash_backward(s: &Shape, visits: &Visits, order: LoopOrder, device: &Device, t: &mut Tally) {
    let units = device.units.max(1) as u128;
    load_tables(s, visits, device, t);
    // Zeroed first, then added to.
    let (read, size) = (s.score_mod.grad_loads.bytes(&visits.all), s.score_mod.grad_bytes);
    let (total, once) = (2 * read + size, size);
    t.add_cached("gradients of tables", read, read + size, cached(device, total, once, size, 1));
    // Both orders keep a block of K and V (and dK, dV) and walk the rows of Q.
    t.add("k", visits.kv_once * s.d * s.size, 0);
    t.add("v", visits.kv_once * s.dv * s.size, 0);
    t.add("dk", 0, s.kv_rows * s.d * s.size);
    t.add("dv", 0, s.kv_rows * s.dv * s.size);

    // Scale, score mod, mask, subtraction, exponential; dropout of P and of dP; dP − D, times P; score mod;
    // scale.
    let per_score = 1 + s.modded + s.masked + 2 + 2 * s.dropout + 2 + s.modded + 1;
    let (divisions, per_visit, per_row);
    match order {
        LoopOrder::KvOuter => {
            let streams =
                [("q", s.d * s.size), ("o", s.dv * s.size), ("do", s.dv * s.size), ("l", F32), ("m", F32)];
            let accumulator = s.d * s.size;
            let width = streams.iter().map(|(_, width)| width).sum::<u128>() + accumulator;
            let working_set = units.min(s.kv_heads) * s.longest.0 * width;
            let serve = |total, once| cached(device, total, once, working_set, 1);
            for (name, width) in streams {
                t.add_cached(
                    name,
                    visits.all.rows * width,
                    0,
                    serve(visits.all.rows * width, visits.q_once * width),
                );
            }
            // dQ = 0 is written first.
            let (read, written) = (visits.all.rows * accumulator, (visits.all.rows + s.rows) * accumulator);
            t.add_cached("dq", read, written, serve(read + written, s.rows * accumulator));
            t.need(s.rows * 2 * F32);
            // P = e^(S − m)/ℓ for each score; D = rowsum(dO ∘ O) and the sum into dQ at each visit.
            (divisions, per_visit, per_row) = (1, 2 * s.dv + s.d, 0);
        }
        LoopOrder::QOuter => {
            let heads = units.div_ceil(visits.blocks.1.max(1)).min(s.kv_heads);
            // f32 problems accumulate in dq itself.
            let separate = s.size < F32;
            let accumulator = s.d * F32.max(s.size);
            let streams = [("q", s.d * s.size), ("do", s.dv * s.size), ("lse", F32), ("D", F32)];
            let width = streams.iter().map(|(_, width)| width).sum::<u128>() + accumulator;
            let working_set = heads * s.longest.0 * width;
            let sharers = units.min(visits.blocks.1);
            let serve = |total, once| cached(device, total, once, working_set, sharers);
            // D = rowsum(dO ∘ O) beforehand.
            t.add("o", s.rows * s.dv * s.size, 0);
            t.add("do", s.rows * s.dv * s.size, 0);
            t.add("D", 0, s.rows * F32);
            for (name, width) in streams {
                t.add_cached(
                    name,
                    visits.all.rows * width,
                    0,
                    serve(visits.all.rows * width, visits.q_once * width),
                );
            }
            // Zeroed, added to at each visit, and rounded to the element type at the end.
            let (mut read, written) =
                (visits.all.rows * accumulator, (visits.all.rows + s.rows) * accumulator);
            let name = if separate { "dq (f32)" } else { "dq" };
            let mut once = s.rows * accumulator;
            if separate {
                read += s.rows * accumulator;
                once += s.rows * accumulator;
                t.add("dq", 0, s.rows * s.d * s.size);
            }
            t.add_cached(name, read, written, serve(read + written, once));
            t.need(s.rows * (2 * F32 + if separate { accumulator } else { 0 }));
            (divisions, per_visit, per_row) = (0, s.d, 2 * s.dv);
        }
    }
    for (product, width) in [
        (&mut t.flops.qk_again, s.d),
        (&mut t.flops.dv, s.dv),
        (&mut t.flops.dp, s.dv),
        (&mut t.flops.dq, s.d),
        (&mut t.flops.dk, s.d),
    ] {
        *product += 2 * visits.all.scores * width;
    }
    t.flops.elementwise +=
        visits.all.scores * (per_score + divisions) + visits.all.rows * per_visit + s.rows * per_row;
}
