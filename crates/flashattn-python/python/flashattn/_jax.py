"""JAX: the two passes as XLA custom calls under a ``custom_vjp``; they work under ``jit``, ``grad`` and ``vmap``.

XLA's FFI rather than ``pure_callback``: XLA's threads call the native code on XLA's own buffers, without Python, the
GIL or copies, compiled functions can be exported, and on a GPU only tables, offsets and seeds go through host memory.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _native
from ._options import learned, write  # noqa: F401 (part of what a library offers)

_DTYPES = ("float16", "bfloat16", "float32")

for _name, _platform, _handler in _native.xla_handlers():
    jax.ffi.register_ffi_target(_name, _handler, platform=_platform)


def check(name: str, x: Any) -> None:
    """Fails unless ``x`` is an array that can be attended to."""
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} is a {type(x).__name__}, expected a jax.Array like q")
    if str(x.dtype) not in _DTYPES:
        raise TypeError(f"{name} is {x.dtype}, expected float16, bfloat16 or float32")


def number(x: Any, q: Any) -> Any:
    """The seed as one or two int32: JAX has no 64-bit numbers unless told to. A random key gives its random bits."""
    if isinstance(x, int):
        return jnp.asarray(np.array([x & 0xFFFFFFFF, x >> 32 & 0xFFFFFFFF], np.uint32).view(np.int32))
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.lax.bitcast_convert_type(jax.random.bits(x, (2,), jnp.uint32), jnp.int32)
    return jnp.asarray(x, jnp.int32).reshape(-1)


def random_seed(q: Any) -> Any:
    """JAX has no generator but the caller's keys."""
    raise ValueError("dropout_p > 0 needs a seed: call flashattn.attention(..., dropout_p=…, seed=jax.random.key(…))")


def table(name: str, x: Any, q: Any) -> tuple[Any, bool]:
    """A table as the native part reads it. Floats of JAX get a gradient, arrays of NumPy are constants."""
    dtype = jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32
    return jnp.asarray(x, dtype), isinstance(x, jax.Array) and dtype == jnp.float32


def integers(name: str, x: Any, q: Any) -> Any:
    """Offsets as the native part reads them."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} is {x.dtype}, expected int32")
    return x.astype(jnp.int32)


def _shapes(q: Any, v: Any) -> tuple:
    lse = (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0])
    o = (*q.shape[:-1], v.shape[-1])
    return jax.ShapeDtypeStruct(o, q.dtype), jax.ShapeDtypeStruct(lse, jnp.float32)


def _call(name: str, results: Any, options: str, *operands: Any) -> Any:
    return jax.ffi.ffi_call(name, results, vmap_method="sequential")(*operands, options=options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: str, q: Any, k: Any, v: Any, extras: tuple) -> tuple[Any, Any]:
    return tuple(_call("flashattn_forward", _shapes(q, v), options, q, k, v, *extras))


def _attend_forward(options: str, q: Any, k: Any, v: Any, extras: tuple) -> tuple:
    o, lse = _attend(options, q, k, v, extras)
    return (o, lse), (q, k, v, o, lse, extras)


def _attend_backward(options: str, saved: tuple, cotangents: tuple) -> tuple:
    q, k, v, o, lse, extras = saved
    do, dlse = cotangents
    slots = learned(options)
    like = [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))]
    like += [jax.ShapeDtypeStruct(extras[i].shape, jnp.float32) for i in slots]
    dq, dk, dv, *d_tables = _call("flashattn_backward", like, options, q, k, v, o, lse, do, dlse, *extras)
    d_extras = [_zero(x) for x in extras]
    for i, gradient in zip(slots, d_tables):
        d_extras[i] = gradient
    return dq, dk, dv, tuple(d_extras)


def _zero(x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


_attend.defvjp(_attend_forward, _attend_backward)


def run(options: str, q: Any, k: Any, v: Any, extras: list, max_seqlen_q: int, max_seqlen_k: int) -> tuple[Any, Any]:
    """o and lse."""
    return _attend(options, q, k, v, tuple(extras))
