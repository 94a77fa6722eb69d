//! Runs [`Code`] over one block of a strip at a time.
//!
//! A register holds a block of values and an instruction is a loop over it, so that the cost of choosing what to do
//! is shared by hundreds of elements. The loops are over arrays of fixed length, which the compiler turns into
//! vector instructions of the function that all this is inlined into.

use super::Strip;
use super::gather::{Transpose, gather, gather_outer, words};
use super::program::{Arg, Code, Instruction, Op, Outer, SCORE, Spread, Update};
use crate::math;
use bytemuck::{Pod, Zeroable, cast_slice, cast_slice_mut};
use flashattn_spec::expr::Var;

/// Elements of a chunk: the length of the vector loops, a multiple of every `L`.
pub(super) const CHUNK: usize = 64;
/// Chunks of a block: registers are 4 KiB, so that a few of them stay in the L1 cache beside the scores.
pub(super) const BLOCK: usize = 16;

/// The elements of a loop: f32, i32 or truth values as 32 bits.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Chunk(pub [u32; CHUNK]);

// SAFETY: an array of u32, whose 256 bytes are a multiple of the alignment, so without padding.
unsafe impl Zeroable for Chunk {}
// SAFETY: as above.
unsafe impl Pod for Chunk {}

/// Registers of one thread; reused from strip to strip.
#[derive(Default)]
pub struct Scratch {
    registers: Vec<Box<[Chunk]>>,
    /// Scores of a block that is no whole number of chunks.
    ragged: Box<[Chunk]>,
}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Scratch({} registers)", self.registers.len())
    }
}

impl Scratch {
    /// Makes room for `registers` registers. Done before any loop, so that the loops do not allocate.
    pub(super) fn reserve(&mut self, registers: usize) {
        let new = || vec![Chunk([0; CHUNK]); BLOCK].into_boxed_slice();
        if self.ragged.is_empty() {
            self.ragged = new();
        }
        while self.registers.len() < registers {
            self.registers.push(new());
        }
    }

    /// What the registers hold, together with the scores of the block that has run.
    #[inline(always)]
    pub(super) fn values<'r>(&'r self, scores: &'r [f32]) -> Values<'r> {
        let score = match cast_slice::<f32, u32>(scores).as_chunks() {
            (whole, []) => whole,
            _ => cast_slice(&self.ragged),
        };
        Values { registers: &self.registers, score }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        (self.registers.len() + usize::from(!self.ragged.is_empty())) * BLOCK * size_of::<Chunk>()
    }
}

/// A register as an operand: chunk `c` of the block is `chunks[c * step]`.
#[derive(Clone, Copy)]
pub(super) struct View<'r> {
    pub chunks: &'r [[u32; CHUNK]],
    pub step: usize,
}

impl<'r> View<'r> {
    /// Chunk `c` of the block.
    #[inline(always)]
    pub fn chunk(self, c: usize) -> &'r [u32; CHUNK] {
        &self.chunks[c * self.step]
    }

    /// The first `n` chunks of the block, checked once and not in the loop.
    #[inline(always)]
    pub fn first(self, n: usize) -> impl Iterator<Item = &'r [u32; CHUNK]> {
        assert!(n == 0 || self.chunks.len() > (n - 1) * self.step);
        // SAFETY: c · step ≤ (n − 1) · step, which is inside, as was just checked.
        (0..n).map(move |c| unsafe { self.chunks.get_unchecked(c * self.step) })
    }

    /// Element `i` of a value of which the register holds one for each element, row or lane.
    #[inline(always)]
    pub fn at(self, i: usize) -> u32 {
        self.chunks[i / CHUNK][i % CHUNK]
    }
}

/// All operands.
#[derive(Clone, Copy)]
pub(super) struct Values<'r> {
    registers: &'r [Box<[Chunk]>],
    score: &'r [[u32; CHUNK]],
}

impl<'r> Values<'r> {
    #[inline(always)]
    pub fn view(self, arg: Arg) -> View<'r> {
        let step = usize::from(!arg.spread.once());
        if arg.register == SCORE {
            return View { chunks: self.score, step };
        }
        View { chunks: cast_slice(&self.registers[arg.register as usize]), step }
    }
}

/// Rows of a block.
pub(super) const fn block_rows<const L: usize>() -> usize {
    BLOCK * CHUNK / L
}

/// Runs the instructions: with `once` those that a strip needs once, else those for the block of `rows` rows from
/// `row`, whose scores are given (empty if the code does not read them). Results: [`Scratch::values`].
#[inline(always)]
pub(super) fn run<const L: usize, T: Transpose>(
    code: &Code,
    once: bool,
    at: &Strip,
    row: usize,
    rows: usize,
    scores: &[f32],
    scratch: &mut Scratch,
) {
    if !scores.len().is_multiple_of(CHUNK) {
        cast_slice_mut(&mut scratch.ragged)[..scores.len()].copy_from_slice(scores);
    }
    let full = (rows * L).div_ceil(CHUNK);
    // Every row that a chunk of the block holds, were it only in part or beyond the end.
    let dense = (full * CHUNK / L).div_ceil(CHUNK);
    for instruction in if once { &code.strip } else { &code.block } {
        let n = match instruction.spread {
            Spread::Uniform | Spread::Lane => 1,
            Spread::Row => dense,
            Spread::Full => full,
        };
        // Taken out, so that it can be written while others are read.
        let mut to = std::mem::take(&mut scratch.registers[instruction.to as usize]);
        step::<L, T>(code, instruction, at, row, &mut to[..n], scratch.values(scores));
        scratch.registers[instruction.to as usize] = to;
    }
}

/// One instruction.
#[inline(always)]
fn step<const L: usize, T: Transpose>(
    code: &Code,
    instruction: &Instruction,
    at: &Strip,
    row: usize,
    to: &mut [Chunk],
    values: Values<'_>,
) {
    let [a, b, c] = instruction.args;
    // Operands that an operation does not have are the score, which has a view too.
    let view = |arg| values.view(arg);
    let float = f32::from_bits;
    let truth = |x: bool| if x { u32::MAX } else { 0 };
    match instruction.op {
        Op::Constant(bits) => fill(to, |_, _| bits),
        Op::Uniform(var) => {
            let value = at.get(var) as u32;
            fill(to, |_, _| value);
        }
        Op::Query => fill(to, |_, i| (at.q0 as u32).wrapping_add((i % L) as u32)),
        Op::Key => {
            let first = (at.kv0 as u32).wrapping_add(row as u32);
            fill(to, |c, i| first.wrapping_add((c * CHUNK + i) as u32));
        }
        Op::Expand => {
            let a = view(a);
            for (c, to) in to.iter_mut().enumerate() {
                expand::<L>(&mut to.0, a, c);
            }
        }
        Op::NegFloat => map1(to, view(a), |x| x ^ 0x8000_0000),
        Op::NegInt => map1(to, view(a), |x| (x as i32).wrapping_neg() as u32),
        Op::AbsFloat => map1(to, view(a), |x| x & 0x7fff_ffff),
        Op::AbsInt => map1(to, view(a), |x| (x as i32).wrapping_abs() as u32),
        Op::Not => map1(to, view(a), |x| !x),
        Op::Exp2 => map1(to, view(a), |x| math::exp2::<L>(float(x)).to_bits()),
        Op::Log2 => map1(to, view(a), |x| math::log2::<L>(float(x)).to_bits()),
        Op::Tanh => map1(to, view(a), |x| math::tanh::<L>(float(x)).to_bits()),
        Op::IntToFloat => map1(to, view(a), |x| (x as i32 as f32).to_bits()),
        Op::BoolToFloat => map1(to, view(a), |x| x & 1.0f32.to_bits()),
        Op::Floor => map1(to, view(a), |x| floor(float(x)) as u32),
        Op::AddFloat => map2(to, view(a), view(b), |x, y| (float(x) + float(y)).to_bits()),
        Op::SubFloat => map2(to, view(a), view(b), |x, y| (float(x) - float(y)).to_bits()),
        Op::MulFloat => map2(to, view(a), view(b), |x, y| (float(x) * float(y)).to_bits()),
        Op::DivFloat => map2(to, view(a), view(b), |x, y| (float(x) / float(y)).to_bits()),
        Op::MinFloat => map2(to, view(a), view(b), |x, y| {
            let (a, b) = (float(x), float(y));
            let least = if a < b { x } else { y };
            // Equal numbers differ in the sign of zero at most. A NaN in b is there already.
            let least = if a == b { x | y } else { least };
            if a.is_nan() { x } else { least }
        }),
        Op::MaxFloat => map2(to, view(a), view(b), |x, y| {
            let (a, b) = (float(x), float(y));
            let most = if a > b { x } else { y };
            let most = if a == b { x & y } else { most };
            if a.is_nan() { x } else { most }
        }),
        Op::LtFloat => map2(to, view(a), view(b), |x, y| truth(float(x) < float(y))),
        Op::LeFloat => map2(to, view(a), view(b), |x, y| truth(float(x) <= float(y))),
        Op::EqFloat => map2(to, view(a), view(b), |x, y| truth(float(x) == float(y))),
        Op::NeFloat => map2(to, view(a), view(b), |x, y| truth(float(x) != float(y))),
        Op::AddInt => map2(to, view(a), view(b), u32::wrapping_add),
        Op::SubInt => map2(to, view(a), view(b), u32::wrapping_sub),
        Op::MulInt => map2(to, view(a), view(b), u32::wrapping_mul),
        Op::DivInt => map2(to, view(a), view(b), |x, y| floor_div(x as i32, y as i32) as u32),
        Op::RemInt => map2(to, view(a), view(b), |x, y| {
            let multiple = floor_div(x as i32, y as i32).wrapping_mul(y as i32);
            if y == 0 { 0 } else { x.wrapping_sub(multiple as u32) }
        }),
        Op::MinInt => map2(to, view(a), view(b), |x, y| (x as i32).min(y as i32) as u32),
        Op::MaxInt => map2(to, view(a), view(b), |x, y| (x as i32).max(y as i32) as u32),
        Op::LtInt => map2(to, view(a), view(b), |x, y| truth((x as i32) < y as i32)),
        Op::LeInt => map2(to, view(a), view(b), |x, y| truth(x as i32 <= y as i32)),
        Op::Eq => map2(to, view(a), view(b), |x, y| truth(x == y)),
        Op::And => map2(to, view(a), view(b), |x, y| x & y),
        Op::Or => map2(to, view(a), view(b), |x, y| x | y),
        Op::Xor => map2(to, view(a), view(b), |x, y| x ^ y),
        Op::Shl => map2(to, view(a), view(b), |x, y| x << (y & 31)),
        Op::Shr => map2(to, view(a), view(b), |x, y| ((x as i32) >> (y & 31)) as u32),
        Op::Select => map3(to, view(a), view(b), view(c), |x, y, z| if (x as i32) < 0 { y } else { z }),
        Op::SoftCap => map3(to, view(a), view(b), view(c), |x, y, z| {
            (math::tanh::<L>(float(x) * float(y)) * float(z)).to_bits()
        }),
        Op::Outer(op) => {
            let (a, b) = (view(a), view(b));
            let abs = |q: u32, k: u32| (q.wrapping_sub(k) as i32).wrapping_abs();
            match op {
                Outer::Sub => outer::<L>(to, a, b, |q, k| q.wrapping_sub(k)),
                Outer::SubFrom => outer::<L>(to, a, b, |q, k| k.wrapping_sub(q)),
                Outer::AbsSub => outer::<L>(to, a, b, |q, k| abs(q, k) as u32),
                Outer::Distance => outer::<L>(to, a, b, |q, k| (abs(q, k) as f32).to_bits()),
                Outer::Lt => outer::<L>(to, a, b, |q, k| truth((q as i32) < k as i32)),
                Outer::Le => outer::<L>(to, a, b, |q, k| truth(q as i32 <= k as i32)),
                Outer::Gt => outer::<L>(to, a, b, |q, k| truth(q as i32 > k as i32)),
                Outer::Ge => outer::<L>(to, a, b, |q, k| truth(q as i32 >= k as i32)),
                Outer::Eq => outer::<L>(to, a, b, |q, k| truth(q == k)),
            }
        }
        Op::MulAdd => map3(to, view(a), view(b), view(c), |x, y, z| {
            math::mul_add::<L>(float(x), float(y), float(z)).to_bits()
        }),
        Op::NegMulAdd => map3(to, view(a), view(b), view(c), |x, y, z| {
            math::mul_add::<L>(-float(x), float(y), float(z)).to_bits()
        }),
        Op::Load(number) => {
            let load = &code.loads[usize::from(number)];
            let data = words(&code.tables[load.slot]);
            if load.outer {
                gather_outer::<L, T>(to, load, data, values);
            } else {
                gather(to, load, data, values);
            }
        }
    }
}

#[inline(always)]
fn fill(to: &mut [Chunk], f: impl Fn(usize, usize) -> u32) {
    for (c, to) in to.iter_mut().enumerate() {
        for (i, to) in to.0.iter_mut().enumerate() {
            *to = f(c, i);
        }
    }
}

/// Row values to chunk `c` of a block.
#[inline(always)]
fn expand<const L: usize>(to: &mut [u32; CHUNK], rows: View<'_>, c: usize) {
    let first = c * (CHUNK / L);
    for (r, to) in to.chunks_exact_mut(L).enumerate() {
        let value = rows.at(first + r);
        to.fill(value);
    }
}

// Each loop is a function of references, by which the compiler knows that what it writes is apart from what it
// reads, even after inlining. Most have a variant for an operand that is the same chunk all the time, which then
// stays in vector registers: the loops are bound by loads and stores.

#[inline(always)]
fn map1(to: &mut [Chunk], a: View<'_>, f: impl Fn(u32) -> u32 + Copy) {
    #[inline(always)]
    fn chunk(to: &mut [u32; CHUNK], a: &[u32; CHUNK], f: impl Fn(u32) -> u32) {
        for i in 0..CHUNK {
            to[i] = f(a[i]);
        }
    }
    let a = a.first(to.len());
    for (to, a) in to.iter_mut().zip(a) {
        chunk(&mut to.0, a, f);
    }
}

#[inline(always)]
fn map2(to: &mut [Chunk], a: View<'_>, b: View<'_>, f: impl Fn(u32, u32) -> u32 + Copy) {
    #[inline(always)]
    fn chunk(to: &mut [u32; CHUNK], a: &[u32; CHUNK], b: &[u32; CHUNK], f: impl Fn(u32, u32) -> u32) {
        for i in 0..CHUNK {
            to[i] = f(a[i], b[i]);
        }
    }
    let a = a.first(to.len());
    if b.step == 0 {
        let b = *b.chunk(0);
        for (to, a) in to.iter_mut().zip(a) {
            chunk(&mut to.0, a, &b, f);
        }
    } else {
        let b = b.first(to.len());
        for ((to, a), b) in to.iter_mut().zip(a).zip(b) {
            chunk(&mut to.0, a, b, f);
        }
    }
}

#[inline(always)]
fn map3(to: &mut [Chunk], a: View<'_>, b: View<'_>, c: View<'_>, f: impl Fn(u32, u32, u32) -> u32 + Copy) {
    #[inline(always)]
    fn chunk(
        to: &mut [u32; CHUNK],
        a: &[u32; CHUNK],
        b: &[u32; CHUNK],
        c: &[u32; CHUNK],
        f: impl Fn(u32, u32, u32) -> u32,
    ) {
        for i in 0..CHUNK {
            to[i] = f(a[i], b[i], c[i]);
        }
    }
    let (a, b, c) = (a.first(to.len()), b.first(to.len()), c.first(to.len()));
    for (((to, a), b), c) in to.iter_mut().zip(a).zip(b).zip(c) {
        chunk(&mut to.0, a, b, c, f);
    }
}

/// A value of each lane with one of each row.
#[inline(always)]
fn outer<const L: usize>(
    to: &mut [Chunk],
    lanes: View<'_>,
    rows: View<'_>,
    f: impl Fn(u32, u32) -> u32 + Copy,
) {
    #[inline(always)]
    fn chunk<const L: usize>(
        to: &mut [u32; CHUNK],
        q: &[u32; CHUNK],
        k: &[u32],
        f: impl Fn(u32, u32) -> u32,
    ) {
        let k = &k[..CHUNK / L];
        for i in 0..CHUNK {
            to[i] = f(q[i], k[i / L]);
        }
    }
    let lanes = *lanes.chunk(0);
    let rows = rows.chunks.as_flattened().chunks_exact(CHUNK / L);
    for (to, rows) in to.iter_mut().zip(rows) {
        chunk::<L>(&mut to.0, &lanes, rows, f);
    }
}

/// The place of an operand that an update does not have: all ones.
const NO_CHUNK: &[[u32; CHUNK]] = &[[u32::MAX; CHUNK]];

/// x = f(x, a, b) for kernel data, of any length.
#[inline(always)]
fn replace(data: &mut [f32], a: View<'_>, b: View<'_>, f: impl Fn(f32, u32, u32) -> f32 + Copy) {
    #[inline(always)]
    fn chunk(x: &mut [f32; CHUNK], a: &[u32; CHUNK], b: &[u32; CHUNK], f: impl Fn(f32, u32, u32) -> f32) {
        for i in 0..CHUNK {
            x[i] = f(x[i], a[i], b[i]);
        }
    }
    let (whole, rest) = data.as_chunks_mut();
    let n = whole.len();
    if b.step == 0 {
        let b = *b.chunk(0);
        for (x, a) in whole.iter_mut().zip(a.first(n)) {
            chunk(x, a, &b, f);
        }
    } else {
        for ((x, a), b) in whole.iter_mut().zip(a.first(n)).zip(b.first(n)) {
            chunk(x, a, b, f);
        }
    }
    if !rest.is_empty() {
        for (i, x) in rest.iter_mut().enumerate() {
            *x = f(*x, a.chunk(n)[i], b.chunk(n)[i]);
        }
    }
}

/// data = the values.
#[inline(always)]
pub(super) fn write(data: &mut [f32], a: View<'_>) {
    replace(data, a, View { chunks: NO_CHUNK, step: 0 }, |_, a, _| f32::from_bits(a));
}

/// data = data · a. A hidden element has gradient 0, whatever its derivative is, infinite perhaps: 0 stays 0.
#[inline(always)]
pub(super) fn multiply(data: &mut [f32], a: View<'_>) {
    replace(data, a, View { chunks: NO_CHUNK, step: 0 }, |x, a, _| {
        let product = x * f32::from_bits(a);
        if x == 0.0 { 0.0 } else { product }
    });
}

/// data = `hidden` where not `a` and `b`.
#[inline(always)]
pub(super) fn hide(data: &mut [f32], hidden: f32, a: Arg, b: Option<Arg>, values: Values<'_>) {
    let b = b.map_or(View { chunks: NO_CHUNK, step: 0 }, |b| values.view(b));
    replace(data, values.view(a), b, |x, a, b| if ((a & b) as i32) < 0 { x } else { hidden });
}

/// The last operation of a score mod: new scores in place of the old.
#[inline(always)]
pub(super) fn update<const L: usize>(scores: &mut [f32], update: Update, values: Values<'_>) {
    let none = View { chunks: NO_CHUNK, step: 0 };
    let view = |arg| values.view(arg);
    let float = f32::from_bits;
    match update {
        Update::None | Update::Hide(..) => {}
        Update::Set(a) => write(scores, view(a)),
        Update::Add { factor, negative, a, b } => {
            let sign = if negative { 0x8000_0000 } else { 0 };
            match b {
                None => {
                    replace(scores, view(a), none, |s, a, _| math::mul_add::<L>(s, factor, float(a ^ sign)))
                }
                Some(b) => replace(scores, view(a), view(b), |s, a, b| {
                    math::mul_add::<L>(float(a ^ sign), float(b), s * factor)
                }),
            }
        }
        Update::SoftCap(a, b) => {
            let (a, b) = (float(view(a).at(0)), float(view(b).at(0)));
            replace(scores, none, none, |s, _, _| math::tanh::<L>(s * a) * b);
        }
    }
}

// The saturating casts of Rust do not become vector instructions; these do.

/// The largest integer not above x; saturates; 0 for NaN.
#[inline(always)]
fn floor(x: f32) -> i32 {
    const LIMIT: f32 = 2_147_483_648.0;
    let inside = if x < LIMIT { x } else { 0.0 };
    let inside = if inside < -LIMIT { -LIMIT } else { inside };
    // SAFETY: in the range of i32: NaN and what is above became 0.
    let whole: i32 = unsafe { inside.to_int_unchecked() };
    let down = whole.wrapping_sub(if whole as f32 > inside { 1 } else { 0 });
    if x >= LIMIT { i32::MAX } else { down }
}

/// Quotient rounded down; x / 0 = 0.
#[inline(always)]
fn floor_div(a: i32, b: i32) -> i32 {
    // There are no integer divisions of vectors. The f64 quotient is exact enough: it cannot round to an integer
    // that the true one does not reach, for they differ by 1 / |b| or more, relatively 2⁻³¹.
    let divisor = if b == 0 || b == -1 { 1 } else { b };
    // SAFETY: the divisor is not 0, and i32::MIN / −1, the one quotient too large, is not computed.
    let quotient: i32 = unsafe { (f64::from(a) / f64::from(divisor)).to_int_unchecked() };
    let rest = a.wrapping_sub(quotient.wrapping_mul(divisor));
    let down = quotient.wrapping_sub(if rest != 0 && (rest ^ divisor) < 0 { 1 } else { 0 });
    let down = if b == -1 { a.wrapping_neg() } else { down };
    if b == 0 { 0 } else { down }
}

impl Strip {
    /// A variable that the whole strip shares.
    fn get(&self, var: Var) -> i32 {
        match var {
            Var::Batch => self.batch,
            Var::Head => self.head,
            Var::SeqlenQ => self.seqlen_q,
            Var::SeqlenK => self.seqlen_k,
            Var::QStart => self.q_start,
            Var::KvStart => self.kv_start,
            Var::Q => self.q0,
            Var::Kv => self.kv0,
        }
    }
}
