"""Pickles of tensors, arrays and builtins, read without running anything they bring along."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np


class UnsafePickleError(ValueError):
    """A pickle refers to something that is not plain data; the message names it."""


def _numpy_globals() -> dict[tuple[str, str], Any]:
    """What numpy's arrays, scalars and dtypes refer to, under the names of numpy 1 and 2."""
    multiarray = np.empty(0).__reduce__()[0].__module__
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    found: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for module in {multiarray, "numpy.core.multiarray", "numpy._core.multiarray"}:
        found[module, "_reconstruct"] = reconstruct
        found[module, "scalar"] = scalar
    return found


_ALLOWED: dict[tuple[str, str], Any] = {
    **_numpy_globals(),
    ("collections", "OrderedDict"): OrderedDict,
}
# For torch's own reader, which takes (object, name) pairs; dtypes have classes of their own since numpy 1.25.
SAFE_GLOBALS: list[Any] = [
    *((value, ".".join(name)) for name, value in _ALLOWED.items() if name[0].startswith("numpy")),
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdSU"},
]


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        # Python 2's bytes come as encoded text.
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise UnsafePickleError(f"Python objects in it ({module}.{name})")


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1", "ascii", "utf-8"):
        raise UnsafePickleError(f"text in it of encoding {encoding!r}")
    return text.encode(encoding)


def load_plain(stream: BinaryIO, encoding: str = "ASCII") -> Any:
    """Unpickle builtins, ``OrderedDict`` and numpy arrays; nothing else is even imported.

    Args:
        stream: open file.
        encoding: of strings that Python 2 wrote.

    Raises:
        UnsafePickleError: the pickle holds anything else.
        pickle.UnpicklingError, EOFError, ...: damaged.
    """
    return _PlainUnpickler(stream, encoding=encoding).load()
