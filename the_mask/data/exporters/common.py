"""Shared by all exporters: predicted frames, the classes in them, and files that are written piece by piece.

Axes: H W pixels, N regions. A label map holds train ids ``0..K-1``; ``ignore_label``
marks pixels without a class.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from the_mask.data.classes import ClassList
from the_mask.data.files import atomic_write, errors_named, inside, relative_name
from the_mask.data.whole_folder import require_new, whole_folder


@dataclass(frozen=True)
class LabelFrame:
    """One labelled frame.

    Attributes:
        video: its name, a relative path.
        name: of the frame, without suffix.
        labels: integers [H, W].
        picture: name of the frame's image in the exported files, a relative path.
    """

    video: str
    name: str
    labels: NDArray[np.integer[Any]]
    picture: str


@dataclass
class ExportReport:
    """What was written.

    Attributes:
        frames, videos: counts.
        files: the files to use in the other tool, in order.
        noticed: message -> count.
    """

    frames: int = 0
    videos: int = 0
    files: list[Path] = field(default_factory=list)
    noticed: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.videos} videos, {self.frames} frames"]
        return "\n".join(lines + [f"{what}: {count}" for what, count in sorted(self.noticed.items())])


class Region(NamedTuple):
    """The pixels of one class in a frame: its train id and a bool mask [H, W]."""

    label: int
    mask: NDArray[np.bool_]


def regions(labels: NDArray[np.integer[Any]], num_classes: int) -> list[Region]:
    """The classes of a label map [H, W], ascending; pixels without a class are left out."""
    present = np.unique(labels)
    return [Region(int(c), labels == c) for c in present[(present >= 0) & (present < num_classes)]]


class Exporter(ABC):
    """Writes label maps into a folder, frame by frame; the frames of a video must be consecutive.

    The folder appears when everything in it is there: at :meth:`close`, or at the end of a ``with`` block; after an
    error nothing is left of it.

    Args:
        folder: new or empty.
        classes: names and colours.
        model: name of the model, stored in formats that have a field for it.

    Raises:
        FileExistsError: the folder is a file, or not empty.
    """

    # Names of frames that have no image files.
    frame_name = "{:08d}"

    def __init__(self, folder: str | Path, classes: ClassList, *, model: str = "") -> None:
        self.target, self.classes, self.model = Path(folder), classes, model
        self.report = ExportReport()
        # Where the files are meanwhile, once there is a frame.
        self.folder = self.target
        self._whole = ExitStack()
        self._videos: set[str] = set()
        self._video: str | None = None
        self._size = (0, 0)
        self._names: set[str] = set()
        require_new(self.target)
        for name in classes.names:
            _require_text(name, "class")

    def write(self, frame: LabelFrame) -> None:
        """Write the next frame.

        Raises:
            ValueError: a name outside the folder, a frame twice, a video in two parts, labels that are not train ids,
                or a size that the format does not allow.
            OSError: the disk. After an error of the disk or of a size there is no folder, and no frame can follow.
        """
        video = relative_name(frame.video, "video")
        relative_name(frame.name, f"frame of video {video}")
        relative_name(frame.picture, f"picture of video {video}")
        for name in (video, frame.name, frame.picture):
            _require_text(name, "name")
        self._check_labels(frame)
        if video == self._video:
            if frame.name in self._names:
                raise ValueError(f"video {video} has two frames named {frame.name}")
        elif video in self._videos:
            raise ValueError(f"the frames of video {video} do not come together")
        elif self._video is None and self._videos:
            raise ValueError(f"{self.target} is closed, or could not be written: video {video} needs a new exporter")
        last, self._video = self._video, None
        # An error here leaves nothing.
        with errors_named(self.target), self._whole.pop_all() as whole:
            if video != last:
                if last is not None:
                    self.end(last)
                else:
                    self.folder = whole.enter_context(whole_folder(self.target, new=True))
                height, width = frame.labels.shape
                self._size, self._names = (height, width), set()
                self.report.videos += 1
                self._videos.add(video)
                self.begin(video)
            self.add(frame, regions(frame.labels, len(self.classes.names)))
            self._whole = whole.pop_all()
        self._video = video
        self._names.add(frame.name)
        self.report.frames += 1

    def close(self) -> None:
        """Complete the files after the last frame; without frames, or after an error, there is no folder."""
        last, self._video = self._video, None
        with errors_named(self.target), self._whole.pop_all():
            if last is not None:
                self.end(last)
                self.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._video = None
            self._whole.__exit__(kind, error, trace)

    # Hooks; a format implements those it needs.
    def begin(self, video: str) -> None:  # noqa: B027
        """Called before the first frame of a video."""

    @abstractmethod
    def add(self, frame: LabelFrame, found: list[Region]) -> None:
        """Called for each checked frame, with its regions."""

    def end(self, video: str) -> None:  # noqa: B027
        """Called after the last frame of a video."""

    def finish(self) -> None:  # noqa: B027
        """Called after the last video."""

    def path(self, name: str) -> Path:
        """Where to write a reported output file; its folder is created."""
        path = inside(self.folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.report.files.append(self.target / name)
        return path

    def require_one_size(self, frame: LabelFrame) -> None:
        """Raise ValueError when a frame has another size than the first one of its video."""
        if frame.labels.shape != self._size:
            (height, width), (h, w) = frame.labels.shape, self._size
            raise ValueError(
                f"video {frame.video}, frame {frame.name} is {height}x{width} (height x width), the frames before it "
                f"{h}x{w}; this format has one size per video"
            )

    def _check_labels(self, frame: LabelFrame) -> None:
        labels, classes = frame.labels, self.classes
        if labels.ndim != 2 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"video {frame.video}, frame {frame.name}: expected integers [height, width], got {labels.dtype} "
                f"{list(labels.shape)}"
            )
        if (labels < len(classes.names)).all() and labels.min() >= 0:
            return
        values = np.unique(labels)
        bad = values[(values < 0) | ((values >= len(classes.names)) & (values != classes.ignore_label))]
        if bad.size:
            raise ValueError(
                f"video {frame.video}, frame {frame.name}: values {bad[:5].tolist()} are no train ids; expected "
                f"0..{len(classes.names) - 1}, or {classes.ignore_label} for no class"
            )


# What XML cannot hold, nor a line of a list.
_NO_TEXT = re.compile("[\0-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def _require_text(name: str, what: str) -> None:
    if _NO_TEXT.search(name):
        raise ValueError(f"{what} {name!r} has characters that files of other tools cannot hold: rename it")


class Spool:
    """Bytes of an incomplete file, in an unnamed temporary file: a killed process leaves nothing behind."""

    def __init__(self, folder: Path) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by copy_to

    def copy_to(self, stream: BinaryIO) -> None:
        """Write everything and close the temporary file."""
        with self.file:
            self.file.seek(0)
            shutil.copyfileobj(self.file, stream)


class JsonList(Spool):
    """Items of a JSON list for :func:`write_document`."""

    count = 0

    def add(self, item: Any) -> None:
        """Append an item."""
        text = json.dumps(item, separators=(",", ":"))
        self.file.write(((",\n" if self.count else "") + text).encode())
        self.count += 1


def write_document(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a JSON object atomically; a :class:`JsonList` among the values becomes a list."""

    def write(stream: BinaryIO) -> None:
        for number, (key, value) in enumerate(fields.items()):
            stream.write(("{" if not number else ",\n").encode() + json.dumps(key).encode() + b":")
            if isinstance(value, JsonList):
                stream.write(b"[\n")
                value.copy_to(stream)
                stream.write(b"\n]")
            else:
                stream.write(json.dumps(value).encode())
        stream.write(b"}\n")

    atomic_write(path, write)
