"""Weights of another class set: recognised by the classes' names, and class layers filled by name.

A class layer has one row per class, in mask decoders one more for "no object". Names are compared without regard to
case, and with ``_`` and ``-`` as spaces, so that "traffic_light" and "Traffic light" are one class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import Tensor

from the_mask.data import get_class_names, import_dataset_modules

# Layers and class memories whose first axis counts classes; a file for another class list loses just these.
CLASS_LAYERS = re.compile(r"(^|\.)(\w*(class_embed|conv_seg)\w*\.(weight|bias)|empty_weight|memory\.(rows|seen))$")
# Key of a checkpoint under which its classes are kept.
STORED = "class_names"


@dataclass(frozen=True)
class ClassSets:
    """What is known about the classes when weights are loaded.

    Attributes:
        model: names of the model's classes, index = train id; None when unknown.
        file: names of the file's classes, instead of those stored in it; None takes the stored ones.
        by_name: fill class layers for another class set from same-named classes.
        check: compare names, not only numbers, of classes.
    """

    model: tuple[str, ...] | None = None
    file: tuple[str, ...] | None = None
    by_name: bool = False
    check: bool = True

    @classmethod
    def from_config(cls, cfg: CfgNode, evaluating: bool = False) -> ClassSets:
        """Those of a run: the first known data set of the config, ``MODEL.WEIGHTS_CLASSES``.

        Raises:
            ValueError: ``MODEL.WEIGHTS_CLASSES`` is no registered data set.
        """
        names = model_classes(cfg, evaluating)
        given = tuple(get_class_names(cfg.MODEL.WEIGHTS_CLASSES)) if cfg.MODEL.WEIGHTS_CLASSES else None
        return cls(names, given, cfg.MODEL.INIT_CLASSES_BY_NAME, cfg.MODEL.CHECK_CLASS_NAMES)


def model_classes(cfg: CfgNode, evaluating: bool = False) -> tuple[str, ...] | None:
    """Class names of a config's data sets (the training sets first, unless ``evaluating``), None when unknown."""
    import_dataset_modules(cfg.DATASETS.IMPORT)
    train, test = list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)
    known = DatasetCatalog.list()
    for name in test + train if evaluating else train + test:
        classes = MetadataCatalog.get(name).get("stuff_classes") if name in known else None
        if classes is not None and len(classes) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
            return tuple(classes)
    return None


def stored_classes(content: Any) -> tuple[str, ...] | None:
    """Class names that a checkpoint of this project holds, or None."""
    names = content.get(STORED) if isinstance(content, Mapping) else None
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) and names else None


def plain_name(name: str) -> str:
    """Name as it is compared: lower case, single spaces."""
    return " ".join(re.split(r"[\s_-]+", name.strip().casefold()))


def same_classes(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """The same classes in the same order."""
    return [plain_name(name) for name in ours] == [plain_name(name) for name in theirs]


def matching_rows(ours: Sequence[str], theirs: Sequence[str]) -> dict[int, int]:
    """Class of the model -> the file's class of the same name; classes whose name is not unique are left out."""

    def unique(names: Sequence[str]) -> dict[str, int]:
        plain = [plain_name(name) for name in names]
        return {name: index for index, name in enumerate(plain) if plain.count(name) == 1}

    known = unique(theirs)
    return {index: known[name] for name, index in unique(ours).items() if name in known}


def describe_difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """How two class lists differ, in a few words."""
    if len(ours) != len(theirs):
        return f"{len(theirs)} classes, the model has {len(ours)}"
    different = [(i, a, b) for i, (a, b) in enumerate(zip(ours, theirs)) if plain_name(a) != plain_name(b)]
    shown = ", ".join(f"{i} is {b!r}, in the model {a!r}" for i, a, b in different[:3])
    return f"{len(different)} of {len(ours)} classes have another name: {shown}{', ...' if len(different) > 3 else ''}"


def transfer_rows(
    state: Mapping[str, Tensor], start: Mapping[str, Tensor], ours: Sequence[str], theirs: Sequence[str]
) -> dict[str, Tensor]:
    """Class layers of a model with the rows of same-named classes taken from a file; other rows stay as they start.

    Args:
        state: the file's tensors under the model's names.
        start: the model's state dict.
        ours, theirs: class names of the model and of the file.

    Returns:
        New tensors of the layers that could be filled. The "no object" row is taken over where both have one. Class
        weights of a loss are not among them.

    Raises:
        ValueError: a class layer of the file has neither as many rows as names were given, nor one more.
    """
    rows = matching_rows(ours, theirs)
    filled = {}
    for name, value in start.items():
        if CLASS_LAYERS.search(name) is None or name.endswith("empty_weight") or name not in state:
            continue
        source = state[name]
        if source.shape[1:] != value.shape[1:]:
            continue
        extra = len(source) - len(theirs)
        if extra not in (0, 1):
            raise ValueError(
                f"{name} has {len(source)} rows in the file, which does not fit the {len(theirs)} classes it is said "
                "to have; see MODEL.WEIGHTS_CLASSES"
            )
        if len(value) - len(ours) != extra:
            continue
        new = value.detach().clone()
        for mine, row in rows.items():
            new[mine] = source[row].to(new)
        if extra:
            new[-1] = source[-1].to(new)
        filled[name] = new
    return filled
