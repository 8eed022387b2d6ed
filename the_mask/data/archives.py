"""Zip archives from outside: limits are checked before unpacking, and all damage raises ``ValueError``."""

from __future__ import annotations

import errno
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Limit of the number of members: a data set has one per picture.
MOST_MEMBERS = 1_000_000
# Errors of zipfile and its decompressors for damaged archives.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, NotImplementedError, RuntimeError, LookupError, OverflowError),
)
# Sizes in bytes: the smallest entry of the central directory, the end record, its 64-bit form, and its locator.
_ENTRY, _END, _END64, _LOCATOR = 46, 22, 56, 20


@contextmanager
def opened_zip(
    path: Path, expansion: int, beyond: int = 1 << 20, most_members: int = MOST_MEMBERS
) -> Iterator[zipfile.ZipFile]:
    """Open an archive. Errors of reading it inside the block become ``ValueError``, too.

    Args:
        path: the file.
        expansion: limit of the unpacked size, as a multiple of the archive's size.
        beyond: bytes allowed beyond that.
        most_members: limit of the number of members.

    Raises:
        ValueError: not an archive, damaged, or above a limit. The message does not name the file.
    """
    try:
        size = path.stat().st_size
        members = _directory_size(path, size) // _ENTRY
        if members > most_members:
            raise ValueError(f"an archive with room for {members} members, of which at most {most_members} are read")
        with zipfile.ZipFile(path) as archive:
            content = sum(info.file_size for info in archive.infolist())
            if content > expansion * size + beyond:
                raise ValueError(f"an archive of {size} bytes that claims to hold {content}")
            yield archive
    except OSError as error:
        # Jumps to places that no file has; everything else is no fault of the archive.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise ValueError(f"a damaged zip archive: {error}") from error
    except _DAMAGE as error:
        raise ValueError(f"a damaged zip archive: {error}") from error


def _directory_size(path: Path, size: int) -> int:
    """Size of the central directory in bytes, as the end of the archive states it."""
    with open(path, "rb") as stream:
        stream.seek(max(0, size - 0xFFFF - _END - _LOCATOR - _END64))
        tail = stream.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) - end < _END:
        raise ValueError("not a zip archive, or its end is missing")
    (claimed,) = struct.unpack_from("<L", tail, end + 12)
    large = end - _LOCATOR - _END64
    if tail[end - _LOCATOR : end][:4] == b"PK\x06\x07" and large >= 0 and tail[large : large + 4] == b"PK\x06\x06":
        (claimed,) = struct.unpack_from("<Q", tail, large + 40)
    return int(claimed)
