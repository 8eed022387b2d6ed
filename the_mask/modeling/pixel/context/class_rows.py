"""The update of a class memory's rows from the features of its classes: pure functions.

"Memory Based Video Scene Parsing", Eq. 1-4 (after MCIBI). The rows are held by ``pixel.context.class_memory``.

Axes: B frames, K classes, n prototypes per class, C channels, P pixels, H W size of labels, h w size of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.utils import comm
from torch import Tensor, distributed
from torch.nn import functional as F

# Below this sum of weights, all pixels equal their prototype and their plain mean is taken.
LEAST_WEIGHT = 1e-6
# Maximum number of values of upsampled features in memory at a time.
VALUES_PER_BAND = 1 << 24


@dataclass(frozen=True)
class MomentumSchedule:
    """Momentum m (the weight of the new value, Eq. 1) over a run: base * ((1 - floor) (1 - t/T)^power + floor).

    The defaults 0.9, 0.9 and 0.01 are the released code's, where m follows the learning rate. Here it does not, so that
    a warm-up or another optimiser does not change the memory. ``power`` 0 keeps m constant.
    """

    base: float = 0.9
    power: float = 0.9
    floor: float = 0.01

    def __post_init__(self) -> None:
        if not (0 <= self.base <= 1 and 0 <= self.floor <= 1 and self.power >= 0):
            raise ValueError(
                f"class memory: MOMENTUM {self.base} and MOMENTUM_FLOOR {self.floor} must be in 0..1, "
                f"MOMENTUM_POWER {self.power} >= 0"
            )

    def __call__(self, iteration: int, total: int) -> float:
        """m of an iteration, counted from 0, in a run of ``total``; later iterations keep the last value."""
        left = 1.0 - min(max(iteration / max(total, 1), 0.0), 1.0)
        return self.base * ((1.0 - self.floor) * left**self.power + self.floor)


@dataclass(frozen=True)
class ClassSums:
    """The sums over pixels that an update needs; sums over disjoint sets of pixels add up.

    Attributes:
        weighted: sum of w_i R_i, [K, n, C] float64.
        weights: sum of w_i, [K, n] float64.
        plain: sum of R_i, [K, n, C] float64.
        counts: pixels, [K, n] float64.
    """

    weighted: Tensor
    weights: Tensor
    plain: Tensor
    counts: Tensor

    @classmethod
    def zeros(cls, memory: Tensor) -> ClassSums:
        """Sums over an empty set of pixels, for a memory [K, n, C]."""
        rows = torch.zeros(memory.shape, dtype=torch.float64, device=memory.device)
        return cls(rows, rows[..., 0].clone(), rows.clone(), rows[..., 0].clone())

    def __add__(self, other: ClassSums) -> ClassSums:
        return ClassSums(
            self.weighted + other.weighted,
            self.weights + other.weights,
            self.plain + other.plain,
            self.counts + other.counts,
        )

    def over_ranks(self) -> ClassSums:
        """Sums over the pixels of all processes; a collective call."""
        if comm.get_world_size() == 1:
            return self
        packed = torch.cat([self.weighted, self.plain, self.weights[..., None], self.counts[..., None]], dim=-1)
        distributed.all_reduce(packed)
        weighted, plain, weights, counts = packed.split([self.weighted.shape[-1], self.plain.shape[-1], 1, 1], dim=-1)
        return ClassSums(weighted, weights[..., 0], plain, counts[..., 0])


def class_sums(features: Tensor, labels: Tensor, positions: Tensor, memory: Tensor, seen: Tensor) -> ClassSums:
    """Sums of the pixels of each class, weighted by how unlike its prototype a pixel is (Eq. 2-4).

    A pixel belongs to the most similar prototype of its class; pixels of a class that was never seen are distributed
    over its prototypes by position. w_i = 1 - cos(R_i, M_c).

    Args:
        features: [P, C]; converted to float32.
        labels: int64 [P]; pixels whose label is not in 0..K-1 are not counted.
        positions: int64 [P], number of the pixel in its frame.
        memory: [K, n, C].
        seen: bool [K].
    """
    sums = ClassSums.zeros(memory)
    valid = (labels >= 0) & (labels < memory.shape[0])
    features, labels, positions = features[valid].float(), labels[valid], positions[valid]
    if not len(labels):
        return sums
    prototypes = memory.shape[1]
    classes, own = labels.unique(return_inverse=True)
    rows = F.normalize(memory[classes].float(), dim=-1)
    alike = torch.einsum("pc,knc->pkn", F.normalize(features, dim=-1), rows)
    alike = alike.gather(1, own[:, None, None].expand(-1, 1, prototypes))[:, 0]
    best, nearest = alike.max(dim=-1)
    nearest = torch.where(seen[labels], nearest, positions % prototypes)
    # Rounding may give a cosine above 1; a weight must not be negative.
    weights = (1 - best).clamp(min=0)

    slots = own * prototypes + nearest
    share = torch.zeros(len(classes) * prototypes, len(labels), device=features.device)
    pixels = torch.arange(len(labels), device=features.device)
    share[slots, pixels] = 1.0
    plain, counts = share @ features, share.sum(dim=1)
    share[slots, pixels] = weights
    weighted, weight = share @ features, share.sum(dim=1)
    grid = (len(classes), prototypes)
    sums.weighted[classes] = weighted.double().unflatten(0, grid)
    sums.weights[classes] = weight.double().unflatten(0, grid)
    sums.plain[classes] = plain.double().unflatten(0, grid)
    sums.counts[classes] = counts.double().unflatten(0, grid)
    return sums


def frame_sums(features: Tensor, labels: Tensor, memory: Tensor, seen: Tensor, at_labels: bool) -> ClassSums:
    """:func:`class_sums` of one frame, at the resolution of its labels or of its features.

    Args:
        features: [C, h, w].
        labels: int64 [H, W] on the same field of view.
        memory: [K, n, C].
        seen: bool [K].
        at_labels: upsample the features bilinearly (paper; in bands of rows, never C x H x W at once), else take the
            label at the centre of each feature.
    """
    height, width = labels.shape
    if not at_labels:
        labels = downsample_labels(labels[None], (features.shape[1], features.shape[2]))[0]
        positions = torch.arange(labels.numel(), device=labels.device)
        return class_sums(features.flatten(1).t(), labels.flatten(), positions, memory, seen)
    to_rows = _linear_rows(features.shape[1], height).to(features)
    rows_per_band = max(1, VALUES_PER_BAND // (features.shape[0] * width))
    total = ClassSums.zeros(memory)
    for start in range(0, height, rows_per_band):
        band = to_rows[start : start + rows_per_band]
        rows = torch.einsum("rh,chw->crw", band, features)
        rows = F.interpolate(rows[None], size=(len(band), width), mode="bilinear", align_corners=False)[0]
        positions = torch.arange(len(band) * width, device=labels.device) + start * width
        part = labels[start : start + rows_per_band].flatten()
        total = total + class_sums(rows.flatten(1).t(), part, positions, memory, seen)
    return total


def downsample_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels [B, H, W] at the centres of ``size`` cells (between two pixels, the right or lower one)."""
    for axis, target in zip((1, 2), size, strict=True):
        steps = torch.arange(target, device=labels.device)
        labels = labels.index_select(axis, (2 * steps + 1) * labels.shape[axis] // (2 * target))
    return labels


def _linear_rows(source: int, target: int) -> Tensor:
    """Weights [target, source] of bilinear interpolation along one axis (pixel centres at +0.5)."""
    return F.interpolate(torch.eye(source)[None], size=target, mode="linear", align_corners=False)[0].t()


def updated_memory(memory: Tensor, seen: Tensor, sums: ClassSums, momentum: float) -> tuple[Tensor, Tensor]:
    """Rows after an update, M <- (1 - m) M + m R' (Eq. 1), and which classes have been seen.

    R' is the weighted mean of :class:`ClassSums`, or the plain one when all weights vanish. Classes without a pixel
    keep their rows; a class seen for the first time takes its plain mean (for n > 1 that of the pixels dealt to each
    prototype, or of the whole class where there are fewer pixels than prototypes).

    Args:
        memory: [K, n, C] float32.
        seen: bool [K].
        sums: of the pixels of one iteration, over all processes.
        momentum: m.
    """
    present = sums.counts > 0
    mean = sums.plain / sums.counts.clamp(min=1)[..., None]
    weighted = sums.weighted / sums.weights.clamp(min=LEAST_WEIGHT)[..., None]
    fresh = torch.where((sums.weights >= LEAST_WEIGHT)[..., None], weighted, mean)
    moved = ((1 - momentum) * memory.double() + momentum * fresh).to(memory.dtype)
    class_mean = sums.plain.sum(dim=1) / sums.counts.sum(dim=1).clamp(min=1)[:, None]
    first = torch.where(present[..., None], mean, class_mean[:, None]).to(memory.dtype)

    known = seen[:, None] & present
    new = ~seen & present.any(dim=1)
    memory = torch.where(known[..., None], moved, memory)
    memory = torch.where(new[:, None, None], first, memory)
    return memory, seen | new


@dataclass(frozen=True)
class Candidates:
    """Randomly drawn pixels of each class, the best first.

    Attributes:
        priority: [K, n] float64, -1 where there is none.
        features: [K, n, C] float32.
    """

    priority: Tensor
    features: Tensor

    @classmethod
    def none(cls, memory: Tensor) -> Candidates:
        """An empty set of candidates, for a memory [K, n, C]."""
        return cls(torch.full(memory.shape[:2], -1.0, dtype=torch.float64, device=memory.device), memory * 0)

    def best_with(self, others: Sequence[Candidates]) -> Candidates:
        """The n candidates with the highest priority among several sets."""
        priority = torch.cat([c.priority for c in (self, *others)], dim=1)
        features = torch.cat([c.features for c in (self, *others)], dim=1)
        best, order = priority.topk(self.priority.shape[1], dim=1)
        return Candidates(best, features.gather(1, order[..., None].expand(-1, -1, features.shape[2])))

    def over_ranks(self) -> Candidates:
        """The best candidates of all processes; a collective call."""
        world = comm.get_world_size()
        if world == 1:
            return self
        priorities = [torch.empty_like(self.priority) for _ in range(world)]
        features = [torch.empty_like(self.features) for _ in range(world)]
        distributed.all_gather(priorities, self.priority.contiguous())
        distributed.all_gather(features, self.features.contiguous())
        gathered = [Candidates(p, f) for p, f in zip(priorities, features, strict=True)]
        return gathered[0].best_with(gathered[1:])


def draw_candidates(features: Tensor, labels: Tensor, memory: Tensor, seen: Tensor, seed: int) -> Candidates:
    """n random pixels of each class that was never seen, from one frame; the random numbers depend on ``seed`` alone.

    Args:
        features: [C, h, w].
        labels: int64 [H, W]; read at the centres of the features.
        memory: [K, n, C].
        seen: bool [K].
        seed: of the clip.
    """
    found = Candidates.none(memory)
    labels = downsample_labels(labels[None], (features.shape[1], features.shape[2])).flatten()
    draws = torch.rand(labels.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    draws = draws.to(labels.device)
    pixels = features.flatten(1).t().float()
    for label in labels.unique().tolist():
        if 0 <= label < len(memory) and not seen[label]:
            inside = (labels == label).nonzero().flatten()
            best, order = draws[inside].topk(min(memory.shape[1], len(inside)))
            found.priority[label, : len(best)] = best
            found.features[label, : len(best)] = pixels[inside[order]]
    return found


def start_rows(memory: Tensor, seen: Tensor, found: Candidates) -> tuple[Tensor, Tensor]:
    """Rows and ``seen`` after unseen classes start from their candidates, repeated if there are fewer than n."""
    count = (found.priority >= 0).sum(dim=1)
    steps = torch.arange(memory.shape[1], device=memory.device)
    order = steps[None] % count.clamp(min=1)[:, None]
    rows = found.features.gather(1, order[..., None].expand(-1, -1, memory.shape[2]))
    new = ~seen & (count > 0)
    return torch.where(new[:, None, None], rows.to(memory), memory), seen | new
