//! Tensors in a GPU's memory, as the caller has them.

use std::marker::PhantomData;
use std::mem::size_of;

use cudarc::driver::sys::{self, CUmemorytype_enum as MemoryType, CUpointer_attribute_enum as Attribute};
use flashattn_spec::tensor::{check_output_strides, check_strides, contiguous_strides};
use flashattn_spec::{DType, ProblemError};

use crate::device::Device;
use crate::driver::check;
use crate::error::Error;
use crate::memory::Buffer;

/// A strided tensor `[batch, seqlen, heads, head_dim]` in a GPU's memory, read or written by a call. Strides are in
/// elements; the last is 1. A view checks that it fits, and is otherwise a name: nothing is read when it is made.
#[derive(Clone, Copy, Debug)]
pub struct DeviceView<'a> {
    ordinal: u32,
    address: u64,
    dtype: DType,
    shape: [usize; 4],
    strides: [usize; 4],
    memory: PhantomData<&'a Buffer>,
}

impl<'a> DeviceView<'a> {
    /// A dense row-major view of a buffer, from byte `offset` on.
    ///
    /// # Errors
    /// As [`DeviceView::with_strides`].
    pub fn new(buffer: &'a Buffer, offset: u64, dtype: DType, shape: [usize; 4]) -> Result<Self, Error> {
        Self::with_strides(buffer, offset, dtype, shape, contiguous_strides(shape))
    }

    /// A view of a buffer with any strides (in elements), from byte `offset` on.
    ///
    /// # Errors
    /// [`Error::View`], [`Error::Range`] if it leaves the buffer.
    pub fn with_strides(
        buffer: &'a Buffer,
        offset: u64,
        dtype: DType,
        shape: [usize; 4],
        strides: [usize; 4],
    ) -> Result<Self, Error> {
        let span = check_strides(shape, strides).map_err(|source| Error::View { name: "a view", source })?;
        buffer.range("a view", offset, span as u128 * dtype.size() as u128)?;
        let (ordinal, address) = (buffer.device().ordinal(), buffer.address().wrapping_add(offset));
        Ok(DeviceView { ordinal, address, dtype, shape, strides, memory: PhantomData })
    }

    /// A view of memory of the caller's: a tensor of another library, by its address, shape and strides (in elements). (Of a
    /// `cudarc::driver::CudaSlice` the address is `slice.device_ptr(&stream).0`, of a torch tensor `data_ptr()`.)
    ///
    /// # Errors
    /// [`Error::View`] for strides that no tensor has.
    ///
    /// # Safety
    /// The memory under the view is the caller's to give to kernels of GPU `ordinal`, to read, or to write where a call says
    /// that it writes. It stays so until the work that was put into streams with this view (or a copy of it) has ended.
    pub unsafe fn from_raw(
        ordinal: u32,
        address: u64,
        dtype: DType,
        shape: [usize; 4],
        strides: [usize; 4],
    ) -> Result<Self, Error> {
        check_strides(shape, strides).map_err(|source| Error::View { name: "a view", source })?;
        Ok(DeviceView { ordinal, address, dtype, shape, strides, memory: PhantomData })
    }

    /// Its address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// `[batch, seqlen, heads, head_dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// In elements.
    pub fn strides(&self) -> [usize; 4] {
        self.strides
    }

    /// Refuses another GPU's memory, another type or another shape; of an output also strides that overlap.
    pub(crate) fn expect(
        &self,
        name: &'static str,
        ordinal: u32,
        dtype: DType,
        shape: [usize; 4],
        output: bool,
    ) -> Result<(), Error> {
        same(name, self.ordinal, ordinal)?;
        if self.dtype != dtype {
            return Err(ProblemError::DType { name, got: self.dtype, expected: dtype }.into());
        }
        if self.shape != shape {
            return Err(shape_error(name, &self.shape, &shape));
        }
        if output {
            check_output_strides(shape, self.strides).map_err(|source| Error::View { name, source })?;
        }
        aligned(name, self.address, dtype.size())
    }
}

/// Consecutive f32 numbers in a GPU's memory.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSlice<'a> {
    ordinal: u32,
    address: u64,
    len: usize,
    memory: PhantomData<&'a Buffer>,
}

impl<'a> DeviceSlice<'a> {
    /// `len` numbers of a buffer, from byte `offset` on.
    ///
    /// # Errors
    /// [`Error::Range`] if they leave the buffer.
    pub fn new(buffer: &'a Buffer, offset: u64, len: usize) -> Result<Self, Error> {
        buffer.range("a slice", offset, len as u128 * size_of::<f32>() as u128)?;
        let (ordinal, address) = (buffer.device().ordinal(), buffer.address().wrapping_add(offset));
        Ok(DeviceSlice { ordinal, address, len, memory: PhantomData })
    }

    /// `len` numbers of the caller's memory.
    ///
    /// # Safety
    /// As [`DeviceView::from_raw`].
    pub unsafe fn from_raw(ordinal: u32, address: u64, len: usize) -> Self {
        DeviceSlice { ordinal, address, len, memory: PhantomData }
    }

    /// Its address.
    pub fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn expect(&self, name: &'static str, ordinal: u32, len: usize) -> Result<(), Error> {
        same(name, self.ordinal, ordinal)?;
        if self.len != len {
            return Err(shape_error(name, &[self.len], &[len]));
        }
        aligned(name, self.address, size_of::<f32>())
    }
}

fn same(what: &'static str, got: u32, expected: u32) -> Result<(), Error> {
    if got == expected { Ok(()) } else { Err(Error::OtherDevice { what, got, expected }) }
}

fn aligned(name: &'static str, address: u64, expected: usize) -> Result<(), Error> {
    match address.is_multiple_of(expected as u64) {
        true => Ok(()),
        false => Err(Error::Misaligned { name, address, expected }),
    }
}

pub(crate) fn shape_error(name: &'static str, got: &[usize], expected: &[usize]) -> Error {
    ProblemError::Shape { name, got: got.to_vec(), expected: expected.to_vec() }.into()
}

/// Asks the driver whose memory an address is, and refuses what kernels of this GPU shall not be given: memory of the host
/// or of another GPU, and addresses that are none. A context is current.
pub(crate) fn check_pointer(device: &Device, name: &'static str, address: u64) -> Result<(), Error> {
    let (mut kind, mut ordinal, mut managed) = (0u32, -1i32, 0u32);
    let mut attributes = [
        Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
        Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
        Attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED,
    ];
    let mut values =
        [(&raw mut kind).cast(), (&raw mut ordinal).cast(), (&raw mut managed).cast::<std::ffi::c_void>()];
    // SAFETY: three attributes with room for a value each, of the sizes that the driver writes (4, 4, and 4 or 1 bytes); an
    // address that is none is looked up, not followed.
    let result =
        unsafe { sys::cuPointerGetAttributes(3, attributes.as_mut_ptr(), values.as_mut_ptr(), address) };
    check("cuPointerGetAttributes", result)?;
    let got = match (kind, managed) {
        (_, 1) => return Ok(()),
        (kind, _) if kind == MemoryType::CU_MEMORYTYPE_DEVICE as u32 => {
            return same(name, ordinal.max(0) as u32, device.ordinal());
        }
        (0, _) => "no memory that CUDA knows",
        _ => "memory of the host",
    };
    Err(Error::Pointer { name, address, got, expected: device.ordinal() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_named() {
        let shape = [2, 5, 3, 8];
        // SAFETY: never given to a kernel.
        let view = |address, strides| unsafe {
            DeviceView::from_raw(1, address, DType::Bf16, shape, strides).unwrap()
        };
        let dense = view(0x1000, [120, 24, 8, 1]);
        let text = |view: DeviceView<'_>, ordinal, dtype, shape, output| {
            view.expect("o", ordinal, dtype, shape, output).unwrap_err().to_string()
        };
        assert!(dense.expect("o", 1, DType::Bf16, shape, true).is_ok());
        assert_eq!(text(dense, 0, DType::Bf16, shape, true), "o is of GPU 1; expected GPU 0");
        assert!(text(dense, 1, DType::F16, shape, true).contains("bf16"));
        assert!(text(dense, 1, DType::Bf16, [2, 5, 3, 9], true).contains("[2, 5, 3, 9]"));
        assert_eq!(
            text(view(0x1001, [120, 24, 8, 1]), 1, DType::Bf16, shape, false),
            "o at address 0x1001; expected a multiple of 2"
        );
        let shared = view(0x1000, [0, 24, 8, 1]);
        assert!(shared.expect("k", 1, DType::Bf16, shape, false).is_ok());
        assert!(text(shared, 1, DType::Bf16, shape, true).contains("overlap"));
        // SAFETY: as above.
        let wrong = unsafe { DeviceView::from_raw(0, 0, DType::F16, shape, [120, 24, 8, 2]) };
        assert!(matches!(wrong, Err(Error::View { .. })));
        // SAFETY: as above.
        let slice = unsafe { DeviceSlice::from_raw(0, 0x1002, 7) };
        assert_eq!(
            slice.expect("lse", 0, 7).unwrap_err().to_string(),
            "lse at address 0x1002; expected a multiple of 4"
        );
        assert!(slice.expect("lse", 0, 8).unwrap_err().to_string().contains("[7]"));
    }
}
