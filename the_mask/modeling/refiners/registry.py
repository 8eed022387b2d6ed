"""Registry of refiners."""

from __future__ import annotations

from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import nn

REFINERS: Registry = Registry("REFINERS")
REFINERS.__doc__ = "Refiners: ``forward(images [B, 3, H, W], masks [B, 1, H, W])`` gives a dict with logits ``out``."


def build_refiner(cfg: CfgNode) -> nn.Module:
    """The refiner of ``MODEL.REFINER.NAME``, untrained.

    Raises:
        ValueError: no such refiner.
    """
    name = cfg.MODEL.REFINER.NAME
    if name not in REFINERS:
        raise ValueError(f"MODEL.REFINER.NAME {name!r}: known are {', '.join(key for key, _ in REFINERS)}")
    return REFINERS.get(name)(cfg)
