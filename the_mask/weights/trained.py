"""Builds the trained model of a config; used by every tool, stream, teacher and study."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from torch import nn

import the_mask.modeling  # noqa: F401  fills the registries
from the_mask.modeling.build import build_segmentor
from the_mask.modeling.refiners import build_refiner
from the_mask.weights.class_sets import ClassSets
from the_mask.weights.loading import load_weights

logger = logging.getLogger(__name__)


def trained(
    cfg: CfgNode,
    *,
    weights: str | Path = "",
    datasets: Sequence[str] | None = None,
    trust_pickle: bool = False,
) -> nn.Module:
    """Build the model of a config and fill it completely from a weights file.

    Args:
        cfg: a full config.
        weights: the file; "" takes ``MODEL.WEIGHTS``.
        datasets: names of the data sets that the model will be used on; their classes must be those of the file, in the
            same order. None takes ``DATASETS.TEST``. A file without class names is assumed to have those of
            ``MODEL.WEIGHTS_CLASSES``, else of ``DATASETS.TRAIN``. Data sets that are not registered, or have another
            number of classes, are not compared.
        trust_pickle: see :func:`load_weights`.

    Returns:
        The model on ``MODEL.DEVICE``, in eval mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no weights given, or a file that is unreadable, untrusted, for another model, or for other classes.
    """
    path = weights or cfg.MODEL.WEIGHTS
    if not path:
        raise ValueError("MODEL.WEIGHTS is empty: trained weights are needed")
    model = build_segmentor(cfg)
    classes = ClassSets.of_use(cfg, cfg.DATASETS.TEST if datasets is None else datasets)
    load_weights(model, path, trust_pickle=trust_pickle, strict=True, classes=classes)
    return model.eval()


def trained_refiner(cfg: CfgNode, trust_pickle: bool = False) -> Any:
    """Build the refiner of ``MODEL.REFINER`` with the weights of ``TEST.REFINER.WEIGHTS``, in eval mode.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_weights`.
    """
    network = build_refiner(cfg)
    load_weights(network, cfg.TEST.REFINER.WEIGHTS, trust_pickle=trust_pickle, strict=True)
    return network.to(cfg.MODEL.DEVICE).eval()
