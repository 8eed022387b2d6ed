"""Training checkpoints on disk: written atomically, read without executing code, deleted only by an explicit list.

A checkpoint is one ``torch.save`` file of tensors and builtins. A write goes to a temporary file in the same folder,
is flushed to the disk and then renamed, so that after a kill, a power cut or a full disk the last good
file is intact. Nothing in a checkpoint is used as a path.
"""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from the_mask.data.files import atomic_write, inside
from the_mask.data.pickle_names import UnreadableError, UnsafePickleError
from the_mask.data.tensor_files import load_torch, zip_problem

logger = logging.getLogger(__name__)

FINAL = "model_final.pth"
BEST = "model_best.pth"
POINTER = "last_checkpoint"
# Key of a checkpoint whose sharded tensors are in separate files, one per process.
PARTS = "parts_elsewhere"
# The only files that are ever deleted to limit the number of checkpoints, and their parts.
NUMBERED = re.compile(r"model_\d{7,}\.pth")
MAX_PARTS = 65536


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file.
        state: tensors and builtins only, so that it can be read back with ``weights_only``.

    Raises:
        CheckpointWriteError: the disk is full, the folder is gone or not writable, ...
    """
    path = Path(path)
    with _as_write_error(path):
        atomic_write(path, lambda stream: torch.save(state, stream))


@contextmanager
def _as_write_error(path: Path) -> Iterator[None]:
    """Turn errors while writing a checkpoint into a :class:`CheckpointWriteError` that says what to do."""
    try:
        yield
    except CheckpointWriteError:
        raise
    except (OSError, RuntimeError) as error:
        # torch's zip writer reports some failures of its stream as RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        free = f", {shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free" if path.parent.is_dir() else ""
        raise CheckpointWriteError(
            f"cannot write checkpoint {path} ({cause}{free}). Earlier checkpoints are untouched; make room or set "
            "OUTPUT_DIR elsewhere, then continue with --resume"
        ) from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project onto the CPU, without executing code; verifies all stored checksums.

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
            state = load_torch(path)
        except UnsafePickleError as error:
            problem = f"it is a pickle with {error}"
        except UnreadableError as error:
            problem = str(error)
        else:
            if isinstance(state, dict) and isinstance(state.get("model"), dict):
                return join_parts(path, state)
            problem = "it holds no 'model'"
    raise ValueError(f"checkpoint {path} cannot be read: {problem}{_advice(path)}")


def part_path(path: Path, rank: int, count: int, token: str = "") -> Path:
    """File in which process ``rank`` of ``count`` stores its parts of the sharded tensors of checkpoint ``path``.

    Args:
        path, rank, count: see above.
        token: identifies one save, so that its parts never replace those of an earlier save; "" in old files.
    """
    return path.with_name(f"{path.name}{f'.{token}' if token else ''}.part{rank}of{count}")


def new_token() -> str:
    """A new token for the parts of one save; all processes must use the same one."""
    return uuid.uuid4().hex[:8]


def remove_parts(path: Path, token: str | None = None) -> None:
    """Delete the parts next to a checkpoint, except those of ``token``; None: delete all."""
    pattern = re.compile(re.escape(path.name) + r"(?:\.(?P<token>[0-9a-f]{8}))?\.part\d+of\d+")
    for other in path.parent.iterdir() if path.parent.is_dir() else ():
        found = pattern.fullmatch(other.name)
        if found and (token is None or (found["token"] or "") != token):
            _remove(other)


def _remove(path: Path) -> None:
    """Delete a file that is no longer needed; a failure is only logged, so that the training goes on."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)


def join_parts(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Join the parts of a sharded checkpoint; other checkpoints are returned unchanged.

    Raises:
        ValueError: a part is missing or damaged, or the checkpoint's list of parts is invalid.
    """
    index = state.pop(PARTS, None)
    if index is None:
        return state
    count, places, token = (
        (index.get(k) for k in ("count", "paths", "token")) if isinstance(index, dict) else [None] * 3
    )
    if not isinstance(count, int) or not 1 <= count <= MAX_PARTS or not isinstance(places, list):
        raise ValueError(f"checkpoint {path}: its {PARTS} are {str(index)[:100]}, which makes no sense")
    if token is not None and not re.fullmatch(r"[0-9a-f]{8}", str(token)):
        raise ValueError(f"checkpoint {path}: the token of its parts is {str(token)[:100]!r}")
    pieces = []
    for rank in range(count):
        file = part_path(path, rank, count, token or "")
        problem = zip_problem(file) if file.is_file() else "it is missing"
        if problem is None:
            try:
                pieces.append(load_torch(file)["parts"])
                continue
            except (UnsafePickleError, UnreadableError, KeyError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"checkpoint {path} was written by {count} processes; its part {file}: {problem}")
    for place in places:
        try:
            *parents, leaf = place.split("/")[1:]
            node = state
            for name in parents:
                node = node[name]
            node[leaf] = torch.cat([piece[place] for piece in pieces])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"checkpoint {path}: its parts of {str(place)[:100]!r} do not fit together") from error
    return state


def newest_first(folder: Path) -> list[Path]:
    """All checkpoints of a folder, including damaged ones, newest first."""
    return sorted(folder.glob("model_*.pth"), key=lambda path: (path.stat().st_mtime, path.name), reverse=True)


def _advice(path: Path) -> str:
    others = [other.name for other in newest_first(path.parent) if other != path and zip_problem(other) is None]
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
            folder: created with its parents if needed.
            keep: numbered checkpoints to keep; 0 keeps all.
        """
        self.folder = Path(folder)
        self.keep = keep
        self.numbered: list[str] = []
        self._made = False

    def last(self) -> Path | None:
        """The checkpoint to resume from: the one that ``last_checkpoint`` names, else the newest usable one.

        Returns:
            None when the folder has no checkpoint of a training.

        Raises:
            ValueError: ``last_checkpoint`` does not name a file in the folder, or names none that is usable and every
                checkpoint is damaged.
        """
        pointer = self.folder / POINTER
        name = ""
        if pointer.is_file():
            try:
                name = pointer.read_text(encoding="utf-8").strip()
                named = inside(self.folder, name) if name else None
            except (UnicodeDecodeError, ValueError) as error:
                raise ValueError(
                    f"{pointer} does not name a checkpoint in its folder ({error}); write the name of one into it, or "
                    "remove it to take the newest"
                ) from error
            if named is not None and named.is_file():
                return named
        # The best checkpoint has no training state.
        there = [path for path in newest_first(self.folder) if path.name != BEST]
        usable = next((path for path in there if zip_problem(path) is None), None)
        if not there:
            if name:
                raise FileNotFoundError(
                    f"{pointer} names {name}, which does not exist, and there is no other checkpoint"
                )
            return None
        what = f"names {name}, which does not exist" if name else "is empty" if pointer.is_file() else "is missing"
        if usable is None:
            names = ", ".join(sorted(path.name for path in there)[:5])
            raise ValueError(f"{pointer} {what}, and all checkpoints in its folder are damaged: {names}")
        logger.warning("%s %s: taking %s, the newest usable checkpoint", pointer, what, usable.name)
        return usable

    def take_numbered(self, names: Any, source: Path) -> None:
        """Take over the list of this run's numbered checkpoints from one of its checkpoints.

        Raises:
            ValueError: the list contains anything but names of numbered checkpoints, since listed files are deleted
                later.
        """
        if not isinstance(names, list) or not all(isinstance(n, str) and NUMBERED.fullmatch(n) for n in names):
            raise ValueError(
                f"{source} lists files that are no numbered checkpoints, so it was not written by a training: "
                f"{str(names)[:200]}"
            )
        self.numbered = list(names)

    @staticmethod
    def numbered_name(iteration: int) -> str:
        """File name of the checkpoint of an iteration."""
        return f"model_{iteration:07d}.pth"

    def save_numbered(self, iteration: int, state: dict[str, Any]) -> Path:
        """Write ``model_<iteration>.pth`` and delete the oldest numbered ones beyond ``keep``."""
        name = self.numbered_name(iteration)
        with _as_write_error(self.folder / name):
            self.ensure()
        names = [other for other in self.numbered if other != name] + [name]
        kept, old = (names[-self.keep :], names[: -self.keep]) if self.keep > 0 else (names, [])
        path = self._save(name, {**state, "numbered": kept})
        self.numbered = kept
        for other in old:
            _remove(self.folder / other)
            remove_parts(self.folder / other)
        return path

    def save_final(self, state: dict[str, Any]) -> Path:
        """Write ``model_final.pth``."""
        with _as_write_error(self.folder / FINAL):
            self.ensure()
        return self._save(FINAL, {**state, "numbered": self.numbered})

    def save_best(self, state: dict[str, Any]) -> Path:
        """Write ``model_best.pth``; ``--resume`` never continues from it."""
        with _as_write_error(self.folder / BEST):
            self.ensure()
        return self._write(BEST, state)

    def ensure(self) -> None:
        """Create the folder. If it was deleted during the run, log that its checkpoints are lost."""
        lost = self.numbered and not any((self.folder / name).is_file() for name in self.numbered)
        if lost or (self._made and not self.folder.is_dir()):
            logger.warning("%s was emptied or deleted during the run: what was in it is lost", self.folder)
            self.numbered = []
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made = True

    def _write(self, name: str, state: dict[str, Any]) -> Path:
        path = self.folder / name
        save_checkpoint(path, state)
        remove_parts(path, state[PARTS]["token"] if PARTS in state else None)
        return path

    def _save(self, name: str, state: dict[str, Any]) -> Path:
        path = self._write(name, state)
        with _as_write_error(self.folder / POINTER):
            atomic_write(self.folder / POINTER, name.encode())
        return path
