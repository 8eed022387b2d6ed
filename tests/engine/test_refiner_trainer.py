"""Training of a tiny refiner on moving_shapes, its samples, and its use in an evaluation."""

import numpy as np
import pytest
import torch

from the_mask.config import load_config
from the_mask.data import get_records
from the_mask.engine.refiner_trainer import CHECKPOINT, RefinerSamples, train_refiner
from the_mask.inference.compose import build_steps, is_plain
from the_mask.weights.checkpoint import read_checkpoint
from the_mask.weights.trained import trained_refiner


def config(*changes):
    options = ["DATASETS.TRAIN", ("moving_shapes_train",), "DATASETS.TEST", ("moving_shapes_val",)]
    options += ["MODEL.REFINER.WIDTH", 4, "MODEL.REFINER.BLOCKS", [1, 1, 1, 1], "MODEL.REFINER.CROP", 32]
    options += ["MODEL.REFINER.BATCH", 2, "MODEL.REFINER.MAX_ITER", 3, "MODEL.DEVICE", "cpu", "SEED", 1]
    return load_config(None, [*options, *changes])


def test_samples_depend_on_their_number_alone(tiny_shapes):
    samples, again = RefinerSamples.from_config(config()), RefinerSamples.from_config(config())
    for number in (0, 5):
        image, coarse, truth = samples(number)
        assert image.shape == (3, 32, 32)
        assert coarse.shape == truth.shape == (1, 32, 32)
        assert set(coarse.unique().tolist()) <= {-1.0, 1.0}
        assert set(truth.unique().tolist()) == {0.0, 1.0}
        assert all(torch.equal(a, b) for a, b in zip((image, coarse, truth), again(number), strict=True))
    assert not torch.equal(samples(0)[2], samples(5)[2])


def test_training_and_resuming(tiny_shapes, tmp_path):
    figures = train_refiner(config(), tmp_path / "whole", log_period=1)
    assert set(figures) == {"loss", "iou_coarse", "iou_refined"}
    assert np.isfinite(list(figures.values())).all()
    train_refiner(config("MODEL.REFINER.MAX_ITER", 2, "MODEL.REFINER.STEPS", []), tmp_path / "parts")
    train_refiner(config("MODEL.REFINER.STEPS", []), tmp_path / "parts", resume=True)
    train_refiner(config("MODEL.REFINER.STEPS", []), tmp_path / "straight")
    parts, straight = (read_checkpoint(tmp_path / name / CHECKPOINT) for name in ("parts", "straight"))
    assert parts["iteration"] == straight["iteration"] == 3
    assert all(torch.equal(parts["model"][name], value) for name, value in straight["model"].items())


@pytest.mark.slow
def test_a_refiner_learns(tiny_shapes, tmp_path):
    options = ("MODEL.REFINER.MAX_ITER", 150, "MODEL.REFINER.BATCH", 8, "MODEL.REFINER.LR", 1e-3)
    figures = train_refiner(config(*options, "MODEL.REFINER.WIDTH", 8), tmp_path)
    assert figures["iou_refined"] > figures["iou_coarse"]


def test_the_step_of_a_pipeline(tiny_shapes, tmp_path):
    train_refiner(config(), tmp_path)
    cfg = config("TEST.REFINER.WEIGHTS", str(tmp_path / CHECKPOINT), "TEST.REFINER.MIN_UNCERTAIN", 0.0)
    assert not is_plain(cfg)
    (step,) = build_steps(cfg)
    labels = torch.zeros(80, 90, dtype=torch.uint8)
    labels[20:70, 20:70] = 1
    image = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    result = step(image, labels, torch.rand(3, 80, 90), None)
    assert result.shape == labels.shape
    assert result.dtype == labels.dtype
    assert set(result.unique().tolist()) <= {0, 1}
    assert not trained_refiner(cfg).training


def test_bad_input(tiny_shapes, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        build_steps(config("TEST.REFINER.WEIGHTS", str(tmp_path / "none.pth")))
    with pytest.raises(ValueError, match="no labelled frames"):
        RefinerSamples([], 32)
    train_refiner(config(), tmp_path)
    weights = ["TEST.REFINER.WEIGHTS", str(tmp_path / CHECKPOINT)]
    with pytest.raises(ValueError, match=r"does not fill the whole model|another architecture"):
        build_steps(config(*weights, "MODEL.REFINER.BLOCKS", [2, 1, 1, 1]))
    frame = get_records("moving_shapes_train")[0]["frames"][0]
    void = [(frame["file_name"], frame["sem_seg_file_name"], [255] * 256)]
    with pytest.raises(ValueError, match="no class with a border"):
        RefinerSamples(void, 32)(0)
