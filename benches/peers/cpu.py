#!/usr/bin/env python3
"""Our CPU executor beside PyTorch's CPU flash SDPA, in one run.

    python3 -m venv /tmp/venv-torch && /tmp/venv-torch/bin/pip install torch numpy safetensors
    cargo build --release
    /tmp/venv-torch/bin/python benches/peers/cpu.py --json cpu.json             # the whole table, about 10 minutes
    /tmp/venv-torch/bin/python benches/peers/cpu.py --dtypes bf16 --passes bwd --only 2048,64
    /tmp/venv-torch/bin/python benches/peers/cpu.py --ours none                 # PyTorch alone

For every shape, dtype and pass both sides compute the same inputs once and are checked (see `check`). Then they take
turns (ours, theirs, ours, ...), a turn being about --turn-ms of back-to-back calls. A time is process CPU time divided
by the number of threads (other tenants disturb it less than wall time), and wall time beside it. CPU time is the mean
over a turn, never of one short call: the kernel brings the clock of a thread that runs on another core up to date only
at its ticks. A ratio is the median over rounds of theirs / ours. Around each cell a probe (a matrix product, or for
decode a memory read) tells what the machine gave at that moment. FLOPs: 4·B·H·Nq·Nk·D forward, halved if causal, ×2.5
backward, ×3.5 both. PyTorch's times include making its results; ours are what our server reports (see `Ours`).

PyTorch's OpenMP threads wait asleep here (OMP_WAIT_POLICY=passive). Spinning, their default, costs up to four times the
CPU time as soon as another process takes a core. On an idle machine it saves 10-20 % of the wall time of calls of a
millisecond: compare wall times there with --spin.
"""
import argparse, ctypes, json, math, os, re, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import fmean, median

if "--spin" not in sys.argv:
    os.environ["OMP_WAIT_POLICY"] = "passive"  # read when the OpenMP library loads

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

# (batch, heads, seqlen_q, seqlen_k, head_dim, causal)
SHAPES = [(1, 8, n, n, 64, causal) for n in (512, 2048, 4096, 8192) for causal in (False, True)]
SHAPES += [(1, 8, n, n, 128, causal) for n in (2048, 8192) for causal in (False, True)]
DECODE = (1, 8, 1, 8192, 128, False)
DTYPES = dict(f32=torch.float32, bf16=torch.bfloat16, f16=torch.float16)
FLOPS = dict(fwd=1.0, bwd=2.5, fwd_bwd=3.5)
NEEDED = dict(fwd={"o", "lse"}, bwd={"dq", "dk", "dv"}, fwd_bwd={"o", "lse", "dq", "dk", "dv"})
FLOOR = dict(f32=2e-6, bf16=2e-3, f16=5e-4)  # of the largest entry: what rounding the result alone may cost


class Ours:
    """`flashattn bench --serve`: a JSON line {"inputs", "causal", "pass", "threads", "iters", "layout", "outputs"?} in,
    a JSON line {"wall_ms", "cpu_ms" (of each iteration), "extra_bytes"} out. The files hold q, k, v, do, and in return
    o, lse, dq, dk, dv, as [batch, heads, seqlen, head_dim] ("bhnd"; ours takes them as strided views, so that both
    sides read the same memory layout) or as [batch, seqlen, heads, head_dim] ("bnhd")."""

    def __init__(self, binary):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([binary, "bench", "--serve"], stdin=pipe, stdout=pipe, text=True, bufsize=1)

    def ask(self, **request):
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": f"the server ended, exit status {self.process.wait()}"}
        return answer if "error" not in answer else sys.exit(f"ours: {answer['error']} (request: {request})")


class Theirs:
    """PyTorch's flash SDPA on contiguous [batch, heads, seqlen, head_dim]."""

    def __init__(self, inputs, causal, which):
        self.q, self.k, self.v = (inputs[x].detach().requires_grad_(which != "fwd") for x in "qkv")
        self.do, self.causal, self.which, self.o = inputs["do"], causal, which, None
        if which == "bwd":
            self.o = self.forward()

    def forward(self):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=self.causal)

    def call(self):
        """One pass; its results by name."""
        o = self.forward() if self.o is None else self.o
        if self.which == "fwd":
            return dict(o=o)
        grads = torch.autograd.grad(o, (self.q, self.k, self.v), self.do, retain_graph=self.o is not None)
        return dict(o=o.detach(), dq=grads[0], dk=grads[1], dv=grads[2])

    def extra_bytes(self):
        """Growth of the process's peak resident memory in one call, less its results."""
        resident = lambda field: int(Path("/proc/self/status").read_text().split(field)[1].split()[0]) * 1024
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak, VmHWM, back to VmRSS
        before = resident("VmRSS:")
        results = self.call()
        return max(0, resident("VmHWM:") - before - sum(t.nbytes for t in results.values()))


def turn(call, iters, warm):
    """(CPU ms / threads, mean; wall ms, median) of a call, over `iters` calls in a row after `warm` others."""
    for _ in range(warm):
        call()
    wall, cpu = [], time.process_time()
    for _ in range(iters):
        start = time.perf_counter()
        call()
        wall.append((time.perf_counter() - start) * 1e3)
    return (time.process_time() - cpu) * 1e3 / iters / torch.get_num_threads(), median(wall)


def probe(shape, dtype):
    """Best of three turns: GFLOP/s of a matrix product in this dtype; for decode GB/s of reading what K and V take."""
    _, heads, nq, nk, d, _ = shape
    if nq == 1:
        data = torch.ones(2 * heads * nk * d * DTYPES[dtype].itemsize // 4)
        reads = (data.sum, data.view(torch.int32).max, data.sum)  # either may be the faster
        return data.nbytes / 1e6 / min(turn(read, 60, 3)[0] for read in reads)
    n = 1024 if dtype == "f32" else 2048
    a, b = (torch.randn(n, n).to(DTYPES[dtype]) for _ in range(2))
    return 2 * n**3 / 1e6 / min(turn(lambda: a @ b, 10, 1)[0] for _ in range(3))


def check(name, dtype, inputs, causal, which, ours):
    """Ours and theirs against PyTorch's flash SDPA in a wider type (f64 for f32, f32 for 16 bits) on the same inputs:
    largest error over the largest entry. Ours may have twice their error plus a rounding (FLOOR). Returns {tensor:
    (our error, their error)}; ends the run on disagreement, since a time would then mean nothing."""
    wide, errors = torch.float64 if dtype == "f32" else torch.float32, {}
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # gives lse too
    exact, theirs = (Theirs(x, causal, which).call() | {"lse": op(*(x[y] for y in "qkv"), is_causal=causal)[1]}
                     for x in ({key: x.to(wide) for key, x in inputs.items()}, inputs))
    for key in sorted(NEEDED[which]):
        if key not in ours or ours[key].shape != exact[key].shape:
            sys.exit(f"{name}: ours gave no {key} of the right shape")
        size = exact[key].abs().max()
        error, limit = (((x[key].to(wide) - exact[key]).abs().max() / size).item() for x in (ours, theirs))
        errors[key] = (error, limit)
        if not error <= 2 * limit + FLOOR["f32" if key == "lse" else dtype]:  # NaN must fail too
            sys.exit(f"{name}: {key} is wrong: our error {error:.2e}, theirs {limit:.2e}")
    return errors


def compare(shape, dtype, which, ours, args, path):
    """Checks and times one cell of the table. A row for theirs and, with our binary, one for ours."""
    batch, heads, nq, nk, d, causal = shape
    generator = torch.Generator().manual_seed(nq * 1000 + d)
    inputs = {key: torch.randn(batch, heads, n, d, generator=generator).to(DTYPES[dtype])
              for key, n in dict(q=nq, k=nk, v=nk, do=nq).items()}
    turned = (lambda t: t) if args.layout == "bhnd" else (lambda t: t.transpose(1, 2).contiguous())
    theirs = Theirs(inputs, causal, which)
    theirs.call()
    extra = dict(torch=theirs.extra_bytes())
    if ours:
        save_file({key: turned(t) for key, t in inputs.items()}, path + ".in")
        request = {"inputs": path + ".in", "causal": causal, "pass": which, "threads": args.threads,
                   "layout": args.layout}
        extra["ours"] = ours.ask(**request, iters=1, outputs=path + ".out")["extra_bytes"]
        out = {key: t if key == "lse" else turned(t) for key, t in load_file(path + ".out").items()}
        errors = check(f"{shape} {dtype} {which}", dtype, inputs, causal, which, out)

    once = turn(theirs.call, 1, 0)[1]
    warm = 1 if once < 500 else 0  # a turn's first call finds cold caches; in a long call that is nothing
    iters = max(1, min(200, round(args.turn_ms / once)))
    times, probes = dict(ours=[], torch=[]), [probe(shape, dtype)]
    for _ in range(args.rounds if once < 2000 else min(args.rounds, 3)):
        if ours:
            time.sleep(0.02)  # with --spin, PyTorch's threads go on for some milliseconds
            answer = ours.ask(**request, iters=iters + warm)
            times["ours"].append((fmean(answer["cpu_ms"][warm:]) / args.threads, median(answer["wall_ms"][warm:])))
        times["torch"].append(turn(theirs.call, iters, warm))
    probes.append(probe(shape, dtype))

    flop = 4 * batch * heads * nq * nk * d * (0.5 if causal else 1) * FLOPS[which]
    work = flop if nq > 1 else 2 * batch * heads * nk * d * DTYPES[dtype].itemsize  # decode: bytes of K and V
    rows = []
    for side in ("torch", "ours") if ours else ("torch",):
        cpu, wall = zip(*times[side])
        ms = median(cpu)
        rows.append({"peer": side, "pass": which, "dtype": dtype, "causal": causal, "batch": batch, "heads": heads,
                     "seqlen": nk, "seqlen_q": nq, "head_dim": d, "ms": ms, "tflops": flop / ms / 1e9, "cpu_ms": ms,
                     "wall_ms": median(wall), "spread": (max(cpu) - min(cpu)) / ms, "rounds": len(cpu),
                     "iters": iters, "rate": work / ms / 1e6, "probe": median(probes), "extra_bytes": extra[side],
                     "threads": args.threads, "layout": args.layout, "spin": args.spin})
    if ours:
        pairs = list(zip(times["torch"], times["ours"]))
        rows[1] |= {"errors": errors, "ratio_cpu": median(t[0] / o[0] for t, o in pairs),
                    "ratio_wall": median(t[1] / o[1] for t, o in pairs)}
    return rows


def table_line(rows):
    r, mask = rows[0], "causal" if rows[0]["causal"] else "full"
    line = f"| {r['dtype']} {r['batch']}×{r['heads']}, {r['seqlen_q']}×{r['seqlen']}, d {r['head_dim']}, {mask} |"
    for r in rows:
        line += (f" {r['cpu_ms']:.2f} ({r['wall_ms']:.2f}) ±{50 * r['spread']:.0f} % | {r['rate']:.0f} "
                 f"({100 * r['rate'] / r['probe']:.0f} %) | {r['extra_bytes'] / 2**20:.1f} |")
    if len(rows) > 1:
        key, (error, limit) = max(r["errors"].items(), key=lambda e: e[1][0] / max(e[1][1], 1e-9))
        line += f" **{r['ratio_cpu']:.2f}** | {r['ratio_wall']:.2f} | {key} {error:.1e} / {limit:.1e} |"
    return line


def machine():
    field = lambda name: re.search(rf"^{name}\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1]
    git = ["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty"]
    git = subprocess.run(git, capture_output=True, text=True)
    return dict(device=f"{field('model name')} (model {field('model')}, {field('cache size')}), {os.cpu_count()} cores",
                commit=git.stdout.strip() or None, torch=torch.__version__)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", default="target/release/flashattn", help="our binary, or none")
    parser.add_argument("--dtypes", default="f32,bf16", help="of f32,bf16,f16 (decode always runs in all three)")
    parser.add_argument("--passes", default="fwd,fwd_bwd", help="of fwd,fwd_bwd,bwd")
    parser.add_argument("--only", default="", help="N,D or N,D,causal or N,D,full or decode; several joined by ';'")
    parser.add_argument("--layout", default="bhnd", choices=("bhnd", "bnhd"), help="memory layout of our inputs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (at most 3 if a call takes over 2 s)")
    parser.add_argument("--turn-ms", type=float, default=250)
    parser.add_argument("--spin", action="store_true", help="let PyTorch's idle threads spin (see above)")
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    only = {name.strip() for name in args.only.split(";") if name.strip()}
    shapes = [s for s in SHAPES if not only or only & {f"{s[3]},{s[4]}", f"{s[3]},{s[4]},{('full', 'causal')[s[5]]}"}]
    passes = args.passes.split(",")
    groups = {f"{dtype} {which}": [(shape, dtype, which) for shape in shapes]
              for dtype in args.dtypes.split(",") for which in passes if shapes}
    if "fwd" in passes and (not only or "decode" in only):
        groups["decode"] = [(DECODE, dtype, "fwd") for dtype in DTYPES]
    ours, about, all_rows = None if args.ours == "none" else Ours(args.ours), machine(), []
    print(*(f"{key} {value}" for key, value in about.items()), f"threads {args.threads}, layout {args.layout}", sep="; ")
    print("\nTimes: CPU ms / threads (wall ms) ±half the range over rounds. Rates: GFLOP/s and their share of a matrix "
          "product's; decode: GB/s and their share of a plain read's.")
    with tempfile.TemporaryDirectory() as folder:
        for title, cells in groups.items():
            mine = " ours | rate | extra MiB | CPU ratio | wall ratio | worst error ours / torch |" if ours else ""
            head = "| shape | torch | rate | extra MiB |" + mine
            print(f"\n**{title}**\n\n{head}\n|{'---|' * (head.count('|') - 1)}", flush=True)
            ratios = []
            for shape, dtype, which in cells:
                rows = compare(shape, dtype, which, ours, args, os.path.join(folder, f"{len(all_rows)}.safetensors"))
                print(table_line(rows), flush=True)
                all_rows += (about | row for row in rows)
                ratios.append([rows[-1].get(key) for key in ("ratio_cpu", "ratio_wall")])
            if ours:
                for name, x in zip(("CPU time", "wall time"), zip(*ratios)):
                    print(f"\n{name}: geometric mean {math.exp(fmean(map(math.log, x))):.2f}×, worst {min(x):.2f}×")
            if args.json:
                Path(args.json).write_text(json.dumps(all_rows, indent=1))


if __name__ == "__main__":
    main()
