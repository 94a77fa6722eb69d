//! The forward pass for a few queries a head (decoding): there is no reuse to block for, so every key and value is
//! read once, in order, and the memory is what limits. Keys are split over tasks; the parts are merged as
//! [`flashattn_spec::softmax`] merges states. How they are split depends on the problem alone.
//!
//! A chunk of K is multiplied by all queries of the group's heads while the chunk is in L1; V likewise. While one
//! of them is worked on, the other's next rows are fetched.

use crate::engine::{Engine, Rows, load, round_up};
use crate::forward::{
    Context, Stats, Stretches, Target, Task as Tile, all_finite, modify, narrow, softmax, with_sink,
};
use crate::memory::{Buffer, Shared};
use crate::mods::Scratch;
use crate::simd::Simd;
use flashattn_spec::blocks::BlockKind;
use flashattn_spec::{AttentionProblem, Element};
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// Queries a head beyond which panels of queries are better.
pub const MAX_QUERIES: usize = 4;
/// Tasks to split a problem into, about, and keys of a task at least.
const TASKS: usize = 64;
const MIN_KEYS: usize = 512;

/// A range of keys for all query heads of one KV head.
#[derive(Clone, Debug)]
pub struct Task {
    /// Sequence.
    pub batch: usize,
    /// KV head.
    pub kv_head: usize,
    /// Keys.
    pub keys: Range<usize>,
}

/// Whether the problem is for this path.
pub fn suits(problem: &AttentionProblem) -> bool {
    problem.seqlen_q <= MAX_QUERIES
}

/// All tasks; those of one KV head follow one another.
pub fn tasks(problem: &AttentionProblem, chunk: usize) -> Vec<Task> {
    let heads = (problem.batch * problem.heads_kv).max(1);
    let mut tasks = Vec::new();
    for batch in 0..problem.batch {
        let n = problem.sequence(batch).seqlen_k;
        let parts = TASKS.div_ceil(heads).min(n / MIN_KEYS).max(1);
        let keys = n.div_ceil(parts).next_multiple_of(chunk).max(chunk);
        for kv_head in 0..problem.heads_kv {
            for start in (0..n.max(1)).step_by(keys) {
                tasks.push(Task { batch, kv_head, keys: start..(start + keys).min(n) });
            }
        }
    }
    tasks
}

/// f32 slots of a task's result: for each row (head of the group, query) the maximum (base 2), the sum, and O.
pub fn part_len<S: Simd>(problem: &AttentionProblem) -> usize {
    problem.group() * problem.seqlen_q * (2 + round_up(problem.head_dim_v, S::LANES))
}

/// Scratch of one thread.
pub struct Workspace {
    q: Buffer,
    s: Buffer,
    stats: Buffer,
    mods: Scratch,
}

impl Workspace {
    /// Scratch for a problem.
    pub fn new<E: Engine>(problem: &AttentionProblem) -> Self {
        let (l, rows) = (E::S::LANES, problem.group() * problem.seqlen_q);
        Workspace {
            q: Buffer::new(rows * round_up(problem.head_dim, l)),
            s: Buffer::new((E::FORWARD.step + E::ROW_MULTIPLE) * l + 2 * l * l),
            stats: Buffer::new(3 * problem.group() * l),
            mods: Scratch::default(),
        }
    }
}

/// Does one task and leaves its part at `part`.
///
/// # Safety
/// The CPU has E's instructions; E works in place; `cx` passed validation; `part` holds [`part_len`] f32 that no other
/// thread touches; `ws` was made for the problem.
#[inline(always)]
pub unsafe fn task<E: Engine>(cx: &Context<'_, E::T>, task: &Task, part: *mut f32, ws: &mut Workspace) {
    let l = E::S::LANES;
    let problem = cx.problem;
    let (d, dv) = (problem.head_dim, problem.head_dim_v);
    let (width, width_v) = (round_up(d, l), round_up(dv, l));
    let seq = problem.sequence(task.batch);
    let (group, nq) = (problem.group(), seq.seqlen_q);
    let k = Rows::of(&cx.inputs.k, seq.batch, seq.kv_row, task.kv_head);
    let v = Rows::of(&cx.inputs.v, seq.batch, seq.kv_row, task.kv_head);
    let row_len = 2 + width_v;
    let negate = if cx.negate() { -1.0 } else { 1.0 };
    // SAFETY: rows and keys stay inside the sequence, buffers have the sizes of `Workspace::new`.
    unsafe {
        let (s, stats) = (ws.s.ptr(), ws.stats.ptr());
        for i in 0..3 * group * l {
            *stats.add(i) = if i < group * l { f32::NEG_INFINITY } else { 0.0 };
        }
        std::ptr::write_bytes(part, 0, group * problem.seqlen_q * row_len);
        for g in 0..group {
            for i in 0..nq {
                let q = Rows::of(&cx.inputs.q, seq.batch, seq.q_row + i, task.kv_head * group + g);
                let dst = ws.q.ptr().add((g * nq + i) * width);
                let dim = cx.query_rows(d);
                for c in 0..width {
                    *dst.add(c) = if c < dim { (*q.ptr.add(c)).to_f32() * negate } else { 0.0 };
                }
            }
        }
        let mut start = task.keys.start;
        while start < task.keys.end {
            let keys = start..(start + E::FORWARD.step).min(task.keys.end);
            start = keys.end;
            for g in 0..group {
                let head = task.kv_head * group + g;
                let tile = Tile { batch: task.batch, head, q0: 0, rows: nq };
                let row = cx.schedule.row(task.batch, head, 0);
                for (keys, runs) in Stretches::new(row, cx.schedule.tile_n(), keys.clone()) {
                    let n = keys.len();
                    // With one query head a key is read here for the first time, so V's rows are fetched meanwhile.
                    let ahead = (g == 0).then_some(v.skip(keys.start));
                    let q = ws.q.ptr().add(g * nq * width);
                    scores::<E>(k.skip(keys.start), n, q, nq, width, s, ahead);
                    modify::<E>(cx, &seq, tile, 0, &keys, runs, s, &mut ws.mods);
                    let stats = Stats {
                        max: stats.add(g * l),
                        sum: stats.add((group + g) * l),
                        alpha: stats.add((2 * group + g) * l),
                    };
                    let alpha = stats.alpha;
                    let partial = runs.iter().any(|r| r.kind == BlockKind::Partial);
                    let careful = partial && !all_finite::<E::S, E::T>(v.skip(keys.start), n);
                    let at = cx.strip(&seq, task.batch, head, 0, keys.clone());
                    let moved = softmax::<E>(cx, at, stats, s, s, 0, false);
                    let next = (g == 0 && keys.end < task.keys.end).then_some(k.skip(keys.end));
                    for i in 0..nq {
                        let o = part.add((g * problem.seqlen_q + i) * row_len + 2);
                        let alpha = if moved { *alpha.add(i) } else { 1.0 };
                        if careful {
                            careful_output::<E>(cx, &seq, tile, i, &keys, v, s.add(i), alpha, o);
                        } else {
                            let next = if i == 0 { next } else { None };
                            output::<E>(v.skip(keys.start), n, s.add(i), alpha, o, next);
                        }
                    }
                }
            }
        }
        for g in 0..group {
            for i in 0..nq {
                let row = part.add((g * problem.seqlen_q + i) * row_len);
                *row = *stats.add(g * l + i);
                *row.add(1) = *stats.add((group + g) * l + i);
            }
        }
    }
}

/// Scores of `n` keys with `nq` queries: key after key in strips of LANES queries, of which `nq` are real.
///
/// # Safety
/// As [`task`].
#[inline(always)]
unsafe fn scores<E: Engine>(
    k: Rows<E::T>,
    n: usize,
    q: *const f32,
    nq: usize,
    width: usize,
    s: *mut f32,
    ahead: Option<Rows<E::T>>,
) {
    let l = E::S::LANES;
    // The transposition's scratch follows the scores.
    let block = s.wrapping_add((E::FORWARD.step + E::ROW_MULTIPLE) * l);
    // SAFETY: the caller's sizes.
    unsafe {
        for key in 0..n {
            E::S::store(s.add(key * l), E::S::splat(0.0));
        }
        for i in 0..nq {
            let q = q.add(i * width);
            let mut key = 0;
            while key < n {
                let count = (n - key).min(l);
                for j in 0..count {
                    if let (0, Some(ahead)) = (i, ahead) {
                        fetch::<E>(ahead.skip(key + j));
                    }
                    E::S::store(block.add(j * l), partial_dot::<E>(k.skip(key + j), q));
                }
                // Sums across lanes, LANES keys at a time.
                let columns = block.add(l * l);
                E::S::transpose(block, l, columns, l);
                let mut sum = E::S::load(columns);
                for j in 1..l {
                    sum = E::S::add(sum, E::S::load(columns.add(j * l)));
                }
                E::S::store(block, sum);
                for j in 0..count {
                    *s.add((key + j) * l + i) = *block.add(j);
                }
                key += count;
            }
        }
    }
}

/// q · k as LANES partial sums; q is padded with zeros.
///
/// # Safety
/// As [`scores`].
#[inline(always)]
unsafe fn partial_dot<E: Engine>(k: Rows<E::T>, q: *const f32) -> <E::S as Simd>::F {
    let l = E::S::LANES;
    // SAFETY: c + l ≤ dim in the vector loops; the tail is copied first.
    unsafe {
        let mut sum = [E::S::splat(0.0); 2];
        let mut c = 0;
        while c + 2 * l <= k.dim {
            sum[0] = E::S::fma(load::<E::S, E::T>(k.ptr.add(c)), E::S::load(q.add(c)), sum[0]);
            sum[1] = E::S::fma(load::<E::S, E::T>(k.ptr.add(c + l)), E::S::load(q.add(c + l)), sum[1]);
            c += 2 * l;
        }
        while c + l <= k.dim {
            sum[0] = E::S::fma(load::<E::S, E::T>(k.ptr.add(c)), E::S::load(q.add(c)), sum[0]);
            c += l;
        }
        if c < k.dim {
            let mut tail = [0.0f32; 16];
            for (i, x) in tail.iter_mut().enumerate().take(k.dim - c) {
                *x = (*k.ptr.add(c + i)).to_f32();
            }
            sum[1] = E::S::fma(E::S::load(tail.as_ptr()), E::S::load(q.add(c)), sum[1]);
        }
        E::S::add(sum[0], sum[1])
    }
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

/// O = α O + Σ p V over `n` keys, for one query; its p are LANES apart. Fetches the rows from `next` on meanwhile.
///
/// # Safety
/// As [`task`].
#[inline(always)]
unsafe fn output<E: Engine>(
    v: Rows<E::T>,
    n: usize,
    p: *const f32,
    alpha: f32,
    o: *mut f32,
    next: Option<Rows<E::T>>,
) {
    const VECTORS: usize = 8;
    let l = E::S::LANES;
    let mut c = 0;
    // SAFETY: c + VECTORS·l ≤ dim in the block loop; O holds whole vectors.
    unsafe {
        let shrink = E::S::splat(alpha);
        while c + VECTORS * l <= v.dim {
            let mut acc = [E::S::splat(0.0); VECTORS];
            for key in 0..n {
                if let (0, Some(next)) = (c, next) {
                    fetch::<E>(next.skip(key));
                }
                let p = E::S::splat(*p.add(key * l));
                let row = v.ptr.add(key * v.stride + c);
                for (i, acc) in acc.iter_mut().enumerate() {
                    *acc = E::S::fma(p, load::<E::S, E::T>(row.add(i * l)), *acc);
                }
            }
            // O joins at the end: sums of chunks lose fewer digits than one sum of all keys.
            for (i, acc) in acc.iter().enumerate() {
                let at = o.add(c + i * l);
                E::S::store(at, E::S::fma(E::S::load(at), shrink, *acc));
            }
            c += VECTORS * l;
        }
        while c + l <= v.dim {
            let mut acc = E::S::splat(0.0);
            for key in 0..n {
                let row = v.ptr.add(key * v.stride + c);
                acc = E::S::fma(E::S::splat(*p.add(key * l)), load::<E::S, E::T>(row), acc);
            }
            E::S::store(o.add(c), E::S::fma(E::S::load(o.add(c)), shrink, acc));
            c += l;
        }
        for c in c..v.dim {
            let mut sum = 0.0;
            for key in 0..n {
                sum += *p.add(key * l) * (*v.ptr.add(key * v.stride + c)).to_f32();
            }
            *o.add(c) = *o.add(c) * alpha + sum;
        }
    }
}

/// [`output`] over visible keys only, where V is not finite.
///
/// # Safety
/// As [`task`].
unsafe fn careful_output<E: Engine>(
    cx: &Context<'_, E::T>,
    seq: &flashattn_spec::Sequence,
    tile: Tile,
    query: usize,
    keys: &Range<usize>,
    v: Rows<E::T>,
    p: *const f32,
    alpha: f32,
    o: *mut f32,
) {
    // SAFETY: keys exist; O holds a row.
    unsafe {
        for c in 0..v.dim {
            *o.add(c) *= alpha;
        }
        for key in keys.clone() {
            let at = cx.strip(seq, tile.batch, tile.head, query, key..key + 1);
            if cx.program.visible(&at) {
                let p = *p.add((key - keys.start) * E::S::LANES);
                for c in 0..v.dim {
                    *o.add(c) += p * (*v.ptr.add(key * v.stride + c)).to_f32();
                }
            }
        }
    }
}

/// Merges the `count` parts of a KV head, which start at `parts`, and writes o and lse of its query heads.
///
/// # Safety
/// As [`task`]; no other thread writes these rows.
#[inline(always)]
pub unsafe fn merge<E: Engine>(
    cx: &Context<'_, E::T>,
    out: &Target<E::T>,
    first: &Task,
    parts: Shared<f32>,
    count: usize,
) {
    let problem = cx.problem;
    let seq = problem.sequence(first.batch);
    let dv = problem.head_dim_v;
    let len = part_len::<E::S>(problem);
    let row_len = len / (problem.group() * problem.seqlen_q).max(1);
    let mut o = vec![0.0f32; dv];
    for g in 0..problem.group() {
        let head = first.kv_head * problem.group() + g;
        let lse = problem.lse_start(&seq, head);
        for i in 0..seq.seqlen_q {
            // SAFETY: every part has this row.
            unsafe {
                let at = parts.get().add((g * problem.seqlen_q + i) * row_len);
                let mut max = f32::NEG_INFINITY;
                for part in 0..count {
                    max = max.max(*at.add(part * len));
                }
                let mut sum = 0.0;
                o.fill(0.0);
                for part in 0..count {
                    let at = at.add(part * len);
                    // An empty part's (max, sum) is (−∞, 0).
                    let factor = if *at == f32::NEG_INFINITY { 0.0 } else { (*at - max).exp2() };
                    // A part that saw only −∞ adds nothing, NaN or not.
                    if *at.add(1) == 0.0 {
                        continue;
                    }
                    sum += *at.add(1) * factor;
                    for (c, o) in o.iter_mut().enumerate() {
                        *o += *at.add(2 + c) * factor;
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
