"""Configs: all keys of the_mask on top of Detectron2's (listed in ``keys/``), and reading YAML with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg

from the_mask.config.compose import ConfigFile, config_names, find_config, flat_keys, read_config
from the_mask.config.keys import SUBJECTS, subject_options
from the_mask.config.options import Allowed

__all__ = [
    "ConfigFile",
    "add_the_mask_config",
    "allowed_values",
    "config_names",
    "find_config",
    "load_config",
    "read_config",
]


# Keys that nobody set, with the only value they had: configs that older versions have written say them.
GONE: Mapping[str, Any] = MappingProxyType(
    {
        "MODEL.KEYFRAME.PIXEL_MEAN": [],
        "MODEL.KEYFRAME.PIXEL_STD": [],
        "MODEL.ENCODER.ANNEAL_POWER": 0.9,
        "MODEL.ENCODER.FROZEN.ROPE_BASE": 100.0,
    }
)
_ALL_OPTIONS = [options for subject in SUBJECTS for options in subject_options(subject)]


def add_the_mask_config(cfg: CfgNode) -> None:
    """Add the keys of the_mask to a Detectron2 config, in place."""
    for options in _ALL_OPTIONS:
        options.add_to(cfg)


@lru_cache(maxsize=1)
def allowed_values() -> Mapping[str, Allowed]:
    """Allowed values of the keys that do not take any, by full key."""
    keys = [pair for options in _ALL_OPTIONS for pair in options.config_keys.items()]
    return MappingProxyType({key: what for key, field in keys if (what := field.metadata.get("allowed"))})


def load_config(
    config_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    allow_unsafe: bool = False,
    allow_remote: bool = False,
) -> CfgNode:
    """Read a YAML config on top of all defaults, apply ``KEY VALUE`` overrides, resolve ``MODEL.DEVICE: auto``.

    Args:
        config_file: path or name of a config, see :func:`find_config`; the configs in its ``_BASE_`` are read first.
            ``None`` gives the defaults.
        overrides: flat list ``[KEY, VALUE, ...]``.
        allow_unsafe: allow YAML that constructs arbitrary Python objects; otherwise it is an error.
        allow_remote: allow URLs as the config and in ``_BASE_``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: unknown or empty key, value of another type, odd number of overrides, invalid or unsafe YAML, a key
            given twice, or a file of another config version.
    """
    cfg = get_cfg()
    add_the_mask_config(cfg)
    if config_file is not None:
        if "://" in str(config_file) and not allow_remote:
            raise ValueError(f"config {config_file} is on another machine; --allow-remote-config fetches it")
        place = str(config_file) if "://" in str(config_file) else find_config(config_file)
        _merge_tree(cfg, read_config(place, allow_unsafe, allow_remote), str(place))
    _merge_overrides(cfg, list(overrides))
    _refuse_empty(cfg, config_file)
    if cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    return cfg


def _merge_tree(cfg: CfgNode, tree: dict[str, Any], label: str) -> None:
    """Merge keys as Detectron2 does for a file, including conversion from older versions."""
    # The instance's attribute overrides the class's method, which would read the file differently. The file name must
    # exist.
    cfg.__dict__["load_yaml_with_base"] = lambda filename, allow_unsafe=False: tree
    tree.setdefault("VERSION", cfg.VERSION)
    for key, only in GONE.items():
        *path, name = key.split(".")
        node: Any = tree
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and node.pop(name, only) != only:
            raise ValueError(f"{label}: {_explain_key(cfg, KeyError(), key)}")
    try:
        cfg.merge_from_file(__file__)
    except AssertionError as error:
        # Detectron2 compares VERSION with its own in an assertion.
        raise ValueError(f"{label}: its config version does not fit this program's, {cfg.VERSION}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{label}: {_explain_key(cfg, error)}") from error
    except ValueError as error:
        raise ValueError(f"{label}: {_without_node(error)}") from error
    finally:
        cfg.__dict__.pop("load_yaml_with_base", None)


def _merge_overrides(cfg: CfgNode, overrides: list[str]) -> None:
    if len(overrides) % 2:
        # Keys are written in capitals: what is not stands in the place of one, or else the last word has no value.
        stray = next((word for word in overrides[::2] if not str(word).isupper()), overrides[-1])
        raise ValueError(f"overrides come as KEY VALUE pairs, got an odd number of words: {stray!r} belongs to no pair")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, AssertionError, TypeError) as error:  # TypeError: a key below a key, A.ENABLED.B
            raise ValueError(f"override {key} {value}: {_explain_key(cfg, error, key)}") from error
        except ValueError as error:
            raise ValueError(f"override {key} {value}: {_without_node(error)}") from error


def _refuse_empty(cfg: CfgNode, config_file: str | Path | None) -> None:
    """Refuse keys without a value: ``MAX_ITER:`` is None in YAML, and yacs accepts None for every key."""
    defaults = get_cfg()
    add_the_mask_config(defaults)
    wanted = dict(flat_keys(defaults))
    empty = [key for key, value in flat_keys(cfg) if value is None and wanted.get(key) is not None]
    if empty:
        examples = ", ".join(f"{key} (such as {wanted[key]!r})" for key in empty)
        raise ValueError(
            f"{config_file or 'overrides'}: keys without a value: {examples}; leave a key out for its default"
        )


def _without_node(error: ValueError) -> str:
    """Remove the whole config, and its class, from yacs' message about a value in place of a group of keys."""
    text = re.sub(r"<class '[\w.]*CfgNode'>", "a group of keys", str(error))
    return re.sub(r" with values \(.*\) for", " for", text, flags=re.DOTALL) if "\n" in text else text


def _explain_key(cfg: CfgNode, error: Exception, key: str | None = None) -> str:
    """Message about an unknown config key, with similar known keys."""
    if key is None:
        key = str(error).strip("'\"").removeprefix("Non-existent config key: ")
    if key in GONE:
        return f"config key {key} is gone: its value is always {GONE[key]!r}"
    known = [name for name, _ in flat_keys(cfg)]
    # A known key or group in a wrong group: MODEL.SOLVER.
    names = {part for name in known for part in accumulate(name.split("."), "{}.{}".format)}
    parts = key.upper().split(".")
    inner = [name for name in (".".join(parts[start:]) for start in range(1, len(parts))) if name in names]
    close = inner[:1] or difflib.get_close_matches(key.upper(), known, n=3)
    return f"unknown config key {key}" + (f"; did you mean {', '.join(close)}?" if close else "")
