//! The forward pass for a few queries a head (decoding): there is no reuse to block for, so every key and value is
//! read once, in order, and the memory is what limits. Keys are split over tasks; the parts are merged as
//! [`flashattn_spec::softmax`] merges states. How they are split depends on the problem alone.
//!
//! A chunk of K is multiplied by all queries of the group's heads while it is near; V likewise. Keys lie along the
//! vectors of a query's scores, so that a single query's softmax fills them; only score mods, masks and dropout see
//! scores as elsewhere, with queries along the vectors.

use crate::engine::{Engine, Rows, load_pair, load_part, round_up};
use crate::forward::{Context, Stretches, Target, Task as Tile, all_finite, modify, narrow, with_sink};
use crate::memory::{Buffer, Shared};
use crate::mods::Scratch;
use crate::simd::Simd;
use flashattn_spec::blocks::{BlockKind, Run};
use flashattn_spec::{AttentionProblem, DType, Element, Inputs, Sequence};
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// Queries a head beyond which panels of queries are better.
pub const MAX_QUERIES: usize = 4;
/// Keys whose scores are held at a time.
pub const CHUNK: usize = 64;
/// Rows that a key is multiplied by at a time: their sums stay in registers.
const ROWS: usize = 4;
/// Bytes by which memory is asked for before it is read. Hardware does so too, but stops at the end of each page; farther
/// than 1 to 4 KiB is slower again (measured on a Xeon, all types).
const AHEAD: usize = 3072;
/// Tasks to split a problem into, about, and keys of a task at least.
const TASKS: usize = 64;
const MIN_KEYS: usize = 512;

/// A range of keys for all query heads of some KV heads.
#[derive(Clone, Debug)]
pub struct Task {
    /// Sequence.
    pub batch: usize,
    /// KV heads.
    pub kv_heads: Range<usize>,
    /// Keys.
    pub keys: Range<usize>,
}

/// Whether the problem is for this path.
pub fn suits(problem: &AttentionProblem) -> bool {
    problem.seqlen_q <= MAX_QUERIES
}

/// How many KV heads a task takes: where the heads of a key lie side by side they are done together, a chunk of keys
/// after the other, so that memory is read in order; as many as leave the chunk in L2.
pub fn heads_together<T: Element>(problem: &AttentionProblem, inputs: &Inputs<'_, T>) -> usize {
    let apart = [&inputs.k, &inputs.v].iter().any(|x| x.strides()[2] > x.strides()[1]);
    if apart { 1 } else { most_together::<T>(problem) }
}

/// The most KV heads that a task takes, however the tensors lie.
pub fn most_together<T: Element>(problem: &AttentionProblem) -> usize {
    let bytes = CHUNK * (problem.head_dim + problem.head_dim_v) * size_of::<T>();
    ((1 << 20) / bytes).clamp(1, problem.heads_kv.max(1))
}

/// All tasks; those of the same KV heads follow one another.
pub fn tasks(problem: &AttentionProblem, together: usize) -> Vec<Task> {
    let units = (problem.batch * problem.heads_kv.div_ceil(together)).max(1);
    let least = (MIN_KEYS / together).max(CHUNK);
    let mut tasks = Vec::new();
    for batch in 0..problem.batch {
        let n = problem.sequence(batch).seqlen_k;
        let parts = TASKS.div_ceil(units).min(n / least).max(1);
        let keys = n.div_ceil(parts).next_multiple_of(CHUNK).max(CHUNK);
        for first in (0..problem.heads_kv).step_by(together) {
            let kv_heads = first..(first + together).min(problem.heads_kv);
            for start in (0..n.max(1)).step_by(keys) {
                tasks.push(Task { batch, kv_heads: kv_heads.clone(), keys: start..(start + keys).min(n) });
            }
        }
    }
    tasks
}

/// f32 slots of a task's result for one KV head: its rows, each (head of the group, query).
pub fn part_len(problem: &AttentionProblem) -> usize {
    problem.group() * problem.seqlen_q * row_len(problem.head_dim_v)
}

/// Where O starts in a row of a part; before it, the maximum so far (base 2) and the sum of 2^(score − maximum). Rows are
/// whole pairs of cache lines: threads that write to the same pair wait for each other (a tenth of the time, f32).
const HEAD: usize = 16;

fn row_len(dim: usize) -> usize {
    round_up(HEAD + dim, 32)
}

/// Scratch of one thread. A *row* is one query of one of the group's heads.
pub struct Workspace {
    q: Buffer,
    /// Scores, then probabilities: CHUNK for each row.
    s: Buffer,
    /// One head's scores as score mods, masks and dropout take them: key after key, queries across the vector.
    strip: Buffer,
    /// Products to be summed across lanes: for each of ROWS rows, a vector for each of LANES keys.
    block: Buffer,
    mods: Scratch,
}

impl Workspace {
    /// Scratch for a problem.
    pub fn new<E: Engine>(problem: &AttentionProblem) -> Self {
        let (l, rows) = (E::S::LANES, problem.heads_q * problem.seqlen_q);
        Workspace {
            q: Buffer::new(rows * round_up(problem.head_dim, l)),
            s: Buffer::new(problem.group() * problem.seqlen_q * CHUNK),
            strip: Buffer::new((CHUNK + E::ROW_MULTIPLE) * l),
            block: Buffer::new(ROWS * l * l),
            mods: Scratch::default(),
        }
    }
}

/// Does one task and leaves its parts at `part`, one for each KV head.
///
/// # Safety
/// The CPU has E's instructions; `cx` passed validation; `part` holds a [`part_len`] for each KV head of the task, and
/// no other thread touches it; `ws` was made for the problem.
#[inline(always)]
pub unsafe fn task<E: Engine>(cx: &Context<'_, E::T>, task: &Task, part: *mut f32, ws: &mut Workspace) {
    let l = E::S::LANES;
    let problem = cx.problem;
    let (d, width) = (problem.head_dim, round_up(problem.head_dim, l));
    let (part_len, row_len) = (part_len(problem), row_len(problem.head_dim_v));
    let seq = problem.sequence(task.batch);
    let (group, nq) = (problem.group(), seq.seqlen_q);
    let heads = task.kv_heads.start * group..task.kv_heads.end * group;
    let rows = heads.len() * nq;
    let negate = if cx.negate() { -1.0 } else { 1.0 };
    // SAFETY: rows and keys stay inside the sequence, buffers have the sizes of `Workspace::new`.
    unsafe {
        for r in 0..rows {
            let q = Rows::of(&cx.inputs.q, seq.batch, seq.q_row + r % nq, heads.start + r / nq);
            let dim = cx.query_rows(d);
            for c in 0..width {
                let x = if c < dim { (*q.ptr.add(c)).to_f32() * negate } else { 0.0 };
                *ws.q.ptr().add(r * width + place::<E>(c, d)) = x;
            }
        }
        // Parts are `seqlen_q` rows a head, also where a packed sequence has fewer.
        std::ptr::write_bytes(part, 0, task.kv_heads.len() * part_len);
        for r in 0..rows {
            *part.add(r / (group * nq) * part_len + r % (group * nq) * row_len) = f32::NEG_INFINITY;
        }
        for start in task.keys.clone().step_by(CHUNK) {
            let chunk = start..(start + CHUNK).min(task.keys.end);
            for kv_head in task.kv_heads.clone() {
                let k = Rows::of(&cx.inputs.k, seq.batch, seq.kv_row, kv_head);
                let v = Rows::of(&cx.inputs.v, seq.batch, seq.kv_row, kv_head);
                if start == task.keys.start {
                    for key in start..(start + ahead(v)).min(task.keys.end) {
                        fetch::<E>(v.skip(key));
                    }
                }
                let at = kv_head - task.kv_heads.start;
                let part = part.add(at * part_len);
                let mut head = kv_head * group;
                while head < (kv_head + 1) * group {
                    // Heads that the mask cannot tell apart have the same runs: they are done together.
                    let runs = cx.schedule.row(task.batch, head, 0);
                    let first = head;
                    while head < (kv_head + 1) * group
                        && std::ptr::eq(runs, cx.schedule.row(task.batch, head, 0))
                    {
                        head += 1;
                    }
                    for (keys, runs) in Stretches::new(runs, cx.schedule.tile_n(), chunk.clone()) {
                        let base = at * group * nq;
                        let at = Stretch { seq, task, kv_head, base, heads: first..head, keys, runs };
                        stretch::<E>(cx, &at, k, v, part, ws);
                    }
                }
            }
        }
    }
}

/// A stretch of keys, at most CHUNK, for some heads of the group.
struct Stretch<'r> {
    seq: Sequence,
    task: &'r Task,
    kv_head: usize,
    /// The KV head's first row in the task.
    base: usize,
    /// Query heads.
    heads: Range<usize>,
    keys: Range<usize>,
    runs: &'r [Run],
}

/// One stretch: scores, score mod and mask, softmax, output.
///
/// # Safety
/// As [`task`].
#[inline(always)]
unsafe fn stretch<E: Engine>(
    cx: &Context<'_, E::T>,
    at: &Stretch<'_>,
    k: Rows<E::T>,
    v: Rows<E::T>,
    part: *mut f32,
    ws: &mut Workspace,
) {
    let l = E::S::LANES;
    let nq = at.seq.seqlen_q;
    let (width, row_len) = (round_up(k.dim, l), row_len(v.dim));
    let n = at.keys.len();
    // Half as wide vectors come with half as many registers.
    let most = if l == 16 { ROWS } else { ROWS / 2 };
    // The task's own keys are worth asking for.
    let last = at.task.keys.end - 1 - at.keys.start;
    let (k_ahead, v_ahead) = (Ahead { rows: ahead(k), last }, Ahead { rows: ahead(v), last });
    let (k, v_rows) = (k.skip(at.keys.start), v.skip(at.keys.start));
    // Rows of the KV head.
    let first_head = at.kv_head * cx.problem.group();
    let rows = (at.heads.start - first_head) * nq..(at.heads.end - first_head) * nq;
    let partial = at.runs.iter().any(|r| r.kind == BlockKind::Partial);
    let modified = cx.program.has_score_mod() || partial;
    let factor = if cx.program.has_score_mod() { LOG2_E } else { cx.scale() * LOG2_E };
    // SAFETY: as the caller; a row has CHUNK scores.
    unsafe {
        let (q, s) = (ws.q.ptr().add(at.base * width), ws.s.ptr());
        let mut r = rows.start;
        while r < rows.end {
            let (q, s, block) = (q.add(r * width), s.add(r * CHUNK), ws.block.ptr());
            // The first to read a key asks for later ones.
            let ahead = if r == 0 { k_ahead } else { Ahead::default() };
            match (rows.end - r).min(most) {
                1 => scores::<E, 1, 4>(k, n, q, s, block, ahead),
                2 => scores::<E, 2, 4>(k, n, q, s, block, ahead),
                3 => scores::<E, 3, 2>(k, n, q, s, block, ahead),
                _ => scores::<E, ROWS, 2>(k, n, q, s, block, ahead),
            }
            r += most;
        }
        let careful = partial && !all_finite::<E::S, E::T>(v_rows, n);
        for head in at.heads.clone() {
            let g = head - first_head;
            let tile = Tile { batch: at.task.batch, head, q0: 0, rows: nq };
            let (s, strip) = (s.add(g * nq * CHUNK), ws.strip.ptr());
            if modified {
                for key in 0..n {
                    E::S::store(strip.add(key * l), E::S::splat(0.0));
                    for i in 0..nq {
                        *strip.add(key * l + i) = *s.add(i * CHUNK + key);
                    }
                }
                modify::<E>(cx, &at.seq, tile, 0, &at.keys, at.runs, strip, &mut ws.mods);
                for i in 0..nq {
                    for key in 0..n {
                        *s.add(i * CHUNK + key) = *strip.add(key * l + i);
                    }
                }
            }
            if let Some(dropper) = &cx.dropper {
                let keep = std::slice::from_raw_parts_mut(strip, n * l);
                keep.fill(1.0);
                let strip = cx.strip(&at.seq, tile.batch, head, 0, at.keys.clone());
                E::S::drop_out(dropper, &strip, keep);
            }
            for i in 0..nq {
                let (row, s) = (part.add((g * nq + i) * row_len), s.add(i * CHUNK));
                let shrink = softmax::<E>(s, n, factor, row);
                let o = row.add(HEAD);
                if shrink != 1.0 {
                    for c in (0..v.dim).step_by(l) {
                        E::S::store(o.add(c), E::S::mul(E::S::load(o.add(c)), E::S::splat(shrink)));
                    }
                }
                if cx.dropper.is_some() {
                    for key in 0..n {
                        *s.add(key) *= *strip.add(key * l + i);
                    }
                }
                if careful {
                    careful_output::<E>(cx, at, tile, i, v, s, o);
                }
            }
        }
        let mut r = rows.start;
        while r < rows.end && !careful {
            let (s, o) = (s.add(r * CHUNK), part.add(r * row_len + HEAD));
            let ahead = if r == 0 { v_ahead } else { Ahead::default() };
            match (rows.end - r).min(most) {
                1 => output::<E, 1>(v_rows, n, s, o, row_len, ahead),
                2 => output::<E, 2>(v_rows, n, s, o, row_len, ahead),
                3 => output::<E, 3>(v_rows, n, s, o, row_len, ahead),
                _ => output::<E, ROWS>(v_rows, n, s, o, row_len, ahead),
            }
            r += most;
        }
    }
}

/// How far ahead to ask for rows: how many, if any, and the last that may be asked for.
#[derive(Clone, Copy, Debug, Default)]
struct Ahead {
    rows: usize,
    last: usize,
}

impl Ahead {
    /// Asks for the row that is read this much after row `i` of `x`.
    ///
    /// # Safety
    /// The CPU has E's instructions.
    #[inline(always)]
    unsafe fn of<E: Engine>(self, x: Rows<E::T>, i: usize) {
        if self.rows > 0 {
            // SAFETY: the caller's.
            unsafe { fetch::<E>(x.skip((i + self.rows).min(self.last))) }
        }
    }
}

/// Where element `c` of a row of `dim` is kept: as [`load_pair`] finds the elements.
fn place<E: Engine>(c: usize, dim: usize) -> usize {
    let pair = 2 * E::S::LANES;
    let first = c / pair * pair;
    if E::T::DTYPE == DType::Bf16 && first + pair <= dim {
        first + c % 2 * E::S::LANES + c % pair / 2
    } else {
        c
    }
}

/// How many rows are AHEAD bytes.
fn ahead<T>(x: Rows<T>) -> usize {
    (AHEAD / (x.dim * size_of::<T>()).max(1)).max(1)
}

/// Asks for a row's cache lines.
///
/// # Safety
/// The CPU has E's instructions; any address is allowed.
#[inline(always)]
unsafe fn fetch<E: Engine>(row: Rows<E::T>) {
    let per_line = 64 / size_of::<E::T>();
    let mut c = 0;
    while c < row.dim {
        // SAFETY: a prefetch does not access memory.
        unsafe { E::S::prefetch(row.ptr.wrapping_add(c).cast()) };
        c += per_line;
    }
}

/// Scores of `n` keys with R rows, K keys at a time. What follows them up to a whole vector becomes −∞.
///
/// # Safety
/// As [`task`].
#[inline(always)]
unsafe fn scores<E: Engine, const R: usize, const K: usize>(
    k: Rows<E::T>,
    n: usize,
    q: *const f32,
    s: *mut f32,
    block: *mut f32,
    ahead: Ahead,
) {
    let l = E::S::LANES;
    // SAFETY: the caller's sizes.
    unsafe {
        for key in (0..n).step_by(l) {
            let count = (n - key).min(l);
            let mut j = 0;
            while j + K <= count {
                for i in 0..K {
                    ahead.of::<E>(k, key + j + i);
                }
                products::<E, R, K>(k.skip(key + j), q, block.add(j * l));
                j += K;
            }
            while j < count {
                ahead.of::<E>(k, key + j);
                products::<E, R, 1>(k.skip(key + j), q, block.add(j * l));
                j += 1;
            }
            for r in 0..R {
                E::S::store(s.add(r * CHUNK + key), E::S::sums(block.add(r * l * l)));
            }
        }
        for key in n..n.next_multiple_of(l) {
            for r in 0..R {
                *s.add(r * CHUNK + key) = f32::NEG_INFINITY;
            }
        }
    }
}

/// q · k of R rows and K keys, each as LANES partial sums; q is padded with zeros.
///
/// # Safety
/// As [`task`]; `block` holds LANES vectors for each row.
#[inline(always)]
unsafe fn products<E: Engine, const R: usize, const K: usize>(k: Rows<E::T>, q: *const f32, block: *mut f32) {
    let l = E::S::LANES;
    let width = round_up(k.dim, l);
    // SAFETY: c + 2 l ≤ dim in the loop over pairs, c < dim in the other.
    unsafe {
        let mut sum = [[E::S::splat(0.0); R]; K];
        let mut c = 0;
        while c + 2 * l <= k.dim {
            for (i, sum) in sum.iter_mut().enumerate() {
                let x = load_pair::<E::S, E::T>(k.ptr.add(i * k.stride + c));
                for (r, sum) in sum.iter_mut().enumerate() {
                    let q = q.add(r * width + c);
                    *sum = E::S::fma(x[0], E::S::load(q), *sum);
                    *sum = E::S::fma(x[1], E::S::load(q.add(l)), *sum);
                }
            }
            c += 2 * l;
        }
        while c < k.dim {
            for (i, sum) in sum.iter_mut().enumerate() {
                let x = load_part::<E::S, E::T>(k.ptr.add(i * k.stride + c), k.dim - c);
                for (r, sum) in sum.iter_mut().enumerate() {
                    *sum = E::S::fma(x, E::S::load(q.add(r * width + c)), *sum);
                }
            }
            c += l;
        }
        for (i, sum) in sum.iter().enumerate() {
            for (r, sum) in sum.iter().enumerate() {
                E::S::store(block.add((r * l + i) * l), *sum);
            }
        }
    }
}

/// One step of online softmax over a row's `n` scores, which become probabilities: updates the statistics at the row's
/// start and returns the factor for what has been added up so far.
///
/// # Safety
/// `s` holds whole vectors; what follows the `n` scores is −∞. `row` is a part's.
#[inline(always)]
unsafe fn softmax<E: Engine>(s: *mut f32, n: usize, factor: f32, row: *mut f32) -> f32 {
    let l = E::S::LANES;
    // SAFETY: the caller's.
    unsafe {
        let mut max = E::S::load(s);
        for i in (l..n).step_by(l) {
            max = E::S::max(max, E::S::load(s.add(i)));
        }
        let mut lanes = [f32::NEG_INFINITY; 16];
        E::S::store(lanes.as_mut_ptr(), max);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] = lanes[i].max(lanes[i + half]);
            }
        }
        let old = *row;
        let new = old.max(lanes[0] * factor);
        // Before anything is visible the maximum is −∞; 0 in its place keeps exp2(−∞ − m) at 0, not NaN.
        let reference = if new == f32::NEG_INFINITY { 0.0 } else { new };
        let shrink = if new == old { 1.0 } else { (old - reference).exp2() };
        let (factor, minus) = (E::S::splat(factor), E::S::splat(-reference));
        let mut sum = E::S::splat(0.0);
        for i in (0..n).step_by(l) {
            let p = E::exp2(E::S::fma(E::S::load(s.add(i)), factor, minus));
            E::S::store(s.add(i), p);
            sum = E::S::add(sum, p);
        }
        *row = new;
        *row.add(1) = *row.add(1) * shrink + E::S::sum(sum);
        shrink
    }
}

/// O += Σ p V over `n` keys, for R rows `o_stride` apart.
///
/// # Safety
/// As [`task`].
#[inline(always)]
unsafe fn output<E: Engine, const R: usize>(
    v: Rows<E::T>,
    n: usize,
    p: *const f32,
    o: *mut f32,
    o_stride: usize,
    mut ahead: Ahead,
) {
    let l = E::S::LANES;
    let mut c = 0;
    // SAFETY: columns below dim exist; O holds whole vectors.
    unsafe {
        while c < v.dim {
            let left = v.dim - c;
            // As many columns at a time as leave enough sums in flight.
            if R == 1 && left >= 8 * l {
                weigh::<E, R, 8>(v, c, n, p, o, o_stride, ahead);
                c += 8 * l;
            } else if left >= 4 * l {
                weigh::<E, R, 4>(v, c, n, p, o, o_stride, ahead);
                c += 4 * l;
            } else if left >= 2 * l {
                weigh::<E, R, 2>(v, c, n, p, o, o_stride, ahead);
                c += 2 * l;
            } else {
                weigh::<E, R, 1>(v, c, n, p, o, o_stride, ahead);
                c += l;
            }
            ahead = Ahead::default();
        }
    }
}

/// [`output`] for V vectors of columns from `c` on; the only one may be short.
///
/// # Safety
/// As [`task`].
#[inline(always)]
unsafe fn weigh<E: Engine, const R: usize, const V: usize>(
    v: Rows<E::T>,
    c: usize,
    n: usize,
    p: *const f32,
    o: *mut f32,
    o_stride: usize,
    ahead: Ahead,
) {
    let l = E::S::LANES;
    // SAFETY: the caller's.
    unsafe {
        let mut acc = [[E::S::splat(0.0); V]; R];
        for key in 0..n {
            ahead.of::<E>(v, key);
            let row = v.ptr.add(key * v.stride + c);
            let mut x = [E::S::splat(0.0); V];
            if V == 1 {
                x[0] = load_part::<E::S, E::T>(row, v.dim - c);
            }
            for (i, x) in x.chunks_exact_mut(2).enumerate() {
                x.copy_from_slice(&load_pair::<E::S, E::T>(row.add(2 * i * l)));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let p = E::S::splat(*p.add(r * CHUNK + key));
                for (acc, x) in acc.iter_mut().zip(x) {
                    *acc = E::S::fma(p, x, *acc);
                }
            }
        }
        // O joins at the end: sums of chunks lose fewer digits than one sum of all keys.
        for (r, acc) in acc.iter().enumerate() {
            for (i, acc) in acc.iter().enumerate() {
                let at = o.add(r * o_stride + c + i * l);
                E::S::store(at, E::S::add(E::S::load(at), *acc));
            }
        }
    }
}

/// [`output`] for one row over visible keys only, where V is not finite.
///
/// # Safety
/// As [`task`].
unsafe fn careful_output<E: Engine>(
    cx: &Context<'_, E::T>,
    at: &Stretch<'_>,
    tile: Tile,
    query: usize,
    v: Rows<E::T>,
    p: *const f32,
    o: *mut f32,
) {
    for (i, key) in at.keys.clone().enumerate() {
        let strip = cx.strip(&at.seq, tile.batch, tile.head, query, key..key + 1);
        if cx.program.visible(&strip) {
            // SAFETY: the key exists; O holds a row.
            unsafe {
                for c in 0..v.dim {
                    *o.add(place::<E>(c, v.dim)) += *p.add(i) * (*v.ptr.add(key * v.stride + c)).to_f32();
                }
            }
        }
    }
}

/// Parts of one KV head: `count`, `stride` f32 apart.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    /// The first.
    pub first: Shared<f32>,
    /// See [`Parts`].
    pub stride: usize,
    /// See [`Parts`].
    pub count: usize,
}

/// Merges the parts of a KV head and writes o and lse of its query heads.
///
/// # Safety
/// As [`task`]; no other thread writes these rows.
#[inline(always)]
pub unsafe fn merge<E: Engine>(
    cx: &Context<'_, E::T>,
    out: &Target<E::T>,
    batch: usize,
    kv_head: usize,
    parts: Parts,
) {
    let problem = cx.problem;
    let seq = problem.sequence(batch);
    let dv = problem.head_dim_v;
    let Parts { first, stride, count } = parts;
    let row_len = row_len(dv);
    let mut o = vec![0.0f32; dv];
    for g in 0..problem.group() {
        let head = kv_head * problem.group() + g;
        let lse = problem.lse_start(&seq, head);
        for i in 0..seq.seqlen_q {
            // SAFETY: every part has this row.
            unsafe {
                let at = first.get().add((g * seq.seqlen_q + i) * row_len);
                let mut max = f32::NEG_INFINITY;
                for part in 0..count {
                    max = max.max(*at.add(part * stride));
                }
                let mut sum = 0.0;
                o.fill(0.0);
                for part in 0..count {
                    let at = at.add(part * stride);
                    // An empty part's (max, sum) is (−∞, 0).
                    let factor = if *at == f32::NEG_INFINITY { 0.0 } else { (*at - max).exp2() };
                    // A part that saw only −∞ adds nothing, NaN or not.
                    if *at.add(1) == 0.0 {
                        continue;
                    }
                    sum += *at.add(1) * factor;
                    for (c, o) in o.iter_mut().enumerate() {
                        *o += *at.add(HEAD + place::<E>(c, dv)) * factor;
                    }
                }
                let (shrink, max, sum) = match cx.inputs.sinks {
                    Some(sinks) => with_sink(max, sum, sinks[head] * LOG2_E),
                    None => (1.0, max, sum),
                };
                let value = if sum == 0.0 { f32::NEG_INFINITY } else { (max + sum.log2()) * LN_2 };
                *out.lse.get().add(lse + i) = value;
                for o in &mut o {
                    *o = if sum == 0.0 { 0.0 } else { *o * shrink / sum };
                }
                let [sb, sn, sh, _] = out.strides;
                let dst = out.o.get().add(seq.batch * sb + (seq.q_row + i) * sn + head * sh);
                narrow::<E::S, E::T>(o.as_ptr(), dv, dst);
            }
        }
    }
}
