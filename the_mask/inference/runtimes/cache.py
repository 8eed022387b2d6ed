"""Exported graphs kept on disk, so that a second start need not export again.

A graph is named by a digest of all it depends on: the part's weights and source code, the layout of its arguments and
the versions of what exported it. Beside each file stands the digest of its content; a file that was changed or cut is
dropped and made anew.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import the_mask

ENVIRONMENT = "THE_MASK_CACHE"
# Least recently used graphs are dropped above this.
MOST_BYTES = 4 << 30
_logger = logging.getLogger("the_mask.runtimes")


def default_folder() -> Path:
    """``$THE_MASK_CACHE``, else ``the_mask`` in the user's cache folder."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "the_mask"


def module_digest(module: nn.Module) -> str:
    """Digest of a module's tensors and of the source code of its classes."""
    digest = hashlib.sha256(f"{the_mask.__version__} {torch.__version__}".encode())
    digest.update(repr(module).encode())
    for kind in sorted({type(child) for child in module.modules()}, key=lambda kind: kind.__qualname__):
        try:
            digest.update(inspect.getsource(kind).encode())
        except (OSError, TypeError):  # a class made at run time has no source
            digest.update(kind.__qualname__.encode())
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def text_digest(*parts: Any) -> str:
    """Digest of the texts of some values."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


class RuntimeCache:
    """A folder of graphs and of what was chosen for them.

    Args:
        folder: made when first written to; None takes :func:`default_folder`.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = (Path(folder) if folder is not None else default_folder()) / "runtimes"

    def graph(self, digest: str, write: Callable[[Path], object]) -> Path:
        """The file of a graph, written by ``write(path)`` unless it is there already and whole."""
        path = self.folder / f"{digest}.onnx"
        seal = path.with_suffix(".sha256")
        if path.is_file() and seal.is_file():
            if seal.read_text().strip() == _file_digest(path):
                os.utime(path)
                return path
            _logger.warning("%s does not have the content it was written with: made anew", path)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            made = Path(temporary) / path.name
            write(made)
            (made.with_suffix(".sha256")).write_text(_file_digest(made))
            # The graph last: a seal without its graph is never read.
            os.replace(made.with_suffix(".sha256"), seal)
            os.replace(made, path)
        self._trim(path)
        return path

    def choice(self, digest: str) -> dict[str, Any] | None:
        """What :meth:`keep_choice` kept, if it can be read."""
        path = self.folder / f"{digest}.json"
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _logger.warning("%s cannot be read (%s): measured anew", path, error)
            return None
        return content if isinstance(content, dict) else None

    def keep_choice(self, digest: str, choice: dict[str, Any]) -> None:
        """Keep which runtime was the fastest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{digest}.json"
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(choice, indent=1))
        os.replace(partial, path)

    def _trim(self, kept: Path) -> None:
        graphs = sorted(self.folder.glob("*.onnx"), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in graphs)
        for path in graphs:
            if total <= MOST_BYTES or path == kept:
                break
            total -= path.stat().st_size
            path.unlink(missing_ok=True)
            path.with_suffix(".sha256").unlink(missing_ok=True)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
