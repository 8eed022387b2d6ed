"""Outputs for the labels of a segmented video, besides the annotated video: PNG files, or a table of class shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from the_mask.data.files import TEMPORARY, atomic_write, write_json
from the_mask.inference.rendering.render import Palette


class LabelSink(Protocol):
    """Receives the labels of each frame in turn."""

    def write(self, number: int, seconds: float, labels: NDArray[np.integer[Any]]) -> None:
        """Take the next frame: its number from 0, its time in the input, and its class ids [H, W]."""

    def close(self) -> None:
        """Finish after the last frame."""


class LabelFolder:
    """One PNG per frame, ``00000000.png`` and so on: class ids, in 8 bits where they fit, else 16.

    Args:
        folder: created if needed; must not contain PNGs.
        num_classes: of the model.
        palette: colours to store in the file (an indexed PNG); None stores grey values. Use grey values for readers
            that turn indices into colours, such as ``cv2.imread``.

    Raises:
        ValueError: there are PNGs in the folder already, it is a file, or there are more classes than colours.
    """

    def __init__(self, folder: Path, num_classes: int, palette: Palette | None = None) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output {folder} is a file; label maps go into a folder")
        if folder.is_dir() and next(folder.glob("*.png"), None) is not None:
            raise ValueError(
                f"output {folder} holds PNGs already, which would be mixed with the new ones; choose another"
            )
        if palette is not None and num_classes > 256:
            raise ValueError(f"a PNG has at most 256 colours, and there are {num_classes} classes")
        self.folder, self._type = folder, np.uint8 if num_classes <= 256 else np.uint16
        self._colors = None if palette is None else np.asarray(palette.colors, np.uint8).reshape(-1).tolist()

    def write(self, number: int, seconds: float, labels: NDArray[np.integer[Any]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(labels.astype(self._type))
        if self._colors is not None:
            picture.putpalette(self._colors)
        atomic_write(self.folder / f"{number:08d}.png", lambda stream: picture.save(stream, format="PNG"))

    def close(self) -> None:
        for left in self.folder.glob(f"*{TEMPORARY}"):
            left.unlink()


class ClassShares:
    """Writes a JSON file with, for each frame, its number, its time, and the share of pixels of each class.

    Args:
        path: the file, written by :meth:`close`.
        names: class names.
        facts: further entries of the file: model, input, ...
    """

    def __init__(self, path: Path, names: list[str], facts: dict[str, Any]) -> None:
        self.path, self.names, self.facts = path, names, facts
        self.frames: list[dict[str, Any]] = []

    def write(self, number: int, seconds: float, labels: NDArray[np.integer[Any]]) -> None:
        ids, counts = np.unique(labels, return_counts=True)
        shares = {
            self.names[i] if i < len(self.names) else str(i): round(int(count) / labels.size, 6)
            for i, count in zip(ids.tolist(), counts, strict=True)
        }
        self.frames.append({"frame": number, "seconds": round(seconds, 6), "shares": shares})

    def close(self) -> None:
        if not self.frames:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {**self.facts, "classes": self.names, "frames": self.frames})
