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

    Frames of a folder keep their pictures' names, those of a video are numbered from 0 as the format has it. Labels of
    anamorphic video get the size of its stored pixels, which annotation tools show.

    Args:
        exporter: of one of :data:`the_mask.data.exporters.FORMATS`.
        source: the open input.
    """

    def __init__(self, exporter: Exporter, source: FrameSource) -> None:
        self.exporter = exporter
        self.video = re.sub(r"[^\w.-]+", "_", Path(source.name).stem).strip("_.") or "video"
        self._pictures = folder_pictures(source.path) if source.path is not None and source.path.is_dir() else None
        self._fps = source.fps
        if source.size is not None and source.stored_size is not None:
            self._scale = source.stored_size[0] / source.size[0], source.stored_size[1] / source.size[1]
        else:
            self._scale = 1.0, 1.0

    def process(self, clips: Sequence[Clip], predictions: Sequence[Any]) -> None:
        """Take the label maps [H, W] of clips with ``frame_indices`` and ``timestamps``."""
        for clip, maps in zip(clips, predictions, strict=True):
            for number, seconds, labels in zip(clip.frame_indices, clip.timestamps, maps, strict=True):
                self._write(number, seconds, scaled(as_label_array(labels), self._scale))

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


def scaled(labels: NDArray[np.integer[Any]], scale: tuple[float, float]) -> NDArray[np.integer[Any]]:
    """A label map [H, W] at other numbers of rows and columns; each pixel takes the label at its centre."""
    if scale == (1.0, 1.0):
        return labels
    sizes = [max(1, round(side * factor)) for side, factor in zip(labels.shape, scale, strict=True)]
    picked = [
        ((np.arange(new) + 0.5) * old / new).astype(np.intp) for new, old in zip(sizes, labels.shape, strict=True)
    ]
    return labels[np.ix_(*picked)]


def folder_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder, or of its ``origin``, in the order in which they are frames."""
    for place in (folder, folder / "origin"):
        found, _ = files_by_stem(place, IMAGE_SUFFIXES, "frame")
        if found:
            return list(found.values())
    return []
