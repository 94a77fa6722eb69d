//! A kernel's body as a flat program: control flow knows where it goes, operand lists are known to fit their rows.

use super::error::Error;
use crate::instr::Semantics;
use crate::instr::{Access, Instr, Item, Operand, RegId, Site, Token, WarpOp};
use crate::kernel::Kernel;

/// An instruction with what the interpreter asks of it at every step.
pub(super) struct Code<'k> {
    pub instr: &'k Instr,
    /// All live lanes must execute it together.
    pub aligned: bool,
    /// Lanes that execute it are ordered with each other.
    pub synchronises: bool,
}

/// A step of the program; targets are indices of steps.
pub(super) enum Step<'k> {
    Instr(Code<'k>),
    If { predicate: RegId, value: bool, next: usize },
    Else { end: usize },
    EndIf,
    Loop { end: usize },
    BreakIf { predicate: RegId, value: bool },
    EndLoop { begin: usize },
}

pub(super) struct Program<'k> {
    pub kernel: &'k Kernel,
    pub steps: Vec<Step<'k>>,
    pub sites: Vec<Site>,
}

enum Open {
    If { at: usize, otherwise: Option<usize>, site: Site },
    Loop { at: usize, site: Site },
}

impl<'k> Program<'k> {
    pub(super) fn new(kernel: &'k Kernel) -> Result<Self, Error> {
        let malformed = |problem: String| Error::Malformed { kernel: kernel.name.clone(), problem };
        let mut program = Program { kernel, steps: Vec::new(), sites: Vec::new() };
        let mut open = Vec::new();
        for item in &kernel.body {
            let here = program.steps.len();
            let unbalanced = |what: &str| malformed(format!("step {here}: {what} without its begin"));
            let (step, site) = match item {
                Item::Comment(_) => continue,
                Item::Instr(instr) => (Step::Instr(program.code(instr)?), instr.site),
                Item::If { predicate, value, site } => {
                    program.register(*predicate, site)?;
                    open.push(Open::If { at: here, otherwise: None, site });
                    (Step::If { predicate: *predicate, value: *value, next: here }, *site)
                }
                Item::Else => match open.last_mut() {
                    Some(Open::If { at, otherwise: otherwise @ None, site }) => {
                        *otherwise = Some(here);
                        if let Step::If { next, .. } = &mut program.steps[*at] {
                            *next = here;
                        }
                        (Step::Else { end: here }, *site)
                    }
                    _ => return Err(unbalanced("an Else")),
                },
                Item::EndIf => match open.pop() {
                    Some(Open::If { at, otherwise, site }) => {
                        match &mut program.steps[otherwise.unwrap_or(at)] {
                            Step::If { next: target, .. } | Step::Else { end: target } => *target = here,
                            _ => {}
                        }
                        (Step::EndIf, site)
                    }
                    _ => return Err(unbalanced("an EndIf")),
                },
                Item::Loop { site } => {
                    open.push(Open::Loop { at: here, site });
                    (Step::Loop { end: here }, *site)
                }
                Item::BreakIf { predicate, value, site } => {
                    program.register(*predicate, site)?;
                    if !open.iter().any(|open| matches!(open, Open::Loop { .. })) {
                        return Err(unbalanced("a BreakIf"));
                    }
                    (Step::BreakIf { predicate: *predicate, value: *value }, *site)
                }
                Item::EndLoop => match open.pop() {
                    Some(Open::Loop { at, site }) => {
                        program.steps[at] = Step::Loop { end: here };
                        (Step::EndLoop { begin: at }, site)
                    }
                    _ => return Err(unbalanced("an EndLoop")),
                },
            };
            program.steps.push(step);
            program.sites.push(site);
        }
        if let Some(Open::If { site, .. } | Open::Loop { site, .. }) = open.last() {
            return Err(malformed(format!("{site}: a branch or loop without its end")));
        }
        Ok(program)
    }

    fn register(&self, id: RegId, site: Site) -> Result<(), Error> {
        let registers = self.kernel.registers.len();
        if (id.0 as usize) < registers {
            return Ok(());
        }
        let problem = format!("{site}: register {} of {registers}", id.0);
        Err(Error::Malformed { kernel: self.kernel.name.clone(), problem })
    }

    fn code(&self, instr: &'k Instr) -> Result<Code<'k>, Error> {
        let registers = instr.dst.iter().copied().chain(instr.src.iter().filter_map(Operand::register));
        for id in registers.chain(instr.guard.map(|guard| guard.0)) {
            self.register(id, instr.site)?;
        }
        let (mut written, mut read) = (0, 0);
        for token in instr.row.tokens() {
            match token {
                Token::Operands { access: Access::Write | Access::ReadWrite, count, .. } => written += count,
                Token::Operands { count, .. } => read += count,
                Token::Literal(_) => {}
            }
        }
        if (written, read) != (instr.dst.len(), instr.src.len()) {
            let problem = format!(
                "{}: {} writes {written} and reads {read} operands, got {} and {}",
                instr.site,
                instr.row.name(),
                instr.dst.len(),
                instr.src.len()
            );
            return Err(Error::Malformed { kernel: self.kernel.name.clone(), problem });
        }
        let aligned = instr.row.aligned();
        let synchronises = aligned
            || matches!(
                instr.row.semantics,
                Semantics::Warp(
                    WarpOp::Shuffle(_)
                        | WarpOp::VoteAny
                        | WarpOp::VoteAll
                        | WarpOp::Ballot
                        | WarpOp::Redux(_)
                        | WarpOp::Elect
                        | WarpOp::BarWarp
                        | WarpOp::BarSync
                        | WarpOp::BarArrive
                )
            );
        Ok(Code { instr, aligned, synchronises })
    }
}
