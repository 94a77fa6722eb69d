//! What a warp must execute together stands only where its lanes cannot part.
//!
//! Each register is uniform (the same value in all lanes of a warp), the thread index, or varying; the kinds are raised
//! until nothing changes. Lanes part in the branches of an `If` on a varying predicate, and in all of a loop that lanes
//! may leave at different rounds; a register written there is varying after it.

use super::{Node, Report, Rule, describe, name};
use crate::instr::{Class, Instr, Operand, RegId, Semantics, Shuffle, SpecialRegister, WarpOp as W};
use crate::kernel::Kernel;

/// What is known of a register's values in the lanes of a warp.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// Not written yet.
    None,
    /// All lanes have the same.
    Uniform,
    /// A multiple of 32, plus the lane.
    Thread,
    /// Anything.
    Varying,
}

impl Kind {
    fn join(self, other: Kind) -> Kind {
        match (self, other) {
            (Kind::None, kind) | (kind, Kind::None) => kind,
            (a, b) if a == b => a,
            _ => Kind::Varying,
        }
    }
}

/// Why lanes may have parted: the branch or loop exit, for the message.
type Parted = Option<String>;

pub(super) fn check(kernel: &Kernel, tree: &[Node<'_>], report: &mut Report) {
    let mut walk =
        Walk { kernel, kinds: vec![Kind::None; kernel.registers.len()], changed: true, report: None };
    while walk.changed {
        walk.changed = false;
        walk.nodes(tree, &None);
    }
    walk.report = Some(report);
    walk.nodes(tree, &None);
}

struct Walk<'a> {
    kernel: &'a Kernel,
    kinds: Vec<Kind>,
    changed: bool,
    report: Option<&'a mut Report>,
}

impl Walk<'_> {
    fn nodes(&mut self, nodes: &[Node<'_>], parted: &Parted) {
        for node in nodes {
            match node {
                Node::Instr(instr) => self.instr(instr, parted),
                Node::If { predicate, site, then, otherwise } => {
                    let inner = match self.varies(*predicate) {
                        true => Some(format!(
                            "in the branch at {site}, which lanes take by {}",
                            self.register(*predicate)
                        )),
                        false => parted.clone(),
                    };
                    self.nodes(then, &inner);
                    self.nodes(otherwise, &inner);
                }
                Node::Loop { body } => {
                    let inner = self.exit(body, parted.is_some()).or_else(|| parted.clone());
                    self.nodes(body, &inner);
                }
                Node::Break { .. } => {}
            }
        }
    }

    /// The first exit of a loop that lanes may take in different rounds. The loop's inner loops have exits of their own.
    fn exit(&self, nodes: &[Node<'_>], parted: bool) -> Parted {
        nodes.iter().find_map(|node| match node {
            Node::Break { predicate, site } if parted || self.varies(*predicate) => {
                Some(format!("in a loop that lanes leave at different rounds, at {site}"))
            }
            Node::If { predicate, then, otherwise, .. } => {
                let parted = parted || self.varies(*predicate);
                self.exit(then, parted).or_else(|| self.exit(otherwise, parted))
            }
            _ => None,
        })
    }

    fn instr(&mut self, instr: &Instr, parted: &Parted) {
        let guarded = instr.guard.filter(|&(id, _)| self.varies(id));
        let kind = match parted.is_some() || guarded.is_some() {
            true => Kind::Varying,
            false => self.result(instr),
        };
        for id in &instr.dst {
            let joined = self.kinds[id.0 as usize].join(kind);
            self.changed |= joined != self.kinds[id.0 as usize];
            self.kinds[id.0 as usize] = joined;
        }
        if !together(instr) {
            return;
        }
        let why = match (parted, guarded) {
            (Some(why), _) => why.clone(),
            (None, Some((id, _))) => format!("under the guard {}", self.register(id)),
            (None, None) => return,
        };
        if let Some(report) = &mut self.report {
            let got = format!("{} where lanes may have parted: {why}", name(&instr.row));
            report.add(Rule::Uniform, instr.site, got, "all lanes of the warp execute it together");
        }
    }

    fn varies(&self, id: RegId) -> bool {
        matches!(self.kinds[id.0 as usize], Kind::Thread | Kind::Varying)
    }

    fn register(&self, id: RegId) -> String {
        describe(self.kernel, id)
    }

    fn operand(&self, operand: Option<&Operand>) -> Kind {
        match operand.map(|operand| operand.register()) {
            Some(Some(id)) => self.kinds[id.0 as usize],
            _ => Kind::Uniform,
        }
    }

    /// The kind of an instruction's results, all lanes executing it.
    fn result(&self, instr: &Instr) -> Kind {
        let src = &instr.src;
        let all = src.iter().map(|operand| self.operand(Some(operand))).fold(Kind::None, Kind::join);
        let all = if all == Kind::None && src.is_empty() { Kind::Uniform } else { all };
        let op = match instr.row.semantics {
            Semantics::Lane(_) => return self.lanewise(instr, all),
            Semantics::Warp(op) => op,
        };
        let same = |kind| if matches!(kind, Kind::None | Kind::Uniform) { kind } else { Kind::Varying };
        match op {
            W::Special(register) => self.special(register),
            W::Param | W::ParamAddress | W::SharedBase | W::CreatePolicy => Kind::Uniform,
            W::VoteAny | W::VoteAll | W::Ballot | W::Redux(_) => Kind::Uniform,
            W::Load { .. } | W::Mapa => same(all),
            // Of one lane, whatever the values are; or of equal values.
            W::Shuffle(mode) => match (mode, self.operand(src.get(1)), src.get(2)) {
                (Shuffle::Idx, Kind::None | Kind::Uniform, Some(Operand::Imm(31, _))) => Kind::Uniform,
                _ => same(all),
            },
            _ => Kind::Varying,
        }
    }

    fn special(&self, register: SpecialRegister) -> Kind {
        use SpecialRegister::*;
        // Whole warps lie along x.
        let rows = self.kernel.block[0].is_multiple_of(32);
        let line = self.kernel.block[1] == 1 && self.kernel.block[2] == 1;
        match register {
            Tid(0) if rows || line => Kind::Thread,
            Tid(1 | 2) if rows || line => Kind::Uniform,
            Ntid(_) | Ctaid(_) | Nctaid(_) | ClusterCtarank | Clusterid(_) | Nclusterid(_) | Smid => {
                Kind::Uniform
            }
            Tid(_) | Laneid | Globaltimer | Clock64 => Kind::Varying,
        }
    }

    /// Of the thread index: its multiples of 32 are the same in a warp, and so are comparisons with such multiples.
    fn lanewise(&self, instr: &Instr, all: Kind) -> Kind {
        let constant = |i: usize| match instr.src.get(i) {
            Some(&Operand::Imm(bits, _)) => Some(bits & 0xffff_ffff),
            _ => None,
        };
        let thread = |i: usize| self.operand(instr.src.get(i)) == Kind::Thread;
        let whole = |n: u64| n.is_multiple_of(32);
        let uniform = match (instr.row.name(), constant(0), constant(1)) {
            ("mov.b32", ..) if all == Kind::Thread => return Kind::Thread,
            ("shr.u32", None, Some(count)) => thread(0) && count >= 5,
            ("div.u32", None, Some(divisor)) => thread(0) && divisor > 0 && whole(divisor),
            ("and.b32", None, Some(mask)) => thread(0) && mask & 31 == 0,
            ("and.b32", Some(mask), None) => thread(1) && mask & 31 == 0,
            ("setp.lt.u32", None, Some(end)) => thread(0) && whole(end),
            ("setp.lt.u32", Some(before), None) => thread(1) && whole(before + 1),
            ("setp.le.u32", None, Some(last)) => thread(0) && whole(last + 1),
            ("setp.le.u32", Some(first), None) => thread(1) && whole(first),
            _ => false,
        };
        match all {
            _ if uniform => Kind::Uniform,
            Kind::Thread => Kind::Varying,
            kind => kind,
        }
    }
}

/// Whether all lanes must execute it together: `.aligned`, the barriers, and what waits for the lanes of its member mask,
/// which is always all.
fn together(instr: &Instr) -> bool {
    let exchange =
        matches!(instr.row.semantics, Semantics::Warp(W::BarWarp)) || instr.row.class == Class::Lanes;
    instr.row.aligned() || exchange
}
