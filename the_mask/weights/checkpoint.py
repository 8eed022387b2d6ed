"""Training checkpoints on disk: written atomically, read without executing anything, pruned by an explicit list.

A checkpoint is one ``torch.save`` file of tensors and builtins. A write goes to a temporary file in the same folder,
is flushed to the disk and then renamed, so that a kill, a power cut or a full disk at any moment leaves the last good
file as it was.
"""

from __future__ import annotations

import logging
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from the_mask.data.files import TEMPORARY, atomic_write

logger = logging.getLogger(__name__)

FINAL = "model_final.pth"
BEST = "model_best.pth"
POINTER = "last_checkpoint"
# Key of a checkpoint whose sharded tensors stand in files of their own, one per process.
PARTS = "parts_elsewhere"


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed process left behind."""
    for path in folder.glob(f".*{TEMPORARY}"):
        logger.info("removing %s, left by an interrupted write", path)
        path.unlink(missing_ok=True)


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file.
        state: tensors and builtins only, so that it can be read back with ``weights_only``.

    Raises:
        CheckpointWriteError: the disk is full, the folder is gone or not writable, ...
    """
    path = Path(path)
    try:
        atomic_write(path, lambda stream: torch.save(state, stream))
    except (OSError, RuntimeError) as error:
        # torch's zip writer reports some failures of the stream below it as RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        free = f", {shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free" if path.parent.is_dir() else ""
        raise CheckpointWriteError(
            f"cannot write checkpoint {path} ({cause}{free}). Earlier checkpoints are untouched; make room or set "
            "OUTPUT_DIR elsewhere, then continue with --resume"
        ) from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project to the CPU, executing nothing and checking every stored checksum.

    Raises:
        FileNotFoundError: no such file.
        ValueError: corrupt, truncated, or not a checkpoint of this project; the message names the next best file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist{_advice(path)}")
    problem = zip_problem(path)
    if problem is None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
            problem = str(error).splitlines()[0]
        else:
            if isinstance(state, dict) and "model" in state:
                return join_parts(path, state)
            problem = "it holds no 'model'"
    raise ValueError(f"checkpoint {path} cannot be read: {problem}{_advice(path)}")


def part_path(path: Path, rank: int, count: int) -> Path:
    """Where process ``rank`` of ``count`` keeps its parts of the sharded tensors of checkpoint ``path``."""
    return path.with_name(f"{path.name}.part{rank}of{count}")


def join_parts(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Put the parts of a sharded checkpoint into their places; other checkpoints stay as they are.

    Raises:
        ValueError: a part is missing or damaged.
    """
    index = state.pop(PARTS, None)
    if index is None:
        return state
    files = [part_path(path, rank, index["count"]) for rank in range(index["count"])]
    pieces = []
    for file in files:
        problem = zip_problem(file) if file.is_file() else "it is missing"
        if problem:
            raise ValueError(f"checkpoint {path} was written by {len(files)} processes; its part {file}: {problem}")
        pieces.append(torch.load(file, map_location="cpu", weights_only=True)["parts"])
    for place in index["paths"]:
        *parents, leaf = place.split("/")[1:]
        node = state
        for name in parents:
            node = node[name]
        node[leaf] = torch.cat([piece[place] for piece in pieces])
    return state


def zip_problem(path: Path) -> str | None:
    """What is wrong with a zip archive (the format of ``torch.save``), or ``None``. torch itself checks no checksum."""
    if not zipfile.is_zipfile(path):
        return f"truncated or not a checkpoint ({path.stat().st_size} bytes)"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        return f"damaged archive ({error})"
    return f"damaged content ({damaged} fails its checksum)" if damaged else None


def usable_checkpoints(folder: Path) -> list[Path]:
    """Undamaged checkpoints of a folder, newest first."""
    files = sorted(folder.glob("model_*.pth"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path for path in files if zip_problem(path) is None]


def _advice(path: Path) -> str:
    others = [other.name for other in usable_checkpoints(path.parent) if other != path] if path.parent.is_dir() else []
    if not others:
        return ". No other checkpoint was found in its folder"
    return (
        f". Next best in {path.parent}: {others[0]}"
        + (f" (also {', '.join(others[1:4])})" if others[1:] else "")
        + f"; write its name into {path.parent / POINTER} and use --resume, or give it as MODEL.WEIGHTS"
    )


class CheckpointFolder:
    """The checkpoints of one run: numbered ones, the final one, the best one, and a pointer to the last.

    Only numbered files of this run (``self.numbered``) are ever deleted, never files found in the folder.
    """

    def __init__(self, folder: str | Path, keep: int = 0) -> None:
        """
        Args:
            folder: created when missing, together with its parents.
            keep: numbered checkpoints to keep; 0 keeps all.
        """
        self.folder = Path(folder)
        self.keep = keep
        self.numbered: list[str] = []

    def last(self) -> Path | None:
        """The checkpoint that ``last_checkpoint`` names, or ``None`` when the folder has no such file."""
        pointer = self.folder / POINTER
        if not pointer.is_file():
            return None
        name = pointer.read_text(encoding="utf-8").strip()
        return self.folder / name if name else None

    @staticmethod
    def numbered_name(iteration: int) -> str:
        """File name of the checkpoint of an iteration."""
        return f"model_{iteration:07d}.pth"

    def save_numbered(self, iteration: int, state: dict[str, Any]) -> Path:
        """Write ``model_<iteration>.pth`` and delete the oldest numbered ones beyond ``keep``."""
        name = self.numbered_name(iteration)
        names = [other for other in self.numbered if other != name] + [name]
        kept, old = (names[-self.keep :], names[: -self.keep]) if self.keep > 0 else (names, [])
        path = self._save(name, {**state, "numbered": kept})
        self.numbered = kept
        for other in old:
            (self.folder / other).unlink(missing_ok=True)
            for part in self.folder.glob(f"{other}.part*"):
                part.unlink()
        return path

    def save_final(self, state: dict[str, Any]) -> Path:
        """Write ``model_final.pth``."""
        return self._save(FINAL, {**state, "numbered": self.numbered})

    def save_best(self, state: dict[str, Any]) -> Path:
        """Write ``model_best.pth``; ``--resume`` never continues from it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self.folder / BEST, state)
        return self.folder / BEST

    def _save(self, name: str, state: dict[str, Any]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        save_checkpoint(path, state)
        atomic_write(self.folder / POINTER, name.encode())
        return path
