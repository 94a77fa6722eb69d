//! `flashattn ptx`: the GPU kernel of a problem, what it needs, and which blocks it computes. Needs no GPU.

use crate::mods::ModArgs;
use crate::options::{self, Pass, length, si};
use crate::tensor_file::write_whole;
use anyhow::{Context, Result, bail};
use clap::{Args, ValueHint};
use flashattn::cuda::KernelConfig;
use flashattn::cuda::plan::Upload;
use flashattn::cuda::stage::{GradLayout, Layout, StagedBackward, StagedPlan};
use flashattn_spec::blocks::BlockSchedule;
use flashattn_spec::{AttentionProblem, DType};
use ptx::assemble::{Report as Assembled, assemble};
use ptx::{Kernel, emit, verify};
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  flashattn ptx --causal
      the forward kernel's resources and the blocks of 4096 causal tokens
  flashattn ptx --seqlen 16k --head-dim 64 --window 1023,0 --softcap 30 -o kernel.ptx
      the same of another problem, and the PTX in a file; -o - prints it
  flashattn ptx --head-dim 72 --dtype f16 --json
      as JSON
  flashattn ptx --pass bwd --causal -o -
      the gradients' kernels: before, main, after

Registers and spills are ptxas's, if it is found: in PATH, CUDA_HOME, or where tools/ptxas.sh puts it.";

/// Options of `flashattn ptx`.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct PtxArgs {
    /// Keys of a sequence; 4k is 4096
    #[arg(long, value_parser = options::count, value_name = "N", default_value = "4k")]
    seqlen: usize,
    /// Queries of a sequence, if not as many as keys
    #[arg(long, value_parser = options::count, value_name = "N")]
    seqlen_q: Option<usize>,
    /// Elements of a query and key row
    #[arg(long, default_value_t = 128, value_name = "D")]
    head_dim: usize,
    /// Elements of a value row, if another number
    #[arg(long, value_name = "D")]
    head_dim_v: Option<usize>,
    /// Query heads
    #[arg(long, default_value_t = 16, value_name = "H")]
    heads: usize,
    /// Key/value heads, if fewer (GQA, MQA)
    #[arg(long, value_name = "H")]
    kv_heads: Option<usize>,
    /// Sequences
    #[arg(long, default_value_t = 1, value_name = "B")]
    batch: usize,
    /// Element type
    #[arg(long, default_value = "bf16", value_parser = options::dtype())]
    dtype: DType,
    /// A query sees the keys up to its own position
    #[arg(long)]
    causal: bool,
    /// Of which pass, fwd or bwd
    #[arg(long, value_enum, default_value_t = Pass::Fwd)]
    pass: Pass,
    /// Gradients with the same bits in every run
    #[arg(long)]
    deterministic: bool,
    #[command(flatten)]
    mods: ModArgs,
    /// Write the PTX to this file; - prints it, and the report to standard error
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    output: Option<PathBuf>,
    /// Print JSON
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

/// What is said of a kernel.
#[derive(Serialize)]
struct Report {
    kernel: String,
    target: String,
    config: String,
    ptx_bytes: usize,
    threads: u32,
    shared_bytes: u32,
    /// Name and bytes of each region.
    shared: Vec<(String, u32)>,
    parameters: usize,
    /// By ptxas; null if there is none.
    ptxas: Option<Resources>,
    /// Why there is none.
    ptxas_error: Option<String>,
    schedule: Schedule,
    /// Tensors that calls copy when all are row-major.
    staged: Vec<String>,
    workspace_bytes: u64,
    /// Name and bytes of what is uploaded once.
    uploads: Vec<(String, usize)>,
}

#[derive(Serialize)]
struct Resources {
    registers: u32,
    spill_stores: u32,
    spill_loads: u32,
    stack: u32,
    warnings: Vec<String>,
}

/// Kernels of a pass in the order of their launches, and what its plan says of them.
struct Planned {
    kernels: Vec<Kernel>,
    /// Of `kernels`.
    main: usize,
    config: String,
    /// Rows and keys of a block, query heads whose rows share it, and items of work.
    tile: [usize; 2],
    heads: usize,
    items: u32,
    staged: Vec<String>,
    workspace_bytes: u64,
    uploads: Vec<Upload>,
}

impl Planned {
    fn new(p: &AttentionProblem, pass: Pass, deterministic: bool) -> Result<Planned> {
        let lower = |tensor: &dyn std::fmt::Debug| format!("{tensor:?}").to_lowercase();
        Ok(match pass {
            Pass::Fwd => {
                let plan = StagedPlan::new(p, &Layout::dense(p))?;
                let config = plan.forward.config.clone();
                Planned {
                    heads: config.packed_heads as usize,
                    config: format!("{config:?}"),
                    tile: [config.tile_m() as usize, config.tile_n as usize],
                    kernels: vec![KernelConfig::Forward(config).kernel()],
                    main: 0,
                    items: plan.forward.tiles,
                    staged: plan.staged().map(|tensor| lower(&tensor)).collect(),
                    workspace_bytes: plan.workspace,
                    uploads: plan.forward.uploads,
                }
            }
            Pass::Bwd => {
                let plan = StagedBackward::new(p, &GradLayout::dense(p), deterministic)?;
                let config = &plan.backward.config;
                Planned {
                    heads: 1,
                    config: format!("{config:?}"),
                    tile: [config.tile_m as usize, config.tile_n() as usize],
                    kernels: KernelConfig::backward(config).iter().map(KernelConfig::kernel).collect(),
                    main: 1,
                    items: plan.backward.items,
                    staged: plan.staged().map(|tensor| lower(&tensor)).collect(),
                    workspace_bytes: plan.workspace,
                    uploads: plan.backward.uploads,
                }
            }
            Pass::FwdBwd => bail!("--pass fwd_bwd: one of fwd and bwd is shown"),
        })
    }
}

/// Tiles of queries by blocks of keys.
#[derive(Serialize)]
struct Schedule {
    tile_m: usize,
    /// Query heads whose rows share a tile: of each `tile_m / heads` queries.
    heads: usize,
    tile_n: usize,
    /// Work items, which thread blocks take one after the other.
    tiles: u32,
    skipped: u64,
    full: u64,
    partial: u64,
    density: f64,
}

/// Builds, checks and prints.
///
/// # Errors
/// What the kernels do not take; a kernel that breaks a rule; whatever prevents writing.
pub fn run(args: &PtxArgs) -> Result<()> {
    let mut p = AttentionProblem::new(args.batch, args.seqlen, args.heads, args.head_dim, args.dtype);
    p.seqlen_q = args.seqlen_q.unwrap_or(args.seqlen);
    p.heads_kv = args.kv_heads.unwrap_or(args.heads);
    p.head_dim_v = args.head_dim_v.unwrap_or(args.head_dim);
    args.mods.apply(&mut p, args.causal, None)?;
    let planned = Planned::new(&p, args.pass, args.deterministic)?;
    let mut texts = Vec::new();
    for kernel in &planned.kernels {
        verify(kernel).context("the kernel breaks a rule: a bug of ours")?;
        texts.push(emit(kernel));
    }
    let report = report(&p, &planned, texts[planned.main].len())?;
    let text = texts.join("\n");
    let mut out = std::io::stdout().lock();
    match &args.output {
        Some(path) if path.as_os_str() == "-" => {
            write!(out, "{text}")?;
            write!(std::io::stderr(), "{}", describe(&p, &report))?;
        }
        Some(path) => {
            write_whole(path, text.as_bytes())?;
            write!(out, "{}\nPTX: {}\n", describe(&p, &report), path.display())?;
        }
        None if args.json => {
            serde_json::to_writer_pretty(&mut out, &report)?;
            writeln!(out)?;
        }
        None => write!(out, "{}", describe(&p, &report))?,
    }
    Ok(())
}

fn report(p: &AttentionProblem, planned: &Planned, ptx_bytes: usize) -> Result<Report> {
    let (kernel, [tile_m, tile_n]) = (&planned.kernels[planned.main], planned.tile);
    // Heads that share a tile see the same.
    let heads = planned.heads;
    let schedule = AttentionProblem { heads_q: p.heads_q / heads, ..p.clone() };
    let counts = BlockSchedule::new(&schedule, tile_m / heads, tile_n)?.counts();
    let (ptxas, ptxas_error) = match assemble(kernel) {
        Ok(Assembled { registers, spill_stores, spill_loads, stack, warnings, .. }) => {
            (Some(Resources { registers, spill_stores, spill_loads, stack, warnings }), None)
        }
        Err(error) => (None, Some(error.to_string())),
    };
    Ok(Report {
        kernel: kernel.name.clone(),
        target: kernel.target.to_string(),
        config: planned.config.clone(),
        ptx_bytes,
        threads: kernel.threads(),
        shared_bytes: kernel.shared_bytes,
        shared: kernel.shared.iter().map(|region| (region.name.clone(), region.bytes)).collect(),
        parameters: kernel.params.len(),
        ptxas,
        ptxas_error,
        schedule: Schedule {
            tile_m,
            heads,
            tile_n,
            tiles: planned.items,
            skipped: counts.skipped,
            full: counts.full,
            partial: counts.partial,
            density: counts.density(),
        },
        staged: planned.staged.clone(),
        workspace_bytes: planned.workspace_bytes,
        uploads: planned.uploads.iter().map(|up| (up.name.clone(), up.bytes().len())).collect(),
    })
}

fn describe(p: &AttentionProblem, r: &Report) -> String {
    let bytes = |x: f64| format!("{}B", si(x));
    let mut lines = vec![
        format!(
            "{} for {}, {} of PTX, {} parameters",
            r.kernel,
            r.target,
            bytes(r.ptx_bytes as f64),
            r.parameters
        ),
        format!(
            "{}×{}:{} heads, {}×{} tokens, head_dim {}, {}: mask {}, score mod {}",
            p.batch,
            p.heads_q,
            p.heads_kv,
            length(p.seqlen_q),
            length(p.seqlen_k),
            p.head_dim,
            p.dtype,
            if r.config.contains("mask_program: Some") { "by a list of blocks" } else { "computed" },
            if r.config.contains("score_mod: Some") { "compiled in" } else { "none" },
        ),
        String::new(),
        format!("threads a block    {}", r.threads),
    ];
    let regions = r.shared.iter().map(|(name, size)| format!("{name} {size}")).collect::<Vec<_>>().join(", ");
    lines.push(format!("shared memory      {} bytes: {regions}", r.shared_bytes));
    match (&r.ptxas, &r.ptxas_error) {
        (Some(x), _) => {
            lines.push(format!("registers          {} a thread (as launched)", x.registers));
            lines.push(format!(
                "spills             {} bytes stored, {} loaded",
                x.spill_stores, x.spill_loads
            ));
            lines.extend(x.warnings.iter().map(|warning| format!("ptxas warns        {warning}")));
        }
        (None, error) => lines.push(format!("registers          {}", error.as_deref().unwrap_or("unknown"))),
    }
    let s = &r.schedule;
    let packed = if s.heads > 1 { format!(" of {} heads", s.heads) } else { String::new() };
    lines.push(format!(
        "items              {}: tiles of {} queries{packed}, blocks of {} keys",
        s.tiles,
        s.tile_m / s.heads,
        s.tile_n
    ));
    lines.push(format!(
        "blocks             {} whole, {} in part, {} skipped: {:.1} % computed",
        s.full,
        s.partial,
        s.skipped,
        100.0 * s.density
    ));
    if !r.staged.is_empty() {
        let staged = r.staged.join(", ");
        lines.push(format!("copied each call   {staged}, if row-major: rows of no multiple of 16 bytes"));
    }
    lines.push(format!("workspace          {}", bytes(r.workspace_bytes as f64)));
    let uploads = r.uploads.iter().map(|(name, size)| format!("{name} {}", bytes(*size as f64)));
    let uploads: Vec<String> = uploads.collect();
    if !uploads.is_empty() {
        lines.push(format!("uploaded once      {}", uploads.join(", ")));
    }
    lines.push(format!("config             {}", r.config));
    lines.join("\n") + "\n"
}
