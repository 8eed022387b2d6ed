"""Backbones by name."""

from __future__ import annotations

from ...config import CfgNode
from ...layers import ShapeSpec
from ...utils.registry import Registry
from .backbone import Backbone

BACKBONE_REGISTRY = Registry("BACKBONE")
BACKBONE_REGISTRY.__doc__ = "Backbones: called with a config and the ShapeSpec of the image, they return a Backbone."


def build_backbone(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> Backbone:
    """Build ``cfg.MODEL.BACKBONE.NAME``; the image has as many channels as ``PIXEL_MEAN`` unless a shape is given."""
    if input_shape is None:
        input_shape = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    backbone = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, input_shape)
    assert isinstance(backbone, Backbone)
    return backbone
