"""FlexAttention's calling convention (``torch.nn.attention.flex_attention``) on our kernels."""

from __future__ import annotations

from typing import Any, Callable, Optional

from ._attention import attention
from ._trace import MaskMod, trace_mask_mod

__all__ = ["BlockMask", "create_block_mask", "flex_attention"]


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
    for name, x in (("query", query), ("key", key), ("value", value)):
        if len(getattr(x, "shape", ())) != 4:
            got = tuple(x.shape) if hasattr(x, "shape") else type(x).__name__
            raise ValueError(f"{name} is {got}, expected shape [batch, heads, seqlen, head_dim]")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads and key {key.shape[1]}, expected as many, or enable_gqa=True"
        )
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


def _swap(x: Any) -> Any:
    """Heads and positions exchanged, as a view where the library has views."""
    return x.swapaxes(1, 2)
