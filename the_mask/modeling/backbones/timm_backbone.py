"""Registration of the backbones that need timm, which is imported only when a model asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

from the_mask.modeling.backbones.common import PyramidBackbone
from the_mask.modeling.backbones.efficientnet_lite import EfficientNetLite, is_lite

if TYPE_CHECKING:
    from the_mask.modeling.backbones.plain_vit import PlainViT


def _shared(options: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
    """Arguments that all models of timm have."""
    return {
        "pretrained": options.PRETRAINED,
        "weights": options.WEIGHTS,
        "in_channels": input_shape.channels or 3,
        "drop_path": options.DROP_PATH,
        "recompute": options.CHECKPOINT,
    }


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PyramidBackbone:
    """timm model from ``MODEL.TIMM`` and ``MODEL.BACKBONE.FREEZE_AT``."""
    options = cfg.MODEL.TIMM
    others = any(value for key, value in options.items() if key != "NAME") or cfg.MODEL.BACKBONE.FREEZE_AT
    if is_lite(options.NAME) and not others:
        return EfficientNetLite(options.NAME, input_shape.channels or 3)
    # timm imports torchvision, and that torch.compile; together they add more than a second to every start.
    from the_mask.modeling.backbones.timm_adapter import TimmBackbone

    return TimmBackbone(
        options.NAME,
        **_shared(options, input_shape),
        out_indices=options.OUT_INDICES,
        out_norm=options.OUT_NORM,
        norm=options.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


@BACKBONE_REGISTRY.register()
def build_beit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PyramidBackbone:
    """BEiT with a pyramid from ``MODEL.BEIT`` and ``MODEL.BACKBONE.FREEZE_AT``."""
    from the_mask.modeling.backbones.beit import BeitPyramid

    options = cfg.MODEL.BEIT
    return BeitPyramid(
        options.NAME,
        image_size=options.IMG_SIZE,
        **_shared(options, input_shape),
        out_indices=options.OUT_INDICES,
        norm=options.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


@BACKBONE_REGISTRY.register()
def build_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PlainViT:
    """Plain vision transformer from ``MODEL.VIT``; ``MODEL.BACKBONE.FREEZE_AT`` above 0 freezes all of it."""
    from the_mask.modeling.backbones.plain_vit import PlainViT

    options = cfg.MODEL.VIT
    backbone = PlainViT(
        options.NAME,
        image_size=options.IMG_SIZE,
        patch_size=options.PATCH_SIZE,
        **_shared(options, input_shape),
        width=options.WIDTH,
        depth=options.DEPTH,
        heads=options.HEADS,
        levels=cfg.MODEL.ENCODER.FROZEN.LEVELS if cfg.MODEL.ENCODER.FROZEN.ENABLED else (),
    )
    return backbone.requires_grad_(cfg.MODEL.BACKBONE.FREEZE_AT == 0)
