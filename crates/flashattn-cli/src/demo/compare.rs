//! Ours beside standard attention on one input: errors against the f64 oracle, times, memory.

use super::inputs;
use crate::attention::{Attention, Given, Results};
use crate::gpu::Resident;
use crate::memory::{Cost, in_use, measure, median};
use crate::options;
use crate::tensor_file::TensorFile;
use anyhow::Result;
use flashattn_cpu::plan::{Options, Plan};
use flashattn_spec::io::{Device, IoModel, LoopOrder, Pass, Tiling};
use flashattn_spec::reference::{self, standard::StandardAttention};
use flashattn_spec::{AttentionProblem, DType, Element};
use serde::Serialize;

/// A number for each output; none for the gradients where only the forward pass ran.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct PerTensor {
    pub o: f64,
    pub lse: f64,
    pub dq: Option<f64>,
    pub dk: Option<f64>,
    pub dv: Option<f64>,
}

impl PerTensor {
    fn each(outputs: usize, f: impl Fn(usize) -> f64) -> Self {
        let gradient = |i: usize| (i < outputs).then(|| f(i));
        PerTensor { o: f(0), lse: f(1), dq: gradient(2), dk: gradient(3), dv: gradient(4) }
    }

    /// With their names.
    pub fn named(&self) -> [(&'static str, Option<f64>); 5] {
        [("o", Some(self.o)), ("lse", Some(self.lse)), ("dq", self.dq), ("dk", self.dk), ("dv", self.dv)]
    }
}

/// A number for each implementation and pass; none for a pass that did not run.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct PerPass<N> {
    pub flash_fwd: N,
    pub flash_bwd: Option<N>,
    pub standard_fwd: N,
    pub standard_bwd: Option<N>,
}

/// A count for each implementation.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Moved {
    pub flash: u128,
    pub standard: u128,
}

/// What is said about an input.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    pub name: String,
    /// Of q.
    pub shape: [usize; 4],
    pub kv_heads: usize,
    pub dtype: DType,
    pub causal: bool,
    /// Largest distance of ours from the oracle.
    pub max_error: PerTensor,
    /// The same of standard attention in the same dtype.
    pub standard_error: PerTensor,
    /// Twice standard attention's, and one rounding of the largest entry.
    pub allowed_error: PerTensor,
    /// Wall time, median; of ours on a GPU its time there, the tensors in its memory.
    pub ms: PerPass<f64>,
    /// Most memory besides inputs and results; backward includes what the forward pass keeps for it. Of ours on a GPU: the
    /// workspace.
    pub extra_bytes: PerPass<usize>,
    /// By the IO model: bytes that the passes move between a core's cache and what is beyond it (on a GPU: between its
    /// multiprocessors and its memory).
    pub moved_bytes: Moved,
}

impl Comparison {
    /// Names of outputs that are farther from the oracle than allowed.
    pub fn wrong(&self) -> Vec<&'static str> {
        let pairs = self.max_error.named().into_iter().zip(self.allowed_error.named());
        pairs
            .filter(|((_, error), (_, allowed))| {
                error.is_some() && error.partial_cmp(allowed).is_none_or(std::cmp::Ordering::is_gt)
            })
            .map(|((name, _), _)| name)
            .collect()
    }
}

/// Times of the passes, and the memory that each needs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timed {
    pub forward: Cost,
    /// None if only the forward pass ran.
    pub backward: Option<Cost>,
}

/// Runs the passes a few times, the first for memory. `made` is what was in use before `by` was made: what it keeps
/// from the forward pass for the backward pass counts as the backward pass's.
pub fn time<T: Element>(
    p: &AttentionProblem,
    given: &Given<T>,
    results: &mut Results<T>,
    by: &mut impl Attention<T>,
    made: usize,
    pass: options::Pass,
) -> Result<Timed> {
    /// Milliseconds that one input may take, less than one call aside.
    const BUDGET: f64 = 700.0;
    let kept = in_use() - made;
    let ((), mut forward) = measure(|| results.forward(p, given, by))?;
    forward.extra_bytes += kept;
    let kept = in_use() - made;
    let mut backward = None;
    if pass.has_backward() {
        let ((), mut cost) = measure(|| results.backward(p, given, by))?;
        cost.extra_bytes += kept;
        backward = Some(cost);
    }
    let first = forward.wall_ms + backward.map_or(0.0, |cost: Cost| cost.wall_ms);
    let repeat = (BUDGET / first).round().clamp(2.0, 15.0) as usize;
    let mut times = [vec![], vec![]];
    for _ in 0..repeat {
        times[0].push(measure(|| results.forward(p, given, by))?.1.wall_ms);
        if backward.is_some() {
            times[1].push(measure(|| results.backward(p, given, by))?.1.wall_ms);
        }
    }
    let [forward_ms, backward_ms] = times.map(|mut t| median(&mut t));
    forward.wall_ms = forward_ms;
    backward.iter_mut().for_each(|cost| cost.wall_ms = backward_ms);
    Ok(Timed { forward, backward })
}

/// What a device computes.
pub fn passes(device: flashattn::Device) -> options::Pass {
    match device {
        flashattn::Device::Cpu => options::Pass::FwdBwd,
        _ => options::Pass::Fwd,
    }
}

/// Ours, on a device.
pub fn time_flash<T: Element>(
    device: flashattn::Device,
    p: &AttentionProblem,
    given: &Given<T>,
    results: &mut Results<T>,
) -> Result<Timed> {
    if let flashattn::Device::Cuda(ordinal) = device {
        let resident = Resident::new(ordinal, p, given)?;
        resident.run(results)?;
        let wall_ms = resident.time()?.median_ms;
        let bytes = resident.forward()?.workspace_bytes(&resident.tensors()?.layout())?;
        let forward = Cost { wall_ms, extra_bytes: bytes as usize, ..Cost::default() };
        return Ok(Timed { forward, backward: None });
    }
    let made = in_use();
    time(p, given, results, &mut Plan::new(p, Options::default())?, made, passes(device))
}

/// Standard attention, on the CPU.
pub fn time_standard<T: Element>(
    p: &AttentionProblem,
    given: &Given<T>,
    results: &mut Results<T>,
    pass: options::Pass,
) -> Result<Timed> {
    let made = in_use();
    time(p, given, results, &mut StandardAttention::new(p)?, made, pass)
}

/// The oracle's o and lse; and dq, dk and dv, where they are wanted.
pub type Exact = Vec<Vec<f64>>;

/// Asks the oracle.
pub fn exact<T: Element>(p: &AttentionProblem, given: &Given<T>, pass: options::Pass) -> Result<Exact> {
    let inputs = given.inputs(p)?;
    let forward = reference::forward(p, &inputs)?;
    let mut all = vec![forward.o, forward.lse];
    if pass.has_backward() {
        let backward = reference::backward(p, &inputs, given.d_o(p)?, None)?;
        all.extend([backward.dq, backward.dk, backward.dv]);
    }
    Ok(all)
}

/// Compares on one input; `exact` is asked if it is not known yet.
pub fn compare<S: Element, T: Element>(
    on: flashattn::Device,
    name: &str,
    file: &TensorFile,
    seqlen: Option<usize>,
    known: Option<Exact>,
) -> Result<(Comparison, Exact)> {
    let (p, given) = inputs::load::<S, T>(file, seqlen)?;
    let pass = passes(on);
    let results = || Results::new(&p, pass.has_backward());
    let (mut ours, mut standard) = (results(), results());
    let flash = time_flash(on, &p, &given, &mut ours)?;
    let baseline = time_standard(&p, &given, &mut standard, pass)?;
    let exact = known.map_or_else(|| self::exact(&p, &given, pass), Ok)?;
    let errors = |r: &Results<T>| {
        let lse: Vec<f64> = r.lse.iter().map(|&x| x.into()).collect();
        let wide = |x: &[T]| -> Vec<f64> { x.iter().map(|x| x.to_f64()).collect() };
        let got = [wide(&r.o), lse, wide(&r.dq), wide(&r.dk), wide(&r.dv)];
        PerTensor::each(exact.len(), |i| {
            largest(got[i].iter().zip(&exact[i]).map(|(g, e)| if g == e { 0.0 } else { (g - e).abs() }))
        })
    };
    let (max_error, standard_error) = (errors(&ours), errors(&standard));
    let twice = standard_error.named().map(|(_, e)| 2.0 * e.unwrap_or_default());
    let size = |i: usize| largest(exact[i].iter().map(|x: &f64| x.abs()).filter(|x| x.is_finite()));
    let allowed_error = PerTensor::each(exact.len(), |i| {
        let stored = if i == 1 { DType::F32 } else { T::DTYPE };
        twice[i] + stored.epsilon() * size(i)
    });
    let (device, counted) = match on {
        flashattn::Device::Cpu => (Device::this_cpu(), Pass::ForwardBackward),
        _ => (Device::h100(), Pass::Forward),
    };
    let tiling = Tiling::for_device(&p, LoopOrder::QOuter, &device);
    let moved_bytes = Moved {
        flash: IoModel::flash(&p, &device, counted, &tiling)?.bytes,
        standard: IoModel::standard(&p, &device, counted)?.bytes,
    };
    let comparison = Comparison {
        name: name.to_owned(),
        shape: p.q_shape(),
        kv_heads: p.heads_kv,
        dtype: p.dtype,
        causal: matches!(p.mask, flashattn_spec::mask::Mask::Causal),
        max_error,
        standard_error,
        allowed_error,
        ms: PerPass {
            flash_fwd: flash.forward.wall_ms,
            flash_bwd: flash.backward.map(|cost| cost.wall_ms),
            standard_fwd: baseline.forward.wall_ms,
            standard_bwd: baseline.backward.map(|cost| cost.wall_ms),
        },
        extra_bytes: PerPass {
            flash_fwd: flash.forward.extra_bytes,
            flash_bwd: flash.backward.map(|cost| cost.extra_bytes),
            standard_fwd: baseline.forward.extra_bytes,
            standard_bwd: baseline.backward.map(|cost| cost.extra_bytes),
        },
        moved_bytes,
    };
    Ok((comparison, exact))
}

/// The largest; a NaN is larger than anything.
fn largest(all: impl Iterator<Item = f64>) -> f64 {
    all.fold(0.0, |m, x| if x.is_nan() || x > m { x } else { m })
}
