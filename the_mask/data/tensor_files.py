"""Reads files of tensors in any format without calling anything that they name.

Formats are recognised by content, not by suffix: ``.safetensors``, torch's archives and its older stream, and
pickles of tensors, arrays and builtins (Detectron2's zoo).

Torch's files are read by torch's own ``weights_only`` reader, other pickles by :mod:`the_mask.data.pickle_reader`, and
both may name only what :mod:`the_mask.data.pickle_names` lists.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from the_mask.data.archives import opened_zip
from the_mask.data.pickle_names import FOR_TORCH, TORCH_GLOBALS, UnreadableError, UnsafePickleError, plain
from the_mask.data.pickle_reader import TRUSTING, TrustingUnpickler, check_pickle, guarded, load_pickle

# Keys under which training programs keep the state dict.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
# First bytes of torch's format before 1.6: a pickled magic number.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# First bytes of files that are often mistaken for weights.
_MISTAKEN = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`",
    b"<!DOCTYPE": "a web page, so the download has failed",
    b"<html": "a web page, so the download has failed",
    b"\x89HDF\r\n\x1a\n": "an HDF5 (Keras) file, which is not read",
}
# A stored archive is as large as its content; compressed ones are bounded before anything is unpacked.
MAX_EXPANSION = 20
# One per tensor.
MAX_MEMBERS = 200_000


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
        with open(path, "rb") as stream, torch.serialization.safe_globals(FOR_TORCH):
            if trust:
                return torch.load(stream, map_location="cpu", weights_only=False, pickle_module=TRUSTING)
            return plain(torch.load(stream, map_location="cpu", weights_only=True))

    return guarded(load)


def _check_names(path: Path, archive: bool) -> None:
    """Refuse a torch file that names anything beyond :data:`TORCH_GLOBALS`."""
    if archive:
        with zipfile.ZipFile(path) as file:
            names = [name for name in file.namelist() if name.endswith("data.pkl")]
            if len(names) != 1:
                raise UnreadableError("a zip archive, but not one that torch.save has written")
            with file.open(names[0]) as stream:
                check_pickle(stream, TORCH_GLOBALS)  # type: ignore[arg-type]
        return
    with open(path, "rb") as stream:
        # Magic number, version, machine, content, keys of the tensors; then their bytes.
        for _ in range(5):
            check_pickle(stream, TORCH_GLOBALS)


def zip_problem(path: Path) -> str | None:
    """The problem of a zip archive (the format of ``torch.save``), or None. torch itself verifies no checksum."""
    try:
        with opened_zip(path, MAX_EXPANSION, most_members=MAX_MEMBERS) as archive:
            damaged = archive.testzip()
    except ValueError as error:
        return f"truncated or not a checkpoint ({path.stat().st_size} bytes): {error}"
    return f"damaged content ({damaged} fails its checksum)" if damaged else None


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


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A ``.safetensors`` file of tensors that share no memory: equal content gives equal bytes.

    safetensors itself writes the metadata in an order that varies between calls.
    """
    from safetensors.torch import save

    data = save(dict(tensors), metadata=dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if metadata:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


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
            "pass --trust-pickle (trust_pickle=True; --trust of the-mask convert), or convert it to "
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
            return guarded(lambda: TrustingUnpickler(stream, encoding="latin1").load())
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
