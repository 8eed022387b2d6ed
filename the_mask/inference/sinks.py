"""Sinks for predictions: their common interface, and those that write files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from the_mask.data.clips import Clip
from the_mask.data.files import write_json
from the_mask.data.label_maps import as_label_array, save_label_map
from the_mask.data.whole_folder import lock_folder

# When files wait for the disk, which takes tens of milliseconds: each one, as work that can be resumed needs; all
# together when the sink is closed; or never, because the caller flushes the folder.
Flush = Literal["each", "close", "never"]


class Sink(ABC):
    """Consumes predictions.

    ``process`` has the interface of Detectron2's ``DatasetEvaluator``.
    """

    @abstractmethod
    def process(self, clips: Sequence[Clip], predictions: Sequence[Any]) -> None:
        """Receive clips of one video, with the maps of their frames. The clips of a video are consecutive."""

    def close(self) -> None:  # noqa: B027  (most have nothing to do)
        """Finish after the last prediction, or after an error."""


class LabelFolder(Sink):
    """Writes label maps as PNGs ``<folder>/<video>/<frame>.png``, without ``<video>`` if it has no name.

    Args:
        folder: created if needed.
        raw_values: value of each class in the files.
        colors: RGB to store with the values, see :func:`the_mask.data.label_maps.save_label_map`.
        flush: when to wait for the disk. Whatever is chosen, a file appears whole unless the machine itself stops.
    """

    def __init__(
        self,
        folder: str | Path,
        raw_values: Sequence[int],
        colors: Sequence[Sequence[int]] | None = None,
        flush: Flush = "each",
    ) -> None:
        self.folder, self.raw_values, self.colors, self.flush = Path(folder), list(raw_values), colors, flush
        # Of a folder for a single video, from its first frame on: two programs would mix their frames.
        self._alone = False
        self._lock: int | None = None

    @classmethod
    def of_video(
        cls,
        folder: Path,
        num_classes: int,
        colors: Sequence[Sequence[int]] | None = None,
        flush: Flush = "close",
    ) -> LabelFolder:
        """A sink for the class ids of a single video.

        Args:
            folder: created if needed; must not contain PNGs.
            num_classes: of the model.
            colors: RGB of the classes to store with the ids; None stores grey values.
            flush: as in the class.

        Raises:
            ValueError: there are PNGs in the folder already, it is a file, or there are more classes than colours.
        """
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output {folder} is a file; label maps go into a folder")
        _refuse_pngs(folder)
        if colors is not None and num_classes > 256:
            raise ValueError(f"a PNG has at most 256 colours, and there are {num_classes} classes")
        sink = cls(folder, range(num_classes), colors, flush)
        sink._alone = True
        return sink

    def _claim(self) -> None:
        self._alone = False
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder.resolve())
        # Another program may have filled it since it was looked at.
        _refuse_pngs(self.folder)

    def process(self, clips: Sequence[Clip], predictions: Sequence[Any]) -> None:
        """Write the label maps [H, W] of some clips.

        Raises:
            ValueError: a name that leads out of the folder, or another program writes label maps there.
        """
        if self._alone:
            self._claim()
        for clip, maps in zip(clips, predictions, strict=True):
            video = [clip.video_id] if clip.video_id else []
            for frame_id, labels in zip(clip.frame_ids, maps, strict=True):
                names = [*video, f"{frame_id}.png"]
                array, durable = as_label_array(labels), self.flush == "each"
                save_label_map(self.folder, names, array, self.raw_values, self.colors, durable)

    def close(self) -> None:
        """Flush the files that were not flushed one by one."""
        if self.flush == "close":
            os.sync()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _refuse_pngs(folder: Path) -> None:
    if folder.is_dir() and next(folder.glob("*.png"), None) is not None:
        raise ValueError(f"output {folder} holds PNGs already, which would be mixed with the new ones; choose another")


class ClassShares(Sink):
    """Writes a JSON file with, for each frame, its number, its time, and the share of pixels of each class.

    Args:
        path: the file, written by :meth:`close`.
        names: class names.
        facts: further entries of the file: model, input, ...
    """

    def __init__(self, path: Path, names: list[str], facts: dict[str, Any]) -> None:
        self.path, self.names, self.facts = path, names, facts
        self.frames: list[dict[str, Any]] = []

    def process(self, clips: Sequence[Clip], predictions: Sequence[Any]) -> None:
        """Receive the label maps [H, W] of clips with ``frame_indices`` and ``timestamps``."""
        for clip, maps in zip(clips, predictions, strict=True):
            for number, seconds, labels in zip(clip.frame_indices, clip.timestamps, maps, strict=True):
                self.frames.append({"frame": number, "seconds": round(seconds, 6), "shares": self._shares(labels)})

    def _shares(self, labels: Any) -> dict[str, float]:
        array = as_label_array(labels)
        ids, counts = np.unique(array, return_counts=True)
        return {
            self.names[i] if i < len(self.names) else str(i): round(int(count) / array.size, 6)
            for i, count in zip(ids.tolist(), counts, strict=True)
        }

    def close(self) -> None:
        """Write the file, if there was a frame."""
        if not self.frames:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {**self.facts, "classes": self.names, "frames": self.frames})


def write_classes(sinks: Sequence[Sink], names: Sequence[str], colors: Sequence[Sequence[int]], ignore: int) -> None:
    """Write classes.json next to each folder's PNGs, for ``the-mask annotations`` and ``the-mask import``."""
    content = {"names": list(names), "colors": [list(map(int, color)) for color in colors], "ignore": ignore}
    for sink in sinks:
        if isinstance(sink, LabelFolder) and sink.folder.is_dir():
            write_json(sink.folder / "classes.json", content)
