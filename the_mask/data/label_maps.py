"""Label maps as arrays, and as PNGs with the raw values of a data set (VSPW: class + 1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from the_mask.data.classes import as_label_table
from the_mask.data.files import write_inside

LabelMap = NDArray[np.integer] | torch.Tensor


def as_label_array(labels: LabelMap, what: str = "label map") -> NDArray[np.integer]:
    """Return ``labels`` as a NumPy integer array, without a copy if possible.

    Raises:
        ValueError: the values are not integers.
    """
    array = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if array.dtype == np.bool_ or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{what} holds {array.dtype} values; expected integer class ids")
    return array


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


def save_label_map(
    folder: Path,
    names: Sequence[str],
    labels: NDArray[np.integer],
    raw_values: Sequence[int],
    colors: Sequence[Sequence[int]] | None = None,
    durable: bool = True,
) -> None:
    """Write train ids [H, W] as a one-channel PNG of raw values: 8 bit where they fit, else 16 bit.

    The file is written atomically; its folder is made if needed.

    Args:
        folder: for label maps.
        names: parts of the file's path below it, see :func:`the_mask.data.files.write_inside`.
        labels: train ids.
        raw_values: of every class.
        colors: RGB of at most 256 raw values, stored with them (a palette PNG). Readers such as ``cv2.imread``
            return the colours of such a file instead of the values.
        durable: see :func:`the_mask.data.files.atomic_write`.
    """
    table = np.asarray(raw_values, dtype=np.uint8 if max(raw_values) <= 255 else np.uint16)
    picture = Image.fromarray(table[labels])
    if colors is not None:
        picture.putpalette(np.asarray(colors, np.uint8).reshape(-1).tolist())
    write_inside(folder, *names, content=lambda stream: picture.save(stream, format="PNG"), durable=durable)
