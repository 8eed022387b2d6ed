"""Videos whose boxes lie about lengths, sizes and counts."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import pytest
from stream_cases import encode, picture

from the_mask.inference.live.sources import open_source


def changed(data: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """A file of boxes with some bytes replaced, counted from behind a box's name."""
    place = data.index(box) + 4 + offset
    return data[:place] + value + data[place + len(value) :]


LIES: dict[str, tuple[bytes, int, bytes]] = {
    "length of the film": (b"mvhd", 16, b"\xff\xff\xff\xf0"),
    "length of the track": (b"tkhd", 20, b"\xff\xff\xff\xf0"),
    "length of the pictures": (b"mdhd", 16, b"\xff\xff\xff\xf0"),
    "unit of time": (b"mdhd", 12, b"\0\0\0\x01"),
    "no unit of time": (b"mdhd", 12, b"\0\0\0\0"),
    "size of the track": (b"tkhd", 76, b"\xff\xff\0\0\xff\xff\0\0"),
    "size of the pictures": (b"avc1", 24, b"\xff\xff\xff\xff"),
    "number of frames": (b"stsz", 8, b"\x7f\xff\xff\xff"),
    "number of times": (b"stts", 4, b"\x7f\xff\xff\xff"),
    "time of a frame": (b"stts", 8, b"\0\0\0\x0c\x7f\xff\xff\xff"),
    "places": (b"stco", 8, b"\xff\xff\xff\xf0"),
    "number of places": (b"stco", 4, b"\x7f\xff\xff\xff"),
    "size of the data": (b"mdat", -8, b"\x7f\xff\xff\xff"),
}


@pytest.mark.parametrize("lie", LIES)
def test_videos_that_lie(tmp_path: Path, lie: str) -> None:
    """Frames come as long as there are some; the rest is an error or a problem that is told."""
    path = tmp_path / "a.mp4"
    path.write_bytes(changed(encode([picture(i) for i in range(12)]), *LIES[lie]))
    told: list[str] = []
    frames = 0
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with open_source(path, on_problem=told.append) as source:
            for frame in source.timed():
                # A track as wide as high is shown so.
                assert frame.image.shape in ((48, 64, 3), (64, 64, 3))
                assert np.isfinite(frame.seconds)
                frames += 1
    except ValueError as error:
        told.append(str(error))
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10
    assert frames <= 12
    assert frames == 12 or any("a.mp4" in text for text in told), (frames, told)
