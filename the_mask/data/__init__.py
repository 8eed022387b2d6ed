"""Data: registration, class lists, clip sampling, clip mapper, loaders. Importing it registers the known data sets."""

from the_mask.data.classes import ClassList, load_class_list, make_class_list
from the_mask.data.datasets import dataset_root, register_all
from the_mask.data.video_tree import get_records, register_video_tree

register_all()

__all__ = [
    "ClassList",
    "dataset_root",
    "get_records",
    "load_class_list",
    "make_class_list",
    "register_all",
    "register_video_tree",
]
