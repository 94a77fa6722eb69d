//! Dispatch of instructions that touch more than their lane, and the small ones among them.

use super::cluster::{Cluster, Context, Flow, Value};
use super::error::Error;
use super::tma::Direction;
use super::warp::{Awaited, lanes};
use crate::instr::{AtomOp, Lanes, Shuffle, SpecialRegister, WarpOp};

/// Where tensor-map parameters lie: no address of global memory.
pub(super) const PARAMETERS: u64 = 0x10_0000_0000;

impl<'a> Cluster<'a> {
    pub(super) fn warp_op(&mut self, cx: Context<'a>, op: WarpOp) -> Result<Flow, Error> {
        use WarpOp as W;
        match op {
            W::Special(register) => {
                let values = self.special(cx, register);
                self.set(cx, 0, &values)?;
            }
            W::Param | W::ParamAddress => self.parameter(cx, op == W::ParamAddress)?,
            W::SharedBase => {
                let base = Self::local_address(self.warps[cx.warp].block, 0);
                self.set(cx, 0, &[base as u64; 32])?;
            }
            W::Load { space, bits, count, order } => {
                self.load(cx, space, bits as u32 / 8, count as usize, order)?
            }
            W::Store { space, bits, count, order } => {
                self.store(cx, space, bits as u32 / 8, count as usize, order)?
            }
            W::Atomic { .. } => self.atomic(cx, op)?,
            W::CpAsync => self.cp_async(cx)?,
            W::CpAsyncCommit => self.warps[cx.warp].copies.commit(cx.lanes),
            W::CpAsyncWait(groups) => return self.cp_async_wait(cx, groups as u32),
            W::CpAsyncMbarrierArrive => return self.cp_async_arrive(cx),
            W::Ldmatrix { count, transpose } => self.ldmatrix(cx, count as usize, transpose)?,
            W::Stmatrix { count, transpose } => self.stmatrix(cx, count as usize, transpose)?,
            W::Mma { k, a, b, d } => self.mma(cx, k as usize, a, b, d)?,
            W::Shuffle(mode) => self.shuffle(cx, mode)?,
            W::VoteAny | W::VoteAll | W::Ballot => self.vote(cx, op)?,
            W::Redux(op) => self.redux(cx, op)?,
            W::Elect => {
                self.members(cx, 0)?;
                let mut values = [0; 32];
                values[cx.lanes.trailing_zeros() as usize] = 1;
                self.set(cx, 0, &values)?;
            }
            W::BarSync => return self.bar(cx, true),
            W::BarArrive => return self.bar(cx, false),
            W::BarWarp => self.members(cx, 0)?,
            W::MbarrierInit => return self.mbarrier_init(cx),
            W::MbarrierInval => return self.mbarrier_inval(cx),
            W::MbarrierArrive => return self.mbarrier_arrive(cx, false, None, true),
            W::MbarrierArriveRemote => return self.mbarrier_arrive(cx, true, None, true),
            W::MbarrierArriveExpectTx => return self.mbarrier_arrive(cx, false, Some(1), true),
            W::MbarrierExpectTx => return self.mbarrier_arrive(cx, false, Some(1), false),
            W::MbarrierTryWait => return self.mbarrier_wait(cx, false),
            W::MbarrierWait => return self.mbarrier_wait(cx, true),
            // Global memory's order is checked by releases and acquires alone.
            W::FenceProxyAsync => {
                self.fence_mbarriers(cx.warp);
                self.warps[cx.warp].proxy_fence();
            }
            W::FenceMbarrierInit => self.fence_mbarriers(cx.warp),
            W::FenceAcqRel => self.order.fence(),
            W::TmaLoad { dims, multicast, .. } => self.tma_load(cx, dims as usize, multicast)?,
            W::TmaStore { dims } => self.tma_store(cx, dims as usize, Direction::Store)?,
            W::TmaReduceAdd { dims } => self.tma_store(cx, dims as usize, Direction::ReduceAdd)?,
            W::TmaPrefetch { dims } => self.tma_prefetch(cx, dims as usize)?,
            W::PrefetchTensorMap => {
                let address = self.uniform(cx, 0)?;
                self.map(cx, address)?;
            }
            W::BulkLoad => self.bulk_load(cx)?,
            W::BulkStore => self.bulk_store(cx, Direction::Store)?,
            W::BulkReduceAddF32 => self.bulk_store(cx, Direction::ReduceAdd)?,
            W::BulkToCluster => self.bulk_to_cluster(cx)?,
            W::BulkCommit => self.warps[cx.warp].bulk.commit(cx.lanes),
            W::BulkWait { groups, read } => return self.bulk_wait(cx, groups as u32, read),
            W::Wgmma(shape) => self.wgmma(cx, shape)?,
            W::WgmmaFence => {
                let registers = &mut self.warps[cx.warp].registers;
                registers.fence = Some(registers.sequence);
            }
            W::WgmmaCommit => {
                let warp = &mut self.warps[cx.warp];
                warp.groups += 1;
                warp.uncommitted = false;
            }
            W::WgmmaWait(groups) => self.wgmma_wait(cx, groups as u32),
            W::SetMaxNReg { increase, registers } => return self.set_max_registers(cx, increase, registers),
            W::ClusterArrive { release } => return self.cluster_arrive(cx, release),
            W::ClusterWait => return self.cluster_wait(cx),
            W::Mapa => {
                let (addresses, ranks) = (self.operand(cx, 0)?, self.operand(cx, 1)?);
                let mut values = [0; 32];
                for lane in lanes(cx.lanes) {
                    let blocks = self.blocks.len();
                    if ranks[lane] >= blocks as u64 {
                        let problem = format!("mapa to block {} of a cluster of {blocks}", ranks[lane]);
                        return Err(self.unsupported(cx, problem));
                    }
                    values[lane] = addresses[lane] & 0xff_ffff | ranks[lane] << 24;
                }
                self.set(cx, 0, &values)?;
            }
            W::CreatePolicy => self.set(cx, 0, &[0; 32])?,
            W::GridDepWait | W::GridDepLaunch => {}
            W::Nanosleep => return Ok(Flow::Yield),
            W::Trap => return Err(Error::Trap { at: self.place(cx, None) }),
        }
        Ok(Flow::Next)
    }

    fn special(&self, cx: Context<'a>, register: SpecialRegister) -> Lanes {
        use SpecialRegister::*;
        let kernel = self.device.program.kernel;
        let warp = &self.warps[cx.warp];
        let (grid, block) = (self.device.grid, self.blocks[warp.block].index);
        let axis = |values: [u32; 3], d: u8| values.get(d as usize).copied().unwrap_or(0) as u64;
        let cluster = |of: [u32; 3]| std::array::from_fn(|d| of[d] / kernel.cluster[d].max(1));
        let value = match register {
            Tid(d) => {
                let [x, y, _] = kernel.block;
                return std::array::from_fn(|lane| {
                    let thread = 32 * warp.index + lane as u32;
                    axis([thread % x, thread / x % y, thread / x / y], d)
                });
            }
            Laneid => return std::array::from_fn(|lane| lane as u64),
            Ntid(d) => axis(kernel.block, d),
            Ctaid(d) => axis(block, d),
            Nctaid(d) => axis(grid, d),
            ClusterCtarank => warp.block as u64,
            Clusterid(d) => axis(cluster(block), d),
            Nclusterid(d) => axis(cluster(grid), d),
            Smid => (self.id as u64 * self.blocks.len() as u64 + warp.block as u64) % 132,
            Globaltimer | Clock64 => self.time,
        };
        [value; 32]
    }

    fn parameter(&mut self, cx: Context<'a>, address: bool) -> Result<(), Error> {
        let index = self.uniform(cx, 0)?;
        let value = match (self.device.args.get(index as usize), address) {
            (Some(Value::Bits(bits)), false) => *bits,
            (Some(Value::Map { .. }), true) => PARAMETERS + 128 * index,
            _ => {
                return Err(
                    self.unsupported(cx, format!("parameter {index} is not there, or of another kind"))
                );
            }
        };
        self.set(cx, 0, &[value; 32])
    }

    /// Checks a member mask: exactly the lanes that execute.
    fn members(&self, cx: Context<'a>, operand: usize) -> Result<(), Error> {
        let mask = self.uniform(cx, operand)? as u32;
        let needed = mask & self.warps[cx.warp].live;
        if needed != cx.lanes { Err(self.divergent(cx, needed)) } else { Ok(()) }
    }

    fn shuffle(&mut self, cx: Context<'a>, mode: Shuffle) -> Result<(), Error> {
        self.members(cx, 3)?;
        let [values, by, clamp] = [self.operand(cx, 0)?, self.operand(cx, 1)?, self.operand(cx, 2)?];
        let mut results = [0; 32];
        for lane in lanes(cx.lanes) {
            let (segment, clamp) = ((clamp[lane] >> 8 & 31) as i32, (clamp[lane] & 31) as i32);
            let (own, by) = (lane as i32, (by[lane] & 31) as i32);
            let most = own & segment | clamp & !segment;
            let (from, valid) = match mode {
                Shuffle::Up => (own - by, own - by >= most),
                Shuffle::Down => (own + by, own + by <= most),
                Shuffle::Bfly => (own ^ by, own ^ by <= most),
                Shuffle::Idx => {
                    let from = own & segment | by & !segment;
                    (from, from <= most)
                }
            };
            let from = if valid { from as usize } else { lane };
            if cx.lanes >> from & 1 == 0 {
                let problem =
                    format!("shfl: lane {lane} takes the value of lane {from}, which does not execute it");
                return Err(self.unsupported(cx, problem));
            }
            results[lane] = values[from];
        }
        self.set(cx, 0, &results)
    }

    fn vote(&mut self, cx: Context<'a>, op: WarpOp) -> Result<(), Error> {
        self.members(cx, 1)?;
        let values = self.operand(cx, 0)?;
        let ballot = lanes(cx.lanes).fold(0u32, |mask, lane| mask | ((values[lane] & 1) as u32) << lane);
        let value = match op {
            WarpOp::VoteAny => (ballot != 0) as u64,
            WarpOp::VoteAll => (ballot == cx.lanes) as u64,
            _ => ballot as u64,
        };
        self.set(cx, 0, &[value; 32])
    }

    fn redux(&mut self, cx: Context<'a>, op: AtomOp) -> Result<(), Error> {
        self.members(cx, 1)?;
        let values = self.operand(cx, 0)?;
        let values = lanes(cx.lanes).map(|lane| values[lane] as u32);
        let value = match op {
            AtomOp::Add => values.reduce(u32::wrapping_add),
            AtomOp::Min => values.min(),
            AtomOp::Max => values.max(),
            _ => return Err(self.unsupported(cx, format!("redux of {op:?}"))),
        };
        self.set(cx, 0, &[value.unwrap_or(0) as u64; 32])
    }

    fn cp_async_wait(&mut self, cx: Context<'a>, groups: u32) -> Result<Flow, Error> {
        let own = self.warps.len() as u16;
        let warp = &mut self.warps[cx.warp];
        if warp.copies.wait(cx.lanes, groups, false).is_none() {
            return Ok(Flow::Retry(Awaited::Copies));
        }
        warp.clocks.seen.learn(2 * own + warp.agent, warp.copies.read_up_to());
        Ok(Flow::Next)
    }

    fn bulk_wait(&mut self, cx: Context<'a>, groups: u32, read: bool) -> Result<Flow, Error> {
        let own = self.warps.len() as u16;
        let warp = &mut self.warps[cx.warp];
        let Some(finished) = warp.bulk.wait(cx.lanes, groups, read) else {
            return Ok(Flow::Retry(Awaited::BulkCopies));
        };
        warp.clocks.seen.learn(3 * own + warp.agent, warp.bulk.read_up_to());
        for copy in finished {
            // From here on what it wrote can be released to other blocks.
            for (buffer, offset, bytes) in copy.rows {
                self.device.global.settle(buffer, offset, bytes, &self.order);
            }
        }
        Ok(Flow::Next)
    }
}
