//! [`Split::Gradients`](super::Split::Gradients): each warpgroup has one gradient of the same keys, and what that takes.
//!
//! ```text
//! values:  Sᵀ = K·Qᵀ;    Pᵀ = exp2(scale·Sᵀ − lse), to the other warpgroup;  dV += Pᵀ·dO
//! keys:    dPᵀ = V·dOᵀ;  dSᵀ = Pᵀ ∘ (dPᵀ − D);                               dK += dSᵀ·Q
//! ```
//!
//! Of as many queries as keys the products' operands keep shared memory as busy as the tensor cores, where half as many queries
//! of S and dP, or half of the columns of dV and dK with P and dS in shared memory, keep it busier. Each issues the next block's
//! first product behind this block's second; while one is between its products, the other's run.

use ptx::build::{Address, Half};

use super::consumer::{Block, Consumer};
use super::{CONSUMERS, Gradient};
use crate::kernels::global::floats;

impl<'k, H: Half> Consumer<'_, 'k, H> {
    /// The algorithm of the warpgroup with this gradient.
    pub(super) fn one_gradient(&self, gradient: Gradient) {
        let (k, shared) = (self.k, self.shared);
        let (once, first, second, sum) = match gradient {
            Gradient::Values => (shared.k_pipeline, shared.q_pipeline, shared.do_pipeline, &self.dv),
            Gradient::Keys => (shared.v_pipeline, shared.do_pipeline, shared.q_pipeline, &self.dk),
        };
        let (once_state, state) = (once.start(k), first.start(k));
        let stage = k.var(0u32);
        let block = Block { stage, do_stage: stage };
        let issue_first = || {
            first.consumer_wait(k, state);
            k.wgmma_fence();
            let next = Block { stage: state.index, do_stage: state.index };
            match gradient {
                Gradient::Values => self.scores(next.stage),
                Gradient::Keys => self.d_probabilities(&next),
            }
            k.wgmma_commit();
        };
        self.each_item(&[sum], |item, left| {
            k.if_(left.ne(0), || {
                once_state.phase.set(item.round);
                once.consumer_wait(k, once_state);
                issue_first();
                k.loop_(|| {
                    stage.set(state.index);
                    // With Q come the statistics.
                    second.consumer_wait(k, state);
                    match gradient {
                        Gradient::Values => self.pass_probabilities(&block),
                        Gradient::Keys => self.take_probabilities(&block),
                    }
                    first.consumer_release(k, stage, self.lane);
                    k.wgmma_fence();
                    match gradient {
                        Gradient::Values => self.d_values(&block),
                        Gradient::Keys => self.d_keys(&block),
                    }
                    k.wgmma_commit();
                    state.advance();
                    left.set(left - 1);
                    k.break_if(left.eq(0));
                    issue_first();
                    k.wgmma_wait(1);
                    second.consumer_release(k, stage, self.lane);
                });
                k.wgmma_wait(0);
                second.consumer_release(k, stage, self.lane);
                once.consumer_release(k, once_state.index, self.lane);
            });
        });
    }

    /// From S to P, which the other warpgroup gets, too. It has read what lay there two blocks before: since then it has let go of
    /// the stage that Q came into.
    fn pass_probabilities(&self, block: &Block<'k>) {
        let k = self.k;
        let (minus_lse, partial) = (self.all(self.minus_lse(block)), self.about(block).partial);
        k.wgmma_wait(0);
        self.probabilities(block, Some(minus_lse));
        self.hide_all(block, partial, &[&self.s]);
        self.pack(&self.s, &self.p);
        let to = self.passed(block);
        for (step, &operand) in self.p.iter().enumerate() {
            to.at(128 * 16 * step as i32).store_vec(operand);
        }
        k.bar_arrive(self.scores_barrier(block, k.var(0u32)), 128 * CONSUMERS);
    }

    /// From dP and the other's P to dS.
    fn take_probabilities(&self, block: &Block<'k>) {
        let k = self.k;
        let (delta, partial) = (self.all(self.delta(block)), self.about(block).partial);
        k.bar_sync(self.scores_barrier(block, k.var(0u32)), 128 * CONSUMERS);
        let from = self.passed(block);
        let p: Vec<_> =
            (0..self.p.len()).map(|step| from.at(128 * 16 * step as i32).load_vec::<u32, 4>()).collect();
        k.wgmma_wait(0);
        for (i, &pair) in p.iter().flatten().enumerate() {
            for (&s, p) in self.s.registers[2 * i..].iter().zip(floats::<H>(pair)) {
                s.set(p);
            }
        }
        self.d_scores(block, Some(delta));
        self.hide_all(block, partial, &[&self.dp]);
        self.pack(&self.dp, &self.ds);
    }

    /// Where the thread's part of P lies on the way, the first of so many pieces.
    fn passed(&self, block: &Block<'k>) -> Address<'k, u32> {
        self.shared.p + (block.stage * self.config.scores().bytes() + (self.k.tid(0) & 127) * 16)
    }
}
