"""How the attention masks of encoder-only models fade out over the training (EoMT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Annealing:
    """Per block, the shares of the training between which its mask goes from always used to never.

    Attributes:
        starts, ends: one per block, 0 <= start < end <= 1.
        power: 1 falls in a straight line.
        max_iter: iterations of the training.
    """

    starts: tuple[float, ...]
    ends: tuple[float, ...]
    power: float
    max_iter: int

    @classmethod
    def of_blocks(
        cls, num_blocks: int, starts: Sequence[float], ends: Sequence[float], power: float, max_iter: int
    ) -> Annealing:
        """For some blocks, with evenly spread shares where none are given.

        Raises:
            ValueError: a wrong number of shares, or shares out of order.
        """
        # The published steps of both data sets are such: block i from (i + 1) / (n + 2) to (i + 2) / (n + 2).
        shares = [(i + 1) / (num_blocks + 2) for i in range(num_blocks + 1)]
        starts, ends = tuple(starts) or tuple(shares[:-1]), tuple(ends) or tuple(shares[1:])
        if len(starts) != num_blocks or len(ends) != num_blocks:
            raise ValueError(
                f"MODEL.ENCODER.ANNEAL_START has {len(starts)} and ANNEAL_END {len(ends)} numbers; expected one for "
                f"each of the {num_blocks} blocks (MODEL.ENCODER.NUM_BLOCKS)"
            )
        for start, end in zip(starts, ends, strict=True):
            if not 0 <= start < end <= 1:
                raise ValueError(
                    f"MODEL.ENCODER.ANNEAL_START {start} and ANNEAL_END {end}: expected shares of the training, "
                    "0 <= start < end <= 1"
                )
        return cls(starts, ends, power, max(max_iter, 1))

    def probabilities(self, iteration: int) -> list[float]:
        """Per block, the probability that a query keeps its attention mask at an iteration of the training."""
        share = iteration / self.max_iter
        return [
            annealed_probability(share, start, end, self.power)
            for start, end in zip(self.starts, self.ends, strict=True)
        ]


def annealed_probability(share: float, start: float, end: float, power: float = 0.9) -> float:
    """Probability at a share of the training (0..1): 1 until ``start``, 0 from ``end`` on."""
    if share < start:
        return 1.0
    if share >= end:
        return 0.0
    return (1.0 - (share - start) / (end - start)) ** power
