#!/usr/bin/env python3
"""What calling from Python costs: import time, wheel size, first call, host time per call of a problem with next to no work;
and on a GPU both passes through PyTorch beside the same kernels by themselves. Peers: PyTorch's SDPA, and flash-attn 4 and 2
where they are installed.

    python benches/peers/python.py [--device cuda] [--lengths 1024,4096,16384] [--out FILE]

A table goes to standard output, and all numbers as JSON to FILE.
"""

import argparse
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.dlpack import to_dlpack

import flashattn
from flashattn import _native


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
        except Exception as error:  # whatever another package's import may raise
            print(f"{name}: not there ({error})", file=sys.stderr)
            continue

        def call(q, k, v, causal=False, function=function):
            o = function(q, k, v, causal=causal)
            return o[0] if isinstance(o, tuple) else o

        found[name] = call
    return found


def native(q, k, v, d_o):
    """Our two passes without PyTorch's dispatcher and autograd: the native part on tensors that are there already."""
    o, lse = torch.empty_like(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    place = {}
    if q.is_cuda:
        place["stream"] = torch.cuda.current_stream().cuda_stream
        place["allocate"] = lambda n: to_dlpack(torch.empty(n, dtype=torch.uint8, device=q.device))

    def forward():
        _native.forward("{}", *map(to_dlpack, (q, k, v)), [], to_dlpack(o), to_dlpack(lse), **place)

    def both():
        forward()
        read = map(to_dlpack, (o, lse, d_o))
        _native.backward("{}", *map(to_dlpack, (q, k, v)), [], *read, None, *map(to_dlpack, gradients), [], **place)

    return {"forward": forward, "forward+backward": both}


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def fresh_process(code, runs, **environment):
    """Seconds that the code prints, at the last line, in processes of its own."""
    env = os.environ | environment
    run = [sys.executable, "-c", code]
    out = [subprocess.run(run, check=True, capture_output=True, text=True, env=env).stdout for _ in range(runs)]
    return [float(x.split()[-1]) for x in out]


def wheel_bytes():
    """The package's files, compressed as a wheel is."""
    folder, memory = Path(flashattn.__file__).parent, io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                archive.write(file, file.relative_to(folder.parent))
    return memory.tell()


def startup(device):
    clock = "import time; t = time.perf_counter(); "
    # After PyTorch, whose own import takes seconds; and the first calls after both, each with its gradients.
    first = f"""
import time, torch, torch.library, torch.utils.dlpack
q = torch.randn(1, 512, 8, 64, dtype=torch.bfloat16, device="{device}", requires_grad=True)
torch.nn.functional.relu(q).sum().backward()
q.grad.sum().item()
t = time.perf_counter()
import flashattn
%s
print(time.perf_counter() - t)
"""
    forward = first % "flashattn.flash_attn_func(q.detach(), q.detach(), q.detach(), causal=True).sum().item()"
    both = first % "flashattn.flash_attn_func(q, q, q, causal=True).sum().backward(); q.grad.sum().item()"
    result = {
        "import_s": statistics.median(fresh_process(clock + "import flashattn; print(time.perf_counter() - t)", 5)),
        "wheel_bytes": wheel_bytes(),
        "native_library_bytes": Path(_native.__file__).stat().st_size,
    }
    if device == "cpu":
        result["import_and_first_call_s"] = statistics.median(fresh_process(forward, 5))
        result["import_and_first_gradients_s"] = statistics.median(fresh_process(both, 5))
        return result
    # The driver compiles the kernels; it keeps them on disk for the next process, unless told not to.
    result["import_and_first_gradients_s"] = min(fresh_process(both, 2))
    result["import_and_first_call_s"] = fresh_process(forward, 1)[0]
    result["first_gradients_without_drivers_cache_s"] = fresh_process(both, 1, CUDA_CACHE_DISABLE="1")[0]
    return result


def per_call(call, device):
    """Microseconds of a call: the best of twenty rounds. On a GPU calls are queued, not awaited."""
    times = []
    for _ in range(20):
        sync(device)
        start = time.perf_counter()
        for _ in range(100):
            call()
        times.append((time.perf_counter() - start) / 100)
    sync(device)
    return min(times) * 1e6


def overhead(function, device):
    """Of 16 tokens, where there is next to nothing to compute."""
    args = [torch.randn(1, 16, 2, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3)]
    plain = [x.detach() for x in args]
    d_o = torch.randn_like(plain[0])
    if function is None:
        return {name: per_call(call, device) for name, call in native(*plain, d_o).items()}
    return {
        "forward": per_call(lambda: function(*plain), device),
        "forward+backward": per_call(lambda: torch.autograd.grad(function(*args), args, d_o), device),
    }


def median_s(call, rounds=20):
    """Seconds on the GPU between the marks around a call, in the median."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events[rounds // 4 :]) / 1e3


def tensors(n, d):
    """Of batch · n = 16384, heads · d = 2048, as FlashAttention-3 reports."""
    shape = (max(16384 // n, 1), n, 2048 // d, d)
    return [torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)]


def flops(q, causal, backward):
    batch, n, heads, d = q.shape
    return 4 * batch * n * n * heads * d * (0.5 if causal else 1) * (2.5 if backward else 1)


def through_torch(function, n, d, causal):
    """TFLOP/s of each pass as a program has it: the call; autograd's backward."""
    args = tensors(n, d)
    o = function(*args, causal=causal)
    d_o = torch.randn_like(o)
    with torch.no_grad():
        forward = median_s(lambda: function(*args, causal=causal))
    backward = median_s(lambda: torch.autograd.grad(o, args, d_o, retain_graph=True))
    seconds = {"forward": forward, "backward": backward}
    return {name: flops(args[0], causal, name == "backward") / s / 1e12 for name, s in seconds.items()}


def kernels_alone(n, d, causal):
    """TFLOP/s of our kernels, from a CUDA graph of ten launches: neither Python nor a launch is between them."""
    q, k, v = (x.detach() for x in tensors(n, d))
    text = json.dumps({"causal": causal, "tables": [], "varlen": False, "sinks": False})
    forward = functools.partial(torch.ops.flashattn.forward, q, k, v, [], text, n, n)
    o, lse = forward()
    backward = functools.partial(
        torch.ops.flashattn.backward, torch.randn_like(o), None, q, k, v, o, lse, [], text, n, n
    )
    result = {}
    for name, call in (("forward", forward), ("backward", backward)):
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                call()
        graph.replay()
        result[name] = flops(q, causal, name == "backward") / (median_s(graph.replay, 8) / 10) / 1e12
        del graph
    return result


def guarded(name, call):
    """None, and the reason on standard error, where another library cannot; ours must not have any reason."""
    try:
        return call()
    except Exception as error:
        if name == "flashattn":
            raise
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def table(header, rows):
    print("\n| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--lengths", default="1024,4096,16384", help="of the speeds on a GPU")
    parser.add_argument("--out", "--json", type=Path, help="JSON file")
    args = parser.parse_args()
    result = {"torch": torch.__version__, "flashattn": flashattn.__version__, "device": args.device}
    if args.device == "cuda":
        result["gpu"] = torch.cuda.get_device_name()

    def save():  # after each part, so that what was measured stays if time runs out
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")

    result |= startup(args.device)
    save()
    unit = {"s": (1e3, "ms"), "bytes": (1e-6, "MB")}
    rows = []
    for name, value in result.items():
        what, _, kind = name.rpartition("_")
        if kind in unit:
            rows.append((what.replace("_", " "), f"{value * unit[kind][0]:.3g} {unit[kind][1]}"))
    table(["", args.device], rows)

    functions = peers()
    result["per_call_us"] = {}
    for name, function in [*functions.items(), ("flashattn, native part alone", None)]:
        times = guarded(name, lambda function=function: overhead(function, args.device))
        if times:
            result["per_call_us"][name] = times
    save()
    table(
        ["host time per call, µs", "forward", "forward + backward"],
        [(name, *times.values()) for name, times in result["per_call_us"].items()],
    )

    if args.device == "cuda":
        result["tflops"] = []
        for n in map(int, args.lengths.split(",")):
            for d in (64, 128):
                for causal in (False, True):
                    row = {"n": n, "d": d, "causal": causal, "kernels alone": kernels_alone(n, d, causal)}
                    for name, function in functions.items():
                        row[name] = guarded(name, functools.partial(through_torch, function, n, d, causal))
                    result["tflops"].append(row)
                    save()
        for direction in ("forward", "backward"):
            names = ["kernels alone", *functions]
            rows = []
            for row in result["tflops"]:
                shape = f"{row['n']}, d {row['d']}, {'causal' if row['causal'] else 'full'}"
                rows.append((shape, *(f"{row[x][direction]:.0f}" if row[x] else "–" for x in names)))
            table([f"{direction}, TFLOP/s", "flashattn, kernels alone", *functions], rows)


if __name__ == "__main__":
    main()
