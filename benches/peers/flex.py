#!/usr/bin/env python3
"""FlexAttention (torch.compile) and materialised standard attention on a GPU, in the regime of `flashattn bench --device cuda`:
fixed random inputs, launches back to back for 150 ms, median of three loops. Run it in the same call as ours.

    python3 benches/peers/flex.py --out flex.json                                     # 8k tokens, each mask and score mod
    python3 benches/peers/flex.py --shapes '128,1,8192' --mods alibi,softcap --dtype f16
    python3 benches/peers/flex.py --standard 8,16,64,1 --out standard.json            # the paper's table: B,H,D,CAUSAL, 512 … 64k
    python3 benches/peers/flex.py --standard 32,12,64,1 --seqlens 1024 --dropout 0.1 --passes bwd   # a training step of GPT-2 small

Ours beside it:

    flashattn bench --device cuda --shapes '64,0,8k;64,1,8k;128,0,8k;128,1,8k' --json            # and with --alibi, --softcap 30,
                                                                                      # --document 1024, --window 1023,0
    flashattn bench --device cuda --batch 8 --heads 16 --head-dim 64 --causal yes --seqlen 512,1k,2k,4k,8k,16k,32k,64k --json

Rows are those of the peers (peer, pass, dtype, causal, batch, heads, seqlen, head_dim, ms, tflops), and `mods` as ours write it;
`peak_mib` is what the pass allocates at most beside its inputs; `ms` is null where memory did not suffice. FLOPs: 4·B·H·N²·D
forward, halved when causal (whatever else is masked), ×2.5 backward, ×3.5 both.
"""
import argparse
import json
import math
import sys

import torch
import torch.nn.functional as F

LOOP_MS = 150
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
SOFTCAP, DOCUMENT, WINDOW = 30.0, 1024, 1023


def cuda_ms(launch):
    """Median milliseconds a launch, back to back, by CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def loop(times):
        start.record()
        for _ in range(times):
            launch()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / times

    loop(2)
    times = max(10, int(LOOP_MS / loop(5)))
    return sorted(loop(times) for _ in range(3))[1]


def measure(launch):
    """Milliseconds, and MiB allocated at most beside what is there; (None, None) if memory does not suffice."""
    try:
        launch()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        launch()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        return cuda_ms(launch), peak
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, None


def row(peer, which, dtype, b, h, n, d, causal, mods, ms, peak):
    flops = 4 * b * h * n * n * d * (0.5 if causal else 1.0) * {"fwd": 1.0, "bwd": 2.5, "fwd_bwd": 3.5}[which]
    tflops = flops / ms / 1e9 if ms else None
    line = {"peer": peer, "pass": which, "dtype": dtype, "causal": causal, "batch": b, "heads": h, "seqlen": n, "head_dim": d,
            "ms": ms, "tflops": tflops, "mods": mods, "peak_mib": peak}
    figure = f"{ms:.3f} ms {tflops:.0f} TFLOP/s {peak:.0f} MiB" if ms else "out of memory"
    print(f"{peer:8} {which} b={b} h={h} d={d:3} causal={int(causal)} n={n:5} {mods or '-':20} {figure}", file=sys.stderr, flush=True)
    return line


def inputs(b, h, n, d, dtype):
    torch.manual_seed(0)
    return [torch.randn(b, h, n, d, device="cuda", dtype=DTYPES[dtype], requires_grad=True) for _ in range(3)]


def slopes(h):
    return torch.exp2(-8.0 * torch.arange(1, h + 1, device="cuda", dtype=torch.float32) / h)


def flex(b, h, n, d, causal, mods, dtype, passes):
    """One shape with one score mod or mask, named as ours name it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    torch._dynamo.reset()
    slope = slopes(h)
    score = {"alibi": lambda s, _b, head, i, j: s - slope[head] * (i - j).abs(),
             "softcap": lambda s, _b, _h, _i, _j: SOFTCAP * torch.tanh(s / SOFTCAP)}.get(mods)
    hidden = {"document": lambda i, j: i // DOCUMENT == j // DOCUMENT,
              "window": lambda i, j: (i - j <= WINDOW) & (j - i <= (0 if causal else WINDOW))}.get(mods)

    def mask(_b, _h, i, j):
        if not causal:
            return hidden(i, j)
        return (i >= j) & hidden(i, j) if hidden else i >= j

    block_mask = create_block_mask(mask, None, None, n, n, device="cuda") if causal or hidden else None
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = inputs(b, h, n, d, dtype)
    name = {"alibi": "alibi", "softcap": f"softcap {SOFTCAP:g}", "document": f"documents of {DOCUMENT}",
            "window": f"window {WINDOW},{0 if causal else WINDOW}"}.get(mods, "")
    run = lambda: compiled(q, k, v, score_mod=score, block_mask=block_mask)
    if "fwd" in passes:
        with torch.no_grad():
            yield row("flex", "fwd", dtype, b, h, n, d, causal, name, *measure(run))
    if "bwd" in passes:
        o = run()
        g = torch.randn_like(o)
        backward = lambda: torch.autograd.grad(o, (q, k, v), g, retain_graph=True)
        yield row("flex", "bwd", dtype, b, h, n, d, causal, name, *measure(backward))


def standard(b, h, n, d, causal, dtype, passes, dropout):
    """S and P in memory, as attention is usually written; and torch's own fused one, for the same row."""
    def attend(q, k, v):
        scores = q @ k.transpose(-1, -2) / math.sqrt(d)
        if causal:
            scores = scores.masked_fill(torch.ones(n, n, device="cuda", dtype=torch.bool).triu_(1), float("-inf"))
        return F.dropout(scores.softmax(-1), dropout) @ v

    def fused(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)

    mods = f"dropout {dropout:g}" if dropout else ""

    for peer, f in (("standard", attend), ("sdpa", fused)):
        q, k, v = inputs(b, h, n, d, dtype)
        if "fwd" in passes:
            with torch.no_grad():
                yield row(peer, "fwd", dtype, b, h, n, d, causal, mods, *measure(lambda: f(q, k, v)))
        if "bwd" in passes:
            def both():
                o = f(q, k, v)
                torch.autograd.grad(o, (q, k, v), o)

            yield row(peer, "fwd_bwd", dtype, b, h, n, d, causal, mods, *measure(both))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--shapes", default="64,0,8192;64,1,8192;128,0,8192;128,1,8192", help="D,causal(0|1),N;…")
    parser.add_argument("--mods", default="none,alibi,softcap,document", help="of none, alibi, softcap, document, window")
    parser.add_argument("--standard", help="B,H,D,CAUSAL: standard attention instead, over --seqlens")
    parser.add_argument("--dropout", type=float, default=0.0, help="of standard attention")
    parser.add_argument("--seqlens", default="512,1024,2048,4096,8192,16384,32768,65536")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--passes", default="fwd", help="of fwd, bwd (of standard attention: forward and backward)")
    args = parser.parse_args()
    passes, rows = args.passes.split(","), []
    if args.standard:
        b, h, d, causal = (int(x) for x in args.standard.split(","))
        for n in map(int, args.seqlens.split(",")):
            rows += standard(b, h, n, d, bool(causal), args.dtype, passes, args.dropout)
    else:
        for d, causal, n in ([int(x) for x in s.split(",")] for s in args.shapes.split(";")):
            for mods in args.mods.split(","):
                b, h = max(1, 16384 // n), max(1, 2048 // d)
                rows += flex(b, h, n, d, bool(causal), mods, args.dtype, passes)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=0)
    else:
        json.dump(rows, sys.stdout, indent=0)


if __name__ == "__main__":
    main()
