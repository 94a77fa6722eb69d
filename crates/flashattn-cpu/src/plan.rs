//! [`Plan`]: a problem made ready for this CPU, and its execution on threads.

use crate::arch::{self, Isa};
use crate::memory::{Buffer, Pool, Shared, bytes_of};
use crate::mods::{Dropper, ScoreProgram};
use crate::{backward, decode, forward};
use flashattn_spec::blocks::BlockSchedule;
use flashattn_spec::{
    AttentionProblem, DType, Element, GradInputs, Gradients, Inputs, Outputs, ProblemError, Sequence,
};

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Why a call was refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CpuError {
    /// The problem or a tensor is wrong.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// The expression of the mask or score mod cannot be compiled.
    #[error("mask or score mod: {0}")]
    Expr(#[from] flashattn_spec::expr::ExprError),
    /// This executor does not have it.
    #[error("{feature} is not supported on the CPU")]
    Unsupported {
        /// What was asked for.
        feature: String,
    },
}

/// How to run, beside what.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Instruction set; `None` takes the best of this CPU. One that the CPU lacks is refused.
    pub isa: Option<Isa>,
    /// Threads; `None` takes those of the current rayon pool. Results do not depend on it.
    pub threads: Option<usize>,
}

/// Tasks of the backward pass below which the keys of a head are split, so that small problems have work for several
/// threads. A constant, so that results do not depend on the number of threads. Each part has a dQ of its own in f32
/// and prepares all queries again: with 8 heads of 2048 tokens, two parts take twice the memory of one and 10 % more
/// CPU time. So heads alone are enough where there are 8.
const MIN_TASKS: usize = 8;
/// Parts of a head, at most, and keys of a part, at least. The number of parts is the same for all sequences of
/// `MAX_PARTS * MIN_KEYS` keys and longer: memory is linear in the length.
const MAX_PARTS: usize = 4;
const MIN_KEYS: usize = 256;
/// Tasks of a thread below which tiles of the forward pass are made smaller, for balance.
const TASKS_PER_THREAD: usize = 4;
/// Bytes of a tile's Q and O in f32, at most: they stay in L2 beside a chunk of K and V, which is prepared once a tile.
const MAX_TILE_BYTES: usize = 1 << 20;
/// Keys of a block of the schedule.
pub(crate) const TILE_N: usize = 32;

/// A problem made ready: programs and schedules are made once, `forward` and `backward` run many times.
///
/// A schedule is made by the first call that needs it, when tensors of the problem's size have been seen: planning
/// costs the same, next to nothing, for any size.
pub struct Plan {
    problem: AttentionProblem,
    isa: Isa,
    threads: usize,
    program: ScoreProgram,
    /// Queries of a panel, and of a tile, of the forward pass.
    panel: usize,
    tile: usize,
    forward_schedule: OnceLock<Result<BlockSchedule, ProblemError>>,
    backward_schedule: OnceLock<Result<BlockSchedule, ProblemError>>,
    // Memory of earlier calls: fresh pages cost about as much as the work on them.
    prepared: Pool<Buffer>,
    dq_parts: Pool<Buffer>,
    o_parts: Pool<Buffer>,
    decode_scratch: Pool<decode::Workspace>,
    forward_scratch: Pool<forward::Workspace>,
    backward_scratch: Pool<backward::Workspace>,
}

impl Plan {
    /// Validates and plans.
    pub fn new(problem: &AttentionProblem, options: Options) -> Result<Self, CpuError> {
        problem.validate()?;
        let mut problem = problem.clone();
        if problem.varlen.is_some() {
            // Scratch is made for the longest sequence that there is, not for the longest that was announced.
            let lengths = (0..problem.batch).map(|b| problem.sequence(b)).map(|s| [s.seqlen_q, s.seqlen_k]);
            [problem.seqlen_q, problem.seqlen_k] =
                lengths.fold([0; 2], |[q, k], s| [q.max(s[0]), k.max(s[1])]);
        }
        if problem.dtype == DType::F64 {
            return Err(CpuError::Unsupported { feature: "dtype f64".into() });
        }
        let isa = options.isa.unwrap_or_else(Isa::detect);
        if !Isa::available().contains(&isa) {
            return Err(CpuError::Unsupported {
                feature: format!("instruction set {isa} (this CPU lacks it)"),
            });
        }
        let panel = match problem.dtype {
            DType::Bf16 => kernels::<half::bf16>(isa)?.panel,
            DType::F16 => kernels::<half::f16>(isa)?.panel,
            _ => kernels::<f32>(isa)?.panel,
        };
        let tasks = |tile: usize| {
            sum_over_sequences(&problem, |s| s.seqlen_q.div_ceil(tile).saturating_mul(problem.heads_q))
        };
        let threads = options.threads.unwrap_or_else(rayon::current_num_threads).max(1);
        let longest = problem.seqlen_q;
        // Tiles of equal length. Their number does not show in results: each row has its own sums.
        let row_bytes = (problem.head_dim + problem.head_dim_v) * size_of::<f32>();
        let max_tile = (MAX_TILE_BYTES / row_bytes).clamp(panel, forward::MAX_PANELS * panel);
        let mut parts = longest.div_ceil(max_tile).max(1);
        let length = |parts: usize| longest.div_ceil(parts).next_multiple_of(panel);
        while length(parts) > panel && tasks(length(parts)) < TASKS_PER_THREAD * threads {
            parts += 1;
        }
        let tile = length(parts).max(panel);
        let lowered = problem.lower()?;
        Ok(Plan {
            program: ScoreProgram::new(
                lowered.score_mod.as_ref(),
                lowered.mask.as_ref(),
                problem.scale().abs(),
            )?,
            problem,
            threads,
            isa,
            panel,
            tile,
            forward_schedule: OnceLock::new(),
            backward_schedule: OnceLock::new(),
            prepared: Pool::default(),
            dq_parts: Pool::default(),
            o_parts: Pool::default(),
            decode_scratch: Pool::default(),
            forward_scratch: Pool::default(),
            backward_scratch: Pool::default(),
        })
    }

    /// Fills o and lse.
    pub fn forward<T: Element>(
        &self,
        inputs: &Inputs<'_, T>,
        out: &mut Outputs<'_, T>,
    ) -> Result<(), CpuError> {
        inputs.check(&self.problem)?;
        out.check(&self.problem)?;
        let kernels = kernels::<T>(self.isa)?;
        let schedule =
            self.forward_schedule.get_or_init(|| BlockSchedule::new(&self.problem, self.panel, TILE_N));
        let mut cx = self.context(schedule.as_ref().map_err(Clone::clone)?, inputs);
        let target = forward::Target {
            strides: out.o.strides(),
            o: Shared(out.o.data_mut().as_mut_ptr()),
            lse: Shared(out.lse.as_mut_ptr()),
        };
        if decode::suits(&self.problem) {
            self.decode(&kernels.decode, &cx, &target);
            return Ok(());
        }
        let mut memory = None;
        if let Some(prepare) = &kernels.prepare {
            let mut chunks = Vec::new();
            let mut first_chunk = Vec::new();
            for batch in 0..self.problem.batch {
                first_chunk.push(chunks.len());
                let n = self.problem.sequence(batch).seqlen_k;
                for kv_head in 0..self.problem.heads_kv {
                    chunks.extend((0..n).step_by(prepare.keys).map(|start| (batch, kv_head, start)));
                }
            }
            let (chunk_len, _) = (prepare.len)(&self.problem);
            let memory = memory.insert(self.prepared.take(|| Buffer::new(chunks.len() * chunk_len)));
            cx.prepared = Some(forward::Prepared { memory: Shared(memory.ptr()), chunk_len, first_chunk });
            run_tasks(
                self.threads,
                chunks.len(),
                &Pool::default(),
                || (),
                |(), i| {
                    let (batch, kv_head, start) = chunks[i];
                    // SAFETY: as below; every chunk is prepared once.
                    unsafe { (prepare.chunk)(&cx, batch, kv_head, start) }
                },
            );
        }
        let mut tasks = Vec::new();
        for batch in 0..self.problem.batch {
            let n = self.problem.sequence(batch).seqlen_q;
            for head in 0..self.problem.heads_q {
                for q0 in (0..n).step_by(self.tile) {
                    tasks.push(forward::Task { batch, head, q0, rows: (n - q0).min(self.tile) });
                }
            }
        }
        // Causal tiles grow with q0: longest first leaves no straggler at the end.
        // Heads one after the other: the threads share a head's K and V.
        tasks.sort_by_key(|t| (t.batch, t.head, std::cmp::Reverse(t.q0)));
        run_tasks(
            self.threads,
            tasks.len(),
            &self.forward_scratch,
            || (kernels.forward_workspace)(&self.problem, self.tile),
            |ws, i| {
                // SAFETY: `kernels` are for an ISA of this CPU; tensors were checked against the problem; tasks
                // write disjoint rows.
                unsafe { (kernels.forward)(&cx, &target, tasks[i], ws) }
            },
        );
        if let Some(memory) = memory {
            self.prepared.put(memory);
        }
        Ok(())
    }

    fn decode<T: Element>(
        &self,
        kernels: &arch::Decode<T>,
        cx: &forward::Context<'_, T>,
        target: &forward::Target<T>,
    ) {
        let together = decode::heads_together(&self.problem, &cx.inputs);
        let tasks = decode::tasks(&self.problem, together);
        let len = decode::part_len(&self.problem);
        let total = tasks.len() * together * len;
        let mut memory = self.o_parts.take(|| Buffer::new(total));
        if memory.len() < total {
            // The tasks depend on how the tensors lie, which may differ from call to call.
            memory = Buffer::new(total);
        }
        let start = Shared(memory.ptr());
        let part = |i: usize| Shared(start.get().wrapping_add(i * together * len));
        let workspace = || (kernels.workspace)(&self.problem);
        run_tasks(self.threads, tasks.len(), &self.decode_scratch, workspace, |ws, i| {
            // SAFETY: the kernels are for an ISA of this CPU; tensors were checked against the problem; each task
            // has parts of its own.
            unsafe { (kernels.task)(cx, &tasks[i], part(i).get(), ws) }
        });
        let mut merges = Vec::new();
        for (i, task) in tasks.iter().enumerate().filter(|(_, task)| task.keys.start == 0) {
            let same = |t: &&decode::Task| (t.batch, &t.kv_heads) == (task.batch, &task.kv_heads);
            let count = tasks[i..].iter().take_while(same).count();
            for (h, kv_head) in task.kv_heads.clone().enumerate() {
                let first = Shared(part(i).get().wrapping_add(h * len));
                let parts = decode::Parts { first, stride: together * len, count };
                merges.push((task.batch, kv_head, parts));
            }
        }
        run_tasks(
            self.threads,
            merges.len(),
            &Pool::default(),
            || (),
            |(), i| {
                let (batch, kv_head, parts) = merges[i];
                // SAFETY: as above; all tasks have ended, and rows of a KV head are merged once.
                unsafe { (kernels.merge)(cx, target, batch, kv_head, parts) }
            },
        );
        self.o_parts.put(memory);
    }

    /// Fills dq, dk, dv and what else is asked for, from the forward's results.
    pub fn backward<T: Element>(
        &self,
        inputs: &Inputs<'_, T>,
        given: &GradInputs<'_, T>,
        out: &mut Gradients<'_, T>,
    ) -> Result<(), CpuError> {
        let problem = &self.problem;
        inputs.check(problem)?;
        given.check(problem)?;
        out.check(problem)?;
        let kernels = kernels::<T>(self.isa)?;
        let parts = self.split_keys(kernels.backward_chunk);
        let split = parts.split;
        let schedule = self
            .backward_schedule
            .get_or_init(|| BlockSchedule::new(problem, kernels.backward_panel, TILE_N));
        let cx = self.context(schedule.as_ref().map_err(Clone::clone)?, inputs);
        let given = backward::Given { grads: *given, split };

        // dQ of every task, when the keys of a head are split.
        let group = problem.group();
        let mut dq_start = Vec::new();
        let mut dq_total = 0;
        if split {
            for task in &parts.tasks {
                dq_start.push(dq_total);
                dq_total += group * (kernels.dq_len)(problem, problem.sequence(task.batch).seqlen_q);
            }
        }
        let mut dq_memory = self.dq_parts.take(|| Buffer::new(dq_total));
        let dq_parts = Shared(dq_memory.ptr());
        let mut d_sinks = vec![0.0f64; if problem.sinks { problem.batch * problem.heads_q } else { 0 }];
        let (mut tables, lanes) = TableParts::new(self, out, &parts.tasks);
        let tasks: Vec<backward::Task> = parts
            .tasks
            .iter()
            .enumerate()
            .map(|(i, task)| backward::Task {
                // In bounds: `dq_start` has one entry a task, each inside the buffer.
                dq: Shared(dq_parts.get().wrapping_add(dq_start.get(i).copied().unwrap_or(0))),
                tables: tables.of(lanes.lane(i)),
                ..task.clone()
            })
            .collect();
        let target = backward::Target {
            dq: (Shared(out.dq.data_mut().as_mut_ptr()), out.dq.strides()),
            dk: (Shared(out.dk.data_mut().as_mut_ptr()), out.dk.strides()),
            dv: (Shared(out.dv.data_mut().as_mut_ptr()), out.dv.strides()),
            d_sinks: Shared(d_sinks.as_mut_ptr()),
        };
        let workspace = || (kernels.backward_workspace)(problem, parts.longest, split);
        // One lane's tasks share table gradients: they run one after the other, in order.
        run_tasks(self.threads, lanes.count, &self.backward_scratch, workspace, |ws, lane| {
            for task in lanes.tasks(lane, &tasks) {
                // SAFETY: `kernels` are for an ISA of this CPU; tensors were checked against the problem; tasks
                // write disjoint keys, dQ parts or heads, and table gradients of their own lane.
                unsafe { (kernels.backward)(&cx, &given, &target, task, ws) }
            }
        });
        if split {
            let mut panels = Vec::new();
            let mut first = 0;
            while first < tasks.len() {
                let task = &tasks[first];
                let same = |t: &&backward::Task| (t.batch, t.kv_head) == (task.batch, task.kv_head);
                let count = tasks[first..].iter().take_while(same).count();
                let seqlen_q = problem.sequence(task.batch).seqlen_q;
                let n = (kernels.dq_len)(problem, seqlen_q);
                for i in 0..group {
                    let first = Shared(task.dq.get().wrapping_add(i * n));
                    let parts = backward::DqParts { first, stride: group * n, count };
                    let (batch, head) = (task.batch, task.kv_head * group + i);
                    for p in 0..seqlen_q.div_ceil(kernels.backward_panel) {
                        panels.push((backward::Panel { batch, head, number: p }, parts));
                    }
                }
                first += count;
            }
            run_tasks(self.threads, panels.len(), &self.backward_scratch, workspace, |ws, i| {
                let (at, parts) = panels[i];
                // SAFETY: as above; every panel is reduced once, after all tasks have ended.
                unsafe { (kernels.reduce)(problem, at, parts, &target, ws) }
            });
        }
        self.dq_parts.put(dq_memory);
        if let Some(out) = &mut out.d_sinks {
            for (head, x) in out.iter_mut().enumerate() {
                let sum: f64 = (0..problem.batch).map(|b| d_sinks[b * problem.heads_q + head]).sum();
                *x = sum as f32;
            }
        }
        tables.finish(&mut out.d_tables);
        Ok(())
    }

    fn context<'a, T: Element>(
        &'a self,
        schedule: &'a BlockSchedule,
        inputs: &Inputs<'a, T>,
    ) -> forward::Context<'a, T> {
        forward::Context {
            problem: &self.problem,
            schedule,
            program: &self.program,
            dropper: self.problem.dropout.map(Dropper::new),
            inputs: *inputs,
            prepared: None,
        }
    }

    /// Bytes of working memory that [`Plan::forward`] takes beside the tensors: operands in the order in which they are
    /// used, and accumulators, for each thread. The first call allocates it, later ones use it again. It is an upper
    /// bound if threads have nothing to do; lists of tasks and of blocks to skip, small beside it, are not counted.
    pub fn forward_workspace_bytes(&self) -> usize {
        match self.problem.dtype {
            DType::Bf16 => self.forward_bytes::<half::bf16>(),
            DType::F16 => self.forward_bytes::<half::f16>(),
            _ => self.forward_bytes::<f32>(),
        }
    }

    /// As [`Plan::forward_workspace_bytes`], of [`Plan::backward`]: linear in the sequence length from 1024 keys on, and
    /// below that with a smaller factor.
    pub fn backward_workspace_bytes(&self) -> usize {
        match self.problem.dtype {
            DType::Bf16 => self.backward_bytes::<half::bf16>(),
            DType::F16 => self.backward_bytes::<half::f16>(),
            _ => self.backward_bytes::<f32>(),
        }
    }

    fn forward_bytes<T: Element>(&self) -> usize {
        let problem = &self.problem;
        // `Plan::new` has refused types without kernels.
        let Ok(kernels) = kernels::<T>(self.isa) else { return 0 };
        let (tasks, scratch, shared) = if decode::suits(problem) {
            // How tasks are cut depends on how the tensors lie: heads together or one by one.
            let parts = |together: usize| {
                // So many heads have one task each, whose list need not be made to count them.
                let heads = problem.batch.saturating_mul(problem.heads_kv);
                let tasks = if heads <= 4096 {
                    decode::tasks(problem, together).len()
                } else {
                    heads.div_ceil(together)
                };
                (tasks, tasks.saturating_mul(together).saturating_mul(decode::part_len(problem)))
            };
            let (one, all) = (parts(1), parts(decode::most_together::<T>(problem)));
            (one.0.max(all.0), bytes_of(|| (kernels.decode.workspace)(problem)), one.1.max(all.1))
        } else {
            let tasks = sum_over_sequences(problem, |s| {
                s.seqlen_q.div_ceil(self.tile).saturating_mul(problem.heads_q)
            });
            let prepared = kernels.prepare.map_or(0, |prepare| {
                let chunks = |s: Sequence| s.seqlen_k.div_ceil(prepare.keys).saturating_mul(problem.heads_kv);
                sum_over_sequences(problem, chunks).saturating_mul((prepare.len)(problem).0)
            });
            (tasks, bytes_of(|| (kernels.forward_workspace)(problem, self.tile)), prepared)
        };
        scratch.saturating_mul(self.threads.min(tasks)).saturating_add(shared.saturating_mul(4))
    }

    fn backward_bytes<T: Element>(&self) -> usize {
        let problem = &self.problem;
        let Ok(kernels) = kernels::<T>(self.isa) else { return 0 };
        let keys = |n| part_keys(problem, n, kernels.backward_chunk);
        let parts = |s: Sequence| s.seqlen_k.max(1).div_ceil(keys(s.seqlen_k));
        let longest = problem.seqlen_k.min(keys(problem.seqlen_k));
        let split = longest < problem.seqlen_k;
        let tasks = sum_over_sequences(problem, |s| parts(s).saturating_mul(problem.heads_kv));
        let dq = |s| {
            parts(s).saturating_mul(problem.heads_q).saturating_mul((kernels.dq_len)(problem, s.seqlen_q))
        };
        let dq = if split { sum_over_sequences(problem, dq).saturating_mul(4) } else { 0 };
        let tables: usize = problem.grad_tables().iter().map(|t| t.data().len()).sum();
        let lanes = if self.program.has_table_grads() { lane_count(tables, tasks) } else { 0 };
        let scratch = bytes_of(|| (kernels.backward_workspace)(problem, longest, split));
        let threads = self.threads.min(if lanes > 0 { lanes } else { tasks });
        let tables = lanes.saturating_mul(tables).saturating_mul(4);
        scratch.saturating_mul(threads).saturating_add(dq).saturating_add(tables)
    }

    /// The tasks of the backward pass: every KV head of every sequence, its keys in several ranges where heads
    /// are few and sequences long.
    fn split_keys(&self, chunk: usize) -> Parts {
        let problem = &self.problem;
        let mut parts = Parts { tasks: Vec::new(), longest: 0, split: false };
        for batch in 0..problem.batch {
            let n = problem.sequence(batch).seqlen_k;
            let keys = part_keys(problem, n, chunk);
            for kv_head in 0..problem.heads_kv {
                // A sequence without keys has a task too: its dQ is 0, and its sinks have gradients.
                for start in (0..n.max(1)).step_by(keys) {
                    let keys = start..(start + keys).min(n);
                    parts.longest = parts.longest.max(keys.len());
                    parts.split |= keys.len() < n;
                    let (dq, tables) = (Shared(std::ptr::null_mut()), backward::Tables::default());
                    parts.tasks.push(backward::Task { batch, kv_head, keys, dq, tables });
                }
            }
        }
        parts
    }
}

/// Keys of each part of a sequence of `n` keys in the backward pass.
fn part_keys(problem: &AttentionProblem, n: usize, chunk: usize) -> usize {
    let heads = problem.batch.saturating_mul(problem.heads_kv).max(1);
    let parts = MIN_TASKS.div_ceil(heads).min(MAX_PARTS).min(n / MIN_KEYS).max(1);
    // Parts would make a copy each of the gradients of tables.
    let parts = if problem.grad_tables().is_empty() { parts } else { 1 };
    n.div_ceil(parts).next_multiple_of(chunk).max(1)
}

/// The sum over all sequences, without looking at each where all are alike.
fn sum_over_sequences(problem: &AttentionProblem, of: impl Fn(Sequence) -> usize) -> usize {
    let (sequences, times) =
        if problem.varlen.is_some() { (problem.batch, 1) } else { (problem.batch.min(1), problem.batch) };
    let sum = (0..sequences).map(|b| of(problem.sequence(b))).fold(0, usize::saturating_add);
    sum.saturating_mul(times)
}

fn kernels<T: Element>(isa: Isa) -> Result<arch::Kernels<T>, CpuError> {
    arch::kernels::<T>(isa).ok_or_else(|| CpuError::Unsupported { feature: format!("dtype {}", T::DTYPE) })
}

struct Parts {
    tasks: Vec<backward::Task>,
    /// Keys of the longest task.
    longest: usize,
    /// Whether some head has more than one task.
    split: bool,
}

/// Which tasks run one after the other because they add to the same table gradients.
struct Lanes {
    count: usize,
    tasks: usize,
}

impl Lanes {
    fn lane(&self, task: usize) -> usize {
        task % self.count.max(1)
    }

    fn tasks<'t>(
        &self,
        lane: usize,
        tasks: &'t [backward::Task],
    ) -> impl Iterator<Item = &'t backward::Task> {
        debug_assert_eq!(self.tasks, tasks.len());
        tasks.iter().skip(lane).step_by(self.count.max(1))
    }
}

/// Table gradients of each lane. Their number is fixed, so the sum's order does not depend on the threads.
struct TableParts {
    lens: Vec<usize>,
    lanes: Vec<Vec<Vec<f32>>>,
}

/// Lanes, at most, where tables want gradients: each has a copy of these tables.
const MAX_LANES: usize = 8;
/// Elements of all tables' gradients together beyond which there is one lane only.
const MAX_LANE_ELEMENTS: usize = 1 << 22;

/// Lanes for tasks that add to tables of so many elements.
fn lane_count(elements: usize, tasks: usize) -> usize {
    if elements > MAX_LANE_ELEMENTS { 1 } else { tasks.min(MAX_LANES) }
}

impl TableParts {
    fn new<T: Element>(plan: &Plan, out: &Gradients<'_, T>, tasks: &[backward::Task]) -> (Self, Lanes) {
        let lens: Vec<usize> = out.d_tables.iter().map(|t| t.len()).collect();
        if !plan.program.has_table_grads() {
            let count = tasks.len();
            return (TableParts { lens, lanes: Vec::new() }, Lanes { count, tasks: count });
        }
        let count = lane_count(lens.iter().sum(), tasks.len());
        let lanes = (0..count).map(|_| lens.iter().map(|&n| vec![0.0; n]).collect()).collect();
        (TableParts { lens, lanes }, Lanes { count, tasks: tasks.len() })
    }

    fn of(&mut self, lane: usize) -> backward::Tables {
        let Some(lane) = self.lanes.get_mut(lane) else { return backward::Tables::default() };
        backward::Tables(lane.iter_mut().map(|t| (Shared(t.as_mut_ptr()), t.len())).collect())
    }

    fn finish(self, out: &mut [&mut [f32]]) {
        for (i, (out, n)) in out.iter_mut().zip(self.lens).enumerate() {
            for (j, x) in out.iter_mut().enumerate().take(n) {
                *x = self.lanes.iter().map(|lane| lane[i][j]).sum();
            }
        }
    }
}

/// Runs tasks 0 .. n on up to `threads` threads, each with a workspace of its own, in order of their numbers.
fn run_tasks<W: Send>(
    threads: usize,
    n: usize,
    pool: &Pool<W>,
    workspace: impl Fn() -> W + Sync,
    task: impl Fn(&mut W, usize) + Sync,
) {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut ws = None;
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                break;
            }
            task(ws.get_or_insert_with(|| pool.take(&workspace)), i);
        }
        if let Some(ws) = ws {
            pool.put(ws);
        }
    };
    let threads = threads.min(n);
    if threads <= 1 {
        return worker();
    }
    rayon::scope(|s| {
        for _ in 1..threads {
            s.spawn(|_| worker());
        }
        worker();
    });
}
