"""UperNetHead: UPerNet and a classifier, for any backbone with several levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn

from the_mask.modeling.pixel.context.types import MAIN, ClipFeatures, FrameFeatures, HeadOutput, PriorMap
from the_mask.modeling.pixel.heads.base import PixelHead, level_channels, level_stride, require_levels
from the_mask.modeling.pixel.layers import classifier
from the_mask.modeling.pixel.pyramid import UperNet


@SEM_SEG_HEADS_REGISTRY.register()
class UperNetHead(UperNet, PixelHead):
    """Levels -> logits at the finest level's stride.

    Keys are those of mmseg's UPerHead after its prefix: ``psp_modules``, ``bottleneck``, ``lateral_convs``,
    ``fpn_convs``, ``fpn_bottleneck``, ``conv_seg``.
    """

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[str],
        shapes: Sequence[ShapeSpec],
        channels: int,
        num_classes: int,
        norm: str,
        pool_sizes: Sequence[int],
        dropout: float = 0.1,
    ) -> None:
        """
        Args:
            levels: backbone levels, finest first, of shapes ``shapes``.
            channels: width of every convolution.
            num_classes: K.
            norm: as for Detectron2's ``get_norm``.
            pool_sizes: cells per side of the pyramid pooling.
            dropout: of whole channels, before the classifier.
        """
        super().__init__([level_channels(shape) for shape in shapes], channels, norm, pool_sizes)
        self.levels = tuple(levels)
        self.stride = level_stride(shapes[0])
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        options = cfg.MODEL.SEM_SEG_HEAD
        return {
            "levels": options.IN_FEATURES,
            "shapes": require_levels("MODEL.SEM_SEG_HEAD.IN_FEATURES", options.IN_FEATURES, input_shape),
            "channels": options.CONVS_DIM,
            "num_classes": options.NUM_CLASSES,
            "norm": options.NORM,
            "pool_sizes": options.POOL_SIZES,
            "dropout": options.DROPOUT,
        }

    def forward(
        self, features: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> HeadOutput:
        main = self.join([features[level] for level in self.levels])
        return HeadOutput(self.conv_seg(self.dropout(main)), features={MAIN: main})
