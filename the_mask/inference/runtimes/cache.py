"""Cache of exported graphs on disk, so that later starts need not export again.

A graph is named by a digest of everything it depends on: the part's weights and source code, the layout of its
arguments and the versions of the exporting packages. The digest of each file's content is stored next to it; a changed
or truncated file is dropped and exported again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import the_mask
from the_mask.data.files import atomic_write, errors_named, file_digest, move_into_place, read_json, write_json
from the_mask.modeling.digest import weights_digest

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
    """Digest of a module's weights and buffers, its settings and the source files of its classes."""
    parts = [the_mask.__version__, torch.__version__, repr(module)]
    kinds = {type(child) for child in module.modules()}
    parts += sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    # Whole files: to look up the lines of a class takes a third of a second for a small network.
    files = {getattr(sys.modules.get(kind.__module__), "__file__", None) or "" for kind in kinds}
    parts += [Path(file).read_text(encoding="utf-8") for file in sorted(files) if file.endswith(".py")]
    saved = module.state_dict().keys()
    parts += [f"{name} {x.tolist()}" for name, x in module.named_buffers() if name not in saved]
    return weights_digest(module, text_digest(*parts))


def text_digest(*parts: Any) -> str:
    """Digest of the string forms of some values."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


class RuntimeCache:
    """A folder of graphs and of the runtimes chosen for them.

    Args:
        folder: created at the first write; None takes :func:`default_folder`.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = (Path(folder) if folder is not None else default_folder()) / "runtimes"

    def graph(self, digest: str, write: Callable[[Path], object]) -> Path:
        """The file of a graph; written by ``write(path)`` unless it is in the cache and intact."""
        path = self.folder / f"{digest}.onnx"
        seal = path.with_suffix(".sha256")
        if path.is_file() and seal.is_file():
            if seal.read_bytes().strip() == file_digest(path).encode():
                os.utime(path)
                return path
            _logger.warning("%s does not have the content it was written with: made anew", path)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            made = Path(temporary) / path.name
            with errors_named(path):
                write(made)
            # The graph is written last: a digest file without its graph is never read.
            atomic_write(seal, file_digest(made).encode())
            move_into_place(made, path)
        self._trim(path)
        return path

    def choice(self, digest: str) -> dict[str, Any] | None:
        """The choice stored by :meth:`keep_choice`, or None if there is none or it cannot be read."""
        path = self.folder / f"{digest}.json"
        if not path.is_file():
            return None
        try:
            return read_json(path)
        except ValueError as error:
            _logger.warning("%s: measured again", error)
            return None

    def keep_choice(self, digest: str, choice: dict[str, Any]) -> None:
        """Store which runtime was the fastest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{digest}.json", choice)

    def _trim(self, kept: Path) -> None:
        graphs = sorted(self.folder.glob("*.onnx"), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in graphs)
        for path in graphs:
            if total <= MOST_BYTES or path == kept:
                break
            total -= path.stat().st_size
            path.unlink(missing_ok=True)
            path.with_suffix(".sha256").unlink(missing_ok=True)
