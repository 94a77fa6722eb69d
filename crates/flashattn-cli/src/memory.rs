//! What a call needs, measured: an allocator that counts, process CPU time and wall time.

use anyhow::Result;
use cpu_time::ProcessTime;
use serde::Serialize;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

/// The system's allocator, counting bytes in use and their peak. Crates that do so turn `realloc` into a copy and
/// touch zeroed pages, which would change what is measured.
pub struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grow(bytes: usize) {
    let now = IN_USE.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(now, Relaxed);
}

// SAFETY: every method passes its arguments on to the system's allocator and returns what that gave; the counters
// allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller keeps the contract of this method, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above; `at` came from the system's allocator with this layout.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if size >= layout.size() {
            grow(size - layout.size());
        } else {
            IN_USE.fetch_sub(layout.size() - size, Relaxed);
        }
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// Bytes in use.
pub fn in_use() -> usize {
    IN_USE.load(Relaxed)
}

/// What one call took.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Cost {
    /// Milliseconds on the clock.
    pub wall_ms: f64,
    /// Milliseconds of CPU time, of all threads together.
    pub cpu_ms: f64,
    /// Most bytes in use during the call, less those before it.
    pub extra_bytes: usize,
}

/// Runs something and measures it. Nothing else may run in the process meanwhile.
///
/// # Errors
/// Whatever `call` gives.
pub fn measure<R>(call: impl FnOnce() -> Result<R>) -> Result<(R, Cost)> {
    let before = in_use();
    PEAK.store(before, Relaxed);
    let (cpu, wall) = (ProcessTime::now(), Instant::now());
    let result = call()?;
    let (wall, cpu) = (wall.elapsed(), cpu.elapsed());
    let extra_bytes = PEAK.load(Relaxed).saturating_sub(before);
    Ok((result, Cost { wall_ms: wall.as_secs_f64() * 1e3, cpu_ms: cpu.as_secs_f64() * 1e3, extra_bytes }))
}

/// Median of some numbers, which are sorted by this; NaN if there are none.
pub fn median(x: &mut [f64]) -> f64 {
    x.sort_by(f64::total_cmp);
    match x.len() {
        0 => f64::NAN,
        n if n.is_multiple_of(2) => (x[n / 2 - 1] + x[n / 2]) / 2.0,
        n => x[n / 2],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!((median(&mut [3.0, 1.0, 2.0]), median(&mut [4.0, 1.0, 2.0, 3.0])), (2.0, 2.5));
        assert!(median(&mut []).is_nan());
    }
}
