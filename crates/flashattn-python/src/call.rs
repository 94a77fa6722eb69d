//! [`Call`]: one forward or backward pass over a caller's arrays, checked, then run on the device where the arrays are.

use crate::array::{Array, Kind, Place, check_disjoint};
use crate::error::Error;
use crate::gpu;
use crate::plans::{self, Planned};
use crate::threads;
use flashattn::{DType, Element, GradInputs, GradientsMut, bf16, f16};

/// What both passes read.
pub struct Call<'a> {
    /// The options' text; [`crate::options::Options`].
    pub options: &'a str,
    /// Queries.
    pub q: Array,
    /// Keys.
    pub k: Array,
    /// Values.
    pub v: Array,
    /// Tables and the rest; [`crate::options`].
    pub extras: Vec<Array>,
    /// The CUDA stream to run on, if the arrays are on a GPU.
    pub stream: Option<usize>,
    /// Whether that stream is being captured into a CUDA graph.
    pub captured: bool,
}

/// The caller's allocator: an array of so many bytes on the GPU of the call. It lives until the pass is in the stream, and its
/// memory by the caller's own rules, which let work that comes later in the stream's order use it again.
pub type Allocate<'a> = dyn FnMut(u64) -> Result<Array, Error> + 'a;

/// What the forward pass writes.
pub struct Results {
    /// Output.
    pub o: Array,
    /// Log-sum-exp, f32 `[batch, heads_q, seqlen_q]` or `[heads_q, total_q]`.
    pub lse: Array,
}

/// What the backward pass reads besides.
pub struct Given {
    /// The forward's output.
    pub o: Array,
    /// The forward's log-sum-exp.
    pub lse: Array,
    /// Gradient with respect to o.
    pub d_o: Array,
    /// Gradient with respect to lse.
    pub d_lse: Option<Array>,
}

/// What the backward pass writes.
pub struct Gradients {
    /// Gradient of q.
    pub dq: Array,
    /// Gradient of k.
    pub dk: Array,
    /// Gradient of v.
    pub dv: Array,
    /// Gradients of the tables that get one, in order, then of the sinks.
    pub d_extras: Vec<Array>,
}

/// Runs `$body` with `$T` the Rust type of the call's elements.
macro_rules! for_dtype {
    ($call:expr, $T:ident => $body:expr) => {
        match $call.q.kind {
            Kind::Element(DType::F32) => {
                type $T = f32;
                $body
            }
            Kind::Element(DType::F16) => {
                type $T = f16;
                $body
            }
            Kind::Element(DType::Bf16) => {
                type $T = bf16;
                $body
            }
            _ => Err(Error::Type(format!(
                "q is {}, expected float16, bfloat16 or float32",
                $call.q.kind.name()
            ))),
        }
    };
}

impl Call<'_> {
    /// All arrays of the call are in one place, but for the extras, which are read on the host.
    fn place<'a>(&'a self, others: impl IntoIterator<Item = &'a Array>) -> Result<Place, Error> {
        let like_q = [&self.k, &self.v].into_iter().chain(others).map(|array| (array, self.q.place));
        for (array, expected) in like_q.chain(self.extras.iter().map(|array| (array, Place::Cpu))) {
            if array.place != expected {
                let (name, got) = (array.name, array.place);
                return Err(Error::Type(format!("{name} is on {got}, expected {expected}")));
            }
        }
        Ok(self.q.place)
    }

    fn inputs(&self) -> impl Iterator<Item = &Array> {
        [&self.q, &self.k, &self.v].into_iter().chain(&self.extras)
    }

    fn planned<T: Element>(&self) -> Result<std::sync::Arc<Planned<T>>, Error> {
        plans::get(self.options, [&self.q, &self.k, &self.v], &self.extras, flashattn::Device::Cpu)
    }

    /// Runs `f` in the thread pool, unless the call is small.
    fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> Result<R, Error> {
        if plans::is_small(&self.q, &self.k) { Ok(f()) } else { threads::run(f) }
    }

    /// Fills o and lse. `allocate`: for memory to work with on a GPU; without it plans have their own.
    ///
    /// # Errors
    /// Whatever is wrong with options and arrays; nothing is written then.
    pub fn forward(&self, results: &mut Results, allocate: Option<&mut Allocate<'_>>) -> Result<(), Error> {
        check_disjoint(&self.inputs().collect::<Vec<_>>(), &[&results.o, &results.lse])?;
        match self.place([&results.o, &results.lse])? {
            Place::Cpu => for_dtype!(self, T => self.run(|| self.forward_cpu::<T>(results))?),
            Place::Cuda { ordinal } => {
                for_dtype!(self, T => gpu::forward::<T>(self, results, ordinal, allocate))
            }
        }
    }

    fn forward_cpu<T: Element>(&self, results: &mut Results) -> Result<(), Error> {
        let (q, k, v) = (self.q.view::<T>()?, self.k.view::<T>()?, self.v.view::<T>()?);
        let mut o = results.o.view_mut::<T>()?;
        let lse = results.lse.list_mut::<f32>()?;
        Ok(self.planned::<T>()?.plan.forward(&q, &k, &v, &mut o, lse)?)
    }

    /// Fills the gradients; `allocate` as for [`Call::forward`].
    ///
    /// # Errors
    /// Whatever is wrong with options and arrays; nothing is written then.
    pub fn backward(
        &self,
        given: &Given,
        gradients: &mut Gradients,
        allocate: Option<&mut Allocate<'_>>,
    ) -> Result<(), Error> {
        let read: Vec<&Array> = [&given.o, &given.lse, &given.d_o].into_iter().chain(&given.d_lse).collect();
        let Gradients { dq, dk, dv, d_extras } = &*gradients;
        let written: Vec<&Array> = [dq, dk, dv].into_iter().chain(d_extras).collect();
        check_disjoint(&self.inputs().chain(read.iter().copied()).collect::<Vec<_>>(), &written)?;
        match self.place(read.into_iter().chain(written))? {
            Place::Cpu => for_dtype!(self, T => self.run(|| self.backward_cpu::<T>(given, gradients))?),
            Place::Cuda { ordinal } => {
                for_dtype!(self, T => gpu::backward::<T>(self, given, gradients, ordinal, allocate))
            }
        }
    }

    fn backward_cpu<T: Element>(&self, given: &Given, gradients: &mut Gradients) -> Result<(), Error> {
        let (q, k, v) = (self.q.view::<T>()?, self.k.view::<T>()?, self.v.view::<T>()?);
        let d_lse = given.d_lse.as_ref().map(|d_lse| d_lse.list::<f32>()).transpose()?;
        let given = GradInputs {
            o: given.o.view::<T>()?,
            lse: given.lse.list::<f32>()?,
            d_o: given.d_o.view::<T>()?,
            d_lse,
        };
        let planned = self.planned::<T>()?;
        let Gradients { dq, dk, dv, d_extras } = gradients;
        let mut lists =
            d_extras.iter_mut().map(|d| d.list_mut::<f32>().map(Some)).collect::<Result<Vec<_>, _>>()?;
        let places = planned.grad_places(lists.len())?;
        let d_sinks = places.sinks.and_then(|i| lists[i].take());
        let d_tables = places.tables.iter().filter_map(|&i| lists[i].take()).collect();
        let (dq, dk, dv) = (dq.view_mut::<T>()?, dk.view_mut::<T>()?, dv.view_mut::<T>()?);
        let mut out = GradientsMut { dq, dk, dv, d_sinks, d_tables };
        planned.plan.backward(&q, &k, &v, &given, &mut out)?;
        lists.into_iter().flatten().for_each(|unused| unused.fill(0.0));
        Ok(())
    }
}
