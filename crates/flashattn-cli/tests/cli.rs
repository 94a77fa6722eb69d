//! The binary as people and programs use it: every subcommand on small input, and on bad input.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use assert_cmd::Command;
use flashattn_spec::mask::Mask;
use flashattn_spec::{AttentionProblem, DType, Inputs, View, reference};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn flashattn(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flashattn"));
    command.args(line.split_whitespace());
    command
}

fn json_of(line: &str) -> Value {
    let output = flashattn(line).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Runs what must fail; its message.
fn refused(line: &str) -> String {
    let output = flashattn(line).output().unwrap();
    assert!(!output.status.success(), "{line} should fail");
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.starts_with("error: ") && !message.contains("panicked"), "{message}");
    message
}

/// Numbers that no tensor shares.
fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1000.0 - 1.0).collect()
}

fn save(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)], metadata: &[(&str, &str)]) {
    let views = tensors
        .iter()
        .map(|(name, t, shape, data)| (*name, TensorView::new(*t, shape.clone(), data).unwrap()));
    let metadata: HashMap<String, String> =
        metadata.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    std::fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

fn f32s(name: &'static str, shape: &[usize], seed: usize) -> (&'static str, Dtype, Vec<usize>, Vec<u8>) {
    let data = numbers(shape.iter().product(), seed).iter().flat_map(|x| x.to_le_bytes()).collect();
    (name, Dtype::F32, shape.to_vec(), data)
}

fn load(path: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let t = file.tensor(name).unwrap();
    assert_eq!(t.dtype(), Dtype::F32);
    let floats = t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    (t.shape().to_vec(), floats)
}

const Q: [usize; 4] = [2, 17, 6, 24];
const K: [usize; 4] = [2, 31, 2, 24];
const V: [usize; 4] = [2, 31, 2, 40];
const O: [usize; 4] = [2, 17, 6, 40];

/// A folder with in.safetensors, and the problem in it.
fn example() -> (TempDir, PathBuf, AttentionProblem) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("in.safetensors");
    let tensors = [f32s("q", &Q, 1), f32s("k", &K, 2), f32s("v", &V, 3), f32s("do", &O, 4)];
    save(&path, &tensors, &[("causal", "true"), ("softmax_scale", "0.25")]);
    let mut p = AttentionProblem::new(2, 17, 6, 24, DType::F32);
    (p.seqlen_k, p.heads_kv, p.head_dim_v, p.mask) = (31, 2, 40, Mask::Causal);
    p.softmax_scale = Some(0.25);
    (folder, path, p)
}

fn assert_close(name: &str, got: &[f32], expected: &[f64]) {
    assert_eq!(got.len(), expected.len(), "{name}");
    let worst = got.iter().zip(expected).map(|(g, e)| (f64::from(*g) - e).abs()).fold(0.0, f64::max);
    assert!(worst < 1e-5, "{name} differs by {worst}");
}

#[test]
fn run_gives_the_oracles_results() {
    let (folder, path, p) = example();
    let out = folder.path().join("out.safetensors");
    let [q, k, v, d_o] =
        [(Q, 1), (K, 2), (V, 3), (O, 4)].map(|(shape, seed)| (shape, numbers(shape.iter().product(), seed)));
    let view = |x: &'_ ([usize; 4], Vec<f32>)| (x.1.clone(), x.0);
    let (q, k, v, d_o) = (view(&q), view(&k), view(&v), view(&d_o));
    let inputs = Inputs {
        q: View::new(&q.0, q.1).unwrap(),
        k: View::new(&k.0, k.1).unwrap(),
        v: View::new(&v.0, v.1).unwrap(),
        sinks: None,
    };
    let check = |p: &AttentionProblem, backward: bool| {
        let exact = reference::forward(p, &inputs).unwrap();
        let (shape, o) = load(&out, "o");
        assert_eq!(shape, O);
        assert_close("o", &o, &exact.o);
        assert_close("lse", &load(&out, "lse").1, &exact.lse);
        if backward {
            let exact = reference::backward(p, &inputs, View::new(&d_o.0, d_o.1).unwrap(), None).unwrap();
            for (name, expected) in [("dq", &exact.dq), ("dk", &exact.dk), ("dv", &exact.dv)] {
                assert_close(name, &load(&out, name).1, expected);
            }
        }
    };
    let (path, to) = (path.display(), out.display());
    flashattn(&format!("run {path} -o {to}")).assert().success();
    check(&p, false);
    flashattn(&format!("run {path} -o {to} --pass bwd --threads 1")).assert().success();
    check(&p, true);
    // Options go before what the file says.
    let other = AttentionProblem {
        mask: Mask::Local { left: Some(5), right: None },
        softmax_scale: Some(-0.5),
        score_mod: flashattn_spec::score_mod::ScoreMod::softcap(2.0),
        ..p
    };
    flashattn(&format!("run {path} -o {to} --no-causal --window 5,-1 --softcap 2 --scale -0.5 --pass bwd"))
        .assert()
        .success();
    check(&other, true);
}

#[test]
fn run_takes_and_gives_npy() {
    let (folder, path, _) = example();
    let at = |name: &str| folder.path().join(name).display().to_string();
    for (name, shape, seed) in [("q", Q, 1), ("k", K, 2), ("v", V, 3)] {
        let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {:?}, }}\n", shape)
            .replace('[', "(")
            .replace(']', ")");
        let data: Vec<u8> = f32s(name, &shape, seed).3;
        let bytes =
            [b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes(), &data]
                .concat();
        std::fs::write(at(&format!("{name}.npy")), bytes).unwrap();
    }
    let npy = format!("run --q {} --k {} --v {}", at("q.npy"), at("k.npy"), at("v.npy"));
    flashattn(&format!("{npy} -o {} --causal --scale 0.25", at("made"))).assert().success();
    flashattn(&format!("run {} -o {}", path.display(), at("out.safetensors"))).assert().success();
    let bytes = std::fs::read(at("made/o.npy")).unwrap();
    let (_, o) = load(&folder.path().join("out.safetensors"), "o");
    let data: Vec<u8> = o.iter().flat_map(|x| x.to_le_bytes()).collect();
    assert!(bytes.starts_with(b"\x93NUMPY") && bytes.ends_with(&data), "the same as from safetensors");
    assert!(Path::new(&at("made/lse.npy")).exists());

    let whole = std::fs::read(at("k.npy")).unwrap();
    std::fs::write(at("k.npy"), &whole[..whole.len() - 1]).unwrap();
    let message = refused(&format!("{npy} -o {}", at("none")));
    assert!(
        message.contains("k.npy: has 11903 bytes of data, expected those of shape [2, 31, 2, 24]"),
        "{message}"
    );
    assert!(!Path::new(&at("none")).exists());
}

#[test]
fn run_refuses_bad_files_and_writes_nothing() {
    let (folder, path, _) = example();
    let (bad, out) = (folder.path().join("bad.safetensors"), folder.path().join("out.safetensors"));
    let line = |options: &str| format!("run {} -o {} {options}", bad.display(), out.display());
    let whole = std::fs::read(&path).unwrap();
    for cut in [0, 7, 8, 100, 1000, whole.len() - 1] {
        std::fs::write(&bad, &whole[..cut]).unwrap();
        assert!(refused(&line("")).contains("bad.safetensors"), "{cut} bytes");
    }
    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&bad, huge).unwrap();
    refused(&line(""));

    let halves = ("k", Dtype::F16, K.to_vec(), vec![0; K.iter().product::<usize>() * 2]);
    let offsets = |name: &'static str, x: &[i32]| {
        (name, Dtype::I32, vec![x.len()], x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
    };
    let [q, k, v] = [f32s("q", &Q, 1), f32s("k", &K, 2), f32s("v", &V, 3)];
    let packed =
        [f32s("q", &[1, 34, 6, 24], 1), f32s("k", &[1, 62, 2, 24], 2), f32s("v", &[1, 62, 2, 40], 3)];
    let [pq, pk, pv] = packed;
    for (tensors, options, text) in [
        (vec![q.clone(), k.clone()], "", "there is no tensor \"v\", only k, q"),
        (vec![q.clone(), halves, v.clone()], "", "k: has dtype f16, expected f32"),
        (
            vec![q.clone(), f32s("k", &[2, 30, 2, 24], 2), v.clone()],
            "",
            "k has shape [2, 30, 2, 24], expected",
        ),
        (
            vec![f32s("q", &[2, 17, 5, 24], 1), k.clone(), v.clone()],
            "",
            "heads_q = 5 is not a multiple of heads_kv = 2",
        ),
        (
            vec![f32s("q", &[17, 6, 24], 1), k.clone(), v.clone()],
            "",
            "q: has shape [17, 6, 24], expected 4 dimensions",
        ),
        (
            vec![q.clone(), k.clone(), v.clone()],
            "--pass bwd",
            "--pass bwd needs the gradient of o: there is no tensor \"do\"",
        ),
        (vec![q.clone(), k.clone(), v.clone()], "--scale nan", "softmax_scale is NaN"),
        (vec![q.clone(), k.clone(), v.clone()], "--softcap -1", "softcap is -1"),
        (vec![q.clone(), k.clone(), v.clone()], "--dropout 1.5", "dropout probability is 1.5"),
        (vec![q.clone(), k.clone(), v.clone()], "--window 3", "--window has 1 numbers, expected two"),
        (
            vec![q.clone(), k.clone(), v.clone(), f32s("sinks", &[5], 1)],
            "",
            "sinks has shape [5], expected [6]",
        ),
        (
            vec![q, k, v, offsets("cu_seqlens_q", &[0, 17])],
            "",
            "one of cu_seqlens_q and cu_seqlens_k is missing",
        ),
        (
            vec![
                pq.clone(),
                pk.clone(),
                pv.clone(),
                offsets("cu_seqlens_q", &[0, 34]),
                offsets("cu_seqlens_k", &[0, 63]),
            ],
            "",
            "k has shape [1, 62, 2, 24], expected [1, 63, 2, 24]",
        ),
        (
            vec![
                pq,
                pk,
                pv,
                offsets("cu_seqlens_q", &[0, 20, 10, 34]),
                offsets("cu_seqlens_k", &[0, 1, 2, 62]),
            ],
            "",
            "cu_seqlens_q: decreases from 20 to 10",
        ),
    ] {
        save(&bad, &tensors, &[]);
        let message = refused(&line(options));
        assert!(message.contains(text), "{message}");
    }
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "only the inputs: {left:?}");
    assert!(
        refused(&format!("run {} -o x --colour", path.display())).contains("unexpected argument '--colour'")
    );
}

#[test]
fn check_reports_and_its_status_says_whether_all_passed() {
    let report = json_of("check --filter mask/window --random 3 --seed 9 --json");
    let cases = report["cases"].as_u64().unwrap();
    assert!(
        cases > 0 && report["passed"] == cases && report["failed"] == 0 && report["skipped"] == 0,
        "{report}"
    );
    assert!(report["device"].as_str().unwrap().starts_with("cpu") && report["failures"] == json!([]));
    assert_eq!(json_of("check --filter random/9 --random 3 --seed 9 --threads 1 --json")["cases"], 3);
    for form in ["", " --json", " --random 2"] {
        let output = flashattn(&format!("check --filter nonesuch{form}")).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && output.stdout.is_empty(), "no report of 0 cases: {message}");
        assert!(message.contains("--filter \"nonesuch\": none of "), "{message}");
    }
    assert!(refused("check --device gpu").contains("expected cpu, cuda or cuda:N"));
    assert!(refused("check --device cuda --isa scalar").contains("--isa scalar is for --device cpu"));
    assert!(refused("check --device cuda:999").contains("cuda:999: "), "no driver, or no such GPU");
    assert!(refused("check --isa sse").contains("possible values: scalar, neon, avx2"));
    let foreign = if cfg!(target_arch = "x86_64") { "neon" } else { "amx" };
    assert!(refused(&format!("check --isa {foreign}")).contains("this CPU has"));
}

/// What GPUs do not take is refused by name whether there is one or not; kernels can be looked at without one.
#[test]
fn gpus_refuse_by_name_and_their_kernels_are_shown() {
    let (folder, path, _) = example();
    let out = folder.path().join("out.safetensors");
    let message = refused(&format!("run {} -o {} --device cuda", path.display(), out.display()));
    assert!(message.contains("f32 (expected bf16 or f16) is not supported on cuda:0") && !out.exists());
    assert!(refused("bench --device cuda:999 --pass bwd --shapes 64,1,512").contains("cuda:999: "));
    let line = "ptx --pass bwd --causal --seqlen 2000 --head-dim 128 --heads 4 --json";
    let report = json_of(line);
    assert!(report["kernel"].as_str().is_some_and(|name| name.starts_with("flash_bwd_sm90_bf16_128")));
    // dq in f32 and two numbers for each row of queries, in tiles of 64; the numbers alone where dq is not added up.
    assert_eq!(report["workspace_bytes"], 4 * 2048 * (128 + 2) * 4);
    let report = json_of(&format!("{line} --deterministic"));
    assert_eq!(report["workspace_bytes"], 4 * 2048 * 2 * 4);
    assert!(refused("ptx --pass fwd_bwd").contains("one of fwd and bwd"));
    let report = json_of("ptx --causal --seqlen 1000 --head-dim 64 --heads 4 --kv-heads 2 --batch 3 --json");
    assert_eq!(report["kernel"], "flash_fwd_sm90_bf16_64_64_causal");
    let schedule = |name: &str| report["schedule"][name].as_u64().unwrap();
    let (m, n) = (1000u64.div_ceil(schedule("tile_m")), 1000u64.div_ceil(schedule("tile_n")));
    assert_eq!(schedule("skipped") + schedule("full") + schedule("partial"), 12 * m * n);
    assert!(
        schedule("tiles") == 12 * m
            && schedule("skipped") > 0
            && report["shared_bytes"].as_u64() > Some(1 << 15)
    );
    assert_eq!(report["staged"], json!([]));
    // Heads that share a tile share its blocks: 40 queries of 4 heads are two tiles for each KV head.
    let line = "ptx --seqlen-q 40 --seqlen 1000 --head-dim 64 --heads 8 --kv-heads 2 --json";
    let schedule = json_of(line)["schedule"].clone();
    assert_eq!(schedule["heads"], 4);
    let tiles = 2 * (40 * 4u64).div_ceil(schedule["tile_m"].as_u64().unwrap());
    let blocks = tiles * 1000u64.div_ceil(schedule["tile_n"].as_u64().unwrap());
    let counted = ["skipped", "full", "partial"].map(|name| schedule[name].as_u64().unwrap());
    assert_eq!((schedule["tiles"].as_u64(), counted.iter().sum::<u64>()), (Some(tiles), blocks));
    let report = json_of("ptx --head-dim 36 --softcap 5 --document 100 --json");
    assert_eq!(report["staged"], json!(["q", "k", "v"]));
    assert_eq!(report["uploads"].as_array().unwrap().len(), 3, "two lists and the documents' ids");
    let kernel = folder.path().join("kernel.ptx");
    flashattn(&format!("ptx --dtype f16 -o {}", kernel.display())).assert().success();
    assert!(std::fs::read_to_string(kernel).unwrap().contains(".entry flash_fwd_sm90_f16_128_128_full"));
    assert!(refused("ptx --head-dim 300").contains("at most 256 each"));
}

#[test]
fn bench_gives_rows_like_the_peers() {
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("bench.svg");
    let line = "bench --seqlen 64,96 --head-dim 32 --heads 4 --kv-heads 2 --dtype f32,bf16 --pass fwd,bwd \
                --rounds 2 --turn-ms 1 --json --plot";
    let rows = json_of(&format!("{line} {}", picture.display()));
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 2 * 2 * 2 * 2);
    for key in [
        "peer", "pass", "dtype", "causal", "batch", "heads", "kv_heads", "seqlen", "head_dim", "ms", "tflops",
    ] {
        assert!(rows.iter().all(|r| !r[key].is_null()), "{key}");
    }
    for key in ["ms", "tflops", "cpu_ms", "wall_ms", "ceiling", "share"] {
        assert!(rows.iter().all(|r| r[key].as_f64().unwrap() > 0.0), "{key}");
    }
    assert!(
        rows.iter().all(|r| r["extra_bytes"].as_u64().unwrap() > 0 && r["error"].as_f64().unwrap() < 0.04)
    );
    assert!(std::fs::read_to_string(&picture).unwrap().contains("bf16 bwd, d 32, causal"));
    assert!(refused("bench --seqlen 0").contains("there is nothing to time"));
    assert!(
        refused("bench --heads 6 --kv-heads 4").contains("heads_q = 6 is not a multiple of heads_kv = 4")
    );
    assert!(refused("bench --grid cpu --heads 4").contains("cannot be used with"));
}

#[test]
fn bench_serves_requests() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    // Memory order [batch, heads, seqlen, head_dim].
    let shape = [1, 3, 20, 16];
    save(
        &path,
        &[f32s("q", &shape, 1), f32s("k", &shape, 2), f32s("v", &shape, 3), f32s("do", &shape, 4)],
        &[],
    );
    let request = |pass: &str, iters: usize| json!({"inputs": path, "causal": true, "pass": pass, "threads": 1, "iters": iters, "layout": "bhnd", "outputs": out});
    let lines =
        format!("{}\nnonsense\n{}\n{}\n", request("fwd_bwd", 3), request("bwd", 0), request("fwd", 1));
    let output = flashattn("bench --serve").write_stdin(lines).output().unwrap();
    assert!(output.status.success());
    let answers: Vec<Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(answers[0]["cpu_ms"].as_array().unwrap().len(), 3);
    assert_eq!(answers[0]["wall_ms"].as_array().unwrap().len(), 3);
    assert!(answers[0]["extra_bytes"].as_u64().unwrap() > 0);
    assert!(answers[1]["error"].as_str().unwrap().starts_with("request:"));
    assert!(answers[2]["error"].as_str().unwrap().contains("iters is 0"));
    assert_eq!((answers.len(), load(&out, "o").0, load(&out, "lse").0), (4, shape.to_vec(), vec![1, 3, 20]));
    // Row 0 of a causal problem sees key 0 only, so each head's o starts with its v.
    let (o, v) = (load(&out, "o").1, load(&path, "v").1);
    for head in 0..3 {
        assert_eq!(o[head * 20 * 16..][..16], v[head * 20 * 16..][..16]);
    }
}

#[test]
fn demo_is_exact_and_saves_its_picture() {
    let folder = tempfile::tempdir().unwrap();
    let report = json_of(&format!("demo --quick --json --out {}", folder.path().display()));
    let inputs = report["inputs"].as_array().unwrap();
    assert_eq!(inputs.len(), 2);
    for input in inputs {
        assert!(input["name"].is_string() && input["shape"].as_array().unwrap().len() == 4);
        for key in ["o", "lse", "dq", "dk", "dv"] {
            let at = |what: &str| input[what][key].as_f64().unwrap();
            assert!(at("max_error") <= at("allowed_error") && at("standard_error") > 0.0, "{key} of {input}");
        }
        for key in ["flash_fwd", "flash_bwd", "standard_fwd", "standard_bwd"] {
            assert!(
                input["ms"][key].as_f64().unwrap() > 0.0 && input["extra_bytes"][key].as_u64().unwrap() > 0
            );
        }
        let bytes = &input["extra_bytes"];
        assert!(
            bytes["flash_bwd"].as_u64().unwrap() * 4 < bytes["standard_bwd"].as_u64().unwrap(),
            "{bytes}"
        );
    }
    let picture = std::fs::read_to_string(folder.path().join("flashattn-demo.svg")).unwrap();
    assert!(picture.contains("flash, forward") && picture.contains("milliseconds"));
    assert!(refused("demo --out /does/not/exist").contains("is not a folder that exists"));
}
