"""Predictions for FiftyOne, as its importer of ``ImageSegmentationDirectory`` reads them."""

from __future__ import annotations

import os
from pathlib import PurePosixPath

import numpy as np

from the_mask.data.exporters.common import Exporter, LabelFrame, Region
from the_mask.data.files import inside, write_json
from the_mask.data.io import write_picture


class FiftyOneExporter(Exporter):
    """``labels/<picture>.png`` of class + 1 (0: no class), and ``mask_targets.json``: what the values mean.

    FiftyOne finds a picture by the name of its mask, so pictures stay where they are.
    """

    def add(self, frame: LabelFrame, found: list[Region]) -> None:
        values = np.zeros(frame.labels.shape, np.uint8 if len(self.classes.names) <= 255 else np.uint16)
        for region in found:
            values[region.mask] = region.label + 1
        name = PurePosixPath(frame.picture).with_suffix(".png").as_posix()
        path = inside(self.folder, "labels", name)
        if path.exists():
            raise ValueError(
                f"video {frame.video}, frame {frame.name}: the picture {frame.picture} is that of another frame"
            )
        write_picture(path, values, durable=False)

    def finish(self) -> None:
        targets = {str(i + 1): name for i, name in enumerate(self.classes.names)}
        # This file refers to the masks: they must be on the disk before it.
        os.sync()
        write_json(self.path("mask_targets.json"), targets)
