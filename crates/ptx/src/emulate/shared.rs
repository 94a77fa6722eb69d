//! A block's shared memory, with a shadow that knows who last wrote and who has read each two bytes since.
//!
//! The shadow is kept by chunks of 16 bytes, which copies and matrix instructions touch whole; a chunk that is touched in
//! part is split into its eight granules, until a write takes it whole. A write must be ordered after the earlier write and all reads since; a read
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

/// Two bytes: their last write, and the reads since that did not take the whole chunk.
#[derive(Clone, Debug)]
struct Granule {
    write: Access,
    reads: Vec<Access>,
}

const UNWRITTEN: Access =
    Access { agent: NOBODY, lane: 0, atomic: false, asynchronous: false, event: 0, sync: 0, step: 0 };

#[derive(Clone, Debug)]
struct Chunk {
    /// The last write of a chunk that is not split.
    write: Access,
    /// Reads of the whole chunk. Those before the last write of a granule were ordered before it, so they do no harm to
    /// later writes, which are ordered after that one.
    reads: Vec<Access>,
    split: Option<Box<[Granule; 8]>>,
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

    fn after_write(&self, write: &Access) -> Result<(), Conflict> {
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

    fn after_reads(&self, reads: &[Access]) -> Result<(), Conflict> {
        match reads.iter().find(|read| !self.ordered(read)) {
            Some(read) => Err(Conflict::AfterRead(read.step)),
            None => Ok(()),
        }
    }

    fn may_read(&self, write: &Access) -> Result<(), Conflict> {
        if write.agent == NOBODY { Err(Conflict::Uninitialised) } else { self.after_write(write) }
    }

    /// Remembers a read; of each agent the last is enough.
    fn remember(&self, reads: &mut Vec<Access>) {
        match reads.iter_mut().find(|read| read.agent == self.access.agent) {
            // Two lanes' reads with no synchronisation between: a later write must be ordered after both.
            Some(read) if read.sync == self.access.sync && read.lane != self.access.lane => {
                *read = Access { lane: ALL_LANES, ..self.access };
            }
            Some(read) => *read = self.access,
            None => reads.push(self.access),
        }
    }

    fn read(&self, chunk: &mut Chunk, first: u32, stop: u32) -> Result<(), Conflict> {
        if stop - first < CHUNK {
            for granule in chunk.granules(first, stop) {
                self.may_read(&granule.write)?;
                self.remember(&mut granule.reads);
            }
            return Ok(());
        }
        match &chunk.split {
            None => self.may_read(&chunk.write)?,
            Some(granules) => granules.iter().try_for_each(|granule| self.may_read(&granule.write))?,
        }
        self.remember(&mut chunk.reads);
        Ok(())
    }

    fn write(&self, chunk: &mut Chunk, first: u32, stop: u32) -> Result<(), Conflict> {
        self.after_reads(&chunk.reads)?;
        if stop - first < CHUNK {
            for granule in chunk.granules(first, stop) {
                self.after_write(&granule.write)?;
                self.after_reads(&granule.reads)?;
                granule.reads.clear();
                granule.write = self.access;
            }
            return Ok(());
        }
        match &chunk.split {
            None => self.after_write(&chunk.write)?,
            Some(granules) => {
                for granule in granules.iter() {
                    self.after_write(&granule.write)?;
                    self.after_reads(&granule.reads)?;
                }
            }
        }
        chunk.split = None;
        chunk.reads.clear();
        chunk.write = self.access;
        Ok(())
    }
}

impl Chunk {
    /// The granules of bytes `first..stop`; splits the chunk.
    fn granules(&mut self, first: u32, stop: u32) -> &mut [Granule] {
        let write = self.write;
        let split = || Box::new(std::array::from_fn(|_| Granule { write, reads: Vec::new() }));
        let granules = self.split.get_or_insert_with(split);
        &mut granules[(first / GRANULE) as usize..stop.div_ceil(GRANULE) as usize]
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
        let chunk = Chunk { write: UNWRITTEN, reads: Vec::new(), split: None, mbarriers: 0 };
        Shared { data: vec![0; chunks * CHUNK as usize], bytes, chunks: vec![chunk; chunks] }
    }

    /// Applies `f` to the chunks of bytes `offset..offset + bytes`, with the bytes meant in each.
    fn visit(
        &mut self,
        offset: u32,
        bytes: u32,
        f: impl Fn(&mut Chunk, u32, u32) -> Result<(), Conflict>,
    ) -> Result<(), Conflict> {
        let Some(end) = offset.checked_add(bytes).filter(|&end| end <= self.bytes) else {
            return Err(Conflict::Bounds);
        };
        let mut at = offset;
        while at < end {
            let chunk = &mut self.chunks[(at / CHUNK) as usize];
            let (first, stop) = (at % CHUNK, (end - at / CHUNK * CHUNK).min(CHUNK));
            // Which halves the bytes touch.
            let halves = (first < 8) as u8 | ((stop > 8) as u8) << 1;
            if chunk.mbarriers & halves != 0 {
                return Err(Conflict::Mbarrier);
            }
            f(chunk, first, stop)?;
            at += stop - first;
        }
        Ok(())
    }

    /// Checks and remembers a read.
    pub(super) fn read(&mut self, offset: u32, bytes: u32, accessor: &Accessor<'_>) -> Result<(), Conflict> {
        self.visit(offset, bytes, |chunk, first, stop| accessor.read(chunk, first, stop))
    }

    /// Checks and remembers a write.
    pub(super) fn write(&mut self, offset: u32, bytes: u32, accessor: &Accessor<'_>) -> Result<(), Conflict> {
        self.visit(offset, bytes, |chunk, first, stop| accessor.write(chunk, first, stop))
    }

    /// An asynchronous write has completed: readers need to have observed this event of this agent.
    pub(super) fn complete(&mut self, offset: u32, bytes: u32, agent: u16, event: u32) {
        let known = |write: &mut Access| {
            if write.event == PENDING {
                (write.agent, write.event) = (agent, event);
            }
        };
        // The range was checked when the write was issued; what was overwritten meanwhile was a race by itself.
        let _ = self.visit(offset, bytes, |chunk, first, stop| {
            match &mut chunk.split {
                None => known(&mut chunk.write),
                Some(_) => {
                    chunk.granules(first, stop).iter_mut().for_each(|granule| known(&mut granule.write))
                }
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
        for (lane, address) in addresses.iter().enumerate().skip(first).take(lanes) {
            if active >> lane & 1 == 1 {
                words.extend(address / 4..address / 4 + bytes.div_ceil(4));
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
