"""The baseline: the best constant prediction."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from detectron2.data import MetadataCatalog

from the_mask.data import get_records
from the_mask.data.video_tree import Record
from the_mask.evaluation.evaluator import VideoSemSegEvaluator
from the_mask.evaluation.frames import single_frame_clips
from the_mask.evaluation.loop import Predicted, feed
from the_mask.evaluation.metrics import best_constant_class, check_labels


def constant_baseline(
    dataset_name: str, windows: Sequence[int] = (8, 16)
) -> tuple[str, OrderedDict[str, dict[str, float]]]:
    """The class with the highest mIoU as a constant prediction, and its figures.

    It is chosen on the same ground truth, so no constant prediction is better. Reads all masks twice.

    Args:
        dataset_name: registered data set with ground truth.
        windows: window lengths n of VC_n. Strict VC_n of a constant is the share of that class among the pixels with
            constant ground truth; compat VC_n is always 100.

    Returns:
        Class name, and results as from :meth:`VideoSemSegEvaluator.evaluate`.

    Raises:
        ValueError: no labelled pixel.
    """
    metadata = MetadataCatalog.get(dataset_name)
    records = get_records(dataset_name)
    num_classes = len(metadata.stuff_classes)
    pixels = np.zeros(num_classes, dtype=np.int64)
    for clip in single_frame_clips(records):
        labels = clip.labels[0]
        if labels is not None:
            labelled = labels[labels != metadata.ignore_label]
            check_labels(labelled, num_classes, "ground truth", str(clip.mask_file_names[0]))
            pixels += np.bincount(labelled, minlength=num_classes)
    if not pixels.any():
        raise ValueError(f"data set {dataset_name} has no labelled pixel")
    best, _ = best_constant_class(np.diag(pixels))
    evaluator = VideoSemSegEvaluator(dataset_name, windows=windows)
    feed(_constant_predictions(records, best), [evaluator])
    return metadata.stuff_classes[best], OrderedDict(sem_seg=evaluator.results(evaluator.local_totals()))


def _constant_predictions(records: Sequence[Record], value: int) -> Iterator[Predicted]:
    for clip in single_frame_clips(records):
        labels = clip.labels[0]
        shape = (1, 1) if labels is None else labels.shape
        yield [clip], [[np.full(shape, value, dtype=np.int32)]]
