"""Score mods and masks from Python: traced, they must mean what the same functions mean on whole tensors."""

import inspect

import numpy as np
import pytest
import torch

import flashattn
from conftest import FINEST, compare, inputs, on_devices
from flashattn import Table, trace_mask_mod, trace_score_mod

SCORE_MODS = {
    "relative": lambda s, b, h, q, k: s + (q - k) * 0.01,
    "reflected": lambda s, b, h, q, k: 1 - s / 3 + 2.0 / (1 + (q - k).abs()),
    "absolute": lambda s, b, h, q, k: s - abs(q - k) * 0.05,
    "by head": lambda s, b, h, q, k: s * (0.5 + h / 4) - b * 0.25,
    "cap": lambda s, b, h, q, k: 3 * torch.tanh(s / 3),
    "where": lambda s, b, h, q, k: torch.where(q // 16 == k // 16, s, s - 1.5),
    "integers": lambda s, b, h, q, k: s + 0.01 * ((q * 7 - k * 3) % 11 - (q - k) // 5),
    "bits": lambda s, b, h, q, k: s + 0.1 * (((q ^ k) & 3) | (q >> 2) & 1),
    "powers": lambda s, b, h, q, k: s**2 * 0.1 + 1.5 ** (-0.1 * k) + s**3.0 * 0.01 + torch.exp(-0.1 * (q - k).abs()) + torch.sqrt(1.0 + k),
    "logarithms": lambda s, b, h, q, k: s - torch.log(1.0 + (q - k).abs()) + torch.log2(1.0 + k) * 0.1,
    "sigmoid": lambda s, b, h, q, k: torch.sigmoid(s) * 2 + torch.exp2(-s.abs()),
    "clamped": lambda s, b, h, q, k: s.clamp(-1, 1) + torch.clamp(q - k, min=-3, max=4) * 0.1,
    "extremes": lambda s, b, h, q, k: torch.maximum(s, -s * 0.1) + torch.minimum(q, k) * 0.01,
    "floor": lambda s, b, h, q, k: s + torch.floor(q / 7) * 0.02 + (k / 8 - torch.floor(k / 8)),
}  # fmt: skip

MASKS = {
    "causal": lambda b, h, q, k: q >= k,
    "sliding": lambda b, h, q, k: (q - k <= 20) & (k <= q + 3),
    "strided": lambda b, h, q, k: (k % 8 == 0) | ((q - k).abs() < 5),
    "by head": lambda b, h, q, k: (q >= k) | (h == 1),
    "not": lambda b, h, q, k: ~((q // 8 == k // 8) ^ (b == 0)),
    "functions": lambda b, h, q, k: torch.logical_or(torch.logical_and(q > k, k != 4), q == 0),
}  # fmt: skip


@on_devices
@pytest.mark.parametrize("name", SCORE_MODS)
def test_score_mods(device, name):
    mod = SCORE_MODS[name]
    q, k, v = inputs(sq=61, sk=83, d=32, heads=4, device=device)
    compare(lambda q, k, v: flashattn.attention(q, k, v, score_mod=mod, return_lse=True), q, k, v, score_mod=mod)


@on_devices
@pytest.mark.parametrize("name", MASKS)
def test_masks(device, name):
    mask = MASKS[name]
    q, k, v = inputs(sq=61, sk=83, d=32, heads=4, device=device)
    compare(lambda q, k, v: flashattn.attention(q, k, v, mask_mod=mask, return_lse=True), q, k, v, mask_mod=mask)


@on_devices
def test_captured_tables_and_their_gradients(device):
    """Tables of 0 to 4 dimensions; floats get gradients, also through a conversion; one is used twice, one never."""
    heads, sq, sk = 4, 61, 83
    q, k, v = inputs(sq=sq, sk=sk, d=32, heads=heads, device=device)
    rand = lambda *shape: torch.rand(*shape, device=device)
    tables = [rand(()), rand(heads), rand(heads, sk), rand(2, heads, sq, sk), rand(sq)]
    ids = torch.randint(0, 3, (2, sk), device=device)
    keep = torch.rand(sq, device=device) < 0.8

    def with_tables(scale, slope, by_key, full, by_query):
        def mod(s, b, h, q, k):
            s = s * scale + by_key[h, k] * slope[h] + full[b, h, q, k]
            return torch.where(keep[q], s + by_query[q] * by_key[h, k], s - ids[b, k] * 0.25)

        return mod

    def ours(q, k, v, *tables):
        return flashattn.attention(q, k, v, score_mod=with_tables(*tables), return_lse=True)

    from conftest import close, plain

    d_o, d_lse = torch.randn(2, sq, heads, 32, device=device), torch.randn(2, heads, sq, device=device)

    def run(function, dtype):
        args = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, *tables)]
        o, lse = function(*args)[:2]
        loss = (o * d_o.to(dtype)).sum() + (lse * d_lse.to(dtype)).sum()
        return [o.detach(), lse.detach(), *torch.autograd.grad(loss, args)]

    def reference(q, k, v, *tables):
        return plain(q, k, v, score_mod=with_tables(*tables))

    results = run(ours, q.dtype), run(reference, torch.float64), run(reference, q.dtype)
    names = ["o", "lse", "dq", "dk", "dv", "scale", "slope", "by_key", "full", "by_query"]
    for name, *three in zip(names, *results):
        close(name, *three, q.dtype)


@on_devices
def test_documents_and_prefix(device):
    ids = torch.repeat_interleave(torch.arange(5, device=device), torch.tensor([10, 30, 1, 15, 5], device=device))
    prefix = torch.tensor([7, 40], device=device)
    mask = lambda b, h, q, k: (ids[q] == ids[k]) & ((k <= q) | (k < prefix[b]))
    q, k, v = inputs(sq=61, sk=61, d=32, device=device)
    compare(lambda q, k, v: flashattn.attention(q, k, v, mask_mod=mask, return_lse=True), q, k, v, mask_mod=mask)


@on_devices
def test_flex_attention(device):
    """FlexAttention's own call: the same arguments, the same results."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    q, k, v = (x.transpose(1, 2).detach() for x in inputs(sq=128, sk=256, d=32, heads=4, device=device))
    bias = torch.randn(4, device=device)
    mod = lambda s, b, h, q, k: s + bias[h] * (q - k).abs() * 0.01
    mask = lambda b, h, q, k: (q + 128 >= k) & (k % 3 != 1)
    theirs = flex.create_block_mask(mask, None, None, 128, 256, device=device)
    options = dict(score_mod=mod, scale=0.2, enable_gqa=True, return_lse=True)
    with pytest.warns() if device == "cpu" else _nothing():
        expected = flex.flex_attention(q, k, v, block_mask=theirs, **options)
    ours = flashattn.create_block_mask(mask, None, None, 128, 256, device=device)
    for block_mask in (ours, theirs):
        got = flashattn.flex_attention(q, k, v, block_mask=block_mask, **options)
        for a, b in zip(got, expected):
            torch.testing.assert_close(
                a, b, **(dict(atol=2e-6, rtol=1e-5) if device == "cpu" else dict(atol=4e-3, rtol=0))
            )
    names = list(inspect.signature(flex.flex_attention).parameters)[:8]
    assert names == list(inspect.signature(flashattn.flex_attention).parameters)[:8]
    names = list(inspect.signature(flex.create_block_mask).parameters)[:5]
    assert names == list(inspect.signature(flashattn.create_block_mask).parameters)[:5]


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_numpy_tables_and_functions():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 3, 16), np.float32) for n in (41, 57, 57))
    slope = rng.random(3, np.float32)
    table, ids = Table(slope), Table(rng.integers(0, 2, 57) == 1)
    mod = lambda s, b, h, q, k: flashattn.where(ids[k], np.tanh(s), s - np.abs(q - k) * table[h])
    got = flashattn.attention(q, k, v, score_mod=mod)
    t = [torch.from_numpy(x) for x in (q, k, v)]
    ts, ti = torch.from_numpy(slope), torch.from_numpy(ids.array)
    expected = flashattn.attention(
        *t, score_mod=lambda s, b, h, q, k: torch.where(ti[k], torch.tanh(s), s - (q - k).abs() * ts[h])
    )
    assert np.array_equal(got, expected.numpy())


@on_devices
def test_scaled_dot_product_attention(device):
    """PyTorch's own signature, defaults, alignment and masks."""
    theirs = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in inputs(sq=61, sk=83, d=32, heads=4, device=device))
    dtype = FINEST[device]
    bias = torch.randn(61, 83, dtype=dtype, device=device, requires_grad=True)
    per_head = torch.randn(1, 4, 1, 83, dtype=dtype, device=device, requires_grad=True)
    visible = torch.rand(2, 1, 61, 83, device=device) < 0.7
    cases = [
        {},
        {"is_causal": True},
        {"attn_mask": bias},
        {"attn_mask": per_head},
        {"attn_mask": visible, "scale": 0.3},
    ]
    d_o = torch.randn(2, 4, 61, 32, dtype=dtype, device=device)
    for options in cases:
        learned = [q, k, v, *(x for x in options.values() if torch.is_tensor(x) and x.requires_grad)]
        results = []
        for function in (flashattn.scaled_dot_product_attention, theirs):
            o = function(q, k, v, enable_gqa=True, **options)
            results.append([o, *torch.autograd.grad(o, learned, d_o)])
        for a, b in zip(*results):
            # In float16 both round; a sum over queries and batches has numbers of some ten.
            torch.testing.assert_close(
                a, b, **(dict(atol=1e-5, rtol=1e-4) if device == "cpu" else dict(atol=0.03, rtol=0.01))
            )
    parameters = inspect.signature(flashattn.scaled_dot_product_attention).parameters.values()
    got = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
    documented = theirs.__doc__.partition("(")[2].partition(")")[0]
    assert got == " ".join(documented.split())
    for wrong in ({"attn_mask": bias[1:]}, {"attn_mask": bias, "is_causal": True}):
        with pytest.raises(ValueError, match="attn_mask"):
            flashattn.scaled_dot_product_attention(q, k, v, enable_gqa=True, **wrong)


def test_minus_infinity_hides():
    """FlexAttention's other way to mask; also where a query sees nothing."""
    q, k, v = inputs(sq=40, sk=40, d=16)
    hide = lambda s, b, h, q, k: torch.where((q >= k) & (q > 5), s, -float("inf"))
    mask = lambda b, h, q, k: (q >= k) & (q > 5)
    d_o = torch.randn(2, 40, 6, 16)
    results = []
    for options in (dict(score_mod=hide), dict(mask_mod=mask)):
        o, lse = flashattn.attention(q, k, v, return_lse=True, **options)
        results.append([o, lse, *torch.autograd.grad(o, (q, k, v), d_o)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_a_trace_is_made_once():
    calls = []

    def mod(s, b, h, q, k):
        calls.append(1)
        return s + k

    traced = trace_score_mod(mod)
    assert trace_score_mod(traced) is traced
    q, k, v = inputs(grad=False)
    first = flashattn.attention(q, k, v, score_mod=traced)
    assert torch.equal(first, flashattn.attention(q, k, v, score_mod=mod))
    flashattn.attention(q, k, v, score_mod=traced)
    assert len(calls) == 2
    assert traced(1.0, 0, 0, 0, 2) == 3.0
    causal = trace_mask_mod(lambda b, h, q, k: k <= q)
    assert len(causal.ops) == 3, "nothing that is not needed"


WRONG = {
    "a branch": (lambda s, b, h, q, k: s if q > k else 0, TypeError, "where"),
    "and": (lambda s, b, h, q, k: s * (q > k and k > 3), TypeError, "&"),
    "a mask as score": (lambda s, b, h, q, k: q > k, TypeError, "float"),
    "bool plus float": (lambda s, b, h, q, k: s + (q > k), TypeError, "number"),
    "nothing": (lambda s, b, h, q, k: None, TypeError, "None"),
    "sine": (lambda s, b, h, q, k: torch.sin(s), NotImplementedError, "sin"),
    "a power": (lambda s, b, h, q, k: s**k, NotImplementedError, "power"),
    "slices": (lambda s, b, h, q, k: s + torch.ones(9, 9)[q, :], NotImplementedError, "slices"),
    "too few indices": (lambda s, b, h, q, k: s + torch.ones(9, 9)[q], TypeError, "2 dimensions is indexed by 1"),
    "too many": (lambda s, b, h, q, k: s + torch.ones(9)[q, k], IndexError, "1 dimension"),
    "a whole array": (lambda s, b, h, q, k: s + torch.ones(4), TypeError, "shape"),
    "a bare NumPy array": (lambda s, b, h, q, k: s + np.ones(9)[k], IndexError, None),
    "a large number": (lambda s, b, h, q, k: s + k * 2**40, ValueError, "32 bits"),
    "a string": (lambda s, b, h, q, k: s + "x", TypeError, "str"),
    "five dimensions": (lambda s, b, h, q, k: s + torch.ones(1, 1, 1, 1, 1)[b, b, b, b, b], ValueError, "at most 4"),
    "a float as index": (lambda s, b, h, q, k: s + torch.ones(9)[s], TypeError, "int"),
    "its own error": (lambda s, b, h, q, k: 1 / 0, ZeroDivisionError, None),
    "an argument too few": (lambda s, b, h, q: s, TypeError, None),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_functions_say_what_is_wrong(name):
    function, error, text = WRONG[name]
    q, k, v = inputs(grad=False)
    with pytest.raises(error, match=text):
        flashattn.attention(q, k, v, score_mod=function)
    # And leave nothing behind.
    assert torch.isfinite(flashattn.attention(q, k, v, score_mod=lambda s, b, h, q, k: s * 2)).all()


def test_a_mask_reads_no_score_and_terms_stay_inside():
    q, k, v = inputs(grad=False)
    kept = []
    flashattn.attention(q, k, v, score_mod=lambda s, b, h, q, k: kept.append(q) or s)
    with pytest.raises(ValueError, match="outside"):
        flashattn.attention(q, k, v, mask_mod=lambda b, h, q, k: k <= kept[0])
    with pytest.raises(ValueError, match="inside a function"):
        Table(np.ones(3))[1]
    with pytest.raises(TypeError, match="Bool"):
        flashattn.attention(q, k, v, mask_mod=lambda b, h, q, k: q)
