"""Chooses the implementation of an operator.

Paths, best first: ``compiled`` (csrc, CPU and CUDA), ``portable`` (PyTorch, built on ``grid_sample``), ``reference``
(explicit gathers of the corners in float64). ``auto`` takes the compiled path if there is a kernel for the device, else
the portable one. ``THE_MASK_OPS=auto|reference|portable|compiled`` forces a path for the process, :func:`use` for a
block of code. After an error inside a path, no other path is tried.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from the_mask.ops import extension

MODES = ("auto", "reference", "portable", "compiled")
OPERATORS = ("ms_deform_attn", "dcnv3", "upsample_argmax")
_ENVIRONMENT = "THE_MASK_OPS"
_logger = logging.getLogger("the_mask.ops")


class Choice(NamedTuple):
    """A path and the reason for it."""

    path: str
    reason: str


def _check_mode(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source}={mode!r}: expected one of {', '.join(MODES)}")
    return mode


_mode = _check_mode(os.environ.get(_ENVIRONMENT) or "auto", _ENVIRONMENT)
_noticed = False


@contextlib.contextmanager
def use(mode: str) -> Iterator[None]:
    """Force a path inside a ``with`` block (all threads of the process), as ``THE_MASK_OPS`` does for a whole run.

    Raises:
        ValueError: unknown mode.
    """
    global _mode
    previous, _mode = _mode, _check_mode(mode, "mode")
    try:
        yield
    finally:
        _mode = previous


def decomposed() -> contextlib.AbstractContextManager[None]:
    """Run the deformable operators as standard operators (``grid_sample``) inside the block, for exporters.

    ``torch.export.export``, ``torch.onnx.export``, ``torch.func`` transforms and double backward work inside; values
    equal those of the kernels.
    """
    return use("portable")


def wants_standard() -> bool:
    """Whether operators run as standard PyTorch operators now, whatever there is."""
    return _mode in ("reference", "portable")


def choose(device: torch.device, operator: str | None = None) -> Choice:
    """The path that is currently used for tensors on ``device``.

    Args:
        device: device of the tensors.
        operator: the operator, if some extensions that can be loaded do not have it.

    Raises:
        RuntimeError: the compiled path is forced, but there is none.
    """
    choice = _choice(device, operator)
    if choice.path == "portable" and not wants_standard():
        _notice(choice.reason)
    return choice


def _choice(device: torch.device, operator: str | None) -> Choice:
    if wants_standard():
        return Choice(_mode, f"{_ENVIRONMENT} or use() asks for it")
    if device.type == "meta":
        return Choice("compiled", "the meta device needs shapes only")
    missing = extension.missing_for(device.type, operator)
    if missing is None:
        return Choice("compiled", f"the extension has {device.type} kernels")
    if _mode == "compiled":
        raise RuntimeError(f"{_ENVIRONMENT}=compiled, but there is no compiled path for {device.type}: {missing}")
    return Choice("portable", missing)


def _notice(missing: str) -> None:
    global _noticed
    if not _noticed and not torch.compiler.is_compiling():
        _noticed = True
        _logger.warning("the_mask.ops runs on the portable PyTorch path: %s", missing)


def explain() -> str:
    """The path for each kind of device of this machine and the reason, as text, one line per device."""
    lines = [f"the_mask.ops: mode {_mode}; extension: {extension.describe()}"]
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for name in devices:
        found: dict[str, list[str]] = {}
        for operator in OPERATORS:
            try:
                choice = _choice(torch.device(name), operator)
                # The first line says why the extension is not loaded.
                reason = "" if choice.reason == extension.LOADED.problem else f" ({choice.reason})"
                found.setdefault(f"{choice.path}{reason}", []).append(operator)
            except RuntimeError as error:
                found.setdefault(f"error: {error}", []).append(operator)
        lines += [f"  {', '.join(operators)} on {name}: {text}" for text, operators in found.items()]
    if "cuda" not in devices:
        lines.append("  cuda: no device here")
    return "\n".join(lines)
