"""PriorMap: a first estimate of each pixel's class, given to the decoder as labels or as probabilities.

A prior is on the pixel grid of the network input and gets the same geometric transforms as the image. Axes: B
frames, K classes, H W size of the prior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PriorMap:
    """Holds either ``labels`` or ``probabilities``; create one with :meth:`from_labels` and the like.

    Attributes:
        labels: int64 [B, H, W] of classes 0..K-1, or ``ignore_label`` where the class is unknown.
        probabilities: float [B, K, H, W], non-negative. A sum below 1 means that part of the mass is unknown.
        num_classes: K.
        ignore_label: the label of unknown pixels.
    """

    labels: Tensor | None
    probabilities: Tensor | None
    num_classes: int
    ignore_label: int

    @classmethod
    def from_labels(cls, labels: Tensor, num_classes: int, ignore_label: int = 255) -> PriorMap:
        """Hard prior from label maps [B, H, W] of any integer type; no softmax is applied.

        Raises:
            ValueError: another number of axes, not integers, or a label outside 0..K-1 that is not ``ignore_label``.
        """
        if labels.dim() != 3 or labels.is_floating_point():
            raise ValueError(f"a prior of labels is integer [B, H, W], got {labels.dtype} {list(labels.shape)}")
        labels = labels.long()
        known = labels[labels != ignore_label]
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < num_classes:
            raise ValueError(
                f"a prior holds labels {int(known.min())}..{int(known.max())}, but the model has {num_classes} classes "
                f"(0..{num_classes - 1}, ignore {ignore_label}): it was made with another class list"
            )
        return cls(labels, None, num_classes, ignore_label)

    @classmethod
    def from_probabilities(cls, probabilities: Tensor, ignore_label: int = 255) -> PriorMap:
        """Soft prior from probabilities [B, K, H, W].

        Raises:
            ValueError: another number of axes.
        """
        if probabilities.dim() != 4 or not probabilities.is_floating_point():
            raise ValueError(
                f"a prior of probabilities is floating point [B, K, H, W], got {probabilities.dtype} "
                f"{list(probabilities.shape)}"
            )
        return cls(None, probabilities, probabilities.shape[1], ignore_label)

    @classmethod
    def from_logits(cls, logits: Tensor, ignore_label: int = 255) -> PriorMap:
        """Soft prior from class logits [B, K, H, W]: their softmax over K in float32, detached."""
        return cls.from_probabilities(logits.detach().float().softmax(dim=1), ignore_label)

    @property
    def is_hard(self) -> bool:
        """Whether this holds labels."""
        return self.labels is not None

    @property
    def batch(self) -> int:
        """Number of maps, B."""
        return self._map().shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Size of the maps, (H, W)."""
        height, width = self._map().shape[-2:]
        return height, width

    def to(self, device: torch.device | str) -> PriorMap:
        """The same prior on a device."""
        return self._each(lambda x: x.to(device), lambda x: x.to(device))

    def flip(self) -> PriorMap:
        """Mirror left-right."""
        return self._each(lambda x: x.flip(-1), lambda x: x.flip(-1))

    def crop(self, top: int, left: int, height: int, width: int) -> PriorMap:
        """Cut out a window.

        Raises:
            ValueError: a window that leaves the map.
        """
        if min(top, left) < 0 or min(height, width) < 1 or top + height > self.size[0] or left + width > self.size[1]:
            raise ValueError(f"window {(top, left, height, width)} (top, left, height, width) leaves {self.size}")

        def cut(x: Tensor) -> Tensor:
            return x[..., top : top + height, left : left + width]

        return self._each(cut, cut)

    def pad(self, height: int, width: int) -> PriorMap:
        """Pad at the bottom and right to (height, width) with unknown pixels: ignore, or probabilities of 0.

        Raises:
            ValueError: smaller than the map.
        """
        below, right = height - self.size[0], width - self.size[1]
        if below < 0 or right < 0:
            raise ValueError(f"a prior of size {self.size} cannot be padded to the smaller {(height, width)}")
        amounts = (0, right, 0, below)
        return self._each(lambda x: F.pad(x, amounts, value=self.ignore_label), lambda x: F.pad(x, amounts))

    def resize(self, height: int, width: int) -> PriorMap:
        """Scale to another grid: labels by the cell that holds the new cell's centre, probabilities bilinearly.

        Commutes with crops at whole cells, and with flips except where a centre falls on the border of two cells
        (labels, shrinking by an even factor), of which the right and lower one is taken.
        """
        if self.size == (height, width):
            return self
        return self._each(
            lambda x: x[:, _centre_cells(x.shape[1], height, x.device)][
                :, :, _centre_cells(x.shape[2], width, x.device)
            ],
            lambda x: F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False),
        )

    def harden(self) -> PriorMap:
        """The most probable labels; ignore where all probabilities are 0."""
        if self.probabilities is None:
            return self
        best, labels = self.probabilities.max(dim=1)
        labels = torch.where(best > 0, labels, self.ignore_label)
        return replace(self, labels=labels, probabilities=None)

    def soften(self) -> PriorMap:
        """Probabilities; labels become one-hot (float32), ignored pixels all 0."""
        if self.labels is None:
            return self
        known = self.labels != self.ignore_label
        one_hot = F.one_hot(self.labels.where(known, 0), self.num_classes).movedim(-1, 1).float()
        return replace(self, labels=None, probabilities=one_hot * known[:, None])

    def unknown(self) -> Tensor:
        """Bool [B, H, W]: where the class is unknown."""
        if self.labels is not None:
            return self.labels == self.ignore_label
        return self._map().amax(dim=1) <= 0

    def require(self, batch: int, size: tuple[int, int], num_classes: int) -> PriorMap:
        """Return self if it fits a batch of frames.

        Raises:
            ValueError: another number of frames, size, or class count than the model and its input have.
        """
        if self.num_classes != num_classes:
            raise ValueError(
                f"the prior has {self.num_classes} classes, the model {num_classes} (MODEL.SEM_SEG_HEAD.NUM_CLASSES)"
            )
        if (self.batch, *self.size) != (batch, *size):
            raise ValueError(
                f"the prior has {self.batch} maps of size {self.size} (H, W), the input {batch} frames of size {size}: "
                "give the prior the geometry of its frame (resize, crop, flip, pad)"
            )
        return self

    def _map(self) -> Tensor:
        found = self.labels if self.labels is not None else self.probabilities
        assert found is not None
        return found

    def _each(self, on_labels: Callable[[Tensor], Tensor], on_probabilities: Callable[[Tensor], Tensor]) -> PriorMap:
        if self.labels is not None:
            return replace(self, labels=on_labels(self.labels))
        return replace(self, probabilities=on_probabilities(self._map()))


def _centre_cells(source: int, target: int, device: torch.device) -> Tensor:
    """For each of ``target`` cells the source cell that holds its centre, as the labels of a clip are resized."""
    return (2 * torch.arange(target, device=device) + 1) * source // (2 * target)
