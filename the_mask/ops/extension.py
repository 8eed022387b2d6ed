"""Loads the compiled extension ``the_mask/ops/_C*.so``; a failure never prevents the import of this module.

The library has no Python binding: it registers operators in the private namespace ``the_mask_kernels``.
"""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

_FOLDER = Path(__file__).resolve().parent
# Compiled into the library (csrc/bindings.cpp) and read before loading it, because a library that was built for another
# torch may crash the process instead of failing to load.
_STAMP = re.compile(rb"THE_MASK_BUILT_FOR torch=([^;]+);cuda=([^;]*);")
_REBUILD = "rebuild it with `python setup.py build_ext --inplace` or `pip install --no-build-isolation -e .`"


class Extension(NamedTuple):
    """State of the compiled extension: ``problem`` is None if it is loaded."""

    path: Path | None
    problem: str | None
    with_cuda: bool = False


def _find() -> Path | None:
    # Another build, such as one with sanitizers (tests/ops/test_sanitizers.py).
    if os.environ.get("THE_MASK_OPS_LIBRARY"):
        return Path(os.environ["THE_MASK_OPS_LIBRARY"])
    found = sorted(_FOLDER.glob("_C*.so")) + sorted(_FOLDER.glob("_C*.pyd")) + sorted(_FOLDER.glob("_C*.dylib"))
    return found[0] if found else None


def read_stamp(path: Path) -> tuple[str, str] | None:
    """(torch version, CUDA version or "") for which the library at ``path`` was built; None without a stamp."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        match = _STAMP.search(content)
        return (match[1].decode(), match[2].decode()) if match else None


def _load(path: Path | None) -> Extension:
    if path is None:
        return Extension(None, "the extension is not built (THE_MASK_BUILD=off, or no compiler at install time)")
    try:
        stamp = read_stamp(path)
        here = torch.__version__.split("+")[0]
        if stamp is None:
            return Extension(path, f"{path.name} is not a library of this project or is damaged; {_REBUILD}")
        if stamp[0] != here:
            return Extension(path, f"{path.name} was built for torch {stamp[0]} and this is torch {here}; {_REBUILD}")
        torch.ops.load_library(str(path))
    except (OSError, ValueError, RuntimeError) as error:
        return Extension(path, f"{path.name} cannot be loaded ({error}); {_REBUILD}")
    return Extension(path, None, torch.ops.the_mask_kernels.built_with_cuda())


# Loaded once at import, so that tracers see plain data instead of the loading.
LOADED = _load(_find())


# Operators that libraries of earlier versions do not have.
_RECENT = frozenset({"upsample_argmax"} if LOADED.problem is None else ())
_LACKING = frozenset(name for name in _RECENT if not hasattr(torch.ops.the_mask_kernels, name))


def missing_for(device_type: str, operator: str | None = None) -> str | None:
    """Why there is no kernel for ``device_type`` (and ``operator``, if given), or None if there is one."""
    if LOADED.problem is not None:
        return LOADED.problem
    if operator in _LACKING:
        return f"the extension is older than the operator {operator}; {_REBUILD}"
    if device_type == "cpu" or (device_type == "cuda" and LOADED.with_cuda):
        return None
    if device_type == "cuda":
        return f"the extension was built without CUDA; {_REBUILD} (THE_MASK_BUILD=cuda)"
    return f"there are no kernels for {device_type}"


def describe() -> str:
    """One line about the extension: what it is, or why it is not loaded."""
    if LOADED.problem is not None:
        return LOADED.problem
    assert LOADED.path is not None
    cuda = "with CUDA" if LOADED.with_cuda else "CPU only"
    return f"{LOADED.path.name}, {cuda}, CPU code for {torch.ops.the_mask_kernels.cpu_capability()}"
