//! `flashattn bench --serve`: times passes on tensors that another program gives, in turns with that program's own
//! (`benches/peers/cpu.py`). A request and its answer are a line of JSON each, on standard input and output.

use crate::attention::{Given, Layout, Results};
use crate::memory::measure;
use crate::options::{Pass, cores, with_dtype};
use crate::tensor_file::{self, Tensor, TensorFile, read, tensor};
use anyhow::{Context, Result, ensure};
use flashattn_cpu::arch::Isa;
use flashattn_cpu::plan::{Options, Plan};
use flashattn_spec::{AttentionProblem, Element, mask::Mask};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Write};
use std::path::PathBuf;

/// One request.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    /// A safetensors file with q, k, v and do.
    inputs: PathBuf,
    #[serde(default)]
    causal: bool,
    pass: Pass,
    threads: Option<usize>,
    iters: usize,
    #[serde(default)]
    layout: Layout,
    /// Where to write o, lse, dq, dk, dv of the last iteration.
    outputs: Option<PathBuf>,
}

/// Times of each iteration, of all threads together for `cpu_ms`, and the most extra memory that one needed.
#[derive(Debug, Default, Serialize)]
struct Answer {
    wall_ms: Vec<f64>,
    cpu_ms: Vec<f64>,
    extra_bytes: usize,
}

/// Answers requests until standard input ends.
///
/// # Errors
/// If standard input or output fails; a bad request gets an answer with an `error`.
pub fn serve(isa: Option<Isa>) -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let answer = match answer(&line?, isa) {
            Ok(answer) => serde_json::to_value(answer)?,
            Err(error) => serde_json::json!({ "error": format!("{error:#}") }),
        };
        let mut out = std::io::stdout().lock();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

fn answer(line: &str, isa: Option<Isa>) -> Result<Answer> {
    let request: Request = serde_json::from_str(line).context("request")?;
    ensure!(request.iters > 0, "iters is 0, expected at least 1");
    ensure!(
        request.threads.is_none_or(|n| (1..=cores()).contains(&n)),
        "threads is {}, expected 1 to {}",
        request.threads.unwrap_or(0),
        cores()
    );
    let bytes = read(&request.inputs)?;
    let file = TensorFile::from_safetensors(&bytes)?;
    let dtype = file.get("q")?.element_type().context("q")?;
    with_dtype!(dtype, T => timed::<T>(&request, &file, isa))
}

fn timed<T: Element>(request: &Request, file: &TensorFile, isa: Option<Isa>) -> Result<Answer> {
    let layout = request.layout;
    let get = |name: &'static str| -> Result<([usize; 4], Vec<T>)> {
        let read = |t: &Tensor| {
            Ok((layout.in_memory(t.dimensions("(batch, seqlen, heads, head_dim)")?), t.elements()?))
        };
        file.get(name).and_then(read).context(name)
    };
    let ([batch, seqlen_q, heads, head_dim], q) = get("q")?;
    let (k_shape, k) = get("k")?;
    let (v_shape, v) = get("v")?;
    let d_o = if request.pass.has_backward() { get("do")? } else { Default::default() };
    let mut p = AttentionProblem::new(batch, seqlen_q, heads, head_dim, T::DTYPE);
    (p.seqlen_k, p.heads_kv, p.head_dim_v) = (k_shape[1], k_shape[2], v_shape[3]);
    p.mask = if request.causal { Mask::Causal } else { Mask::Full };
    for (name, got, expected) in [("k", k_shape, p.k_shape()), ("v", v_shape, p.v_shape())] {
        ensure!(
            got == expected,
            "{name} has shape {got:?} as (batch, seqlen, heads, head_dim), expected {expected:?}"
        );
    }
    if request.pass.has_backward() {
        ensure!(d_o.0 == p.o_shape(), "do has shape {:?}, expected {:?}", d_o.0, p.o_shape());
    }
    let given = Given { layout, q, k, v, d_o: d_o.1, ..Given::default() };
    let mut plan = Plan::new(&p, Options { isa, threads: request.threads })?;
    let mut results = Results::new(&p, request.pass.has_backward());
    if !request.pass.has_forward() {
        results.forward(&p, &given, &mut plan)?;
    }
    let mut answer = Answer::default();
    for _ in 0..request.iters {
        let (_, cost) = measure(|| results.run(&p, &given, request.pass, &mut plan))?;
        answer.wall_ms.push(cost.wall_ms);
        answer.cpu_ms.push(cost.cpu_ms);
        answer.extra_bytes = answer.extra_bytes.max(cost.extra_bytes);
    }
    if let Some(path) = &request.outputs {
        save(&p, layout, &results).save(path)?;
    }
    Ok(answer)
}

fn save<T: Element>(p: &AttentionProblem, layout: Layout, results: &Results<T>) -> TensorFile<'static> {
    let lse = tensor_file::tensor(&results.lse, &[p.batch, p.heads_q, p.seqlen_q]);
    let mut tensors = vec![("o", tensor(&results.o, &layout.in_memory(p.o_shape()))), ("lse", lse)];
    if !results.dq.is_empty() {
        let gradients = [
            ("dq", &results.dq, p.q_shape()),
            ("dk", &results.dk, p.k_shape()),
            ("dv", &results.dv, p.v_shape()),
        ];
        tensors.extend(gradients.map(|(name, x, shape)| (name, tensor(x, &layout.in_memory(shape)))));
    }
    let tensors = tensors.into_iter().map(|(name, t)| (name.to_owned(), t)).collect();
    TensorFile { tensors, ..TensorFile::default() }
}
