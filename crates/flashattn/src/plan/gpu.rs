//! Plans for GPUs, and passes over tensors that lie there.

use super::Plan;
use crate::Device;
use crate::error::Error;
use flashattn_cuda::stage::{GradLayout, Layout, StagedBackward};
use flashattn_cuda::{
    Backward, BackwardArgs, Buffer, DeviceSlice, DeviceView, Forward, ForwardArgs, Stream, Workspace,
};
use flashattn_spec::{AttentionProblem, Element, GradInputs, Gradients, Inputs, Outputs};
use std::sync::OnceLock;

/// The passes of a problem on a GPU.
pub(crate) struct Executor {
    device: Device,
    forward: Forward,
    /// Made when it is first asked for: who only needs the forward pass does not wait for its kernels.
    backward: OnceLock<Backward>,
    deterministic: bool,
    sinks: Option<Buffer>,
    pub workspace_bytes: usize,
}

impl Executor {
    pub fn new(ordinal: u32, problem: &AttentionProblem, sinks: Option<&[f32]>) -> Result<Self, Error> {
        let device = Device::Cuda(ordinal);
        let make = || {
            let forward = Forward::open(ordinal, problem)?;
            let gpu = forward.device();
            let sinks = sinks.map(|sinks| gpu.upload(&gpu.stream()?, sinks)).transpose()?;
            let workspace_bytes = forward.workspace_bytes(&Layout::dense(problem))? as usize;
            let backward = OnceLock::new();
            Ok(Executor { device, sinks, workspace_bytes, forward, backward, deterministic: false })
        };
        make().map_err(Error::cuda(device))
    }

    pub fn set_deterministic(&mut self, deterministic: bool) -> Result<(), Error> {
        if self.deterministic != deterministic {
            self.deterministic = deterministic;
            self.backward = OnceLock::new();
            // What cannot be done is refused now.
            self.plan_backward()?;
        }
        Ok(())
    }

    fn plan_backward(&self) -> Result<StagedBackward, Error> {
        let problem = self.forward.problem();
        let plan = StagedBackward::new(problem, &GradLayout::dense(problem), self.deterministic);
        plan.map_err(|error| Error::cuda(self.device)(error.into()))
    }

    /// 0 for what would be refused.
    pub fn backward_workspace_bytes(&self) -> usize {
        self.plan_backward().map_or(0, |plan| plan.workspace as usize)
    }

    fn backward(&self) -> Result<&Backward, Error> {
        if let Some(backward) = self.backward.get() {
            return Ok(backward);
        }
        let backward = Backward::new(self.forward.device(), self.forward.problem(), self.deterministic);
        let backward = backward.map_err(Error::cuda(self.device))?;
        Ok(self.backward.get_or_init(|| backward))
    }

    pub fn on_host<T: Element>(
        &self,
        inputs: &Inputs<'_, T>,
        outputs: &mut Outputs<'_, T>,
    ) -> Result<(), Error> {
        self.forward.run_on_host(inputs, outputs).map_err(Error::cuda(self.device))
    }

    pub fn backward_on_host<T: Element>(
        &self,
        inputs: &Inputs<'_, T>,
        given: &GradInputs<'_, T>,
        gradients: &mut Gradients<'_, T>,
    ) -> Result<(), Error> {
        self.backward()?.run_on_host(inputs, given, gradients).map_err(Error::cuda(self.device))
    }

    fn sinks(&self) -> Result<Option<DeviceSlice<'_>>, flashattn_cuda::Error> {
        let heads = self.forward.problem().heads_q;
        self.sinks.as_ref().map(|buffer| DeviceSlice::new(buffer, 0, heads)).transpose()
    }
}

/// Tensors on a GPU for [`Plan::forward_on`] and [`Plan::backward_on`]: shapes and strides as on the host.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTensors<'a> {
    /// Queries `[batch, seqlen_q, heads_q, head_dim]`.
    pub q: DeviceView<'a>,
    /// Keys `[batch, seqlen_k, heads_kv, head_dim]`.
    pub k: DeviceView<'a>,
    /// Values `[batch, seqlen_k, heads_kv, head_dim_v]`.
    pub v: DeviceView<'a>,
    /// Output `[batch, seqlen_q, heads_q, head_dim_v]`; the forward pass writes every element, the backward pass reads it.
    pub o: DeviceView<'a>,
    /// Log-sum-exp, dense `[batch, heads_q, seqlen_q]` (`[heads_q, total_q]` when packed), natural logarithm; likewise.
    pub lse: DeviceSlice<'a>,
}

impl DeviceTensors<'_> {
    /// How they lie: what [`Forward::prepare`], [`Forward::workspace`] and [`Forward::staged`] are asked about.
    pub fn layout(&self) -> Layout {
        let &DeviceTensors { q, k, v, o, lse } = self;
        ForwardArgs { q, k, v, o, lse, sinks: None }.layout()
    }
}

/// What [`Plan::backward_on`] reads and writes besides the forward pass' tensors: shapes and strides as on the host. What is
/// written overlaps nothing else.
#[derive(Clone, Copy, Debug)]
pub struct DeviceGradients<'a> {
    /// Gradient of the loss with respect to o, of o's shape.
    pub d_o: DeviceView<'a>,
    /// Gradient with respect to lse, laid out like it; None: zero.
    pub d_lse: Option<DeviceSlice<'a>>,
    /// Gradient of q, of its shape; every element is written.
    pub dq: DeviceView<'a>,
    /// Gradient of k, likewise.
    pub dk: DeviceView<'a>,
    /// Gradient of v, likewise.
    pub dv: DeviceView<'a>,
    /// Gradient of the sinks `[heads_q]`; given exactly when there are sinks.
    pub d_sinks: Option<DeviceSlice<'a>>,
    /// Gradients of [`Plan::grad_tables`], in their order, f32, each as long as its table.
    pub d_tables: &'a [DeviceSlice<'a>],
    /// Whether to add to what the gradients hold: see [`BackwardArgs::accumulate`].
    pub accumulate: bool,
}

impl<T: Element> Plan<T> {
    /// The forward pass of a plan for [`Device::Cuda`], with what is particular to GPUs: its device and streams, workspaces,
    /// preparation for graphs, which tensors are copied because of how they lie.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for plans of other devices.
    pub fn gpu(&self) -> Result<&Forward, Error> {
        Ok(&self.on_gpu()?.forward)
    }

    /// As [`Plan::gpu`], of the backward pass, whose kernels the first call compiles.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for plans of other devices, and for what the kernels do not take.
    pub fn gpu_backward(&self) -> Result<&Backward, Error> {
        self.on_gpu()?.backward()
    }

    fn on_gpu(&self) -> Result<&Executor, Error> {
        match &self.executor {
            super::Executor::Cuda(gpu) => Ok(gpu),
            super::Executor::Cpu(_) => {
                let feature = "a tensor in a GPU's memory".to_owned();
                Err(Error::Unsupported { feature, executor: self.device })
            }
        }
    }

    /// Puts the forward pass over tensors in the GPU's memory into a stream, and does not wait. Memory, stream and their life
    /// are the caller's business; see [`DeviceView::from_raw`].
    ///
    /// The plan keeps a workspace for each stream; or the caller gives one ([`Forward::workspace`]). After a first call (or
    /// [`Forward::prepare`]) with the same strides and stream, calls allocate nothing and can be captured into CUDA graphs.
    /// Tensors that the kernel cannot take as they lie are copied by each call ([`Forward::staged`] names them).
    ///
    /// ```no_run
    /// use flashattn::cuda::{DeviceSlice, DeviceView};
    /// use flashattn::{Attention, DType, Device, DeviceTensors, Shape, bf16};
    ///
    /// let shape = [2, 4096, 16, 128];
    /// let attention = Attention::new().causal().device(Device::Cuda(0));
    /// let plan = attention.plan::<bf16>(Shape::of(shape, shape, shape)?)?;
    /// let gpu = plan.gpu()?.device();
    /// # let (raw_stream, pointers, raw_lse) = (std::ptr::null_mut(), [0u64; 4], 0);
    /// // The stream and tensors of another library; `[batch, seqlen, heads, head_dim]`, strides in elements.
    /// let strides = [4096 * 16 * 128, 16 * 128, 128, 1];
    /// // SAFETY: they live, and are ours to use, until the stream's work has ended.
    /// let stream = unsafe { gpu.stream_from_raw(raw_stream) };
    /// let view = |at| unsafe { DeviceView::from_raw(0, at, DType::Bf16, shape, strides) };
    /// let [q, k, v, o] = pointers.map(view);
    /// let lse = unsafe { DeviceSlice::from_raw(0, raw_lse, 2 * 16 * 4096) };
    /// let tensors = DeviceTensors { q: q?, k: k?, v: v?, o: o?, lse };
    /// plan.forward_on(&stream, &tensors, None)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Before anything is launched: tensors that do not fit the plan, are misaligned or not of this GPU's memory; streams of
    /// other GPUs. What goes wrong in a kernel shows at the stream's next wait: [`Forward::wait`] names kernel and config.
    pub fn forward_on(
        &self,
        stream: &Stream,
        tensors: &DeviceTensors<'_>,
        workspace: Option<&Workspace>,
    ) -> Result<(), Error> {
        let gpu = self.on_gpu()?;
        let &DeviceTensors { q, k, v, o, lse } = tensors;
        let run = || {
            let args = ForwardArgs { q, k, v, sinks: gpu.sinks()?, o, lse };
            match workspace {
                Some(workspace) => gpu.forward.run_with(stream, &args, workspace),
                None => gpu.forward.run(stream, &args),
            }
        };
        run().map_err(Error::cuda(self.device))
    }

    /// Puts the backward pass into a stream, from the forward pass' tensors, and does not wait: as [`Plan::forward_on`].
    ///
    /// The arguments of a run, for [`Backward::prepare`], [`Backward::workspace`] and [`Backward::staged`], are laid out as
    /// [`Plan::backward_args`] says.
    ///
    /// # Errors
    /// As [`Plan::forward_on`], and what the kernels do not take; [`Backward::wait`] names kernel and config.
    pub fn backward_on(
        &self,
        stream: &Stream,
        tensors: &DeviceTensors<'_>,
        gradients: &DeviceGradients<'_>,
        workspace: Option<&Workspace>,
    ) -> Result<(), Error> {
        let (backward, args) = (self.on_gpu()?.backward()?, self.backward_args(tensors, gradients)?);
        let done = match workspace {
            Some(workspace) => backward.run_with(stream, &args, workspace),
            None => backward.run(stream, &args),
        };
        done.map_err(Error::cuda(self.device))
    }

    /// What [`Plan::backward_on`] gives to [`Backward::run`], the plan's sinks included.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for plans of other devices.
    pub fn backward_args<'a>(
        &'a self,
        tensors: &DeviceTensors<'a>,
        gradients: &DeviceGradients<'a>,
    ) -> Result<BackwardArgs<'a>, Error> {
        let &DeviceTensors { q, k, v, o, lse } = tensors;
        let &DeviceGradients { d_o, d_lse, dq, dk, dv, d_sinks, d_tables, accumulate } = gradients;
        let sinks = self.on_gpu()?.sinks().map_err(Error::cuda(self.device))?;
        Ok(BackwardArgs { q, k, v, sinks, o, lse, d_o, d_lse, dq, dk, dv, d_sinks, d_tables, accumulate })
    }
}
