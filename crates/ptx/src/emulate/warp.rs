//! A warp: registers, lanes, and what it waits for.

use std::cell::Cell;
use std::collections::VecDeque;

use super::barrier::Arrival;
use super::clocks::{Clock, Clocks};
use super::shared::Access;
use crate::instr::{Lanes, RegId};

/// Lanes of a mask, in order.
pub(super) fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (lane < 32).then_some(lane as usize)
    })
}

/// An open branch or loop.
#[derive(Clone, Copy, Debug)]
pub(super) enum Frame {
    /// `all` came to the branch, `other` wait for their turn; at step `next` the turn ends.
    If { all: u32, other: u32, next: usize },
    /// `all` came to the loop, which ends at step `next`.
    Loop { all: u32, next: usize },
}

/// Why a register cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub register: RegId,
    pub kind: FaultKind,
    pub lane: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FaultKind {
    Undefined,
    InFlight(&'static str),
}

/// One register in the 32 lanes.
#[derive(Clone, Debug)]
struct State {
    /// Lanes in which it was written.
    defined: u32,
    /// The warp's instruction that last read or wrote it, other than a `wgmma`.
    touched: Cell<u32>,
    /// The last `wgmma` group that uses it, and as what.
    flight: u32,
    slot: Slot,
}

/// How a `wgmma` uses a register: as accumulator `index` of a tile of `count`, or as part of A.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    Accumulator { index: u16, count: u16 },
    A,
}

pub(super) struct Registers {
    values: Vec<Lanes>,
    states: Vec<State>,
    /// Instructions so far that wrote registers.
    pub sequence: u32,
    /// The last `wgmma.fence`, by that count; none yet: `None`.
    pub fence: Option<u32>,
    /// `wgmma` groups known to have completed.
    pub completed: u32,
}

impl Registers {
    pub(super) fn new(count: usize) -> Self {
        let state = State { defined: 0, touched: Cell::new(0), flight: 0, slot: Slot::A };
        Registers {
            values: vec![[0; 32]; count],
            states: vec![state; count],
            sequence: 0,
            fence: None,
            completed: 0,
        }
    }

    /// A register's values, if it was written in these lanes and no `wgmma` has it.
    pub(super) fn read(&self, id: RegId, lanes: u32) -> Result<&Lanes, Fault> {
        let state = &self.states[id.0 as usize];
        if state.flight > self.completed {
            let kind =
                FaultKind::InFlight("read before the wgmma.wait_group that covers the wgmma that uses it");
            return Err(Fault { register: id, kind, lane: None });
        }
        state.touched.set(self.sequence);
        self.defined(id, lanes)
    }

    fn defined(&self, id: RegId, lanes: u32) -> Result<&Lanes, Fault> {
        let missing = lanes & !self.states[id.0 as usize].defined;
        if missing != 0 {
            let lane = Some(missing.trailing_zeros());
            return Err(Fault { register: id, kind: FaultKind::Undefined, lane });
        }
        Ok(&self.values[id.0 as usize])
    }

    pub(super) fn write(&mut self, id: RegId, lanes: u32, values: &Lanes) -> Result<(), Fault> {
        let state = &mut self.states[id.0 as usize];
        if state.flight > self.completed {
            let kind =
                FaultKind::InFlight("written before the wgmma.wait_group that covers the wgmma that uses it");
            return Err(Fault { register: id, kind, lane: None });
        }
        state.defined |= lanes;
        state.touched.set(self.sequence);
        let register = &mut self.values[id.0 as usize];
        if lanes == u32::MAX {
            *register = *values;
        } else {
            for lane in self::lanes(lanes) {
                register[lane] = values[lane];
            }
        }
        Ok(())
    }

    /// Takes a register into flight for a `wgmma` of group `group`; `reads`: its values matter.
    pub(super) fn take(
        &mut self,
        id: RegId,
        slot: Slot,
        group: u32,
        reads: bool,
    ) -> Result<&mut Lanes, Fault> {
        let fault = |kind| Fault { register: id, kind, lane: None };
        let state = &self.states[id.0 as usize];
        let flying = state.flight > self.completed;
        if flying && state.slot != slot {
            return Err(fault(FaultKind::InFlight(
                "used by another wgmma, in another place, before a wait covers it",
            )));
        }
        if !flying {
            let problem = match self.fence {
                None => Some("used by a wgmma with no wgmma.fence before it"),
                Some(fence) if state.touched.get() > fence => Some(
                    "read or written by an ordinary instruction after the last wgmma.fence before the wgmma",
                ),
                Some(_) => None,
            };
            if let Some(problem) = problem {
                return Err(fault(FaultKind::InFlight(problem)));
            }
        }
        if reads {
            self.defined(id, u32::MAX)?;
        }
        let state = &mut self.states[id.0 as usize];
        (state.flight, state.slot, state.defined) = (group, slot, u32::MAX);
        Ok(&mut self.values[id.0 as usize])
    }
}

/// What a warp waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// Nothing: it can run.
    Ready,
    /// Others to arrive at a barrier of the block.
    Barrier(u8),
    /// Others to arrive at the cluster's barrier.
    Cluster,
    /// Something to happen after event `since`; then it tries again.
    Event { since: u64, what: Awaited },
}

/// What a warp that tries again waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    Mbarrier { block: usize, offset: u32, parity: u32 },
    Copies,
    BulkCopies,
    Registers(u8),
}

/// A copy that a warp has issued and not yet waited for.
#[derive(Clone, Debug)]
pub(super) struct Copy {
    /// Its number, the stream's event.
    pub event: u32,
    /// Lanes that have still to wait for its reads, and for all of it.
    pub unread: u32,
    pub unfinished: u32,
    /// The group to which it belongs, counted by each of these lanes.
    pub group: u32,
    pub complete: bool,
    pub step: u32,
    /// What it writes in global memory: buffer, offset, bytes.
    pub rows: Vec<(usize, usize, usize)>,
}

/// A warp's copies of one kind (`cp.async`, or bulk): in order of issue, grouped by commits of each lane.
#[derive(Clone, Debug, Default)]
pub(super) struct Stream {
    pub issued: u32,
    commits: [u32; 32],
    pub copies: VecDeque<Copy>,
}

impl Stream {
    /// The groups into which copies of these lanes go: lanes of the same group, group.
    pub(super) fn open_groups(&self, mut lanes: u32) -> Vec<(u32, u32)> {
        let mut groups = Vec::new();
        while lanes != 0 {
            let group = self.commits[lanes.trailing_zeros() as usize];
            let same =
                self::lanes(lanes).filter(|&lane| self.commits[lane] == group).fold(0, |m, l| m | 1 << l);
            groups.push((same, group));
            lanes &= !same;
        }
        groups
    }

    /// Issues a copy; returns its event.
    pub(super) fn issue(
        &mut self,
        lanes: u32,
        group: u32,
        step: u32,
        rows: Vec<(usize, usize, usize)>,
    ) -> u32 {
        self.issued += 1;
        let (event, complete) = (self.issued, false);
        self.copies.push_back(Copy { event, unread: lanes, unfinished: lanes, group, complete, step, rows });
        event
    }

    pub(super) fn commit(&mut self, lanes: u32) {
        self::lanes(lanes).for_each(|lane| self.commits[lane] += 1);
    }

    pub(super) fn complete(&mut self, event: u32) {
        if let Some(copy) = self.copies.iter_mut().find(|copy| copy.event == event) {
            copy.complete = true;
        }
    }

    /// Waits, in these lanes, until at most `groups` committed groups are pending; false: not yet.
    ///
    /// Returns the copies that no lane has to wait for any more.
    pub(super) fn wait(&mut self, lanes: u32, groups: u32, reads_only: bool) -> Option<Vec<Copy>> {
        let covered = |copy: &Copy| {
            let old = |&lane: &usize| copy.group + groups < self.commits[lane];
            self::lanes(lanes & copy.unfinished).filter(old).fold(0u32, |mask, lane| mask | 1 << lane)
        };
        let masks: Vec<u32> = self.copies.iter().map(covered).collect();
        if self.copies.iter().zip(&masks).any(|(copy, &mask)| mask != 0 && !copy.complete) {
            return None;
        }
        for (copy, mask) in self.copies.iter_mut().zip(masks) {
            copy.unread &= !mask;
            if !reads_only {
                copy.unfinished &= !mask;
            }
        }
        let mut finished = Vec::new();
        self.copies.retain(|copy| {
            if copy.unfinished == 0 {
                finished.push(copy.clone());
            }
            copy.unfinished != 0
        });
        Some(finished)
    }

    /// The last copy up to which all copies' shared memory is free again.
    pub(super) fn read_up_to(&self) -> u32 {
        self.copies.iter().find(|copy| copy.unread != 0).map_or(self.issued, |copy| copy.event - 1)
    }
}

pub(super) struct Warp {
    /// Its block's rank in the cluster.
    pub block: usize,
    /// Its index in the block.
    pub index: u32,
    /// Its number as an agent: its index in the cluster.
    pub agent: u16,
    pub pc: usize,
    /// Lanes that exist.
    pub live: u32,
    /// Lanes that execute.
    pub active: u32,
    pub frames: Vec<Frame>,
    pub registers: Registers,
    pub clocks: Clocks,
    /// Synchronisations of the lanes so far.
    pub sync: u32,
    pub wait: Wait,
    /// Lanes for which a wait that is tried again has been satisfied.
    pub satisfied: u32,
    pub executed: u64,
    pub done: bool,
    pub copies: Stream,
    pub bulk: Stream,
    /// `wgmma` issued, and a hash of which; committed groups.
    pub products: u64,
    pub products_hash: u64,
    pub groups: u32,
    pub max_registers: u32,
    /// Whether `wgmma` follow the last commit.
    pub uncommitted: bool,
    /// Where it is at the cluster's barrier.
    pub cluster: Arrival,
    /// mbarrier initialisations that a fence has made known: a relaxed arrival passes on these alone.
    pub fenced: Clock,
}

impl Warp {
    pub(super) fn new(block: usize, index: u32, agent: u16, live: u32, registers: usize) -> Self {
        let mut clocks = Clocks::default();
        clocks.seen.learn(agent, 1);
        Warp {
            block,
            index,
            agent,
            pc: 0,
            live,
            active: live,
            frames: Vec::new(),
            registers: Registers::new(registers),
            clocks,
            sync: 1,
            wait: Wait::Ready,
            satisfied: 0,
            executed: 0,
            done: false,
            copies: Stream::default(),
            bulk: Stream::default(),
            products: 0,
            products_hash: 0,
            groups: 0,
            max_registers: 0,
            uncommitted: false,
            cluster: Arrival::None,
            fenced: Clock::default(),
        }
    }

    /// An access of the warp's own, as the shadow remembers it.
    pub(super) fn access(&self, lane: u8, step: u32) -> Access {
        let (agent, sync) = (self.agent, self.sync);
        let event = self.clocks.seen.get(agent);
        Access { agent, lane, atomic: false, asynchronous: false, event, sync, step }
    }

    /// Begins a new epoch: what the warp does from here on is not part of what it has released.
    pub(super) fn next_epoch(&mut self) {
        self.clocks.seen.learn(self.agent, self.clocks.seen.get(self.agent) + 1);
    }

    /// Gives what the warp knows to others, and begins a new epoch.
    pub(super) fn release(&mut self, to: &mut Clocks) {
        to.join(&self.clocks);
        self.next_epoch();
    }

    /// `fence.proxy.async`.
    pub(super) fn proxy_fence(&mut self) {
        self.clocks.visible.join(&self.clocks.seen);
        self.next_epoch();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_waited_for_by_groups() {
        let mut stream = Stream::default();
        for _ in 0..3 {
            let groups = stream.open_groups(0b11);
            assert_eq!(groups.len(), 1);
            stream.issue(0b11, groups[0].1, 0, Vec::new());
            stream.commit(0b11);
        }
        assert!(stream.wait(0b11, 1, false).is_none());
        stream.complete(1);
        stream.complete(2);
        assert_eq!(stream.wait(0b01, 1, false).map(|done| done.len()), Some(0)); // lane 1 has not waited
        assert_eq!(stream.read_up_to(), 0);
        assert_eq!(stream.wait(0b10, 1, false).map(|done| done.len()), Some(2));
        assert_eq!(stream.read_up_to(), 2);
        assert!(stream.wait(0b11, 0, true).is_none());
        stream.complete(3);
        assert_eq!(stream.wait(0b11, 0, true).map(|done| done.len()), Some(0));
        assert_eq!((stream.read_up_to(), stream.copies.len()), (3, 1));
    }

    #[test]
    fn lanes_that_commit_alone_have_groups_of_their_own() {
        let mut stream = Stream::default();
        stream.commit(0b01);
        assert_eq!(stream.open_groups(0b111), [(0b001, 1), (0b110, 0)]);
    }
}
