"""Data: registration, class lists, clip sampling, clip mapper, loaders. Importing it registers the known data sets."""

import importlib
from typing import TYPE_CHECKING, Any

from the_mask.data.classes import ClassList, load_class_list, make_class_list
from the_mask.data.clips import Clip, as_clips, clip_indices, tile_video
from the_mask.data.datasets import dataset_root, register_all
from the_mask.data.image_tree import register_image_tree
from the_mask.data.io import read_image, read_label
from the_mask.data.plugins import import_dataset_modules
from the_mask.data.registry import get_class_names, get_records
from the_mask.data.video_tree import register_video_tree

if TYPE_CHECKING:
    from the_mask.data.build import build_test_loader, build_train_loader
    from the_mask.data.mapper import ClipMapper

register_all()

__all__ = [
    "ClassList",
    "Clip",
    "ClipMapper",
    "as_clips",
    "build_test_loader",
    "build_train_loader",
    "clip_indices",
    "dataset_root",
    "get_class_names",
    "get_records",
    "import_dataset_modules",
    "load_class_list",
    "make_class_list",
    "read_image",
    "read_label",
    "register_all",
    "register_image_tree",
    "register_video_tree",
    "tile_video",
]

# Imported on demand, because they need OpenCV, which a stream of arrays does not: 20 MB.
_HOMES = {
    "ClipMapper": "the_mask.data.mapper",
    "build_test_loader": "the_mask.data.build",
    "build_train_loader": "the_mask.data.build",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
