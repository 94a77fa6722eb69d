//! The backward kernels of some problems as PTX, with the plan of each as JSON: for `benches/peers/gpu_backward.py`, which launches
//! them beside other libraries' in one process. `cargo run --release -p flashattn-cuda --example bwd DIR [d,…] [N,…]`; with
//! `report` for DIR ptxas' figures instead.

use std::collections::HashMap;
use std::path::Path;

use flashattn_cuda::kernels::{BwdConfig, flash_bwd_sm90, flash_bwd_sm90_preprocess, flash_bwd_sm90_queries};
use flashattn_cuda::plan::{Argument, BackwardPlan, GradStrides, GradTensor, Strides};
use flashattn_spec::mask::Mask;
use flashattn_spec::tensor::contiguous_strides;
use flashattn_spec::{AttentionProblem, DType};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().unwrap_or_else(|| "report".to_owned());
    let mut numbers = |default: &str| -> Result<Vec<usize>, Failure> {
        let list = args.next().unwrap_or_else(|| default.to_owned());
        list.split(',').map(|x| x.parse().map_err(Failure::from)).collect()
    };
    let dims = numbers("64,128,256")?;
    let lengths = numbers("512,1024,2048,4096,8192,16384")?;
    let mut cases = Cases { folder, kernels: HashMap::new(), rows: Vec::new() };
    for &d in &dims {
        for mask in [Mask::Full, Mask::Causal] {
            // Ragged ones first, to be checked; of the others, which are timed, batch · N and heads · d are constant.
            for (batch, m, n, heads, heads_kv) in
                [(2, 333, 517, 4, 2), (1, 130, 517, 3, 1), (1, 700, 300, 2, 2), (2, 1024, 1024, 4, 4)]
            {
                cases.add(batch, [m, n], [heads, heads_kv], d, &mask, "check", false)?;
                cases.add(batch, [m, n], [heads, heads_kv], d, &mask, "check", true)?;
            }
            for &n in &lengths {
                cases.add((16384 / n).max(1), [n, n], [2048 / d; 2], d, &mask, "time", false)?;
            }
            cases.add(2, [8192; 2], [2048 / d; 2], d, &mask, "time", true)?;
        }
    }
    cases.finish()
}

struct Cases {
    folder: String,
    kernels: HashMap<BwdConfig, usize>,
    rows: Vec<Value>,
}

impl Cases {
    #[allow(clippy::too_many_arguments)] // a case's parameters
    fn add(
        &mut self,
        batch: usize,
        [m, n]: [usize; 2],
        [heads_q, heads_kv]: [usize; 2],
        d: usize,
        mask: &Mask,
        what: &str,
        deterministic: bool,
    ) -> Result<(), Failure> {
        let p = AttentionProblem {
            heads_kv,
            seqlen_k: n,
            mask: mask.clone(),
            ..AttentionProblem::new(batch, m, heads_q, d, DType::Bf16)
        };
        let [q, k, v, o] = [p.q_shape(), p.k_shape(), p.v_shape(), p.o_shape()].map(contiguous_strides);
        let strides = GradStrides { forward: Strides { q, k, v, o }, d_o: o, dq: q, dk: k, dv: v };
        let plan = BackwardPlan::new(&p, &strides, false, deterministic)?;
        let count = self.kernels.len();
        let kernel = *self.kernels.entry(plan.config.clone()).or_insert(count);
        self.rows.push(json!({
            "what": what, "batch": batch, "m": m, "n": n, "heads": heads_q, "heads_kv": heads_kv, "d": d,
            "causal": !matches!(mask, Mask::Full), "deterministic": deterministic, "kernel": kernel,
            "arguments": plan.arguments.iter().map(argument).collect::<Vec<_>>(),
            "workspace": plan.workspace.iter().map(|&(t, bytes)| (name(t), bytes)).collect::<Vec<_>>(),
            "query_blocks": plan.query_blocks, "items": plan.items, "query_items": plan.query_items,
        }));
        Ok(())
    }

    fn finish(self) -> Result<(), Failure> {
        let mut configs: Vec<_> = self.kernels.into_iter().collect();
        configs.sort_by_key(|&(_, index)| index);
        let mut kernels = Vec::new();
        for (config, index) in configs {
            let parts = [
                flash_bwd_sm90_preprocess(&config),
                flash_bwd_sm90(&config),
                flash_bwd_sm90_queries(&config),
            ];
            let mut files = Vec::new();
            for (kernel, part) in parts.iter().zip(["pre", "main", "post"]) {
                ptx::verify(kernel)?;
                if self.folder == "report" {
                    let report = ptx::assemble(kernel)?;
                    println!("{}, dQ by itself {}: {report:?}", kernel.name, config.own_dq);
                    continue;
                }
                let file = format!("bwd{index}_{part}.ptx");
                std::fs::write(Path::new(&self.folder).join(&file), ptx::emit(kernel))?;
                files.push(json!({ "file": file, "name": kernel.name, "shared": kernel.shared_bytes, "threads": kernel.threads() }));
            }
            kernels.push(files);
        }
        if self.folder != "report" {
            let all = json!({ "kernels": kernels, "cases": self.rows });
            std::fs::write(Path::new(&self.folder).join("bwd.json"), serde_json::to_string(&all)?)?;
        }
        Ok(())
    }
}

fn name(tensor: GradTensor) -> String {
    format!("{tensor:?}")
}

fn argument(argument: &Argument<GradTensor>) -> Value {
    match argument {
        Argument::U32(x) => json!(["u32", x]),
        Argument::S32(x) => json!(["s32", x]),
        Argument::F32(x) => json!(["f32", x]),
        Argument::U64(x) => json!(["u64", x]),
        Argument::Address(tensor) => json!(["address", name(*tensor)]),
        Argument::TensorMap(map, tensor) => {
            json!(["map", name(*tensor), map.shape, map.strides, map.tile])
        }
    }
}
