#!/usr/bin/env python3
"""What calling from Python costs: import time, first call, time per call of a problem with next to no work, and on a
GPU the speed through PyTorch, beside PyTorch's SDPA and whatever flash_attn is installed.

    python benches/peers/python.py [--device cuda] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import flashattn


def sdpa(q, k, v, causal=False):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def ours(q, k, v, causal=False):
    return flashattn.flash_attn_func(q, k, v, causal=causal)


def peers():
    found = {"flashattn": ours, "torch SDPA": sdpa}
    for name, module in (("flash_attn 4", "flash_attn.cute"), ("flash_attn 2", "flash_attn")):
        try:
            function = __import__(module, fromlist=["flash_attn_func"]).flash_attn_func
        except ImportError as error:
            print(f"{name}: not installed ({error})", file=sys.stderr)
            continue

        def call(q, k, v, causal=False, function=function):
            o = function(q, k, v, causal=causal)
            return o[0] if isinstance(o, tuple) else o

        found[name] = call
    return found


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def fresh_process(code, runs=5):
    """Median of what the code prints, in seconds."""
    out = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(runs)]
    return statistics.median(float(x.stdout) for x in out)


def startup(device):
    clock = "import time; t = time.perf_counter(); "
    # After PyTorch, whose own import takes seconds; and the first call after both.
    code = f"""
import time, torch, torch.library, torch.utils.dlpack
q = torch.randn(1, 512, 8, 64, dtype=torch.bfloat16, device="{device}")
torch.nn.functional.relu(q).sum().item()
t = time.perf_counter()
import flashattn
flashattn.flash_attn_func(q, q, q, causal=True).sum().item()
print(time.perf_counter() - t)
"""
    return {
        "import_s": fresh_process(clock + "import flashattn; print(time.perf_counter() - t)"),
        "import_and_first_torch_call_s": fresh_process(code),
        "native_library_bytes": Path(flashattn._native.__file__).stat().st_size,
    }


def per_call(function, device, grad):
    """Microseconds of a call with 16 tokens: the best of twenty rounds. On a GPU calls are queued, not awaited."""
    q, k, v = (torch.randn(1, 16, 2, 64, dtype=torch.bfloat16, device=device, requires_grad=grad) for _ in range(3))
    d_o = torch.randn_like(q)

    def call():
        o = function(q, k, v)
        if grad:
            torch.autograd.grad(o, (q, k, v), d_o)

    times = []
    for _ in range(20):
        sync(device)
        start = time.perf_counter()
        for _ in range(100):
            call()
        times.append((time.perf_counter() - start) / 100)
    return min(times) * 1e6


def tflops(function, n, d, causal, backward):
    """Median TFLOP/s on a GPU at batch · n = 16384, heads · d = 2048, through autograd."""
    heads = 2048 // d
    q, k, v = (torch.randn(16384 // n, n, heads, d, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3))
    o = function(q, k, v, causal=causal)
    d_o = torch.randn_like(o)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(20)]
    for start, stop in events:
        start.record()
        if backward:
            torch.autograd.grad(o, (q, k, v), d_o, retain_graph=True)
        else:
            with torch.no_grad():
                function(q, k, v, causal=causal)
        stop.record()
    torch.cuda.synchronize()
    seconds = statistics.median(start.elapsed_time(stop) for start, stop in events[5:]) / 1e3
    work = 4 * 16384 * n * 2048 * (0.5 if causal else 1) * (2.5 if backward else 1)
    return work / seconds / 1e12


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = {"torch": torch.__version__, "device": args.device, **startup(args.device), "per_call_us": {}, "tflops": []}
    for name, function in peers().items():
        try:
            times = {mode: per_call(function, args.device, mode != "forward") for mode in ("forward", "forward+backward")}
        except Exception as error:  # another library's reason; ours must not have any
            if name == "flashattn":
                raise
            print(f"{name}: {error}", file=sys.stderr)
            continue
        result["per_call_us"][name] = times
        if args.device == "cuda":
            for n in (1024, 4096, 16384):
                for d in (64, 128):
                    for causal in (False, True):
                        row = {"peer": name, "n": n, "d": d, "causal": causal}
                        row |= {p: tflops(function, n, d, causal, p == "backward") for p in ("forward", "backward")}
                        result["tflops"].append(row)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
