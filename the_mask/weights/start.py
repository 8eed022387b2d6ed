"""The config of a run that starts from a trained model, on a data set that was imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from the_mask.config import load_config
from the_mask.data.class_names import config_classes, same_classes
from the_mask.data.imported import imported_overrides
from the_mask.models import Card
from the_mask.weights.find import find_model

# Keys whose values are of the classes that they were written for.
PER_CLASS = ("MODEL.CLIP_SEGMENTOR.CLASS_WEIGHTS", "MODEL.KEYFRAME.CLASS_WEIGHTS", "TEST.REFINER.STUFF")


def start_config(
    config_file: str | Path = "",
    overrides: Sequence[str] = (),
    *,
    model: str = "",
    data: str | Path = "",
    allow_unsafe: bool = False,
    allow_remote: bool = False,
) -> CfgNode:
    """The config of a run: that of a file or of a trained model, with an imported data set in place of its own.

    For other classes than the model's own, values per class are reset, and rows of class layers are copied from classes
    of the same name (``MODEL.INIT_CLASSES_BY_NAME``). Overrides come last.

    Args:
        config_file: see :func:`the_mask.config.load_config`.
        overrides: flat list ``[KEY, VALUE, ...]``.
        model: in place of a config file, see :func:`the_mask.weights.find.find_model`; ``MODEL.WEIGHTS`` is its file.
        data: folder of ``the-mask import``.
        allow_unsafe, allow_remote: of the config file.

    Raises:
        ValueError: neither or both of a file and a model; see also the functions above.
        FileNotFoundError: see the functions above.
    """
    if bool(config_file) == bool(model):
        raise ValueError("expected a config (--config) or a trained model (--model), one of them")

    def load(words: Sequence[str]) -> tuple[CfgNode, Card | None]:
        if model:
            return find_model(model, words)
        return load_config(config_file, words, allow_unsafe, allow_remote), None

    words = [*(imported_overrides(data) if data else ()), *overrides]
    cfg, card = load(words)
    if not data and card is None:
        return cfg
    own = card.facts.get("classes") if card is not None else config_classes(load(())[0])
    new = config_classes(cfg, cfg.DATASETS.TRAIN)
    if not own or new is None or same_classes(new, own):
        return cfg
    reset = [word for key in PER_CLASS for word in (key, "()")]
    by_name = ["MODEL.INIT_CLASSES_BY_NAME", "True"] if card is not None else []
    return load([*reset, *by_name, *words])[0]
