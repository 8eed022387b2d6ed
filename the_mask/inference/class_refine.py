"""Refine a label map: split it by class into crops, refine those with uncertain borders in batches, reassemble.

Axes: K classes, H W frame size. Source: the ADE20K protocol of the released CascadePSP code.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from the_mask.config.keys.inference import RefinementOptions
from the_mask.inference.merge import normalize_scores
from the_mask.inference.refine import global_step, normalised, resize, working_size
from the_mask.modeling.stream import FrameName

logger = logging.getLogger(__name__)
LEAST_AREA = 32 * 32
# Side of the disk that joins parts of a class; the radius is half of it (released code).
JOIN_SIDE = 10
MARGIN_OF_BOX = 0.125
START_CONFIDENCE = 0.5
STUFF_FACTOR = 0.51
# Width in pixels, on either side of a contour, of the band that decides whether it is uncertain.
BAND = 5
LOG_FRAMES = 50


@dataclass(frozen=True)
class Piece:
    """A component of one class: its class, box (top, left, bottom, right) and mask inside the box."""

    label: int
    box: tuple[int, int, int, int]
    mask: NDArray[np.bool_]

    @property
    def slices(self) -> tuple[slice, slice]:
        """The box as an index."""
        top, left, bottom, right = self.box
        return slice(top, bottom), slice(left, right)


def split_classes(labels: NDArray[np.integer], least_area: int = LEAST_AREA) -> Iterator[Piece]:
    """Components of the classes of a label map [H, W], in ascending order of class and position.

    Per class with more than ``least_area`` pixels: dilate by a disk of 10x10 pixels so that parts with a gap of at most
    9 pixels stay together, take 8-connected components, erode them back, drop those of at most ``least_area`` pixels,
    and keep the class's own pixels of the rest. Boxes are larger than the component by an eighth of its size on every
    side.
    """
    height, width = labels.shape
    disk = join_disk()
    for label in np.unique(labels):
        own = labels == label
        if own.sum() <= least_area:
            continue
        count, components = cv2.connectedComponents(cv2.dilate(own.astype(np.uint8), disk), connectivity=8)
        for number in range(1, count):
            # The outside of the picture must not affect dilation and erosion.
            mask = cv2.erode((components == number).astype(np.uint8), disk).astype(bool)
            if mask.sum() <= least_area:
                continue
            mask &= own
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if not len(rows):
                continue
            down, across = (round(MARGIN_OF_BOX * (ends[-1] + 1 - ends[0])) for ends in (rows, columns))
            top, left = max(int(rows[0]) - down, 0), max(int(columns[0]) - across, 0)
            bottom, right = min(int(rows[-1]) + 1 + down, height), min(int(columns[-1]) + 1 + across, width)
            yield Piece(int(label), (top, left, bottom, right), mask[top:bottom, left:right])


def join_disk() -> NDArray[np.uint8]:
    """The disk that joins parts. Its centre is to the right of and below the middle, as in the released code.

    Because of that, the erosion removes a component's first row and column.
    """
    places = np.arange(JOIN_SIDE) - JOIN_SIDE // 2
    return (places[:, None] ** 2 + places**2 <= (JOIN_SIDE // 2) ** 2).astype(np.uint8)


def uncertain_share(piece: Piece, margin: NDArray[np.floating], threshold: float) -> float:
    """Share (0..1) of the band around a piece's contour where the two best classes are closer than ``threshold``.

    Args:
        margin: best minus second best probability, [H, W].
        threshold: 0..1.

    Returns:
        0 for a piece without a contour inside its box.
    """
    square = np.ones((2 * BAND + 1, 2 * BAND + 1), dtype=np.uint8)
    mask = piece.mask.astype(np.uint8)
    band = cv2.dilate(mask, square) != cv2.erode(mask, square)
    return float((margin[piece.slices][band] < threshold).mean()) if band.any() else 0.0


def reassemble(
    labels: NDArray[np.integer], refined: Sequence[tuple[Piece, NDArray[np.floating]]], stuff: Collection[int] = ()
) -> NDArray[np.integer]:
    """Write refined pieces into a label map where they are more confident than the present label.

    Every pixel starts with its label at confidence 0.5. A piece takes a pixel where its probability (times 0.51 for
    stuff, so that things win) is larger than the confidence so far. Every pixel keeps a label.

    Args:
        labels: [H, W].
        refined: pieces with probabilities of the size of their boxes, in order.
        stuff: classes that give way to things.

    Returns:
        A new map of the same dtype.
    """
    result = labels.copy()
    confidence = np.full(labels.shape, START_CONFIDENCE, dtype=np.float32)
    for piece, probability in refined:
        value = probability * STUFF_FACTOR if piece.label in stuff else probability
        surer = value > confidence[piece.slices]
        result[piece.slices][surer] = piece.label
        confidence[piece.slices][surer] = value[surer]
    return result


class ClassRefinement:
    """Post-processing step: refine the borders of a label map with a trained refiner.

    Args:
        network: a refiner; put in eval mode.
        options: what is refined, and at which sizes.
        multiple: sides of the working size are rounded to multiples of this.

    Attributes:
        frames, components, seconds: number of frames and components so far, and their wall time; logged every 50
            frames.
    """

    def __init__(
        self,
        network: Any,
        options: RefinementOptions = RefinementOptions(),
        multiple: int = 32,
    ) -> None:
        self.network = network.eval()
        self.options = options
        self.stuff = frozenset(options.stuff)
        self.multiple = multiple
        self.frames = self.components = 0
        self.seconds = 0.0

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8], labels: Tensor, scores: Tensor, name: FrameName | None) -> Tensor:
        """Refined labels [H, W]; ``image`` is uint8 RGB [H, W, 3], ``scores`` [K, H, W]."""
        start = time.perf_counter()
        refined = self._refined(image, labels, scores)
        self.seconds += time.perf_counter() - start
        self.frames += 1
        if self.frames % LOG_FRAMES == 0:
            logger.info(
                "refinement: %d frames, %d components refined, %.3f s/frame",
                self.frames,
                self.components,
                self.seconds / self.frames,
            )
        return refined

    def _refined(self, image: NDArray[np.uint8], labels: Tensor, scores: Tensor) -> Tensor:
        coarse = labels.numpy()
        pieces = self.uncertain_pieces(coarse, scores)
        self.components += len(pieces)
        if not pieces:
            return labels
        device = next(self.network.parameters()).device
        picture = normalised(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).to(device))
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, piece in enumerate(pieces):
            height, width = piece.mask.shape
            groups[working_size(height, width, self.options.long_edge, self.options.least_edge, self.multiple)].append(
                index
            )
        refined: dict[int, NDArray[np.floating]] = {}
        for size, members in groups.items():
            for start in range(0, len(members), self.options.batch):
                chosen = members[start : start + self.options.batch]
                for index, probability in zip(chosen, self._refine(picture, [pieces[i] for i in chosen], size)):
                    refined[index] = probability
        ordered = [(pieces[index], refined[index]) for index in range(len(pieces))]
        return torch.from_numpy(reassemble(coarse, ordered, self.stuff))

    def uncertain_pieces(self, labels: NDArray[np.integer], scores: Tensor) -> list[Piece]:
        """The components to refine; none in a map of a single class, which has no borders."""
        if labels.size == 0 or (labels == labels.flat[0]).all():
            return []
        pieces = list(split_classes(labels, self.options.least_area))
        if self.options.min_uncertain == 0 or not pieces:
            return pieces
        best = normalize_scores(scores, "sum-to-one").topk(2, dim=0).values
        margin = (best[0] - best[1]).cpu().numpy()
        return [
            piece
            for piece in pieces
            if uncertain_share(piece, margin, self.options.margin) >= self.options.min_uncertain
        ]

    def _refine(self, picture: Tensor, pieces: Sequence[Piece], size: tuple[int, int]) -> list[NDArray[np.floating]]:
        """Refine pieces with the same working size; returns probabilities, each of the size of its box."""
        images, masks = [], []
        for piece in pieces:
            crop = picture[(slice(None), *piece.slices)][None]
            mask = torch.from_numpy(piece.mask).to(picture.device)[None, None].float() * 2 - 1
            grows = size[0] > crop.shape[-2] or size[1] > crop.shape[-1]
            images.append(resize(crop, size, "bicubic" if grows else "area"))
            masks.append(resize(mask, size, "bilinear" if grows else "area"))
        out, _ = global_step(self.network, torch.cat(images), torch.cat(masks), size)
        return [
            resize(probability[None], piece.mask.shape, "bilinear")[0, 0].cpu().numpy()
            for probability, piece in zip(out, pieces, strict=True)
        ]
