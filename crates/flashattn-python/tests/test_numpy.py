"""NumPy arrays, by DLPack and without PyTorch."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import flashattn


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s).astype(dtype) for s in ((2, 41, 6, 24), (2, 57, 2, 24), (2, 57, 2, 40))]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_same_as_torch(dtype):
    q, k, v = arrays(dtype)
    t = [torch.from_numpy(x) for x in (q, k, v)]
    o, lse, none = flashattn.flash_attn_func(q, k, v, causal=True, softcap=3.0, return_attn_probs=True)
    assert type(o) is np.ndarray and o.dtype == dtype and o.shape == (2, 41, 6, 40) and none is None
    assert lse.dtype == np.float32 and lse.shape == (2, 6, 41)
    expected = flashattn.flash_attn_func(*t, causal=True, softcap=3.0, return_attn_probs=True)
    assert np.array_equal(o, expected[0].numpy()) and np.array_equal(lse, expected[1].numpy())
    slopes = np.linspace(0.1, 1, 6)
    o = flashattn.attention(q, k, v, alibi_slopes=slopes, window_size=np.array([9, 3]), dropout_p=0.2, seed=5)
    options = dict(alibi_slopes=torch.from_numpy(slopes), window_size=(9, 3), dropout_p=0.2, seed=5)
    assert np.array_equal(o, flashattn.attention(*t, **options).numpy())


def test_packed():
    q, k, v = (x[0] for x in arrays())
    cu_q, cu_k = np.array([0, 7, 7, 41]), np.array([0, 50, 53, 57], np.int32)
    o = flashattn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 34, 50)
    t = [torch.from_numpy(x) for x in (q, k, v, cu_q, cu_k)]
    assert np.array_equal(o, flashattn.flash_attn_varlen_func(*t, 34, 50).numpy())
    qkv = np.random.default_rng(1).standard_normal((2, 9, 3, 4, 16), np.float32)
    expected = flashattn.flash_attn_func(*(qkv[:, :, i] for i in range(3)))
    assert np.array_equal(flashattn.flash_attn_qkvpacked_func(qkv), expected)


def test_any_layout():
    q, k, v = arrays()
    expected = flashattn.flash_attn_func(q, k, v)
    for x in (q, k, v):
        x.setflags(write=False)
    assert np.array_equal(flashattn.flash_attn_func(q, k, v), expected), "read-only"
    views = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v)]
    assert np.array_equal(flashattn.flash_attn_func(*views), expected)
    backwards = [np.ascontiguousarray(x[:, ::-1])[:, ::-1] for x in (q, k, v)]
    assert np.array_equal(flashattn.flash_attn_func(*backwards), expected)
    columns = [np.asfortranarray(x) for x in (q, k, v)]
    assert np.array_equal(flashattn.flash_attn_func(*columns), expected)
    shared = np.broadcast_to(k[:1], k.shape)
    assert np.array_equal(
        flashattn.flash_attn_func(q, shared, shared), flashattn.flash_attn_func(q, shared.copy(), shared.copy())
    )


def test_errors():
    q, k, v = arrays()
    with pytest.raises(TypeError, match="q is float64, expected float16, bfloat16 or float32"):
        flashattn.flash_attn_func(q.astype(float), k, v)
    with pytest.raises(ValueError, match="needs a seed"):
        flashattn.flash_attn_func(q, k, v, 0.1)
    with pytest.raises(TypeError, match="cu_seqlens_q is float64"):
        flashattn.flash_attn_varlen_func(q[0], k[0], v[0], np.zeros(2), np.zeros(2), 1, 1)


def test_without_torch():
    code = """
import sys
sys.modules["torch"] = None
import numpy as np, flashattn
q = np.ones((1, 8, 2, 16), np.float32)
o = flashattn.attention(q, q, q, score_mod=lambda s, b, h, q, k: s - abs(q - k), mask_mod=lambda b, h, q, k: k <= q)
assert np.allclose(o, 1)
flashattn.install_as_flash_attn()
import flash_attn
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr
