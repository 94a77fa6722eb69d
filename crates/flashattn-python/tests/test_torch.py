"""PyTorch tensors: values and gradients by upstream's policy, and that autograd, the compiler and the generator work."""

import math
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import flashattn
from conftest import FINEST, compare, inputs, near, on_devices, plain, with_dtypes
from flashattn import bert_padding


def func(**options):
    return lambda q, k, v: flashattn.flash_attn_func(q, k, v, return_attn_probs=True, **options)[:2]


@with_dtypes
@pytest.mark.parametrize("heads_kv", [6, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_exact(device, dtype, heads_kv, causal):
    q, k, v = inputs(dtype, heads_kv=heads_kv, device=device)
    compare(func(causal=causal), q, k, v, causal=causal)


@with_dtypes
@pytest.mark.parametrize(
    "sizes", [(1, 239, 64, 64), (97, 1, 40, 24), (128, 128, 128, 128), (3, 1, 7, 1), (65, 257, 33, 96)]
)
def test_sizes(device, dtype, sizes):
    sq, sk, d, dv = sizes
    q, k, v = inputs(dtype, sq=sq, sk=sk, d=d, dv=dv, device=device)
    compare(func(causal=True), q, k, v, causal=True)


@with_dtypes
@pytest.mark.parametrize("window", [(17, 0), (-1, 5), (30, 11), (0, 0)])
def test_window(device, dtype, window):
    q, k, v = inputs(dtype, device=device)
    compare(func(window_size=window), q, k, v, window=window)
    o = flashattn.flash_attn_func(q, k, v, window_size=window)
    assert torch.equal(o, flashattn.flash_attn_func(q, k, v, window_size=torch.tensor(window)))


@with_dtypes
@pytest.mark.parametrize("per_batch", [False, True])
def test_alibi_softcap_scale(device, dtype, per_batch):
    q, k, v = inputs(dtype, device=device)
    slopes = torch.rand(2, 6, device=device) if per_batch else torch.rand(6, device=device)
    options = dict(softcap=3.0, causal=True)
    compare(func(alibi_slopes=slopes, softmax_scale=0.3, **options), q, k, v, alibi=slopes, scale=0.3, **options)


@on_devices
def test_learned_extras(device):
    """Gradients of slopes, bias, sinks, and of what a score mod captures."""
    q, k, v = inputs(device=device)
    slopes = torch.rand(6, device=device)
    compare(
        lambda q, k, v, s: flashattn.attention(q, k, v, alibi_slopes=s.float(), return_lse=True),
        q, k, v, [slopes], alibi=slopes, learned=["alibi"],
    )  # fmt: skip
    sinks = torch.randn(6, device=device)
    compare(
        lambda q, k, v, s: flashattn.attention(q, k, v, sinks=s.float(), causal=True, return_lse=True),
        q, k, v, [sinks], sinks=sinks, causal=True, learned=["sinks"],
    )  # fmt: skip


@with_dtypes
def test_dropout(device, dtype):
    q, k, v = inputs(dtype, device=device)
    p = 0.17
    seed = 1 << 40 | 12345
    ones = torch.eye(k.shape[1], device=device)[None, :, None, :].expand(2, -1, 2, -1).to(dtype)
    weights = flashattn.attention(q, k, ones, dropout_p=p, seed=seed, causal=True).transpose(1, 2)
    keep = (weights != 0) | (flashattn.attention(q, k, ones, causal=True).transpose(1, 2) == 0)
    compare(
        lambda q, k, v: flashattn.attention(q, k, v, dropout_p=p, seed=seed, causal=True, return_lse=True),
        q, k, v, causal=True, keep=keep, p=p,
    )  # fmt: skip


@on_devices
def test_dropout_by_the_generator(device):
    q, k, v = inputs(device=device, sq=257, sk=301)
    p = 0.17
    torch.manual_seed(7)
    o, lse, weights = flashattn.flash_attn_func(q, k, v, p, causal=True, return_attn_probs=True)
    torch.manual_seed(7)
    assert torch.equal(o, flashattn.flash_attn_func(q, k, v, p, causal=True))
    assert not torch.equal(o, flashattn.flash_attn_func(q, k, v, p, causal=True)), "a new seed at each call"
    expected, expected_lse, exact = plain(*(x.float() for x in (q, k, v)), causal=True, keep=weights > 0, p=p)
    eps = torch.finfo(q.dtype).eps
    assert (o - expected).abs().max() < 84 * eps and (lse - expected_lse).abs().max() < 1e-5
    assert (weights.abs() - exact).abs().max() < 8.4 * eps
    visible = exact > 0
    n = visible.sum().item()
    dropped = (weights[visible] < 0).sum().item() / n
    assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / n), dropped


def lengths_of(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


@with_dtypes
@pytest.mark.parametrize("form", ["func", "kvpacked", "qkvpacked"])
def test_packed_sequences(device, dtype, form):
    same = form == "qkvpacked"
    lengths_q = [33, 0, 71, 5]
    lengths_k = lengths_q if same else [61, 9, 40, 0]
    cu_q, cu_k = lengths_of(lengths_q, device), lengths_of(lengths_k, device)
    heads_kv = 6 if same else 2
    x = [
        torch.randn(n, h, 40, dtype=dtype, device=device)
        for n, h in ((sum(lengths_q), 6), *[(sum(lengths_k), heads_kv)] * 2)
    ]
    slopes = torch.rand(4, 6, device=device)
    options = dict(causal=True, softcap=4.0, alibi_slopes=slopes, return_attn_probs=True)
    x = [t.requires_grad_() for t in x]
    q, k, v = x
    if form == "func":
        o, lse, none = flashattn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 71, 61, **options)
    elif form == "kvpacked":
        kv = torch.stack([k, v], 1)
        o, lse, none = flashattn.flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, 71, 61, **options)
    else:
        o, lse, none = flashattn.flash_attn_varlen_qkvpacked_func(torch.stack([q, k, v], 1), cu_q, 71, **options)
    assert none is None and lse.shape == (6, sum(lengths_q)) and lse.dtype == torch.float32
    d_o = torch.randn_like(o)
    got = torch.autograd.grad(o, x, d_o)
    # Each sequence by itself gives the very same.
    for b in range(4):
        rows = [slice(int(c[b]), int(c[b + 1])) for c in (cu_q, cu_k, cu_k)]
        if rows[0].start == rows[0].stop or rows[1].start == rows[1].stop:
            assert not o[rows[0]].any()
            continue
        part = [t[r][None].detach().requires_grad_() for t, r in zip(x, rows)]
        own = dict(options, alibi_slopes=slopes[b])
        o_part, lse_part, _ = flashattn.flash_attn_func(*part, **own)
        near(o[rows[0]], o_part[0])
        near(lse[:, rows[0]], lse_part[0])
        for g, r, e in zip(got, rows, torch.autograd.grad(o_part, part, d_o[rows[0]][None])):
            near(g[r], e[0])


def test_packed_weights():
    cu = lengths_of([33, 0, 21])
    qkv = torch.randn(54, 3, 4, 16)
    torch.manual_seed(3)
    o, _, weights = flashattn.flash_attn_varlen_qkvpacked_func(qkv, cu, 33, 0.25, causal=True, return_attn_probs=True)
    assert weights.shape == (3, 4, 33, 33) and not weights[1].any()
    for b, (start, stop) in enumerate(((0, 33), (33, 33), (33, 54))):
        n = stop - start
        part = torch.einsum("hqk,khd->qhd", weights[b, :, :n, :n].clamp(min=0) / 0.75, qkv[start:stop, 2])
        torch.testing.assert_close(o[start:stop], part, atol=1e-5, rtol=1e-5)


@on_devices
def test_packed_in_one_tensor(device):
    qkv = torch.randn(2, 77, 3, 4, 24, dtype=FINEST[device], device=device, requires_grad=True)
    q, k, v = qkv.unbind(2)
    kv = torch.stack([k, v], 2)
    expected = flashattn.flash_attn_func(q, k, v, causal=True, deterministic=True)
    packed = flashattn.flash_attn_qkvpacked_func(qkv, causal=True, deterministic=True)
    assert torch.equal(packed, expected)
    assert torch.equal(flashattn.flash_attn_kvpacked_func(q, kv, causal=True), expected)
    d_o = torch.randn_like(packed)
    (got,) = torch.autograd.grad(packed, qkv, d_o)
    assert torch.equal(got, torch.stack(torch.autograd.grad(expected, [q, k, v], d_o), 2))


@on_devices
def test_any_strides(device):
    q, k, v = inputs(device=device, grad=False)
    expected = flashattn.flash_attn_func(q, k, v)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    o = flashattn.flash_attn_func(*heads_first)
    assert torch.equal(o, expected) and o.stride() == heads_first[0].stride(), "the result lies as q does"
    dims_first = [x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0) for x in (q, k, v)]
    assert dims_first[0].stride(-1) != 1
    assert torch.equal(flashattn.flash_attn_func(*dims_first), expected)
    padded = torch.randn(2, 203, 2, 80, dtype=q.dtype, device=device)
    padded[..., :59] = k
    assert torch.equal(flashattn.flash_attn_func(q, padded[..., :59], v), expected)
    shared = [x[:1].expand(2, -1, -1, -1) for x in (k, v)]
    assert torch.equal(
        flashattn.flash_attn_func(q, *shared), flashattn.flash_attn_func(q, *(x.contiguous() for x in shared))
    )


@on_devices
def test_any_gradient_strides(device):
    q, k, v = inputs(device=device)
    o = flashattn.flash_attn_func(q, k, v, deterministic=True)
    expected = torch.autograd.grad(o, (q, k, v), torch.ones_like(o), retain_graph=True)
    for a, b in zip(torch.autograd.grad(o.sum(), (q, k, v), retain_graph=True), expected):
        assert torch.equal(a, b), "all strides are 0"
    d_o = torch.randn(2, 59, 6, 113, dtype=o.dtype, device=device).permute(0, 3, 2, 1)
    a, b = (torch.autograd.grad(o, q, d, retain_graph=True)[0] for d in (d_o, d_o.contiguous()))
    assert torch.equal(a, b)


@on_devices
def test_only_what_is_asked_for(device):
    q, k, v = inputs(device=device)
    k.requires_grad_(False)
    _, lse = flashattn.attention(q, k, v, return_lse=True)
    lse.sum().backward()
    assert k.grad is None and torch.isfinite(q.grad).all() and not v.grad.any()
    with torch.no_grad():
        assert not flashattn.flash_attn_func(q, k, v).requires_grad


def test_no_second_derivative_rather_than_a_wrong_one():
    q, k, v = inputs()
    o = flashattn.flash_attn_func(q, k, v)
    (gradient,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


@with_dtypes
def test_rows_that_see_nothing(device, dtype):
    q, k, v = inputs(dtype, sq=90, sk=21, device=device)
    o, lse, _ = flashattn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert not o[:, :69].any() and torch.isneginf(lse[:, :, :69]).all()
    o.sum().backward()
    assert not q.grad[:, :69].any() and torch.isfinite(k.grad).all()


@on_devices
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_empty(device, shape):
    q, k, v = inputs(batch=shape[0], sq=shape[1], sk=shape[2], device=device)
    o = flashattn.flash_attn_func(q, k, v)
    assert o.shape == q.shape and not o.any()
    o.sum().backward()
    assert k.grad.shape == k.shape


@on_devices
def test_the_same_every_time(device):
    q, k, v = inputs(torch.bfloat16, device=device, sq=400, sk=333, d=64)
    o = flashattn.flash_attn_func(q, k, v, causal=True, deterministic=True)
    d_o = torch.randn_like(o)
    first = torch.autograd.grad(o, (q, k, v), d_o, retain_graph=True)
    threads = flashattn.num_threads()
    try:
        for n in (1, 2, 3, 2, 1):
            flashattn.set_num_threads(n)
            assert torch.equal(flashattn.flash_attn_func(q, k, v, causal=True, deterministic=True), o)
            again = torch.autograd.grad(o, (q, k, v), d_o, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(first, again))
    finally:
        flashattn.set_num_threads(threads)


@on_devices
def test_compiled(device):
    """One graph, forward and backward, also with sizes that change; dropout comes from the generator."""
    torch._dynamo.reset()

    options = dict(causal=True, window_size=(40, 0), deterministic=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(q, k, v, slopes):
        return flashattn.flash_attn_func(q * 2, k, v, alibi_slopes=slopes, **options).sin()

    slopes = torch.rand(6, device=device)
    for sq in (113, 90, 71):
        q, k, v = inputs(sq=sq, device=device)
        expected = flashattn.flash_attn_func(q * 2, k, v, alibi_slopes=slopes, **options).sin()
        d_o = torch.randn_like(expected)
        got = f(q, k, v, slopes)
        assert torch.equal(got, expected)
        for a, b in zip(torch.autograd.grad(got, (q, k, v), d_o), torch.autograd.grad(expected, (q, k, v), d_o)):
            near(a, b)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def dropped(q, k, v):
        return flashattn.flash_attn_func(q, k, v, 0.3)

    assert not torch.equal(dropped(q, k, v), dropped(q, k, v))


def test_compiled_packed_and_traced():
    torch._dynamo.reset()
    slope = torch.rand(4)
    mod = flashattn.trace_score_mod(lambda s, b, h, q, k: s - abs(q - k) * slope[h])
    qkv, cu = torch.randn(54, 3, 4, 16), lengths_of([33, 21])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(qkv, cu):
        o = flashattn.flash_attn_varlen_qkvpacked_func(qkv, cu, 33, causal=True)
        return o, flashattn.attention(*qkv[None].unbind(2), score_mod=mod)

    o, flex = f(qkv, cu)
    assert torch.equal(o, flashattn.flash_attn_varlen_qkvpacked_func(qkv, cu, 33, causal=True))
    assert torch.equal(flex, flashattn.attention(*qkv[None].unbind(2), score_mod=mod))


@on_devices
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of PyTorch's own test
def test_registered_operators(device):
    q, k, v = inputs(device=device)
    for text in (
        '{"tables":[],"sinks":false,"varlen":false}',
        '{"tables":[true],"alibi":0,"sinks":true,"varlen":false}',
    ):
        extras = [torch.rand(6, device=device, requires_grad=True) for _ in range(2)] if "alibi" in text else []
        # It compares gradients of two runs; on a GPU those of slopes are added up in any order.
        near = dict(atol=1e-2, rtol=1e-2) if device == "cuda" else {}
        torch.library.opcheck(torch.ops.flashattn.forward, (q, k, v, extras, text, 0, 0), **near)


def peak_bytes():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status).group(1))


def test_without_the_dispatcher(monkeypatch):
    """In eager mode autograd alone sees the passes: the same bits; whoever else looks gets the operator."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from flashattn import _torch

    q, k, v = inputs(torch.float32)
    d_o = torch.randn(*q.shape[:-1], v.shape[-1])

    def results(d_o=d_o):
        o = flashattn.flash_attn_func(q, k, v, causal=True)
        return o, *torch.autograd.grad(o, (q, k, v), d_o)

    here = results()
    assert _torch._seen_by_autograd_alone([q, k, v])
    negative = results(torch._neg_view(-d_o))
    graph = make_fx(lambda q: flashattn.flash_attn_func(q, k.detach(), v.detach()), pre_dispatch=True)(q.detach())
    assert "flashattn.forward" in graph.code
    monkeypatch.setattr(_torch, "_seen_by_autograd_alone", lambda tensors: False)
    there = results()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(here, there, negative))


def test_no_score_matrix():
    """16k tokens: the scores of one head would be 512 MiB in bf16."""
    q, k, v = inputs(torch.bfloat16, batch=1, sq=16384, sk=16384, heads=1, heads_kv=1, d=64)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = peak_bytes()
    flashattn.flash_attn_func(q, k, v, window_size=(128, 0)).sum().backward()
    assert peak_bytes() - before < 64 << 20


def test_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    q, k, v = inputs(sq=500, sk=700, d=64, grad=False)
    expected = flashattn.flash_attn_func(q, k, v)
    with ThreadPoolExecutor(4) as pool:
        for o in pool.map(lambda _: flashattn.flash_attn_func(q, k, v), range(16)):
            assert torch.equal(o, expected)


def test_after_fork():
    """A child has none of its parent's threads. (By itself: the libraries' own threads do not survive a fork.)"""
    code = """
import os, numpy as np, flashattn
q = np.random.default_rng(0).standard_normal((1, 700, 6, 64), np.float32)
expected = flashattn.flash_attn_func(q, q, q)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(flashattn.flash_attn_func(q, q, q), expected) else 1)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n", done.stderr


def test_padding():
    x = torch.randn(3, 17, 5)
    mask = torch.arange(17)[None] < torch.tensor([[4], [17], [9]])
    rows, indices, cu, longest, used = bert_padding.unpad_input(x, mask)
    assert rows.shape == (30, 5) and cu.tolist() == [0, 4, 21, 30] and longest == 17 and used.tolist() == [4, 17, 9]
    assert torch.equal(bert_padding.pad_input(rows, indices, 3, 17), x * mask[..., None])
    kept = mask.roll(1, 1) & ~mask
    assert bert_padding.unpad_input(x, mask, kept)[4].tolist() == [4, 17, 9]
