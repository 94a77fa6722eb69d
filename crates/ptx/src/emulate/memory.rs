//! Global memory: named buffers, far enough apart that an access beyond one does not meet the next.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};

use super::error::Error;

/// Address of the first buffer.
const FIRST: u64 = 0x7000_0000_0000;
/// Addresses without memory after each buffer.
const GAP: u64 = 1 << 20;

/// A buffer of a [`Memory`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Buffer(usize);

/// Words are atomics because blocks of a launch run on several threads; a race between blocks is reported, not undefined.
#[derive(Debug)]
pub(super) struct Storage {
    pub name: String,
    pub address: u64,
    pub bytes: usize,
    words: Vec<AtomicU32>,
    /// For each word, which of its bytes were written.
    written: Vec<AtomicU8>,
}

/// Emulated global memory. Buffers begin at multiples of 256 bytes, as `cuMemAlloc` gives them.
#[derive(Debug, Default)]
pub struct Memory {
    buffers: Vec<Storage>,
}

impl Memory {
    /// Without buffers.
    pub fn new() -> Self {
        Memory::default()
    }

    /// A buffer whose bytes were never written; a kernel that reads them is in error.
    pub fn alloc(&mut self, name: &str, bytes: usize) -> Buffer {
        let address = match self.buffers.last() {
            None => FIRST,
            Some(last) => (last.address + last.bytes as u64 + GAP).next_multiple_of(256),
        };
        let words = bytes.div_ceil(4);
        self.buffers.push(Storage {
            name: name.to_owned(),
            address,
            bytes,
            words: (0..words).map(|_| AtomicU32::new(0)).collect(),
            written: (0..words).map(|_| AtomicU8::new(0)).collect(),
        });
        Buffer(self.buffers.len() - 1)
    }

    /// A buffer with this content.
    pub fn upload<T: bytemuck::Pod>(&mut self, name: &str, data: &[T]) -> Buffer {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let buffer = self.alloc(name, bytes.len());
        self.buffers[buffer.0].store(0, bytes);
        buffer
    }

    /// A buffer's content; an error if a byte was never written.
    pub fn read<T: bytemuck::Pod>(&self, buffer: Buffer) -> Result<Vec<T>, Error> {
        let size = size_of::<T>();
        let Some(storage) = self.buffers.get(buffer.0) else {
            return Err(Error::BufferShape {
                buffer: "of another memory".to_owned(),
                bytes: 0,
                element: size,
            });
        };
        if size == 0 || storage.bytes % size != 0 {
            let (buffer, bytes) = (storage.name.clone(), storage.bytes);
            return Err(Error::BufferShape { buffer, bytes, element: size });
        }
        if let Some(byte) = storage.unwritten(0, storage.bytes) {
            return Err(Error::Unwritten { buffer: storage.name.clone(), byte });
        }
        let mut values = vec![T::zeroed(); storage.bytes / size];
        storage.load(0, bytemuck::cast_slice_mut(&mut values));
        Ok(values)
    }

    /// A buffer's address; 0 for a buffer of another memory.
    pub fn address(&self, buffer: Buffer) -> u64 {
        self.buffers.get(buffer.0).map_or(0, |storage| storage.address)
    }

    pub(super) fn buffers(&self) -> &[Storage] {
        &self.buffers
    }

    pub(super) fn storage(&self, buffer: Buffer) -> Option<&Storage> {
        self.buffers.get(buffer.0)
    }

    /// The buffer with the greatest address not above `address`: the only one that may contain it.
    pub(super) fn near(&self, address: u64) -> Option<usize> {
        self.buffers.partition_point(|buffer| buffer.address <= address).checked_sub(1)
    }
}

impl Storage {
    /// Bytes `bytes` of word `word`, as a mask, for a range that begins at `offset`.
    fn masks(offset: usize, bytes: usize) -> impl Iterator<Item = (usize, usize, usize)> {
        let end = offset + bytes;
        (offset / 4..end.div_ceil(4)).map(move |word| (word, offset.max(4 * word), end.min(4 * word + 4)))
    }

    /// The first byte of a range that was never written.
    pub(super) fn unwritten(&self, offset: usize, bytes: usize) -> Option<usize> {
        Self::masks(offset, bytes).find_map(|(word, first, end)| {
            let written = self.written[word].load(Relaxed);
            if written == 0xf {
                return None;
            }
            (first..end).find(|byte| written >> (byte % 4) & 1 == 0)
        })
    }

    pub(super) fn load(&self, offset: usize, out: &mut [u8]) {
        if offset.is_multiple_of(4) {
            let mut chunks = out.chunks_exact_mut(4);
            let mut word = offset / 4;
            for chunk in &mut chunks {
                chunk.copy_from_slice(&self.words[word].load(Relaxed).to_le_bytes());
                word += 1;
            }
            let rest = chunks.into_remainder();
            if !rest.is_empty() {
                rest.copy_from_slice(&self.words[word].load(Relaxed).to_le_bytes()[..rest.len()]);
            }
            return;
        }
        for (i, byte) in out.iter_mut().enumerate() {
            let at = offset + i;
            *byte = (self.words[at / 4].load(Relaxed) >> (8 * (at % 4))) as u8;
        }
    }

    pub(super) fn store(&self, offset: usize, data: &[u8]) {
        for (word, first, end) in Self::masks(offset, data.len()) {
            let bytes = &data[first - offset..end - offset];
            if let [a, b, c, d] = *bytes {
                self.words[word].store(u32::from_le_bytes([a, b, c, d]), Relaxed);
                self.written[word].store(0xf, Relaxed);
                continue;
            }
            // A part of a word: other blocks may write the rest of it at the same time.
            let (mut value, mut mask, mut written) = (0u32, 0u32, 0u8);
            for (byte, &data) in (first..end).zip(bytes) {
                value |= (data as u32) << (8 * (byte % 4));
                mask |= 0xff << (8 * (byte % 4));
                written |= 1 << (byte % 4);
            }
            let _ = self.words[word].fetch_update(Relaxed, Relaxed, |old| Some(old & !mask | value));
            self.written[word].fetch_or(written, Relaxed);
        }
    }

    /// Replaces an aligned 32-bit word and returns what it was.
    pub(super) fn update32(&self, offset: usize, f: impl Fn(u32) -> u32) -> u32 {
        let word = &self.words[offset / 4];
        match word.fetch_update(Relaxed, Relaxed, |old| Some(f(old))) {
            Ok(old) | Err(old) => old,
        }
    }

    /// Adds to 64 aligned bits. Other threads' additions may come between the halves: each carry is added once, so the sum is right
    /// when all are done, which is when reads that are no race come.
    pub(super) fn add64(&self, offset: usize, value: u64) {
        let (low, high) = (value as u32, (value >> 32) as u32);
        let carry = self.update32(offset, |old| old.wrapping_add(low)).checked_add(low).is_none();
        self.update32(offset + 4, |old| old.wrapping_add(high).wrapping_add(carry.into()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_lie_apart_and_know_what_was_written() {
        let mut memory = Memory::new();
        let a = memory.upload("a", &[1u16, 2, 3]);
        let b = memory.alloc("b", 8);
        assert_eq!(memory.read::<u16>(a), Ok(vec![1, 2, 3]));
        assert!(memory.address(b).is_multiple_of(256) && memory.address(b) >= memory.address(a) + GAP);
        assert_eq!(memory.near(memory.address(b) + 3), Some(1));
        assert_eq!(memory.near(FIRST - 1), None);
        memory.buffers[1].store(1, &[9, 8]);
        assert_eq!(memory.read::<u8>(b), Err(Error::Unwritten { buffer: "b".to_owned(), byte: 0 }));
        memory.buffers[1].store(0, &[7]);
        memory.buffers[1].store(3, &[6, 5, 4, 3, 2]);
        assert_eq!(memory.read::<u8>(b), Ok(vec![7, 9, 8, 6, 5, 4, 3, 2]));
        assert!(matches!(memory.read::<u32>(a), Err(Error::BufferShape { bytes: 6, element: 4, .. })));
        let mut odd = [0; 3];
        memory.buffers[1].load(3, &mut odd);
        assert_eq!(odd, [6, 5, 4]);
    }
}
