"""Predicted label maps as PNGs with the raw values of a data set (VSPW: class + 1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from the_mask.data.classes import as_label_table
from the_mask.data.files import atomic_write


def raw_values_of_classes(label_table: Sequence[int], num_classes: int) -> list[int]:
    """The inverse of a label table: for each train id, the lowest raw PNG value that is mapped to it.

    Raises:
        ValueError: a class has no raw value.
    """
    first: dict[int, int] = {}
    for raw, train_id in enumerate(as_label_table(label_table)):
        first.setdefault(train_id, raw)
    missing = [train_id for train_id in range(num_classes) if train_id not in first]
    if missing:
        raise ValueError(f"the label table has no raw value for train ids {missing}")
    return [first[train_id] for train_id in range(num_classes)]


def save_label_map(path: Path, labels: NDArray[np.integer], raw_values: Sequence[int]) -> None:
    """Write train ids [H, W] as a one-channel PNG of raw values: 8 bit where they fit, else 16 bit.

    The file is written atomically. It has no palette, because readers such as ``cv2.imread`` would return colours
    instead of the values.
    """
    table = np.asarray(raw_values, dtype=np.uint8 if max(raw_values) <= 255 else np.uint16)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(table[labels])
    atomic_write(path, lambda stream: picture.save(stream, format="PNG"))
