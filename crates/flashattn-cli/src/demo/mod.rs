//! `flashattn demo`: the main job on real inputs. Attention of trained models on a real text, forward and backward,
//! by ours and by standard attention: both against the f64 oracle, their times and memory, and how these grow.

mod compare;
mod inputs;
mod scaling;

use crate::options::{self, si};
use crate::tensor_file::write_whole;
use anyhow::{Context, Result, ensure};
use clap::{Args, ValueHint};
use comfy_table::{CellAlignment, Table};
use compare::{Comparison, compare};
use flashattn_cpu::arch::Isa;
use flashattn_spec::DType;
use flashattn_spec::io::Device;
use half::{bf16, f16};
use indicatif::ProgressBar;
use inputs::INPUTS;
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  flashattn demo
      under a minute on two idle cores; saves flashattn-demo.svg here
  flashattn demo --quick --json --out /tmp
      seconds, on the first 1024 tokens
  flashattn demo --device cuda
      the forward pass on a GPU, beside standard attention on the CPU

Exact means: no output is farther from the f64 oracle than twice what standard attention errs in the same type, plus one
rounding of the largest entry. Exit status 1 otherwise.";

/// Options of `flashattn demo`.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct DemoArgs {
    /// Where ours runs: cpu, or cuda or cuda:N, forward only; standard attention and the oracle run on the CPU
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: flashattn::Device,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Folder for the picture
    #[arg(long, value_name = "DIR", default_value = ".", value_hint = ValueHint::DirPath)]
    out: PathBuf,
    /// Only the first 1024 tokens, and a short scaling study
    #[arg(long)]
    quick: bool,
    /// Also run the inputs widened to f32
    #[arg(long)]
    f32: bool,
    /// Let standard attention have so much memory in the scaling study
    #[arg(long, value_name = "BYTES", value_parser = options::count, default_value = "2048M")]
    max_memory: usize,
}

#[derive(Serialize)]
struct Report {
    device: String,
    isa: String,
    threads: usize,
    inputs: Vec<Comparison>,
    scaling: Vec<scaling::Point>,
    picture: PathBuf,
}

/// Computes, prints and draws.
///
/// # Errors
/// If ours is not exact, and whatever prevents writing.
pub fn run(args: &DemoArgs) -> Result<()> {
    ensure!(args.out.is_dir(), "--out {} is not a folder that exists", args.out.display());
    let (device, isa) = machine(args.device)?;
    let sizes: &[usize] =
        if args.quick { &[256, 512, 1024, 2048] } else { &[512, 1024, 2048, 4096, 8192, 16384] };
    let inputs = INPUTS.len() * (1 + usize::from(args.f32));
    let bar = options::progress((inputs + sizes.len()) as u64);
    // The bar shows that it is alive while the oracle takes its time.
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    let inputs = comparisons(args, &bar)?;
    let scaling = scaling::study(args.device, &INPUTS[0].file()?, sizes, args.max_memory, &bar)?;
    bar.finish_and_clear();

    let picture = args.out.join("flashattn-demo.svg");
    write_whole(&picture, scaling::picture(&scaling, &device)?.as_bytes())?;
    let report = Report { device, isa, threads: options::cores(), inputs, scaling, picture };
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
    } else {
        print(&mut out, &report)?;
    }
    for input in &report.inputs {
        let wrong = input.wrong();
        ensure!(
            wrong.is_empty(),
            "{}: {} farther from the oracle than allowed",
            input.name,
            wrong.join(", ")
        );
    }
    Ok(())
}

/// Names of the device that ours runs on and of its instruction set.
fn machine(device: flashattn::Device) -> Result<(String, String)> {
    let flashattn::Device::Cuda(ordinal) = device else {
        return Ok((Device::this_cpu().name, Isa::detect().to_string()));
    };
    let gpu = flashattn::cuda::Device::open(ordinal)?;
    let (major, minor) = gpu.properties().compute_capability;
    Ok((gpu.properties().name.clone(), format!("sm_{major}{minor}")))
}

/// Each input in its own dtype and, if asked for, widened to f32, which has the same exact results.
fn comparisons(args: &DemoArgs, bar: &ProgressBar) -> Result<Vec<Comparison>> {
    let (on, f32_too) = (args.device, args.f32);
    let mut all = Vec::new();
    for input in INPUTS {
        let file = input.file()?;
        let name = input.name;
        let wide = format!("{name}-f32");
        let step = |name: &str| bar.set_message(format!("{name}: ours, standard attention, f64 oracle"));
        step(name);
        let dtype = file.get("q")?.element_type().context("q")?;
        let tokens = args.quick.then_some(1024).filter(|&n| n < file.get("q").map_or(0, |q| q.shape[1]));
        let (own, exact) = match dtype {
            DType::Bf16 => compare::<bf16, bf16>(on, name, &file, tokens, None)?,
            DType::F16 => compare::<f16, f16>(on, name, &file, tokens, None)?,
            _ => compare::<f32, f32>(on, name, &file, tokens, None)?,
        };
        all.push(own);
        bar.inc(1);
        if !f32_too {
            continue;
        }
        step(&wide);
        match dtype {
            DType::Bf16 => all.push(compare::<bf16, f32>(on, &wide, &file, tokens, Some(exact))?.0),
            DType::F16 => all.push(compare::<f16, f32>(on, &wide, &file, tokens, Some(exact))?.0),
            _ => {}
        }
        bar.inc(1);
    }
    Ok(all)
}

fn print(out: &mut impl Write, report: &Report) -> Result<()> {
    writeln!(out, "{}, {} threads, {}\n", report.device, report.threads, report.isa)?;
    for x in &report.inputs {
        let [_, n, h, d] = x.shape;
        let mask = if x.causal { "causal" } else { "full" };
        writeln!(
            out,
            "{}: {n} tokens, {h} heads on {}, head_dim {d}, {}, {mask}",
            x.name, x.kv_heads, x.dtype
        )?;
    }
    writeln!(out, "\nLargest error against the f64 oracle (ours | standard attention in the same type)\n")?;
    writeln!(out, "{}", error_table(&report.inputs))?;
    let resident = report.inputs.iter().any(|x| x.ms.flash_bwd.is_none());
    if resident {
        writeln!(
            out,
            "\nOurs by the GPU's clock, tensors in its memory; standard attention on this CPU, for the errors"
        )?;
    }
    writeln!(
        out,
        "\nTime (wall) and extra memory, and by the IO model the bytes moved beyond a core's cache\n"
    )?;
    writeln!(out, "{}", cost_table(&report.inputs))?;
    let passes = if resident { "forward" } else { "forward and backward" };
    writeln!(out, "\nGrowth: smollm2-135m, cut or repeated, {passes}\n")?;
    writeln!(out, "{}", scaling::table(&report.scaling))?;
    let wrong = report.inputs.iter().any(|x| !x.wrong().is_empty());
    let verdict = if wrong { "NOT exact" } else { "exact" };
    writeln!(out, "\n{verdict}: every output within twice the error of standard attention: {}", !wrong)?;
    writeln!(out, "picture: {}", report.picture.display())?;
    Ok(())
}

fn error_table(inputs: &[Comparison]) -> Table {
    let mut table = options::table(&["input", "o", "lse", "dq", "dk", "dv"]);
    for x in inputs {
        let pairs = x.max_error.named().into_iter().zip(x.standard_error.named());
        let cells = pairs.map(|((_, ours), (_, standard))| match (ours, standard) {
            (Some(ours), Some(standard)) => format!("{ours:.1e} | {standard:.1e}"),
            _ => "–".to_owned(),
        });
        table.add_row([x.name.clone()].into_iter().chain(cells));
    }
    table
}

fn cost_table(inputs: &[Comparison]) -> Table {
    let mut table =
        options::table(&["input", "", "forward", "backward", "forward memory", "backward memory", "moved"]);
    let bytes = |x: usize| format!("{}B", si(x as f64));
    for x in inputs {
        let (ms, extra) = (x.ms, x.extra_bytes);
        for (name, side, times, memory, moved) in [
            (
                x.name.as_str(),
                "flash",
                [Some(ms.flash_fwd), ms.flash_bwd],
                [Some(extra.flash_fwd), extra.flash_bwd],
                x.moved_bytes.flash,
            ),
            (
                "",
                "standard",
                [Some(ms.standard_fwd), ms.standard_bwd],
                [Some(extra.standard_fwd), extra.standard_bwd],
                x.moved_bytes.standard,
            ),
        ] {
            let [forward, backward] = times.map(|t| t.map_or("–".to_owned(), |t| format!("{t:.3} ms")));
            let [fwd_bytes, bwd_bytes] = memory.map(|x| x.map_or("–".to_owned(), bytes));
            table.add_row([
                name,
                side,
                &forward,
                &backward,
                &fwd_bytes,
                &bwd_bytes,
                &format!("{}B", si(moved as f64)),
            ]);
        }
        let ratio = |a: f64, b: f64| format!("{:.1}×", b / a.max(1e-9));
        let maybe = |a: Option<f64>, b: Option<f64>| a.zip(b).map_or("–".to_owned(), |(a, b)| ratio(a, b));
        let float = |x: Option<usize>| x.map(|x| x as f64);
        table.add_row([
            String::new(),
            "ratio".into(),
            ratio(ms.flash_fwd, ms.standard_fwd),
            maybe(ms.flash_bwd, ms.standard_bwd),
            ratio(extra.flash_fwd as f64, extra.standard_fwd as f64),
            maybe(float(extra.flash_bwd), float(extra.standard_bwd)),
            ratio(x.moved_bytes.flash as f64, x.moved_bytes.standard as f64),
        ]);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
