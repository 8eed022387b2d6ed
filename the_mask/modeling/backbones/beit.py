"""BEiT (timm's model) with a four-level pyramid, for images of any size.

The pyramid is that of the BEiT segmentation code. Axes: B images, H W image size, h w patches per side, C channels,
N = h*w + 1 tokens (class token first), G patches per side of the square the position tables are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import isqrt
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.layers import get_norm
from timm.models.beit import Attention, Beit
from torch import Tensor, nn

from the_mask.modeling.backbones.common import LEVELS, STRIDES, PyramidBackbone, run_blocks
from the_mask.modeling.backbones.timm_adapter import create_headless, prune_and_load

PATCH = 16
# The segmentation code starts the layer scales here; timm's default is ten times as large.
LAYER_SCALE = 1e-6


def relative_position_index(height: int, width: int, trained: int, device: torch.device) -> Tensor:
    """Row of the position table for every pair of tokens: int64 [N,N], (query, key).

    The table has (2G-1)^2 rows for offsets -(G-1)..G-1 in y and x, then three rows: class token to patch, patch to
    class token, class token to itself. Offsets beyond the table use its border. Windows up to G patches per side are
    therefore exact; in larger images, distant patches are treated as G-1 away.

    Args:
        height: h.
        width: w.
        trained: G.
        device: of the result.
    """
    span, reach = 2 * trained - 1, trained - 1

    def offsets(size: int) -> Tensor:
        at = torch.arange(size, device=device)
        return (at[:, None] - at[None, :]).clamp(-reach, reach) + reach

    patches = offsets(height)[:, None, :, None] * span + offsets(width)[None, :, None, :]
    tokens = height * width + 1
    index = torch.empty(tokens, tokens, dtype=torch.int64, device=device)
    index[1:, 1:] = patches.reshape(tokens - 1, tokens - 1)
    index[0, :] = span * span
    index[:, 0] = span * span + 1
    index[0, 0] = span * span + 2
    return index


class GivenBiasAttention(Attention):
    """timm's attention with the position bias passed in by the caller, which knows the size of the image."""

    def _get_rel_pos_bias(self) -> Tensor:
        return self.relative_position_bias_table.new_zeros(())


def run_block(block: Any, x: Tensor, index: Tensor) -> Tensor:
    """One transformer block on tokens [B,N,C] with its position table read at ``index`` [N,N]."""
    bias = block.attn.relative_position_bias_table[index].permute(2, 0, 1)
    return block(x, shared_rel_pos_bias=bias[None])


def geometric_offsets(reach: int, target: int) -> np.ndarray:
    """Positions of a table's offsets -reach..reach on the finer axis -target..target: 0, ±1, ±(1+q), ±(1+q+q²), ...

    q is found by bisection in [1.01, 1.5] so that the last one lies at ``target``: neighbours stay neighbours, and
    the added length goes to the far offsets (released BEiT code).
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if sum(ratio**i for i in range(reach)) > target else (ratio, high)
    positive = np.cumsum(((low + high) / 2) ** np.arange(reach))
    return np.concatenate([-positive[::-1], [0.0], positive])


def resize_position_table(table: Tensor, trained: int) -> Tensor:
    """Resize a position table to G = ``trained`` patches per side: [(2g-1)²+3,heads] -> [(2G-1)²+3,heads].

    A larger table is interpolated by bicubic splines on :func:`geometric_offsets`; a smaller one is the centre of the
    old one. The three rows of the class token are kept.

    Raises:
        ValueError: the rows do not belong to a square of patches.
    """
    span = isqrt(len(table) - 3) if len(table) > 3 else 0
    if span * span != len(table) - 3 or span % 2 == 0:
        raise ValueError(f"position table of {len(table)} rows: expected (2g-1)^2+3 for a square of g patches per side")
    old, new = span // 2, trained - 1
    patches, extra = table[:-3].unflatten(0, (span, span)), table[-3:]
    if new <= old:
        patches = patches[old - new : old + new + 1, old - new : old + new + 1]
    else:
        # Imported here: a quarter of a second that loading other sizes alone needs.
        from scipy.interpolate import RectBivariateSpline

        at, wanted, degree = geometric_offsets(old, new), np.arange(-new, new + 1), min(3, span - 1)
        heads = [
            RectBivariateSpline(at, at, head, kx=degree, ky=degree)(wanted, wanted)
            for head in patches.permute(2, 0, 1).double().numpy()
        ]
        patches = torch.from_numpy(np.stack(heads, axis=-1)).to(table.dtype)
    return torch.cat([patches.flatten(0, 1), extra])


def resize_position_tables(state: dict[str, Tensor], trained: int) -> dict[str, Tensor]:
    """Apply :func:`resize_position_table` to the tables of a state dict."""
    return {
        key: resize_position_table(value, trained) if key.endswith("relative_position_bias_table") else value
        for key, value in state.items()
    }


def build_pyramid(dim: int, norm: str) -> nn.ModuleList:
    """Four branches from stride 16 to strides 4 (two deconvolutions), 8 (one), 16 and 32 (max pool)."""

    def deconv() -> nn.ConvTranspose2d:
        return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)

    return nn.ModuleList(
        [
            nn.Sequential(deconv(), get_norm(norm, dim) or nn.Identity(), nn.GELU(), deconv()),
            deconv(),
            nn.Identity(),
            nn.MaxPool2d(2, ceil_mode=True),
        ]
    )


class BeitPyramid(PyramidBackbone):
    """BEiT: images [B,3,H,W] -> ``res2`` ... ``res5``, all of the model's width, at ceil(H/4), ceil(H/8), ...

    Args:
        name: a timm BEiT with a position table per block.
        image_size: pixels per side of the square the position tables are for.
        pretrained: download timm's weights.
        weights: local file in any layout timm reads, wins over ``pretrained``; position tables are resized.
        out_indices: the four blocks whose outputs make the levels.
        in_channels: channels of the images.
        drop_path: stochastic depth of the last block, rising linearly from 0.
        norm: of the pyramid, as for Detectron2's ``get_norm``.
        recompute: gradient checkpointing: recompute the activations inside blocks in the backward pass.
        freeze_at: 1 freezes the patch embedding, 2 ... 5 also the blocks up to the first ... fourth output.

    Raises:
        FileNotFoundError, ValueError: see :mod:`the_mask.modeling.backbones.timm_adapter`; not a BEiT with position
            tables, ``image_size`` not a multiple of 16, or ``out_indices`` that are not four rising block numbers.
    """

    def __init__(
        self,
        name: str = "beit_large_patch16_224",
        image_size: int = 512,
        pretrained: bool = False,
        weights: str = "",
        out_indices: Sequence[int] = (7, 11, 15, 23),
        in_channels: int = 3,
        drop_path: float = 0.2,
        norm: str = "SyncBN",
        recompute: bool = False,
        freeze_at: int = 0,
    ) -> None:
        if not name.startswith("beit") or f"patch{PATCH}" not in name:
            raise ValueError(f"MODEL.BEIT.NAME={name!r}: must be one of timm's beit*_patch16_* models")
        if image_size < PATCH or image_size % PATCH:
            raise ValueError(f"MODEL.BEIT.IMG_SIZE={image_size}: must be a multiple of {PATCH}")
        model: Beit = create_headless(
            name, pretrained and not weights, in_channels, drop_path, img_size=image_size, init_values=LAYER_SCALE
        )
        depth = len(model.blocks)
        indices = list(out_indices)
        if len(indices) != 4 or sorted(set(indices)) != indices or not 0 <= indices[0] <= indices[-1] < depth:
            raise ValueError(f"MODEL.BEIT.OUT_INDICES={indices}: must be four rising block numbers in 0..{depth - 1}")
        super().__init__([model.embed_dim] * 4)
        self.trained = image_size // PATCH
        self.indices = prune_and_load(model, indices, weights, partial(resize_position_tables, trained=self.trained))
        self.recompute = recompute
        for block in model.blocks:
            block.attn.__class__ = GivenBiasAttention
        self.model = model
        self.fpn = build_pyramid(model.embed_dim, norm)
        bounds = [0, *(i + 1 for i in self.indices)]
        stages = [model.blocks[start:end] for start, end in pairwise(bounds)]
        self.freeze_stages([[model.patch_embed], *stages], freeze_at)
        model.cls_token.requires_grad_(freeze_at == 0)

    @property
    def size_divisibility(self) -> int:
        return STRIDES[-1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        full_height, full_width = x.shape[-2:]
        x = F.pad(x, (0, -full_width % PATCH, 0, -full_height % PATCH))
        height, width = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        # The module's own forward insists on IMG_SIZE.
        x = self.model.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.model.cls_token.expand(len(x), -1, -1), x), dim=1)
        index = relative_position_index(height, width, self.trained, x.device)
        recompute = self.recompute and torch.is_grad_enabled()
        outputs = []
        for i, block in enumerate(self.model.blocks):
            x = run_blocks([partial(run_block, block)], x, index, recompute=recompute)
            if i in self.indices:
                outputs.append(x[:, 1:].transpose(1, 2).unflatten(2, (height, width)))
        features = {}
        for level, stride, branch, output in zip(LEVELS, STRIDES, self.fpn, outputs, strict=True):
            # The input was padded to whole patches; crop the finer levels to the image.
            features[level] = branch(output)[..., : -(-full_height // stride), : -(-full_width // stride)]
        return features
