//! What blocks of a launch share: global memory with the order of its accesses, and the L2 model.
//!
//! Each cluster is an agent. A word remembers its last write and a read since; accesses of different clusters must be
//! ordered by release and acquire (or be atomic both). Order within a cluster is not looked at here.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::l2::L2;
use super::memory::{Memory, Storage};

const PAGE: usize = 1024;
/// An asynchronous write whose completion no one has waited for: it is ordered before nothing.
pub(super) const UNORDERED: u16 = u16::MAX;

/// What a cluster knows of the others: the epoch each has released.
pub(super) type Epochs = HashMap<u32, u16>;

fn join(to: &mut Epochs, from: &Epochs) {
    for (&cluster, &epoch) in from {
        let known = to.entry(cluster).or_default();
        *known = (*known).max(epoch);
    }
}

/// A cluster's view of the order between clusters.
#[derive(Debug)]
pub(super) struct Order {
    pub cluster: u32,
    epoch: u16,
    seen: Epochs,
    /// What relaxed accesses have observed; an acquire fence takes it over.
    observed: Epochs,
    /// What the last release fence covers; relaxed writes after it pass it on.
    fenced: Option<Epochs>,
}

impl Order {
    pub(super) fn new(cluster: u32) -> Self {
        let (seen, observed) = (Epochs::new(), Epochs::new());
        Order { cluster, epoch: 1, seen, observed, fenced: None }
    }

    fn snapshot(&mut self) -> Epochs {
        let mut epochs = self.seen.clone();
        epochs.insert(self.cluster, self.epoch);
        // Saturates one below UNORDERED; beyond that, later accesses count as released: no false alarm.
        self.epoch = (self.epoch + 1).min(UNORDERED - 1);
        epochs
    }

    pub(super) fn fence(&mut self) {
        join(&mut self.seen, &self.observed);
        self.fenced = Some(self.snapshot());
    }
}

/// `| cluster + 1: 25 | epoch: 16 | step: 20 | halves: 2 | atomic: 1 |`; 0 is none.
#[derive(Clone, Copy)]
struct Tag(u64);

impl Tag {
    const MAX_CLUSTERS: u32 = (1 << 25) - 2;
    const MAX_STEPS: usize = 1 << 20;

    fn new(cluster: u32, epoch: u16, step: u32, halves: u8, atomic: bool) -> Self {
        let high = (cluster as u64 + 1) << 39 | (epoch as u64) << 23;
        Tag(high | (step as u64) << 3 | (halves as u64) << 1 | atomic as u64)
    }
    fn cluster(self) -> Option<u32> {
        ((self.0 >> 39) as u32).checked_sub(1)
    }
    fn epoch(self) -> u16 {
        (self.0 >> 23) as u16
    }
    fn step(self) -> u32 {
        (self.0 >> 3) as u32 & 0xf_ffff
    }
    fn halves(self) -> u8 {
        (self.0 >> 1) as u8 & 3
    }
    fn atomic(self) -> bool {
        self.0 & 1 == 1
    }
}

struct Page {
    write: [AtomicU64; PAGE],
    read: [AtomicU64; PAGE],
}

/// An access that another cluster's access races with: what the other did, and its step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Raced {
    pub other: &'static str,
    pub step: u32,
}

/// How an access takes part in the order between clusters.
#[derive(Clone, Copy)]
pub(super) struct Access {
    pub write: bool,
    pub atomic: bool,
    /// Its completion is not ordered yet.
    pub unordered: bool,
    pub step: u32,
}

/// Global memory during one launch.
pub(super) struct Global<'m> {
    pub memory: &'m Memory,
    pages: Vec<Vec<OnceLock<Box<Page>>>>,
    released: Mutex<HashMap<u64, Epochs>>,
    any_released: AtomicBool,
    /// With more than one cluster, order between clusters matters.
    several: bool,
    l2: Option<Mutex<L2>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'m> Global<'m> {
    pub(super) fn new(memory: &'m Memory, clusters: u32, l2: Option<u64>) -> Self {
        let pages = |buffer: &Storage| {
            let pages = if clusters > 1 { buffer.bytes.div_ceil(4 * PAGE) } else { 0 };
            (0..pages).map(|_| OnceLock::new()).collect()
        };
        Global {
            memory,
            pages: memory.buffers().iter().map(pages).collect(),
            released: Mutex::default(),
            any_released: AtomicBool::new(false),
            several: clusters > 1,
            l2: l2.map(|bytes| Mutex::new(L2::new(bytes, memory.buffers().len()))),
        }
    }

    /// Whether tags can carry these numbers.
    pub(super) fn fits(clusters: u64, steps: usize) -> bool {
        clusters <= Tag::MAX_CLUSTERS as u64 && steps <= Tag::MAX_STEPS
    }

    pub(super) fn touch_l2(&self, buffer: usize, address: u64, bytes: u64, write: bool) {
        if let Some(l2) = &self.l2 {
            lock(l2).access(buffer as u32, address, bytes, write);
        }
    }

    pub(super) fn into_l2(self) -> Option<L2> {
        self.l2.map(|l2| l2.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn page(&self, buffer: usize, word: usize) -> (&Page, usize) {
        let page = self.pages[buffer][word / PAGE].get_or_init(|| {
            let zero = || std::array::from_fn(|_| AtomicU64::new(0));
            Box::new(Page { write: zero(), read: zero() })
        });
        (page, word % PAGE)
    }

    /// Checks and remembers an access of a cluster to bytes of a buffer.
    pub(super) fn order(
        &self,
        buffer: usize,
        offset: usize,
        bytes: usize,
        order: &Order,
        access: Access,
    ) -> Result<(), Raced> {
        if !self.several {
            return Ok(());
        }
        let end = offset + bytes;
        for word in offset / 4..end.div_ceil(4) {
            let halves = [2 * word, 2 * word + 1].map(|half| (2 * half < end && 2 * half + 2 > offset) as u8);
            let halves = halves[0] | halves[1] << 1;
            let epoch = if access.unordered { UNORDERED } else { order.epoch };
            let tag = Tag::new(order.cluster, epoch, access.step, halves, access.atomic);
            let (page, i) = self.page(buffer, word);
            // The own tag goes in before the other's is read: of two clusters that do this at the same time, one sees
            // the other.
            let (write, read) = if access.write {
                (page.write[i].swap(tag.0, SeqCst), page.read[i].load(SeqCst))
            } else {
                self.note_read(&page.read[i], tag);
                (page.write[i].load(SeqCst), 0)
            };
            for (earlier, other) in [(Tag(write), "write"), (Tag(read), "read")] {
                let Some(cluster) = earlier.cluster() else { continue };
                let both_atomic = earlier.atomic() && access.atomic;
                let known = match order.seen.get(&cluster) {
                    // Of the own accesses only bulk stores that no one has waited for are not ordered.
                    _ if cluster == order.cluster => earlier.epoch() != UNORDERED,
                    known => known.is_some_and(|&known| known >= earlier.epoch()),
                };
                if !both_atomic && !known && earlier.halves() & halves != 0 {
                    return Err(Raced { other, step: earlier.step() });
                }
            }
        }
        Ok(())
    }

    /// A bulk store has been waited for: its writes are ordered before what the cluster does from here on.
    pub(super) fn settle(&self, buffer: usize, offset: usize, bytes: usize, order: &Order) {
        if !self.several {
            return;
        }
        for word in offset / 4..(offset + bytes).div_ceil(4) {
            let (page, i) = self.page(buffer, word);
            let tag = Tag(page.write[i].load(SeqCst));
            if tag.cluster() == Some(order.cluster) && tag.epoch() == UNORDERED {
                let settled = Tag::new(order.cluster, order.epoch, tag.step(), tag.halves(), tag.atomic());
                // Another cluster's write in between stays.
                let _ = page.write[i].compare_exchange(tag.0, settled.0, SeqCst, SeqCst);
            }
        }
    }

    /// Keeps the first reader, until the same cluster reads again.
    fn note_read(&self, slot: &AtomicU64, tag: Tag) {
        let known = Tag(slot.load(SeqCst));
        if known.0 == 0 || known.cluster() == tag.cluster() && known.0 != tag.0 {
            slot.store(tag.0, SeqCst);
        }
    }

    /// Before a write that others may observe: passes on what the cluster has released.
    pub(super) fn release(&self, address: u64, order: &mut Order, releases: bool) {
        let epochs = match (releases, &order.fenced) {
            (true, _) => order.snapshot(),
            (false, Some(fenced)) => fenced.clone(),
            (false, None) => return,
        };
        if self.several {
            join(lock(&self.released).entry(address).or_default(), &epochs);
            self.any_released.store(true, SeqCst);
        }
    }

    /// After a read that may have observed another cluster's write.
    pub(super) fn acquire(&self, address: u64, order: &mut Order, acquires: bool) {
        if !self.any_released.load(SeqCst) {
            return;
        }
        if let Some(epochs) = lock(&self.released).get(&address) {
            join(if acquires { &mut order.seen } else { &mut order.observed }, epochs);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Access = Access { write: true, atomic: false, unordered: false, step: 5 };

    #[test]
    fn tags_keep_their_fields() {
        let tag = Tag::new(Tag::MAX_CLUSTERS, UNORDERED, 0xf_ffff, 2, true);
        assert_eq!(tag.cluster(), Some(Tag::MAX_CLUSTERS));
        assert_eq!((tag.epoch(), tag.step(), tag.halves(), tag.atomic()), (UNORDERED, 0xf_ffff, 2, true));
    }

    #[test]
    fn clusters_are_ordered_by_release_and_acquire_alone() {
        let mut memory = Memory::new();
        memory.alloc("x", 64);
        let global = Global::new(&memory, 3, None);
        let (mut a, mut b) = (Order::new(0), Order::new(1));
        assert_eq!(global.order(0, 0, 2, &a, PLAIN), Ok(()));
        assert_eq!(global.order(0, 2, 2, &b, PLAIN), Ok(())); // the other half
        assert_eq!(global.order(0, 8, 4, &a, PLAIN), Ok(()));
        let read = Access { write: false, ..PLAIN };
        assert_eq!(global.order(0, 8, 4, &b, read), Err(Raced { other: "write", step: 5 }));
        global.release(64, &mut a, true);
        global.acquire(64, &mut b, true);
        assert_eq!(global.order(0, 8, 4, &b, read), Ok(()));
        // The release does not cover what follows it.
        assert_eq!(global.order(0, 12, 4, &a, PLAIN), Ok(()));
        assert!(global.order(0, 12, 4, &b, read).is_err());
        assert_eq!(global.order(0, 8, 4, &a, PLAIN), Err(Raced { other: "read", step: 5 }));
    }

    #[test]
    fn fences_make_relaxed_accesses_order() {
        let mut memory = Memory::new();
        memory.alloc("x", 64);
        let global = Global::new(&memory, 2, None);
        let (mut a, mut b) = (Order::new(0), Order::new(1));
        assert_eq!(global.order(0, 0, 4, &a, PLAIN), Ok(()));
        a.fence();
        global.release(64, &mut a, false);
        global.acquire(64, &mut b, false);
        assert!(global.order(0, 0, 4, &b, PLAIN).is_err());
        b.fence();
        assert_eq!(global.order(0, 0, 4, &b, PLAIN), Ok(()));
        let atomic = Access { atomic: true, ..PLAIN };
        assert_eq!(global.order(0, 16, 4, &a, atomic), Ok(()));
        assert_eq!(global.order(0, 16, 4, &b, atomic), Ok(()));
    }
}
