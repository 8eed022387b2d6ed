"""Turns a checkpoint into the files of a packaged model; see :mod:`the_mask.models`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor

import the_mask
from the_mask.config import load_config
from the_mask.data.class_names import classes_dataset, config_classes
from the_mask.data.files import atomic_write, file_digest, read_text
from the_mask.models import FOLDER, parse_card
from the_mask.weights.converters.files import save_state
from the_mask.weights.trained import trained

# Keys that belong to a machine, not to a model: where it writes, what it logs to. The optimiser and its schedule stay:
# they are a start for training on from the model.
LEFT_OUT = (
    *("OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "SEED", "CUDNN_BENCHMARK", "SOLVER.TRACKERS"),
    *("TEST.SAVE_PREDICTIONS", "TEST.SAVE_SCORES", "TEST.SAVE_REPORT", "TEST.VOTING.SAVE_MASKS"),
    *("MODEL.DEVICE", "MODEL.KEYFRAME.CACHE_DIR", "MODEL.FROZEN_FEATURES.CACHE"),
)
TEMPLATE = "\nWhat it is for, what it was trained on, what it fails at: to be written.\n"


@dataclass(frozen=True)
class ModelFiles:
    """The three files of a model: weights (``.safetensors``), complete config (YAML), card (Markdown with facts)."""

    weights: Path
    config: Path
    card: Path


def pack_model(cfg: CfgNode, name: str, trust_pickle: bool = False, folder: Path = FOLDER) -> Path:
    """Write ``NAME.safetensors``, ``NAME.yaml`` and ``NAME.md`` for the model of a config, see :func:`write_model`.

    Args:
        cfg: with ``MODEL.WEIGHTS``.
        name: lower case letters, digits and hyphens.
        trust_pickle: of :func:`the_mask.weights.load_weights`.
        folder: output folder.

    Returns:
        The weights file.

    Raises:
        ValueError: a bad name, no weights, or weights that do not fill the model.
        FileNotFoundError: no such weights or folder.
    """
    if not name or not set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-"):
        raise ValueError(f"{name!r}: a model's name has lower case letters, digits and hyphens only")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: the folder does not exist")
    files = ModelFiles(*(folder / f"{name}{suffix}" for suffix in (".safetensors", ".yaml", ".md")))
    write_model(cfg, files, name, trust_pickle=trust_pickle)
    return files.weights


def write_model(
    cfg: CfgNode,
    files: ModelFiles,
    name: str,
    facts: Mapping[str, Any] | None = None,
    *,
    halve: bool = True,
    trust_pickle: bool = False,
) -> None:
    """Write the model of a config as self-contained files, without a data set, other weights or a base config.

    Averaged weights are used if the checkpoint has them. Facts and text of an existing card are kept, except those that
    are computed here: ``sha256``, ``bytes``, ``parameters``, ``classes``, ``colors``.

    Args:
        cfg: with ``MODEL.WEIGHTS``.
        files: files to write; their folder must exist.
        name: name of the model, for the notes in the files.
        facts: further facts for the card.
        halve: store matrices and kernels in float16.
        trust_pickle: of :func:`the_mask.weights.load_weights`.

    Raises:
        ValueError: no weights, or weights that do not fill the model.
        FileNotFoundError: no such weights.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("there is nothing to pack: MODEL.WEIGHTS is empty")
    known: dict[str, Any] = {}
    text = TEMPLATE
    if files.card.exists():
        old = parse_card(name, read_text(files.card, "card"))
        known, text = old.facts, "\n" + old.text
    own = cfg.clone()
    own.defrost()
    # The file has the complete model, so no other weights are to be read.
    own.MODEL.TIMM.WEIGHTS = own.MODEL.BEIT.WEIGHTS = ""
    own.MODEL.TIMM.PRETRAINED = own.MODEL.BEIT.PRETRAINED = own.MODEL.THE_MASK.INIT_FROM_STAGE1 = False
    own.MODEL.DEVICE = "cpu"
    model = trained(own, trust_pickle=trust_pickle)
    classes = config_classes(own, own.DATASETS.TRAIN)
    dataset = classes_dataset(own, own.DATASETS.TRAIN)
    state = {k: half(v) if halve else v for k, v in model.state_dict().items() if not k.startswith("criterion.")}
    save_state(files.weights, state, f"the_mask model {name}", classes)
    # User modules are not included; names and colours of the classes go into the card.
    own.MODEL.WEIGHTS, own.DATASETS.IMPORT = "", []
    content = yaml.safe_dump({"VERSION": own.VERSION, **changed_keys(own, load_config())}, sort_keys=True)
    header = f"# The whole config of {name}, written by the_mask {the_mask.__version__}.\n"
    atomic_write(files.config, (header + content).encode())
    found = known | dict(facts or {})
    found |= {
        "sha256": file_digest(files.weights),
        "bytes": files.weights.stat().st_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "classes": list(classes or ()),
        "colors": [list(map(int, c)) for c in MetadataCatalog.get(dataset).stuff_colors] if dataset else [],
    }
    front = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=120)
    atomic_write(files.card, f"---\n{front}---\n{text}".encode())


def half(value: Tensor) -> Tensor:
    """Convert matrices and kernels to float16; not vectors (biases, norm statistics), which may have large values."""
    return value.half() if value.is_floating_point() and value.ndim > 1 else value


def changed_keys(cfg: CfgNode, defaults: CfgNode) -> dict[str, Any]:
    """Keys of a model's config whose values are not the defaults, nested as in YAML; without :data:`LEFT_OUT`."""
    return _changed(cfg, defaults, "")


def _changed(node: dict[str, Any], defaults: CfgNode, prefix: str) -> dict[str, Any]:
    found = {}
    for key, value in node.items():
        if key not in defaults:
            found[key] = _plain(value)
        elif isinstance(value, CfgNode) and isinstance(defaults[key], CfgNode):
            inner = _changed(value, defaults[key], f"{prefix}{key}.")
            if inner:
                found[key] = inner
        elif f"{prefix}{key}" not in LEFT_OUT and value != defaults[key]:
            found[key] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, CfgNode):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
