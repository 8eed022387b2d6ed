"""Shares of positive queries: sums, means, plot, and the files of a run."""

import json
from pathlib import Path

import numpy as np
import pytest
from engine_fakes import FakeModel, FakeTrainer, debug_cfg, fake_cfg
from PIL import Image

from the_mask.engine import Trainer
from the_mask.engine.matching_stats import PositiveShares, plot_shares


def clip(name: str, first: float, both: float) -> dict:
    return {"name": name, "positive_round1": first, "positive_all": both}


def test_means_by_hand() -> None:
    shares = PositiveShares()
    shares.add([clip("d/a frames 1, 2", 0.1, 0.2), clip("d/b frames 7", 0.3, 0.3), clip("d/a frames 5", 0.2, 0.4)])
    assert list(shares.per_video()) == ["d/a", "d/b"]
    assert shares.per_video()["d/a"] == pytest.approx({"clips": 2, "round1": 0.15, "all": 0.3})
    assert shares.overall() == pytest.approx({"clips": 3, "round1": 0.2, "all": 0.3})
    other = PositiveShares()
    other.add([clip("d/b frames 8", 0.1, 0.1)])
    shares.merge(other)
    assert shares.per_video()["d/b"] == pytest.approx({"clips": 2, "round1": 0.2, "all": 0.2})


def test_nothing_counted() -> None:
    assert PositiveShares().overall() == {"clips": 0, "round1": 0, "all": 0}
    assert plot_shares(PositiveShares()).shape == (360, 640, 3)


def test_plot_shows_both_curves() -> None:
    shares = PositiveShares()
    shares.add([clip(f"v{i} frames 0", 0.02 * i, 0.04 * i) for i in range(6)])
    pixels = plot_shares(shares).reshape(-1, 3)
    for color in ((70, 110, 190), (225, 130, 45), (150, 40, 40)):
        assert (pixels == color).all(1).sum() > 200


def test_files_of_a_real_run(tiny_shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = debug_cfg(tmp_path, "SOLVER.MAX_ITER", 2, "MODEL.THE_MASK.ROUNDS", 2, "MODEL.THE_MASK.WARMUP_ITERS", 1)
    with caplog.at_level("INFO", logger="the_mask"):
        Trainer(cfg).train()
    assert "loss from iteration 0 on: primary" in caplog.text
    assert "loss from iteration 1 on: hierarchical" in caplog.text
    assert "after round one" in caplog.text
    content = json.loads((tmp_path / "positive_queries.json").read_text())
    assert content["overall"]["clips"] == 4
    assert 0 < content["overall"]["round1"] < content["overall"]["all"] < 1
    assert all(name.startswith("moving_shapes_train/") for name in content["videos"])
    assert np.asarray(Image.open(tmp_path / "positive_queries.png")).shape == (360, 640, 3)


def test_counts_survive_a_resume(tmp_path: Path) -> None:
    class Counting(FakeTrainer):
        @classmethod
        def build_model(cls, cfg):
            model = FakeModel()
            model.criterion = FakeModel()
            model.criterion.last_stats = {"mode": "primary", "videos": [clip("v frames 0", 0.1, 0.2)]}
            return model

    Counting(fake_cfg(tmp_path)).train()
    trainer = Counting(fake_cfg(tmp_path, "SOLVER.MAX_ITER", 8))
    trainer.resume_or_load(True)
    trainer.train()
    content = json.loads((tmp_path / "positive_queries.json").read_text())
    assert content["overall"] == pytest.approx({"clips": 8, "round1": 0.1, "all": 0.2})
