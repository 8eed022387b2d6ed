"""Semantic segmentation heads by name."""

from __future__ import annotations

from torch import nn

from ...config import CfgNode
from ...layers import ShapeSpec
from ...utils.registry import Registry

SEM_SEG_HEADS_REGISTRY = Registry("SEM_SEG_HEADS")
SEM_SEG_HEADS_REGISTRY.__doc__ = "Heads: called with a config and the shapes of the features, they return an nn.Module."


def build_sem_seg_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build ``cfg.MODEL.SEM_SEG_HEAD.NAME`` for features of ``input_shape``."""
    return SEM_SEG_HEADS_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.NAME)(cfg, input_shape)
