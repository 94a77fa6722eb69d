//! Copies in the background: `cp.async` and bulk copies, and the completion of all of them at a time drawn by the seed.
//!
//! Until then the destination is tagged as written by an event that no clock reaches, so that whoever reads it is told.

use std::cmp::Ordering;

use rand::Rng;

use super::access::Range;
use super::cluster::{Cluster, Context};
use super::error::Error;
use super::mbarrier::Use;
use super::shared::{Access, PENDING};
use super::tma::{Direction, Plan};
use super::warp::lanes;

/// Work that completes later.
pub(super) struct Pending<'a> {
    pub due: u64,
    number: u64,
    pub cx: Context<'a>,
    pub effect: Effect,
}

/// What happens then.
pub(super) enum Effect {
    /// Global memory to shared memory of some blocks, then bytes at their mbarriers.
    Load { plan: Plan, targets: Vec<(usize, u32)>, mbarriers: Vec<(usize, u32)> },
    /// What was read from shared memory to global memory.
    Store { plan: Plan, data: Vec<u8>, direction: Direction, event: u32 },
    /// Shared memory to shared memory of another block.
    Move { data: Vec<u8>, target: (usize, u32), mbarrier: (usize, u32) },
    /// `cp.async`: for each lane the range read, the offset written and how many bytes of it.
    Copy { block: usize, parts: Vec<(Range, u32, u32)>, event: u32 },
    /// Arrivals at mbarriers, once the warp's copies up to `event` have completed.
    Arrive { targets: Vec<(usize, u32, u32)>, event: u32 },
}

impl PartialEq for Pending<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}
impl Eq for Pending<'_> {}
impl PartialOrd for Pending<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Pending<'_> {
    /// The earliest is the greatest: it comes first out of the heap.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.due, other.number).cmp(&(self.due, self.number))
    }
}

impl<'a> Cluster<'a> {
    pub(super) fn issue(&mut self, cx: Context<'a>, effect: Effect) {
        // From at once to some thousand instructions, all orders of magnitude alike.
        let most = 1u64 << self.rng.random_range(0..13);
        let due = self.time + self.rng.random_range(1..=most);
        self.push(cx, due, effect);
    }

    fn push(&mut self, cx: Context<'a>, due: u64, effect: Effect) {
        self.issued += 1;
        self.pending.push(Pending { due, number: self.issued, cx, effect });
    }

    /// Completes what is due.
    pub(super) fn complete_due(&mut self) -> Result<(), Error> {
        while self.pending.peek().is_some_and(|next| next.due <= self.time) {
            let Some(pending) = self.pending.pop() else { break };
            self.events += 1;
            self.complete(pending.cx, pending.effect)?;
        }
        Ok(())
    }

    fn complete(&mut self, cx: Context<'a>, effect: Effect) -> Result<(), Error> {
        let w = cx.warp;
        let who = (w, cx.step, None);
        match effect {
            Effect::Load { plan, targets, mbarriers } => {
                let mut data = vec![0; plan.bytes];
                for &(at, (buffer, offset, bytes)) in &plan.rows {
                    self.read_global(who, (buffer, offset), &mut data[at..at + bytes], false)?;
                }
                for (target, mbarrier) in targets.into_iter().zip(mbarriers) {
                    self.deliver(cx, &plan, &data, target, mbarrier)?;
                }
            }
            Effect::Move { data, target, mbarrier } => {
                let plan = Plan::linear(data.len(), Vec::new());
                self.deliver(cx, &plan, &data, target, mbarrier)?;
            }
            Effect::Store { plan, data, direction, event } => {
                for &(at, range) in &plan.rows {
                    self.write_global(who, range, direction == Direction::ReduceAdd, true)?;
                    self.count_global(range, true);
                    let storage = &self.device.global.memory.buffers()[range.0];
                    match direction {
                        Direction::Store => storage.store(range.1, &data[at..at + range.2]),
                        Direction::ReduceAdd => {
                            self.read_global(who, (range.0, range.1), &mut vec![0; range.2], true)?;
                            plan.add(storage, range.1, &data[at..at + range.2]);
                        }
                    }
                }
                self.warps[w].bulk.complete(event);
            }
            Effect::Copy { block, parts, event } => {
                let agent = 2 * self.warps.len() as u16 + self.warps[w].agent;
                let mut data = [0; 16];
                for ((buffer, offset, bytes), to, size) in parts {
                    data.fill(0);
                    self.read_global(who, (buffer, offset), &mut data[..bytes], false)?;
                    let shared = &mut self.blocks[block].shared;
                    shared.data[to as usize..(to + size) as usize].copy_from_slice(&data[..size as usize]);
                    shared.complete(to, size, agent, event);
                }
                self.warps[w].copies.complete(event);
            }
            Effect::Arrive { targets, event } => {
                let agent = 2 * self.warps.len() as u16 + self.warps[w].agent;
                for (block, offset, arrivals) in targets {
                    self.release_copies(block, offset, agent, event);
                    self.arrive(cx, block, offset, arrivals)?;
                }
            }
        }
        Ok(())
    }

    /// Puts a copy's data into shared memory and counts it at the mbarrier.
    fn deliver(
        &mut self,
        cx: Context<'a>,
        plan: &Plan,
        data: &[u8],
        (block, offset): (usize, u32),
        mbarrier: (usize, u32),
    ) -> Result<(), Error> {
        let (agent, event) = self.complete_bytes(cx, mbarrier.0, mbarrier.1, data.len() as u32)?;
        let shared = &mut self.blocks[block].shared;
        for (at, to, bytes) in plan.pieces(offset) {
            shared.data[to as usize..to as usize + bytes].copy_from_slice(&data[at..at + bytes]);
        }
        for (to, bytes) in plan.spans(offset) {
            shared.complete(to, bytes, agent, event);
        }
        Ok(())
    }

    /// Checks that a copy may write shared memory, and tags it as pending.
    pub(super) fn reserve(
        &mut self,
        cx: Context<'a>,
        lane: usize,
        plan: &Plan,
        (block, offset): (usize, u32),
        agent: u16,
        asynchronous: bool,
    ) -> Result<(), Error> {
        let access =
            Access { agent, event: PENDING, asynchronous, ..self.warps[cx.warp].access(lane as u8, cx.step) };
        for (to, bytes) in plan.spans(offset) {
            self.check_shared((cx.warp, cx.step), Some(lane), true, (block, to, bytes), access)?;
        }
        Ok(())
    }

    /// Reads shared memory for a bulk copy, under an agent and event that must be waited for before it is overwritten.
    pub(super) fn take_shared(
        &mut self,
        cx: Context<'a>,
        lane: usize,
        plan: &Plan,
        (block, offset): (usize, u32),
        (agent, event): (u16, u32),
    ) -> Result<Vec<u8>, Error> {
        let access =
            Access { agent, event, asynchronous: true, ..self.warps[cx.warp].access(lane as u8, cx.step) };
        for (from, bytes) in plan.spans(offset) {
            self.check_shared((cx.warp, cx.step), Some(lane), false, (block, from, bytes), access)?;
        }
        let mut data = vec![0; plan.bytes];
        let shared = &self.blocks[block].shared.data;
        for (at, from, bytes) in plan.pieces(offset) {
            data[at..at + bytes].copy_from_slice(&shared[from as usize..from as usize + bytes]);
        }
        Ok(data)
    }

    /// `cp.async`.
    pub(super) fn cp_async(&mut self, cx: Context<'a>) -> Result<(), Error> {
        let [to, from, sizes, valid] =
            [self.operand(cx, 0)?, self.operand(cx, 1)?, self.operand(cx, 2)?, self.operand(cx, 3)?];
        let block = self.warps[cx.warp].block;
        let agent = 2 * self.warps.len() as u16 + self.warps[cx.warp].agent;
        for (mask, group) in self.warps[cx.warp].copies.open_groups(cx.lanes) {
            let mut parts = Vec::new();
            for lane in lanes(mask) {
                let (size, valid) = (sizes[lane] as u32, valid[lane] as u32);
                if !matches!(size, 4 | 8 | 16)
                    || valid > size
                    || size != 16 && cx.instr.row.name().contains(".cg")
                {
                    let problem = format!(
                        "cp.async of {size} bytes, {valid} of them read: expected 4, 8 or 16 (.cg: 16)"
                    );
                    return Err(self.unsupported(cx, problem));
                }
                let (_, offset) = self.shared_at(cx, lane, to[lane] as u32, size, size, false)?;
                // With nothing to read the address may be anything.
                let (buffer, at) = match valid {
                    0 => (0, 0),
                    _ => self.global_at(cx, lane, from[lane], valid as usize, size as usize)?,
                };
                let plan = Plan::linear(size as usize, Vec::new());
                self.reserve(cx, lane, &plan, (block, offset), agent, false)?;
                parts.push(((buffer, at, valid as usize), offset, size));
            }
            let event = self.warps[cx.warp].copies.issue(mask, group, cx.step, Vec::new());
            self.issue(cx, Effect::Copy { block, parts, event });
        }
        Ok(())
    }

    /// Arrivals that come after the warp's copies so far.
    pub(super) fn issue_arrivals(&mut self, cx: Context<'a>, targets: Vec<(usize, u32, u32)>) {
        let own = |pending: &&Pending<'_>| {
            pending.cx.warp == cx.warp && matches!(pending.effect, Effect::Copy { .. })
        };
        let last = self.pending.iter().filter(own).map(|pending| pending.due).max();
        let due = last.unwrap_or(self.time) + 1;
        let event = self.warps[cx.warp].copies.issued;
        self.push(cx, due, Effect::Arrive { targets, event });
    }

    /// A size operand of a bulk copy.
    fn bulk_bytes(&self, cx: Context<'a>, bytes: u64) -> Result<usize, Error> {
        if bytes == 0 || !bytes.is_multiple_of(16) || bytes >= 1 << 20 {
            return Err(
                self.unsupported(cx, format!("bulk copy of {bytes} bytes: expected a multiple of 16"))
            );
        }
        Ok(bytes as usize)
    }

    /// `cp.async.bulk` from global to shared memory.
    pub(super) fn bulk_load(&mut self, cx: Context<'a>) -> Result<(), Error> {
        let [to, from, sizes, on] =
            [self.operand(cx, 0)?, self.operand(cx, 1)?, self.operand(cx, 2)?, self.operand(cx, 3)?];
        for lane in lanes(cx.lanes) {
            let bytes = self.bulk_bytes(cx, sizes[lane])?;
            let target = self.shared_at(cx, lane, to[lane] as u32, bytes as u32, 16, true)?;
            let (buffer, offset) = self.global_at(cx, lane, from[lane], bytes, 16)?;
            let mbarrier = self.mbarrier_at(cx, lane, on[lane] as u32, Use::Remote, true)?;
            let plan = Plan::linear(bytes, vec![(0, (buffer, offset, bytes))]);
            let agent = self.mbarrier_agent(mbarrier);
            self.reserve(cx, lane, &plan, target, agent, true)?;
            self.issue(cx, Effect::Load { plan, targets: vec![target], mbarriers: vec![mbarrier] });
        }
        Ok(())
    }

    /// `cp.async.bulk` and `cp.reduce.async.bulk` from shared to global memory.
    pub(super) fn bulk_store(&mut self, cx: Context<'a>, direction: Direction) -> Result<(), Error> {
        let [to, from, sizes] = [self.operand(cx, 0)?, self.operand(cx, 1)?, self.operand(cx, 2)?];
        for lane in lanes(cx.lanes) {
            let bytes = self.bulk_bytes(cx, sizes[lane])?;
            let (buffer, offset) = self.global_at(cx, lane, to[lane], bytes, 16)?;
            let source = self.shared_at(cx, lane, from[lane] as u32, bytes as u32, 16, false)?;
            let plan = Plan::linear(bytes, vec![(0, (buffer, offset, bytes))]);
            self.issue_store(cx, lane, plan, source, direction)?;
        }
        Ok(())
    }

    /// Reads the source now, writes global memory later.
    pub(super) fn issue_store(
        &mut self,
        cx: Context<'a>,
        lane: usize,
        plan: Plan,
        source: (usize, u32),
        direction: Direction,
    ) -> Result<(), Error> {
        let warps = self.warps.len() as u16;
        let warp = &mut self.warps[cx.warp];
        let agent = 3 * warps + warp.agent;
        let rows = plan.rows.iter().map(|&(_, range)| range).collect();
        let group = warp.bulk.open_groups(1 << lane).first().map_or(0, |&(_, group)| group);
        let event = warp.bulk.issue(1 << lane, group, cx.step, rows);
        let data = self.take_shared(cx, lane, &plan, source, (agent, event))?;
        self.issue(cx, Effect::Store { plan, data, direction, event });
        Ok(())
    }

    /// `cp.async.bulk` from the block's to another block's shared memory.
    pub(super) fn bulk_to_cluster(&mut self, cx: Context<'a>) -> Result<(), Error> {
        let [to, from, sizes, on] =
            [self.operand(cx, 0)?, self.operand(cx, 1)?, self.operand(cx, 2)?, self.operand(cx, 3)?];
        for lane in lanes(cx.lanes) {
            let bytes = self.bulk_bytes(cx, sizes[lane])?;
            let target = self.shared_at(cx, lane, to[lane] as u32, bytes as u32, 16, true)?;
            let source = self.shared_at(cx, lane, from[lane] as u32, bytes as u32, 16, false)?;
            let mbarrier = self.mbarrier_at(cx, lane, on[lane] as u32, Use::Remote, true)?;
            let plan = Plan::linear(bytes, Vec::new());
            let agent = self.mbarrier_agent(mbarrier);
            // The source is free when the copy has come: in the phase that is running.
            let event = self.mbarrier_phase(mbarrier) + 1;
            self.use_block(source.0, (agent, event, cx.step));
            let data = self.take_shared(cx, lane, &plan, source, (agent, event))?;
            self.reserve(cx, lane, &plan, target, agent, true)?;
            self.issue(cx, Effect::Move { data, target, mbarrier });
        }
        Ok(())
    }

    pub(super) fn mbarrier_agent(&self, (block, offset): (usize, u32)) -> u16 {
        self.blocks[block].mbarriers.get(&offset).map_or(0, |mbarrier| mbarrier.agent)
    }

    fn mbarrier_phase(&self, (block, offset): (usize, u32)) -> u32 {
        self.blocks[block].mbarriers.get(&offset).map_or(0, |mbarrier| mbarrier.phase)
    }
}
