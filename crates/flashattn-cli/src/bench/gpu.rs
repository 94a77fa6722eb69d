//! `flashattn bench --device cuda`: passes over tensors in the GPU's memory, by the GPU's clock. The regime is that of
//! `peers.py`: fixed random inputs, launches back to back for 150 ms, the median of three such loops.

use super::grid::Cell;
use super::verify::{ROWS, verify_gradient_rows, verify_rows};
use super::{BenchArgs, JsonRows};
use super::{Point, picture};
use crate::attention::{Given, Layout, Results};
use crate::gpu::Resident;
use crate::options::{self, Pass, with_dtype};
use crate::tensor_file::write_whole;
use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table};
use flashattn::cuda::kernels::{BwdConfig, FwdConfig};
use flashattn::{Device, Plan};
use flashattn_spec::{DType, Element};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use rand_distr::StandardNormal;
use rayon::prelude::*;
use serde::Serialize;
use std::io::Write;
use std::time::Instant;

/// A timed cell; the first fields as in the peers' rows.
#[derive(Clone, Debug, Serialize)]
struct Row {
    peer: &'static str,
    pass: Pass,
    dtype: DType,
    causal: bool,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    seqlen: usize,
    seqlen_q: usize,
    head_dim: usize,
    /// A launch, by the GPU's clock: mean of a loop, median of loops.
    ms: f64,
    tflops: f64,
    /// (slowest − fastest loop) / median.
    spread: f64,
    launches: usize,
    /// Largest error over the largest entry, of `rows_checked` rows of each result.
    error: f64,
    rows_checked: usize,
    /// Whether gradients have the same bits in every run by request.
    deterministic: bool,
    /// Host time of a call that only launches.
    host_us: f64,
    /// Making the plan, and with it the kernel; null if an earlier row has made that. The driver's cache on disk may have it
    /// from an earlier process: `CUDA_CACHE_DISABLE=1` for the time without.
    first_call_ms: Option<f64>,
    /// Making the plan when the process has the kernel.
    cached_call_ms: f64,
    /// What else changes the scores: window, softcap, …
    mods: String,
    kernel: String,
    registers: u32,
    local_bytes: u32,
    /// Tensors that each call copies because of how they lie.
    staged: Vec<String>,
    workspace_bytes: u64,
    layout: Layout,
    device: String,
    driver: String,
    commit: Option<&'static str>,
    #[serde(skip)]
    cell: String,
}

/// Times and prints.
///
/// # Errors
/// What the GPU refuses, wrong results, and whatever prevents writing.
pub fn run(args: &BenchArgs, ordinal: u32, cells: &[Cell]) -> Result<()> {
    let bar = options::progress(cells.len() as u64);
    let (mut rows, mut configs) = (Vec::<Row>::new(), Vec::new());
    let mut json = args.json.then(JsonRows::default);
    for cell in cells {
        let name = format!("{} {} {}", cell.problem.dtype, cell.pass, cell.name());
        bar.set_message(name.clone());
        let dtype = cell.problem.dtype;
        let row = with_dtype!(dtype, T => time::<T>(args, ordinal, cell, &mut configs)).context(name)?;
        if let Some(json) = &mut json {
            json.push(&row)?;
        }
        rows.push(row);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let device = rows.first().map_or(String::new(), |row| row.device.clone());
    if let Some(path) = &args.plot {
        let points: Vec<Point> = rows.iter().map(point).collect();
        write_whole(path, picture(&points, &device, "TFLOP/s")?.as_bytes())?;
    }
    if let Some(json) = json {
        return json.finish();
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{device}, driver for CUDA {}\n\n{}",
        rows.first().map_or("", |row| &row.driver),
        table(&rows)
    )?;
    if let Some(path) = &args.plot {
        writeln!(out, "\npicture: {}", path.display())?;
    }
    Ok(())
}

/// Random tensors, made by all threads.
fn random<T: Element>(cell: &Cell, layout: Layout) -> Given<T> {
    const CHUNK: usize = 1 << 16;
    let normal = |shape: [usize; 4], seed: u64| {
        let mut data = vec![T::default(); shape.into_iter().product()];
        data.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| {
            let mut rng = SmallRng::seed_from_u64(seed << 32 | i as u64);
            chunk.iter_mut().for_each(|x| *x = T::from_f32(rng.sample::<f32, _>(StandardNormal)));
        });
        data
    };
    let p = &cell.problem;
    let (q, k, v) = (normal(p.q_shape(), 1), normal(p.k_shape(), 2), normal(p.v_shape(), 3));
    let d_o = if cell.pass.has_backward() { normal(p.o_shape(), 4) } else { Vec::new() };
    Given { layout, q, k, v, d_o, ..Given::default() }
}

/// The kernels of a pass.
type Configs = (FwdConfig, Option<BwdConfig>);

/// Checks and times one cell. `configs` are those of the kernels that this process has made.
fn time<T: Element>(args: &BenchArgs, ordinal: u32, cell: &Cell, configs: &mut Vec<Configs>) -> Result<Row> {
    let (p, pass, layout) = (&cell.problem, cell.pass, args.layout);
    ensure!(p.lse_len() * p.seqlen_k > 0, "there is nothing to time: a size is 0");
    let given = random::<T>(cell, layout);
    let plan = || {
        let start = Instant::now();
        let plan = Plan::<T>::from_problem(p.clone(), None, Device::Cuda(ordinal))?;
        let plan = plan.deterministic(args.deterministic)?;
        let backward = pass.has_backward().then(|| plan.gpu_backward()).transpose()?;
        let configs: Configs = (plan.gpu()?.config().clone(), backward.map(|pass| pass.config().clone()));
        Ok::<_, anyhow::Error>((configs, start.elapsed().as_secs_f64() * 1e3))
    };
    let (config, first) = plan()?;
    let cached_call_ms = plan()?.1;
    let known = configs.contains(&config);
    if !known {
        configs.push(config);
    }
    let resident = Resident::new(ordinal, p, &given, args.deterministic)?;
    let mut results = Results::<T>::new(p, pass.has_backward());
    resident.run(Pass::Fwd, &mut results)?;
    let mut error = verify_rows(p, &given, &results)?;
    if pass.has_backward() {
        resident.run(Pass::Bwd, &mut results)?;
        error = error.max(verify_gradient_rows(p, &given, &results)?);
    }
    let (host_us, timed, made) = (resident.host_us(pass)?, resident.time(pass)?, resident.made(pass)?);
    let properties = flashattn::cuda::Device::open(ordinal)?.properties().clone();
    Ok(Row {
        peer: "ours",
        pass,
        dtype: p.dtype,
        causal: cell.causal,
        batch: p.batch,
        heads: p.heads_q,
        kv_heads: p.heads_kv,
        seqlen: p.seqlen_k,
        seqlen_q: p.seqlen_q,
        head_dim: p.head_dim,
        ms: timed.median_ms,
        tflops: cell.flops() / timed.median_ms / 1e9,
        spread: (timed.max_ms - timed.min_ms) / timed.median_ms,
        launches: timed.launches,
        error,
        rows_checked: ROWS,
        deterministic: args.deterministic,
        host_us,
        first_call_ms: (!known).then_some(first),
        cached_call_ms,
        mods: cell.mods.trim_start_matches(", ").to_owned(),
        kernel: made.kernel,
        registers: made.registers,
        local_bytes: made.local_bytes,
        staged: made.staged,
        workspace_bytes: made.workspace_bytes,
        layout,
        device: properties.name,
        driver: properties.driver.to_string(),
        commit: option_env!("FLASHATTN_COMMIT"),
        cell: cell.name(),
    })
}

fn point(r: &Row) -> Point {
    let (dtype, pass, head_dim, causal, seqlen) = (r.dtype, r.pass, r.head_dim, r.causal, r.seqlen);
    Point { dtype, pass, head_dim, causal, seqlen, rate: r.tflops }
}

fn table(rows: &[Row]) -> Table {
    let mut table = options::table(&[
        "dtype",
        "pass",
        "batch×heads, sizes",
        "ms",
        "±",
        "TFLOP/s",
        "host",
        "first call",
        "copied",
        "error",
    ]);
    for r in rows {
        table.add_row([
            r.dtype.to_string(),
            r.pass.to_string(),
            r.cell.clone(),
            format!("{:.4}", r.ms),
            format!("{:.1} %", 50.0 * r.spread),
            format!("{:.0}", r.tflops),
            format!("{:.1} µs", r.host_us),
            r.first_call_ms.map_or("–".to_owned(), |ms| format!("{ms:.0} ms")),
            if r.staged.is_empty() { "–".to_owned() } else { r.staged.join(" ") },
            format!("{:.1e}", r.error),
        ]);
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
