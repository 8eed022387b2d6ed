"""Resizes tables of a file: of positions, made for another window or image size, and of queries."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor

SUFFIX = ".relative_position_bias_table"
# Absolute positions of a plain ViT.
ABSOLUTE = "backbone.model.pos_embed"
_PREFIX_TOKENS = ("backbone.model.cls_token", "backbone.model.reg_token")
# Number of rows of BEiT's tables that belong to the class token.
CLASS_TOKEN_ROWS = 3
# Learned queries of mask classifiers, [Q, D].
QUERIES = (".query_feat.weight", ".query_embed.weight", "sem_seg_head.q.weight")
# Noise on copied queries, in standard deviations of the table: enough for copies to become different.
QUERY_NOISE = 0.3


def fit_position_tables(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Resize the tables of a file to those of a model.

    Tables [rows,heads] of Swin are interpolated as timm does, BEiT's as the released segmentation code does, and the
    absolute positions [1,rows,D] of plain ViTs as timm does.

    Args:
        state: tensors by our names.
        ours: the model's state dict.

    Returns:
        The state dict, and the names of the resized tables. Tables with another number of heads are unchanged.

    Raises:
        ValueError: absolute positions that do not belong to a square of patches.
    """
    fitted, names = dict(state), []
    if ABSOLUTE in state and ABSOLUTE in ours and state[ABSOLUTE].shape != ours[ABSOLUTE].shape:
        from the_mask.modeling.backbones.plain_vit import resize_table

        prefix = sum(ours[name].shape[1] for name in _PREFIX_TOKENS if name in ours)
        fitted[ABSOLUTE] = resize_table(state[ABSOLUTE], ours[ABSOLUTE].shape, prefix, ABSOLUTE)
        names.append(ABSOLUTE)
    for name, table in state.items():
        wanted = ours.get(name) if name.endswith(SUFFIX) else None
        if wanted is None or wanted.shape == table.shape or wanted.shape[1:] != table.shape[1:]:
            continue
        old, new = _side(len(table), 0), _side(len(wanted), 0)
        if old and new:
            # timm takes more than a second to import, so it is imported only when needed.
            from timm.layers import resize_rel_pos_bias_table

            fitted[name] = resize_rel_pos_bias_table(table, ((new + 1) // 2,) * 2, tuple(wanted.shape))
            names.append(name)
        elif _side(len(table), CLASS_TOKEN_ROWS) and (new := _side(len(wanted), CLASS_TOKEN_ROWS)):
            from the_mask.modeling.backbones.beit import resize_position_table

            fitted[name] = resize_position_table(table, (new + 1) // 2)
            names.append(name)
    return fitted, names


def _side(rows: int, extra: int) -> int:
    """Side (odd) of the square of offsets in a table; 0 if the number of rows is not a square plus ``extra``."""
    side = isqrt(max(rows - extra, 0))
    return side if side * side == rows - extra and side % 2 else 0


def add_queries(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Give a file with fewer queries those that the model has more: noisy copies of the file's, in turn.

    They begin with what the old ones know; from a random start they would need as long a training.

    Returns:
        The state dict, and a note; "" where nothing was added.
    """
    fitted, note, generator = dict(state), "", torch.Generator().manual_seed(1)
    for name, table in state.items():
        wanted = ours.get(name) if name.endswith(QUERIES) else None
        if wanted is None or wanted.shape[1:] != table.shape[1:] or len(wanted) <= len(table):
            continue
        copies = table[torch.arange(len(wanted) - len(table)) % len(table)]
        noise = torch.randn(copies.shape, generator=generator, dtype=table.dtype)
        fitted[name] = torch.cat([table, copies + QUERY_NOISE * table.std() * noise])
        note = f"{len(copies)} of {len(wanted)} queries are noisy copies of the file's {len(table)}"
    return fitted, note
