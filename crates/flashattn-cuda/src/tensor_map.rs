//! Tensor maps: what TMA needs to know of a tensor, encoded by the driver.

use std::ffi::c_void;

use cudarc::driver::sys::{
    self, CUtensorMap, CUtensorMapDataType as DataType, CUtensorMapFloatOOBfill as Fill,
    CUtensorMapInterleave as Interleave, CUtensorMapL2promotion as Promotion, CUtensorMapSwizzle,
};
use ptx::kernel::{Swizzle, TensorElement};

use crate::device::Device;
use crate::driver::check;
use crate::error::Error;
use crate::memory::Buffer;

/// A tensor map over a buffer's memory, to be given to a kernel by value. The buffer must outlive the launches.
#[derive(Clone, Debug)]
pub struct TensorMap {
    pub(crate) raw: CUtensorMap,
}

impl TensorMap {
    /// The parameter's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        bytemuck::bytes_of(&self.raw.opaque)
    }
}

impl TensorMap {
    /// Encodes `map` over the buffer from byte `offset` on, after checking it and that the tensor lies in the buffer.
    pub fn new(map: &ptx::TensorMap, buffer: &Buffer, offset: u64) -> Result<TensorMap, Error> {
        buffer.range("a tensor map", offset, extent(map))?;
        Self::encode(map, buffer.device(), buffer.address().wrapping_add(offset))
    }

    /// Encodes `map` over the tensor at an address of the device's memory, after checking it.
    pub(crate) fn encode(map: &ptx::TensorMap, device: &Device, address: u64) -> Result<TensorMap, Error> {
        map.check(address)?;
        // The driver reads as many as there are dimensions; arrays of 5 spare it a null pointer for one dimension.
        let mut shape = [1; 5];
        let mut strides = [0; 5];
        let mut tile = [1; 5];
        shape.iter_mut().zip(&map.shape).for_each(|(to, &from)| *to = from);
        strides.iter_mut().zip(&map.strides).for_each(|(to, &from)| *to = from);
        tile.iter_mut().zip(&map.tile).for_each(|(to, &from)| *to = from);
        let element = match map.element {
            TensorElement::U8 => DataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            TensorElement::F16 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            TensorElement::BF16 => DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            TensorElement::F32 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let swizzle = match map.swizzle {
            Swizzle::None => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::B32 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::B64 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::B128 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let mut raw = CUtensorMap { opaque: [0; 16] };
        let _current = device.current()?;
        // SAFETY: the map is a local of the alignment that its type has; the arrays have an entry for each dimension (1
        // to 5, checked); a context is current; the address is only encoded, not followed.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut raw,
                element,
                map.shape.len() as u32,
                std::ptr::without_provenance_mut::<c_void>(address as usize),
                shape.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                [1u32; 5].as_ptr(),
                Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", result)?;
        Ok(TensorMap { raw })
    }
}

/// Bytes from a tensor's first element to the end of its last.
fn extent(map: &ptx::TensorMap) -> u128 {
    let sizes = map.shape.iter().map(|&size| u128::from(size));
    let outer: u128 =
        sizes.clone().skip(1).zip(&map.strides).map(|(size, &stride)| (size - 1) * u128::from(stride)).sum();
    outer + sizes.take(1).sum::<u128>() * u128::from(map.element.bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_end_with_the_last_element() {
        let map = |shape: &[u64], strides: &[u64]| ptx::TensorMap {
            element: TensorElement::BF16,
            shape: shape.to_vec(),
            strides: strides.to_vec(),
            tile: vec![1; shape.len()],
            swizzle: Swizzle::None,
        };
        assert_eq!(extent(&map(&[64], &[])), 128);
        assert_eq!(extent(&map(&[64, 10], &[256])), 9 * 256 + 128);
        // Overlapping (a stride of 0 repeats a row), and as large as can be.
        assert_eq!(extent(&map(&[64, 10, 3], &[0, 4096])), 2 * 4096 + 128);
        let most = 1 << 32;
        assert_eq!(
            extent(&map(&[most, most], &[1 << 39])),
            u128::from(most - 1) * (1 << 39) + 2 * u128::from(most)
        );
    }
}
