"""Seeds."""

from __future__ import annotations

import logging
import os
import random
import time

import numpy as np
import torch

__all__ = ["seed_all_rng"]


def seed_all_rng(seed: int | None = None) -> None:
    """Seed ``random``, numpy and torch, and set ``PYTHONHASHSEED`` for child processes.

    Args:
        seed: ``None`` takes a new seed from the process id, the clock and the system's random numbers, and logs it.
    """
    if seed is None:
        seed = os.getpid() + time.time_ns() % 1_000_000_000 + int.from_bytes(os.urandom(2), "big")
        logging.getLogger(__name__).info("Using a random seed %d", seed)
    np.random.seed(seed)  # noqa: NPY002 - the global generator is the one to seed
    torch.manual_seed(seed)
    random.seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)
