//! Registers are written before they are read, at least on one path.
//!
//! A value carried around a loop is written below its first read in program order, so inside a loop whatever the loop
//! writes counts as written. What is read before any write at run time is the emulator's to find.

use super::{Node, Report, Rule, Set, describe};
use crate::instr::{Access, Instr, RegId, Semantics, Site, Token, WarpOp};
use crate::kernel::Kernel;

pub(super) fn check(kernel: &Kernel, tree: &[Node<'_>], report: &mut Report) {
    let mut walk = Walk { kernel, report, reported: Set::new(kernel, false) };
    walk.nodes(tree, &mut Set::new(kernel, false));
}

struct Walk<'a> {
    kernel: &'a Kernel,
    report: &'a mut Report,
    reported: Set,
}

impl Walk<'_> {
    fn nodes(&mut self, nodes: &[Node<'_>], written: &mut Set) {
        for node in nodes {
            match node {
                Node::Instr(instr) => {
                    let operands = instr.src.iter().filter_map(|operand| operand.register());
                    for id in operands.chain(instr.guard.map(|(id, _)| id)).chain(read_and_written(instr)) {
                        self.read(id, instr.site, written);
                    }
                    instr.dst.iter().for_each(|&id| written.insert(id));
                }
                Node::If { predicate, site, then, otherwise } => {
                    self.read(*predicate, site, written);
                    let mut other = written.clone();
                    self.nodes(then, written);
                    self.nodes(otherwise, &mut other);
                    written.extend(&other);
                }
                Node::Loop { body } => {
                    writes(body, written);
                    self.nodes(body, written);
                }
                Node::Break { predicate, site } => self.read(*predicate, site, written),
            }
        }
    }

    fn read(&mut self, id: RegId, site: Site, written: &Set) {
        if !written.has(id) && !self.reported.has(id) {
            self.reported.insert(id);
            let got = format!("a read of {}, which nothing has written", describe(self.kernel, id));
            self.report.add(Rule::Undefined, site, got, "a write before it");
        }
    }
}

/// Operands that an instruction reads and writes. The accumulators of `wgmma` are not among them: with scale-d false
/// they are only written, and that is how a kernel begins.
fn read_and_written(instr: &Instr) -> Vec<RegId> {
    if matches!(instr.row.semantics, Semantics::Warp(WarpOp::Wgmma(_))) {
        return Vec::new();
    }
    let (mut found, mut dst) = (Vec::new(), instr.dst.iter());
    for token in instr.row.tokens() {
        if let Token::Operands { access: access @ (Access::Write | Access::ReadWrite), count, .. } = token {
            found.extend(dst.by_ref().take(count).filter(|_| access == Access::ReadWrite));
        }
    }
    found
}

/// Everything that these nodes write.
fn writes(nodes: &[Node<'_>], written: &mut Set) {
    for node in nodes {
        match node {
            Node::Instr(instr) => instr.dst.iter().for_each(|&id| written.insert(id)),
            Node::If { then, otherwise, .. } => {
                writes(then, written);
                writes(otherwise, written);
            }
            Node::Loop { body } => writes(body, written),
            Node::Break { .. } => {}
        }
    }
}
