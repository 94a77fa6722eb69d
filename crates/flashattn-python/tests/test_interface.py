"""The signatures of flash_attn 2, its import path, and errors that say what was got and expected."""

import ctypes
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import flashattn
from conftest import inputs

T = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,"
    " deterministic=False, return_attn_probs=False"
)
VL = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {T}",
    "flash_attn_kvpacked_func": f"q, kv, {T}",
    "flash_attn_qkvpacked_func": f"qkv, {T}",
    "flash_attn_varlen_func": f"q, k, v, {VL}, {T}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {VL}, {T}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {T}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None,"
    " cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,"
    " window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,"
    " return_softmax_lse=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(flashattn, name)).parameters.values()
    got = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    assert got == SIGNATURES[name]
    assert all(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters)
    assert all(f"{p.name}" in getattr(flashattn, name).__doc__ for p in parameters) or "kvcache" in name


def test_everything_is_documented():
    for name in flashattn.__all__:
        assert inspect.getdoc(getattr(flashattn, name)), name
    assert "Parameters\n----------" in inspect.getdoc(flashattn.attention)


def test_import_flash_attn():
    code = """
import flashattn, torch
module = flashattn.install_as_flash_attn()
assert flashattn.install_as_flash_attn() is module
import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.flash_attn_interface import flash_attn_qkvpacked_func
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
import flash_attn.bert_padding, flash_attn.flash_attn_interface
assert flash_attn.__version__.startswith("2.") and flash_attn_func is flashattn.flash_attn_func
q = torch.randn(1, 9, 2, 16)
assert flash_attn_func(q, q, q, causal=True).shape == q.shape
try:
    import flash_attn.flash_attn_triton
except ModuleNotFoundError:
    print("ok")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr
    other = "import sys, types; sys.modules['flash_attn'] = types.ModuleType('flash_attn'); import flashattn; flashattn.install_as_flash_attn()"
    done = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
    assert "RuntimeError: flash_attn has been imported already" in done.stderr


def test_import_needs_no_library():
    code = "import sys, flashattn; print([m for m in ('numpy', 'torch', 'jax') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def change(**changed):
    def call():
        q, k, v = inputs(grad=False)
        arguments = {"q": q, "k": k, "v": v, **{name: f(q) if callable(f) else f for name, f in changed.items()}}
        return flashattn.attention(**arguments)

    return call


WRONG = {
    "a list": (change(q=[1.0]), TypeError, "q is a list, expected an array"),
    "float64": (change(q=lambda q: q.double()), TypeError, "q is torch.float64, expected torch.float16"),
    "integers": (change(k=lambda q: q.int()), TypeError, "k is torch.int32"),
    "two dtypes": (change(v=lambda q: q.half()), TypeError, "v is torch.float16, expected torch.float32 like q"),
    "two libraries": (change(k=lambda q: q.numpy()), TypeError, "k is a ndarray, expected a torch.Tensor"),
    "three dimensions": (change(q=lambda q: q[0]), ValueError, r"q has shape \(113, 6, 59\), expected \[batch"),
    "another batch": (change(q=lambda q: q[:1]), ValueError, r"k has shape \(2, 203, 2, 59\), expected \(1, 203, 2, 59\)"),
    "another length": (change(v=lambda q: q[..., :2, :]), ValueError, r"v has shape \(2, 113, 2, 59\), expected \(2, 203"),
    "another head_dim": (change(q=lambda q: q[..., :58]), ValueError, "58"),
    "heads": (change(q=lambda q: q[:, :, :5]), ValueError, "q has 5 heads, expected a multiple of the 2"),
    "slopes": (change(alibi_slopes=torch.ones(5)), ValueError, r"ALiBi slopes has shape \[5\], expected \[heads_q = 6\]"),
    "bias": (change(bias=torch.ones(6, 113, 203)), ValueError, r"bias has shape \[6, 113, 203\]"),
    "sinks": (change(sinks=torch.ones(2)), ValueError, r"sinks has shape \[2\], expected \[6\]"),
    "dropout": (change(dropout_p=1.0), ValueError, "dropout_p is 1.0, expected 0 <="),
    "softcap": (change(softcap=-1.0), ValueError, "softcap is -1.0"),
    "scale": (change(softmax_scale=float("nan")), ValueError, "softmax_scale is nan"),
    "window": (change(window_size=(1, 2, 3)), ValueError, "window_size"),
    "one cu_seqlens": (change(cu_seqlens_q=torch.tensor([0, 1])), ValueError, "expected both or none"),
    "dense with cu_seqlens": (
        change(cu_seqlens_q=torch.tensor([0, 113]), cu_seqlens_k=torch.tensor([0, 203])), ValueError, r"\[total, heads"),
    "meta": (lambda: flashattn.attention(*(x.to("meta") for x in inputs(grad=False))).numpy(), Exception, None),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    call, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        call()


PACKED = {
    "decreasing": ([0, 7, 3, 20], ValueError, "decreases from 7 to 3"),
    "past the end": ([0, 7, 25], ValueError, "ends at 25, expected 20"),
    "short of the end": ([0, 7], ValueError, "ends at 7, expected 20"),
    "not from 0": ([1, 20], ValueError, "starts at 1"),
    "negative": ([0, -3, 20], ValueError, "decreases"),
    "floats": ([0.0, 20.0], TypeError, "expected torch.int32"),
    "empty": ([], (TypeError, ValueError), None),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_errors(name):
    offsets, error, text = PACKED[name]
    q = torch.randn(20, 2, 8)
    cu = torch.tensor(offsets)
    with pytest.raises(error, match=text):
        flashattn.flash_attn_varlen_func(q, q, q, cu, cu, 20, 20)


def test_not_there_yet_by_name():
    q = torch.randn(1, 2, 2, 8)
    with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache"):
        flashattn.flash_attn_with_kvcache(q, q, q)
    with pytest.raises(NotImplementedError, match="block_table"):
        cu = torch.tensor([0, 2])
        flashattn.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 2, 2, block_table=torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"qkv has shape \(1, 2, 2, 8\), expected \[batch, seqlen, 3"):
        flashattn.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match="4 heads and key 2, expected as many, or enable_gqa"):
        flashattn.flex_attention(torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))


def test_io_model():
    """The paper's Fig. 2, left: 4.4 GB of HBM accesses for flash, about 40 for standard."""
    counted = flashattn.io.model(1024, batch=64, dtype="float16", dropout_p=0.1, loop_order="kv-outer", density=0.25)
    assert counted["flash"]["bytes"] / 1e9 == pytest.approx(4.4, abs=0.05)
    assert counted["standard"]["bytes"] > 8 * counted["flash"]["bytes"] > 8 * counted["block-sparse"]["bytes"]
    assert counted["flash"]["flops"] > counted["standard"]["flops"], "recomputation"
    one, two = (flashattn.io.workspace_bytes((1, n, 8, 64), dtype="bfloat16", causal=True)[1] for n in (8192, 16384))
    assert one < two <= 2 * one
    with pytest.raises(ValueError, match='"h200", expected'):
        flashattn.io.model(1024, device="h200")
    with pytest.raises(TypeError, match="float8"):
        flashattn.io.model(1024, dtype="float8")


def test_threads():
    with pytest.raises(ValueError, match="0, expected at least 1"):
        flashattn.set_num_threads(0)
    before = flashattn.num_threads()
    flashattn.set_num_threads(before + 1)
    assert flashattn.num_threads() == before + 1
    flashattn.set_num_threads(before)
    flashattn.clear_plans()


def test_readme():
    """The README's Python runs."""
    readme = pathlib.Path(__file__).parents[3] / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    scope = {}
    for block in blocks:
        exec(block, scope)
    assert scope["q"].grad.shape == scope["o"].shape


def test_version():
    metadata = importlib.metadata if hasattr(importlib, "metadata") else importlib.import_module("importlib.metadata")
    try:
        assert metadata.version("flashattn") == flashattn.__version__
    except metadata.PackageNotFoundError:
        assert "site-packages" not in flashattn.__file__, "used from the source tree"


def test_native_refuses_what_python_would_not_give():
    """The native part trusts nobody: overlap, read-only, wrong sizes, types, capsules."""
    from flashattn import _native

    q = np.zeros((1, 4, 2, 8), np.float32)
    lse = np.zeros((1, 2, 4), np.float32)
    o = np.zeros_like(q)
    frozen = np.zeros_like(q)
    frozen.setflags(write=False)
    odd = np.zeros(q.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(q.shape)
    ok = '{"causal":true}'
    cases = [
        ((ok, q, q, q, [], q, lse), ValueError, "o shares memory with q"),
        ((ok, q, q, q, [], o, o[0, 0, :, :4]), ValueError, "lse"),
        ((ok, q, q, q, [], frozen, lse), ValueError, "o is read-only"),
        ((ok, q, q, q, [], o[:, :3], lse), ValueError, r"o has shape \[1, 3, 2, 8\]"),
        ((ok, q, q, q, [], o, lse[..., :3]), ValueError, "lse"),
        ((ok, q, q, q, [], o.astype(np.float16), lse), TypeError, "o is float16, expected float32"),
        ((ok, q, q, q, [], o, lse.astype(np.int32)), TypeError, "lse is int32, expected float32"),
        ((ok, q[..., ::2], q, q, [], o, lse), ValueError, "q: last stride is 2"),
        ((ok, q[:, ::-1], q, q, [], o, lse), ValueError, "q of shape .* runs backwards"),
        ((ok, odd, q, q, [], o, lse), ValueError, "multiple of 4"),
        ((ok, q[0, 0], q, q, [], o, lse), ValueError, "q has shape"),
        ((ok, q.astype(np.complex64), q, q, [], o, lse), TypeError, "q has DLPack type code 5"),
        ((ok, 3, q, q, [], o, lse), TypeError, "q is a int"),
        ((ok, q, q, q, [q], o, lse), ValueError, "1 extra arrays, the options have 0"),
        (('{"tables":[true]}', q, q, q, [lse.astype(np.int32)], o, lse), ValueError, None),
        (('{"varlen":true}', q[0], q[0], q[0], [lse.copy(), lse.copy()], o[0], lse[0]), TypeError, "int32"),
        (('{"alibi":3}', q, q, q, [], o, lse), ValueError, "table 3 is used"),
        (('{"score":{"ops":[]}}', q, q, q, [], o, lse), ValueError, "no operation"),
        (('{"score":{"ops":[{"un":["neg",0]}]}}', q, q, q, [], o, lse), ValueError, "operation 0 uses operation 0"),
        (('{"nonsense":1}', q, q, q, [], o, lse), ValueError, "unknown field"),
        (("", q, q, q, [], o, lse), ValueError, "options"),
    ]  # fmt: skip
    for arguments, error, text in cases:
        with pytest.raises(error, match=text):
            _native.forward(*arguments)
        assert not o.any() and not lse.any(), "nothing is written"
    capsule = q.__dlpack__()
    q2 = np.ones_like(q)
    _native.forward(ok, capsule, q2, q2, [], o, lse)
    with pytest.raises(TypeError, match="not yet taken"):
        _native.forward(ok, capsule, q2, q2, [], o, lse)


class Elsewhere:
    """An array whose DLPack tensor says that it is in a GPU's memory, at an address that is nobody's."""

    def __init__(self, shape, bits=16, device=(2, 0), strides=None):
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        self.strides = (ctypes.c_int64 * len(shape))(*strides) if strides else None
        fields = [("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32)]
        fields += [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]
        fields += [("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("offset", ctypes.c_uint64)]
        fields += [("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]
        managed = type("Managed", (ctypes.Structure,), {"_fields_": fields})
        places = [x and ctypes.addressof(x) for x in (self.shape, self.strides)]
        self.managed = managed(0x10000, device, len(shape), 2, bits, 1, *places, 0, None, None)

    def __dlpack__(self):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor", None)


def test_gradients_that_cannot_be_touched():
    """The backward pass on arrays that say that they are on a GPU, whether or not there is one; and on wrong ones here."""
    from flashattn import _native

    shape, options = (1, 4, 2, 8), '{"causal":true}'
    read = [Elsewhere(shape), Elsewhere((1, 2, 4), 32), Elsewhere(shape), None]  # o, lse, do, dlse
    written = [Elsewhere(shape) for _ in range(3)]
    for i, x in enumerate(written):
        x.managed.data = 0x20000 + 0x10000 * i
    q = read[0]
    asked = []
    memory = dict(stream=0, allocate=asked.append, captured=False)
    with pytest.raises(RuntimeError, match=r"cuda:0: "):
        _native.backward(options, q, q, q, [], *read, *written, [], **memory)
    with pytest.raises(NotImplementedError, match=r"dtype: f32 .* is not supported on cuda:0"):
        wide = [Elsewhere(shape, 32) for _ in range(4)]
        for i, x in enumerate(wide[1:]):
            x.managed.data = 0x20000 + 0x10000 * i
        q32 = wide[0]
        _native.backward(options, q32, q32, q32, [], q32, read[1], q32, None, *wide[1:], [], **memory)
    with pytest.raises(TypeError, match="dv is on cpu, expected cuda:0"):
        _native.backward(options, q, q, q, [], *read, *written[:2], np.zeros(shape, np.float16), [], **memory)
    with pytest.raises(ValueError, match="dk shares memory with dq"):
        _native.backward(options, q, q, q, [], *read, written[0], written[0], written[2], [], **memory)
    assert not asked
    x, lse = np.zeros(shape, np.float32), np.zeros((1, 2, 4), np.float32)
    out = [np.zeros(shape, np.float32) for _ in range(3)]
    for extras, d_extras, wanted in (([], [lse.copy()], 0), ([np.ones(2, np.float32)], [], 1)):
        text = '{"tables":[%s]%s}' % (("true", ',"alibi":0') if extras else ("", ""))
        with pytest.raises(ValueError, match=f"got {len(d_extras)} gradients of extras to fill, expected {wanted}"):
            _native.backward(text, x, x, x, extras, x, lse, x, None, *out, d_extras)


def test_memory_that_cannot_be_touched():
    """Wrong pointers, devices and strides are exceptions, whether or not there is a driver or a GPU."""
    from flashattn import _native

    shape, options = (1, 4, 2, 8), '{"causal":true}'
    x, lse = Elsewhere(shape), Elsewhere((1, 2, 4), 32)
    o = Elsewhere(shape)
    o.managed.data, lse.managed.data = 0x20000, 0x30000
    with pytest.raises(RuntimeError, match=r"cuda:0: "):
        _native.forward(options, x, x, x, [], o, lse)
    with pytest.raises(NotImplementedError, match=r"dtype: f32 .* is not supported on cuda:0"):
        q, out = Elsewhere(shape, 32), Elsewhere(shape, 32)
        out.managed.data = 0x20000
        _native.forward(options, q, q, q, [], out, lse)
    host = np.zeros(shape, np.float16)
    with pytest.raises(TypeError, match="k is on cpu, expected cuda:0"):
        _native.forward(options, x, host, x, [], o, lse)
    with pytest.raises(TypeError, match="k is on cuda:0, expected cpu"):
        _native.forward(options, host, x, host, [], np.zeros(shape, np.float16), lse)
    with pytest.raises(TypeError, match="DLPack device type 10"):
        _native.forward(options, Elsewhere(shape, device=(10, 0)), x, x, [], o, lse)
    with pytest.raises(ValueError, match="overflow"):
        far = Elsewhere(shape, device=(1, 0), strides=(1 << 62, 1 << 62, 1 << 62, 1))
        _native.forward(options, far, host, host, [], np.zeros(shape, np.float16), np.zeros((1, 2, 4), np.float32))
    with pytest.raises((TypeError, ValueError)):
        null = Elsewhere(shape, device=(1, 0))
        null.managed.data = None
        _native.forward(options, null, host, host, [], np.zeros(shape, np.float16), np.zeros((1, 2, 4), np.float32))
