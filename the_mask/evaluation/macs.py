"""Multiply-accumulate operations of key and non-key frames, counted by fvcore."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from the_mask.data.clips import Clip
from the_mask.modeling.propagation.propagated import PropagatedSegmentor
from the_mask.ops import decomposed

# The operators in published figures; norms, activations and resizing are left out.
COUNTED = ("conv", "linear", "matmul", "bmm", "addmm", "einsum")


@dataclass(frozen=True)
class MacReport:
    """The operations of one forward pass.

    Attributes:
        macs: multiply-accumulates of convolutions and matrix products.
        uncounted: operators that fvcore cannot count, with their number, such as sampling and attention.
    """

    macs: int
    uncounted: dict[str, int] = field(default_factory=dict)


def count_macs(module: nn.Module, inputs: Sequence[Tensor]) -> MacReport:
    """Trace ``module(*inputs)`` in eval mode and count. The module returns tensors, alone or in containers."""
    was_training = module.training
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # The tracer does not support operators with lists of sizes, but it supports their standard form.
        with torch.no_grad(), decomposed():
            analysis = FlopCountAnalysis(_Flat(module).eval(), tuple(inputs)).unsupported_ops_warnings(False)
            counts, unknown = analysis.by_operator(), analysis.unsupported_ops()
    finally:
        module.train(was_training)
        logger.setLevel(level)
    return MacReport(int(sum(counts[name] for name in COUNTED if name in counts)), dict(unknown))


def propagation_macs(model: PropagatedSegmentor, size: tuple[int, int]) -> tuple[MacReport, MacReport]:
    """Operations of a keyframe and of a propagated frame of ``size`` (H, W), the keyframe at ``key_scale``."""
    frame = torch.zeros(3, *size, device=model.device)
    key = [max(1, round(side * model.key_scale)) for side in size]
    images, _ = model.segmentor.stack([Clip([torch.zeros(3, *key, device=model.device)])])
    small = model.small_frames([frame])[0][None]
    scores = torch.zeros(1, model.num_classes, *small.shape[-2:], device=model.device)
    key_report = count_macs(_Key(model.segmentor), [images])
    if not any(True for _ in model.propagator.parameters()):
        return key_report, MacReport(0)
    return key_report, count_macs(model.propagator, [scores, small, small])


def average_macs(key: float, non_key: float, interval: int) -> float:
    """Mean over one keyframe and ``interval - 1`` propagated frames.

    Raises:
        ValueError: ``interval`` below 1.
    """
    if interval < 1:
        raise ValueError(f"a keyframe interval of {interval} frames; expected >= 1")
    return (key + (interval - 1) * non_key) / interval


class _Key(nn.Module):
    """Backbone and head of a segmentor."""

    def __init__(self, segmentor: Any) -> None:
        super().__init__()
        self.backbone = segmentor.backbone
        self.sem_seg_head = segmentor.sem_seg_head

    def forward(self, images: Tensor) -> Any:
        return self.sem_seg_head(self.backbone(images))


class _Flat(nn.Module):
    """Wraps a module to return its tensors as one tuple, as tracing requires."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(_tensors(self.module(*inputs)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [tensor for item in vars(value).values() for tensor in _tensors(item)] if hasattr(value, "__dict__") else []
