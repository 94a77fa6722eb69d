//! The plan of a backward pass: three kernels with the same arguments.

use std::collections::HashMap;
use std::ops::Range;

use flashattn_spec::blocks::{BlockKind, BlockSchedule};
use flashattn_spec::expr::{Node, NodeId, Program, Traced, Var};
use flashattn_spec::{AttentionProblem, DType, ProblemError, philox};
use ptx::instr::Element;

use super::{Argument, Data, Feature, PlanError, Strides, Upload, band};
use crate::config;
use crate::kernels::{BwdConfig, MaskKind, TableGrad, TableShape, superaccumulator, table_indices, turns};

fn unsupported<T>(feature: Feature, got: String, expected: impl Into<String>) -> Result<T, PlanError> {
    Err(PlanError::Unsupported { feature, executor: "flash_bwd_sm90", got, expected: expected.into() })
}

/// A tensor of the caller's, or memory that the launches need besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GradTensor {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// The forward pass' output.
    O,
    /// Its log-sum-exp, f32, dense.
    Lse,
    /// Gradient of the output.
    DO,
    /// Gradient of lse, f32, dense.
    DLse,
    /// Sink logits, f32 by query head.
    Sinks,
    /// Gradient of the queries.
    DQ,
    /// Gradient of the keys.
    DK,
    /// Gradient of the values.
    DV,
    /// Gradient of the sinks, f32 by query head.
    DSinks,
    /// Gradient of this one of [`AttentionProblem::grad_tables`], f32.
    DTable(usize),
    /// Workspace: dQ in f32.
    DqSums,
    /// Workspace: how far each block of keys has come that takes turns to add to dQ.
    Turns,
    /// Workspace: statistics of each row.
    Stats,
    /// Workspace: parts of the sinks' gradient.
    SinkSums,
    /// Workspace: exact sums, of which the gradient of this table is made.
    TableSums(usize),
    /// One u32 that is 0 before the launches and after them.
    Counter,
    /// The plan's upload of this index.
    Upload(usize),
}

/// Strides of a call's tensors `[batch, seqlen, heads, head_dim]`, in elements; the last is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GradStrides {
    /// Of q, k, v and o.
    pub forward: Strides,
    /// Of the gradient of o.
    pub d_o: [usize; 4],
    /// Of the gradient of q.
    pub dq: [usize; 4],
    /// Of the gradient of k.
    pub dk: [usize; 4],
    /// Of the gradient of v.
    pub dv: [usize; 4],
}

/// A backward pass, ready to be bound to memory and launched, in this order on one stream:
///
/// 1. [`BackwardPlan::zeroed`] is filled with zeros;
/// 2. [`crate::kernels::flash_bwd_sm90_preprocess`], [`crate::kernels::flash_bwd_sm90`] and
///    [`crate::kernels::flash_bwd_sm90_queries`] with [`BackwardPlan::grids`] blocks, as far as these are more than none.
///
/// dK, dV and the sinks' gradient are bit-identical over runs; so is dQ if it has a kernel of its own or blocks of keys take turns to
/// add to it, one of which a deterministic plan has, or if there is one block of keys only. Gradients of tables are added up in any
/// order; in a deterministic plan without rounding, so that they, too, are bit-identical.
#[derive(Clone, Debug)]
pub struct BackwardPlan {
    /// The kernels' config.
    pub config: BwdConfig,
    /// Arguments in the kernels' order.
    pub arguments: Vec<Argument<GradTensor>>,
    /// What [`GradTensor::Upload`] counts.
    pub uploads: Vec<Upload>,
    /// Workspace and its bytes, linear in the number of queries, and of elements of tables. What it holds before and after does not
    /// matter.
    pub workspace: Vec<(GradTensor, usize)>,
    /// Outputs and workspace that are added to.
    pub zeroed: Vec<GradTensor>,
    /// Blocks of the preprocessing kernel, and of the one after the main one that takes dQ from its sums.
    pub query_blocks: u32,
    /// Items of work of the main kernel.
    pub items: u32,
    /// Items of work of the kernel that computes dQ by itself; 0 if there is none.
    pub query_items: u32,
}

impl BackwardPlan {
    /// Plans the backward pass of a problem whose tensors have these strides; `d_lse`: with a gradient through lse.
    ///
    /// # Errors
    /// What is wrong with the problem, or what the kernels do not take.
    pub fn new(
        problem: &AttentionProblem,
        strides: &GradStrides,
        d_lse: bool,
        deterministic: bool,
    ) -> Result<BackwardPlan, PlanError> {
        problem.validate()?;
        let lowered = problem.lower()?;
        let reach = band(problem, lowered.mask.is_some());
        let by_blocks = lowered.mask.filter(|_| reach.is_none());
        let mut config = configure(problem, reach, &by_blocks, &lowered.score_mod)?;
        config.d_lse = d_lse;
        if deterministic {
            // Each query sees all keys up to some, so that blocks of keys follow each other.
            let prefix = matches!(reach, Some([None, _]));
            let masked = reach != Some([None, None]);
            let many = problem.seqlen_k > config::DETERMINISTIC_OWN_DQ[usize::from(masked)];
            config.turns = many && prefix && !config.own_dq && lowered.score_mod.is_none();
            config.own_dq = !config.turns;
            exact_sums(problem, lowered.score_mod.as_ref(), &mut config)?;
        }
        let [query_blocks, items, query_items] = count(problem, &config)?;
        let mut plan = BackwardPlan {
            config,
            arguments: Vec::new(),
            uploads: Vec::new(),
            workspace: Vec::new(),
            zeroed: Vec::new(),
            query_blocks,
            items,
            query_items,
        };
        plan.tensors(problem, strides)?;
        plan.memory(problem);
        plan.sizes(problem);
        match reach {
            Some(reach) => {
                let sides = reach.into_iter().flatten();
                plan.arguments.extend(sides.map(|reach| Argument::S32(reach as i32)));
            }
            None => plan.schedule(problem)?,
        }
        plan.tables("mask", by_blocks.as_ref())?;
        plan.tables("score mod", lowered.score_mod.as_ref())?;
        plan.table_grads(lowered.score_mod.as_ref());
        plan.options(problem);
        Ok(plan)
    }

    /// Blocks to launch of the three kernels on a GPU of so many multiprocessors; a kernel of 0 is not launched.
    pub fn grids(&self, multiprocessors: u32) -> [u32; 3] {
        let after =
            if self.config.own_dq { self.query_items.min(multiprocessors) } else { self.query_blocks };
        [self.query_blocks, self.items.min(multiprocessors), after]
    }

    /// Bytes of workspace in all.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace.iter().map(|&(_, bytes)| bytes).sum()
    }

    /// Checks that a tensor may lie at this address.
    ///
    /// # Errors
    /// [`Feature::Address`].
    pub fn check_address(&self, tensor: GradTensor, address: u64) -> Result<(), PlanError> {
        use GradTensor::{DK, DO, DQ, DV, DqSums, K, O, Q, Stats, TableSums, V};
        let align = match tensor {
            Q | K | V | DO | DqSums | Stats => 16,
            O => BwdConfig::o_bytes(self.config.head_dim_v),
            DQ | DK => BwdConfig::gradient_bytes(self.config.head_dim),
            DV => BwdConfig::gradient_bytes(self.config.head_dim_v),
            TableSums(_) => 8,
            _ => 4,
        };
        let align = u64::from(align);
        if address.is_multiple_of(align) {
            return Ok(());
        }
        let got = format!("{tensor:?} at address {address:#x}");
        unsupported(Feature::Address, got, format!("a multiple of {align} bytes"))
    }

    fn upload(&mut self, name: String, data: Data) {
        self.uploads.push(Upload { name, data });
        self.arguments.push(Argument::Address(GradTensor::Upload(self.uploads.len() - 1)));
    }

    /// Tensor maps, addresses and strides.
    fn tensors(&mut self, problem: &AttentionProblem, strides: &GradStrides) -> Result<(), PlanError> {
        use GradTensor::{DK, DO, DQ, DV, K, O, Q, V};
        let given = &strides.forward;
        let loaded = [
            (Q, problem.q_shape(), given.q),
            (K, problem.k_shape(), given.k),
            (V, problem.v_shape(), given.v),
            (DO, problem.o_shape(), strides.d_o),
        ];
        let (mut shapes, mut bytes) = ([[1; 4]; 4], [[0; 3]; 4]);
        for (i, (tensor, [b, n, h, d], [sb, sn, sh, _])) in loaded.into_iter().enumerate() {
            // Of an empty tensor nothing is loaded, but a tensor map must be one.
            shapes[i] = [d, n, h, b].map(|size| size.max(1) as u64);
            for (to, (dim, size, stride)) in
                [("seqlen", n, sn), ("heads", h, sh), ("batch", b, sb)].into_iter().enumerate()
            {
                bytes[i][to] = if size > 1 { tma_stride(tensor, dim, stride)? } else { 16 };
            }
        }
        let maps = self.config.tensor_maps(shapes, bytes).map(Some);
        // A map over an empty tensor would leave its memory: one of another stands in, unused.
        let full = |i: usize| !loaded[i].1.contains(&0);
        for (i, map) in maps.iter().enumerate() {
            let stand_in = if full(i) { i } else { usize::from(!full(0)) };
            if let Some(map) = if stand_in == i { map } else { &maps[stand_in] } {
                self.arguments.push(Argument::TensorMap(map.clone(), loaded[stand_in].0));
            }
        }
        let plain = [
            (O, problem.o_shape(), given.o),
            (DQ, problem.q_shape(), strides.dq),
            (DK, problem.k_shape(), strides.dk),
            (DV, problem.v_shape(), strides.dv),
        ];
        for (tensor, [b, n, h, d], [sb, sn, sh, _]) in plain {
            let bytes = if tensor == O { BwdConfig::o_bytes } else { BwdConfig::gradient_bytes };
            let elements = bytes(d as u32) as usize / 2;
            for (dim, size, stride) in [("batch", b, sb), ("seqlen", n, sn), ("heads", h, sh)] {
                if size > 1 && !stride.is_multiple_of(elements) {
                    let got = format!("{tensor:?} with a {dim} stride of {stride} elements");
                    return unsupported(Feature::Stride, got, format!("a multiple of {elements}"));
                }
            }
        }
        let all = [
            (Q, given.q),
            (K, given.k),
            (V, given.v),
            (O, given.o),
            (DO, strides.d_o),
            (DQ, strides.dq),
            (DK, strides.dk),
            (DV, strides.dv),
        ];
        for (tensor, strides) in all {
            self.arguments.push(Argument::Address(tensor));
            self.arguments.extend(strides[..3].iter().map(|&x| Argument::U64(x as u64)));
        }
        Ok(())
    }

    /// lse, workspace and sinks.
    fn memory(&mut self, problem: &AttentionProblem) {
        use GradTensor::{Counter, DLse, DSinks, DqSums, Lse, SinkSums, Sinks, Stats, Turns};
        self.arguments.push(Argument::Address(Lse));
        if self.config.d_lse {
            self.arguments.push(Argument::Address(DLse));
        }
        let [_, queries, heads, _] = problem.q_shape();
        self.arguments.extend([heads * queries, queries].map(|x| Argument::U64(x as u64)));
        let tiles = tiles(problem, &self.config) * problem.heads_q;
        self.workspace = vec![(Stats, tiles * self.config.stats_bytes() as usize)];
        if !self.config.own_dq {
            self.workspace.push((DqSums, tiles * self.config.dq_sum_bytes() as usize));
            self.arguments.push(Argument::Address(DqSums));
        }
        if self.config.turns {
            self.workspace.push((Turns, self.items as usize * turns::BYTES as usize));
            self.zeroed.push(Turns);
            self.arguments.push(Argument::Address(Turns));
        }
        self.arguments.extend([Stats, Counter].map(Argument::Address));
        if self.config.sinks {
            self.workspace.push((SinkSums, tiles * 4));
            self.arguments.extend([Sinks, DSinks, SinkSums].map(Argument::Address));
            if self.query_blocks == 0 {
                self.zeroed.push(DSinks);
            }
        }
    }

    /// Lengths, heads and the scale.
    fn sizes(&mut self, p: &AttentionProblem) {
        let items = p.seqlen_k.div_ceil(self.config.tile_n() as usize);
        let pairs = p.heads_kv * p.batch;
        let masked = self.config.mask != MaskKind::Band { left: false, right: false };
        let m_blocks = p.seqlen_q.div_ceil(self.config.tile_m as usize);
        let least = if self.config.turns { config::turns_head_group(m_blocks, masked) } else { 1 };
        let head_group = config::backward_head_group(items, masked).max(least).min(pairs.max(1));
        let tiles = tiles(p, &self.config);
        let numbers = [p.seqlen_q, p.seqlen_k, p.heads_q, p.heads_kv, p.batch, head_group, tiles];
        // They fit: validated to be below 2³⁰, and the pairs are at most the items.
        self.arguments.extend(numbers.map(|x| Argument::U32(x as u32)));
        self.arguments.push(Argument::F32(p.scale()));
    }

    /// The blocks of queries of each block of keys, as the kernels' `rows` and `runs`; and those of keys of each item of queries, if
    /// dQ has a kernel of its own.
    fn schedule(&mut self, problem: &AttentionProblem) -> Result<(), PlanError> {
        let (tile_m, tile_n) = (self.config.tile_m as usize, self.config.tile_n() as usize);
        let n_blocks = problem.seqlen_k.div_ceil(tile_n);
        let columns = BlockSchedule::new(problem, tile_m, tile_n)?;
        self.lists(problem, &columns, ["rows", "runs"], n_blocks, |batch, head, n_block| {
            columns.column(batch, head, n_block)
        })?;
        if self.config.own_dq {
            let items = problem.seqlen_q.div_ceil(BwdConfig::QUERIES as usize);
            let rows = BlockSchedule::new(problem, BwdConfig::QUERIES as usize, tile_n)?;
            self.lists(problem, &rows, ["query_rows", "query_runs"], items, |batch, head, item| {
                rows.row(batch, head, item).iter().map(|run| (run.n_blocks(), run.kind)).collect()
            })?;
        }
        Ok(())
    }

    /// Uploads for each (sequence, head) `many` lists of runs of blocks.
    fn lists(
        &mut self,
        problem: &AttentionProblem,
        schedule: &BlockSchedule,
        names: [&str; 2],
        many: usize,
        list: impl Fn(usize, usize, usize) -> Vec<(Range<usize>, BlockKind)>,
    ) -> Result<(), PlanError> {
        let (mut rows, mut runs) = (Vec::new(), Vec::<u32>::new());
        // Sequences and heads that the mask cannot tell apart share their runs, by where their first lies.
        let mut known: HashMap<_, Vec<[u32; 4]>> = HashMap::new();
        for (batch, head) in (0..problem.batch).flat_map(|b| (0..problem.heads_q).map(move |h| (b, h))) {
            let class =
                (schedule.row(batch, head, 0).as_ptr(), schedule.m_blocks(batch), schedule.n_blocks(batch));
            let of_class = known.entry(class).or_insert_with(|| {
                let row = |number| {
                    let (first, mut blocks) = (runs.len() / 2, 0);
                    for (range, kind) in list(batch, head, number) {
                        blocks += range.len();
                        let partial = if kind == BlockKind::Partial { 1 << 31 } else { 0 };
                        runs.extend([range.start as u32 | partial, range.end as u32]);
                    }
                    [first as u32, (runs.len() / 2 - first) as u32, blocks as u32, 0]
                };
                (0..many).map(row).collect()
            });
            rows.extend(of_class.iter().flatten());
        }
        if u32::try_from(runs.len() / 2).is_err() {
            return unsupported(
                Feature::Size,
                format!("{} runs of blocks", runs.len() / 2),
                "fewer than 2^32",
            );
        }
        for (name, mut words) in names.into_iter().zip([rows, runs]) {
            // No buffer is empty.
            words.resize(words.len().max(4), 0);
            self.upload(name.to_owned(), Data::Words(words));
        }
        Ok(())
    }

    /// A program's tables: the address, and the sizes of the dimensions that are not 1.
    fn tables(&mut self, of: &str, traced: Option<&Traced>) -> Result<(), PlanError> {
        for (i, table) in traced.into_iter().flat_map(|traced| &traced.tables).enumerate() {
            if u32::try_from(table.data().len()).is_err() {
                let got = format!("a table of the {of} of shape {:?}", table.shape());
                return unsupported(Feature::Size, got, "fewer than 2^32 elements");
            }
            self.upload(format!("{of} table {i}"), Data::Table(table.clone()));
            self.sizes_of(table.dims());
        }
        Ok(())
    }

    fn sizes_of(&mut self, dims: [usize; 4]) {
        self.arguments.extend(dims.into_iter().filter(|&d| d != 1).map(|d| Argument::U32(d as u32)));
    }

    /// Gradients of tables, up to the last that is added to.
    fn table_grads(&mut self, score_mod: Option<&Traced>) {
        use GradTensor::{DTable, TableSums};
        let wanted: Vec<_> = score_mod.iter().flat_map(|s| &s.tables).filter(|t| t.wants_grad()).collect();
        self.zeroed.extend((0..wanted.len()).map(DTable));
        let last = self.config.table_grads.iter().map(|grad| grad.table).max();
        for (i, table) in wanted.iter().enumerate().take(last.map_or(0, |last| last + 1)) {
            self.arguments.push(Argument::Address(DTable(i)));
            let Some(&grad) = self.config.table_grads.iter().find(|grad| grad.table == i) else { continue };
            self.sizes_of(table.dims());
            if grad.exact {
                self.arguments.push(Argument::Address(TableSums(i)));
                self.workspace.push((TableSums(i), table.data().len() * superaccumulator::BYTES as usize));
                self.zeroed.push(TableSums(i));
            }
        }
    }

    /// Dropout, packed sequences.
    fn options(&mut self, problem: &AttentionProblem) {
        if let Some(dropout) = problem.dropout.filter(|_| self.config.dropout) {
            let [low, high] = philox::key(dropout.seed);
            self.arguments.extend([low, high, philox::threshold(dropout.p)].map(Argument::U32));
            self.arguments.push(Argument::F32(1.0 / (1.0 - dropout.p)));
        }
        if let Some(varlen) = &problem.varlen {
            for (name, offsets) in
                [("cu_seqlens_q", &varlen.cu_seqlens_q), ("cu_seqlens_k", &varlen.cu_seqlens_k)]
            {
                let words = offsets.iter().map(|&x| x as u32).collect();
                self.upload(name.to_owned(), Data::Words(words));
            }
        }
    }
}

fn configure(
    p: &AttentionProblem,
    band: Option<[Option<usize>; 2]>,
    mask: &Option<Traced>,
    score_mod: &Option<Traced>,
) -> Result<BwdConfig, PlanError> {
    let element = match p.dtype {
        DType::Bf16 => Element::BF16,
        DType::F16 => Element::F16,
        other => return unsupported(Feature::DType, other.to_string(), "bf16 or f16"),
    };
    let dropout = p.dropout.is_some_and(|dropout| dropout.p > 0.0);
    let programs = usize::from(mask.is_some()) + usize::from(score_mod.is_some());
    let Some(tiles) = config::backward_sm90(p.head_dim, p.head_dim_v, programs, dropout) else {
        let most = config::BACKWARD_SM90.map(|row| row.head_dim).into_iter().max().unwrap_or(0);
        let got = format!("head_dim {}, head_dim_v {}", p.head_dim, p.head_dim_v);
        return unsupported(Feature::HeadDim, got, format!("at most {most} each"));
    };
    let shapes = |traced: &Traced| -> Vec<TableShape> {
        traced.tables.iter().map(|table| table.dims().map(|size| size != 1)).collect()
    };
    let mut table_grads = Vec::new();
    let score_mod = match score_mod {
        None => None,
        Some(traced) => {
            let wants = |slot: usize| traced.tables[slot].wants_grad();
            let gradients = traced
                .expr
                .gradients(|slot| wants(slot.index()))
                .map_err(|error| PlanError::from(ProblemError::ScoreMod(error.into())))?;
            let shapes = shapes(traced);
            table_grads.extend(gradients.tables.iter().map(|grad| {
                let slot = grad.slot.index();
                let table = (0..slot).filter(|&other| wants(other)).count();
                TableGrad { shape: shapes[slot], table, exact: false }
            }));
            Some((gradients.program, shapes))
        }
    };
    Ok(BwdConfig {
        element,
        head_dim: p.head_dim as u32,
        head_dim_v: p.head_dim_v as u32,
        tile_m: tiles.tile_m,
        split: tiles.split,
        stages: tiles.stages,
        do_stages: tiles.do_stages,
        mask: match band {
            Some([left, right]) => MaskKind::Band { left: left.is_some(), right: right.is_some() },
            None => MaskKind::Blocks,
        },
        mask_program: mask.as_ref().map(|traced| ((*traced.expr).clone(), shapes(traced))),
        // What is dropped meets dP as 0, which may be infinite where nothing else is.
        repair: p.varlen.is_some() || band != Some([None, None]) || score_mod.is_some() || dropout,
        score_mod,
        table_grads,
        dropout,
        sinks: p.sinks,
        d_lse: false,
        varlen: p.varlen.is_some(),
        own_dq: p.seqlen_k <= tiles.own_dq[usize::from(band != Some([None, None]))],
        turns: false,
    })
}

/// Which gradients of tables need exact sums so as not to depend on the order of their terms: those with elements that have several.
fn exact_sums(
    p: &AttentionProblem,
    score_mod: Option<&Traced>,
    config: &mut BwdConfig,
) -> Result<(), PlanError> {
    let (Some(traced), Some((program, _))) = (score_mod, &config.score_mod) else { return Ok(()) };
    let wanted: Vec<_> = traced.tables.iter().filter(|table| table.wants_grad()).collect();
    let mut terms = vec![0; wanted.len()];
    for (grad, index) in config.table_grads.iter().zip(table_indices(program)) {
        terms[grad.table] += most_terms(p, program, index, wanted[grad.table].dims());
    }
    for grad in &mut config.table_grads {
        let terms = terms[grad.table];
        if terms >= superaccumulator::MAX_TERMS {
            let got = format!("{terms} terms of an element of a table's gradient, deterministic");
            return unsupported(Feature::Size, got, format!("fewer than {}", superaccumulator::MAX_TERMS));
        }
        grad.exact = terms > 1;
    }
    Ok(())
}

/// How many pairs of queries and keys at most add to one element of a table's gradient: of all those that its index does not tell
/// apart by itself.
fn most_terms(p: &AttentionProblem, program: &Program, index: [NodeId; 4], dims: [usize; 4]) -> u128 {
    let sizes = [(Var::Batch, p.batch), (Var::Head, p.heads_q), (Var::Q, p.seqlen_q), (Var::Kv, p.seqlen_k)];
    let told_apart = |(var, size): (Var, usize)| {
        // Beyond the edge indices are clamped to it.
        let mut indices = index.iter().zip(dims);
        indices.any(|(node, dim)| program.nodes()[node.index()] == Node::Var(var) && size <= dim)
    };
    sizes.into_iter().filter(|&size| !told_apart(size)).map(|(_, size)| size as u128).product()
}

/// Tiles of queries of a head, over all sequences; of packed ones an upper bound that is linear in their length.
fn tiles(p: &AttentionProblem, config: &BwdConfig) -> usize {
    let tile_m = config.tile_m as usize;
    match p.varlen {
        Some(_) => p.total_q() / tile_m + p.batch,
        None => p.batch * p.seqlen_q.div_ceil(tile_m),
    }
}

/// Blocks of queries of all heads and sequences, and items of keys: 0 if there are none.
fn count(p: &AttentionProblem, config: &BwdConfig) -> Result<[u32; 3], PlanError> {
    let blocks = |total: usize, longest: usize, tile: u32, heads: usize| {
        let each = if total == 0 { 0 } else { longest.div_ceil(tile as usize) };
        let blocks = each as u128 * heads as u128 * p.batch as u128;
        // Each block takes one number more than there are items.
        match u32::try_from(blocks) {
            Ok(blocks) if blocks < 1 << 31 => Ok(blocks),
            _ => unsupported(Feature::Size, format!("{blocks} blocks of {tile} rows"), "fewer than 2^31"),
        }
    };
    let queries = |tile: u32| blocks(p.total_q(), p.seqlen_q, tile, p.heads_q);
    let items = blocks(p.total_k(), p.seqlen_k, config.tile_n(), p.heads_kv)?;
    let query_items = if config.own_dq { queries(BwdConfig::QUERIES)? } else { 0 };
    Ok([queries(config.tile_m)?, items, query_items])
}

/// A stride in bytes, as TMA takes it.
fn tma_stride(tensor: GradTensor, dim: &str, stride: usize) -> Result<u64, PlanError> {
    let bytes = stride as u128 * 2;
    match u64::try_from(bytes) {
        Ok(bytes) if bytes.is_multiple_of(16) && bytes < 1 << 40 => Ok(bytes),
        _ => unsupported(
            Feature::Stride,
            format!("{tensor:?} with a {dim} stride of {bytes} bytes"),
            "a multiple of 16 below 2^40",
        ),
    }
}

#[cfg(test)]
mod tests {
    use flashattn_spec::expr::Table;
    use flashattn_spec::mask::Mask;
    use flashattn_spec::score_mod::ScoreMod;
    use flashattn_spec::tensor::contiguous_strides;

    use super::*;
    use crate::kernels::Split;

    fn dense(p: &AttentionProblem) -> GradStrides {
        let [q, k, v, o] = [p.q_shape(), p.k_shape(), p.v_shape(), p.o_shape()].map(contiguous_strides);
        GradStrides { forward: Strides { q, k, v, o }, d_o: o, dq: q, dk: k, dv: v }
    }

    fn plan(p: &AttentionProblem, deterministic: bool) -> BackwardPlan {
        let plan = BackwardPlan::new(p, &dense(p), true, deterministic).unwrap();
        // One argument for each parameter, of its kind, in all three kernels.
        let [main, before, after] = [
            crate::kernels::flash_bwd_sm90(&plan.config),
            crate::kernels::flash_bwd_sm90_preprocess(&plan.config),
            crate::kernels::flash_bwd_sm90_queries(&plan.config),
        ];
        assert!(main.params == before.params && main.params == after.params);
        assert_eq!(plan.arguments.len(), main.params.len());
        for (argument, param) in plan.arguments.iter().zip(&main.params) {
            use ptx::kernel::ParamKind::{F32, S32, TensorMap, U32, U64};
            let kind = match argument {
                Argument::U32(_) => U32,
                Argument::S32(_) => S32,
                Argument::F32(_) => F32,
                Argument::U64(_) | Argument::Address(_) => U64,
                Argument::TensorMap(..) => TensorMap,
            };
            assert_eq!(param.kind, kind, "{}", param.name);
        }
        plan
    }

    #[test]
    fn what_is_not_taken_is_named_with_its_limit() {
        let p = AttentionProblem::new(1, 64, 2, 64, DType::Bf16);
        let refusal = |p: &AttentionProblem, strides: &GradStrides, deterministic| {
            BackwardPlan::new(p, strides, false, deterministic).unwrap_err().to_string()
        };
        let expected = "is not supported by flash_bwd_sm90; expected";
        let other = AttentionProblem { dtype: DType::F32, ..p.clone() };
        assert_eq!(refusal(&other, &dense(&other), false), format!("dtype: f32 {expected} bf16 or f16"));
        let other = AttentionProblem { head_dim: 257, ..p.clone() };
        let got = "head dimension: head_dim 257, head_dim_v 64";
        assert_eq!(refusal(&other, &dense(&other), false), format!("{got} {expected} at most 256 each"));
        let strides = GradStrides { d_o: [0, 132, 64, 1], ..dense(&p) };
        let got = "stride: DO with a seqlen stride of 264 bytes";
        assert_eq!(refusal(&p, &strides, false), format!("{got} {expected} a multiple of 16 below 2^40"));
        let strides = GradStrides { dk: [0, 132, 64, 1], ..dense(&p) };
        let got = "stride: DK with a seqlen stride of 132 elements";
        assert_eq!(refusal(&p, &strides, false), format!("{got} {expected} a multiple of 8"));
        let error = plan(&p, false).check_address(GradTensor::DO, 0x1008).unwrap_err();
        let got = "address: DO at address 0x1008";
        assert_eq!(error.to_string(), format!("{got} {expected} a multiple of 16 bytes"));
        let slopes = Table::per_head(vec![1.0; 2]).unwrap().with_grad().unwrap();
        let other = AttentionProblem {
            seqlen_q: 1 << 20,
            seqlen_k: 1 << 20,
            score_mod: ScoreMod::Alibi(slopes),
            ..p.clone()
        };
        let got = "size: 1099511627776 terms of an element of a table's gradient, deterministic";
        assert_eq!(
            refusal(&other, &dense(&other), true),
            format!("{got} {expected} fewer than 549755813888")
        );
        plan(&other, false);
    }

    #[test]
    fn sums_of_several_terms_are_exact_in_deterministic_plans() {
        use GradTensor::{DTable, TableSums};
        let learned = |dims: [usize; 4]| {
            let len = dims.into_iter().product();
            Table::f32(&dims, vec![0.0; len]).unwrap().with_grad().unwrap()
        };
        let p = |batch, dims| {
            let mut p = AttentionProblem::new(batch, 40, 2, 64, DType::Bf16);
            (p.seqlen_k, p.score_mod) = (50, ScoreMod::bias(learned(dims)));
            p
        };
        let sums = |p: &AttentionProblem| {
            let [plain, exact] = [false, true].map(|deterministic| plan(p, deterministic));
            assert_eq!(plain.zeroed, [DTable(0)]);
            assert!(!plain.workspace.iter().any(|(tensor, _)| matches!(tensor, TableSums(_))));
            let bytes = exact.workspace.iter().find(|(tensor, _)| *tensor == TableSums(0)).map(|x| x.1);
            assert_eq!(exact.zeroed.contains(&TableSums(0)), bytes.is_some());
            bytes
        };
        // One pair for each element.
        assert_eq!(sums(&p(3, [3, 2, 40, 50])), None);
        assert_eq!(sums(&p(1, [1, 2, 40, 50])), None);
        // Several: of sequences, heads, queries or keys.
        for dims in [[1, 2, 40, 50], [3, 1, 40, 50], [3, 2, 1, 50], [3, 2, 40, 1], [1, 1, 1, 1]] {
            assert_eq!(sums(&p(3, dims)), Some(104 * dims.into_iter().product::<usize>()));
        }
        // Indices that meet at the edge, that are computed, and a table that is read twice.
        let other = |score_mod| AttentionProblem { score_mod, ..p(1, [1; 4]) };
        let table = learned([1, 2, 39, 50]);
        let clamped = ScoreMod::custom(|s, ix| s + table[(ix.batch, ix.head, ix.q, ix.kv)]).unwrap();
        assert_eq!(sums(&other(clamped)), Some(104 * 2 * 39 * 50));
        let table = learned([1, 2, 40, 50]);
        let shifted = ScoreMod::custom(|s, ix| s + table[(ix.batch, ix.head, ix.q + 1, ix.kv)]).unwrap();
        assert_eq!(sums(&other(shifted)), Some(104 * 2 * 40 * 50));
        let twice = ScoreMod::custom(|s, ix| {
            s + table[(ix.batch, ix.head, ix.q, ix.kv)] * table[(ix.batch, ix.head, ix.q - 1, ix.kv)]
        });
        assert_eq!(sums(&other(twice.unwrap())), Some(104 * 2 * 40 * 50));
        // Of packed sequences each counts its own.
        let packed = p(2, [1, 2, 40, 50]).with_varlen(&[0, 40, 60], &[0, 50, 60]);
        assert_eq!(sums(&packed), Some(104 * 2 * 40 * 50));
    }

    #[test]
    fn extra_memory_is_linear_in_the_queries() {
        let bytes = |n: usize, packed: bool, d: usize| {
            let mut p = AttentionProblem::new(2, n, 3, d, DType::F16);
            if packed {
                p = p.with_varlen(&[0, n as i32, 2 * n as i32], &[0, n as i32, 2 * n as i32]);
            }
            [false, true].map(|deterministic| plan(&p, deterministic).workspace_bytes())
        };
        for d in [64, 128, 256] {
            // Two sequences of three heads: of each query its statistics, and dQ in f32 where it is added up.
            let each = if d == 256 { [8, 8] } else { [4 * d + 8, 8] };
            assert_eq!(bytes(1024, false, d), each.map(|each| 2 * 1024 * 3 * each));
            let tile = if d == 64 { 128 } else { 64 };
            assert_eq!(bytes(1024, true, d), each.map(|each| 2 * (1024 + tile) * 3 * each));
            // Of many keys it is in a deterministic plan, too, by turns of blocks of 128.
            let [added, in_turns] = bytes(4096, false, d);
            assert_eq!(added, 2 * 4096 * 3 * each[0]);
            assert_eq!(in_turns - added, if d == 256 { 0 } else { 2 * 32 * 3 * 64 });
        }
    }

    #[test]
    fn lists_are_by_block_of_keys() {
        let mut p = AttentionProblem::new(2, 300, 2, 128, DType::Bf16);
        p.mask = Mask::chunked(128);
        let words =
            |plan: &BackwardPlan, i: usize| bytemuck::cast_slice::<u8, u32>(plan.uploads[i].bytes()).to_vec();
        let listed = plan(&p, false);
        assert_eq!((listed.config.split, listed.config.tile_n(), listed.items), (Split::Columns, 64, 20));
        let (rows, runs) = (words(&listed, 0), words(&listed, 1));
        // Five blocks of keys of both heads of both sequences, which share their runs.
        assert_eq!(rows.len(), 4 * 4 * 5);
        assert_eq!(rows[..20], rows[60..]);
        // Keys 64 to 127 are seen by queries 0 to 127 in whole.
        assert_eq!(runs[2 * rows[4] as usize..][..2], [0, 2]);
        // Queries 128 to 255 see keys 128 to 255, blocks 2 and 3, in whole; the last 44 see one block.
        let deterministic = plan(&p, true);
        assert_eq!((listed.query_items, deterministic.query_items), (0, 3 * 4));
        let (rows, runs) = (words(&deterministic, 2), words(&deterministic, 3));
        assert_eq!(rows.len(), 4 * 4 * 3);
        assert_eq!(runs[2 * rows[4] as usize..][..2], [2, 4]);
        assert_eq!(rows[10], 1);
    }

    #[test]
    fn nothing_is_launched_for_nothing() {
        let mut p = AttentionProblem::new(1, 0, 2, 64, DType::Bf16);
        (p.seqlen_k, p.sinks) = (40, true);
        let no_queries = plan(&p, false);
        assert_eq!((no_queries.query_blocks, no_queries.items), (0, 2));
        assert_eq!(no_queries.zeroed, [GradTensor::DSinks]);
        (p.seqlen_q, p.seqlen_k) = (40, 0);
        assert_eq!((plan(&p, false).query_blocks, plan(&p, false).items), (2, 0));
    }
}
