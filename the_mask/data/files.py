"""Files: atomic writes, names that stay inside their folder, and readers whose errors name the file."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, BinaryIO

# Suffix of a file that is being written, by which leftovers of a killed process are found.
TEMPORARY = ".writing"


def atomic_write(path: Path, content: bytes | Callable[[BinaryIO], object], durable: bool = True) -> None:
    """Create or replace a file atomically: at every moment the path holds the old content or the complete new one.

    The content goes to a temporary file in the same folder, is flushed to the disk and then renamed.

    Args:
        path: the file; its folder must exist. A symbolic link is replaced, not followed.
        content: bytes, or a function that writes to the open temporary file.
        durable: wait for the disk. False is for the many files of a folder that gets its name only when all are there,
            by :func:`whole_folder`.

    Raises:
        OSError: writing failed; the error names the file.
    """
    try:
        _write_atomically(path, content, durable)
    except (OSError, RuntimeError) as error:
        # torch's archive writer reports a failure of its stream as RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        # Errors of an open file (such as a full disk) do not name it.
        if cause.errno is not None and cause.filename is None:
            raise type(cause)(cause.errno, cause.strerror, str(path)) from error
        raise cause from error


def _write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object], durable: bool) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    # It may be a leftover of a killed process with the same id, or another user's link: do not write through either.
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as stream:
            if callable(content):
                content(stream)
            else:
                stream.write(content)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that is made elsewhere and appears when everything in it is there; an older one is replaced.

    Yields:
        where to write meanwhile, next to the folder. After an error nothing of it is left, and an older folder is as it
        was.
    """
    # Not with_name: the folder may be ".", or end with "..".
    target = folder.resolve()
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        # Once for all files, which :func:`atomic_write` need not do for each of them.
        os.sync()
        old = target.with_name(f"{target.name}.old-{os.getpid()}")
        if target.exists():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Put the content of a closed file on the disk.

    Raises:
        OSError: names the file, whatever has failed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON with :func:`atomic_write`."""
    atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())


def read_text(path: Path, what: str = "file") -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another encoding; the message names file, encoding and line.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what} {path} does not exist") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise ValueError(f"{what} {path} is not UTF-8 text, it looks like UTF-16: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{what} {path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x}), it looks like cp1252 or "
            "Latin-1: save it as UTF-8"
        ) from error


def read_lines(path: Path, what: str = "file") -> list[str]:
    """Read the non-empty lines of a text file, stripped; raises as :func:`read_text`."""
    return [line.strip() for line in re.split(r"[\r\n]+", read_text(path, what)) if line.strip()]


def read_json(path: Path, what: str = "file") -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not an object; the message names the file.
    """
    try:
        content = json.loads(read_text(path, what))
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} {path} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{what} {path} is nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} {path} holds {type(content).__name__}, expected an object {{...}}")
    return content


def sync_folder(folder: Path) -> None:
    """Put a folder's list of names on the disk: a rename in it is durable only then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def relative_name(text: str, what: str = "name") -> str:
    """Normalise a relative path: ``./cam1//v/`` becomes ``cam1/v``. Used as the id of a video.

    Args:
        text: the path, its parts separated by ``/``.
        what: name for the error.

    Raises:
        ValueError: the path is absolute, contains ``..``, contains a character that file names cannot have, or is
            empty.
    """
    path = PurePath(text)
    if path.anchor:
        raise ValueError(f"{what} {text!r} is an absolute path; expected one relative to its folder")
    if ".." in path.parts:
        raise ValueError(f"{what} {text!r} leads out of its folder by '..'")
    if not path.parts or "\0" in text:
        raise ValueError(f"{what} {text!r} names no file or folder")
    return path.as_posix()


def inside(folder: str | Path, *names: str) -> Path:
    """The path of a name inside a folder. Use it for every name that comes from a list, an archive or another program.

    Args:
        folder: may itself be a symbolic link.
        names: relative path below it, in parts or as one text; the last part may be a file that does not exist yet.

    Raises:
        ValueError: the name is absolute, empty or has ``..``, or a symbolic link in the folder leads out of it.
    """
    path = Path(folder, *(relative_name(name) for name in names))
    if not path.resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError(f"{path} is, or lies behind, a symbolic link that leads out of {folder}: remove the link")
    return path
