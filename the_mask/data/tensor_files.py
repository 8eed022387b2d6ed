"""Read files of tensors in any format without calling anything that they name.

Formats are recognised by content, not by suffix: ``.safetensors``, torch's archives and its older stream, and
pickles of tensors, arrays and builtins (Detectron2's zoo).

A pickle is a program, and the names in it decide what it can call. Torch's files are read by torch's own
``weights_only`` reader, other pickles by Python's, and both may name only what is in :data:`TORCH_GLOBALS` and
:data:`STAND_INS`. Numpy's own constructors are never among it, since with a data type of Python objects they turn
bytes of the file into pointers; stand-ins take their place and build arrays of plain numbers from bytes whose number
has been checked.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
import types
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

# Keys under which training programs keep the state dict.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
# First bytes of torch's format before 1.6: a pickled magic number.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# What people often have in place of a weights file.
_MISTAKEN = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`",
    b"<!DOCTYPE": "a web page, so the download has failed",
    b"<html": "a web page, so the download has failed",
    b"\x89HDF\r\n\x1a\n": "an HDF5 (Keras) file, which is not read",
}
MAX_DEPTH = 64
MAX_ITEMS = 10_000_000
# A stored archive is as large as its content; compressed ones are bounded before anything is unpacked.
MAX_EXPANSION = 20


class UnsafePickleError(ValueError):
    """A pickle names something that is not plain data; the message says what."""


class UnreadableError(ValueError):
    """A file is damaged or of an unknown kind; the message says why, without the file's name."""


# Stand-ins for what numpy's pickles name.


class _Number:
    """Stands in for a numpy dtype: one of plain numbers, booleans or texts, whose byte order may be set once more."""

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


class _Array:
    """Stands in for a numpy array until the whole file is read."""

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
    if not isinstance(number, _Number) or not isinstance(content, (bytes, bytearray)) or order not in ("C", "F"):
        raise UnsafePickleError("an array of other things than numbers in it")
    if not isinstance(shape, tuple) or len(shape) > 32 or not all(type(side) is int and side >= 0 for side in shape):
        raise UnsafePickleError(f"an array of shape {shape!r} in it")
    if math.prod(shape) * number.dtype.itemsize != len(content):
        raise UnsafePickleError(f"an array of {list(shape)} {number.dtype} in {len(content)} bytes in it")
    if not content:
        return np.zeros(shape, number.dtype)
    return np.frombuffer(content, number.dtype).reshape(shape, order="F" if order == "F" else "C").copy()


class _StandIn:
    """Called in place of what a pickle names. The pickle can neither change nor build it."""

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
    """Stands in for ``OrderedDict``; attributes are left out (torch's state dicts carry versions of modules)."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


def _reconstruct(kind: object, shape: object, dtype: object) -> _Array:
    if kind is not _NDARRAY:
        raise UnsafePickleError("a kind of array in it")
    return _Array()


def _scalar(number: object, content: object = b"") -> Any:
    return _array(content, number, (), "C").item()


def _from_buffer(content: object, number: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.value = _array(content, number, shape, order)
    return array


def _encode(text: object, encoding: object = "utf-8") -> bytes:
    """Python 2's bytes, and those of protocol 2, come as encoded text."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "ascii", "utf-8"):
        raise UnsafePickleError(f"text of encoding {encoding!r} in it")
    return text.encode(str(encoding))


def _no_bytes() -> bytes:
    return b""


def _dtype(kind: object, align: object = False, copy: object = False) -> _Number:
    return _Number(kind)


_NDARRAY = _StandIn("numpy.ndarray", None)
_NUMPY = {
    "numpy.ndarray": _NDARRAY,
    "numpy.dtype": _StandIn("numpy.dtype", _dtype),
    **{
        f"{module}.{name}": _StandIn(f"{module}.{name}", call)
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
    f"{module}.{name}": _StandIn(name, call)
    for module in ("builtins", "__builtin__")
    for name, call in (("bytes", _no_bytes), ("set", set), ("frozenset", frozenset), ("complex", complex))
}
# Everything that a pickle which torch did not write can call.
STAND_INS: dict[str, _StandIn] = {
    **_NUMPY,
    **_BUILTINS,
    "collections.OrderedDict": _StandIn("collections.OrderedDict", _Dictionary),
    "_codecs.encode": _StandIn("_codecs.encode", _encode),
}
# Everything that a file written by torch may name; of the rest, torch's own reader refuses what it does not know.
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
_FOR_TORCH: list[Any] = [
    *((stand_in, name) for name, stand_in in STAND_INS.items()),
    (_Array, f"{__name__}._Array"),
    (_Number, f"{__name__}._Number"),
]


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
    # Size and depth, when written out, of each object on the stack; None is a mark.
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


def _check_pickle(stream: BinaryIO, allowed: Collection[str] | None = None) -> None:
    """Check one pickle before it is read; ``allowed`` are the names it may contain, where they are written out."""

    def look() -> None:
        for name, argument in _instructions(stream):
            if allowed is None:
                continue
            if name == "GLOBAL" and argument.replace(" ", ".") not in allowed:
                raise UnsafePickleError(f"Python objects in it ({argument.replace(' ', '.')})")
            if name == "STACK_GLOBAL":
                raise UnsafePickleError("Python objects in it (instruction STACK_GLOBAL)")

    _guarded(look)


def load_pickle(stream: BinaryIO, encoding: str = "latin1") -> Any:
    """Load the builtins and numpy arrays of a pickle; nothing else is even imported.

    Args:
        stream: open file, at its start.
        encoding: of strings that Python 2 wrote.

    Raises:
        UnsafePickleError: the pickle holds anything else.
        UnreadableError: damaged.
    """
    _check_pickle(stream)
    stream.seek(0)
    return _guarded(lambda: plain(_PlainUnpickler(stream, encoding=encoding).load()))


def load_torch(path: Path, trust: bool = False) -> Any:
    """Load a file that ``torch.save`` wrote, onto the CPU.

    Args:
        path: an archive whose checksums are verified here (torch verifies none), or the format before torch 1.6.
        trust: let the file run its own code. Classes that are not installed become empty objects.

    Raises:
        UnsafePickleError: it holds more than tensors, arrays and builtins, and ``trust`` is off.
        UnreadableError: damaged.
    """
    with open(path, "rb") as stream:
        archive = stream.read(4) == b"PK\x03\x04"
    if archive and (problem := zip_problem(path)) is not None:
        raise UnreadableError(problem)
    if not trust:
        _check_names(path, archive)

    def load() -> Any:
        # A stream, because torch goes by the suffix of a path.
        with open(path, "rb") as stream, torch.serialization.safe_globals(_FOR_TORCH):
            if trust:
                return torch.load(stream, map_location="cpu", weights_only=False, pickle_module=_TRUSTING)
            return plain(torch.load(stream, map_location="cpu", weights_only=True))

    return _guarded(load)


def _check_names(path: Path, archive: bool) -> None:
    """Refuse a torch file that names anything beyond :data:`TORCH_GLOBALS`."""
    if archive:
        with zipfile.ZipFile(path) as file:
            names = [name for name in file.namelist() if name.endswith("data.pkl")]
            if len(names) != 1:
                raise UnreadableError("a zip archive, but not one that torch.save has written")
            with file.open(names[0]) as stream:
                _check_pickle(stream, TORCH_GLOBALS)  # type: ignore[arg-type]
        return
    with open(path, "rb") as stream:
        # Magic number, version, machine, content, keys of the tensors; then their bytes.
        for _ in range(5):
            _check_pickle(stream, TORCH_GLOBALS)


def _guarded(read: Callable[[], Any]) -> Any:
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


def plain(content: Any) -> Any:
    """Replace the stand-ins in loaded content by the tensors and arrays they stand for.

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
        if isinstance(value, _Array):
            return value.value
        if isinstance(value, _Number):
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


def zip_problem(path: Path) -> str | None:
    """The problem of a zip archive (the format of ``torch.save``), or None. torch itself verifies no checksum."""
    if not zipfile.is_zipfile(path):
        return f"truncated or not a checkpoint ({path.stat().st_size} bytes)"
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
            if size > MAX_EXPANSION * path.stat().st_size + 2**20:
                return f"an archive of {path.stat().st_size} bytes that claims to hold {size}"
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"damaged archive ({error})"
    return f"damaged content ({damaged} fails its checksum)" if damaged else None


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


class _TrustingUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return type(name.rpartition(".")[2], (_Missing,), {"__module__": module})


# torch.load takes a module with these names.
_TRUSTING: Any = types.ModuleType("trusting_pickle")
_TRUSTING.Unpickler = _TrustingUnpickler
_TRUSTING.UnpicklingError = pickle.UnpicklingError
_TRUSTING.load = lambda stream, **options: _TrustingUnpickler(stream, **options).load()


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a ``.safetensors`` file, on the CPU.

    Raises:
        UnreadableError: damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names: Sequence[str] = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        raise UnreadableError(str(error)) from error


def read_tensors(path: str | Path, what: str = "weights file", trust: bool = False) -> Any:
    """Read a file of tensors; a ``.safetensors`` file gives ``{"model": tensors, **metadata}``.

    Args:
        path: the file; its suffix does not matter.
        what: what the file is, for errors.
        trust: let a pickle run its own code.

    Raises:
        FileNotFoundError: no such file. ValueError: damaged, of an unknown kind, or with Python objects in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path} does not exist")
    try:
        return _read(path, trust)
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{path} is refused: it is a pickle with {error}, and opening it can run code. If its source is trusted, "
            "pass --trust-pickle (trust_pickle=True; --trust of tools/convert_checkpoint.py), or convert it to "
            ".safetensors once"
        ) from error
    except UnreadableError as error:
        size = path.stat().st_size
        raise ValueError(f"{path} is corrupt, truncated, or not a {what} ({size} bytes): {error}") from error


def _read(path: Path, trust: bool) -> Any:
    size = path.stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(32)
    for start, meaning in _MISTAKEN.items():
        if head.lower().startswith(start.lower()):
            raise UnreadableError(f"it is {meaning}")
    if head.startswith((b"PK\x03\x04", _LEGACY_TORCH)):
        return load_torch(path, trust)
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8:
        tensors, metadata = load_safetensors(path)
        return {**metadata, "model": tensors}
    with open(path, "rb") as stream:
        if trust:
            return _guarded(lambda: _TrustingUnpickler(stream, encoding="latin1").load())
        return load_pickle(stream)


def state_dict_of(content: Any, path: str | Path) -> dict[str, Tensor]:
    """Find the state dict in the content of a checkpoint, whatever is wrapped around it.

    ``module.`` (DistributedDataParallel) and ``_orig_mod.`` (``torch.compile``) are removed from the names.

    Raises:
        ValueError: no dictionary of tensors.
    """
    seen: set[int] = set()
    while isinstance(content, Mapping) and id(content) not in seen:
        seen.add(id(content))
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            break
        content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    state = {str(name): _tensor(value) for name, value in content.items() if isinstance(value, (Tensor, np.ndarray))}
    if not state:
        raise ValueError(f"{path} holds no tensors; its keys are {[str(key)[:80] for key in list(content)[:8]]}")
    names = {name: re.sub(r"(?:^|(?<=\.))_orig_mod\.", "", name) for name in state}
    while all(name.startswith("module.") for name in names.values()):
        names = {name: new.removeprefix("module.") for name, new in names.items()}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{path} holds tensors whose names differ only by '_orig_mod.'")
    return {names[name]: value for name, value in state.items()}


def _tensor(value: Tensor | np.ndarray) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    # torch supports only the machine's byte order.
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
