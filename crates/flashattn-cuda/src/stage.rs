//! Tensors that the kernels cannot take where they lie: copied to a workspace before them, and results back after them.
//!
//! TMA reads q, k, v (and the gradient of o) by strides and addresses that are multiples of 16 bytes; the forward kernel stores
//! o in fours of elements; the backward kernels read o and store gradients by 16 bytes, where rows do not divide into those by
//! elements and by pairs. What does not fit is *staged*: [`copy_rows`](crate::kernels::copy_rows) writes its rows, padded to 16
//! bytes, into the workspace. That costs the tensor's bytes twice more (a read and a write), a launch, and the workspace; never
//! silently: [`StagedPlan::staged`] and [`StagedBackward::staged`] name the tensors. Everything else is read and written in place.

mod backward;

use std::fmt::Debug;

use flashattn_spec::{AttentionProblem, DType};

pub use backward::{GradLayout, StagedBackward};

use crate::config::Tiles;
use crate::kernels::{CopyConfig, CopyLaunch};
use crate::plan::{Feature, ForwardPlan, PlanError, Strides, Tensor};

/// Bytes at which everything in a workspace begins.
const ALIGN: u64 = 256;

/// How a call's tensors lie in memory, as far as a plan depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Strides in elements.
    pub strides: Strides,
    /// Of q, k, v and o the largest power of two, at most 16, that divides the address.
    pub align: [u64; 4],
}

impl Layout {
    /// The layout of tensors with these strides at these addresses (of q, k, v, o).
    pub fn new(strides: Strides, addresses: [u64; 4]) -> Layout {
        Layout { strides, align: addresses.map(align) }
    }

    /// Row-major tensors of a problem, at addresses as allocators give them.
    pub fn dense(problem: &AttentionProblem) -> Layout {
        let strides = flashattn_spec::tensor::contiguous_strides;
        let p = problem;
        let [q, k, v, o] = [p.q_shape(), p.k_shape(), p.v_shape(), p.o_shape()].map(strides);
        Layout { strides: Strides { q, k, v, o }, align: [16; 4] }
    }
}

/// The largest power of two, at most 16, that divides an address.
fn align(address: u64) -> u64 {
    1 << address.trailing_zeros().min(4)
}

/// Where a launch finds a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// Where the caller's is.
    Caller,
    /// So many bytes into the workspace.
    Workspace(u64),
}

/// A copy of a tensor's rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Copy<T = Tensor> {
    /// The tensor.
    pub tensor: T,
    /// Whether it is a result, which goes from the workspace to the caller; inputs go the other way.
    pub back: bool,
    /// The kernel's config.
    pub config: CopyConfig,
    /// Its launch.
    pub launch: CopyLaunch,
    /// Of batch, row and head in bytes.
    from: [u64; 3],
    to: [u64; 3],
    /// Rows of a sequence, heads, sequences, pieces of a row.
    sizes: [u32; 4],
}

impl<T> Copy<T> {
    /// The kernel's arguments: the first eight 64-bit, the last five 32-bit.
    pub fn arguments(&self, from: u64, to: u64) -> ([u64; 8], [u32; 5]) {
        let ([a, b, c], [d, e, f], [g, h, i, j]) = (self.from, self.to, self.sizes);
        ([from, a, b, c, to, d, e, f], [g, h, i, j, self.launch.shift])
    }
}

/// A forward pass whose tensors may lie anywhere: a [`ForwardPlan`], and the copies around it.
#[derive(Clone, Debug)]
pub struct StagedPlan {
    /// The kernel's plan.
    pub forward: ForwardPlan,
    /// Copies before it.
    pub before: Vec<Copy>,
    /// And after it.
    pub after: Vec<Copy>,
    /// Bytes of the workspace, which begins at a multiple of 256: for staged tensors, 0 without any.
    pub workspace: u64,
    places: [Location; 4],
}

/// Tensors that can be staged, in the order of [`Layout::align`].
const TENSORS: [Tensor; 4] = [Tensor::Q, Tensor::K, Tensor::V, Tensor::O];

impl StagedPlan {
    /// Plans the forward pass of a problem whose tensors lie so.
    ///
    /// # Errors
    /// As [`ForwardPlan::new`], but for strides and addresses.
    pub fn new(problem: &AttentionProblem, layout: &Layout) -> Result<StagedPlan, PlanError> {
        StagedPlan::with_tiles(problem, layout, None)
    }

    /// As [`StagedPlan::new`], with other tiles than the tuning table's: see [`ForwardPlan::with_tiles`].
    ///
    /// # Errors
    /// As [`StagedPlan::new`].
    pub fn with_tiles(
        problem: &AttentionProblem,
        layout: &Layout,
        tiles: Option<Tiles>,
    ) -> Result<StagedPlan, PlanError> {
        problem.validate()?;
        let (p, s) = (problem, layout.strides);
        let shapes = [p.q_shape(), p.k_shape(), p.v_shape(), p.o_shape()];
        let mut strides = [s.q, s.k, s.v, s.o];
        let (mut copies, mut places, mut workspace) = (Vec::new(), [Location::Caller; 4], 0);
        // Other types are refused below.
        let sixteen_bits = matches!(p.dtype, DType::Bf16 | DType::F16);
        for (i, tensor) in TENSORS.into_iter().enumerate().filter(|_| sixteen_bits) {
            if shapes[i].contains(&0) {
                // Without elements there is nothing to copy, and strides mean nothing.
                strides[i] = [0, 0, 0, 1];
                continue;
            }
            if fits(tensor, shapes[i], strides[i], layout.align[i]) {
                continue;
            }
            let back = tensor == Tensor::O;
            let staged = stage(tensor, shapes[i], strides[i], layout.align[i], back, None)?;
            places[i] = Location::Workspace(workspace);
            workspace = staged.end(workspace)?;
            strides[i] = staged.strides;
            copies.push(staged.copy);
        }
        let [q, k, v, o] = strides;
        let forward = ForwardPlan::with_tiles(problem, &Strides { q, k, v, o }, tiles)?;
        let (after, before) = copies.into_iter().partition(|copy: &Copy| copy.back);
        Ok(StagedPlan { forward, before, after, workspace, places })
    }

    /// Where the kernel finds a tensor; those that are never staged are the caller's.
    pub fn place(&self, tensor: Tensor) -> Location {
        let index = TENSORS.into_iter().position(|other| other == tensor);
        index.map_or(Location::Caller, |i| self.places[i])
    }

    /// The copies, in the order of [`StagedPlan::before`] and [`StagedPlan::after`].
    pub fn copies(&self) -> impl Iterator<Item = &Copy> {
        self.before.iter().chain(&self.after)
    }

    /// Tensors that are copied because the kernel cannot take them where they lie.
    pub fn staged(&self) -> impl Iterator<Item = Tensor> {
        TENSORS.into_iter().filter(|&tensor| self.place(tensor) != Location::Caller)
    }
}

/// Bytes a step of a dimension that has more than one index: the others' strides mean nothing.
fn steps([b, n, h, _]: [usize; 4], [sb, sn, sh, _]: [usize; 4]) -> [u128; 3] {
    [(b, sb), (n, sn), (h, sh)].map(|(size, stride)| if size > 1 { stride as u128 * 2 } else { 0 })
}

/// Whether the kernel can take a tensor as it lies: the rules of [`ForwardPlan`] and [`ForwardPlan::check_address`].
fn fits(tensor: Tensor, shape: [usize; 4], strides: [usize; 4], align: u64) -> bool {
    match tensor {
        Tensor::O => multiples(shape, strides, align, 8),
        _ => loads(shape, strides, align),
    }
}

/// Whether a tensor's address and strides are multiples of so many bytes.
fn multiples(shape: [usize; 4], strides: [usize; 4], align: u64, bytes: u64) -> bool {
    align >= bytes && steps(shape, strides).iter().all(|step| step.is_multiple_of(bytes.into()))
}

/// Whether TMA can load a tensor.
fn loads(shape: [usize; 4], strides: [usize; 4], align: u64) -> bool {
    multiples(shape, strides, align, 16) && steps(shape, strides).iter().all(|&step| step < 1 << 40)
}

struct Staged<T> {
    copy: Copy<T>,
    shape: [usize; 4],
    strides: [usize; 4],
    bytes: u64,
}

impl<T: Debug + std::marker::Copy> Staged<T> {
    /// Where the workspace's next tensor begins if this one does at `begin`.
    fn end(&self, begin: u64) -> Result<u64, PlanError> {
        let end = self.bytes.checked_next_multiple_of(ALIGN).and_then(|x| x.checked_add(begin));
        end.ok_or_else(|| too_large(self.copy.tensor, self.shape))
    }
}

/// Row-major, rows padded to 16 bytes; a dimension of stride 0 stays one. `add`: to what the caller's tensor, of this type,
/// holds.
fn stage<T: Debug + std::marker::Copy>(
    tensor: T,
    shape: [usize; 4],
    strides: [usize; 4],
    align: u64,
    back: bool,
    add: Option<DType>,
) -> Result<Staged<T>, PlanError> {
    let refuse = || too_large(tensor, shape);
    let steps = steps(shape, strides);
    let [b, n, h, d] = shape;
    let row = d.next_multiple_of(8);
    let mut to = [0; 3];
    let mut elements = row;
    let mut sizes = [b, n, h];
    for i in [2, 1, 0] {
        // Repeated rows are copied once (results have none: validated to be distinct).
        sizes[i] = if steps[i] == 0 { 1 } else { sizes[i] };
        to[i] = if sizes[i] > 1 { elements } else { 0 };
        elements = elements.checked_mul(sizes[i]).ok_or_else(refuse)?;
    }
    let bytes = u64::try_from(elements).ok().and_then(|x| x.checked_mul(2)).ok_or_else(refuse)?;
    let mut caller = [0; 3];
    for (to, step) in caller.iter_mut().zip(steps) {
        *to = u64::try_from(step).map_err(|_| refuse())?;
    }
    let copied = to.map(|stride| stride as u64 * 2);
    // The widest power of two that divides everything.
    let bits = caller.iter().chain(&copied).fold(align | (2 * d as u64) | 16, |bits, &x| bits | x);
    let config = CopyConfig { bytes: 1 << bits.trailing_zeros(), add };
    let [batch, seqlen, heads] = sizes;
    let rows = seqlen.checked_mul(heads).filter(|&rows| rows < 1 << 31).ok_or_else(refuse)?;
    // Validated to be below 2³⁰ each.
    let sizes = [rows, heads, batch, 2 * d / config.bytes as usize].map(|x| x as u32);
    let launch = config.launch(sizes[0], sizes[3], sizes[2]);
    let (from, to_bytes) = if back { (copied, caller) } else { (caller, copied) };
    let copy = Copy { tensor, back, config, launch, from, to: to_bytes, sizes };
    Ok(Staged { copy, shape, strides: [to[0], to[1], to[2], 1], bytes })
}

fn too_large(tensor: impl Debug, shape: [usize; 4]) -> PlanError {
    PlanError::Unsupported {
        feature: Feature::Size,
        executor: "copy_rows",
        got: format!("{tensor:?} of shape {shape:?}, which has to be copied,"),
        expected: "fewer than 2^31 rows of a sequence and 2^63 bytes".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem() -> AttentionProblem {
        let mut p = AttentionProblem::new(3, 17, 4, 36, DType::Bf16);
        (p.heads_kv, p.seqlen_k, p.head_dim_v) = (2, 29, 64);
        p
    }

    #[test]
    fn only_what_does_not_fit_is_staged() {
        let p = problem();
        let dense = Layout::dense(&p);
        let names = |layout: &Layout| StagedPlan::new(&p, layout).unwrap().staged().collect::<Vec<_>>();
        // Heads of 72 bytes; v's and o's have 128.
        assert_eq!(names(&dense), [Tensor::Q, Tensor::K]);
        assert_eq!(names(&Layout { align: [16, 16, 8, 8], ..dense }), [Tensor::Q, Tensor::K, Tensor::V]);
        assert_eq!(names(&Layout { align: [16, 16, 16, 4], ..dense }), [Tensor::Q, Tensor::K, Tensor::O]);
        let mut odd = dense;
        odd.strides.o[1] += 1;
        assert_eq!(names(&odd), [Tensor::Q, Tensor::K, Tensor::O]);
        // Strides of a single index mean nothing.
        let one = AttentionProblem { batch: 1, heads_q: 1, heads_kv: 1, ..p.clone() };
        let strides = [7, 40, 3, 1];
        let strides = Strides { q: strides, k: strides, v: [9, 64, 5, 1], o: [1, 64, 1, 1] };
        let plan = StagedPlan::new(&one, &Layout { strides, align: [16; 4] }).unwrap();
        assert_eq!((plan.staged().count(), plan.workspace), (0, 0));
        assert_eq!(Layout::new(strides, [0, 6, 24, 1 << 40]).align, [16, 2, 8, 16]);
    }

    #[test]
    fn copies_are_as_wide_as_both_sides_allow() {
        let p = problem();
        let plan = StagedPlan::new(&p, &Layout::dense(&p)).unwrap();
        let q = &plan.before[0];
        // 72 bytes a row are 9 pieces of 8; padded to 80.
        assert_eq!((q.tensor, q.config.bytes, q.sizes), (Tensor::Q, 8, [17 * 4, 4, 3, 9]));
        assert_eq!((q.from, q.to), ([17 * 288, 288, 72], [17 * 320, 320, 80]));
        assert_eq!(plan.place(Tensor::Q), Location::Workspace(0));
        assert_eq!(plan.place(Tensor::K), Location::Workspace((3u64 * 17 * 320).next_multiple_of(256)));
        assert_eq!((plan.place(Tensor::V), plan.place(Tensor::Lse)), (Location::Caller, Location::Caller));
        let two = StagedPlan::new(&p, &Layout { align: [2; 4], ..Layout::dense(&p) }).unwrap();
        assert!(two.before.iter().chain(&two.after).all(|copy| copy.config.bytes == 2));
        assert_eq!((two.after.len(), two.after[0].to[2]), (1, 128));
    }

    #[test]
    fn repeated_sequences_are_copied_once() {
        let p = problem();
        let mut shared = Layout::dense(&p);
        (shared.strides.k[0], shared.strides.q[0]) = (0, 0);
        let plan = StagedPlan::new(&p, &shared).unwrap();
        assert_eq!(plan.before[1].sizes, [29 * 2, 2, 1, 9]);
        let q = (17u64 * 320).next_multiple_of(256);
        assert_eq!(plan.workspace, q + (29u64 * 160).next_multiple_of(256));
    }

    #[test]
    fn offsets_past_32_bits_are_kept() {
        let p = AttentionProblem::new(2, 16, 3, 36, DType::F16);
        let mut far = Layout::dense(&p);
        far.strides.q[0] = (1 << 33) + 4;
        let plan = StagedPlan::new(&p, &far).unwrap();
        assert_eq!(plan.before[0].from[0], (1 << 34) + 8);
        let mut beyond = far;
        beyond.strides.q[0] = usize::MAX;
        let error = StagedPlan::new(&p, &beyond).unwrap_err().to_string();
        assert!(error.starts_with("size: Q of shape [2, 16, 3, 36]"), "{error}");
    }
}
