"""Linear interpolation along one axis as cells and weights.

Axes: ``n`` pixels of the result, ``T`` taps.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray


def interpolate(size_in: int, size_out: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Lower cell, upper cell, and weight of the upper cell, each [size_out].

    As ``F.interpolate(mode="bilinear", align_corners=False)`` along one axis.
    """
    position = np.maximum((np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5, 0)
    low = np.minimum(np.floor(position).astype(np.int64), size_in - 1)
    return low, np.minimum(low + 1, size_in - 1), position - low


@lru_cache(maxsize=64)
def axis_taps(cells: int, stride: int, network: int, output: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Both steps along an axis: ``cells`` enlarged by ``stride``, cropped to ``network``, resized to ``output`` pixels.

    Returns:
        First cell [n] and weights [n, T] of it and the following cells, T 2 or 3; n is ``output``. A weight of 0 may be
        beyond the last cell. The arrays are cached: do not change them.
    """
    low, high, fraction = interpolate(network, output)
    cell_low, cell_high, part = (values[:network] for values in interpolate(cells, cells * stride))
    first = cell_low[low]
    weights = np.zeros((output, 4))
    pixels = np.arange(output)
    pairs: list[tuple[Any, Any]] = [
        (cell_low[low], (1 - fraction) * (1 - part[low])),
        (cell_high[low], (1 - fraction) * part[low]),
        (cell_low[high], fraction * (1 - part[high])),
        (cell_high[high], fraction * part[high]),
    ]
    for cell, weight in pairs:
        weights[pixels, cell - first] += weight
    taps = 3 if weights[:, 2].any() else 2
    return first.astype(np.int32), np.ascontiguousarray(weights[:, :taps], dtype=np.float32)
