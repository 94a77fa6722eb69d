//! [`Attention`]: the options, and the calls that plan, allocate and run in one go.

use crate::error::{Error, shape_error};
use crate::output::{Gradients, Output};
use crate::plan::{Plan, Shape};
use crate::tensor::{AsView, Tensor};
use crate::{Device, Mask, ScoreMod};
use flashattn_spec::expr::{Index, Table, Term};
use flashattn_spec::{AttentionProblem, Dropout, Element, ProblemError, Varlen};
use std::sync::Arc;

/// Attention with its options: a builder, and the calls that use it.
///
/// Options compose. Masks are and-ed: a key is visible if all of them show it. Score mods apply in the order
/// in which they are given, to `scale · q·k`, before the mask. Nothing is checked while building; the first
/// thing that is wrong is the error of [`Attention::plan`] and of the calls.
///
/// ```
/// use flashattn::Attention;
/// let attention = Attention::new().causal().window(256, 0).softcap(30.0).scale(0.125).dropout(0.1, 42);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Attention {
    masks: Vec<Mask>,
    score_mods: Vec<ScoreMod>,
    scale: Option<f32>,
    dropout: Option<Dropout>,
    sinks: Option<Arc<[f32]>>,
    varlen: Option<Varlen>,
    device: Device,
    threads: Option<usize>,
    deterministic: bool,
    /// The first error of an option that could not be made.
    error: Option<Error>,
}

impl Attention {
    /// `softmax(q kᵀ / √head_dim) v`, every query seeing every key, on the CPU.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds [`Mask::Causal`]: queries see the keys up to their own position. With more keys than queries, the
    /// last query is level with the last key, as when the first keys come from a cache.
    pub fn causal(self) -> Self {
        self.mask(Mask::Causal)
    }

    /// Adds a sliding window: keys from `left` before a query's position to `right` after it, both inclusive.
    /// For a window open on one side, add [`Mask::Local`] by [`Attention::mask`].
    pub fn window(self, left: usize, right: usize) -> Self {
        self.mask(Mask::window(left, right))
    }

    /// Adds a mask, such as [`Mask::document`], [`Mask::prefix_lm`], [`Mask::chunked`] or a block mask.
    pub fn mask(mut self, mask: Mask) -> Self {
        self.masks.push(mask);
        self
    }

    /// Adds a mask written as a closure that gives a Bool. It runs once, here, to record the expression.
    ///
    /// ```
    /// # use flashattn::Attention;
    /// // Every 64th key, and the last 128.
    /// let sparse = Attention::new().mask_fn(|ix| (ix.kv % 64).eq(0) | ix.kv.ge(ix.diagonal() - 128));
    /// ```
    pub fn mask_fn(mut self, condition: impl for<'t> FnOnce(Index<'t>) -> Term<'t>) -> Self {
        match Mask::custom(condition) {
            Ok(mask) => self.mask(mask),
            Err(error) => {
                self.error.get_or_insert(error.into());
                self
            }
        }
    }

    /// Adds a soft cap of the scores: `cap · tanh(s / cap)`.
    pub fn softcap(self, cap: f32) -> Self {
        self.score_mod(ScoreMod::SoftCap(cap))
    }

    /// Adds ALiBi: `s − slope · distance`, with one slope for each query head. (For slopes that differ among
    /// the batch or are learned, add [`ScoreMod::Alibi`] by [`Attention::score_mod`].)
    pub fn alibi(mut self, slopes: &[f32]) -> Self {
        match ScoreMod::alibi(slopes) {
            Ok(score_mod) => self.score_mod(score_mod),
            Err(error) => {
                self.error.get_or_insert(error.into());
                self
            }
        }
    }

    /// Adds a bias to the scores: f32 `[batch, heads_q, seqlen_q, seqlen_k]`, where each dimension may be 1.
    /// It has a gradient if it was made [`Table::with_grad`].
    pub fn bias(self, bias: Table) -> Self {
        self.score_mod(ScoreMod::Bias(bias))
    }

    /// Adds a score mod, applied after those before it.
    pub fn score_mod(mut self, score_mod: ScoreMod) -> Self {
        self.score_mods.push(score_mod);
        self
    }

    /// Adds a score mod written as a closure from the score and its place to the new score, applied after
    /// those before it. It runs once, here, to record the expression, which the backward pass differentiates.
    ///
    /// ```
    /// # use flashattn::{Attention, Table};
    /// let slope = Table::per_head(vec![0.5, 0.25])?;
    /// let alibi = Attention::new().score_fn(|s, ix| s - (ix.q - ix.kv).abs() * slope[ix.head]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn score_fn(mut self, function: impl for<'t> FnOnce(Term<'t>, Index<'t>) -> Term<'t>) -> Self {
        match ScoreMod::custom(function) {
            Ok(score_mod) => self.score_mod(score_mod),
            Err(error) => {
                self.error.get_or_insert(error.into());
                self
            }
        }
    }

    /// Sets the factor of `q·k`, which is otherwise `1 / √head_dim`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Drops attention probabilities with probability `p` (0 ≤ p < 1) and divides the others by `1 − p`.
    /// Which ones is a pure function of the seed and the place: the backward pass drops the same, and so does
    /// every device.
    pub fn dropout(mut self, p: f32, seed: u64) -> Self {
        self.dropout = Some(Dropout { p, seed });
        self
    }

    /// Adds a learned sink logit for each query head (`[heads_q]`, in units of scores) to the softmax's
    /// denominator.
    pub fn sinks(mut self, logits: &[f32]) -> Self {
        self.sinks = Some(logits.into());
        self
    }

    /// Packed sequences of different lengths: q is `[1, total_q, heads_q, head_dim]`, and sequence b are its
    /// rows `cu_seqlens_q[b] .. cu_seqlens_q[b + 1]`; likewise k and v. The offsets start at 0, never
    /// decrease, and end at the number of rows.
    pub fn varlen(mut self, cu_seqlens_q: &[i32], cu_seqlens_k: &[i32]) -> Self {
        self.varlen = Some(Varlen { cu_seqlens_q: cu_seqlens_q.into(), cu_seqlens_k: cu_seqlens_k.into() });
        self
    }

    /// Sets where to run.
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Sets how many threads of the current rayon pool to use; all of them otherwise. Results do not depend
    /// on it.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Sets whether gradients have the same bits in every run. On the CPU all results have anyway, and so have, on a GPU, all but
    /// the gradients of q and of tables. That of q has a kernel of its own above head_dim 128 in any case; below, blocks of keys then
    /// take turns to add to it where there are many, or it has such a kernel, too, which takes less memory: 8 to 20 % more time, as
    /// measured on an H100 from 2k tokens on, without windows and programs. Those of tables are summed without rounding, which takes 104 bytes for each
    /// element to which several pairs of query and key may add.
    pub fn deterministic(mut self, deterministic: bool) -> Self {
        self.deterministic = deterministic;
        self
    }

    /// The problem that these options make of tensors of the given shape and type, checked: what other
    /// executors, the oracle and the IO model take.
    ///
    /// # Errors
    /// The first option that is wrong or does not fit the shape.
    pub fn problem<T: Element>(&self, shape: Shape) -> Result<AttentionProblem, Error> {
        if let Some(error) = &self.error {
            return Err(error.clone());
        }
        let mask = match self.masks.as_slice() {
            [] => Mask::Full,
            [mask] => mask.clone(),
            masks => Mask::And(masks.to_vec()),
        };
        let score_mod = match self.score_mods.as_slice() {
            [] => ScoreMod::None,
            [score_mod] => score_mod.clone(),
            score_mods => ScoreMod::Chain(score_mods.to_vec()),
        };
        let Shape { batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v } = shape;
        let mut problem = AttentionProblem {
            batch,
            heads_q,
            heads_kv,
            seqlen_q,
            seqlen_k,
            head_dim,
            head_dim_v,
            dtype: T::DTYPE,
            mask,
            score_mod,
            softmax_scale: self.scale,
            dropout: self.dropout,
            sinks: self.sinks.is_some(),
            varlen: None,
        };
        if let Some(Varlen { cu_seqlens_q, cu_seqlens_k }) = &self.varlen {
            problem = problem.with_varlen(cu_seqlens_q, cu_seqlens_k);
        }
        problem.validate()?;
        if let Some(Varlen { cu_seqlens_q, cu_seqlens_k }) = &self.varlen {
            if batch != 1 {
                let (got, expected) = ([batch, seqlen_q], [1, batch.saturating_mul(seqlen_q)]);
                return Err(shape_error("[batch, total_q] of packed sequences", &got, &expected));
            }
            ends("cu_seqlens_q", cu_seqlens_q, "q", seqlen_q)?;
            ends("cu_seqlens_k", cu_seqlens_k, "k", seqlen_k)?;
        }
        if let Some(sinks) = &self.sinks
            && sinks.len() != heads_q
        {
            return Err(shape_error("sinks", &[sinks.len()], &[heads_q]));
        }
        Ok(problem)
    }

    /// Plans for tensors of the given shape and type: checks everything that does not need the tensors,
    /// and compiles the mask and score mods. The plan can run many times; its first call finds the blocks to skip.
    ///
    /// # Errors
    /// As [`Attention::problem`]; [`Error::Unsupported`] if the device cannot do it.
    pub fn plan<T: Element>(&self, shape: Shape) -> Result<Plan<T>, Error> {
        let problem = self.problem::<T>(shape)?;
        if self.threads == Some(0) {
            return Err(ProblemError::Zero { name: "threads" }.into());
        }
        Plan::new(problem, self.sinks.clone(), self.device, self.threads)?.deterministic(self.deterministic)
    }

    /// Attention of q, k and v: `[batch, seqlen_q, heads_q, head_dim_v]`, dense.
    ///
    /// Query heads may share KV heads: `heads_q` is a multiple of `heads_kv`.
    ///
    /// # Errors
    /// As [`Attention::plan`]; [`Error::OutOfMemory`] for the result.
    pub fn forward<T: Element>(
        &self,
        q: &impl AsView<T>,
        k: &impl AsView<T>,
        v: &impl AsView<T>,
    ) -> Result<Tensor<T>, Error> {
        Ok(self.forward_with_lse(q, k, v)?.o)
    }

    /// As [`Attention::forward`], with the log-sum-exp of each row beside it: what [`Attention::backward`]
    /// and [`Output::merge`] need.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub fn forward_with_lse<T: Element>(
        &self,
        q: &impl AsView<T>,
        k: &impl AsView<T>,
        v: &impl AsView<T>,
    ) -> Result<Output<T>, Error> {
        self.plan_for(q, k, v)?.forward_alloc(q, k, v)
    }

    /// Gradients of a loss, from its gradient `d_o` with respect to o (of o's shape), and `d_lse` with
    /// respect to the lse (laid out like it) if the loss uses it. `output` is what
    /// [`Attention::forward_with_lse`] gave for the same q, k, v and options.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub fn backward<T: Element>(
        &self,
        q: &impl AsView<T>,
        k: &impl AsView<T>,
        v: &impl AsView<T>,
        output: &Output<T>,
        d_o: &impl AsView<T>,
        d_lse: Option<&[f32]>,
    ) -> Result<Gradients<T>, Error> {
        self.plan_for(q, k, v)?.backward_alloc(q, k, v, output, d_o, d_lse)
    }

    fn plan_for<T: Element>(
        &self,
        q: &impl AsView<T>,
        k: &impl AsView<T>,
        v: &impl AsView<T>,
    ) -> Result<Plan<T>, Error> {
        let (q, k, v) = (q.to_view("q")?, k.to_view("k")?, v.to_view("v")?);
        self.plan(Shape::of(q.shape(), k.shape(), v.shape())?)
    }
}

/// The last offset is the number of rows: no row is left out, and none is read past the end.
fn ends(name: &'static str, cu_seqlens: &[i32], tensor: &str, rows: usize) -> Result<(), Error> {
    match cu_seqlens.last() {
        Some(&last) if usize::try_from(last) != Ok(rows) => {
            let reason = format!("ends at {last}, expected {rows}, the rows of {tensor}");
            Err(ProblemError::CuSeqlens { name, reason }.into())
        }
        _ => Ok(()),
    }
}
