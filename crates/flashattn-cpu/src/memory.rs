//! Scratch memory of one thread: 64-byte aligned, allocated once a call and reused from task to task.

use std::cell::Cell;
use std::sync::{Mutex, PoisonError};

thread_local! {
    /// Bytes that [`bytes_of`] has counted so far, while it counts.
    static COUNTED: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Bytes of the buffers that `make` makes on this thread. None is allocated: they are empty, and must not be used.
pub fn bytes_of<R>(make: impl FnOnce() -> R) -> usize {
    COUNTED.set(Some(0));
    drop(make());
    COUNTED.take().unwrap_or(0)
}

/// One cache line of f32.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// An aligned buffer of f32 (or of anything smaller, through [`Buffer::ptr`]'s cast).
#[derive(Debug, Default)]
pub struct Buffer(Vec<Line>);

impl Buffer {
    /// A zeroed buffer of at least `len` f32; only counted inside [`bytes_of`].
    pub fn new(len: usize) -> Self {
        let lines = len.div_ceil(16);
        if let Some(bytes) = COUNTED.get() {
            COUNTED.set(Some(bytes.saturating_add(lines.saturating_mul(size_of::<Line>()))));
            return Buffer::default();
        }
        Buffer(bytemuck::zeroed_vec(lines))
    }

    /// How many f32 it holds.
    pub fn len(&self) -> usize {
        self.0.len() * 16
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// First element.
    pub fn ptr(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }
}

/// Things that are costly to make, kept for the next call.
#[derive(Debug)]
pub struct Pool<T>(Mutex<Vec<T>>);

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Pool(Mutex::new(Vec::new()))
    }
}

impl<T> Pool<T> {
    /// One that was put back, or a new one.
    pub fn take(&self, make: impl FnOnce() -> T) -> T {
        // A thread that panicked while it held the lock left the list whole: pushing and popping are all we do.
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.unwrap_or_else(make)
    }

    /// Keeps one.
    pub fn put(&self, x: T) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(x);
    }
}

/// A pointer into the caller's output that worker threads may share; they write disjoint parts.
#[derive(Debug)]
pub struct Shared<T>(pub *mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<T> {}

// SAFETY: a plain pointer; whoever dereferences it states why the access is exclusive.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The pointer. A method, so that closures capture the wrapper and not its field.
    pub fn get(self) -> *mut T {
        self.0
    }
}
