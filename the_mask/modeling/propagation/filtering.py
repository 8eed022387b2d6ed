"""Guided spatially varying filtering: edges of a segmentation, filter weights, and the sum over shifted copies.

Axes: B maps, C channels, K filter slots, h w cells. Slots are [the map itself, its shifts, (zero), (intra)].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Displacement = tuple[int, int]

EDGES = ("laplacian", "sigmoid", "differs")
NORMALISATIONS = ("relu", "softmax")


def displacements(reach: int = 1) -> list[Displacement]:
    """(down, right) displacement of every shifted copy, row-major: the 8 neighbours, then 8 points at ``reach`` > 1.

    Source: ideal-delay kernels of GSVNet (section 3.4.1; order of the released code).

    Raises:
        ValueError: ``reach`` below 1.
    """
    if reach < 1:
        raise ValueError(f"MODEL.KEYFRAME.REACH is {reach}; expected >= 1 cell")
    ring = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    return ring if reach == 1 else ring + [(dy * reach, dx * reach) for dy, dx in ring]


def delay_kernels(shifts: Sequence[Displacement], extra: int = 0) -> Tensor:
    """The impulse kernels [S + extra, 1, 1, 2d+1, 2d+1] that shift by correlation; ``extra`` kernels of zeros follow.

    The released checkpoints hold them (``ideal_dk.filter_copy_s``, with one of zeros).
    """
    reach = max(max(abs(dy), abs(dx)) for dy, dx in shifts)
    kernels = torch.zeros(len(shifts) + extra, 1, 1, 2 * reach + 1, 2 * reach + 1)
    for slot, (dy, dx) in enumerate(shifts):
        kernels[slot, 0, 0, reach + dy, reach + dx] = 1
    return kernels


def edge_map(labels: Tensor, kind: str) -> Tensor:
    """Where the classes of a label map change.

    Args:
        labels: [B, h, w] integers.
        kind: "laplacian", 1 where the 8-neighbour Laplacian of the class *numbers* is not zero, zeros around the map
            (released code; opposite steps can cancel, and the frame's border is an edge for classes > 0); "sigmoid",
            the same squashed by a sigmoid instead (paper); "differs", 1 where any neighbour has another class, border
            repeated.

    Returns:
        [B, 1, h, w] float32; no gradient.
    """
    if kind not in EDGES:
        raise ValueError(f"edge map {kind!r}: expected one of {', '.join(EDGES)}")
    h, w = labels.shape[-2:]
    values = labels[:, None].float()
    padded = F.pad(values, (1, 1, 1, 1), mode="replicate" if kind == "differs" else "constant")
    neighbours = [padded[..., 1 + dy : 1 + dy + h, 1 + dx : 1 + dx + w] for dy, dx in displacements()]
    if kind == "differs":
        return torch.stack([neighbour != values for neighbour in neighbours]).any(dim=0).float()
    laplacian = sum(neighbours[1:], neighbours[0]) - 8 * values
    return laplacian.sigmoid() if kind == "sigmoid" else (laplacian != 0).float()


def filter_weights(raw: Tensor, kind: str) -> Tensor:
    """Normalise the guide's output over its slots.

    Args:
        raw: [B, K, h, w].
        kind: "relu", relu(r) / (sum of relu(r) + 1e-9), which is 0 where no slot is positive (released code); or
            "softmax". Both have unity gain (paper, equation 5).

    Returns:
        [B, K, h, w] >= 0.
    """
    if kind not in NORMALISATIONS:
        raise ValueError(f"normalisation {kind!r}: expected one of {', '.join(NORMALISATIONS)}")
    if kind == "softmax":
        return raw.softmax(dim=1)
    positive = raw.relu()
    return positive / (positive.sum(dim=1, keepdim=True) + 1e-9)


def dynamic_filter(
    scores: Tensor, weights: Tensor, shifts: Sequence[Displacement], intra: Tensor | None = None, zeros: int = 0
) -> Tensor:
    """out_c(p) = sum over slots k of weights_k(p) * slot_k,c(p), without building the slots.

    Args:
        scores: [B, C, h, w], warped.
        weights: [B, K, h, w], shared by all channels; K = 1 + len(shifts) + zeros + (1 with ``intra``).
        shifts: slot k holds scores(p + shift_k), 0 outside.
        intra: [B, C, h, w], the last slot.
        zeros: number of slots that hold 0, before the intra slot; they allow a gain below 1.

    Returns:
        [B, C, h, w]. Source: GSVNet equation 5.

    Raises:
        ValueError: a number of weights that does not fit the slots.
    """
    slots = 1 + len(shifts) + zeros + (intra is not None)
    if weights.shape[1] != slots:
        raise ValueError(f"{weights.shape[1]} filter weights for {slots} slots")
    h, w = scores.shape[-2:]
    reach = max((max(abs(dy), abs(dx)) for dy, dx in shifts), default=0)
    padded = F.pad(scores, (reach, reach, reach, reach))
    out = scores * weights[:, :1]
    for slot, (dy, dx) in enumerate(shifts, start=1):
        shifted = padded[..., reach + dy : reach + dy + h, reach + dx : reach + dx + w]
        out = torch.addcmul(out, shifted, weights[:, slot : slot + 1])
    return out if intra is None else torch.addcmul(out, intra, weights[:, -1:])
