"""Mutations of files: bytes, values of nested structures, members of archives, chunks of PNGs.

Checksums are recomputed, so that the code behind them is reached.
"""

from __future__ import annotations

import copy
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Mutation = Callable[[Random, bytes], bytes]

NUMBERS = (0, 1, -1, 2, 7, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64, 10**30)
# Values of unexpected types and sizes.
ODD: tuple[Any, ...] = (
    *NUMBERS,
    *(-5, 0.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan"), 10**400),
    *("", " ", "x", "\0", "../x", "/etc/passwd", "\ud800", "é" * 300, "-1", "1e400", "nan"),
    *(None, True, False, b"", b"\xff\x00"),
)
ODD_CONTAINERS: tuple[Any, ...] = ([], {}, [[]], [None], {"": None}, [0] * 2000, [[0, 0], [1]], {"x": {"x": []}})


def mutate_bytes(dice: Random, data: bytes, tokens: tuple[bytes, ...] = ()) -> bytes:
    """Change one to six bytes, ranges, numbers or known words."""
    text = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 3, 6))):
        place = dice.randrange(len(text) + 1)
        length = min(len(text) - place, dice.choice((1, 1, 2, 4, 8, 30, 300)))
        kind = dice.randrange(9)
        if kind == 0 and length:
            text[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            text[place : place + length] = dice.randbytes(length)
        elif kind == 2:
            del text[place : place + length]
        elif kind == 3:
            text[place:place] = text[place : place + length] * dice.choice((1, 1, 5, 100))
        elif kind == 4:
            text[place:place] = dice.randbytes(dice.choice((1, 2, 4, 16)))
        elif kind == 5:
            number, size = dice.choice(NUMBERS), dice.choice((1, 2, 4, 8))
            packed = (number & (1 << 8 * size) - 1).to_bytes(size, dice.choice(("little", "big")))
            text[place : place + size] = packed
        elif kind == 6:
            text[place : place + length] = str(dice.choice(ODD)).encode("utf-8", "surrogatepass")
        elif kind == 7 and tokens:
            text[place : place + dice.choice((0, length))] = dice.choice(tokens)
        elif kind == 8:
            other = dice.randrange(len(text) + 1)
            text[place:place] = text[other : other + length]
    if dice.randrange(30) == 0:
        del text[dice.randrange(len(text) + 1) :]
    return bytes(text)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Container and key of every value in a nested structure."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = [(value, key) for key in value]
    elif isinstance(value, list):
        items = [(value, index) for index in range(len(value))]
    for container, key in items:
        yield container, key
        yield from places(container[key])


def mutate_structure(dice: Random, value: Any, odd: tuple[Any, ...] = ODD) -> Any:
    """Copy nested lists and dictionaries, with one to three values replaced, removed, duplicated or swapped."""
    root = [copy.deepcopy(value)]
    for _ in range(dice.choice((1, 1, 2, 3))):
        spots = list(places(root))
        container, key = spots[dice.randrange(1 if dice.randrange(40) == 0 else len(spots))]
        kind = dice.randrange(7)
        if kind == 0 and container is not root:
            del container[key]
        elif kind == 1:
            other, name = dice.choice(spots)
            container[key] = copy.deepcopy(other[name])
        elif kind == 2 and isinstance(container, dict):
            container[dice.choice(("", "x", "id", str(key) + "x"))] = container.pop(key)
        elif kind == 3 and isinstance(container, list) and container is not root:
            container.insert(key, copy.deepcopy(container[key]))
        elif kind == 4:
            container[key] = copy.deepcopy(dice.choice(ODD_CONTAINERS))
        elif kind == 5 and type(container[key]) in (int, float) and abs(container[key]) < 10**15:
            container[key] = container[key] * dice.choice((-1, 0.5, 3, 10**6)) + dice.choice((0, 1, -1))
        else:
            container[key] = dice.choice(odd)
    return root[0]


JSON_ODD = tuple(value for value in ODD if not isinstance(value, bytes))


def mutate_json(dice: Random, data: bytes) -> bytes:
    """Change values mostly, bytes sometimes."""
    if dice.randrange(8) == 0:
        return mutate_bytes(dice, data, (b"[" * 2000, b'{"a":' * 2000, b"NaN", b"1e999", b"9" * 5000, b"null"))
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(dice, data)
    return json.dumps(mutate_structure(dice, value, JSON_ODD)).encode("utf-8", "surrogatepass")


def mutate_zip(dice: Random, data: bytes, inner: Mutation = mutate_bytes) -> bytes:
    """Change a member, its name or the archive; checksums of members are recomputed."""
    if dice.randrange(4) == 0:
        return mutate_bytes(dice, data, (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06"))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [[info.filename, archive.read(info)] for info in archive.infolist()]
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError):
        return mutate_bytes(dice, data)
    for _ in range(dice.choice((1, 1, 2))):
        if not members:
            break
        number = dice.randrange(len(members))
        kind = dice.randrange(8)
        if kind == 0:
            members.pop(number)
        elif kind == 1:
            members[number][0] = dice.choice(("../x", "/x", "", "x" * 5000, "a\0b", members[0][0] + "/x", "C:\\x"))
        elif kind == 2:
            members.append(list(members[number]))
        else:
            members[number][1] = inner(dice, members[number][1])
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", dice.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name or "-"), content)
    return target.getvalue()


def mutate_png(dice: Random, data: bytes) -> bytes:
    """Change chunks of a PNG, or its pixels before compression; checksums are recomputed."""
    if not data.startswith(b"\x89PNG") or dice.randrange(6) == 0:
        return mutate_bytes(dice, data, (b"IHDR", b"IDAT", b"PLTE", b"acTL", b"fcTL", b"eXIf", b"tRNS"))
    chunks, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append([data[place + 4 : place + 8], data[place + 8 : place + 8 + length]])
        place += 12 + length
    for _ in range(dice.choice((1, 1, 2, 3))):
        if not chunks:
            break
        number = dice.randrange(len(chunks))
        kind, content = chunks[number]
        choice = dice.randrange(6)
        if choice == 0:
            chunks.insert(dice.randrange(len(chunks) + 1), list(chunks[number]))
        elif choice == 1:
            chunks.pop(number)
        elif choice == 2:
            name = dice.choice(
                (b"acTL", b"fcTL", b"fdAT", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"zTXt", b"gAMA", b"cHRM")
            )
            chunks.insert(dice.randrange(len(chunks) + 1), [name, dice.randbytes(dice.choice((0, 1, 4, 8, 26, 100)))])
        elif kind == b"IDAT" and choice == 3:
            try:
                chunks[number][1] = zlib.compress(mutate_bytes(dice, zlib.decompress(content)))
            except zlib.error:
                chunks[number][1] = mutate_bytes(dice, content)
        else:
            chunks[number][1] = mutate_bytes(dice, content)
    packed = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    ]
    return data[:8] + b"".join(packed)
