//! Producer–consumer pipelines over mbarriers.
//!
//! A pipeline has `stages` buffers, and for each a *full* barrier (the producer's bytes have arrived) and an *empty* one
//! (the consumers have read them). Both sides walk the stages in the same order, each with a [`PipelineState`] of its
//! own; a barrier's parity flips each time round.

use crate::build::{Builder, Reg};
use crate::hopper::Mbarrier;

/// Where one side of a pipeline is: the stage, and the parity of the phase it waits for there.
#[derive(Clone, Copy, Debug)]
pub struct PipelineState<'k> {
    /// Stage, from 0.
    pub index: Reg<'k, u32>,
    /// Parity of the round, 0 in the first.
    pub phase: Reg<'k, u32>,
    stages: u32,
}

impl<'k> PipelineState<'k> {
    /// On to the next stage.
    #[track_caller]
    pub fn advance(self) {
        let next = self.index + 1;
        let wrapped = next.ge(self.stages);
        self.phase.set(wrapped.select(self.phase ^ 1, self.phase));
        self.index.set(wrapped.select(0, next));
    }
}

/// Barriers of a pipeline between one producer thread and whole consumer warps, possibly across a cluster.
#[derive(Clone, Copy, Debug)]
pub struct Pipeline<'k> {
    full: Mbarrier<'k>,
    empty: Mbarrier<'k>,
    stages: u32,
    cluster: u32,
    consumer_warps: u32,
}

impl<'k> Pipeline<'k> {
    /// A pipeline whose stages are released by `consumer_warps` warps of each of `cluster` blocks (1 without a cluster:
    /// more means that each block's loads go to all of them).
    #[track_caller]
    pub fn new(k: &'k Builder, name: &str, stages: u32, consumer_warps: u32, cluster: u32) -> Self {
        let full = Mbarrier(k.shared(&format!("{name}.full"), 8 * stages, 8));
        let empty = Mbarrier(k.shared(&format!("{name}.empty"), 8 * stages, 8));
        Pipeline { full, empty, stages, cluster, consumer_warps }
    }

    /// Prepares the barriers: by one thread, before [`Builder::fence_mbarrier_init`] and a barrier of the block (of the
    /// cluster, if there is one).
    #[track_caller]
    pub fn init(self, k: &'k Builder) {
        for stage in 0..self.stages as i32 {
            Mbarrier(self.full.0.at(8 * stage)).init(k, 1);
            Mbarrier(self.empty.0.at(8 * stage)).init(k, self.consumer_warps * self.cluster);
        }
    }

    /// A state at the first stage.
    #[track_caller]
    pub fn start(self, k: &'k Builder) -> PipelineState<'k> {
        PipelineState { index: k.var(0u32), phase: k.var(0u32), stages: self.stages }
    }

    /// The barrier on which this stage's loads complete.
    #[track_caller]
    pub fn full(self, state: PipelineState<'k>) -> Mbarrier<'k> {
        Mbarrier(self.full.0 + state.index * 8)
    }

    /// Producer: waits until the stage is free (in the first round it is), and announces `bytes`.
    #[track_caller]
    pub fn producer_acquire(self, k: &'k Builder, state: PipelineState<'k>, bytes: u32) {
        self.producer_wait(k, state);
        self.full(state).arrive_expect_tx(k, bytes);
    }

    /// Producer: waits until the stage is free.
    #[track_caller]
    pub fn producer_wait(self, k: &'k Builder, state: PipelineState<'k>) {
        Mbarrier(self.empty.0 + state.index * 8).wait(k, state.phase ^ 1);
    }

    /// Consumer: waits until the stage's bytes have arrived.
    #[track_caller]
    pub fn consumer_wait(self, k: &'k Builder, state: PipelineState<'k>) {
        self.full(state).wait(k, state.phase);
    }

    /// Consumer: this warp has read stage `index`. All lanes call it; with a cluster, lane `r` tells block `r`.
    #[track_caller]
    pub fn consumer_release(self, k: &'k Builder, index: Reg<'k, u32>, lane: Reg<'k, u32>) {
        let empty = Mbarrier(self.empty.0 + index * 8);
        if self.cluster == 1 {
            k.when(lane.eq(0), || empty.arrive(k));
        } else {
            k.when(lane.lt(self.cluster), || empty.arrive_remote(k, lane));
        }
    }

    /// Producer, at its end: waits until every stage it filled has been read, so that no block of the cluster leaves
    /// while another still signals it.
    #[track_caller]
    pub fn producer_drain(self, k: &'k Builder, state: PipelineState<'k>) {
        for _ in 0..self.stages {
            Mbarrier(self.empty.0 + state.index * 8).wait(k, state.phase ^ 1);
            state.advance();
        }
    }
}
