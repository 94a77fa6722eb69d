"""NumPy, CuPy and whatever else has ``__dlpack__`` and a module with ``empty``: the forward pass."""

from __future__ import annotations

import sys
from typing import Any

from . import _native
from ._options import write  # noqa: F401 (part of what a library offers)

_DTYPES = ("float16", "bfloat16", "float32")


def _module(q: Any) -> Any:
    return sys.modules[type(q).__module__.partition(".")[0]]


def check(name: str, x: Any) -> None:
    """Fails unless ``x`` is an array that can be attended to."""
    if not hasattr(x, "__dlpack__") or not hasattr(x, "shape"):
        raise TypeError(
            f"{name} is a {type(x).__name__}, expected an array with __dlpack__ (of NumPy, PyTorch, JAX, CuPy, …)"
        )
    if str(x.dtype) not in _DTYPES:
        raise TypeError(f"{name} is {x.dtype}, expected float16, bfloat16 or float32")


def number(x: Any, q: Any) -> Any:
    """The seed as an array."""
    return _module(q).asarray([x], dtype="int64")


def random_seed(q: Any) -> Any:
    """There is no generator that everybody means."""
    raise ValueError("dropout_p > 0 needs a seed: call flashattn.attention(..., dropout_p=…, seed=…)")


def table(name: str, x: Any, q: Any) -> tuple[Any, bool]:
    """A table as the native part reads it; never with a gradient."""
    dtype = "float32" if "float" in str(x.dtype) else "int32"
    return _module(q).ascontiguousarray(x, dtype=dtype).reshape(x.shape), False


def integers(name: str, x: Any, q: Any) -> Any:
    """Offsets as the native part reads them."""
    x = _module(q).asarray(x)
    if x.dtype.kind not in "iu":
        raise TypeError(f"{name} is {x.dtype}, expected int32")
    return _module(q).ascontiguousarray(x, dtype="int32")


def _as_it_is(x: Any, module: Any) -> bool:
    """Whether the native part can read it without a copy."""
    strides, flags = getattr(x, "strides", None), getattr(x, "flags", None)
    if getattr(flags, "writeable", True) is False and tuple(map(int, module.__version__.split(".")[:2])) < (2, 1):
        return False  # NumPy's DLPack could not say that an array is read-only, so it refuses
    return strides is None or (all(s >= 0 for s in strides) and (x.shape[-1] < 2 or strides[-1] == x.dtype.itemsize))


def run(options: str, q: Any, k: Any, v: Any, extras: list, max_seqlen_q: int, max_seqlen_k: int) -> tuple[Any, Any]:
    """o and lse."""
    module = _module(q)
    q, k, v = (x if _as_it_is(x, module) else module.array(x, order="C") for x in (q, k, v))
    o = module.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype)
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if len(q.shape) == 4 else (q.shape[1], q.shape[0])
    lse = module.empty(lse_shape, dtype="float32")
    stream = None
    if hasattr(module, "cuda"):  # CuPy
        stream = module.cuda.get_current_stream().ptr
        extras = [x.get() for x in extras]  # the native part reads these on the host
    _native.forward(options, q, k, v, extras, o, lse, stream)
    return o, lse
