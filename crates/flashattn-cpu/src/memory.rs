//! Scratch memory of one thread: 64-byte aligned, allocated once a call and reused from task to task.

use std::sync::{Mutex, PoisonError};

/// One cache line of f32.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// An aligned buffer of f32 (or of anything smaller, through [`Buffer::ptr`]'s cast).
#[derive(Debug, Default)]
pub struct Buffer(Vec<Line>);

impl Buffer {
    /// A zeroed buffer of at least `len` f32.
    pub fn new(len: usize) -> Self {
        Buffer(bytemuck::zeroed_vec(len.div_ceil(16)))
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
