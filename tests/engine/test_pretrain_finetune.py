"""Pretrain on COCO-Stuff, save, finetune on VSPW, evaluate: the two documented commands, on tiny sets laid out and
labelled as the releases are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_fakes import CONFIGS
from PIL import Image

from the_mask.data import get_class_names, load_class_list, register_all
from the_mask.engine import RunOptions, Trainer, run_training
from the_mask.weights import read_checkpoint

HEIGHT, WIDTH = 48, 64
SMALL = [
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"),
    *("INPUT.CROP.SIZE", "[64, 64]", "INPUT.RESIZE.LONG_EDGE", "64", "INPUT.RESIZE.SHORT_EDGE", "48"),
    *("INPUT.TEST.LONG_EDGE", "64", "INPUT.TEST.SHORT_EDGE", "48", "TEST.EVAL_PERIOD", "2"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.NORM", "FrozenBN"),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "SOLVER.WARMUP_ITERS", "0"),
]
MASK2FORMER = [
    *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "12", "MODEL.MASK_FORMER.DEC_LAYERS", "3"),
    *(
        "MODEL.MASK_FORMER.HIDDEN_DIM",
        "32",
        "MODEL.MASK_FORMER.NHEADS",
        "4",
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS",
        "64",
    ),
    *("MODEL.MASK_FORMER.DIM_FEEDFORWARD", "64", "MODEL.SEM_SEG_HEAD.MASK_DIM", "32"),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_NHEADS", "4"),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD", "64"),
]
# Two channels per group: one alone has no variance after the pooling to a single cell.
UPERNET = [
    "MODEL.SEM_SEG_HEAD.NORM",
    "GN",
    "MODEL.CLIP_SEGMENTOR.AUX_CHANNELS",
    "64",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM",
    "64",
]
# Raw values of a native mask: person, tree (168), sky-other (156), wood (181), unlabelled.
COCO_VALUES = [0, 168, 156, 181, 255]
# Raw values of VSPW masks: tree, sky, person, others (ignored).
VSPW_VALUES = [load_class_list("vspw").names.index(name) + 1 for name in ("tree", "sky", "person")] + [0]


def write_pair(image: Path, mask: Path, values: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    label = rng.choice(values, (4, 4)).astype(np.uint8).repeat(HEIGHT // 4, 0).repeat(WIDTH // 4, 1)
    for path, array in ((image, rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)), (mask, label)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """COCO-Stuff with four and two images, VSPW with two and one videos of three frames."""
    root = tmp_path / "data"
    coco, vspw = root / "coco_stuff164k", root / "VSPW_480p"
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            name = f"{split}2017/{number + 9:012d}"
            write_pair(coco / f"images/{name}.jpg", coco / f"annotations/{name}.png", COCO_VALUES, number)
    for split, videos in (("train", ["1_a", "2_b"]), ("val", ["3_c"])):
        for video in videos:
            for t in range(3):
                folder = vspw / "data" / video
                write_pair(folder / f"origin/{t:08d}.jpg", folder / f"mask/{t:08d}.png", VSPW_VALUES, t)
        (vspw / f"{split}.txt").write_text("\n".join(videos) + "\n")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    register_all(root)
    yield tmp_path
    monkeypatch.undo()
    register_all()


def options(config: str, output: Path, *overrides: str, **keywords: bool) -> RunOptions:
    return RunOptions(CONFIGS / config, [*SMALL, "OUTPUT_DIR", str(output), *overrides], **keywords)


@pytest.mark.parametrize(
    ("model", "small", "class_layers"),
    [
        ("mask2former_r50", MASK2FORMER, ("sem_seg_head.predictor.class_embed.weight",)),
        pytest.param(
            "upernet_r50",
            UPERNET,
            ("sem_seg_head.conv_seg.weight", "auxiliary_heads.res4.conv_seg.weight"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mask2former", "upernet"],
)
def test_pretrain_save_finetune_evaluate(
    data: Path, model: str, small: list[str], class_layers: tuple[str, ...]
) -> None:
    # First command.
    results = run_training(options(f"coco_stuff164k/{model}.yaml", data / "pre", *small))
    assert 0 <= results["sem_seg"]["mIoU"] <= 100
    assert math.isnan(results["sem_seg"]["IoU-bicycle"])
    assert math.isfinite(results["sem_seg"]["IoU-person"])
    weights = data / "pre" / "model_final.pth"
    pretrained = read_checkpoint(weights)
    coco, vspw = get_class_names("coco_stuff164k_train"), get_class_names("vspw_train")
    assert pretrained["class_names"] == coco

    # Second command: first its start, by hand.
    finetune = [*small, "MODEL.WEIGHTS", str(weights)]
    for by_name in ("False", "True"):
        words = [*finetune, "MODEL.INIT_CLASSES_BY_NAME", by_name]
        torch.manual_seed(0)
        trainer = Trainer(options(f"vspw/{model}.yaml", data / "start", *words).load())
        fresh = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.resume_or_load(False)
        state = trainer.model.state_dict()
        changed = {name for name in state if state[name].shape != pretrained["model"][name].shape}
        assert {name for name in changed if not name.startswith("criterion")} == {
            name.replace("weight", part) for name in class_layers for part in ("weight", "bias")
        }
        assert all(torch.equal(state[name], pretrained["model"][name]) for name in state if name not in changed)
        for layer in class_layers:
            theirs = pretrained["model"][layer]
            for name in ("person", "tree", "gun"):
                row = state[layer][vspw.index(name)]
                copied = by_name == "True" and name in coco
                assert torch.equal(row, theirs[coco.index(name)] if copied else fresh[layer][vspw.index(name)])

    results = run_training(options(f"vspw/{model}.yaml", data / "fine", *finetune))
    log = (data / "fine" / "log.txt").read_text()
    assert "another class set: 171 classes, the model has 124" in log
    assert "class layers, started anew" in log
    tuned = str(data / "fine" / "model_final.pth")
    assert read_checkpoint(tuned)["class_names"] == vspw

    # Evaluation: the same figures from the file, and no figures from a model of other classes.
    again = run_training(options(f"vspw/{model}.yaml", data / "test", *small, "MODEL.WEIGHTS", tuned, eval_only=True))
    assert again["sem_seg"]["mIoU"] == results["sem_seg"]["mIoU"]
    with pytest.raises(ValueError, match=r"other classes, so its results would mean nothing: 171 classes, the model"):
        run_training(options(f"vspw/{model}.yaml", data / "test", *finetune, eval_only=True))
    # Nor does a run go on with another data set of its own.
    with pytest.raises(ValueError, match="cannot be resumed"):
        run_training(options(f"vspw/{model}.yaml", data / "pre", *small, resume=True))
