//! A backward pass over tensors that may lie anywhere.

use std::collections::HashMap;

use flashattn_spec::tensor::contiguous_strides;
use flashattn_spec::{AttentionProblem, DType};

use super::{ALIGN, Copy, Location, align, loads, multiples, stage};
use crate::kernels::{BwdConfig, CopyConfig};
use crate::plan::{BackwardPlan, GradStrides, GradTensor, PlanError, Strides};

/// How a call's tensors lie in memory, and which of the options it has that plans depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GradLayout {
    /// Strides in elements.
    pub strides: GradStrides,
    /// Of q, k, v, o, do, dq, dk and dv the largest power of two, at most 16, that divides the address.
    pub align: [u64; 8],
    /// Whether the loss has a gradient through lse.
    pub d_lse: bool,
    /// Whether gradients are added to what their memory holds.
    pub accumulate: bool,
}

impl GradLayout {
    /// The layout of tensors with these strides at these addresses (of q, k, v, o, do, dq, dk, dv); without a gradient through
    /// lse, and overwriting.
    pub fn new(strides: GradStrides, addresses: [u64; 8]) -> GradLayout {
        GradLayout { strides, align: addresses.map(align), d_lse: false, accumulate: false }
    }

    /// Row-major tensors of a problem, at addresses as allocators give them.
    pub fn dense(problem: &AttentionProblem) -> GradLayout {
        let p = problem;
        let [q, k, v, o] = [p.q_shape(), p.k_shape(), p.v_shape(), p.o_shape()].map(contiguous_strides);
        let strides = GradStrides { forward: Strides { q, k, v, o }, d_o: o, dq: q, dk: k, dv: v };
        GradLayout::new(strides, [0; 8])
    }
}

/// A [`BackwardPlan`], the copies around it, and where its workspace lies.
#[derive(Clone, Debug)]
pub struct StagedBackward {
    /// The kernels' plan.
    pub backward: BackwardPlan,
    /// Copies before them.
    pub before: Vec<Copy<GradTensor>>,
    /// And after them.
    pub after: Vec<Copy<GradTensor>>,
    /// Bytes of the workspace, which begins at a multiple of 256: the plan's own, and staged tensors.
    pub workspace: u64,
    places: HashMap<GradTensor, u64>,
}

impl StagedBackward {
    /// Plans the backward pass of a problem whose tensors lie so.
    ///
    /// Gradients that are to be added to what is there are staged all: computed into the workspace and rounded, then added in
    /// f32 and rounded again. Those of tables are added to directly.
    ///
    /// # Errors
    /// As [`BackwardPlan::new`], but for strides and addresses.
    pub fn new(
        problem: &AttentionProblem,
        layout: &GradLayout,
        deterministic: bool,
    ) -> Result<StagedBackward, PlanError> {
        use GradTensor::{DK, DO, DQ, DSinks, DV, K, O, Q, TableSums, Turns, V};
        problem.validate()?;
        let (p, s) = (problem, &layout.strides);
        let [q, k, v, o] = [p.q_shape(), p.k_shape(), p.v_shape(), p.o_shape()];
        let mut tensors = [
            (Q, q, s.forward.q),
            (K, k, s.forward.k),
            (V, v, s.forward.v),
            (O, o, s.forward.o),
            (DO, o, s.d_o),
            (DQ, q, s.dq),
            (DK, k, s.dk),
            (DV, v, s.dv),
        ];
        let (mut copies, mut places, mut workspace) = (Vec::new(), HashMap::new(), 0);
        // Other types are refused below.
        let sixteen_bits = matches!(p.dtype, DType::Bf16 | DType::F16);
        for ((tensor, shape, strides), align) in tensors.iter_mut().zip(layout.align).filter(|_| sixteen_bits)
        {
            if shape.contains(&0) {
                // Without elements there is nothing to copy, and strides mean nothing.
                *strides = [0, 0, 0, 1];
                continue;
            }
            let back = matches!(tensor, DQ | DK | DV);
            let add = back && layout.accumulate;
            let takes = |bytes: u32| multiples(*shape, *strides, align, bytes.into());
            let dim = shape[3] as u32;
            let fits = match tensor {
                O => takes(BwdConfig::o_bytes(dim)),
                _ if back => !add && takes(BwdConfig::gradient_bytes(dim)),
                _ => loads(*shape, *strides, align),
            };
            if fits {
                continue;
            }
            let staged = stage(*tensor, *shape, *strides, align, back, add.then_some(p.dtype))?;
            places.insert(*tensor, workspace);
            workspace = staged.end(workspace)?;
            *strides = staged.strides;
            copies.push(staged.copy);
        }
        let [q, k, v, o, d_o, dq, dk, dv] = tensors.map(|(_, _, strides)| strides);
        let strides = GradStrides { forward: Strides { q, k, v, o }, d_o, dq, dk, dv };
        let mut backward = BackwardPlan::new(problem, &strides, layout.d_lse, deterministic)?;
        for &(tensor, bytes) in &backward.workspace {
            places.insert(tensor, workspace);
            workspace += (bytes as u64).next_multiple_of(ALIGN);
        }
        if layout.accumulate {
            backward.zeroed.retain(|tensor| matches!(tensor, TableSums(_) | Turns));
            if p.sinks && backward.query_blocks > 0 {
                let config = CopyConfig { bytes: 4, add: Some(DType::F32) };
                // Validated to be below 2³⁰.
                let heads = p.heads_q as u32;
                let (launch, sizes) = (config.launch(1, heads, 1), [1, 1, 1, heads]);
                places.insert(DSinks, workspace);
                workspace += (4 * p.heads_q as u64).next_multiple_of(ALIGN);
                let (from, to) = ([0; 3], [0; 3]);
                copies.push(Copy { tensor: DSinks, back: true, config, launch, from, to, sizes });
            }
        }
        let (after, before) = copies.into_iter().partition(|copy: &Copy<_>| copy.back);
        Ok(StagedBackward { backward, before, after, workspace, places })
    }

    /// Where the kernels find a tensor; the counter and uploads are the caller's.
    pub fn place(&self, tensor: GradTensor) -> Location {
        self.places.get(&tensor).map_or(Location::Caller, |&offset| Location::Workspace(offset))
    }

    /// The copies, in the order of [`StagedBackward::before`] and [`StagedBackward::after`].
    pub fn copies(&self) -> impl Iterator<Item = &Copy<GradTensor>> {
        self.before.iter().chain(&self.after)
    }

    /// Tensors that are copied, because the kernels cannot take them where they lie, or because they are added to what is there.
    pub fn staged(&self) -> impl Iterator<Item = GradTensor> {
        self.copies().map(|copy| copy.tensor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_does_not_fit_is_staged() {
        use GradTensor::{DK, DO, DQ, DSinks, DV, K, O, Q, V};
        let mut p = AttentionProblem::new(3, 17, 4, 64, DType::Bf16);
        (p.heads_kv, p.seqlen_k, p.head_dim_v, p.sinks) = (2, 29, 40, true);
        let dense = GradLayout::dense(&p);
        let plan = |layout: &GradLayout| StagedBackward::new(&p, layout, false).unwrap();
        let names = |layout: &GradLayout| plan(layout).staged().collect::<Vec<_>>();
        assert_eq!(names(&dense), []);
        let workspace = plan(&dense).workspace;
        // Rows of 64 and of 40 elements are read and written by 16 bytes.
        assert_eq!(names(&GradLayout { align: [2, 16, 8, 2, 8, 4, 8, 16], ..dense }), [Q, V, O, DO, DQ, DK]);
        let mut odd = dense;
        (odd.strides.forward.k[1], odd.strides.dk[1]) = (128 + 4, 132);
        assert_eq!(names(&GradLayout { align: [16, 16, 16, 16, 16, 2, 16, 16], ..odd }), [K, DQ, DK]);
        // Others o by single elements and gradients by pairs.
        let other = AttentionProblem { head_dim: 62, head_dim_v: 33, ..p.clone() };
        let plan_of = StagedBackward::new(&other, &GradLayout::dense(&other), false).unwrap();
        assert_eq!(plan_of.staged().collect::<Vec<_>>(), [Q, K, V, DO, DV]);
        let adding = plan(&GradLayout { accumulate: true, ..dense });
        assert_eq!(adding.staged().collect::<Vec<_>>(), [DQ, DK, DV, DSinks]);
        assert!(adding.before.is_empty() && adding.backward.zeroed.is_empty());
        let add: Vec<_> = adding.after.iter().map(|copy| (copy.config.bytes, copy.config.add)).collect();
        let half = (16, Some(DType::Bf16));
        assert_eq!(add, [half, half, half, (4, Some(DType::F32))]);
        let staged = 2 * (3 * 17 * 4 * 64 + 3 * 29 * 2 * (64 + 40)) as u64;
        assert!((staged..staged + 4 * ALIGN + 1).contains(&(adding.workspace - workspace)));
    }
}
