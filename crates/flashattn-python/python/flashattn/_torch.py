"""PyTorch: the two passes as registered operators, so that ``torch.compile`` and other tracers know them; and for autograd alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.dlpack import to_dlpack

from . import _native, _options
from ._options import learned
from ._trace import Term, _dispatch, _name

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def write(*options: Any) -> str:
    """The options as text: a constant to ``torch.compile``, as all that it depends on are."""
    return _options.write(*options)


# What torch.compiler.assume_constant_result does; that would import the compiler, which takes seconds.
write._dynamo_marked_constant = True  # type: ignore[attr-defined]


class TracingMode(TorchFunctionMode):
    """While a function is traced: operations of tensors with traced values, such as ``bias[h, q, k]``, are recorded."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if any(isinstance(x, Term) or (isinstance(x, tuple) and any(isinstance(i, Term) for i in x)) for x in args):
            return _dispatch(_name(function), args, kwargs)
        return function(*args, **(kwargs or {}))


def _unit(x: Tensor) -> Tensor:
    """With stride 1 in the last dimension, as it is or copied."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


def _like(x: Tensor, head_dim: Any) -> Tensor:
    """A new tensor with another head_dim; in memory ordered like ``x`` if it is the same."""
    if x.shape[-1] == head_dim:
        y = torch.empty_like(x)
        if y.stride(-1) == 1:
            return y
    return x.new_empty((*x.shape[:-1], head_dim))


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    # [batch, seqlen, heads, head_dim] or [total, heads, head_dim].
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    return _like(q, v.shape[-1]), q.new_empty(shape, dtype=torch.float32)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], options: str
) -> tuple[list[Tensor], list[Tensor]]:
    d_extras = [torch.empty(extras[i].shape, dtype=torch.float32, device=q.device) for i in learned(options)]
    return [_like(x, x.shape[-1]) for x in (q, k, v)], d_extras


def _on_device(q: Tensor, extras: list[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    """The extras on the host, where the native part reads them (calls with some wait for them); and where to run: the current
    stream, with working memory of PyTorch's allocator, which is the graph's own pool while a CUDA graph is captured."""
    if not q.is_cuda:
        return extras, {}
    captured = torch.cuda.is_current_stream_capturing()
    if captured and extras:
        raise NotImplementedError(
            "tables, sinks, cu_seqlens and the seed of dropout are read on the host: calls with these cannot be captured into"
            " a CUDA graph"
        )

    def allocate(size: int) -> Any:
        return to_dlpack(torch.empty(size, dtype=torch.uint8, device=q.device))

    stream = torch.cuda.current_stream(q.device).cuda_stream
    return [x.cpu() for x in extras], {"stream": stream, "allocate": allocate, "captured": captured}


def _forward(
    q: Tensor, k: Tensor, v: Tensor, extras: list[Tensor], options: str, max_seqlen_q: int, max_seqlen_k: int
) -> tuple[Tensor, Tensor]:
    o, lse = _outputs(q, v)
    q, k, v = (_unit(x) for x in (q, k, v))
    extras, place = _on_device(q, extras)
    a, b, c = (to_dlpack(x) for x in (q, k, v))
    tables = [to_dlpack(x) for x in extras]
    _native.forward(options, a, b, c, tables, to_dlpack(o), to_dlpack(lse), **place)
    return o, lse


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, extras: list[Tensor], options: str, max_seqlen_q: int, max_seqlen_k: int
) -> tuple[Tensor, Tensor]:
    return _outputs(q, v)


def _backward(
    do: Tensor,
    dlse: Optional[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    extras: list[Tensor],
    options: str,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> list[Tensor]:
    gradients, d_extras = _gradients(q, k, v, extras, options)
    a, b, c = (to_dlpack(_unit(x)) for x in (q, k, v))
    dq, dk, dv = (to_dlpack(x) for x in gradients)
    extras, place = _on_device(q, extras)
    _native.backward(
        options,
        a,
        b,
        c,
        [to_dlpack(x) for x in extras],
        to_dlpack(_unit(o)),
        to_dlpack(lse.contiguous()),
        to_dlpack(_unit(do)),
        None if dlse is None else to_dlpack(dlse.contiguous()),
        dq,
        dk,
        dv,
        [to_dlpack(x) for x in d_extras],
        **place,
    )
    return gradients + d_extras


def _backward_fake(
    do: Tensor,
    dlse: Optional[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    extras: list[Tensor],
    options: str,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> list[Tensor]:
    gradients, d_extras = _gradients(q, k, v, extras, options)
    return gradients + d_extras


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, extras, ctx.options, ctx.max_seqlen_q, ctx.max_seqlen_k = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *extras)


def _vjp(ctx: Any, do: Optional[Tensor], dlse: Optional[Tensor], direct: bool = False) -> tuple:
    q, k, v, o, lse, *extras = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    # Of second derivatives the operator says that there are none.
    given = [x for x in (do, dlse, q, k, v, o, lse, *extras) if x is not None]
    direct = direct and not torch.is_grad_enabled() and _seen_by_autograd_alone(given)
    backward = _backward if direct else torch.ops.flashattn.backward
    results = backward(do, dlse, q, k, v, o, lse, extras, ctx.options, ctx.max_seqlen_q, ctx.max_seqlen_k)
    d_extras: list = [None] * len(extras)
    for i, gradient in zip(learned(ctx.options), results[3:]):
        d_extras[i] = gradient
    return (*results[:3], d_extras, None, None, None)


def _second_derivative(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError(
        "second derivatives of attention are not there; use plain attention where they are needed"
    )


_library = torch.library.Library("flashattn", "DEF")
_library.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor[] extras, str options, SymInt max_seqlen_q, SymInt max_seqlen_k)"
    " -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor[] extras, str options,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _key)
    _library.impl("backward", _backward, _key)
torch.library.register_fake("flashattn::forward", _forward_fake, lib=_library)
torch.library.register_fake("flashattn::backward", _backward_fake, lib=_library)
torch.library.register_autograd("flashattn::forward", _vjp, setup_context=_setup_context, lib=_library)
# Without it PyTorch would go on with zeros and a warning.
torch.library.register_autograd("flashattn::backward", _second_derivative, lib=_library)


class _Direct(torch.autograd.Function):
    """The same for autograd alone: the dispatcher between takes longer than small calls do."""

    @staticmethod
    def forward(
        ctx: Any, options: str, max_seqlen_q: int, max_seqlen_k: int, q: Tensor, k: Tensor, v: Tensor, *extras: Tensor
    ) -> tuple[Tensor, Tensor]:
        output = _forward(q, k, v, list(extras), options, max_seqlen_q, max_seqlen_k)
        _setup_context(ctx, (q, k, v, extras, options, max_seqlen_q, max_seqlen_k), output)
        return output

    @staticmethod
    def backward(ctx: Any, do: Optional[Tensor], dlse: Optional[Tensor]) -> tuple:
        dq, dk, dv, d_extras, *_ = _vjp(ctx, do, dlse, direct=True)
        return (None, None, None, dq, dk, dv, *d_extras)


# Private, and so perhaps not in each version: then calls go through the dispatcher.
_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_functions = getattr(torch._C, "_len_torch_function_stack", None)
_transforms = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)


def _seen_by_autograd_alone(tensors: list[Tensor]) -> bool:
    """Whether no compiler, tracer, mode, transform or subclass of tensors wants to see the operator, and no tensor is to be negated."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if _modes is None or _functions is None or _transforms is None:
        return False
    plain = all(
        type(x) in (Tensor, torch.nn.Parameter) and x.device.type in ("cpu", "cuda") and not x.is_neg() for x in tensors
    )
    return plain and _modes() == 0 and _functions() == 0 and _transforms() is None


def check(name: str, x: Any) -> None:
    """Fails unless ``x`` is a tensor that can be attended to."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}, expected a torch.Tensor like q")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} is {x.dtype}, expected torch.float16, torch.bfloat16 or torch.float32")
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(f"{name} is on {x.device}, expected cpu or cuda")


def number(x: Any, q: Tensor) -> Tensor:
    """The seed as a tensor."""
    return torch.as_tensor(x, dtype=torch.int64, device=q.device)


def random_seed(q: Tensor) -> Tensor:
    """A new seed from PyTorch's generator, which ``torch.manual_seed`` sets."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)


def table(name: str, x: Any, q: Tensor) -> tuple[Tensor, bool]:
    """A table as the native part reads it, and whether it gets a gradient."""
    x = torch.as_tensor(x)
    if x.device != q.device:
        raise TypeError(f"{name} is on {x.device}, expected {q.device} like q")
    dtype = torch.float32 if x.is_floating_point() else torch.int32
    return x.to(dtype).contiguous(), x.requires_grad and torch.is_grad_enabled()


def integers(name: str, x: Any, q: Tensor) -> Tensor:
    """Offsets as the native part reads them."""
    x = torch.as_tensor(x)
    if x.is_floating_point() or x.dtype == torch.bool:
        raise TypeError(f"{name} is {x.dtype}, expected torch.int32")
    return x.to(device=q.device, dtype=torch.int32).contiguous()


def run(
    options: str, q: Tensor, k: Tensor, v: Tensor, extras: list, max_seqlen_q: int, max_seqlen_k: int
) -> tuple[Tensor, Tensor]:
    """o and lse."""
    if _seen_by_autograd_alone([q, k, v, *extras]):
        return _Direct.apply(options, max_seqlen_q, max_seqlen_k, q, k, v, *extras)
    return torch.ops.flashattn.forward(q, k, v, extras, options, max_seqlen_q, max_seqlen_k)


def probabilities(q: Tensor, k: Tensor, seed: Tensor, dropout_p: float, sequence: int = 0, **options: Any) -> Tensor:
    """Attention weights ``[batch, heads, seqlen_q, seqlen_k]``, negative where dropout drops them.

    For tests, like the original's: as large as the score matrix. It is attention to the rows of the unit matrix.
    """
    from ._attention import attention

    batch, seqlen_k, heads_kv = k.shape[:3]
    unit = torch.eye(seqlen_k, dtype=q.dtype, device=q.device)[None, :, None, :].expand(batch, -1, heads_kv, -1)
    with torch.no_grad():
        # In parts, for the head_dim of v that GPUs take.
        parts = [attention(q, k, v, **options) for v in unit.split(256, -1)]
        weights = torch.cat(parts, -1).transpose(1, 2)
    # Dropout counts sequences from the first: leave out those before `sequence`.
    keep = torch.empty((sequence + batch, *weights.shape[1:]), dtype=torch.uint8)
    _native.dropout_mask(int(seed), dropout_p, to_dlpack(keep))
    return torch.where(keep[sequence:].to(q.device) != 0, weights, -weights)


def packed_probabilities(
    q: Tensor, k: Tensor, seed: Tensor, dropout_p: float, lengths: tuple, **options: Any
) -> Tensor:
    """As :func:`probabilities`, of packed sequences, each padded with zeros to the longest."""
    cu_q, cu_k = (x.tolist() for x in lengths[:2])
    longest = [max((b - a for a, b in zip(cu, cu[1:])), default=0) for cu in (cu_q, cu_k)]
    weights = q.new_zeros(len(cu_q) - 1, q.shape[1], *longest)
    for b in range(len(cu_q) - 1):
        own = dict(options)
        slopes = options.get("alibi_slopes")
        if slopes is not None and slopes.dim() == 2:
            own["alibi_slopes"] = slopes[b : b + 1] if slopes.shape[0] > 1 else slopes
        q_b, k_b = q[None, cu_q[b] : cu_q[b + 1]], k[None, cu_k[b] : cu_k[b + 1]]
        n, m = q_b.shape[1], k_b.shape[1]
        if n and m:
            weights[b, :, :n, :m] = probabilities(q_b, k_b, seed, dropout_p, sequence=b, **own)[0]
    return weights
