"""Hugging Face Transformers: ``attn_implementation="fused"``, after :func:`register`.

Transformers describes masks as functions of positions, as FlexAttention does. They are traced like any other, so padding,
sliding windows, chunks and packed sequences cost no memory, and the blocks that they hide are skipped.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch

from ._attention import attention
from ._trace import MaskMod, trace_mask_mod

__all__ = ["register"]


def register(name: str = "fused") -> None:
    """Makes ``attn_implementation=name`` mean this package.

    Parameters
    ----------
    name : str
        What to write in ``from_pretrained(..., attn_implementation=name)``. Transformers takes every name with "flash" in
        it for one of the packages that it knows.

    Raises
    ------
    ValueError
        For such a name.

    Examples
    --------
    >>> flashattn.hf.register()
    >>> model = AutoModelForCausalLM.from_pretrained("…", attn_implementation="fused")
    """
    if "flash" in name:
        raise ValueError(f"name is {name!r}, expected one without 'flash', which Transformers would look for elsewhere")
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, _forward)
    AttentionMaskInterface.register(name, _mask)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Optional[Callable] = None,
    attention_mask: Optional[torch.Tensor] = None,
    **options: Any,
) -> MaskMod:
    """A model's mask, traced; in place of the tensor that Transformers would make of it."""

    def mask(b: Any, h: Any, q: Any, kv: Any) -> Any:
        kv = kv + kv_offset
        visible = kv <= q + q_offset if mask_function is None else mask_function(b, h, q + q_offset, kv)
        if attention_mask is not None:
            # Keys past the end of the padding mask are those of a static cache that are not there yet.
            visible = visible & attention_mask.to(torch.bool)[b, kv] & (kv < attention_mask.shape[1])
        return visible

    return trace_mask_mod(mask)


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    sliding_window: Optional[int] = None,
    softcap: Optional[float] = None,
    is_causal: Optional[bool] = None,
    s_aux: Optional[torch.Tensor] = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as Transformers calls it: heads before positions in, after positions out."""
    extra: dict[str, Any] = {}
    if isinstance(attention_mask, MaskMod):
        extra["mask_mod"] = attention_mask
    elif attention_mask is not None:
        raise TypeError(f"attention_mask is a {type(attention_mask).__name__}, expected None or a mask of flashattn.hf")
    else:
        extra["causal"] = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if sliding_window is not None:
            extra["window_size"] = (sliding_window - 1, sliding_window - 1)
    o = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        softmax_scale=scaling,
        softcap=softcap or 0.0,
        dropout_p=dropout,
        sinks=s_aux,
        **extra,
    )
    return o, None
