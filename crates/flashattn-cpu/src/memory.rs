//! Scratch memory of one thread: 64-byte aligned, allocated once a call and reused from task to task.

/// One cache line of f32.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// An aligned buffer of f32 (or of anything smaller, through [`Buffer::ptr`]'s cast).
#[derive(Debug, Default)]
pub struct Buffer(Vec<Line>);

impl Buffer {
    /// A zeroed buffer of at least `len` f32.
    pub fn new(len: usize) -> Self {
        Buffer(vec![Line([0.0; 16]); len.div_ceil(16)])
    }

    /// First element.
    pub fn ptr(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.0.len() * 64
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
