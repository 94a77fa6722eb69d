"""The yardstick: attention and its gradients in float64 by plain PyTorch, and how far plain attention in the type of the
inputs is from it. Upstream's policy: we may be off by twice as much, plus a floor for where that happens to be exact.
"""

import collections
import math

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: The most exact type that a device takes: GPUs refuse float32 by name (test_cuda.py).
FINEST = {"cpu": torch.float32, "cuda": torch.float16}
on_devices = pytest.mark.parametrize("device", DEVICES)
with_dtypes = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        *(("cpu", dtype) for dtype in DTYPES),
        *(pytest.param("cuda", dtype, marks=pytest.mark.cuda) for dtype in DTYPES[1:]),
    ],
)
#: Half a unit in the last place of numbers near 1; for float32, of the sums of some hundred that gradients are.
#: (Where a query sees one key only, plain attention's error is 0. The Rust corpus derives its floors case by case.)
FLOOR = {torch.float32: 2**-18, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    without = [item for item in items if item.get_closest_marker("cuda")]
    items[:] = [item for item in items if not item.get_closest_marker("cuda")]
    config.hook.pytest_deselected(items=without)
    config.needs_cuda = [item.nodeid for item in without]


def pytest_terminal_summary(terminalreporter, config):
    names = collections.Counter(name.partition("[")[0] for name in getattr(config, "needs_cuda", []))
    if names:
        terminalreporter.section(f"deselected, as they need a GPU: {names.total()}")
        for name, count in names.items():
            terminalreporter.write_line(f"{name} ({count})")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def inputs(dtype=None, batch=2, sq=113, sk=203, heads=6, heads_kv=2, d=59, dv=None, device="cpu", grad=True):
    """q, k and v of ragged, pairwise-distinct sizes."""
    dtype = dtype or FINEST[device]
    shapes = (batch, sq, heads, d), (batch, sk, heads_kv, d), (batch, sk, heads_kv, dv or d)
    return [torch.randn(s, dtype=dtype, device=device, requires_grad=grad) for s in shapes]


def plain(
    q, k, v, scale=None, causal=False, window=(-1, -1), softcap=0.0, alibi=None, score_mod=None, mask_mod=None,
    sinks=None, keep=None, p=0.0,
):  # fmt: skip
    """Attention that makes the whole matrix of scores, in the type of q: o, lse and the weights."""
    batch, sq, heads, d = q.shape
    sk = k.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale or 1 / math.sqrt(d))
    i = torch.arange(sq, device=q.device)[:, None]
    j = torch.arange(sk, device=q.device)[None, :]
    diagonal = i + sk - sq
    if softcap > 0:
        s = torch.tanh(s / softcap) * softcap
    if alibi is not None:
        s = s - alibi.to(s.dtype).reshape(-1, heads, 1, 1) * (diagonal - j).abs()
    b, h = (
        torch.arange(n, device=q.device).reshape(shape) for n, shape in ((batch, (-1, 1, 1, 1)), (heads, (-1, 1, 1)))
    )
    if score_mod is not None:
        s = score_mod(s, b, h, i, j).to(q.dtype)  # of a narrow score and an integer PyTorch makes float32
    visible = torch.ones(sq, sk, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible & (j <= diagonal)
    if window[0] >= 0:
        visible = visible & (j >= diagonal - window[0])
    if window[1] >= 0:
        visible = visible & (j <= diagonal + window[1])
    if mask_mod is not None:
        visible = visible & mask_mod(b, h, i, j)
    s = s.masked_fill(~visible, -math.inf)
    every = s
    if sinks is not None:
        column = sinks.to(s.dtype).reshape(-1, 1, 1).expand(batch, heads, sq, 1)
        every = torch.cat([s, column], dim=-1)
    lse = torch.logsumexp(every, dim=-1)
    weights = torch.exp(s - lse.masked_fill(lse == -math.inf, 0)[..., None])
    dropped = weights if keep is None else weights * keep / (1 - p)
    return torch.einsum("bhqk,bkhd->bqhd", dropped, v), lse, weights


def compare(ours, q, k, v, others=(), lse_gradient=True, **options):
    """Holds ``ours(q, k, v)`` → (o, lse) and its gradients to the policy."""
    learned = [q, k, v, *others]

    def run(function, dtype):
        args = [x.detach().to(dtype).requires_grad_() for x in learned]
        o, lse = function(*args)[:2]
        finite = torch.isfinite(lse)
        loss = (o * d_o.to(o.dtype)).sum()
        if lse_gradient:
            loss = loss + (lse.masked_fill(~finite, 0) * d_lse.to(lse.dtype)).sum()
        gradients = torch.autograd.grad(loss, args)
        return [o.detach(), lse.detach(), *gradients]

    d_o = torch.randn(*q.shape[:-1], v.shape[-1], device=q.device)
    d_lse = torch.randn(q.shape[0], q.shape[2], q.shape[1], device=q.device)

    def reference(q, k, v, *others):
        own = dict(options)
        for name, x in zip(options.get("learned", ()), others):
            own[name] = x
        own.pop("learned", None)
        return plain(q, k, v, **own)

    dtype = q.dtype
    names = ["o", "lse", "dq", "dk", "dv", *options.get("learned", ())]
    got = run(ours, dtype)
    exact = run(reference, torch.float64)
    standard = run(reference, dtype)
    for name, a, b, c in zip(names, got, exact, standard):
        close(name, a, b, c, dtype)


def close(name, got, exact, standard, dtype):
    """Our error is at most twice that of plain attention of the same type, plus the floor."""
    assert got.shape == exact.shape, name
    hidden = torch.isinf(exact)
    assert torch.equal(torch.isinf(got), hidden), name
    error = (got.double() - exact).masked_fill(hidden, 0).abs().max().item()
    theirs = (standard.double() - exact).masked_fill(hidden, 0).abs().max().item()
    floor = FLOOR[dtype] * max(1.0, exact.masked_fill(hidden, 0).abs().max().item())
    assert error <= 2 * theirs + floor, f"{name}: error {error:.3g}, plain attention's {theirs:.3g}, floor {floor:.3g}"


def near(got, expected):
    """The same; on GPUs, where packed and other sequences are cut into blocks of different sizes, up to a few roundings."""
    if not got.is_cuda:
        return torch.testing.assert_close(got, expected)
    largest = expected[expected.isfinite()].abs().amax().item() if expected.isfinite().any() else 0.0
    torch.testing.assert_close(got, expected, atol=4 * FLOOR[got.dtype] * max(1.0, largest), rtol=0)
