"""Weights for other classes: recognised by the class names; class layers can be filled by name.

A class layer has one row per class, and in mask decoders one more for "no object"; the first layer of GSVNet's guide
has a column per class. See
:mod:`the_mask.data.class_names` for the comparison of names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from the_mask.data import get_class_names
from the_mask.data.class_names import config_classes, plain_name
from the_mask.data.files import parse_json

# Layers and class memories with an axis of classes; only these are not loaded from a file with other classes.
CLASS_LAYERS = re.compile(
    r"(^|\.)(\w*(class_embed|class_head|conv_seg)\w*\.(weight|bias)|empty_weight|memory\.(rows|seen)"
    r"|logits\.conv\.(weight|bias)|intra_net\.6\.(weight|bias)|guide_conv\.0\.weight)$"
)
# The class layer whose second axis is the class.
CLASS_COLUMNS = "guide_conv.0.weight"
# Key of a checkpoint for its class names.
STORED = "class_names"


@dataclass(frozen=True)
class ClassSets:
    """Class names that are known when weights are loaded.

    Attributes:
        model: names of the model's classes, index = train id; None when unknown.
        file: names of the file's classes, instead of those stored in it; None takes the stored ones.
        by_name: if the classes differ, fill class layers from same-named classes.
        check: compare the names of classes, not only their number.
        assumed: assumed to be the file's classes if neither it nor ``file`` names any.
    """

    model: tuple[str, ...] | None = None
    file: tuple[str, ...] | None = None
    by_name: bool = False
    check: bool = True
    assumed: tuple[str, ...] | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> ClassSets:
        """For a training: from the data sets of the config and ``MODEL.WEIGHTS_CLASSES``.

        Raises:
            ValueError: data sets with different classes, or ``MODEL.WEIGHTS_CLASSES`` is not a registered data set.
        """
        node = cfg.MODEL
        return cls(config_classes(cfg), _given(cfg), node.INIT_CLASSES_BY_NAME, node.CHECK_CLASS_NAMES)

    @classmethod
    def of_use(cls, cfg: CfgNode, datasets: Sequence[str]) -> ClassSets:
        """For using trained weights on data sets.

        A file without class names is assumed to have those of ``DATASETS.TRAIN``, in their order.

        Raises:
            ValueError: as :meth:`from_config`.
        """
        trained_on = config_classes(cfg, cfg.DATASETS.TRAIN)
        model = config_classes(cfg, datasets) or trained_on
        return cls(model, _given(cfg), check=cfg.MODEL.CHECK_CLASS_NAMES, assumed=trained_on)


def _given(cfg: CfgNode) -> tuple[str, ...] | None:
    return tuple(get_class_names(cfg.MODEL.WEIGHTS_CLASSES)) if cfg.MODEL.WEIGHTS_CLASSES else None


def stored_classes(content: Any) -> tuple[str, ...] | None:
    """Class names stored in a checkpoint of this project, or None."""
    names = content.get(STORED) if isinstance(content, Mapping) else None
    # In safetensors, metadata are strings.
    if isinstance(names, str):
        try:
            names = parse_json(names)
        except ValueError:
            names = None
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) and names else None


def matching_rows(ours: Sequence[str], theirs: Sequence[str]) -> dict[int, int]:
    """The file's class of the same name, by class of the model; ambiguous names are left out."""

    def unique(names: Sequence[str]) -> dict[str, int]:
        plain = [plain_name(name) for name in names]
        return {name: index for index, name in enumerate(plain) if plain.count(name) == 1}

    known = unique(theirs)
    return {index: known[name] for name, index in unique(ours).items() if name in known}


def transfer_rows(
    state: Mapping[str, Tensor], start: Mapping[str, Tensor], ours: Sequence[str], theirs: Sequence[str]
) -> dict[str, Tensor]:
    """Fill a model's class layers with the rows of same-named classes of a file; other rows keep their initial values.

    Args:
        state: the file's tensors under the model's names.
        start: the model's state dict.
        ours, theirs: class names of the model and of the file.

    Returns:
        New tensors of the layers that could be filled. The "no object" row is copied if both have one. Class weights of
        a loss and layers with a column per class are not filled.

    Raises:
        ValueError: the number of rows in a class layer of the file is neither the number of names nor one more.
    """
    rows = matching_rows(ours, theirs)
    filled = {}
    for name, value in start.items():
        if CLASS_LAYERS.search(name) is None or name.endswith(("empty_weight", CLASS_COLUMNS)) or name not in state:
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
