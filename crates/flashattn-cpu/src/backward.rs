//! The backward pass: Algorithm 4 of the paper. S and P are recomputed from Q, K and lse; keys are outside and
//! queries inside, so that dK and dV stay in cache and dQ is the one that is read and written again.
//!
//! ```text
//! D = rowsum(dO ∘ O) − dlse                                        (the gradient through lse joins here)
//! for each query head of the KV head:
//!     for each block of keys:                                       (K, V, Kᵀ prepared once)
//!         for each panel of queries, for each chunk of keys in the block that it sees:
//!             Sᵀ = K Qᵀ;  P = exp(score_mod(scale · S) − lse);  dPᵀ = V dOᵀ
//!             dS = P ∘ (dropout(dP) − D) ∘ score_mod'
//!             dV += dropout(P)ᵀ dO;  dK += dSᵀ Q;  dQᵀ += Kᵀ dSᵀ
//! dQ, dK *= scale
//! ```
//!
//! A task is (sequence, KV head, range of keys). Where there are few heads the keys are split over several tasks,
//! each with a dQ of its own, added up in order at the end: how many depends on the problem alone, so results do
//! not depend on the number of threads.

use crate::engine::{Engine, F, Left, Rows, Shape};
use crate::forward::{Context, Stretches, all_finite, fetch_to_write, keys_of, narrow, write_transposed};
use crate::gemm::Init;
use crate::memory::{Buffer, Shared};
use crate::mods::{Scratch, Task as Modify};
use crate::simd::Simd;
use flashattn_spec::blocks::{BlockKind, Run};
use flashattn_spec::{AttentionProblem, Element, GradInputs, Sequence};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// What the tasks of a backward call share, beside [`Context`].
pub struct Given<'a, T> {
    /// o, lse, dO, dlse.
    pub grads: GradInputs<'a, T>,
    /// dQ is finished by [`reduce`] from the tasks' parts, instead of by the one task of its head.
    pub split: bool,
}

/// The keys of one KV head that a task works on.
#[derive(Clone, Debug)]
pub struct Task {
    /// Sequence.
    pub batch: usize,
    /// KV head.
    pub kv_head: usize,
    /// Keys.
    pub keys: Range<usize>,
    /// Where the task's dQ goes when the keys are split: one [`dq_len`] for each head of the group.
    pub dq: Shared<f32>,
    /// Gradients of tables that this task adds to.
    pub tables: Tables,
}

/// Gradients of tables: where each starts, and how long it is.
#[derive(Clone, Debug, Default)]
pub struct Tables(pub Vec<(Shared<f32>, usize)>);

impl Tables {
    /// The gradients as slices.
    ///
    /// # Safety
    /// The memory is valid, and nobody else uses it while the slices live.
    #[allow(
        clippy::mut_from_ref,
        reason = "the memory is not ours: each task has its own, see `Task::tables`"
    )]
    unsafe fn slices(&self) -> Vec<&mut [f32]> {
        // SAFETY: the caller's.
        self.0.iter().map(|&(p, n)| unsafe { std::slice::from_raw_parts_mut(p.get(), n) }).collect()
    }
}

/// Where results go.
#[derive(Clone, Copy, Debug)]
pub struct Target<T> {
    /// dQ and its strides.
    pub dq: (Shared<T>, [usize; 4]),
    /// dK and its strides.
    pub dk: (Shared<T>, [usize; 4]),
    /// dV and its strides.
    pub dv: (Shared<T>, [usize; 4]),
    /// Gradients of the sinks, `[batch, heads_q]`.
    pub d_sinks: Shared<f64>,
}

/// Queries of a panel.
pub const fn panel<E: Engine>() -> usize {
    E::BACKWARD.vectors * E::S::LANES
}

/// f32 slots of dQ of a head, as the tasks keep it: panels, then vectors, then features by lanes.
pub fn dq_len<E: Engine>(problem: &AttentionProblem, seqlen_q: usize) -> usize {
    seqlen_q.div_ceil(panel::<E>()) * panel::<E>() * E::o_rows(problem.head_dim)
}

/// Keys of a block: as many as leave K, V, Kᵀ, dK and dV in about 1 1/2 MiB of L2.
fn block_keys<E: Engine>(problem: &AttentionProblem) -> usize {
    let bytes = (problem.head_dim + problem.head_dim_v) * (4 + 2 * size_of::<E::T>());
    (1536 * 1024 / bytes / E::BACKWARD.chunk).clamp(1, 8) * E::BACKWARD.chunk
}

/// Scratch of one thread.
pub struct Workspace {
    // One head's queries, prepared: Q and dO as right operands over features and over queries.
    q: Buffer,
    d_o: Buffer,
    q_right: Buffer,
    do_right: Buffer,
    /// −lse in base 2, and D.
    minus_lse: Buffer,
    delta: Buffer,
    finite: Vec<bool>,
    dq: Buffer,
    // A block of keys, prepared.
    k: Buffer,
    v: Buffer,
    kt: Buffer,
    // All keys of the task.
    dk: Buffer,
    dv: Buffer,
    // One chunk of one panel.
    s: Buffer,
    dp: Buffer,
    p_left: Buffer,
    ds_left: Buffer,
    ds_right: Buffer,
    /// Side strips of one vector, see [`EXTRA`].
    extra: Buffer,
    pack: Buffer,
    mods: Scratch,
    /// dQ of the workspace serves tasks that are not split.
    own_dq: bool,
}

impl Workspace {
    /// Scratch for tasks of up to `keys` keys.
    pub fn new<E: Engine>(problem: &AttentionProblem, keys: usize, split: bool) -> Self {
        let Shape { vectors, chunk, step } = E::BACKWARD;
        let (d, dv) = (problem.head_dim, problem.head_dim_v);
        let panels = problem.seqlen_q.div_ceil(panel::<E>());
        let block = block_keys::<E>(problem);
        Workspace {
            q: Buffer::new(panels * E::q_len(d, vectors)),
            d_o: Buffer::new(panels * E::q_len(dv, vectors)),
            q_right: Buffer::new(panels * E::right_len(d, vectors)),
            do_right: Buffer::new(panels * E::right_len(dv, vectors)),
            minus_lse: Buffer::new(panels * panel::<E>()),
            delta: Buffer::new(panels * panel::<E>()),
            finite: vec![true; panels],
            dq: Buffer::new(if split { 0 } else { dq_len::<E>(problem, problem.seqlen_q) }),
            k: Buffer::new(E::k_len(d, block)),
            v: Buffer::new(E::k_len(dv, block)),
            kt: Buffer::new(E::vt_len(d, block)),
            dk: Buffer::new(E::rows_len(d, keys)),
            dv: Buffer::new(E::rows_len(dv, keys)),
            s: Buffer::new(panel::<E>() * step),
            dp: Buffer::new(panel::<E>() * step),
            p_left: Buffer::new(E::left_len(vectors, chunk)),
            ds_left: Buffer::new(E::left_len(vectors, chunk)),
            ds_right: Buffer::new(E::p_len(vectors, chunk)),
            extra: Buffer::new(EXTRA * step * E::S::LANES),
            pack: Buffer::new(E::scratch_len(d.max(dv))),
            mods: Scratch::default(),
            own_dq: !split,
        }
    }
}

/// What a step on one panel and one chunk works with.
struct Step<'r> {
    seq: Sequence,
    batch: usize,
    head: usize,
    /// First query, and how many of the panel exist.
    q0: usize,
    rows: usize,
    /// Panel number.
    panel: usize,
    /// Keys, and the runs of the schedule that they are from.
    part: Range<usize>,
    runs: &'r [Run],
    dq: *mut f32,
    /// dK and dV of the part's first key on.
    dk: *mut f32,
    dv: *mut f32,
    tables: &'r Tables,
}

/// Does one task.
///
/// # Safety
/// The CPU has E's instructions; `cx` and `given` passed validation; `out` addresses tensors of the problem's shapes,
/// and no other thread touches the task's rows (nor its dQ and table gradients); `ws` was made for as many keys.
#[inline(always)]
pub unsafe fn task<E: Engine>(
    cx: &Context<'_, E::T>,
    given: &Given<'_, E::T>,
    out: &Target<E::T>,
    task: &Task,
    ws: &mut Workspace,
) {
    let Shape { chunk, .. } = E::BACKWARD;
    let problem = cx.problem;
    let (d, dv) = (problem.head_dim, problem.head_dim_v);
    let seq = problem.sequence(task.batch);
    let k = Rows::of(&cx.inputs.k, seq.batch, seq.kv_row, task.kv_head);
    let v = Rows::of(&cx.inputs.v, seq.batch, seq.kv_row, task.kv_head);
    let panels = seq.seqlen_q.div_ceil(panel::<E>());
    let dq_len = dq_len::<E>(problem, seq.seqlen_q);
    let block = block_keys::<E>(problem);
    let tile_n = cx.schedule.tile_n();
    let group = problem.group();
    // SAFETY: the workspace has the engine's sizes; rows and keys stay inside the sequence.
    unsafe {
        E::enter();
        clear(ws.dk.ptr(), E::rows_len(d, task.keys.len()));
        clear(ws.dv.ptr(), E::rows_len(dv, task.keys.len()));
        for i in 0..group {
            let head = task.kv_head * group + i;
            prepare_queries::<E>(cx, given, out, task, &seq, head, ws);
            let dq = if ws.own_dq { ws.dq.ptr() } else { task.dq.get().add(i * dq_len) };
            clear(dq, dq_len);
            let mut start = task.keys.start;
            while start < task.keys.end {
                let keys = start..(start + block).min(task.keys.end);
                start = keys.end;
                let kc = E::pack_k(k.skip(keys.start), keys.len(), ws.k.ptr());
                let vc = E::pack_k(v.skip(keys.start), keys.len(), ws.v.ptr());
                let kt = E::pack_vt(k.skip(keys.start), keys.len(), block, ws.kt.ptr());
                let finite = !cx.program.has_mask()
                    || all_finite::<E::S, E::T>(k.skip(keys.start), keys.len())
                        && all_finite::<E::S, E::T>(v.skip(keys.start), keys.len());
                for p in 0..panels {
                    let row = cx.schedule.row(task.batch, head, p);
                    for first in keys.clone().step_by(chunk) {
                        let chunk = first..(first + chunk).min(keys.end);
                        for (part, runs) in Stretches::new(row, tile_n, chunk.clone()) {
                            let (at, offset) = (part.start - keys.start, part.start - task.keys.start);
                            let q0 = p * panel::<E>();
                            let step = Step {
                                seq,
                                batch: task.batch,
                                head,
                                q0,
                                rows: (seq.seqlen_q - q0).min(panel::<E>()),
                                panel: p,
                                part,
                                runs,
                                dq: dq.add(p * panel::<E>() * E::o_rows(d)),
                                dk: ws.dk.ptr().add(E::rows_at(d, offset, 0)),
                                dv: ws.dv.ptr().add(E::rows_at(dv, offset, 0)),
                                tables: &task.tables,
                            };
                            let partial = runs.iter().any(|r| r.kind == BlockKind::Partial);
                            if partial && !(finite && ws.finite[p]) {
                                careful_step::<E>(cx, given, &step, ws);
                            } else {
                                let operands =
                                    (E::skip_k(kc, at, d), E::skip_k(vc, at, dv), E::skip_vt(kt, at));
                                fast_step::<E>(cx, &step, operands, ws);
                            }
                        }
                    }
                }
            }
            if !given.split {
                for p in 0..panels {
                    let dq = dq.add(p * panel::<E>() * E::o_rows(d));
                    write_dq::<E>(problem, &seq, head, p, dq, out, ws.pack.ptr());
                }
            }
        }
        write_rows::<E>(problem.scale(), ws.dk.ptr(), d, &seq, task, out.dk, ws.pack.ptr());
        write_rows::<E>(1.0, ws.dv.ptr(), dv, &seq, task, out.dv, ws.pack.ptr());
        E::leave();
    }
}

/// # Safety
/// `p` is valid for `n` f32.
unsafe fn clear(p: *mut f32, n: usize) {
    // SAFETY: the caller's.
    unsafe { std::ptr::write_bytes(p, 0, n) }
}

/// Prepares Q, dO, lse and D of a head, and adds up the gradient of its sink.
///
/// # Safety
/// As [`task`].
#[inline(always)]
unsafe fn prepare_queries<E: Engine>(
    cx: &Context<'_, E::T>,
    given: &Given<'_, E::T>,
    out: &Target<E::T>,
    task: &Task,
    seq: &Sequence,
    head: usize,
    ws: &mut Workspace,
) {
    let vectors = E::BACKWARD.vectors;
    let (d, dv) = (cx.problem.head_dim, cx.problem.head_dim_v);
    let q = Rows::of(&cx.inputs.q, seq.batch, seq.q_row, head);
    let o = Rows::of(&given.grads.o, seq.batch, seq.q_row, head);
    let d_o = Rows::of(&given.grads.d_o, seq.batch, seq.q_row, head);
    let lse_start = cx.problem.lse_start(seq, head);
    let sink = cx.inputs.sinks.map(|s| s[head]);
    let mut d_sink = 0.0f64;
    // SAFETY: rows below seqlen_q exist; buffers hold all panels.
    unsafe {
        for p in 0..seq.seqlen_q.div_ceil(panel::<E>()) {
            // A panel that sees none of the task's keys is not needed, except for the gradient of a sink.
            let runs = cx.schedule.row(task.batch, head, p);
            let mut seen = Stretches::new(runs, cx.schedule.tile_n(), task.keys.clone());
            if seen.next().is_none() && sink.is_none() {
                continue;
            }
            let q0 = p * panel::<E>();
            let rows = (seq.seqlen_q - q0).min(panel::<E>());
            let (q, o, d_o) = (q.skip(q0), o.skip(q0), d_o.skip(q0));
            let pack = ws.pack.ptr();
            let dst = ws.q.ptr().add(p * E::q_len(d, vectors));
            E::pack_q(q, cx.query_rows(rows), vectors, cx.negate(), dst, pack);
            E::pack_q(d_o, rows, vectors, false, ws.d_o.ptr().add(p * E::q_len(dv, vectors)), pack);
            E::pack_right(q, rows, vectors, ws.q_right.ptr().add(p * E::right_len(d, vectors)));
            E::pack_right(d_o, rows, vectors, ws.do_right.ptr().add(p * E::right_len(dv, vectors)));
            let mut finite = !cx.program.has_mask()
                || all_finite::<E::S, E::T>(q, rows) && all_finite::<E::S, E::T>(d_o, rows);
            for i in 0..panel::<E>() {
                let (mut minus_lse, mut delta) = (f32::NEG_INFINITY, 0.0);
                if i < rows {
                    let at = lse_start + q0 + i;
                    let lse = given.grads.lse[at];
                    let dot = dot::<E::S, E::T>(o.skip(i), d_o.skip(i));
                    delta = dot - given.grads.d_lse.map_or(0.0, |x| x[at]);
                    // exp2(s − ∞) = 0: a row that sees nothing has no gradient.
                    minus_lse = if lse == f32::NEG_INFINITY { lse } else { lse * -LOG2_E };
                    if let Some(sink) = sink
                        && lse != f32::NEG_INFINITY
                    {
                        d_sink -= f64::from((sink - lse).exp()) * f64::from(delta);
                    }
                    if lse == f32::NEG_INFINITY && !delta.is_finite() {
                        delta = 0.0;
                    }
                    finite &= delta.is_finite();
                }
                *ws.minus_lse.ptr().add(q0 + i) = minus_lse;
                *ws.delta.ptr().add(q0 + i) = delta;
            }
            ws.finite[p] = finite;
        }
        if sink.is_some() && task.keys.start == 0 {
            *out.d_sinks.get().add(task.batch * cx.problem.heads_q + head) = d_sink;
        }
    }
}

/// Σ x·y over a row.
///
/// # Safety
/// Both rows are valid and of the same length.
#[inline(always)]
unsafe fn dot<S: Simd, T: Element>(x: Rows<T>, y: Rows<T>) -> f32 {
    // SAFETY: indices stay below dim.
    unsafe {
        let (mut sum, mut tail) = (S::splat(0.0), 0.0);
        let mut i = 0;
        while i + S::LANES <= x.dim {
            sum = S::fma(
                crate::engine::load::<S, T>(x.ptr.add(i)),
                crate::engine::load::<S, T>(y.ptr.add(i)),
                sum,
            );
            i += S::LANES;
        }
        while i < x.dim {
            tail += (*x.ptr.add(i)).to_f32() * (*y.ptr.add(i)).to_f32();
            i += 1;
        }
        S::sum(sum) + tail
    }
}

/// One panel against one chunk of keys.
///
/// # Safety
/// As [`task`]; `operands` are K, V and Kᵀ from the part's first key on.
#[inline(always)]
unsafe fn fast_step<E: Engine>(
    cx: &Context<'_, E::T>,
    at: &Step<'_>,
    operands: (Left, Left, Left),
    ws: &mut Workspace,
) {
    let Shape { vectors: all, chunk, step } = E::BACKWARD;
    let l = <E::S as Simd>::LANES;
    let (d, dv) = (cx.problem.head_dim, cx.problem.head_dim_v);
    let (k, v, kt) = operands;
    let vectors = at.rows.div_ceil(l).next_multiple_of(E::VECTOR_MULTIPLE);
    let modified = cx.program.has_score_mod();
    // SAFETY: buffers hold a panel by a chunk (scores: by a step).
    unsafe {
        let (s, dp) = (ws.s.ptr(), ws.dp.ptr());
        let (p_left, ds_left, ds_right) =
            if E::IN_PLACE { (s, dp, dp) } else { (ws.p_left.ptr(), ws.ds_left.ptr(), ws.ds_right.ptr()) };
        let q = ws.q.ptr().add(at.panel * E::q_len(d, all));
        let d_o = ws.d_o.ptr().add(at.panel * E::q_len(dv, all));
        let mut first = 0;
        while first < at.part.len() {
            let rows = (at.part.len() - first).min(step);
            E::scores(E::skip_k(k, first, d), rows, d, q, vectors, s, step);
            E::scores(E::skip_k(v, first, dv), rows, dv, d_o, vectors, dp, step);
            let keys = at.part.start + first..at.part.start + first + rows;
            for v in 0..vectors {
                let strip = Strips {
                    keys: &keys,
                    q0: at.q0 + v * l,
                    s: s.add(v * step * l),
                    dp: dp.add(v * step * l),
                    minus_lse: ws.minus_lse.ptr().add(at.q0 + v * l),
                    delta: ws.delta.ptr().add(at.q0 + v * l),
                    scale: if modified { LOG2_E } else { cx.scale() * LOG2_E },
                };
                let store = Store { p_left, ds_left, ds_right, all, chunk, v, first };
                if modified || cx.program.has_mask() || cx.dropper.is_some() {
                    strip.modify::<E>(cx, at, ws.extra.ptr(), &mut ws.mods);
                }
                strip.pad::<E>();
                match (cx.dropper.is_some(), modified) {
                    (false, false) => strip.gradients::<E, false, false>(ws.extra.ptr(), &store),
                    (false, true) => strip.gradients::<E, false, true>(ws.extra.ptr(), &store),
                    (true, false) => strip.gradients::<E, true, false>(ws.extra.ptr(), &store),
                    (true, true) => strip.gradients::<E, true, true>(ws.extra.ptr(), &store),
                }
            }
            first += rows;
        }
        let n = at.part.len();
        let q_right = ws.q_right.ptr().add(at.panel * E::right_len(d, all));
        let do_right = ws.do_right.ptr().add(at.panel * E::right_len(dv, all));
        E::accumulate_rows(p_left, chunk, n, do_right, vectors, dv, at.dv);
        E::accumulate_rows(ds_left, chunk, n, q_right, vectors, d, at.dk);
        E::accumulate_o(kt, n, d, ds_right, chunk, vectors, at.dq, Init::Add);
    }
}

/// The scores of one vector of queries, and what belongs to them.
struct Strips<'a> {
    keys: &'a Range<usize>,
    q0: usize,
    s: *mut f32,
    dp: *mut f32,
    minus_lse: *const f32,
    delta: *const f32,
    /// From score to exponent of 2.
    scale: f32,
}

/// Where P and dS go: operands made for `all` vectors and `chunk` keys, from row `first` of vector `v` on.
struct Store {
    p_left: *mut f32,
    ds_left: *mut f32,
    ds_right: *mut f32,
    all: usize,
    chunk: usize,
    v: usize,
    first: usize,
}

/// Strips of side buffers: score mod's derivative, dropout's factor, raw scores, dS before the derivative.
const EXTRA: usize = 4;

impl Strips<'_> {
    /// Score mod, mask, dropout and the gradients of tables.
    ///
    /// # Safety
    /// As [`fast_step`]; `extra` holds [`EXTRA`] strips.
    #[inline(always)]
    unsafe fn modify<E: Engine>(
        &self,
        cx: &Context<'_, E::T>,
        at: &Step<'_>,
        extra: *mut f32,
        scratch: &mut Scratch,
    ) {
        let l = <E::S as Simd>::LANES;
        let n = self.keys.len() * l;
        let side = E::BACKWARD.step * l;
        // SAFETY: n elements of each strip are initialised by `scores`, or here.
        unsafe {
            let [factor, keep, raw, ds] = [0, 1, 2, 3].map(|i| extra.add(i * side));
            if cx.program.has_table_grads() {
                std::ptr::copy_nonoverlapping(self.s, raw, n);
            }
            for run in at.runs {
                let masked = run.kind == BlockKind::Partial;
                let keys = keys_of(run, cx.schedule.tile_n(), self.keys);
                if keys.is_empty() || !masked && !cx.program.has_score_mod() {
                    continue;
                }
                let offset = (keys.start - self.keys.start) * l;
                let here = cx.strip(&at.seq, at.batch, at.head, self.q0, keys.clone());
                let scores = std::slice::from_raw_parts_mut(self.s.add(offset), keys.len() * l);
                let derivative = std::slice::from_raw_parts_mut(factor.add(offset), keys.len() * l);
                let task = Modify::ApplyWithDerivative { scores, derivative, masked };
                E::S::perform(cx.program, &here, task, scratch);
            }
            let here = cx.strip(&at.seq, at.batch, at.head, self.q0, self.keys.clone());
            if let Some(dropper) = &cx.dropper {
                let keep = std::slice::from_raw_parts_mut(keep, n);
                keep.fill(1.0);
                E::S::drop_out(dropper, &here, keep);
            }
            if cx.program.has_table_grads() {
                let (minus_lse, delta) = (E::S::load(self.minus_lse), E::S::load(self.delta));
                for i in (0..n).step_by(l) {
                    let p = probability::<E>(E::S::load(self.s.add(i)), self.scale, minus_lse);
                    let mut dp = E::S::load(self.dp.add(i));
                    if cx.dropper.is_some() {
                        dp = E::S::mul(dp, E::S::load(keep.add(i)));
                    }
                    E::S::store(ds.add(i), E::S::mul(p, E::S::sub(dp, delta)));
                }
                let mut tables = at.tables.slices();
                let task = Modify::TableGrads {
                    scores: std::slice::from_raw_parts(raw, n),
                    d_scores: std::slice::from_raw_parts(ds, n),
                    grads: &mut tables,
                };
                E::S::perform(cx.program, &here, task, scratch);
            }
        }
    }

    /// Rows up to the next `ROW_MULTIPLE` become keys that nothing sees.
    ///
    /// # Safety
    /// The strips hold these rows.
    #[inline(always)]
    unsafe fn pad<E: Engine>(&self) {
        let l = <E::S as Simd>::LANES;
        for r in self.keys.len()..self.keys.len().next_multiple_of(E::ROW_MULTIPLE) {
            // SAFETY: the caller's.
            unsafe {
                E::S::store(self.s.add(r * l), E::S::splat(f32::NEG_INFINITY));
                E::S::store(self.dp.add(r * l), E::S::splat(0.0));
            }
        }
    }

    /// P and dS from S and dP; `DROP`: with dropout's factors; `MODIFIED`: with the score mod's derivative.
    ///
    /// # Safety
    /// As [`fast_step`].
    #[inline(always)]
    unsafe fn gradients<E: Engine, const DROP: bool, const MODIFIED: bool>(
        &self,
        extra: *const f32,
        to: &Store,
    ) {
        let l = <E::S as Simd>::LANES;
        let side = E::BACKWARD.step * l;
        let (factor, keep) = (extra, extra.wrapping_add(side));
        let rows = self.keys.len().next_multiple_of(E::ROW_MULTIPLE);
        // SAFETY: the caller's sizes.
        unsafe {
            let (minus_lse, delta) = (E::S::load(self.minus_lse), E::S::load(self.delta));
            let mut r = 0;
            while r < rows {
                let mut p = [E::S::splat(0.0); 2];
                let mut ds = [E::S::splat(0.0); 2];
                for i in 0..2 {
                    let at = (r + i) * l;
                    p[i] = probability::<E>(E::S::load(self.s.add(at)), self.scale, minus_lse);
                    let mut dp = E::S::load(self.dp.add(at));
                    if DROP {
                        dp = E::S::mul(dp, E::S::load(keep.add(at)));
                    }
                    ds[i] = E::S::mul(p[i], E::S::sub(dp, delta));
                    if MODIFIED {
                        ds[i] = E::S::mul(ds[i], E::S::load(factor.add(at)));
                    }
                    if DROP {
                        p[i] = E::S::mul(p[i], E::S::load(keep.add(at)));
                    }
                }
                let row = to.first + r;
                E::store_left(to.p_left, to.all, to.chunk, to.v, row, p[0], p[1]);
                E::store_left(to.ds_left, to.all, to.chunk, to.v, row, ds[0], ds[1]);
                if !E::IN_PLACE {
                    E::store_p(to.ds_right, to.chunk, to.v, row, ds[0], ds[1]);
                }
                r += 2;
            }
        }
    }
}

/// exp(s − lse) in base 2.
///
/// # Safety
/// The CPU has E's instructions.
#[inline(always)]
unsafe fn probability<E: Engine>(s: F<E>, scale: f32, minus_lse: F<E>) -> F<E> {
    // SAFETY: the caller's.
    unsafe { E::exp2(E::S::fma(s, E::S::splat(scale), minus_lse)) }
}

/// [`fast_step`] element by element over what is visible: for partial blocks of operands that are not finite, where
/// 0 · NaN would reach rows that do not see the NaN.
///
/// # Safety
/// As [`task`].
unsafe fn careful_step<E: Engine>(
    cx: &Context<'_, E::T>,
    given: &Given<'_, E::T>,
    at: &Step<'_>,
    ws: &mut Workspace,
) {
    let l = <E::S as Simd>::LANES;
    let (d, dv) = (cx.problem.head_dim, cx.problem.head_dim_v);
    let kv_head = at.head / cx.problem.group();
    let seq = &at.seq;
    for i in 0..at.rows {
        let q = cx.inputs.q.row(seq.batch, seq.q_row + at.q0 + i, at.head);
        let d_o = given.grads.d_o.row(seq.batch, seq.q_row + at.q0 + i, at.head);
        // SAFETY: the panel has `rows` queries; accumulators hold the part's keys.
        unsafe {
            let (minus_lse, delta) = (*ws.minus_lse.ptr().add(at.q0 + i), *ws.delta.ptr().add(at.q0 + i));
            for key in at.part.clone() {
                let here = cx.strip(seq, at.batch, at.head, at.q0 + i, key..key + 1);
                if !cx.program.visible(&here) {
                    continue;
                }
                let k = cx.inputs.k.row(seq.batch, seq.kv_row + key, kv_head);
                let v = cx.inputs.v.row(seq.batch, seq.kv_row + key, kv_head);
                let dot = |x: &[E::T], y: &[E::T]| -> f32 {
                    x.iter().zip(y).map(|(x, y)| x.to_f32() * y.to_f32()).sum()
                };
                let sign = if cx.negate() { -1.0 } else { 1.0 };
                let raw = dot(q, k) * sign;
                let (s, derivative) = cx.program.modified(&here, raw);
                let scale = if cx.program.has_score_mod() { LOG2_E } else { cx.scale() * LOG2_E };
                let p = s.mul_add(scale, minus_lse).exp2();
                let mut keep = [1.0f32];
                if let Some(dropper) = &cx.dropper {
                    dropper.apply::<1>(&here, &mut keep);
                }
                let ds_modified = p * (dot(d_o, v) * keep[0] - delta);
                let ds = ds_modified * derivative;
                if cx.program.has_table_grads() {
                    let mut tables = at.tables.slices();
                    let (scores, mut d_scores) = ([raw; 16], [0.0; 16]);
                    d_scores[0] = ds_modified;
                    let task = Modify::TableGrads {
                        scores: &scores[..l],
                        d_scores: &d_scores[..l],
                        grads: &mut tables,
                    };
                    E::S::perform(cx.program, &here, task, &mut ws.mods);
                }
                let row = key - at.part.start;
                for (c, x) in d_o.iter().enumerate() {
                    *at.dv.add(E::rows_at(dv, row, c)) += p * keep[0] * x.to_f32();
                }
                for (c, x) in q.iter().enumerate() {
                    *at.dk.add(E::rows_at(d, row, c)) += ds * x.to_f32();
                }
                for (c, x) in k.iter().enumerate() {
                    *at.dq.add((i / l * E::o_rows(d) + c) * l + i % l) += ds * x.to_f32();
                }
            }
        }
    }
}

/// A panel of queries of one head.
#[derive(Clone, Copy, Debug)]
pub struct Panel {
    /// Sequence.
    pub batch: usize,
    /// Query head.
    pub head: usize,
    /// Which panel.
    pub number: usize,
}

/// dQ of one head as its tasks have left it: `count` parts, `stride` f32 apart.
#[derive(Clone, Copy, Debug)]
pub struct DqParts {
    /// The first part.
    pub first: Shared<f32>,
    /// From one part to the next.
    pub stride: usize,
    /// Number of parts.
    pub count: usize,
}

/// Adds up the parts of dQ of one panel, in order, and writes it.
///
/// # Safety
/// `parts` addresses the dQ of all tasks of the head; no other thread touches the panel.
#[inline(always)]
pub unsafe fn reduce<E: Engine>(
    problem: &AttentionProblem,
    at: Panel,
    parts: DqParts,
    out: &Target<E::T>,
    ws: &mut Workspace,
) {
    let Panel { batch, head, number: p } = at;
    let seq = problem.sequence(batch);
    let n = panel::<E>() * E::o_rows(problem.head_dim);
    let DqParts { first, stride, count } = parts;
    // SAFETY: the caller's; the first part holds the sum.
    unsafe {
        let sum = first.get().add(p * n);
        for i in 1..count {
            let part = sum.add(i * stride);
            let mut j = 0;
            while j < n {
                E::S::store(sum.add(j), E::S::add(E::S::load(sum.add(j)), E::S::load(part.add(j))));
                j += <E::S as Simd>::LANES;
            }
        }
        write_dq::<E>(problem, &seq, head, p, sum, out, ws.pack.ptr());
    }
}

/// Writes a panel of dQ, scaled.
///
/// # Safety
/// As [`reduce`].
#[inline(always)]
unsafe fn write_dq<E: Engine>(
    problem: &AttentionProblem,
    seq: &Sequence,
    head: usize,
    p: usize,
    dq: *mut f32,
    out: &Target<E::T>,
    pack: *mut f32,
) {
    let l = <E::S as Simd>::LANES;
    let (dst, strides) = out.dq;
    let o_rows = E::o_rows(problem.head_dim);
    // Q was negated for a negative scale, but K was not: dS K takes the scale's sign here.
    let scale = [problem.scale(); 16];
    let q0 = p * panel::<E>();
    let rows = (seq.seqlen_q - q0).min(panel::<E>());
    for v in 0..rows.div_ceil(l) {
        let lanes = (rows - v * l).min(l);
        let first = seq.q_row + q0 + v * l;
        let start = seq.batch * strides[0] + first * strides[1] + head * strides[2];
        // SAFETY: the caller's.
        unsafe {
            let dst = dst.get().wrapping_add(start);
            let rows = dq.add(v * o_rows * l);
            write_transposed::<E>(rows, problem.head_dim, &scale, lanes, dst, strides[1], pack);
        }
    }
}

/// Rows of dK and dV that are asked for before they are written.
const WRITE_AHEAD: usize = 8;

/// Writes dK or dV of a task.
///
/// # Safety
/// As [`task`].
#[inline(always)]
unsafe fn write_rows<E: Engine>(
    scale: f32,
    rows: *const f32,
    dim: usize,
    seq: &Sequence,
    task: &Task,
    (dst, strides): (Shared<E::T>, [usize; 4]),
    pack: *mut f32,
) {
    for key in 0..task.keys.len() {
        let row = seq.kv_row + task.keys.start + key;
        let start = seq.batch * strides[0] + row * strides[1] + task.kv_head * strides[2];
        // SAFETY: the key exists; `pack` holds a row.
        unsafe {
            fetch_to_write::<E>(dst.get().wrapping_add(start + WRITE_AHEAD * strides[1]), dim);
            for c in 0..dim {
                *pack.add(c) = *rows.add(E::rows_at(dim, key, c)) * scale;
            }
            narrow::<E::S, E::T>(pack, dim, dst.get().add(start));
        }
    }
}
