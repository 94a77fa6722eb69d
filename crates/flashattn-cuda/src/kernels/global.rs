//! Tensors of the caller's in global memory, a row of a warp at a time: for what is not worth the tensor cores.

use ptx::build::{Address, Half, Reg};
use ptx::instr::Element;
use ptx::{BF16x2, Builder, F16x2};

/// A tensor of 16-bit floats in global memory.
#[derive(Clone, Copy, Debug)]
pub struct GlobalTensor<'k> {
    /// Its address.
    pub data: Reg<'k, u64>,
    /// Strides of batch, row and head, in elements.
    pub strides: [Reg<'k, u64>; 3],
}

impl<'k> GlobalTensor<'k> {
    /// The tensor of the parameters `name_data`, `name_batch`, `name_row`, `name_head`.
    pub fn param(k: &'k Builder, name: &str) -> Self {
        GlobalTensor {
            data: k.param_ptr(&format!("{name}_data")),
            strides: ["batch", "row", "head"].map(|dim| k.param_ptr(&format!("{name}_{dim}"))),
        }
    }

    /// Address of element `column` of a row.
    pub fn at(&self, [batch, row, head, column]: [Reg<'k, u32>; 4]) -> Address<'k, u64> {
        let [by_batch, by_row, by_head] = self.strides;
        let wide = |r: Reg<'k, u32>| r.to_u64();
        let element = wide(batch) * by_batch + wide(row) * by_row + wide(head) * by_head + wide(column);
        (element * 2 + self.data).address()
    }

    /// The same column so many rows further.
    pub fn down(&self, at: Address<'k, u64>, rows: Reg<'k, u32>) -> Address<'k, u64> {
        at + rows.to_u64() * (self.strides[1] * 2)
    }
}

/// Bytes that a thread takes at a time of rows of so many elements, and that their address and strides therefore are multiples
/// of: 16 if rows divide into such pieces, else `least`.
pub const fn piece(dim: u32, least: u32) -> u32 {
    if dim.is_multiple_of(8) { 16 } else { least }
}

/// Elements 32·i of a row of `dim` from the lane's own, at `at`, on; 0 past the end.
pub fn columns<'k>(lane: Reg<'k, u32>, at: Address<'k, u64>, dim: u32) -> Vec<Reg<'k, u16>> {
    let k = lane.builder();
    let column = |i: u32| {
        let at = at.at(64 * i as i32);
        if 32 * (i + 1) <= dim {
            return at.load();
        }
        let value = k.var(0u16);
        k.when(lane.lt(dim - 32 * i), || value.set(at.load::<u16>()));
        value
    };
    (0..dim.div_ceil(32)).map(column).collect()
}

/// The value of one 16-bit float.
pub fn float<'k, H: Half>(bits: Reg<'k, u16>) -> Reg<'k, f32> {
    match H::ELEMENT {
        Element::F16 => bits.f16_to_f32(),
        _ => (bits.to_u32() << 16).bits(),
    }
}

/// The values of two neighbouring 16-bit floats, low first.
pub fn floats<'k, H: Half>(pair: Reg<'k, u32>) -> [Reg<'k, f32>; 2] {
    match H::ELEMENT {
        Element::F16 => pair.bits::<F16x2>().unpack(),
        _ => pair.bits::<BF16x2>().unpack(),
    }
}

/// The bits of one 16-bit float, rounded.
pub fn half_bits<'k, H: Half>(value: Reg<'k, f32>) -> Reg<'k, u16> {
    match H::ELEMENT {
        Element::F16 => value.to_f16(),
        _ => value.to_bf16(),
    }
}

/// Whether the bits are those of NaN or ∞.
pub fn not_finite<'k, H: Half>(bits: Reg<'k, u16>) -> Reg<'k, bool> {
    let exponent = if H::ELEMENT == Element::F16 { 0x7c00 } else { 0x7f80 };
    (bits.to_u32() & exponent).eq(exponent)
}
