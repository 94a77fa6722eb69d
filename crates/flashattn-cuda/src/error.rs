//! The one error of this crate.

use flashattn_spec::ProblemError;
use flashattn_spec::tensor::ViewError;
use ptx::instr::Target;
use ptx::kernel::TensorMapError;
use ptx::verify::VerifyErrors;

use crate::plan::PlanError;

/// What can go wrong between a problem, a kernel and a GPU.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No driver's library can be loaded.
    #[error("no NVIDIA driver: {} cannot be loaded", if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" })]
    NoDriver,
    /// The driver lacks a function.
    #[error(
        "the NVIDIA driver has no function {function}; expected CUDA {expected} or later (a newer driver)"
    )]
    MissingFunction {
        /// Its name.
        function: &'static str,
        /// The first CUDA version that does.
        expected: Version,
    },
    /// The driver is too old for the PTX that is emitted.
    #[error("the NVIDIA driver supports CUDA {got}; expected {expected} or later")]
    OldDriver {
        /// Its version.
        got: Version,
        /// The first that suits.
        expected: Version,
    },
    /// There is no such GPU.
    #[error("no GPU {ordinal}: this machine has {count}")]
    NoDevice {
        /// Number asked for, from 0.
        ordinal: u32,
        /// GPUs there are.
        count: u32,
    },
    /// A call of the driver failed. After an error of a kernel (an illegal address, say) every later call of the process
    /// fails in the same way.
    #[error("{call} failed: {name} ({code}): {text}")]
    Driver {
        /// The function called.
        call: &'static str,
        /// `CUresult`.
        code: u32,
        /// Its name.
        name: String,
        /// The driver's explanation.
        text: String,
    },
    /// The kernel breaks a rule.
    #[error(transparent)]
    Verify(#[from] VerifyErrors),
    /// The kernel is for other GPUs.
    #[error("kernel {kernel} is for {expected}; got {device} of compute capability {}.{}", .got.0, .got.1)]
    Target {
        /// The kernel's name.
        kernel: String,
        /// Its target.
        expected: Target,
        /// The GPU's name.
        device: String,
        /// The GPU's compute capability.
        got: (u32, u32),
    },
    /// The driver's compiler refuses the PTX.
    #[error("the driver refuses kernel {kernel} ({source}):\n{log}")]
    Compile {
        /// The kernel's name.
        kernel: String,
        /// What the compiler printed, with the PTX and Rust lines it speaks of.
        log: String,
        /// The driver's error.
        source: Box<Error>,
    },
    /// The kernel's dynamic shared memory does not fit.
    #[error(
        "kernel {kernel} needs {got} bytes of shared memory a block; expected at most {expected} on this GPU"
    )]
    Shared {
        /// The kernel's name.
        kernel: String,
        /// Bytes it needs.
        got: u32,
        /// Bytes a block may have.
        expected: u32,
    },
    /// The launch has another number of arguments than the kernel has parameters.
    #[error("kernel {kernel} got {got} arguments; expected {expected}")]
    ArgumentCount {
        /// The kernel's name.
        kernel: String,
        /// Arguments given.
        got: usize,
        /// Parameters it has.
        expected: usize,
    },
    /// An argument is of another kind than its parameter.
    #[error("argument {index} ({name}) of kernel {kernel} is {got}; expected {expected}")]
    Argument {
        /// The kernel's name.
        kernel: String,
        /// Which, from 0.
        index: usize,
        /// The parameter's name.
        name: String,
        /// Kind of the argument.
        got: &'static str,
        /// Kind of the parameter.
        expected: &'static str,
    },
    /// The grid cannot be launched.
    #[error("a grid of {got:?} blocks for kernel {kernel}; expected {expected}")]
    Grid {
        /// The kernel's name.
        kernel: String,
        /// Blocks given.
        got: [u32; 3],
        /// What is possible.
        expected: String,
    },
    /// A stream, buffer or event belongs to another GPU.
    #[error("{what} is of GPU {got}; expected GPU {expected}")]
    OtherDevice {
        /// What.
        what: &'static str,
        /// Its GPU.
        got: u32,
        /// The GPU of what it is used with.
        expected: u32,
    },
    /// A range leaves a buffer.
    #[error("{what}: bytes {first} to {end} of a buffer of {bytes} bytes")]
    Range {
        /// What was to be done.
        what: &'static str,
        /// First byte.
        first: u64,
        /// Byte after the last.
        end: u128,
        /// Bytes of the buffer.
        bytes: u64,
    },
    /// A buffer's bytes are not a whole number of elements.
    #[error("a buffer of {bytes} bytes read as elements of {size} bytes; expected a whole number of them")]
    Elements {
        /// Bytes of the buffer.
        bytes: u64,
        /// Bytes of an element.
        size: usize,
    },
    /// A tensor map is refused.
    #[error("tensor map: {0}")]
    TensorMap(#[from] TensorMapError),
    /// The problem, or a tensor's shape or type, is wrong.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// The kernels do not take the problem.
    #[error(transparent)]
    Plan(PlanError),
    /// A view does not fit its memory.
    #[error("{name}: {source}")]
    View {
        /// The tensor.
        name: &'static str,
        /// What is wrong with it.
        source: ViewError,
    },
    /// A tensor's address is no multiple of its elements' size.
    #[error("{name} at address {address:#x}; expected a multiple of {expected}")]
    Misaligned {
        /// The tensor.
        name: &'static str,
        /// Its address.
        address: u64,
        /// What it should be a multiple of.
        expected: usize,
    },
    /// An address is not of a GPU's memory.
    #[error("{name} at address {address:#x} is {got}; expected memory of GPU {expected}")]
    Pointer {
        /// The tensor.
        name: &'static str,
        /// Its address.
        address: u64,
        /// What the address is.
        got: &'static str,
        /// The GPU of the plan.
        expected: u32,
    },
    /// A stream is not of the GPU's primary context.
    #[error("the stream is of another context; expected one of the primary context of GPU {expected}")]
    OtherContext {
        /// The GPU of the plan.
        expected: u32,
    },
    /// A workspace is too small.
    #[error("a workspace of {got} bytes; expected at least {expected}")]
    Workspace {
        /// Its bytes.
        got: u64,
        /// Bytes that the tensors' layout needs.
        expected: u64,
    },
    /// A kernel went wrong, or work that was put into the context before it: the driver tells of both at the next wait.
    #[error("kernel {kernel} failed, or work before it ({config}): {error}")]
    Kernel {
        /// The kernel's name.
        kernel: String,
        /// Its config.
        config: String,
        /// The driver's error.
        error: Box<Error>,
    },
}

impl From<PlanError> for Error {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::Problem(error) => Error::Problem(error),
            unsupported => Error::Plan(unsupported),
        }
    }
}

/// A CUDA version, as `1000 · major + 10 · minor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}
