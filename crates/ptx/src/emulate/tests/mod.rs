//! Each mechanism with a kernel that is right and kernels that are wrong in exactly one way.

mod clusters;
mod control;
mod copies;
mod errors;
mod global;
mod mutations;
mod products;
mod shared;
mod speed;
mod tensors;

use super::{Arg, Buffer, Error, Launch, Memory, Report, emulate};
use crate::Builder;
use crate::build::build;
use crate::instr::Target;
use crate::kernel::Kernel;

/// How many interleavings a test looks at.
const SEEDS: u64 = 12;

fn kernel(threads: u32, body: impl FnOnce(&Builder)) -> Kernel {
    build("test", Target::Sm90a, threads, body)
}

fn launch(kernel: &Kernel, grid: u32, args: Vec<Arg>) -> Launch {
    Launch { grid: [grid, 1, 1], args, shared_bytes: kernel.shared_bytes, ..Launch::default() }
}

/// Runs a kernel of one output buffer `out` of so many words, under several seeds that must agree.
fn run(kernel: &Kernel, grid: u32, inputs: &[Vec<u32>], words: usize) -> Result<(Vec<u32>, Report), Error> {
    let mut first: Option<(Vec<u32>, Report)> = None;
    for seed in 0..SEEDS {
        let mut memory = Memory::new();
        let mut args: Vec<Arg> = Vec::new();
        for (i, input) in inputs.iter().enumerate() {
            args.push(Arg::Buffer(memory.upload(&format!("in{i}"), input), 0));
        }
        let out = memory.alloc("out", 4 * words);
        args.push(Arg::Buffer(out, 0));
        let report = emulate(kernel, &mut memory, &Launch { seed, ..launch(kernel, grid, args) })?;
        let values = memory.read(out)?;
        match &first {
            Some(first) => assert_eq!(first.0, values, "seed {seed}"),
            None => first = Some((values, report)),
        }
    }
    Ok(first.unwrap())
}

/// The error that every seed meets; panics if one does not.
fn refused(kernel: &Kernel, grid: u32, words: usize) -> Error {
    let mut last = None;
    for seed in 0..SEEDS {
        let mut memory = Memory::new();
        let out = memory.alloc("out", 4 * words);
        let args = kernel.params.iter().map(|_| Arg::Buffer(out, 0)).collect();
        match emulate(kernel, &mut memory, &Launch { seed, ..launch(kernel, grid, args) }) {
            Ok(_) => panic!("seed {seed} was not refused"),
            Err(error) => last = Some(error),
        }
    }
    last.unwrap()
}

/// The line of this file's error, to see that the place is the right one.
fn line(error: &Error) -> u32 {
    match error {
        Error::Race { at, .. }
        | Error::OutOfBounds { at, .. }
        | Error::Misaligned { at, .. }
        | Error::Uninitialised { at, .. }
        | Error::InFlight { at, .. }
        | Error::MissingProxyFence { at, .. }
        | Error::DivergentAligned { at, .. }
        | Error::BarrierMisuse { at, .. }
        | Error::Unsupported { at, .. }
        | Error::Trap { at } => at.site.line(),
        other => panic!("{other}"),
    }
}

fn floats(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn buffer(memory: &mut Memory, words: usize) -> Buffer {
    memory.alloc("out", 4 * words)
}
