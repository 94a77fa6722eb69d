//! What the emulator refuses, each with the place in the kernel's source.

use std::fmt;

use crate::instr::Site;
use crate::kernel::TensorMapError;

/// Who was doing what where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The kernel's name.
    pub kernel: String,
    /// The block's index in the grid.
    pub block: [u32; 3],
    /// The warp's index in the block.
    pub warp: u32,
    /// The lane, where one lane is at fault.
    pub lane: Option<u32>,
    /// The instruction's place in the Rust source.
    pub site: Site,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([x, y, z], warp) = (self.block, self.warp);
        write!(f, "{}: kernel {}, block ({x}, {y}, {z}), warp {warp}", self.site, self.kernel)?;
        match self.lane {
            Some(lane) => write!(f, ", lane {lane}"),
            None => Ok(()),
        }
    }
}

/// Why an emulated launch was refused or stopped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Number of arguments.
    #[error("kernel {kernel} takes {expected} arguments, got {got}")]
    ArgumentCount {
        /// The kernel.
        kernel: String,
        /// Arguments given.
        got: usize,
        /// Parameters declared.
        expected: usize,
    },
    /// Kind of an argument.
    #[error("argument {index} ({parameter}) of kernel {kernel}: expected {expected}, got {got}")]
    ArgumentKind {
        /// The kernel.
        kernel: String,
        /// Which, from 0.
        index: usize,
        /// The parameter's name.
        parameter: String,
        /// The argument's kind.
        got: &'static str,
        /// The parameter's kind.
        expected: &'static str,
    },
    /// An argument names a buffer that this memory does not have, or a tensor that reaches beyond its buffer.
    #[error("argument {index} ({parameter}) of kernel {kernel}: {problem}")]
    Argument {
        /// The kernel.
        kernel: String,
        /// Which, from 0.
        index: usize,
        /// The parameter's name.
        parameter: String,
        /// What is wrong.
        problem: String,
    },
    /// Grid, cluster, block or shared memory do not fit each other or the target.
    #[error("launch of kernel {kernel}: {problem}")]
    LaunchShape {
        /// The kernel.
        kernel: String,
        /// What is wrong.
        problem: String,
    },
    /// The kernel is not well formed; `verify` says more.
    #[error("kernel {kernel} is malformed: {problem}")]
    Malformed {
        /// The kernel.
        kernel: String,
        /// What is wrong.
        problem: String,
    },
    /// Two accesses, at least one of which writes, are not ordered.
    #[error("{at}: race: this {access} of {what} is not ordered after the {other_access} at {other}")]
    Race {
        /// The later access.
        at: Box<Place>,
        /// What it does: read or write.
        access: &'static str,
        /// The memory.
        what: String,
        /// What the earlier access does.
        other_access: &'static str,
        /// The earlier access.
        other: Site,
    },
    /// No warp can go on.
    #[error("kernel {kernel}: deadlock:\n{}", .waits.join("\n"))]
    Deadlock {
        /// The kernel.
        kernel: String,
        /// Each warp that has not ended: where it is and what it waits for.
        waits: Vec<String>,
    },
    /// An access outside of a buffer, of the block's shared memory or of a barrier's range.
    #[error("{at}: {bytes} bytes at {address:#x} are out of bounds: {what}")]
    OutOfBounds {
        /// The access.
        at: Box<Place>,
        /// First byte.
        address: u64,
        /// Bytes.
        bytes: u64,
        /// What lies near.
        what: String,
    },
    /// An address that is not a multiple of what the instruction needs.
    #[error("{at}: address {address:#x} ({what}): expected a multiple of {alignment}")]
    Misaligned {
        /// The access.
        at: Box<Place>,
        /// The address.
        address: u64,
        /// Alignment needed.
        alignment: u64,
        /// Of what.
        what: String,
    },
    /// A register or memory was read before anything was written there.
    #[error("{at}: {what} is read but was never written")]
    Uninitialised {
        /// The read.
        at: Box<Place>,
        /// What.
        what: String,
    },
    /// The host reads a byte of a buffer that no one wrote.
    #[error("byte {byte} of buffer {buffer} was never written")]
    Unwritten {
        /// The buffer.
        buffer: String,
        /// The first such byte.
        byte: usize,
    },
    /// The host reads a buffer as elements that it does not have a whole number of, or a foreign buffer.
    #[error("buffer {buffer} of {bytes} bytes cannot be read as elements of {element} bytes")]
    BufferShape {
        /// The buffer.
        buffer: String,
        /// Its size.
        bytes: usize,
        /// Bytes of an element.
        element: usize,
    },
    /// A register of a `wgmma` was touched before the wait that covers it, or without a `wgmma.fence` before.
    #[error("{at}: register of {register}: {problem}")]
    InFlight {
        /// The instruction that touches it.
        at: Box<Place>,
        /// Where the register was made.
        register: Site,
        /// What is wrong.
        problem: &'static str,
    },
    /// The asynchronous proxy reads or overwrites what the generic proxy wrote, with no proxy fence between.
    #[error("{at}: {what} was written at {other} by ordinary stores; a fence.proxy.async must come between")]
    MissingProxyFence {
        /// The asynchronous access.
        at: Box<Place>,
        /// The memory.
        what: String,
        /// The ordinary write.
        other: Site,
    },
    /// Not all the lanes that must execute an instruction together did.
    #[error("{at}: {instruction} needs lanes {needed:#010x}, executed by {active:#010x}")]
    DivergentAligned {
        /// The instruction.
        at: Box<Place>,
        /// Its name.
        instruction: String,
        /// Lanes that execute it.
        active: u32,
        /// Lanes that must.
        needed: u32,
    },
    /// A barrier used against its rules.
    #[error("{at}: {problem}")]
    BarrierMisuse {
        /// The instruction.
        at: Box<Place>,
        /// What is wrong.
        problem: String,
    },
    /// A tensor map is refused.
    #[error("argument {index} ({parameter}) of kernel {kernel}: {source}")]
    TensorMap {
        /// The kernel.
        kernel: String,
        /// Which argument, from 0.
        index: usize,
        /// The parameter's name.
        parameter: String,
        /// Why.
        source: TensorMapError,
    },
    /// A block ends while something still uses its shared memory, or with a promise not kept.
    #[error("kernel {kernel}, block ({}, {}, {}) ends, but {problem}", .block[0], .block[1], .block[2])]
    PendingAtExit {
        /// The kernel.
        kernel: String,
        /// The block.
        block: [u32; 3],
        /// What is pending.
        problem: String,
    },
    /// The kernel executed `trap`.
    #[error("{at}: trap")]
    Trap {
        /// The instruction.
        at: Box<Place>,
    },
    /// A warp executed more instructions than [`INSTRUCTION_BUDGET`](super::INSTRUCTION_BUDGET): it spins.
    #[error(
        "{at}: still running after {instructions} instructions; does it spin on something that never comes?"
    )]
    Budget {
        /// Where it is.
        at: Box<Place>,
        /// Instructions executed.
        instructions: u64,
    },
    /// An operand outside of what the instruction takes, or what the emulator does not model.
    #[error("{at}: {problem}")]
    Unsupported {
        /// The instruction.
        at: Box<Place>,
        /// What is wrong.
        problem: String,
    },
}
