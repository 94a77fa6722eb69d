//! Registers of a `wgmma` belong to it from its issue until a wait that covers its group.
//!
//! Along the program: `wgmma` puts its accumulators and A registers into the open group, commit closes the group,
//! `wait_group N` frees all closed groups but the newest N. Branches are merged, loops walked until nothing changes. Any
//! other access to a register makes it *stale*: before the next `wgmma` that has it stands a fence.

use std::collections::{BTreeMap, HashSet};

use super::{Node, Report, Rule, Set, describe, name};
use crate::instr::{Instr, RegId, Semantics, Site, WarpOp, WgmmaShape};
use crate::kernel::Kernel;

/// The part that a register plays in a `wgmma` in flight.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Read as A.
    A,
    /// One of these accumulators ([`Walk::tiles`]).
    Accumulator(usize),
    /// One or another, by the path taken.
    Mixed,
}

/// Registers in flight, each with its role and the `wgmma` that has it.
type Flight = BTreeMap<RegId, (Role, Site)>;

#[derive(Clone)]
struct State {
    /// Accessed since the last fence; at the begin all are, since a fence goes before the first `wgmma`.
    stale: Set,
    /// Groups in flight: the open one, then closed ones from the newest.
    groups: Vec<Flight>,
}

impl State {
    fn merge(&mut self, other: &State) -> bool {
        let before = self.stale.clone();
        self.stale.extend(&other.stale);
        let mut changed = self.stale != before;
        if self.groups.len() < other.groups.len() {
            self.groups.resize(other.groups.len(), Flight::new());
        }
        for (group, other) in self.groups.iter_mut().zip(&other.groups) {
            for (&id, &(role, site)) in other {
                let entry = group.entry(id).or_insert_with(|| {
                    changed = true;
                    (role, site)
                });
                if entry.0 != role && entry.0 != Role::Mixed {
                    entry.0 = Role::Mixed;
                    changed = true;
                }
            }
        }
        changed
    }

    fn role(&self, id: RegId) -> Option<(Role, Site, bool)> {
        let mut groups = self.groups.iter().enumerate();
        groups.find_map(|(i, group)| group.get(&id).map(|&(role, site)| (role, site, i == 0)))
    }
}

pub(super) fn check(kernel: &Kernel, tree: &[Node<'_>], report: &mut Report) {
    let (mut any, mut waits) = (false, 0);
    for instr in instructions(kernel) {
        match instr {
            WarpOp::Wgmma(_) => any = true,
            WarpOp::WgmmaWait(groups) => waits = waits.max(groups as usize),
            _ => {}
        }
    }
    if !any {
        return;
    }
    let state = State { stale: Set::new(kernel, true), groups: vec![Flight::new()] };
    let mut walk =
        Walk { kernel, report, quiet: false, tiles: Vec::new(), closed: waits + 1, reported: HashSet::new() };
    walk.nodes(tree, Some(state), &mut None);
}

fn instructions(kernel: &Kernel) -> impl Iterator<Item = WarpOp> {
    kernel.body.iter().filter_map(|item| match item {
        crate::instr::Item::Instr(Instr { row, .. }) => match row.semantics {
            Semantics::Warp(op) => Some(op),
            Semantics::Lane(_) => None,
        },
        _ => None,
    })
}

struct Walk<'a> {
    kernel: &'a Kernel,
    report: &'a mut Report,
    /// Inside the search for a loop's state: nothing is reported yet.
    quiet: bool,
    /// Accumulators of the kernel's `wgmma`s: the registers and the shape.
    tiles: Vec<(Vec<RegId>, WgmmaShape)>,
    /// Closed groups kept apart; any wait frees those beyond, so they are kept as one.
    closed: usize,
    /// Pairs of lines already reported: an array's registers share their fate, one message is enough.
    reported: HashSet<(Site, Site)>,
}

impl Walk<'_> {
    /// The state after these nodes; `None` where no path leads. `exits` gathers the states at the breaks of the loop.
    fn nodes(
        &mut self,
        nodes: &[Node<'_>],
        mut state: Option<State>,
        exits: &mut Option<State>,
    ) -> Option<State> {
        for node in nodes {
            let Some(now) = &mut state else { break };
            match node {
                Node::Instr(instr) => self.instr(instr, now),
                Node::If { predicate, site, then, otherwise } => {
                    self.access(*predicate, site, "the predicate of a branch", now);
                    let other = now.clone();
                    state = self.nodes(then, state, exits);
                    let other = self.nodes(otherwise, Some(other), exits);
                    merge(&mut state, other);
                }
                Node::Loop { body } => {
                    let (mut start, quiet) = (now.clone(), std::mem::replace(&mut self.quiet, true));
                    while let Some(end) = self.nodes(body, Some(start.clone()), &mut None)
                        && start.merge(&end)
                    {}
                    self.quiet = quiet;
                    state = None;
                    self.nodes(body, Some(start), &mut state);
                }
                Node::Break { predicate, site } => {
                    self.access(*predicate, site, "the predicate of a break", now);
                    merge(exits, Some(now.clone()));
                }
            }
        }
        state
    }

    fn instr(&mut self, instr: &Instr, state: &mut State) {
        let op = match instr.row.semantics {
            Semantics::Warp(op) => Some(op),
            Semantics::Lane(_) => None,
        };
        match op {
            Some(WarpOp::Wgmma(shape)) => return self.wgmma(instr, shape, state),
            Some(WarpOp::WgmmaFence) => state.stale.clear(),
            Some(WarpOp::WgmmaCommit) => {
                state.groups.insert(0, Flight::new());
                if state.groups.len() > self.closed + 1
                    && let Some(oldest) = state.groups.pop()
                    && let Some(last) = state.groups.last_mut()
                {
                    for (id, entry) in oldest {
                        last.entry(id).or_insert(entry);
                    }
                }
            }
            Some(WarpOp::WgmmaWait(groups)) => state.groups.truncate(1 + groups as usize),
            _ => {}
        }
        let read = instr.src.iter().filter_map(|operand| operand.register());
        for id in read.chain(instr.guard.map(|(id, _)| id)).chain(instr.dst.iter().copied()) {
            self.access(id, instr.site, name(&instr.row), state);
        }
    }

    /// An access other than as accumulator or A.
    fn access(&mut self, id: RegId, site: Site, by: &str, state: &mut State) {
        state.stale.insert(id);
        let Some((_, issued, open)) = state.role(id) else { return };
        let expected = match open {
            true => "wgmma.commit_group and a wgmma.wait_group that covers it before",
            false => "a wgmma.wait_group that covers it before",
        };
        self.in_flight(id, site, by, issued, expected);
    }

    fn in_flight(&mut self, id: RegId, site: Site, by: &str, issued: Site, expected: &str) {
        if !self.quiet && self.reported.insert((site, issued)) {
            let got = format!("{by} on {}, in flight in the wgmma at {issued}", describe(self.kernel, id));
            self.report.add(Rule::WgmmaInFlight, site, got, expected);
        }
    }

    fn wgmma(&mut self, instr: &Instr, shape: WgmmaShape, state: &mut State) {
        let read = || instr.src.iter().filter_map(|operand| operand.register());
        let a = if shape.a_in_registers { 4 } else { 0 };
        for id in read().skip(a).chain(instr.guard.map(|(id, _)| id)) {
            self.access(id, instr.site, name(&instr.row), state);
        }
        // Products of one shape on the same accumulators are ordered among themselves.
        let same = |tile: &(Vec<RegId>, WgmmaShape)| {
            tile.0 == instr.dst && (tile.1.n, tile.1.d) == (shape.n, shape.d)
        };
        let tile = self.tiles.iter().position(same).unwrap_or_else(|| {
            self.tiles.push((instr.dst.clone(), shape));
            self.tiles.len() - 1
        });
        let accumulators = instr.dst.iter().map(|&id| (id, Role::Accumulator(tile)));
        let operands: Vec<(RegId, Role)> =
            accumulators.chain(read().take(a).map(|id| (id, Role::A))).collect();
        if let Some((id, issued)) = operands.iter().find_map(|&(id, role)| match state.role(id) {
            Some((other, issued, _)) if other != role => Some((id, issued)),
            _ => None,
        }) {
            let expected = "a wait before it is used in another role or shape";
            self.in_flight(id, instr.site, name(&instr.row), issued, expected);
        }
        if let Some(&(id, _)) = operands.iter().find(|&&(id, _)| state.stale.has(id))
            && !self.quiet
            && self.reported.insert((instr.site, instr.site))
        {
            let got =
                format!("wgmma on {}, accessed otherwise since the last fence", describe(self.kernel, id));
            self.report.add(
                Rule::WgmmaFence,
                instr.site,
                got,
                "wgmma.fence between that access and this wgmma",
            );
        }
        if let Some(open) = state.groups.first_mut() {
            open.extend(operands.into_iter().map(|(id, role)| (id, (role, instr.site))));
        }
    }
}

fn merge(state: &mut Option<State>, other: Option<State>) {
    match (state.as_mut(), other) {
        (Some(state), Some(other)) => {
            state.merge(&other);
        }
        (None, other) => *state = other,
        (Some(_), None) => {}
    }
}
