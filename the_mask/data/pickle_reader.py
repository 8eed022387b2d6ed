"""Reads pickles without calling anything but the replacements in :mod:`the_mask.data.pickle_names`.

A pickle is scanned before it is read; only a trusted one is loaded by Python's own reader.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any, BinaryIO

from the_mask.data.pickle_names import MAX_DEPTH, STAND_INS, UnreadableError, UnsafePickleError, plain

MAX_ITEMS = 10_000_000


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        stand_in = STAND_INS.get(f"{module}.{name}")
        if stand_in is None:
            raise UnsafePickleError(f"Python objects in it ({module}.{name})")
        return stand_in


# Instructions that make objects without calling something found by name.
_REFUSED = {"EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "PERSID", "NEXT_BUFFER"}
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}


def _instructions(stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Names and arguments of one pickle's instructions; none of them is executed.

    Raises:
        UnsafePickleError: an instruction of :data:`_REFUSED`.
        UnreadableError: no pickle, or one that takes more memory or time than its length explains: indices beyond its
            objects, tuples of tuples so deep or so often repeated that their hash does not end.
    """
    # Size and depth of each object on the stack, if written out; None is a mark.
    stack: list[tuple[int, int] | None] = []
    memo: dict[int, tuple[int, int]] = {}
    argument: Any
    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        name = operation.name
        if name in _REFUSED:
            raise UnsafePickleError(f"Python objects in it (instruction {name})")
        if name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise UnreadableError(f"object number {argument} after {count} instructions")
        taken: list[tuple[int, int]] = []
        for kind in reversed(operation.stack_before):
            if kind in (pickletools.markobject, pickletools.stackslice):
                while (item := stack.pop()) is not None:
                    taken.append(item)
                if kind is pickletools.stackslice:
                    stack.append(None)
            elif (item := stack.pop()) is None:
                raise UnreadableError(f"instruction {name} without its arguments")
            else:
                taken.append(item)
        if name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(None)
        elif name in _TUPLES:
            size, depth = sum(item[0] for item in taken), max((item[1] for item in taken), default=0)
            if size > MAX_ITEMS or depth > MAX_DEPTH:
                raise UnreadableError(f"tuples in it are nested {depth} deep, with {size} items")
            stack.append((size + 1, depth + 1))
        elif name == "DUP":
            stack += taken * 2
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            stack.append(taken[0]) if taken else None
            top = stack[-1]
            if top is None:
                raise UnreadableError(f"instruction {name} without its argument")
            memo[len(memo) if name == "MEMOIZE" else argument] = top
        else:
            stack += [(1, 0)] * len(operation.stack_after)
        yield name, argument


def check_pickle(stream: BinaryIO, allowed: Collection[str] | None = None) -> None:
    """Check one pickle before it is read; ``allowed`` are the names it may contain, where they are written out."""

    def look() -> None:
        for name, argument in _instructions(stream):
            if allowed is None:
                continue
            if name == "GLOBAL" and argument.replace(" ", ".") not in allowed:
                raise UnsafePickleError(f"Python objects in it ({argument.replace(' ', '.')})")
            if name == "STACK_GLOBAL":
                raise UnsafePickleError("Python objects in it (instruction STACK_GLOBAL)")

    guarded(look)


def load_pickle(stream: BinaryIO, encoding: str = "latin1") -> Any:
    """Load the builtins and numpy arrays of a pickle; nothing else is even imported.

    Args:
        stream: open file, at its start.
        encoding: of strings that Python 2 wrote.

    Raises:
        UnsafePickleError: the pickle holds anything else.
        UnreadableError: damaged.
    """
    check_pickle(stream)
    stream.seek(0)
    return guarded(lambda: plain(_PlainUnpickler(stream, encoding=encoding).load()))


def guarded(read: Callable[[], Any]) -> Any:
    """Call a pickle reader and translate its errors: on damaged input it can raise almost anything."""
    try:
        return read()
    except (UnsafePickleError, UnreadableError):
        raise
    except MemoryError as error:
        raise UnreadableError("it claims more memory than there is") from error
    except RecursionError as error:
        raise UnreadableError("it is nested too deep") from error
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if found:
            raise UnsafePickleError(f"Python objects in it ({found[1]})") from error
        raise UnreadableError(_first_line(error)) from error
    except (
        *(RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, ImportError, OverflowError),
        AssertionError,
        OSError,
    ) as error:
        raise UnreadableError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# Used only with ``trust``.


class _Missing:
    """An object of a class that is not installed: accepts whatever a pickle does with it, and holds nothing."""

    def __new__(cls, *args: Any, **options: Any) -> _Missing:
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def _ignore(self, *args: Any, **options: Any) -> None:
        pass

    __setstate__ = append = extend = __setitem__ = add = _ignore

    def __call__(self, *args: Any, **options: Any) -> _Missing:
        return self


class TrustingUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return type(name.rpartition(".")[2], (_Missing,), {"__module__": module})


# torch.load takes a module with these names.
TRUSTING: Any = types.ModuleType("trusting_pickle")
TRUSTING.Unpickler = TrustingUnpickler
TRUSTING.UnpicklingError = pickle.UnpicklingError
TRUSTING.load = lambda stream, **options: TrustingUnpickler(stream, **options).load()
