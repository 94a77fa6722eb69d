//! PTX text of a kernel: readable, with the Rust location of each line, and the same for the same kernel.

use std::collections::HashMap;
use std::fmt::Write;

use crate::instr::{Access, Instr, Item, Operand, RegId, Site, Token};
use crate::kernel::{Kernel, ParamKind};
use crate::types::Type;

/// The `.version` emitted: taken by drivers since CUDA 12.4, and has every instruction of the table (fp8 `mma` is new in it).
pub const PTX_VERSION: &str = "8.4";

/// Name of the dynamic shared memory in the PTX.
pub(crate) const SHARED: &str = "shared_memory";

/// Writes the kernel as a PTX module.
///
/// It does not check: call [`verify`](crate::verify::verify) first. Comments name the Rust file and line of the code
/// below them; paths are cut to the file's name, so that the text does not depend on where the crate was built.
pub fn emit(kernel: &Kernel) -> String {
    let mut out = Writer::new(kernel);
    out.header();
    out.body();
    out.text.push_str("\tret;\n}\n");
    out.text
}

struct Writer<'a> {
    kernel: &'a Kernel,
    text: String,
    names: Vec<String>,
    counts: HashMap<&'static str, (usize, Type)>,
    site: Option<Site>,
    /// Open `If`s: the label's number, and whether an `Else` was seen.
    ifs: Vec<(usize, bool)>,
    /// Open loops' labels.
    loops: Vec<usize>,
    labels: usize,
}

impl<'a> Writer<'a> {
    fn new(kernel: &'a Kernel) -> Self {
        let mut counts: HashMap<&'static str, (usize, Type)> = HashMap::new();
        let names = kernel
            .registers
            .iter()
            .map(|register| {
                let (next, _) = counts.entry(register.ty.prefix()).or_insert((0, register.ty));
                *next += 1;
                format!("{}{}", register.ty.prefix(), *next - 1)
            })
            .collect();
        Writer {
            kernel,
            text: String::new(),
            names,
            counts,
            site: None,
            ifs: Vec::new(),
            loops: Vec::new(),
            labels: 0,
        }
    }

    fn line(&mut self, text: &str) {
        self.text.push('\t');
        self.text.push_str(text);
        self.text.push('\n');
    }

    fn header(&mut self) {
        let kernel = self.kernel;
        let mut text = format!("//\n// {}, written by the ptx crate\n//\n", kernel.name);
        for region in &kernel.shared {
            let _ = writeln!(text, "// shared {:>7} +{:<6} {}", region.offset, region.bytes, region.name);
        }
        let _ = writeln!(text, ".version {PTX_VERSION}\n.target {}\n.address_size 64\n", kernel.target);
        if kernel.shared_bytes > 0 {
            let _ = writeln!(text, ".extern .shared .align 1024 .b8 {SHARED}[];\n");
        }
        let _ = writeln!(text, ".visible .entry {}(", kernel.name);
        for (i, param) in kernel.params.iter().enumerate() {
            let comma = if i + 1 < kernel.params.len() { "," } else { "" };
            let declared = match param.kind {
                ParamKind::U32 => format!(".u32 {}", param.name),
                ParamKind::S32 => format!(".s32 {}", param.name),
                ParamKind::F32 => format!(".f32 {}", param.name),
                ParamKind::U64 => format!(".u64 {}", param.name),
                ParamKind::TensorMap => format!(".align 64 .b8 {}[128]", param.name),
            };
            let _ = writeln!(text, "\t.param {declared}{comma}");
        }
        let [x, y, z] = kernel.block;
        let _ = writeln!(text, ")\n.reqntid {x}, {y}, {z}\n.minnctapersm {}", kernel.min_blocks);
        if kernel.cluster_blocks() > 1 {
            let [x, y, z] = kernel.cluster;
            let _ = writeln!(text, ".explicitcluster\n.reqnctapercluster {x}, {y}, {z}");
        }
        text.push_str("{\n");
        let mut counts: Vec<_> = self.counts.iter().collect();
        counts.sort_by_key(|(prefix, _)| **prefix);
        for (prefix, (count, ty)) in counts {
            let _ = writeln!(text, "\t.reg .{} {prefix}<{count}>;", ty.declared());
        }
        self.text.push_str(&text);
    }

    fn at(&mut self, site: Site) {
        if self.site.is_none_or(|last| (last.file(), last.line()) != (site.file(), site.line())) {
            let file = site.file().rsplit(['/', '\\']).next().unwrap_or_default();
            let text = format!("// {file}:{}", site.line());
            self.line(&text);
            self.site = Some(site);
        }
    }

    fn body(&mut self) {
        let kernel = self.kernel;
        for item in &kernel.body {
            match item {
                Item::Comment(text) => {
                    let text = format!("// {}", text.replace('\n', " "));
                    self.line(&text);
                }
                Item::Instr(instr) => {
                    self.at(instr.site);
                    let text = self.instruction(instr);
                    self.line(&text);
                }
                Item::If { predicate, value, site } => {
                    self.at(site);
                    let label = self.label();
                    self.ifs.push((label, false));
                    let not = if *value { "!" } else { "" };
                    let text = format!("@{not}{} bra ELSE_{label};", self.name(*predicate));
                    self.line(&text);
                }
                Item::Else => {
                    if let Some((label, otherwise)) = self.ifs.last_mut() {
                        *otherwise = true;
                        let label = *label;
                        self.line(&format!("bra END_{label};"));
                        let _ = writeln!(self.text, "ELSE_{label}:");
                    }
                }
                Item::EndIf => {
                    if let Some((label, otherwise)) = self.ifs.pop() {
                        let name = if otherwise { "END" } else { "ELSE" };
                        let _ = writeln!(self.text, "{name}_{label}:");
                    }
                }
                Item::Loop { site } => {
                    self.at(site);
                    let label = self.label();
                    self.loops.push(label);
                    let _ = writeln!(self.text, "LOOP_{label}:");
                }
                Item::BreakIf { predicate, value, site } => {
                    self.at(site);
                    let not = if *value { "" } else { "!" };
                    if let Some(&label) = self.loops.last() {
                        let text = format!("@{not}{} bra DONE_{label};", self.name(*predicate));
                        self.line(&text);
                    }
                }
                Item::EndLoop => {
                    if let Some(label) = self.loops.pop() {
                        self.line(&format!("bra LOOP_{label};"));
                        let _ = writeln!(self.text, "DONE_{label}:");
                    }
                }
            }
        }
    }

    fn label(&mut self) -> usize {
        self.labels += 1;
        self.labels - 1
    }

    fn name(&self, id: RegId) -> &str {
        &self.names[id.0 as usize]
    }

    fn instruction(&self, instr: &Instr) -> String {
        let mut text = match instr.guard {
            Some((predicate, true)) => format!("@{} ", self.name(predicate)),
            Some((predicate, false)) => format!("@!{} ", self.name(predicate)),
            None => String::new(),
        };
        // A parameter and the shared memory's base have names in place of operands.
        if let Some(special) = self.named(instr) {
            return text + &special;
        }
        let (mut dst, mut src) = (instr.dst.iter(), instr.src.iter());
        for token in instr.row.tokens() {
            match token {
                Token::Literal(literal) => text.push_str(literal),
                Token::Operands { access, ty, count, braced } => {
                    let operands: Vec<String> = (0..count)
                        .filter_map(|_| match access {
                            Access::Write | Access::ReadWrite => {
                                dst.next().map(|&id| self.name(id).to_owned())
                            }
                            Access::Read | Access::Address => {
                                src.next().map(|operand| self.operand(operand, ty))
                            }
                        })
                        .collect();
                    let list = operands.join(", ");
                    text.push_str(&if braced { format!("{{{list}}}") } else { list });
                }
            }
        }
        if text.ends_with('}') && text.contains('\n') {
            return text; // a block of several lines ends itself
        }
        text + ";"
    }

    fn operand(&self, operand: &Operand, ty: Type) -> String {
        match *operand {
            Operand::Reg(id) => self.name(id).to_owned(),
            Operand::Address(id, 0) => self.name(id).to_owned(),
            Operand::Address(id, offset) => format!("{}+{offset}", self.name(id)),
            Operand::Imm(bits, _) => immediate(bits, ty),
        }
    }

    fn named(&self, instr: &Instr) -> Option<String> {
        use crate::instr::{Semantics, WarpOp};
        let Semantics::Warp(op) = instr.row.semantics else { return None };
        let dst = instr.dst.first().map(|&id| self.name(id))?;
        let param = |operand: Option<&Operand>| match operand {
            Some(&Operand::Imm(index, _)) => {
                self.kernel.params.get(index as usize).map(|param| param.name.as_str())
            }
            _ => None,
        };
        match op {
            WarpOp::Param => Some(format!("{} {dst}, [{}];", instr.row.name(), param(instr.src.first())?)),
            WarpOp::ParamAddress => Some(format!(
                "mov.b64 {dst}, {0};\n\tcvta.param.u64 {dst}, {dst};",
                param(instr.src.first())?
            )),
            WarpOp::SharedBase => Some(format!("mov.u32 {dst}, {SHARED};")),
            _ => None,
        }
    }
}

/// A constant as PTX reads it, bit for bit.
fn immediate(bits: u64, ty: Type) -> String {
    match ty {
        Type::F32 => format!("0f{:08X}", bits as u32),
        Type::S32 => (bits as u32 as i32).to_string(),
        Type::S64 => (bits as i64).to_string(),
        Type::Pred => (bits & 1).to_string(),
        Type::U32 | Type::U64 if bits < 1 << 16 => bits.to_string(),
        _ => format!("0x{bits:x}"),
    }
}
