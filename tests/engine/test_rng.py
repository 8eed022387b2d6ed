"""Generator states: complete, storable as tensors and builtins, restorable."""

import random
from pathlib import Path

import numpy as np
import torch

from the_mask.engine.rng import preserved_rng, rng_state, seed_everything, set_rng_state


def _draw() -> tuple[float, ...]:
    numpy = np.random
    return random.random(), random.gauss(0, 1), float(numpy.randn()), float(numpy.rand()), float(torch.randn(()))


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    seed_everything(3)
    _draw()  # leaves half a Gaussian pair in Python's and NumPy's generators
    torch.save(rng_state(), tmp_path / "rng.pth")
    expected = [_draw() for _ in range(3)]
    set_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert [_draw() for _ in range(3)] == expected


def test_preserved() -> None:
    seed_everything(4)
    expected = _draw()
    seed_everything(4)
    with preserved_rng():
        _draw()
    assert _draw() == expected


def test_seed_everything_takes_large_seeds() -> None:
    seed_everything(2**40)
    first = _draw()
    seed_everything(2**40)
    assert _draw() == first
