//! Boxes of tensors: which bytes of global memory they are, and where they lie in shared memory.

use half::{bf16, f16};

use super::access::Range;
use super::asynchronous::Effect;
use super::cluster::{Cluster, Context, Value};
use super::error::Error;
use super::execute::PARAMETERS;
use super::mbarrier::Use;
use super::memory::Storage;
use super::shared::BASE;
use super::warp::lanes;
use crate::kernel::{Swizzle, TensorElement, TensorMap};

/// What a store does with what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Store,
    ReduceAdd,
}

/// What a copy moves.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Bytes in shared memory.
    pub bytes: usize,
    /// Byte of the box (before the swizzle), and the range of a buffer that belongs there; the rest is outside.
    pub rows: Vec<(usize, Range)>,
    swizzle: Swizzle,
    element: TensorElement,
}

impl Plan {
    /// Bytes one after the other.
    pub(super) fn linear(bytes: usize, rows: Vec<(usize, Range)>) -> Self {
        Plan { bytes, rows, swizzle: Swizzle::None, element: TensorElement::F32 }
    }

    /// The box of a map at these coordinates.
    fn tile(map: &TensorMap, buffer: usize, base: usize, at: &[i64]) -> Self {
        let size = map.element.bytes() as usize;
        let row_bytes = map.tile[0] as usize * size;
        let mut plan = Plan {
            bytes: map.tile_bytes() as usize,
            rows: Vec::new(),
            swizzle: map.swizzle,
            element: map.element,
        };
        // The part of a row that is inside.
        let first = (-at[0]).clamp(0, map.tile[0] as i64);
        let end = (map.shape[0] as i64 - at[0]).clamp(first, map.tile[0] as i64);
        let bytes = (end - first) as usize * size;
        if bytes == 0 {
            return plan;
        }
        let mut index = vec![0u32; map.tile.len()];
        for row in 0..plan.bytes / row_bytes {
            let mut offset = Some(base as i64 + (at[0] + first) * size as i64);
            for d in 1..index.len() {
                let coordinate = at[d] + index[d] as i64;
                let inside = (0..map.shape[d] as i64).contains(&coordinate);
                offset =
                    offset.filter(|_| inside).map(|offset| offset + coordinate * map.strides[d - 1] as i64);
            }
            if let Some(offset) = offset {
                plan.rows.push((row * row_bytes + first as usize * size, (buffer, offset as usize, bytes)));
            }
            for (index, &size) in index.iter_mut().zip(&map.tile).skip(1) {
                *index += 1;
                if *index < size {
                    break;
                }
                *index = 0;
            }
        }
        plan
    }

    /// Where the bytes lie from an offset of shared memory on: byte of the box, offset, bytes.
    pub(super) fn pieces(&self, offset: u32) -> impl Iterator<Item = (usize, u32, usize)> {
        let (bytes, swizzle) = (self.bytes, self.swizzle);
        let piece = if swizzle == Swizzle::None { bytes } else { 16 };
        (0..bytes).step_by(piece.max(1)).map(move |at| {
            let to = swizzle.apply(BASE + offset + at as u32) - BASE;
            (at, to, piece.min(bytes - at))
        })
    }

    /// The same bytes of shared memory, in fewer ranges where order does not matter.
    pub(super) fn spans(&self, offset: u32) -> Vec<(u32, u32)> {
        // The swizzle permutes within 128 bytes.
        if self.swizzle == Swizzle::None || self.bytes.is_multiple_of(128) {
            return vec![(offset, self.bytes as u32)];
        }
        self.pieces(offset).map(|(_, to, bytes)| (to, bytes as u32)).collect()
    }

    /// Adds elements to what a buffer holds.
    pub(super) fn add(&self, storage: &Storage, offset: usize, data: &[u8]) {
        let add16 = |old: u32, at: usize, bits: u16| {
            let shift = 8 * (at % 4);
            let x = (old >> shift) as u16;
            let sum = match self.element {
                TensorElement::BF16 => (bf16::from_bits(x) + bf16::from_bits(bits)).to_bits(),
                _ => (f16::from_bits(x) + f16::from_bits(bits)).to_bits(),
            };
            old & !(0xffff << shift) | (sum as u32) << shift
        };
        let mut at = offset;
        match self.element {
            TensorElement::F32 => {
                for word in data.chunks_exact(4) {
                    let x = f32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                    storage.update32(at, |old| (f32::from_bits(old) + x).to_bits());
                    at += 4;
                }
            }
            TensorElement::F16 | TensorElement::BF16 => {
                for half in data.chunks_exact(2) {
                    let bits = u16::from_le_bytes([half[0], half[1]]);
                    storage.update32(at, |old| add16(old, at, bits));
                    at += 2;
                }
            }
            TensorElement::U8 => {}
        }
    }
}

impl<'a> Cluster<'a> {
    /// The tensor map at an address of parameter space: map, buffer, offset in the buffer.
    pub(super) fn map(&self, cx: Context<'a>, address: u64) -> Result<(&'a TensorMap, usize, usize), Error> {
        let device = self.device;
        let index =
            address.checked_sub(PARAMETERS).filter(|offset| offset % 128 == 0).map(|offset| offset / 128);
        match index.and_then(|index| device.args.get(index as usize)) {
            Some(Value::Map { map, address, buffer }) => {
                let base = address - device.global.memory.buffers()[*buffer].address;
                Ok((map, *buffer, base as usize))
            }
            _ => Err(self.unsupported(
                cx,
                format!("no tensor map at {address:#x}: expected the address of a parameter"),
            )),
        }
    }

    /// The box that a lane asks for; `first` is the operand with the map's address, coordinates follow.
    fn tile(&self, cx: Context<'a>, lane: usize, first: usize, dims: usize) -> Result<Plan, Error> {
        let (map, buffer, base) = self.map(cx, self.operand(cx, first)?[lane])?;
        if map.tile.len() != dims {
            let problem = format!("{dims} coordinates for a tensor map of {} dimensions", map.tile.len());
            return Err(self.unsupported(cx, problem));
        }
        let mut at = Vec::with_capacity(dims);
        for d in 0..dims {
            at.push(self.operand(cx, first + 1 + d)?[lane] as u32 as i32 as i64);
        }
        Ok(Plan::tile(map, buffer, base, &at))
    }

    /// `cp.async.bulk.tensor` to shared memory.
    pub(super) fn tma_load(&mut self, cx: Context<'a>, dims: usize, multicast: bool) -> Result<(), Error> {
        let (to, on) = (self.operand(cx, 0)?, self.operand(cx, 2 + dims)?);
        let masks = if multicast { self.operand(cx, 3 + dims)? } else { [0; 32] };
        for lane in lanes(cx.lanes) {
            let plan = self.tile(cx, lane, 1, dims)?;
            let target = self.shared_at(cx, lane, to[lane] as u32, plan.bytes as u32, 128, true)?;
            let mbarrier = self.mbarrier_at(cx, lane, on[lane] as u32, Use::Remote, true)?;
            let (mut targets, mut mbarriers) = (vec![target], vec![mbarrier]);
            if multicast {
                let mask = masks[lane] as u16;
                if mask == 0 || mask as u32 >> self.blocks.len().min(16) != 0 {
                    let problem =
                        format!("multicast to blocks {mask:#b} of a cluster of {}", self.blocks.len());
                    return Err(self.unsupported(cx, problem));
                }
                let blocks = || lanes(mask as u32);
                targets = blocks().map(|block| (block, target.1)).collect();
                mbarriers = blocks().map(|block| (block, mbarrier.1)).collect();
                for block in blocks() {
                    // The same place must be there, and an mbarrier, in each of them.
                    self.shared_at(
                        cx,
                        lane,
                        Self::local_address(block, target.1),
                        plan.bytes as u32,
                        128,
                        true,
                    )?;
                    self.mbarrier_at(cx, lane, Self::local_address(block, mbarrier.1), Use::Remote, true)?;
                }
            }
            for (&target, &mbarrier) in targets.iter().zip(&mbarriers) {
                let agent = self.mbarrier_agent(mbarrier);
                self.reserve(cx, lane, &plan, target, agent, true)?;
            }
            self.issue(cx, Effect::Load { plan, targets, mbarriers });
        }
        Ok(())
    }

    /// `cp.async.bulk.tensor` and `cp.reduce.async.bulk.tensor` to global memory.
    pub(super) fn tma_store(
        &mut self,
        cx: Context<'a>,
        dims: usize,
        direction: Direction,
    ) -> Result<(), Error> {
        let from = self.operand(cx, 1 + dims)?;
        for lane in lanes(cx.lanes) {
            let plan = self.tile(cx, lane, 0, dims)?;
            if direction == Direction::ReduceAdd && plan.element == TensorElement::U8 {
                return Err(self.unsupported(cx, "TMA adds f32, f16 and bf16, not bytes".to_owned()));
            }
            let source = self.shared_at(cx, lane, from[lane] as u32, plan.bytes as u32, 128, false)?;
            self.issue_store(cx, lane, plan, source, direction)?;
        }
        Ok(())
    }

    /// `cp.async.bulk.prefetch.tensor`: the L2 model sees it, the tensor's traffic does not count it.
    pub(super) fn tma_prefetch(&mut self, cx: Context<'a>, dims: usize) -> Result<(), Error> {
        let global = self.device.global;
        for lane in lanes(cx.lanes) {
            for (_, (buffer, offset, bytes)) in self.tile(cx, lane, 0, dims)?.rows {
                let address = global.memory.buffers()[buffer].address + offset as u64;
                global.touch_l2(buffer, address, bytes as u64, false);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_are_clipped_to_the_tensor() {
        let map = TensorMap {
            element: TensorElement::BF16,
            shape: vec![10, 3],
            strides: vec![32],
            tile: vec![8, 2],
            swizzle: Swizzle::None,
        };
        let rows = |x, y| Plan::tile(&map, 0, 100, &[x, y]).rows;
        assert_eq!(rows(0, 0), [(0, (0, 100, 16)), (16, (0, 132, 16))]);
        assert_eq!(rows(8, 2), [(0, (0, 100 + 64 + 16, 4))]); // two columns of the last row
        assert_eq!(rows(-3, -1), [(16 + 6, (0, 100, 10))]);
        assert_eq!(rows(10, 0), []);
    }

    #[test]
    fn pieces_follow_the_swizzle() {
        let plan = Plan { bytes: 256, rows: Vec::new(), swizzle: Swizzle::B128, element: TensorElement::U8 };
        let to: Vec<u32> = plan.pieces(1024).map(|(_, to, _)| to - 1024).collect();
        assert_eq!(to[..8], [0, 16, 32, 48, 64, 80, 96, 112]);
        assert_eq!(to[8..], [144, 128, 176, 160, 208, 192, 240, 224]);
    }
}
