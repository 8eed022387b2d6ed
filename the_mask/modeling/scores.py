"""Class scores from queries, and label maps from class scores, without a full-size tensor per query or per class.

Axes: Q queries, K classes, T frames, h w mask size, H W size of the network input, H' W' size of the original frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from the_mask.ops import upsample_argmax
from the_mask.ops.fast_linear import fast_product

PIXELS_PER_CHUNK = 1 << 16
ROWS_PER_TILE = 16


def semantic_scores(logits: Tensor, masks: Tensor, chunk: int = PIXELS_PER_CHUNK, enlarge: int = 1) -> Tensor:
    """Combine classes and masks: S[c] = sum over q of softmax(logits_q)[c] * sigmoid(mask_q), no-object left out.

    Args:
        logits: [Q, K+1]. masks: logits [Q, h, w].
        chunk: pixels at a time; no tensor of Q maps is larger.
        enlarge: factor by which the masks are enlarged (bilinear) before the sigmoid: 1 merges at mask size, as
            THE-Mask; the mask stride merges at the size of the network input, as the released Mask2Former.

    Returns:
        [K, h*enlarge, w*enlarge] float32 scores >= 0 (not probabilities: they need not sum to 1 over classes).
        Source: Mask2Former, semantic inference.
    """
    # Mixed precision would round the sum over all queries to 8 bits, enough to swap close classes.
    with torch.autocast(masks.device.type, enabled=False):
        classes = logits.float().softmax(dim=-1)[:, :-1].t()
        if enlarge > 1:
            return _merge_enlarged(classes, masks, chunk, enlarge)
        flat = masks.flatten(1)
        # A number of chunks in an exported program would fix its sizes.
        chunks = (flat,) if torch.compiler.is_exporting() else flat.split(chunk, dim=1)
        parts = [fast_product(classes, part.float().sigmoid()) for part in chunks]
        return torch.cat(parts, dim=1).unflatten(1, masks.shape[1:])


def _merge_enlarged(classes: Tensor, masks: Tensor, chunk: int, enlarge: int) -> Tensor:
    """classes [K, Q], masks [Q, h, w] -> [K, h*enlarge, w*enlarge], in bands of rows of about ``chunk`` pixels."""
    height, width = masks.shape[-2] * enlarge, masks.shape[-1] * enlarge
    if torch.compiler.is_exporting():
        large = F.interpolate(masks[None].float(), size=(height, width), mode="bilinear", align_corners=False)[0]
        return (classes @ large.flatten(1).sigmoid()).unflatten(1, (height, width))
    scores = masks.new_empty(len(classes), height, width, dtype=torch.float32)
    rows = max(1, chunk // width)
    matrix = _interpolation_matrix(masks.shape[-2], height)
    for band, part in zip(matrix.split(rows), scores.split(rows, dim=1), strict=True):
        large = _resize_band(masks, band, width, width, enlarge)
        part.copy_(fast_product(classes, large.flatten(1).sigmoid_()).unflatten(1, part.shape[1:]))
    return scores


def clip_scores(
    outputs: Mapping[str, Any], clip: int, clip_weight: float, chunk: int = PIXELS_PER_CHUNK, enlarge: int = 1
) -> Tensor:
    """Scores of every frame of one clip from a mask decoder's predictions.

    Args:
        outputs: see :mod:`the_mask.modeling.mask.mask_decoders.base`.
        clip: index of the clip in the batch.
        clip_weight: weight of the clip branch; the frame branch, where there is one, has the rest.
        chunk, enlarge: see :func:`semantic_scores`.

    Returns:
        [T, K, h*enlarge, w*enlarge] float32.
    """
    frame = outputs.get("frame")
    scores = []
    for t in range(outputs["pred_masks"].shape[2]):
        score = semantic_scores(outputs["pred_logits"][clip], outputs["pred_masks"][clip, :, t], chunk, enlarge)
        if frame is not None:
            own = semantic_scores(frame["pred_logits"][clip, t], frame["pred_masks"][clip, :, t], chunk, enlarge)
            score = score.mul_(clip_weight).add_(own, alpha=1 - clip_weight)
        scores.append(score)
    return torch.stack(scores)


def query_maps(outputs: Mapping[str, Any], clip: int, clip_weight: float) -> tuple[Tensor, Tensor]:
    """The queries behind :func:`clip_scores` of the last frame of one clip.

    Returns:
        Class scores [Q, K] (no-object left out) and mask logits [Q, h, w], float32, such that the sum over q of class
        scores times sigmoid(mask) is the frame's scores; with a frame branch, Q counts both branches' queries.
    """
    frame = outputs.get("frame")
    classes = [outputs["pred_logits"][clip].float().softmax(dim=-1)[:, :-1]]
    masks = [outputs["pred_masks"][clip, :, -1].float()]
    if frame is not None:
        own = frame["pred_logits"][clip, -1].float().softmax(dim=-1)[:, :-1]
        classes = [classes[0] * clip_weight, own * (1 - clip_weight)]
        masks.append(frame["pred_masks"][clip, :, -1].float())
    return torch.cat(classes), torch.cat(masks)


def resize_scores(
    scores: Tensor, network_size: tuple[int, int], output_size: tuple[int, int], stride: int, rows: slice = slice(None)
) -> Tensor:
    """Bilinear to the size of the network input, then bilinear to the original size, for some rows of the result.

    The map covers ceil(H/stride) * stride rows of the input; those beyond H (padding) are cut before the second step.
    Both steps are linear and separable: columns are interpolated on the rows that are needed only, and the two row
    steps are one banded matrix.

    Args:
        scores: [K, h, w] with h = ceil(H/stride).
        network_size: (H, W), pixels, without padding.
        output_size: (H', W'), pixels.
        stride: pixels of the input per cell.
        rows: rows of the result, step 1.

    Returns:
        [K, len(rows), W'], equal to those rows of the whole result up to rounding.
    """
    matrix = _row_matrix(scores.shape[-2], network_size[0], output_size[0], stride)[rows]
    resized = scores.new_empty(scores.shape[0], len(matrix), output_size[1], dtype=torch.float32)
    # In tiles, because a product with the whole matrix would mostly multiply by zero.
    for tile, part in zip(matrix.split(ROWS_PER_TILE), resized.split(ROWS_PER_TILE, dim=1), strict=True):
        part.copy_(_resize_band(scores, tile, network_size[1], output_size[1], stride))
    return resized


def _resize_band(scores: Tensor, matrix: Tensor, network_width: int, output_width: int, stride: int) -> Tensor:
    """Rows ``matrix`` [rows, h] of the maps [K, h, w], columns interpolated to the two widths in turn."""
    needed = matrix.any(dim=0).nonzero().flatten()
    if not len(needed):
        return scores.new_empty(scores.shape[0], 0, output_width)
    map_width = scores.shape[-1] * stride
    first, last = int(needed[0]), int(needed[-1]) + 1
    band = scores[None, :, first:last].float()
    band = F.interpolate(band, size=(last - first, map_width), mode="bilinear", align_corners=False)
    band = band[..., :network_width]
    if network_width != output_width:
        band = F.interpolate(band, size=(last - first, output_width), mode="bilinear", align_corners=False)
    with torch.autocast(scores.device.type, enabled=False):
        return matrix[:, first:last].to(band) @ band[0]


def label_map(scores: Tensor, network_size: tuple[int, int], output_size: tuple[int, int], stride: int) -> Tensor:
    """Best class per pixel of the original frame, never K x H' x W' at once: :func:`the_mask.ops.upsample_argmax`.

    Args: as :func:`resize_scores`.

    Returns:
        uint8 (int32 with more than 255 classes) [H', W'] on the CPU; the lowest of equal classes.
    """
    return upsample_argmax(scores, network_size, output_size, stride).cpu()


def _row_matrix(height: int, network_height: int, output_height: int, stride: int) -> Tensor:
    """Both row steps of :func:`resize_scores` as one banded matrix [H', h]; float64."""
    to_network = _interpolation_matrix(height, height * stride)[:network_height]
    return _interpolation_matrix(network_height, output_height) @ to_network


def _interpolation_matrix(size_in: int, size_out: int) -> Tensor:
    """Weights [size_out, size_in] of 1-D linear interpolation, as ``F.interpolate(align_corners=False)``; float64."""
    position = ((torch.arange(size_out, dtype=torch.float64) + 0.5) * (size_in / size_out) - 0.5).clamp(min=0)
    low = position.floor().long().clamp(max=size_in - 1)
    high = (low + 1).clamp(max=size_in - 1)
    fraction = (position - low)[:, None]
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    matrix.scatter_add_(1, low[:, None], 1 - fraction)
    return matrix.scatter_add_(1, high[:, None], fraction)
