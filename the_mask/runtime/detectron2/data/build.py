"""The two functions that any loader of dicts needs."""

from __future__ import annotations

from typing import Any

import torch

from ..utils.env import seed_all_rng

__all__ = ["trivial_batch_collator", "worker_init_reset_seed"]


def trivial_batch_collator(batch: list[Any]) -> list[Any]:
    """Return the batch as the list it is."""
    return batch


def worker_init_reset_seed(worker_id: int) -> None:
    """Give all random generators of a loader's worker process their own seed, from the one torch gave it."""
    seed_all_rng(torch.initial_seed() % 2**31 + worker_id)
