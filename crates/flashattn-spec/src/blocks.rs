//! [`BlockSchedule`]: which tiles of the score matrix a mask hides, shows whole, or cuts.
//!
//! The score matrix of each (sequence, head) is cut into tiles of `tile_m` queries by `tile_n` keys. A tile that is
//! hidden is never loaded nor computed, which is where causal attention gets its factor of two and block-sparse
//! attention its IO complexity Θ(Nd + N²d²s/M), s being the fraction of visible tiles (arXiv 2205.14135,
//! Proposition 4); in a tile that is wholly visible the mask need not be evaluated.
//!
//! # Algorithm
//!
//! ```text
//! for each class of (sequence, head) that the mask cannot tell apart:
//!     split(all rows, [all columns])
//! split(rows, columns still undecided, columns decided):
//!     halve each undecided range of columns, bounding the mask over rows × range (interval analysis),
//!         until it is decided (hidden, whole) or no wider than the rows are high
//!     if rows is one tile: look closer at the tiles that are undecided    (`settle`)
//!     else: split(upper half of rows, …), split(lower half of rows, …)
//! ```
//!
//! So a mask with few edges costs little more than its edges are long, and rows come out in order, as runs.
//! What intervals cannot decide is taken in part, which is always correct: a run is never whole if any of its
//! elements is hidden, and a tile is never skipped if any is visible.

use crate::expr::{Block, Bounder, Env, Traced, Var};
use crate::problem::{AttentionProblem, MAX_INDEX, ProblemError, Sequence};
use std::collections::HashMap;
use std::ops::Range;

/// How a tile is visible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockKind {
    /// All its elements inside the sequence are visible: no masking work. The last tile of a row or column may
    /// reach past the end of the sequence; that part is not the mask's business, executors clamp to
    /// `seqlen_q` and `seqlen_k` themselves.
    Full,
    /// Some are, or it could not be told: the mask must be evaluated.
    Partial,
}

/// KV tiles next to each other of the same kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// First KV tile.
    pub n_block_min: usize,
    /// One past the last KV tile.
    pub n_block_max: usize,
    /// How they are visible.
    pub kind: BlockKind,
}

impl Run {
    /// The KV tiles.
    pub fn n_blocks(&self) -> Range<usize> {
        self.n_block_min..self.n_block_max
    }
}

/// How many tiles there are of each kind, over all sequences and query heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// Tiles with nothing visible.
    pub skipped: u64,
    /// Tiles taken whole.
    pub full: u64,
    /// Tiles taken in part.
    pub partial: u64,
}

impl BlockCounts {
    /// All tiles.
    pub fn total(&self) -> u64 {
        self.skipped.saturating_add(self.visible())
    }

    /// Tiles that must be computed.
    pub fn visible(&self) -> u64 {
        self.full.saturating_add(self.partial)
    }

    /// The fraction of tiles that must be computed (s in Proposition 4); 0 if there are none at all.
    pub fn density(&self) -> f64 {
        if self.total() == 0 {
            return 0.0;
        }
        self.visible() as f64 / self.total() as f64
    }
}

/// The visible tiles of a problem. See the module's documentation.
#[derive(Clone, Debug)]
pub struct BlockSchedule {
    tile_m: usize,
    tile_n: usize,
    batch: usize,
    heads_q: usize,
    classes: Vec<Class>,
    /// The class of (sequence, head): `[batch or 1, heads_q or 1]`, 1 if the mask cannot tell them apart.
    class_of: Vec<u32>,
    sequences_differ: bool,
    heads_differ: bool,
}

/// The tiles of all (sequence, head) that the mask cannot tell apart.
#[derive(Clone, Debug)]
struct Class {
    m_blocks: usize,
    n_blocks: usize,
    /// Row m is `runs[starts[m]..starts[m + 1]]`; without a mask there are no starts, and each row is `runs`.
    starts: Vec<usize>,
    runs: Vec<Run>,
}

impl Class {
    fn row(&self, m_block: usize) -> &[Run] {
        match (self.starts.get(m_block), self.starts.get(m_block + 1)) {
            (Some(&from), Some(&to)) => &self.runs[from..to],
            _ if self.starts.is_empty() && m_block < self.m_blocks => &self.runs,
            _ => &[],
        }
    }

    fn counts(&self) -> BlockCounts {
        let rows = if self.starts.is_empty() { self.m_blocks as u64 } else { 1 };
        let count = |kind| -> u64 {
            let runs = self.runs.iter().filter(|r| r.kind == kind);
            rows * runs.map(|r| r.n_blocks().len() as u64).sum::<u64>()
        };
        let (full, partial) = (count(BlockKind::Full), count(BlockKind::Partial));
        let total = self.m_blocks as u64 * self.n_blocks as u64;
        BlockCounts { skipped: total - full - partial, full, partial }
    }

    /// What it counts of [`MAX_ENTRIES`].
    fn entries(&self) -> usize {
        self.starts.len() + self.runs.len()
    }
}

/// Rows and runs of a schedule, at most: about 800 MB. A causal mask gets there at some hundred million tokens; what
/// it keeps from happening is that sizes alone, without tensors of such sizes, take all memory.
const MAX_ENTRIES: usize = 1 << 25;

fn too_large(got: usize) -> ProblemError {
    ProblemError::TooLarge { name: "number of rows and runs of the block schedule", got, max: MAX_ENTRIES }
}

impl BlockSchedule {
    /// Finds the visible tiles of `tile_m` queries by `tile_n` keys.
    ///
    /// # Errors
    /// [`ProblemError::Zero`] if a tile size is 0, [`ProblemError::TooLarge`] if the schedule would need more than
    /// 2²⁵ rows and runs (without a mask it needs none, whatever the lengths), and whatever is wrong with the problem.
    pub fn new(problem: &AttentionProblem, tile_m: usize, tile_n: usize) -> Result<Self, ProblemError> {
        for (name, size) in [("tile_m", tile_m), ("tile_n", tile_n)] {
            if size == 0 {
                return Err(ProblemError::Zero { name });
            }
        }
        problem.validate()?;
        let mask = problem.mask.lower()?;
        let depends_on = |vars: &[Var]| {
            mask.as_ref().is_some_and(|mask| vars.iter().any(|&var| mask.expr.depends_on(var)))
        };
        // Without elements nothing differs, and a batch of any size costs nothing.
        let any = problem.seqlen_q > 0 && problem.seqlen_k > 0;
        let by_sequence = any && depends_on(&[Var::Batch, Var::QStart, Var::KvStart]);
        let heads_differ = any && depends_on(&[Var::Head]);
        let sequences_differ = by_sequence || problem.varlen.is_some();
        let sequences = if sequences_differ { problem.batch } else { problem.batch.min(1) };
        let heads = if heads_differ { problem.heads_q } else { 1 };
        let pairs = sequences.saturating_mul(heads);
        // Packed sequences of equal lengths may share rows, and without a mask there are none.
        let alike = problem.varlen.is_some() || mask.is_none();
        let rows = if alike { 1 } else { problem.seqlen_q.div_ceil(tile_m) + 1 };
        let needed = pairs.saturating_mul(rows);
        if needed > MAX_ENTRIES {
            return Err(too_large(needed));
        }

        let mut classes: Vec<Class> = Vec::new();
        let mut class_of = Vec::with_capacity(pairs);
        let mut entries = 0;
        let mut seen: HashMap<(usize, usize, usize), u32> = HashMap::new();
        for batch in 0..sequences {
            let sequence = problem.sequence(batch);
            for head in 0..heads {
                let lengths = (sequence.seqlen_q, sequence.seqlen_k, head);
                let known = if by_sequence { None } else { seen.get(&lengths) };
                let class = match known {
                    Some(&class) => class,
                    None => {
                        let left = MAX_ENTRIES - entries;
                        let (class, _) = Planner::plan(&mask, batch, head, &sequence, tile_m, tile_n, left)
                            .map_err(|needed| too_large(entries.saturating_add(needed)))?;
                        entries += class.entries();
                        classes.push(class);
                        let class = classes.len() as u32 - 1;
                        seen.insert(lengths, class);
                        class
                    }
                };
                class_of.push(class);
            }
        }
        let (batch, heads_q) = (problem.batch, problem.heads_q);
        Ok(BlockSchedule {
            tile_m,
            tile_n,
            batch,
            heads_q,
            classes,
            class_of,
            sequences_differ,
            heads_differ,
        })
    }

    /// Queries a tile.
    pub fn tile_m(&self) -> usize {
        self.tile_m
    }

    /// Keys a tile.
    pub fn tile_n(&self) -> usize {
        self.tile_n
    }

    fn class(&self, batch: usize, head: usize) -> Option<&Class> {
        if batch >= self.batch || head >= self.heads_q {
            return None;
        }
        let sequence = if self.sequences_differ { batch } else { 0 };
        let index = if self.heads_differ { sequence * self.heads_q + head } else { sequence };
        self.class_of.get(index).map(|&class| &self.classes[class as usize])
    }

    /// How many different patterns of tiles there are, over all (sequence, head).
    pub fn distinct(&self) -> usize {
        self.classes.len()
    }

    /// Rows of tiles (Q blocks) of a sequence; 0 if there is no such sequence.
    pub fn m_blocks(&self, batch: usize) -> usize {
        self.class(batch, 0).map_or(0, |class| class.m_blocks)
    }

    /// Columns of tiles (KV blocks) of a sequence; 0 if there is no such sequence.
    pub fn n_blocks(&self, batch: usize) -> usize {
        self.class(batch, 0).map_or(0, |class| class.n_blocks)
    }

    /// The visible KV tiles of one Q tile, as runs in ascending order that do not overlap; empty if it sees
    /// nothing (or does not exist).
    pub fn row(&self, batch: usize, head: usize, m_block: usize) -> &[Run] {
        self.class(batch, head).map_or(&[], |class| class.row(m_block))
    }

    /// All rows of tiles of (sequence, head), those that are alike and known to be as one.
    pub(crate) fn rows(&self, batch: usize, head: usize) -> impl Iterator<Item = (Range<usize>, &[Run])> {
        let class = self.class(batch, head);
        let (rows, step) =
            class.map_or((0, 1), |c| (c.m_blocks, if c.starts.is_empty() { c.m_blocks } else { 1 }));
        (0..rows).step_by(step.max(1)).map(move |m| (m..m + step, class.map_or(&[][..], |c| c.row(m))))
    }

    /// How a tile is visible; `None` if it is skipped (or does not exist).
    pub fn kind(&self, batch: usize, head: usize, m_block: usize, n_block: usize) -> Option<BlockKind> {
        kind_in(self.row(batch, head, m_block), n_block)
    }

    /// The same schedule seen from a KV tile: the Q tiles that see it, as ranges in ascending order with their kind,
    /// for loops that keep K and V in fast memory and stream Q (the paper's Algorithm 1 and the backward pass).
    /// Takes time proportional to the number of Q tiles.
    pub fn column(&self, batch: usize, head: usize, n_block: usize) -> Vec<(Range<usize>, BlockKind)> {
        let mut column: Vec<(Range<usize>, BlockKind)> = Vec::new();
        let Some(class) = self.class(batch, head) else { return column };
        for m in 0..class.m_blocks {
            match (kind_in(class.row(m), n_block), column.last_mut()) {
                (Some(kind), Some((range, last))) if range.end == m && *last == kind => range.end = m + 1,
                (Some(kind), _) => column.push((m..m + 1, kind)),
                (None, _) => {}
            }
        }
        column
    }

    /// How many tiles there are of each kind.
    pub fn counts(&self) -> BlockCounts {
        let each: Vec<BlockCounts> = self.classes.iter().map(Class::counts).collect();
        // A class stands for all sequences and all heads unless they differ.
        let sequences = if self.sequences_differ { 1 } else { self.batch as u64 };
        let heads = if self.heads_differ { 1 } else { self.heads_q as u64 };
        let add = |sum: u64, x: u64| sum.saturating_add(x.saturating_mul(sequences).saturating_mul(heads));
        self.class_of.iter().map(|&class| each[class as usize]).fold(BlockCounts::default(), |sum, x| {
            BlockCounts {
                skipped: add(sum.skipped, x.skipped),
                full: add(sum.full, x.full),
                partial: add(sum.partial, x.partial),
            }
        })
    }
}

fn kind_in(row: &[Run], n_block: usize) -> Option<BlockKind> {
    let run = row.get(row.partition_point(|run| run.n_block_max <= n_block))?;
    (run.n_block_min <= n_block).then_some(run.kind)
}

/// How a rectangle of the score matrix is visible, as far as known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cover {
    Hidden,
    Full,
    Unknown,
}

/// A range of columns on a band of rows.
#[derive(Clone, Debug)]
struct Piece {
    n: Range<usize>,
    cover: Cover,
}

/// Finds the tiles of one class.
struct Planner<'a> {
    bounder: Bounder<'a>,
    block: Block,
    sequence: Sequence,
    tile_m: usize,
    tile_n: usize,
    class: Class,
    /// How many rectangles were bounded.
    steps: usize,
    /// How many rectangles `settle` may bound for the next tile.
    patience: usize,
    /// [`Class::entries`], at most; planning stops when there are more.
    limit: usize,
}

/// The least that [`Planner::patience`] falls to.
const MIN_PATIENCE: usize = 8;

impl Planner<'_> {
    /// The tiles of one (sequence, head), and how many rectangles were bounded to find them; or, if the class has more
    /// than `limit` entries, how many it has at least.
    fn plan(
        mask: &Option<Traced>,
        batch: usize,
        head: usize,
        sequence: &Sequence,
        tile_m: usize,
        tile_n: usize,
        limit: usize,
    ) -> Result<(Class, usize), usize> {
        let m_blocks = sequence.seqlen_q.div_ceil(tile_m);
        let n_blocks = sequence.seqlen_k.div_ceil(tile_n);
        let mut class = Class { m_blocks, n_blocks, starts: Vec::new(), runs: Vec::new() };
        let Some(mask) = mask else {
            if n_blocks > 0 {
                class.runs.push(Run { n_block_min: 0, n_block_max: n_blocks, kind: BlockKind::Full });
            }
            return Ok((class, 0));
        };
        if m_blocks >= limit {
            return Err(m_blocks.saturating_add(1));
        }
        class.starts.push(0);
        // The problem is valid, so lengths, starts, batch and head fit i32.
        let block = Block::at(&Env {
            batch: batch as i32,
            head: head as i32,
            q: 0,
            kv: 0,
            seqlen_q: sequence.seqlen_q as i32,
            seqlen_k: sequence.seqlen_k as i32,
            q_start: sequence.q_start as i32,
            kv_start: sequence.kv_start as i32,
        });
        let bounder = Bounder::new(&mask.expr, &mask.tables);
        let mut planner = Planner {
            bounder,
            block,
            sequence: *sequence,
            tile_m,
            tile_n,
            class,
            steps: 0,
            patience: 0,
            limit,
        };
        planner.patience = planner.full_patience();
        if m_blocks > 0 {
            planner.split(0..m_blocks, vec![Piece { n: 0..n_blocks, cover: Cover::Unknown }]);
        }
        let entries = planner.class.entries();
        if entries > limit { Err(entries) } else { Ok((planner.class, planner.steps)) }
    }

    /// Enough for the edges of many short documents, and cheaper than computing a tile for nothing.
    fn full_patience(&self) -> usize {
        4 * (self.tile_m.min(MAX_INDEX) + self.tile_n.min(MAX_INDEX))
    }

    /// Bounds the mask over real queries × real keys (never empty).
    fn bound(&mut self, q: Range<usize>, kv: Range<usize>) -> Cover {
        self.steps += 1;
        self.block.q = (q.start as i32, q.end as i32 - 1);
        self.block.kv = (kv.start as i32, kv.end as i32 - 1);
        let visible = self.bounder.bounds(&self.block);
        if visible.is_never() {
            Cover::Hidden
        } else if visible.is_always() {
            Cover::Full
        } else {
            Cover::Unknown
        }
    }

    /// Queries and keys of a rectangle of tiles, as far as they exist.
    fn elements(&self, m: &Range<usize>, n: &Range<usize>) -> (Range<usize>, Range<usize>) {
        let q = m.start * self.tile_m..(m.end * self.tile_m).min(self.sequence.seqlen_q);
        (q, n.start * self.tile_n..(n.end * self.tile_n).min(self.sequence.seqlen_k))
    }

    /// Emits the rows `m`; `pieces` are what is known of them, in order.
    fn split(&mut self, m: Range<usize>, pieces: Vec<Piece>) {
        if self.class.entries() > self.limit {
            return;
        }
        let mut refined = Vec::with_capacity(pieces.len() + 4);
        for piece in pieces {
            match piece.cover {
                Cover::Unknown => self.refine(&m, piece.n, &mut refined),
                _ => push(&mut refined, piece),
            }
        }
        if m.len() == 1 || refined.iter().all(|piece| piece.cover != Cover::Unknown) {
            m.for_each(|m| self.emit(m, &refined));
            return;
        }
        let [upper, lower] = halves(&m);
        self.split(upper, refined.clone());
        self.split(lower, refined);
    }

    /// Decides columns `n` of the rows `m`, or cuts them until they are about as wide as the rows are high.
    fn refine(&mut self, m: &Range<usize>, n: Range<usize>, out: &mut Vec<Piece>) {
        if n.is_empty() {
            return;
        }
        let (q, kv) = self.elements(m, &n);
        let small = n.len() == 1 || (m.len() > 1 && kv.len() <= q.len());
        let cover = self.bound(q, kv);
        if cover != Cover::Unknown || small {
            push(out, Piece { n, cover });
            return;
        }
        for half in halves(&n) {
            self.refine(m, half, out);
        }
    }

    /// Appends row `m`.
    fn emit(&mut self, m: usize, pieces: &[Piece]) {
        let start = self.class.runs.len();
        for piece in pieces {
            let kind = match piece.cover {
                Cover::Hidden => continue,
                Cover::Full => BlockKind::Full,
                Cover::Unknown => match self.settle(m, piece.n.start) {
                    Some(kind) => kind,
                    None => continue,
                },
            };
            match self.class.runs[start..].last_mut() {
                Some(run) if run.kind == kind && run.n_block_max == piece.n.start => {
                    run.n_block_max = piece.n.end;
                }
                _ => {
                    let (n_block_min, n_block_max) = (piece.n.start, piece.n.end);
                    self.class.runs.push(Run { n_block_min, n_block_max, kind });
                }
            }
        }
        self.class.starts.push(self.class.runs.len());
    }

    /// Looks closer at one tile that intervals leave open. Mostly its corners already show that it has visible and
    /// hidden elements; else intervals are too wide (`a & b` where neither is certain, ids with gaps), and get
    /// narrower on smaller rectangles.
    fn settle(&mut self, m: usize, n: usize) -> Option<BlockKind> {
        let (q, kv) = self.elements(&(m..m + 1), &(n..n + 1));
        let mut seen = Seen::default();
        for q in [q.start, q.end - 1] {
            for kv in [kv.start, kv.end - 1] {
                seen.add(self.bound(q..q + 1, kv..kv + 1));
            }
        }
        let mut open = vec![(q, kv)];
        let give_up = self.steps + self.patience;
        while let Some((q, kv)) = open.pop() {
            // An element that stays open (a comparison of rounded floats) may be either.
            let element = q.len() == 1 && kv.len() == 1;
            if element || seen.is_partial() {
                return Some(BlockKind::Partial);
            }
            if self.steps >= give_up {
                // The mask is of a kind that intervals say little about: spend less on the next tile.
                self.patience = (self.patience / 2).max(MIN_PATIENCE);
                return Some(BlockKind::Partial);
            }
            // Halve the longer side, or the other if that decides more: a straight edge then takes few steps.
            let mut ways = [halves(&q).map(|q| (q, kv.clone())), halves(&kv).map(|kv| (q.clone(), kv))];
            if q.len() < kv.len() {
                ways.swap(0, 1);
            }
            let mut still_open: Option<Vec<_>> = None;
            for way in ways {
                if way.iter().any(|(q, kv)| q.is_empty() || kv.is_empty()) {
                    continue;
                }
                let mut unknown = Vec::new();
                for (q, kv) in way {
                    let cover = self.bound(q.clone(), kv.clone());
                    seen.add(cover);
                    if cover == Cover::Unknown {
                        unknown.push((q, kv));
                    }
                }
                if still_open.as_ref().is_none_or(|other| unknown.len() < other.len()) {
                    still_open = Some(unknown);
                }
            }
            open.extend(still_open.unwrap_or_default());
        }
        self.patience = self.full_patience();
        match (seen.visible, seen.hidden) {
            (true, true) => Some(BlockKind::Partial),
            (true, false) => Some(BlockKind::Full),
            (false, _) => None,
        }
    }
}

/// What has been seen in a tile so far.
#[derive(Default)]
struct Seen {
    visible: bool,
    hidden: bool,
}

impl Seen {
    fn add(&mut self, cover: Cover) {
        self.visible |= cover == Cover::Full;
        self.hidden |= cover == Cover::Hidden;
    }

    fn is_partial(&self) -> bool {
        self.visible && self.hidden
    }
}

fn halves(range: &Range<usize>) -> [Range<usize>; 2] {
    let middle = range.start + range.len() / 2;
    [range.start..middle, middle..range.end]
}

/// Appends a piece, as part of the last one if both are decided alike.
fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    match pieces.last_mut() {
        Some(last) if last.cover == piece.cover && piece.cover != Cover::Unknown => last.n.end = piece.n.end,
        _ => pieces.push(piece),
    }
}

#[cfg(test)]
mod tests;
