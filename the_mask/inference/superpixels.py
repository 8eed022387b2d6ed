"""SLIC superpixels in NumPy: k-means on colour and position, each pixel compared with the nine nearest cells of a grid.

Source: Achanta et al. 2012. Axes: H W picture size.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

ITERATIONS = 5
# Connected pieces smaller than this share of a grid cell are merged into a neighbour.
LEAST_PIECE = 0.25


def slic(image: NDArray[np.uint8], segments: int = 300, compactness: float = 10.0) -> NDArray[np.int64]:
    """Cut a picture into connected regions of similar colour.

    Args:
        image: RGB [H, W, 3].
        segments: approximate number of regions, >= 1.
        compactness: weight of position against colour (CIELAB units per grid cell); larger values give squarer regions.

    Returns:
        [H, W] of region numbers 0..n-1, each a connected region (4 neighbours).

    Raises:
        ValueError: ``segments`` < 1 or ``compactness`` <= 0.
    """
    if segments < 1 or compactness <= 0:
        raise ValueError(f"superpixels: expected segments >= 1 and compactness > 0, got {segments} and {compactness}")
    height, width = image.shape[:2]
    side = float(np.sqrt(height * width / segments))
    rows, columns = max(1, round(height / side)), max(1, round(width / side))
    y, x = np.mgrid[:height, :width]
    colour = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    place = np.stack([y, x], axis=-1).astype(np.float32) * (compactness / side)
    points = np.concatenate([colour, place], axis=-1).reshape(-1, 5)
    cell_y, cell_x = (y * rows // height).reshape(-1), (x * columns // width).reshape(-1)

    owner = cell_y * columns + cell_x
    for _ in range(ITERATIONS):
        owner = _nearest(points, _centres(points, owner, rows * columns), cell_y, cell_x, rows, columns)
    return _connected(owner.reshape(height, width), LEAST_PIECE * side * side)


def _centres(points: NDArray[np.float32], owner: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Mean point [count, 5] of each cluster; far away for an empty cluster, so that no pixel joins it."""
    size = np.bincount(owner, minlength=count)
    sums = np.stack([np.bincount(owner, points[:, axis], minlength=count) for axis in range(5)], axis=1)
    return np.where(size[:, None] > 0, sums / np.maximum(size, 1)[:, None], 1e9)


def _nearest(
    points: NDArray[np.float32],
    centres: NDArray[np.float64],
    cell_y: NDArray[np.int64],
    cell_x: NDArray[np.int64],
    rows: int,
    columns: int,
) -> NDArray[np.int64]:
    """The closest centre among the 3 x 3 cells around each pixel's cell."""
    centres = centres.astype(np.float32)
    best = np.full(len(points), np.inf, dtype=np.float32)
    owner = np.zeros(len(points), dtype=np.int64)
    for step_y in (-1, 0, 1):
        for step_x in (-1, 0, 1):
            candidate = np.clip(cell_y + step_y, 0, rows - 1) * columns + np.clip(cell_x + step_x, 0, columns - 1)
            distance = ((points - centres[candidate]) ** 2).sum(axis=1)
            closer = distance < best
            best[closer], owner[closer] = distance[closer], candidate[closer]
    return owner


def _connected(owner: NDArray[np.int64], least: float) -> NDArray[np.int64]:
    """Number the connected pieces; those below ``least`` pixels join the neighbour with the longest border."""
    pieces = _pieces(owner)
    size = np.bincount(pieces.reshape(-1))
    first, second = _border_pairs(pieces)
    # Both directions: (small piece, large neighbour).
    pairs = np.concatenate([np.stack([first, second], 1), np.stack([second, first], 1)])
    pairs = pairs[(size[pairs[:, 0]] < least) & (size[pairs[:, 1]] >= least)]
    target = np.arange(len(size))
    if len(pairs):
        unique, length = np.unique(pairs, axis=0, return_counts=True)
        # Sorted by border length, so that the last assignment is that of the longest border.
        order = np.argsort(length, kind="stable")
        target[unique[order, 0]] = unique[order, 1]
    _, numbers = np.unique(target[pieces], return_inverse=True)
    return numbers.reshape(owner.shape).astype(np.int64)


def _pieces(owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of the connected piece (4 neighbours, equal owner) of each pixel."""
    numbers = np.arange(owner.size).reshape(owner.shape)
    down, right = owner[1:] == owner[:-1], owner[:, 1:] == owner[:, :-1]
    start = np.concatenate([numbers[:-1][down], numbers[:, :-1][right]])
    end = np.concatenate([numbers[1:][down], numbers[:, 1:][right]])
    graph = coo_matrix((np.ones(len(start), dtype=np.int8), (start, end)), shape=(owner.size, owner.size))
    _, pieces = connected_components(graph, directed=False)
    return pieces.reshape(owner.shape).astype(np.int64)


def _border_pairs(pieces: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers on the two sides of every border between neighbouring pixels."""
    down, right = pieces[1:] != pieces[:-1], pieces[:, 1:] != pieces[:, :-1]
    first = np.concatenate([pieces[:-1][down], pieces[:, :-1][right]])
    return first, np.concatenate([pieces[1:][down], pieces[:, 1:][right]])
