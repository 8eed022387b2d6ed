"""Order of the samples, as functions of (seed, position) only: no state, so a run resumes anywhere.

Position p counts samples over the whole run and over all ranks. Epoch = p // items; the item is the p-th of that
epoch's permutation, and the sample's own seed depends on (seed, epoch, p). So the data do not depend on the number of
workers or ranks, or on resuming.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True)
class SampleKey:
    """A request of the loader to the data set: an item and the seed of all its randomness."""

    item: int
    seed: int
    position: int


def epoch_permutation(seed: int, epoch: int, num_items: int) -> np.ndarray:
    """Order of the items in an epoch, int64 [num_items]."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,))).permutation(num_items)


def sample_seed(seed: int, epoch: int, position: int) -> int:
    """Seed of one sample, 0..2^63-1."""
    return int(np.random.SeedSequence([seed, epoch, position]).generate_state(1, np.uint64)[0] >> 1)


def derive_seed(seed: int, *branch: int) -> int:
    """Another seed, 0..2^63-1, for a part of a sample (a retry, the colours, ...)."""
    # As a spawn key, because trailing zeros of a plain entropy list are ignored.
    return int(np.random.SeedSequence(seed, spawn_key=branch).generate_state(1, np.uint64)[0] >> 1)


class SampleStream:
    """Gives the :class:`SampleKey` of a position; the last permutation is cached to save time."""

    def __init__(self, num_items: int, seed: int) -> None:
        if num_items < 1 or seed < 0:
            raise ValueError(f"need at least one item and a seed >= 0, got {num_items} items, seed {seed}")
        self.num_items = num_items
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __getitem__(self, position: int) -> SampleKey:
        epoch, place = divmod(position, self.num_items)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_permutation(self.seed, epoch, self.num_items)
        return SampleKey(int(self._order[place]), sample_seed(self.seed, epoch, position), position)


def rank_positions(iteration: int, total_batch: int, rank: int, world_size: int) -> range:
    """Positions of one iteration that belong to a rank: a contiguous slice of [i·N, (i+1)·N)."""
    per_rank = total_batch // world_size
    start = iteration * total_batch + rank * per_rank
    return range(start, start + per_rank)


class TrainBatchSampler(Sampler[list[SampleKey]]):
    """Endless batches of sample keys for one rank, starting at any iteration.

    With ``accum_steps`` > 1 each iteration's slice is split into that many consecutive micro-batches.

    Raises:
        ValueError: the total batch does not divide evenly.
    """

    def __init__(
        self,
        num_items: int,
        total_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accum_steps: int = 1,
        start_iter: int = 0,
    ) -> None:
        parts = world_size * accum_steps
        if total_batch < 1 or accum_steps < 1 or total_batch % parts:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {total_batch} must be a positive multiple of processes x SOLVER.ACCUM_STEPS = "
                f"{world_size} x {accum_steps}"
            )
        if not 0 <= rank < world_size or start_iter < 0:
            raise ValueError(f"need 0 <= rank < world_size and start_iter >= 0, got {rank}, {world_size}, {start_iter}")
        self.stream = SampleStream(num_items, seed)
        self.total_batch = total_batch
        self.rank = rank
        self.world_size = world_size
        self.batch_size = total_batch // parts
        self.start_iter = start_iter

    def __iter__(self) -> Iterator[list[SampleKey]]:
        iteration = self.start_iter
        while True:
            keys = [self.stream[p] for p in rank_positions(iteration, self.total_batch, self.rank, self.world_size)]
            for start in range(0, len(keys), self.batch_size):
                yield keys[start : start + self.batch_size]
            iteration += 1


def shard_videos(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Assign whole videos to ranks, balanced by frames: the longest remaining video goes to the least loaded rank.

    Args:
        lengths: frames per video.
        world_size: number of ranks.

    Returns:
        Video indices of each rank, ascending; a rank may get none.
    """
    shards: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for video in sorted(range(len(lengths)), key=lambda v: (-lengths[v], v)):
        rank = loads.index(min(loads))
        shards[rank].append(video)
        loads[rank] += lengths[video]
    return [sorted(shard) for shard in shards]
