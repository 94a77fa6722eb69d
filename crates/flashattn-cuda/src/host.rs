//! Passes over tensors in the host's memory, which are copied to the GPU and back; and this crate as an executor of the corpus.

use bytemuck::Pod;
use flashattn_spec::suite::{ExecError, Executor};
use flashattn_spec::tensor::check_strides;
use flashattn_spec::{AttentionProblem, Element, GradInputs, Gradients, Inputs, Outputs, View};

use crate::device::{Device, Stream};
use crate::error::Error;
use crate::forward::{Forward, ForwardArgs};
use crate::memory::Buffer;
use crate::plan::{Feature, PlanError};
use crate::views::{DeviceSlice, DeviceView};

/// A view's elements from the first to the last, and whether there are others between them.
fn span<'a, T: Element>(view: &View<'a, T>) -> Result<(&'a [T], bool), Error> {
    let span = check_strides(view.shape(), view.strides())
        .map_err(|source| Error::View { name: "a view", source })?;
    // The view has been made, so that its memory has as many.
    let data = view.data().get(..span).unwrap_or_default();
    Ok((data, span != view.shape().into_iter().product()))
}

/// A tensor on its way.
struct Moved {
    buffer: Buffer,
    offset: u64,
}

impl Moved {
    /// Memory for a span, `offset` bytes into an allocation; with its contents, if they matter.
    fn new<T: Pod>(stream: &Stream, data: &[T], offset: u64, contents: bool) -> Result<Moved, Error> {
        let buffer = stream.device().alloc(offset as usize + size_of_val(data))?;
        if contents {
            buffer.write_at(stream, offset, data)?;
        }
        Ok(Moved { buffer, offset })
    }

    fn view<T: Element>(&self, view: &View<'_, T>) -> Result<DeviceView<'_>, Error> {
        DeviceView::with_strides(&self.buffer, self.offset, T::DTYPE, view.shape(), view.strides())
    }
}

impl Forward {
    /// Runs the pass over tensors in the host's memory and waits. They are copied as they lie, gaps between their elements
    /// too, to memory that is allocated for the call, and o and lse back: for tests and small programs; what is to be fast
    /// keeps its tensors on the GPU ([`Forward::run`]).
    ///
    /// # Errors
    /// As [`Forward::run`] and [`Forward::wait`].
    pub fn run_on_host<T: Element>(
        &self,
        inputs: &Inputs<'_, T>,
        outputs: &mut Outputs<'_, T>,
    ) -> Result<(), Error> {
        self.host(inputs, outputs, [0; 4])
    }

    /// `offsets`: bytes that q, k, v and o shall begin past a multiple of 256.
    fn host<T: Element>(
        &self,
        inputs: &Inputs<'_, T>,
        outputs: &mut Outputs<'_, T>,
        offsets: [u64; 4],
    ) -> Result<(), Error> {
        let p = self.problem();
        inputs.check(p)?;
        outputs.check(p)?;
        let stream = self.device().stream()?;
        let stream = &stream;
        let input = |view: &View<'_, T>, offset| Moved::new(stream, span(view)?.0, offset, true);
        let [a, b, c, d] = offsets;
        let (q, k, v) = (input(&inputs.q, a)?, input(&inputs.k, b)?, input(&inputs.v, c)?);
        // What lies between o's elements comes back as it was.
        let (data, gaps) = span(&outputs.o.as_view())?;
        let o = Moved::new(stream, data, d, gaps)?;
        let lse = Moved::new(stream, outputs.lse, 0, false)?;
        let sinks = inputs.sinks.map(|sinks| Moved::new(stream, sinks, 0, true)).transpose()?;
        let args = ForwardArgs {
            q: q.view(&inputs.q)?,
            k: k.view(&inputs.k)?,
            v: v.view(&inputs.v)?,
            sinks: sinks.as_ref().map(|sinks| DeviceSlice::new(&sinks.buffer, 0, p.heads_q)).transpose()?,
            o: o.view(&outputs.o.as_view())?,
            lse: DeviceSlice::new(&lse.buffer, 0, outputs.lse.len())?,
        };
        let workspace = self.workspace(stream, &args.layout())?;
        self.run_with(stream, &args, &workspace)?;
        self.wait(stream)?;
        let count = data.len();
        let o_data = outputs.o.data_mut();
        o.buffer.read_at(stream, o.offset, o_data.get_mut(..count).unwrap_or_default())?;
        lse.buffer.read_at(stream, 0, outputs.lse)
    }
}

/// Runs each problem by a fresh [`Forward`] over copies of its tensors, which begin as far past a multiple of 16 bytes as the
/// host's do: what is tested is how tensors lie.
#[derive(Debug)]
pub struct CudaExecutor {
    device: Device,
}

impl CudaExecutor {
    /// An executor on a GPU.
    pub fn new(device: Device) -> Self {
        CudaExecutor { device }
    }
}

impl From<Error> for ExecError {
    fn from(error: Error) -> Self {
        match error {
            Error::Plan(PlanError::Unsupported { .. }) => {
                ExecError::Unsupported { feature: error.to_string() }
            }
            other => ExecError::Failed(other.to_string()),
        }
    }
}

impl Executor for CudaExecutor {
    fn device(&self) -> String {
        format!("cuda:{} ({})", self.device.ordinal(), self.device.properties().name)
    }

    fn forward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<'_, T>,
        outputs: &mut Outputs<'_, T>,
    ) -> Result<(), ExecError> {
        let forward = Forward::new(&self.device, problem)?;
        let o = outputs.o.as_view();
        let offsets = [inputs.q, inputs.k, inputs.v, o].map(|view| view.data().as_ptr().addr() as u64 % 16);
        Ok(forward.host(inputs, outputs, offsets)?)
    }

    fn backward<T: Element>(
        &self,
        _: &AttentionProblem,
        _: &Inputs<'_, T>,
        _: &GradInputs<'_, T>,
        _: &mut Gradients<'_, T>,
    ) -> Result<(), ExecError> {
        Err(ExecError::Unsupported { feature: Feature::Gradients.name().to_owned() })
    }
}
