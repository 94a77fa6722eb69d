//! ptxas as the judge of a kernel: does NVIDIA's assembler take it, how many registers, does it spill, what does it warn
//! of? It needs no GPU. The driver's own compiler is the same program, so what ptxas says is what a launch gets.

use std::env;
use std::ffi::OsString;
use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::emit::emit;
use crate::instr::Target;
use crate::kernel::Kernel;

/// The version that `tools/ptxas.sh` puts into the cache.
pub const VERSION: &str = "13.0.88";

/// What ptxas says of a kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Registers of a thread at launch (before `setmaxnreg`).
    pub registers: u32,
    /// Bytes of registers written to local memory, a thread.
    pub spill_stores: u32,
    /// Bytes of registers read back.
    pub spill_loads: u32,
    /// Bytes of stack, a thread.
    pub stack: u32,
    /// Bytes of static shared memory; dynamic shared memory is not in it.
    pub shared: u32,
    /// Block barriers used.
    pub barriers: u32,
    /// Warnings, and the remarks that tell of a loss of speed (`wgmma` serialised: C7508 to C7519), a line each.
    pub warnings: Vec<String>,
}

impl Report {
    /// Whether the kernel is as its author meant it: no spills and nothing to warn of.
    pub fn check(&self) -> Result<(), Error> {
        let &Report { spill_stores, spill_loads, registers, .. } = self;
        if spill_stores + spill_loads > 0 {
            return Err(Error::Spills { spill_stores, spill_loads, registers });
        }
        match self.warnings.is_empty() {
            true => Ok(()),
            false => Err(Error::Warnings(self.warnings.clone())),
        }
    }
}

/// Why there is no good report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no ptxas.
    #[error(
        "ptxas was not found; looked at {}. Run `bash tools/ptxas.sh` (from PyPI into a cache, no root), or set PTXAS to its path",
        list(.looked)
    )]
    NotFound {
        /// Every path tried, in order.
        looked: Vec<PathBuf>,
    },
    /// ptxas refuses the kernel.
    #[error("ptxas refuses the kernel:\n{message}")]
    Failed {
        /// What it said; below each line of it the PTX line it speaks of, and the Rust line where that was built.
        message: String,
    },
    /// ptxas took the kernel, but its output has no figures.
    #[error("ptxas did not print the kernel's registers and spills; it printed:\n{output}")]
    Unreadable {
        /// What it printed.
        output: String,
    },
    /// A file or process could not be made.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel spills registers.
    #[error(
        "registers spill to local memory: {spill_stores} bytes stored, {spill_loads} loaded a thread; expected none within {registers} registers"
    )]
    Spills {
        /// [`Report::spill_stores`].
        spill_stores: u32,
        /// [`Report::spill_loads`].
        spill_loads: u32,
        /// [`Report::registers`].
        registers: u32,
    },
    /// ptxas warns.
    #[error("ptxas warns, expected silence:\n{}", .0.join("\n"))]
    Warnings(Vec<String>),
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Finds ptxas: `$PTXAS` if set (and then nowhere else), every folder of `$PATH`, `bin` of `$CUDA_HOME`, `$CUDA_PATH` and
/// `/usr/local/cuda`, and last the cache that `tools/ptxas.sh` fills.
pub fn find() -> Result<PathBuf, Error> {
    let looked = candidates(|name| env::var_os(name).filter(|value| !value.is_empty()));
    match looked.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => Err(Error::NotFound { looked }),
    }
}

fn candidates(var: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let program = format!("ptxas{}", env::consts::EXE_SUFFIX);
    if let Some(path) = var("PTXAS") {
        return vec![path.into()];
    }
    let mut paths: Vec<PathBuf> =
        var("PATH").iter().flat_map(|path| env::split_paths(path).collect::<Vec<_>>()).collect();
    paths.extend(
        ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(&var).map(|home| Path::new(&home).join("bin")),
    );
    paths.push("/usr/local/cuda/bin".into());
    let cache = var("FLASHATTN_CACHE")
        .map(PathBuf::from)
        .or_else(|| var("XDG_CACHE_HOME").map(|cache| Path::new(&cache).join("flashattn")))
        .or_else(|| var("HOME").map(|home| Path::new(&home).join(".cache/flashattn")));
    paths.extend(cache.map(|cache| cache.join("ptxas").join(VERSION)));
    paths.iter().map(|folder| folder.join(&program)).collect()
}

/// Has ptxas assemble a kernel. The kernel is not verified first: see [`verify`](crate::verify::verify).
pub fn assemble(kernel: &Kernel) -> Result<Report, Error> {
    assemble_text(&emit(kernel), kernel.target)
}

/// Has ptxas assemble a PTX module with one kernel.
pub fn assemble_text(ptx: &str, target: Target) -> Result<Report, Error> {
    let program = find()?;
    let folder = Folder::new()?;
    let file = folder.0.join("kernel.ptx");
    fs::write(&file, ptx)
        .map_err(|source| Error::Io { what: format!("writing {}", file.display()), source })?;
    let output = Command::new(&program)
        .args(["-v", "--warn-on-spills", "-arch", target.name(), "-o"])
        .arg(folder.0.join("kernel.cubin"))
        .arg(&file)
        .output()
        .map_err(|source| Error::Io { what: format!("running {}", program.display()), source })?;
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    if !output.status.success() {
        // Warnings of a kernel that is refused would only hide the reason.
        let errors: Vec<&str> = text.lines().filter(|line| !is_warning(line)).collect();
        let message = explain(&errors.join("\n"), ptx);
        return Err(Error::Failed {
            message: if message.is_empty() { output.status.to_string() } else { message },
        });
    }
    parse(&text, ptx).ok_or(Error::Unreadable { output: text })
}

/// A folder of this call, deleted when it ends.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Folder, Error> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ptx-{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = env::temp_dir().join(name);
        // A folder left by a crashed process of the same id is no longer anyone's; a link of that name is refused.
        let _ = fs::remove_dir_all(&path);
        match fs::create_dir(&path) {
            Ok(()) => Ok(Folder(path)),
            Err(source) => Err(Error::Io { what: format!("making the folder {}", path.display()), source }),
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Figures and warnings out of ptxas' output; `None` if it does not have them.
fn parse(output: &str, ptx: &str) -> Option<Report> {
    let mut report = Report::default();
    let (mut properties, mut used) = (false, false);
    for line in output.lines() {
        // "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" and
        // "ptxas info    : Used 24 registers, used 1 barriers, 1024 bytes smem, 528 bytes cmem[0]"
        if line.contains("bytes stack frame") {
            properties = true;
        } else if line.contains("Used ") && line.contains(" registers") {
            used = true;
        } else if is_warning(line) {
            report.warnings.push(explain(line, ptx));
            continue;
        } else {
            continue;
        }
        for part in line.rsplit(" : ").next()?.split(',') {
            let words: Vec<&str> = part.split_whitespace().collect();
            let Some(number) = words.iter().find_map(|word| word.parse().ok()) else { continue };
            match words[..] {
                [.., "stack", "frame"] => report.stack = number,
                [.., "spill", "stores"] => report.spill_stores = number,
                [.., "spill", "loads"] => report.spill_loads = number,
                [.., "registers"] => report.registers = number,
                [.., "barriers"] => report.barriers = number,
                [.., "smem"] => report.shared = number,
                _ => {}
            }
        }
    }
    (properties && used).then_some(report)
}

/// Warnings proper, and the remarks printed as information although the kernel loses speed.
fn is_warning(line: &str) -> bool {
    line.contains("warning") || line.contains("Performance Loss") || line.contains("(C75")
}

/// Lines that ptxas or the driver's compiler printed, each followed by the PTX line it speaks of and the Rust line from
/// which that came.
pub fn explain(output: &str, ptx: &str) -> String {
    let lines: Vec<&str> = ptx.lines().collect();
    let mut text = String::new();
    for line in output.lines().filter(|line| !line.trim().is_empty()) {
        let number = line.split_once(", line ").and_then(|(_, rest)| {
            rest.split(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse::<usize>().ok())
        });
        let message =
            if number.is_some() { line.split_once("; ").map_or(line, |(_, message)| message) } else { line };
        let _ = writeln!(text, "{message}");
        let Some(shown) = number.and_then(|number| lines.get(number.checked_sub(1)?)) else { continue };
        let _ = writeln!(text, "    PTX line {}: {}", number.unwrap_or_default(), shown.trim());
        let built = lines[..number.unwrap_or_default()].iter().rev().find_map(|line| {
            let comment = line.trim().strip_prefix("// ")?;
            let (file, number) = comment.rsplit_once(':')?;
            (file.ends_with(".rs") && number.parse::<u32>().is_ok()).then_some(comment)
        });
        if let Some(place) = built {
            let _ = writeln!(text, "    built at {place}");
        }
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use std::panic::Location;

    use super::*;
    use crate::instr::{
        self, Access, Accumulator, Element, Instr, Item, Operand, Order as Ordering, RegId, Row, Semantics,
        Space, SpecialRegister, Token, WarpOp as W, WgmmaShape, all_rows,
    };
    use crate::kernel::{Param, ParamKind, Register};
    use crate::types::Type;
    use crate::verify::takes_immediate;

    fn kernel(target: Target) -> Kernel {
        let kinds = [ParamKind::U32, ParamKind::S32, ParamKind::F32, ParamKind::U64, ParamKind::TensorMap];
        Kernel {
            name: "k".into(),
            target,
            block: [128, 1, 1],
            cluster: [1; 3],
            min_blocks: 1,
            params: kinds
                .iter()
                .enumerate()
                .map(|(i, &kind)| Param { name: format!("p{i}"), kind })
                .collect(),
            shared: Vec::new(),
            shared_bytes: 1024,
            registers: Vec::new(),
            body: Vec::new(),
        }
    }

    /// The index of the parameter that a row reads: it is a constant always.
    fn parameter(row: &Row) -> Option<u64> {
        match row.semantics {
            Semantics::Warp(W::ParamAddress) => Some(4),
            Semantics::Warp(W::Param) => [Type::U32, Type::S32, Type::F32, Type::U64]
                .iter()
                .position(|ty| row.text.starts_with(&format!("ld.param.{ty} ")))
                .map(|index| index as u64),
            _ => None,
        }
    }

    /// Appends the row: registers from `next` on, or a constant for the read operand of index `immediate`.
    fn push(kernel: &mut Kernel, row: &Row, immediate: Option<usize>) {
        let site = Location::caller();
        let (mut dst, mut src) = (Vec::new(), Vec::new());
        for token in row.tokens() {
            let Token::Operands { access, ty, count, .. } = token else { continue };
            for _ in 0..count {
                let id = RegId(kernel.registers.len() as u32);
                kernel.registers.push(Register { ty, site });
                match access {
                    Access::Write | Access::ReadWrite => dst.push(id),
                    // The map of a tensor copy has no offset: its brackets hold the coordinates too.
                    Access::Address if ty == Type::U64 && row.text.contains(".tensor.") => {
                        src.push(Operand::Address(id, 0))
                    }
                    Access::Address => src.push(Operand::Address(id, 16)),
                    Access::Read => src.push(match (parameter(row), row.semantics, src.len()) {
                        (Some(index), ..) => Operand::Imm(index, ty),
                        // Its size is no register.
                        (_, Semantics::Warp(W::CpAsync), 2) => Operand::Imm(16, ty),
                        (.., index) if immediate != Some(index) => Operand::Reg(id),
                        (_, Semantics::Warp(W::BarSync | W::BarArrive), 1) => Operand::Imm(32, ty),
                        (
                            _,
                            Semantics::Warp(
                                W::BulkLoad | W::BulkStore | W::BulkToCluster | W::BulkReduceAddF32,
                            ),
                            _,
                        ) => Operand::Imm(16, ty),
                        _ => Operand::Imm(1, ty),
                    }),
                }
            }
        }
        kernel.body.push(Item::Comment(format!("row {}", row.text.replace('\n', " "))));
        kernel.body.push(Item::Instr(Instr { row: row.clone(), dst, src, guard: None, site }));
    }

    #[test]
    #[ignore = "needs ptxas: bash tools/ptxas.sh"]
    fn ptxas_takes_every_row_on_its_first_target() {
        let mut rows = all_rows();
        rows.extend([Type::U32, Type::S32, Type::F32, Type::U64].map(instr::param));
        rows.extend([instr::param_address(), instr::shared_base(), instr::special(SpecialRegister::Tid(0))]);
        let mut failures = String::new();
        for target in [Target::Sm80, Target::Sm89, Target::Sm90, Target::Sm90a] {
            let rows: Vec<&Row> = rows.iter().filter(|row| row.target == target).collect();
            assert!(!rows.is_empty(), "no row is new in {target}");
            for batch in rows.chunks(200) {
                let mut kernel = kernel(target);
                for row in batch {
                    push(&mut kernel, row, None);
                    let (operands, mut read) = (row.tokens(), 0);
                    for token in operands {
                        let Token::Operands { access: Access::Read | Access::Address, count, .. } = token
                        else {
                            continue;
                        };
                        if takes_immediate(row, &token) {
                            push(&mut kernel, row, Some(read));
                        }
                        read += count;
                    }
                }
                if let Err(error) = assemble(&kernel) {
                    failures += &format!("{target}: {error}\n");
                }
            }
        }
        assert!(failures.is_empty(), "{failures}");
    }

    #[test]
    #[ignore = "needs ptxas: bash tools/ptxas.sh"]
    fn a_row_that_ptxas_refuses_is_named_with_its_line() {
        let mut kernel = kernel(Target::Sm80);
        push(&mut kernel, &instr::ADD_F32, None);
        push(&mut kernel, &instr::ELECT, None); // Hopper's
        let error = assemble(&kernel).unwrap_err();
        assert!(matches!(error, Error::Failed { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("elect.sync _|%p0, %b0;") && text.contains("built at assemble.rs:"), "{text}");
        assert!(!text.contains("add.rn"), "{text}");
    }

    #[test]
    #[ignore = "needs ptxas: bash tools/ptxas.sh"]
    fn spills_of_ptxas_fail_the_check() {
        // 100 values live at once, and 16 blocks of 128 threads that share 65536 registers: 32 a thread.
        let mut spilling = kernel(Target::Sm90);
        push(&mut spilling, &instr::param(Type::U64), None);
        // The loads' base and the stores' may be the same address, so no store can go before the last load.
        let load = instr::load(Space::Global, Type::F32, 1, Ordering::Weak, instr::Cache::Default);
        let store = instr::store(Space::Global, Type::F32, 1, Ordering::Weak);
        push(
            &mut spilling,
            &instr::load(Space::Global, Type::U64, 1, Ordering::Weak, instr::Cache::Default),
            None,
        );
        if let Some(Item::Instr(load)) = spilling.body.last_mut() {
            load.src = vec![Operand::Address(RegId(0), 0)];
        }
        let (from, to, first) = (RegId(0), RegId(2), spilling.registers.len() as i32);
        let site = Location::caller();
        spilling.registers.resize(first as usize + 100, Register { ty: Type::F32, site });
        let item = |row: &Row, dst, src| Item::Instr(Instr { row: row.clone(), dst, src, guard: None, site });
        for i in 0..100 {
            let value = RegId((first + i) as u32);
            spilling.body.push(item(&load, vec![value], vec![Operand::Address(from, 4 * i)]));
        }
        for i in 0..100 {
            let value = RegId((first + i) as u32);
            spilling.body.push(item(&store, vec![], vec![Operand::Address(to, 4 * i), Operand::Reg(value)]));
        }
        let free = assemble(&spilling).unwrap();
        free.check().unwrap();
        assert!(free.registers > 100 && free.stack == 0, "{free:?}");

        spilling.min_blocks = 16;
        let report = assemble(&spilling).unwrap();
        assert!(report.registers <= 32 && report.spill_stores > 0 && report.stack > 0, "{report:?}");
        assert!(matches!(report.check(), Err(Error::Spills { .. })));
        assert!(report.warnings.iter().any(|line| line.contains("spill")), "{:?}", report.warnings);
    }

    #[test]
    #[ignore = "needs ptxas: bash tools/ptxas.sh"]
    fn wgmma_serialised_by_ptxas_fails_the_check() {
        let shape = WgmmaShape {
            n: 8,
            a: Element::BF16,
            b: Element::BF16,
            d: Accumulator::F32,
            a_in_registers: false,
            transpose_a: false,
            transpose_b: false,
        };
        let mut kernel = kernel(Target::Sm90a);
        push(&mut kernel, &instr::WGMMA_FENCE, None);
        push(&mut kernel, &instr::wgmma(shape), None);
        push(&mut kernel, &instr::WGMMA_COMMIT, None);
        // The accumulator is used before any wait.
        let address = RegId(kernel.registers.len() as u32);
        push(&mut kernel, &instr::store(Space::Global, Type::F32, 1, Ordering::Weak), None);
        if let Some(Item::Instr(store)) = kernel.body.last_mut() {
            store.src = vec![Operand::Address(address, 0), Operand::Reg(RegId(0))];
        }
        let report = assemble(&kernel).unwrap();
        assert!(report.warnings.iter().any(|line| line.contains("(C75")), "{report:?}");
        let error = report.check().unwrap_err();
        assert!(matches!(error, Error::Warnings(_)) && error.to_string().contains("GMMA"), "{error}");
    }

    #[test]
    fn output_is_read() {
        let output = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'k' for 'sm_90a'\n\
            ptxas info    : Function properties for k\n    \
            24 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\n\
            ptxas info    : Used 168 registers, used 3 barriers, 24 bytes cumulative stack size, 1024 bytes smem, 528 bytes cmem[0]\n";
        let expected = Report {
            registers: 168,
            spill_stores: 8,
            spill_loads: 16,
            stack: 24,
            shared: 1024,
            barriers: 3,
            warnings: vec![],
        };
        assert_eq!(parse(output, "").unwrap(), expected);
        assert_eq!(parse("ptxas info    : 0 bytes gmem\n", ""), None);
    }

    #[test]
    fn ptxas_is_looked_for_in_order() {
        let suffix = env::consts::EXE_SUFFIX;
        let vars = |name: &str| match name {
            "PATH" => env::join_paths(["/a", "/b"]).ok(),
            "CUDA_HOME" => Some("/cuda".into()),
            "HOME" => Some("/home/me".into()),
            _ => None,
        };
        let paths =
            ["/a", "/b", "/cuda/bin", "/usr/local/cuda/bin", "/home/me/.cache/flashattn/ptxas/13.0.88"];
        assert_eq!(candidates(vars), paths.map(|folder| Path::new(folder).join(format!("ptxas{suffix}"))));
        let chosen = |name: &str| if name == "PTXAS" { Some("/mine/ptxas".into()) } else { vars(name) };
        assert_eq!(candidates(chosen), [PathBuf::from("/mine/ptxas")]);
        let cache = |name: &str| if name == "FLASHATTN_CACHE" { Some("/cache".into()) } else { vars(name) };
        assert!(
            candidates(cache)
                .ends_with(&[Path::new("/cache/ptxas").join(VERSION).join(format!("ptxas{suffix}"))])
        );
        let text = Error::NotFound { looked: candidates(vars) }.to_string();
        assert!(text.contains("/cuda/bin/ptxas") && text.contains("tools/ptxas.sh"), "{text}");
    }

    #[test]
    fn nothing_is_left_behind() {
        let folder = Folder::new().unwrap();
        let path = folder.0.clone();
        fs::write(path.join("kernel.ptx"), "x").unwrap();
        drop(folder);
        assert!(!path.exists());
    }

    #[test]
    fn the_script_fetches_the_version_that_is_looked_for() {
        let script =
            fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tools/ptxas.sh")).unwrap();
        assert!(script.contains(&format!("version={VERSION} ")), "tools/ptxas.sh fetches another version");
    }
}
