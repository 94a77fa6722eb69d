"""Exact attention, forward and backward, in memory linear in the sequence length (FlashAttention, arXiv 2205.14135), on
the arrays of PyTorch, JAX, NumPy and CuPy.

>>> import numpy as np, flashattn
>>> q = k = v = np.random.default_rng(0).standard_normal((1, 512, 8, 64), np.float32)
>>> o = flashattn.flash_attn_func(q, k, v, causal=True)

:func:`attention` has every option; :func:`flash_attn_func` and its kin have the signatures of ``flash_attn`` 2;
:func:`flex_attention` has that of PyTorch's FlexAttention.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import io
from ._attention import attention
from ._install import install_as_flash_attn
from ._native import clear_plans, num_threads, set_num_threads
from ._trace import MaskMod, ScoreMod, Table, Term, trace_mask_mod, trace_score_mod, where
from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from .flex import BlockMask, create_block_mask, flex_attention, scaled_dot_product_attention

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # These need PyTorch.
    if name in ("bert_padding", "hf"):
        return importlib.import_module(f"flashattn.{name}")
    raise AttributeError(f"module 'flashattn' has no attribute {name!r}")


__all__ = [
    "BlockMask",
    "MaskMod",
    "ScoreMod",
    "Table",
    "Term",
    "attention",
    "clear_plans",
    "create_block_mask",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "flex_attention",
    "install_as_flash_attn",
    "io",
    "num_threads",
    "scaled_dot_product_attention",
    "set_num_threads",
    "trace_mask_mod",
    "trace_score_mod",
    "where",
]
