"""Labels of an enlarged score map in PyTorch: in row tiles (portable), and whole in float64 (the oracle).

Axes: ``K`` classes, ``h w`` map, ``H W`` labels, ``T`` taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_PER_TILE = 16


def label_dtype(classes: int) -> torch.dtype:
    """uint8 for at most 255 classes (255 is reserved for "ignore"), else int32."""
    return torch.uint8 if classes <= 255 else torch.int32


def upsample_argmax_reference(
    scores: Tensor, row_start: Tensor, row_weights: Tensor, column_start: Tensor, column_weights: Tensor
) -> Tensor:
    """Explicit matrices for both axes in float64, all scores at once; arguments as for the operator."""
    rows = _matrix(row_start, row_weights.double(), scores.shape[1])
    columns = _matrix(column_start, column_weights.double(), scores.shape[2])
    return (rows @ scores.double() @ columns.t()).argmax(dim=0).to(label_dtype(scores.shape[0]))


def upsample_argmax_portable(
    scores: Tensor, row_start: Tensor, row_weights: Tensor, column_start: Tensor, column_weights: Tensor
) -> Tensor:
    """In tiles of rows, never K x H x W at once; arguments as for the operator."""
    height = scores.shape[1]
    labels = scores.new_empty(len(row_start), len(column_start), dtype=label_dtype(scores.shape[0]))
    last = torch.tensor(scores.shape[2] - 1, device=scores.device)
    cells = [(column_start.long() + t).minimum(last) for t in range(column_weights.shape[1])]
    for start in range(0, len(row_start), ROWS_PER_TILE):
        tile = slice(start, start + ROWS_PER_TILE)
        first, end = int(row_start[tile].min()), min(int(row_start[tile].max()) + row_weights.shape[1], height)
        band = scores[:, first:end]
        wide = band.index_select(2, cells[0]) * column_weights[:, 0]
        for t, cell in enumerate(cells[1:], start=1):
            wide = torch.addcmul(wide, band.index_select(2, cell), column_weights[:, t])
        matrix = _matrix(row_start[tile] - first, row_weights[tile], end - first)
        # max() returns the first of equal classes, as argmax() does, and is faster over the outermost dimension.
        labels[tile] = (matrix @ wide).max(dim=0).indices.to(labels.dtype)
    return labels


def _matrix(start: Tensor, weights: Tensor, size: int) -> Tensor:
    """[n, size] of weights [n, T] that begin at ``start`` [n]."""
    matrix = weights.new_zeros(len(start), size)
    for t in range(weights.shape[1]):
        cell = (start.long() + t).clamp(max=size - 1)[:, None]
        matrix.scatter_add_(1, cell, weights[:, t : t + 1])
    return matrix
