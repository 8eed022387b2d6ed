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
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

import the_mask
from the_mask.data.files import atomic_write, errors_named, file_digest, move_into_place, read_json, write_json
from the_mask.data.schema import check_schema
from the_mask.data.whole_folder import partial_folder
from the_mask.export.package import WEIGHTS
from the_mask.modeling.digest import weights_digest

ENVIRONMENT = "THE_MASK_CACHE"
# Least recently used graphs are dropped above this.
MOST_BYTES = 4 << 30
# Endings of graphs: ONNX, and OpenVINO's own format.
GRAPHS = (".onnx", ".xml")
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

    Where it cannot be written (read-only, a full disk), graphs are made in a temporary folder, and nothing is kept.

    Args:
        folder: created at the first write; None takes :func:`default_folder`.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = (Path(folder) if folder is not None else default_folder()) / "runtimes"
        self._own: tempfile.TemporaryDirectory[str] | None = None

    def graph(self, digest: str, write: Callable[[Path], object], suffix: str = ".onnx") -> Path:
        """The file of a graph; written by ``write(path)`` unless it is in the cache and intact.

        Its weights may be in a second file, see :func:`weights_of`. ``suffix`` is one of :data:`GRAPHS`.

        Raises:
            OSError: it can be written neither to the cache nor to a temporary folder.
        """
        if self._own is None:
            try:
                return self._graph(self.folder / f"{digest}{suffix}", write)
            except OSError as error:
                _logger.warning("the cache cannot be written, graphs are made anew in each process: %s", error)
                self._own = tempfile.TemporaryDirectory(prefix="the_mask_")
        return self._graph(Path(self._own.name) / f"{digest}{suffix}", write)

    def _graph(self, path: Path, write: Callable[[Path], object]) -> Path:
        seal = path.with_suffix(".sha256")
        if path.is_file() and seal.is_file():
            if seal.read_bytes().strip() == _digests(path).encode():
                with suppress(OSError):  # a cache that can only be read
                    os.utime(path)
                return path
            _logger.warning("%s does not have the content it was written with: made anew", path)
        with partial_folder(path) as temporary:
            made = temporary / path.name
            with errors_named(path):
                write(made)
            # The graph is written last: a digest file without its graph is never read.
            atomic_write(seal, _digests(made).encode())
            if weights_of(made).is_file():
                move_into_place(weights_of(made), weights_of(path))
            else:
                weights_of(path).unlink(missing_ok=True)
            move_into_place(made, path)
        self._trim(path)
        return path

    def choice(self, digest: str) -> str | None:
        """The runtime stored by :meth:`keep_choice`, or None if there is none or it cannot be read."""
        path = self.folder / f"{digest}.json"
        if not path.is_file():
            return None
        try:
            content = read_json(path)
            check_schema(content, {"runtime": str}, f"{path} is no choice of a runtime")
        except (ValueError, OSError) as error:
            _logger.warning("%s: measured again", error)
            return None
        return str(content["runtime"])

    def keep_choice(self, digest: str, runtime: str, facts: dict[str, Any]) -> None:
        """Store which runtime was the fastest."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / f"{digest}.json", {"runtime": runtime, **facts})
        except OSError as error:
            _logger.warning("which runtime is the fastest is not kept: %s", error)

    def _trim(self, kept: Path) -> None:
        graphs = [path for path in kept.parent.iterdir() if path.suffix in GRAPHS]
        graphs.sort(key=lambda path: path.stat().st_mtime)
        files = {path: [file for file in (path, weights_of(path)) if file.is_file()] for path in graphs}
        total = sum(file.stat().st_size for several in files.values() for file in several)
        for path in graphs:
            if total <= MOST_BYTES or path == kept:
                break
            for file in files[path]:
                total -= file.stat().st_size
                file.unlink(missing_ok=True)
            path.with_suffix(".sha256").unlink(missing_ok=True)


def weights_of(path: Path) -> Path:
    """The file with a graph's weights, if they are not in the graph's own: in ONNX those of large ones."""
    return path.with_name(path.name + WEIGHTS)


def _digests(path: Path) -> str:
    """SHA-256 of a graph's files, a line each."""
    return "\n".join(file_digest(file) for file in (path, weights_of(path)) if file.is_file())
