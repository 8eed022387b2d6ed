"""The classes of a config's model, and the comparison of class lists.

Names are compared without regard to case, and with ``_`` and ``-`` as spaces, so that "traffic_light" and "Traffic
light" are one class. The order counts: index = train id = channel of the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from the_mask.data.classes import as_label_table, as_names
from the_mask.data.plugins import import_dataset_modules
from the_mask.data.registry import require_known


def plain_name(name: str) -> str:
    """A class name in the form that is compared: lower case, single spaces."""
    return " ".join(re.split(r"[\s_-]+", name.strip().casefold()))


def same_classes(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether two lists have the same classes in the same order."""
    return [plain_name(name) for name in first] == [plain_name(name) for name in second]


def describe_difference(ours: Sequence[str], theirs: Sequence[str], who: str = "the model") -> str:
    """Describe how two class lists differ. ``who`` is the owner of ``ours``, named in the text."""
    if len(ours) != len(theirs):
        return f"{len(theirs)} classes, {who} has {len(ours)}"
    pairs = enumerate(zip(ours, theirs, strict=True))
    different = [(i, a, b) for i, (a, b) in pairs if plain_name(a) != plain_name(b)]
    shown = ", ".join(f"{i} is {b!r}, in {who} {a!r}" for i, a, b in different[:3])
    more = ", ..." if len(different) > 3 else ""
    if sorted(map(plain_name, ours)) == sorted(map(plain_name, theirs)):
        return f"the same {len(ours)} classes in another order: {shown}{more}"
    return f"{len(different)} of {len(ours)} classes have another name: {shown}{more}"


def config_classes(cfg: CfgNode, datasets: Sequence[str] | None = None) -> tuple[str, ...] | None:
    """Class names of a config's model, index = train id; None if unknown. See :func:`classes_dataset`."""
    name = classes_dataset(cfg, datasets)
    return None if name is None else tuple(MetadataCatalog.get(name).stuff_classes)


def classes_dataset(cfg: CfgNode, datasets: Sequence[str] | None = None) -> str | None:
    """Name of a data set with the classes of a config's model. All its data sets must have the same classes.

    Data sets that are not registered, or whose number of classes is not ``NUM_CLASSES``, are left out here; training on
    such a data set is refused (:func:`check_classes`). With ``MODEL.CHECK_CLASS_NAMES`` False the names of the first
    data set are used; training sets are still compared with each other, because a model cannot learn two orders.

    Args:
        cfg: a config; ``DATASETS.IMPORT`` is imported.
        datasets: the data sets to look at; None: ``DATASETS.TRAIN`` and ``DATASETS.TEST``.

    Returns:
        the first of these data sets, or None.

    Raises:
        ValueError: two data sets have different classes, or the same classes in another order.
    """
    import_dataset_modules(cfg.DATASETS.IMPORT)
    known, trained_on = set(DatasetCatalog.list()), set(cfg.DATASETS.TRAIN)
    found: tuple[str, Sequence[str]] | None = None
    for name in [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST] if datasets is None else datasets:
        classes = MetadataCatalog.get(name).get("stuff_classes") if name in known else None
        if classes is None or len(classes) != cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
            continue
        if found is None:
            found = name, classes
        elif (cfg.MODEL.CHECK_CLASS_NAMES or {found[0], name} <= trained_on) and not same_classes(found[1], classes):
            raise ValueError(_differ(found[0], found[1], name, classes))
    return None if found is None else found[0]


def check_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    """Raise ValueError unless all data sets have the same classes, as many as the head has, and its ignore label.

    ``cfg.DATASETS.IMPORT`` is imported first.
    """
    import_dataset_modules(cfg.DATASETS.IMPORT)
    if not names:
        raise ValueError("no data set given: set DATASETS.TRAIN (and DATASETS.TEST), e.g. ('moving_shapes_train',)")
    first: Sequence[str] | None = None
    for name in names:
        require_known(name)
        metadata = MetadataCatalog.get(name)
        classes = metadata.get("stuff_classes")
        if classes is None or metadata.get("label_table") is None:
            raise ValueError(
                f"data set {name} has no stuff_classes and label_table; use register_video_tree or register_image_tree"
            )
        classes, _ = as_names(classes), as_label_table(metadata.label_table)
        if first is None:
            first = classes
        if len(classes) != len(first):
            raise ValueError(_differ(names[0], first, name, classes))
        if metadata.ignore_label != cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE:
            raise ValueError(
                f"data set {name} ignores label {metadata.ignore_label}, but MODEL.SEM_SEG_HEAD.IGNORE_VALUE is "
                f"{cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE}"
            )
        if len(classes) != cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
            raise ValueError(
                f"data set {name} has {len(classes)} classes, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is "
                f"{cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES}"
            )
    config_classes(cfg, names)


def _differ(first: str, ours: Sequence[str], second: str, theirs: Sequence[str]) -> str:
    return (
        f"data sets {first} ({len(ours)} classes) and {second} ({len(theirs)} classes) have different class lists: "
        f"{describe_difference(ours, theirs, first)}. One model needs the same classes in the same order "
        "(MODEL.CHECK_CLASS_NAMES False compares only their number, but for training sets with each other)"
    )
