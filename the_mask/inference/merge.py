"""Merge the class scores of several views or models. Axes: K classes, H W frame size.

Models have scores on different scales: a per-pixel model gives probabilities, a mask-classification model sums of
products, with a total between 0 and the number of queries. So each model's scores are normalised before averaging.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from the_mask.modeling.scores import label_map

NORMALIZATIONS = ("none", "sum-to-one", "softmax", "temperature")
MEANS = ("arithmetic", "geometric")
PARITIES = ("", "mmseg")
# Lower bound of scores before taking logarithms.
LEAST_SCORE = 1e-12


def check_merge(normalization: str, mean: str, where: str) -> None:
    """Raise ValueError for an unknown name; ``where`` is the config node, for the message."""
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"{where}.NORMALIZE {normalization!r}: expected one of {', '.join(NORMALIZATIONS)}")
    if mean not in MEANS:
        raise ValueError(f"{where}.MEAN {mean!r}: expected one of {', '.join(MEANS)}")


def normalize_scores(scores: Tensor, mode: str, temperature: float = 1.0) -> Tensor:
    """Bring class scores to a common scale.

    Args:
        scores: [K, ...] >= 0, any float type.
        mode: ``none``; ``sum-to-one``: divided by their sum over classes (1/K where it is 0); ``softmax``: softmax of
            the scores themselves. On scores that already are probabilities this is the second softmax of the mmseg
            pipelines: for K = 124 a perfect score of 1 becomes e / (e + 123) = 0.022; ``temperature``:
            sum-to-one(scores ** (1 / temperature)), which for a softmax output is softmax(logits / temperature).
        temperature: > 0.

    Returns:
        float32 [K, ...].

    Raises:
        ValueError: unknown mode, or a temperature <= 0.
    """
    scores = scores.float()
    if mode == "none":
        return scores
    if mode == "sum-to-one":
        total = scores.sum(dim=0, keepdim=True)
        return torch.where(total > 0, scores / total.clamp(min=torch.finfo(torch.float32).tiny), 1 / scores.shape[0])
    if mode == "softmax":
        return scores.softmax(dim=0)
    if mode == "temperature":
        if not temperature > 0:
            raise ValueError(f"temperature {temperature}: expected a number > 0")
        return (scores.clamp(min=LEAST_SCORE).log() / temperature).softmax(dim=0)
    raise ValueError(f"normalisation {mode!r}: expected one of {', '.join(NORMALIZATIONS)}")


class ScoreMean:
    """Weighted mean of score maps that are added one after the other, in rows; accumulated in float32.

    Keeps one map of the frame's size. ``geometric`` is exp of the mean logarithm, without normalising again, so that
    the mean of equal maps is that map.
    """

    def __init__(self, kind: str = "arithmetic") -> None:
        if kind not in MEANS:
            raise ValueError(f"mean {kind!r}: expected one of {', '.join(MEANS)}")
        self.kind = kind
        self.weight = 0.0
        self._sum: Tensor | None = None

    def start(self, num_classes: int, height: int, width: int, device: torch.device | str, weight: float = 1.0) -> None:
        """Start one more map with a weight > 0; its rows are added by :meth:`add_rows`.

        Raises:
            ValueError: a weight <= 0, or another shape than earlier maps.
        """
        if not weight > 0:
            raise ValueError(f"the weight of a score map is {weight}; expected a number > 0")
        shape = (num_classes, height, width)
        if self._sum is None:
            self._sum = torch.zeros(shape, dtype=torch.float32, device=device)
        elif tuple(self._sum.shape) != shape:
            raise ValueError(f"score maps of shapes {tuple(self._sum.shape)} and {shape} (K, H, W) cannot be averaged")
        self._current = weight
        self.weight += weight

    def add_rows(self, rows: slice, scores: Tensor) -> None:
        """Add [K, len(rows), W] of the current map."""
        assert self._sum is not None, "start() announces a map"
        part = scores.to(self._sum.device, torch.float32)
        if self.kind == "geometric":
            part = part.clamp(min=LEAST_SCORE).log()
        self._sum[:, rows].add_(part, alpha=self._current)

    def add(self, scores: Tensor, weight: float = 1.0) -> None:
        """Add a whole map [K, H, W]."""
        classes, height, width = scores.shape
        self.start(classes, height, width, scores.device, weight)
        self.add_rows(slice(None), scores)

    def result(self) -> Tensor:
        """The mean, [K, H, W] float32; the accumulator is used up.

        Raises:
            ValueError: nothing was added.
        """
        if self._sum is None:
            raise ValueError("the mean of no score maps")
        total, self._sum = self._sum.div_(self.weight), None
        return total.exp_() if self.kind == "geometric" else total


def merge_scores(
    maps: Sequence[Tensor],
    normalization: str = "none",
    mean: str = "arithmetic",
    weights: Sequence[float] | None = None,
    temperatures: Sequence[float] | None = None,
) -> Tensor:
    """Normalise and average a list of score maps [K, H, W]. Returns [K, H, W] float32.

    Raises:
        ValueError: no maps, different shapes, unknown names, or lists of another length than ``maps``.
    """
    weights = list(weights or [1.0] * len(maps))
    temperatures = list(temperatures or [1.0] * len(maps))
    accumulator = ScoreMean(mean)
    for scores, weight, temperature in zip(maps, weights, temperatures, strict=True):
        accumulator.add(normalize_scores(scores, normalization, temperature), weight)
    return accumulator.result()


def score_labels(scores: Tensor) -> Tensor:
    """Best class per pixel (the lowest on ties): uint8 (int32 with more than 255 classes) [H, W] on the CPU."""
    size = (scores.shape[1], scores.shape[2])
    return label_map(scores, size, size, 1)
