//! Barriers of the block and of the cluster, and the register pool of `setmaxnreg`.

use super::clocks::Clocks;
use super::cluster::{Cluster, Context, Flow};
use super::error::Error;
use super::warp::{Awaited, Wait};
use crate::kernel::Kernel;

/// A named barrier of a block.
#[derive(Clone, Debug, Default)]
pub(super) struct Barrier {
    /// Threads that the first to arrive asked for; 0 while no one has.
    pub expected: u32,
    pub arrived: u32,
    /// Warps that have arrived, by index in the cluster, and whether they wait.
    warps: Vec<(usize, bool)>,
    /// What those who arrived knew.
    clocks: Clocks,
}

/// Where a warp is at the cluster's barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    None,
    Arrived,
    /// The phase at which it arrived has completed.
    Completed,
}

/// Registers of a multiprocessor.
const REGISTERS: u32 = 65536;

/// Registers a thread has at launch when ptxas may use as many as fit.
pub(super) fn launch_registers(kernel: &Kernel) -> u32 {
    let threads = kernel.threads().next_multiple_of(128).saturating_mul(kernel.min_blocks.max(1));
    (REGISTERS / threads.max(1)).min(255) / 8 * 8
}

impl Cluster<'_> {
    /// `bar.sync` and `bar.arrive`.
    pub(super) fn bar(&mut self, cx: Context<'_>, waits: bool) -> Result<Flow, Error> {
        let (id, threads) = (self.uniform(cx, 0)?, self.uniform(cx, 1)? as u32);
        let block = self.warps[cx.warp].block;
        let most = self.device.program.kernel.threads().next_multiple_of(32);
        if id > 15 {
            return Err(self.misuse(cx, format!("barrier {id}: expected 0 to 15")));
        }
        if threads == 0 || threads % 32 != 0 || threads > most {
            let problem = format!(
                "barrier {id} for {threads} threads: expected a multiple of 32 up to the block's {most}"
            );
            return Err(self.misuse(cx, problem));
        }
        let barrier = &mut self.blocks[block].barriers[id as usize];
        if barrier.expected != 0 && barrier.expected != threads {
            let expected = barrier.expected;
            return Err(
                self.misuse(cx, format!("barrier {id} for {threads} threads, others came for {expected}"))
            );
        }
        if barrier.warps.iter().any(|&(warp, _)| warp == cx.warp) {
            return Err(self.misuse(cx, format!("barrier {id}: the warp has already arrived in this phase")));
        }
        barrier.expected = threads;
        barrier.arrived += 32;
        barrier.warps.push((cx.warp, waits));
        let warp = &mut self.warps[cx.warp];
        warp.release(&mut barrier.clocks);
        if barrier.arrived < barrier.expected {
            if waits {
                warp.wait = Wait::Barrier(id as u8);
                return Ok(Flow::Wait);
            }
            return Ok(Flow::Next);
        }
        let complete = std::mem::take(barrier);
        for (waiter, waits) in complete.warps {
            if waits {
                self.warps[waiter].clocks.join(&complete.clocks);
                self.warps[waiter].wait = Wait::Ready;
            }
        }
        self.events += 1;
        Ok(Flow::Yield)
    }

    /// `barrier.cluster.arrive`.
    pub(super) fn cluster_arrive(&mut self, cx: Context<'_>, release: bool) -> Result<Flow, Error> {
        let warp = &mut self.warps[cx.warp];
        if warp.cluster != Arrival::None {
            return Err(self.misuse(
                cx,
                "the warp has arrived at the cluster's barrier and not waited since".to_owned(),
            ));
        }
        warp.cluster = Arrival::Arrived;
        if release {
            warp.release(&mut self.barrier[0]);
        } else {
            self.barrier[0].seen.join(&warp.fenced);
        }
        self.cluster_release();
        Ok(Flow::Next)
    }

    /// Completes the cluster barrier's phase if all warps have arrived or ended.
    pub(super) fn cluster_release(&mut self) {
        if !self.warps.iter().all(|warp| warp.done || warp.cluster == Arrival::Arrived) {
            return;
        }
        let [current, last] = &mut self.barrier;
        last.join(current);
        for warp in &mut self.warps {
            if warp.cluster == Arrival::Arrived {
                warp.cluster = Arrival::Completed;
            }
            if warp.wait == Wait::Cluster {
                warp.wait = Wait::Ready;
                warp.cluster = Arrival::None;
                warp.clocks.join(last);
            }
        }
    }

    /// `barrier.cluster.wait`.
    pub(super) fn cluster_wait(&mut self, cx: Context<'_>) -> Result<Flow, Error> {
        let warp = &mut self.warps[cx.warp];
        match warp.cluster {
            Arrival::None => {
                Err(self.misuse(cx, "wait at the cluster's barrier without an arrival before".to_owned()))
            }
            Arrival::Arrived => {
                warp.wait = Wait::Cluster;
                Ok(Flow::Wait)
            }
            Arrival::Completed => {
                warp.cluster = Arrival::None;
                warp.clocks.join(&self.barrier[1]);
                Ok(Flow::Next)
            }
        }
    }

    /// `setmaxnreg`: the pool is what the block had at launch, if ptxas takes as many as fit.
    pub(super) fn set_max_registers(
        &mut self,
        cx: Context<'_>,
        increase: bool,
        count: u8,
    ) -> Result<Flow, Error> {
        // The largest is 256, which a byte does not hold.
        let count = if count == 0 { 256 } else { count as u32 };
        if count % 8 != 0 || count < 24 {
            let problem = format!("setmaxnreg to {count} registers: expected a multiple of 8 from 24 to 256");
            return Err(self.unsupported(cx, problem));
        }
        let block = self.warps[cx.warp].block;
        let own = self.warps[cx.warp].max_registers;
        if increase {
            let warps = || self.warps.iter().filter(|warp| warp.block == block);
            let others: u32 = warps().map(|warp| warp.max_registers).sum::<u32>() - own;
            let pool = launch_registers(self.device.program.kernel) * warps().count() as u32;
            if others + count > pool {
                return Ok(Flow::Retry(Awaited::Registers(count as u8)));
            }
        }
        self.warps[cx.warp].max_registers = count;
        self.events += 1;
        Ok(Flow::Next)
    }
}
