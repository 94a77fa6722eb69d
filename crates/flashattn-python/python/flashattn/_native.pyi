"""The compiled part; private. Arrays are anything with ``__dlpack__``, or DLPack capsules."""

from collections.abc import Callable, Sequence
from typing import Any, Optional

def forward(
    options: str,
    q: Any,
    k: Any,
    v: Any,
    extras: Sequence[Any],
    o: Any,
    lse: Any,
    stream: Optional[int] = None,
    allocate: Optional[Callable[[int], Any]] = None,
    captured: bool = False,
) -> None: ...
def backward(
    options: str,
    q: Any,
    k: Any,
    v: Any,
    extras: Sequence[Any],
    o: Any,
    lse: Any,
    do_: Any,
    dlse: Optional[Any],
    dq: Any,
    dk: Any,
    dv: Any,
    d_extras: Sequence[Any],
    stream: Optional[int] = None,
    allocate: Optional[Callable[[int], Any]] = None,
    captured: bool = False,
) -> None: ...
def dropout_mask(seed: int, p: float, out: Any) -> None: ...
def io_model(
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    heads: int,
    kv_heads: int,
    batch: int,
    dtype_name: str,
    causal: bool,
    dropout: Optional[float],
    pass_name: str,
    device_name: str,
    loop_order: str,
    tile: Optional[tuple[int, int]],
    density: Optional[float],
    sram_bytes: Optional[int],
    peak: Optional[float],
    bandwidth: Optional[float],
) -> str: ...
def workspace_bytes(
    options: str, q_shape: Sequence[int], k_shape: Sequence[int], v_shape: Sequence[int], dtype_name: str
) -> tuple[int, int]: ...
def num_threads() -> int: ...
def set_num_threads(num_threads: int) -> None: ...
def clear_plans() -> None: ...
def xla_handlers() -> list[tuple[str, str, Any]]: ...
