"""Heads of encoder-only mask classification: queries, classes, masks, upscaling, and the annealed attention mask.

Axes: N images, Q queries, K classes, D width, P prefix tokens, h w patches per side, S = Q + P + h*w tokens.

Modules and keys are EoMT's and VidEoMT's: ``q``, ``class_head``, ``mask_head.{0,2,4}``,
``upscale.i.{conv1,conv2,norm}``, ``attn_mask_probs`` and, where queries are carried on, ``query_updater``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.modeling.mask.frozen_decoder import FrozenDecoder
from the_mask.ops.fast_linear import fast_linear
from the_mask.ops.inference import is_plain_inference

MASK_STRIDE = 4
# At inference, patches are upscaled in bands of rows whose pixels take this much memory.
BAND_BYTES = 12 << 20


class UpscaleBlock(nn.Module):
    """Double a map's size: transposed convolution, GELU, depthwise 3x3, LayerNorm over channels.

    Maps are channels last, [N, h, w, D] -> [N, 2h, 2w, D]: the transposed convolution, whose windows do not overlap, is
    then one matrix product, and the norm needs no transposition. Parameters are those of the usual modules.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, bias=False)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, above: bool = False, below: bool = False) -> Tensor:
        """
        Args:
            x: a map, or some rows of one.
            above, below: the first, the last row is one of the map beside the rows asked for; so is the result's.
        """
        count, height, width, channels = x.shape
        assert self.conv1.bias is not None
        kernel = self.conv1.weight.permute(2, 3, 1, 0).reshape(-1, channels)
        x = fast_linear(x, kernel, self.conv1.bias.repeat(4), gelu=True).view(count, height, width, 2, 2, channels)
        x = x.transpose(2, 3).reshape(count, 2 * height, 2 * width, channels)
        x = self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        # The row beside became two; the outer one lacked its neighbour.
        return self.norm(x[:, int(above) : 2 * height - int(below)])


class EncoderHead(nn.Module):
    """The parts that an encoder-only model adds to its encoder.

    Args:
        width: D.
        num_queries: Q.
        num_classes: K.
        patch_size: pixels per side of a patch, a power of two >= 8.
        num_blocks: blocks that see the queries.
        propagate: queries are carried from frame to frame.
        decoder: decoder of a frozen encoder; None: the encoder's last blocks see the queries.

    Raises:
        ValueError: a patch size that cannot be halved down to the stride of the masks.
    """

    attn_mask_probs: Tensor

    def __init__(
        self,
        width: int,
        num_queries: int,
        num_classes: int,
        patch_size: int,
        num_blocks: int,
        propagate: bool = False,
        decoder: FrozenDecoder | None = None,
    ) -> None:
        super().__init__()
        steps = max(1, int(math.log2(patch_size)) - 2)
        if patch_size < 2 * MASK_STRIDE or patch_size & (patch_size - 1):
            raise ValueError(
                f"MODEL.VIT.PATCH_SIZE={patch_size}: masks of stride {MASK_STRIDE} come from doubling the map of "
                "patches, so patches must be 8, 16 or 32 pixels"
            )
        self.q = nn.Embedding(num_queries, width)
        self.class_head = nn.Linear(width, num_classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.upscale = nn.Sequential(*(UpscaleBlock(width) for _ in range(steps)))
        self.query_updater = nn.Linear(width, width) if propagate else None
        self.decoder: FrozenDecoder | None = decoder
        self.register_buffer("attn_mask_probs", torch.ones(num_blocks))

    @property
    def num_queries(self) -> int:
        """Number of queries, Q."""
        return self.q.num_embeddings

    def predict(self, queries: Tensor, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Classes and masks of queries.

        Args:
            queries: [N, Q, D], normed.
            patches: [N, h*w, D], normed.
            grid: (h, w).

        Returns:
            logits [N, Q, K + 1] and masks [N, Q, h * patch / 4, w * patch / 4], logits too.
        """
        own, patches = self.mask_head(queries), patches.unflatten(1, grid)
        rows = grid[0]
        if is_plain_inference(own, patches):
            row_bytes = own.element_size() * patches[0, 0].numel() * 4 ** len(self.upscale)
            rows = max(1, BAND_BYTES // row_bytes)
        bands = [self._band(own, patches, start, min(start + rows, grid[0])) for start in range(0, grid[0], rows)]
        return self.class_head(queries), bands[0] if len(bands) == 1 else torch.cat(bands, dim=2)

    def _band(self, queries: Tensor, patches: Tensor, start: int, stop: int) -> Tensor:
        """Masks [N, Q, ., .] of the rows from ``start`` to ``stop`` of patches [N, h, w, D]."""
        above, below = start > 0, stop < patches.shape[1]
        pixels = patches[:, start - above : stop + below]
        for block in self.upscale:
            pixels = block(pixels, above, below)
        pixels = pixels[:, int(above) : pixels.shape[1] - int(below)]
        # One product per image: its pixels are the weights.
        pairs = zip(queries, pixels.flatten(1, 2), strict=True)
        return torch.stack([fast_linear(*pair) for pair in pairs]).unflatten(2, pixels.shape[1:3])

    def carry(self, queries: Tensor) -> Tensor:
        """Queries of the next frame from those of a frame, [N, Q, D] each."""
        if self.query_updater is None:
            return self.q.weight.expand(len(queries), -1, -1)
        return self.query_updater(queries) + self.q.weight

    def first_queries(self, count: int) -> Tensor:
        """Queries of the first frame of ``count`` clips, [N, Q, D]."""
        return self.q.weight.expand(count, -1, -1)


def attention_mask(masks: Tensor, grid: tuple[int, int], prefix: int, keep: Tensor | None) -> Tensor:
    """Attention mask of the next block: a query attends only to patches in its own mask, other tokens to everything.

    A query with an empty mask still attends to the other queries and the prefix tokens.

    Args:
        masks: logits [N, Q, ., .].
        grid: (h, w).
        prefix: P.
        keep: bool [N, Q], the queries whose mask is used; None: all.

    Returns:
        bool [N, 1, S, S], True where attention is allowed. No gradient.
    """
    count, queries = masks.shape[:2]
    inside = F.interpolate(masks.detach(), size=grid, mode="bilinear", align_corners=False).flatten(2) > 0
    if keep is not None:
        inside |= ~keep.unsqueeze(-1)
    total = queries + prefix + inside.shape[-1]
    allowed = torch.ones(count, 1, total, total, dtype=torch.bool, device=masks.device)
    allowed[:, 0, :queries, queries + prefix :] = inside
    return allowed


def annealed_probability(share: float, start: float, end: float, power: float = 0.9) -> float:
    """Probability that a query keeps its attention mask, at a point of the training.

    Args:
        share: share of the training that is done, 0..1.
        start: share at which the probability begins to fall from 1.
        end: share at which it reaches 0.
        power: exponent of the decay; 1 is linear.
    """
    if share < start:
        return 1.0
    if share >= end:
        return 0.0
    return (1.0 - (share - start) / (end - start)) ** power


def check_annealing(starts: Sequence[float], ends: Sequence[float], num_blocks: int) -> None:
    """Raise a ValueError unless there are a start and a later end for each block, as shares of the training."""
    if len(starts) != num_blocks or len(ends) != num_blocks:
        raise ValueError(
            f"MODEL.ENCODER.ANNEAL_START has {len(starts)} and ANNEAL_END {len(ends)} numbers; expected one for each "
            f"of the {num_blocks} blocks (MODEL.ENCODER.NUM_BLOCKS)"
        )
    for start, end in zip(starts, ends, strict=True):
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"MODEL.ENCODER.ANNEAL_START {start} and ANNEAL_END {end}: expected shares of the training, "
                "0 <= start < end <= 1"
            )
