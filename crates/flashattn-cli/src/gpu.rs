//! A problem's tensors in a GPU's memory, and the passes over them.

use crate::attention::{Given, Layout, Results};
use crate::options::Pass;
use anyhow::{Context, Result, ensure};
use flashattn::cuda::{Buffer, DeviceSlice, DeviceView, Module, Stream, timing};
use flashattn::{Device, DeviceGradients, DeviceTensors, Plan};
use flashattn_spec::{AttentionProblem, Element};
use std::time::Instant;

/// Calls whose host time is measured: fewer launches than the driver's queue takes without waiting.
const QUEUED: u32 = 100;

/// A plan with its tensors where it runs.
pub struct Resident<T> {
    plan: Plan<T>,
    layout: Layout,
    stream: Stream,
    /// q, k, v, o and lse.
    buffers: [Buffer; 5],
    /// do, dq, dk, dv and dsinks, if gradients are wanted.
    gradients: Option<[Buffer; 5]>,
}

/// What runs of a pass are made of.
pub struct Made {
    /// Its main kernel's name and registers, and the most local memory that one of its kernels has.
    pub kernel: String,
    pub registers: u32,
    pub local_bytes: u32,
    /// Tensors that each call copies because of how they lie.
    pub staged: Vec<String>,
    pub workspace_bytes: u64,
}

impl<T: Element> Resident<T> {
    /// Plans, and uploads q, k and v, and do if there is one. Results hold NaN until they are computed.
    ///
    /// # Errors
    /// What the GPU refuses.
    pub fn new(ordinal: u32, p: &AttentionProblem, given: &Given<T>, deterministic: bool) -> Result<Self> {
        let sinks = given.sinks.as_deref().map(Into::into);
        let plan = Plan::<T>::from_problem(p.clone(), sinks, Device::Cuda(ordinal))?;
        let plan = plan.deterministic(deterministic)?;
        let device = plan.gpu()?.device();
        let stream = device.stream()?;
        let upload = |data: &[T]| device.upload(&stream, data);
        let result = |bytes: usize| -> Result<Buffer> {
            let buffer = device.alloc(bytes)?;
            // All bits set are a NaN in every type.
            buffer.fill(&stream, 0xff)?;
            Ok(buffer)
        };
        let tensor = |shape: [usize; 4]| result(shape.into_iter().product::<usize>() * size_of::<T>());
        let (o, lse) = (tensor(p.o_shape())?, result(p.lse_len() * size_of::<f32>())?);
        let buffers = [upload(&given.q)?, upload(&given.k)?, upload(&given.v)?, o, lse];
        let gradients = match given.d_o.as_slice() {
            [] => None,
            d_o => Some([
                upload(d_o)?,
                tensor(p.q_shape())?,
                tensor(p.k_shape())?,
                tensor(p.v_shape())?,
                result(p.heads_q * size_of::<f32>())?,
            ]),
        };
        Ok(Resident { plan, layout: given.layout, stream, buffers, gradients })
    }

    fn view<'a>(&self, buffer: &'a Buffer, shape: [usize; 4]) -> Result<DeviceView<'a>> {
        let dtype = self.plan.problem().dtype;
        Ok(DeviceView::with_strides(buffer, 0, dtype, shape, self.layout.strides(shape))?)
    }

    fn tensors(&self) -> Result<DeviceTensors<'_>> {
        let (p, [q, k, v, o, lse]) = (self.plan.problem(), &self.buffers);
        Ok(DeviceTensors {
            q: self.view(q, p.q_shape())?,
            k: self.view(k, p.k_shape())?,
            v: self.view(v, p.v_shape())?,
            o: self.view(o, p.o_shape())?,
            lse: DeviceSlice::new(lse, 0, p.lse_len())?,
        })
    }

    fn gradients(&self) -> Result<DeviceGradients<'_>> {
        let p = self.plan.problem();
        ensure!(p.grad_tables().is_empty(), "gradients of tables have no memory here");
        let [d_o, dq, dk, dv, d_sinks] = self.gradients.as_ref().context("no gradient of o was given")?;
        Ok(DeviceGradients {
            d_o: self.view(d_o, p.o_shape())?,
            d_lse: None,
            dq: self.view(dq, p.q_shape())?,
            dk: self.view(dk, p.k_shape())?,
            dv: self.view(dv, p.v_shape())?,
            d_sinks: p.sinks.then(|| DeviceSlice::new(d_sinks, 0, p.heads_q)).transpose()?,
            d_tables: &[],
            accumulate: false,
        })
    }

    /// Puts a pass into the stream.
    fn launch(&self, pass: Pass) -> Result<impl Fn(&Stream) -> Result<()>> {
        let tensors = self.tensors()?;
        let gradients = pass.has_backward().then(|| self.gradients()).transpose()?;
        Ok(move |stream: &Stream| {
            if pass.has_forward() {
                self.plan.forward_on(stream, &tensors, None)?;
            }
            if let Some(gradients) = &gradients {
                self.plan.backward_on(stream, &tensors, gradients, None)?;
            }
            Ok(())
        })
    }

    fn wait(&self, pass: Pass) -> Result<()> {
        match pass.has_backward() {
            true => self.plan.gpu_backward()?.wait(&self.stream)?,
            false => self.plan.gpu()?.wait(&self.stream)?,
        }
        Ok(())
    }

    /// Runs a pass and fetches what it has computed; backward alone from what o and lse hold on the GPU.
    ///
    /// # Errors
    /// What goes wrong on the GPU.
    pub fn run(&self, pass: Pass, results: &mut Results<T>) -> Result<()> {
        self.launch(pass)?(&self.stream)?;
        self.wait(pass)?;
        if pass.has_forward() {
            self.buffers[3].read_at(&self.stream, 0, &mut results.o)?;
            self.buffers[4].read_at(&self.stream, 0, &mut results.lse)?;
        }
        if let (true, Some([_, dq, dk, dv, d_sinks])) = (pass.has_backward(), &self.gradients) {
            dq.read_at(&self.stream, 0, &mut results.dq)?;
            dk.read_at(&self.stream, 0, &mut results.dk)?;
            dv.read_at(&self.stream, 0, &mut results.dv)?;
            if let Some(to) = results.d_sinks.as_deref_mut() {
                d_sinks.read_at(&self.stream, 0, to)?;
            }
        }
        Ok(())
    }

    /// Microseconds of the host for a call that only launches.
    ///
    /// # Errors
    /// As [`Resident::run`].
    pub fn host_us(&self, pass: Pass) -> Result<f64> {
        let launch = self.launch(pass)?;
        let start = Instant::now();
        for _ in 0..QUEUED {
            launch(&self.stream)?;
        }
        let us = start.elapsed().as_secs_f64() * 1e6 / f64::from(QUEUED);
        self.wait(pass)?;
        Ok(us)
    }

    /// By the GPU's clock, launches back to back: [`timing::sustained`].
    ///
    /// # Errors
    /// As [`Resident::run`].
    pub fn time(&self, pass: Pass) -> Result<timing::Timing> {
        timing::sustained(&self.stream, self.launch(pass)?)
    }

    /// What a pass is made of; of both, the backward's kernels, and the workspaces of both.
    ///
    /// # Errors
    /// If there is nothing to launch.
    pub fn made(&self, pass: Pass) -> Result<Made> {
        let tensors = self.tensors()?;
        let (mut staged, mut workspace_bytes) = (Vec::new(), 0);
        let lower = |tensor: &dyn std::fmt::Debug| format!("{tensor:?}").to_lowercase();
        let mut kernels: Vec<&Module> = Vec::new();
        if pass.has_forward() {
            let (forward, layout) = (self.plan.gpu()?, tensors.layout());
            staged.extend(forward.staged(&layout)?.iter().map(|tensor| lower(tensor)));
            workspace_bytes += forward.workspace_bytes(&layout)?;
            kernels = forward.module().into_iter().collect();
        }
        if pass.has_backward() {
            let backward = self.plan.gpu_backward()?;
            let layout = self.plan.backward_args(&tensors, &self.gradients()?)?.layout();
            staged.extend(backward.staged(&layout)?.iter().map(|tensor| lower(tensor)));
            workspace_bytes += backward.workspace_bytes(&layout)?;
            kernels = backward.modules().collect();
        }
        let main = kernels.get(kernels.len() / 2).context("there is nothing to launch")?;
        let local_bytes = kernels.iter().map(|kernel| kernel.attributes().local_bytes).max();
        Ok(Made {
            kernel: main.name().to_owned(),
            registers: main.attributes().registers,
            local_bytes: local_bytes.unwrap_or_default(),
            staged,
            workspace_bytes,
        })
    }
}
