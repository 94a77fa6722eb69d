//! How a warp ends, what must be done by then, and how errors name what they are about.

use super::barrier::Arrival;
use super::clocks::Clock;
use super::cluster::{Cluster, Context};
use super::error::{Error, Place};
use super::mbarrier::Mbarrier;
use super::shared::{Access, Accessor, BASE, Conflict};
use super::warp::{Awaited, Fault, FaultKind, Wait};
use crate::instr::Site;

impl Cluster<'_> {
    /// The warp has come to the end of the program.
    pub(super) fn end(&mut self, w: usize) -> Result<(), Error> {
        let warp = &mut self.warps[w];
        warp.done = true;
        let block = warp.block;
        self.blocks[block].running -= 1;
        // Ended warps are not waited for.
        self.cluster_release();
        if self.blocks[block].running == 0 {
            self.check_exit(block)?;
        }
        Ok(())
    }

    fn check_exit(&mut self, block: usize) -> Result<(), Error> {
        let program = self.device.program;
        let pending = |problem: String| Error::PendingAtExit {
            kernel: program.kernel.name.clone(),
            block: self.blocks[block].index,
            problem,
        };
        for group in self.warps.iter().filter(|warp| warp.block == block).collect::<Vec<_>>().chunks(4) {
            let first = group[0];
            if let Some(other) =
                group.iter().find(|w| (w.products, w.products_hash) != (first.products, first.products_hash))
            {
                return Err(pending(format!(
                    "warps {} and {} of a warpgroup did not execute the same wgmma ({} and {} of them)",
                    first.index, other.index, first.products, other.products
                )));
            }
            for warp in group {
                if warp.registers.completed < warp.groups || warp.uncommitted {
                    return Err(pending(format!("warp {} has not waited for its last wgmma", warp.index)));
                }
                if let Some(copy) = warp.bulk.copies.iter().find(|copy| copy.unread != 0) {
                    let site = program.sites[copy.step as usize];
                    let what = "has not waited until the bulk copy has read shared memory, issued at";
                    return Err(pending(format!("warp {} {what} {site}", warp.index)));
                }
            }
        }
        // What all its warps together know is over.
        let mut known = Clock::default();
        self.warps.iter().filter(|warp| warp.block == block).for_each(|warp| known.join(&warp.clocks.seen));
        if let Some(&(.., step)) =
            self.blocks[block].uses.iter().find(|&&(agent, event, _)| known.get(agent) < event)
        {
            let site = program.sites[step as usize];
            return Err(pending(format!(
                "its shared memory is used at {site} with no synchronisation after that"
            )));
        }
        for (&offset, mbarrier) in &self.blocks[block].mbarriers {
            if let Some(problem) = mbarrier.unfinished() {
                return Err(pending(format!("{} {problem}", self.shared_name(offset))));
            }
        }
        for w in 0..self.warps.len() {
            let warp = &self.warps[w];
            if let Some(copy) = warp.copies.copies.front().filter(|_| warp.block == block) {
                let site = program.sites[copy.step as usize];
                self.counters.warn(format!("{site}: cp.async that is not waited for before the block ends"));
            }
        }
        Ok(())
    }

    pub(super) fn deadlock(&self) -> Error {
        let waits = self.warps.iter().enumerate().filter(|(_, warp)| !warp.done).map(|(w, warp)| {
            // A barrier's waiter stands behind it.
            let at =
                if matches!(warp.wait, Wait::Event { .. }) { warp.pc } else { warp.pc.saturating_sub(1) };
            format!("{} waits for {}", self.place_at(w, at as u32, None), self.awaited(w))
        });
        Error::Deadlock { kernel: self.device.program.kernel.name.clone(), waits: waits.collect() }
    }

    fn awaited(&self, w: usize) -> String {
        let warp = &self.warps[w];
        match warp.wait {
            Wait::Ready => "its turn".to_owned(),
            Wait::Barrier(id) => {
                let barrier = &self.blocks[warp.block].barriers[id as usize];
                format!("barrier {id}: {} of {} threads have arrived", barrier.arrived, barrier.expected)
            }
            Wait::Cluster => format!(
                "the cluster's barrier: {} of {} warps have arrived or ended",
                self.warps.iter().filter(|warp| warp.done || warp.cluster == Arrival::Arrived).count(),
                self.warps.len()
            ),
            Wait::Event { what: Awaited::Mbarrier { block, offset, parity }, .. } => {
                let state =
                    self.blocks[block].mbarriers.get(&offset).map(Mbarrier::to_string).unwrap_or_default();
                format!("{}, parity {parity}: {state}", self.shared_name(offset))
            }
            Wait::Event { what: Awaited::Copies, .. } => "its cp.async".to_owned(),
            Wait::Event { what: Awaited::BulkCopies, .. } => "its bulk copies".to_owned(),
            Wait::Event { what: Awaited::Registers(count), .. } => {
                format!("setmaxnreg.inc to {count} registers, more than the other warps leave")
            }
        }
    }

    pub(super) fn site(&self, step: u32) -> Site {
        self.device.program.sites[step as usize]
    }

    pub(super) fn place_at(&self, w: usize, step: u32, lane: Option<usize>) -> Box<Place> {
        let warp = &self.warps[w];
        Box::new(Place {
            kernel: self.device.program.kernel.name.clone(),
            block: self.blocks[warp.block].index,
            warp: warp.index,
            lane: lane.map(|lane| lane as u32),
            site: self.site(step),
        })
    }

    pub(super) fn place(&self, cx: Context<'_>, lane: Option<usize>) -> Box<Place> {
        self.place_at(cx.warp, cx.step, lane)
    }

    pub(super) fn unsupported(&self, cx: Context<'_>, problem: String) -> Error {
        Error::Unsupported { at: self.place(cx, None), problem }
    }

    pub(super) fn misuse(&self, cx: Context<'_>, problem: String) -> Error {
        Error::BarrierMisuse { at: self.place(cx, None), problem }
    }

    pub(super) fn divergent(&self, cx: Context<'_>, needed: u32) -> Error {
        let instruction = cx.instr.row.name().to_owned();
        Error::DivergentAligned { at: self.place(cx, None), instruction, active: cx.lanes, needed }
    }

    pub(super) fn fault(&self, w: usize, step: u32, fault: Fault) -> Error {
        let register = &self.device.program.kernel.registers[fault.register.0 as usize];
        let at = self.place_at(w, step, fault.lane.map(|lane| lane as usize));
        match fault.kind {
            FaultKind::Undefined => {
                let what = format!("the {} register made at {}", register.ty, register.site);
                Error::Uninitialised { at, what }
            }
            FaultKind::InFlight(problem) => Error::InFlight { at, register: register.site, problem },
        }
    }

    /// The region of shared memory that contains an offset, and where in it.
    pub(super) fn shared_name(&self, offset: u32) -> String {
        let regions = &self.device.program.kernel.shared;
        match regions.iter().find(|region| {
            (region.offset..region.offset.saturating_add(region.bytes.max(1))).contains(&offset)
        }) {
            Some(region) => format!("shared {}+{}", region.name, offset - region.offset),
            None => format!("shared memory+{offset}"),
        }
    }

    pub(super) fn conflict(
        &self,
        at: Box<Place>,
        access: &'static str,
        offset: u32,
        bytes: u32,
        conflict: Conflict,
    ) -> Error {
        let what = self.shared_name(offset);
        match conflict {
            Conflict::AfterWrite(step) => {
                Error::Race { at, access, what, other_access: "write", other: self.site(step) }
            }
            Conflict::AfterRead(step) => {
                Error::Race { at, access, what, other_access: "read", other: self.site(step) }
            }
            Conflict::Fence(step) => Error::MissingProxyFence { at, what, other: self.site(step) },
            Conflict::Uninitialised => Error::Uninitialised { at, what },
            Conflict::Mbarrier => {
                Error::BarrierMisuse { at, problem: format!("{access} of {what}, where an mbarrier is") }
            }
            Conflict::Bounds => {
                // A descriptor may lie before the first byte.
                let (address, bytes) = (offset.wrapping_add(BASE) as u64, bytes as u64);
                let what = format!("the block has {} bytes of shared memory", self.device.shared_bytes);
                Error::OutOfBounds { at, address, bytes, what }
            }
        }
    }

    /// Checks a read of shared memory by lanes of a warp, or through the asynchronous proxy.
    pub(super) fn check_shared(
        &mut self,
        (w, step): (usize, u32),
        lane: Option<usize>,
        write: bool,
        (block, offset, bytes): (usize, u32, u32),
        access: Access,
    ) -> Result<(), Error> {
        let warp = &self.warps[w];
        let accessor = Accessor { access, issuer: warp.agent, clocks: &warp.clocks };
        let shared = &mut self.blocks[block].shared;
        let result = if write {
            shared.write(offset, bytes, &accessor)
        } else {
            shared.read(offset, bytes, &accessor)
        };
        result.map_err(|conflict| {
            let name = if write { "write" } else { "read" };
            self.conflict(self.place_at(w, step, lane), name, offset, bytes, conflict)
        })
    }
}
