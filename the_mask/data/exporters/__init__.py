"""Predictions in the formats of other tools, to view, score or correct them there.

Every format is an :class:`Exporter` in :data:`FORMATS`; ``the-mask annotations`` feeds it from a folder of label PNGs,
``the-mask segment --annotations`` while a video is segmented. :func:`class_masks` and :func:`to_supervision` turn a
label map into masks and boxes in memory.
"""

from __future__ import annotations

from the_mask.data.exporters.coco import CocoExporter, PanopticExporter, YtvisExporter
from the_mask.data.exporters.common import Exporter, ExportReport, LabelFrame
from the_mask.data.exporters.cvat import CvatMasksExporter, CvatVideoExporter
from the_mask.data.exporters.fiftyone import FiftyOneExporter
from the_mask.data.exporters.label_studio import LabelStudioExporter
from the_mask.data.exporters.objects import ClassMasks, class_masks, to_supervision
from the_mask.data.exporters.predictions import dataset_classes, given_classes, read_predictions, stored_classes

FORMATS: dict[str, type[Exporter]] = {
    "coco": CocoExporter,
    "panoptic": PanopticExporter,
    "ytvis": YtvisExporter,
    "cvat-masks": CvatMasksExporter,
    "cvat-video": CvatVideoExporter,
    "label-studio": LabelStudioExporter,
    "fiftyone": FiftyOneExporter,
}

__all__ = [
    "FORMATS",
    "ClassMasks",
    "ExportReport",
    "Exporter",
    "LabelFrame",
    "class_masks",
    "dataset_classes",
    "given_classes",
    "read_predictions",
    "stored_classes",
    "to_supervision",
]
