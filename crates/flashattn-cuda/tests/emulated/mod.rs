//! What the emulated passes share.

use flashattn_cuda::kernels::copy_rows;
use flashattn_cuda::plan::PlanError;
use flashattn_cuda::stage::Copy;
use flashattn_spec::suite::{Case, ExecError};
use flashattn_spec::{DType, Dropout};
use ptx::emulate::{Arg, Buffer, Launch, Memory, emulate};

/// Blocks of a launch: more than one, so that work is shared out, and few, so that a block has several turns.
pub const GRID: u32 = 3;

pub fn failed(error: impl std::fmt::Display) -> ExecError {
    ExecError::Failed(error.to_string())
}

pub fn refused(error: PlanError) -> ExecError {
    match error {
        PlanError::Unsupported { .. } => ExecError::Unsupported { feature: error.to_string() },
        PlanError::Problem(_) => failed(error),
    }
}

/// Runs a copy in the emulator, between so many bytes into a buffer of the caller's and into the workspace.
pub fn copy<T>(
    step: &Copy<T>,
    memory: &mut Memory,
    caller: (Buffer, u64),
    staged: (Buffer, u64),
) -> Result<(), ExecError> {
    let [caller, staged] = [caller, staged].map(|(buffer, offset)| memory.address(buffer) + offset);
    let (from, to) = if step.back { (staged, caller) } else { (caller, staged) };
    let (long, short) = step.arguments(from, to);
    let args = long.map(Arg::U64).into_iter().chain(short.map(Arg::U32)).collect();
    // Fewer blocks than planned: each has several turns.
    let grid = step.launch.grid.map(|blocks| blocks.min(GRID));
    let kernel = copy_rows(&step.config);
    ptx::verify(&kernel).map_err(failed)?;
    emulate(&kernel, memory, &Launch { grid, args, ..Launch::default() }).map_err(failed)?;
    Ok(())
}

/// The corpus has dropout at one head dimension; its tiles differ by them.
pub fn with_dropout(cases: Vec<Case>) -> impl Iterator<Item = Case> {
    let cases = cases.into_iter().filter(|case| case.name.starts_with("head-dim/"));
    cases.filter(|case| case.problem.dtype != DType::F32).map(|mut case| {
        case.name += " with dropout";
        case.problem.dropout = Some(Dropout { p: 0.3, seed: 1 << 40 | 11 });
        case
    })
}
