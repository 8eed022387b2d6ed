"""Import data sets of other tools and benchmarks as a folder tree for training.

Every format is a function in :data:`FORMATS` that gives class names and labelled frames; :func:`import_dataset` writes
them: ``OUTPUT/data/<video>/{origin,mask}``, the lists of the splits, ``classes.json`` and ``dataset.py``, a module for
``DATASETS.IMPORT`` that registers ``<name>_train`` and ``<name>_val``.
"""

from the_mask.data.importers.coco import read_coco, read_panoptic, read_vipseg, read_ytvis
from the_mask.data.importers.common import ImportReport, LabelledFrame, Labels
from the_mask.data.importers.pictures import read_color_masks, read_cvat_masks, read_davis
from the_mask.data.importers.shapes import read_cvat_video, read_label_studio, read_labelme
from the_mask.data.importers.writer import FORMATS, import_dataset

__all__ = [
    "FORMATS",
    "ImportReport",
    "LabelledFrame",
    "Labels",
    "import_dataset",
    "read_coco",
    "read_color_masks",
    "read_cvat_masks",
    "read_cvat_video",
    "read_davis",
    "read_label_studio",
    "read_labelme",
    "read_panoptic",
    "read_vipseg",
    "read_ytvis",
]
