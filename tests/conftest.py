"""Shared test set-up: the_mask is imported before anything imports detectron2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import the_mask  # noqa: F401


# The data room is imported inside, so that the operators' tests need nothing but torch.
@pytest.fixture(scope="session")
def _tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from the_mask.data.synthetic import SceneSize, make_moving_shapes

    root = tmp_path_factory.mktemp("datasets")
    make_moving_shapes(root / "moving_shapes", train_videos=4, val_videos=2, size=SceneSize(6, 48, 64))
    return root


@pytest.fixture
def tiny_shapes(_tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Root of a data folder with four and two videos of six frames 48x64; registered for the test and its children."""
    from the_mask.data import register_all

    monkeypatch.setenv("DETECTRON2_DATASETS", str(_tiny_root))
    register_all(_tiny_root)
    yield _tiny_root
    monkeypatch.undo()
    register_all()
