//! A problem's tensors in a GPU's memory, and the forward pass over them.

use crate::attention::{Given, Layout, Results};
use anyhow::Result;
use flashattn::cuda::{Buffer, DeviceSlice, DeviceView, Forward, Stream, timing};
use flashattn::{Device, DeviceTensors, Plan};
use flashattn_spec::{AttentionProblem, Element};
use std::time::Instant;

/// Launches whose host time is measured: fewer than the driver's queue takes without waiting.
const QUEUED: u32 = 100;

/// A plan with its tensors where it runs.
pub struct Resident<T> {
    plan: Plan<T>,
    layout: Layout,
    stream: Stream,
    /// q, k, v, o and lse.
    buffers: [Buffer; 5],
}

impl<T: Element> Resident<T> {
    /// Plans, and uploads q, k and v. o and lse hold NaN until they are computed.
    ///
    /// # Errors
    /// What the GPU refuses.
    pub fn new(ordinal: u32, p: &AttentionProblem, given: &Given<T>) -> Result<Self> {
        let sinks = given.sinks.as_deref().map(Into::into);
        let plan = Plan::<T>::from_problem(p.clone(), sinks, Device::Cuda(ordinal))?;
        let device = plan.gpu()?.device();
        let stream = device.stream()?;
        let upload = |data: &[T]| device.upload(&stream, data);
        let elements: usize = p.o_shape().into_iter().product();
        let (o, lse) =
            (device.alloc(elements * size_of::<T>())?, device.alloc(p.lse_len() * size_of::<f32>())?);
        // All bits set are a NaN in every type.
        o.fill(&stream, 0xff)?;
        lse.fill(&stream, 0xff)?;
        let buffers = [upload(&given.q)?, upload(&given.k)?, upload(&given.v)?, o, lse];
        Ok(Resident { plan, layout: given.layout, stream, buffers })
    }

    /// The plan's GPU side.
    ///
    /// # Errors
    /// Never: the plan is a GPU's.
    pub fn forward(&self) -> Result<&Forward> {
        Ok(self.plan.gpu()?)
    }

    /// Views of the tensors.
    ///
    /// # Errors
    /// If they do not fit the problem.
    pub fn tensors(&self) -> Result<DeviceTensors<'_>> {
        let (p, [q, k, v, o, lse]) = (self.plan.problem(), &self.buffers);
        let view =
            |buffer, shape| DeviceView::with_strides(buffer, 0, p.dtype, shape, self.layout.strides(shape));
        Ok(DeviceTensors {
            q: view(q, p.q_shape())?,
            k: view(k, p.k_shape())?,
            v: view(v, p.v_shape())?,
            o: view(o, p.o_shape())?,
            lse: DeviceSlice::new(lse, 0, p.lse_len())?,
        })
    }

    /// Runs the pass and fetches o and lse.
    ///
    /// # Errors
    /// What goes wrong on the GPU.
    pub fn run(&self, results: &mut Results<T>) -> Result<()> {
        self.plan.forward_on(&self.stream, &self.tensors()?, None)?;
        self.forward()?.wait(&self.stream)?;
        self.buffers[3].read_at(&self.stream, 0, &mut results.o)?;
        Ok(self.buffers[4].read_at(&self.stream, 0, &mut results.lse)?)
    }

    /// Microseconds of the host for a call that only launches.
    ///
    /// # Errors
    /// As [`Resident::run`].
    pub fn host_us(&self) -> Result<f64> {
        let tensors = self.tensors()?;
        let start = Instant::now();
        for _ in 0..QUEUED {
            self.plan.forward_on(&self.stream, &tensors, None)?;
        }
        let us = start.elapsed().as_secs_f64() * 1e6 / f64::from(QUEUED);
        self.forward()?.wait(&self.stream)?;
        Ok(us)
    }

    /// By the GPU's clock, launches back to back: [`timing::sustained`].
    ///
    /// # Errors
    /// As [`Resident::run`].
    pub fn time(&self) -> Result<timing::Timing> {
        let tensors = self.tensors()?;
        timing::sustained(&self.stream, |stream| anyhow::Ok(self.plan.forward_on(stream, &tensors, None)?))
    }
}
