"""Allows only one training, or one run over an archive, at a time in an output folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detectron2.utils import comm

logger = logging.getLogger(__name__)

LOCK = ".lock"
_held: dict[str, int] = {}


class OutputInUseError(ValueError):
    """Another process is writing to the folder."""


@contextmanager
def claimed(folder: str | Path, what: str = "training", otherwise: str = "set another OUTPUT_DIR") -> Iterator[None]:
    """Lock a folder against others inside the block; a collective call if there are several processes.

    The lock belongs to the process: the kernel releases it when the process ends for any reason, and child processes do
    not inherit it. A process that holds it may lock again.

    Args:
        folder: created if needed.
        what: kind of the other process, for the message.
        otherwise: advice for users who do not want to wait, for the message.

    Raises:
        OutputInUseError: another process holds it.
    """
    key = str(Path(folder).resolve())
    stream, problem = None, ""
    if comm.is_main_process():
        if not _held.get(key):
            stream, problem = _lock(Path(folder), what, otherwise)
        _held[key] = _held.get(key, 0) + 1
    try:
        problem = comm.all_gather(problem)[0]
        if problem:
            raise OutputInUseError(problem)
        yield
    finally:
        if comm.is_main_process():
            _held[key] -= 1
        if stream is not None:
            os.close(stream)


def _lock(folder: Path, what: str, otherwise: str) -> tuple[int | None, str]:
    """The open lock file, or an error message."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    stream = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(stream, 200).decode(errors="replace").strip() or "another process"
        os.close(stream)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return None, (f"{folder} is in use by another {what} ({owner}): wait for it, stop it, or {otherwise}")
        logger.warning("%s cannot be locked (%s): take care that no other %s writes into it", folder, error, what)
        return None, ""
    os.ftruncate(stream, 0)
    os.write(stream, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return stream, ""
