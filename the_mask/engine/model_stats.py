"""Size and cost of a config's model without its weights: parameters, multiply-adds, estimated training memory.

Everything runs on the meta device, where tensors have shapes but no numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import the_mask.modeling  # noqa: F401  (fills the registries)
from the_mask.modeling.macs import count_macs
from the_mask.modeling.mask.mask_classifier import MaskClassifier
from the_mask.modeling.propagation.propagated import PropagatedSegmentor

# AdamW in float32: weight, gradient and two moments; a frozen parameter is only a weight.
BYTES_TRAINED, BYTES_FROZEN = 16, 4


@dataclass(frozen=True)
class ModelStats:
    """The result of :func:`model_stats`.

    Attributes:
        parameters: parameters of the whole model, including auxiliary heads.
        backbone: parameters of its backbone; 0 if it has no separate one.
        frames: number of frames of a training clip.
        size: (height, width) of a training crop, pixels.
        macs: multiply-adds of one clip of that size; None if they depend on the input.
        activations: bytes kept for the backward pass of one such clip, float32; None in the same case.
        state: bytes of weights, gradients and AdamW's moments, float32.
    """

    parameters: int
    backbone: int
    frames: int
    size: tuple[int, int]
    macs: int | None
    activations: int | None
    state: int

    @property
    def training_memory(self) -> int | None:
        """Minimum number of bytes for training with one clip per process."""
        return None if self.activations is None else self.state + self.activations


def model_stats(cfg: CfgNode, forward: bool = True) -> ModelStats:
    """Count the model of a config at its training size, one clip whose every frame is predicted.

    Not counted: losses, matching, temporary buffers, the data loader, and fragmentation.

    Args:
        cfg: a full config.
        forward: False counts only parameters.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    # Weights do not matter here, and may come from an optional package.
    cfg.MODEL.TIMM.WEIGHTS = cfg.MODEL.BEIT.WEIGHTS = ""
    with torch.device("meta"):
        model: Any = build_model(cfg)
    # Eval mode, because stochastic depth skips whole branches and batch statistics need several images.
    model.eval()
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    state = BYTES_TRAINED * trained + BYTES_FROZEN * (total - trained)
    backbone = getattr(model, "backbone", None)
    own = 0 if backbone is None else sum(p.numel() for p in backbone.parameters())
    frames = len({0, *cfg.INPUT.CLIP.DILATIONS})
    height, width = cfg.INPUT.CROP.SIZE
    divisor = model.size_divisibility
    padded = [-(-side // divisor) * divisor for side in (height, width)]
    images = torch.empty(frames, 3, *padded, device="meta")
    if not forward or isinstance(model, PropagatedSegmentor):
        # The work of a PropagatedSegmentor depends on its keyframes.
        return ModelStats(total, own, frames, (height, width), None, None, state)
    activations = _run(lambda: _activations(model, images, frames))
    macs = _run(lambda: count_macs(model, lambda: _forward(model, images, frames, training=False)))
    return ModelStats(
        parameters=total,
        backbone=own,
        frames=frames,
        size=(height, width),
        macs=macs,
        activations=activations or None,
        state=state,
    )


class YesMode(TorchDispatchMode):
    """On the meta device, answers a model's checks with yes: all scores are finite, all memory frames are valid."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool and args[0].is_meta:
            return True
        return function(*args, **(kwargs or {}))


def _run(measure: Callable[[], int]) -> int | None:
    """Run a measurement; None for a model whose computation depends on values."""
    try:
        return measure()
    except (RuntimeError, NotImplementedError) as error:
        # The second is the error of torch.autocast on the meta device.
        if "meta" in str(error).lower() or "unsupported scalarType" in str(error):
            return None
        raise


def _activations(model: Any, images: Tensor, frames: int) -> int:
    """Bytes of the tensors that autograd keeps, each storage once, without parameters and buffers."""
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            # Keep the tensor, so that the address of its storage is not reused.
            kept[storage._cdata] = (storage.nbytes(), x.detach())
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = _forward(model, images, frames, training=True)
    size = sum(nbytes for nbytes, _ in kept.values())
    del outputs
    return size


def _forward(model: Any, images: Tensor, frames: int, training: bool) -> Any:
    """The network's outputs for one clip; in training, also the predictions of intermediate layers."""
    if isinstance(model, MaskClassifier):
        return model.sem_seg_head(model.backbone(images), frames, training)
    with YesMode():
        return list(model.group_scores(images, frames))


@dataclass(frozen=True)
class Published:
    """A published number of parameters, from a paper or its released code.

    Attributes:
        pattern: pattern of config names that it applies to, e.g. ``vspw/mask2former_r50``.
        part: "model" or "backbone".
        millions: number of parameters in millions.
        source: where it was published.
        note: why ours differs, if by more than 1 %.
    """

    pattern: str
    part: str
    millions: float
    source: str
    note: str = ""

    def found(self, stats: ModelStats) -> float:
        """Our number, in millions."""
        return (stats.parameters if self.part == "model" else stats.backbone) / 1e6

    def difference(self, stats: ModelStats) -> float:
        """Relative difference: our number / published number - 1."""
        return self.found(stats) / self.millions - 1


def _the_mask() -> list[Published]:
    totals = {"b0": (22.99, 26.18), "b1": (32.96, 36.15), "b2": (44.00, 47.19), "b5": (101.25, 104.44)}
    return [
        Published(f"vspw/the_mask_mit_{size}_{kind}", "model", number, "THE-Mask, released code")
        for size, numbers in totals.items()
        for kind, number in zip(("1f", "video"), numbers, strict=True)
    ]


def _backbones() -> list[Published]:
    mit = {"b0": 3.319392, "b1": 13.151424, "b2": 24.196288, "b3": 44.072128, "b4": 60.842688, "b5": 81.443008}
    intern = {"t": 28.76952, "s": 48.50256, "b": 94.90992, "l": 218.95237, "xl": 328.971228, "h": 1073.12248}
    return [
        *(Published(f".*_mit_{size}(_.*)?", "backbone", n, "SegFormer, released code") for size, n in mit.items()),
        *(
            Published(f".*_internimage_{size}(?!_t?_?cpu)(_.*)?", "backbone", n, "InternImage, released code")
            for size, n in intern.items()
        ),
    ]


def _upernet() -> list[Published]:
    intern = {"t": 59, "s": 80, "b": 128, "l": 256, "xl": 368, "h": 1120}
    source = "InternImage, UperNet on ADE20K"
    return [
        *(Published(f".*/upernet_internimage_{size}(_.*)?", "model", n, source) for size, n in intern.items()),
        Published(".*/upernet_swin_l(_.*)?", "model", 234, "Swin, UperNet on ADE20K"),
        Published(".*/upernet_convnext_xl(_.*)?", "model", 391, "ConvNeXt, UperNet on ADE20K"),
    ]


PUBLISHED: tuple[Published, ...] = (
    *_the_mask(),
    *_backbones(),
    *_upernet(),
    Published("vspw/mask2former_r50", "model", 44, "Mask2Former, R50 on ADE20K"),
    Published(".*/mask2former_internimage_h", "model", 1094, "InternImage, Mask2Former on Cityscapes"),
    Published(".*/mask2former_internimage_h_wide", "model", 1310, "InternImage, Mask2Former on COCO-Stuff"),
    Published(".*/swiftnet_r18", "model", 11.8, "SwiftNet, RN18"),
)


def published(name: str) -> list[Published]:
    """Published sizes of a config's model, e.g. ``vspw/mask2former_r50``."""
    return [entry for entry in PUBLISHED if re.fullmatch(entry.pattern, name)]
