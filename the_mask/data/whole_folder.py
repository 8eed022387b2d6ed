"""Folders that appear only when they are complete, whatever happens to the process that makes them."""

from __future__ import annotations

import fcntl
import glob
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from the_mask.data.files import sync_folder

logger = logging.getLogger(__name__)
# Kinds of folders next to the target, followed by the id of the process that makes it.
PARTIAL, OLD = "partial", "old"
_LEFT = re.compile(rf"\.({PARTIAL}|{OLD})-(\d{{1,18}})(-\d+)?")
_numbers = itertools.count(1)


class FolderInUseError(ValueError):
    """Another process, or another part of this one, is writing to the folder."""


def require_new(folder: Path) -> None:
    """Raise unless a folder can be made: there is none, or an empty one, which can be replaced.

    Raises:
        FileExistsError: it is a file, not empty, or a mount point, which cannot be renamed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already and not empty: name a new folder")
    if os.path.ismount(folder):
        raise FileExistsError(f"{folder} is a mount point: name a new folder in it")


@contextmanager
def whole_folder(folder: Path, new: bool = False) -> Iterator[Path]:
    """Make a folder under a temporary name; it gets its name, and replaces an older one, when it is complete.

    What killed processes have left of earlier attempts is removed first. If one was killed while it replaced an older
    folder, that gets its name back.

    Args:
        folder: what will be there.
        new: it must not replace anything (:func:`require_new`), also nothing that another process makes meanwhile.

    Yields:
        where to write meanwhile, next to the folder. After an error nothing of it is left, and an older folder is as it
        was.

    Raises:
        FileExistsError: this process is making the folder already; or, if it has to be new, another one is.
    """
    # Not with_name: the folder may be ".", or end with "..".
    target = folder.resolve()
    if new:
        require_new(target)
        _refuse_others(target)
    old = target.with_name(f"{target.name}.{OLD}-{os.getpid()}")
    with partial_folder(target, f"{os.getpid()}") as partial:
        yield partial
        # Once for all files, which atomic_write need not do for each of them.
        os.sync()
        if new:
            require_new(target)
        try:
            if target.exists():
                target.rename(old)
            partial.rename(target)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
        sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def partial_folder(target: Path, owner: str = "") -> Iterator[Path]:
    """A folder next to a target, for what becomes the target; it is removed afterwards.

    What killed processes have left next to the target is removed first.

    Args:
        target: a file or folder.
        owner: end of the name; by default another one for each call of a process.
    """
    partial = target.with_name(f"{target.name}.{PARTIAL}-{owner or f'{os.getpid()}-{next(_numbers)}'}")
    if target.parent.is_dir():
        _clear(target)
    partial.mkdir(parents=True)
    # Locked until the end: a process in another container may have the same id.
    lock = _lock(partial)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _refuse_others(target: Path) -> None:
    for path in target.parent.glob(f"{glob.escape(target.name)}.{PARTIAL}-*") if target.parent.is_dir() else ():
        if _LEFT.fullmatch(path.name.removeprefix(target.name)) and path.is_dir() and not path.is_symlink():
            lock = _lock(path)
            if lock is None:
                raise FileExistsError(f"{target} is being made by another process (in {path.name}): name a new folder")
            os.close(lock)


def _clear(target: Path) -> None:
    """Remove what was left next to a target by processes that are gone.

    Touched are only real folders, not symbolic links, named after the target and a process that neither runs on this
    machine nor holds the folder.
    """
    for path in sorted(target.parent.iterdir()):
        found = _LEFT.fullmatch(path.name.removeprefix(target.name)) if path.name.startswith(target.name) else None
        if found is None or path.is_symlink() or not path.is_dir() or _runs(int(found[2])):
            continue
        lock = _lock(path)
        if lock is None:
            continue
        try:
            if found[1] == OLD and not target.exists():
                logger.warning("%s is back: a process was killed while it replaced it", target)
                path.rename(target)
            else:
                logger.info("removing %s, left by a killed process", path)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _runs(process: int) -> bool:
    """Whether another process of this id runs on this machine."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def lock_folder(folder: Path) -> int | None:
    """Open a folder and lock it until the descriptor is closed or the process ends; None where locks do not work.

    Raises:
        FolderInUseError: it is locked already. OSError: no such folder, or a symbolic link.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise FolderInUseError(f"{folder} is being written by another process: name another folder") from error
    except OSError as error:
        os.close(descriptor)
        logger.warning("%s cannot be locked (%s): take care that nothing else writes there", folder, error)
        return None
    return descriptor


def _lock(folder: Path) -> int | None:
    """Like :func:`lock_folder`, but None for whatever prevents it."""
    try:
        return lock_folder(folder)
    except (FolderInUseError, OSError):
        return None
