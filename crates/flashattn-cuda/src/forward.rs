//! The forward pass of a problem on a GPU: planned once, put into streams many times.
//!
//! ```text
//! Forward::new      plan, compile (or find) the kernel, upload what depends on the problem alone
//! prepare           for a layout and a stream: what has to be copied, and a workspace
//! run               check, bind addresses, launch; nothing else
//! ```
//!
//! `run` waits for nothing. After [`Forward::prepare`] (or a first run) with the same layout and stream it allocates no device
//! memory, copies nothing between host and device and can be captured into a CUDA graph.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flashattn_spec::{AttentionProblem, ProblemError};

use crate::cache::KernelConfig;
use crate::device::{Device, Stream};
use crate::error::Error;
use crate::kernels::FwdConfig;
use crate::launch::{Arg, Launch, Slot};
use crate::memory::Buffer;
use crate::module::Module;
use crate::plan::{Argument, ForwardPlan, Strides, Tensor};
use crate::stage::{Copy, Layout, Location, StagedPlan};
use crate::tensor_map::TensorMap;
use crate::views::{DeviceSlice, DeviceView, check_pointer};

/// What everything in a workspace begins at a multiple of. It begins with the tile counter, which is 0 between runs.
const ALIGN: u64 = 256;

/// The tensors of a forward pass. Shapes as in [`AttentionProblem`].
#[derive(Clone, Copy, Debug)]
pub struct ForwardArgs<'a> {
    /// Queries.
    pub q: DeviceView<'a>,
    /// Keys.
    pub k: DeviceView<'a>,
    /// Values.
    pub v: DeviceView<'a>,
    /// Sink logits `[heads_q]`; given exactly when the problem has sinks.
    pub sinks: Option<DeviceSlice<'a>>,
    /// Output; every element is written.
    pub o: DeviceView<'a>,
    /// Log-sum-exp (natural), dense `[batch, heads_q, seqlen_q]` (`[heads_q, total_q]` when packed); written.
    pub lse: DeviceSlice<'a>,
}

impl ForwardArgs<'_> {
    /// How the tensors lie.
    pub fn layout(&self) -> Layout {
        let [q, k, v, o] = [self.q, self.k, self.v, self.o].map(|view| view.strides());
        let addresses = [self.q, self.k, self.v, self.o].map(|view| view.address());
        Layout::new(Strides { q, k, v, o }, addresses)
    }
}

/// The forward pass of one problem on one GPU. Threads and streams may share it.
#[derive(Debug)]
pub struct Forward {
    device: Device,
    problem: AttentionProblem,
    config: FwdConfig,
    /// None if there are no queries, and so nothing to launch.
    module: Option<Arc<Module>>,
    uploads: Buffer,
    /// Where in it each upload begins.
    offsets: Vec<u64>,
    prepared: Mutex<HashMap<Layout, Arc<Prepared>>>,
}

/// The pass for one layout.
#[derive(Debug)]
struct Prepared {
    /// No other has it in this process.
    id: u64,
    plan: StagedPlan,
    /// The kernels of its copies.
    copies: Vec<Arc<Module>>,
    /// A workspace for each stream by its id: what is in one stream runs in turn.
    pool: Mutex<HashMap<u64, Arc<Workspace>>>,
}

/// Device memory that a run needs besides its tensors. One run at a time may use it: runs of one stream, or of streams
/// that wait for each other.
#[derive(Debug)]
pub struct Workspace {
    buffer: Buffer,
    bound: Mutex<Bound>,
}

/// The kernel's arguments of the last run with this workspace.
#[derive(Debug, Default)]
struct Bound {
    /// [`Prepared::id`]; 0: none yet.
    id: u64,
    addresses: Addresses,
    slots: Vec<Slot>,
}

/// Of q, k, v, o, lse and sinks.
type Addresses = [u64; 6];

/// Where a workspace's staged tensors begin.
fn staged_at(plan: &ForwardPlan) -> u64 {
    plan.counter_bytes().next_multiple_of(ALIGN)
}

impl Prepared {
    fn new(device: &Device, mut plan: StagedPlan) -> Result<Prepared, Error> {
        static IDS: AtomicU64 = AtomicU64::new(1);
        // They are on the device.
        plan.forward.uploads = Vec::new();
        let modules = plan.copies().map(|copy| KernelConfig::Copy(copy.config).module(device));
        let copies = modules.collect::<Result<_, _>>()?;
        Ok(Prepared { id: IDS.fetch_add(1, Relaxed), plan, copies, pool: Mutex::default() })
    }

    fn workspace_bytes(&self) -> u64 {
        staged_at(&self.plan.forward) + self.plan.workspace
    }
}

impl Workspace {
    /// Takes memory for a workspace, allocated by [`Device::alloc`] or the caller's, of [`Forward::workspace_bytes`]; the
    /// runs that use it come after this in the stream's order.
    ///
    /// # Errors
    /// [`Error::Misaligned`] unless it begins at a multiple of 256; [`Error::Workspace`] if it is too small for any run.
    pub fn new(buffer: Buffer, stream: &Stream) -> Result<Workspace, Error> {
        let (address, bytes) = (buffer.address(), buffer.bytes() as u64);
        if bytes < ALIGN {
            return Err(Error::Workspace { got: bytes, expected: ALIGN });
        }
        if !address.is_multiple_of(ALIGN) {
            return Err(Error::Misaligned { name: "the workspace", address, expected: ALIGN as usize });
        }
        buffer.fill_first(stream, ALIGN as usize, 0)?;
        Ok(Workspace { buffer, bound: Mutex::default() })
    }

    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.buffer.bytes() as u64
    }
}

impl Forward {
    /// Plans a problem for a GPU and compiles its kernel, unless the process has it already.
    ///
    /// # Errors
    /// What is wrong with the problem; [`Error::Plan`] for what the kernels do not take, [`Error::Target`] for a GPU that they
    /// do not run on; the driver's.
    pub fn new(device: &Device, problem: &AttentionProblem) -> Result<Forward, Error> {
        Self::with_plan(device, problem, dense(problem)?)
    }

    /// As [`Forward::new`], for GPU `ordinal`. What the kernels do not take is refused even where there is no GPU.
    ///
    /// # Errors
    /// As [`Forward::new`] and [`Device::open`].
    pub fn open(ordinal: u32, problem: &AttentionProblem) -> Result<Forward, Error> {
        let plan = dense(problem)?;
        Self::with_plan(&Device::open(ordinal)?, problem, plan)
    }

    fn with_plan(device: &Device, problem: &AttentionProblem, plan: StagedPlan) -> Result<Forward, Error> {
        let config = plan.forward.config.clone();
        let module = match plan.forward.tiles {
            0 => None,
            _ => Some(KernelConfig::Forward(config.clone()).module(device)?),
        };
        let (mut bytes, mut offsets) = (Vec::new(), Vec::new());
        for upload in &plan.forward.uploads {
            bytes.resize(bytes.len().next_multiple_of(ALIGN as usize), 0u8);
            offsets.push(bytes.len() as u64);
            bytes.extend_from_slice(upload.bytes());
        }
        let uploads = match bytes.is_empty() {
            true => device.alloc(0)?,
            false => device.upload(&device.stream()?, &bytes)?,
        };
        let mut prepared = HashMap::new();
        if plan.staged().next().is_none() {
            // What most calls need is planned already.
            prepared.insert(Layout::dense(problem), Arc::new(Prepared::new(device, plan)?));
        }
        let (device, problem, prepared) = (device.clone(), problem.clone(), Mutex::new(prepared));
        Ok(Forward { device, problem, config, module, uploads, offsets, prepared })
    }

    /// Its GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What is computed.
    pub fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    /// The kernel's config.
    pub fn config(&self) -> &FwdConfig {
        &self.config
    }

    /// The compiled kernel; `None` if there are no queries, and so nothing to launch.
    pub fn module(&self) -> Option<&Module> {
        self.module.as_deref()
    }

    /// Tensors (of q, k, v, o) that the kernel cannot take where they lie, and that each run copies: see
    /// [`stage`](crate::stage).
    ///
    /// # Errors
    /// As [`Forward::run`].
    pub fn staged(&self, layout: &Layout) -> Result<Vec<Tensor>, Error> {
        Ok(self.prepared(layout)?.plan.staged().collect())
    }

    /// Bytes of a workspace for tensors that lie so.
    ///
    /// # Errors
    /// As [`Forward::run`].
    pub fn workspace_bytes(&self, layout: &Layout) -> Result<u64, Error> {
        Ok(self.prepared(layout)?.workspace_bytes())
    }

    /// A workspace of the caller's own for tensors that lie so.
    ///
    /// # Errors
    /// As [`Forward::run`].
    pub fn workspace(&self, stream: &Stream, layout: &Layout) -> Result<Workspace, Error> {
        Workspace::new(self.device.alloc(self.workspace_bytes(layout)? as usize)?, stream)
    }

    /// Makes everything ready for runs with this layout in this stream: kernels of copies, a workspace in the plan's pool.
    ///
    /// # Errors
    /// As [`Forward::run`].
    pub fn prepare(&self, stream: &Stream, layout: &Layout) -> Result<(), Error> {
        self.device.same(stream.device(), "the stream")?;
        self.pooled(&*self.prepared(layout)?, stream).map(drop)
    }

    /// Puts the pass into the stream, with a workspace that the plan keeps for this stream, and does not wait.
    ///
    /// What is captured into a graph keeps that workspace and the plan's uploads: the graph may not outlive the plan, and one that
    /// shall run at the same time as other runs of this plan needs a workspace of its own ([`Forward::run_with`]).
    ///
    /// The plan keeps a workspace for each stream and layout that it has seen, and frees them when it is dropped, which waits for
    /// the GPU. Where plans come and go, as for each step of a decoder, one [`Workspace`] given to all of them spares both.
    ///
    /// # Errors
    /// Tensors that do not fit the problem, are misaligned or of another GPU's memory, a stream of another one, before
    /// anything is launched; the driver's. What goes wrong in a kernel shows at the stream's next wait ([`Forward::wait`]).
    pub fn run(&self, stream: &Stream, args: &ForwardArgs<'_>) -> Result<(), Error> {
        self.check(stream, args)?;
        let prepared = self.prepared(&args.layout())?;
        let workspace = self.pooled(&prepared, stream)?;
        self.enqueue(&prepared, stream, args, &workspace)
    }

    /// As [`Forward::run`], with a workspace of the caller's.
    ///
    /// # Errors
    /// As [`Forward::run`]; [`Error::Workspace`] if it has less than [`Forward::workspace_bytes`].
    pub fn run_with(
        &self,
        stream: &Stream,
        args: &ForwardArgs<'_>,
        workspace: &Workspace,
    ) -> Result<(), Error> {
        self.check(stream, args)?;
        self.device.same(workspace.buffer.device(), "the workspace")?;
        let prepared = self.prepared(&args.layout())?;
        let (got, expected) = (workspace.bytes(), prepared.workspace_bytes());
        if got < expected {
            return Err(Error::Workspace { got, expected });
        }
        self.enqueue(&prepared, stream, args, workspace)
    }

    /// Waits for the stream's work.
    ///
    /// # Errors
    /// [`Error::Kernel`], with this kernel's name and config, if something in it went wrong.
    pub fn wait(&self, stream: &Stream) -> Result<(), Error> {
        stream.synchronize().map_err(|error| self.failed(error))
    }

    fn failed(&self, error: Error) -> Error {
        match (&self.module, error) {
            (Some(module), error @ Error::Driver { .. }) => Error::Kernel {
                kernel: module.name().to_owned(),
                config: format!("{:?}", self.config),
                error: error.into(),
            },
            (_, error) => error,
        }
    }

    fn check(&self, stream: &Stream, args: &ForwardArgs<'_>) -> Result<(), Error> {
        self.device.same(stream.device(), "the stream")?;
        let (p, ordinal) = (&self.problem, self.device.ordinal());
        args.q.expect("q", ordinal, p.dtype, p.q_shape(), false)?;
        args.k.expect("k", ordinal, p.dtype, p.k_shape(), false)?;
        args.v.expect("v", ordinal, p.dtype, p.v_shape(), false)?;
        args.o.expect("o", ordinal, p.dtype, p.o_shape(), true)?;
        args.lse.expect("lse", ordinal, p.lse_len())?;
        match (args.sinks, p.sinks) {
            (Some(sinks), true) => sinks.expect("sinks", ordinal, p.heads_q),
            (None, false) => Ok(()),
            (given, _) => {
                let word = |given| if given { "given" } else { "absent" };
                let (got, expected) = (word(given.is_some()), word(p.sinks));
                Err(ProblemError::Presence { name: "sinks", got, expected }.into())
            }
        }
    }

    fn prepared(&self, layout: &Layout) -> Result<Arc<Prepared>, Error> {
        if let Some(prepared) = lock(&self.prepared).get(layout) {
            return Ok(prepared.clone());
        }
        // Not under the lock, which other layouts' runs need: twice at worst.
        let prepared = Prepared::new(&self.device, StagedPlan::new(&self.problem, layout)?)?;
        Ok(lock(&self.prepared).entry(*layout).or_insert(Arc::new(prepared)).clone())
    }

    /// The workspace that a layout's runs in a stream share.
    fn pooled(&self, prepared: &Prepared, stream: &Stream) -> Result<Arc<Workspace>, Error> {
        let mut pool = lock(&prepared.pool);
        let id = stream.id()?;
        if let Some(workspace) = pool.get(&id) {
            return Ok(workspace.clone());
        }
        stream.check_context()?;
        let buffer = self.device.alloc(prepared.workspace_bytes() as usize)?;
        let workspace = Arc::new(Workspace::new(buffer, stream)?);
        pool.insert(id, workspace.clone());
        Ok(workspace)
    }

    /// Launches what is checked. Holds the workspace meanwhile, so that other threads' launches do not come between.
    fn enqueue(
        &self,
        prepared: &Prepared,
        stream: &Stream,
        args: &ForwardArgs<'_>,
        workspace: &Workspace,
    ) -> Result<(), Error> {
        let Some(module) = &self.module else { return Ok(()) };
        let sinks = args.sinks.map_or(0, |sinks| sinks.address());
        let ForwardArgs { q, k, v, o, lse, .. } = args;
        let addresses = [q.address(), k.address(), v.address(), o.address(), lse.address(), sinks];
        let mut bound = lock(&workspace.bound);
        let at = Place { forward: self, plan: &prepared.plan, workspace: workspace.buffer.address() };
        if bound.id != prepared.id || bound.addresses != addresses {
            self.check_pointers(&addresses, &bound)?;
            at.bind(module, prepared.id, addresses, &mut bound)?;
        }
        let (before, after) = prepared.copies.split_at(prepared.plan.before.len());
        at.copy(stream, &addresses, &prepared.plan.before, before)?;
        let launch =
            Launch::new([prepared.plan.forward.grid(self.device.properties().multiprocessors), 1, 1]);
        // SAFETY: the kernel touches the tensors of the views, whose makers promise that they live and are the caller's; the
        // workspace and the uploads, which are freed after the stream's work (the driver waits); all of them by the shapes
        // and strides that were checked.
        unsafe { module.launch_packed(stream, &launch, &mut bound.slots) }
            .map_err(|error| self.failed(error))?;
        at.copy(stream, &addresses, &prepared.plan.after, after)
    }

    /// Asks the driver about the addresses that the last run did not have.
    fn check_pointers(&self, addresses: &Addresses, bound: &Bound) -> Result<(), Error> {
        let p = &self.problem;
        let (queries, keys) = (p.total_q() > 0, p.total_k() > 0);
        let tensors =
            [("q", queries), ("k", keys), ("v", keys), ("o", queries), ("lse", queries), ("sinks", p.sinks)];
        let _current = self.device.current()?;
        for (i, (name, any)) in tensors.into_iter().enumerate() {
            if any && (bound.id == 0 || bound.addresses[i] != addresses[i]) {
                check_pointer(&self.device, name, addresses[i])?;
            }
        }
        Ok(())
    }
}

/// Where a run's memory is.
struct Place<'a> {
    forward: &'a Forward,
    plan: &'a StagedPlan,
    workspace: u64,
}

impl Place<'_> {
    fn caller(&self, tensor: Tensor, addresses: &Addresses) -> u64 {
        match tensor {
            Tensor::Q => addresses[0],
            Tensor::K => addresses[1],
            Tensor::V => addresses[2],
            Tensor::O => addresses[3],
            Tensor::Lse => addresses[4],
            Tensor::Sinks => addresses[5],
            Tensor::Counter => self.workspace,
            Tensor::Upload(i) => self.forward.uploads.address() + self.forward.offsets[i],
        }
    }

    fn kernel(&self, tensor: Tensor, addresses: &Addresses) -> u64 {
        match self.plan.place(tensor) {
            Location::Caller => self.caller(tensor, addresses),
            Location::Workspace(offset) => self.workspace + staged_at(&self.plan.forward) + offset,
        }
    }

    /// Makes the kernel's arguments for these addresses; of the last run's, what is the same stays.
    fn bind(&self, module: &Module, id: u64, addresses: Addresses, bound: &mut Bound) -> Result<(), Error> {
        let ForwardPlan { arguments, .. } = &self.plan.forward;
        let device = &self.forward.device;
        // Whatever fails below leaves no half of two runs.
        let old = std::mem::take(&mut bound.id) == id;
        let mut maps = Vec::new();
        for (i, argument) in arguments.iter().enumerate() {
            let Argument::TensorMap(map, tensor) = argument else { continue };
            let address = self.kernel(*tensor, &addresses);
            if !old || address != self.kernel(*tensor, &bound.addresses) {
                maps.push((i, TensorMap::encode(map, device, address)?));
            }
        }
        if old {
            for (i, map) in &maps {
                bound.slots[*i] = Slot::new(map.bytes());
            }
            for (slot, argument) in bound.slots.iter_mut().zip(arguments) {
                if let Argument::Address(tensor) = argument {
                    *slot = Slot::new(&self.kernel(*tensor, &addresses).to_ne_bytes());
                }
            }
        } else {
            let mut maps = maps.iter();
            let args: Vec<Arg<'_>> = arguments
                .iter()
                .filter_map(|argument| {
                    Some(match *argument {
                        Argument::U32(x) => Arg::U32(x),
                        Argument::S32(x) => Arg::S32(x),
                        Argument::F32(x) => Arg::F32(x),
                        Argument::U64(x) => Arg::U64(x),
                        Argument::Address(tensor) => Arg::U64(self.kernel(tensor, &addresses)),
                        // Each has been encoded above.
                        Argument::TensorMap(..) => Arg::TensorMap(&maps.next()?.1),
                    })
                })
                .collect();
            bound.slots = module.pack(&args)?;
        }
        (bound.id, bound.addresses) = (id, addresses);
        Ok(())
    }

    fn copy(
        &self,
        stream: &Stream,
        addresses: &Addresses,
        copies: &[Copy],
        modules: &[Arc<Module>],
    ) -> Result<(), Error> {
        for (copy, module) in copies.iter().zip(modules) {
            let [caller, staged] = [self.caller(copy.tensor, addresses), self.kernel(copy.tensor, addresses)];
            let (from, to) = if copy.tensor == Tensor::O { (staged, caller) } else { (caller, staged) };
            let (long, short) = copy.arguments(from, to);
            let args: Vec<_> = long.map(Arg::U64).into_iter().chain(short.map(Arg::U32)).collect();
            // SAFETY: as of the kernel: the caller's tensor, and its place in the workspace, which has room for it.
            unsafe { module.launch(stream, &Launch::new(copy.launch.grid), &args) }
                .map_err(|error| self.forward.failed(error))?;
        }
        Ok(())
    }
}

/// Config and uploads depend on the problem alone, so any layout will do.
fn dense(problem: &AttentionProblem) -> Result<StagedPlan, Error> {
    Ok(StagedPlan::new(problem, &Layout::dense(problem))?)
}

/// Nothing panics while it holds one of this module's locks in a state that others could not use.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
