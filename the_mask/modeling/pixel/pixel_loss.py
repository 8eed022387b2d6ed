"""Cross-entropy of per-pixel models, over all valid pixels or the hard ones. Axes: B frames, K classes, H W labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class HardPixels:
    """Online hard example mining.

    Attributes:
        threshold: pixels whose own class has a probability below it are kept.
        min_kept: minimum number of pixels per frame to keep, the hardest ones of the batch.
    """

    threshold: float = 0.7
    min_kept: int = 100000

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1 or self.min_kept < 1:
            raise ValueError(
                f"MODEL.CLIP_SEGMENTOR.OHEM: THRESHOLD {self.threshold} must be in 0..1 and MIN_KEPT {self.min_kept} "
                "at least 1"
            )

    def __call__(self, losses: Tensor, valid: Tensor) -> Tensor:
        """Choose the pixels to use.

        Args:
            losses: cross-entropy [B, H, W]; a larger one is a smaller probability of the pixel's class.
            valid: bool [B, H, W].

        Returns:
            bool [B, H, W], a subset of ``valid``: all pixels below the threshold, or the ``B * min_kept`` hardest
            (with those that tie with the last of them) where these are more.
        """
        found = losses[valid]
        if not found.numel():
            return valid
        count = min(self.min_kept * losses.shape[0], found.numel())
        bar = found.kthvalue(found.numel() - count + 1).values
        return valid & ((torch.exp(-losses) < self.threshold) | (losses >= bar))


def pixel_loss(
    logits: Tensor,
    labels: Tensor,
    ignore_label: int,
    sampler: HardPixels | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Mean (with ``class_weights``: weighted mean) cross-entropy of logits enlarged bilinearly to label size.

    Args:
        logits: [B, K, h, w].
        labels: int64 [B, H, W]; pixels of ``ignore_label`` are not used.
        ignore_label: label of pixels without a class.
        sampler: keeps only the hard pixels.
        class_weights: [K], weight of a pixel by its label; does not decide which pixels are hard.

    Returns:
        A scalar in float32; 0 (with a graph) without any valid pixel.
    """
    logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    with torch.autocast(logits.device.type, enabled=False):
        losses = F.cross_entropy(logits, labels, ignore_index=ignore_label, reduction="none")
    kept = labels != ignore_label
    if sampler is not None:
        kept = sampler(losses.detach(), kept)
    if class_weights is None:
        return (losses * kept).sum() / kept.sum().clamp(min=1)
    weights = class_weights[labels.where(kept, 0)] * kept
    return (losses * weights).sum() / weights.sum().clamp(min=1e-6)
