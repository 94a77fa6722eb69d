"""The functions of ``flash_attn`` 2, with its names, defaults, shapes and return values.

They take PyTorch tensors as the original does, and JAX, NumPy and CuPy arrays besides. Beyond the original: any
head_dim, float32, CPUs, gradients through the log-sum-exp and for ALiBi slopes.
"""

from __future__ import annotations

from typing import Any, Optional

from ._attention import attention, backend

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

_OPTIONS = """
    dropout_p : float
        Probability with which an attention weight is dropped; 0 for evaluation. Which ones are dropped comes from
        PyTorch's generator (``torch.manual_seed``).
    softmax_scale : float, optional
        Factor of the scores, 1/√head_dim if not given.
    causal : bool
        Queries see keys up to their own position, aligned at the end of both sequences.
    window_size : (int, int), or an array of two
        Queries see keys from so many before their own position to so many after it, inclusive; -1 is without limit.
    softcap : float
        If above 0, scores s become ``softcap · tanh(s / softcap)``.
    alibi_slopes : array of float32, ``[heads]`` or ``[batch, heads]``, optional
        Slopes m: scores become ``s − m · |i + seqlen_k − seqlen_q − j|``.
    deterministic : bool
        Whether gradients have the same bits in every run. CPUs give nothing else, whatever the number of threads; a GPU takes
        more time for that of q then, up to head_dim 128.
    return_attn_probs : bool
        Whether to return the log-sum-exp and, if there is dropout, the attention weights (for tests only), too.

    Returns
    -------
    out : array, {out}
        A row that sees no key is 0.
    softmax_lse : array of float32, {lse}
        Natural logarithm of the sum of exponentials of each row's scores. If ``return_attn_probs``.
    S_dmask : array ``[batch, heads, seqlen_q, seqlen_k]``, or None without dropout
        Attention weights, negative where they are dropped. If ``return_attn_probs``.
"""


def _documented(text: str, packed: bool = False) -> Any:
    """Gives a function its docstring."""
    names = ("``[total_q, heads, head_dim]``", "``[heads, total_q]``")
    if not packed:
        names = ("``[batch, seqlen_q, heads, head_dim]``", "``[batch, heads, seqlen_q]``")

    def decorate(function: Any) -> Any:
        function.__doc__ = text.rstrip() + _OPTIONS.format(out=names[0], lse=names[1])
        return function

    return decorate


def _run(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float,
    return_attn_probs: bool,
    lengths: Optional[tuple] = None,
    **options: Any,
) -> Any:
    seed = None
    if dropout_p > 0:
        seed = backend(q).random_seed(q)
    packed = {}
    if lengths is not None:
        packed = dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), lengths))
    o, lse = attention(q, k, v, dropout_p=dropout_p, seed=seed, return_lse=True, **packed, **options)
    if not return_attn_probs:
        return o
    if seed is None:
        return o, lse, None
    from . import _torch

    if lengths is None:
        return o, lse, _torch.probabilities(q, k, seed, dropout_p, **options)
    return o, lse, _torch.packed_probabilities(q, k, seed, dropout_p, lengths, **options)


def _options(
    softmax_scale: Any, causal: bool, window_size: Any, softcap: float, alibi_slopes: Any, deterministic: bool
) -> dict:
    return {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
    }


@_documented(
    """Attention. Query heads may share KV heads (MQA, GQA).

    Parameters
    ----------
    q : array, ``[batch, seqlen_q, heads, head_dim]``
        Queries.
    k, v : array, ``[batch, seqlen_k, heads_kv, head_dim]``
        Keys and values.
    """
)
def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _run(q, k, v, dropout_p, return_attn_probs, **options)


@_documented(
    """Attention of keys and values in one array.

    Parameters
    ----------
    q : array, ``[batch, seqlen_q, heads, head_dim]``
        Queries.
    kv : array, ``[batch, seqlen_k, 2, heads_kv, head_dim]``
        Keys and values.
    """
)
def flash_attn_kvpacked_func(
    q: Any,
    kv: Any,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    k, v = _parts("kv", kv, 2, 5)
    return _run(q, k, v, dropout_p, return_attn_probs, **options)


@_documented(
    """Attention of queries, keys and values in one array.

    Parameters
    ----------
    qkv : array, ``[batch, seqlen, 3, heads, head_dim]``
        Queries, keys and values.
    """
)
def flash_attn_qkvpacked_func(
    qkv: Any,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    q, k, v = _parts("qkv", qkv, 3, 5)
    return _run(q, k, v, dropout_p, return_attn_probs, **options)


@_documented(
    """Attention of packed sequences.

    Parameters
    ----------
    q : array, ``[total_q, heads, head_dim]``
        Queries of all sequences, one after the other.
    k, v : array, ``[total_k, heads_kv, head_dim]``
        Keys and values of all sequences.
    cu_seqlens_q, cu_seqlens_k : array of int32, ``[batch + 1]``
        Sequence b has rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.
    max_seqlen_q, max_seqlen_k : int
        The longest sequences.
    block_table
        Paged keys and values: not there yet.
    """,
    packed=True,
)
def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Any:
    if block_table is not None:
        raise NotImplementedError("flash_attn_varlen_func: block_table (paged KV) is not there yet")
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _run(q, k, v, dropout_p, return_attn_probs, lengths, **options)


@_documented(
    """Attention of packed sequences, keys and values in one array.

    Parameters
    ----------
    q : array, ``[total_q, heads, head_dim]``
        Queries of all sequences, one after the other.
    kv : array, ``[total_k, 2, heads_kv, head_dim]``
        Keys and values of all sequences.
    cu_seqlens_q, cu_seqlens_k : array of int32, ``[batch + 1]``
        Sequence b has rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.
    max_seqlen_q, max_seqlen_k : int
        The longest sequences.
    """,
    packed=True,
)
def flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    k, v = _parts("kv", kv, 2, 4)
    return _run(q, k, v, dropout_p, return_attn_probs, lengths, **options)


@_documented(
    """Attention of packed sequences; queries, keys and values in one array.

    Parameters
    ----------
    qkv : array, ``[total, 3, heads, head_dim]``
        Queries, keys and values of all sequences, one after the other.
    cu_seqlens : array of int32, ``[batch + 1]``
        Sequence b has rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.
    max_seqlen : int
        The longest sequence.
    """,
    packed=True,
)
def flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    q, k, v = _parts("qkv", qkv, 3, 4)
    return _run(q, k, v, dropout_p, return_attn_probs, lengths, **options)


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Decoding with a cache: not there yet.

    Raises
    ------
    NotImplementedError
        Always.
    """
    raise NotImplementedError(
        "flash_attn_with_kvcache is not there yet; flash_attn_func decodes with contiguous caches"
    )


def _parts(name: str, x: Any, count: int, rank: int) -> Any:
    """The arrays that are packed in one, as views of it."""
    axis = rank - 3
    if len(getattr(x, "shape", ())) != rank or x.shape[axis] != count:
        shape = "[batch, seqlen" if rank == 5 else "[total"
        got = tuple(x.shape) if hasattr(x, "shape") else type(x).__name__
        raise ValueError(f"{name} has shape {got}, expected {shape}, {count}, heads, head_dim]")
    if hasattr(x, "unbind"):
        # One gradient of the whole, rather than the sum of padded ones.
        return x.unbind(axis)
    before = (slice(None),) * axis
    return tuple(x[(*before, i)] for i in range(count))
