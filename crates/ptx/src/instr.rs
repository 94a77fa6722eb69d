//! The instruction table: one row for each PTX instruction that a kernel can use.
//!
//! A row is the instruction's text with its operands' types in place of the operands, the first target that has it, the
//! class under which the emulator counts it, and what it does. Everything else is made from the row: the builder's
//! operand check, the emitted text, the emulator's step, and a test that has ptxas assemble each row alone. **A new
//! instruction is a new row** in [`rows!`](crate::instr) below, or a new member of one of the families (functions that
//! make rows: `wgmma`, `mma`, `load`, …).
//!
//! # How a row's text is read
//!
//! `"fma.rn.f32 =f32, f32, f32"` — a word that follows a space, comma or bracket and is a type name is an operand:
//!
//! | word | operand |
//! |---|---|
//! | `f32` | a register or an immediate, read |
//! | `=f32` | a register, written |
//! | `+f32` | a register, read and written |
//! | `f32*4` | four of them in braces; also `=f32*4`, `+f32*4` |
//! | `[u64]` | an address: a register and a constant byte offset |
//! | anything else | itself |
//!
//! Operands are given in the order of the text, written ones apart from read ones ([`Instr::dst`], [`Instr::src`]).

use std::borrow::Cow;
use std::fmt;
use std::panic::Location;

use half::{bf16, f16};

use crate::fp8;
use crate::types::{Bits, Type};

/// The first kind of GPU that has an instruction, and the target for which a kernel is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// Ampere (A100) and everything after it.
    Sm80,
    /// Ada (fp8 in `mma`).
    Sm89,
    /// Hopper, what later architectures keep.
    Sm90,
    /// Hopper with what only Hopper has: `wgmma`, `setmaxnreg`.
    Sm90a,
}

impl Target {
    /// As PTX and ptxas write it.
    pub const fn name(self) -> &'static str {
        match self {
            Target::Sm80 => "sm_80",
            Target::Sm89 => "sm_89",
            Target::Sm90 => "sm_90",
            Target::Sm90a => "sm_90a",
        }
    }

    /// Dynamic shared memory that one block may have, in bytes.
    pub const fn shared_limit(self) -> u32 {
        match self {
            Target::Sm80 => 163 * 1024,
            Target::Sm89 => 99 * 1024,
            Target::Sm90 | Target::Sm90a => 227 * 1024,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Classes under which the emulator counts warp instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// f32 and packed-half arithmetic.
    Float,
    /// Integer and logic arithmetic, moves, selections, predicates.
    Integer,
    /// Conversions.
    Convert,
    /// The special-function unit: exp2, log2, tanh, reciprocal.
    Special,
    /// Between lanes: shuffles, votes.
    Lanes,
    /// Loads and stores of global memory.
    Global,
    /// Loads and stores of shared memory, `ldmatrix`, `stmatrix`.
    Shared,
    /// Atomics and reductions.
    Atomic,
    /// Asynchronous copies (cp.async, bulk copies, TMA).
    Copy,
    /// Tensor-core products.
    Matrix,
    /// Barriers, fences, waits.
    Sync,
}

/// One register's values in the 32 lanes of a warp.
pub type Lanes = [u64; 32];

/// What an instruction computes in each lane by itself: results from operands.
pub type LaneFn = fn(results: &mut [Lanes], operands: &[Lanes]);

/// What an instruction does.
#[derive(Clone, Copy, Debug)]
pub enum Semantics {
    /// A pure function of each lane's operands.
    Lane(LaneFn),
    /// Anything that touches memory, other lanes, or time.
    Warp(WarpOp),
}

/// A memory space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Global memory; addresses are 64 bits.
    Global,
    /// The block's (or, through `mapa`, the cluster's) shared memory; addresses are 32 bits.
    Shared,
}

/// A read-modify-write operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AtomOp {
    /// Sum.
    Add,
    /// Minimum.
    Min,
    /// Maximum.
    Max,
    /// `old >= limit ? 0 : old + 1`.
    Inc,
    /// Exchange.
    Exch,
    /// Compare with the first operand and, if equal, store the second.
    Cas,
}

impl AtomOp {
    const fn name(self) -> &'static str {
        match self {
            AtomOp::Add => "add",
            AtomOp::Min => "min",
            AtomOp::Max => "max",
            AtomOp::Inc => "inc",
            AtomOp::Exch => "exch",
            AtomOp::Cas => "cas",
        }
    }
}

/// The order that a global access keeps with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// None.
    Weak,
    /// Atomic, without ordering others; device scope.
    Relaxed,
    /// Later accesses stay after it; device scope.
    Acquire,
    /// Earlier accesses stay before it; device scope.
    Release,
    /// Both; device scope.
    AcqRel,
}

impl Order {
    const fn suffix(self) -> &'static str {
        match self {
            Order::Weak => "",
            Order::Relaxed => ".relaxed.gpu",
            Order::Acquire => ".acquire.gpu",
            Order::Release => ".release.gpu",
            Order::AcqRel => ".acq_rel.gpu",
        }
    }
}

/// Element types of tensor-core operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// binary16.
    F16,
    /// bfloat16.
    BF16,
    /// f32 of which 19 bits are used.
    TF32,
    /// fp8 with 4 exponent bits.
    E4M3,
    /// fp8 with 5 exponent bits.
    E5M2,
}

impl Element {
    /// Bytes of an element in memory.
    pub const fn bytes(self) -> u32 {
        match self {
            Element::F16 | Element::BF16 => 2,
            Element::TF32 => 4,
            Element::E4M3 | Element::E5M2 => 1,
        }
    }

    /// As PTX writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Element::F16 => "f16",
            Element::BF16 => "bf16",
            Element::TF32 => "tf32",
            Element::E4M3 => "e4m3",
            Element::E5M2 => "e5m2",
        }
    }
}

/// Type of a tensor-core accumulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Accumulator {
    /// One f32 a register.
    F32,
    /// Two f16 a register.
    F16,
}

/// Shape and types of a `wgmma`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WgmmaShape {
    /// Columns: a multiple of 8 up to 256. Rows are always 64.
    pub n: u32,
    /// Element type of A.
    pub a: Element,
    /// Element type of B.
    pub b: Element,
    /// Accumulator type.
    pub d: Accumulator,
    /// A comes from registers (4 a thread) instead of shared memory.
    pub a_in_registers: bool,
    /// A in shared memory is M-major (16-bit types only).
    pub transpose_a: bool,
    /// B in shared memory is N-major (16-bit types only).
    pub transpose_b: bool,
}

impl WgmmaShape {
    /// Depth of one instruction: 32 bytes of elements.
    pub const fn k(&self) -> u32 {
        32 / self.a.bytes()
    }

    /// Accumulator registers a thread.
    pub const fn accumulators(&self) -> u32 {
        match self.d {
            Accumulator::F32 => self.n / 2,
            Accumulator::F16 => self.n / 4,
        }
    }
}

/// Special registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SpecialRegister {
    /// Thread in the block, by dimension.
    Tid(u8),
    /// Threads of the block.
    Ntid(u8),
    /// Block in the grid.
    Ctaid(u8),
    /// Blocks of the grid.
    Nctaid(u8),
    /// Lane in the warp.
    Laneid,
    /// Rank of the block in its cluster.
    ClusterCtarank,
    /// Cluster in the grid.
    Clusterid(u8),
    /// Clusters of the grid.
    Nclusterid(u8),
    /// Multiprocessor on which the block runs.
    Smid,
    /// Nanoseconds (64 bits).
    Globaltimer,
    /// Cycles (64 bits).
    Clock64,
}

/// How `shfl` picks the source lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shuffle {
    /// The lane given.
    Idx,
    /// lane − n.
    Up,
    /// lane + n.
    Down,
    /// lane xor n.
    Bfly,
}

/// What an instruction does beyond its own lane. Operands are in the order of the row's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // fields are named as the variants' texts name them
pub enum WarpOp {
    /// Read a special register.
    Special(SpecialRegister),
    /// Read a kernel parameter: operand 0 is its index (immediate).
    Param,
    /// Address of a tensor-map parameter: operand 0 is its index (immediate).
    ParamAddress,
    /// Base address of the block's dynamic shared memory.
    SharedBase,
    /// `count` values of `bits` each from `[address]`.
    Load { space: Space, bits: u8, count: u8, order: Order },
    /// `[address]`, then `count` values of `bits` each.
    Store { space: Space, bits: u8, count: u8, order: Order },
    /// `[address]`, value(s) → old value, if `returns`. `count` values of type `ty` (vector `red`).
    Atomic { space: Space, op: AtomOp, ty: Type, count: u8, returns: bool, order: Order },
    /// `[shared], [global], bytes (immediate), source bytes`: the rest of `bytes` is zero.
    CpAsync,
    /// Close the thread's group of `cp.async`.
    CpAsyncCommit,
    /// Wait until at most so many groups are pending.
    CpAsyncWait(u8),
    /// `[mbarrier]`: arrives when the thread's earlier `cp.async` have completed; `noinc`.
    CpAsyncMbarrierArrive,
    /// `count` 8×8 matrices of 16-bit elements from shared memory, `[row address]` by lane.
    Ldmatrix { count: u8, transpose: bool },
    /// The reverse.
    Stmatrix { count: u8, transpose: bool },
    /// Warp product m16n8 (k = 32 bytes of A elements, or half of it): D, A, B, C.
    Mma { k: u8, a: Element, b: Element, d: Accumulator },
    /// value, lane or distance, clamp, member mask.
    Shuffle(Shuffle),
    /// predicate, member mask → predicate: true in any lane.
    VoteAny,
    /// predicate, member mask → predicate: true in all lanes.
    VoteAll,
    /// predicate, member mask → bits of the lanes.
    Ballot,
    /// value (u32), member mask → reduction over the lanes.
    Redux(AtomOp),
    /// member mask → predicate, true in one lane.
    Elect,
    /// barrier id, threads.
    BarSync,
    /// barrier id, threads: arrives and goes on.
    BarArrive,
    /// member mask.
    BarWarp,
    /// `[mbarrier], count`.
    MbarrierInit,
    /// `[mbarrier]`.
    MbarrierInval,
    /// `[mbarrier]` of the block.
    MbarrierArrive,
    /// `[mbarrier]` in any block of the cluster (a `mapa` address).
    MbarrierArriveRemote,
    /// `[mbarrier], bytes`: expects so many bytes more in this phase, and arrives.
    MbarrierArriveExpectTx,
    /// `[mbarrier], bytes`: expects so many bytes more in this phase.
    MbarrierExpectTx,
    /// `[mbarrier], parity` → whether the phase of that parity has completed.
    MbarrierTryWait,
    /// `[mbarrier], parity`: waits until the phase of that parity has completed.
    MbarrierWait,
    /// Generic-proxy accesses to shared memory before it are seen by async-proxy accesses after it.
    FenceProxyAsync,
    /// mbarrier initialisations before it are seen by the cluster and the async proxy.
    FenceMbarrierInit,
    /// Orders this thread's accesses at device scope.
    FenceAcqRel,
    /// `[shared], [map, {coordinates}], [mbarrier]` (and the mask of blocks: `multicast`; and a cache policy: `hint`).
    TmaLoad { dims: u8, multicast: bool, hint: bool },
    /// `[map, {coordinates}], [shared]`.
    TmaStore { dims: u8 },
    /// The same, adding to what is there.
    TmaReduceAdd { dims: u8 },
    /// `[map, {coordinates}]`: into L2.
    TmaPrefetch { dims: u8 },
    /// `[map]`: the descriptor itself into the cache.
    PrefetchTensorMap,
    /// `[shared], [global], bytes, [mbarrier]`.
    BulkLoad,
    /// `[global], [shared], bytes`.
    BulkStore,
    /// `[cluster shared], [shared], bytes, [mbarrier]`.
    BulkToCluster,
    /// `[global], [shared], bytes`: adds f32 to what is there.
    BulkReduceAddF32,
    /// Close the thread's group of bulk stores and reductions.
    BulkCommit,
    /// Wait until at most `groups` are pending; `read`: only until their sources have been read.
    BulkWait { groups: u8, read: bool },
    /// Accumulators (written and, if the predicate holds, read), A (descriptor or 4 registers), B descriptor, predicate
    /// scale-d.
    Wgmma(WgmmaShape),
    /// Register accesses before it are seen by `wgmma` after it.
    WgmmaFence,
    /// Close the warpgroup's group of `wgmma`.
    WgmmaCommit,
    /// Wait until at most so many groups are pending.
    WgmmaWait(u8),
    /// Registers a thread from here on.
    SetMaxNReg { increase: bool, registers: u8 },
    /// Arrive at the cluster's barrier; `release`: with ordering.
    ClusterArrive { release: bool },
    /// Wait at the cluster's barrier.
    ClusterWait,
    /// shared address, block rank → the same place in that block's shared memory.
    Mapa,
    /// Wait until the grids this one depends on have completed and their writes are seen.
    GridDepWait,
    /// Let dependent grids start.
    GridDepLaunch,
    /// Makes an L2 cache policy (64 bits).
    CreatePolicy,
    /// Suspend for about so many nanoseconds.
    Nanosleep,
    /// End the grid with an error.
    Trap,
}

/// One row of the table: an instruction.
#[derive(Clone, Debug)]
pub struct Row {
    /// Text with operand types in place of operands; see the [module](self) for how it is read.
    pub text: Cow<'static, str>,
    /// First target that has it.
    pub target: Target,
    /// Class for counting.
    pub class: Class,
    /// What it does.
    pub semantics: Semantics,
}

/// How an operand is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read: in [`Instr::src`].
    Read,
    /// Written: in [`Instr::dst`].
    Write,
    /// Both: in [`Instr::dst`] only.
    ReadWrite,
    /// An address, read: [`Operand::Address`] in [`Instr::src`].
    Address,
}

/// A piece of a row's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token<'a> {
    /// Itself.
    Literal(&'a str),
    /// `count` operands, in braces if `braced`.
    Operands {
        /// How they are used.
        access: Access,
        /// Their type.
        ty: Type,
        /// How many.
        count: usize,
        /// Written with `*`.
        braced: bool,
    },
}

impl Row {
    const fn new(text: &'static str, target: Target, class: Class, semantics: Semantics) -> Row {
        Row { text: Cow::Borrowed(text), target, class, semantics }
    }

    fn made(text: String, target: Target, class: Class, op: WarpOp) -> Row {
        Row { text: Cow::Owned(text), target, class, semantics: Semantics::Warp(op) }
    }

    /// The instruction's name: the text up to its operands.
    pub fn name(&self) -> &str {
        self.text.split(' ').next().unwrap_or_default()
    }

    /// Whether all threads of the warp must execute it together (`.aligned`, and the block barriers).
    pub fn aligned(&self) -> bool {
        self.text.contains(".aligned")
            || self.text.starts_with("bar.sync")
            || self.text.starts_with("bar.arrive")
    }

    /// The text's pieces.
    pub fn tokens(&self) -> Vec<Token<'_>> {
        let text: &str = &self.text;
        let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '=' | '+' | '*' | '_');
        let (mut tokens, mut literal, mut at, mut before) = (Vec::new(), 0, 0, ' ');
        while let Some(c) = text[at..].chars().next() {
            let end = at + text[at..].find(|c| !word(c)).unwrap_or(text.len() - at);
            if end == at {
                at += c.len_utf8();
                before = c;
                continue;
            }
            if let (' ' | '[' | '{' | '|' | '@', Some(operands)) = (before, operand(&text[at..end], before)) {
                if literal < at {
                    tokens.push(Token::Literal(&text[literal..at]));
                }
                tokens.push(operands);
                literal = end;
            }
            before = 'w';
            at = end;
        }
        if literal < text.len() {
            tokens.push(Token::Literal(&text[literal..]));
        }
        tokens
    }
}

/// The operand that a word of a row's text stands for.
fn operand(word: &str, before: char) -> Option<Token<'_>> {
    let (access, rest) = match word.as_bytes().first()? {
        b'=' => (Access::Write, &word[1..]),
        b'+' => (Access::ReadWrite, &word[1..]),
        _ if before == '[' => (Access::Address, word),
        _ => (Access::Read, word),
    };
    let (name, count) = match rest.split_once('*') {
        Some((name, count)) => (name, Some(count.parse().ok()?)),
        None => (rest, None),
    };
    Some(Token::Operands {
        access,
        ty: Type::parse(name)?,
        count: count.unwrap_or(1),
        braced: count.is_some(),
    })
}

/// A virtual register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegId(pub u32);

/// What an instruction reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operand {
    /// A register.
    Reg(RegId),
    /// A constant: the bits of a value of this type.
    Imm(u64, Type),
    /// A register and a constant number of bytes.
    Address(RegId, i32),
}

impl Operand {
    /// The register read, if any.
    pub fn register(&self) -> Option<RegId> {
        match *self {
            Operand::Reg(id) | Operand::Address(id, _) => Some(id),
            Operand::Imm(..) => None,
        }
    }
}

/// Where in the kernel's Rust source an instruction was built.
pub type Site = &'static Location<'static>;

/// An instruction of a kernel.
#[derive(Clone, Debug)]
pub struct Instr {
    /// Its row.
    pub row: Row,
    /// Registers written (or read and written), in the order of the row's text.
    pub dst: Vec<RegId>,
    /// Operands read, in the order of the row's text.
    pub src: Vec<Operand>,
    /// Executed only in lanes where this predicate has this value.
    pub guard: Option<(RegId, bool)>,
    /// Where it was built.
    pub site: Site,
}

/// An element of a kernel's body. Control flow is structured.
#[derive(Clone, Debug)]
pub enum Item {
    /// An instruction.
    Instr(Instr),
    /// Lanes in which the predicate has this value go on; the others wait for `Else` or `EndIf`.
    If {
        /// The predicate.
        predicate: RegId,
        /// The value for which the body runs.
        value: bool,
        /// Where.
        site: Site,
    },
    /// The other lanes' turn.
    Else,
    /// All lanes that came to the `If` go on.
    EndIf,
    /// A loop begins.
    Loop {
        /// Where.
        site: Site,
    },
    /// Lanes in which the predicate has this value leave the innermost loop.
    BreakIf {
        /// The predicate.
        predicate: RegId,
        /// The value for which a lane leaves.
        value: bool,
        /// Where.
        site: Site,
    },
    /// Back to the loop's begin, until no lane is left in it.
    EndLoop,
    /// A remark for readers of the PTX.
    Comment(String),
}

macro_rules! lane {
    (|$($x:ident : $t:ty),*| $body:expr) => {
        Semantics::Lane(|results, operands| {
            let mut operands = operands.iter();
            $(let Some($x) = operands.next() else { return };)*
            for lane in 0..32 {
                $(let $x = <$t as Bits>::from_bits64($x[lane]);)*
                results[0][lane] = Bits::to_bits64($body);
            }
        })
    };
}

macro_rules! rows {
    ($($(#[$doc:meta])* $name:ident $text:literal $target:ident $class:ident $semantics:expr;)*) => {
        $(
            #[doc = concat!("`", $text, "`")]
            $(#[$doc])*
            pub const $name: Row = Row::new($text, Target::$target, Class::$class, $semantics);
        )*
        /// The rows that are not members of a family.
        pub const ROWS: &[Row] = &[$($name),*];
    };
}

/// `min` and `max` of PTX: of a number and a NaN, the number.
fn min(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        b
    } else if b.is_nan() || a < b || (a == b && a.is_sign_negative()) {
        a
    } else {
        b
    }
}
fn max(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        b
    } else if b.is_nan() || a > b || (a == b && a.is_sign_positive()) {
        a
    } else {
        b
    }
}

/// Subnormal to zero, sign kept.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

fn each16(a: [f16; 2], b: [f16; 2], f: fn(f32, f32) -> f32) -> [f16; 2] {
    [0, 1].map(|i| f16::from_f32(f(a[i].to_f32(), b[i].to_f32())))
}
fn eachb16(a: [bf16; 2], b: [bf16; 2], f: fn(f32, f32) -> f32) -> [bf16; 2] {
    [0, 1].map(|i| bf16::from_f32(f(a[i].to_f32(), b[i].to_f32())))
}

/// Float to integer as `cvt.rzi`/`cvt.rni` do it: saturating, NaN is 0.
fn to_i32(x: f32) -> i32 {
    x as i32
}

use Semantics::Warp;
use WarpOp as W;

rows! {
    // f32. Rounding is written out, so that ptxas does not contract: what the emulator computes is what the GPU computes.
    ADD_F32 "add.rn.f32 =f32, f32, f32" Sm80 Float lane!(|a: f32, b: f32| a + b);
    SUB_F32 "sub.rn.f32 =f32, f32, f32" Sm80 Float lane!(|a: f32, b: f32| a - b);
    MUL_F32 "mul.rn.f32 =f32, f32, f32" Sm80 Float lane!(|a: f32, b: f32| a * b);
    FMA_F32 "fma.rn.f32 =f32, f32, f32, f32" Sm80 Float lane!(|a: f32, b: f32, c: f32| a.mul_add(b, c));
    DIV_F32 "div.rn.f32 =f32, f32, f32" Sm80 Float lane!(|a: f32, b: f32| a / b);
    MIN_F32 "min.f32 =f32, f32, f32" Sm80 Float lane!(|a: f32, b: f32| min(a, b));
    MAX_F32 "max.f32 =f32, f32, f32" Sm80 Float lane!(|a: f32, b: f32| max(a, b));
    MIN_NAN_F32 "min.NaN.f32 =f32, f32, f32" Sm80 Float lane!(|a: f32, b: f32| if a.is_nan() { a } else if b.is_nan() { b } else { min(a, b) });
    MAX_NAN_F32 "max.NaN.f32 =f32, f32, f32" Sm80 Float lane!(|a: f32, b: f32| if a.is_nan() { a } else if b.is_nan() { b } else { max(a, b) });
    /// 2 ulp on hardware; the emulator rounds correctly.
    DIV_FULL_F32 "div.full.f32 =f32, f32, f32" Sm80 Special lane!(|a: f32, b: f32| a / b);
    NEG_F32 "neg.f32 =f32, f32" Sm80 Float lane!(|a: f32| -a);
    ABS_F32 "abs.f32 =f32, f32" Sm80 Float lane!(|a: f32| a.abs());
    SQRT_F32 "sqrt.rn.f32 =f32, f32" Sm80 Special lane!(|a: f32| a.sqrt());
    // The approximations: the emulator gives the correctly rounded value, hardware is within 2 ulp (tanh: 2^-11).
    EX2_F32 "ex2.approx.ftz.f32 =f32, f32" Sm80 Special lane!(|a: f32| flush((flush(a) as f64).exp2() as f32));
    LG2_F32 "lg2.approx.ftz.f32 =f32, f32" Sm80 Special lane!(|a: f32| (flush(a) as f64).log2() as f32);
    TANH_F32 "tanh.approx.f32 =f32, f32" Sm80 Special lane!(|a: f32| (a as f64).tanh() as f32);
    RCP_F32 "rcp.approx.ftz.f32 =f32, f32" Sm80 Special lane!(|a: f32| flush(1.0 / flush(a)));
    RSQRT_F32 "rsqrt.approx.ftz.f32 =f32, f32" Sm80 Special lane!(|a: f32| (1.0 / (flush(a) as f64).sqrt()) as f32);
    FLOOR_F32 "cvt.rmi.f32.f32 =f32, f32" Sm80 Convert lane!(|a: f32| a.floor());

    // Pairs of halves.
    ADD_F16X2 "add.rn.f16x2 =f16x2, f16x2, f16x2" Sm80 Float lane!(|a: [f16; 2], b: [f16; 2]| each16(a, b, |a, b| a + b));
    MUL_F16X2 "mul.rn.f16x2 =f16x2, f16x2, f16x2" Sm80 Float lane!(|a: [f16; 2], b: [f16; 2]| each16(a, b, |a, b| a * b));
    FMA_F16X2 "fma.rn.f16x2 =f16x2, f16x2, f16x2, f16x2" Sm80 Float
        lane!(|a: [f16; 2], b: [f16; 2], c: [f16; 2]| [0, 1].map(|i| f16::from_f64(a[i].to_f64() * b[i].to_f64() + c[i].to_f64())));
    MAX_F16X2 "max.f16x2 =f16x2, f16x2, f16x2" Sm80 Float lane!(|a: [f16; 2], b: [f16; 2]| each16(a, b, max));
    ADD_BF16X2 "add.rn.bf16x2 =bf16x2, bf16x2, bf16x2" Sm90 Float lane!(|a: [bf16; 2], b: [bf16; 2]| eachb16(a, b, |a, b| a + b));
    MUL_BF16X2 "mul.rn.bf16x2 =bf16x2, bf16x2, bf16x2" Sm90 Float lane!(|a: [bf16; 2], b: [bf16; 2]| eachb16(a, b, |a, b| a * b));
    FMA_BF16X2 "fma.rn.bf16x2 =bf16x2, bf16x2, bf16x2, bf16x2" Sm80 Float
        lane!(|a: [bf16; 2], b: [bf16; 2], c: [bf16; 2]| [0, 1].map(|i| bf16::from_f64(a[i].to_f64() * b[i].to_f64() + c[i].to_f64())));
    MAX_BF16X2 "max.bf16x2 =bf16x2, bf16x2, bf16x2" Sm80 Float lane!(|a: [bf16; 2], b: [bf16; 2]| eachb16(a, b, max));
    EX2_F16X2 "ex2.approx.f16x2 =f16x2, f16x2" Sm80 Special lane!(|a: [f16; 2]| a.map(|x| f16::from_f64(x.to_f64().exp2())));
    EX2_BF16X2 "ex2.approx.ftz.bf16x2 =bf16x2, bf16x2" Sm90 Special lane!(|a: [bf16; 2]| a.map(|x| bf16::from_f64(x.to_f64().exp2())));

    // Conversions. Packing takes the high half first, as PTX does.
    PACK_F16X2 "cvt.rn.f16x2.f32 =f16x2, f32, f32" Sm80 Convert lane!(|hi: f32, lo: f32| [f16::from_f32(lo), f16::from_f32(hi)]);
    PACK_BF16X2 "cvt.rn.bf16x2.f32 =bf16x2, f32, f32" Sm80 Convert lane!(|hi: f32, lo: f32| [bf16::from_f32(lo), bf16::from_f32(hi)]);
    PACK_E4M3X2 "cvt.rn.satfinite.e4m3x2.f32 =b16, f32, f32" Sm89 Convert
        lane!(|hi: f32, lo: f32| fp8::e4m3(lo) as u16 | (fp8::e4m3(hi) as u16) << 8);
    PACK_E5M2X2 "cvt.rn.satfinite.e5m2x2.f32 =b16, f32, f32" Sm89 Convert
        lane!(|hi: f32, lo: f32| fp8::e5m2(lo) as u16 | (fp8::e5m2(hi) as u16) << 8);
    F16_F32 "cvt.rn.f16.f32 =b16, f32" Sm80 Convert lane!(|a: f32| f16::from_f32(a).to_bits());
    BF16_F32 "cvt.rn.bf16.f32 =b16, f32" Sm80 Convert lane!(|a: f32| bf16::from_f32(a).to_bits());
    F32_F16 "cvt.f32.f16 =f32, b16" Sm80 Convert lane!(|a: u16| f16::from_bits(a).to_f32());
    F32_U32 "cvt.rn.f32.u32 =f32, u32" Sm80 Convert lane!(|a: u32| a as f32);
    F32_S32 "cvt.rn.f32.s32 =f32, s32" Sm80 Convert lane!(|a: i32| a as f32);
    F32_U64 "cvt.rn.f32.u64 =f32, u64" Sm80 Convert lane!(|a: u64| a as f32);
    S32_F32_ZERO "cvt.rzi.s32.f32 =s32, f32" Sm80 Convert lane!(|a: f32| to_i32(a));
    S32_F32_EVEN "cvt.rni.s32.f32 =s32, f32" Sm80 Convert lane!(|a: f32| to_i32(a.round_ties_even()));
    S32_F32_FLOOR "cvt.rmi.s32.f32 =s32, f32" Sm80 Convert lane!(|a: f32| to_i32(a.floor()));
    U64_U32 "cvt.u64.u32 =u64, u32" Sm80 Convert lane!(|a: u32| a as u64);
    S64_S32 "cvt.s64.s32 =s64, s32" Sm80 Convert lane!(|a: i32| a as i64);
    U32_U64 "cvt.u32.u64 =u32, u64" Sm80 Convert lane!(|a: u64| a as u32);
    U32_U16 "cvt.u32.u16 =u32, b16" Sm80 Convert lane!(|a: u16| a as u32);
    U16_U32 "cvt.u16.u32 =b16, u32" Sm80 Convert lane!(|a: u32| a as u16);
    MOV_PAIR "mov.b32 =b32, {b16, b16}" Sm80 Integer lane!(|a: u16, b: u16| [a, b]);
    MOV_PAIR64 "mov.b64 =b64, {b32, b32}" Sm80 Integer lane!(|a: u32, b: u32| a as u64 | (b as u64) << 32);
    SPLIT_PAIR64 "mov.b64 {=b32, =b32}, b64" Sm80 Integer Semantics::Lane(|results, operands| {
        for lane in 0..32 {
            results[0][lane] = operands[0][lane] & 0xffff_ffff;
            results[1][lane] = operands[0][lane] >> 32;
        }
    });
    SPLIT_PAIR "mov.b32 {=b16, =b16}, b32" Sm80 Integer Semantics::Lane(|results, operands| {
        for lane in 0..32 {
            results[0][lane] = operands[0][lane] & 0xffff;
            results[1][lane] = operands[0][lane] >> 16 & 0xffff;
        }
    });

    // Moves; between 32-bit types they keep the bits.
    MOV_PRED "mov.pred =pred, pred" Sm80 Integer lane!(|a: bool| a);
    MOV_B16 "mov.b16 =b16, b16" Sm80 Integer lane!(|a: u16| a);
    MOV_B32 "mov.b32 =b32, b32" Sm80 Integer lane!(|a: u32| a);
    MOV_B64 "mov.b64 =b64, b64" Sm80 Integer lane!(|a: u64| a);

    // Integers.
    ADD_U32 "add.u32 =u32, u32, u32" Sm80 Integer lane!(|a: u32, b: u32| a.wrapping_add(b));
    SUB_U32 "sub.u32 =u32, u32, u32" Sm80 Integer lane!(|a: u32, b: u32| a.wrapping_sub(b));
    MUL_U32 "mul.lo.u32 =u32, u32, u32" Sm80 Integer lane!(|a: u32, b: u32| a.wrapping_mul(b));
    MULHI_U32 "mul.hi.u32 =u32, u32, u32" Sm80 Integer lane!(|a: u32, b: u32| ((a as u64 * b as u64) >> 32) as u32);
    MAD_U32 "mad.lo.u32 =u32, u32, u32, u32" Sm80 Integer lane!(|a: u32, b: u32, c: u32| a.wrapping_mul(b).wrapping_add(c));
    DIV_U32 "div.u32 =u32, u32, u32" Sm80 Integer lane!(|a: u32, b: u32| a.checked_div(b).unwrap_or(u32::MAX));
    REM_U32 "rem.u32 =u32, u32, u32" Sm80 Integer lane!(|a: u32, b: u32| a.checked_rem(b).unwrap_or(a));
    MIN_U32 "min.u32 =u32, u32, u32" Sm80 Integer lane!(|a: u32, b: u32| a.min(b));
    MAX_U32 "max.u32 =u32, u32, u32" Sm80 Integer lane!(|a: u32, b: u32| a.max(b));
    ADD_S32 "add.s32 =s32, s32, s32" Sm80 Integer lane!(|a: i32, b: i32| a.wrapping_add(b));
    SUB_S32 "sub.s32 =s32, s32, s32" Sm80 Integer lane!(|a: i32, b: i32| a.wrapping_sub(b));
    MUL_S32 "mul.lo.s32 =s32, s32, s32" Sm80 Integer lane!(|a: i32, b: i32| a.wrapping_mul(b));
    DIV_S32 "div.s32 =s32, s32, s32" Sm80 Integer lane!(|a: i32, b: i32| if b == 0 { -1 } else { a.wrapping_div(b) });
    REM_S32 "rem.s32 =s32, s32, s32" Sm80 Integer lane!(|a: i32, b: i32| if b == 0 { a } else { a.wrapping_rem(b) });
    MIN_S32 "min.s32 =s32, s32, s32" Sm80 Integer lane!(|a: i32, b: i32| a.min(b));
    MAX_S32 "max.s32 =s32, s32, s32" Sm80 Integer lane!(|a: i32, b: i32| a.max(b));
    NEG_S32 "neg.s32 =s32, s32" Sm80 Integer lane!(|a: i32| a.wrapping_neg());
    ABS_S32 "abs.s32 =s32, s32" Sm80 Integer lane!(|a: i32| a.wrapping_abs());
    ADD_U64 "add.u64 =u64, u64, u64" Sm80 Integer lane!(|a: u64, b: u64| a.wrapping_add(b));
    SUB_U64 "sub.u64 =u64, u64, u64" Sm80 Integer lane!(|a: u64, b: u64| a.wrapping_sub(b));
    MUL_U64 "mul.lo.u64 =u64, u64, u64" Sm80 Integer lane!(|a: u64, b: u64| a.wrapping_mul(b));
    MUL_WIDE_U32 "mul.wide.u32 =u64, u32, u32" Sm80 Integer lane!(|a: u32, b: u32| a as u64 * b as u64);
    MAD_WIDE_U32 "mad.wide.u32 =u64, u32, u32, u64" Sm80 Integer lane!(|a: u32, b: u32, c: u64| (a as u64 * b as u64).wrapping_add(c));
    ADD_S64 "add.s64 =s64, s64, s64" Sm80 Integer lane!(|a: i64, b: i64| a.wrapping_add(b));
    MUL_S64 "mul.lo.s64 =s64, s64, s64" Sm80 Integer lane!(|a: i64, b: i64| a.wrapping_mul(b));
    AND_B32 "and.b32 =b32, b32, b32" Sm80 Integer lane!(|a: u32, b: u32| a & b);
    OR_B32 "or.b32 =b32, b32, b32" Sm80 Integer lane!(|a: u32, b: u32| a | b);
    XOR_B32 "xor.b32 =b32, b32, b32" Sm80 Integer lane!(|a: u32, b: u32| a ^ b);
    NOT_B32 "not.b32 =b32, b32" Sm80 Integer lane!(|a: u32| !a);
    AND_B64 "and.b64 =b64, b64, b64" Sm80 Integer lane!(|a: u64, b: u64| a & b);
    OR_B64 "or.b64 =b64, b64, b64" Sm80 Integer lane!(|a: u64, b: u64| a | b);
    AND_PRED "and.pred =pred, pred, pred" Sm80 Integer lane!(|a: bool, b: bool| a & b);
    OR_PRED "or.pred =pred, pred, pred" Sm80 Integer lane!(|a: bool, b: bool| a | b);
    XOR_PRED "xor.pred =pred, pred, pred" Sm80 Integer lane!(|a: bool, b: bool| a ^ b);
    NOT_PRED "not.pred =pred, pred" Sm80 Integer lane!(|a: bool| !a);
    SHL_B32 "shl.b32 =b32, b32, u32" Sm80 Integer lane!(|a: u32, n: u32| a.checked_shl(n).unwrap_or(0));
    SHR_U32 "shr.u32 =u32, u32, u32" Sm80 Integer lane!(|a: u32, n: u32| a.checked_shr(n).unwrap_or(0));
    SHR_S32 "shr.s32 =s32, s32, u32" Sm80 Integer lane!(|a: i32, n: u32| a >> n.min(31));
    SHL_B64 "shl.b64 =b64, b64, u32" Sm80 Integer lane!(|a: u64, n: u32| a.checked_shl(n).unwrap_or(0));
    SHR_U64 "shr.u64 =u64, u64, u32" Sm80 Integer lane!(|a: u64, n: u32| a.checked_shr(n).unwrap_or(0));
    SHR_S64 "shr.s64 =s64, s64, u32" Sm80 Integer lane!(|a: i64, n: u32| a >> n.min(63));
    POPC_B32 "popc.b32 =u32, b32" Sm80 Integer lane!(|a: u32| a.count_ones());
    CLZ_B32 "clz.b32 =u32, b32" Sm80 Integer lane!(|a: u32| a.leading_zeros());
    PRMT_B32 "prmt.b32 =b32, b32, b32, b32" Sm80 Integer lane!(|a: u32, b: u32, s: u32| permute(a, b, s));
    SELP_B16 "selp.b16 =b16, b16, b16, pred" Sm80 Integer lane!(|a: u16, b: u16, p: bool| if p { a } else { b });
    SELP_B32 "selp.b32 =b32, b32, b32, pred" Sm80 Integer lane!(|a: u32, b: u32, p: bool| if p { a } else { b });
    SELP_B64 "selp.b64 =b64, b64, b64, pred" Sm80 Integer lane!(|a: u64, b: u64, p: bool| if p { a } else { b });

    // Comparisons. `neu` is true when either is NaN, as Rust's `!=`.
    EQ_F32 "setp.eq.f32 =pred, f32, f32" Sm80 Float lane!(|a: f32, b: f32| a == b);
    NE_F32 "setp.neu.f32 =pred, f32, f32" Sm80 Float lane!(|a: f32, b: f32| a != b);
    LT_F32 "setp.lt.f32 =pred, f32, f32" Sm80 Float lane!(|a: f32, b: f32| a < b);
    LE_F32 "setp.le.f32 =pred, f32, f32" Sm80 Float lane!(|a: f32, b: f32| a <= b);
    EQ_U32 "setp.eq.u32 =pred, u32, u32" Sm80 Integer lane!(|a: u32, b: u32| a == b);
    NE_U32 "setp.ne.u32 =pred, u32, u32" Sm80 Integer lane!(|a: u32, b: u32| a != b);
    LT_U32 "setp.lt.u32 =pred, u32, u32" Sm80 Integer lane!(|a: u32, b: u32| a < b);
    LE_U32 "setp.le.u32 =pred, u32, u32" Sm80 Integer lane!(|a: u32, b: u32| a <= b);
    EQ_S32 "setp.eq.s32 =pred, s32, s32" Sm80 Integer lane!(|a: i32, b: i32| a == b);
    NE_S32 "setp.ne.s32 =pred, s32, s32" Sm80 Integer lane!(|a: i32, b: i32| a != b);
    LT_S32 "setp.lt.s32 =pred, s32, s32" Sm80 Integer lane!(|a: i32, b: i32| a < b);
    LE_S32 "setp.le.s32 =pred, s32, s32" Sm80 Integer lane!(|a: i32, b: i32| a <= b);
    EQ_U64 "setp.eq.u64 =pred, u64, u64" Sm80 Integer lane!(|a: u64, b: u64| a == b);
    NE_U64 "setp.ne.u64 =pred, u64, u64" Sm80 Integer lane!(|a: u64, b: u64| a != b);
    LT_U64 "setp.lt.u64 =pred, u64, u64" Sm80 Integer lane!(|a: u64, b: u64| a < b);
    LE_U64 "setp.le.u64 =pred, u64, u64" Sm80 Integer lane!(|a: u64, b: u64| a <= b);

    // Between lanes. The member mask is always all lanes.
    VOTE_ANY "vote.sync.any.pred =pred, pred, b32" Sm80 Lanes Warp(W::VoteAny);
    VOTE_ALL "vote.sync.all.pred =pred, pred, b32" Sm80 Lanes Warp(W::VoteAll);
    BALLOT "vote.sync.ballot.b32 =b32, pred, b32" Sm80 Lanes Warp(W::Ballot);
    ELECT "elect.sync _|=pred, b32" Sm90 Lanes Warp(W::Elect);

    // Block and warp barriers.
    BAR_SYNC "bar.sync u32, u32" Sm80 Sync Warp(W::BarSync);
    BAR_ARRIVE "bar.arrive u32, u32" Sm80 Sync Warp(W::BarArrive);
    BAR_WARP "bar.warp.sync b32" Sm80 Sync Warp(W::BarWarp);
    FENCE_ACQ_REL "fence.acq_rel.gpu" Sm80 Sync Warp(W::FenceAcqRel);

    // cp.async (Ampere).
    CP_ASYNC "cp.async.cg.shared.global [u32], [u64], u32, u32" Sm80 Copy Warp(W::CpAsync);
    CP_ASYNC_SMALL "cp.async.ca.shared.global [u32], [u64], u32, u32" Sm80 Copy Warp(W::CpAsync);
    CP_ASYNC_COMMIT "cp.async.commit_group" Sm80 Sync Warp(W::CpAsyncCommit);
    CP_ASYNC_MBARRIER "cp.async.mbarrier.arrive.noinc.shared.b64 [u32]" Sm80 Sync Warp(W::CpAsyncMbarrierArrive);

    // mbarriers.
    MBARRIER_INIT "mbarrier.init.shared.b64 [u32], u32" Sm80 Sync Warp(W::MbarrierInit);
    MBARRIER_INVAL "mbarrier.inval.shared.b64 [u32]" Sm80 Sync Warp(W::MbarrierInval);
    MBARRIER_ARRIVE "mbarrier.arrive.shared::cta.b64 _, [u32]" Sm90 Sync Warp(W::MbarrierArrive);
    /// Without `.release.cluster`, which ptxas turns into a full memory barrier besides.
    MBARRIER_ARRIVE_REMOTE "mbarrier.arrive.shared::cluster.b64 _, [u32]" Sm90 Sync Warp(W::MbarrierArriveRemote);
    MBARRIER_ARRIVE_EXPECT_TX "mbarrier.arrive.expect_tx.shared::cta.b64 _, [u32], u32" Sm90 Sync Warp(W::MbarrierArriveExpectTx);
    MBARRIER_EXPECT_TX "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [u32], u32" Sm90 Sync Warp(W::MbarrierExpectTx);
    MBARRIER_TRY_WAIT "mbarrier.try_wait.parity.shared::cta.b64 =pred, [u32], u32" Sm90 Sync Warp(W::MbarrierTryWait);
    /// Several lines: the hardware's try_wait gives up after a while, so a wait is a loop around it.
    MBARRIER_WAIT "{\n\t.reg .pred done;\nAGAIN:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [u32], u32;\n\t@done bra DONE;\n\tbra AGAIN;\nDONE:\n\t}"
        Sm90 Sync Warp(W::MbarrierWait);
    FENCE_PROXY_ASYNC "fence.proxy.async.shared::cta" Sm90 Sync Warp(W::FenceProxyAsync);
    FENCE_MBARRIER_INIT "fence.mbarrier_init.release.cluster" Sm90 Sync Warp(W::FenceMbarrierInit);

    // Bulk copies without a tensor map. Sizes and addresses are multiples of 16 bytes.
    BULK_LOAD "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [u32], [u64], u32, [u32]" Sm90 Copy Warp(W::BulkLoad);
    BULK_STORE "cp.async.bulk.global.shared::cta.bulk_group [u64], [u32], u32" Sm90 Copy Warp(W::BulkStore);
    BULK_TO_CLUSTER "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [u32], [u32], u32, [u32]" Sm90 Copy Warp(W::BulkToCluster);
    BULK_REDUCE_ADD_F32 "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [u64], [u32], u32" Sm90 Copy Warp(W::BulkReduceAddF32);
    BULK_COMMIT "cp.async.bulk.commit_group" Sm90 Sync Warp(W::BulkCommit);
    PREFETCH_TENSOR_MAP "prefetch.tensormap [u64]" Sm90 Copy Warp(W::PrefetchTensorMap);
    POLICY_EVICT_FIRST "createpolicy.fractional.L2::evict_first.b64 =u64" Sm80 Integer Warp(W::CreatePolicy);
    POLICY_EVICT_LAST "createpolicy.fractional.L2::evict_last.b64 =u64" Sm80 Integer Warp(W::CreatePolicy);

    // wgmma's own synchronisation.
    WGMMA_FENCE "wgmma.fence.sync.aligned" Sm90a Sync Warp(W::WgmmaFence);
    WGMMA_COMMIT "wgmma.commit_group.sync.aligned" Sm90a Sync Warp(W::WgmmaCommit);

    // Clusters and dependent launches.
    CLUSTER_ARRIVE "barrier.cluster.arrive.release.aligned" Sm90 Sync Warp(W::ClusterArrive { release: true });
    CLUSTER_ARRIVE_RELAXED "barrier.cluster.arrive.relaxed.aligned" Sm90 Sync Warp(W::ClusterArrive { release: false });
    CLUSTER_WAIT "barrier.cluster.wait.acquire.aligned" Sm90 Sync Warp(W::ClusterWait);
    MAPA "mapa.shared::cluster.u32 =u32, u32, u32" Sm90 Integer Warp(W::Mapa);
    GRID_DEP_WAIT "griddepcontrol.wait" Sm90 Sync Warp(W::GridDepWait);
    GRID_DEP_LAUNCH "griddepcontrol.launch_dependents" Sm90 Sync Warp(W::GridDepLaunch);
    NANOSLEEP "nanosleep.u32 u32" Sm80 Sync Warp(W::Nanosleep);
    TRAP "trap" Sm80 Sync Warp(W::Trap);
}

/// `prmt` in its default mode: each nibble of the selector picks a byte of {b, a}; its top bit spreads the sign.
fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = (a as u64 | (b as u64) << 32).to_le_bytes();
    u32::from_le_bytes([0, 1, 2, 3].map(|i| {
        let nibble = (selector >> (4 * i) & 15) as usize;
        let byte = bytes[nibble & 7];
        if nibble & 8 == 0 { byte } else { ((byte as i8) >> 7) as u8 }
    }))
}

/// A read of a kernel parameter of this type; the operand is its index.
pub fn param(ty: Type) -> Row {
    Row::made(format!("ld.param.{ty} ={ty}, u32"), Target::Sm80, Class::Integer, W::Param)
}

/// The generic address of a tensor-map parameter; the operand is its index.
pub fn param_address() -> Row {
    Row::made("mov.b64 =u64, u32".to_owned(), Target::Sm80, Class::Integer, W::ParamAddress)
}

/// The address of the block's dynamic shared memory.
pub fn shared_base() -> Row {
    Row::made("mov.u32 =u32".to_owned(), Target::Sm80, Class::Integer, W::SharedBase)
}

/// A read of a special register.
pub fn special(register: SpecialRegister) -> Row {
    use SpecialRegister::*;
    let axis = |d: u8| ["x", "y", "z"][d.min(2) as usize];
    let (name, wide) = match register {
        Tid(d) => (format!("%tid.{}", axis(d)), false),
        Ntid(d) => (format!("%ntid.{}", axis(d)), false),
        Ctaid(d) => (format!("%ctaid.{}", axis(d)), false),
        Nctaid(d) => (format!("%nctaid.{}", axis(d)), false),
        Laneid => ("%laneid".to_owned(), false),
        ClusterCtarank => ("%cluster_ctarank".to_owned(), false),
        Clusterid(d) => (format!("%clusterid.{}", axis(d)), false),
        Nclusterid(d) => (format!("%nclusterid.{}", axis(d)), false),
        Smid => ("%smid".to_owned(), false),
        Globaltimer => ("%globaltimer".to_owned(), true),
        Clock64 => ("%clock64".to_owned(), true),
    };
    let target = match register {
        ClusterCtarank | Clusterid(_) | Nclusterid(_) => Target::Sm90,
        _ => Target::Sm80,
    };
    let text = if wide { format!("mov.u64 =u64, {name}") } else { format!("mov.u32 =u32, {name}") };
    Row::made(text, target, Class::Integer, W::Special(register))
}

fn vector(ty: &str, count: u8) -> String {
    if count == 1 { ty.to_owned() } else { format!("{ty}*{count}") }
}

fn dotted(count: u8) -> String {
    if count == 1 { String::new() } else { format!(".v{count}") }
}

fn space_text(space: Space) -> (&'static str, &'static str) {
    match space {
        Space::Global => ("global", "[u64]"),
        Space::Shared => ("shared", "[u32]"),
    }
}

/// How a load treats the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cache {
    /// As usual.
    Default,
    /// Read-only data, through the texture path.
    ReadOnly,
    /// Read once: not kept in L1.
    Streaming,
}

/// Loads `count` (1, 2, 4) values of `ty`; at most 16 bytes, at an address that is a multiple of the bytes loaded.
pub fn load(space: Space, ty: Type, count: u8, order: Order, cache: Cache) -> Row {
    let (name, address) = space_text(space);
    let cache = match (space, order, cache) {
        (Space::Shared, ..) | (_, _, Cache::Default) | (_, Order::Acquire | Order::Relaxed, _) => "",
        (_, _, Cache::ReadOnly) => ".nc",
        (_, _, Cache::Streaming) => ".L1::no_allocate",
    };
    let bits = ty.bits() as u8;
    Row::made(
        format!(
            "ld{}.{name}{cache}{}.b{bits} ={}, {address}",
            order.suffix(),
            dotted(count),
            vector(ty.name(), count)
        ),
        Target::Sm80,
        if space == Space::Global { Class::Global } else { Class::Shared },
        W::Load { space, bits, count, order },
    )
}

/// Stores `count` (1, 2, 4) values of `ty`; at most 16 bytes, at an address that is a multiple of the bytes stored.
pub fn store(space: Space, ty: Type, count: u8, order: Order) -> Row {
    let (name, address) = space_text(space);
    let bits = ty.bits() as u8;
    Row::made(
        format!(
            "st{}.{name}{}.b{bits} {address}, {}",
            order.suffix(),
            dotted(count),
            vector(ty.name(), count)
        ),
        Target::Sm80,
        if space == Space::Global { Class::Global } else { Class::Shared },
        W::Store { space, bits, count, order },
    )
}

/// A read-modify-write that returns the old value. `ty`: f32 (add), u32, s32, u64; for `Cas` and `Exch` the bits.
pub fn atom(space: Space, op: AtomOp, ty: Type, order: Order) -> Row {
    let (name, address) = space_text(space);
    let (shown, operands) = match op {
        AtomOp::Cas => (format!("b{}", ty.bits()), format!("{ty}, {ty}")),
        AtomOp::Exch => (format!("b{}", ty.bits()), ty.to_string()),
        _ => (ty.to_string(), ty.to_string()),
    };
    Row::made(
        format!("atom{}.{name}.{}.{shown} ={ty}, {address}, {operands}", order.suffix(), op.name()),
        Target::Sm80,
        Class::Atomic,
        W::Atomic { space, op, ty, count: 1, returns: true, order },
    )
}

/// A read-modify-write without a result; `count` 2 or 4 adds so many f32 at once (global, sm_90).
pub fn red(space: Space, op: AtomOp, ty: Type, count: u8, order: Order) -> Row {
    let (name, address) = space_text(space);
    Row::made(
        format!(
            "red{}.{name}.{}{}.{ty} {address}, {}",
            order.suffix(),
            op.name(),
            dotted(count),
            vector(ty.name(), count)
        ),
        if count == 1 { Target::Sm80 } else { Target::Sm90 },
        Class::Atomic,
        W::Atomic { space, op, ty, count, returns: false, order },
    )
}

/// `shfl.sync` of a 32-bit value.
pub fn shuffle(mode: Shuffle) -> Row {
    let name = match mode {
        Shuffle::Idx => "idx",
        Shuffle::Up => "up",
        Shuffle::Down => "down",
        Shuffle::Bfly => "bfly",
    };
    Row::made(
        format!("shfl.sync.{name}.b32 =b32, b32, u32, u32, b32"),
        Target::Sm80,
        Class::Lanes,
        W::Shuffle(mode),
    )
}

/// `redux.sync` over u32: add, min, max.
pub fn redux(op: AtomOp) -> Row {
    Row::made(
        format!("redux.sync.{}.u32 =u32, u32, b32", op.name()),
        Target::Sm80,
        Class::Lanes,
        W::Redux(op),
    )
}

/// Waits until at most `groups` of the thread's cp.async groups are pending.
pub fn cp_async_wait(groups: u8) -> Row {
    Row::made(format!("cp.async.wait_group {groups}"), Target::Sm80, Class::Sync, W::CpAsyncWait(groups))
}

/// Waits until at most `groups` of the thread's bulk groups are pending (`read`: have not read their source).
pub fn bulk_wait(groups: u8, read: bool) -> Row {
    let read_text = if read { ".read" } else { "" };
    Row::made(
        format!("cp.async.bulk.wait_group{read_text} {groups}"),
        Target::Sm90,
        Class::Sync,
        W::BulkWait { groups, read },
    )
}

/// Waits until at most `groups` of the warpgroup's wgmma groups are pending.
pub fn wgmma_wait(groups: u8) -> Row {
    Row::made(
        format!("wgmma.wait_group.sync.aligned {groups}"),
        Target::Sm90a,
        Class::Sync,
        W::WgmmaWait(groups),
    )
}

/// Loads `count` (1, 2, 4) 8×8 matrices of 16-bit elements.
pub fn ldmatrix(count: u8, transpose: bool) -> Row {
    let trans = if transpose { ".trans" } else { "" };
    Row::made(
        format!("ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 =b32*{count}, [u32]"),
        Target::Sm80,
        Class::Shared,
        W::Ldmatrix { count, transpose },
    )
}

/// Stores `count` (1, 2, 4) 8×8 matrices of 16-bit elements.
pub fn stmatrix(count: u8, transpose: bool) -> Row {
    let trans = if transpose { ".trans" } else { "" };
    Row::made(
        format!("stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [u32], b32*{count}"),
        Target::Sm90,
        Class::Shared,
        W::Stmatrix { count, transpose },
    )
}

/// Warp product `m16n8` of depth `k`: D = A·B + C, A row-major and B column-major fragments.
pub fn mma(a: Element, b: Element, k: u8, d: Accumulator) -> Row {
    let (shown, regs, ty) = match d {
        Accumulator::F32 => ("f32", 4, "f32"),
        Accumulator::F16 => ("f16", 2, "b32"),
    };
    // A has 16·k elements over 32 lanes, B half of that.
    let a_regs = 16 * k as u32 * a.bytes() / 128;
    let b_regs = a_regs / 2;
    let target = if a.bytes() == 1 { Target::Sm89 } else { Target::Sm80 };
    Row::made(
        format!(
            "mma.sync.aligned.m16n8k{k}.row.col.{shown}.{}.{}.{shown} ={ty}*{regs}, b32*{a_regs}, b32*{b_regs}, {ty}*{regs}",
            a.name(),
            b.name()
        ),
        target,
        Class::Matrix,
        W::Mma { k, a, b, d },
    )
}

/// Warpgroup product `m64nNk(32 bytes)`, asynchronous: D (+)= A·B.
pub fn wgmma(shape: WgmmaShape) -> Row {
    let (d, ty) = match shape.d {
        Accumulator::F32 => ("f32", "f32"),
        Accumulator::F16 => ("f16", "b32"),
    };
    let (regs, bit) = (shape.accumulators(), |on: bool| on as u8);
    let a = if shape.a_in_registers { "b32*4" } else { "u64" };
    // The transposition immediates exist for 16-bit types only, and for A only when it is in shared memory.
    let transposes = match (shape.a.bytes(), shape.a_in_registers) {
        (2, true) => format!(", {}", bit(shape.transpose_b)),
        (2, false) => format!(", {}, {}", bit(shape.transpose_a), bit(shape.transpose_b)),
        _ => String::new(),
    };
    Row::made(
        format!(
            "wgmma.mma_async.sync.aligned.m64n{}k{}.{d}.{}.{} +{ty}*{regs}, {a}, u64, pred, 1, 1{transposes}",
            shape.n,
            shape.k(),
            shape.a.name(),
            shape.b.name()
        ),
        Target::Sm90a,
        Class::Matrix,
        W::Wgmma(shape),
    )
}

/// `setmaxnreg`: registers a thread from here on, a multiple of 8 from 24 to 256.
pub fn set_max_registers(increase: bool, registers: u8) -> Row {
    let verb = if increase { "inc" } else { "dec" };
    Row::made(
        format!("setmaxnreg.{verb}.sync.aligned.u32 {registers}"),
        Target::Sm90a,
        Class::Sync,
        W::SetMaxNReg { increase, registers },
    )
}

/// TMA: a box of a tensor into shared memory, completing on an mbarrier.
pub fn tma_load(dims: u8, multicast: bool, hint: bool) -> Row {
    let (cast, mask) = if multicast { (".multicast::cluster", ", b16") } else { ("", "") };
    let (cache, policy) = if hint { (".L2::cache_hint", ", u64") } else { ("", "") };
    Row::made(
        format!(
            "cp.async.bulk.tensor.{dims}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes{cast}{cache} \
             [u32], [u64, s32*{dims}], [u32]{mask}{policy}"
        ),
        // ptxas takes multicast for sm_90, but warns that it is meant for sm_90a.
        if multicast { Target::Sm90a } else { Target::Sm90 },
        Class::Copy,
        W::TmaLoad { dims, multicast, hint },
    )
}

/// TMA: a box of shared memory into a tensor.
pub fn tma_store(dims: u8) -> Row {
    Row::made(
        format!("cp.async.bulk.tensor.{dims}d.global.shared::cta.tile.bulk_group [u64, s32*{dims}], [u32]"),
        Target::Sm90,
        Class::Copy,
        W::TmaStore { dims },
    )
}

/// TMA: a box of shared memory added to a tensor.
pub fn tma_reduce_add(dims: u8) -> Row {
    Row::made(
        format!(
            "cp.reduce.async.bulk.tensor.{dims}d.global.shared::cta.add.tile.bulk_group [u64, s32*{dims}], [u32]"
        ),
        Target::Sm90,
        Class::Copy,
        W::TmaReduceAdd { dims },
    )
}

/// TMA: a box of a tensor into L2.
pub fn tma_prefetch(dims: u8) -> Row {
    Row::made(
        format!("cp.async.bulk.prefetch.tensor.{dims}d.L2.global.tile [u64, s32*{dims}]"),
        Target::Sm90,
        Class::Copy,
        W::TmaPrefetch { dims },
    )
}

/// The whole table: [`ROWS`] and members of every family.
pub fn all_rows() -> Vec<Row> {
    use Element::*;
    let mut rows = ROWS.to_vec();
    let specials = [
        SpecialRegister::Laneid,
        SpecialRegister::ClusterCtarank,
        SpecialRegister::Smid,
        SpecialRegister::Globaltimer,
        SpecialRegister::Clock64,
    ];
    rows.extend(specials.map(special));
    for d in 0..3 {
        use SpecialRegister::*;
        rows.extend([Tid(d), Ntid(d), Ctaid(d), Nctaid(d), Clusterid(d), Nclusterid(d)].map(special));
    }
    for space in [Space::Global, Space::Shared] {
        for (ty, counts) in [
            (Type::B16, &[1u8, 2, 4][..]),
            (Type::B32, &[1, 2, 4]),
            (Type::F32, &[1, 2, 4]),
            (Type::U64, &[1, 2]),
        ] {
            for &count in counts {
                // Caches can be told apart for global memory only.
                let caches = [Cache::Default, Cache::ReadOnly, Cache::Streaming];
                for cache in &caches[..if space == Space::Global { 3 } else { 1 }] {
                    rows.push(load(space, ty, count, Order::Weak, *cache));
                }
                rows.push(store(space, ty, count, Order::Weak));
            }
        }
        for op in [AtomOp::Add, AtomOp::Min, AtomOp::Max, AtomOp::Inc, AtomOp::Exch, AtomOp::Cas] {
            rows.push(atom(space, op, Type::U32, Order::Relaxed));
        }
        rows.push(atom(space, AtomOp::Add, Type::F32, Order::Relaxed));
        rows.push(red(space, AtomOp::Add, Type::F32, 1, Order::Relaxed));
        rows.push(red(space, AtomOp::Add, Type::U32, 1, Order::Relaxed));
    }
    rows.push(load(Space::Global, Type::U32, 1, Order::Acquire, Cache::Default));
    rows.push(store(Space::Global, Type::U32, 1, Order::Release));
    rows.push(atom(Space::Global, AtomOp::Add, Type::U32, Order::AcqRel));
    rows.push(red(Space::Global, AtomOp::Add, Type::U32, 1, Order::Release));
    rows.push(red(Space::Global, AtomOp::Add, Type::U64, 1, Order::Relaxed));
    rows.extend([2, 4].map(|count| red(Space::Global, AtomOp::Add, Type::F32, count, Order::Relaxed)));
    rows.extend([Shuffle::Idx, Shuffle::Up, Shuffle::Down, Shuffle::Bfly].map(shuffle));
    rows.extend([AtomOp::Add, AtomOp::Min, AtomOp::Max].map(redux));
    rows.extend([0, 1, 3].map(cp_async_wait));
    rows.extend([0, 1, 3].map(wgmma_wait));
    for transpose in [false, true] {
        rows.extend([bulk_wait(0, transpose), bulk_wait(2, transpose)]);
        for count in [1, 2, 4] {
            rows.extend([ldmatrix(count, transpose), stmatrix(count, transpose)]);
        }
    }
    for (a, ks) in [(F16, [8, 16]), (BF16, [8, 16]), (TF32, [4, 8])] {
        rows.extend(ks.map(|k| mma(a, a, k, Accumulator::F32)));
    }
    rows.push(mma(F16, F16, 16, Accumulator::F16));
    for a in [E4M3, E5M2] {
        rows.extend([E4M3, E5M2].map(|b| mma(a, b, 32, Accumulator::F32)));
    }
    for n in (8..=256).step_by(8) {
        for (a, b, d) in [
            (BF16, BF16, Accumulator::F32),
            (F16, F16, Accumulator::F32),
            (F16, F16, Accumulator::F16),
            (TF32, TF32, Accumulator::F32),
            (E4M3, E4M3, Accumulator::F32),
            (E4M3, E5M2, Accumulator::F32),
            (E5M2, E4M3, Accumulator::F32),
            (E5M2, E5M2, Accumulator::F32),
            (E4M3, E4M3, Accumulator::F16),
        ] {
            for a_in_registers in [false, true] {
                let two = a.bytes() == 2;
                rows.push(wgmma(WgmmaShape {
                    n,
                    a,
                    b,
                    d,
                    a_in_registers,
                    transpose_a: two && !a_in_registers && n % 16 == 0,
                    transpose_b: two && n % 16 == 0,
                }));
            }
        }
    }
    rows.extend([set_max_registers(true, 240), set_max_registers(false, 24)]);
    for dims in 1..=5 {
        for multicast in [false, true] {
            rows.extend([false, true].map(|hint| tma_load(dims, multicast, hint)));
        }
        rows.extend([tma_store(dims), tma_reduce_add(dims), tma_prefetch(dims)]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_as_operands_and_literals() {
        let row = mma(Element::BF16, Element::BF16, 16, Accumulator::F32);
        let operands: Vec<_> = row
            .tokens()
            .into_iter()
            .filter_map(|token| match token {
                Token::Operands { access, ty, count, braced } => Some((access, ty, count, braced)),
                Token::Literal(_) => None,
            })
            .collect();
        assert_eq!(
            operands,
            [
                (Access::Write, Type::F32, 4, true),
                (Access::Read, Type::B32, 4, true),
                (Access::Read, Type::B32, 2, true),
                (Access::Read, Type::F32, 4, true)
            ]
        );
        assert_eq!(MBARRIER_WAIT.tokens().iter().filter(|t| matches!(t, Token::Operands { .. })).count(), 2);
        assert_eq!(
            ELECT.tokens()[1],
            Token::Operands { access: Access::Write, ty: Type::Pred, count: 1, braced: false }
        );
        assert_eq!(CP_ASYNC_COMMIT.tokens(), [Token::Literal("cp.async.commit_group")]);
    }

    #[test]
    fn rows_are_distinct() {
        let mut texts: Vec<_> = all_rows().into_iter().map(|row| row.text.into_owned()).collect();
        let all = texts.len();
        texts.sort();
        texts.dedup();
        assert_eq!(texts.len(), all, "a row stands twice in the table");
    }

    #[test]
    fn lane_semantics() {
        let apply = |row: Row, operands: &[u64]| {
            let operands: Vec<Lanes> = operands.iter().map(|&bits| [bits; 32]).collect();
            let mut results = [[0; 32]; 2];
            match row.semantics {
                Semantics::Lane(f) => f(&mut results, &operands),
                Semantics::Warp(op) => panic!("{op:?} is no lane operation"),
            }
            results[0][31]
        };
        let f = |x: f32| x.to_bits64();
        assert_eq!(apply(MAX_F32, &[f(f32::NAN), f(-3.0)]), f(-3.0));
        assert_eq!(apply(PACK_BF16X2, &[f(2.0), f(1.0)]), 0x4000_3f80);
        assert_eq!(apply(SHL_B32, &[1, 32]), 0);
        assert_eq!(apply(SHR_S32, &[(-8i32).to_bits64(), 40]), (-1i32).to_bits64());
        assert_eq!(apply(SHR_S64, &[(-8i64).to_bits64(), 2]), (-2i64).to_bits64());
        assert_eq!(
            apply(F32_U64, &[(1 << 40) + (1 << 16) + 1]),
            f((1u64 << 40) as f32 * (1.0 + f32::EPSILON))
        );
        assert_eq!(apply(MULHI_U32, &[0xD251_1F53, 0xffff_ffff]), 0xD251_1F52);
        assert_eq!(apply(PRMT_B32, &[0x3322_1100, 0x7766_5544, 0x7531]), 0x7755_3311);
        assert_eq!(apply(NE_F32, &[f(f32::NAN), f(1.0)]), 1);
        assert_eq!(apply(MAD_WIDE_U32, &[u32::MAX as u64, 2, 5]), u32::MAX as u64 * 2 + 5);
    }
}
