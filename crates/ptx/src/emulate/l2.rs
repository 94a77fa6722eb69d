//! A model of the L2 cache: least recently used lines of 128 bytes, filled and written back by sectors of 32.

use std::collections::HashMap;

use super::report::Traffic;

pub(super) const LINE: u64 = 128;
const SECTOR: u64 = 32;
const NONE: u32 = u32::MAX;

struct Line {
    address: u64,
    buffer: u32,
    valid: u8,
    dirty: u8,
    older: u32,
    newer: u32,
}

/// The cache. Lines are linked from the oldest to the newest use.
pub(super) struct L2 {
    capacity: usize,
    lines: Vec<Line>,
    index: HashMap<u64, u32>,
    oldest: u32,
    newest: u32,
    /// Misses and write-backs by buffer.
    pub traffic: Vec<Traffic>,
}

impl L2 {
    pub(super) fn new(bytes: u64, buffers: usize) -> Self {
        L2 {
            capacity: (bytes / LINE).max(1) as usize,
            lines: Vec::new(),
            index: HashMap::new(),
            oldest: NONE,
            newest: NONE,
            traffic: vec![Traffic::default(); buffers],
        }
    }

    /// Touches bytes `address..address + bytes`. A written sector is not fetched: the cache has byte masks.
    pub(super) fn access(&mut self, buffer: u32, address: u64, bytes: u64, write: bool) {
        if bytes == 0 {
            return;
        }
        let (mut sector, end) = (address / SECTOR, (address + bytes).div_ceil(SECTOR));
        while sector < end {
            let line = sector * SECTOR / LINE;
            let stop = end.min((line + 1) * (LINE / SECTOR));
            let mask = (sector..stop).fold(0u8, |mask, s| mask | 1 << (s % (LINE / SECTOR)));
            self.touch(buffer, line, mask, write);
            sector = stop;
        }
    }

    fn touch(&mut self, buffer: u32, address: u64, mask: u8, write: bool) {
        let at = match self.index.get(&address) {
            Some(&at) => {
                self.unlink(at);
                at
            }
            None => self.insert(buffer, address),
        };
        self.link(at);
        let line = &mut self.lines[at as usize];
        let missing = mask & !line.valid;
        line.valid |= mask;
        if write {
            line.dirty |= mask;
        } else {
            self.traffic[buffer as usize].read_missed += missing.count_ones() as u64 * SECTOR;
        }
    }

    fn insert(&mut self, buffer: u32, address: u64) -> u32 {
        let fresh = Line { address, buffer, valid: 0, dirty: 0, older: NONE, newer: NONE };
        let at = if self.lines.len() < self.capacity {
            self.lines.push(fresh);
            self.lines.len() as u32 - 1
        } else {
            let at = self.oldest;
            self.unlink(at);
            self.write_back(at);
            self.index.remove(&self.lines[at as usize].address);
            self.lines[at as usize] = fresh;
            at
        };
        self.index.insert(address, at);
        at
    }

    fn write_back(&mut self, at: u32) {
        let line = &mut self.lines[at as usize];
        self.traffic[line.buffer as usize].written_back += line.dirty.count_ones() as u64 * SECTOR;
        line.dirty = 0;
    }

    fn unlink(&mut self, at: u32) {
        let (older, newer) = (self.lines[at as usize].older, self.lines[at as usize].newer);
        match older {
            NONE => self.oldest = newer,
            older => self.lines[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.lines[newer as usize].older = older,
        }
    }

    fn link(&mut self, at: u32) {
        self.lines[at as usize].older = self.newest;
        self.lines[at as usize].newer = NONE;
        match self.newest {
            NONE => self.oldest = at,
            newest => self.lines[newest as usize].newer = at,
        }
        self.newest = at;
    }

    /// Writes back what is dirty: the end of the launch.
    pub(super) fn flush(&mut self) {
        for at in 0..self.lines.len() as u32 {
            self.write_back(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn least_recently_used_goes_first() {
        let mut l2 = L2::new(2 * LINE, 1);
        let missed = |l2: &L2| l2.traffic[0].read_missed;
        l2.access(0, 0, 4, false); // one sector of line 0
        l2.access(0, 4, 60, false); // the same, and one more
        assert_eq!(missed(&l2), 64);
        l2.access(0, LINE, LINE, false);
        l2.access(0, 0, 32, false); // line 0 is now the newer
        assert_eq!(missed(&l2), 64 + 128);
        l2.access(0, 2 * LINE, 32, false); // evicts line 1
        l2.access(0, 0, 64, false);
        assert_eq!(missed(&l2), 64 + 128 + 32);
        l2.access(0, LINE, 32, false);
        assert_eq!(missed(&l2), 64 + 128 + 32 + 32);
    }

    #[test]
    fn writes_are_written_back_once() {
        let mut l2 = L2::new(LINE, 2);
        l2.access(1, 0, 64, true);
        l2.access(1, 0, 64, true);
        l2.access(1, 0, 32, false); // what was written is there
        assert_eq!(l2.traffic[1], Traffic::default());
        l2.access(0, LINE, 32, false);
        assert_eq!(l2.traffic[1].written_back, 64);
        l2.flush();
        assert_eq!((l2.traffic[1].written_back, l2.traffic[0].read_missed), (64, 32));
    }
}
