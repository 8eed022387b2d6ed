"""Label maps as masks and boxes in memory: NumPy, and supervision's ``Detections``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from the_mask.data.exporters.common import regions


class ClassMasks(NamedTuple):
    """The N classes in one frame, ascending.

    Attributes:
        class_ids: int64 [N], train ids.
        masks: bool [N, H, W], disjoint.
        boxes: float32 [N, 4], x0, y0, x1, y1 in pixels of the first and the last column and row.
        areas: int64 [N], pixels.
    """

    class_ids: NDArray[np.int64]
    masks: NDArray[np.bool_]
    boxes: NDArray[np.float32]
    areas: NDArray[np.int64]


def class_masks(labels: Any, num_classes: int) -> ClassMasks:
    """Masks, boxes and areas of the classes in a label map.

    Args:
        labels: integers [H, W], an array or the output of ``StreamingSegmentor.step``; values outside
            ``0..num_classes-1`` are pixels without a class.
        num_classes: K.

    Raises:
        ValueError: no integers, or not [H, W].
    """
    array = np.asarray(labels.cpu() if hasattr(labels, "cpu") else labels)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"label map: expected integers [height, width], got {array.dtype} {list(array.shape)}")
    found = regions(array, num_classes)
    masks = np.stack([region.mask for region in found]) if found else np.zeros((0, *array.shape), bool)
    boxes = [_box(region.mask) for region in found]
    return ClassMasks(
        np.array([region.label for region in found], np.int64),
        masks,
        np.array(boxes, np.float32).reshape(-1, 4),
        masks.sum((1, 2), dtype=np.int64),
    )


def to_supervision(labels: Any, names: Sequence[str]) -> Any:
    """``supervision.Detections`` of a label map: a detection per class, with its mask and name.

    Args:
        labels: see :func:`class_masks`.
        names: K class names.

    Raises:
        ModuleNotFoundError: supervision is not installed.
        ValueError: see :func:`class_masks`.
    """
    try:
        import supervision
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Detections need supervision: pip install 'the_mask[supervision]'") from error
    found = class_masks(labels, len(names))
    return supervision.Detections(
        xyxy=found.boxes,
        mask=found.masks,
        class_id=found.class_ids,
        data={"class_name": np.array([names[i] for i in found.class_ids], dtype=str)},
    )


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])
