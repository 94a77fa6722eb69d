#!/usr/bin/env python3
"""Bytes that cross the GPU's memory interface, by its own counters (Nsight Compute), beside the IO model: our forward kernel and
standard attention (torch: S and P in memory). The modern counterpart of the paper's Fig. 2, left.

    cargo build --release
    python3 benches/peers/ncu.py --flashattn target/release/flashattn --out ncu.json --markdown ncu.md
    python3 benches/peers/ncu.py --shapes '64,1,1024;128,0,4096' --standard-max 2048

A shape is D,CAUSAL,N with batch · N = 16384 and heads · D = 2048, bf16. ncu empties the caches before each kernel and locks the
clock, so times here are not those of `bench`. Ours is one launch of `flashattn bench --device cuda`, standard attention all
kernels of one forward pass, up to `--standard-max` tokens. The model is `flashattn io --device h100` with the kernel's own tile:
`model_bytes` all that multiprocessors ask for, `model_slow_bytes` what L2 cannot serve. Counters need permission
(ERR_NVGPUCTRPERM: root, or NVreg_RestrictProfilingToAdminUsers=0).
"""
import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile

NCU = "/usr/local/cuda/bin/ncu"
METRICS = {"dram_read": "dram__bytes_read.sum", "dram_written": "dram__bytes_write.sum", "l2": "lts__t_bytes.sum",
           "ns": "gpu__time_duration.sum"}


def standard(b, h, n, d, causal):
    """One forward pass, between the profiler's marks; after one that is not looked at."""
    import math
    import torch
    q, k, v = (torch.randn(b, h, n, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    hidden = torch.ones(n, n, device="cuda", dtype=torch.bool).triu_(1) if causal else None

    def attend():
        scores = q @ k.transpose(-1, -2)
        scores *= 1 / math.sqrt(d)
        if hidden is not None:
            scores.masked_fill_(hidden, float("-inf"))
        return scores.softmax(-1) @ v

    attend()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    attend()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def count(ncu, options, command):
    """The metrics, added up over the profiled kernels, and how many those were."""
    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, "ncu.csv")
        line = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", log,
                "--metrics", ",".join(METRICS.values())] + options + command
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        text = open(log, encoding="utf-8").read() if os.path.exists(log) else ""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if done.returncode or len(lines) < 3:
        sys.exit(f"ncu failed ({done.returncode}): {' '.join(line)}\n{text[-2000:]}\n{done.stderr[-2000:]}")
    rows = list(csv.DictReader(lines))[1:]  # below the header stand the units
    number = lambda text: float(text.replace(",", ""))
    return {name: sum(number(row[metric]) for row in rows) for name, metric in METRICS.items()} | {"kernels": len(rows)}


def ask(flashattn, *words):
    done = subprocess.run([flashattn, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flashattn", default="target/release/flashattn")
    parser.add_argument("--ncu", default=NCU if os.path.exists(NCU) else "ncu")
    parser.add_argument("--shapes", default="64,1,1024;64,1,4096;64,1,16384;128,0,1024;128,0,4096;128,1,4096;128,1,16384;256,1,4096")
    parser.add_argument("--standard-max", type=int, default=4096, help="longest sequence of standard attention")
    parser.add_argument("--out", default="ncu.json")
    parser.add_argument("--markdown")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        b, h, n, d, causal = (int(x) for x in args.worker.split(","))
        return standard(b, h, n, d, bool(causal))
    rows = []
    for shape in args.shapes.split(";"):
        d, causal, n = (int(x) for x in shape.split(","))
        b, h = max(1, 16384 // n), max(1, 2048 // d)
        sizes = ["--seqlen", str(n), "--head-dim", str(d), "--heads", str(h), "--batch", str(b)] + ["--causal"] * causal
        schedule = ask(args.flashattn, "ptx", *sizes, "--json")["schedule"]
        tile = f"{schedule['tile_m']},{schedule['tile_n']}"
        model = ask(args.flashattn, "io", "--device", "h100", "--pass", "forward", *sizes, "--tile", tile, "--json")["rows"]
        model = {row["algorithm"]: row for row in model}
        bench = [args.flashattn, "bench", "--device", "cuda", "--shapes", shape, "--json"]
        jobs = [("flash", ["--kernel-name", "regex:flash_fwd", "--launch-count", "1"], bench)]
        if n <= args.standard_max:
            worker = [sys.executable, os.path.abspath(__file__), "--worker", f"{b},{h},{n},{d},{causal}"]
            jobs.append(("standard", ["--profile-from-start", "off"], worker))
        for algorithm, options, command in jobs:
            counted = count(args.ncu, options, command)
            dram = counted["dram_read"] + counted["dram_written"]
            said = model[algorithm]
            rows.append({"algorithm": algorithm, "batch": b, "heads": h, "seqlen": n, "head_dim": d, "causal": bool(causal),
                         "tile": tile, "dram_bytes": dram, **counted, "model_bytes": said["bytes"],
                         "model_slow_bytes": said["slow_bytes"], "ratio": dram / said["slow_bytes"]})
            print(f"{algorithm:8} d={d:3} causal={causal} n={n:5}: DRAM {dram / 1e6:.0f} MB (model {said['slow_bytes'] / 1e6:.0f}), "
                  f"L2 {counted['l2'] / 1e6:.0f} MB (model {said['bytes'] / 1e6:.0f})", file=sys.stderr, flush=True)
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=0)
    if args.markdown:
        with open(args.markdown, "w", encoding="utf-8") as file:
            file.write("| | shape | DRAM, counted | model | ratio | L2, counted | model |\n|---|---|---|---|---|---|---|\n")
            for row in rows:
                mask = "causal" if row["causal"] else "full"
                shape = f"{row['batch']}×{row['heads']}, {row['seqlen']}, d {row['head_dim']}, {mask}"
                mb = lambda name: f"{row[name] / 1e6:.0f} MB"
                file.write(f"| {row['algorithm']} | {shape} | {mb('dram_bytes')} | {mb('model_slow_bytes')} | {row['ratio']:.2f} "
                           f"| {mb('l2')} | {mb('model_bytes')} |\n")


if __name__ == "__main__":
    main()
