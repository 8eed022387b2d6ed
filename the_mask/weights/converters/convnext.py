"""ConvNeXt: from the original layout, timm's and OpenMMLab's to timm's names below ``model.``."""

from __future__ import annotations

from the_mask.weights.converters.parts import Part
from the_mask.weights.converters.rules import Names, drop, move

NAMES = (
    Names(
        """
        model.stem.{0,1}.*
        model.stages.{0..3}.blocks.#.{conv_dw,norm,mlp.fc1,mlp.fc2}.*
        model.stages.{1..3}.downsample.{0,1}.*
        """
    ),
    Names("model.stages.{0..3}.blocks.#.gamma", optional=True),
    Names("norm{0..3}.*", optional=True),
)

_BLOCK = r"stages\.(\d)\.(\d+)\."
_OURS = r"model.stages.\1.blocks.\2."
_SHARED = (
    move(r"downsample_layers\.0\.([01])\.(weight|bias)", r"model.stem.\1.\2"),
    move(r"downsample_layers\.([1-3])\.([01])\.(weight|bias)", r"model.stages.\1.downsample.\2.\3"),
    move(rf"{_BLOCK}(gamma|norm\.weight|norm\.bias)", rf"{_OURS}\3"),
    move(r"norm([0-3])\.(weight|bias)", r"norm\1.\2"),
    drop(r"(norm|head|fc)\.(weight|bias)", "classifier"),
)

PARTS = (
    Part(
        "ConvNeXt, original layout",
        "convnext",
        (r"downsample_layers\.0\.0\.weight", r"stages\.0\.0\.dwconv\.weight"),
        (
            *_SHARED,
            move(rf"{_BLOCK}dwconv\.(weight|bias)", rf"{_OURS}conv_dw.\3"),
            move(rf"{_BLOCK}pwconv([12])\.(weight|bias)", rf"{_OURS}mlp.fc\3.\4"),
        ),
        NAMES,
        unlike=(r".*\.grn\..*",),
    ),
    Part(
        "ConvNeXt, OpenMMLab layout",
        "mmseg",
        (r"downsample_layers\.0\.0\.weight", r"stages\.0\.0\.depthwise_conv\.weight"),
        (
            *_SHARED,
            move(rf"{_BLOCK}depthwise_conv\.(weight|bias)", rf"{_OURS}conv_dw.\3"),
            # Pointwise convolutions may be stored as such or as linear layers.
            move(
                rf"{_BLOCK}pointwise_conv([12])\.(weight|bias)",
                rf"{_OURS}mlp.fc\3.\4",
                lambda x: x.flatten(1) if x.ndim > 1 else x,
            ),
        ),
        NAMES,
        unlike=(r".*\.grn\..*",),
    ),
    Part(
        "ConvNeXt, timm layout",
        "convnext",
        (r"stem\.0\.weight", r"stages\.0\.blocks\.0\.conv_dw\.weight"),
        (
            drop(r"(head\..*|norm_pre\..*)", "classifier"),
            move(r"(stem|stages)\.(.*)", r"model.\1.\2"),
            move(r"norm([0-3])\.(weight|bias)", r"norm\1.\2"),
        ),
        NAMES,
        unlike=(r".*\.grn\..*",),
    ),
    Part("ConvNeXt", "native", (r"model\.stages\.0\.blocks\.0\.conv_dw\.weight",), (), NAMES, (r".*\.grn\..*",)),
)
