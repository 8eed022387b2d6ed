"""Folders that ``the-mask import`` has written, as data sets of a config."""

from __future__ import annotations

from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from the_mask.data.plugins import import_dataset_modules
from the_mask.data.registry import registered_tree

MODULE = "dataset.py"


def imported_overrides(folder: str | Path) -> list[str]:
    """Config keys for training and testing on an imported folder; runs its ``dataset.py``.

    Args:
        folder: with a ``dataset.py`` that registers trees at this folder: ``train``, and ``val`` if there is one.

    Returns:
        ``[KEY, VALUE, ...]``: the data sets, the number of classes and the ignore label.

    Raises:
        FileNotFoundError: no such folder, or no ``dataset.py`` in it.
        ValueError: the module fails, or registers no training set there.
    """
    folder = Path(folder)
    module = folder / MODULE
    if not module.is_file():
        what = f"holds no {MODULE}, so the-mask import has not written it" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(f"data set {folder} {what}; name other data sets in DATASETS.TRAIN and DATASETS.TEST")
    import_dataset_modules([str(module)])
    trees = [tree for name in DatasetCatalog.list() if (tree := registered_tree(name)) is not None]
    here = {tree.split: tree.name for tree in trees if tree.root.resolve() == folder.resolve()}
    if "train" not in here:
        raise ValueError(f"{module} registers no training set at its own folder; it registers {here or 'nothing'}")
    metadata = MetadataCatalog.get(here["train"])
    values = {
        "DATASETS.IMPORT": [str(module)],
        "DATASETS.TRAIN": (here["train"],),
        "DATASETS.TEST": tuple(here[split] for split in ("val",) if split in here),
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": len(metadata.stuff_classes),
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": metadata.ignore_label,
    }
    return [word for key, value in values.items() for word in (key, repr(value))]
