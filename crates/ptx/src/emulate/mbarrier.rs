//! mbarriers: objects in shared memory that count arrivals and bytes by phases.

use std::fmt;

use super::clocks::Clocks;
use super::cluster::{Cluster, Context, Flow};
use super::error::Error;
use super::shared::BASE;
use super::warp::{Awaited, lanes};

/// Most bytes that a phase may wait for.
const TX_LIMIT: i64 = (1 << 20) - 1;

/// Events of an mbarrier's second agent: it was initialised, and that was made known to the cluster and the asynchronous
/// proxy.
const INITIALISED: u32 = 1;
const FENCED: u32 = 2;

/// An initialised mbarrier.
#[derive(Clone, Debug)]
pub(super) struct Mbarrier {
    /// Its number as an agent; the next number is of its initialisation.
    pub agent: u16,
    /// Arrivals of a phase.
    count: u32,
    /// Arrivals still to come in this phase.
    pending: u32,
    /// Bytes expected less bytes that have come.
    bytes: i64,
    /// Phases completed.
    pub phase: u32,
    /// What arrivals so far have released, and what had been when the last phase completed.
    arrived: Clocks,
    released: Clocks,
    /// The last phase in which bytes came, and the last that a warp has waited for; counted from 1.
    copied: u32,
    observed: u32,
}

impl fmt::Display for Mbarrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (phase, pending, count, bytes) = (self.phase, self.pending, self.count, self.bytes);
        write!(f, "{phase} phases complete, {pending} of {count} arrivals and {bytes} bytes pending")
    }
}

impl Mbarrier {
    /// Completes the phase if nothing is pending.
    fn settle(&mut self) -> bool {
        if self.pending != 0 || self.bytes != 0 {
            return false;
        }
        self.phase += 1;
        self.pending = self.count;
        self.released.join(&self.arrived);
        true
    }

    /// Why its block must not end now.
    pub(super) fn unfinished(&self) -> Option<String> {
        if self.bytes != 0 {
            return Some(format!("(an mbarrier) has bytes pending: {self}"));
        }
        (self.copied > self.observed).then(|| {
            format!("(an mbarrier) has got an asynchronous copy that no warp has waited for: {self}")
        })
    }
}

/// How an mbarrier is used, for what must come before.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// By a thread of the block.
    Local,
    /// By the asynchronous proxy, or from another block of the cluster.
    Remote,
}

impl<'a> Cluster<'a> {
    /// `mbarrier.init`.
    pub(super) fn mbarrier_init(&mut self, cx: Context<'a>) -> Result<Flow, Error> {
        let (addresses, counts) = (self.operand(cx, 0)?, self.operand(cx, 1)?);
        for lane in lanes(cx.lanes) {
            let (block, offset) = self.shared_at(cx, lane, addresses[lane] as u32, 8, 8, false)?;
            let count = counts[lane] as u32;
            if count == 0 || count >= 1 << 20 {
                return Err(self.misuse(cx, format!("mbarrier for {count} arrivals: expected 1 to 2^20 - 1")));
            }
            if self.blocks[block].mbarriers.contains_key(&offset) {
                let name = self.shared_name(offset);
                return Err(self
                    .misuse(cx, format!("{name} is an mbarrier already; mbarrier.inval must come before")));
            }
            let warp = &self.warps[cx.warp];
            let access = warp.access(lane as u8, cx.step);
            self.check_shared((cx.warp, cx.step), Some(lane), true, (block, offset, 8), access)?;
            let Some(next) = self.agents.checked_add(2).filter(|&next| next < u16::MAX) else {
                return Err(self.unsupported(cx, "more than 32,000 mbarriers were initialised".to_owned()));
            };
            let mbarrier = Mbarrier {
                agent: self.agents,
                count,
                pending: count,
                bytes: 0,
                phase: 0,
                arrived: Clocks::default(),
                released: Clocks::default(),
                copied: 0,
                observed: 0,
            };
            self.warps[cx.warp].clocks.seen.learn(mbarrier.agent + 1, INITIALISED);
            self.agents = next;
            self.blocks[block].mbarriers.insert(offset, mbarrier);
            self.blocks[block].shared.mark_mbarrier(offset, true);
        }
        Ok(Flow::Next)
    }

    /// `mbarrier.inval`.
    pub(super) fn mbarrier_inval(&mut self, cx: Context<'a>) -> Result<Flow, Error> {
        let addresses = self.operand(cx, 0)?;
        for lane in lanes(cx.lanes) {
            let (block, offset) = self.mbarrier_at(cx, lane, addresses[lane] as u32, Use::Local, false)?;
            if let Some(problem) = self.blocks[block].mbarriers.get(&offset).and_then(Mbarrier::unfinished) {
                let name = self.shared_name(offset);
                return Err(self.misuse(cx, format!("mbarrier.inval, but {name} {problem}")));
            }
            self.blocks[block].mbarriers.remove(&offset);
            self.blocks[block].shared.mark_mbarrier(offset, false);
        }
        Ok(Flow::Next)
    }

    /// The mbarriers that this warp has initialised, or knows of, become known beyond the block's threads.
    pub(super) fn fence_mbarriers(&mut self, w: usize) {
        let warp = &mut self.warps[w];
        for mbarrier in self.blocks.iter().flat_map(|block| block.mbarriers.values()) {
            let agent = mbarrier.agent + 1;
            if warp.clocks.seen.get(agent) >= INITIALISED {
                warp.clocks.seen.learn(agent, FENCED);
                warp.fenced.learn(agent, FENCED);
            }
        }
    }

    /// Block and offset of an initialised mbarrier that the lane may use in this way.
    pub(super) fn mbarrier_at(
        &self,
        cx: Context<'a>,
        lane: usize,
        address: u32,
        how: Use,
        cluster: bool,
    ) -> Result<(usize, u32), Error> {
        let (block, offset) = self.shared_at(cx, lane, address, 8, 8, cluster)?;
        let name = || self.shared_name(offset);
        let Some(mbarrier) = self.blocks[block].mbarriers.get(&offset) else {
            let problem = format!("no mbarrier was initialised at {} (address {:#x})", name(), address);
            return Err(self.misuse(cx, problem));
        };
        let warp = &self.warps[cx.warp];
        let known = warp.clocks.seen.get(mbarrier.agent + 1);
        if known < INITIALISED {
            let problem = format!("mbarrier {} is used without a barrier after its initialisation", name());
            return Err(self.misuse(cx, problem));
        }
        if (how == Use::Remote || block != warp.block) && known < FENCED {
            let problem = format!(
                "mbarrier {} is used by the asynchronous proxy or another block without fence.mbarrier_init between \
                 its initialisation and the barrier before this use",
                name()
            );
            return Err(self.misuse(cx, problem));
        }
        Ok((block, offset))
    }

    /// `mbarrier.arrive` in its forms: `bytes` is the operand with the bytes to expect.
    pub(super) fn mbarrier_arrive(
        &mut self,
        cx: Context<'a>,
        cluster: bool,
        bytes: Option<usize>,
        arrives: bool,
    ) -> Result<Flow, Error> {
        let addresses = self.operand(cx, 0)?;
        let bytes = bytes.map(|i| self.operand(cx, i)).transpose()?;
        for lane in lanes(cx.lanes) {
            let (block, offset) = self.mbarrier_at(cx, lane, addresses[lane] as u32, Use::Local, cluster)?;
            let warp = &self.warps[cx.warp];
            if block != warp.block {
                let event = warp.clocks.seen.get(warp.agent);
                self.use_block(block, (warp.agent, event, cx.step));
            }
            let expected = bytes.map_or(0, |bytes| bytes[lane] as u32) as i64;
            let Some(mbarrier) = self.blocks[block].mbarriers.get_mut(&offset) else { continue };
            mbarrier.bytes += expected;
            let over = mbarrier.bytes > TX_LIMIT;
            if arrives {
                // All lanes arrive in one instruction: they release the same.
                mbarrier.arrived.join(&self.warps[cx.warp].clocks);
            }
            if over {
                let problem = format!("{} expects more than 2^20 - 1 bytes", self.shared_name(offset));
                return Err(self.misuse(cx, problem));
            }
            if arrives {
                self.arrive(cx, block, offset, 1)?;
            }
        }
        if arrives {
            self.warps[cx.warp].next_epoch();
        }
        Ok(Flow::Next)
    }

    /// Something outside of a block uses its shared memory; of each agent the last use is enough.
    pub(super) fn use_block(&mut self, block: usize, new: (u16, u32, u32)) {
        let uses = &mut self.blocks[block].uses;
        match uses.iter_mut().find(|known| known.0 == new.0) {
            Some(known) => *known = new,
            None => uses.push(new),
        }
    }

    /// Counts arrivals.
    pub(super) fn arrive(
        &mut self,
        cx: Context<'a>,
        block: usize,
        offset: u32,
        arrivals: u32,
    ) -> Result<(), Error> {
        let Some(mbarrier) = self.blocks[block].mbarriers.get_mut(&offset) else { return Ok(()) };
        if mbarrier.pending < arrivals {
            let state = mbarrier.to_string();
            let name = self.shared_name(offset);
            return Err(self.misuse(cx, format!("one arrival too many in this phase at {name}: {state}")));
        }
        mbarrier.pending -= arrivals;
        self.events += mbarrier.settle() as u64;
        Ok(())
    }

    /// What a copy of a stream that was issued by a warp gives to those who wait: its data.
    pub(super) fn release_copies(&mut self, block: usize, offset: u32, agent: u16, event: u32) {
        if let Some(mbarrier) = self.blocks[block].mbarriers.get_mut(&offset) {
            mbarrier.arrived.seen.learn(agent, event);
        }
    }

    /// Bytes of an asynchronous copy have come; returns the agent and event under which they are known.
    pub(super) fn complete_bytes(
        &mut self,
        cx: Context<'a>,
        block: usize,
        offset: u32,
        bytes: u32,
    ) -> Result<(u16, u32), Error> {
        let name = self.shared_name(offset);
        let Some(mbarrier) = self.blocks[block].mbarriers.get_mut(&offset) else {
            return Err(self.misuse(cx, format!("mbarrier {name} is gone when its copy completes")));
        };
        let known = (mbarrier.agent, mbarrier.phase + 1);
        mbarrier.copied = mbarrier.phase + 1;
        mbarrier.bytes -= bytes as i64;
        let under = mbarrier.bytes < -TX_LIMIT;
        self.events += mbarrier.settle() as u64;
        if under {
            return Err(
                self.misuse(cx, format!("more than 2^20 - 1 bytes came at {name} that it does not expect"))
            );
        }
        Ok(known)
    }

    /// Whether the phase of this parity has completed; if so, the warp knows what it knew.
    fn observe(&mut self, w: usize, block: usize, offset: u32, parity: u32) -> bool {
        let Some(mbarrier) = self.blocks[block].mbarriers.get_mut(&offset) else { return false };
        if mbarrier.phase & 1 == parity & 1 {
            return false;
        }
        mbarrier.observed = mbarrier.observed.max(mbarrier.phase);
        let warp = &mut self.warps[w];
        warp.clocks.join(&mbarrier.released);
        warp.clocks.seen.learn(mbarrier.agent, mbarrier.phase);
        // Lanes that all waited are ordered with what each had done before.
        warp.sync += 1;
        true
    }

    /// `mbarrier.try_wait.parity`; `blocks`: as a loop around it.
    pub(super) fn mbarrier_wait(&mut self, cx: Context<'a>, blocks: bool) -> Result<Flow, Error> {
        let (addresses, parities) = (self.operand(cx, 0)?, self.operand(cx, 1)?);
        let mut results = [0; 32];
        let mut awaited = None;
        let mut last = None;
        for lane in lanes(cx.lanes & !self.warps[cx.warp].satisfied) {
            let what = (addresses[lane] as u32, parities[lane] as u32);
            // Most often all lanes wait for the same.
            if last.is_none_or(|(known, _)| known != what) {
                let (block, offset) = self.mbarrier_at(cx, lane, what.0, Use::Local, false)?;
                let done = self.observe(cx.warp, block, offset, what.1);
                if !done {
                    awaited = Some(Awaited::Mbarrier { block, offset, parity: what.1 });
                }
                last = Some((what, done));
            }
            if let Some((_, true)) = last {
                results[lane] = 1;
                self.warps[cx.warp].satisfied |= 1 << lane;
            }
        }
        if blocks {
            return Ok(awaited.map_or(Flow::Next, Flow::Retry));
        }
        self.set(cx, 0, &results)?;
        Ok(if awaited.is_some() { Flow::Yield } else { Flow::Next })
    }

    /// `cp.async.mbarrier.arrive.noinc`: arrives when the lanes' earlier copies have completed.
    pub(super) fn cp_async_arrive(&mut self, cx: Context<'a>) -> Result<Flow, Error> {
        let addresses = self.operand(cx, 0)?;
        let mut targets: Vec<(usize, u32, u32)> = Vec::new();
        for lane in lanes(cx.lanes) {
            let (block, offset) = self.mbarrier_at(cx, lane, addresses[lane] as u32, Use::Local, false)?;
            match targets.iter_mut().find(|target| (target.0, target.1) == (block, offset)) {
                Some(target) => target.2 += 1,
                None => targets.push((block, offset, 1)),
            }
        }
        self.issue_arrivals(cx, targets);
        Ok(Flow::Next)
    }

    /// The address of the first byte of an offset, as the block itself names it.
    pub(super) fn local_address(block: usize, offset: u32) -> u32 {
        (block as u32) << 24 | (offset + BASE)
    }
}
