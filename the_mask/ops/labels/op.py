"""The operator ``the_mask::upsample_argmax``: checks, schema, fake kernel, and the choice of a path.

Axes: ``K`` classes, ``h w`` map, ``H W`` size of the network input, ``H' W'`` labels, ``T`` taps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from the_mask.ops.checks import check_rank
from the_mask.ops.labels.reference import label_dtype, upsample_argmax_portable, upsample_argmax_reference
from the_mask.ops.labels.taps import axis_taps
from the_mask.ops.registration import operator
from the_mask.ops.selection import choose


def upsample_argmax(
    scores: Tensor, network_size: tuple[int, int], output_size: tuple[int, int], stride: int = 1
) -> Tensor:
    """Best class of every pixel of a score map, enlarged to the network input and resized to the output.

    Both steps are bilinear, as ``F.interpolate(align_corners=False)``; padding beyond the network input is removed
    between them. No tensor of K full-size maps is made. Has no gradient.

    Args:
        scores: [K, h, w] of any floating type; converted to float32.
        network_size: (H, W), pixels; h >= H / stride, w >= W / stride.
        output_size: (H', W'), pixels.
        stride: pixels of the network input per cell.

    Returns:
        [H', W'] uint8 (int32 with more than 255 classes) on the device of ``scores``; on ties the lowest class.

    Raises:
        ValueError: sizes that do not fit; the message names them.
    """
    check_rank("scores", scores, "K h w")
    if 0 in scores.shape or not scores.is_floating_point():
        raise ValueError(f"scores has shape {tuple(scores.shape)} and dtype {scores.dtype}: expected floats, not empty")
    if stride < 1 or min(*network_size, *output_size) < 1:
        raise ValueError(
            f"stride {stride}, network_size {network_size}, output_size {output_size}: expected at least 1"
        )
    for axis, name, size in ((1, "height", network_size[0]), (2, "width", network_size[1])):
        if scores.shape[axis] < math.ceil(size / stride):
            raise ValueError(
                f"scores has shape {tuple(scores.shape)}: a {name} of {size} pixels at stride {stride} needs "
                f"{math.ceil(size / stride)} cells"
            )
    return torch.ops.the_mask.upsample_argmax(scores.detach().float().contiguous(), network_size, output_size, stride)


def _taps(scores: Tensor, network: Sequence[int], output: Sequence[int], stride: int) -> list[Tensor]:
    """First cells and weights of the rows, then of the columns, on the device of the scores."""
    row_start, row_weights = axis_taps(scores.shape[1], stride, network[0], output[0])
    column_start, column_weights = axis_taps(scores.shape[2], stride, network[1], output[1])
    taps = max(row_weights.shape[1], column_weights.shape[1])
    arrays = (row_start, _padded(row_weights, taps), column_start, _padded(column_weights, taps))
    return [torch.from_numpy(array).to(scores.device) for array in arrays]


def _padded(weights: NDArray[np.float32], taps: int) -> NDArray[np.float32]:
    return weights if weights.shape[1] == taps else np.pad(weights, ((0, 0), (0, taps - weights.shape[1])))


@operator("upsample_argmax", "(Tensor scores, SymInt[] network_size, SymInt[] output_size, SymInt stride) -> Tensor")
def _operator(scores: Tensor, network_size: Sequence[int], output_size: Sequence[int], stride: int) -> Tensor:
    path = choose(scores.device, "upsample_argmax").path
    taps = _taps(scores, network_size, output_size, stride)
    if path == "compiled":
        return torch.ops.the_mask_kernels.upsample_argmax(scores.contiguous(), *taps)
    function = upsample_argmax_reference if path == "reference" else upsample_argmax_portable
    return function(scores, taps[0], taps[1], taps[2], taps[3])


@torch.library.register_fake("the_mask::upsample_argmax")
def _(scores: Tensor, network_size: Sequence[int], output_size: Sequence[int], stride: int) -> Tensor:
    return scores.new_empty(output_size[0], output_size[1], dtype=label_dtype(scores.shape[0]))
