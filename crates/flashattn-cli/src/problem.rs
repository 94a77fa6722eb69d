//! From a file of tensors and options to a problem and what its passes read.

use crate::attention::{Given, Layout, Results};
use crate::mods::ModArgs;
use crate::options::Pass;
use crate::tensor_file::{Tensor, TensorFile};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use flashattn_spec::{AttentionProblem, Element};

/// Options that say what attention means here. What is not given comes from the file's metadata (`causal`,
/// `softmax_scale`), as in the files that `run` writes.
#[derive(Args, Clone, Debug, Default)]
pub struct ProblemArgs {
    /// A query sees the keys up to its own position, counted from the end (bottom-right)
    #[arg(long, overrides_with = "no_causal")]
    causal: bool,
    /// A query sees every key, whatever the file says
    #[arg(long)]
    no_causal: bool,
    #[command(flatten)]
    mods: ModArgs,
}

/// Dense tensors have four dimensions; packed ones may leave out the batch of one.
fn shape(tensor: &Tensor, packed: bool) -> Result<[usize; 4]> {
    if packed && tensor.shape.len() == 3 {
        let [n, h, d] = tensor.dimensions("(total, heads, head_dim)")?;
        return Ok([1, n, h, d]);
    }
    tensor.dimensions("(batch, seqlen, heads, head_dim)")
}

impl ProblemArgs {
    /// The problem that the file's tensors and these options make. Names: q, k, v; cu_seqlens_q and cu_seqlens_k;
    /// sinks; alibi_slopes.
    ///
    /// # Errors
    /// What is missing, or does not fit together.
    pub fn problem(&self, file: &TensorFile) -> Result<AttentionProblem> {
        let dtype = file.get("q")?.element_type().context("q")?;
        let offsets =
            |name: &str| file.tensors.get(name).map(|t| t.integers().context(name.to_owned())).transpose();
        let offsets = match (offsets("cu_seqlens_q")?, offsets("cu_seqlens_k")?) {
            (Some(q), Some(k)) => Some((q, k)),
            (None, None) => None,
            _ => bail!("one of cu_seqlens_q and cu_seqlens_k is missing: packed sequences need both"),
        };
        let packed = offsets.is_some();
        let shape = |name: &'static str| file.get(name).and_then(|t| shape(t, packed).context(name));
        let [batch, seqlen_q, heads_q, head_dim] = shape("q")?;
        let [_, seqlen_k, heads_kv, head_dim_v] = shape("v")?;
        let mut p = AttentionProblem::new(batch, seqlen_q, heads_q, head_dim, dtype);
        (p.seqlen_k, p.heads_kv, p.head_dim_v) = (seqlen_k, heads_kv, head_dim_v);
        if let Some((q, k)) = offsets {
            p = p.with_varlen(&q, &k);
        }
        let slopes = file.tensors.get("alibi_slopes").filter(|_| self.mods.alibi);
        let slopes = slopes.map(|t| t.elements::<f32>().context("alibi_slopes")).transpose()?;
        self.mods.apply(&mut p, self.causal(file)?, slopes)?;
        if self.mods.scale.is_none() {
            let scale = file.metadata.get("softmax_scale");
            let parse = |s: &String| s.parse().with_context(|| format!("metadata softmax_scale = {s:?}"));
            p.softmax_scale = scale.map(parse).transpose()?;
        }
        p.sinks = file.tensors.contains_key("sinks");
        p.validate()?;
        for (name, expected) in [("q", p.q_shape()), ("k", p.k_shape()), ("v", p.v_shape())] {
            let got = shape(name)?;
            ensure!(got == expected, "{name} has shape {got:?}, expected {expected:?}");
        }
        Ok(p)
    }

    fn causal(&self, file: &TensorFile) -> Result<bool> {
        match file.metadata.get("causal").map(String::as_str) {
            _ if self.causal => Ok(true),
            _ if self.no_causal => Ok(false),
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(other) => bail!(
                "metadata causal = {other:?}, expected \"true\" or \"false\"; give --causal or --no-causal"
            ),
        }
    }
}

/// What passes read. Of a dtype that was found to be q's.
///
/// # Errors
/// A tensor that is missing, of another dtype or shape.
pub fn given<T: Element>(p: &AttentionProblem, file: &TensorFile, pass: Pass) -> Result<Given<T>> {
    let elements = |name: &'static str| file.get(name).and_then(|t| t.elements::<T>().context(name));
    let mut given = Given {
        layout: Layout::Bnhd,
        q: elements("q")?,
        k: elements("k")?,
        v: elements("v")?,
        sinks: optional(file, "sinks", &[p.heads_q])?,
        ..Given::default()
    };
    if pass.has_backward() {
        let d_o = file.get("do").context("--pass bwd needs the gradient of o")?;
        let (got, expected) = (shape(d_o, p.varlen.is_some()).context("do")?, p.o_shape());
        ensure!(got == expected, "do has shape {got:?}, expected {expected:?}");
        given.d_o = elements("do")?;
        given.d_lse = optional(file, "dlse", &lse_shape(p))?;
    }
    Ok(given)
}

/// Fills o and lse from the file; false if it does not have both.
///
/// # Errors
/// A tensor of another dtype or shape.
pub fn known_output<T: Element>(
    p: &AttentionProblem,
    file: &TensorFile,
    results: &mut Results<T>,
) -> Result<bool> {
    let (Some(o), Some(lse)) = (file.tensors.get("o"), optional(file, "lse", &lse_shape(p))?) else {
        return Ok(false);
    };
    let got = shape(o, p.varlen.is_some()).context("o")?;
    ensure!(got == p.o_shape(), "o has shape {got:?}, expected {:?}", p.o_shape());
    (results.o, results.lse) = (o.elements().context("o")?, lse);
    Ok(true)
}

fn optional(file: &TensorFile, name: &'static str, shape: &[usize]) -> Result<Option<Vec<f32>>> {
    let Some(tensor) = file.tensors.get(name) else { return Ok(None) };
    ensure!(tensor.shape == shape, "{name} has shape {:?}, expected {shape:?}", tensor.shape);
    Ok(Some(tensor.elements().context(name)?))
}

/// Dimensions of lse in a file.
pub fn lse_shape(p: &AttentionProblem) -> Vec<usize> {
    if p.varlen.is_some() { vec![p.heads_q, p.total_q()] } else { vec![p.batch, p.heads_q, p.seqlen_q] }
}
