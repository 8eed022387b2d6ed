"""Configs: all keys of the_mask on top of Detectron2's (listed in ``config_keys``), and reading YAML with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from the_mask.config.keys import SUBJECTS


def add_the_mask_config(cfg: CfgNode) -> None:
    """Add the keys of the_mask to a Detectron2 config, in place."""
    for subject in SUBJECTS:
        subject.add_keys(cfg)


def load_config(
    config_file: str | Path | None = None, overrides: Sequence[str] = (), allow_unsafe: bool = False
) -> CfgNode:
    """Read a YAML config on top of all defaults, apply ``KEY VALUE`` overrides, resolve ``MODEL.DEVICE: auto``.

    Args:
        config_file: YAML file; its ``_BASE_`` is read first. ``None`` gives the defaults.
        overrides: flat list ``[KEY, VALUE, ...]``.
        allow_unsafe: let YAML construct arbitrary Python objects. Off: such a file is an error.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: unknown key, value of another type, odd number of overrides, invalid or unsafe YAML, or a file of
            another config version.
    """
    cfg = get_cfg()
    add_the_mask_config(cfg)
    if config_file is not None:
        _merge_file(cfg, Path(config_file), allow_unsafe)
    _merge_overrides(cfg, list(overrides))
    if cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    return cfg


def _merge_file(cfg: CfgNode, path: Path, allow_unsafe: bool) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    try:
        cfg.merge_from_file(str(path), allow_unsafe=allow_unsafe)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{path}: YAML that builds Python objects is refused (see --allow-unsafe-yaml): {error}"
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    except AssertionError as error:
        # Detectron2 compares VERSION with its own by an assertion.
        raise ValueError(f"{path}: its config version does not fit this program's, {cfg.VERSION}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path}: {_explain_key(cfg, error)}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: _BASE_ leads back to a file that is being read") from error
    except ValueError as error:
        raise ValueError(f"{path}: {_without_node(error)}") from error
    except (AttributeError, TypeError) as error:
        # yacs takes for granted that it got a dict.
        raise ValueError(f"{path}: a config is a mapping of config keys to values ({error})") from error


def _merge_overrides(cfg: CfgNode, overrides: list[str]) -> None:
    if len(overrides) % 2:
        raise ValueError(f"overrides come as KEY VALUE pairs, got an odd number of words: {overrides}")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, AssertionError) as error:
            raise ValueError(f"override {key} {value}: {_explain_key(cfg, error, key)}") from error
        except ValueError as error:
            raise ValueError(f"override {key} {value}: {_without_node(error)}") from error


def _without_node(error: ValueError) -> str:
    """Cut the whole config out of yacs' message about a value where a group of keys belongs."""
    text = str(error)
    return re.sub(r" with values \(.*\) for", " for", text, flags=re.DOTALL) if "\n" in text else text


def _explain_key(cfg: CfgNode, error: Exception, key: str | None = None) -> str:
    """Say which config key is unknown and which known ones look like it."""
    key = key or str(error).strip("'\"").removeprefix("Non-existent config key: ")
    close = difflib.get_close_matches(key, list(_flat_keys(cfg)), n=3)
    return f"unknown config key {key}" + (f"; did you mean {', '.join(close)}?" if close else "")


def _flat_keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _flat_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
