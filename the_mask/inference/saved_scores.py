"""Class scores on disk, one compressed float16 file per frame, to merge models without running them together.

Layout: ``<folder>/scores.json`` names the classes; ``<folder>/<video>/<frame>.npz`` holds ``scores``, [K, H, W] of
float16.
"""

from __future__ import annotations

import tokenize
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from the_mask.data.archives import opened_zip
from the_mask.data.class_names import describe_difference, same_classes
from the_mask.data.files import inside, read_json, write_inside, write_json
from the_mask.data.schema import Each, check_schema
from the_mask.modeling.stream import NO_HINTS, FrameName, Hints, Stream, StreamState

INDEX = "scores.json"
FORMAT = 1
# After float16 the scores compress about as well at the fastest level as at the slowest.
COMPRESSION_LEVEL = 1
# Limit of what an archive may unpack to, as a multiple of its size: constant scores are compressed a thousand times.
MAX_EXPANSION = 1100
LARGEST = float(np.finfo(np.float16).max)


def score_path(folder: Path, name: FrameName) -> Path:
    """File of one frame, (video, frame)."""
    return inside(folder, *_names(name))


def _names(name: FrameName) -> tuple[str, str]:
    return name[0], f"{name[1]}.npz"


class ScoreWriter:
    """Writes the scores of frames, atomically.

    Args:
        folder: created if needed. A folder with scores of other classes is an error.
        class_names: K names.

    Raises:
        ValueError: the folder holds scores of other classes.
    """

    def __init__(self, folder: str | Path, class_names: Sequence[str]) -> None:
        self.folder = Path(folder)
        self.class_names = list(class_names)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / INDEX).is_file():
            check_same_classes(self.class_names, read_index(self.folder), "this model", str(self.folder))
        else:
            write_json(self.folder / INDEX, {"format": FORMAT, "classes": self.class_names})

    def write(self, name: FrameName, scores: Tensor) -> Path:
        """Write [K, H, W] of frame (video, frame); returns the file.

        Raises:
            ValueError: another number of classes, or scores beyond float16.
        """
        if scores.dim() != 3 or scores.shape[0] != len(self.class_names):
            raise ValueError(f"scores {list(scores.shape)} of {name} for {len(self.class_names)} classes")
        array = scores.detach().float().cpu().numpy()
        if array.size and not np.abs(array).max() <= LARGEST:
            raise ValueError(f"scores of {name} reach {np.abs(array).max()}, beyond float16 ({LARGEST:.0f})")
        half = array.astype(np.float16)
        return write_inside(self.folder, *_names(name), content=lambda stream: _write_npz(stream, half))


class SavedScores(Stream):
    """A stream that reads scores from a folder; it needs each frame's name.

    Args:
        folder: written by :class:`ScoreWriter`.

    Raises:
        FileNotFoundError: no such folder, or it has no index.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.class_names = read_index(self.folder)
        self.num_classes = len(self.class_names)

    @property
    def looks_back(self) -> bool:
        """False: every file is read on its own."""
        return False

    def init_state(self) -> StreamState:
        """An empty state, since nothing is carried between frames."""
        return self.new_state()

    def step(
        self, frame: np.ndarray | Tensor, state: StreamState, hints: Hints = NO_HINTS
    ) -> tuple[Tensor, StreamState]:
        """Scores [K, H, W] float32 of the frame, found by its name.

        Raises:
            FileNotFoundError: no file for this frame.
            ValueError: no name; an unreadable file, or one of another size or number of classes.
        """
        if hints.name is None:
            raise ValueError(f"saved scores ({self.folder}) are found by video and frame, but the frame has no name")
        size = (frame.shape[0], frame.shape[1])
        state = self.continue_state(state, size)
        return self.read(hints.name, size), {**state, "seen": state["seen"] + 1}

    def read(self, name: FrameName, size: tuple[int, int]) -> Tensor:
        """As :meth:`step`, for a frame of ``size`` (H, W)."""
        path = score_path(self.folder, name)
        if not path.is_file():
            raise FileNotFoundError(
                f"score file {path} is missing (video {name[0]}, frame {name[1]}); write it with TEST.SAVE_SCORES"
            )
        expected = (self.num_classes, *size)
        try:
            array = _read_npz(path, expected)
        except (ValueError, SyntaxError, TypeError, tokenize.TokenError) as error:
            raise ValueError(f"score file {path} cannot be read ({error}); delete it and write it again") from error
        return torch.from_numpy(array.astype(np.float32))


def read_index(folder: Path) -> list[str]:
    """Class names of a folder of scores.

    Raises:
        FileNotFoundError: no index. ValueError: one of another format.
    """
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is not a folder of scores (write one: TEST.SAVE_SCORES)")
    content = read_json(path, "index of scores")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has format {content.get('format')!r:.80}; expected {FORMAT}")
    check_schema(content, {"classes": Each(list, str, least=1)}, f"{path} is no index of scores")
    names: list[str] = content["classes"]
    return names


def check_same_classes(first: Sequence[str], second: Sequence[str], first_name: str, second_name: str) -> None:
    """Raise a ValueError that shows the first differences of two class lists."""
    if same_classes(first, second):
        return
    raise ValueError(
        f"the members of an ensemble need the same classes in the same order; {second_name} has others: "
        f"{describe_difference(first, second, first_name)}"
    )


def _read_npz(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read the scores of a file. An archive that claims another shape is refused before unpacking."""
    with opened_zip(path, MAX_EXPANSION, most_members=8) as archive, archive.open("scores.npy") as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"array format {version}, expected (1, 0)")
        found, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        if found != shape or dtype != np.float16 or fortran_order:
            raise ValueError(f"it has {dtype} of shape {list(found)}, expected float16 of {list(shape)} (K, H, W)")
        # Read to the end, where the archive's checksum is verified.
        wanted = int(np.prod(shape)) * dtype.itemsize
        data = stream.read(wanted + 1)
    if len(data) != wanted:
        raise ValueError(f"{len(data)} bytes of scores, expected {wanted}")
    return np.frombuffer(data, dtype).reshape(shape)


def _write_npz(target: BinaryIO, scores: np.ndarray) -> None:
    with (
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=COMPRESSION_LEVEL) as archive,
        archive.open("scores.npy", "w", force_zip64=True) as stream,
    ):
        np.lib.format.write_array(stream, scores)
