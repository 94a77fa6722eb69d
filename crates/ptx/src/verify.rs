//! The rules that a kernel must keep before it is emitted: what ptxas, the hardware or the emulator would punish later
//! and further from its cause. [`verify`] finds every breach and names the line of Rust from which it came.
//!
//! | rules | file |
//! |---|---|
//! | launch: names, block, cluster, shared memory, parameters | `launch.rs` |
//! | each instruction alone: operands and constants against its row | `operands.rs` |
//! | control flow is structured | this file |
//! | every register read has been written | `registers.rs` |
//! | `.aligned` instructions, barriers, shuffles: by whole warps only | `uniform.rs` |
//! | registers of a `wgmma` in flight are not touched | `wgmma.rs` |
//!
//! The last three walk the control flow, so they run on kernels that pass the others.

mod launch;
mod operands;
mod registers;
#[cfg(test)]
mod tests;
mod uniform;
mod wgmma;

use std::fmt;

#[cfg(test)]
pub(crate) use operands::takes_immediate;

use crate::instr::{Instr, Item, RegId, Row, Site};
use crate::kernel::Kernel;

/// What a kernel must keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Names are PTX identifiers, and distinct.
    Name,
    /// Block, cluster and blocks a multiprocessor are possible.
    Launch,
    /// Parameters fit in 4096 bytes.
    Parameters,
    /// Shared memory is within the target's limit, and regions neither overlap nor leave it.
    Shared,
    /// The kernel's target has the instruction.
    Target,
    /// Operands are as the row says: number, type, register or constant.
    Operand,
    /// The instruction has a form that exists: vector widths, shapes, types of atomics.
    Form,
    /// Barriers have ids 0 to 15, and whole warps of the block take part.
    Barrier,
    /// `If`, `Else`, `EndIf`, `Loop`, `BreakIf`, `EndLoop` match.
    Structure,
    /// A register is written before it is read, at least on some path.
    Undefined,
    /// What a warp must execute together does not stand where lanes may differ.
    Uniform,
    /// An instruction of several PTX lines has no guard.
    Guard,
    /// Registers of a `wgmma` in flight are not touched.
    WgmmaInFlight,
    /// Between another access to a register and a `wgmma` that has it stands a `wgmma.fence`.
    WgmmaFence,
}

/// A breach of a rule.
#[derive(Clone, Debug, PartialEq)]
pub struct VerifyError {
    /// The rule.
    pub rule: Rule,
    /// The Rust line that built the instruction; `None` for what concerns the whole kernel.
    pub site: Option<Site>,
    /// What stands there.
    pub got: String,
    /// What should.
    pub expected: String,
}

impl fmt::Display for VerifyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.site {
            Some(site) => write!(f, "{site}: ")?,
            None => f.write_str("kernel: ")?,
        }
        write!(f, "{:?}: got {}; expected {}", self.rule, self.got, self.expected)
    }
}

/// Every breach of a rule in a kernel; at least one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("kernel {kernel:?} breaks {} rule(s):\n{}", .errors.len(), lines(.errors))]
pub struct VerifyErrors {
    /// The kernel's name.
    pub kernel: String,
    /// The breaches.
    pub errors: Vec<VerifyError>,
}

fn lines(errors: &[VerifyError]) -> String {
    errors.iter().map(|error| error.to_string()).collect::<Vec<_>>().join("\n")
}

/// Checks a kernel against every [`Rule`].
pub fn verify(kernel: &Kernel) -> Result<(), VerifyErrors> {
    let mut report = Report::default();
    launch::check(kernel, &mut report);
    for item in &kernel.body {
        match item {
            Item::Instr(instr) => operands::check(kernel, instr, &mut report),
            Item::If { predicate, site, .. } | Item::BreakIf { predicate, site, .. } => {
                operands::predicate(kernel, *predicate, site, &mut report)
            }
            _ => {}
        }
    }
    let tree = tree(kernel, &mut report);
    if report.errors.is_empty() {
        registers::check(kernel, &tree, &mut report);
        uniform::check(kernel, &tree, &mut report);
        wgmma::check(kernel, &tree, &mut report);
    }
    match report.errors.is_empty() {
        true => Ok(()),
        false => Err(VerifyErrors { kernel: kernel.name.clone(), errors: report.errors }),
    }
}

/// The breaches found so far.
#[derive(Default)]
struct Report {
    errors: Vec<VerifyError>,
}

impl Report {
    fn add(
        &mut self,
        rule: Rule,
        site: impl Into<Option<Site>>,
        got: impl Into<String>,
        expected: impl Into<String>,
    ) {
        self.errors.push(VerifyError { rule, site: site.into(), got: got.into(), expected: expected.into() });
    }
}

/// A register in messages: its type, and where it was made.
fn describe(kernel: &Kernel, id: RegId) -> String {
    match kernel.registers.get(id.0 as usize) {
        Some(register) => format!("register {} ({}, made at {})", id.0, register.ty, register.site),
        None => format!("register {}", id.0),
    }
}

/// An instruction in messages.
fn name(row: &Row) -> &str {
    // Of several lines the one that waits, below a declaration and a label.
    let line = row.text.lines().nth(3).unwrap_or(&row.text).trim();
    line.split(' ').next().unwrap_or(line)
}

/// The body as a tree.
enum Node<'k> {
    Instr(&'k Instr),
    If { predicate: RegId, site: Site, then: Vec<Node<'k>>, otherwise: Vec<Node<'k>> },
    Loop { body: Vec<Node<'k>> },
    Break { predicate: RegId, site: Site },
}

/// Deepest nesting of branches and loops: the checks are recursive.
const DEPTH: usize = 64;

/// Beyond it.
const TOO_DEEP: usize = DEPTH + 1;

/// Deepest nesting of loops: each is walked about three times for each walk of the loop around it.
const LOOPS: usize = 8;

fn tree<'k>(kernel: &'k Kernel, report: &mut Report) -> Vec<Node<'k>> {
    enum Open<'k> {
        If { predicate: RegId, site: Site, then: Option<Vec<Node<'k>>> },
        Loop { site: Site },
    }
    let mut open: Vec<(Open<'k>, Vec<Node<'k>>)> = Vec::new();
    let mut nodes = Vec::new();
    let mut last = None;
    for item in &kernel.body {
        match item {
            Item::Instr(instr) => {
                last = Some(instr.site);
                nodes.push(Node::Instr(instr));
            }
            Item::Comment(_) => {}
            &Item::If { predicate, site, .. } => {
                open.push((Open::If { predicate, site, then: None }, std::mem::take(&mut nodes)));
            }
            &Item::Loop { site } => open.push((Open::Loop { site }, std::mem::take(&mut nodes))),
            Item::Else => match open.last_mut() {
                Some((Open::If { then: then @ None, .. }, _)) => *then = Some(std::mem::take(&mut nodes)),
                _ => report.add(Rule::Structure, last, "Else", "one Else inside an If"),
            },
            Item::EndIf => match open.pop() {
                Some((Open::If { predicate, site, then }, outer)) => {
                    let inner = std::mem::replace(&mut nodes, outer);
                    let (then, otherwise) = match then {
                        Some(then) => (then, inner),
                        None => (inner, Vec::new()),
                    };
                    // Beyond the limit nothing is nested: the drop of a tree is recursive too.
                    if open.len() < DEPTH {
                        nodes.push(Node::If { predicate, site, then, otherwise });
                    }
                }
                other => {
                    report.add(Rule::Structure, last, "EndIf", "EndIf at the end of an If");
                    open.extend(other);
                }
            },
            &Item::BreakIf { predicate, site, .. } => {
                if !open.iter().any(|(open, _)| matches!(open, Open::Loop { .. })) {
                    report.add(Rule::Structure, site, "BreakIf outside of a loop", "BreakIf inside a loop");
                }
                nodes.push(Node::Break { predicate, site });
            }
            Item::EndLoop => match open.pop() {
                Some((Open::Loop { .. }, outer)) => {
                    let body = std::mem::replace(&mut nodes, outer);
                    if open.len() < DEPTH {
                        nodes.push(Node::Loop { body });
                    }
                }
                other => {
                    report.add(Rule::Structure, last, "EndLoop", "EndLoop at the end of a Loop");
                    open.extend(other);
                }
            },
        }
        // Reported once, on crossing a limit.
        if let (Item::If { site, .. } | Item::Loop { site }, 0..=TOO_DEEP) = (item, open.len()) {
            let loops = open.iter().filter(|(open, _)| matches!(open, Open::Loop { .. })).count();
            let loops = if matches!(item, Item::Loop { .. }) { loops } else { 0 };
            for (what, got, most) in [("branches and loops", open.len(), DEPTH), ("loops", loops, LOOPS)] {
                if got == most + 1 {
                    let got = format!("{got} {what} inside each other");
                    report.add(Rule::Structure, *site, got, format!("at most {most}"));
                }
            }
        }
    }
    for (open, outer) in open.into_iter().rev() {
        let (what, site) = match open {
            Open::If { site, .. } => ("If", site),
            Open::Loop { site } => ("Loop", site),
        };
        report.add(Rule::Structure, site, format!("{what} without an end"), format!("End{what} after it"));
        nodes = outer;
    }
    nodes
}

/// A set of registers.
#[derive(Clone, PartialEq, Eq)]
struct Set(Vec<u64>);

impl Set {
    fn new(kernel: &Kernel, full: bool) -> Set {
        Set(vec![if full { u64::MAX } else { 0 }; kernel.registers.len().div_ceil(64)])
    }

    fn has(&self, id: RegId) -> bool {
        self.0[id.0 as usize / 64] >> (id.0 % 64) & 1 == 1
    }

    fn insert(&mut self, id: RegId) {
        self.0[id.0 as usize / 64] |= 1 << (id.0 % 64);
    }

    fn extend(&mut self, other: &Set) {
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| *a |= b);
    }

    fn clear(&mut self) {
        self.0.fill(0);
    }
}
