"""The options of a call as text, which the native part reads; ``src/options.rs`` says what it may contain."""

from __future__ import annotations

import functools
import json
from typing import Any, Optional

from ._trace import encode


@functools.lru_cache(maxsize=4096)
def write(
    causal: bool,
    window: tuple[Optional[int], Optional[int]],
    scale: Optional[float],
    softcap: Optional[float],
    dropout: Optional[float],
    alibi: Optional[int],
    bias: Optional[int],
    score: Optional[tuple],
    score_table: int,
    mask: Optional[tuple],
    mask_table: int,
    tables: tuple[bool, ...],
    varlen: bool,
    sinks: bool,
    deterministic: bool,
) -> str:
    """The text; ``score`` and ``mask`` are traced operations, their tables numbered from the given ones on."""
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "dropout": dropout,
        "alibi": alibi,
        "bias": bias,
        "score": None if score is None else encode(score, score_table),
        "mask": None if mask is None else encode(mask, mask_table),
        "tables": tables,
        "varlen": varlen,
        "sinks": sinks,
        "deterministic": deterministic or None,
    }
    return json.dumps({key: value for key, value in options.items() if value is not None}, separators=(",", ":"))


@functools.lru_cache(maxsize=4096)
def learned(options: str) -> tuple[int, ...]:
    """Which of the extras have a gradient."""
    parsed = json.loads(options)
    slots = [i for i, grad in enumerate(parsed["tables"]) if grad]
    if parsed["sinks"]:
        slots.append(len(parsed["tables"]) + 2 * parsed["varlen"])
    return tuple(slots)
