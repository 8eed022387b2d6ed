"""Tiny moving_shapes on disk for tests that train for real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from converter_cases import R50, noise, segmentor, timm_backbone
from torch import Tensor

from the_mask.data import register_all
from the_mask.data.synthetic import SceneSize, make_moving_shapes


@pytest.fixture(scope="session")
def _tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    make_moving_shapes(root / "moving_shapes", train_videos=4, val_videos=2, size=SceneSize(6, 48, 64))
    return root


@pytest.fixture
def tiny_shapes(_tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Root of a data folder with four and two videos of six frames 48x64; registered for the test and its children."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(_tiny_root))
    register_all(_tiny_root)
    yield _tiny_root
    monkeypatch.undo()
    register_all()


@pytest.fixture(scope="session")
def swin() -> dict[str, Tensor]:
    """Weights of a Swin-T in timm's names."""
    return noise(timm_backbone("swin_tiny_patch4_window7_224").state_dict())


@pytest.fixture(scope="session")
def small_state() -> dict[str, Tensor]:
    """Weights of a narrow Mask2Former R50."""
    return noise(segmentor(*R50).state_dict())
