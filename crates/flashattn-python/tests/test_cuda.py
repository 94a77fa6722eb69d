"""CUDA tensors: the forward pass, in the caller's stream and in CUDA graphs. (The other tests, gradients too, run on both
devices; these need the forward pass only.)"""

import pytest
import torch

import flashattn
from conftest import close, inputs, plain

pytestmark = pytest.mark.cuda
DTYPES = [torch.float16, torch.bfloat16]

OPTIONS = {
    "full": ({}, {}),
    "causal": (dict(causal=True), dict(causal=True)),
    "window": (dict(window_size=(30, 11)), dict(window=(30, 11))),
    "scale, soft cap": (dict(softmax_scale=0.3, softcap=3.0), dict(scale=0.3, softcap=3.0)),
    "score mod": ({"score_mod": lambda s, b, h, q, k: s - (q - k).abs() * 0.05},) * 2,
    "mask": ({"mask_mod": lambda b, h, q, k: (k % 8 == 0) | ((q - k).abs() < 5)},) * 2,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("heads_kv", [6, 2, 1])
def test_forward(dtype, name, heads_kv):
    ours, theirs = OPTIONS[name]
    for sizes in (
        dict(sq=113, sk=203, d=59),
        dict(sq=257, sk=130, d=64),
        dict(sq=1, sk=300, d=128),
        dict(sq=90, sk=90, d=96, dv=40),
    ):
        q, k, v = inputs(dtype, heads_kv=heads_kv, device="cuda", grad=False, **sizes)
        o, lse = flashattn.attention(q, k, v, return_lse=True, **ours)
        exact = plain(q.double(), k.double(), v.double(), **theirs)
        standard = plain(q, k, v, **theirs)
        close("o", o, exact[0], standard[0], dtype)
        close("lse", lse, exact[1], standard[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_sinks_and_dropout(dtype):
    """What is read on the host; the CPU gives the same, and drops the same entries."""
    q, k, v = inputs(dtype, d=64, device="cuda", grad=False)
    slopes, sinks = torch.rand(2, 6, device="cuda"), torch.randn(6, device="cuda")
    options = dict(causal=True, dropout_p=0.2, seed=1 << 40 | 5)
    o = flashattn.attention(q, k, v, alibi_slopes=slopes, sinks=sinks, **options)
    expected = flashattn.attention(q.cpu(), k.cpu(), v.cpu(), alibi_slopes=slopes.cpu(), sinks=sinks.cpu(), **options)
    torch.testing.assert_close(o.cpu(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed(dtype):
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 33, 33, 104], [0, 61, 70, 110]))
    q, k, v = (torch.randn(n, h, 64, dtype=dtype, device="cuda") for n, h in ((104, 6), (110, 2), (110, 2)))
    o, lse, _ = flashattn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 71, 61, causal=True, return_attn_probs=True)
    for b in (0, 2):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        part = [q[None, rows], k[None, keys], v[None, keys]]
        exact = plain(*(x.double() for x in part), causal=True)
        standard = plain(*part, causal=True)
        close("o", o[None, rows], exact[0], standard[0], dtype)
        close("lse", lse[None, :, rows], exact[1], standard[1], dtype)


def test_layouts():
    q, k, v = inputs(torch.bfloat16, d=64, device="cuda", grad=False)
    expected = flashattn.flash_attn_func(q, k, v)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(flashattn.flash_attn_func(*heads_first), expected)
    padded = torch.randn(2, 203, 2, 81, dtype=torch.bfloat16, device="cuda")
    padded[..., 3:67] = k
    assert torch.equal(flashattn.flash_attn_func(q, padded[..., 3:67], v), expected), "not aligned to 16 bytes"


def test_cupy():
    cupy = pytest.importorskip("cupy")
    q, k, v = inputs(torch.float16, d=64, device="cuda", grad=False)
    slopes = torch.rand(6, device="cuda")
    expected, expected_lse = flashattn.attention(q, k, v, causal=True, alibi_slopes=slopes, return_lse=True)
    torch.cuda.synchronize()
    with cupy.cuda.Stream():
        arrays = [cupy.from_dlpack(x) for x in (q, k, v)]
        o, lse = flashattn.attention(*arrays, causal=True, alibi_slopes=cupy.from_dlpack(slopes), return_lse=True)
    assert isinstance(o, cupy.ndarray) and cupy.array_equal(o, cupy.from_dlpack(expected))
    assert cupy.array_equal(lse, cupy.from_dlpack(expected_lse))


def test_refused_by_name():
    q, k, v = inputs(device="cuda", grad=False)
    with pytest.raises(NotImplementedError, match=r"dtype: f32 .* is not supported on cuda:0"):
        flashattn.flash_attn_func(q, k, v)
    with pytest.raises(TypeError, match="k is on cpu, expected cuda:0"):
        flashattn.flash_attn_func(q.half(), k.half().cpu(), v.half())


def test_graph():
    q, k, v = inputs(torch.bfloat16, device="cuda", grad=False, d=64)
    flashattn.flash_attn_func(q, k, v, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = flashattn.flash_attn_func(q, k, v, causal=True)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(o, flashattn.flash_attn_func(q, k, v, causal=True))


def test_stream():
    q, k, v = inputs(torch.bfloat16, device="cuda", grad=False, sq=2048, sk=2048, d=64)
    expected = flashattn.flash_attn_func(q, k, v)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(q)
        torch.cuda._sleep(100_000_000)
        late.copy_(q)
        o = flashattn.flash_attn_func(late, k, v)
    stream.synchronize()
    assert torch.equal(o, expected)
