//! Beside the two passes: the IO model, memory of plans, the entries that dropout keeps, threads.

use crate::array::Place;
use crate::dlpack::import;
use crate::error::Error;
use crate::options::Options;
use crate::{plans, threads, xla};
use flashattn::spec::io::{Device, IoModel, IoReport, LoopOrder, Pass, Tiling};
use flashattn::spec::{Dropout, philox};
use flashattn::{AttentionProblem, DType, Element, Mask, Shape, bf16, f16};
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

fn dtype(name: &str) -> Result<DType, Error> {
    match name {
        "float16" => Ok(DType::F16),
        "bfloat16" => Ok(DType::Bf16),
        "float32" => Ok(DType::F32),
        _ => Err(Error::Type(format!("dtype is {name}, expected float16, bfloat16 or float32"))),
    }
}

/// The device of the IO model: its name, and numbers that replace what is known of it.
fn device(name: &str) -> Result<Device, Error> {
    Ok(match name {
        "a100" => Device::a100(),
        "a100-80" => Device::a100_80(),
        "h100" => Device::h100(),
        "cpu" => Device::this_cpu(),
        _ => {
            return Err(Error::Value(format!(
                "device is {name:?}, expected 'a100', 'a100-80', 'h100' or 'cpu'"
            )));
        }
    })
}

/// The IO model of standard and of flash attention, and of block-sparse if there is a density: a JSON list of reports.
#[pyfunction]
#[pyo3(signature = (seqlen_q, seqlen_k, head_dim, heads, kv_heads, batch, dtype_name, causal, dropout, pass_name, device_name,
    loop_order, tile, density, sram_bytes, peak, bandwidth))]
pub fn io_model(
    seqlen_q: usize,
    seqlen_k: usize,
    head_dim: usize,
    heads: usize,
    kv_heads: usize,
    batch: usize,
    dtype_name: &str,
    causal: bool,
    dropout: Option<f32>,
    pass_name: &str,
    device_name: &str,
    loop_order: &str,
    tile: Option<(usize, usize)>,
    density: Option<f64>,
    sram_bytes: Option<u64>,
    peak: Option<f64>,
    bandwidth: Option<f64>,
) -> PyResult<String> {
    let dtype = dtype(dtype_name)?;
    let mut device = device(device_name)?;
    if let Some(bytes) = sram_bytes {
        device = device.with_sram(bytes);
    }
    if let Some(peak) = peak {
        device = device.with_peak(dtype, peak);
    }
    if let Some(bandwidth) = bandwidth {
        device = device.with_bandwidth(bandwidth);
    }
    let pass = match pass_name {
        "forward" => Pass::Forward,
        "backward" => Pass::Backward,
        "both" => Pass::ForwardBackward,
        _ => Err(Error::Value(format!("pass is {pass_name:?}, expected 'forward', 'backward' or 'both'")))?,
    };
    let order = match loop_order {
        "q-outer" => LoopOrder::QOuter,
        "kv-outer" => LoopOrder::KvOuter,
        _ => Err(Error::Value(format!("loop_order is {loop_order:?}, expected 'q-outer' or 'kv-outer'")))?,
    };
    let mut problem = AttentionProblem::new(batch, seqlen_k, heads, head_dim, dtype);
    problem.seqlen_q = seqlen_q;
    problem.heads_kv = kv_heads;
    problem.mask = if causal { Mask::Causal } else { Mask::Full };
    problem.dropout = dropout.map(|p| Dropout { p, seed: 0 });
    let tiling = match tile {
        None => Tiling::for_device(&problem, order, &device),
        Some((m, n)) => Tiling::new(&problem, order, m, n),
    };
    let reports = || -> Result<Vec<IoReport>, Error> {
        let mut reports = vec![
            IoModel::standard(&problem, &device, pass)?,
            IoModel::flash(&problem, &device, pass, &tiling)?,
        ];
        if let Some(density) = density {
            reports.push(IoModel::block_sparse(&problem, &device, pass, &tiling, density)?);
        }
        Ok(reports)
    };
    Ok(serde_json::to_string(&reports()?).map_err(Error::from)?)
}

/// Bytes of working memory of the forward and of the backward pass, beside the tensors, on the CPU.
#[pyfunction]
pub fn workspace_bytes(
    options: &str,
    q_shape: [usize; 4],
    k_shape: [usize; 4],
    v_shape: [usize; 4],
    dtype_name: &str,
) -> PyResult<(usize, usize)> {
    fn bytes<T: Element>(options: &Options, shape: Shape) -> Result<(usize, usize), Error> {
        let (attention, _) = options.attention(&[])?;
        let plan = threads::run(|| attention.plan::<T>(shape))??;
        Ok((plan.forward_workspace_bytes(), plan.backward_workspace_bytes()))
    }
    let run = || -> Result<_, Error> {
        let options = Options::parse(options)?;
        let shape = Shape::of(q_shape, k_shape, v_shape)?;
        match dtype(dtype_name)? {
            DType::F16 => bytes::<f16>(&options, shape),
            DType::Bf16 => bytes::<bf16>(&options, shape),
            _ => bytes::<f32>(&options, shape),
        }
    };
    Ok(run()?)
}

/// Fills a uint8 array `[batch, heads, seqlen_q, seqlen_k]` with 1 where dropout keeps the entry, else 0.
#[pyfunction]
#[pyo3(signature = (seed, p, out))]
pub fn dropout_mask(py: Python<'_>, seed: i64, p: f32, out: &Bound<'_, PyAny>) -> PyResult<()> {
    let mut imported = import("out", out)?;
    let array = &mut imported.array;
    let fill = || -> Result<(), Error> {
        let &[_, heads, seqlen_q, seqlen_k] = array.shape.as_slice() else {
            return Err(Error::Value(format!("out has shape {:?}, expected 4 dimensions", array.shape)));
        };
        if array.place != Place::Cpu {
            return Err(Error::NotImplemented(format!("out is on {}, expected cpu", array.place)));
        }
        if !(0.0..1.0).contains(&p) {
            return Err(Error::Value(format!("dropout probability is {p}, expected 0 <= p < 1")));
        }
        let list = array.list_mut::<u8>()?;
        for (row, entries) in list.chunks_exact_mut(seqlen_k.max(1)).enumerate() {
            let (q, head, batch) = (row % seqlen_q, row / seqlen_q % heads, row / seqlen_q / heads);
            for (kv, entry) in (0..).zip(entries) {
                let keep = philox::keep(seed.cast_unsigned(), batch as u32, head as u32, q as u32, kv, p);
                *entry = keep.into();
            }
        }
        Ok(())
    };
    Ok(py.detach(fill)?)
}

/// Threads that calls use.
#[pyfunction]
pub fn num_threads() -> PyResult<usize> {
    Ok(threads::count()?)
}

/// Sets how many threads calls use. Results do not depend on it.
#[pyfunction]
pub fn set_num_threads(num_threads: usize) -> PyResult<()> {
    plans::clear();
    Ok(threads::set(num_threads)?)
}

/// Drops plans that are kept for later calls, with their working memory.
#[pyfunction]
pub fn clear_plans() {
    plans::clear();
}

/// The XLA custom calls: name, platform, capsule.
#[pyfunction]
pub fn xla_handlers(py: Python<'_>) -> PyResult<Vec<(&'static str, &'static str, Bound<'_, PyCapsule>)>> {
    let handlers: [(_, _, xla::Handler); 4] = [
        ("flashattn_forward", "cpu", xla::forward::<false>),
        ("flashattn_backward", "cpu", xla::backward::<false>),
        ("flashattn_forward", "CUDA", xla::forward::<true>),
        ("flashattn_backward", "CUDA", xla::backward::<true>),
    ];
    handlers.into_iter().map(|(name, platform, f)| Ok((name, platform, xla::capsule(py, f)?))).collect()
}
