"""Trainings with faults: a disk error ends them with one line, and a kill loses and changes nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import engine_fakes
import pytest
from engine_fakes import assert_same, fake_cfg, variant
from injection import fail_everywhere

from the_mask.weights.checkpoint import CheckpointFolder, read_checkpoint

HERE = Path(__file__).resolve().parent
NOISY = {"dropout": 0.3, "noise": 0.1}
OPTIONS = ["SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.CHECKPOINT_KEEP", 2, "TEST.EVAL_PERIOD", 2, "SOLVER.LOG_PERIOD", 2]


def run(folder: Path, *options: Any) -> None:
    """Train, or resume."""
    trainer = variant(**NOISY)(fake_cfg(folder, *OPTIONS, *options))
    trainer.resume_or_load(resume=True)
    trainer.train()


def curves(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("time", "data_time")} for row in rows]


def final(folder: Path) -> Any:
    return read_checkpoint(folder / "model_final.pth")["model"]


@pytest.mark.slow
def test_an_error_of_the_disk_at_every_step(tmp_path: Path) -> None:
    run(tmp_path / "whole")

    def check(folder: Path, done: bool) -> None:
        last = CheckpointFolder(folder / "run").last()
        if last is not None:
            read_checkpoint(last)
        if done:
            assert_same(final(folder / "run"), final(tmp_path / "whole"))
            assert curves(folder / "run") == curves(tmp_path / "whole")

    steps = fail_everywhere(lambda folder: run(folder / "run"), check, lambda folder: None, tmp_path)
    assert steps > 60


FULL_DISK = """
import resource, signal, sys
from pathlib import Path

import the_mask  # makes detectron2 importable
from the_mask.engine.run import exit_code
from the_mask.weights.checkpoint import CheckpointWriteError

sys.path[:0] = sys.argv[2:]
from test_trainings import run

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
sys.exit(exit_code(lambda: run(Path(sys.argv[1])), also=(CheckpointWriteError,)))
"""


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """The kernel refuses every file beyond some kilobytes, as on a full disk; in a process of its own, since the files
    of a test run would be refused, too."""
    folders = [str(HERE), str(Path(engine_fakes.__file__).parent), str(HERE.parent.parent)]
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path), *folders], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1
    assert "cannot write checkpoint" in done.stderr
    assert "File too large" in done.stderr


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments(tmp_path: Path) -> None:
    """Kill and resume at random moments: weights, best checkpoint and curves equal those of an uninterrupted run."""
    length = ["SOLVER.MAX_ITER", 400]
    run(tmp_path / "whole", *length)
    dice, killed, folder = random.Random(0), 0, tmp_path / "run"
    while killed < 100 or not (folder / "model_final.pth").exists():
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(folder, *length)
                code = 0
            finally:
                os._exit(code)
        if killed < 100:
            time.sleep(dice.uniform(0.005, 0.4))
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        killed += code == -signal.SIGKILL
        if code == 0 and killed < 100:
            break  # the training ended before the next kill
    run(folder, *length)
    assert killed > 10
    assert_same(final(folder), final(tmp_path / "whole"))
    assert curves(folder) == curves(tmp_path / "whole")
    assert_same(*(read_checkpoint(place / "model_best.pth")["model"] for place in (folder, tmp_path / "whole")))
