//! `flashattn run`: attention over tensors in files.

use crate::attention::Results;
use crate::memory::measure;
use crate::options::{self, ComputeArgs, Pass, si, with_dtype};
use crate::problem::{self, ProblemArgs};
use crate::tensor_file::{Tensor, TensorFile, npy_bytes, parse_npy, read, tensor, write_whole};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueHint};
use flashattn_spec::{AttentionProblem, Element};
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  flashattn run qkv.safetensors -o out.safetensors --causal
      o and lse from q, k and v
  flashattn run qkv.safetensors -o grads.safetensors --pass bwd --window 255,0
      dq, dk, dv from q, k, v and do; o and lse too, unless the file has them
  flashattn run --q q.npy --k k.npy --v v.npy -o folder --softcap 30
      numpy's files: writes folder/o.npy and folder/lse.npy

Tensors, [batch, seqlen, heads, head_dim] in f32, bf16 or f16:
  q, k, v             k and v may have fewer heads (GQA, MQA), v another head_dim
  do, dlse            gradients of o and lse, for the backward pass; dlse may be absent
  sinks               f32 [heads]: logits that join the softmax's denominator, if there
  alibi_slopes        f32 [heads], for --alibi
  cu_seqlens_q, _k    i32 [batch + 1], for sequences packed as [total, heads, head_dim]
Results: o like q, lse f32 [batch, heads, seqlen] (natural logarithm), dq, dk, dv, dsinks.";

/// Options of `flashattn run`.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct RunArgs {
    /// Tensors, with their names
    #[arg(value_name = "IN.safetensors", value_hint = ValueHint::FilePath, required_unless_present_all = ["q", "k", "v"])]
    input: Option<PathBuf>,
    /// Results: a .safetensors file, or a folder for .npy files
    #[arg(short, long, value_name = "OUT", value_hint = ValueHint::AnyPath)]
    output: PathBuf,
    /// What is computed
    #[arg(long, value_enum, default_value_t = Pass::Fwd)]
    pass: Pass,
    #[command(flatten)]
    problem: ProblemArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    npy: NpyArgs,
}

/// Tensors in files of their own.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Tensors as .npy files, instead of those of IN.safetensors")]
struct NpyArgs {
    /// Queries
    #[arg(long, value_name = "FILE")]
    q: Option<PathBuf>,
    /// Keys
    #[arg(long, value_name = "FILE")]
    k: Option<PathBuf>,
    /// Values
    #[arg(long, value_name = "FILE")]
    v: Option<PathBuf>,
    /// Gradient of o
    #[arg(long = "do", value_name = "FILE")]
    d_o: Option<PathBuf>,
    /// Gradient of lse
    #[arg(long, value_name = "FILE")]
    dlse: Option<PathBuf>,
    /// Output of the forward pass
    #[arg(long, value_name = "FILE", requires = "lse")]
    o: Option<PathBuf>,
    /// Log-sum-exp of the forward pass
    #[arg(long, value_name = "FILE", requires = "o")]
    lse: Option<PathBuf>,
    /// Sink logits
    #[arg(long, value_name = "FILE")]
    sinks: Option<PathBuf>,
    /// Slopes for --alibi
    #[arg(long, value_name = "FILE")]
    alibi_slopes: Option<PathBuf>,
    /// Offsets of packed queries
    #[arg(long, value_name = "FILE")]
    cu_seqlens_q: Option<PathBuf>,
    /// Offsets of packed keys
    #[arg(long, value_name = "FILE")]
    cu_seqlens_k: Option<PathBuf>,
}

impl NpyArgs {
    /// Names and contents of the files that are given.
    fn read(&self) -> Result<Vec<(&'static str, &Path, Vec<u8>)>> {
        let all = [
            ("q", &self.q),
            ("k", &self.k),
            ("v", &self.v),
            ("do", &self.d_o),
            ("dlse", &self.dlse),
            ("o", &self.o),
            ("lse", &self.lse),
            ("sinks", &self.sinks),
            ("alibi_slopes", &self.alibi_slopes),
            ("cu_seqlens_q", &self.cu_seqlens_q),
            ("cu_seqlens_k", &self.cu_seqlens_k),
        ];
        let given = all.into_iter().filter_map(|(name, path)| Some((name, path.as_deref()?)));
        given.map(|(name, path)| Ok((name, path, read(path)?))).collect()
    }
}

/// Reads, computes and writes.
///
/// # Errors
/// Bad files, tensors that do not fit together, and whatever prevents writing; nothing is written then.
pub fn run(args: &RunArgs) -> Result<()> {
    let bytes = args.input.as_deref().map(read).transpose()?;
    let arrays = args.npy.read()?;
    let mut file = TensorFile::default();
    if let (Some(bytes), Some(path)) = (&bytes, &args.input) {
        file = TensorFile::from_safetensors(bytes).with_context(|| path.display().to_string())?;
    }
    for (name, path, bytes) in &arrays {
        let tensor = parse_npy(bytes).with_context(|| path.display().to_string())?;
        file.tensors.insert((*name).to_owned(), tensor);
    }
    let p = args.problem.problem(&file)?;
    options::start_threads(args.compute.threads())?;
    with_dtype!(p.dtype, T => compute::<T>(args, &p, &file))
}

fn compute<T: Element>(args: &RunArgs, p: &AttentionProblem, file: &TensorFile) -> Result<()> {
    let given = problem::given::<T>(p, file, args.pass)?;
    let mut plan = args.compute.plan::<T>(p, given.sinks.as_deref())?;
    let mut results = Results::<T>::new(p, args.pass.has_backward());
    let known = args.pass == Pass::Bwd && problem::known_output(p, file, &mut results)?;
    let pass = if args.pass == Pass::Bwd && !known { Pass::FwdBwd } else { args.pass };
    let ((), cost) = measure(|| results.run(p, &given, pass, &mut plan))?;
    let tensors = named(p, &results, pass);
    let names =
        tensors.iter().map(|(name, t)| format!("{name} {:?}", t.shape)).collect::<Vec<_>>().join(", ");
    save(tensors, &args.output)?;
    let (ms, extra) = (cost.wall_ms, si(cost.extra_bytes as f64));
    writeln!(
        std::io::stdout(),
        "{names} in {}: {ms:.1} ms, {extra}B of extra memory",
        args.output.display()
    )?;
    Ok(())
}

fn named<T: Element>(
    p: &AttentionProblem,
    results: &Results<T>,
    pass: Pass,
) -> Vec<(&'static str, Tensor<'static>)> {
    // Packed tensors have no batch dimension.
    let from = usize::from(p.varlen.is_some());
    let mut all = Vec::new();
    if pass.has_forward() {
        all.push(("o", tensor(&results.o, &p.o_shape()[from..])));
        all.push(("lse", tensor(&results.lse, &problem::lse_shape(p))));
    }
    if pass.has_backward() {
        all.push(("dq", tensor(&results.dq, &p.q_shape()[from..])));
        all.push(("dk", tensor(&results.dk, &p.k_shape()[from..])));
        all.push(("dv", tensor(&results.dv, &p.v_shape()[from..])));
        all.extend(results.d_sinks.iter().map(|x| ("dsinks", tensor(x, &[p.heads_q]))));
    }
    all
}

fn save(tensors: Vec<(&'static str, Tensor<'static>)>, path: &Path) -> Result<()> {
    if path.extension().is_some_and(|e| e == "safetensors") {
        let metadata =
            HashMap::from([("made_by".to_owned(), format!("flashattn {}", env!("CARGO_PKG_VERSION")))]);
        let tensors = tensors.into_iter().map(|(name, t)| (name.to_owned(), t)).collect();
        return TensorFile { tensors, metadata }.save(path);
    }
    if path.is_file() {
        bail!("{} is a file: --output takes a name that ends with .safetensors, or a folder", path.display());
    }
    // Encoded before the first is written: numpy has no bf16.
    let files = tensors.iter().map(|(name, t)| Ok((name, npy_bytes(t)?))).collect::<Result<Vec<_>>>()?;
    std::fs::create_dir_all(path).with_context(|| format!("cannot make folder {}", path.display()))?;
    files.iter().try_for_each(|(name, bytes)| write_whole(&path.join(format!("{name}.npy")), bytes))
}
