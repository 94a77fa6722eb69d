//! The tensors of a problem, and the two implementations that passes over them are asked of: ours and standard
//! attention.

use crate::options::Pass;
use anyhow::{Context, Result};
use flashattn_cpu::plan::Plan;
use flashattn_spec::reference::standard::StandardAttention;
use flashattn_spec::tensor::contiguous_strides;
use flashattn_spec::{
    AttentionProblem, Element, GradInputs, Gradients, Inputs, Outputs, View, ViewError, ViewMut,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::StandardNormal;
use serde::{Deserialize, Serialize};

/// How `[batch, seqlen, heads, head_dim]` lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// In that order.
    #[default]
    Bnhd,
    /// Each head's rows one after the other: `[batch, heads, seqlen, head_dim]`.
    Bhnd,
}

impl Layout {
    /// The dimensions in the order of memory.
    pub fn in_memory(self, [b, n, h, d]: [usize; 4]) -> [usize; 4] {
        match self {
            Layout::Bnhd => [b, n, h, d],
            Layout::Bhnd => [b, h, n, d],
        }
    }

    /// Strides in elements.
    pub fn strides(self, shape: [usize; 4]) -> [usize; 4] {
        let [b, x, y, d] = contiguous_strides(self.in_memory(shape));
        match self {
            Layout::Bnhd => [b, x, y, d],
            Layout::Bhnd => [b, y, x, d],
        }
    }

    /// A view of this layout.
    ///
    /// # Errors
    /// If there are too few elements.
    pub fn view<T: Element>(self, data: &[T], shape: [usize; 4]) -> Result<View<'_, T>, ViewError> {
        View::with_strides(data, shape, self.strides(shape))
    }

    fn view_mut<T: Element>(self, data: &mut [T], shape: [usize; 4]) -> Result<ViewMut<'_, T>, ViewError> {
        ViewMut::with_strides(data, shape, self.strides(shape))
    }
}

/// Something that computes attention for the problem that it was made for.
pub trait Attention<T> {
    /// Fills o and lse.
    fn forward(&mut self, inputs: &Inputs<T>, outputs: &mut Outputs<T>) -> Result<()>;
    /// Fills the gradients.
    fn backward(&mut self, inputs: &Inputs<T>, given: &GradInputs<T>, out: &mut Gradients<T>) -> Result<()>;
}

impl<T: Element> Attention<T> for Plan {
    fn forward(&mut self, inputs: &Inputs<T>, outputs: &mut Outputs<T>) -> Result<()> {
        Ok(Plan::forward(self, inputs, outputs)?)
    }

    fn backward(&mut self, inputs: &Inputs<T>, given: &GradInputs<T>, out: &mut Gradients<T>) -> Result<()> {
        Ok(Plan::backward(self, inputs, given, out)?)
    }
}

/// A plan of a device.
pub enum AnyPlan<T> {
    /// The CPU's own, whose instruction set and threads can be chosen.
    Cpu(Box<Plan>),
    /// Another device's, through the facade.
    Other(Box<flashattn::Plan<T>>),
}

impl<T: Element> Attention<T> for AnyPlan<T> {
    fn forward(&mut self, inputs: &Inputs<T>, outputs: &mut Outputs<T>) -> Result<()> {
        match self {
            AnyPlan::Cpu(plan) => Attention::forward(plan.as_mut(), inputs, outputs),
            AnyPlan::Other(plan) => {
                Ok(plan.forward(&inputs.q, &inputs.k, &inputs.v, &mut outputs.o, outputs.lse)?)
            }
        }
    }

    fn backward(&mut self, inputs: &Inputs<T>, given: &GradInputs<T>, out: &mut Gradients<T>) -> Result<()> {
        match self {
            AnyPlan::Cpu(plan) => Attention::backward(plan.as_mut(), inputs, given, out),
            AnyPlan::Other(plan) => Ok(plan.backward(&inputs.q, &inputs.k, &inputs.v, given, out)?),
        }
    }
}

impl<T: Element> Attention<T> for StandardAttention<'_, T> {
    fn forward(&mut self, inputs: &Inputs<T>, outputs: &mut Outputs<T>) -> Result<()> {
        Ok(StandardAttention::forward(self, inputs, outputs)?)
    }

    fn backward(&mut self, inputs: &Inputs<T>, given: &GradInputs<T>, out: &mut Gradients<T>) -> Result<()> {
        Ok(StandardAttention::backward(self, inputs, given, out)?)
    }
}

/// What passes read.
#[derive(Clone, Debug, Default)]
pub struct Given<T> {
    /// Of q, k, v, do, and of the results.
    pub layout: Layout,
    /// Queries.
    pub q: Vec<T>,
    /// Keys.
    pub k: Vec<T>,
    /// Values.
    pub v: Vec<T>,
    /// Gradient of the output; may be empty if there is no backward pass.
    pub d_o: Vec<T>,
    /// Gradient of lse.
    pub d_lse: Option<Vec<f32>>,
    /// Sink logits.
    pub sinks: Option<Vec<f32>>,
}

/// What passes write.
#[derive(Clone, Debug, Default)]
pub struct Results<T> {
    /// Output.
    pub o: Vec<T>,
    /// Log-sum-exp, `[batch, heads_q, seqlen_q]`.
    pub lse: Vec<f32>,
    /// Gradients of q, k, v; empty before there was a backward pass.
    pub dq: Vec<T>,
    /// See dq.
    pub dk: Vec<T>,
    /// See dq.
    pub dv: Vec<T>,
    /// Gradient of the sinks, if there are any.
    pub d_sinks: Option<Vec<f32>>,
}

fn elements(shape: [usize; 4]) -> usize {
    shape.into_iter().product()
}

impl<T: Element> Given<T> {
    /// Normally distributed tensors.
    pub fn random(p: &AttentionProblem, layout: Layout, seed: u64) -> Self {
        let [q, k, v, d_o] = [p.q_shape(), p.k_shape(), p.v_shape(), p.o_shape()];
        let normal = |shape, stream| normal(elements(shape), seed.wrapping_add(stream));
        Given {
            layout,
            q: normal(q, 0),
            k: normal(k, 1),
            v: normal(v, 2),
            d_o: normal(d_o, 3),
            ..Self::default()
        }
    }

    /// Checked views.
    ///
    /// # Errors
    /// If there are fewer elements than the problem says.
    pub fn inputs(&self, p: &AttentionProblem) -> Result<Inputs<'_, T>> {
        let view = |name, data, shape| self.layout.view(data, shape).context(name);
        Ok(Inputs {
            q: view("q", &self.q, p.q_shape())?,
            k: view("k", &self.k, p.k_shape())?,
            v: view("v", &self.v, p.v_shape())?,
            sinks: self.sinks.as_deref(),
        })
    }

    /// View of do.
    ///
    /// # Errors
    /// If there are fewer elements than the problem says.
    pub fn d_o(&self, p: &AttentionProblem) -> Result<View<'_, T>> {
        self.layout.view(&self.d_o, p.o_shape()).context("do")
    }
}

/// Normally distributed numbers that depend on the seed only.
pub fn normal<T: Element>(n: usize, seed: u64) -> Vec<T> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..n).map(|_| T::from_f32(rng.sample::<f32, _>(StandardNormal))).collect()
}

impl<T: Element> Results<T> {
    /// Makes room, so that a pass allocates nothing but its workspace.
    pub fn new(p: &AttentionProblem, backward: bool) -> Self {
        let zeros = |shape| vec![T::default(); elements(shape)];
        let gradient = |shape| if backward { zeros(shape) } else { Vec::new() };
        Results {
            o: zeros(p.o_shape()),
            lse: vec![0.0; p.lse_len()],
            dq: gradient(p.q_shape()),
            dk: gradient(p.k_shape()),
            dv: gradient(p.v_shape()),
            d_sinks: (backward && p.sinks).then(|| vec![0.0; p.heads_q]),
        }
    }

    /// Fills o and lse.
    ///
    /// # Errors
    /// If tensors do not fit the problem.
    pub fn forward(
        &mut self,
        p: &AttentionProblem,
        given: &Given<T>,
        by: &mut impl Attention<T>,
    ) -> Result<()> {
        let o = given.layout.view_mut(&mut self.o, p.o_shape())?;
        by.forward(&given.inputs(p)?, &mut Outputs { o, lse: &mut self.lse })
    }

    /// Fills the gradients, from o and lse.
    ///
    /// # Errors
    /// If tensors do not fit the problem.
    pub fn backward(
        &mut self,
        p: &AttentionProblem,
        given: &Given<T>,
        by: &mut impl Attention<T>,
    ) -> Result<()> {
        let layout = given.layout;
        let from = GradInputs {
            o: layout.view(&self.o, p.o_shape())?,
            lse: &self.lse,
            d_o: given.d_o(p)?,
            d_lse: given.d_lse.as_deref(),
        };
        let mut to = Gradients {
            dq: layout.view_mut(&mut self.dq, p.q_shape())?,
            dk: layout.view_mut(&mut self.dk, p.k_shape())?,
            dv: layout.view_mut(&mut self.dv, p.v_shape())?,
            d_sinks: self.d_sinks.as_deref_mut(),
            d_tables: Vec::new(),
        };
        by.backward(&given.inputs(p)?, &from, &mut to)
    }

    /// The passes that are asked for.
    ///
    /// # Errors
    /// If tensors do not fit the problem.
    pub fn run(
        &mut self,
        p: &AttentionProblem,
        given: &Given<T>,
        pass: Pass,
        by: &mut impl Attention<T>,
    ) -> Result<()> {
        if pass.has_forward() {
            self.forward(p, given, by)?;
        }
        if pass.has_backward() {
            self.backward(p, given, by)?;
        }
        Ok(())
    }
}
