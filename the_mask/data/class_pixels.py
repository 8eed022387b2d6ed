"""Pixels per class, and warnings about class lists that are probably wrong.

Example: two classes stored as 0 and 255, where 255 is the ignored value. The training runs, but only one class is left
and scores 100 %. No file is damaged, so this is a warning, not an error.
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
# Masks read before a training. Lists of up to this many classes are expected to occur in them completely.
PROBES, SHOWN_BY_PROBES = 32, 8


def count_ids(
    values: Mapping[int, int], label_table: Sequence[int], num_classes: int
) -> tuple[dict[int, int], Counter[int]]:
    """Turn pixel counts by (legal) raw value into counts by train id, and counts by raw value of the ignored pixels."""
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
    """Warnings about the classes of some masks: allowed, but rarely intended.

    Args:
        names: K classes.
        pixels: pixels per class, [K].
        ignored: pixels by ignored raw value.
        where: which masks were read, for the text.
        only_single: too few masks were read to call a class absent; only a single class is reported.
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

    Unreadable masks and illegal values are not reported here, but where the masks are used.
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
