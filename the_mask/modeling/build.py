"""A config's model, laid out in memory as the config asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from the_mask.modeling.feature_cache import attach_cache


def build_segmentor(cfg: CfgNode) -> nn.Module:
    """Detectron2's ``build_model``, with ``MODEL.CHANNELS_LAST`` and ``MODEL.FROZEN_FEATURES`` on top.

    Values do not depend on the layout beyond rounding, and neither do checkpoints; only speed does.
    """
    model: nn.Module = build_model(cfg)
    attach_cache(model, cfg)
    # Convolutions pass the layout of their weights on to their outputs, so converting the weights is enough.
    return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model


class TrainedModel(Protocol):
    """Build the model of a config with its trained weights, in eval mode: :func:`the_mask.weights.trained`."""

    def __call__(self, cfg: CfgNode, *, weights: str = "", datasets: Sequence[str] | None = None) -> nn.Module: ...


_trained_model: list[TrainedModel] = []


def provide_trained_model(function: TrainedModel) -> None:
    """Say how models get their trained weights; called by the room above this one that reads files of weights."""
    _trained_model[:] = [function]


def trained_model(cfg: CfgNode, *, weights: str = "", datasets: Sequence[str] | None = None) -> nn.Module:
    """A trained model that another model needs, such as a teacher; see :func:`the_mask.weights.trained`.

    Raises:
        RuntimeError: ``the_mask.weights`` has not been imported.
    """
    if not _trained_model:
        raise RuntimeError("a trained model is needed, but nothing reads weights: import the_mask.weights first")
    return _trained_model[0](cfg, weights=weights, datasets=datasets)
