"""Pre-annotations for Label Studio: tasks with brush masks as predictions, and the matching labelling interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from the_mask.data.classes import ClassList
from the_mask.data.exporters.common import Exporter, JsonList, LabelFrame, Region
from the_mask.data.files import atomic_write

# Where Label Studio serves pictures of its own machine (LOCAL_FILES_SERVING_ENABLED).
LOCAL_FILES = "/data/local-files/?d="
# Bits of the lengths that a run may choose from.
WIDTHS = (3, 4, 8, 16)


class LabelStudioExporter(Exporter):
    """``tasks.json``, a task per frame with a brush mask per class as a prediction, and ``config.xml``.

    Args:
        folder, classes, model: see :class:`Exporter`.
        url: prefix of image names in the tasks.
    """

    def __init__(self, folder: str | Path, classes: ClassList, *, model: str = "", url: str = LOCAL_FILES) -> None:
        super().__init__(folder, classes, model=model)
        self.url = url

    def begin(self, video: str) -> None:
        if self.report.videos == 1:
            self._tasks = JsonList(self.folder)

    def add(self, frame: LabelFrame, found: list[Region]) -> None:
        height, width = frame.labels.shape
        fixed = {"type": "brushlabels", "from_name": "tag", "to_name": "image", "image_rotation": 0}
        results = [
            {
                "id": f"{self.report.frames}_{region.label}",
                **fixed,
                "original_width": width,
                "original_height": height,
                "value": {
                    "format": "rle",
                    "rle": encode_brush(region.mask),
                    "brushlabels": [self.classes.names[region.label]],
                },
            }
            for region in found
        ]
        # An empty prediction is written too: it says that the frame was segmented.
        data = {"image": self.url + quote(frame.picture), "video": frame.video, "frame": frame.name}
        self._tasks.add({"data": data, "predictions": [{"model_version": self.model, "result": results}]})

    def finish(self) -> None:
        def write(stream: Any) -> None:
            stream.write(b"[\n")
            self._tasks.copy_to(stream)
            stream.write(b"\n]\n")

        atomic_write(self.path("tasks.json"), write)
        atomic_write(self.path("config.xml"), interface(self.classes).encode())


def interface(classes: ClassList) -> str:
    """The labelling interface of a Label Studio project with these classes."""
    labels = "".join(
        f'    <Label value={quoteattr(name)} background="#{r:02x}{g:02x}{b:02x}"/>\n'
        for name, (r, g, b) in zip(classes.names, classes.colors, strict=True)
    )
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true" zoomControl="true"/>\n'
        f'  <BrushLabels name="tag" toName="image">\n{labels}  </BrushLabels>\n</View>\n'
    )


def encode_brush(mask: NDArray[np.bool_]) -> list[int]:
    """Label Studio's run-length code of a mask [H, W]: the bytes of its bit stream, as numbers.

    Values are those of a picture r, g, b, alpha: all four 255 where the mask is true, else 0.
    :func:`the_mask.data.importers.shapes.decode_brush` describes the stream.
    """
    flat = mask.reshape(-1)
    edges = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    lengths, values = 4 * np.diff(edges), flat[edges[:-1]].astype(np.int64) * 255
    longest = 1 << WIDTHS[-1]
    # Runs that are too long become several.
    pieces = -(-lengths // longest)
    values = np.repeat(values, pieces)
    last = np.cumsum(pieces) - 1
    split = np.full(int(pieces.sum()), longest, np.int64)
    split[last] = lengths - (pieces - 1) * longest
    kind = np.searchsorted([1 << width for width in WIDTHS], split)
    width = np.array(WIDTHS)[kind]
    # 1, two bits for the kind, the length less one, eight bits for the value.
    codes = (((4 | kind) << width | (split - 1)) << 8) | values
    sizes = 3 + width + 8
    place = np.arange(3 + WIDTHS[-1] + 8)
    shifts = sizes[:, None] - 1 - place
    body = ((codes[:, None] >> shifts.clip(0)) & 1)[shifts >= 0].astype(np.uint8)
    head = f"{4 * flat.size:032b}{7:05b}" + "".join(f"{width - 1:04b}" for width in WIDTHS)
    return np.packbits(np.concatenate([np.array(list(head), np.uint8), body])).tolist()
