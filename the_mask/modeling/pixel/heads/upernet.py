"""UperNetHead: UPerNet and a classifier, for any backbone with several levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY

from the_mask.config.keys.context import PixelHeadOptions
from the_mask.modeling.pixel.context.types import MAIN, ClipFeatures, FrameFeatures, HeadOutput, PriorMap
from the_mask.modeling.pixel.heads.base import PixelHead, level_channels, level_stride, require_levels
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
        options: PixelHeadOptions = PixelHeadOptions(),
    ) -> None:
        """``levels`` of the backbone, finest first, are of shapes ``shapes``."""
        channels = [level_channels(shape) for shape in shapes]
        super().__init__(channels, options.convs_dim, options.norm, options.pool_sizes)
        self.levels = tuple(levels)
        self.stride = level_stride(shapes[0])
        self.add_classifier(options)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        options = PixelHeadOptions.from_config(cfg)
        shapes = require_levels("MODEL.SEM_SEG_HEAD.IN_FEATURES", options.in_features, input_shape)
        return {"levels": options.in_features, "shapes": shapes, "options": options}

    def forward(
        self, features: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> HeadOutput:
        main = self.join([features[level] for level in self.levels])
        return HeadOutput(self.classify(main), features={MAIN: main})
