//! Passes over tensors in the host's memory, which are copied to the GPU and back; and this crate as an executor of the corpus.

use bytemuck::Pod;
use flashattn_spec::suite::{ExecError, Executor};
use flashattn_spec::tensor::check_strides;
use flashattn_spec::{AttentionProblem, Element, GradInputs, Gradients, Inputs, Outputs, View, ViewMut};

use crate::backward::{Backward, BackwardArgs};
use crate::device::{Device, Stream};
use crate::error::Error;
use crate::forward::{Forward, ForwardArgs};
use crate::memory::Buffer;
use crate::plan::PlanError;
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

    /// An input.
    fn input<T: Element>(stream: &Stream, view: &View<'_, T>, offset: u64) -> Result<Moved, Error> {
        Moved::new(stream, span(view)?.0, offset, true)
    }

    /// A result; what lies between its elements comes back as it was.
    fn output<T: Element>(stream: &Stream, view: &View<'_, T>, offset: u64) -> Result<Moved, Error> {
        let (data, gaps) = span(view)?;
        Moved::new(stream, data, offset, gaps)
    }

    fn numbers(stream: &Stream, numbers: &[f32], contents: bool) -> Result<Moved, Error> {
        Moved::new(stream, numbers, 0, contents)
    }

    /// Fetches a result.
    fn fetch<T: Element>(&self, stream: &Stream, view: &mut ViewMut<'_, T>) -> Result<(), Error> {
        let count = span(&view.as_view())?.0.len();
        self.buffer.read_at(stream, self.offset, view.data_mut().get_mut(..count).unwrap_or_default())
    }

    fn slice(&self) -> Result<DeviceSlice<'_>, Error> {
        DeviceSlice::new(&self.buffer, 0, self.buffer.bytes() / size_of::<f32>())
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
        let [a, b, c, d] = offsets;
        let q = Moved::input(stream, &inputs.q, a)?;
        let k = Moved::input(stream, &inputs.k, b)?;
        let v = Moved::input(stream, &inputs.v, c)?;
        let o = Moved::output(stream, &outputs.o.as_view(), d)?;
        let lse = Moved::numbers(stream, outputs.lse, false)?;
        let sinks = inputs.sinks.map(|sinks| Moved::numbers(stream, sinks, true)).transpose()?;
        let args = ForwardArgs {
            q: q.view(&inputs.q)?,
            k: k.view(&inputs.k)?,
            v: v.view(&inputs.v)?,
            sinks: sinks.as_ref().map(Moved::slice).transpose()?,
            o: o.view(&outputs.o.as_view())?,
            lse: lse.slice()?,
        };
        let workspace = self.workspace(stream, &args.layout())?;
        self.run_with(stream, &args, &workspace)?;
        self.wait(stream)?;
        o.fetch(stream, &mut outputs.o)?;
        lse.buffer.read_at(stream, 0, outputs.lse)
    }
}

impl Backward {
    /// As [`Forward::run_on_host`].
    ///
    /// # Errors
    /// As [`Backward::run`] and [`Backward::wait`].
    pub fn run_on_host<T: Element>(
        &self,
        inputs: &Inputs<'_, T>,
        given: &GradInputs<'_, T>,
        gradients: &mut Gradients<'_, T>,
    ) -> Result<(), Error> {
        self.host(inputs, given, gradients, [0; 8])
    }

    /// `offsets`: bytes that q, k, v, o, do, dq, dk and dv shall begin past a multiple of 256.
    fn host<T: Element>(
        &self,
        inputs: &Inputs<'_, T>,
        given: &GradInputs<'_, T>,
        gradients: &mut Gradients<'_, T>,
        offsets: [u64; 8],
    ) -> Result<(), Error> {
        let p = self.problem();
        inputs.check(p)?;
        given.check(p)?;
        gradients.check(p)?;
        let stream = self.device().stream()?;
        let stream = &stream;
        let read = [&inputs.q, &inputs.k, &inputs.v, &given.o, &given.d_o];
        let moved = read.into_iter().zip(offsets).map(|(view, at)| Moved::input(stream, view, at));
        let moved = moved.collect::<Result<Vec<_>, Error>>()?;
        let written = [&gradients.dq, &gradients.dk, &gradients.dv].map(ViewMut::as_view);
        let results = written.iter().zip(&offsets[5..]).map(|(view, &at)| Moved::output(stream, view, at));
        let results = results.collect::<Result<Vec<_>, Error>>()?;
        let number = |numbers: Option<&[f32]>, contents| {
            numbers.map(|numbers| Moved::numbers(stream, numbers, contents)).transpose()
        };
        let lse = Moved::numbers(stream, given.lse, true)?;
        let (d_lse, sinks) = (number(given.d_lse, true)?, number(inputs.sinks, true)?);
        let d_sinks = number(gradients.d_sinks.as_deref(), false)?;
        let tables = gradients.d_tables.iter().map(|table| Moved::numbers(stream, table, false));
        let tables = tables.collect::<Result<Vec<_>, Error>>()?;
        let d_tables = tables.iter().map(Moved::slice).collect::<Result<Vec<_>, Error>>()?;
        let args = BackwardArgs {
            q: moved[0].view(read[0])?,
            k: moved[1].view(read[1])?,
            v: moved[2].view(read[2])?,
            sinks: sinks.as_ref().map(Moved::slice).transpose()?,
            o: moved[3].view(read[3])?,
            lse: lse.slice()?,
            d_o: moved[4].view(read[4])?,
            d_lse: d_lse.as_ref().map(Moved::slice).transpose()?,
            dq: results[0].view(&written[0])?,
            dk: results[1].view(&written[1])?,
            dv: results[2].view(&written[2])?,
            d_sinks: d_sinks.as_ref().map(Moved::slice).transpose()?,
            d_tables: &d_tables,
            accumulate: false,
        };
        let workspace = self.workspace(stream, &args.layout())?;
        self.run_with(stream, &args, &workspace)?;
        self.wait(stream)?;
        for (moved, view) in results.iter().zip([&mut gradients.dq, &mut gradients.dk, &mut gradients.dv]) {
            moved.fetch(stream, view)?;
        }
        if let (Some(moved), Some(to)) = (&d_sinks, gradients.d_sinks.as_deref_mut()) {
            moved.buffer.read_at(stream, 0, to)?;
        }
        let mut pairs = tables.iter().zip(&mut gradients.d_tables);
        pairs.try_for_each(|(moved, table)| moved.buffer.read_at(stream, 0, table))
    }
}

/// Runs each problem by a fresh [`Forward`] or [`Backward`] over copies of its tensors, which begin as far past a multiple of 16 bytes as the
/// host's do: what is tested is how tensors lie.
#[derive(Debug)]
pub struct CudaExecutor {
    device: Device,
    deterministic: bool,
}

impl CudaExecutor {
    /// An executor on a GPU.
    pub fn new(device: Device) -> Self {
        CudaExecutor { device, deterministic: false }
    }

    /// With deterministic backward passes.
    pub fn deterministic(self) -> Self {
        CudaExecutor { deterministic: true, ..self }
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
        Ok(forward.host(inputs, outputs, [inputs.q, inputs.k, inputs.v, o].map(past_16))?)
    }

    fn backward<T: Element>(
        &self,
        problem: &AttentionProblem,
        inputs: &Inputs<'_, T>,
        given: &GradInputs<'_, T>,
        gradients: &mut Gradients<'_, T>,
    ) -> Result<(), ExecError> {
        let backward = Backward::new(&self.device, problem, self.deterministic)?;
        let [dq, dk, dv] = [&gradients.dq, &gradients.dk, &gradients.dv].map(|view| past_16(view.as_view()));
        let [q, k, v, o, d_o] = [inputs.q, inputs.k, inputs.v, given.o, given.d_o].map(past_16);
        Ok(backward.host(inputs, given, gradients, [q, k, v, o, d_o, dq, dk, dv])?)
    }
}

/// Bytes that a view begins past a multiple of 16.
fn past_16<T: Element>(view: View<'_, T>) -> u64 {
    view.data().as_ptr().addr() as u64 % 16
}
