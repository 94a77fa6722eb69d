//! The builder: a kernel is a Rust function that calls it.
//!
//! Program order is emission order. A Rust `for` unrolls, a Rust `if` specialises; what shall be a loop or a branch on
//! the GPU is [`Builder::loop_`], [`Builder::for_`], [`Builder::if_`]. Registers are typed by Rust types ([`Reg`]`<f32>`)
//! and carry the builder, so that arithmetic on them is written as arithmetic:
//!
//! ```
//! use ptx::{Target, build};
//!
//! let kernel = build("axpy", Target::Sm80, 256, |k| {
//!     let (a, x, y, n) = (k.param_f32("a"), k.param_ptr("x"), k.param_ptr("y"), k.param_u32("n"));
//!     let i = k.ctaid(0) * 256 + k.tid(0);
//!     k.if_(i.lt(n), || {
//!         let offset = i.to_u64() * 4;
//!         let at = (y + offset).address();
//!         at.store((x + offset).address().load::<f32>().fma(a, at.load::<f32>()));
//!     });
//! });
//! assert!(ptx::emit(&kernel).contains("fma.rn.f32"));
//! ```
//!
//! A register is written again only by [`Reg::set`] and by operations that say so (destination first: `mma`, `wgmma`).

use std::cell::RefCell;
use std::marker::PhantomData;
use std::panic::Location;

use crate::instr::{
    self, Cache, Instr, Item, Operand, Order, RegId, Row, Shuffle, Space, SpecialRegister, Target,
};
use crate::kernel::{Kernel, Param, ParamKind, Register, SharedRegion};
use crate::types::{Bits, Scalar, Type};

/// All lanes of a warp, as a member mask.
pub(crate) const ALL_LANES: Operand = Operand::Imm(0xffff_ffff, Type::B32);

/// Builds a kernel of `threads` threads a block (in one dimension).
pub fn build(name: &str, target: Target, threads: u32, body: impl FnOnce(&Builder)) -> Kernel {
    let builder = Builder {
        state: RefCell::new(State {
            kernel: Kernel {
                name: name.to_owned(),
                target,
                block: [threads, 1, 1],
                cluster: [1, 1, 1],
                min_blocks: 1,
                params: Vec::new(),
                shared: Vec::new(),
                shared_bytes: 0,
                registers: Vec::new(),
                body: Vec::new(),
            },
            guard: None,
            shared_base: None,
        }),
    };
    body(&builder);
    builder.state.into_inner().kernel
}

/// What a kernel is built with; see the [module](self).
#[derive(Debug)]
pub struct Builder {
    state: RefCell<State>,
}

#[derive(Debug)]
struct State {
    kernel: Kernel,
    guard: Option<(RegId, bool)>,
    shared_base: Option<RegId>,
}

/// A virtual register that holds a `T`.
pub struct Reg<'k, T> {
    pub(crate) id: RegId,
    pub(crate) k: &'k Builder,
    ty: PhantomData<T>,
}

impl<T> Clone for Reg<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Reg<'_, T> {}

impl<T> std::fmt::Debug for Reg<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "register {}", self.id.0)
    }
}

/// A register or a constant.
pub trait Value<'k, T: Scalar>: Copy {
    /// As an operand.
    fn operand(self) -> Operand;
}

impl<'k, T: Scalar> Value<'k, T> for Reg<'k, T> {
    fn operand(self) -> Operand {
        Operand::Reg(self.id)
    }
}

macro_rules! constants {
    ($($ty:ty),*) => { $(
        impl<'k> Value<'k, $ty> for $ty {
            fn operand(self) -> Operand {
                Operand::Imm(self.to_bits64(), <$ty as Scalar>::TYPE)
            }
        }
    )* };
}
constants!(bool, u16, u32, i32, f32, u64, i64);

impl Builder {
    // ---- what everything else is made of -----------------------------------------------------------------------

    /// A new register, not yet written.
    #[track_caller]
    pub fn reg<T: Scalar>(&self) -> Reg<'_, T> {
        let mut state = self.state.borrow_mut();
        let registers = &mut state.kernel.registers;
        registers.push(Register { ty: T::TYPE, site: Location::caller() });
        Reg { id: RegId(registers.len() as u32 - 1), k: self, ty: PhantomData }
    }

    /// New registers, not yet written.
    #[track_caller]
    pub fn regs<T: Scalar>(&self, count: usize) -> Vec<Reg<'_, T>> {
        let mut registers = Vec::with_capacity(count);
        for _ in 0..count {
            registers.push(self.reg());
        }
        registers
    }

    /// Appends an instruction with these operands.
    #[track_caller]
    pub fn push(&self, row: Row, dst: &[RegId], src: &[Operand]) {
        let site = Location::caller();
        let mut state = self.state.borrow_mut();
        let guard = state.guard;
        let instr = Instr { row, dst: dst.to_vec(), src: src.to_vec(), guard, site };
        state.kernel.body.push(Item::Instr(instr));
    }

    /// Appends an instruction with one result, in a new register.
    #[track_caller]
    pub fn result<T: Scalar>(&self, row: Row, src: &[Operand]) -> Reg<'_, T> {
        let result = self.reg();
        self.push(row, &[result.id], src);
        result
    }

    fn item(&self, item: Item) {
        self.state.borrow_mut().kernel.body.push(item);
    }

    /// A remark in the PTX.
    pub fn comment(&self, text: &str) {
        self.item(Item::Comment(text.to_owned()));
    }

    /// A new register with this value.
    #[track_caller]
    pub fn var<'k, T: Scalar>(&'k self, value: impl Value<'k, T>) -> Reg<'k, T> {
        self.result(mov(T::TYPE), &[value.operand()])
    }

    // ---- the launch ---------------------------------------------------------------------------------------------

    /// Blocks of a cluster, by dimension.
    pub fn cluster(&self, blocks: [u32; 3]) {
        self.state.borrow_mut().kernel.cluster = blocks;
    }

    /// Blocks that shall fit on a multiprocessor; 1 unless called.
    pub fn min_blocks(&self, blocks: u32) {
        self.state.borrow_mut().kernel.min_blocks = blocks;
    }

    fn parameter(&self, name: &str, kind: ParamKind) -> Operand {
        let mut state = self.state.borrow_mut();
        let params = &mut state.kernel.params;
        params.push(Param { name: name.to_owned(), kind });
        Operand::Imm(params.len() as u64 - 1, Type::U32)
    }

    /// A parameter: an integer.
    #[track_caller]
    pub fn param_u32(&self, name: &str) -> Reg<'_, u32> {
        let param = self.parameter(name, ParamKind::U32);
        self.result(instr::param(Type::U32), &[param])
    }

    /// A parameter: a signed integer.
    #[track_caller]
    pub fn param_s32(&self, name: &str) -> Reg<'_, i32> {
        let param = self.parameter(name, ParamKind::S32);
        self.result(instr::param(Type::S32), &[param])
    }

    /// A parameter: a float.
    #[track_caller]
    pub fn param_f32(&self, name: &str) -> Reg<'_, f32> {
        let param = self.parameter(name, ParamKind::F32);
        self.result(instr::param(Type::F32), &[param])
    }

    /// A parameter: an address in global memory, or a 64-bit integer.
    #[track_caller]
    pub fn param_ptr(&self, name: &str) -> Reg<'_, u64> {
        let param = self.parameter(name, ParamKind::U64);
        self.result(instr::param(Type::U64), &[param])
    }

    /// A parameter: a tensor map; its address.
    #[track_caller]
    pub fn param_tensor_map(&self, name: &str) -> Address<'_, u64> {
        let param = self.parameter(name, ParamKind::TensorMap);
        self.result(instr::param_address(), &[param]).address()
    }

    /// A region of the block's dynamic shared memory. `align` is a power of two up to 1024.
    #[track_caller]
    pub fn shared(&self, name: &str, bytes: u32, align: u32) -> Address<'_, u32> {
        let base = self.shared_base();
        let mut state = self.state.borrow_mut();
        let kernel = &mut state.kernel;
        let offset = kernel.shared_bytes.next_multiple_of(align.max(1));
        kernel.shared.push(SharedRegion { name: name.to_owned(), offset, bytes });
        kernel.shared_bytes = offset + bytes;
        Address { base, offset: offset as i32 }
    }

    /// The base goes before everything else, so that it is there in every branch.
    #[track_caller]
    fn shared_base(&self) -> Reg<'_, u32> {
        let known = self.state.borrow().shared_base;
        if let Some(id) = known {
            return Reg { id, k: self, ty: PhantomData };
        }
        let base = self.reg::<u32>();
        let mut state = self.state.borrow_mut();
        let (row, site) = (instr::shared_base(), Location::caller());
        let instr = Instr { row, dst: vec![base.id], src: Vec::new(), guard: None, site };
        state.kernel.body.insert(0, Item::Instr(instr));
        state.shared_base = Some(base.id);
        base
    }

    /// A special register of 32 bits.
    #[track_caller]
    pub fn special(&self, register: SpecialRegister) -> Reg<'_, u32> {
        self.result(instr::special(register), &[])
    }

    /// The thread's index in its block.
    #[track_caller]
    pub fn tid(&self, dimension: u8) -> Reg<'_, u32> {
        self.special(SpecialRegister::Tid(dimension))
    }

    /// The block's index in the grid.
    #[track_caller]
    pub fn ctaid(&self, dimension: u8) -> Reg<'_, u32> {
        self.special(SpecialRegister::Ctaid(dimension))
    }

    /// Blocks of the grid.
    #[track_caller]
    pub fn nctaid(&self, dimension: u8) -> Reg<'_, u32> {
        self.special(SpecialRegister::Nctaid(dimension))
    }

    /// The thread's lane in its warp.
    #[track_caller]
    pub fn lane(&self) -> Reg<'_, u32> {
        self.special(SpecialRegister::Laneid)
    }

    /// The warp's index in its block, known to be the same in all lanes.
    #[track_caller]
    pub fn warp(&self) -> Reg<'_, u32> {
        (self.tid(0) >> 5).shfl_idx(0)
    }

    // ---- control flow -------------------------------------------------------------------------------------------

    /// Runs `body` in the lanes in which `predicate` holds.
    #[track_caller]
    pub fn if_<'k>(&'k self, predicate: Reg<'k, bool>, body: impl FnOnce()) {
        self.item(Item::If { predicate: predicate.id, value: true, site: Location::caller() });
        body();
        self.item(Item::EndIf);
    }

    /// Runs `body` in the lanes in which `predicate` holds, `otherwise` in the others.
    #[track_caller]
    pub fn if_else<'k>(&'k self, predicate: Reg<'k, bool>, body: impl FnOnce(), otherwise: impl FnOnce()) {
        self.item(Item::If { predicate: predicate.id, value: true, site: Location::caller() });
        body();
        self.item(Item::Else);
        otherwise();
        self.item(Item::EndIf);
    }

    /// Guards each instruction that `body` appends by `predicate`: no branch, so it suits a few instructions.
    #[track_caller]
    pub fn when<'k>(&'k self, predicate: Reg<'k, bool>, body: impl FnOnce()) {
        let outer = self.state.borrow().guard;
        let inner = match outer {
            None => (predicate.id, true),
            Some(guard) => {
                // A conjunction is computed outside of any guard, so that it is defined in every lane.
                self.state.borrow_mut().guard = None;
                let outer = Reg::<bool> { id: guard.0, k: self, ty: PhantomData };
                let outer = if guard.1 { outer } else { !outer };
                ((predicate & outer).id, true)
            }
        };
        self.state.borrow_mut().guard = Some(inner);
        body();
        self.state.borrow_mut().guard = outer;
    }

    /// A loop, left by [`Builder::break_if`].
    #[track_caller]
    pub fn loop_(&self, body: impl FnOnce()) {
        self.item(Item::Loop { site: Location::caller() });
        body();
        self.item(Item::EndLoop);
    }

    /// Leaves the innermost loop in the lanes in which `predicate` holds.
    #[track_caller]
    pub fn break_if<'k>(&'k self, predicate: Reg<'k, bool>) {
        self.item(Item::BreakIf { predicate: predicate.id, value: true, site: Location::caller() });
    }

    /// A loop over `start`, `start + step`, … below `end`.
    #[track_caller]
    pub fn for_<'k>(
        &'k self,
        start: impl Value<'k, u32>,
        end: impl Value<'k, u32>,
        step: impl Value<'k, u32>,
        body: impl FnOnce(Reg<'k, u32>),
    ) {
        let i = self.var(start);
        self.item(Item::Loop { site: Location::caller() });
        self.break_if(i.ge(end));
        body(i);
        i.set(i + step);
        self.item(Item::EndLoop);
    }

    // ---- barriers of the block --------------------------------------------------------------------------------

    /// All threads of the block wait for each other.
    #[track_caller]
    pub fn sync_threads(&self) {
        let threads = self.state.borrow().kernel.threads();
        self.bar_sync(0, threads);
    }

    /// Waits at named barrier `id` (0 to 15) for `threads` threads in all.
    #[track_caller]
    pub fn bar_sync<'k>(&'k self, id: impl Value<'k, u32>, threads: u32) {
        self.push(instr::BAR_SYNC, &[], &[id.operand(), threads.operand()]);
    }

    /// Arrives at named barrier `id` and goes on.
    #[track_caller]
    pub fn bar_arrive<'k>(&'k self, id: impl Value<'k, u32>, threads: u32) {
        self.push(instr::BAR_ARRIVE, &[], &[id.operand(), threads.operand()]);
    }

    /// The lanes of a warp wait for each other, and see each other's memory accesses.
    #[track_caller]
    pub fn sync_warp(&self) {
        self.push(instr::BAR_WARP, &[], &[ALL_LANES]);
    }

    /// Orders this thread's memory accesses at the scope of the device.
    #[track_caller]
    pub fn fence_acq_rel(&self) {
        self.push(instr::FENCE_ACQ_REL, &[], &[]);
    }

    /// Ends the grid with an error.
    #[track_caller]
    pub fn trap(&self) {
        self.push(instr::TRAP, &[], &[]);
    }

    // ---- cp.async -----------------------------------------------------------------------------------------------

    /// Copies `bytes` (4, 8 or 16) to shared memory in the background; only the first `valid` are read, the rest is
    /// zero.
    #[track_caller]
    pub fn cp_async<'k>(
        &'k self,
        to: impl Into<Address<'k, u32>>,
        from: impl Into<Address<'k, u64>>,
        bytes: u32,
        valid: impl Value<'k, u32>,
    ) {
        let row = if bytes == 16 { instr::CP_ASYNC } else { instr::CP_ASYNC_SMALL };
        self.push(row, &[], &[to.into().operand(), from.into().operand(), bytes.operand(), valid.operand()]);
    }

    /// Closes the group of copies since the last one.
    #[track_caller]
    pub fn cp_async_commit(&self) {
        self.push(instr::CP_ASYNC_COMMIT, &[], &[]);
    }

    /// Waits until at most `groups` groups are pending. Other threads' copies need a barrier besides.
    #[track_caller]
    pub fn cp_async_wait(&self, groups: u8) {
        self.push(instr::cp_async_wait(groups), &[], &[]);
    }

    // ---- warp matrices ------------------------------------------------------------------------------------------

    /// Loads four 8×8 matrices of 16-bit elements: lane `l` gives the address of row `l % 8` of matrix `l / 8`.
    #[track_caller]
    pub fn ldmatrix_x4<'k, T: Scalar>(
        &'k self,
        row: impl Into<Address<'k, u32>>,
        transpose: bool,
    ) -> [Reg<'k, T>; 4] {
        let registers = [self.reg(), self.reg(), self.reg(), self.reg()];
        self.push(instr::ldmatrix(4, transpose), &registers.map(|r| r.id), &[row.into().operand()]);
        registers
    }

    /// Stores four 8×8 matrices of 16-bit elements; addresses as for [`Builder::ldmatrix_x4`].
    #[track_caller]
    pub fn stmatrix_x4<'k, T: Scalar>(
        &'k self,
        row: impl Into<Address<'k, u32>>,
        matrices: [Reg<'k, T>; 4],
        transpose: bool,
    ) {
        let [a, b, c, d] = matrices.map(|r| r.operand());
        self.push(instr::stmatrix(4, transpose), &[], &[row.into().operand(), a, b, c, d]);
    }

    /// `d += a·b`, one warp, 16×8 with f32 accumulators. `k`: 16 or 8 for 16-bit elements, 8 or 4 for tf32, 32 for fp8;
    /// `a` has `16·k·bytes/128` registers and `b` half of that.
    #[track_caller]
    pub fn mma<'k, A: Scalar, B: Scalar>(
        &'k self,
        element: instr::Element,
        k: u8,
        d: [Reg<'k, f32>; 4],
        a: &[Reg<'k, A>],
        b: &[Reg<'k, B>],
    ) {
        let row = instr::mma(element, element, k, instr::Accumulator::F32);
        let mut operands: Vec<Operand> = a.iter().map(|r| r.operand()).collect();
        operands.extend(b.iter().map(|r| r.operand()));
        operands.extend(d.map(|r| r.operand()));
        self.push(row, &d.map(|r| r.id), &operands);
    }
}

/// The move of a type.
pub(crate) fn mov(ty: Type) -> Row {
    match ty.bits() {
        1 => instr::MOV_PRED,
        16 => instr::MOV_B16,
        32 => instr::MOV_B32,
        _ => instr::MOV_B64,
    }
}

// ---- addresses ----------------------------------------------------------------------------------------------------

/// A register type that addresses memory: `u32` shared, `u64` global.
pub trait AddressType: Scalar {
    /// What it addresses.
    const SPACE: Space;
}
impl AddressType for u32 {
    const SPACE: Space = Space::Shared;
}
impl AddressType for u64 {
    const SPACE: Space = Space::Global;
}

/// An address: a register and a constant number of bytes. `Address<u32>` is in shared memory, `Address<u64>` in global.
#[derive(Debug)]
pub struct Address<'k, A> {
    base: Reg<'k, A>,
    offset: i32,
}

impl<A> Clone for Address<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<A> Copy for Address<'_, A> {}

impl<'k, A: AddressType> From<Reg<'k, A>> for Address<'k, A> {
    fn from(base: Reg<'k, A>) -> Self {
        Address { base, offset: 0 }
    }
}

impl<'k, A: AddressType> Address<'k, A> {
    /// The address so many bytes further.
    pub fn at(self, bytes: i32) -> Self {
        Address { base: self.base, offset: self.offset + bytes }
    }

    /// As an operand.
    pub fn operand(self) -> Operand {
        Operand::Address(self.base.id, self.offset)
    }

    /// The value here.
    #[track_caller]
    pub fn load<T: Scalar>(self) -> Reg<'k, T> {
        let [value] = self.load_as(Order::Weak, Cache::Default);
        value
    }

    /// `N` (1, 2, 4) values from here, at most 16 bytes, by one instruction.
    #[track_caller]
    pub fn load_vec<T: Scalar, const N: usize>(self) -> [Reg<'k, T>; N] {
        self.load_as(Order::Weak, Cache::Default)
    }

    /// `N` values from here, with an order and a cache policy.
    #[track_caller]
    pub fn load_as<T: Scalar, const N: usize>(self, order: Order, cache: Cache) -> [Reg<'k, T>; N] {
        let k = self.base.k;
        // Not `from_fn`: its closure would hide the caller's location.
        let mut registers = [Reg { id: RegId(0), k, ty: PhantomData }; N];
        for register in &mut registers {
            *register = k.reg();
        }
        k.push(
            instr::load(A::SPACE, T::TYPE, N as u8, order, cache),
            &registers.map(|r| r.id),
            &[self.operand()],
        );
        registers
    }

    /// Stores a value here.
    #[track_caller]
    pub fn store<T: Scalar>(self, value: Reg<'k, T>) {
        self.store_as([value], Order::Weak);
    }

    /// Stores `N` (1, 2, 4) values from here on, at most 16 bytes, by one instruction.
    #[track_caller]
    pub fn store_vec<T: Scalar, const N: usize>(self, values: [Reg<'k, T>; N]) {
        self.store_as(values, Order::Weak);
    }

    /// Stores `N` values with an order.
    #[track_caller]
    pub fn store_as<T: Scalar, const N: usize>(self, values: [Reg<'k, T>; N], order: Order) {
        let mut operands = vec![self.operand()];
        operands.extend(values.iter().map(|r| r.operand()));
        self.base.k.push(instr::store(A::SPACE, T::TYPE, N as u8, order), &[], &operands);
    }

    /// Read, modify, write; the old value.
    #[track_caller]
    pub fn atom<T: Scalar>(self, op: instr::AtomOp, value: impl Value<'k, T>, order: Order) -> Reg<'k, T> {
        self.base.k.result(instr::atom(A::SPACE, op, T::TYPE, order), &[self.operand(), value.operand()])
    }

    /// Adds a value, without asking for the old one.
    #[track_caller]
    pub fn red_add<T: Scalar>(self, value: impl Value<'k, T>) {
        let row = instr::red(A::SPACE, instr::AtomOp::Add, T::TYPE, 1, Order::Relaxed);
        self.base.k.push(row, &[], &[self.operand(), value.operand()]);
    }

    /// Adds 2 or 4 neighbouring f32 at once (global memory, sm_90).
    #[track_caller]
    pub fn red_add_vec<const N: usize>(self, values: [Reg<'k, f32>; N]) {
        let mut operands = vec![self.operand()];
        operands.extend(values.map(|r| r.operand()));
        let row = instr::red(A::SPACE, instr::AtomOp::Add, Type::F32, N as u8, Order::Relaxed);
        self.base.k.push(row, &[], &operands);
    }

    /// The address as a register.
    #[track_caller]
    pub fn reg(self) -> Reg<'k, A>
    where
        Reg<'k, A>: OffsetBy,
    {
        if self.offset == 0 { self.base } else { self.base.offset_by(self.offset) }
    }
}

/// Adds a constant number of bytes to an address register.
pub trait OffsetBy {
    /// This and `bytes`.
    fn offset_by(self, bytes: i32) -> Self;
}
impl OffsetBy for Reg<'_, u32> {
    #[track_caller]
    fn offset_by(self, bytes: i32) -> Self {
        self + bytes as u32
    }
}
impl OffsetBy for Reg<'_, u64> {
    #[track_caller]
    fn offset_by(self, bytes: i32) -> Self {
        self + bytes as i64 as u64
    }
}

impl<'k, A: AddressType> Reg<'k, A> {
    /// The address that this register holds.
    pub fn address(self) -> Address<'k, A> {
        self.into()
    }
}

impl<'k, A: AddressType, V: Value<'k, A>> std::ops::Add<V> for Address<'k, A>
where
    Reg<'k, A>: std::ops::Add<V, Output = Reg<'k, A>>,
{
    type Output = Address<'k, A>;
    #[track_caller]
    fn add(self, bytes: V) -> Self {
        Address { base: self.base + bytes, offset: self.offset }
    }
}

// ---- values -------------------------------------------------------------------------------------------------------

impl<'k, T: Scalar> Reg<'k, T> {
    /// The builder.
    pub fn builder(self) -> &'k Builder {
        self.k
    }

    /// Gives this register a new value. If the value was just computed for this, the instruction that computed it
    /// writes here directly.
    #[track_caller]
    pub fn set(self, value: impl Value<'k, T>) {
        let operand = value.operand();
        {
            let mut state = self.k.state.borrow_mut();
            let State { kernel, guard, .. } = &mut *state;
            let fresh = matches!(operand, Operand::Reg(id) if id.0 as usize + 1 == kernel.registers.len());
            if let (true, Operand::Reg(id), Some(Item::Instr(last))) =
                (fresh, operand, kernel.body.last_mut())
                && last.dst == [id]
                && last.guard == *guard
                && self.id.0 < id.0
            {
                last.dst[0] = self.id;
                kernel.registers.pop();
                return;
            }
        }
        self.k.push(mov(T::TYPE), &[self.id], &[operand]);
    }

    /// The same bits as another type of the same width.
    #[track_caller]
    pub fn bits<U: Scalar>(self) -> Reg<'k, U> {
        self.k.result(mov(U::TYPE), &[self.operand()])
    }

    #[track_caller]
    fn shfl(self, mode: Shuffle, by: Operand, clamp: u32) -> Self {
        self.k.result(instr::shuffle(mode), &[self.operand(), by, clamp.operand(), ALL_LANES])
    }

    /// The value in lane `lane` (32-bit types).
    #[track_caller]
    pub fn shfl_idx(self, lane: impl Value<'k, u32>) -> Self {
        self.shfl(Shuffle::Idx, lane.operand(), 31)
    }

    /// The value in the lane whose index differs in these bits (32-bit types).
    #[track_caller]
    pub fn shfl_bfly(self, bits: u32) -> Self {
        self.shfl(Shuffle::Bfly, bits.operand(), 31)
    }

    /// The value so many lanes further; the own one where there is none (32-bit types).
    #[track_caller]
    pub fn shfl_down(self, lanes: u32) -> Self {
        self.shfl(Shuffle::Down, lanes.operand(), 31)
    }

    /// The value so many lanes before; the own one where there is none (32-bit types).
    #[track_caller]
    pub fn shfl_up(self, lanes: u32) -> Self {
        self.shfl(Shuffle::Up, lanes.operand(), 0)
    }
}

macro_rules! binary {
    ($trait:ident $method:ident: $($ty:ty => $row:ident),*) => { $(
        impl<'k, V: Value<'k, $ty>> std::ops::$trait<V> for Reg<'k, $ty> {
            type Output = Reg<'k, $ty>;
            #[track_caller]
            fn $method(self, other: V) -> Self {
                self.k.result(instr::$row, &[self.operand(), other.operand()])
            }
        }
    )* };
}
macro_rules! constant_first {
    ($trait:ident $method:ident: $($ty:ty => $row:ident),*) => { $(
        impl<'k> std::ops::$trait<Reg<'k, $ty>> for $ty {
            type Output = Reg<'k, $ty>;
            #[track_caller]
            fn $method(self, other: Reg<'k, $ty>) -> Reg<'k, $ty> {
                other.k.result(instr::$row, &[self.operand(), other.operand()])
            }
        }
    )* };
}
use crate::types::{B32, BF16x2, F16x2};
binary!(Add add: f32 => ADD_F32, u32 => ADD_U32, i32 => ADD_S32, u64 => ADD_U64, i64 => ADD_S64, F16x2 => ADD_F16X2, BF16x2 => ADD_BF16X2);
binary!(Sub sub: f32 => SUB_F32, u32 => SUB_U32, i32 => SUB_S32, u64 => SUB_U64);
binary!(Mul mul: f32 => MUL_F32, u32 => MUL_U32, i32 => MUL_S32, u64 => MUL_U64, i64 => MUL_S64, F16x2 => MUL_F16X2, BF16x2 => MUL_BF16X2);
binary!(Div div: f32 => DIV_F32, i32 => DIV_S32);
binary!(Rem rem: i32 => REM_S32);
binary!(BitAnd bitand: u32 => AND_B32, B32 => AND_B32, u64 => AND_B64, bool => AND_PRED);
binary!(BitOr bitor: u32 => OR_B32, B32 => OR_B32, u64 => OR_B64, bool => OR_PRED);
binary!(BitXor bitxor: u32 => XOR_B32, B32 => XOR_B32, bool => XOR_PRED);
constant_first!(Add add: f32 => ADD_F32, u32 => ADD_U32, i32 => ADD_S32);
constant_first!(Sub sub: f32 => SUB_F32, u32 => SUB_U32, i32 => SUB_S32);
constant_first!(Mul mul: f32 => MUL_F32, u32 => MUL_U32, i32 => MUL_S32);
constant_first!(Div div: f32 => DIV_F32);

/// The logarithm of a constant power of two. ptxas takes division by one for any other division: a reciprocal and corrections.
fn log2_of_constant(operand: Operand) -> Option<u32> {
    match operand {
        Operand::Imm(bits, _) if bits.is_power_of_two() => Some(bits.ilog2()),
        _ => None,
    }
}

impl<'k, V: Value<'k, u32>> std::ops::Div<V> for Reg<'k, u32> {
    type Output = Reg<'k, u32>;
    #[track_caller]
    fn div(self, other: V) -> Self {
        let (row, operand) = match log2_of_constant(other.operand()) {
            Some(log2) => (instr::SHR_U32, log2.operand()),
            None => (instr::DIV_U32, other.operand()),
        };
        self.k.result(row, &[self.operand(), operand])
    }
}

impl<'k, V: Value<'k, u32>> std::ops::Rem<V> for Reg<'k, u32> {
    type Output = Reg<'k, u32>;
    #[track_caller]
    fn rem(self, other: V) -> Self {
        let (row, operand) = match log2_of_constant(other.operand()) {
            Some(log2) => (instr::AND_B32, ((1u32 << log2) - 1).operand()),
            None => (instr::REM_U32, other.operand()),
        };
        self.k.result(row, &[self.operand(), operand])
    }
}

macro_rules! shifts {
    ($($trait:ident $method:ident: $ty:ty => $row:ident),*) => { $(
        impl<'k, V: Value<'k, u32>> std::ops::$trait<V> for Reg<'k, $ty> {
            type Output = Reg<'k, $ty>;
            #[track_caller]
            fn $method(self, count: V) -> Self {
                self.k.result(instr::$row, &[self.operand(), count.operand()])
            }
        }
    )* };
}
shifts!(Shl shl: u32 => SHL_B32, Shr shr: u32 => SHR_U32, Shr shr: i32 => SHR_S32, Shl shl: u64 => SHL_B64, Shr shr: u64 => SHR_U64, Shr shr: i64 => SHR_S64);

macro_rules! unary {
    ($trait:ident $method:ident: $($ty:ty => $row:ident),*) => { $(
        impl<'k> std::ops::$trait for Reg<'k, $ty> {
            type Output = Reg<'k, $ty>;
            #[track_caller]
            fn $method(self) -> Self {
                self.k.result(instr::$row, &[self.operand()])
            }
        }
    )* };
}
unary!(Neg neg: f32 => NEG_F32, i32 => NEG_S32);
unary!(Not not: u32 => NOT_B32, bool => NOT_PRED);

/// Types that can be compared.
pub trait Compare: Scalar {
    /// Rows of `==`, `!=`, `<`, `<=`.
    const ROWS: [Row; 4];
}
macro_rules! compare {
    ($($ty:ty: $eq:ident $ne:ident $lt:ident $le:ident),*) => { $(
        impl Compare for $ty {
            const ROWS: [Row; 4] = [instr::$eq, instr::$ne, instr::$lt, instr::$le];
        }
    )* };
}
compare!(f32: EQ_F32 NE_F32 LT_F32 LE_F32, u32: EQ_U32 NE_U32 LT_U32 LE_U32, i32: EQ_S32 NE_S32 LT_S32 LE_S32, u64: EQ_U64 NE_U64 LT_U64 LE_U64);

impl<'k, T: Compare> Reg<'k, T> {
    #[track_caller]
    fn compare(self, row: usize, a: Operand, b: Operand) -> Reg<'k, bool> {
        let [eq, ne, lt, le] = T::ROWS;
        self.k.result([eq, ne, lt, le][row].clone(), &[a, b])
    }

    /// `self == other`.
    #[track_caller]
    pub fn eq(self, other: impl Value<'k, T>) -> Reg<'k, bool> {
        self.compare(0, self.operand(), other.operand())
    }

    /// `self != other`; true for NaN.
    #[track_caller]
    pub fn ne(self, other: impl Value<'k, T>) -> Reg<'k, bool> {
        self.compare(1, self.operand(), other.operand())
    }

    /// `self < other`.
    #[track_caller]
    pub fn lt(self, other: impl Value<'k, T>) -> Reg<'k, bool> {
        self.compare(2, self.operand(), other.operand())
    }

    /// `self <= other`.
    #[track_caller]
    pub fn le(self, other: impl Value<'k, T>) -> Reg<'k, bool> {
        self.compare(3, self.operand(), other.operand())
    }

    /// `self > other`.
    #[track_caller]
    pub fn gt(self, other: impl Value<'k, T>) -> Reg<'k, bool> {
        self.compare(2, other.operand(), self.operand())
    }

    /// `self >= other`.
    #[track_caller]
    pub fn ge(self, other: impl Value<'k, T>) -> Reg<'k, bool> {
        self.compare(3, other.operand(), self.operand())
    }
}

macro_rules! two_operands {
    ($($ty:ty: $($method:ident $row:ident $doc:literal),*;)*) => { $(
        impl<'k> Reg<'k, $ty> { $(
            #[doc = $doc]
            #[track_caller]
            pub fn $method(self, other: impl Value<'k, $ty>) -> Self {
                self.k.result(instr::$row, &[self.operand(), other.operand()])
            }
        )* }
    )* };
}
two_operands! {
    f32: min MIN_F32 "The smaller; of a number and a NaN the number.", max MAX_F32 "The larger; of a number and a NaN the number.";
    u32: min MIN_U32 "The smaller.", max MAX_U32 "The larger.", mul_hi MULHI_U32 "High half of the product.";
    i32: min MIN_S32 "The smaller.", max MAX_S32 "The larger.";
    F16x2: max MAX_F16X2 "The larger, each.";
    BF16x2: max MAX_BF16X2 "The larger, each.";
}

macro_rules! one_operand {
    ($($ty:ty: $($method:ident -> $to:ty, $row:ident $doc:literal),*;)*) => { $(
        impl<'k> Reg<'k, $ty> { $(
            #[doc = $doc]
            #[track_caller]
            pub fn $method(self) -> Reg<'k, $to> {
                self.k.result(instr::$row, &[self.operand()])
            }
        )* }
    )* };
}
one_operand! {
    f32: abs -> f32, ABS_F32 "Absolute value.",
        exp2 -> f32, EX2_F32 "2 to this power, approximately (2 ulp; subnormals are zero).",
        log2 -> f32, LG2_F32 "Base-2 logarithm, approximately.",
        tanh -> f32, TANH_F32 "Hyperbolic tangent, approximately (2⁻¹¹).",
        rcp -> f32, RCP_F32 "Reciprocal, approximately (1 ulp).",
        sqrt -> f32, SQRT_F32 "Square root, correctly rounded.",
        rsqrt -> f32, RSQRT_F32 "Reciprocal square root, approximately.",
        floor -> f32, FLOOR_F32 "Largest integer that is not larger.",
        to_i32 -> i32, S32_F32_ZERO "To an integer, towards zero, saturating.",
        round_to_i32 -> i32, S32_F32_EVEN "To the nearest integer, ties to even, saturating.",
        to_f16 -> u16, F16_F32 "To the bits of an f16.",
        to_bf16 -> u16, BF16_F32 "To the bits of a bf16.";
    u16: f16_to_f32 -> f32, F32_F16 "The value of the f16 with these bits.",
        to_u32 -> u32, U32_U16 "Zero-extended.";
    u32: to_u64 -> u64, U64_U32 "Zero-extended.",
        to_f32 -> f32, F32_U32 "As a float, rounded.",
        to_u16 -> u16, U16_U32 "The low half.",
        count_ones -> u32, POPC_B32 "Bits that are 1.",
        leading_zeros -> u32, CLZ_B32 "Leading bits that are 0.";
    i32: to_i64 -> i64, S64_S32 "Sign-extended.",
        to_f32 -> f32, F32_S32 "As a float, rounded.",
        abs -> i32, ABS_S32 "Absolute value.";
    u64: to_u32 -> u32, U32_U64 "The low half.",
        to_f32 -> f32, F32_U64 "As a float, rounded.";
    F16x2: exp2 -> F16x2, EX2_F16X2 "2 to this power, approximately.";
    BF16x2: exp2 -> BF16x2, EX2_BF16X2 "2 to this power, approximately.";
}

impl<'k> Reg<'k, f32> {
    /// `self * factor + term`, rounded once.
    #[track_caller]
    pub fn fma(self, factor: impl Value<'k, f32>, term: impl Value<'k, f32>) -> Self {
        self.k.result(instr::FMA_F32, &[self.operand(), factor.operand(), term.operand()])
    }
}

impl<'k> Reg<'k, u32> {
    /// The full product.
    #[track_caller]
    pub fn mul_wide(self, other: impl Value<'k, u32>) -> Reg<'k, u64> {
        self.k.result(instr::MUL_WIDE_U32, &[self.operand(), other.operand()])
    }

    /// Low and high half of the full product.
    #[track_caller]
    pub fn mul_halves(self, other: impl Value<'k, u32>) -> [Reg<'k, u32>; 2] {
        let product = self.mul_wide(other);
        let halves = [self.k.reg(), self.k.reg()];
        self.k.push(instr::SPLIT_PAIR64, &halves.map(|r| r.id), &[product.operand()]);
        halves
    }

    /// `self * factor + term` in 64 bits: an element's address.
    #[track_caller]
    pub fn mad_wide(self, factor: impl Value<'k, u32>, term: impl Value<'k, u64>) -> Reg<'k, u64> {
        self.k.result(instr::MAD_WIDE_U32, &[self.operand(), factor.operand(), term.operand()])
    }
}

/// Pairs of 16-bit floats.
pub trait Half: Scalar {
    /// `cvt.rn.…x2.f32`.
    const PACK: Row;
    /// The element type in tensor-core instructions.
    const ELEMENT: instr::Element;
}
impl Half for F16x2 {
    const PACK: Row = instr::PACK_F16X2;
    const ELEMENT: instr::Element = instr::Element::F16;
}
impl Half for BF16x2 {
    const PACK: Row = instr::PACK_BF16X2;
    const ELEMENT: instr::Element = instr::Element::BF16;
}

impl Builder {
    /// Two floats, rounded, in one register: `low` is the element at the lower address.
    #[track_caller]
    pub fn pack<'k, H: Half>(&'k self, low: impl Value<'k, f32>, high: impl Value<'k, f32>) -> Reg<'k, H> {
        self.result(H::PACK, &[high.operand(), low.operand()])
    }
}

impl<'k> Reg<'k, BF16x2> {
    /// Both values, low first.
    #[track_caller]
    pub fn unpack(self) -> [Reg<'k, f32>; 2] {
        let bits = self.bits::<u32>();
        [(bits << 16).bits(), (bits & 0xffff_0000).bits()]
    }
}

impl<'k> Reg<'k, F16x2> {
    /// Both values, low first.
    #[track_caller]
    pub fn unpack(self) -> [Reg<'k, f32>; 2] {
        let (low, high) = (self.k.reg::<u16>(), self.k.reg::<u16>());
        self.k.push(instr::SPLIT_PAIR, &[low.id, high.id], &[self.operand()]);
        [low.f16_to_f32(), high.f16_to_f32()]
    }
}

impl<'k> Reg<'k, bool> {
    /// `a` where this holds, else `b`.
    #[track_caller]
    pub fn select<T: Scalar>(self, a: impl Value<'k, T>, b: impl Value<'k, T>) -> Reg<'k, T> {
        let row = match T::TYPE.bits() {
            16 => instr::SELP_B16,
            32 => instr::SELP_B32,
            _ => instr::SELP_B64,
        };
        self.k.result(row, &[a.operand(), b.operand(), self.operand()])
    }

    /// Whether it holds in any lane.
    #[track_caller]
    pub fn any(self) -> Reg<'k, bool> {
        self.k.result(instr::VOTE_ANY, &[self.operand(), ALL_LANES])
    }

    /// Whether it holds in all lanes.
    #[track_caller]
    pub fn all(self) -> Reg<'k, bool> {
        self.k.result(instr::VOTE_ALL, &[self.operand(), ALL_LANES])
    }

    /// A bit for each lane.
    #[track_caller]
    pub fn ballot(self) -> Reg<'k, B32> {
        self.k.result(instr::BALLOT, &[self.operand(), ALL_LANES])
    }
}
