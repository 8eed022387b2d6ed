"""Labels of a segmented video in the format of an annotation tool, frame by frame as they come."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from the_mask.data.clips import Clip
from the_mask.data.exporters import Exporter, LabelFrame
from the_mask.data.frame_files import files_by_stem
from the_mask.data.io import IMAGE_SUFFIXES
from the_mask.data.label_maps import as_label_array
from the_mask.inference.live.frame_source import FrameSource
from the_mask.inference.sinks import Sink


class AnnotationSink(Sink):
    """Feeds an exporter with the frames of one video.

    Frames of a folder keep their pictures' names, those of a video are numbered from 0 as the format has it.

    Args:
        exporter: of one of :data:`the_mask.data.exporters.FORMATS`.
        source: the open input.
    """

    def __init__(self, exporter: Exporter, source: FrameSource) -> None:
        self.exporter = exporter
        self.video = re.sub(r"[^\w.-]+", "_", Path(source.name).stem).strip("_.") or "video"
        self._pictures = folder_pictures(source.path) if source.path is not None and source.path.is_dir() else None
        self._fps = source.fps

    def process(self, clips: Sequence[Clip], predictions: Sequence[Any]) -> None:
        """Take the label maps [H, W] of clips with ``frame_indices`` and ``timestamps``."""
        for clip, maps in zip(clips, predictions, strict=True):
            for number, seconds, labels in zip(clip.frame_indices, clip.timestamps, maps, strict=True):
                self._write(number, seconds, as_label_array(labels))

    def _write(self, number: int, seconds: float, labels: NDArray[np.integer[Any]]) -> None:
        if self._pictures is None:
            name = self.exporter.frame_name.format(number)
            frame = LabelFrame(self.video, name, labels, f"{self.video}/{name}.png")
        else:
            # By time, because pictures that cannot be read are left out.
            picture = self._pictures[round(seconds * self._fps)]
            frame = LabelFrame(self.video, picture.stem, labels, f"{self.video}/{picture.name}")
        self.exporter.write(frame)

    def close(self) -> None:
        """Finish the exporter's files."""
        self.exporter.close()


def folder_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder, or of its ``origin``, in the order in which they are frames."""
    for place in (folder, folder / "origin"):
        found, _ = files_by_stem(place, IMAGE_SUFFIXES, "frame")
        if found:
            return list(found.values())
    return []
