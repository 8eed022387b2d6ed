"""Sinks for the predictions of :mod:`the_mask.evaluation.loop`, besides the evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from the_mask.data.clips import Clip
from the_mask.data.files import inside
from the_mask.evaluation.label_png import save_label_map
from the_mask.evaluation.metrics import as_label_array


class PngSink:
    """Writes label maps as ``<folder>/<video>/<frame>.png``, one channel, atomically.

    Args:
        folder: created if needed.
        raw_values: value of each class in the files.
    """

    def __init__(self, folder: str | Path, raw_values: Sequence[int]) -> None:
        self.folder = Path(folder)
        self.raw_values = list(raw_values)

    def process(self, clips: Sequence[Clip], predictions: Sequence[Sequence[Any]]) -> None:
        """Write the label maps [H, W] of some clips.

        Raises:
            ValueError: a name that leads out of the folder.
        """
        for clip, maps in zip(clips, predictions, strict=True):
            for frame_id, labels in zip(clip.frame_ids, maps, strict=True):
                path = inside(self.folder, clip.video_id, f"{frame_id}.png")
                save_label_map(path, as_label_array(labels), self.raw_values)
