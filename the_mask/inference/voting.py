"""Closed-set voting: each class-agnostic mask takes the majority class of its pixels (SSA).

Source: Semantic Segment Anything, closed-set rule. Axes: K classes, H W frame size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco
from torch import Tensor

from the_mask.inference.mask_generators import MaskGenerator
from the_mask.modeling.stream import FrameName

RunLengths = Mapping[str, Any]


def vote_masks(
    labels: NDArray[np.integer],
    masks: Sequence[RunLengths],
    num_classes: int,
    min_majority: float = 0.0,
    scores: NDArray[np.floating] | None = None,
) -> NDArray[np.integer]:
    """Overwrite each mask with the class that wins in it.

    Masks are processed in descending order of area (equal areas in the order given), so smaller masks win over larger
    ones. The class is the mode of ``labels`` (not of the map being written) inside the mask, the lowest on ties. Pixels
    outside all masks keep their label, and so do those of a mask whose winner has less than ``min_majority``. Empty
    masks are left out.

    Args:
        labels: predicted classes [H, W], 0..K-1.
        masks: COCO run lengths (``size`` [H, W], ``counts``); there may be none.
        num_classes: K.
        min_majority: minimum share (0..1) of the winner, in the mask's pixels or, with ``scores``, in its summed
            scores.
        scores: [K, H, W] >= 0: soft voting. The winner has the largest summed score, the lowest class of equal ones.

    Returns:
        [H, W] of the dtype of ``labels``, a new array.

    Raises:
        ValueError: a mask of another size, or a share outside 0..1.
    """
    if not 0 <= min_majority <= 1:
        raise ValueError(f"TEST.VOTING.MIN_MAJORITY {min_majority}: expected a share in 0..1")
    result = labels.copy()
    areas = [_area(mask, labels.shape) for mask in masks]
    for index in sorted(range(len(masks)), key=lambda i: -areas[i]):
        if areas[index] == 0:
            continue
        inside, box = _decode(masks[index])
        if scores is None:
            votes = np.bincount(labels[box][inside], minlength=num_classes).astype(np.float64)
        else:
            votes = scores[(slice(None), *box)][:, inside].sum(axis=1, dtype=np.float64)
        winner = int(votes.argmax())
        if votes[winner] >= min_majority * votes.sum():
            result[box][inside] = winner
    return result


class MaskVoting:
    """Last post-processing step: voting with the masks of a generator.

    Args:
        generator: source of the masks.
        num_classes: K.
        min_majority, soft: see :func:`vote_masks`.
    """

    def __init__(
        self, generator: MaskGenerator, num_classes: int, min_majority: float = 0.0, soft: bool = False
    ) -> None:
        if not 0 <= min_majority <= 1:
            raise ValueError(f"TEST.VOTING.MIN_MAJORITY {min_majority}: expected a share in 0..1")
        self.generator = generator
        self.num_classes = num_classes
        self.min_majority = min_majority
        self.soft = soft

    def __call__(self, image: NDArray[np.uint8], labels: Tensor, scores: Tensor, name: FrameName | None) -> Tensor:
        """Labels [H, W] after the vote; ``image`` is uint8 RGB [H, W, 3], ``scores`` [K, H, W]."""
        masks = self.generator.masks(image, name)
        soft = scores.float().cpu().numpy() if self.soft else None
        return torch.from_numpy(vote_masks(labels.numpy(), masks, self.num_classes, self.min_majority, soft))


def _area(mask: RunLengths, shape: tuple[int, ...]) -> int:
    if tuple(mask["size"]) != tuple(shape):
        raise ValueError(f"a mask of size {list(mask['size'])} for a frame of {list(shape)} (height, width)")
    return int(coco.area(mask))


def _decode(mask: RunLengths) -> tuple[NDArray[np.bool_], tuple[slice, slice]]:
    """The mask inside its bounding box, and the box, which makes small masks cheap."""
    left, top, width, height = (int(value) for value in coco.toBbox(mask))
    box = (slice(top, top + height), slice(left, left + width))
    return coco.decode(mask)[box].astype(bool), box
