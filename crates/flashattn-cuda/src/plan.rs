//! From a problem to a launch: which kernel, with which arguments, and what to upload. Nothing here touches a GPU; the same
//! plan is launched by the driver and by the emulator.

mod backward;

use std::collections::HashMap;

use bytemuck::cast_slice;
use flashattn_spec::blocks::{BlockKind, BlockSchedule};
use flashattn_spec::expr::{Table, TableData, Traced};
use flashattn_spec::mask::Mask;
use flashattn_spec::{AttentionProblem, DType, ProblemError, philox};
use ptx::instr::Element;

use crate::config::{self, Extras, Tiles};
use crate::kernels::{FwdConfig, MaskKind, Slope};

pub use backward::{BackwardPlan, GradStrides, GradTensor};

/// What the kernels of this crate do not take yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Feature {
    /// Element types other than bf16 and f16.
    DType,
    /// Head dimensions beyond the tuning table.
    HeadDim,
    /// Strides of q, k, v that TMA cannot take, or of o that its stores cannot.
    Stride,
    /// Addresses of the same kind.
    Address,
    /// More tiles, blocks or elements of a table than 32 bits count; more terms of a sum than it has room for.
    Size,
}

impl Feature {
    /// All of them.
    pub const ALL: [Feature; 5] =
        [Feature::DType, Feature::HeadDim, Feature::Stride, Feature::Address, Feature::Size];

    /// As errors call it.
    pub const fn name(self) -> &'static str {
        match self {
            Feature::DType => "dtype",
            Feature::HeadDim => "head dimension",
            Feature::Stride => "stride",
            Feature::Address => "address",
            Feature::Size => "size",
        }
    }
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// The problem is invalid.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// The kernel does not take it yet.
    #[error("{}: {got} is not supported by {executor}; expected {expected}", .feature.name())]
    Unsupported {
        /// What it does not take.
        feature: Feature,
        /// The kernel.
        executor: &'static str,
        /// What was asked for.
        got: String,
        /// What it takes.
        expected: String,
    },
}

fn unsupported<T>(feature: Feature, got: String, expected: impl Into<String>) -> Result<T, PlanError> {
    Err(PlanError::Unsupported { feature, executor: "flash_fwd_sm90", got, expected: expected.into() })
}

/// A tensor of the caller's, or memory that the launch needs besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tensor {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Output.
    O,
    /// Log-sum-exp, f32, dense.
    Lse,
    /// Sink logits, f32 by query head.
    Sinks,
    /// [`ForwardPlan::counter_bytes`]; the first u32 is 0 before the launch and after it, the others may be anything.
    Counter,
    /// The plan's upload of this index.
    Upload(usize),
}

/// An argument, not yet bound to memory.
#[derive(Clone, Debug, PartialEq)]
pub enum Argument<T = Tensor> {
    /// A 32-bit integer.
    U32(u32),
    /// A signed 32-bit integer.
    S32(i32),
    /// A float.
    F32(f32),
    /// A 64-bit integer.
    U64(u64),
    /// A tensor's address.
    Address(T),
    /// A tensor map over a tensor.
    TensorMap(ptx::TensorMap, T),
}

/// Data that must lie in the device's memory before the launch. It depends on the problem alone.
#[derive(Clone, Debug)]
pub struct Upload {
    /// What it is.
    pub name: String,
    data: Data,
}

#[derive(Clone, Debug)]
enum Data {
    Words(Vec<u32>),
    Table(Table),
}

impl Upload {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Words(words) => cast_slice(words),
            Data::Table(table) => match table.data() {
                TableData::F32(data) => cast_slice(data),
                TableData::I32(data) => cast_slice(data),
            },
        }
    }
}

/// Strides of a call's tensors `[batch, seqlen, heads, head_dim]`, in elements; the last is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Strides {
    /// Of q.
    pub q: [usize; 4],
    /// Of k.
    pub k: [usize; 4],
    /// Of v.
    pub v: [usize; 4],
    /// Of o.
    pub o: [usize; 4],
}

/// A forward pass, ready to be bound to memory and launched.
#[derive(Clone, Debug)]
pub struct ForwardPlan {
    /// The kernel's config.
    pub config: FwdConfig,
    /// Arguments in the kernel's order.
    pub arguments: Vec<Argument>,
    /// What [`Tensor::Upload`] counts.
    pub uploads: Vec<Upload>,
    /// Tiles of work; without any there is nothing to launch and nothing to write.
    pub tiles: u32,
}

impl ForwardPlan {
    /// Plans the forward pass of a problem whose tensors have these strides.
    ///
    /// # Errors
    /// What is wrong with the problem, or what the kernel does not take.
    pub fn new(problem: &AttentionProblem, strides: &Strides) -> Result<ForwardPlan, PlanError> {
        ForwardPlan::with_tiles(problem, strides, None)
    }

    /// As [`ForwardPlan::new`], with other tiles than the tuning table's.
    ///
    /// # Errors
    /// As [`ForwardPlan::new`]. Tiles that do not fit the GPU's registers or shared memory are refused when the kernel is
    /// loaded, or slow.
    pub fn with_tiles(
        problem: &AttentionProblem,
        strides: &Strides,
        tiles: Option<Tiles>,
    ) -> Result<ForwardPlan, PlanError> {
        problem.validate()?;
        let lowered = problem.lower()?;
        let mask = band(problem, lowered.mask.is_some());
        let by_blocks = lowered.mask.filter(|_| mask.is_none());
        let config = configure(problem, strides, mask, &by_blocks, &lowered.score_mod, tiles)?;
        let tiles = count(problem, &config)?;
        let mut plan = ForwardPlan { config, arguments: Vec::new(), uploads: Vec::new(), tiles };
        plan.tensors(problem, strides)?;
        plan.sizes(problem);
        match mask {
            Some(reach) => {
                let sides = reach.into_iter().flatten();
                plan.arguments.extend(sides.map(|reach| Argument::S32(reach as i32)));
            }
            None => plan.schedule(problem)?,
        }
        plan.tables("mask", by_blocks)?;
        plan.tables("score mod", lowered.score_mod)?;
        plan.options(problem, strides);
        Ok(plan)
    }

    /// Blocks to launch on a GPU of so many multiprocessors.
    pub fn grid(&self, multiprocessors: u32) -> u32 {
        self.tiles.min(multiprocessors)
    }

    /// Bytes of [`Tensor::Counter`]: the next tile's number; and for each tile the one that its block had before it.
    pub fn counter_bytes(&self) -> u64 {
        4 + 4 * u64::from(self.tiles)
    }

    /// Checks that a tensor may lie at this address.
    ///
    /// # Errors
    /// [`Feature::Address`].
    pub fn check_address(&self, tensor: Tensor, address: u64) -> Result<(), PlanError> {
        let align = match tensor {
            Tensor::Q | Tensor::K | Tensor::V => 16,
            Tensor::O => 8,
            _ => 4,
        };
        if address.is_multiple_of(align) {
            return Ok(());
        }
        unsupported(
            Feature::Address,
            format!("{tensor:?} at address {address:#x}"),
            format!("a multiple of {align} bytes"),
        )
    }

    fn upload(&mut self, name: String, data: Data) -> Argument {
        self.uploads.push(Upload { name, data });
        Argument::Address(Tensor::Upload(self.uploads.len() - 1))
    }

    /// Tensor maps, addresses and strides of the outputs.
    fn tensors(&mut self, problem: &AttentionProblem, strides: &Strides) -> Result<(), PlanError> {
        let tensors = [
            (Tensor::Q, problem.q_shape(), strides.q),
            (Tensor::K, problem.k_shape(), strides.k),
            (Tensor::V, problem.v_shape(), strides.v),
        ];
        let (mut shapes, mut bytes) = ([[1; 4]; 3], [[0; 3]; 3]);
        for (i, (tensor, [b, n, h, d], [sb, sn, sh, _])) in tensors.into_iter().enumerate() {
            // Without keys none are loaded, but a tensor map must be one.
            shapes[i] = [d, n, h, b].map(|size| size.max(1) as u64);
            for (to, (dim, size, stride)) in
                [("seqlen", n, sn), ("heads", h, sh), ("batch", b, sb)].into_iter().enumerate()
            {
                bytes[i][to] = if size > 1 { tma_stride(tensor, dim, stride)? } else { 16 };
            }
        }
        let maps = self.config.tensor_maps(shapes, bytes);
        let keys = problem.total_k() > 0;
        for (map, tensor) in maps.into_iter().zip([Tensor::Q, Tensor::K, Tensor::V]) {
            // A map over an empty tensor would leave its memory: Q's stands in, unused.
            let argument = match (keys, self.arguments.first()) {
                (false, Some(q)) => q.clone(),
                _ => Argument::TensorMap(map, tensor),
            };
            self.arguments.push(argument);
        }
        for ((dim, size), stride) in
            ["batch", "seqlen", "heads"].into_iter().zip(problem.o_shape()).zip(strides.o)
        {
            // Columns are stored in fours.
            if size > 1 && !stride.is_multiple_of(4) {
                let got = format!("o with a {dim} stride of {stride} elements");
                return unsupported(Feature::Stride, got, "a multiple of 4");
            }
        }
        self.arguments.extend([Tensor::O, Tensor::Lse, Tensor::Counter].map(Argument::Address));
        let [_, queries, heads, _] = problem.q_shape();
        let [sb, sn, sh, _] = strides.o;
        let numbers = [sb, sn, sh, heads * queries, queries];
        self.arguments.extend(numbers.map(|x| Argument::U64(x as u64)));
        Ok(())
    }

    /// Lengths, heads and the scale.
    fn sizes(&mut self, p: &AttentionProblem) {
        let head_bytes = p.seqlen_k as u64 * (p.head_dim + p.head_dim_v) as u64 * 2;
        let (heads, group) = match self.config.packed_heads {
            1 => (p.heads_q, p.group()),
            _ => (p.heads_kv, 1),
        };
        let pairs = (heads * p.batch) as u64;
        let masked = self.config.mask != MaskKind::Band { left: false, right: false };
        let head_group = config::head_group(head_bytes, group as u64, masked).min(pairs.max(1));
        let numbers = [p.seqlen_q, p.seqlen_k, p.heads_q, p.heads_kv, p.batch, head_group as usize];
        // They fit: validated to be below 2³⁰, and the pairs are at most the tiles.
        self.arguments.extend(numbers.map(|x| Argument::U32(x as u32)));
        self.arguments.push(Argument::F32(p.scale()));
    }

    /// The blocks of each tile, as the kernel's `rows` and `runs`.
    fn schedule(&mut self, problem: &AttentionProblem) -> Result<(), PlanError> {
        let (tile_m, tile_n) = (self.config.tile_m() as usize, self.config.tile_n as usize);
        let schedule = BlockSchedule::new(problem, tile_m, tile_n)?;
        let m_blocks = problem.seqlen_q.div_ceil(tile_m);
        let (mut rows, mut runs) = (Vec::with_capacity(4 * self.tiles as usize), Vec::<u32>::new());
        // Sequences and heads that the mask cannot tell apart share their runs, by where they lie.
        let mut known: HashMap<_, u32> = HashMap::new();
        for (batch, head) in (0..problem.batch).flat_map(|b| (0..problem.heads_q).map(move |h| (b, h))) {
            for m_block in 0..m_blocks {
                let row = schedule.row(batch, head, m_block);
                let first = *known.entry((row.as_ptr(), row.len())).or_insert_with(|| {
                    let first = runs.len() as u32 / 2;
                    for run in row {
                        let partial = if run.kind == BlockKind::Partial { 1 << 31 } else { 0 };
                        runs.extend([run.n_block_min as u32 | partial, run.n_block_max as u32]);
                    }
                    first
                });
                let blocks: usize = row.iter().map(|run| run.n_blocks().len()).sum();
                rows.extend([first, row.len() as u32, blocks as u32, 0]);
            }
        }
        for (name, mut words) in [("rows", rows), ("runs", runs)] {
            // No buffer is empty.
            words.resize(words.len().max(4), 0);
            let address = self.upload(name.to_owned(), Data::Words(words));
            self.arguments.push(address);
        }
        Ok(())
    }

    /// A program's tables: the address, and the sizes of the dimensions that are not 1.
    fn tables(&mut self, of: &str, traced: Option<Traced>) -> Result<(), PlanError> {
        for (i, table) in traced.into_iter().flat_map(|traced| traced.tables).enumerate() {
            if u32::try_from(table.data().len()).is_err() {
                return unsupported(
                    Feature::Size,
                    format!("a table of the {of} of shape {:?}", table.shape()),
                    "fewer than 2^32 elements",
                );
            }
            let dims = table.dims();
            let address = self.upload(format!("{of} table {i}"), Data::Table(table));
            self.arguments.push(address);
            self.arguments.extend(dims.into_iter().filter(|&d| d != 1).map(|d| Argument::U32(d as u32)));
        }
        Ok(())
    }

    /// Dropout, sinks, packed sequences, what to repair from.
    fn options(&mut self, problem: &AttentionProblem, strides: &Strides) {
        if let Some(dropout) = problem.dropout.filter(|_| self.config.dropout) {
            let [low, high] = philox::key(dropout.seed);
            self.arguments.extend([low, high, philox::threshold(dropout.p)].map(Argument::U32));
            self.arguments.push(Argument::F32(1.0 / (1.0 - dropout.p)));
        }
        if self.config.sinks {
            self.arguments.push(Argument::Address(Tensor::Sinks));
        }
        if let Some(varlen) = &problem.varlen {
            for (name, offsets) in
                [("cu_seqlens_q", &varlen.cu_seqlens_q), ("cu_seqlens_k", &varlen.cu_seqlens_k)]
            {
                let words = offsets.iter().map(|&x| x as u32).collect();
                let address = self.upload(name.to_owned(), Data::Words(words));
                self.arguments.push(address);
            }
        }
        for (tensor, strides) in [(Tensor::Q, strides.q), (Tensor::K, strides.k), (Tensor::V, strides.v)] {
            self.arguments.push(Argument::Address(tensor));
            self.arguments.extend(strides[..3].iter().map(|&x| Argument::U64(x as u64)));
        }
    }
}

/// How far a mask that is a band around the diagonal reaches to the left and right; `None` for other masks. A reach beyond
/// all queries or keys is cut to their number, which hides nothing, so that the kernel's sums fit.
fn band(p: &AttentionProblem, masked: bool) -> Option<[Option<usize>; 2]> {
    match p.mask {
        _ if !masked => Some([None, None]),
        Mask::Causal => Some([None, Some(0)]),
        Mask::Local { left, right } => {
            Some([left.map(|left| left.min(p.seqlen_k)), right.map(|right| right.min(p.seqlen_q))])
        }
        _ => None,
    }
}

fn configure(
    p: &AttentionProblem,
    strides: &Strides,
    band: Option<[Option<usize>; 2]>,
    mask: &Option<Traced>,
    score_mod: &Option<Traced>,
    tiles: Option<Tiles>,
) -> Result<FwdConfig, PlanError> {
    let element = match p.dtype {
        DType::Bf16 => Element::BF16,
        DType::F16 => Element::F16,
        other => return unsupported(Feature::DType, other.to_string(), "bf16 or f16"),
    };
    let dropout = p.dropout.is_some_and(|dropout| dropout.p > 0.0);
    // A slope is divided by the scale, and must not be infinite then.
    let is_slope = |traced: &Traced| Slope::of(&traced.expr).is_some() && p.scale() > 1e-6;
    let slope = score_mod.as_ref().is_some_and(is_slope);
    let extras = match (mask.is_some(), score_mod.is_some()) {
        (false, false) if dropout => Extras::Dropout,
        _ if dropout => Extras::Programs,
        (true, true) => Extras::Programs,
        (true, false) => Extras::Mask,
        (false, true) if slope => Extras::Slope,
        (false, true) if element == Element::F16 => Extras::ScoreF16,
        (false, true) => Extras::Score,
        (false, false) => Extras::None,
    };
    let (head_dims, masked) = ([p.head_dim, p.head_dim_v], band != Some([None, None]));
    let tiles_for = |extras| tiles.or_else(|| config::forward_sm90(head_dims, p.seqlen_k, masked, extras));
    // Nothing else may depend on the head.
    let plain = extras == Extras::None && !p.sinks && p.varlen.is_none();
    let packed =
        tiles_for(Extras::Packed).filter(|tiles| plain && packs(p, strides.q, 64 * tiles.consumers as usize));
    let packed_heads = if packed.is_some() { p.group() as u32 } else { 1 };
    let Some(tiles) = packed.or_else(|| tiles_for(extras)) else {
        let most = config::FORWARD_SM90.map(|row| row.head_dim).into_iter().max().unwrap_or(0);
        let got = format!("head_dim {}, head_dim_v {}", p.head_dim, p.head_dim_v);
        return unsupported(Feature::HeadDim, got, format!("at most {most} each"));
    };
    let program = |traced: &Option<Traced>| {
        traced.as_ref().map(|traced| {
            let shapes = traced.tables.iter().map(|table| table.dims().map(|size| size != 1));
            ((*traced.expr).clone(), shapes.collect())
        })
    };
    Ok(FwdConfig {
        element,
        head_dim: p.head_dim as u32,
        head_dim_v: p.head_dim_v as u32,
        consumers: tiles.consumers,
        tile_n: tiles.tile_n,
        stages: tiles.stages,
        q_in_registers: tiles.q_in_registers,
        mask: match band {
            Some([left, right]) => MaskKind::Band { left: left.is_some(), right: right.is_some() },
            None => MaskKind::Blocks,
        },
        mask_program: program(mask),
        score_mod: program(score_mod),
        small_indices: score_mod.is_some() && p.seqlen_q.max(p.seqlen_k) < 1 << 22,
        prescaled: if score_mod.is_some() { !slope } else { p.scale() <= 0.0 },
        dropout,
        sinks: p.sinks,
        varlen: p.varlen.is_some(),
        packed_heads,
    })
}

/// Whether the query heads of a group can share tiles of so many rows, and a single one would not fill them.
fn packs(p: &AttentionProblem, q_strides: [usize; 4], tile_m: usize) -> bool {
    let g = p.group();
    // TMA's limit, of the stride from one KV head's queries to the next one's.
    let near = p.heads_kv <= 1 || q_strides[2] as u128 * (g as u128 * 2) < 1 << 40;
    g > 1 && tile_m.is_multiple_of(g) && p.seqlen_q < tile_m && near
}

/// Tiles of a launch: 0 if there are no queries.
fn count(p: &AttentionProblem, config: &FwdConfig) -> Result<u32, PlanError> {
    if p.total_q() == 0 {
        return Ok(0);
    }
    let heads = config.packed_heads as usize;
    let m_blocks = (p.seqlen_q * heads).div_ceil(config.tile_m() as usize) as u128;
    let tiles = m_blocks * (p.heads_q / heads) as u128 * p.batch as u128;
    // Each block takes one number more than there are tiles.
    match u32::try_from(tiles) {
        Ok(tiles) if tiles < 1 << 31 => Ok(tiles),
        _ => unsupported(
            Feature::Size,
            format!("{tiles} tiles of {} rows", config.tile_m()),
            "fewer than 2^31",
        ),
    }
}

/// A stride in bytes, as TMA takes it.
fn tma_stride(tensor: Tensor, dim: &str, stride: usize) -> Result<u64, PlanError> {
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
    use super::*;

    fn dense(p: &AttentionProblem) -> Strides {
        let strides = flashattn_spec::tensor::contiguous_strides;
        Strides {
            q: strides(p.q_shape()),
            k: strides(p.k_shape()),
            v: strides(p.v_shape()),
            o: strides(p.o_shape()),
        }
    }

    fn plan(p: &AttentionProblem) -> ForwardPlan {
        let plan = ForwardPlan::new(p, &dense(p)).unwrap();
        // One argument for each parameter, of its kind.
        let kernel = crate::kernels::flash_fwd_sm90(&plan.config);
        assert_eq!(plan.arguments.len(), kernel.params.len());
        for (argument, param) in plan.arguments.iter().zip(&kernel.params) {
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

    fn refusal(p: &AttentionProblem) -> String {
        ForwardPlan::new(p, &dense(p)).unwrap_err().to_string()
    }

    #[test]
    fn what_is_not_taken_is_named_with_its_limit() {
        let p = AttentionProblem::new(1, 64, 2, 64, DType::Bf16);
        let expected = "is not supported by flash_fwd_sm90; expected";
        let other = AttentionProblem { dtype: DType::F32, ..p.clone() };
        assert_eq!(refusal(&other), format!("dtype: f32 {expected} bf16 or f16"));
        let other = AttentionProblem { head_dim_v: 264, ..p.clone() };
        let got = "head dimension: head_dim 64, head_dim_v 264";
        assert_eq!(refusal(&other), format!("{got} {expected} at most 256 each"));
        let other = AttentionProblem { head_dim: 36, ..p.clone() };
        let got = "stride: Q with a heads stride of 72 bytes";
        let seqlen = ForwardPlan::new(&other, &Strides { q: [0, 72, 36, 1], ..dense(&other) })
            .unwrap_err()
            .to_string();
        assert_eq!(seqlen, format!("{got} {expected} a multiple of 16 below 2^40"));
        let error = ForwardPlan::new(&p, &Strides { o: [0, 129, 64, 1], ..dense(&p) }).unwrap_err();
        let got = "stride: o with a seqlen stride of 129 elements";
        assert_eq!(error.to_string(), format!("{got} {expected} a multiple of 4"));
        let error = plan(&p).check_address(Tensor::K, 0x1008).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("address: K at address 0x1008 {expected} a multiple of 16 bytes")
        );
        assert!(
            matches!(refusal(&AttentionProblem { heads_kv: 3, ..p }).as_str(), text if text.contains("heads_kv"))
        );
    }

    #[test]
    fn masks_become_bands_or_lists() {
        let mut p = AttentionProblem::new(2, 300, 2, 64, DType::F16);
        let signed = |plan: &ForwardPlan| -> Vec<i32> {
            let only = |a: &Argument| if let Argument::S32(x) = a { Some(*x) } else { None };
            plan.arguments.iter().filter_map(only).collect()
        };
        let full = plan(&p);
        assert_eq!(full.config.mask, MaskKind::Band { left: false, right: false });
        assert_eq!((full.tiles, full.grid(132), full.grid(5)), (12, 12, 5));
        p.mask = Mask::Causal;
        assert_eq!(signed(&plan(&p)), [0]);
        // A reach beyond all keys is cut: the kernel's sums stay small.
        p.mask = Mask::window(1 << 29, 7);
        assert_eq!(signed(&plan(&p)), [300, 7]);
        p.mask = Mask::chunked(128);
        let blocks = plan(&p);
        assert_eq!((blocks.config.mask, signed(&blocks)), (MaskKind::Blocks, vec![]));
        let words = |i: usize| cast_slice::<u8, u32>(blocks.uploads[i].bytes()).to_vec();
        let (rows, runs) = (words(0), words(1));
        assert_eq!(rows.len(), 4 * blocks.tiles as usize);
        // Both heads of both sequences share the runs of three rows of 128 queries: of 128 keys, 0 to 128 are one block.
        assert_eq!(rows[..12], rows[36..]);
        assert_eq!((rows[2], runs.len() / 2), (1, rows[1] as usize + rows[5] as usize + rows[9] as usize));
        assert_eq!((runs[0] & 0x7fff_ffff, runs[2 * rows[1] as usize - 1]), (0, 1));
    }

    #[test]
    fn heads_of_a_group_share_tiles_of_few_queries() {
        let mut p = AttentionProblem::new(2, 5, 16, 64, DType::Bf16);
        (p.heads_kv, p.seqlen_k, p.mask) = (2, 300, Mask::Causal);
        let shared = plan(&p);
        // 5 queries of 8 heads are one tile of 128 rows, for each KV head.
        assert_eq!((shared.config.packed_heads, shared.tiles), (8, 4));
        let Some(Argument::TensorMap(map, Tensor::Q)) = shared.arguments.first() else {
            panic!("no map of q")
        };
        assert_eq!(
            (map.shape.as_slice(), map.tile.as_slice()),
            (&[64, 8, 5, 2, 2][..], &[64, 8, 16, 1, 1][..])
        );
        assert_eq!(map.strides, [128, 16 * 128, 8 * 128, 5 * 16 * 128]);
        // Tiles of 64 queries of 2 heads.
        let longer = AttentionProblem { seqlen_q: 127, heads_q: 4, ..p.clone() };
        assert_eq!((plan(&longer).config.packed_heads, plan(&longer).tiles), (2, 8));
        let sinks = AttentionProblem { sinks: true, ..p.clone() };
        let odd = AttentionProblem { heads_q: 6, ..p.clone() };
        let full = AttentionProblem { seqlen_q: 128, ..p.clone() };
        let plain = AttentionProblem { heads_kv: 16, ..p.clone() };
        let chunked = AttentionProblem { mask: Mask::chunked(64), ..p.clone() };
        for p in [sinks, odd, full, plain, chunked] {
            assert_eq!((plan(&p).config.packed_heads, plan(&p).tiles), (1, p.heads_q as u32 * 2), "{p:?}");
        }
        // KV heads' queries too far apart for TMA; of a single KV head it does not matter.
        let far = Strides { q: [1 << 30, 64, 1 << 37, 1], ..dense(&p) };
        assert_eq!(ForwardPlan::new(&p, &far).unwrap().config.packed_heads, 1);
        let one = AttentionProblem { heads_kv: 1, ..p };
        assert_eq!(
            ForwardPlan::new(&one, &Strides { q: far.q, ..dense(&one) }).unwrap().config.packed_heads,
            16
        );
    }

    #[test]
    fn options_have_their_arguments() {
        let mut p = AttentionProblem::new(2, 100, 4, 64, DType::Bf16).with_varlen(&[0, 30, 100], &[0, 0, 77]);
        p.sinks = true;
        p.dropout = Some(flashattn_spec::Dropout { p: 0.5, seed: 3 << 32 | 9 });
        p.score_mod = flashattn_spec::score_mod::ScoreMod::alibi(&[1.0; 4]).unwrap();
        let plan = plan(&p);
        let names: Vec<&str> = plan.uploads.iter().map(|upload| upload.name.as_str()).collect();
        assert_eq!(names, ["score mod table 0", "cu_seqlens_q", "cu_seqlens_k"]);
        // ALiBi's slope takes the scale with it.
        assert!(!plan.config.prescaled && plan.config.varlen && plan.config.sinks);
        for expected in
            [Argument::U32(9), Argument::U32(3), Argument::F32(2.0), Argument::Address(Tensor::Sinks)]
        {
            assert!(plan.arguments.contains(&expected), "{expected:?}");
        }
        p.softmax_scale = Some(-1.0);
        p.score_mod = flashattn_spec::score_mod::ScoreMod::None;
        assert!(super::tests::plan(&p).config.prescaled);
        // No queries: nothing to launch.
        let none = AttentionProblem::new(0, 100, 4, 64, DType::Bf16);
        assert_eq!(super::tests::plan(&none).tiles, 0);
    }
}
