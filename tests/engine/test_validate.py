"""Every mistake of a config is found before the first iteration, and all of them at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fakes import debug_cfg

from the_mask.data import get_records
from the_mask.engine.validate import validate


def test_a_good_config_passes(tiny_shapes: Path, tmp_path: Path) -> None:
    validate(debug_cfg(tmp_path), world_size=2)
    validate(debug_cfg(tmp_path), training=False)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("DATASETS.TRAIN", ("moving_shape_train",), "unknown dataset 'moving_shape_train'.*moving_shapes_train"),
        ("DATASETS.TRAIN", (), "DATASETS.TRAIN is empty"),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 124, r"moving_shapes_train has (\d+) classes: set .*NUM_CLASSES \1 "),
        ("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 65535, "marks void pixels by 255: set MODEL.SEM_SEG_HEAD.IGNORE_VALUE 255"),
        ("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 3, "IGNORE_VALUE 3 is also the id of a class"),
        ("SOLVER.IMS_PER_BATCH", 7, r"IMS_PER_BATCH 7 does not divide into 2 process\(es\) x SOLVER.ACCUM_STEPS 1; 8"),
        ("SOLVER.IMS_PER_BATCH", 10**9, r"SOLVER.IMS_PER_BATCH 1000000000: expected a number in 1..65536"),
        ("SOLVER.ACCUM_STEPS", 3, "does not divide.*; 6 would"),
        ("SOLVER.MAX_ITER", 0, "SOLVER.MAX_ITER 0: expected a number >= 1"),
        ("SOLVER.EMA.DECAY", 1.0, "EMA.DECAY 1 never moves"),
        ("SOLVER.OPTIMIZER", "ADAM", "SOLVER.OPTIMIZER 'ADAM': expected one of 'ADAMW', 'SGD'"),
        ("SOLVER.AMP.PRECISION", "fp8", "'bf16', 'fp16'"),
        ("INPUT.CROP.SIZE", [480], r"INPUT.CROP.SIZE \[480\]: expected \[height, width\]"),
        ("INPUT.CROP.SIZE", [0, 64], "INPUT.CROP.SIZE"),
        ("INPUT.RESIZE.MIN_SCALE", 9.0, "expected 0 < MIN_SCALE <= MAX_SCALE, got 9.0"),
        ("INPUT.RESIZE.SHORT_EDGE", 0, "edges of at least 1 pixel"),
        ("INPUT.CLIP.DILATIONS", [-3, -3], "different whole numbers"),
        ("INPUT.CLIP.BOUNDARY", "wrap", "INPUT.CLIP.BOUNDARY 'wrap'"),
        ("TEST.VC_WINDOWS", [8, 1], r"TEST.VC_WINDOWS \[8, 1\]"),
        ("TEST.SAVE_REPORT", "report.pdf", "report.pdf: expected the name of an .html file"),
        ("TEST.CLIP_LENGTH", 0, "TEST.CLIP_LENGTH 0"),
        ("MODEL.THE_MASK.INIT_FROM_STAGE1", True, "needs the one-frame checkpoint in MODEL.WEIGHTS"),
        ("MODEL.DEVICE", "gpu", "MODEL.DEVICE 'gpu'"),
    ],
)
def test_mistakes(tiny_shapes: Path, tmp_path: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(debug_cfg(tmp_path, key, value), world_size=2)


def test_all_mistakes_are_named_at_once(tiny_shapes: Path, tmp_path: Path) -> None:
    cfg = debug_cfg(tmp_path, "SOLVER.MAX_ITER", -1, "DATASETS.TEST", ("nowhere",), "SOLVER.OPTIMIZER", "X")
    with pytest.raises(ValueError, match=r"(?s)SOLVER.OPTIMIZER.*SOLVER.MAX_ITER.*nowhere"):
        validate(cfg)


def test_evaluation_needs_no_training_set(tiny_shapes: Path, tmp_path: Path) -> None:
    cfg = debug_cfg(tmp_path, "DATASETS.TRAIN", ("nowhere",), "SOLVER.IMS_PER_BATCH", 7)
    validate(cfg, world_size=2, training=False)
    with pytest.raises(ValueError, match=r"DATASETS.TEST is empty"):
        validate(debug_cfg(tmp_path, "DATASETS.TEST", ()), training=False)


def test_missing_files(tiny_shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"MODEL.WEIGHTS: .*none.pth does not exist"):
        validate(debug_cfg(tmp_path, "MODEL.WEIGHTS", str(tmp_path / "none.pth")))
    classes = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 124]
    absent = debug_cfg(tmp_path, "DATASETS.TRAIN", ("vspw_train",), "DATASETS.TEST", ("vspw_val",), *classes)
    with pytest.raises(FileNotFoundError, match="vspw_train"):
        validate(absent)


def test_start_is_not_looked_for_when_resuming(tiny_shapes: Path, tmp_path: Path) -> None:
    stage1 = ["MODEL.THE_MASK.INIT_FROM_STAGE1", True]
    validate(debug_cfg(tmp_path, *stage1), resuming=True)
    validate(debug_cfg(tmp_path, *stage1), training=False)
    validate(debug_cfg(tmp_path, *stage1, "MODEL.WEIGHTS", str(tmp_path / "moved.pth")), resuming=True)


def test_test_set_is_looked_for_when_it_will_be_needed(tiny_shapes: Path, tmp_path: Path) -> None:
    def cfg(period: int) -> Any:
        return debug_cfg(tmp_path, "TEST.EVAL_PERIOD", period)

    (tiny_shapes / "moving_shapes" / "val.txt").rename(tiny_shapes / "val.txt.aside")
    try:
        validate(cfg(-1))
        for period in (0, 100):
            with pytest.raises(FileNotFoundError, match="moving_shapes_val"):
                validate(cfg(period))
    finally:
        (tiny_shapes / "val.txt.aside").rename(tiny_shapes / "moving_shapes" / "val.txt")


def test_what_is_tested_is_said(tiny_shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    validate(debug_cfg(tmp_path, "TEST.EVAL_PERIOD", 0))
    assert not caplog.records
    validate(debug_cfg(tmp_path, "TEST.EVAL_PERIOD", -1))
    assert "nothing is evaluated" in caplog.text
    caplog.clear()
    validate(debug_cfg(tmp_path, "TEST.EVAL_PERIOD", 0, "DATASETS.TEST", ("moving_shapes_train",)))
    count = sum(len(record["frames"]) for record in get_records("moving_shapes_train"))
    assert f"moving_shapes_train: {count} of {count} frames are also trained on" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_where_there_is_none(tiny_shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no usable GPU; set MODEL.DEVICE cpu"):
        validate(debug_cfg(tmp_path, "MODEL.DEVICE", "cuda"))


def test_warm_ups_that_never_end_are_said(tiny_shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ("SOLVER.WARMUP_ITERS", 50, "SOLVER.MAX_ITER", 50)
    keys += ("MODEL.THE_MASK.ROUNDS", 2, "MODEL.THE_MASK.WARMUP_ITERS", 60)
    validate(debug_cfg(tmp_path, *keys))
    assert "SOLVER.WARMUP_ITERS 50 is not below SOLVER.MAX_ITER 50: the rate never reaches BASE_LR" in caplog.text
    assert "MODEL.THE_MASK.WARMUP_ITERS 60 is not below SOLVER.MAX_ITER 50" in caplog.text
    caplog.clear()
    validate(debug_cfg(tmp_path, "SOLVER.WARMUP_ITERS", 49, "SOLVER.MAX_ITER", 50))
    assert "WARMUP" not in caplog.text
