"""Finds configs and composes them from their files.

A config is a YAML file. Small ones may share a file: ``models.yaml`` in a folder has ``name: body`` pairs, and
``vspw/the_mask_mit_b0_1f.yaml`` is the row ``the_mask_mit_b0_1f`` of ``vspw/models.yaml`` if there is no such file.
In rows, keys may be written in full (``SOLVER.BASE_LR: 0.1``). ``_BASE_`` is a config or a list, relative to the
folder; the bases are merged from left to right, and the keys in the body come last.
"""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import the_mask
from the_mask.config.strict_yaml import parse_yaml

logger = logging.getLogger(__name__)
BASE, TABLE = "_BASE_", "models.yaml"
Tree = dict[str, Any]


@dataclass(frozen=True)
class ConfigFile:
    """The location of a config: a YAML file, or a row of a table.

    Attributes:
        path: the file.
        row: name of the row, or None if the whole file is the config.
    """

    path: Path
    row: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.row is None else f"{self.path}:{self.row}"


def config_root() -> Path:
    """The folder of this library's configs: inside the installed package, or ``configs/`` of the source tree."""
    package = Path(the_mask.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str | Path) -> ConfigFile:
    """Find a config by its path or its name.

    Args:
        name: a path; or a name below the library's configs, with or without ``configs/`` and ``.yaml``, such as
            ``vspw/the_mask_r50_1f``; or the name of a model that comes with the library, for its config.

    Raises:
        FileNotFoundError: it does not exist; the message has similar names.
    """
    given = Path(name).expanduser()
    found = _at(given)
    if found is None and not given.is_absolute():
        parts = given.parts
        below = Path(*parts[parts.index("configs") + 1 :]) if "configs" in parts[:-1] else given
        found = _at(config_root() / below) or _at(config_root() / below.with_name(f"{below.name}.yaml"))
    if found is None and len(given.parts) == 1:
        found = _at(Path(the_mask.__file__).parent / "models" / f"{given.name}.yaml")
    if found is None:
        # By the last part, and of equals the one that resembles the whole.
        wanted = "/".join([given.parent.name, given.stem])
        stems = difflib.get_close_matches(given.stem, {known.rpartition("/")[2] for known in config_names()}, n=3)
        known = [known for known in config_names() if known.rpartition("/")[2] in stems]
        close = difflib.get_close_matches(wanted, known, n=3, cutoff=0)
        hint = f"; did you mean {', '.join(close)}?" if close else f" (configs are in {config_root()})"
        raise FileNotFoundError(f"config file {name} does not exist{hint}")
    return found


def config_names() -> list[str]:
    """Names of the library's configs, ``<folder>/<name>``: files and rows, without those that are only bases."""
    root, names = config_root(), []
    for path in root.rglob("*.yaml"):
        folder = path.parent.relative_to(root).as_posix()
        if path.name == TABLE:
            names += [f"{folder}/{row}" for row in _table(path) if not row.startswith("_")]
        elif not path.name.startswith("_"):
            names.append(f"{folder}/{path.stem}")
    return sorted(name for name in names if not name.startswith(("backbones/", "recipes/")))


def read_config(config: ConfigFile | str, allow_unsafe: bool = False, allow_remote: bool = False) -> Tree:
    """Read the keys of a config and of its bases.

    Args:
        config: result of :func:`find_config`, or a URL.
        allow_unsafe: allow YAML that constructs arbitrary Python objects.
        allow_remote: allow configs from URLs.

    Raises:
        FileNotFoundError: a base does not exist.
        ValueError: see :func:`parse_yaml`; a body that is not a mapping, circular bases, a URL without permission, or a
            key that is a group in one file and a value in another.
    """
    return _read(config, allow_unsafe, allow_remote, ())


def config_bases(config: ConfigFile) -> list[ConfigFile]:
    """The bases of a config, in order; URLs are an error."""
    body = _table(config.path)[config.row] if config.row else parse_yaml(config.path.read_bytes(), str(config.path))
    found = [_base(base, config, allow_remote=False) for base in _bases((body or {}).get(BASE), str(config))]
    return [base for base in found if isinstance(base, ConfigFile)]


def _read(config: ConfigFile | str, allow_unsafe: bool, allow_remote: bool, above: tuple[str, ...]) -> Tree:
    label = str(config)
    if label in above:
        raise ValueError(f"{above[-1]}: {BASE} leads back to {label}, which is being read")
    if isinstance(config, str):
        body: Any = parse_yaml(_fetch(config), config, allow_unsafe)
    elif config.row is None:
        body = parse_yaml(config.path.read_bytes(), str(config.path), allow_unsafe)
    else:
        body = copy.deepcopy(_table(config.path, allow_unsafe)[config.row])
        logger.info("%s is %s", config.path.with_name(f"{config.row}.yaml"), _summary(config, body))
    if not isinstance(body, dict):
        raise ValueError(f"{label}: a config is a mapping of config keys to values, got {type(body).__name__}")
    tree: Tree = {}
    for base in _bases(body.pop(BASE, None), label):
        _merge(_read(_base(base, config, allow_remote), allow_unsafe, allow_remote, (*above, label)), tree, label)
    _merge(_unfold(body, label), tree, label)
    return tree


def _at(path: Path) -> ConfigFile | None:
    """The config at a path: a file, or a row of the table in its folder; None if there is none."""
    if path.is_file():
        return ConfigFile(path)
    table = path.with_name(TABLE)
    if path.suffix == ".yaml" and table.is_file() and path.stem in _table(table):
        return ConfigFile(table, path.stem)
    return None


def _table(path: Path, allow_unsafe: bool = False) -> Tree:
    """The rows of a table; cached, do not change them."""
    now = path.stat()
    return _parsed_table(path, now.st_mtime_ns, now.st_size, allow_unsafe)


@lru_cache(maxsize=32)
def _parsed_table(path: Path, modified: int, size: int, allow_unsafe: bool) -> Tree:
    rows = parse_yaml(path.read_bytes(), str(path), allow_unsafe)
    if not isinstance(rows, dict) or not all(isinstance(body, dict) for body in rows.values()):
        raise ValueError(f"{path}: a table of configs maps names to configs, 'name: {{{BASE}: ..., KEY: value}}'")
    return rows


def _summary(config: ConfigFile, body: Tree) -> str:
    parts = _bases(body.get(BASE), str(config)) + [f"{key} {value}" for key, value in body.items() if key != BASE]
    return f"row {config.row} of {config.path}: {', '.join(parts)}"


def _bases(value: Any, label: str) -> list[str]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{label}: {BASE} is {value!r}; expected the path of a config, or a list of them")
    return names


def _base(name: str, config: ConfigFile | str, allow_remote: bool) -> ConfigFile | str:
    """A base, relative to the config that names it."""
    address = urljoin(config, name) if isinstance(config, str) else name
    if "://" in address:
        if not allow_remote:
            raise ValueError(f"{config}: {BASE} {name} is on another machine; --allow-remote-config fetches it")
        return address
    path = Path(name).expanduser()
    assert isinstance(config, ConfigFile)
    found = _at(config.path.parent / path)
    if found is None:
        raise FileNotFoundError(f"{config}: its {BASE} {config.path.parent / path} does not exist")
    return found


def _fetch(address: str) -> str:
    # Imported here, because most runs fetch nothing.
    from detectron2.utils.file_io import PathManager

    logger.info("fetching config %s", address)
    with PathManager.open(address, "r") as stream:
        return stream.read()


def _unfold(body: Tree, label: str, prefix: str = "") -> Tree:
    """``{"A.B": 1}`` as ``{"A": {"B": 1}}``, at any depth."""
    tree: Tree = {}
    for key, value in body.items():
        branch: Any = _unfold(value, label, f"{prefix}{key}.") if isinstance(value, dict) else value
        for part in reversed(str(key).split(".")):
            branch = {part: branch}
        twice = dict(flat_keys(branch)).keys() & dict(flat_keys(tree)).keys()
        if twice:
            names = ", ".join(prefix + name for name in sorted(twice))
            raise ValueError(f"{label}: {names} is given twice, in a group and with dots")
        _merge(branch, tree, label)
    return tree


def _merge(new: Tree, into: Tree, label: str, prefix: str = "") -> None:
    for key, value in new.items():
        old = into.get(key)
        if key in into and isinstance(old, dict) != isinstance(value, dict):
            raise ValueError(f"{label}: {prefix}{key} is a group of keys in one place and a value in another")
        if isinstance(old, dict):
            _merge(value, old, label, f"{prefix}{key}.")
        else:
            into[key] = value


def flat_keys(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``KEY, value`` of every leaf."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
