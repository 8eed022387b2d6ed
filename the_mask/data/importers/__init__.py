"""Import data sets of other tools and benchmarks as a folder tree for training.

Every format is a function in :data:`FORMATS` that gives class names and labelled frames; :func:`import_dataset` writes
them: ``OUTPUT/data/<video>/{origin,mask}``, the lists of the splits, ``classes.json`` and ``dataset.py``, a module for
``DATASETS.IMPORT`` that registers ``<name>_train`` and ``<name>_val``.
"""

from the_mask.data.importers.common import ImportReport, LabelledFrame, Labels
from the_mask.data.importers.video import Sampling
from the_mask.data.importers.writer import FORMATS, import_dataset

__all__ = ["FORMATS", "ImportReport", "LabelledFrame", "Labels", "Sampling", "import_dataset"]
