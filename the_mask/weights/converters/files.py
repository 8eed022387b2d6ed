"""Converts weights files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.modeling import build_model
from torch import Tensor

import the_mask.modeling  # noqa: F401  (fills the registries)
from the_mask.config import load_config
from the_mask.data.files import atomic_write
from the_mask.data.tensor_files import safetensors_bytes
from the_mask.weights.class_sets import STORED
from the_mask.weights.converters.convert import DIFFERENCES, Conversion, check, convert
from the_mask.weights.converters.encoder_only import add_base
from the_mask.weights.converters.tables import fit_position_tables
from the_mask.weights.loading import LoadReport, compare
from the_mask.weights.reading import read_weights

SUFFIXES = (".safetensors", ".pth")


def convert_file(
    source: Path,
    target: Path,
    family: str = "",
    trust: bool = False,
    config_file: Path | None = None,
    write_config: Path | None = None,
    base: Path | None = None,
) -> str:
    """Convert ``source`` to ``target``.

    Args:
        source: any file :func:`the_mask.engine.load_weights` reads.
        target: ``.safetensors`` or ``.pth``; replaced only on success.
        family: expected family of the file, see :func:`convert`.
        trust: allow a file that can run code when it is opened.
        config_file: a model that the result must fill, except for class layers and criterion. A file with only a
            backbone must fill the backbone.
        write_config: new YAML based on ``config_file``, with these weights and the keys with which the model computes
            the same as their release.
        base: the original encoder, for a file that holds changes to its weights (released EoMT on DINOv3).

    Returns:
        The report, as text.

    Raises:
        FileNotFoundError, ValueError: unreadable, of an unknown or another family, or incomplete; the message has the
            report, and ``target`` is unchanged.
    """
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{target}: the result must end in {' or '.join(SUFFIXES)}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: its folder does not exist")
    if write_config is not None:
        if config_file is None:
            raise ValueError(f"{write_config}: a config is written on the base of another one, which is not given")
        if write_config.exists():
            raise ValueError(f"{write_config} exists; choose another name or remove it")
        if not write_config.parent.is_dir():
            raise FileNotFoundError(f"{write_config}: its folder does not exist")
    file = read_weights(source, trust)
    result = check(convert(file.state, str(source), family))
    if result.differences:
        if base is None:
            raise ValueError(f"{source} {DIFFERENCES}")
        original = read_weights(base, trust)
        encoder = check(convert(original.state, str(base))).state
        result.state = add_base(result.state, encoder, str(source), str(base))
        file.notes.append(f"added to the encoder of {base}")
    elif base is not None:
        raise ValueError(f"{source} holds whole weights, not changes of an encoder: leave {base} out")
    if config_file is not None:
        file.notes.append(_check_model(result, config_file))
    save_state(target, result.state, result.title, file.class_names)
    if write_config is not None and config_file is not None:
        _write_config(write_config, config_file, target, result.settings)
        file.notes.append(f"{write_config}: config with these weights")
    return "\n".join([*file.notes, str(result)])


def _write_config(path: Path, base: Path, weights: Path, settings: Mapping[str, str]) -> None:
    content: dict[str, Any] = {"_BASE_": os.path.relpath(base.resolve(), path.parent.resolve())}
    for key, value in {"MODEL.WEIGHTS": str(weights), **settings}.items():
        *nodes, leaf = key.split(".")
        node = content
        for name in nodes:
            node = node.setdefault(name, {})
        node[leaf] = value
    atomic_write(path, yaml.safe_dump(content, sort_keys=False).encode())


def save_state(path: Path, state: dict[str, Tensor], source: str, class_names: Sequence[str] | None = None) -> None:
    """Write tensors as ``.safetensors`` or ``.pth``, with their source and the class names."""
    # Slices and expanded tensors share memory, which safetensors refuses.
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        names = {STORED: json.dumps(list(class_names))} if class_names else {}
        atomic_write(path, safetensors_bytes(own, {"format": "pt", "converted_from": source, **names}))
    else:
        content: dict[str, Any] = {"model": own, "converted_from": source}
        if class_names:
            content[STORED] = list(class_names)
        atomic_write(path, lambda stream: torch.save(content, stream))


def _check_model(result: Conversion, config_file: Path) -> str:
    cfg = load_config(config_file, ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        ours = build_model(cfg).state_dict()
    sections = {name.split(".")[0] for name in result.state}
    wanted = {name: value for name, value in ours.items() if name.split(".")[0] in sections}
    state, resized = fit_position_tables(result.state, wanted)
    report: LoadReport = compare(state, wanted, f"{result.source}, converted, in {config_file}")
    if report.missing or report.mismatched:
        names = [*report.missing, *(name for name, _, _ in report.mismatched)]
        if any(not name.endswith("num_batches_tracked") for name in names):
            raise ValueError(f"{result.source} does not fill the model of {config_file}\n{report}")
    result.state = state
    return f"fills {', '.join(sorted(sections))} of {config_file}" + (
        f"; {len(resized)} position tables resized" if resized else ""
    )


def write_huggingface(source: Path, folder: Path, config_file: Path | None, trust: bool = False) -> str:
    """Write the weights of an encoder-only model as a folder that transformers opens.

    Args:
        source: any file that fills the model.
        folder: the result; replaced file by file.
        config_file: the model's config.

    Returns:
        The report, as text.

    Raises:
        FileNotFoundError, ValueError: no config, weights that do not fill the model, or a model that transformers does
            not have.
    """
    from the_mask.weights.converters.to_huggingface import save_huggingface
    from the_mask.weights.trained import trained

    if config_file is None:
        raise ValueError("a folder for transformers needs the model's config: --config-file")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder}: its parent folder does not exist")
    cfg = load_config(config_file, ["MODEL.DEVICE", "cpu"])
    model: Any = trained(cfg, weights=source, trust_pickle=trust)
    names = read_weights(source, trust).class_names
    kind = save_huggingface(model, folder, names if names and len(names) == model.num_classes else None)
    return f"{folder}: model type {kind}"
