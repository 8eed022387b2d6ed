"""Build a config's model, in the memory layout that the config asks for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Protocol

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from the_mask.modeling.feature_cache import attach_cache


def build_segmentor(cfg: CfgNode) -> nn.Module:
    """Detectron2's ``build_model``, with ``MODEL.CHANNELS_LAST`` and ``MODEL.FROZEN_FEATURES`` on top.

    The layout affects only speed: results are equal up to rounding, and checkpoints are the same.

    Raises:
        ValueError: ``MODEL.DEVICE`` is no device of this machine.
    """
    problem = device_problem(cfg.MODEL.DEVICE)
    if problem:
        raise ValueError(problem)
    model: nn.Module = build_model(cfg)
    attach_cache(model, cfg)
    # Convolutions pass the layout of their weights on to their outputs, so converting the weights is enough.
    return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model


def device_problem(device: str) -> str:
    """Why ``MODEL.DEVICE`` cannot be used on this machine, or ""."""
    try:
        found = torch.device(device)
    except RuntimeError:
        return f"MODEL.DEVICE {device!r}: expected auto, cpu or cuda"
    if found.type != "cuda":
        return ""
    if not torch.cuda.is_available():
        return f"MODEL.DEVICE {device}: this machine has no usable GPU; set MODEL.DEVICE cpu"
    count = torch.cuda.device_count()
    if (found.index or 0) >= count:
        return f"MODEL.DEVICE {device}: this machine has {count} GPU(s), numbered from 0"
    return ""


class TrainedModel(Protocol):
    """Build the model of a config with its trained weights, in eval mode: :func:`the_mask.weights.trained`."""

    def __call__(self, cfg: CfgNode, *, weights: str = "", datasets: Sequence[str] | None = None) -> nn.Module: ...


# Who gives models their trained weights, by name: this room does not import those that are built on it.
PROVIDER = "the_mask.weights.trained"


def trained_model(cfg: CfgNode, *, weights: str = "", datasets: Sequence[str] | None = None) -> nn.Module:
    """A trained model that another model needs, such as a teacher; see :func:`the_mask.weights.trained`."""
    provider: TrainedModel = importlib.import_module(PROVIDER).trained
    return provider(cfg, weights=weights, datasets=datasets)
