"""Tracing of score mods and masks: a Python function runs once, on :class:`Term` objects that record what is done to
them. What comes out is data, which the native part compiles, differentiates, and bounds over blocks to skip some.
"""

from __future__ import annotations

import math
import struct
import sys
import threading
from typing import Any, Callable

__all__ = ["MaskMod", "ScoreMod", "Table", "Term", "trace_mask_mod", "trace_score_mod", "where"]

_active = threading.local()

#: Names under which operations arrive (from operators, PyTorch functions and NumPy ufuncs), and what they are here.
_BINARY = {
    "add": "add", "sub": "sub", "subtract": "sub", "mul": "mul", "multiply": "mul",
    "div": "div", "truediv": "div", "true_divide": "div", "divide": "div",
    "floordiv": "floordiv", "floor_divide": "floordiv", "mod": "mod", "remainder": "mod",
    "minimum": "min", "fmin": "min", "maximum": "max", "fmax": "max",
    "lt": "lt", "less": "lt", "le": "le", "less_equal": "le", "eq": "eq", "equal": "eq", "ne": "ne", "not_equal": "ne",
    "and": "and", "bitwise_and": "and", "logical_and": "and", "or": "or", "bitwise_or": "or", "logical_or": "or",
    "xor": "xor", "bitwise_xor": "xor", "logical_xor": "xor",
    "lshift": "shl", "bitwise_left_shift": "shl", "left_shift": "shl",
    "rshift": "shr", "bitwise_right_shift": "shr", "right_shift": "shr",
}  # fmt: skip
_SWAPPED = {"gt": "lt", "greater": "lt", "ge": "le", "greater_equal": "le"}
_UNARY = {
    "neg": "neg", "negative": "neg", "abs": "abs", "absolute": "abs", "exp2": "exp2", "log2": "log2", "tanh": "tanh",
    "invert": "not", "bitwise_not": "not", "logical_not": "not", "float": "float",
}  # fmt: skip


def _operators(name: str) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]:
    """A binary operator and its reflected form."""
    return lambda a, b: _dispatch(name, (a, b)), lambda a, b: _dispatch(name, (b, a))


class Term:
    """A value inside a traced function: a score, a position, or what was computed from them.

    Operators ``+ - * / // % **``, comparisons, ``& | ^ ~ << >>``, and :func:`abs`; the methods below; and functions of
    ``torch`` or NumPy of the same names (``torch.where``, ``torch.tanh``, ``np.exp``, …). Integers divide as in Python.
    ``and``, ``or``, ``not``, ``if`` and chained comparisons cannot be recorded: use ``&``, ``|``, ``~`` and
    :func:`where`.
    """

    __slots__ = ("_id", "_trace")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, trace: _Trace, index: int):
        self._trace = trace
        self._id = index

    __add__, __radd__ = _operators("add")
    __sub__, __rsub__ = _operators("sub")
    __mul__, __rmul__ = _operators("mul")
    __truediv__, __rtruediv__ = _operators("truediv")
    __floordiv__, __rfloordiv__ = _operators("floordiv")
    __mod__, __rmod__ = _operators("mod")
    __pow__, __rpow__ = _operators("pow")
    __and__, __rand__ = _operators("and")
    __or__, __ror__ = _operators("or")
    __xor__, __rxor__ = _operators("xor")
    __lshift__, __rlshift__ = _operators("lshift")
    __rshift__, __rrshift__ = _operators("rshift")
    __lt__, __gt__ = _operators("lt")[0], _operators("gt")[0]
    __le__, __ge__ = _operators("le")[0], _operators("ge")[0]
    __eq__, __ne__ = _operators("eq")[0], _operators("ne")[0]  # type: ignore[assignment]

    def __neg__(self) -> Term:
        return self._call("neg")

    def __pos__(self) -> Term:
        return self

    def __abs__(self) -> Term:
        return self._call("abs")

    def __invert__(self) -> Term:
        return self._call("invert")

    def _call(self, name: str, *args: Any) -> Any:
        return _dispatch(name, (self, *args))

    def __bool__(self) -> bool:
        raise TypeError(
            "a traced value has no truth value: use &, | and ~ instead of and, or and not, and flashattn.where instead of if"
        )

    def __iter__(self) -> Any:
        raise TypeError("a traced value is one number, expected something to iterate over")

    def __index__(self) -> int:
        raise TypeError(
            "a traced value is not known yet and cannot index this array: make the array a flashattn.Table "
            "(PyTorch tensors can be indexed as they are)"
        )

    __int__ = __float__ = __index__

    def abs(self) -> Term:
        """Absolute value."""
        return self._call("abs")

    def exp(self) -> Term:
        """e to the power of this."""
        return self._call("exp")

    def exp2(self) -> Term:
        """2 to the power of this."""
        return self._call("exp2")

    def log(self) -> Term:
        """Natural logarithm."""
        return self._call("log")

    def log2(self) -> Term:
        """Logarithm to base 2."""
        return self._call("log2")

    def tanh(self) -> Term:
        """Hyperbolic tangent."""
        return self._call("tanh")

    def sigmoid(self) -> Term:
        """1 / (1 + e to the power of minus this)."""
        return self._call("sigmoid")

    def sqrt(self) -> Term:
        """Square root."""
        return self._call("sqrt")

    def floor(self) -> Term:
        """The largest whole number not above this, as a float."""
        return self._call("floor")

    def float(self) -> Term:
        """As a float; a truth value becomes 0 or 1."""
        return self._call("float")

    def minimum(self, other: Any) -> Term:
        """The lesser."""
        return self._call("minimum", other)

    def maximum(self, other: Any) -> Term:
        """The greater."""
        return self._call("maximum", other)

    def clamp(self, min: Any = None, max: Any = None) -> Term:
        """Not below ``min``, not above ``max``."""
        return _dispatch("clamp", (self,), {"min": min, "max": max})

    def to(self, dtype: Any) -> Term:
        """As another type; only floating-point types can be asked for. (Devices are accepted: there is none.)"""
        return self if dtype is None or type(dtype).__name__ == "device" else self._call("to", dtype)

    #: Where PyTorch's tensors have a device; for functions that are written for both.
    device = None

    def new_ones(self, size: tuple, dtype: Any = None) -> Term:
        """A constant; for functions that are written for tensors, too."""
        return self._constant(1, size, dtype)

    def new_zeros(self, size: tuple, dtype: Any = None) -> Term:
        """A constant; for functions that are written for tensors, too."""
        return self._constant(0, size, dtype)

    def _constant(self, value: int, size: tuple, dtype: Any) -> Term:
        if tuple(size) != ():
            raise NotImplementedError(f"a constant of shape {size} cannot be traced, expected ()")
        name = str(dtype)
        return self._trace.term(bool(value) if "bool" in name else value if "int" in name else float(value))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _dispatch(_name(function), args, kwargs)

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if method != "__call__":
            raise NotImplementedError(f"numpy.{ufunc.__name__}.{method} cannot be traced")
        return _dispatch(ufunc.__name__, args, kwargs)

    def __array_function__(self, function: Any, types: Any, args: tuple, kwargs: Any) -> Any:
        return _dispatch(function.__name__, args, kwargs)


class Table:
    """An array that a traced function can index with traced positions.

    Indices outside of a dimension are clamped to its edge. Floating-point arrays are read as float32, others as int32;
    arrays of truth values give truth values. PyTorch tensors become tables by themselves.

    Parameters
    ----------
    array : array
        Up to four dimensions.

    Examples
    --------
    >>> slope = flashattn.Table(np.array([0.5, 0.25], np.float32))
    >>> alibi = lambda s, b, h, q, k: s - abs(q - k) * slope[h]
    """

    def __init__(self, array: Any):
        rank = len(array.shape)
        if rank > 4:
            raise ValueError(f"a table has {rank} dimensions, expected at most 4")
        self.array = array
        self._index: tuple = ()

    def __getitem__(self, index: Any) -> Any:
        table = object.__new__(Table)
        table.array = self.array
        table._index = self._index + (index if isinstance(index, tuple) else (index,))
        return table._loaded()

    def _loaded(self) -> Any:
        rank, got = len(self.array.shape), len(self._index)
        if got < rank:
            return self
        if got > rank:
            raise IndexError(f"a table of {rank} dimensions is indexed by {got} positions")
        return _trace().load(self.array, self._index)


class _Trace:
    """The operations recorded so far."""

    def __init__(self) -> None:
        self.ops: list = []
        self._known: dict = {}
        self.tables: list = []

    def push(self, *op: Any) -> Term:
        index = self._known.setdefault(op, len(self.ops))
        if index == len(self.ops):
            self.ops.append(op)
        return Term(self, index)

    def term(self, x: Any) -> Term:
        """A term of a term, a number, or an array that holds one number."""
        if isinstance(x, Term):
            if x._trace is not self:
                raise ValueError("a traced value is used outside of the function that it belongs to")
            return x
        if isinstance(x, Table):
            if len(x._index) < len(x.array.shape):
                raise TypeError(f"a table of {len(x.array.shape)} dimensions is indexed by {len(x._index)} positions")
            return self.load(x.array, ())
        if isinstance(x, bool):
            return self.push("bool", x)
        if isinstance(x, int):
            if not -(2**31) <= x < 2**31:
                raise ValueError(f"the constant {x} does not fit 32 bits")
            return self.push("int", x)
        if isinstance(x, float):
            return self.push("float", _float_bits(x))
        if _is_array(x):
            if x.shape:
                raise TypeError(
                    f"an array of shape {tuple(x.shape)} meets a traced number: index it down to one element"
                )
            if type(x).__module__ == "numpy":
                return self.term(x.item())
            return self.load(x, ())
        raise TypeError(f"a {type(x).__name__} meets a traced number, expected a number or an element of a table")

    def load(self, array: Any, index: tuple) -> Term:
        for i in index:
            if isinstance(i, slice) or i is None or i is Ellipsis:
                raise NotImplementedError("a table is indexed by positions; slices, None and ... cannot be traced")
        slot = next((n for n, known in enumerate(self.tables) if known is array), None)
        if slot is None:
            slot = len(self.tables)
            self.tables.append(array)
        places = tuple(self.term(i)._id for i in index) or (self.push("int", 0)._id,)
        value = self.push("load", slot, places)
        return _dispatch("ne", (value, 0)) if "bool" in str(array.dtype) else value

    def finish(self, root: Term) -> tuple[tuple, tuple]:
        """What ``root`` needs, with ``root`` last, and the tables that it reads."""
        needed = {root._id}
        for index in range(root._id, -1, -1):
            if index in needed:
                needed.update(_operands(self.ops[index]))
        order = {old: new for new, old in enumerate(sorted(needed))}
        slots: dict = {}
        for old in order:
            if self.ops[old][0] == "load":
                slots.setdefault(self.ops[old][1], len(slots))
        ops = tuple(_renumber(self.ops[old], order, slots) for old in order)
        return ops, tuple(self.tables[old] for old in slots)


def _operands(op: tuple) -> tuple:
    return {"load": lambda: op[2], "un": lambda: op[2:], "bin": lambda: op[2:], "select": lambda: op[1:]}.get(
        op[0], lambda: ()
    )()


def _renumber(op: tuple, order: dict, slots: dict) -> tuple:
    if op[0] == "load":
        return ("load", slots[op[1]], tuple(order[i] for i in op[2]))
    if op[0] in ("un", "bin"):
        return (*op[:2], *(order[i] for i in op[2:]))
    if op[0] == "select":
        return ("select", *(order[i] for i in op[1:]))
    return op


def encode(ops: tuple, first_table: int) -> dict:
    """The operations as the native part reads them; tables are numbered from ``first_table`` on."""

    def one(op: tuple) -> Any:
        if op[0] == "score":
            return "score"
        if op[0] == "load":
            return {"load": [op[1] + first_table, list(op[2])]}
        return {op[0]: op[1] if len(op) == 2 else list(op[1:])}

    return {"ops": [one(op) for op in ops]}


def _float_bits(x: float) -> int:
    if math.isfinite(x) and abs(x) > 3.4028235677973366e38:
        x = math.copysign(math.inf, x)
    return struct.unpack("<I", struct.pack("<f", x))[0]


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _name(function: Any) -> str:
    name = getattr(function, "__name__", str(function))
    if name.startswith("__"):
        name = name.strip("_")
        # Reflected operators arrive with their operands in reflected order.
        if name[:1] == "r" and name[1:] in _REFLECTED:
            return "reflected " + name[1:]
    return name


_REFLECTED = frozenset("add sub mul truediv div floordiv mod pow and or xor lshift rshift".split())


def _trace() -> _Trace:
    trace = getattr(_active, "trace", None)
    if trace is None:
        raise ValueError("tables can be indexed only inside a function that is being traced")
    return trace


def _dispatch(name: str, args: tuple, kwargs: Any = None) -> Any:
    """Records the operation of that name."""
    t = _trace()
    kwargs = {key: value for key, value in (kwargs or {}).items() if value is not None}
    if name == "getitem":
        return Table(args[0])[args[1]]
    if name.startswith("reflected "):
        name, args = name[len("reflected ") :], (args[1], args[0])
    if name == "clamp" or name == "clip":
        low = kwargs.get("min", args[1] if len(args) > 1 else None)
        high = kwargs.get("max", args[2] if len(args) > 2 else None)
        x = t.term(args[0])
        x = x if low is None else _dispatch("maximum", (x, low))
        return x if high is None else _dispatch("minimum", (x, high))
    if name == "to" or name == "type":
        if len(args) == 2 and not kwargs and "float" in str(args[1]):
            return _dispatch("float", args[:1])
        raise NotImplementedError(f"{name}{args[1:]} cannot be traced, expected a floating-point type")
    if kwargs:
        raise NotImplementedError(f"{name} with {', '.join(kwargs)} cannot be traced")
    if name in ("min", "max") and len(args) == 2:
        name += "imum"
    if name == "where" and len(args) == 3:
        return t.push("select", *(t.term(x)._id for x in args))
    if name == "pow" or name == "power" or name == "square":
        return _power(t, args[0], 2 if name == "square" else args[1])
    one = len(args) == 1
    if name in _BINARY and len(args) == 2:
        return t.push("bin", _BINARY[name], t.term(args[0])._id, t.term(args[1])._id)
    if name in _SWAPPED and len(args) == 2:
        return t.push("bin", _SWAPPED[name], t.term(args[1])._id, t.term(args[0])._id)
    if name in _UNARY and one:
        return t.push("un", _UNARY[name], t.term(args[0])._id)
    if name == "floor" and one:
        return t.push("un", "float", t.push("un", "floor", t.term(args[0])._id)._id)
    if name == "exp" and one:
        return (t.term(args[0]) * math.log2(math.e)).exp2()
    if name == "log" and one:
        return t.term(args[0]).log2() * math.log(2)
    if name == "sqrt" and one:
        return (t.term(args[0]).log2() * 0.5).exp2()
    if name == "rsqrt" and one:
        return (t.term(args[0]).log2() * -0.5).exp2()
    if name == "sigmoid" and one:
        return (t.term(args[0]) * 0.5).tanh() * 0.5 + 0.5
    raise NotImplementedError(f"{name} cannot be traced; flashattn.Term lists what can")


def _power(t: _Trace, base: Any, exponent: Any) -> Term:
    x = t.term(base)
    if isinstance(exponent, (int, float)):
        if exponent == 0.5:
            return x.sqrt()
        if exponent == int(exponent) and 0 < exponent <= 16:
            result = x
            for _ in range(int(exponent) - 1):
                result = result * x
            return result
    if isinstance(base, (int, float)) and base > 0:
        return (t.term(exponent) * math.log2(base)).exp2()
    raise NotImplementedError(
        "a power can be traced with a whole exponent from 1 to 16, with exponent 0.5, or with a positive constant base"
    )


def where(condition: Any, if_true: Any, if_false: Any) -> Term:
    """``if_true`` where the traced ``condition`` holds, else ``if_false``."""
    return _dispatch("where", (condition, if_true, if_false))


class _Traced:
    """A function that has been traced: it can be used many times, and inside ``torch.compile``."""

    def __init__(self, function: Callable, ops: tuple, tables: tuple):
        self.function = function
        self.ops = ops
        self.tables = tables

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class ScoreMod(_Traced):
    """A traced score mod; see :func:`trace_score_mod`."""


class MaskMod(_Traced):
    """A traced mask; see :func:`trace_mask_mod`."""


def _run(function: Callable, score: bool) -> tuple[tuple, tuple]:
    if getattr(_active, "trace", None) is not None:
        raise ValueError("a function is being traced already")
    t = _active.trace = _Trace()
    try:
        places = [t.push("var", name) for name in ("batch", "head", "q", "kv")]
        arguments = [t.push("score"), *places] if score else places
        torch = sys.modules.get("torch")
        if torch is None:
            result = function(*arguments)
        else:
            from ._torch import TracingMode

            with TracingMode():
                result = function(*arguments)
        if result is None:
            raise TypeError("the function returned None, expected the new score" if score else "the mask returned None")
        return t.finish(t.term(result))
    finally:
        _active.trace = None


def trace_score_mod(function: Callable) -> ScoreMod:
    """Records a score mod.

    Parameters
    ----------
    function : callable
        From ``(score, batch, head, q_idx, kv_idx)`` to the new score, FlexAttention's convention. It runs once, here.
        Arrays that it reads must be PyTorch tensors or :class:`Table`. Floating-point tensors that require a gradient
        get one.

    Returns
    -------
    ScoreMod
        To be given to :func:`attention` or :func:`flex_attention` instead of the function, which saves the tracing.
    """
    if isinstance(function, ScoreMod):
        return function
    return ScoreMod(function, *_run(function, score=True))


def trace_mask_mod(function: Callable) -> MaskMod:
    """Records a mask.

    Parameters
    ----------
    function : callable
        From ``(batch, head, q_idx, kv_idx)`` to whether the query may see the key. It runs once, here.

    Returns
    -------
    MaskMod
        To be given to :func:`attention` instead of the function.
    """
    if isinstance(function, MaskMod):
        return function
    return MaskMod(function, *_run(function, score=False))
