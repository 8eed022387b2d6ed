"""Reads weights files of any kind: tensors, notes on how they were found, and class names.

The input is a file, a folder as written by Hugging Face, the index of weights split into several files, or the name of
a model. See :mod:`the_mask.data.tensor_files` for formats and safety.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from the_mask.data.files import inside, read_json
from the_mask.data.tensor_files import read_tensors, state_dict_of
from the_mask.models import model_names, model_weights
from the_mask.weights.checkpoint import PARTS, join_parts
from the_mask.weights.class_sets import stored_classes
from the_mask.weights.hub import HUB_PREFIX, fetch_pretrained, hub_id

# File names that are looked for in a folder, in this order.
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".pkl", ".ckpt")


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


def locate_weights(path: str | Path) -> Path:
    """Find the weights file of a path, which may be a folder; of a model that comes with the library, by its name; or
    of a hub model, ``hf://owner/name`` or ``hf://owner/name@revision``, which is downloaded unless it was before.

    Raises:
        FileNotFoundError: no such file, model, or a folder without a weights file of a known name.
        ValueError: another address, or a damaged file of a model.
        ModuleNotFoundError, OSError: see :func:`the_mask.weights.hub.fetch_pretrained`.
    """
    hub = hub_id(str(path)) if str(path).startswith(HUB_PREFIX) else None
    if hub is not None:
        return fetch_pretrained(*hub) / FOLDER_FILES[0]
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(path)):
        raise ValueError(f"weights {path}: addresses are not read; download the file and give its path")
    path = Path(path)
    if path.is_dir():
        for name in FOLDER_FILES:
            if (path / name).is_file():
                return path / name
        there = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)
        hint = f"name one of its files: {', '.join(there[:8])}" if there else "it holds no weights file"
        raise FileNotFoundError(f"weights {path} is a folder without {', '.join(FOLDER_FILES[:2])}, ...; {hint}")
    if not path.is_file() and str(path) in model_names():
        return model_weights(str(path))
    if not path.is_file():
        names = difflib.get_close_matches(str(path), model_names(), n=3)
        hint = f"; did you mean the model {' or '.join(names)}?" if names else ""
        raise FileNotFoundError(f"weights file {path} does not exist{hint}")
    return path


def read_weights(path: str | Path, trust_pickle: bool = False, use_ema: bool = True) -> WeightsFile:
    """Read weights.

    Args:
        path: see :func:`locate_weights`.
        trust_pickle: allow formats that can execute code when opened.
        use_ema: take the averaged weights of a checkpoint that has both.

    Raises:
        FileNotFoundError: no such file, or one of its parts is missing.
        ValueError: unreadable, untrusted, or without tensors.
    """
    file = locate_weights(path)
    if _is_text(file):
        state = _read_index(file, trust_pickle)
        return WeightsFile(state, [f"{len(state)} tensors of the index {file.name}"])
    content = read_tensors(file, trust=trust_pickle)
    if isinstance(content, dict) and PARTS in content:
        content = join_parts(file, content)
    class_names = stored_classes(content)
    notes = [] if file == Path(path) else [f"file {file.name}"]
    average = content.get("ema") if use_ema and isinstance(content, Mapping) else None
    if isinstance(average, Mapping) and "average" in average:
        content = average["average"]
        notes.append("weights: the exponential moving average")
    return WeightsFile(state_dict_of(content, file), notes, class_names)


def _is_text(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def _read_index(path: Path, trust: bool) -> dict[str, Tensor]:
    """Read the tensors of weights split into several files, by their index."""
    places = read_json(path, "index of weights").get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{path} is JSON, but no index of weights: it has no 'weight_map' of tensors and files")
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        part = inside(path.parent, name, where=str(path))
        if not part.is_file():
            raise FileNotFoundError(f"{path} names {part}, which does not exist: the weights are incomplete")
        state.update(state_dict_of(read_tensors(part, trust=trust), part))
    missing = [name for name in places if name not in state]
    if missing:
        raise ValueError(f"{path} names {len(missing)} tensors that are not in its files, e.g. {missing[0]}")
    return {name: state[name] for name in places}
