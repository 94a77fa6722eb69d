//! Memory of a GPU.

use bytemuck::{AnyBitPattern, NoUninit};
use cudarc::driver::sys;

use crate::device::{Device, Stream};
use crate::driver::check;
use crate::error::Error;

/// Bytes of a GPU's memory: allocated here and freed on drop, or the caller's.
#[derive(Debug)]
pub struct Buffer {
    device: Device,
    address: u64,
    bytes: usize,
    owned: bool,
}

impl Device {
    /// Allocates memory; what it holds is not defined.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer, Error> {
        let mut address = 0;
        if bytes > 0 {
            let _current = self.current()?;
            // SAFETY: the pointer is to a local; a context is current.
            check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&mut address, bytes) })?;
        }
        Ok(Buffer { device: self.clone(), address, bytes, owned: bytes > 0 })
    }

    /// Allocates memory with these values. Waits for the stream.
    pub fn upload<T: NoUninit>(&self, stream: &Stream, values: &[T]) -> Result<Buffer, Error> {
        let buffer = self.alloc(size_of_val(values))?;
        buffer.write(stream, values)?;
        Ok(buffer)
    }

    /// Memory of the caller's (a tensor of PyTorch, say), which stays the caller's.
    ///
    /// # Safety
    /// `bytes` bytes from `address` are memory of this GPU, and stay so while the result is used.
    pub unsafe fn buffer_from_raw(&self, address: u64, bytes: usize) -> Buffer {
        Buffer { device: self.clone(), address, bytes, owned: false }
    }
}

impl Buffer {
    /// Its GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies values to its begin. Waits for the stream: the values may be anywhere in the host's memory.
    pub fn write<T: NoUninit>(&self, stream: &Stream, values: &[T]) -> Result<(), Error> {
        self.write_at(stream, 0, values)
    }

    /// Copies values to byte `offset` and on. Waits for the stream.
    pub fn write_at<T: NoUninit>(&self, stream: &Stream, offset: u64, values: &[T]) -> Result<(), Error> {
        self.device.same(stream.device(), "the stream")?;
        let bytes = size_of_val(values);
        self.range("writing", offset, bytes as u128)?;
        if bytes == 0 {
            return Ok(());
        }
        let _current = self.device.current()?;
        let (from, to, handle) = (values.as_ptr().cast(), self.address + offset, stream.handle());
        // SAFETY: both ranges have `bytes` bytes (checked above), and the source lives until the wait below.
        check("cuMemcpyHtoDAsync", unsafe { sys::cuMemcpyHtoDAsync_v2(to, from, bytes, handle) })?;
        stream.synchronize()
    }

    /// Copies it all to the host. Waits for the stream.
    pub fn read<T: AnyBitPattern + NoUninit>(&self, stream: &Stream) -> Result<Vec<T>, Error> {
        let size = size_of::<T>();
        if size == 0 || !self.bytes.is_multiple_of(size) {
            return Err(Error::Elements { bytes: self.bytes as u64, size });
        }
        let mut values: Vec<T> = bytemuck::zeroed_vec(self.bytes / size);
        self.read_at(stream, 0, &mut values)?;
        Ok(values)
    }

    /// Copies bytes from `offset` on into all of `values`. Waits for the stream.
    pub fn read_at<T: AnyBitPattern + NoUninit>(
        &self,
        stream: &Stream,
        offset: u64,
        values: &mut [T],
    ) -> Result<(), Error> {
        self.device.same(stream.device(), "the stream")?;
        let bytes = size_of_val(values);
        self.range("reading", offset, bytes as u128)?;
        if bytes == 0 {
            return Ok(());
        }
        let _current = self.device.current()?;
        let (from, to) = (self.address + offset, values.as_mut_ptr().cast());
        // SAFETY: both ranges have `bytes` bytes, in which every bit pattern is a T; the target lives until the wait below.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(to, from, bytes, stream.handle()) };
        check("cuMemcpyDtoHAsync", result)?;
        stream.synchronize()
    }

    /// Sets every byte, in the stream's order; does not wait.
    pub fn fill(&self, stream: &Stream, byte: u8) -> Result<(), Error> {
        self.fill_first(stream, self.bytes, byte)
    }

    /// Sets the first bytes, in the stream's order; does not wait.
    pub(crate) fn fill_first(&self, stream: &Stream, bytes: usize, byte: u8) -> Result<(), Error> {
        self.device.same(stream.device(), "the stream")?;
        self.range("filling", 0, bytes as u128)?;
        if bytes == 0 {
            return Ok(());
        }
        let _current = self.device.current()?;
        // SAFETY: the buffer has as many bytes (checked above); the stream lives.
        let result = unsafe { sys::cuMemsetD8Async(self.address, byte, bytes, stream.handle()) };
        check("cuMemsetD8Async", result)
    }

    /// Refuses bytes that are not the buffer's.
    pub(crate) fn range(&self, what: &'static str, first: u64, bytes: u128) -> Result<(), Error> {
        let end = u128::from(first) + bytes;
        match end <= self.bytes as u128 {
            true => Ok(()),
            false => Err(Error::Range { what, first, end, bytes: self.bytes as u64 }),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let (true, Ok(_current)) = (self.owned, self.device.current()) {
            // SAFETY: allocated by `alloc` and freed once; the driver waits for work that uses it.
            let _ = unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}
