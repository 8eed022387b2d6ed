"""Files: atomic writes, names that stay inside their folder, and readers whose errors name the file."""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)
# Suffix of a file that is being written, by which leftovers of a killed process are found.
TEMPORARY = ".writing"
# Bytes of a name that others can be made of.
MOST_NAME = 200


def atomic_write(path: Path, content: bytes | Callable[[BinaryIO], object], durable: bool = True) -> None:
    """Create or replace a file atomically: at every moment the path holds the old content or the complete new one.

    The content goes to a temporary file in the same folder, is flushed to the disk and then renamed.

    Args:
        path: the file; its folder must exist. A symbolic link is replaced, not followed.
        content: bytes, or a function that writes to the open temporary file.
        durable: wait for the disk. False is for the many files of a folder that gets its name only when all are there,
            by :func:`the_mask.data.whole_folder.whole_folder`.

    Raises:
        OSError: writing failed; the error names the file.
    """
    with errors_named(path):
        descriptor = os.open(path.parent, _FOLDER)
        try:
            _write(descriptor, path, content, durable)
        finally:
            os.close(descriptor)


def write_inside(
    folder: str | Path, *names: str, content: bytes | Callable[[BinaryIO], object], durable: bool = True
) -> Path:
    """Write with :func:`atomic_write` below a folder, under a name that comes from a list, an archive or a program.

    Missing folders are created. No symbolic link below the folder is followed, not even one that replaces a folder
    during the call: each folder is opened relative to its open parent.

    Args:
        folder: may itself be a symbolic link.
        names: relative path below it, in parts or as one text.
        content, durable: as :func:`atomic_write`.

    Returns:
        The file.

    Raises:
        ValueError: the name is absolute, empty or has ``..``, or passes through a symbolic link.
        OSError: writing failed; the error names the file.
    """
    path = Path(folder, *(relative_name(name) for name in names))
    with errors_named(path):
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(folder, _FOLDER)
        try:
            for part in path.relative_to(folder).parts[:-1]:
                above, descriptor = descriptor, _folder_in(descriptor, part, path)
                os.close(above)
            _write(descriptor, path, content, durable)
        finally:
            os.close(descriptor)
    return path


_FOLDER = os.O_RDONLY | os.O_DIRECTORY if hasattr(os, "O_DIRECTORY") else os.O_RDONLY


def _folder_in(above: int, name: str, path: Path) -> int:
    """Open a sub-folder of an open folder, creating it if needed."""
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=above)
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=above)
    except OSError as error:
        if stat.S_ISLNK(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
            raise ValueError(f"{path} lies behind the symbolic link {name}, which is not written through") from error
        raise


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Add the file's name to errors raised while it is written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's archive writer reports a failure of its stream as RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        # Errors of an open file (such as a full disk) do not name it; others name it relative to an open folder.
        if cause.errno is not None and not (isinstance(cause.filename, str) and os.path.isabs(cause.filename)):
            raise type(cause)(cause.errno, cause.strerror, str(path)) from error
        raise cause from error


def _write(folder: int, path: Path, content: bytes | Callable[[BinaryIO], object], durable: bool) -> None:
    """Write the file ``path`` into its folder, which is open."""
    name = path.name
    if len(os.fsencode(name)) > MOST_NAME:
        # Together with what is added, it would be longer than names can be.
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    temporary = f".{name}.{os.getpid()}{TEMPORARY}"

    def remove() -> None:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)

    # It may be a leftover of a killed process with the same id, or another user's link: do not write through either.
    remove()
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o666, dir_fd=folder)) as stream:
            if callable(content):
                content(stream)
            else:
                stream.write(content)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        remove()
    if durable:
        # The rename is durable only after the folder has been flushed.
        os.fsync(folder)


def move_into_place(made: Path, path: Path) -> None:
    """Flush a finished file to the disk and rename it to its final path, replacing an older file.

    For files that a library can only write to a path; use :func:`atomic_write` for everything else.

    Args:
        made: the file, on the same disk.
        path: its final path.

    Raises:
        OSError: writing failed; the error names the file.
    """
    with errors_named(path):
        sync_file(made)
        os.replace(made, path)
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Flush a closed file to the disk.

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


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, which makes renames in it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, below: bool = False) -> None:
    """Delete the temporary files of a folder, and of the folders ``below``, that a killed process has left behind.

    Only for folders that one process writes at a time.
    """
    for path in [*(folder.rglob if below else folder.glob)(f".*{TEMPORARY}")]:
        logger.info("removing %s, left by an interrupted write", path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_writable(path: Path, *others: Path) -> None:
    """Check that a file can be written at a path, without writing it.

    Args:
        path: the file; missing folders would be created.
        others: further files that will be written.

    Raises:
        ValueError: it is a folder, its parent is not a folder, the name is too long, or access is denied.
    """
    for name in (path, *others):
        try:
            if name.is_dir():
                raise ValueError(f"output {path} is a folder; name a file in it")
            os.stat(name)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ValueError(f"output {path} cannot be written: {error.strerror}") from error
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"output {path} cannot be written: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"output {path} cannot be written: access to {folder} is denied")


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


def parse_json(text: str, source: str = "JSON") -> Any:
    """Parse JSON text. All JSON from outside is read with this function.

    Args:
        text: the text.
        source: name of its file, for errors.

    Raises:
        ValueError: not JSON, nested too deeply, or a number with more digits than Python converts.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{source} is nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error


def parse_count(text: str, most: int = 2**31 - 1) -> int | None:
    """A whole number 0..most in decimal digits; None for anything else."""
    # Python refuses to convert thousands of digits.
    value = int(text) if text.isdecimal() and len(text) < 100 else most + 1
    return value if value <= most else None


def read_json(path: Path, what: str = "file") -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not an object; the message names the file.
    """
    content = parse_json(read_text(path, what), f"{what} {path}")
    if not isinstance(content, dict):
        raise ValueError(f"{what} {path} holds {type(content).__name__}, expected an object {{...}}")
    return content


def _is_possible(path: PurePath) -> bool:
    """Whether a path can exist: its characters, its length and that of its parts (ext4, APFS, NTFS)."""
    try:
        # Bytes that are not UTF-8 are surrogates in Python, which lists, JSON and HTML cannot hold.
        parts = [part.encode() for part in path.parts]
    except UnicodeEncodeError:
        return False
    return sum(map(len, parts)) < 3000 and all(len(part) < 250 and b"\0" not in part for part in parts)


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
    if not path.parts or not _is_possible(path):
        raise ValueError(
            f"{what} {text[:300]!r} names no file or folder; expected UTF-8, at most 250 bytes between two '/'"
        )
    return path.as_posix()


def inside(folder: str | Path, *names: str, where: str = "") -> Path:
    """The path of a name inside a folder, for reading; use :func:`write_inside` to write.

    Args:
        folder: may itself be a symbolic link.
        names: relative path below it, in parts or as one text; the last part may be a file that does not exist yet.
        where: start of the error message: the file that the names come from.

    Raises:
        ValueError: the name is absolute, empty or has ``..``, or a symbolic link in the folder leads out of it.
    """
    path = Path(folder, *(relative_name(name, f"{where}: name" if where else "name") for name in names))
    if not path.resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError(f"{path} is, or lies behind, a symbolic link that leads out of {folder}: remove the link")
    return path
