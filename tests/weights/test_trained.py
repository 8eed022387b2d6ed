"""The one way from a config to a trained model refuses weights of other classes, in every tool that uses it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from engine_fakes import debug_cfg

from the_mask.config import load_config
from the_mask.data import register_video_tree
from the_mask.engine import Trainer
from the_mask.engine.predict import run_calibration, run_prediction
from the_mask.engine.run import RunOptions, evaluate_only
from the_mask.inference import StreamingSegmentor
from the_mask.inference.compose import build_stream
from the_mask.modeling.build import build_segmentor, trained_model
from the_mask.weights import trained

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def names(tiny_shapes: Path) -> list[str]:
    """Classes of moving_shapes; the same data are also registered with the first and the last exchanged."""
    from detectron2.data import MetadataCatalog

    names = list(MetadataCatalog.get("moving_shapes_train").stuff_classes)
    other = [names[-1], *names[1:-1], names[0]]
    register_video_tree("shapes_reordered", tiny_shapes / "moving_shapes", "val", other)
    return names


@pytest.fixture
def cfg(tmp_path: Path, names: list[str]) -> CfgNode:
    """The debug config, its weights in a file that names its classes."""
    cfg = debug_cfg(tmp_path)
    torch.manual_seed(0)
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.save({"model": build_segmentor(cfg).state_dict(), "class_names": names}, cfg.MODEL.WEIGHTS)
    return cfg


def options(cfg: CfgNode, folder: Path) -> RunOptions:
    (folder / "used.yaml").write_text(cfg.dump())
    return RunOptions(folder / "used.yaml")


USES: dict[str, Callable[[CfgNode, Path], Any]] = {
    "trained": lambda cfg, folder: trained(cfg),
    "evaluation": lambda cfg, folder: evaluate_only(cfg),
    "stream": lambda cfg, folder: StreamingSegmentor(cfg),
    "compose": lambda cfg, folder: build_stream(cfg),
    "prediction": lambda cfg, folder: run_prediction(options(cfg, folder), "shapes_reordered", folder / "out"),
    "calibration": lambda cfg, folder: run_calibration(options(cfg, folder), "shapes_reordered"),
    "teacher": lambda cfg, folder: trained_model(cfg, weights=cfg.MODEL.WEIGHTS, datasets=["shapes_reordered"]),
}


@pytest.mark.parametrize("use", USES)
def test_another_order_is_refused_by_name(cfg: CfgNode, tmp_path: Path, use: str) -> None:
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ("shapes_reordered",)
    with pytest.raises(ValueError, match=r"weights.pth was trained for other classes.*in another order: 0 is 'sky'"):
        USES[use](cfg, tmp_path)


def test_the_second_test_set_is_compared_too(cfg: CfgNode) -> None:
    cfg.DATASETS.TEST = ("moving_shapes_val", "shapes_reordered")
    with pytest.raises(ValueError, match=r"moving_shapes_val .* and shapes_reordered .* different class lists"):
        trained(cfg)
    with pytest.raises(ValueError, match=r"moving_shapes_train .* and shapes_reordered .* different class lists"):
        Trainer(cfg)


def test_a_file_without_names_is_taken_to_have_those_of_the_training_sets(cfg: CfgNode) -> None:
    torch.save(torch.load(cfg.MODEL.WEIGHTS)["model"], cfg.MODEL.WEIGHTS)
    assert not trained(cfg).training
    cfg.DATASETS.TEST = ("shapes_reordered",)
    with pytest.raises(ValueError, match="does not name its classes"):
        trained(cfg)
    cfg.MODEL.WEIGHTS_CLASSES = "shapes_reordered"
    trained(cfg)
    cfg.MODEL.WEIGHTS_CLASSES, cfg.MODEL.CHECK_CLASS_NAMES = "", False
    trained(cfg)


def test_frozen_layers_cannot_start_anew(cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("shapes_reordered",), ()
    trainer = Trainer(cfg)
    trainer.load_weights(cfg.MODEL.WEIGHTS)
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"other classes, and layers that would start anew are frozen.*class_embed"):
        trainer.load_weights(cfg.MODEL.WEIGHTS)


def test_weights_are_needed(cfg: CfgNode) -> None:
    cfg.MODEL.WEIGHTS = ""
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty"):
        trained(cfg)


def test_a_model_finds_its_teacher_by_itself(tmp_path: Path) -> None:
    """Whoever builds it has imported the models, and nothing that reads weights."""
    config = str(ROOT / "configs/debug/swiftnet_debug.yaml")
    torch.save(build_segmentor(load_config(config, ["MODEL.DEVICE", "cpu"])).state_dict(), tmp_path / "teacher.pth")
    code = (
        "import sys\nfrom the_mask.config import load_config\nfrom the_mask.modeling import build_model\n"
        "assert 'the_mask.weights' not in sys.modules\n"
        "assert build_model(load_config(sys.argv[1], sys.argv[2:])).teacher is not None\n"
    )
    options = ["MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "DistilledSegmentor"]
    options += ["MODEL.DISTILLATION.TEACHER_CONFIG", config]
    options += ["MODEL.DISTILLATION.TEACHER_WEIGHTS", str(tmp_path / "teacher.pth")]
    subprocess.run([sys.executable, "-c", code, config, *options], check=True, cwd=ROOT)


def test_nothing_else_fills_a_whole_model() -> None:
    """``load_weights(..., strict=True)`` is how a second way would begin."""
    found = set()
    for folder in ("the_mask", "tools", "benchmarks", "datasets"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("load_weights"):
                    continue
                if any(word.arg == "strict" for word in node.keywords):
                    found.add(path.relative_to(ROOT).as_posix())
    assert found == {"the_mask/weights/trained.py"}
