"""Data: registration, class lists, clip sampling, clip mapper, loaders. Importing it registers the known data sets."""

from the_mask.data.build import build_test_loader, build_train_loader
from the_mask.data.classes import ClassList, load_class_list, make_class_list
from the_mask.data.clips import Clip, as_clips, clip_indices, tile_video
from the_mask.data.datasets import dataset_root, register_all
from the_mask.data.image_tree import register_image_tree
from the_mask.data.io import read_image, read_label
from the_mask.data.mapper import ClipMapper
from the_mask.data.plugins import import_dataset_modules
from the_mask.data.registry import get_class_names, get_records
from the_mask.data.video_tree import register_video_tree

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
