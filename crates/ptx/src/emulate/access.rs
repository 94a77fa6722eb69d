//! Loads, stores and atomics of lanes, in global and shared memory.

use half::{bf16, f16};

use super::cluster::{Cluster, Context};
use super::error::Error;
use super::global;
use super::shared::{BASE, Conflict, wavefronts};
use super::warp::lanes;
use crate::instr::{AtomOp, Lanes, Order, Space, WarpOp};
use crate::types::{Bits, Type};

/// A range of a buffer: buffer, offset, bytes.
pub(super) type Range = (usize, usize, usize);

/// Who accesses: warp, step, lane.
pub(super) type Who = (usize, u32, Option<usize>);

impl Cluster<'_> {
    /// The block and the offset of an address in shared memory; `cluster`: of any block of the cluster.
    pub(super) fn shared_at(
        &self,
        cx: Context<'_>,
        lane: usize,
        address: u32,
        bytes: u32,
        alignment: u32,
        cluster: bool,
    ) -> Result<(usize, u32), Error> {
        let (block, inside) = ((address >> 24) as usize, address & 0xff_ffff);
        let own = self.warps[cx.warp].block;
        let outside = |what: String| {
            let (at, address, bytes) = (self.place(cx, Some(lane)), address as u64, bytes as u64);
            Err(Error::OutOfBounds { at, address, bytes, what })
        };
        if block >= self.blocks.len() || inside < BASE || inside - BASE + bytes > self.device.shared_bytes {
            let (from, size) = (Self::local_address(own, 0), self.device.shared_bytes);
            return outside(format!("the block's shared memory is {size} bytes from {from:#x}"));
        }
        if block != own && !cluster {
            return outside(format!(
                "it is shared memory of block {block} of the cluster, accessed as the own"
            ));
        }
        if self.blocks[block].running == 0 {
            return outside(format!("block {block} of the cluster has ended"));
        }
        if inside % alignment != 0 {
            let (address, alignment) = (address as u64, alignment as u64);
            let (at, what) = (self.place(cx, Some(lane)), self.shared_name(inside - BASE));
            return Err(Error::Misaligned { at, address, alignment, what });
        }
        Ok((block, inside - BASE))
    }

    /// The buffer and the offset of an address in global memory.
    pub(super) fn global_at(
        &self,
        cx: Context<'_>,
        lane: usize,
        address: u64,
        bytes: usize,
        alignment: usize,
    ) -> Result<(usize, usize), Error> {
        let memory = self.device.global.memory;
        let near = memory.near(address).map(|i| (i, &memory.buffers()[i]));
        let found = near.and_then(|(i, buffer)| {
            let offset = usize::try_from(address - buffer.address).ok()?;
            (offset.checked_add(bytes)? <= buffer.bytes).then_some((i, offset))
        });
        let Some((buffer, offset)) = found else {
            let what = match near {
                Some((_, buffer)) => {
                    let beyond = address - buffer.address;
                    format!(
                        "byte {beyond} from the begin of buffer {}, which has {} bytes",
                        buffer.name, buffer.bytes
                    )
                }
                None => "no buffer lies below".to_owned(),
            };
            return Err(Error::OutOfBounds {
                at: self.place(cx, Some(lane)),
                address,
                bytes: bytes as u64,
                what,
            });
        };
        if !address.is_multiple_of(alignment as u64) {
            let what = format!("buffer {}+{offset}", memory.buffers()[buffer].name);
            let (at, alignment) = (self.place(cx, Some(lane)), alignment as u64);
            return Err(Error::Misaligned { at, address, alignment, what });
        }
        Ok((buffer, offset))
    }

    /// Counts an access to global memory, and shows it to the L2 model.
    pub(super) fn count_global(&mut self, (buffer, offset, bytes): Range, write: bool) {
        let traffic = &mut self.counters.buffers[buffer];
        *if write { &mut traffic.written } else { &mut traffic.read } += bytes as u64;
        let global = self.device.global;
        global.touch_l2(buffer, global.memory.buffers()[buffer].address + offset as u64, bytes as u64, write);
    }

    /// Checks the order of an access to global memory.
    fn order_global(&self, (w, step, lane): Who, range: Range, access: global::Access) -> Result<(), Error> {
        let (buffer, offset, bytes) = range;
        self.device.global.order(buffer, offset, bytes, &self.order, access).map_err(|raced| {
            let name = &self.device.global.memory.buffers()[buffer].name;
            Error::Race {
                at: self.place_at(w, step, lane),
                access: if access.write { "write" } else { "read" },
                what: format!("buffer {name}+{offset} (by another block)"),
                other_access: raced.other,
                other: self.site(raced.step),
            }
        })
    }

    pub(super) fn write_global(
        &self,
        who: Who,
        range: Range,
        atomic: bool,
        unordered: bool,
    ) -> Result<(), Error> {
        self.order_global(who, range, global::Access { write: true, atomic, unordered, step: who.1 })
    }

    /// Checks and performs a read of global memory.
    pub(super) fn read_global(
        &mut self,
        who: Who,
        (buffer, offset): (usize, usize),
        out: &mut [u8],
        atomic: bool,
    ) -> Result<(), Error> {
        let range = (buffer, offset, out.len());
        self.count_global(range, false);
        self.order_global(
            who,
            range,
            global::Access { write: false, atomic, unordered: false, step: who.1 },
        )?;
        let storage = &self.device.global.memory.buffers()[buffer];
        if let Some(byte) = storage.unwritten(offset, out.len()) {
            let what = format!("byte {byte} of buffer {}", storage.name);
            return Err(Error::Uninitialised { at: self.place_at(who.0, who.1, who.2), what });
        }
        storage.load(offset, out);
        Ok(())
    }

    pub(super) fn count_wavefronts(&mut self, addresses: &[u32; 32], lanes: u32, bytes: u32) {
        let (all, extra) = wavefronts(addresses, lanes, bytes);
        self.counters.shared.wavefronts += all;
        self.counters.shared.conflicts += extra;
    }

    /// Loads of `count` values of `size` bytes each.
    pub(super) fn load(
        &mut self,
        cx: Context<'_>,
        space: Space,
        size: u32,
        count: usize,
        order: Order,
    ) -> Result<(), Error> {
        let addresses = self.operand(cx, 0)?;
        let (size, total) = (size as usize, size as usize * count);
        if !matches!(size, 2 | 4 | 8) || !matches!(count, 1 | 2 | 4) || total > 16 {
            return Err(self.unsupported(cx, format!("access of {count} values of {size} bytes")));
        }
        let mut results = [[0; 32]; 4];
        let mut data = [0; 16];
        if space == Space::Shared {
            self.count_wavefronts(&addresses.map(|a| a as u32), cx.lanes, total as u32);
        }
        for lane in lanes(cx.lanes) {
            match space {
                Space::Shared => {
                    let bytes = total as u32;
                    let (block, offset) =
                        self.shared_at(cx, lane, addresses[lane] as u32, bytes, bytes, false)?;
                    let access = self.warps[cx.warp].access(lane as u8, cx.step);
                    self.check_shared((cx.warp, cx.step), Some(lane), false, (block, offset, bytes), access)?;
                    let from = offset as usize;
                    data[..total].copy_from_slice(&self.blocks[block].shared.data[from..from + total]);
                }
                Space::Global => {
                    let at = self.global_at(cx, lane, addresses[lane], total, total)?;
                    if order != Order::Weak {
                        let acquires = matches!(order, Order::Acquire | Order::AcqRel);
                        self.device.global.acquire(addresses[lane], &mut self.order, acquires);
                    }
                    let who = (cx.warp, cx.step, Some(lane));
                    self.read_global(who, at, &mut data[..total], order != Order::Weak)?;
                }
            }
            for (i, result) in results.iter_mut().enumerate().take(count) {
                let mut value = [0; 8];
                value[..size].copy_from_slice(&data[i * size..(i + 1) * size]);
                result[lane] = u64::from_le_bytes(value);
            }
        }
        for (i, result) in results.iter().enumerate().take(count) {
            self.set(cx, i, result)?;
        }
        Ok(())
    }

    /// Stores of `count` values of `size` bytes each.
    pub(super) fn store(
        &mut self,
        cx: Context<'_>,
        space: Space,
        size: u32,
        count: usize,
        order: Order,
    ) -> Result<(), Error> {
        let addresses = self.operand(cx, 0)?;
        let (size, total) = (size as usize, size as usize * count);
        if !matches!(size, 2 | 4 | 8) || !matches!(count, 1 | 2 | 4) || total > 16 {
            return Err(self.unsupported(cx, format!("access of {count} values of {size} bytes")));
        }
        let mut values = [[0; 32]; 4];
        for (i, value) in values.iter_mut().enumerate().take(count) {
            *value = self.operand(cx, i + 1)?;
        }
        let mut rows = [[0u8; 16]; 32];
        for lane in lanes(cx.lanes) {
            for i in 0..count {
                rows[lane][i * size..(i + 1) * size].copy_from_slice(&values[i][lane].to_le_bytes()[..size]);
            }
        }
        if space == Space::Shared {
            self.count_wavefronts(&addresses.map(|a| a as u32), cx.lanes, total as u32);
        } else {
            self.distinct(cx, &addresses, &rows, total)?;
        }
        for lane in lanes(cx.lanes) {
            let data = &rows[lane][..total];
            match space {
                Space::Shared => {
                    let bytes = total as u32;
                    let (block, offset) =
                        self.shared_at(cx, lane, addresses[lane] as u32, bytes, bytes, false)?;
                    self.store_shared(cx, lane, block, offset, data)?;
                }
                Space::Global => {
                    let (buffer, offset) = self.global_at(cx, lane, addresses[lane], total, total)?;
                    if order != Order::Weak {
                        let releases = matches!(order, Order::Release | Order::AcqRel);
                        self.device.global.release(addresses[lane], &mut self.order, releases);
                    }
                    let range = (buffer, offset, total);
                    self.write_global((cx.warp, cx.step, Some(lane)), range, order != Order::Weak, false)?;
                    self.count_global(range, true);
                    self.device.global.memory.buffers()[buffer].store(offset, data);
                }
            }
        }
        Ok(())
    }

    fn store_shared(
        &mut self,
        cx: Context<'_>,
        lane: usize,
        block: usize,
        offset: u32,
        data: &[u8],
    ) -> Result<(), Error> {
        let from = offset as usize;
        let bytes = data.len() as u32;
        let warp = &self.warps[cx.warp];
        let accessor = super::shared::Accessor {
            access: warp.access(lane as u8, cx.step),
            issuer: warp.agent,
            clocks: &warp.clocks,
        };
        let shared = &mut self.blocks[block].shared;
        let result = shared.write(offset, bytes, &accessor);
        match result {
            Ok(()) => {}
            // Lanes that store the same value to the same place agree.
            Err(Conflict::AfterWrite(step))
                if step == cx.step && shared.data[from..from + data.len()] == *data => {}
            Err(conflict) => {
                let at = self.place(cx, Some(lane));
                return Err(self.conflict(at, "write", offset, bytes, conflict));
            }
        }
        self.blocks[block].shared.data[from..from + data.len()].copy_from_slice(data);
        Ok(())
    }

    /// Lanes of one store must not write different values to one place.
    fn distinct(
        &self,
        cx: Context<'_>,
        addresses: &Lanes,
        rows: &[[u8; 16]; 32],
        bytes: usize,
    ) -> Result<(), Error> {
        let mut order: Vec<usize> = lanes(cx.lanes).collect();
        if order.is_sorted_by(|&a, &b| addresses[a] < addresses[b]) {
            return Ok(());
        }
        order.sort_by_key(|&lane| addresses[lane]);
        for pair in order.windows(2) {
            let (a, b) = (pair[0], pair[1]);
            // All are multiples of their size: the same address, or no overlap.
            if addresses[a] == addresses[b] && rows[a][..bytes] != rows[b][..bytes] {
                return Err(Error::Race {
                    at: self.place(cx, Some(b)),
                    access: "write",
                    what: format!("global address {:#x} (lane {a} writes another value)", addresses[b]),
                    other_access: "write",
                    other: cx.instr.site,
                });
            }
        }
        Ok(())
    }

    /// `atom` and `red`.
    pub(super) fn atomic(&mut self, cx: Context<'_>, op: WarpOp) -> Result<(), Error> {
        let WarpOp::Atomic { space, op, ty, count, returns, order } = op else { return Ok(()) };
        // Of 64 bits only sums in global memory, whose old value no one asks for.
        let wide = (space, op, ty, count, returns) == (Space::Global, AtomOp::Add, Type::U64, 1, false);
        let narrow = ty.bits() == 32
            && modify(op, ty, 0, 0, 0).is_some()
            && matches!(count, 1 | 2 | 4)
            && (count == 1 || op == AtomOp::Add && space == Space::Global);
        if !wide && !narrow {
            return Err(self.unsupported(cx, format!("atomic {op:?} of {count} {ty}")));
        }
        let addresses = self.operand(cx, 0)?;
        let count = count as usize;
        let mut values = [[0; 32]; 4];
        for (i, value) in values.iter_mut().enumerate().take(cx.instr.src.len().saturating_sub(1)) {
            *value = self.operand(cx, i + 1)?;
        }
        if space == Space::Shared {
            self.count_wavefronts(&addresses.map(|a| a as u32), cx.lanes, 4);
        }
        let mut results = [0; 32];
        for lane in lanes(cx.lanes) {
            let total = ty.bits() as usize / 8 * count;
            let new = |i: usize, old: u32| {
                modify(op, ty, old, values[i][lane] as u32, values[1][lane] as u32).unwrap_or(old)
            };
            match space {
                Space::Shared => {
                    let (block, offset) = self.shared_at(cx, lane, addresses[lane] as u32, 4, 4, false)?;
                    let mut access = self.warps[cx.warp].access(lane as u8, cx.step);
                    access.atomic = true;
                    for write in [false, true] {
                        self.check_shared((cx.warp, cx.step), Some(lane), write, (block, offset, 4), access)?;
                    }
                    let word = &mut self.blocks[block].shared.data[offset as usize..offset as usize + 4];
                    let old = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                    word.copy_from_slice(&new(0, old).to_le_bytes());
                    results[lane] = old as u64;
                }
                Space::Global => {
                    let (buffer, offset) = self.global_at(cx, lane, addresses[lane], total, total)?;
                    let (acquires, releases) = match order {
                        Order::AcqRel => (true, true),
                        Order::Acquire => (true, false),
                        Order::Release => (false, true),
                        Order::Weak | Order::Relaxed => (false, false),
                    };
                    let global = self.device.global;
                    global.acquire(addresses[lane], &mut self.order, acquires);
                    global.release(addresses[lane], &mut self.order, releases);
                    let who = (cx.warp, cx.step, Some(lane));
                    self.read_global(who, (buffer, offset), &mut [0; 16][..total], true)?;
                    self.write_global(who, (buffer, offset, total), true, false)?;
                    self.count_global((buffer, offset, total), true);
                    let storage = &global.memory.buffers()[buffer];
                    if wide {
                        storage.add64(offset, values[0][lane]);
                        continue;
                    }
                    for i in 0..count {
                        results[lane] = storage.update32(offset + 4 * i, |old| new(i, old)) as u64;
                    }
                }
            }
        }
        if returns {
            self.set(cx, 0, &results)?;
        }
        Ok(())
    }
}

/// What a read-modify-write leaves; `None`: there is no such operation.
pub(super) fn modify(op: AtomOp, ty: Type, old: u32, a: u32, b: u32) -> Option<u32> {
    let add16 = |f: fn(u16, u16) -> u16| {
        let [x, y] = [<[u16; 2]>::from_bits64(old as u64), <[u16; 2]>::from_bits64(a as u64)];
        [f(x[0], y[0]), f(x[1], y[1])].to_bits64() as u32
    };
    Some(match (op, ty) {
        (AtomOp::Exch, _) => a,
        (AtomOp::Cas, _) if old == a => b,
        (AtomOp::Cas, _) => old,
        (AtomOp::Add, Type::F32) => (f32::from_bits(old) + f32::from_bits(a)).to_bits(),
        (AtomOp::Add, Type::F16x2) => add16(|x, y| (f16::from_bits(x) + f16::from_bits(y)).to_bits()),
        (AtomOp::Add, Type::BF16x2) => add16(|x, y| (bf16::from_bits(x) + bf16::from_bits(y)).to_bits()),
        (AtomOp::Add, Type::U32 | Type::S32 | Type::B32) => old.wrapping_add(a),
        (AtomOp::Min, Type::U32 | Type::B32) => old.min(a),
        (AtomOp::Max, Type::U32 | Type::B32) => old.max(a),
        (AtomOp::Min, Type::S32) => (old as i32).min(a as i32) as u32,
        (AtomOp::Max, Type::S32) => (old as i32).max(a as i32) as u32,
        (AtomOp::Inc, Type::U32 | Type::B32) => {
            if old >= a {
                0
            } else {
                old + 1
            }
        }
        _ => return None,
    })
}
