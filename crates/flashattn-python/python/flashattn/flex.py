"""The calling conventions of PyTorch's own attention, with heads before positions: FlexAttention's
(``torch.nn.attention.flex_attention``), and that of ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Any, Callable, Optional

from ._attention import attention
from ._trace import MaskMod, Table, trace_mask_mod

__all__ = ["BlockMask", "create_block_mask", "flex_attention", "scaled_dot_product_attention"]


class BlockMask:
    """A mask made ready; from :func:`create_block_mask`.

    Which blocks can be skipped is found by the native part, which bounds the mask's expression over blocks of the size
    that suits the device, so there is nothing else to store.
    """

    def __init__(self, mask_mod: MaskMod):
        self.mask_mod = mask_mod


def create_block_mask(
    mask_mod: Callable,
    B: Optional[int] = None,
    H: Optional[int] = None,
    Q_LEN: Optional[int] = None,
    KV_LEN: Optional[int] = None,
    device: Any = None,
    BLOCK_SIZE: Any = None,
    _compile: bool = False,
) -> BlockMask:
    """Traces a mask.

    Parameters
    ----------
    mask_mod : callable
        From (batch, head, q_idx, kv_idx) to whether the query sees the key.
    B, H, Q_LEN, KV_LEN, device, BLOCK_SIZE, _compile
        Accepted, as FlexAttention has them; a mask here is not tied to sizes.

    Returns
    -------
    BlockMask
    """
    return BlockMask(trace_mask_mod(mask_mod))


def flex_attention(
    query: Any,
    key: Any,
    value: Any,
    score_mod: Optional[Callable] = None,
    block_mask: Any = None,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
) -> Any:
    """Attention with a score mod and a mask of one's own; no compilation is needed.

    Parameters
    ----------
    query : array, ``[batch, heads_q, seqlen_q, head_dim]``
        Queries. (Note the order of dimensions, which is FlexAttention's.)
    key, value : array, ``[batch, heads_kv, seqlen_k, head_dim]``
        Keys and values.
    score_mod : callable or ScoreMod, optional
        From (score, batch, head, q_idx, kv_idx) to the new score. Tensors that it reads and that require a gradient get
        one.
    block_mask : BlockMask, optional
        From :func:`create_block_mask`, ours or PyTorch's.
    scale : float, optional
        Factor of the scores, 1/√head_dim if not given.
    enable_gqa : bool
        Whether there may be fewer KV heads than query heads.
    return_lse : bool
        Whether to return the log-sum-exp ``[batch, heads_q, seqlen_q]``, too.
    kernel_options
        Accepted and not needed.

    Returns
    -------
    array, ``[batch, heads_q, seqlen_q, head_dim_v]``, or with the log-sum-exp
    """
    _check(query, key, value, enable_gqa)
    mask_mod = None if block_mask is None else block_mask.mask_mod
    o, lse = attention(
        _swap(query),
        _swap(key),
        _swap(value),
        softmax_scale=scale,
        score_mod=score_mod,
        mask_mod=mask_mod,
        return_lse=True,
    )
    o = _swap(o)
    return (o, lse) if return_lse else o


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention as ``torch.nn.functional.scaled_dot_product_attention`` has it.

    Parameters
    ----------
    query : array, ``[batch, heads_q, seqlen_q, head_dim]``
        Queries.
    key, value : array, ``[batch, heads_kv, seqlen_k, head_dim]``
        Keys and values.
    attn_mask : array, broadcastable to ``[batch, heads_q, seqlen_q, seqlen_k]``, optional
        Truth values: whether the query sees the key. Numbers: are added to the scores, and get a gradient if they require
        one. It is as large as it is; :func:`flex_attention` needs no such array.
    dropout_p : float
        Probability with which an attention weight is dropped, from PyTorch's generator.
    is_causal : bool
        Query i sees keys up to i: aligned at the start, as PyTorch has it here (elsewhere in this package: at the end).
    scale : float, optional
        Factor of the scores, 1/√head_dim if not given.
    enable_gqa : bool
        Whether there may be fewer KV heads than query heads.

    Returns
    -------
    array, ``[batch, heads_q, seqlen_q, head_dim_v]``
    """
    _check(query, key, value, enable_gqa)
    options: dict[str, Any] = {}
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask and is_causal are given, expected one of them")
        full = (*query.shape[:3], key.shape[2])
        shape = (1,) * (4 - len(attn_mask.shape)) + tuple(attn_mask.shape)
        if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, full)):
            raise ValueError(f"attn_mask has shape {tuple(attn_mask.shape)}, expected one that broadcasts to {full}")
        attn_mask = attn_mask.reshape(shape)
        if "bool" in str(attn_mask.dtype):
            visible = Table(attn_mask)
            options["mask_mod"] = lambda b, h, q, k: visible[b, h, q, k]
        else:
            options["bias"] = attn_mask
    elif is_causal and query.shape[2] == key.shape[2]:
        options["causal"] = True  # no other alignment
    elif is_causal:
        options["mask_mod"] = lambda b, h, q, k: k <= q
    o = attention(_swap(query), _swap(key), _swap(value), softmax_scale=scale, dropout_p=dropout_p, **options)
    return _swap(o)


def _check(query: Any, key: Any, value: Any, enable_gqa: bool) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if len(getattr(x, "shape", ())) != 4:
            got = tuple(x.shape) if hasattr(x, "shape") else type(x).__name__
            raise ValueError(f"{name} is {got}, expected shape [batch, heads, seqlen, head_dim]")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads and key {key.shape[1]}, expected as many, or enable_gqa=True"
        )


def _swap(x: Any) -> Any:
    """Heads and positions exchanged, as a view where the library has views."""
    return x.swapaxes(1, 2)
