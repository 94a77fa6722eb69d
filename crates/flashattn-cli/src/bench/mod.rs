//! `flashattn bench`: times passes over a grid of sizes.

mod gpu;
mod grid;
mod probe;
mod serve;
mod verify;

use crate::attention::{Given, Layout, Results};
use crate::memory::{measure, median};
use crate::options::{self, ComputeArgs, Pass, with_dtype};
use crate::plot::{self, Panel, Series};
use crate::tensor_file::write_whole;
use anyhow::{Context, Result, ensure};
use clap::{Args, ValueHint};
use comfy_table::{CellAlignment, Table};
use flashattn::Device;
use flashattn_cpu::arch::Isa;
use flashattn_cpu::plan::{Options, Plan};
use flashattn_spec::{DType, Element, io};
use grid::{Cell, GridArgs};
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  flashattn bench
      f32 and bf16, forward alone and with backward, at 512 and 2048 tokens
  flashattn bench --seqlen 1k,4k,16k --head-dim 64,128 --dtype bf16 --pass fwd,bwd --plot bench.svg
      a grid, and a picture of it
  flashattn bench --seqlen 8k --seqlen-q 1 --heads 32 --kv-heads 8 --pass fwd --causal no
      decoding with grouped heads
  flashattn bench --grid cpu --json > rows.json
      the sizes of the comparison with PyTorch (benches/peers/cpu.py), one JSON row each
  flashattn bench --device cuda --grid h100 --json > rows.json
      36 shapes on a GPU; other shapes, masks and scores: --shapes '72,1,3000' --dtype f16 --kv-heads 4 --alibi
  flashattn bench --device cuda --grid h100 --pass bwd --deterministic --json > rows.json
      the gradients, with the same bits in every run

Each result is compared with the f64 oracle before it is timed. A time is process CPU time divided by threads, which other
programs on the machine disturb little; wall time stands beside it. ± is half the range over rounds. On a GPU a time is by
its own clock, of launches back to back for 150 ms, median of three such loops, the tensors in its memory.";

/// Options of `flashattn bench`.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct BenchArgs {
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    grid: GridArgs,
    /// How tensors lie in memory
    #[arg(long, value_enum, default_value_t = Layout::Bnhd)]
    layout: Layout,
    /// Turns of each size, of which the median counts
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Milliseconds of back-to-back calls in a turn
    #[arg(long, default_value_t = 150.0, value_name = "MS")]
    turn_ms: f64,
    /// Compare rates with this many GFLOP/s, instead of those of a matrix product in f32 measured around each size
    #[arg(long, value_name = "GFLOPS")]
    ceiling: Option<f64>,
    /// Gradients with the same bits in every run, as on the CPU always, on a GPU too
    #[arg(long)]
    deterministic: bool,
    /// Print JSON, a row for each size
    #[arg(long)]
    json: bool,
    /// Save a picture: rates against sequence length
    #[arg(long, value_name = "FILE.svg", value_hint = ValueHint::FilePath)]
    plot: Option<PathBuf>,
    /// Instead, time what another program asks for in lines of JSON on standard input (benches/peers/cpu.py)
    #[arg(long, conflicts_with_all = ["json", "plot", "grid", "seqlen", "dtype", "pass", "threads"])]
    serve: bool,
}

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
    /// As cpu_ms.
    ms: f64,
    tflops: f64,
    /// Process CPU time / threads, mean of a turn, median of turns.
    cpu_ms: f64,
    wall_ms: f64,
    /// (slowest − fastest turn) / median, by CPU time.
    spread: f64,
    rounds: usize,
    iters: usize,
    /// GFLOP/s; GB/s of K and V where seqlen_q is 1.
    rate: f64,
    /// What `rate` is compared with, measured before and after.
    ceiling: f64,
    share: f64,
    extra_bytes: usize,
    /// Largest error over the largest entry.
    error: f64,
    threads: usize,
    isa: String,
    layout: Layout,
    cpu: String,
    commit: Option<&'static str>,
    #[serde(skip)]
    cell: String,
}

/// Times and prints.
///
/// # Errors
/// Options that do not fit together, wrong results, and whatever prevents writing.
pub fn run(args: &BenchArgs) -> Result<()> {
    let how = args.compute.options()?;
    if args.serve {
        return serve::serve(how.isa);
    }
    options::start_threads(args.compute.threads())?;
    let cells = args.grid.cells(args.compute.on_gpu())?;
    if let Device::Cuda(ordinal) = args.compute.device {
        return gpu::run(args, ordinal, &cells);
    }
    let bar = options::progress(cells.len() as u64);
    let device = io::Device::this_cpu().name;
    let (mut rows, mut json) = (Vec::new(), args.json.then(JsonRows::default));
    for cell in &cells {
        let name = format!("{} {} {}", cell.problem.dtype, cell.pass, cell.name());
        bar.set_message(name.clone());
        let row = with_dtype!(cell.problem.dtype, T => time::<T>(args, how, cell, &device)).context(name)?;
        if let Some(json) = &mut json {
            json.push(&row)?;
        }
        rows.push(row);
        bar.inc(1);
    }
    bar.finish_and_clear();
    if let Some(path) = &args.plot {
        let points: Vec<Point> =
            rows.iter().filter(|r| r.seqlen_q > 1 || r.seqlen == 1).map(Point::new).collect();
        write_whole(path, picture(&points, &device, "GFLOP/s")?.as_bytes())?;
    }
    if let Some(json) = json {
        return json.finish();
    }
    let mut out = std::io::stdout().lock();
    let threads = args.compute.threads();
    writeln!(out, "{device}, {threads} threads, {}\n\n{}", isa(how), table(&rows))?;
    if let Some(path) = &args.plot {
        writeln!(out, "\npicture: {}", path.display())?;
    }
    Ok(())
}

/// Rows as a JSON array on standard output, one a line and each as soon as it is there: what stops a long run leaves those before.
#[derive(Default)]
struct JsonRows {
    rows: usize,
}

impl JsonRows {
    fn push(&mut self, row: &impl Serialize) -> Result<()> {
        let mut out = std::io::stdout().lock();
        write!(out, "{}", if self.rows == 0 { "[\n" } else { ",\n" })?;
        self.rows += 1;
        serde_json::to_writer(&mut out, row)?;
        Ok(out.flush()?)
    }

    fn finish(self) -> Result<()> {
        Ok(writeln!(std::io::stdout().lock(), "{}\n]", if self.rows == 0 { "[" } else { "" })?)
    }
}

fn isa(how: Options) -> Isa {
    how.isa.unwrap_or_else(Isa::detect)
}

/// Checks and times one cell.
fn time<T: Element>(args: &BenchArgs, how: Options, cell: &Cell, device: &str) -> Result<Row> {
    let (p, pass, threads) = (&cell.problem, cell.pass, args.compute.threads());
    let mut plan = Plan::new(p, how)?;
    ensure!(p.lse_len() * p.seqlen_k > 0, "there is nothing to time: a size is 0");
    let given = Given::<T>::random(p, args.layout, 1);
    let mut results = Results::new(p, pass.has_backward());
    if !pass.has_forward() {
        results.forward(p, &given, &mut plan)?;
    }
    let mut call = |results: &mut Results<T>| measure(|| results.run(p, &given, pass, &mut plan));
    let (_, first) = call(&mut results)?;
    let error = verify::verify(cell, &given, &results)?;

    let ceiling = || match (args.ceiling, cell.decode_bytes()) {
        (_, Some(bytes)) => probe::read(threads, bytes),
        (Some(ceiling), None) => Ok(ceiling),
        (None, None) => probe::fma(threads),
    };
    let before = ceiling()?;
    let (_, once) = call(&mut results)?;
    let iters = (args.turn_ms / once.wall_ms).round().clamp(1.0, 500.0) as usize;
    let rounds = usize::from(args.rounds).min(if once.wall_ms > 2000.0 { 3 } else { usize::MAX });
    let (mut cpu, mut wall) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let mut turn = 0.0;
        for _ in 0..iters {
            let (_, cost) = call(&mut results)?;
            turn += cost.cpu_ms;
            wall.push(cost.wall_ms);
        }
        // Of a whole turn: the kernel brings the clock of a thread on another core up to date only at its ticks.
        cpu.push(turn / iters as f64 / threads as f64);
    }
    let ceiling = median(&mut [before, ceiling()?]);
    let (ms, flops) = (median(&mut cpu), cell.flops());
    let rate = cell.decode_bytes().map_or(flops, |bytes| bytes as f64) / ms / 1e6;
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
        ms,
        tflops: flops / ms / 1e9,
        cpu_ms: ms,
        wall_ms: median(&mut wall),
        spread: (cpu[rounds - 1] - cpu[0]) / ms,
        rounds,
        iters,
        rate,
        ceiling,
        share: rate / ceiling,
        extra_bytes: first.extra_bytes,
        error,
        threads,
        isa: isa(how).to_string(),
        layout: args.layout,
        cpu: device.to_owned(),
        commit: option_env!("FLASHATTN_COMMIT"),
        cell: cell.name(),
    })
}

fn table(rows: &[Row]) -> Table {
    let mut table = options::table(&[
        "dtype",
        "pass",
        "batch×heads, sizes",
        "ms",
        "±",
        "wall",
        "rate",
        "of ceiling",
        "extra memory",
        "error",
    ]);
    for r in rows {
        let unit = if r.seqlen_q == 1 && r.pass == Pass::Fwd { "GB/s" } else { "GFLOP/s" };
        table.add_row([
            r.dtype.to_string(),
            r.pass.to_string(),
            r.cell.clone(),
            format!("{:.3}", r.ms),
            format!("{:.0} %", 50.0 * r.spread),
            format!("{:.3}", r.wall_ms),
            format!("{:.0} {unit}", r.rate),
            format!("{:.0} %", 100.0 * r.share),
            format!("{}B", options::si(r.extra_bytes as f64)),
            format!("{:.1e}", r.error),
        ]);
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// A place in the picture.
struct Point {
    dtype: DType,
    pass: Pass,
    head_dim: usize,
    causal: bool,
    seqlen: usize,
    rate: f64,
}

impl Point {
    fn new(r: &Row) -> Point {
        let (dtype, pass, head_dim, causal, seqlen) = (r.dtype, r.pass, r.head_dim, r.causal, r.seqlen);
        Point { dtype, pass, head_dim, causal, seqlen, rate: r.rate }
    }
}

fn picture(points: &[Point], device: &str, unit: &str) -> Result<String> {
    let mut series: Vec<Series> = Vec::new();
    let mut colours: Vec<(DType, Pass, usize)> = Vec::new();
    for p in points {
        let key = (p.dtype, p.pass, p.head_dim);
        let colour = colours.iter().position(|k| *k == key).unwrap_or_else(|| {
            colours.push(key);
            colours.len() - 1
        });
        let mask = if p.causal { ", causal" } else { "" };
        let label = format!("{} {}, d {}{mask}", p.dtype, p.pass, p.head_dim);
        let point = (p.seqlen, p.rate);
        match series.iter_mut().find(|s| s.label == label) {
            Some(s) => s.points.push(point),
            None => series.push(Series { label, colour, faint: p.causal, points: vec![point] }),
        }
    }
    let y_label = |y: f64| format!("{y:.0}");
    plot::svg(&[Panel { title: device.to_owned(), y_name: unit.to_owned(), y_label, full: true, series }])
}
