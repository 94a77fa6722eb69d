//! Builder calls for what Hopper added: mbarriers, TMA and bulk copies, wgmma, clusters, dependent launches.

use crate::build::{ALL_LANES, Address, Builder, Reg, Value};
use crate::instr::{self, Operand, WgmmaShape};
use crate::types::Scalar;

/// A barrier in shared memory (8 bytes) that counts arrivals and bytes of asynchronous copies. Its phases alternate
/// between parity 0 and 1; a wait is for the completion of the phase of a parity.
#[derive(Clone, Copy, Debug)]
pub struct Mbarrier<'k>(pub Address<'k, u32>);

impl<'k> Mbarrier<'k> {
    /// Prepares it for `count` arrivals a phase. One thread does it; [`Builder::fence_mbarrier_init`] and a barrier
    /// follow.
    #[track_caller]
    pub fn init(self, k: &'k Builder, count: u32) {
        k.push(instr::MBARRIER_INIT, &[], &[self.0.operand(), count.operand()]);
    }

    /// Arrives.
    #[track_caller]
    pub fn arrive(self, k: &'k Builder) {
        k.push(instr::MBARRIER_ARRIVE, &[], &[self.0.operand()]);
    }

    /// Arrives when this thread's earlier `cp.async` copies have completed; counted in [`Mbarrier::init`].
    #[track_caller]
    pub fn arrive_after_cp_async(self, k: &'k Builder) {
        k.push(instr::CP_ASYNC_MBARRIER, &[], &[self.0.operand()]);
    }

    /// Arrives at the same barrier of block `rank` of the cluster.
    #[track_caller]
    pub fn arrive_remote(self, k: &'k Builder, rank: impl Value<'k, u32>) {
        let there = k.mapa(self.0, rank).address();
        k.push(instr::MBARRIER_ARRIVE_REMOTE, &[], &[there.operand()]);
    }

    /// Arrives, and lets the phase wait for so many more bytes.
    #[track_caller]
    pub fn arrive_expect_tx(self, k: &'k Builder, bytes: impl Value<'k, u32>) {
        k.push(instr::MBARRIER_ARRIVE_EXPECT_TX, &[], &[self.0.operand(), bytes.operand()]);
    }

    /// Waits until the phase of this parity has completed.
    #[track_caller]
    pub fn wait(self, k: &'k Builder, parity: impl Value<'k, u32>) {
        k.push(instr::MBARRIER_WAIT, &[], &[self.0.operand(), parity.operand()]);
    }

    /// Whether the phase of this parity has completed; may wait a little.
    #[track_caller]
    pub fn try_wait(self, k: &'k Builder, parity: impl Value<'k, u32>) -> Reg<'k, bool> {
        k.result(instr::MBARRIER_TRY_WAIT, &[self.0.operand(), parity.operand()])
    }
}

/// The A operand of a `wgmma`.
#[derive(Clone, Copy, Debug)]
pub enum WgmmaA<'a, 'k, T> {
    /// In shared memory.
    Shared(Reg<'k, u64>),
    /// In registers: the fragment of 16 rows a warp.
    Registers(&'a [Reg<'k, T>; 4]),
}

impl Builder {
    /// True in one lane of the warp.
    #[track_caller]
    pub fn elect(&self) -> Reg<'_, bool> {
        self.result(instr::ELECT, &[ALL_LANES])
    }

    /// `count` mbarriers side by side.
    #[track_caller]
    pub fn mbarriers(&self, name: &str, count: u32) -> Vec<Mbarrier<'_>> {
        let first = self.shared(name, 8 * count, 8);
        (0..count).map(|i| Mbarrier(first.at(8 * i as i32))).collect()
    }

    /// Makes initialised mbarriers known to the cluster and to the copy engine. A barrier follows it.
    #[track_caller]
    pub fn fence_mbarrier_init(&self) {
        self.push(instr::FENCE_MBARRIER_INIT, &[], &[]);
    }

    /// Makes this thread's ordinary writes to shared memory known to `wgmma`, TMA and bulk copies.
    #[track_caller]
    pub fn fence_proxy_async(&self) {
        self.push(instr::FENCE_PROXY_ASYNC, &[], &[]);
    }

    // ---- TMA ----------------------------------------------------------------------------------------------------

    fn tensor<'k>(&'k self, map: Address<'k, u64>, at: &[Reg<'k, i32>]) -> Vec<Operand> {
        let mut operands = vec![map.operand()];
        operands.extend(at.iter().map(|r| r.operand()));
        operands
    }

    /// Copies the box of `map` at `at` (innermost first) to shared memory; completes on `on` with the box's bytes.
    #[track_caller]
    pub fn tma_load<'k>(
        &'k self,
        to: impl Into<Address<'k, u32>>,
        map: Address<'k, u64>,
        at: &[Reg<'k, i32>],
        on: Mbarrier<'k>,
    ) {
        let mut operands = vec![to.into().operand()];
        operands.extend(self.tensor(map, at));
        operands.push(on.0.operand());
        self.push(instr::tma_load(at.len() as u8, false, false), &[], &operands);
    }

    /// The same to the same place in every block of the cluster whose bit is set in `blocks`.
    #[track_caller]
    pub fn tma_load_multicast<'k>(
        &'k self,
        to: impl Into<Address<'k, u32>>,
        map: Address<'k, u64>,
        at: &[Reg<'k, i32>],
        on: Mbarrier<'k>,
        blocks: impl Value<'k, u16>,
    ) {
        let mut operands = vec![to.into().operand()];
        operands.extend(self.tensor(map, at));
        operands.extend([on.0.operand(), blocks.operand()]);
        self.push(instr::tma_load(at.len() as u8, true, false), &[], &operands);
    }

    /// Copies shared memory to the box of `map` at `at`; belongs to the thread's bulk group.
    #[track_caller]
    pub fn tma_store<'k>(
        &'k self,
        map: Address<'k, u64>,
        at: &[Reg<'k, i32>],
        from: impl Into<Address<'k, u32>>,
    ) {
        let mut operands = self.tensor(map, at);
        operands.push(from.into().operand());
        self.push(instr::tma_store(at.len() as u8), &[], &operands);
    }

    /// Adds shared memory to the box of `map` at `at`; belongs to the thread's bulk group.
    #[track_caller]
    pub fn tma_reduce_add<'k>(
        &'k self,
        map: Address<'k, u64>,
        at: &[Reg<'k, i32>],
        from: impl Into<Address<'k, u32>>,
    ) {
        let mut operands = self.tensor(map, at);
        operands.push(from.into().operand());
        self.push(instr::tma_reduce_add(at.len() as u8), &[], &operands);
    }

    /// Copies the box of `map` at `at` into L2 only.
    #[track_caller]
    pub fn tma_prefetch<'k>(&'k self, map: Address<'k, u64>, at: &[Reg<'k, i32>]) {
        self.push(instr::tma_prefetch(at.len() as u8), &[], &self.tensor(map, at));
    }

    /// Copies `bytes` (a multiple of 16) to another block's shared memory; `to` and `on` are [`Builder::mapa`] addresses.
    #[track_caller]
    pub fn bulk_to_cluster<'k>(
        &'k self,
        to: impl Into<Address<'k, u32>>,
        from: impl Into<Address<'k, u32>>,
        bytes: impl Value<'k, u32>,
        on: Mbarrier<'k>,
    ) {
        let operands = [to.into().operand(), from.into().operand(), bytes.operand(), on.0.operand()];
        self.push(instr::BULK_TO_CLUSTER, &[], &operands);
    }

    /// Fetches a tensor map itself ahead of its use.
    #[track_caller]
    pub fn prefetch_tensor_map<'k>(&'k self, map: Address<'k, u64>) {
        self.push(instr::PREFETCH_TENSOR_MAP, &[], &[map.operand()]);
    }

    /// Copies `bytes` (a multiple of 16) to shared memory; completes on `on`.
    #[track_caller]
    pub fn bulk_load<'k>(
        &'k self,
        to: impl Into<Address<'k, u32>>,
        from: impl Into<Address<'k, u64>>,
        bytes: impl Value<'k, u32>,
        on: Mbarrier<'k>,
    ) {
        let operands = [to.into().operand(), from.into().operand(), bytes.operand(), on.0.operand()];
        self.push(instr::BULK_LOAD, &[], &operands);
    }

    /// Copies `bytes` (a multiple of 16) to global memory; belongs to the thread's bulk group.
    #[track_caller]
    pub fn bulk_store<'k>(
        &'k self,
        to: impl Into<Address<'k, u64>>,
        from: impl Into<Address<'k, u32>>,
        bytes: impl Value<'k, u32>,
    ) {
        self.push(instr::BULK_STORE, &[], &[to.into().operand(), from.into().operand(), bytes.operand()]);
    }

    /// Adds `bytes` (a multiple of 16) of f32 to global memory; belongs to the thread's bulk group.
    #[track_caller]
    pub fn bulk_reduce_add_f32<'k>(
        &'k self,
        to: impl Into<Address<'k, u64>>,
        from: impl Into<Address<'k, u32>>,
        bytes: impl Value<'k, u32>,
    ) {
        self.push(
            instr::BULK_REDUCE_ADD_F32,
            &[],
            &[to.into().operand(), from.into().operand(), bytes.operand()],
        );
    }

    /// Closes the thread's bulk group.
    #[track_caller]
    pub fn bulk_commit(&self) {
        self.push(instr::BULK_COMMIT, &[], &[]);
    }

    /// Waits until at most `groups` bulk groups are pending; with `read`, only until they have read their source.
    #[track_caller]
    pub fn bulk_wait(&self, groups: u8, read: bool) {
        self.push(instr::bulk_wait(groups, read), &[], &[]);
    }

    // ---- wgmma --------------------------------------------------------------------------------------------------

    /// Orders register accesses before it with `wgmma` after it.
    #[track_caller]
    pub fn wgmma_fence(&self) {
        self.push(instr::WGMMA_FENCE, &[], &[]);
    }

    /// `d = a·b`, or `d += a·b` where `accumulate` holds: 64 rows, asynchronous, by the four warps of a warpgroup
    /// together. `d` has [`WgmmaShape::accumulators`] registers; neither it nor A's registers may be touched before a
    /// [`Builder::wgmma_wait`] covers it.
    #[track_caller]
    pub fn wgmma<'k, D: Scalar, A: Scalar>(
        &'k self,
        shape: WgmmaShape,
        d: &[Reg<'k, D>],
        a: WgmmaA<'_, 'k, A>,
        b: Reg<'k, u64>,
        accumulate: impl Value<'k, bool>,
    ) {
        let shape = WgmmaShape { a_in_registers: matches!(a, WgmmaA::Registers(_)), ..shape };
        // The instruction takes a predicate register only.
        let accumulate = match accumulate.operand() {
            Operand::Imm(..) => self.var(accumulate).operand(),
            register => register,
        };
        let mut operands = match a {
            WgmmaA::Shared(descriptor) => vec![descriptor.operand()],
            WgmmaA::Registers(registers) => registers.map(|r| r.operand()).to_vec(),
        };
        operands.extend([b.operand(), accumulate]);
        let d: Vec<_> = d.iter().map(|r| r.id).collect();
        self.push(instr::wgmma(shape), &d, &operands);
    }

    /// Closes the warpgroup's group of `wgmma`.
    #[track_caller]
    pub fn wgmma_commit(&self) {
        self.push(instr::WGMMA_COMMIT, &[], &[]);
    }

    /// Waits until at most `groups` groups are pending.
    #[track_caller]
    pub fn wgmma_wait(&self, groups: u8) {
        self.push(instr::wgmma_wait(groups), &[], &[]);
    }

    /// Raises the registers a thread of this warpgroup, waiting until they are free.
    #[track_caller]
    pub fn raise_registers(&self, registers: u8) {
        self.push(instr::set_max_registers(true, registers), &[], &[]);
    }

    /// Lowers the registers a thread of this warpgroup.
    #[track_caller]
    pub fn lower_registers(&self, registers: u8) {
        self.push(instr::set_max_registers(false, registers), &[], &[]);
    }

    // ---- clusters, dependent launches -------------------------------------------------------------------------

    /// Rank of the block in its cluster.
    #[track_caller]
    pub fn cluster_rank(&self) -> Reg<'_, u32> {
        self.special(instr::SpecialRegister::ClusterCtarank)
    }

    /// The place in block `rank`'s shared memory that corresponds to `address`.
    #[track_caller]
    pub fn mapa<'k>(&'k self, address: Address<'k, u32>, rank: impl Value<'k, u32>) -> Reg<'k, u32> {
        self.result(instr::MAPA, &[address.reg().operand(), rank.operand()])
    }

    /// All threads of the cluster wait for each other.
    #[track_caller]
    pub fn sync_cluster(&self) {
        self.push(instr::CLUSTER_ARRIVE, &[], &[]);
        self.push(instr::CLUSTER_WAIT, &[], &[]);
    }

    /// Waits for the grids that this one was launched to depend on.
    #[track_caller]
    pub fn grid_dependency_wait(&self) {
        self.push(instr::GRID_DEP_WAIT, &[], &[]);
    }

    /// Lets the grids that depend on this one start.
    #[track_caller]
    pub fn grid_dependency_launch(&self) {
        self.push(instr::GRID_DEP_LAUNCH, &[], &[]);
    }
}
