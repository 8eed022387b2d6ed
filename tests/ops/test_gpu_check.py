"""What benchmarks/gpu_check.py rests on: its runner of tests, and the losses it compares with."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FILE = """
import pytest

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(False, reason="")]


@pytest.mark.parametrize("a", [1, 2])
@pytest.mark.parametrize("b, c", [(1, 2), (3, 3)])
def test_sums(a, b, c):
    assert b <= c
    assert a + b != 5, "two and three"


def test_left_out():
    pytest.skip("not here")


def helper():
    raise AssertionError
"""


@pytest.fixture
def plain_tests(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("plain_tests")


@pytest.mark.parametrize("alone", [False, True])
def test_runner_with_and_without_pytest(plain_tests, tmp_path, monkeypatch, alone):
    (tmp_path / "some_tests.py").write_text(FILE)
    if alone:
        real = importlib.util.find_spec
        monkeypatch.delitem(sys.modules, "pytest")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest" else real(name))
    found = {o.name: o for o in plain_tests.run_tests(tmp_path / "some_tests.py", seconds=60)}
    results = {name: outcome.result for name, outcome in found.items()}
    assert len(found) == 5
    assert sorted(results.values()) == ["failed", "passed", "passed", "passed", "skipped"]
    assert results["test_left_out"] == "skipped"
    (failed,) = [outcome for outcome in found.values() if outcome.result == "failed"]
    assert "two and three" in failed.message
    late = plain_tests.run_tests(tmp_path / "some_tests.py", seconds=-1)
    assert {outcome.message for outcome in late} == {"no time left"}


def test_training_has_the_golden_losses(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    training = importlib.import_module("gpu_training")
    report = training.check_training(torch.device("cpu"))
    assert report["passed"], report
    losses = report["float32"]["losses"]
    assert losses[-1] < losses[0] / 2
    monkeypatch.setattr(training, "STEPS", 2)
    with pytest.raises(ValueError, match="zip"):
        training.check_training(torch.device("cpu"))


def test_report_and_status(tmp_path):
    """Two parts as a person would run them; the report says which kernels ran."""
    output = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--device", "cpu", "--no-build"]
    done = subprocess.run(
        [*command, "--only", "build", "accuracy", "sanitizer", "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(output.read_text())
    assert report["parts"]["build"]["skipped"] == "--no-build"
    assert report["parts"]["sanitizer"]["passed"] is None
    assert "on cpu" in report["operators"]
    passed = report["parts"]["accuracy"]["passed"]
    assert done.returncode == (0 if passed else 1)
    assert ("everything that ran passed" in done.stdout) == passed
    assert str(output) in done.stdout


# Stands for an environment of torch, what torch itself requires, and numpy.
SITE = """
import sys

ABSENT = set("PIL av cloudpickle cv2 detectron2 fvcore hypothesis iopath onnx pycocotools pytest".split())
ABSENT |= set("safetensors scipy tabulate tensorboard termcolor timm torchvision tqdm transformers yacs yaml".split())


class Finder:
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            return None
        return next((spec for f in self.finders if (spec := f.find_spec(name, path, target)) is not None), None)

    def find_distributions(self, *context):
        for finder in self.finders:
            yield from getattr(finder, "find_distributions", lambda *_: ())(*context)


sys.meta_path[:] = [Finder(list(sys.meta_path))]
"""


def test_torch_and_numpy_are_enough(tmp_path):
    """OpenCV, PyAV, timm, pycocotools and the rest are absent: what needs them is left out with the reason."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    absent = subprocess.run([sys.executable, "-c", "import cv2"], env=environment, capture_output=True, check=False)
    assert b"ModuleNotFoundError" in absent.stderr
    output = tmp_path / "report.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu_check.py"),
        "--device",
        "cpu",
        "--no-build",
        "--output",
        str(output),
    ]
    done = subprocess.run(
        [*command, "--only", "accuracy", "training", "debug_config"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    parts = json.loads(output.read_text())["parts"]
    for name, part in parts.items():
        assert "No module named" not in str(part), (name, part)
    assert parts["debug_config"]["passed"] is None
    assert "the trainer needs pytest, fvcore" in parts["debug_config"]["skipped"]
    assert parts["training"]["passed"], parts["training"]
    assert done.returncode == (0 if parts["accuracy"]["passed"] else 1)
    # The parts that take longer import their files.
    kernels = BENCHMARKS.parent / "tests" / "ops" / "test_cuda_kernels.py"
    code = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(BENCHMARKS)!r}, {str(BENCHMARKS.parent)!r}]
import gpu_check, op_contenders, plain_tests, timing
assert len(plain_tests.load_tests(Path({str(kernels)!r})).__dict__) > 20
assert set(gpu_check.PARTS) == set(gpu_check.RUNNERS)
"""
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
