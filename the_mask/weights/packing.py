"""From a checkpoint to the files of a model that comes with the library; see :mod:`the_mask.models`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from torch import Tensor

from the_mask.config import load_config
from the_mask.data.class_names import config_classes
from the_mask.data.files import atomic_write, file_digest
from the_mask.models import FOLDER, parse_card
from the_mask.weights.converters.files import save_state
from the_mask.weights.trained import trained

# What belongs to a training or a machine, not to a model.
LEFT_OUT = ("OUTPUT_DIR", "DATALOADER", "SOLVER", "SEED", "CUDNN_BENCHMARK")
TEMPLATE = "\nWhat it is for, what it was trained on, what it fails at: to be written.\n"


def pack_model(cfg: CfgNode, name: str, trust_pickle: bool = False, folder: Path = FOLDER) -> Path:
    """Write ``NAME.safetensors``, ``NAME.yaml`` and ``NAME.md`` for the model of a config.

    Averaged weights are taken where the checkpoint has them. Facts and prose of a card that exists stay, but for what
    is computed here: ``sha256``, ``bytes``, ``parameters``, ``classes``.

    Args:
        cfg: with ``MODEL.WEIGHTS``.
        name: lower case letters, digits and hyphens.
        trust_pickle: of :func:`the_mask.weights.load_weights`.
        folder: where to.

    Returns:
        The weights file.

    Raises:
        ValueError: a bad name, no weights, or weights that do not fill the model.
        FileNotFoundError: no such weights or folder.
    """
    if not name or not set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-"):
        raise ValueError(f"{name!r}: a model's name has lower case letters, digits and hyphens only")
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("there is nothing to pack: MODEL.WEIGHTS is empty")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: the folder does not exist")
    target, card = folder / f"{name}.safetensors", folder / f"{name}.md"
    facts: dict[str, Any] = {}
    text = TEMPLATE
    if card.exists():
        old = parse_card(name, card.read_text(encoding="utf-8"))
        facts, text = old.facts, "\n" + old.text
    own = cfg.clone()
    own.defrost()
    # The whole model is in the file, so nothing else is to be read for it.
    own.MODEL.TIMM.WEIGHTS = own.MODEL.BEIT.WEIGHTS = ""
    own.MODEL.TIMM.PRETRAINED = own.MODEL.BEIT.PRETRAINED = False
    own.MODEL.DEVICE = "cpu"
    model = trained(own, trust_pickle=trust_pickle)
    classes = config_classes(own, own.DATASETS.TRAIN)
    state = {key: half(value) for key, value in model.state_dict().items() if not key.startswith("criterion.")}
    save_state(target, state, f"the_mask model {name}", classes)
    own.MODEL.DEVICE, own.MODEL.WEIGHTS = "auto", ""
    content = yaml.safe_dump({"VERSION": own.VERSION, **changed_keys(own, load_config())}, sort_keys=True)
    header = f"# The whole config of {name}, written by tools/pack_model.py.\n"
    atomic_write(folder / f"{name}.yaml", (header + content).encode())
    facts |= {
        "sha256": file_digest(target),
        "bytes": target.stat().st_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "classes": list(classes or ()),
    }
    front = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=120)
    atomic_write(card, f"---\n{front}---\n{text}".encode())
    return target


def half(value: Tensor) -> Tensor:
    """Matrices and kernels in float16; vectors (biases, statistics of norms) stay: they are small and may be large."""
    return value.half() if value.is_floating_point() and value.ndim > 1 else value


def changed_keys(cfg: CfgNode, defaults: CfgNode) -> dict[str, Any]:
    """Keys of a model whose values are not the defaults, nested as in YAML."""
    return _changed({key: value for key, value in cfg.items() if key not in LEFT_OUT}, defaults)


def _changed(node: dict[str, Any], defaults: CfgNode) -> dict[str, Any]:
    found = {}
    for key, value in node.items():
        if key not in defaults:
            found[key] = _plain(value)
        elif isinstance(value, CfgNode) and isinstance(defaults[key], CfgNode):
            inner = _changed(value, defaults[key])
            if inner:
                found[key] = inner
        elif key != "DEVICE" and value != defaults[key]:
            found[key] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, CfgNode):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
