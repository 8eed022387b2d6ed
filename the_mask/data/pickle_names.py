"""Names that pickles of weights may use, and their replacements.

A pickle is a program, and the names in it decide what it can call. Numpy's constructors are never allowed:
with a data type of Python objects they turn bytes of the file into pointers. They are replaced by functions that build
arrays of plain numbers from a checked number of bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_DEPTH = 64


class UnsafePickleError(ValueError):
    """A pickle names something that is not plain data; the message says what."""


class UnreadableError(ValueError):
    """A file is damaged or of an unknown kind; the message says why, without the file's name."""


class StoredNumber:
    """Replacement for a numpy dtype of numbers, booleans or text; its byte order may be set again."""

    __slots__ = ("dtype",)

    def __init__(self, kind: object = "") -> None:
        if isinstance(kind, bytes):
            kind = kind.decode("latin1")
        if not isinstance(kind, str) or not re.fullmatch(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16|[SU]\d{1,6}|\?)", kind):
            raise UnsafePickleError(f"an array of {kind!r} in it")
        self.dtype = np.dtype(kind)

    def __setstate__(self, state: object) -> None:
        # (version, byte order, sub-array, names, fields, size, alignment, flags[, metadata])
        if not isinstance(state, tuple) or len(state) not in (8, 9) or any(part is not None for part in state[2:5]):
            raise UnsafePickleError("an array of structures in it")
        order: Any = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise UnsafePickleError(f"an array of byte order {order!r} in it")
        self.dtype = self.dtype.newbyteorder(order)


class StoredArray:
    """Replacement for a numpy array until the whole file is read."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray = np.zeros(0)

    def __setstate__(self, state: object) -> None:
        # (version, shape, dtype, Fortran order, bytes); the oldest have no version
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise UnsafePickleError("an array of unknown layout in it")
        shape, number, fortran, content = state[-4:]
        self.value = _array(content, number, shape, "F" if fortran is True else "C")


def _array(content: object, number: object, shape: object, order: object) -> np.ndarray:
    if isinstance(content, str):  # bytes of Python 2, read as latin1
        content = content.encode("latin1")
    if not isinstance(number, StoredNumber) or not isinstance(content, (bytes, bytearray)) or order not in ("C", "F"):
        raise UnsafePickleError("an array of other things than numbers in it")
    if not isinstance(shape, tuple) or len(shape) > 32 or not all(type(side) is int and side >= 0 for side in shape):
        raise UnsafePickleError(f"an array of shape {shape!r} in it")
    if math.prod(shape) * number.dtype.itemsize != len(content):
        raise UnsafePickleError(f"an array of {list(shape)} {number.dtype} in {len(content)} bytes in it")
    if not content:
        return np.zeros(shape, number.dtype)
    return np.frombuffer(content, number.dtype).reshape(shape, order="F" if order == "F" else "C").copy()


class StandIn:
    """Replacement for a callable that a pickle names. The pickle can neither modify nor create one."""

    __slots__ = ("_call", "name")
    name: str
    _call: Callable[..., Any] | None

    def __init__(self, name: str, call: Callable[..., Any] | None) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        if self._call is None:
            raise UnsafePickleError(f"a call of {self.name} in it")
        try:
            return self._call(*args)
        except (TypeError, OverflowError) as error:
            raise UnreadableError(f"{self.name} with wrong arguments ({error})") from error

    def __setattr__(self, name: str, value: object) -> None:
        raise UnsafePickleError(f"a change of {self.name} in it")

    def __setstate__(self, state: object) -> None:
        raise UnsafePickleError(f"a change of {self.name} in it")


class _Dictionary(dict[Any, Any]):
    """Replacement for ``OrderedDict`` without attributes (torch's state dicts store versions of modules there)."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


def _reconstruct(kind: object, shape: object, dtype: object) -> StoredArray:
    if kind is not _NDARRAY:
        raise UnsafePickleError("a kind of array in it")
    return StoredArray()


def _scalar(number: object, content: object = b"") -> Any:
    return _array(content, number, (), "C").item()


def _from_buffer(content: object, number: object, shape: object, order: object) -> StoredArray:
    array = StoredArray()
    array.value = _array(content, number, shape, order)
    return array


def _encode(text: object, encoding: object = "utf-8") -> bytes:
    """Python 2's bytes, and those of protocol 2, come as encoded text."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "ascii", "utf-8"):
        raise UnsafePickleError(f"text of encoding {encoding!r} in it")
    return text.encode(str(encoding))


def _no_bytes() -> bytes:
    return b""


def _dtype(kind: object, align: object = False, copy: object = False) -> StoredNumber:
    return StoredNumber(kind)


_NDARRAY = StandIn("numpy.ndarray", None)
_NUMPY = {
    "numpy.ndarray": _NDARRAY,
    "numpy.dtype": StandIn("numpy.dtype", _dtype),
    **{
        f"{module}.{name}": StandIn(f"{module}.{name}", call)
        for package in ("numpy.core", "numpy._core")
        for module, name, call in (
            (f"{package}.multiarray", "_reconstruct", _reconstruct),
            (f"{package}.multiarray", "scalar", _scalar),
            (f"{package}.numeric", "_frombuffer", _from_buffer),
        )
    },
}
# Builtins for which older protocols have no instruction; Python 2 called their module otherwise.
_BUILTINS = {
    f"{module}.{name}": StandIn(name, call)
    for module in ("builtins", "__builtin__")
    for name, call in (("bytes", _no_bytes), ("set", set), ("frozenset", frozenset), ("complex", complex))
}
# Everything that a pickle not written by torch may call.
STAND_INS: dict[str, StandIn] = {
    **_NUMPY,
    **_BUILTINS,
    "collections.OrderedDict": StandIn("collections.OrderedDict", _Dictionary),
    "_codecs.encode": StandIn("_codecs.encode", _encode),
}
# Everything that a file written by torch may name; torch's own reader checks the rest.
TORCH_GLOBALS: frozenset[str] = frozenset(
    {
        *STAND_INS,
        "collections.Counter",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        *(f"torch.{name}" for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
        *(
            f"torch.{kind}Storage"
            for kind in [
                "Double",
                "Float",
                "Half",
                "Long",
                "Int",
                "Short",
                "Char",
                "Byte",
                "Bool",
                "BFloat16",
                "ComplexDouble",
                "ComplexFloat",
            ]
        ),
    }
)
# For torch's reader, which takes (object, name) pairs and builds only objects of the classes it was given.
FOR_TORCH: list[Any] = [
    *((stand_in, name) for name, stand_in in STAND_INS.items()),
    (StoredArray, f"{__name__}.StoredArray"),
    (StoredNumber, f"{__name__}.StoredNumber"),
]


def plain(content: Any) -> Any:
    """Convert the replacements in loaded content to tensors and arrays.

    Raises:
        UnsafePickleError: something else is in it. UnreadableError: it contains itself, or is nested too deep.
    """
    done: dict[int, Any] = {}
    above: set[int] = set()

    def walk(value: Any, depth: int) -> Any:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Tensor)):
            return value
        if isinstance(value, (torch.Size, torch.dtype, torch.device, np.ndarray)):
            return value
        if isinstance(value, StoredArray):
            return value.value
        if isinstance(value, StoredNumber):
            return value.dtype
        if not isinstance(value, (dict, list, tuple, set, frozenset)):
            raise UnsafePickleError(f"Python objects in it ({getattr(value, 'name', type(value).__name__)})")
        key = id(value)
        if key in done:
            return done[key]
        if key in above:
            raise UnreadableError("a container in it contains itself")
        if depth > MAX_DEPTH:
            raise UnreadableError(f"it is nested more than {MAX_DEPTH} deep")
        above.add(key)
        new: Any
        if isinstance(value, dict):
            new = {walk(name, depth + 1): walk(item, depth + 1) for name, item in value.items()}
        else:
            kind = next(k for k in (list, tuple, set, frozenset) if isinstance(value, k))
            new = kind(walk(item, depth + 1) for item in value)
        above.discard(key)
        done[key] = new
        return new

    return walk(content, 0)
