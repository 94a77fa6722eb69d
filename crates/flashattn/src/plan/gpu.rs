//! Plans for GPUs, and passes over tensors that lie there.

use super::Plan;
use crate::Device;
use crate::error::Error;
use flashattn_cuda::stage::Layout;
use flashattn_cuda::{Buffer, DeviceSlice, DeviceView, Forward, ForwardArgs, Stream, Workspace};
use flashattn_spec::{AttentionProblem, Element, Inputs, Outputs};

/// The passes of a problem on a GPU.
pub(crate) struct Executor {
    device: Device,
    forward: Forward,
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
            Ok(Executor { device, sinks, workspace_bytes, forward })
        };
        make().map_err(Error::cuda(device))
    }

    pub fn on_host<T: Element>(
        &self,
        inputs: &Inputs<'_, T>,
        outputs: &mut Outputs<'_, T>,
    ) -> Result<(), Error> {
        self.forward.run_on_host(inputs, outputs).map_err(Error::cuda(self.device))
    }
}

/// Tensors on a GPU for [`Plan::forward_on`]: shapes and strides as on the host.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTensors<'a> {
    /// Queries `[batch, seqlen_q, heads_q, head_dim]`.
    pub q: DeviceView<'a>,
    /// Keys `[batch, seqlen_k, heads_kv, head_dim]`.
    pub k: DeviceView<'a>,
    /// Values `[batch, seqlen_k, heads_kv, head_dim_v]`.
    pub v: DeviceView<'a>,
    /// Output `[batch, seqlen_q, heads_q, head_dim_v]`; every element is written.
    pub o: DeviceView<'a>,
    /// Log-sum-exp, dense `[batch, heads_q, seqlen_q]` (`[heads_q, total_q]` when packed), natural logarithm; written.
    pub lse: DeviceSlice<'a>,
}

impl DeviceTensors<'_> {
    /// How they lie: what [`Forward::prepare`], [`Forward::workspace`] and [`Forward::staged`] are asked about.
    pub fn layout(&self) -> Layout {
        let &DeviceTensors { q, k, v, o, lse } = self;
        ForwardArgs { q, k, v, o, lse, sinks: None }.layout()
    }
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
        let sinks = |buffer| DeviceSlice::new(buffer, 0, self.problem.heads_q);
        let run = || {
            let sinks = gpu.sinks.as_ref().map(sinks).transpose()?;
            let args = ForwardArgs { q, k, v, sinks, o, lse };
            match workspace {
                Some(workspace) => gpu.forward.run_with(stream, &args, workspace),
                None => gpu.forward.run(stream, &args),
            }
        };
        run().map_err(Error::cuda(self.device))
    }
}
