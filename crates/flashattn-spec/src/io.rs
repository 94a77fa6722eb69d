//! The IO model: how much attention computes, how much it moves, and which of the two takes longer.
//!
//! Attention is counted on a two-level machine ([`Device`]): processors with a small fast memory each (SRAM
//! of a GPU, L2 of a CPU core) before one slow memory. What is counted, tensor by tensor, is every byte that
//! crosses from one to the other (arXiv 2205.14135, section 3; N sequence length, d head dimension, M size of
//! the fast memory):
//!
//! | | FLOPs | bytes | extra memory |
//! |---|---|---|---|
//! | [`IoModel::standard`] | Θ(N²d) | Θ(Nd + N²) | Θ(N²) |
//! | [`IoModel::flash`] (Theorems 1, 2, 5) | Θ(N²d) | Θ(N²d²/M) | Θ(N) |
//! | [`IoModel::block_sparse`] (Proposition 4) | Θ(N²ds) | Θ(Nd + N²d²s/M) | Θ(N) |
//!
//! Rules of the count:
//!
//! 1. Standard attention runs one kernel a step: QKᵀ, score mod, mask, softmax, dropout, PV. Each reads its
//!    operands from slow memory once and writes its result (a product reads K and V once per KV head). It
//!    computes the scores that the mask hides, too.
//! 2. Flash attention skips the tiles that the [`BlockSchedule`] skips, and computes the others whole, except
//!    for what lies past the end of a sequence.
//! 3. A FLOP is one addition, multiplication, comparison, exponential or division; a product of an m×k by a
//!    k×n matrix has 2mkn.
//! 4. A cache that processors share (L2 of a GPU) does not change these counts, but the time: see
//!    [`TensorTraffic::cached`].
//!
//! 5. Tables of score mods and masks are operands, too. The kernels of standard attention read each once (the
//!    backward pass those that the derivative needs) and write the gradients of those that learn. A tile of
//!    flash attention reads what its expression loads: an element for each score (a full bias), for each row or
//!    column (ids of tokens), or one (a slope of the head), as its place in the table depends on query, key,
//!    both or neither; of the mask's tables only in tiles that are visible in part. Gradients of tables are
//!    zeroed, and each tile reads and writes what it adds to.
//!
//! Not counted: sinks and seeds, a few bytes a head.

mod count;
mod device;
#[cfg(test)]
mod tests;

pub use device::{Device, Peak};

use crate::blocks::BlockSchedule;
use crate::element::DType;
use crate::problem::{AttentionProblem, ProblemError};
use count::{Shape, Tally, Visits};
use serde::Serialize;

/// Why the model refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum IoError {
    /// The problem or the tiles are not valid.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// The density of block-sparse attention is a fraction.
    #[error("density is {got}, expected 0 <= density <= 1")]
    Density {
        /// What was given.
        got: f64,
    },
    /// A device's rates must be positive.
    #[error("{name} of the device is {got}, expected a finite number above 0")]
    Device {
        /// The rate.
        name: &'static str,
        /// What was given.
        got: f64,
    },
}

/// Which passes are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pass {
    /// O (and the row statistics) from Q, K, V.
    Forward,
    /// dQ, dK, dV from Q, K, V, O, dO and the row statistics.
    Backward,
    /// One after the other.
    ForwardBackward,
}

impl Pass {
    fn has_forward(self) -> bool {
        self != Pass::Backward
    }

    fn has_backward(self) -> bool {
        self != Pass::Forward
    }
}

/// Which operand stays in fast memory while the other streams by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoopOrder {
    /// The paper's Algorithms 1 and 4: a block of K and V stays. Each visit of a Q block reads and writes its
    /// O, ℓ and m (backward: reads O and dO, reads and writes dQ), in the problem's element type.
    KvOuter,
    /// FlashAttention-2's: forward, a block of Q and its O stay and K, V stream by, so that O and lse are
    /// written once. Backward, a block of K and V stays, rowsum(dO ∘ O) is computed once beforehand, and dQ
    /// is accumulated in f32.
    QOuter,
}

/// Rows of Q and of K in a tile of the score matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Tile {
    /// Queries (Br in the paper).
    pub tile_m: usize,
    /// Keys (Bc in the paper).
    pub tile_n: usize,
}

/// How the score matrix is walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Tiling {
    /// What stays and what streams.
    pub order: LoopOrder,
    /// Tile of the forward pass.
    pub forward: Tile,
    /// Tile of the backward pass.
    pub backward: Tile,
    /// In a [`LoopOrder::QOuter`] forward pass, let the query heads that share a KV head share the tile's
    /// `tile_m` rows, and so the reading of K and V (the mask must not tell them apart).
    pub pack_gqa: bool,
}

impl Tiling {
    /// The same given tile in both passes. Query heads are packed where a single one does not fill the tile.
    pub fn new(problem: &AttentionProblem, order: LoopOrder, tile_m: usize, tile_n: usize) -> Self {
        let tile = Tile { tile_m, tile_n };
        let pack_gqa = order == LoopOrder::QOuter && problem.seqlen_q < tile_m && problem.group() > 1;
        Tiling { order, forward: tile, backward: tile, pack_gqa }
    }

    /// Tiles for the device's fast memory, by Algorithm 1, line 1: with M elements of fast memory the operand
    /// that stays gets ⌈M/4d⌉ rows and the one that streams min(⌈M/4d⌉, d). Where head_dim_v differs, 4d is
    /// 2(head_dim + head_dim_v) and the other d is the larger of the two.
    pub fn for_device(problem: &AttentionProblem, order: LoopOrder, device: &Device) -> Self {
        let elements = usize::try_from(device.sram_bytes).unwrap_or(usize::MAX) / problem.dtype.size();
        let (d, dv) = (problem.head_dim, problem.head_dim_v);
        let stays = elements.div_ceil(2 * (d + dv).max(1)).max(1);
        let streams = stays.min(d.max(dv)).max(1);
        let kv_stays = Tile { tile_m: streams, tile_n: stays };
        let forward = match order {
            LoopOrder::KvOuter => kv_stays,
            LoopOrder::QOuter => Tile { tile_m: stays, tile_n: streams },
        };
        Tiling { backward: kv_stays, ..Tiling::new(problem, order, forward.tile_m, forward.tile_n) }
    }
}

/// FLOPs by product, and of everything else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Flops {
    /// S = QKᵀ of the forward pass.
    pub qk: u128,
    /// O = PV.
    pub pv: u128,
    /// S = QKᵀ again, in flash attention's backward pass.
    pub qk_again: u128,
    /// dV = Pᵀ dO.
    pub dv: u128,
    /// dP = dO Vᵀ.
    pub dp: u128,
    /// dQ = dS K.
    pub dq: u128,
    /// dK = dSᵀ Q.
    pub dk: u128,
    /// Scale, score mod and mask (one each a score), softmax, dropout, rescaling of O and their gradients.
    pub elementwise: u128,
}

impl Flops {
    /// All matrix products.
    pub fn products(&self) -> u128 {
        self.qk + self.pv + self.qk_again + self.dv + self.dp + self.dq + self.dk
    }

    /// Everything.
    pub fn total(&self) -> u128 {
        self.products() + self.elementwise
    }
}

/// Bytes of one tensor that cross between fast and slow memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TensorTraffic {
    /// The tensor: "q", "o", "S", "dq", …
    pub name: &'static str,
    /// Bytes read.
    pub read: u128,
    /// Bytes written.
    pub written: u128,
    /// How many of both the device's shared cache can serve, so that they need not wait for slow memory:
    /// repeated accesses, if what all processors work on at a time fits the cache; otherwise as far as
    /// processors that walk the same K and V (or Q) side by side can share what one of them loads. An
    /// optimistic estimate.
    pub cached: u128,
}

/// Which resource takes longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// Arithmetic.
    Compute,
    /// Slow memory.
    Memory,
}

/// Which algorithm a report is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// Materialises S and P (the paper's Algorithm 0).
    Standard,
    /// FlashAttention.
    Flash,
    /// Block-sparse FlashAttention with a given density.
    BlockSparse,
}

/// What the model counted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct IoReport {
    /// The algorithm.
    pub algorithm: Algorithm,
    /// The passes.
    pub pass: Pass,
    /// Name of the device.
    pub device: String,
    /// Element type.
    pub dtype: DType,
    /// Tiles, unless standard; clamped to the sequence lengths.
    pub tiling: Option<Tiling>,
    /// Computed scores as a fraction of all scores (forward, or backward if that is all there is); 1 if there
    /// are none.
    pub density: f64,
    /// FLOPs.
    pub flops: Flops,
    /// Traffic by tensor, in the order of first use.
    pub tensors: Vec<TensorTraffic>,
    /// All bytes read and written: what the paper calls HBM accesses.
    pub bytes: u128,
    /// Those that slow memory must deliver: `bytes` less what the shared cache can serve.
    pub slow_bytes: u128,
    /// The most memory needed at a time beyond q, k, v, o and their gradients: score-sized matrices if
    /// standard (one fresh matrix a step, freed after its last use), row statistics and f32 accumulators if
    /// flash.
    pub extra_bytes: u128,
    /// FLOPs for each of `slow_bytes`.
    pub intensity: f64,
    /// Seconds of arithmetic at the device's peak, all FLOPs alike.
    pub time_compute: f64,
    /// Seconds of slow memory at full bandwidth.
    pub time_memory: f64,
    /// Which of the two is longer.
    pub bound: Bound,
}

impl IoReport {
    /// Seconds by the roofline: the longer of arithmetic and slow memory, that is, if they overlap perfectly.
    pub fn time(&self) -> f64 {
        self.time_compute.max(self.time_memory)
    }

    /// Traffic of one tensor.
    pub fn tensor(&self, name: &str) -> Option<&TensorTraffic> {
        self.tensors.iter().find(|t| t.name == name)
    }
}

/// Counts attention. See the module's documentation for what is counted.
#[derive(Clone, Copy, Debug)]
pub struct IoModel;

impl IoModel {
    /// Standard attention, which writes S and P to slow memory (the paper's Algorithm 0 and its gradient).
    ///
    /// # Errors
    /// What is wrong with the problem or the device.
    pub fn standard(problem: &AttentionProblem, device: &Device, pass: Pass) -> Result<IoReport, IoError> {
        problem.validate()?;
        let shape = Shape::new(problem)?;
        let mut tally = Tally::default();
        if pass.has_forward() {
            count::standard_forward(&shape, &mut tally);
        }
        if pass.has_backward() {
            count::standard_backward(&shape, &mut tally);
        }
        if tally.extra <= u128::from(device.shared_cache_bytes) {
            tally.cache_scores();
        }
        report(Algorithm::Standard, problem, device, pass, None, 1.0, tally)
    }

    /// FlashAttention with given tiles.
    ///
    /// # Errors
    /// What is wrong with the problem, the tiles or the device.
    pub fn flash(
        problem: &AttentionProblem,
        device: &Device,
        pass: Pass,
        tiling: &Tiling,
    ) -> Result<IoReport, IoError> {
        tiled(Algorithm::Flash, problem, device, pass, tiling, 1.0)
    }

    /// Block-sparse FlashAttention: of the tiles that the problem's mask leaves, the fraction `density` is
    /// computed (s in Proposition 4). For a pattern that is known, [`IoModel::flash`] with
    /// [`crate::mask::Mask::Block`] is exact.
    ///
    /// # Errors
    /// A density outside 0 … 1, and as [`IoModel::flash`].
    pub fn block_sparse(
        problem: &AttentionProblem,
        device: &Device,
        pass: Pass,
        tiling: &Tiling,
        density: f64,
    ) -> Result<IoReport, IoError> {
        if !(0.0..=1.0).contains(&density) {
            return Err(IoError::Density { got: density });
        }
        tiled(Algorithm::BlockSparse, problem, device, pass, tiling, density)
    }
}

fn tiled(
    algorithm: Algorithm,
    problem: &AttentionProblem,
    device: &Device,
    pass: Pass,
    tiling: &Tiling,
    density: f64,
) -> Result<IoReport, IoError> {
    problem.validate()?;
    let shape = Shape::new(problem)?;
    let clamp = |tile: Tile| Tile {
        tile_m: tile.tile_m.min(problem.seqlen_q.max(1) * if tiling.pack_gqa { problem.group() } else { 1 }),
        tile_n: tile.tile_n.min(problem.seqlen_k.max(1)),
    };
    let tiling = Tiling { forward: clamp(tiling.forward), backward: clamp(tiling.backward), ..*tiling };
    // Packed rows belong to `group` heads: the schedule, which is by head, sees a shorter tile.
    let packed = if tiling.pack_gqa && tiling.order == LoopOrder::QOuter { problem.group() } else { 1 };
    let visit = |tile: Tile, packed: usize| -> Result<Visits, IoError> {
        let tile_m = if tile.tile_m == 0 { 0 } else { (tile.tile_m / packed).max(1) };
        let schedule = BlockSchedule::new(problem, tile_m, tile.tile_n)?;
        Ok(Visits::count(problem, &schedule, packed).scaled(density))
    };
    let mut tally = Tally::default();
    let mut computed = None;
    if pass.has_forward() {
        let visits = visit(tiling.forward, packed)?;
        computed = Some(visits.all.scores);
        count::flash_forward(&shape, &visits, tiling.order, device, &mut tally);
    }
    if pass.has_backward() {
        let visits = visit(tiling.backward, 1)?;
        computed = computed.or(Some(visits.all.scores));
        count::flash_backward(&shape, &visits, tiling.order, device, &mut tally);
    }
    let density = match (computed, shape.scores) {
        (Some(computed), all) if all > 0 => computed as f64 / all as f64,
        _ => 1.0,
    };
    report(algorithm, problem, device, pass, Some(tiling), density, tally)
}

fn report(
    algorithm: Algorithm,
    problem: &AttentionProblem,
    device: &Device,
    pass: Pass,
    tiling: Option<Tiling>,
    density: f64,
    tally: Tally,
) -> Result<IoReport, IoError> {
    let peak = device.peak(problem.dtype);
    for (name, got) in [("bandwidth", device.bandwidth), ("peak", peak)] {
        if !(got.is_finite() && got > 0.0) {
            return Err(IoError::Device { name, got });
        }
    }
    let Tally { flops, tensors, extra } = tally;
    let bytes: u128 = tensors.iter().map(|t| t.read + t.written).sum();
    let slow_bytes = bytes - tensors.iter().map(|t| t.cached).sum::<u128>();
    let time_compute = flops.total() as f64 / peak;
    let time_memory = slow_bytes as f64 / device.bandwidth;
    Ok(IoReport {
        algorithm,
        pass,
        device: device.name.clone(),
        dtype: problem.dtype,
        tiling,
        density,
        flops,
        bytes,
        slow_bytes,
        extra_bytes: extra,
        intensity: if slow_bytes == 0 { 0.0 } else { flops.total() as f64 / slow_bytes as f64 },
        time_compute,
        time_memory,
        bound: if time_compute >= time_memory { Bound::Compute } else { Bound::Memory },
        tensors,
    })
}
