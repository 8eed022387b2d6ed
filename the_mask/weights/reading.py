"""Reading weights files of any kind, without executing anything unless told to.

Read: checkpoints of this project, ``.pth`` state dicts (bare or wrapped), ``.safetensors``, and pickles of nothing but
tensors, arrays and builtins (Detectron2's ``.pkl`` zoo). Files that hold other Python objects can run code when they
are opened, so they need an explicit ``trust_pickle``.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from the_mask.weights.checkpoint import PARTS, join_parts, zip_problem
from the_mask.weights.class_sets import STORED, stored_classes
from the_mask.weights.converters.safe_pickle import SAFE_GLOBALS, UnsafePickleError, load_plain

# Keys under which training programs keep the state dict.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")


@dataclass
class WeightsFile:
    """Content of a weights file.

    Attributes:
        state: tensors by name, on the CPU.
        notes: how they were found.
        class_names: names of the classes, index = train id, when the file holds them.
    """

    state: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    class_names: tuple[str, ...] | None = None


def read_weights(path: str | Path, trust_pickle: bool = False, use_ema: bool = True) -> WeightsFile:
    """Read a weights file.

    Args:
        path: the file.
        trust_pickle: allow formats that can execute code when opened.
        use_ema: take the averaged weights of a checkpoint that holds both.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, untrusted, or no tensors in it.
    """
    content = _read(path, trust_pickle)
    notes = []
    class_names = stored_classes(content)
    average = content.get("ema") if use_ema and isinstance(content, Mapping) else None
    if isinstance(average, Mapping) and "average" in average:
        content = average["average"]
        notes.append("weights: the exponential moving average")
    while isinstance(content, Mapping):
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            break
        content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    state = {str(name): _tensor(value) for name, value in content.items() if isinstance(value, (Tensor, np.ndarray))}
    if not state:
        raise ValueError(f"{path} holds no tensors; its keys are {list(content)[:8]}")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return WeightsFile(state, notes, class_names)


def _read(path: str | Path, trust_pickle: bool) -> Any:
    """Content of a weights file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist (MODEL.WEIGHTS)")
    content = _read_file(path, trust_pickle)
    return join_parts(path, content) if isinstance(content, dict) and PARTS in content else content


def _tensor(value: Tensor | np.ndarray) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def _read_file(path: Path, trust_pickle: bool) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
                return {"model": tensors, STORED: (file.metadata() or {}).get(STORED)}
        except SafetensorError as error:
            raise ValueError(f"{path} is corrupt or truncated: {error}") from error
    if path.suffix in (".pkl", ".pickle"):
        return _read_pickle(path, trust_pickle)
    if zipfile.is_zipfile(path):
        problem = zip_problem(path)
        if problem:
            raise ValueError(f"{path} cannot be read: {problem}")
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        if not trust_pickle and zipfile.is_zipfile(path):
            found = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
            what = f" ({found[1]})" if found else ""
            raise ValueError(_needs_trust(path, f"it holds Python objects{what} beside tensors")) from error
        raise ValueError(_unreadable(path, error)) from error
    except (RuntimeError, EOFError, KeyError, ValueError, AttributeError, ImportError) as error:
        raise ValueError(_unreadable(path, error)) from error


def _read_pickle(path: Path, trust_pickle: bool) -> Any:
    try:
        with open(path, "rb") as stream:
            # latin1: the files of Detectron2's zoo were written by Python 2.
            return pickle.load(stream, encoding="latin1") if trust_pickle else load_plain(stream, "latin1")
    except UnsafePickleError as error:
        raise ValueError(_needs_trust(path, f"it is a pickle with {error}")) from error
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError, AttributeError, ImportError, IndexError) as error:
        raise ValueError(_unreadable(path, error)) from error


def _needs_trust(path: Path, what: str) -> str:
    return (
        f"{path} is refused: {what}, and opening it can run code. If its source is trusted, pass --trust-pickle "
        "(trust_pickle=True; --trust of tools/convert_checkpoint.py), or convert it to .safetensors once"
    )


def _unreadable(path: Path, error: Exception) -> str:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{path} is corrupt, truncated, or not a weights file ({path.stat().st_size} bytes): {first}"
