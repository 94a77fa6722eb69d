//! Each instruction alone: its operands against its row's text, and the forms that PTX has.

use super::{Report, Rule, describe, launch, name};
use crate::instr::{
    Access, Accumulator, AtomOp, Element, Instr, Operand, RegId, Semantics, Site, Space, Token, WarpOp as W,
    WgmmaShape,
};
use crate::kernel::{Kernel, ParamKind};
use crate::types::Type;

/// Whether PTX takes a constant in place of a register here. Packed pairs and matrix fragments are registers always.
pub(crate) fn takes_immediate(row: &crate::instr::Row, token: &Token<'_>) -> bool {
    let &Token::Operands { access: Access::Read, ty, braced, .. } = token else { return false };
    let stored = matches!(row.semantics, Semantics::Warp(W::Store { .. }));
    !matches!(ty, Type::F16x2 | Type::BF16x2) && (!braced || stored) && !row.text.starts_with("cvt.f32.f16")
}

pub(super) fn check(kernel: &Kernel, instr: &Instr, report: &mut Report) {
    let (row, site) = (&instr.row, instr.site);
    if row.target > kernel.target {
        report.add(
            Rule::Target,
            site,
            format!("{} for {}", name(row), kernel.target),
            row.target.to_string(),
        );
    }
    if let Some((id, _)) = instr.guard {
        predicate(kernel, id, site, report);
        let lines = row.text.contains('\n') || matches!(row.semantics, Semantics::Warp(W::ParamAddress));
        if lines {
            let got = format!("a guard on {}, which is several lines of PTX", name(row));
            report.add(Rule::Guard, site, got, "a branch around it");
        }
    }
    if types(kernel, instr, report)
        && let Semantics::Warp(op) = row.semantics
    {
        form(kernel, instr, op, report);
    }
}

/// A branch's or a guard's predicate.
pub(super) fn predicate(kernel: &Kernel, id: RegId, site: Site, report: &mut Report) {
    match kernel.registers.get(id.0 as usize) {
        Some(register) if register.ty == Type::Pred => {}
        Some(_) => {
            report.add(Rule::Operand, site, format!("{} as predicate", describe(kernel, id)), "a pred")
        }
        None => report.add(Rule::Operand, site, format!("register {} as predicate", id.0), known(kernel)),
    }
}

fn known(kernel: &Kernel) -> String {
    format!("one of the kernel's {} registers", kernel.registers.len())
}

/// Operands against the row's tokens; whether their numbers are right, so that they can be looked at by index.
fn types(kernel: &Kernel, instr: &Instr, report: &mut Report) -> bool {
    let (mut written, mut read) = (0, 0);
    let name = name(&instr.row);
    for token in instr.row.tokens() {
        let Token::Operands { access, ty, count, .. } = token else { continue };
        for _ in 0..count {
            let (got, index) = match access {
                Access::Write | Access::ReadWrite => {
                    written += 1;
                    (instr.dst.get(written - 1).map(|&id| Operand::Reg(id)), format!("result {written}"))
                }
                Access::Read | Access::Address => {
                    read += 1;
                    (instr.src.get(read - 1).copied(), format!("operand {read}"))
                }
            };
            let address = access == Access::Address;
            let problem = match got {
                None => continue,
                Some(Operand::Imm(_, given))
                    if address || !takes_immediate(&instr.row, &token) || !ty.takes(given) =>
                {
                    Some(format!("a constant {given}"))
                }
                Some(Operand::Imm(..)) => None,
                Some(Operand::Reg(id)) if address => Some(describe(kernel, id)),
                Some(Operand::Address(id, offset)) if !address => {
                    Some(format!("the address {}+{offset}", id.0))
                }
                Some(Operand::Reg(id) | Operand::Address(id, _)) => match kernel.registers.get(id.0 as usize)
                {
                    None => {
                        report.add(
                            Rule::Operand,
                            instr.site,
                            format!("register {} in {name}", id.0),
                            known(kernel),
                        );
                        continue;
                    }
                    Some(register) => (!ty.takes(register.ty)).then(|| describe(kernel, id)),
                },
            };
            if let Some(got) = problem {
                let constant = if takes_immediate(&instr.row, &token) { " or a constant" } else { "" };
                let expected =
                    if address { format!("an address {ty}") } else { format!("a register {ty}{constant}") };
                report.add(Rule::Operand, instr.site, format!("{got} as {index} of {name}"), expected);
            }
        }
    }
    let right = (instr.dst.len(), instr.src.len()) == (written, read);
    if !right {
        let got = format!("{} results and {} operands for {name}", instr.dst.len(), instr.src.len());
        report.add(Rule::Operand, instr.site, got, format!("{written} and {read}"));
    }
    right
}

/// Forms that a family of rows can name but PTX does not have, and constants out of range.
fn form(kernel: &Kernel, instr: &Instr, op: W, report: &mut Report) {
    let constant = |i: usize| match instr.src.get(i) {
        Some(&Operand::Imm(bits, _)) => Some(bits),
        _ => None,
    };
    let name = name(&instr.row);
    let mut refuse = |rule, got: String, expected: &str| report.add(rule, instr.site, got, expected);
    match op {
        W::Param | W::ParamAddress => {
            let kind =
                constant(0).and_then(|index| kernel.params.get(index as usize)).map(|param| param.kind);
            let ty = instr
                .dst
                .first()
                .and_then(|id| kernel.registers.get(id.0 as usize))
                .map(|register| register.ty);
            let expected = match (op, ty) {
                (W::ParamAddress, _) => Some(ParamKind::TensorMap),
                (_, Some(Type::U32)) => Some(ParamKind::U32),
                (_, Some(Type::S32)) => Some(ParamKind::S32),
                (_, Some(Type::F32)) => Some(ParamKind::F32),
                (_, Some(Type::U64)) => Some(ParamKind::U64),
                _ => None,
            };
            if kind.is_none() || kind != expected {
                let got = format!("parameter {:?}, {kind:?}", constant(0));
                refuse(Rule::Operand, got, &format!("a parameter of kind {expected:?}"));
            }
        }
        W::Load { bits, count, .. } | W::Store { bits, count, .. } => {
            let bytes = u32::from(bits) * u32::from(count) / 8;
            if !matches!(count, 1 | 2 | 4) || bytes > 16 {
                refuse(
                    Rule::Form,
                    format!("{count} values of {bits} bits ({name})"),
                    "1, 2 or 4 values, at most 16 bytes",
                );
            }
        }
        W::Atomic { space, op, ty, count, returns, .. } => {
            let add = matches!(ty, Type::U32 | Type::S32 | Type::U64 | Type::F32);
            let fits = match (op, count) {
                (AtomOp::Add, 1) => add,
                (AtomOp::Add, 2 | 4) => ty == Type::F32 && space == Space::Global && !returns,
                (AtomOp::Min | AtomOp::Max, 1) => add && ty != Type::F32 || ty == Type::S64,
                (AtomOp::Inc, 1) => ty == Type::U32,
                (AtomOp::Exch | AtomOp::Cas, 1) => returns && matches!(ty.bits(), 32 | 64),
                _ => false,
            };
            if !fits {
                refuse(Rule::Form, format!("{name} of {count} {ty}"), "a type and width that PTX has for it");
            }
        }
        W::CpAsync => {
            let sizes: &[u64] = if instr.row.text.starts_with("cp.async.cg") { &[16] } else { &[4, 8, 16] };
            let size = constant(2);
            if !size.is_some_and(|size| sizes.contains(&size)) {
                refuse(
                    Rule::Form,
                    format!("a size of {size:?} bytes for {name}"),
                    &format!("a constant of {sizes:?}"),
                );
            } else if constant(3) > size {
                refuse(
                    Rule::Form,
                    format!("{:?} source bytes for {name}", constant(3)),
                    &format!("at most {size:?}"),
                );
            }
        }
        W::BulkLoad | W::BulkStore | W::BulkToCluster | W::BulkReduceAddF32 => {
            if let Some(bytes) = constant(2).filter(|bytes| !bytes.is_multiple_of(16)) {
                refuse(Rule::Form, format!("{bytes} bytes for {name}"), "a multiple of 16");
            }
        }
        W::MbarrierWait | W::MbarrierTryWait => {
            if let Some(parity) = constant(1).filter(|&parity| parity > 1) {
                refuse(Rule::Form, format!("parity {parity}"), "0 or 1");
            }
        }
        W::Ldmatrix { count, .. } | W::Stmatrix { count, .. } if !matches!(count, 1 | 2 | 4) => {
            refuse(Rule::Form, format!("{count} matrices for {name}"), "1, 2 or 4");
        }
        W::Mma { k, a, b, d } => {
            use Element::*;
            let fits = match (a, b) {
                (F16, F16) => matches!(k, 8 | 16),
                (BF16, BF16) => matches!(k, 8 | 16) && d == Accumulator::F32,
                (TF32, TF32) => matches!(k, 4 | 8) && d == Accumulator::F32,
                (E4M3 | E5M2, E4M3 | E5M2) => k == 32 && d == Accumulator::F32,
                _ => false,
            };
            if !fits {
                refuse(Rule::Form, name.to_owned(), "a depth and types that mma.sync m16n8 has");
            }
        }
        W::Wgmma(shape) => {
            if let Err(expected) = wgmma(shape) {
                refuse(Rule::Form, format!("{name} of {shape:?}"), expected);
            }
        }
        W::Redux(op) if !matches!(op, AtomOp::Add | AtomOp::Min | AtomOp::Max) => {
            refuse(Rule::Form, name.to_owned(), "redux.sync of add, min or max");
        }
        W::BarSync | W::BarArrive => {
            if let Some(id) = constant(0).filter(|&id| id > 15) {
                refuse(Rule::Barrier, format!("barrier {id}"), "0 to 15");
            }
            let threads = launch::threads(kernel);
            if let Some(count) = constant(1)
                && (count == 0 || !count.is_multiple_of(32) || count > threads)
            {
                refuse(
                    Rule::Barrier,
                    format!("a barrier of {count} threads"),
                    &format!("whole warps of the block's {threads}"),
                );
            }
        }
        W::SetMaxNReg { registers, .. }
            if !(24..=248).contains(&registers) || !registers.is_multiple_of(8) =>
        {
            refuse(Rule::Form, format!("{name} to {registers}"), "a multiple of 8 from 24 to 248");
        }
        W::TmaLoad { dims, .. }
        | W::TmaStore { dims }
        | W::TmaReduceAdd { dims }
        | W::TmaPrefetch { dims } => {
            if !(1..=5).contains(&dims) {
                refuse(Rule::Form, format!("{dims} dimensions for {name}"), "1 to 5");
            }
            // Its brackets hold the coordinates too, and PTX has no place for an offset there.
            let map = usize::from(matches!(op, W::TmaLoad { .. }));
            if let Some(&Operand::Address(_, offset)) =
                instr.src.get(map).filter(|o| !matches!(o, Operand::Address(_, 0)))
            {
                refuse(
                    Rule::Operand,
                    format!("a tensor map at an offset of {offset} bytes"),
                    "a tensor map parameter",
                );
            }
        }
        _ => {}
    }
}

fn wgmma(shape: WgmmaShape) -> Result<(), &'static str> {
    use Element::*;
    let WgmmaShape { n, a, b, d, a_in_registers, transpose_a, transpose_b } = shape;
    if !(8..=256).contains(&n) || !n.is_multiple_of(8) {
        return Err("n a multiple of 8 from 8 to 256");
    }
    let types = match (a, b) {
        (F16, F16) | (E4M3 | E5M2, E4M3 | E5M2) => true,
        (BF16, BF16) | (TF32, TF32) => d == Accumulator::F32,
        _ => false,
    };
    if !types {
        return Err("A and B of one type (or both fp8), and f16 accumulators only for f16 and fp8");
    }
    if (transpose_a || transpose_b) && a.bytes() != 2 {
        return Err("transposition of 16-bit types only");
    }
    match transpose_a && a_in_registers {
        true => Err("A transposed in shared memory only"),
        false => Ok(()),
    }
}
