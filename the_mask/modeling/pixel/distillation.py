"""Distillation losses between a student's and a teacher's outputs: pure functions.

After "Structured Knowledge Distillation for Semantic Segmentation", without its adversarial term. Axes: B frames, K
classes, C channels, h w map size, P regions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor
from torch.nn import functional as F

from the_mask.config.compose import find_config


def pixel_distillation(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    """Mean over pixels of -sum over k of softmax(z_T / tau)_k log softmax(z_S / tau)_k, times tau^2.

    Args:
        student: z_S, logits [B, K, h, w].
        teacher: z_T, logits [B, K, h', w'], resized bilinearly to the student's size; no gradient.
        temperature: tau > 0.
        valid: bool [B, h, w]: pixels to use; None takes all.

    Returns:
        A scalar in float32; 0 (with a graph) without any valid pixel.

    Raises:
        ValueError: different numbers of frames or classes.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"student logits {list(student.shape)}, teacher's {list(teacher.shape)}: need equal B and K")
    teacher = F.interpolate(teacher.detach().float(), size=student.shape[-2:], mode="bilinear", align_corners=False)
    with torch.autocast(student.device.type, enabled=False):
        target = (teacher / temperature).softmax(dim=1)
        losses = -(target * (student.float() / temperature).log_softmax(dim=1)).sum(dim=1)
    if valid is None:
        valid = torch.ones_like(losses, dtype=torch.bool)
    return temperature**2 * (losses * valid).sum() / valid.sum().clamp(min=1)


def region_affinity(features: Tensor, scale: float = 0.5) -> Tensor:
    """Cosine similarity of all pairs of max-pooled regions: [B, C, h, w] -> [B, P, P] float32.

    Args:
        features: of any width.
        scale: side of a region as a share of the map's side; 0.5 gives P = 4 regions.
    """
    kernel = [max(1, int(side * scale)) for side in features.shape[-2:]]
    regions = F.max_pool2d(features.float(), kernel_size=kernel, stride=kernel, ceil_mode=True).flatten(2)
    with torch.autocast(features.device.type, enabled=False):
        # The length is treated as a constant in the gradient, as in the released code.
        regions = regions / (regions.norm(dim=1, keepdim=True).detach() + 1e-8)
        return regions.transpose(1, 2) @ regions


def pair_distillation(student: Tensor, teacher: Tensor, scale: float = 0.5) -> Tensor:
    """Mean squared difference of the :func:`region_affinity` of student and teacher.

    Args:
        student, teacher: features [B, C, h, w]; their widths may differ. The teacher's are resized bilinearly to the
            student's size and have no gradient.
        scale: see :func:`region_affinity`.
    """
    teacher = teacher.detach().float()
    if teacher.shape[-2:] != student.shape[-2:]:
        teacher = F.interpolate(teacher, size=student.shape[-2:], mode="bilinear", align_corners=False)
    return F.mse_loss(region_affinity(student, scale), region_affinity(teacher, scale))


def content_mask(
    contents: Sequence[tuple[int, int]], image_size: tuple[int, int], size: tuple[int, int], device: torch.device | str
) -> Tensor:
    """Which cells of a map have their centre inside the picture and not in its padding (bottom and right).

    Args:
        contents: (height, width) of the picture in each of B padded images.
        image_size: (H, W) of these.
        size: (h, w) of the map.
        device: of the result.

    Returns:
        bool [B, h, w].
    """
    rows, columns = (
        (torch.arange(n, device=device) + 0.5) * (side / n) for n, side in zip(size, image_size, strict=True)
    )
    masks = [(rows < height)[:, None] & (columns < width)[None] for height, width in contents]
    return torch.stack(masks)


def missing_teacher(options: CfgNode) -> Iterator[str]:
    """Problems that prevent a distillation with ``MODEL.DISTILLATION``, one message each.

    Whether the weights exist is not looked at: those who read them know where they may be.
    """
    for key in ("TEACHER_CONFIG", "TEACHER_WEIGHTS"):
        if not options[key]:
            yield f"MODEL.DISTILLATION.{key} is empty: a distillation needs a trained teacher"
    if options.TEACHER_CONFIG:
        try:
            find_config(options.TEACHER_CONFIG)
        except FileNotFoundError as error:
            yield f"MODEL.DISTILLATION.TEACHER_CONFIG: {error}"
