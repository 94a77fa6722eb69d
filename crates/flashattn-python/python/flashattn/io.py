"""The IO model: what attention computes and moves, on a machine with a fast memory before a slow one (the paper's
section 3), for standard and for flash attention."""

from __future__ import annotations

import json
from typing import Any, Optional

from . import _native

__all__ = ["model", "workspace_bytes"]


def model(
    seqlen: int,
    *,
    seqlen_q: Optional[int] = None,
    head_dim: int = 64,
    heads: int = 16,
    kv_heads: Optional[int] = None,
    batch: int = 1,
    dtype: str = "bfloat16",
    causal: bool = False,
    dropout_p: Optional[float] = None,
    passes: str = "both",
    device: str = "a100",
    loop_order: str = "q-outer",
    tile: Optional[tuple[int, int]] = None,
    density: Optional[float] = None,
    sram_bytes: Optional[int] = None,
    peak: Optional[float] = None,
    bandwidth: Optional[float] = None,
) -> dict[str, dict[str, Any]]:
    """Counts FLOPs and bytes, as ``flashattn io`` does on the command line.

    Parameters
    ----------
    seqlen : int
        Keys; queries, too, if ``seqlen_q`` is not given.
    head_dim, heads, kv_heads, batch, dtype, causal, dropout_p
        The problem.
    passes : {'both', 'forward', 'backward'}
        What is counted.
    device : {'a100', 'a100-80', 'h100', 'cpu'}
        The machine; 'cpu' is this one, with estimates of its peak and bandwidth.
    loop_order : {'q-outer', 'kv-outer'}
        Which operand stays in fast memory: queries (FlashAttention-2), or keys and values (the paper's Algorithm 1).
    tile : (int, int), optional
        Queries and keys of a tile, instead of the largest that fits.
    density : float, optional
        Also count block-sparse attention that computes this fraction of the tiles.
    sram_bytes, peak, bandwidth : optional
        Fast memory of a processor in bytes, FLOP/s, and bytes/s, instead of the device's.

    Returns
    -------
    dict
        For 'standard', 'flash' and perhaps 'block-sparse': a dict with 'flops', 'bytes' (the paper's HBM accesses),
        'slow_bytes' (those that the shared cache cannot serve), 'extra_bytes' (memory beside the tensors),
        'intensity' (FLOP/byte), 'time_compute' and 'time_memory' (seconds), 'bound', and 'tensors'.

    Examples
    --------
    The configuration of the paper's Fig. 2, left: 4.4 GB.

    >>> counted = flashattn.io.model(1024, batch=64, dtype="float16", dropout_p=0.1, loop_order="kv-outer")
    >>> round(counted["flash"]["bytes"] / 1e9, 1)
    4.4
    """
    text = _native.io_model(
        seqlen if seqlen_q is None else seqlen_q, seqlen, head_dim, heads, heads if kv_heads is None else kv_heads,
        batch, dtype, causal, dropout_p, passes, device, loop_order, tile, density, sram_bytes, peak, bandwidth,
    )  # fmt: skip
    reports = {report["algorithm"]: report for report in json.loads(text)}
    for report in reports.values():
        report["flops"] = sum(report["flops"].values())
    return reports


def workspace_bytes(
    q_shape: tuple[int, int, int, int],
    k_shape: Optional[tuple[int, int, int, int]] = None,
    v_shape: Optional[tuple[int, int, int, int]] = None,
    *,
    dtype: str = "float32",
    causal: bool = False,
) -> tuple[int, int]:
    """Bytes of memory that the forward and the backward pass take on the CPU beside the tensors, at most.

    Parameters
    ----------
    q_shape, k_shape, v_shape : tuple
        ``[batch, seqlen, heads, head_dim]``; those not given are as q's.
    dtype : str
        Element type.
    causal : bool
        As in :func:`flashattn.attention`.

    Returns
    -------
    (int, int)
        Of the forward and of the backward pass; linear in the sequence length.
    """
    options = json.dumps({"causal": causal})
    k_shape = k_shape or q_shape
    return _native.workspace_bytes(options, q_shape, k_shape, v_shape or k_shape, dtype)
