"""tools/predict.py, fit_temperature.py, average_checkpoints.py and train_refiner.py, in turn on tiny data."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

import the_mask.modeling  # noqa: F401  fills the registries
from the_mask.config import load_config
from the_mask.data import register_all
from the_mask.data.synthetic import SceneSize, make_moving_shapes
from the_mask.weights import save_checkpoint

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "debug" / "the_mask_debug_1f.yaml")


def tool(name):
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("inference_tools")
    make_moving_shapes(root / "moving_shapes", train_videos=1, val_videos=1, size=SceneSize(2, 48, 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        register_all(root)
        for seed in range(2):
            torch.manual_seed(seed)
            model = build_model(load_config(CONFIG, ["MODEL.DEVICE", "cpu"]))
            save_checkpoint(root / f"{seed}.pth", {"model": model.state_dict()})
        yield root
    register_all()


def test_average_predict_and_fit(work, capsys):
    mean = str(work / "mean.pth")
    assert tool("average_checkpoints")([str(work / "0.pth"), str(work / "1.pth"), "--output", mean]) == 0
    assert "mean of 2 checkpoints" in capsys.readouterr().out
    options = [
        "MODEL.WEIGHTS",
        mean,
        "MODEL.DEVICE",
        "cpu",
        "OUTPUT_DIR",
        str(work / "out"),
        "DATALOADER.NUM_WORKERS",
        "0",
    ]
    target = ["--config-file", CONFIG, "--dataset", "moving_shapes_val", "--output", str(work / "png")]
    assert tool("predict")([*target, "--save-scores", str(work / "scores"), *options]) == 0
    files = sorted((work / "png").rglob("*.png"))
    assert len(files) == len(list((work / "scores").rglob("*.npz"))) == 2
    scores = np.load(next(iter((work / "scores").rglob(f"{files[0].stem}.npz"))))["scores"]
    # Untrained scores are nearly equal, and half precision swaps some of the best.
    assert (np.array(Image.open(files[0])) == scores.astype(np.float32).argmax(0)).mean() > 0.9
    assert tool("fit_temperature")(["--config-file", CONFIG, "--dataset", "moving_shapes_val", *options]) == 0
    assert "nats per pixel of moving_shapes_val" in capsys.readouterr().out


def test_train_refiner(work, capsys):
    options = ["MODEL.REFINER.WIDTH", "4", "MODEL.REFINER.BLOCKS", "[1,1,1,1]", "MODEL.REFINER.CROP", "32"]
    options += ["MODEL.REFINER.BATCH", "1", "MODEL.REFINER.MAX_ITER", "1", "MODEL.DEVICE", "cpu"]
    assert tool("train_refiner")(["--config-file", CONFIG, "--output", str(work / "refiner"), *options]) == 0
    assert "iou_refined" in capsys.readouterr().out
    assert (work / "refiner" / "refiner_final.pth").is_file()


def test_errors_are_plain(work, capsys):
    assert tool("average_checkpoints")([str(work / "none.pth"), "--output", str(work / "x.pth")]) == 1
    assert "none.pth" in capsys.readouterr().err
    target = ["--config-file", CONFIG, "--dataset", "moving_shapes_val", "--output", str(work / "y")]
    assert tool("predict")([*target, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(work / "out")]) == 1
    assert "MODEL.WEIGHTS is empty" in capsys.readouterr().err
