//! A block's shared memory, with a shadow that knows who last wrote and who has read each two bytes since.
//!
//! The shadow is kept by chunks of 16 bytes, which copies and matrix instructions touch whole; a chunk that was touched
//! in part is split into its eight granules. A write must be ordered after the earlier write and all reads since; a read
//! after the earlier write.

use super::clocks::Clocks;

/// First address of dynamic shared memory: not 0, as on hardware.
pub(super) const BASE: u32 = 1024;
const CHUNK: u32 = 16;
const GRANULE: u32 = 2;
/// The agent of what was never written.
const NOBODY: u16 = u16::MAX;
/// An event that no clock reaches: an asynchronous write that has not completed.
pub(super) const PENDING: u32 = u32::MAX;
/// Several lanes.
pub(super) const ALL_LANES: u8 = u8::MAX;

/// An access by an agent, as the shadow remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    pub agent: u16,
    /// The lane, for accesses by lanes of warps; [`ALL_LANES`] where order between lanes is given.
    pub lane: u8,
    pub atomic: bool,
    /// Through the asynchronous proxy.
    pub asynchronous: bool,
    /// The agent's event.
    pub event: u32,
    /// The warp's count of synchronisations of its lanes.
    pub sync: u32,
    /// The step of the program.
    pub step: u32,
}

/// An access to be checked.
pub(super) struct Accessor<'a> {
    pub access: Access,
    /// The warp that issues it, and what it knows.
    pub issuer: u16,
    pub clocks: &'a Clocks,
}

/// Why an access is refused; steps are of the earlier access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Conflict {
    /// Not ordered after a write.
    AfterWrite(u32),
    /// Not ordered after a read.
    AfterRead(u32),
    /// Ordered, but without a proxy fence.
    Fence(u32),
    /// Never written.
    Uninitialised,
    /// The bytes are an initialised mbarrier's.
    Mbarrier,
    /// Outside.
    Bounds,
}

#[derive(Clone, Debug)]
struct State {
    write: Access,
    reads: Vec<Access>,
}

const UNWRITTEN: Access =
    Access { agent: NOBODY, lane: 0, atomic: false, asynchronous: false, event: 0, sync: 0, step: 0 };

#[derive(Clone, Debug)]
struct Chunk {
    whole: State,
    split: Option<Box<[State; 8]>>,
    /// Which of the two halves are mbarriers.
    mbarriers: u8,
}

impl Accessor<'_> {
    /// Whether the issuer may rely on `earlier` having happened.
    fn ordered(&self, earlier: &Access) -> bool {
        if earlier.atomic && self.access.atomic {
            return true;
        }
        if earlier.agent == self.issuer {
            // The warp's own: other lanes' accesses need a synchronisation of the lanes between.
            return earlier.sync != self.access.sync
                || earlier.lane == self.access.lane
                || self.access.lane == ALL_LANES && earlier.lane == ALL_LANES;
        }
        self.clocks.seen.get(earlier.agent) >= earlier.event
    }

    fn visible(&self, earlier: &Access) -> bool {
        !self.access.asynchronous
            || earlier.asynchronous
            || self.clocks.visible.get(earlier.agent) >= earlier.event
    }

    fn after_write(&self, state: &State) -> Result<(), Conflict> {
        let write = &state.write;
        if write.agent == NOBODY {
            return Ok(());
        }
        if !self.ordered(write) {
            return Err(Conflict::AfterWrite(write.step));
        }
        if !self.visible(write) {
            return Err(Conflict::Fence(write.step));
        }
        Ok(())
    }

    fn read(&self, state: &mut State) -> Result<(), Conflict> {
        if state.write.agent == NOBODY {
            return Err(Conflict::Uninitialised);
        }
        self.after_write(state)?;
        match state.reads.iter_mut().find(|read| read.agent == self.access.agent) {
            // Two lanes' reads with no synchronisation between: a later write must be ordered after both.
            Some(read) if read.sync == self.access.sync && read.lane != self.access.lane => {
                *read = Access { lane: ALL_LANES, ..self.access };
            }
            Some(read) => *read = self.access,
            None => state.reads.push(self.access),
        }
        Ok(())
    }

    fn write(&self, state: &mut State) -> Result<(), Conflict> {
        self.after_write(state)?;
        if let Some(read) = state.reads.iter().find(|read| !self.ordered(read)) {
            return Err(Conflict::AfterRead(read.step));
        }
        state.reads.clear();
        state.write = self.access;
        Ok(())
    }
}

/// Dynamic shared memory of one block, by offsets from its begin.
pub(super) struct Shared {
    pub data: Vec<u8>,
    bytes: u32,
    chunks: Vec<Chunk>,
}

impl Shared {
    pub(super) fn new(bytes: u32) -> Self {
        let chunks = bytes.div_ceil(CHUNK) as usize;
        let state = State { write: UNWRITTEN, reads: Vec::new() };
        let chunk = Chunk { whole: state, split: None, mbarriers: 0 };
        Shared { data: vec![0; chunks * CHUNK as usize], bytes, chunks: vec![chunk; chunks] }
    }

    /// Applies `f` to the states of bytes `offset..offset + bytes`.
    fn visit(
        &mut self,
        offset: u32,
        bytes: u32,
        mut f: impl FnMut(&mut State) -> Result<(), Conflict>,
    ) -> Result<(), Conflict> {
        let Some(end) = offset.checked_add(bytes).filter(|&end| end <= self.bytes) else {
            return Err(Conflict::Bounds);
        };
        let mut at = offset;
        while at < end {
            let chunk = &mut self.chunks[(at / CHUNK) as usize];
            let (first, stop) = (at % CHUNK, (end - at / CHUNK * CHUNK).min(CHUNK));
            if chunk.mbarriers != 0 && (chunk.mbarriers >> (first / 8) & 1 | chunk.mbarriers >> ((stop - 1) / 8) & 1) == 1 {
                return Err(Conflict::Mbarrier);
            }
            if stop - first == CHUNK && chunk.split.is_none() {
                f(&mut chunk.whole)?;
            } else {
                let whole = &chunk.whole;
                let states = chunk.split.get_or_insert_with(|| Box::new(std::array::from_fn(|_| whole.clone())));
                for state in &mut states[(first / GRANULE) as usize..stop.div_ceil(GRANULE) as usize] {
                    f(state)?;
                }
            }
            at += stop - first;
        }
        Ok(())
    }

    /// Checks and remembers a read.
    pub(super) fn read(&mut self, offset: u32, bytes: u32, accessor: &Accessor<'_>) -> Result<(), Conflict> {
        self.visit(offset, bytes, |state| accessor.read(state))
    }

    /// Checks and remembers a write.
    pub(super) fn write(&mut self, offset: u32, bytes: u32, accessor: &Accessor<'_>) -> Result<(), Conflict> {
        self.visit(offset, bytes, |state| accessor.write(state))?;
        self.merge(offset, bytes);
        Ok(())
    }

    /// Chunks that were written whole by one access are whole again.
    fn merge(&mut self, offset: u32, bytes: u32) {
        for index in offset.div_ceil(CHUNK)..(offset + bytes) / CHUNK {
            let chunk = &mut self.chunks[index as usize];
            if let Some(states) = chunk.split.take() {
                let [state, ..] = *states;
                chunk.whole = state;
            }
        }
    }

    /// An asynchronous write has completed: readers need to have observed this event of this agent.
    pub(super) fn complete(&mut self, offset: u32, bytes: u32, agent: u16, event: u32) {
        // The range was checked when the write was issued; what was overwritten meanwhile was a race by itself.
        let _ = self.visit(offset, bytes, |state| {
            if state.write.event == PENDING {
                state.write.agent = agent;
                state.write.event = event;
            }
            Ok(())
        });
    }

    /// Marks 8 bytes as an mbarrier or as ordinary memory again.
    pub(super) fn mark_mbarrier(&mut self, offset: u32, is: bool) {
        if let Some(chunk) = self.chunks.get_mut((offset / CHUNK) as usize) {
            let bit = 1 << (offset % CHUNK / 8);
            chunk.mbarriers = if is { chunk.mbarriers | bit } else { chunk.mbarriers & !bit };
        }
    }
}

/// Wavefronts that lanes' accesses of `bytes` each take, and how many of them are due to bank conflicts: 32 banks of 4
/// bytes; 8-byte accesses go by half warps, 16-byte ones by quarters.
pub(super) fn wavefronts(addresses: &[u32; 32], active: u32, bytes: u32) -> (u64, u64) {
    let lanes = match bytes {
        0..=4 => 32,
        8 => 16,
        _ => 8,
    };
    let (mut all, mut extra) = (0, 0);
    for first in (0..32).step_by(lanes) {
        let mut words: Vec<u32> = Vec::with_capacity(32);
        for lane in first..first + lanes {
            if active >> lane & 1 == 1 {
                let word = addresses[lane] / 4;
                words.extend(word..word + bytes.div_ceil(4));
            }
        }
        if words.is_empty() {
            continue;
        }
        words.sort_unstable();
        words.dedup();
        let mut banks = [0u64; 32];
        words.iter().for_each(|word| banks[(word % 32) as usize] += 1);
        let most = banks.into_iter().max().unwrap_or(1);
        all += most;
        extra += most - 1;
    }
    (all, extra)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(agent: u16, event: u32) -> Access {
        Access { agent, lane: ALL_LANES, atomic: false, asynchronous: false, event, sync: event, step: 7 }
    }

    fn accessor<'a>(access: Access, clocks: &'a Clocks) -> Accessor<'a> {
        Accessor { access, issuer: access.agent, clocks }
    }

    #[test]
    fn halves_of_a_word_are_apart() {
        let (mut shared, nothing) = (Shared::new(64), Clocks::default());
        assert_eq!(shared.write(4, 2, &accessor(access(0, 1), &nothing)), Ok(()));
        assert_eq!(shared.write(6, 2, &accessor(access(1, 1), &nothing)), Ok(()));
        assert_eq!(shared.write(0, 16, &accessor(access(1, 1), &nothing)), Err(Conflict::AfterWrite(7)));
        assert_eq!(shared.read(8, 2, &accessor(access(1, 1), &nothing)), Err(Conflict::Uninitialised));
        assert_eq!(shared.read(60, 8, &accessor(access(1, 1), &nothing)), Err(Conflict::Bounds));
    }

    #[test]
    fn order_is_what_the_clock_says() {
        let (mut shared, mut clocks) = (Shared::new(32), Clocks::default());
        assert_eq!(shared.write(0, 32, &accessor(access(0, 1), &clocks)), Ok(()));
        assert_eq!(shared.read(0, 4, &accessor(access(1, 1), &clocks)), Err(Conflict::AfterWrite(7)));
        clocks.seen.learn(0, 1);
        assert_eq!(shared.read(0, 4, &accessor(access(1, 1), &clocks)), Ok(()));
        // Agent 2 knows of the write, not of the read.
        assert_eq!(shared.write(4, 4, &accessor(access(2, 1), &clocks)), Ok(()));
        assert_eq!(shared.write(0, 16, &accessor(access(2, 2), &clocks)), Err(Conflict::AfterRead(7)));
        let through = Access { asynchronous: true, ..access(3, 1) };
        assert_eq!(shared.read(16, 16, &accessor(through, &clocks)), Err(Conflict::Fence(7)));
        clocks.visible.learn(0, 1);
        assert_eq!(shared.read(16, 16, &accessor(through, &clocks)), Ok(()));
    }

    #[test]
    fn banks() {
        let lanes = |f: fn(u32) -> u32| std::array::from_fn(|lane| f(lane as u32));
        assert_eq!(wavefronts(&lanes(|l| 4 * l), u32::MAX, 4), (1, 0));
        assert_eq!(wavefronts(&lanes(|_| 64), u32::MAX, 4), (1, 0)); // a broadcast
        assert_eq!(wavefronts(&lanes(|l| 8 * l), u32::MAX, 4), (2, 1));
        assert_eq!(wavefronts(&lanes(|l| 128 * l), u32::MAX, 4), (32, 31));
        assert_eq!(wavefronts(&lanes(|l| 128 * l), 0b101, 4), (2, 1));
        assert_eq!(wavefronts(&lanes(|l| 16 * l), u32::MAX, 16), (4, 0));
        assert_eq!(wavefronts(&lanes(|l| 128 * l), u32::MAX, 16), (32, 28));
        assert_eq!(wavefronts(&lanes(|l| 8 * l), u32::MAX, 8), (2, 0));
    }
}
