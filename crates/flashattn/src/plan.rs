//! [`Plan`]: attention of one shape made ready for one device, to run many times.

#[cfg(feature = "cuda")]
pub(crate) mod gpu;

use crate::Device;
use crate::error::{Error, shape_error};
use crate::output::{Gradients, Output};
use crate::tensor::{AsView, AsViewMut, Tensor, zeros};
use flashattn_cpu::plan as cpu;
use flashattn_spec::expr::Table;
use flashattn_spec::{AttentionProblem, Element, GradInputs, Inputs, Outputs, ProblemError};
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

/// Sizes of the tensors of a call. For packed sequences batch is 1, and the lengths are those of all
/// together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Sequences.
    pub batch: usize,
    /// Query heads; a multiple of `heads_kv`.
    pub heads_q: usize,
    /// Key/value heads: equal to `heads_q` (MHA), fewer (GQA) or 1 (MQA).
    pub heads_kv: usize,
    /// Queries of a sequence.
    pub seqlen_q: usize,
    /// Keys of a sequence.
    pub seqlen_k: usize,
    /// Elements of a query or key.
    pub head_dim: usize,
    /// Elements of a value or an output.
    pub head_dim_v: usize,
}

impl Shape {
    /// The sizes from the shapes of q `[batch, seqlen_q, heads_q, head_dim]`, k `[batch, seqlen_k, heads_kv,
    /// head_dim]` and v `[batch, seqlen_k, heads_kv, head_dim_v]`.
    ///
    /// # Errors
    /// [`flashattn_spec::ProblemError::Shape`] if they do not agree.
    pub fn of(q: [usize; 4], k: [usize; 4], v: [usize; 4]) -> Result<Self, Error> {
        let [batch, seqlen_q, heads_q, head_dim] = q;
        let [_, seqlen_k, heads_kv, _] = k;
        let head_dim_v = v[3];
        for (name, got, expected) in [
            ("k", k, [batch, seqlen_k, heads_kv, head_dim]),
            ("v", v, [batch, seqlen_k, heads_kv, head_dim_v]),
        ] {
            if got != expected {
                return Err(shape_error(name, &got, &expected));
            }
        }
        Ok(Shape { batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v })
    }
}

/// The gradients that [`Plan::backward`] fills: views over the caller's memory.
pub type GradientsMut<'a, T> = flashattn_spec::Gradients<'a, T>;

/// Attention of one shape and element type made ready for one device; from [`crate::Attention::plan`].
///
/// ```
/// # use flashattn::{Attention, Shape, View, ViewMut};
/// let shape = [1, 5, 2, 8];
/// let plan = Attention::new().causal().plan::<f32>(Shape::of(shape, shape, shape)?)?;
/// let x: Vec<f32> = (0..80).map(|i| (i as f32).sin()).collect();
/// let x = View::new(&x, shape)?;
/// // Outputs have any strides: here the memory is [batch, heads, seqlen, head_dim].
/// let (mut o, mut lse) = (vec![0.0; 80], vec![0.0; 10]);
/// plan.forward(&x, &x, &x, &mut ViewMut::with_strides(&mut o, shape, [80, 8, 40, 1])?, &mut lse)?;
/// // The first query sees only the first key.
/// assert_eq!(o[..8], x.row(0, 0, 0)[..]);
/// assert_eq!(o[40..48], x.row(0, 0, 1)[..]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Plan<T> {
    problem: AttentionProblem,
    sinks: Option<Arc<[f32]>>,
    grad_tables: Vec<Table>,
    device: Device,
    executor: Executor,
    dtype: PhantomData<fn(T) -> T>,
}

/// One variant a [`Device`].
enum Executor {
    Cpu(Box<cpu::Plan>),
    #[cfg(feature = "cuda")]
    Cuda(Box<gpu::Executor>),
}

impl<T> fmt::Debug for Plan<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plan").field("problem", &self.problem).field("device", &self.device).finish()
    }
}

impl<T: Element> Plan<T> {
    /// A plan for a problem that is made already, of element type `T`; what [`crate::Attention::plan`] does with the one that
    /// it makes. `sinks` are given exactly when the problem has them.
    ///
    /// # Errors
    /// If the problem or the sinks are wrong; [`Error::Unsupported`] if the device cannot do it.
    pub fn from_problem(
        problem: AttentionProblem,
        sinks: Option<Arc<[f32]>>,
        device: Device,
    ) -> Result<Self, Error> {
        problem.validate()?;
        if problem.dtype != T::DTYPE {
            return Err(
                ProblemError::DType { name: "the plan", got: T::DTYPE, expected: problem.dtype }.into()
            );
        }
        let word = |given| if given { "given" } else { "absent" };
        match &sinks {
            Some(sinks) if problem.sinks && sinks.len() != problem.heads_q => {
                Err(shape_error("sinks", &[sinks.len()], &[problem.heads_q]))
            }
            sinks if sinks.is_some() != problem.sinks => {
                let (got, expected) = (word(sinks.is_some()), word(problem.sinks));
                Err(ProblemError::Presence { name: "sinks", got, expected }.into())
            }
            _ => Plan::new(problem, sinks, device, None),
        }
    }

    /// Sets whether gradients have the same bits in every run: see [`crate::Attention::deterministic`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device cannot do it: a GPU not where 2³⁹ pairs of query and key may add to one element of a table.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "only GPUs have the choice"))]
    pub fn deterministic(mut self, deterministic: bool) -> Result<Self, Error> {
        match &mut self.executor {
            // Always.
            Executor::Cpu(_) => {}
            #[cfg(feature = "cuda")]
            Executor::Cuda(gpu) => gpu.set_deterministic(deterministic)?,
        }
        Ok(self)
    }

    pub(crate) fn new(
        problem: AttentionProblem,
        sinks: Option<Arc<[f32]>>,
        device: Device,
        threads: Option<usize>,
    ) -> Result<Self, Error> {
        let executor = match device {
            Device::Cpu => Executor::Cpu(Box::new(cpu::Plan::new(
                &problem,
                cpu::Options { threads, ..Default::default() },
            )?)),
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => {
                Executor::Cuda(Box::new(gpu::Executor::new(ordinal, &problem, sinks.as_deref())?))
            }
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => {
                let feature = "a build without the cargo feature cuda".to_owned();
                return Err(Error::Unsupported { feature, executor: device });
            }
        };
        let grad_tables = problem.grad_tables();
        Ok(Plan { problem, sinks, grad_tables, device, executor, dtype: PhantomData })
    }

    /// What is computed: shapes, mask, score mod and all.
    pub fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    /// Where it runs.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Bytes of working memory that [`Plan::forward`] takes beside the tensors, at most: linear in the sequence length.
    /// The first call allocates it, and the plan keeps it for the next. (Lists of tasks and of blocks to skip, small
    /// beside it, are not counted.) On a GPU: device memory, for row-major tensors; others may have to be copied first
    /// (`flashattn::cuda::Forward::workspace_bytes`).
    ///
    /// ```
    /// # use flashattn::{Attention, Shape, bf16};
    /// let bytes = |seqlen| -> Result<usize, flashattn::Error> {
    ///     let shape = [1, seqlen, 4, 64];
    ///     let plan = Attention::new().causal().plan::<bf16>(Shape::of(shape, shape, shape)?)?;
    ///     Ok(plan.backward_workspace_bytes())
    /// };
    /// assert!(bytes(16384)? <= 2 * bytes(8192)?);
    /// // A plan needs no tensors, and takes no memory for them.
    /// assert!(bytes(1 << 29)? > 1 << 32);
    /// # Ok::<(), flashattn::Error>(())
    /// ```
    pub fn forward_workspace_bytes(&self) -> usize {
        match &self.executor {
            Executor::Cpu(plan) => plan.forward_workspace_bytes(),
            #[cfg(feature = "cuda")]
            Executor::Cuda(gpu) => gpu.workspace_bytes,
        }
    }

    /// As [`Plan::forward_workspace_bytes`], of [`Plan::backward`]. (On a GPU it is planned anew to answer.)
    pub fn backward_workspace_bytes(&self) -> usize {
        match &self.executor {
            Executor::Cpu(plan) => plan.backward_workspace_bytes(),
            #[cfg(feature = "cuda")]
            Executor::Cuda(gpu) => gpu.backward_workspace_bytes(),
        }
    }

    /// The tables that get a gradient, in the order of [`GradientsMut::d_tables`].
    pub fn grad_tables(&self) -> &[Table] {
        &self.grad_tables
    }

    /// Fills o, `[batch, seqlen_q, heads_q, head_dim_v]`, and lse, `[batch, heads_q, seqlen_q]` (`[heads_q,
    /// total_q]` when packed), natural logarithm.
    ///
    /// On a GPU each call copies the tensors there and the results back, and waits; tensors that are there already are
    /// given to `Plan::forward_on`.
    ///
    /// # Errors
    /// If a tensor does not fit the plan; nothing is written then. On a GPU also what goes wrong there.
    pub fn forward(
        &self,
        q: &impl AsView<T>,
        k: &impl AsView<T>,
        v: &impl AsView<T>,
        o: &mut impl AsViewMut<T>,
        lse: &mut [f32],
    ) -> Result<(), Error> {
        let inputs = self.inputs(q, k, v)?;
        let mut outputs = Outputs { o: o.to_view_mut("o")?, lse };
        match &self.executor {
            Executor::Cpu(plan) => Ok(plan.forward(&inputs, &mut outputs)?),
            #[cfg(feature = "cuda")]
            Executor::Cuda(gpu) => gpu.on_host(&inputs, &mut outputs),
        }
    }

    /// Fills the gradients from the forward's o and lse and from the loss's gradients with respect to them.
    /// [`GradientsMut::d_sinks`] is given exactly when there are sinks, and [`GradientsMut::d_tables`] has a
    /// slice for each of [`Plan::grad_tables`].
    ///
    /// On a GPU the first call compiles the kernels, and each copies as [`Plan::forward`] does; tensors that are there already
    /// are given to `Plan::backward_on`.
    ///
    /// # Errors
    /// If a tensor does not fit the plan; nothing is written then. On a GPU also what goes wrong there.
    pub fn backward(
        &self,
        q: &impl AsView<T>,
        k: &impl AsView<T>,
        v: &impl AsView<T>,
        given: &GradInputs<'_, T>,
        gradients: &mut GradientsMut<'_, T>,
    ) -> Result<(), Error> {
        let inputs = self.inputs(q, k, v)?;
        match &self.executor {
            Executor::Cpu(plan) => Ok(plan.backward(&inputs, given, gradients)?),
            #[cfg(feature = "cuda")]
            Executor::Cuda(gpu) => gpu.backward_on_host(&inputs, given, gradients),
        }
    }

    /// As [`Plan::forward`], into new memory.
    ///
    /// # Errors
    /// As [`Plan::forward`]; [`Error::OutOfMemory`].
    pub fn forward_alloc(
        &self,
        q: &impl AsView<T>,
        k: &impl AsView<T>,
        v: &impl AsView<T>,
    ) -> Result<Output<T>, Error> {
        let mut o = Tensor::zeros("o", self.problem.o_shape())?;
        let mut lse = zeros("lse", &[self.problem.lse_len()])?;
        self.forward(q, k, v, &mut o, &mut lse)?;
        Ok(Output { o, lse })
    }

    /// As [`Plan::backward`], into new memory. `d_o` has o's shape, `d_lse` lse's layout.
    ///
    /// # Errors
    /// As [`Plan::backward`]; [`Error::OutOfMemory`].
    pub fn backward_alloc(
        &self,
        q: &impl AsView<T>,
        k: &impl AsView<T>,
        v: &impl AsView<T>,
        output: &Output<T>,
        d_o: &impl AsView<T>,
        d_lse: Option<&[f32]>,
    ) -> Result<Gradients<T>, Error> {
        let problem = &self.problem;
        let given =
            GradInputs { o: output.o.to_view("o")?, lse: &output.lse, d_o: d_o.to_view("do")?, d_lse };
        // Before memory is taken for results, so that wrong inputs cost nothing.
        given.check(problem)?;
        let tables = self.grad_tables.iter();
        let mut all = Gradients {
            dq: Tensor::zeros("dq", problem.q_shape())?,
            dk: Tensor::zeros("dk", problem.k_shape())?,
            dv: Tensor::zeros("dv", problem.v_shape())?,
            d_sinks: problem.sinks.then(|| vec![0.0; problem.heads_q]),
            d_tables: tables
                .map(|table| Ok((table.clone(), zeros("d_tables", table.shape())?)))
                .collect::<Result<_, Error>>()?,
        };
        self.backward(
            q,
            k,
            v,
            &given,
            &mut GradientsMut {
                dq: all.dq.to_view_mut("dq")?,
                dk: all.dk.to_view_mut("dk")?,
                dv: all.dv.to_view_mut("dv")?,
                d_sinks: all.d_sinks.as_deref_mut(),
                d_tables: all.d_tables.iter_mut().map(|(_, gradient)| gradient.as_mut_slice()).collect(),
            },
        )?;
        Ok(all)
    }

    fn inputs<'a>(
        &'a self,
        q: &'a impl AsView<T>,
        k: &'a impl AsView<T>,
        v: &'a impl AsView<T>,
    ) -> Result<Inputs<'a, T>, Error> {
        let (q, k, v) = (q.to_view("q")?, k.to_view("k")?, v.to_view("v")?);
        Ok(Inputs { q, k, v, sinks: self.sinks.as_deref() })
    }
}
