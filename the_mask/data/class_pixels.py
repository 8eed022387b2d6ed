"""How many pixels each class has, and the class lists that this shows to be a mistake.

Two classes stored as 0 and 255 train without a complaint when 255 is the ignored value: one class is left, and it
scores 100 %. Nothing is wrong with any file, so this is a warning, not an error.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from detectron2.data import MetadataCatalog

from the_mask.data.io import read_label_raw
from the_mask.data.registry import Record

logger = logging.getLogger(__name__)
# Masks read before a training; lists of up to this many classes are expected to show in them.
PROBES, SHOWN_BY_PROBES = 32, 8


def count_ids(
    values: Mapping[int, int], label_table: Sequence[int], num_classes: int
) -> tuple[dict[int, int], Counter[int]]:
    """Pixels by train id, and pixels by raw value of those that are ignored, out of pixels by (legal) raw value."""
    pixels: Counter[int] = Counter()
    ignored: Counter[int] = Counter()
    for value, count in values.items():
        train_id = label_table[value]
        if 0 <= train_id < num_classes:
            pixels[train_id] += count
        else:
            ignored[value] += count
    return dict(pixels), ignored


def class_warnings(
    names: Sequence[str], pixels: np.ndarray, ignored: Mapping[int, int], where: str = "", only_single: bool = False
) -> list[str]:
    """What is seldom meant about the classes of some masks.

    Args:
        names: K classes.
        pixels: pixels per class, [K].
        ignored: pixels by ignored raw value.
        where: which masks were looked at, said in the text.
        only_single: too few masks were looked at to say that a class is absent; a single class is still told.
    """
    absent = [name for name, count in zip(names, pixels, strict=True) if not count]
    total = int(pixels.sum()) + sum(ignored.values())
    if not total or (not absent and len(names) > 1):
        return []
    single = len(names) - len(absent) <= 1
    if only_single and not single:
        return []
    strange = [value for value in ignored if value >= len(names)]
    shown = ", ".join(f"{value} ({ignored[value] / total:.1%} of the pixels)" for value in sorted(strange))
    hint = (
        f". Values far outside the class ids 0..{len(names) - 1} are ignored: {shown}; if one of them is a class, say "
        f"so in the label table, e.g. {{0: 0, {strange[0]}: 1}}"
        if strange
        else ""
    )
    if single:
        left = next((name for name, count in zip(names, pixels, strict=True) if count), None)
        text = (
            f"only class {left!r} has pixels{where}, so every model is right"
            if left
            else f"no class has a pixel{where}"
        )
    else:
        text = f"{len(absent)} of {len(names)} classes have no pixel{where}: {', '.join(absent[:8])}"
        text += ", ..." if len(absent) > 8 else ""
    return [text + hint]


def warn_about_classes(name: str, records: Sequence[Record]) -> list[str]:
    """Read some masks of a data set, spread evenly, and log :func:`class_warnings`; returns them.

    Unreadable masks and illegal values are left to whoever uses the masks.
    """
    metadata = MetadataCatalog.get(name)
    masks = [frame["sem_seg_file_name"] for record in records for frame in record["frames"]]
    masks = [mask for mask in masks if mask is not None]
    chosen = sorted({round(i) for i in np.linspace(0, len(masks) - 1, min(PROBES, len(masks)))})
    values: Counter[int] = Counter()
    for i in chosen:
        try:
            found, counts = np.unique(read_label_raw(masks[i]), return_counts=True)
        except (ValueError, FileNotFoundError):
            continue
        values.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
    table, classes = metadata.label_table, metadata.stuff_classes
    legal = {value: count for value, count in values.items() if value < len(table) and table[value] >= 0}
    pixels, ignored = count_ids(legal, table, len(classes))
    per_class = np.array([pixels.get(i, 0) for i in range(len(classes))])
    where = "" if len(chosen) == len(masks) else f" in {len(chosen)} of {len(masks)} masks"
    few = len(chosen) < len(masks) and len(classes) > SHOWN_BY_PROBES
    warnings = [f"data set {name}: {text}" for text in class_warnings(classes, per_class, ignored, where, few)]
    for text in warnings:
        logger.warning(text)
    return warnings
