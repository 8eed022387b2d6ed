"""ContextHead: an expression of context blocks, then a classifier. Axes: B clips, K classes, C channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from the_mask.config.keys.context import PixelHeadOptions
from the_mask.modeling.pixel.context.registry import ContextBlock
from the_mask.modeling.pixel.context.tree import BlockTree
from the_mask.modeling.pixel.context.types import MAIN, ClipFeatures, FrameFeatures, HeadOutput, PriorMap
from the_mask.modeling.pixel.heads.base import PixelHead, level_stride, require_levels
from the_mask.modeling.pixel.layers import ConvNorm


@SEM_SEG_HEADS_REGISTRY.register()
class ContextHead(PixelHead):
    """Blocks of ``MODEL.CONTEXT.EXPRESSION`` (``blocks.<name>``), a 3x3 convolution after ``&``, and a classifier."""

    @configurable
    def __init__(self, *, tree: BlockTree, options: PixelHeadOptions = PixelHeadOptions()) -> None:
        """``CONVS_DIM`` and ``NORM`` are of the convolution that joins the operands of an outermost ``&``."""
        super().__init__()
        assert tree.out_shape.channels is not None
        self.tree = tree
        self.blocks = tree.blocks
        self.fusion = (
            ConvNorm(tree.out_shape.channels, options.convs_dim, 3, options.norm) if tree.is_concat else nn.Identity()
        )
        self.add_classifier(options, 0 if tree.is_concat else tree.out_shape.channels)
        for name, block in zip(tree.blocks, tree.instances(), strict=True):
            if block.classifier_channels not in (0, self.conv_seg.in_channels):
                raise ValueError(
                    f"block {name} classifies features of {block.classifier_channels} channels with the head's "
                    f"classifier, which reads {self.conv_seg.in_channels}: make MODEL.SEM_SEG_HEAD.CONVS_DIM equal"
                )
        self.stride = level_stride(tree.out_shape)
        self.memory_length = tree.memory_length
        self.memory_levels = tree.memory_levels

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        options = PixelHeadOptions.from_config(cfg)
        require_levels("MODEL.SEM_SEG_HEAD.IN_FEATURES", options.in_features, input_shape)
        levels = {name: input_shape[name] for name in options.in_features}
        tree = BlockTree(
            cfg.MODEL.CONTEXT.EXPRESSION, cfg, levels, options.in_features[-1], cfg.MODEL.CLIP_SEGMENTOR.FOLD_TIME
        )
        return {"tree": tree, "options": options}

    @property
    def uses_prior(self) -> bool:
        """Whether a block reads the prior."""
        return self.tree.uses_prior

    def stateful_blocks(self) -> Iterable[ContextBlock]:
        """Blocks that are also updated outside the optimiser."""
        return (block for block in self.tree.instances() if block.stateful)

    def extra_losses(self, iteration: int) -> dict[str, Tensor]:
        """Additional losses of the stateful blocks."""
        losses: dict[str, Tensor] = {}
        for block in self.stateful_blocks():
            losses.update(block.extra_losses(self.conv_seg, iteration))
        return losses

    def forward(
        self, features: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> HeadOutput:
        output = self.tree.run(features, memory, prior)
        main = self.fusion(output.feature)
        return HeadOutput(self.classify(main), output.aux_logits, output.aux_weights, {MAIN: main})
