//! `wgmma`: products of a warpgroup with operands in shared memory, asynchronous to its warps.
//!
//! Each warp computes its 16 rows when it issues the instruction. What makes it asynchronous is kept by the checks: its
//! registers are in flight, and its reads of shared memory are under way, until a wait covers its group.

use super::cluster::{Cluster, Context};
use super::error::Error;
use super::matrix::{accumulate, decode, fragment, multiply};
use super::shared::{ALL_LANES, Access, Accessor, BASE};
use super::warp::Slot;
use crate::instr::{Element, Operand, WgmmaShape};
use crate::kernel::Swizzle;

/// A matrix descriptor, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Descriptor {
    start: u32,
    leading: u32,
    stride: u32,
    swizzle: Swizzle,
}

impl Descriptor {
    /// `None`: bits are set that must not be, or the base offset is used.
    fn decode(bits: u64) -> Option<Self> {
        const UNUSED: u64 = 0x3 << 14 | 0x3 << 30 | 0x3f << 46 | 0x3ff << 52;
        if bits & UNUSED != 0 {
            return None;
        }
        let field = |shift: u32| (bits >> shift & 0x3fff) as u32 * 16;
        let swizzle = [Swizzle::None, Swizzle::B128, Swizzle::B64, Swizzle::B32][(bits >> 62) as usize];
        Some(Descriptor { start: field(0), leading: field(16), stride: field(32), swizzle })
    }

    /// Address of 16 bytes: of row `mn`, K from byte `16 · chunk` on.
    fn along(&self, mn: u32, chunk: u32) -> u32 {
        let (group, row) = (mn / 8 * self.stride, mn % 8);
        match self.swizzle {
            Swizzle::None => self.start + group + row * 16 + chunk * self.leading,
            swizzle => swizzle.apply(self.start + group + row * swizzle.span() + chunk * 16),
        }
    }

    /// Address of 16 bytes: of depth `k`, eight elements of 16 bits from `8 · chunk` on.
    fn across(&self, k: u32, chunk: u32) -> u32 {
        match self.swizzle {
            Swizzle::None => self.start + chunk * self.stride + k / 8 * self.leading + k % 8 * 16,
            swizzle => {
                let (span, chunks) = (swizzle.span(), swizzle.span() / 16);
                let inside = k % 8 * span + chunk % chunks * 16;
                swizzle.apply(self.start + chunk / chunks * self.leading + k / 8 * self.stride + inside)
            }
        }
    }
}

impl Cluster<'_> {
    pub(super) fn wgmma(&mut self, cx: Context<'_>, shape: WgmmaShape) -> Result<(), Error> {
        let (n, k) = (shape.n as usize, shape.k() as usize);
        let warp = &self.warps[cx.warp];
        let (index, group) = (warp.index, warp.groups + 1);
        let warps = self.device.program.kernel.threads() / 32;
        if index / 4 * 4 + 4 > warps {
            let problem = format!(
                "wgmma needs four warps from a multiple of 4 on; warp {index} is of a block of {warps}"
            );
            return Err(self.misuse(cx, problem));
        }
        if n % 8 != 0 || !(8..=256).contains(&n) || cx.instr.dst.len() != shape.accumulators() as usize {
            return Err(
                self.unsupported(cx, format!("wgmma of {n} columns: expected a multiple of 8 up to 256"))
            );
        }
        if shape.a.bytes() != shape.b.bytes() {
            return Err(self.unsupported(cx, format!("wgmma of {:?} and {:?}", shape.a, shape.b)));
        }
        if (shape.transpose_a || shape.transpose_b) && shape.a.bytes() != 2 {
            return Err(self.unsupported(cx, "wgmma transposes 16-bit elements only".to_owned()));
        }
        let a_count = if shape.a_in_registers { 4 } else { 1 };
        let keep = self.uniform(cx, a_count + 1)? & 1 == 1;
        let a = if shape.a_in_registers {
            let mut registers = [[0; 32]; 4];
            for (i, register) in registers.iter_mut().enumerate() {
                *register = match cx.instr.src.get(i) {
                    Some(&Operand::Reg(id)) => {
                        let taken = self.warps[cx.warp].registers.take(id, Slot::A, group, true);
                        match taken {
                            Ok(values) => *values,
                            Err(fault) => return Err(self.fault(cx.warp, cx.step, fault)),
                        }
                    }
                    _ => self.operand(cx, i)?,
                };
            }
            fragment(shape.a, &registers, 16, k)
        } else {
            let (mut a, first) = (vec![0.0; 16 * k], index % 4 * 16);
            self.matrix_operand(cx, 0, shape.a, shape.transpose_a, (first, 16), |row, at, x| {
                a[row * k + at] = x
            })?;
            a
        };
        let mut b = vec![0.0; k * n];
        self.matrix_operand(cx, a_count, shape.b, shape.transpose_b, (0, shape.n), |column, at, x| {
            b[at * n + column] = x
        })?;
        let sums = multiply(&a, &b, n, k);
        for (j, &id) in cx.instr.dst.iter().enumerate() {
            let slot = Slot::Accumulator { index: j as u16, count: cx.instr.dst.len() as u16 };
            match self.warps[cx.warp].registers.take(id, slot, group, keep) {
                Ok(register) => accumulate(shape.d, register, j, &sums, n, keep),
                Err(fault) => return Err(self.fault(cx.warp, cx.step, fault)),
            }
        }
        let warp = &mut self.warps[cx.warp];
        warp.uncommitted = true;
        warp.products += 1;
        warp.products_hash =
            warp.products_hash.wrapping_mul(0x100_0000_01b3).wrapping_add(cx.step as u64 + 1);
        self.counters.matrix_flops += 2 * 16 * (n * k) as u64;
        Ok(())
    }

    /// Reads `count` rows of an operand in shared memory from row `first` on; `put(row, k, value)`.
    fn matrix_operand(
        &mut self,
        cx: Context<'_>,
        operand: usize,
        element: Element,
        transpose: bool,
        (first, count): (u32, u32),
        mut put: impl FnMut(usize, usize, f32),
    ) -> Result<(), Error> {
        let bits = self.uniform(cx, operand)?;
        let Some(descriptor) = Descriptor::decode(bits) else {
            let problem = format!("matrix descriptor {bits:#018x}: unused bits or a base offset are set");
            return Err(self.unsupported(cx, problem));
        };
        let own = self.warps.len() as u16;
        let warp = &self.warps[cx.warp];
        let event = warp.groups + 1;
        let access =
            Access { agent: own + warp.agent, event, asynchronous: true, ..warp.access(ALL_LANES, cx.step) };
        let accessor = Accessor { access, issuer: warp.agent, clocks: &warp.clocks };
        let shared = &mut self.blocks[warp.block].shared;
        // 32 bytes of K in two chunks of each row; or 16 of K with the rows in chunks of eight.
        let (outer, inner) =
            if transpose { (0..16, first / 8..(first + count) / 8) } else { (first..first + count, 0..2) };
        let per_chunk = (16 / element.bytes()) as usize;
        for i in outer {
            for chunk in inner.clone() {
                let address =
                    if transpose { descriptor.across(i, chunk) } else { descriptor.along(i, chunk) };
                let offset = address.wrapping_sub(BASE);
                if let Err(conflict) = shared.read(offset, 16, &accessor) {
                    return Err(self.conflict(self.place(cx, None), "read", offset, 16, conflict));
                }
                let bytes = &shared.data[offset as usize..offset as usize + 16];
                if transpose {
                    let row = (8 * chunk - first) as usize;
                    decode(element, bytes, |e, x| put(row + e, i as usize, x));
                } else {
                    let (row, at) = ((i - first) as usize, chunk as usize * per_chunk);
                    decode(element, bytes, |e, x| put(row, at + e, x));
                }
            }
        }
        Ok(())
    }

    /// `wgmma.wait_group`.
    pub(super) fn wgmma_wait(&mut self, cx: Context<'_>, groups: u32) {
        let own = self.warps.len() as u16;
        let warp = &mut self.warps[cx.warp];
        let completed = warp.groups.saturating_sub(groups).max(warp.registers.completed);
        warp.registers.completed = completed;
        warp.clocks.seen.learn(own + warp.agent, completed);
    }
}
