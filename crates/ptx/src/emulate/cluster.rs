//! A cluster of blocks while it runs: its scheduler, control flow, and the dispatch of instructions.
//!
//! Warps are state machines. A turn picks a warp that can run, by the seed, and lets it execute some instructions, again
//! by the seed; so other seeds are other interleavings, and asynchronous copies complete at other times. Time is the
//! number of instructions executed.

use std::collections::BinaryHeap;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::INSTRUCTION_BUDGET;
use super::asynchronous::Pending;
use super::barrier::{Barrier, launch_registers};
use super::clocks::Clocks;
use super::error::Error;
use super::global::{Global, Order};
use super::mbarrier::Mbarrier;
use super::program::{Code, Program, Step};
use super::report::Counters;
use super::shared::Shared;
use super::warp::{Awaited, Frame, Wait, Warp, lanes};
use crate::instr::{Instr, Lanes, Operand, RegId, Semantics};
use crate::kernel::TensorMap;

/// An argument as the kernel sees it.
pub(super) enum Value {
    Bits(u64),
    Map { map: TensorMap, address: u64, buffer: usize },
}

/// What all clusters of a launch share.
pub(super) struct Device<'a> {
    pub program: &'a Program<'a>,
    pub args: &'a [Value],
    pub grid: [u32; 3],
    pub shared_bytes: u32,
    pub seed: u64,
    pub global: &'a Global<'a>,
}

/// A block: what its warps share.
pub(super) struct Block {
    pub index: [u32; 3],
    pub shared: Shared,
    pub barriers: Vec<Barrier>,
    /// By offset in shared memory.
    pub mbarriers: std::collections::BTreeMap<u32, Mbarrier>,
    /// Uses of its shared memory from outside that it must know to be over before it ends: agent, event, step.
    pub uses: Vec<(u16, u32, u32)>,
    /// Warps that have not ended.
    pub running: usize,
}

/// An instruction being executed.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    /// The warp, by index in the cluster.
    pub warp: usize,
    pub step: u32,
    pub instr: &'a Instr,
    /// Lanes that execute it.
    pub lanes: u32,
}

/// How a warp goes on after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// With the next step.
    Next,
    /// With the next step, when others have had a turn.
    Yield,
    /// With the next step, once no longer waiting.
    Wait,
    /// With the same step, once something has happened.
    Retry(Awaited),
}

/// A running cluster.
pub(super) struct Cluster<'a> {
    pub device: &'a Device<'a>,
    pub id: u32,
    pub blocks: Vec<Block>,
    pub warps: Vec<Warp>,
    /// What arrivals at the cluster's barrier have released, and what its last phase did.
    pub barrier: [Clocks; 2],
    pub pending: BinaryHeap<Pending<'a>>,
    pub issued: u64,
    pub agents: u16,
    pub time: u64,
    /// Counts what may let a waiting warp go on.
    pub events: u64,
    pub rng: SmallRng,
    pub order: Order,
    pub counters: Counters,
}

impl<'a> Cluster<'a> {
    pub(super) fn new(device: &'a Device<'a>, id: u32) -> Self {
        let kernel = device.program.kernel;
        let clusters: [u32; 3] = std::array::from_fn(|d| device.grid[d] / kernel.cluster[d]);
        let [cx, cy, _] = clusters;
        let at = [id % cx, id / cx % cy, id / cx / cy];
        let warps_per_block = kernel.threads().div_ceil(32);
        let (mut blocks, mut warps) = (Vec::new(), Vec::new());
        for rank in 0..kernel.cluster_blocks() {
            let [rx, ry, _] = kernel.cluster;
            let inside = [rank % rx, rank / rx % ry, rank / rx / ry];
            blocks.push(Block {
                index: std::array::from_fn(|d| at[d] * kernel.cluster[d] + inside[d]),
                shared: Shared::new(device.shared_bytes),
                barriers: vec![Barrier::default(); 16],
                mbarriers: Default::default(),
                uses: Vec::new(),
                running: warps_per_block as usize,
            });
            for index in 0..warps_per_block {
                let threads = (kernel.threads() - 32 * index).min(32);
                let live = if threads == 32 { u32::MAX } else { (1 << threads) - 1 };
                warps.push(Warp::new(rank as usize, index, warps.len() as u16, live, kernel.registers.len()));
            }
        }
        let registers = launch_registers(kernel);
        warps.iter_mut().for_each(|warp| warp.max_registers = registers);
        Cluster {
            device,
            id,
            agents: 4 * warps.len() as u16,
            blocks,
            warps,
            barrier: Default::default(),
            pending: BinaryHeap::new(),
            issued: 0,
            time: 0,
            events: 0,
            // Neighbouring clusters and seeds must not share a sequence: spread them by an odd constant.
            rng: SmallRng::seed_from_u64(
                device.seed.wrapping_add((id as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            ),
            order: Order::new(id),
            counters: Counters::new(device.global.memory.buffers().len()),
        }
    }

    /// Runs so many turns, or to the end: then true.
    pub(super) fn advance(&mut self, turns: u64) -> Result<bool, Error> {
        let mut ready = Vec::with_capacity(self.warps.len());
        for _ in 0..turns {
            self.complete_due()?;
            ready.clear();
            let events = self.events;
            ready.extend(self.warps.iter().enumerate().filter_map(|(w, warp)| {
                let can = match warp.wait {
                    Wait::Ready => true,
                    Wait::Event { since, .. } => events > since,
                    Wait::Barrier(_) | Wait::Cluster => false,
                };
                (can && !warp.done).then_some(w)
            }));
            if ready.is_empty() {
                if let Some(next) = self.pending.peek() {
                    // Nothing to do but wait for a copy.
                    self.time = self.time.max(next.due);
                    continue;
                }
                if self.warps.iter().all(|warp| warp.done) {
                    return Ok(true);
                }
                return Err(self.deadlock());
            }
            let warp = ready[self.rng.random_range(0..ready.len())];
            let most = 1u32 << self.rng.random_range(0..9);
            for _ in 0..self.rng.random_range(1..=most) {
                if !self.step(warp)? {
                    break;
                }
            }
        }
        Ok(false)
    }

    /// One step of a warp; false: another warp's turn.
    fn step(&mut self, w: usize) -> Result<bool, Error> {
        let program = self.device.program;
        let warp = &mut self.warps[w];
        let Some(step) = program.steps.get(warp.pc) else {
            self.end(w)?;
            return Ok(false);
        };
        self.time += 1;
        warp.executed += 1;
        let at = warp.pc;
        if warp.executed > INSTRUCTION_BUDGET {
            let at = self.place_at(w, at as u32, None);
            return Err(Error::Budget { at, instructions: INSTRUCTION_BUDGET });
        }
        match step {
            Step::Instr(code) => {
                let again = matches!(warp.wait, Wait::Event { .. });
                let since = self.events;
                let flow = self.instruction(w, at as u32, code, again)?;
                let warp = &mut self.warps[w];
                if let Flow::Retry(what) = flow {
                    warp.wait = Wait::Event { since, what };
                    return Ok(false);
                }
                if again {
                    warp.wait = Wait::Ready;
                }
                warp.satisfied = 0;
                warp.pc = at + 1;
                return Ok(flow == Flow::Next);
            }
            Step::If { predicate, value, next } => {
                let taken = self.predicate(w, at as u32, *predicate, *value)?;
                let warp = &mut self.warps[w];
                warp.frames.push(Frame::If { all: warp.active, other: warp.active & !taken, next: *next });
                warp.active = taken;
            }
            Step::Else { end } => {
                if let Some(Frame::If { other, next, .. }) = warp.frames.last_mut() {
                    warp.active = std::mem::take(other);
                    *next = *end;
                }
            }
            Step::EndIf => {
                if let Some(Frame::If { all, .. }) = warp.frames.pop() {
                    warp.active = all;
                }
            }
            Step::Loop { end } => warp.frames.push(Frame::Loop { all: warp.active, next: *end }),
            Step::BreakIf { predicate, value } => {
                let leaving = self.predicate(w, at as u32, *predicate, *value)?;
                let warp = &mut self.warps[w];
                warp.active &= !leaving;
                // Branches inside the loop must not bring them back.
                for frame in warp.frames.iter_mut().rev() {
                    match frame {
                        Frame::If { all, .. } => *all &= !leaving,
                        Frame::Loop { .. } => break,
                    }
                }
            }
            Step::EndLoop { begin } => {
                if warp.active != 0 {
                    warp.pc = begin + 1;
                    return Ok(true);
                }
                if let Some(Frame::Loop { all, .. }) = warp.frames.pop() {
                    warp.active = all;
                }
            }
        }
        // With no lane left here, go on where the innermost branch or loop turns.
        let warp = &mut self.warps[w];
        warp.pc = match warp.frames.last() {
            Some(&(Frame::If { next, .. } | Frame::Loop { next, .. })) if warp.active == 0 => next,
            _ => at + 1,
        };
        Ok(true)
    }

    /// Active lanes in which a predicate has this value.
    fn predicate(&mut self, w: usize, step: u32, id: RegId, value: bool) -> Result<u32, Error> {
        let warp = &self.warps[w];
        let values = match warp.registers.read(id, warp.active) {
            Ok(values) => values,
            Err(fault) => return Err(self.fault(w, step, fault)),
        };
        let mask =
            values.iter().enumerate().fold(0u32, |mask, (lane, &bits)| mask | ((bits & 1) as u32) << lane);
        Ok(if value { mask } else { !mask } & warp.active)
    }

    fn instruction(&mut self, w: usize, step: u32, code: &Code<'a>, again: bool) -> Result<Flow, Error> {
        let instr = code.instr;
        if !again {
            self.counters.classes[instr.row.class as usize] += 1;
        }
        let lanes = match instr.guard {
            None => self.warps[w].active,
            Some((id, value)) => self.predicate(w, step, id, value)?,
        };
        if lanes == 0 {
            return Ok(Flow::Next);
        }
        let context = Context { warp: w, step, instr, lanes };
        let warp = &mut self.warps[w];
        if code.aligned && lanes != warp.live {
            let needed = warp.live;
            return Err(self.divergent(context, needed));
        }
        warp.sync += code.synchronises as u32;
        warp.registers.sequence += 1;
        match instr.row.semantics {
            Semantics::Warp(op) => self.warp_op(context, op),
            Semantics::Lane(f) => {
                let (mut operands, mut results) = ([[0; 32]; 4], [[0; 32]; 2]);
                let (read, written) = (instr.src.len().min(4), instr.dst.len().min(2));
                for (i, operand) in operands[..read].iter_mut().enumerate() {
                    *operand = self.operand(context, i)?;
                }
                f(&mut results[..written], &operands[..read]);
                for (i, result) in results[..written].iter().enumerate() {
                    self.set(context, i, result)?;
                }
                Ok(Flow::Next)
            }
        }
    }

    /// Values of a source operand; an address has its offset added.
    pub(super) fn operand(&self, cx: Context<'_>, i: usize) -> Result<Lanes, Error> {
        match cx.instr.src.get(i) {
            None => Err(self.unsupported(cx, format!("{} has no operand {i}", cx.instr.row.name()))),
            Some(&Operand::Imm(bits, _)) => Ok([bits; 32]),
            Some(&(Operand::Reg(id) | Operand::Address(id, 0))) => self.register(cx, id).copied(),
            Some(&Operand::Address(id, offset)) => {
                // 32-bit addresses wrap as such.
                let mask = match self.device.program.kernel.registers[id.0 as usize].ty.bits() {
                    64 => u64::MAX,
                    _ => u32::MAX as u64,
                };
                Ok(self.register(cx, id)?.map(|base| base.wrapping_add(offset as i64 as u64) & mask))
            }
        }
    }

    fn register(&self, cx: Context<'_>, id: RegId) -> Result<&Lanes, Error> {
        self.warps[cx.warp].registers.read(id, cx.lanes).map_err(|fault| self.fault(cx.warp, cx.step, fault))
    }

    /// A source operand that must be the same in all lanes.
    pub(super) fn uniform(&self, cx: Context<'_>, i: usize) -> Result<u64, Error> {
        let values = self.operand(cx, i)?;
        let first = cx.lanes.trailing_zeros() as usize;
        if let Some(lane) = lanes(cx.lanes).find(|&lane| values[lane] != values[first]) {
            let problem = format!(
                "operand {i} of {} must be the same in all lanes: lane {first} has {}, lane {lane} has {}",
                cx.instr.row.name(),
                values[first],
                values[lane]
            );
            return Err(Error::Unsupported { at: self.place(cx, None), problem });
        }
        Ok(values[first])
    }

    /// Writes a result in the lanes that execute.
    pub(super) fn set(&mut self, cx: Context<'_>, i: usize, values: &Lanes) -> Result<(), Error> {
        let Some(&id) = cx.instr.dst.get(i) else {
            return Err(self.unsupported(cx, format!("{} has no result {i}", cx.instr.row.name())));
        };
        let result = self.warps[cx.warp].registers.write(id, cx.lanes, values);
        result.map_err(|fault| self.fault(cx.warp, cx.step, fault))
    }
}
