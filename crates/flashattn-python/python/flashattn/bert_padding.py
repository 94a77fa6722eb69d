"""Padded batches to packed sequences and back, as ``flash_attn.bert_padding`` has it. PyTorch only."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

__all__ = ["index_first_axis", "pad_input", "unpad_input"]


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` of ``x``."""
    return x.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Optional[Tensor] = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Takes the padding out.

    Parameters
    ----------
    hidden_states : Tensor, ``[batch, seqlen, ...]``
    attention_mask : Tensor, ``[batch, seqlen]``
        1 or True where there is a token.
    unused_mask : Tensor, ``[batch, seqlen]``, optional
        1 where memory is kept for a token that is not used.

    Returns
    -------
    hidden_states : Tensor, ``[total, ...]``
    indices : Tensor, ``[total]``
        Where the tokens were in the flattened batch.
    cu_seqlens : Tensor of int32, ``[batch + 1]``
    max_seqlen : int
    seqused : Tensor of int32, ``[batch]``
        Tokens of each sequence, without the unused ones.
    """
    every = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = every.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(every.flatten(), as_tuple=False).flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Puts the padding back, as zeros: ``[total, ...]`` to ``[batch, seqlen, ...]``."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))
