"""FCNHead: convolutions and a classifier on one level; the main head of small models and every auxiliary head."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from the_mask.config.keys.context import PixelHeadOptions
from the_mask.modeling.pixel.context.types import MAIN, ClipFeatures, FrameFeatures, HeadOutput, PriorMap
from the_mask.modeling.pixel.heads.base import PixelHead, level_channels, level_stride, require_levels
from the_mask.modeling.pixel.layers import ConvNorm


@SEM_SEG_HEADS_REGISTRY.register()
class FCNHead(PixelHead):
    """3x3 convolutions, dropout, classifier: level [B, C, h, w] -> logits [B, K, h, w].

    Keys are those of mmseg's head of this name: ``convs.<i>.{conv,bn}``, ``conv_seg``.
    """

    @configurable
    def __init__(
        self,
        *,
        level: str,
        shape: ShapeSpec,
        options: PixelHeadOptions = PixelHeadOptions(),
    ) -> None:
        """It reads backbone level ``level``, of shape ``shape``."""
        super().__init__()
        self.level = level
        self.stride = level_stride(shape)
        widths = [level_channels(shape)] + [options.convs_dim] * options.num_convs
        self.convs = nn.Sequential(*(ConvNorm(a, b, 3, options.norm) for a, b in itertools.pairwise(widths)))
        self.add_classifier(options)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        options = PixelHeadOptions.from_config(cfg)
        shapes = require_levels("MODEL.SEM_SEG_HEAD.IN_FEATURES", options.in_features, input_shape)
        return {"level": options.in_features[-1], "shape": shapes[-1], "options": options}

    def forward(
        self, features: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> HeadOutput:
        main: Tensor = self.convs(features[self.level])
        return HeadOutput(self.classify(main), features={MAIN: main})


def build_aux_heads(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> nn.ModuleDict:
    """One FCN head of a single convolution per level of ``MODEL.AUX_HEADS``, by level."""
    require_levels("MODEL.AUX_HEADS", cfg.MODEL.AUX_HEADS or list(input_shape), input_shape)
    head = PixelHeadOptions.from_config(cfg)
    options = replace(head, convs_dim=cfg.MODEL.CLIP_SEGMENTOR.AUX_CHANNELS, num_convs=1)
    return nn.ModuleDict(
        {level: FCNHead(level=level, shape=input_shape[level], options=options) for level in cfg.MODEL.AUX_HEADS}
    )
