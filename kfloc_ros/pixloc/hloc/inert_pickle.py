# SPDX-License-Identifier: Apache-2.0
"""Reader of a pickle's data that interprets the opcodes itself; nothing is imported or called.

Containers, numbers and text become themselves. Every function call and every object becomes an inert ``Call`` with the
target and its arguments. NumPy's arrays and scalars are decoded from such calls.
"""

from __future__ import annotations

import math
import pickletools
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Name:
    """Class or function that the pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """Call that unpickling would make: the target, the arguments, and the state to set."""

    target: Name
    args: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)


class _Mark:
    """Start of a run of values on the stack."""


_VALUES = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8",
})  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING_TO_DO = frozenset({"PROTO", "FRAME"})
MAX_STACK = 1_000_000
MAX_VALUES = 100_000_000
"""Largest number of values in a pickle; a value at several places counts each time, since references can expand a few
bytes to 2^200 values."""
MAX_KEY_PARTS = 16


class _Machine:
    """Stack and memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, arg: Any) -> None:
        stack = self.stack
        if len(stack) > MAX_STACK:
            raise ValueError("it piles up more values than a log does")
        if name in _VALUES:
            stack.append(arg)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_Mark())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[arg])
        elif name in _SHORT_TUPLES:
            count = _SHORT_TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            values = self._since_mark()
            stack.append(_collected(name, values))
        elif name in ("APPEND", "APPENDS"):
            values = self._since_mark() if name == "APPENDS" else [stack.pop()]
            target = stack[-1]
            (target.items if isinstance(target, Call) else target).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self._since_mark() if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
            if isinstance(stack[-1], Call):
                stack[-1].items.extend(zip(values[::2], values[1::2], strict=True))
            else:
                stack[-1].update(_collected("DICT", values))
        elif name == "ADDITEMS":
            values = self._since_mark()
            stack[-1].update(map(_key, values))
        elif name == "GLOBAL":
            module, _, attribute = arg.partition(" ")
            stack.append(Name(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(Name(str(module), str(attribute)))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            keywords = stack.pop() if name == "NEWOBJ_EX" else {}
            args, target = stack.pop(), stack.pop()
            if not isinstance(target, Name) or keywords:
                raise ValueError("it calls something that it does not name")
            stack.append(Call(target, tuple(args)))
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], Call):
                raise ValueError("it gives a state to something that has none")
            stack[-1].state = state
        elif name not in _NOTHING_TO_DO:
            raise ValueError(f"it uses the operation {name}, which a log does not need")

    def _since_mark(self) -> list[Any]:
        position = next(i for i in reversed(range(len(self.stack))) if isinstance(self.stack[i], _Mark))
        values = self.stack[position + 1 :]
        del self.stack[position:]
        return values


def read_inert(content: bytes) -> Any:
    """Return the value of a pickle, with arrays decoded and every other call as a ``Call``.

    Raises:
        ValueError: the pickle is damaged, or uses operations that plain data does not need.
    """
    machine = _Machine()
    try:
        for opcode, arg, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                return _resolve(machine.stack.pop(), {}, {})
            machine.step(opcode.name, arg)
    except (IndexError, KeyError, TypeError, AttributeError, StopIteration, RecursionError, OverflowError) as error:
        raise ValueError(f"not a pickle that makes sense: {error!r}") from error
    raise ValueError("it ends in the middle")


def _key(value: Any) -> Any:
    """Return a key of a dictionary or a member of a set; refuse nested ones, whose hash could take unbounded time."""
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) > MAX_KEY_PARTS or any(isinstance(part, tuple | frozenset) for part in parts):
        raise ValueError("a key, or a member of a set, is nested")
    return value


def _collected(name: str, values: list[Any]) -> Any:
    if name == "DICT":
        return dict(zip(map(_key, values[::2]), values[1::2], strict=True))
    if name == "FROZENSET":
        return frozenset(map(_key, values))
    return {"TUPLE": tuple, "LIST": list}[name](values)


def _resolve(value: Any, done: dict[int, Any], sizes: dict[int, int]) -> Any:
    """Return ``value`` with NumPy's calls decoded, at any depth.

    ``done`` has the finished results, None for unfinished ones, and ``sizes`` their numbers of values.
    """
    if not isinstance(value, list | tuple | dict | set | frozenset | Call):
        return value
    if id(value) in done:
        if done[id(value)] is None:
            raise ValueError("something in it contains itself")
        return done[id(value)]
    done[id(value)] = None
    parts: list[Any]
    if isinstance(value, Call):
        parts = [value.args, value.state, value.items]
    else:
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
    found = [_resolve(part, done, sizes) for part in parts]
    sizes[id(value)] = 1 + sum(sizes.get(id(part), 1) for part in parts)
    if sizes[id(value)] > MAX_VALUES:
        raise ValueError("it holds more values than a log does")
    result: Any
    if isinstance(value, Call):
        value.args, value.state, value.items = found
        result = _decoded(value)
    elif isinstance(value, dict):
        result = dict(zip(found[: len(value)], found[len(value) :], strict=True))
    else:
        result = type(value)(found)
    done[id(value)] = result
    return result


def _decoded(call: Call) -> Any:
    match call.target.module.replace("numpy._core", "numpy.core"), call.target.name:
        case "_codecs", "encode":  # bytes, in pickles that Python 2 could read
            text, encoding = call.args
            if encoding != "latin1":
                raise ValueError(f"bytes in the encoding {encoding!r}")
            return text.encode("latin1")
        case "builtins" | "__builtin__", "bytes" | "set" | "frozenset" as name:
            (content,) = call.args or ((),)
            if name == "bytes":
                return bytes(list(content))
            return {"set": set, "frozenset": frozenset}[name](map(_key, content))
        case "numpy", "dtype":
            return _dtype(call)
        case "numpy.core.multiarray", "scalar":
            return _array(call.args[1], call.args[0], (), fortran=False)[()]
        case "numpy.core.multiarray", "_reconstruct":
            _, shape, dtype, fortran, data = call.state
            return _array(data, dtype, shape, fortran)
        case "numpy.core.numeric", "_frombuffer":
            data, dtype, shape, order = call.args
            return _array(data, dtype, shape, order == "F")
    return call


def _dtype(call: Call) -> np.dtype[Any]:
    kind, order = str(call.args[0]), "|" if call.state is None else str(call.state[1])
    if re.fullmatch(r"[biufSU]\d{1,6}", kind) is None or order not in ("<", ">", "|", "="):
        raise ValueError(f"numbers of the kind {kind!r}")
    return np.dtype(order + kind)


def _array(data: Any, dtype: Any, shape: Any, fortran: bool) -> NDArray[Any]:
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, np.dtype):
        raise ValueError("an array of other things than numbers")
    sizes = tuple(int(size) for size in shape)
    if min(sizes, default=0) < 0 or math.prod(sizes) * dtype.itemsize != len(data):
        raise ValueError(f"an array of {sizes} that does not fit its {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(sizes, order="F" if fortran else "C").copy()
