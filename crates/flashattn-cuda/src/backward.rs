//! The backward pass of a problem on a GPU: planned once, put into streams many times.
//!
//! As [`Forward`](crate::Forward): `run` checks, binds addresses and launches; it waits for nothing, and after
//! [`Backward::prepare`] (or a first run) with the same layout and stream it allocates no device memory and can be captured into
//! a CUDA graph. What it launches is in [`BackwardPlan`](crate::plan::BackwardPlan), with copies around it where
//! [`stage`](crate::stage) says so.

use std::sync::Arc;

use flashattn_spec::AttentionProblem;

use crate::bind::{ALIGN, Layouts, Prepared, Uploads, Workspace, copy, copy_modules, failed};
use crate::cache::KernelConfig;
use crate::device::{Device, Stream};
use crate::error::Error;
use crate::kernels::BwdConfig;
use crate::launch::Launch;
use crate::module::Module;
use crate::plan::{GradStrides, GradTensor, Strides};
use crate::stage::{GradLayout, Location, StagedBackward};
use crate::views::{DeviceSlice, DeviceView, optional, shape_error};

/// The tensors of a backward pass. Shapes as in [`AttentionProblem`]. No two that are written overlap, and none that is written
/// overlaps one that is read.
#[derive(Clone, Copy, Debug)]
pub struct BackwardArgs<'a> {
    /// Queries.
    pub q: DeviceView<'a>,
    /// Keys.
    pub k: DeviceView<'a>,
    /// Values.
    pub v: DeviceView<'a>,
    /// Sink logits `[heads_q]`; given exactly when the problem has sinks.
    pub sinks: Option<DeviceSlice<'a>>,
    /// The forward pass' output.
    pub o: DeviceView<'a>,
    /// Its log-sum-exp.
    pub lse: DeviceSlice<'a>,
    /// Gradient of the loss with respect to o, of o's shape.
    pub d_o: DeviceView<'a>,
    /// Gradient with respect to lse, laid out like it; None: zero.
    pub d_lse: Option<DeviceSlice<'a>>,
    /// Gradient of q, of its shape; every element is written.
    pub dq: DeviceView<'a>,
    /// Gradient of k, summed over the query heads of a group; likewise.
    pub dk: DeviceView<'a>,
    /// Gradient of v, summed over the query heads of a group; likewise.
    pub dv: DeviceView<'a>,
    /// Gradient of the sinks `[heads_q]`; given exactly when the problem has sinks.
    pub d_sinks: Option<DeviceSlice<'a>>,
    /// Gradients of [`AttentionProblem::grad_tables`], in their order, each as long as its table.
    pub d_tables: &'a [DeviceSlice<'a>],
    /// Whether to add to what the gradients' memory holds instead of overwriting it. dq, dk and dv are then computed into the
    /// workspace, rounded, and added in f32: their bytes of workspace more, and a pass over each.
    pub accumulate: bool,
}

impl BackwardArgs<'_> {
    /// How the tensors lie, and options.
    pub fn layout(&self) -> GradLayout {
        let views = [self.q, self.k, self.v, self.o, self.d_o, self.dq, self.dk, self.dv];
        let [q, k, v, o, d_o, dq, dk, dv] = views.map(|view| view.strides());
        let strides = GradStrides { forward: Strides { q, k, v, o }, d_o, dq, dk, dv };
        let layout = GradLayout::new(strides, views.map(|view| view.address()));
        GradLayout { d_lse: self.d_lse.is_some(), accumulate: self.accumulate, ..layout }
    }

    /// By [`caller`].
    fn addresses(&self) -> Vec<u64> {
        let slice = |slice: Option<DeviceSlice<'_>>| slice.map_or(0, |slice| slice.address());
        let views = [self.q, self.k, self.v, self.o, self.d_o, self.dq, self.dk, self.dv];
        let slices = [Some(self.lse), self.d_lse, self.sinks, self.d_sinks];
        let tables = self.d_tables.iter().map(|table| table.address());
        views.iter().map(DeviceView::address).chain(slices.map(slice)).chain(tables).collect()
    }
}

/// The names of [`BackwardArgs::addresses`]; the rest are d_tables.
const NAMES: [&str; 12] = ["q", "k", "v", "o", "do", "dq", "dk", "dv", "lse", "dlse", "sinks", "dsinks"];

/// Where in [`BackwardArgs::addresses`] a tensor of the caller's is; None: it is not the caller's.
fn caller(tensor: GradTensor) -> Option<usize> {
    use GradTensor::*;
    Some(match tensor {
        Q => 0,
        K => 1,
        V => 2,
        O => 3,
        DO => 4,
        DQ => 5,
        DK => 6,
        DV => 7,
        Lse => 8,
        DLse => 9,
        Sinks => 10,
        DSinks => 11,
        DTable(i) => NAMES.len() + i,
        DqSums | Turns | Stats | SinkSums | TableSums(_) | Counter | Upload(_) => return None,
    })
}

/// The backward pass of one problem on one GPU. Threads and streams may share it.
#[derive(Debug)]
pub struct Backward {
    device: Device,
    problem: AttentionProblem,
    deterministic: bool,
    /// Elements of the tables that get gradients.
    tables: Vec<usize>,
    config: BwdConfig,
    /// Without a gradient through lse; None if there is nothing to launch.
    modules: Option<[Arc<Module>; 3]>,
    uploads: Uploads,
    layouts: Layouts<GradLayout, Pass>,
}

/// The pass for one layout.
#[derive(Debug)]
struct Pass {
    staged: StagedBackward,
    /// In the order of their launches.
    modules: Option<[Arc<Module>; 3]>,
}

fn modules(device: &Device, plan: &StagedBackward) -> Result<Option<[Arc<Module>; 3]>, Error> {
    let backward = &plan.backward;
    if backward.query_blocks == 0 && backward.items == 0 {
        return Ok(None);
    }
    let [before, main, after] = KernelConfig::backward(&backward.config);
    Ok(Some([before.module(device)?, main.module(device)?, after.module(device)?]))
}

impl Backward {
    /// Plans a problem for a GPU and compiles its kernels, unless the process has them already.
    ///
    /// dk, dv and the sinks' gradient are bit-identical over runs in any case. dq is if a head dimension is above 128, if there are
    /// at most as many keys as a block has, or if the plan is `deterministic`: then blocks of keys take turns to add to it where there
    /// are many, without a mask or under a causal one; elsewhere a kernel of its own computes the scores again, which takes less memory.
    /// Both take more time. Gradients of tables are added up in any order; by deterministic plans without rounding, so that they, too,
    /// are bit-identical.
    ///
    /// # Errors
    /// What is wrong with the problem; [`Error::Plan`] for what the kernels do not take, [`Error::Target`] for a GPU that they
    /// do not run on; the driver's.
    pub fn new(device: &Device, problem: &AttentionProblem, deterministic: bool) -> Result<Backward, Error> {
        let plan = StagedBackward::new(problem, &GradLayout::dense(problem), deterministic)?;
        Self::with_plan(device, problem, deterministic, plan)
    }

    /// As [`Backward::new`], for GPU `ordinal`. What the kernels do not take is refused even where there is no GPU.
    ///
    /// # Errors
    /// As [`Backward::new`] and [`Device::open`].
    pub fn open(ordinal: u32, problem: &AttentionProblem, deterministic: bool) -> Result<Backward, Error> {
        let plan = StagedBackward::new(problem, &GradLayout::dense(problem), deterministic)?;
        Self::with_plan(&Device::open(ordinal)?, problem, deterministic, plan)
    }

    fn with_plan(
        device: &Device,
        problem: &AttentionProblem,
        deterministic: bool,
        plan: StagedBackward,
    ) -> Result<Backward, Error> {
        let modules = modules(device, &plan)?;
        let uploads = Uploads::new(device, &plan.backward.uploads)?;
        let tables = problem.grad_tables().iter().map(|table| table.data().len()).collect();
        let (device, problem, config) = (device.clone(), problem.clone(), plan.backward.config);
        let layouts = Layouts::default();
        Ok(Backward { device, problem, deterministic, tables, config, modules, uploads, layouts })
    }

    /// Its GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What is differentiated.
    pub fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    /// Whether dq and the gradients of tables have the same bits in every run.
    pub fn deterministic(&self) -> bool {
        self.deterministic
    }

    /// The kernels' config, without a gradient through lse.
    pub fn config(&self) -> &BwdConfig {
        &self.config
    }

    /// The compiled kernels in the order of their launches, of runs without a gradient through lse; empty if there is nothing to
    /// launch. The second is the main one.
    pub fn modules(&self) -> impl Iterator<Item = &Module> {
        self.modules.iter().flatten().map(|module| &**module)
    }

    /// Tensors that each run copies: those that the kernels cannot take where they lie (see [`stage`](crate::stage)), and
    /// gradients that are added to what is there.
    ///
    /// # Errors
    /// As [`Backward::run`].
    pub fn staged(&self, layout: &GradLayout) -> Result<Vec<GradTensor>, Error> {
        Ok(self.prepared(layout)?.plan.staged.staged().collect())
    }

    /// Bytes of a workspace for tensors that lie so: dq in f32 and two numbers for each row of queries, linear in the length; exact
    /// sums of the gradients of tables, if deterministic; and what is staged.
    ///
    /// # Errors
    /// As [`Backward::run`].
    pub fn workspace_bytes(&self, layout: &GradLayout) -> Result<u64, Error> {
        Ok(self.prepared(layout)?.workspace_bytes)
    }

    /// A workspace of the caller's own for tensors that lie so.
    ///
    /// # Errors
    /// As [`Backward::run`].
    pub fn workspace(&self, stream: &Stream, layout: &GradLayout) -> Result<Workspace, Error> {
        Workspace::new(self.device.alloc(self.workspace_bytes(layout)? as usize)?, stream)
    }

    /// Makes everything ready for runs with this layout in this stream: kernels, a workspace in the plan's pool.
    ///
    /// # Errors
    /// As [`Backward::run`].
    pub fn prepare(&self, stream: &Stream, layout: &GradLayout) -> Result<(), Error> {
        self.device.same(stream.device(), "the stream")?;
        self.prepared(layout)?.pooled(&self.device, stream).map(drop)
    }

    /// Puts the pass into the stream, with a workspace that the plan keeps for this stream and layout, and does not wait. For
    /// graphs and for plans that come and go see [`Forward::run`](crate::Forward::run).
    ///
    /// # Errors
    /// Tensors that do not fit the problem, are misaligned or of another GPU's memory, a stream of another one, before
    /// anything is launched; the driver's. What goes wrong in a kernel shows at the stream's next wait ([`Backward::wait`]).
    pub fn run(&self, stream: &Stream, args: &BackwardArgs<'_>) -> Result<(), Error> {
        self.check(stream, args)?;
        let prepared = self.prepared(&args.layout())?;
        let workspace = prepared.pooled(&self.device, stream)?;
        self.enqueue(&prepared, stream, args, &workspace)
    }

    /// As [`Backward::run`], with a workspace of the caller's.
    ///
    /// # Errors
    /// As [`Backward::run`]; [`Error::Workspace`] if it has less than [`Backward::workspace_bytes`].
    pub fn run_with(
        &self,
        stream: &Stream,
        args: &BackwardArgs<'_>,
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
    /// [`Error::Kernel`], with the main kernel's name and config, if something in it went wrong.
    pub fn wait(&self, stream: &Stream) -> Result<(), Error> {
        stream.synchronize().map_err(|error| self.failed(error))
    }

    fn failed(&self, error: Error) -> Error {
        failed(self.modules().nth(1), &self.config, error)
    }

    fn check(&self, stream: &Stream, args: &BackwardArgs<'_>) -> Result<(), Error> {
        self.device.same(stream.device(), "the stream")?;
        let (p, ordinal) = (&self.problem, self.device.ordinal());
        let tensors = [
            ("q", args.q, p.q_shape(), false),
            ("k", args.k, p.k_shape(), false),
            ("v", args.v, p.v_shape(), false),
            ("o", args.o, p.o_shape(), false),
            ("do", args.d_o, p.o_shape(), false),
            ("dq", args.dq, p.q_shape(), true),
            ("dk", args.dk, p.k_shape(), true),
            ("dv", args.dv, p.v_shape(), true),
        ];
        for (name, view, shape, written) in tensors {
            view.expect(name, ordinal, p.dtype, shape, written)?;
        }
        args.lse.expect("lse", ordinal, p.lse_len())?;
        args.d_lse.map_or(Ok(()), |d_lse| d_lse.expect("dlse", ordinal, p.lse_len()))?;
        let sinks = p.sinks.then_some(p.heads_q);
        optional("sinks", args.sinks, ordinal, sinks)?;
        optional("dsinks", args.d_sinks, ordinal, sinks)?;
        if args.d_tables.len() != self.tables.len() {
            return Err(shape_error("d_tables", &[args.d_tables.len()], &[self.tables.len()]));
        }
        let mut tables = args.d_tables.iter().zip(&self.tables);
        tables.try_for_each(|(table, &len)| table.expect("d_tables[i]", ordinal, len))
    }

    fn prepared(&self, layout: &GradLayout) -> Result<Arc<Prepared<Pass>>, Error> {
        self.layouts.get(*layout, |layout| {
            let mut staged = StagedBackward::new(&self.problem, layout, self.deterministic)?;
            // They are on the device.
            staged.backward.uploads = Vec::new();
            let (bytes, modules) = (ALIGN + staged.workspace, modules(&self.device, &staged)?);
            let copies = copy_modules(&self.device, staged.copies())?;
            Ok(Prepared::new(Pass { staged, modules }, copies, bytes))
        })
    }

    /// Launches what is checked. Holds the workspace meanwhile, so that other threads' launches do not come between.
    fn enqueue(
        &self,
        prepared: &Prepared<Pass>,
        stream: &Stream,
        args: &BackwardArgs<'_>,
        workspace: &Workspace,
    ) -> Result<(), Error> {
        let Pass { staged, modules } = &prepared.plan;
        let (plan, addresses) = (&staged.backward, args.addresses());
        let from_caller = |tensor, addresses: &[u64]| match (tensor, caller(tensor)) {
            (GradTensor::Upload(i), _) => self.uploads.address(i),
            // (Of another plan's run there are other addresses, which `bind` does not ask about.)
            (_, Some(i)) => addresses.get(i).copied().unwrap_or_default(),
            (_, None) => workspace.address(),
        };
        let place = |tensor, addresses: &[u64]| match staged.place(tensor) {
            Location::Caller => from_caller(tensor, addresses),
            Location::Workspace(offset) => workspace.address() + ALIGN + offset,
        };
        let mut bound = workspace.bound();
        if !bound.holds(prepared.id, &addresses) {
            let p = &self.problem;
            let (queries, keys) = (p.total_q() > 0, p.total_k() > 0);
            let views = [queries, keys, keys, queries, queries, queries, keys, keys];
            let slices = [queries, queries && args.d_lse.is_some(), p.sinks, p.sinks];
            let fixed = NAMES.into_iter().zip(views.into_iter().chain(slices));
            let tables = self.tables.iter().map(|&len| ("d_tables[i]", len > 0));
            bound.check_pointers(&self.device, fixed.chain(tables), &addresses)?;
            if let Some([module, ..]) = modules {
                bound.bind(module, prepared.id, &addresses, &plan.arguments, place)?;
            }
        }
        let mut launch = || {
            for &tensor in &plan.zeroed {
                let workspace = plan.workspace.iter().find(|&&(other, _)| other == tensor);
                let bytes = match (tensor, workspace) {
                    (_, Some(&(_, bytes))) => bytes,
                    (GradTensor::DTable(i), _) => 4 * self.tables[i],
                    _ => 4 * self.problem.heads_q,
                };
                // SAFETY: the caller's slice, whose length was checked; or the workspace, which has room for it.
                let memory = unsafe { self.device.buffer_from_raw(place(tensor, &addresses), bytes) };
                memory.fill(stream, 0)?;
            }
            let Some(modules) = modules else { return Ok(()) };
            let (before, after) = prepared.copies.split_at(staged.before.len());
            let both = |tensor| [from_caller(tensor, &addresses), place(tensor, &addresses)];
            // SAFETY: as of the kernels: the caller's tensors, and their places in the workspace, which has room for them.
            unsafe { copy(stream, &staged.before, before, both) }?;
            let grids = plan.grids(self.device.properties().multiprocessors);
            for (module, grid) in modules.iter().zip(grids) {
                if grid > 0 {
                    // SAFETY: the kernels touch the tensors of the views, whose makers promise that they live and are the
                    // caller's; the workspace and the uploads, which are freed after the stream's work (the driver waits); all
                    // of them by the shapes and strides that were checked.
                    unsafe { module.launch_packed(stream, &Launch::new([grid, 1, 1]), &mut bound.slots) }?;
                }
            }
            // SAFETY: as of the copies before them.
            unsafe { copy(stream, &staged.after, after, both) }
        };
        launch().map_err(|error| self.failed(error))
    }
}
