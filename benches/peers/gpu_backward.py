"""The backward kernels beside PyTorch's cuDNN on one GPU, in one process:
    cargo run --release -p flashattn-cuda --example bwd DIR && python3 benches/peers/gpu_backward.py DIR … [--budget SECONDS]
Each DIR has the PTX of one variant, compiled here by the driver when first used, and the plans as JSON. Cases to check are compared
with f64 on ragged shapes, with NaN where gradients are to be written; those of a deterministic plan also with themselves, bit by
bit. Regime of timings: back-to-back launches of 100 ms on random inputs, after a loop that warms up; shape by shape, all variants
and then cuDNN. Lines and JSON are written as they come; a case begins only within the budget."""
import argparse, ctypes as C, json, os, re, sys, time
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

cu = C.CDLL("libcuda.so.1")
torch.zeros(1, device="cuda")
SMS = torch.cuda.get_device_properties(0).multi_processor_count


def check(result, what):
    if result:
        text = C.c_char_p()
        cu.cuGetErrorString(result, C.byref(text))
        raise RuntimeError(f"{what}: {result} {text.value}")


class Config(C.Structure):
    _fields_ = [("grid", C.c_uint * 3), ("block", C.c_uint * 3), ("shared", C.c_uint), ("stream", C.c_void_p),
                ("attributes", C.c_void_p), ("count", C.c_uint)]


class Kernel:
    def __init__(self, folder, about, change=lambda text: text):
        text = change(open(os.path.join(folder, about["file"]), "rb").read()) + b"\0"
        module, self.function = C.c_void_p(), C.c_void_p()
        start = time.time()
        check(cu.cuModuleLoadData(C.byref(module), text), about["file"])
        self.jit_ms = 1e3 * (time.time() - start)
        check(cu.cuModuleGetFunction(C.byref(self.function), module, about["name"].encode()), about["name"])
        check(cu.cuFuncSetAttribute(self.function, 8, about["shared"]), "shared memory")
        spilled, registers = C.c_int(), C.c_int()
        cu.cuFuncGetAttribute(C.byref(spilled), 3, self.function)
        cu.cuFuncGetAttribute(C.byref(registers), 4, self.function)
        self.about = f"{about['name']}: jit {self.jit_ms:.0f} ms, {registers.value} registers, {spilled.value} bytes local"
        self.shared, self.threads = about["shared"], about["threads"]

    def launch(self, blocks, pointers):
        config = Config()
        config.grid[:], config.block[:], config.shared = (blocks, 1, 1), (self.threads, 1, 1), self.shared
        config.stream = torch.cuda.current_stream().cuda_stream
        check(cu.cuLaunchKernelEx(C.byref(config), self.function, pointers, None), self.about)


class Variant:
    """A folder's plans, and its kernels as far as they were asked for."""
    def __init__(self, folder):
        self.folder, self.name, self.compiled = folder, os.path.basename(os.path.normpath(folder)), {}
        plans = json.load(open(os.path.join(folder, "bwd.json")))
        self.files, self.cases = plans["kernels"], plans["cases"]

    def kernels(self, i):
        if i not in self.compiled:
            self.compiled[i] = [Kernel(self.folder, about) for about in self.files[i]]
        return self.compiled[i]


class Map(C.Structure):
    _fields_ = [("bytes", C.c_ubyte * 128)]


def tensor_map(address, shape, strides, tile):
    raw = (C.c_ubyte * 192)()
    aligned = (C.addressof(raw) + 63) // 64 * 64
    n = len(shape)
    result = cu.cuTensorMapEncodeTiled(C.c_void_p(aligned), 9, n, C.c_void_p(address), (C.c_uint64 * n)(*shape),
                                       (C.c_uint64 * (n - 1))(*strides), (C.c_uint32 * n)(*tile), (C.c_uint32 * n)(*[1] * n), 0, 3, 2, 0)
    check(result, f"tensor map {shape} {strides} {tile}")
    out = Map()
    C.memmove(C.addressof(out), aligned, 128)
    return out


class Case:
    """A case's tensors, bound to its kernels' arguments."""
    def __init__(self, case, variant):
        self.case, self.kernels, self.variant = case, variant.kernels(case["kernel"]), variant.name
        b, m, n, h, hk, d = (case[x] for x in ("batch", "m", "n", "heads", "heads_kv", "d"))
        bf16 = dict(device="cuda", dtype=torch.bfloat16)
        t = self.t = dict(Q=torch.randn(b, m, h, d, **bf16), K=torch.randn(b, n, hk, d, **bf16), V=torch.randn(b, n, hk, d, **bf16),
                          DO=torch.randn(b, m, h, d, **bf16), Counter=torch.zeros(1, device="cuda", dtype=torch.int32))
        for name, like in (("DQ", "Q"), ("DK", "K"), ("DV", "V")):
            t[name] = torch.full_like(t[like], float("nan"))
        for name, size in case["workspace"]:
            t[name] = torch.full((size // 4,), float("nan"), device="cuda")
        after = min(case.get("query_items", 0), SMS) or case["query_blocks"]
        self.grids = [case["query_blocks"], min(case["items"], SMS), after]

    def bind(self, o, lse):
        self.t["O"], self.t["Lse"] = o, lse
        kinds = dict(u32=C.c_uint32, s32=C.c_int32, f32=C.c_float, u64=C.c_uint64)
        self.keep = []
        for kind, *x in self.case["arguments"]:
            if kind == "address":
                self.keep.append(C.c_uint64(self.t[x[0]].data_ptr()))
            elif kind == "map":
                self.keep.append(tensor_map(self.t[x[0]].data_ptr(), *x[1:]))
            else:
                self.keep.append(kinds[kind](x[0]))
        self.pointers = (C.c_void_p * len(self.keep))(*[C.addressof(a) for a in self.keep])

    def launch(self, which=(0, 1, 2)):
        for i in which:
            self.kernels[i].launch(self.grids[i], self.pointers)


def reference(t, causal):
    """o, lse and gradients in f64, from formulas: rows that see nothing are zero."""
    q, k, v, do = (t[x].double().transpose(1, 2) for x in ("Q", "K", "V", "DO"))
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = q @ k.transpose(-1, -2) * scale
    if causal:
        last = torch.arange(q.shape[2], device="cuda")[:, None] + k.shape[2] - q.shape[2]
        s = s.masked_fill(torch.arange(k.shape[2], device="cuda")[None] > last, float("-inf"))
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - torch.where(lse.isinf(), torch.zeros_like(lse), lse)[..., None])
    o = p @ v
    dp = do @ v.transpose(-1, -2)
    ds = p * (dp - (o * do).sum(-1, keepdim=True))
    heads = lambda x: x.unflatten(1, (-1, group)).sum(2).transpose(1, 2)
    dq = (ds @ k * scale).transpose(1, 2)
    return o.transpose(1, 2).bfloat16().contiguous(), lse.float().contiguous(), dict(
        DQ=dq, DK=heads(ds.transpose(-1, -2) @ q * scale), DV=heads(p.transpose(-1, -2) @ do))


def correct(case):
    t = case.t
    o, lse, expected = reference(t, case.case["causal"])
    case.bind(o, lse)
    case.launch()
    torch.cuda.synchronize()
    error = {x: ((t[x].double() - e).norm() / e.norm()).item() for x, e in expected.items()}
    good = all(e < 8e-3 for e in error.values()) and t["Counter"].item() == 0
    first = {x: t[x].clone() for x in expected}
    same = True
    for _ in range(3):
        case.launch()
        torch.cuda.synchronize()
        same &= all(torch.equal(t[x], first[x]) for x in (expected if case.case["deterministic"] else ("DK", "DV")))
    shape = [case.case[x] for x in ("batch", "m", "n", "heads", "heads_kv", "d", "causal", "deterministic")]
    print("ok   " if good and same else "WRONG", case.variant, shape, {x: f"{e:.1e}" for x, e in error.items()}, "" if same else "runs differ", flush=True)
    return good and same


def sustained(f, ms=100):
    def loop(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            f()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / times
    loop(2)
    times = max(3, int(ms / loop(3)))
    return sorted(loop(times) for _ in range(2))[0]


def flash(t, causal):
    q, k, v = (t[x].transpose(1, 2) for x in "QKV")
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return out[0].transpose(1, 2).contiguous(), out[1].float().contiguous()


def time_ours(case):
    c = case.case
    case.bind(*flash(case.t, c["causal"]))
    ms = sustained(case.launch)
    parts = [sustained(lambda i=i: case.launch((i,)), 30) for i in range(3)]
    flops = 10 * c["batch"] * c["heads"] * c["m"] * c["n"] * c["d"] * (0.5 if c["causal"] else 1)
    row = dict(peer=case.variant, d=c["d"], causal=c["causal"], n=c["n"], deterministic=c["deterministic"], ms=ms,
               tflops=flops / ms / 1e9, parts_ms=parts)
    print(f"{case.variant:8} d {c['d']} {'causal' if c['causal'] else 'full  '} n {c['n']:6}{' det' if c['deterministic'] else '    '} "
          f"{row['tflops']:5.0f} TFLOP/s  {ms:.3f} ms (pre {parts[0]:.3f} main {parts[1]:.3f} post {parts[2]:.3f}; main {flops / parts[1] / 1e9:.0f}) "
          f"{case.kernels[1].about.split(': ')[1]}", flush=True)
    return row


ABLATIONS = {
    "as it is": [],
    "no dQ sums": [(rb"\n[^\n]*(red\.relaxed\.gpu\.global\.add\.v4\.f32|cp\.reduce\.async\.bulk)[^\n]*", b"")],
    "no exp2": [(rb"ex2\.approx\.ftz\.f32 ", b"mov.f32 ")],
    "no barrier of dS": [(rb"\n[^\n]*bar\.(sync|arrive) [^0][^\n]*, 256;", b"")],
    "no dS stored": [(rb"\n[^\n]*stmatrix[^\n]*", b"")],
}


def ablate(plan, variant):
    """What the main kernel takes without one of its parts (its results are wrong then)."""
    case = Case(plan, variant)
    case.bind(*flash(case.t, plan["causal"]))
    about = variant.files[plan["kernel"]][1]
    flops = 10 * plan["batch"] * plan["heads"] * plan["m"] * plan["n"] * plan["d"] * (0.5 if plan["causal"] else 1)
    for name, edits in ABLATIONS.items():
        def change(text):
            for pattern, to in edits:
                text, count = re.subn(pattern, to, text)
                assert count, f"{name}: nothing to take out"
            return text
        kernel = Kernel(variant.folder, about, change)
        ms = sustained(lambda: kernel.launch(case.grids[1], case.pointers), 80)
        print(f"{variant.name} main d {plan['d']} {'causal' if plan['causal'] else 'full'} n {plan['n']} {name}: {flops / ms / 1e9:.0f} TFLOP/s  {kernel.about}", flush=True)


def time_peer(name, backend, d, causal, n):
    b, h = max(1, 16384 // n), 2048 // d
    q, k, v = (torch.randn(b, h, n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    g = torch.randn_like(q)
    with sdpa_kernel(backend):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        ms = sustained(lambda: torch.autograd.grad(o, (q, k, v), g, retain_graph=True))
    tflops = 10 * b * h * n * n * d * (0.5 if causal else 1) / ms / 1e9
    print(f"{name:8} d {d} {'causal' if causal else 'full  '} n {n:6}     {tflops:5.0f} TFLOP/s  {ms:.3f} ms", flush=True)
    return dict(peer=name, d=d, causal=causal, n=n, ms=ms, tflops=tflops)


def main():
    args = argparse.ArgumentParser()
    args.add_argument("folders", nargs="+", help="variants; the first is the one to check")
    args.add_argument("--budget", type=float, default=500)
    args.add_argument("--json")
    args.add_argument("--check-only", action="store_true")
    args.add_argument("--checks", type=int, default=1000, help="at most so many, spread over all")
    args.add_argument("--time", help="d:full|causal:N,…  instead of all shapes of the first folder")
    args.add_argument("--deterministic", action="store_true", help="times of deterministic plans, too")
    args.add_argument("--no-peers", action="store_true")
    args.add_argument("--ablate", action="store_true", help="the first variant's main kernel at 8192 without its parts")
    args = args.parse_args()
    start = time.time()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), SMS, torch.__version__, torch.backends.cudnn.version(), flush=True)
    variants = [Variant(folder) for folder in args.folders]
    out_of_time = lambda: time.time() - start > args.budget
    wrong, rows = {}, []

    def keep(row):
        rows.append(row)
        if args.json:
            json.dump(rows, open(args.json, "w"))

    for v in variants:
        checks = [c for c in v.cases if c["what"] == "check"]
        # Of the other variants only each kernel once.
        # Each second plan is deterministic: an odd step meets both.
        checks = checks[::-(-len(checks) // args.checks) | 1] if v is variants[0] else list({c["kernel"]: c for c in checks}.values())
        if args.time:
            wanted = {tuple(x.split(":")[:2]) for x in args.time.split(",")}
            checks = [c for c in checks if v is variants[0] or (str(c["d"]), "causal" if c["causal"] else "full") in wanted]
        for c in checks:
            if out_of_time():
                print("out of time: not checked", v.name, c["d"], c["causal"], flush=True)
            elif not correct(Case(c, v)):
                wrong[v.name, c["kernel"]] = True
    key = lambda c: (c["d"], c["causal"], c["n"], c["deterministic"])
    timed = [c for c in variants[0].cases if c["what"] == "time" and (args.deterministic or not c["deterministic"])]
    if args.time:
        wanted = {(int(d), mask == "causal", int(n)) for d, mask, n in (x.split(":") for x in args.time.split(","))}
        timed = [c for c in timed if key(c)[:3] in wanted]
    for c in [] if args.check_only else timed:
        for v in variants:
            for same in (x for x in v.cases if x["what"] == "time" and key(x) == key(c)):
                if out_of_time():
                    return print("out of time", flush=True) or True
                if (v.name, same["kernel"]) in wrong:
                    print("not timed, it is wrong:", v.name, key(c), flush=True)
                    continue
                keep(time_ours(Case(same, v)))
        if not args.no_peers and not c["deterministic"]:
            keep(time_peer("cudnn", SDPBackend.CUDNN_ATTENTION, *key(c)[:3]))
        if args.ablate and c["n"] == 8192 and not c["deterministic"]:
            ablate(c, variants[0])
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
