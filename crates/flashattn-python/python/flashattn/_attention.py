""":func:`attention`, with every option, and how it finds the caller's array library."""

from __future__ import annotations

import math
import sys
from typing import Any, Callable, Optional

from ._trace import trace_mask_mod, trace_score_mod


def backend(q: Any) -> Any:
    """The module for the library that ``q`` belongs to."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(q, torch.Tensor):
        from . import _torch

        return _torch
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(q, jax.Array):
        from . import _jax

        return _jax
    from . import _arrays

    return _arrays


def check_shapes(library: Any, q: Any, k: Any, v: Any, packed: bool) -> None:
    """Fails unless q, k and v fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        library.check(name, x)
        rank, names = (3, "[total, heads, head_dim]") if packed else (4, "[batch, seqlen, heads, head_dim]")
        if len(x.shape) != rank:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {names}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}, expected {q.dtype} like q")
    (*rows, heads, _), (*rows_q, heads_q, dim_q) = k.shape, q.shape
    expected = (*(rows if packed else (rows_q[0], rows[1])), heads, dim_q)
    if tuple(k.shape) != expected:
        raise ValueError(f"k has shape {tuple(k.shape)}, expected {expected} to fit q {tuple(q.shape)}")
    expected = (*rows, heads, v.shape[-1])
    if tuple(v.shape) != expected:
        raise ValueError(f"v has shape {tuple(v.shape)}, expected {expected} to fit k {tuple(k.shape)}")
    if heads == 0 or heads_q % heads:
        raise ValueError(f"q has {heads_q} heads, expected a multiple of the {heads} of k and v")


def window_sides(window_size: Any) -> tuple[Optional[int], Optional[int]]:
    """Left and right of a window; None where it is open."""
    sides = window_size.tolist() if hasattr(window_size, "tolist") else list(window_size)
    if len(sides) != 2:
        raise ValueError(f"window_size is {window_size}, expected two numbers (left, right), -1 for no limit")
    sides = [-1 if side is None else int(side) for side in sides]
    return (None if sides[0] < 0 else sides[0]), (None if sides[1] < 0 else sides[1])


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softmax_scale: Optional[float] = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    bias: Any = None,
    score_mod: Optional[Callable] = None,
    mask_mod: Optional[Callable] = None,
    sinks: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    dropout_p: float = 0.0,
    seed: Any = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:
    """Exact attention in memory linear in the sequence length, with every option; all of them compose.

    ``softmax(mask(score_mod(softmax_scale · q kᵀ))) v`` for each batch and head. Differentiable with respect to q, k, v,
    sinks, and floating-point tables (bias, slopes, arrays that ``score_mod`` reads) that require a gradient, through the
    output and through the log-sum-exp: by ``torch.autograd`` and by JAX.

    Parameters
    ----------
    q : array, ``[batch, seqlen_q, heads_q, head_dim]``
        Queries: a PyTorch tensor, a JAX array, a NumPy or CuPy array, of float16, bfloat16 or float32, with any strides.
        (It is copied if its last stride is not 1.) Packed sequences: ``[total_q, heads_q, head_dim]``.
    k, v : array, ``[batch, seqlen_k, heads_kv, head_dim]``
        Keys and values; ``heads_q`` is a multiple of ``heads_kv``. The head_dim of v may differ.
    causal : bool
        Queries see keys up to their own position, aligned at the end: key j ≤ i + seqlen_k − seqlen_q.
    window_size : (int, int)
        Queries see keys from so many before that position to so many after it, inclusive; -1 is without limit.
    softmax_scale : float, optional
        Factor of the scores, 1/√head_dim if not given.
    softcap : float
        If above 0, scores s become ``softcap · tanh(s / softcap)``.
    alibi_slopes : array, ``[heads_q]`` or ``[batch, heads_q]``, optional
        Slopes m of ALiBi: scores become ``s − m · |i + seqlen_k − seqlen_q − j|``.
    bias : array, ``[batch, heads_q, seqlen_q, seqlen_k]``, optional
        Is added to the scores; each dimension may be 1.
    score_mod : callable, optional
        From (score, batch, head, q_idx, kv_idx) to the new score; see :func:`trace_score_mod`. Applied after the above.
    mask_mod : callable, optional
        From (batch, head, q_idx, kv_idx) to whether the query sees the key. Blocks that it hides are skipped.
    sinks : array, ``[heads_q]``, optional
        A learned logit for each head in the softmax's denominator.
    cu_seqlens_q, cu_seqlens_k : array of int32, ``[batch + 1]``, optional
        Packed sequences: sequence b has rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.
    max_seqlen_q, max_seqlen_k : int
        The longest of them. (The CPU needs no such hint.)
    dropout_p : float
        Probability with which a weight is dropped. Others are divided by 1 − dropout_p.
    seed : int or array, optional
        Decides which. PyTorch: from its generator if not given. JAX: also a key.
    deterministic : bool
        Whether gradients have the same bits in every run. CPUs give nothing else; a GPU takes more time for that of q then, up to
        head_dim 128, and computes those of tables in sums that do not round, which take memory.
    return_lse : bool
        Whether to return the log-sum-exp, too.

    Returns
    -------
    o : array, ``[batch, seqlen_q, heads_q, head_dim_v]``
        As q's library has them. A row that sees no key is 0.
    lse : array of float32, ``[batch, heads_q, seqlen_q]``, or ``[heads_q, total_q]`` if packed
        Natural logarithm of the sum of exponentials of each row's scores; -inf if it sees no key. If ``return_lse``.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong: which, what was got, and what was expected.
    NotImplementedError
        If the device cannot do it yet.
    """
    library = backend(q)
    packed = cu_seqlens_q is not None
    if packed != (cu_seqlens_k is not None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k: one is given, expected both or none")
    check_shapes(library, q, k, v, packed)
    if softcap < 0:
        raise ValueError(f"softcap is {softcap}, expected 0 (none) or more")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}, expected 0 <= dropout_p < 1")
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale is {softmax_scale}, expected a finite number")

    extras: list = []
    learned: list[bool] = []

    def add(name: str, x: Any) -> int:
        x, grad = library.table(name, x, q)
        extras.append(x)
        learned.append(grad)
        return len(extras) - 1

    alibi = None if alibi_slopes is None else add("alibi_slopes", alibi_slopes)
    bias = None if bias is None else add("bias", bias)
    score, score_table = None, len(extras)
    if score_mod is not None:
        traced_score = trace_score_mod(score_mod)
        score = traced_score.ops
        for x in traced_score.tables:
            add("a table of score_mod", x)
    mask, mask_table = None, len(extras)
    if mask_mod is not None:
        traced_mask = trace_mask_mod(mask_mod)
        mask = traced_mask.ops
        for x in traced_mask.tables:
            add("a table of mask_mod", x)
            learned[-1] = False
    if packed:
        extras += [
            library.integers(name, x, q) for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k))
        ]
    if sinks is not None:
        extras.append(library.table("sinks", sinks, q)[0])
    if dropout_p > 0:
        extras.append(library.random_seed(q) if seed is None else library.number(seed, q))
    options = library.write(
        bool(causal), window_sides(window_size), None if softmax_scale is None else float(softmax_scale),
        float(softcap) if softcap > 0 else None, float(dropout_p) if dropout_p > 0 else None, alibi, bias,
        score, score_table, mask, mask_table, tuple(learned), packed, sinks is not None, bool(deterministic),
    )  # fmt: skip
    o, lse = library.run(options, q, k, v, extras, max_seqlen_q, max_seqlen_k)
    return (o, lse) if return_lse else o
