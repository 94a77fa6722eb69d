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

use std::sync::Arc;

use flashattn_spec::AttentionProblem;

use crate::bind::{ALIGN, Layouts, Prepared, Uploads, Workspace, copy, copy_modules, failed};
use crate::cache::KernelConfig;
use crate::device::{Device, Stream};
use crate::error::Error;
use crate::kernels::FwdConfig;
use crate::launch::Launch;
use crate::module::Module;
use crate::plan::{ForwardPlan, Strides, Tensor};
use crate::stage::{Layout, Location, StagedPlan};
use crate::views::{DeviceSlice, DeviceView, optional};

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
    uploads: Uploads,
    layouts: Layouts<Layout, StagedPlan>,
}

/// Of q, k, v, o, lse and sinks.
type Addresses = [u64; 6];

/// Where a workspace's staged tensors begin.
fn staged_at(plan: &ForwardPlan) -> u64 {
    plan.counter_bytes().next_multiple_of(ALIGN)
}

fn prepare(device: &Device, mut plan: StagedPlan) -> Result<Prepared<StagedPlan>, Error> {
    // They are on the device.
    plan.forward.uploads = Vec::new();
    let (copies, bytes) = (copy_modules(device, plan.copies())?, staged_at(&plan.forward) + plan.workspace);
    Ok(Prepared::new(plan, copies, bytes))
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
        let uploads = Uploads::new(device, &plan.forward.uploads)?;
        let layouts = Layouts::default();
        if plan.staged().next().is_none() {
            // What most calls need is planned already.
            layouts.get(Layout::dense(problem), |_| prepare(device, plan))?;
        }
        let (device, problem) = (device.clone(), problem.clone());
        Ok(Forward { device, problem, config, module, uploads, layouts })
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
        Ok(self.prepared(layout)?.workspace_bytes)
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
        self.prepared(layout)?.pooled(&self.device, stream).map(drop)
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
        let workspace = prepared.pooled(&self.device, stream)?;
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
        let prepared = self.prepared(&args.layout())?;
        workspace.expect(&self.device, prepared.workspace_bytes)?;
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
        failed(self.module(), &self.config, error)
    }

    fn check(&self, stream: &Stream, args: &ForwardArgs<'_>) -> Result<(), Error> {
        self.device.same(stream.device(), "the stream")?;
        let (p, ordinal) = (&self.problem, self.device.ordinal());
        args.q.expect("q", ordinal, p.dtype, p.q_shape(), false)?;
        args.k.expect("k", ordinal, p.dtype, p.k_shape(), false)?;
        args.v.expect("v", ordinal, p.dtype, p.v_shape(), false)?;
        args.o.expect("o", ordinal, p.dtype, p.o_shape(), true)?;
        args.lse.expect("lse", ordinal, p.lse_len())?;
        optional("sinks", args.sinks, ordinal, p.sinks.then_some(p.heads_q))
    }

    fn prepared(&self, layout: &Layout) -> Result<Arc<Prepared<StagedPlan>>, Error> {
        let make = |layout: &Layout| prepare(&self.device, StagedPlan::new(&self.problem, layout)?);
        self.layouts.get(*layout, make)
    }

    /// Launches what is checked. Holds the workspace meanwhile, so that other threads' launches do not come between.
    fn enqueue(
        &self,
        prepared: &Prepared<StagedPlan>,
        stream: &Stream,
        args: &ForwardArgs<'_>,
        workspace: &Workspace,
    ) -> Result<(), Error> {
        let Some(module) = &self.module else { return Ok(()) };
        let sinks = args.sinks.map_or(0, |sinks| sinks.address());
        let ForwardArgs { q, k, v, o, lse, .. } = args;
        let addresses = [q.address(), k.address(), v.address(), o.address(), lse.address(), sinks];
        let plan = &prepared.plan;
        let staged = workspace.address() + staged_at(&plan.forward);
        let caller = |tensor, [q, k, v, o, lse, sinks]: Addresses| match tensor {
            Tensor::Q => q,
            Tensor::K => k,
            Tensor::V => v,
            Tensor::O => o,
            Tensor::Lse => lse,
            Tensor::Sinks => sinks,
            Tensor::Counter => workspace.address(),
            Tensor::Upload(i) => self.uploads.address(i),
        };
        let place = |tensor, addresses| match plan.place(tensor) {
            Location::Caller => caller(tensor, addresses),
            Location::Workspace(offset) => staged + offset,
        };
        let mut bound = workspace.bound();
        if !bound.holds(prepared.id, &addresses) {
            let (queries, keys) = (self.problem.total_q() > 0, self.problem.total_k() > 0);
            let names = ["q", "k", "v", "o", "lse", "sinks"];
            let any = [queries, keys, keys, queries, queries, self.problem.sinks];
            bound.check_pointers(&self.device, names.into_iter().zip(any), &addresses)?;
            // (Of another plan's run there are other addresses, which `bind` does not ask about.)
            let place =
                |tensor, addresses: &[u64]| place(tensor, Addresses::try_from(addresses).unwrap_or_default());
            bound.bind(module, prepared.id, &addresses, &plan.forward.arguments, place)?;
        }
        let (before, after) = prepared.copies.split_at(plan.before.len());
        let both = |tensor| [caller(tensor, addresses), place(tensor, addresses)];
        // SAFETY: as of the kernel: the caller's tensors, and their places in the workspace, which has room for them.
        unsafe { copy(stream, &plan.before, before, both) }.map_err(|error| self.failed(error))?;
        let launch = Launch::new([plan.forward.grid(self.device.properties().multiprocessors), 1, 1]);
        // SAFETY: the kernel touches the tensors of the views, whose makers promise that they live and are the caller's; the
        // workspace and the uploads, which are freed after the stream's work (the driver waits); all of them by the shapes
        // and strides that were checked.
        unsafe { module.launch_packed(stream, &launch, &mut bound.slots) }
            .map_err(|error| self.failed(error))?;
        // SAFETY: as of the copies before it.
        unsafe { copy(stream, &plan.after, after, both) }.map_err(|error| self.failed(error))
    }
}

/// Config and uploads depend on the problem alone, so any layout will do.
fn dense(problem: &AttentionProblem) -> Result<StagedPlan, Error> {
    Ok(StagedPlan::new(problem, &Layout::dense(problem))?)
}
