"""Random points on masks: bilinear sampling, and the choice of uncertain points.

Axes: B clips, T frames, Q queries, N targets, M maps, C channels, P points, h w map size. Points are (x, y) in 0..1 of
the map's extent, (0, 0) being the outer corner of the first pixel; values outside the map count as 0 (bilinear
``grid_sample`` with ``align_corners=False``, as in PointRend and the released Mask2Former).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Candidates drawn at a time by `importance_points`, which bounds its memory for any number of maps. On a CPU small
# chunks stay in the cache; on a GPU few launches matter.
_CANDIDATES_PER_CHUNK = {"cpu": 1 << 18, "other": 1 << 23}
# Points per block of `shared_point_blocks`: with a hundred channels a block stays in a core's cache.
_POINTS_PER_BLOCK = 4096
# Added to the certainty of candidates that are taken last.
_LAST = 1e30


def point_generator(seed: int, stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Generator of one stream of random points of one training sample.

    Args:
        seed: the sample's own seed, so that points depend on the sample and not on rank, worker or batch.
        stream: number of the use; streams of one seed are independent of each other.
        device: where the points are drawn; the numbers differ between device types.

    Raises:
        ValueError: a negative seed.
    """
    if seed < 0:
        raise ValueError(f"the seed of a sample must be >= 0, got {seed}")
    generator = torch.Generator(device=device)
    # SeedSequence mixes (seed, stream) so that neighbouring seeds share no stream.
    state = np.random.SeedSequence([seed, stream]).generate_state(2, np.uint32)
    generator.manual_seed((int(state[0]) << 31) ^ int(state[1]))
    return generator


def point_sample(maps: Tensor, points: Tensor, padding: str = "zeros") -> Tensor:
    """Bilinear values of maps at points, which differ per map.

    Args:
        maps: [M, C, h, w].
        points: [M, P, 2], (x, y) in 0..1.
        padding: values outside the map: "zeros", or "border" for those of the outermost pixels.

    Returns:
        [M, C, P].
    """
    return grid_values(maps, (2.0 * points - 1.0).to(maps.dtype), padding)


def grid_values(maps: Tensor, grid: Tensor, padding: str = "zeros") -> Tensor:
    """`point_sample` at coordinates in -1..1, for points of which several maps are sampled."""
    grid = grid.unsqueeze(1)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode=padding, align_corners=False).squeeze(2)


def bilinear_corners(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four pixels around each point and their bilinear weights.

    Args:
        points: [..., 2], (x, y) in 0..1.
        height, width: size of the map.

    Returns:
        ``index`` int64 [..., 4] into the flattened map, and ``weight`` [..., 4]. Corners outside the map have weight 0
        (and the index of the nearest pixel).
    """
    columns, weights_x = _corners_of_axis(points[..., 0], width)
    rows, weights_y = _corners_of_axis(points[..., 1], height)
    rows = [r * width for r in rows]
    index = torch.stack([r + c for r in rows for c in columns], dim=-1)
    weight = torch.stack([wy * wx for wy in weights_y for wx in weights_x], dim=-1)
    return index, weight


def _corners_of_axis(position: Tensor, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """Lower and upper pixel of each position (0..1) on one axis, and their weights; weight 0 outside."""
    pixel = position * length - 0.5
    low = pixel.floor()
    fraction = pixel - low
    index = low.long()
    upper = index + 1
    weights = [(1 - fraction).masked_fill_(index < 0, 0.0), fraction.masked_fill_(upper >= length, 0.0)]
    return [index.clamp_(0, length - 1), upper.clamp_(0, length - 1)], weights


def shared_point_blocks(maps: Tensor, points: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Bilinear float32 values of all channels of one map at the same points, some points at a time.

    Equal to `point_sample`, without gradient. The corners are looked up once for all channels and each lookup reads one
    contiguous row of channels, which on a CPU is about ten times as fast as ``grid_sample`` at a hundred channels.

    Args:
        maps: [C, h, w].
        points: [P, 2], (x, y) in 0..1.

    Yields:
        The slice of the points, and their values [P', C].
    """
    channels, height, width = maps.shape
    table = maps.detach().reshape(channels, height * width).t().float().contiguous()
    index, weight = bilinear_corners(points.float(), height, width)
    for start in range(0, points.shape[0], _POINTS_PER_BLOCK):
        rows = slice(start, start + _POINTS_PER_BLOCK)
        yield rows, F.embedding_bag(index[rows], table, per_sample_weights=weight[rows], mode="sum")


def shared_index_sample(index_map: Tensor, points: Tensor, num_values: int) -> Tensor:
    """Bilinear values of the one-hot maps of an integer map, without making those maps.

    Args:
        index_map: [H, W] integers in 0..num_values-1.
        points: [..., P, 2], (x, y) in 0..1.
        num_values: number of one-hot maps, V.

    Returns:
        float32 [..., P, V].
    """
    index, weight = bilinear_corners(points.reshape(-1, 2), *index_map.shape)
    values = index_map.flatten()[index].long()
    one_hot = torch.eye(num_values, device=points.device)
    sampled = F.embedding_bag(values, one_hot, per_sample_weights=weight, mode="sum")
    return sampled.view(*points.shape[:-1], num_values)


def importance_points(
    maps: Tensor,
    num_points: int,
    oversample_ratio: float,
    importance_ratio: float,
    generator: torch.Generator,
    ignored: Tensor | None = None,
) -> Tensor:
    """Points where the masks are uncertain, drawn separately for each map (PointRend; released Mask2Former).

    ``oversample_ratio * P`` uniform candidates per map; the ``importance_ratio * P`` with the smallest absolute logit,
    taken after bilinear sampling, are kept, and new uniform points fill up to P.

    Args:
        maps: logits [M, h, w].
        num_points: P.
        oversample_ratio: candidates per point, >= 1.
        importance_ratio: share of uncertain points, 0..1.
        generator: source of all points, on the maps' device.
        ignored: bool [H, W] or None. Candidates all of whose pixels are ignored are taken last.

    Returns:
        [M, P, 2], (x, y) in 0..1, without gradient.

    Raises:
        ValueError: a ratio outside its range or ``num_points < 1``.
    """
    if num_points < 1 or oversample_ratio < 1 or not 0 <= importance_ratio <= 1:
        raise ValueError(
            "point sampling needs num_points >= 1, oversample_ratio >= 1 and importance_ratio in 0..1, got "
            f"{num_points}, {oversample_ratio}, {importance_ratio}"
        )
    num_candidates = int(num_points * oversample_ratio)
    num_uncertain = int(num_points * importance_ratio)
    num_maps, device = maps.shape[0], maps.device
    limit = _CANDIDATES_PER_CHUNK["cpu" if device.type == "cpu" else "other"]
    chunk = max(1, limit // num_candidates)
    surrounded = None if ignored is None else _surrounded(ignored)
    parts = []
    with torch.no_grad():
        for start in range(0, num_maps, chunk):
            logits = maps[start : start + chunk].float()
            count = logits.shape[0]
            # Drawn in grid_sample's own range -1..1: rescaling all candidates would cost as much as drawing them.
            candidates = torch.empty(count, num_candidates, 2, device=device).uniform_(-1, 1, generator=generator)
            certainty = grid_values(logits[:, None], candidates)[:, 0].abs_()
            if surrounded is not None:
                # The four pixels around a candidate meet in the corner of pixels that is nearest to it.
                grid = candidates.view(1, 1, -1, 2)
                last = F.grid_sample(surrounded, grid, mode="nearest", align_corners=True)
                certainty.add_(last.view(count, -1), alpha=_LAST)
            chosen = _smallest(certainty, num_uncertain)
            uncertain = candidates.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2))
            fresh = torch.rand(count, num_points - num_uncertain, 2, generator=generator, device=device)
            parts.append(torch.cat([(uncertain + 1) / 2, fresh], dim=1))
    return torch.cat(parts) if parts else maps.new_zeros(0, num_points, 2, dtype=torch.float32)


def _surrounded(ignored: Tensor) -> Tensor:
    """1 at the corners of pixels, [1, 1, H + 1, W + 1], around which all four pixels of a bool [H, W] are True, else 0.

    Pixels outside are those nearest to them, as in padding with "border".
    """
    valid = F.pad((~ignored)[None, None].float(), (1, 1, 1, 1), mode="replicate")
    return 1 - F.max_pool2d(valid, 2, stride=1)


def _smallest(values: Tensor, count: int) -> Tensor:
    """Indices [M, count] of the smallest values of each row of [M, n], in no particular order."""
    if count == 0:
        return torch.zeros(values.shape[0], 0, dtype=torch.long, device=values.device)
    if count == values.shape[1]:
        return torch.arange(count, device=values.device).expand(values.shape[0], -1)
    if values.device.type == "cpu":
        # A partition; torch.topk takes four times as long on a CPU.
        return torch.from_numpy(np.argpartition(values.numpy(), count - 1, axis=1)[:, :count])
    return values.topk(count, dim=1, largest=False, sorted=False).indices
