"""The command line: exit codes and messages."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from detectron2.data import MetadataCatalog

from the_mask.data import register_all
from the_mask.data.synthetic import SceneSize, make_moving_shapes
from the_mask.engine.logs import setup_logging
from the_mask.weights import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DEBUG = ROOT / "configs" / "debug" / "mask2former_debug.yaml"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "tools" / "train_net.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("datasets")
    make_moving_shapes(root / "moving_shapes", train_videos=2, val_videos=1, size=SceneSize(4, 48, 64))
    register_all(root)
    yield root
    register_all()
    setup_logging(None, rank=1)


def arguments(folder: Path, *more: str, config: Path = DEBUG) -> list[str]:
    classes = len(MetadataCatalog.get("moving_shapes_train").stuff_classes)
    flags = [word for word in more if word.startswith("--")]
    overrides = [word for word in more if not word.startswith("--")]
    base = ["OUTPUT_DIR", str(folder), "MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(classes)]
    return ["--config-file", str(config), *flags, *base, "SOLVER.MAX_ITER", "2", *overrides]


def test_train_resume_evaluate(tool: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert tool.main(arguments(tmp_path, "TEST.EVAL_PERIOD", "2")) == 0
    assert {"config.yaml", "log.txt", "metrics.json", "model_final.pth", "model_best.pth", "last_checkpoint"} <= set(
        os.listdir(tmp_path)
    )
    assert "environment:" in (tmp_path / "log.txt").read_text()
    assert tool.main(arguments(tmp_path, "--resume", "SOLVER.MAX_ITER", "3")) == 0
    assert [json.loads(line)["iteration"] for line in (tmp_path / "metrics.json").read_text().splitlines()] == [0, 1, 2]
    assert "SOLVER.MAX_ITER: 2 -> 3" in (tmp_path / "log.txt").read_text()
    capsys.readouterr()
    final = str(tmp_path / "model_final.pth")
    assert tool.main(arguments(tmp_path / "eval", "--eval-only", "MODEL.WEIGHTS", final)) == 0
    assert "mIoU" in capsys.readouterr().out
    assert tool.main(arguments(tmp_path, "--eval-only", "--resume")) == 0
    assert read_checkpoint(tmp_path / "model_final.pth")["iteration"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval-only"], "an evaluation needs weights: MODEL.WEIGHTS is empty"),
        (["--eval-only", "--resume"], "has no checkpoint"),
        (["MODEL.WEIGHTS", "none.pth"], "MODEL.WEIGHTS: weights file none.pth does not exist"),
        (["DATASETS.TRAIN", "('vspw_trian',)"], "unknown dataset 'vspw_trian'"),
        (["SOLVER.MAX_ITERS", "5"], "did you mean SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER"], "odd number of words"),
        (["--num-gpus=99"], "--num-gpus 99"),
    ],
)
def test_mistakes(
    tool: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    assert tool.main(arguments(tmp_path, *words)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_foreign_weights(tool: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(torch.nn.Transformer(8, 2, 1, 1, 8).state_dict(), tmp_path / "foreign.pth")
    for flags in ([], ["--eval-only"]):
        words = [*flags, "MODEL.WEIGHTS", str(tmp_path / "foreign.pth")]
        assert tool.main(arguments(tmp_path / "out", *words)) == 1
        error = capsys.readouterr().err
        assert "another architecture" in error
        assert "missing in the file" in error


@pytest.mark.parametrize(
    "content", ["!!python/object/apply:os.getcwd []", "VERSION: 99", "SOLVER: [", "NO_SUCH_KEY: 1"]
)
def test_bad_yaml(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert tool.main(["--config-file", str(path)]) == 1
    assert str(path) in capsys.readouterr().err
    assert tool.main(["--config-file", str(tmp_path / "none.yaml")]) == 1


def test_ctrl_c_in_a_process_of_its_own(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), *arguments(tmp_path, "SOLVER.MAX_ITER", "100000")]
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(data),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "iter 2/" in line:
                process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "continue with --resume" in error
    assert "Traceback" not in error
    last = tmp_path / (tmp_path / "last_checkpoint").read_text()
    assert read_checkpoint(last)["iteration"] >= 1
