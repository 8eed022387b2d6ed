"""FCNHead: convolutions and a classifier on one level; the main head of small models and every auxiliary head."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from the_mask.modeling.pixel.context.types import MAIN, ClipFeatures, FrameFeatures, HeadOutput, PriorMap
from the_mask.modeling.pixel.heads.base import PixelHead, level_channels, level_stride, require_levels
from the_mask.modeling.pixel.layers import ConvNorm, classifier


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
        channels: int,
        num_convs: int,
        num_classes: int,
        norm: str,
        dropout: float = 0.1,
    ) -> None:
        """
        Args:
            level: backbone level it reads, of shape ``shape``.
            channels: of every convolution.
            num_convs: at least 1.
            num_classes: K.
            norm: as for Detectron2's ``get_norm``.
            dropout: of whole channels, before the classifier.
        """
        super().__init__()
        if num_convs < 1:
            raise ValueError(f"MODEL.SEM_SEG_HEAD.NUM_CONVS {num_convs}: expected at least 1")
        self.level = level
        self.stride = level_stride(shape)
        widths = [level_channels(shape)] + [channels] * num_convs
        self.convs = nn.Sequential(*(ConvNorm(a, b, 3, norm) for a, b in itertools.pairwise(widths)))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        options = cfg.MODEL.SEM_SEG_HEAD
        shapes = require_levels("MODEL.SEM_SEG_HEAD.IN_FEATURES", options.IN_FEATURES, input_shape)
        return {
            "level": options.IN_FEATURES[-1],
            "shape": shapes[-1],
            "channels": options.CONVS_DIM,
            "num_convs": options.NUM_CONVS,
            "num_classes": options.NUM_CLASSES,
            "norm": options.NORM,
            "dropout": options.DROPOUT,
        }

    def forward(
        self, features: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> HeadOutput:
        main: Tensor = self.convs(features[self.level])
        return HeadOutput(self.conv_seg(self.dropout(main)), features={MAIN: main})


def build_aux_heads(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> nn.ModuleDict:
    """One FCN head of a single convolution per level of ``MODEL.AUX_HEADS``, by level."""
    require_levels("MODEL.AUX_HEADS", cfg.MODEL.AUX_HEADS or list(input_shape), input_shape)
    options = cfg.MODEL.SEM_SEG_HEAD
    return nn.ModuleDict(
        {
            level: FCNHead(
                level=level,
                shape=input_shape[level],
                channels=cfg.MODEL.CLIP_SEGMENTOR.AUX_CHANNELS,
                num_convs=1,
                num_classes=options.NUM_CLASSES,
                norm=options.NORM,
                dropout=options.DROPOUT,
            )
            for level in cfg.MODEL.AUX_HEADS
        }
    )
