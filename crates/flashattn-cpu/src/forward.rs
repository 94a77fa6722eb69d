//! The forward pass on one tile of queries: Algorithm 1 of the paper with the loops of FlashAttention-2 (queries
//! outside, keys inside), so that O, the row maximum and the row sum stay in cache and are written once.
//!
//! ```text
//! for each chunk of keys that some panel of the tile sees:        (chunk: K and V prepared once for the tile)
//!     for each panel of queries:                                   (panel: as many as fit the registers)
//!         Sᵀ = K Qᵀ; Sᵀ = mask(score_mod(scale · Sᵀ))
//!         m' = max(m, rowmax S); P = exp(S − m'); l = l · exp(m − m') + rowsum P
//!         Oᵀ = Oᵀ · exp(m − m') + Vᵀ dropout(Pᵀ)
//! O = Oᵀ / l; lse = m + ln l
//! ```
//!
//! Departures: (1) exponentials are base 2, with log2(e) folded into the scale; `m` is kept in that base.
//! (2) Blocks that the schedule skips are never touched, and only partial blocks are masked. (3) Where V holds
//! Inf or NaN, a partial block is multiplied element by element, so that 0 · NaN of a hidden key reaches no row.

use crate::engine::{Engine, FusedStep, Late, LateProduct, Left, Rows, Shape, load};
use crate::gemm::Init;
use crate::memory::{Buffer, Shared};
use crate::mods::{Dropper, ScoreProgram, Scratch, Strip, Task as Modify};
use crate::simd::Simd;
use flashattn_spec::blocks::{BlockKind, BlockSchedule, Run};
use flashattn_spec::{AttentionProblem, Element, Inputs, Sequence};
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// What all tasks of a call share.
pub struct Context<'a, T> {
    /// The problem.
    pub problem: &'a AttentionProblem,
    /// Which keys a panel of queries visits; its `tile_m` is the panel.
    pub schedule: &'a BlockSchedule,
    /// Mask and score mod.
    pub program: &'a ScoreProgram,
    /// Dropout, if any.
    pub dropper: Option<Dropper>,
    /// q, k, v, sinks.
    pub inputs: Inputs<'a, T>,
    /// K and V of every chunk, where they are prepared once for all tiles.
    pub prepared: Option<Prepared>,
}

/// K and V of all sequences and KV heads, prepared in chunks.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Memory, and f32 slots of a chunk: K, then V.
    pub memory: Shared<f32>,
    /// See `memory`.
    pub chunk_len: usize,
    /// First chunk of each sequence's first head; a head's chunks follow one another.
    pub first_chunk: Vec<usize>,
}

impl Prepared {
    /// Where the chunk of `keys` first key `start` of (sequence, KV head) is.
    fn chunk(&self, batch: usize, kv_head: usize, seqlen_k: usize, start: usize, chunk: usize) -> *mut f32 {
        let number = self.first_chunk[batch] + kv_head * seqlen_k.div_ceil(chunk) + start / chunk;
        self.memory.get().wrapping_add(number * self.chunk_len)
    }
}

/// f32 slots of a prepared chunk, and how many of them are K.
pub fn prepared_len<E: Engine>(problem: &AttentionProblem) -> (usize, usize) {
    let k = E::k_len(problem.head_dim, E::FORWARD.chunk);
    (k + E::vt_len(problem.head_dim_v, E::FORWARD.chunk), k)
}

/// Prepares one chunk of K and V.
///
/// # Safety
/// As [`tile`]; no other thread prepares the same chunk.
#[inline(always)]
pub unsafe fn prepare<E: Engine>(cx: &Context<'_, E::T>, batch: usize, kv_head: usize, start: usize) {
    let Some(prepared) = &cx.prepared else { return };
    let seq = cx.problem.sequence(batch);
    let chunk = E::FORWARD.chunk;
    let rows = (seq.seqlen_k - start).min(chunk);
    let k = Rows::of(&cx.inputs.k, seq.batch, seq.kv_row + start, kv_head);
    let v = Rows::of(&cx.inputs.v, seq.batch, seq.kv_row + start, kv_head);
    let at = prepared.chunk(batch, kv_head, seq.seqlen_k, start, chunk);
    // SAFETY: the caller's.
    unsafe {
        E::pack_k(k, rows, at);
        E::pack_vt(v, rows, chunk, at.add(prepared_len::<E>(cx.problem).1));
    }
}

impl<T: Element> Context<'_, T> {
    /// |scale|; its sign is folded into Q, so that a maximum stays a maximum. A scale of 0 is folded in whole
    /// ([`Context::query_rows`]), since 0 · −∞ would unmask.
    pub fn scale(&self) -> f32 {
        if self.problem.scale() == 0.0 { 1.0 } else { self.problem.scale().abs() }
    }

    /// How many of `rows` queries are prepared for scores; the others, and all for a scale of 0, are taken as 0.
    pub fn query_rows(&self, rows: usize) -> usize {
        if self.problem.scale() == 0.0 { 0 } else { rows }
    }

    /// Whether Q is negated when prepared.
    pub fn negate(&self) -> bool {
        self.problem.scale() < 0.0
    }

    /// The coordinates of a strip of scores.
    pub fn strip(&self, seq: &Sequence, batch: usize, head: usize, q0: usize, keys: Range<usize>) -> Strip {
        Strip {
            batch: batch as i32,
            head: head as i32,
            q0: q0 as i32,
            kv0: keys.start as i32,
            seqlen_q: seq.seqlen_q as i32,
            seqlen_k: seq.seqlen_k as i32,
            q_start: seq.q_start as i32,
            kv_start: seq.kv_start as i32,
            rows: keys.len(),
        }
    }
}

/// Panels of a tile, at most.
pub const MAX_PANELS: usize = 64;

/// One tile of queries of one head.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    /// Sequence.
    pub batch: usize,
    /// Query head.
    pub head: usize,
    /// First query.
    pub q0: usize,
    /// Queries.
    pub rows: usize,
}

/// Where results go: the caller's o and lse.
#[derive(Clone, Copy, Debug)]
pub struct Target<T> {
    /// First element of o.
    pub o: Shared<T>,
    /// Strides of o.
    pub strides: [usize; 4],
    /// First element of lse.
    pub lse: Shared<f32>,
}

/// Scratch of one thread.
pub struct Workspace {
    q: Buffer,
    o: Buffer,
    k: Buffer,
    vt: Buffer,
    s: Buffer,
    p: Buffer,
    row_max: Buffer,
    row_sum: Buffer,
    alpha: Buffer,
    pack: Buffer,
    mods: Scratch,
}

/// Queries of a panel.
pub const fn panel<E: Engine>() -> usize {
    E::FORWARD.vectors * E::S::LANES
}

impl Workspace {
    /// Scratch for tiles of up to `rows` queries.
    pub fn new<E: Engine>(problem: &AttentionProblem, rows: usize) -> Self {
        let panels = rows.div_ceil(panel::<E>());
        let (d, dv) = (problem.head_dim, problem.head_dim_v);
        Workspace {
            q: Buffer::new(panels * E::q_len(d, E::FORWARD.vectors)),
            o: Buffer::new(panels * E::o_rows(dv) * panel::<E>()),
            k: Buffer::new(E::k_len(d, E::FORWARD.chunk)),
            vt: Buffer::new(E::vt_len(dv, E::FORWARD.chunk)),
            s: Buffer::new(E::FORWARD.chunk * panel::<E>()),
            // One for the stretch at hand, two that fused stretches fill in turn.
            p: Buffer::new(3 * E::p_len(E::FORWARD.vectors, E::FORWARD.chunk)),
            row_max: Buffer::new(panels * panel::<E>()),
            row_sum: Buffer::new(panels * panel::<E>()),
            alpha: Buffer::new(panel::<E>()),
            pack: Buffer::new(E::scratch_len(d.max(dv))),
            mods: Scratch::default(),
        }
    }
}

/// Keys of `run` inside `chunk`.
pub fn keys_of(run: &Run, tile_n: usize, chunk: &Range<usize>) -> Range<usize> {
    let blocks = run.n_blocks();
    (blocks.start * tile_n).max(chunk.start)..(blocks.end * tile_n).min(chunk.end)
}

/// The maximal stretches of adjacent runs inside a chunk of keys: `(keys, runs)`. (An iterator and not a callback:
/// a closure would be compiled without the instruction set's features.)
pub struct Stretches<'r> {
    runs: &'r [Run],
    tile_n: usize,
    chunk: Range<usize>,
}

impl<'r> Stretches<'r> {
    /// The stretches of `runs`, whose blocks have `tile_n` keys, inside `chunk`.
    pub fn new(runs: &'r [Run], tile_n: usize, chunk: Range<usize>) -> Self {
        Stretches { runs, tile_n, chunk }
    }
}

impl<'r> Iterator for Stretches<'r> {
    type Item = (Range<usize>, &'r [Run]);

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        while let Some(first) = self.runs.first() {
            let mut keys = keys_of(first, self.tile_n, &self.chunk);
            let mut n = 1;
            if !keys.is_empty() {
                while n < self.runs.len() && keys.end < self.chunk.end {
                    let more = keys_of(&self.runs[n], self.tile_n, &self.chunk);
                    if more.start != keys.end {
                        break;
                    }
                    keys.end = more.end;
                    n += 1;
                }
            }
            let (runs, rest) = self.runs.split_at(n);
            self.runs = rest;
            if !keys.is_empty() {
                return Some((keys, runs));
            }
        }
        None
    }
}

/// Computes one tile.
///
/// # Safety
/// The CPU has E's instructions; `cx` passed validation; `out` addresses tensors of the problem's shapes and no
/// other thread touches the task's rows; `ws` was made for at least `task.rows` queries.
#[allow(clippy::needless_range_loop, reason = "a panel's number addresses more than `started`")]
#[inline(always)]
pub unsafe fn tile<E: Engine>(cx: &Context<'_, E::T>, out: &Target<E::T>, task: Task, ws: &mut Workspace) {
    let l = <E::S as Simd>::LANES;
    let seq = cx.problem.sequence(task.batch);
    let (d, dv) = (cx.problem.head_dim, cx.problem.head_dim_v);
    let kv_head = task.head / cx.problem.group();
    let q = Rows::of(&cx.inputs.q, seq.batch, seq.q_row + task.q0, task.head);
    let k = Rows::of(&cx.inputs.k, seq.batch, seq.kv_row, kv_head);
    let v = Rows::of(&cx.inputs.v, seq.batch, seq.kv_row, kv_head);
    let panels = task.rows.div_ceil(panel::<E>());
    let Shape { vectors: all, chunk: step, .. } = E::FORWARD;
    let (q_len, o_len) = (E::q_len(d, all), E::o_rows(dv) * panel::<E>());
    let tile_n = cx.schedule.tile_n();
    let row = |p: usize| cx.schedule.row(task.batch, task.head, task.q0 / panel::<E>() + p);

    // SAFETY: the workspace has the engine's sizes; rows and keys stay inside the sequence.
    unsafe {
        E::enter();
        let mut seen = Range { start: usize::MAX, end: 0 };
        for p in 0..panels {
            let rows = (task.rows - p * panel::<E>()).min(panel::<E>());
            let dst = ws.q.ptr().add(p * q_len);
            let rows = cx.query_rows(rows);
            E::pack_q(q.skip(p * panel::<E>()), rows, all, cx.negate(), dst, ws.pack.ptr());
            for i in p * panel::<E>()..(p + 1) * panel::<E>() {
                *ws.row_max.ptr().add(i) = f32::NEG_INFINITY;
                *ws.row_sum.ptr().add(i) = 0.0;
            }
            if let (Some(first), Some(last)) = (row(p).first(), row(p).last()) {
                seen.start = seen.start.min(first.n_blocks().start * tile_n);
                seen.end = seen.end.max(last.n_blocks().end * tile_n).min(seq.seqlen_k);
            }
        }
        let plain = !cx.program.has_score_mod() && cx.dropper.is_none();
        let mut late = Late::default();
        let mut side = 1;
        // A panel's O is written by its first product, so it needs no clearing.
        let mut started = [false; MAX_PANELS];
        debug_assert!(panels <= MAX_PANELS);

        let mut chunk = seen.start / E::FORWARD.chunk * E::FORWARD.chunk;
        while chunk < seen.end {
            let keys = chunk..(chunk + E::FORWARD.chunk).min(seq.seqlen_k);
            chunk += E::FORWARD.chunk;
            let mut operands = None;
            let mut finite = None;
            for p in 0..panels {
                let rows = (task.rows - p * panel::<E>()).min(panel::<E>());
                let vectors = rows.div_ceil(l);
                for (part, runs) in Stretches::new(row(p), tile_n, keys.clone()) {
                    if operands.is_none() {
                        operands = Some(match &cx.prepared {
                            Some(all) => {
                                let at = all.chunk(task.batch, kv_head, seq.seqlen_k, keys.start, step);
                                E::prepared(at, at.add(prepared_len::<E>(cx.problem).1), step)
                            }
                            None => {
                                let kc = E::pack_k(k.skip(keys.start), keys.len(), ws.k.ptr());
                                (kc, E::pack_vt(v.skip(keys.start), keys.len(), step, ws.vt.ptr()))
                            }
                        });
                    }
                    let Some((kc, vc)) = operands else { unreachable!("prepared above") };
                    let o = ws.o.ptr().add(p * o_len);
                    let q = ws.q.ptr().add(p * q_len);
                    let q0 = task.q0 + p * panel::<E>();
                    let vectors = vectors.next_multiple_of(E::VECTOR_MULTIPLE);
                    let mut part = part;
                    if E::FUSED && plain && runs.iter().all(|r| r.kind == BlockKind::Full) {
                        // The first keys set the reference, the others follow in one go.
                        if !started[p] && part.len() > E::ROW_MULTIPLE {
                            let first = part.start..part.start + E::ROW_MULTIPLE;
                            part.start = first.end;
                            let (kc, vc) = skip::<E>((kc, vc), first.start - keys.start, d);
                            let at = Stretch { keys: first, runs, q0, rows, vectors, p };
                            separate::<E>(cx, &seq, task, (kc, vc), q, o, &at, None, &mut started[p], ws);
                        }
                        if started[p] && part.len().is_multiple_of(E::ROW_MULTIPLE) {
                            let (kc, vc) = skip::<E>((kc, vc), part.start - keys.start, d);
                            side = 3 - side;
                            let probabilities = ws.p.ptr().add(side * E::p_len(all, step));
                            let fused = FusedStep {
                                k: kc,
                                rows: part.len(),
                                dim: d,
                                q,
                                s: ws.s.ptr(),
                                p: probabilities,
                                p_rows: step,
                                factor: cx.scale() * LOG2_E,
                                reference: ws.row_max.ptr().add(p * panel::<E>()),
                                sum: ws.row_sum.ptr().add(p * panel::<E>()),
                            };
                            if E::fused(fused, &mut late) {
                                late.0 = Some(LateProduct {
                                    vt: vc,
                                    keys: part.len(),
                                    p: probabilities,
                                    p_rows: step,
                                    o,
                                    o_rows: E::o_rows(dv),
                                    block: 0,
                                    step: 0,
                                });
                                continue;
                            }
                        }
                    }
                    E::finish(&mut late);
                    let partial = runs.iter().any(|r| r.kind == BlockKind::Partial);
                    if partial && finite.is_none() {
                        finite = Some(all_finite::<E::S, E::T>(v.skip(keys.start), keys.len()));
                    }
                    let careful = partial && finite == Some(false);
                    let operands = skip::<E>((kc, vc), part.start - keys.start, d);
                    let at = Stretch { keys: part, runs, q0, rows, vectors, p };
                    let careful = careful.then_some(v);
                    separate::<E>(cx, &seq, task, operands, q, o, &at, careful, &mut started[p], ws);
                }
            }
            // The chunk's V may be overwritten next.
            E::finish(&mut late);
        }
        for p in 0..panels {
            let rows = (task.rows - p * panel::<E>()).min(panel::<E>());
            let q0 = task.q0 + p * panel::<E>();
            finish::<E>(cx, out, &seq, task, q0, rows, started[p], p, ws);
        }
        E::leave();
    }
}

/// K and V from a key of the chunk on.
#[inline(always)]
fn skip<E: Engine>((k, v): (Left, Left), start: usize, dim: usize) -> (Left, Left) {
    // SAFETY: only pointer arithmetic inside the chunk.
    unsafe { (E::skip_k(k, start, dim), E::skip_vt(v, start)) }
}

/// A stretch of keys for one panel.
struct Stretch<'r> {
    keys: Range<usize>,
    runs: &'r [Run],
    /// First query, how many there are, and in how many vectors.
    q0: usize,
    rows: usize,
    vectors: usize,
    /// Panel number.
    p: usize,
}

/// One stretch, step by step: scores, score mod and mask, softmax, output. `careful` is V where it is not finite.
///
/// # Safety
/// As [`tile`]; `operands` are K and V from the stretch's first key on.
#[inline(always)]
unsafe fn separate<E: Engine>(
    cx: &Context<'_, E::T>,
    seq: &Sequence,
    task: Task,
    operands: (Left, Left),
    q: *const f32,
    o: *mut f32,
    at: &Stretch<'_>,
    careful: Option<Rows<E::T>>,
    started: &mut bool,
    ws: &mut Workspace,
) {
    let l = <E::S as Simd>::LANES;
    let step = E::FORWARD.step;
    let (d, dv) = (cx.problem.head_dim, cx.problem.head_dim_v);
    let n = at.keys.len();
    let s = ws.s.ptr();
    let probabilities = if E::IN_PLACE { s } else { ws.p.ptr() };
    // SAFETY: buffers hold a panel by a chunk.
    unsafe {
        E::scores(operands.0, n, d, q, at.vectors, s, step);
        let mut moved = false;
        for v in 0..at.vectors {
            let s = s.add(v * step * l);
            modify::<E>(cx, seq, task, at.q0 + v * l, &at.keys, at.runs, s, &mut ws.mods);
            let stats = at.p * panel::<E>() + v * l;
            let stats = Stats {
                max: ws.row_max.ptr().add(stats),
                sum: ws.row_sum.ptr().add(stats),
                alpha: ws.alpha.ptr().add(v * l),
            };
            let strip = cx.strip(seq, task.batch, task.head, at.q0 + v * l, at.keys.clone());
            moved |= softmax::<E>(cx, strip, stats, s, probabilities, v, careful.is_some());
        }
        let init = match (*started, moved) {
            (false, _) => Init::Zero,
            (true, false) => Init::Add,
            (true, true) => Init::Scale(ws.alpha.ptr()),
        };
        *started = true;
        match careful {
            Some(v) => careful_o::<E>(cx, seq, task, at.q0, at.rows, &at.keys, v, s, o, init),
            None => E::accumulate_o(operands.1, n, dv, probabilities, step, at.vectors, o, init),
        }
    }
}

/// Score mod and mask on the scores of one vector of queries.
///
/// # Safety
/// `s` holds CHUNK rows of LANES.
#[inline(always)]
pub unsafe fn modify<E: Engine>(
    cx: &Context<'_, E::T>,
    seq: &Sequence,
    task: Task,
    q0: usize,
    part: &Range<usize>,
    runs: &[Run],
    s: *mut f32,
    scratch: &mut Scratch,
) {
    let l = <E::S as Simd>::LANES;
    // SAFETY: rows of `part`, and up to the next ROW_MULTIPLE, are inside S.
    unsafe {
        if cx.program.has_score_mod() || cx.program.has_mask() {
            for run in runs {
                let masked = run.kind == BlockKind::Partial;
                if !masked && !cx.program.has_score_mod() {
                    continue;
                }
                let keys = keys_of(run, cx.schedule.tile_n(), part);
                let at = cx.strip(seq, task.batch, task.head, q0, keys.clone());
                let scores =
                    std::slice::from_raw_parts_mut(s.add((keys.start - part.start) * l), keys.len() * l);
                E::S::perform(cx.program, &at, Modify::Apply { scores, masked }, scratch);
            }
        }
        for r in part.len()..part.len().next_multiple_of(E::ROW_MULTIPLE) {
            E::S::store(s.add(r * l), E::S::splat(f32::NEG_INFINITY));
        }
    }
}

/// Running statistics of one vector of queries: maximum (base 2) and sum, and the factor by which O shrinks.
pub struct Stats {
    /// Maximum, or another reference.
    pub max: *mut f32,
    /// Sum of 2^(score − reference).
    pub sum: *mut f32,
    /// Written: what earlier output is to be multiplied by.
    pub alpha: *mut f32,
}

/// One step of online softmax over `at.rows` keys for vector `v`: updates the statistics, writes P, and returns
/// whether any maximum moved. With `keep`, P is left in `s` as f32 instead.
///
/// # Safety
/// `s` and `p` have the engine's layout; the statistics are valid for a vector each.
#[inline(always)]
pub unsafe fn softmax<E: Engine>(
    cx: &Context<'_, E::T>,
    at: Strip,
    stats: Stats,
    s: *mut f32,
    p: *mut f32,
    v: usize,
    keep: bool,
) -> bool {
    let l = <E::S as Simd>::LANES;
    let rows = at.rows.next_multiple_of(E::ROW_MULTIPLE);
    let factor = if cx.program.has_score_mod() { LOG2_E } else { cx.scale() * LOG2_E };
    // SAFETY: `rows` rows of S are initialised; see `modify`.
    unsafe {
        let factor = E::S::splat(factor);
        let old = E::S::load(stats.max);
        let mut max = [E::S::splat(f32::NEG_INFINITY); 8];
        let mut r = 0;
        while r + 8 <= rows {
            for (i, m) in max.iter_mut().enumerate() {
                *m = E::S::max(*m, E::S::load(s.add((r + i) * l)));
            }
            r += 8;
        }
        while r < rows {
            max[0] = E::S::max(max[0], E::S::load(s.add(r * l)));
            r += 1;
        }
        for i in [4, 2, 1] {
            for j in 0..i {
                max[j] = E::S::max(max[j], max[j + i]);
            }
        }
        let max = max[0];
        // Before anything is visible the maximum is −∞; 0 in its place keeps exp2(−∞ − m) at 0, not NaN.
        let new = E::S::max(old, E::S::mul(max, factor));
        let safe = E::S::replace_neg_inf(new, E::S::splat(0.0));
        let minus = E::S::sub(E::S::splat(0.0), safe);
        let alpha = E::exp2(E::S::add(old, minus));
        let mut sum = [E::S::splat(0.0); 2];
        let fused = cx.dropper.is_none() && !keep;
        let mut r = 0;
        while r < rows {
            let p0 = E::exp2(E::S::fma(E::S::load(s.add(r * l)), factor, minus));
            let p1 = E::exp2(E::S::fma(E::S::load(s.add((r + 1) * l)), factor, minus));
            sum = [E::S::add(sum[0], p0), E::S::add(sum[1], p1)];
            if fused {
                E::store_p(p, E::FORWARD.chunk, v, r, p0, p1);
            } else {
                E::S::store(s.add(r * l), p0);
                E::S::store(s.add((r + 1) * l), p1);
            }
            r += 2;
        }
        let sum = E::S::fma(E::S::load(stats.sum), alpha, E::S::add(sum[0], sum[1]));
        E::S::store(stats.sum, sum);
        E::S::store(stats.max, new);
        E::S::store(stats.alpha, alpha);
        if let Some(dropper) = &cx.dropper {
            E::S::drop_out(dropper, &at, std::slice::from_raw_parts_mut(s, at.rows * l));
        }
        if !fused && !keep && !E::IN_PLACE {
            for r in (0..rows).step_by(2) {
                E::store_p(
                    p,
                    E::FORWARD.chunk,
                    v,
                    r,
                    E::S::load(s.add(r * l)),
                    E::S::load(s.add((r + 1) * l)),
                );
            }
        }
        E::S::any_gt(new, old)
    }
}

/// Whether a stretch of rows holds neither NaN nor Inf.
///
/// # Safety
/// `x` is valid for `rows` rows.
#[inline(always)]
pub unsafe fn all_finite<S: Simd, T: Element>(x: Rows<T>, rows: usize) -> bool {
    // x · 0 is NaN exactly for NaN and Inf; a sum, unlike a test each, is a loop without branches.
    // SAFETY: element i of row r exists.
    unsafe {
        let (mut sum, mut tail, zero) = (S::splat(0.0), 0.0, S::splat(0.0));
        for r in 0..rows {
            let row = x.ptr.add(r * x.stride);
            let mut i = 0;
            while i + S::LANES <= x.dim {
                sum = S::fma(load::<S, T>(row.add(i)), zero, sum);
                i += S::LANES;
            }
            while i < x.dim {
                tail += (*row.add(i)).to_f32() * 0.0;
                i += 1;
            }
        }
        S::sum(sum) + tail == 0.0
    }
}

/// Oᵀ from `init` plus Vᵀ Pᵀ over visible elements only: for the partial blocks of a V that is not finite.
///
/// # Safety
/// `s` holds P as f32; `o` has the engine's layout; keys of `part` exist.
unsafe fn careful_o<E: Engine>(
    cx: &Context<'_, E::T>,
    seq: &Sequence,
    task: Task,
    q0: usize,
    rows: usize,
    part: &Range<usize>,
    v: Rows<E::T>,
    s: *const f32,
    o: *mut f32,
    init: Init,
) {
    let l = <E::S as Simd>::LANES;
    let o_rows = E::o_rows(cx.problem.head_dim_v);
    for i in 0..E::FORWARD.vectors * l {
        let (vector, lane) = (i / l, i % l);
        // SAFETY: all indices are inside the panel, the chunk and the sequence.
        unsafe {
            let o = o.add(vector * o_rows * l + lane);
            for c in 0..o_rows {
                match init {
                    Init::Zero => *o.add(c * l) = 0.0,
                    Init::Add => {}
                    Init::Scale(alpha) => *o.add(c * l) *= *alpha.add(i),
                }
            }
            if i >= rows {
                continue;
            }
            for key in part.clone() {
                let at = cx.strip(seq, task.batch, task.head, q0 + i, key..key + 1);
                if !cx.program.visible(&at) {
                    continue;
                }
                let p = *s.add((vector * E::FORWARD.chunk + key - part.start) * l + lane);
                let row = v.skip(key);
                for c in 0..row.dim {
                    *o.add(c * l) += p * (*row.ptr.add(c)).to_f32();
                }
            }
        }
    }
}

/// Divides by the row sum, adds the sink, writes o and lse of a panel.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn finish<E: Engine>(
    cx: &Context<'_, E::T>,
    out: &Target<E::T>,
    seq: &Sequence,
    task: Task,
    q0: usize,
    rows: usize,
    started: bool,
    p: usize,
    ws: &mut Workspace,
) {
    let l = <E::S as Simd>::LANES;
    let dv = cx.problem.head_dim_v;
    let o_rows = E::o_rows(dv);
    let sink = cx.inputs.sinks.map(|s| s[task.head] * LOG2_E);
    let lse_start = cx.problem.lse_start(seq, task.head);
    // SAFETY: rows q0 .. q0 + rows belong to this task; the pack buffer holds LANES rows of d_v.
    unsafe {
        for v in 0..rows.div_ceil(l) {
            let mut inverse = [0.0f32; 16];
            let lanes = (rows - v * l).min(l);
            for (i, inverse) in inverse.iter_mut().enumerate().take(lanes) {
                let at = p * panel::<E>() + v * l + i;
                let (max, sum) = (*ws.row_max.ptr().add(at), *ws.row_sum.ptr().add(at));
                let (shrink, max, sum) = match sink {
                    Some(sink) => with_sink(max, sum, sink),
                    None => (1.0, max, sum),
                };
                // Only a row that sees nothing, or only −∞, has a sum of 0: o = 0, lse = −∞. NaN is no such row.
                let (factor, lse) = if sum == 0.0 {
                    (0.0, f32::NEG_INFINITY)
                } else {
                    (shrink / sum, (max + sum.log2()) * LN_2)
                };
                *inverse = factor;
                *out.lse.get().add(lse_start + q0 + v * l + i) = lse;
            }
            let o = ws.o.ptr().add(p * o_rows * panel::<E>() + v * o_rows * l);
            if !started {
                std::ptr::write_bytes(o, 0, o_rows * l);
            }
            let [sb, sn, sh, _] = out.strides;
            let dst = out.o.get().add(seq.batch * sb + (seq.q_row + q0 + v * l) * sn + task.head * sh);
            write_transposed::<E>(o, dv, &inverse, lanes, dst, sn, ws.pack.ptr());
        }
    }
}

/// Writes `lanes` rows of `dim` from their transpose `x`, each times its factor (0 gives 0 whatever x is).
///
/// # Safety
/// `x` holds `o_rows(dim)` vectors; `dst` is valid for rows `stride` apart; `pack` has the engine's scratch.
#[inline(always)]
pub unsafe fn write_transposed<E: Engine>(
    x: *mut f32,
    dim: usize,
    factors: &[f32; 16],
    lanes: usize,
    dst: *mut E::T,
    stride: usize,
    pack: *mut f32,
) {
    let l = <E::S as Simd>::LANES;
    let width = E::o_rows(dim);
    // SAFETY: the caller's sizes.
    unsafe {
        for i in 0..lanes {
            fetch_to_write::<E>(dst.wrapping_add(i * stride), dim);
        }
        let factor = E::S::load(factors.as_ptr());
        for c in 0..width {
            E::S::store(x.add(c * l), E::S::mul(E::S::load(x.add(c * l)), factor));
        }
        for c in (0..width).step_by(l) {
            E::S::transpose(x.add(c * l), l, pack.add(c), width);
        }
        for (i, factor) in factors.iter().enumerate().take(lanes) {
            if *factor == 0.0 {
                std::ptr::write_bytes(pack.add(i * width), 0, dim);
            }
            narrow::<E::S, E::T>(pack.add(i * width), dim, dst.add(i * stride));
        }
    }
}

/// Asks for the cache lines of a row that will be written: otherwise each store waits for its line.
///
/// # Safety
/// The CPU has E's instructions; any address is allowed.
#[inline(always)]
pub unsafe fn fetch_to_write<E: Engine>(row: *const E::T, dim: usize) {
    for c in (0..dim).step_by(64 / size_of::<E::T>()) {
        // SAFETY: a prefetch does not access memory.
        unsafe { E::S::prefetch_write(row.wrapping_add(c).cast()) };
    }
}

/// Joins a sink logit (base 2) to a row's statistics: the factor for what was summed so far, the new maximum and
/// sum. A row that sees nothing has lse = sink.
pub fn with_sink(max: f32, sum: f32, sink: f32) -> (f32, f32, f32) {
    let new = max.max(sink);
    if new == f32::NEG_INFINITY {
        return (1.0, max, sum);
    }
    // An empty row's (max, sum) is (−∞, 0).
    let shrink = if max == f32::NEG_INFINITY { 0.0 } else { (max - new).exp2() };
    (shrink, new, sum * shrink + (sink - new).exp2())
}

/// Rounds `n` f32 to T.
///
/// # Safety
/// Both pointers are valid for `n` elements.
#[inline(always)]
pub unsafe fn narrow<S: Simd, T: Element>(src: *const f32, n: usize, dst: *mut T) {
    for i in 0..n {
        // SAFETY: i < n.
        unsafe { *dst.add(i) = T::from_f32(*src.add(i)) }
    }
}
