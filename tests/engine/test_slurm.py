"""launch_slurm: what is asked of submitit, and what the processes of a job run. submitit itself is played by a fake."""

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest

from the_mask.engine import slurm
from the_mask.engine.slurm import SlurmOptions, TrainingTask, parse_training, submit

ROOT = Path(__file__).resolve().parents[2]
DEBUG = str(ROOT / "configs" / "debug" / "mask2former_debug.yaml")


class FakeJob:
    job_id = "123"


class FakeExecutor:
    made: list = []  # noqa: RUF012

    def __init__(self, folder, cluster):
        self.folder, self.cluster = folder, cluster
        self.made.append(self)

    def update_parameters(self, **parameters):
        self.parameters = parameters

    def submit(self, task):
        self.task = task
        return FakeJob()


class FakeEnvironment:
    def export(self, overwrite):
        assert overwrite
        os.environ["RANK"] = "1"


@pytest.fixture
def submitit(monkeypatch):
    monkeypatch.setenv("RANK", "")
    module, helpers = types.ModuleType("submitit"), types.ModuleType("submitit.helpers")
    module.AutoExecutor, module.helpers = FakeExecutor, helpers
    helpers.TorchDistributedEnvironment = FakeEnvironment
    helpers.DelayedSubmission = lambda task: ("again", task)
    monkeypatch.setitem(sys.modules, "submitit", module)
    monkeypatch.setitem(sys.modules, "submitit.helpers", helpers)
    monkeypatch.setattr(slurm, "check", lambda options, world: options.load())
    FakeExecutor.made = []
    return FakeExecutor


def test_what_is_asked_for(submitit, tmp_path):
    options = SlurmOptions(nodes=2, gpus_per_node=4, hours=1.5, memory_gb=64, partition="p", folder=tmp_path / "logs")
    text = submit(["--config-file", DEBUG, "MODEL.PARALLEL", "fsdp2"], options)
    assert "job 123: 2 x 4 processes, at most 1.5 h" in text
    executor = submitit.made[0]
    assert executor.cluster == "slurm"
    assert (tmp_path / "logs").is_dir()
    assert executor.parameters == {
        "name": "the_mask",
        "nodes": 2,
        "tasks_per_node": 4,
        "gpus_per_node": 4,
        "cpus_per_task": 8,
        "timeout_min": 90,
        "mem_gb": 64,
        "slurm_partition": "p",
    }
    assert executor.task.options.overrides == ["MODEL.PARALLEL", "fsdp2"]


def test_what_a_process_runs(submitit, monkeypatch):
    ran = []
    monkeypatch.setattr(slurm, "run_processes", lambda options: ran.append((os.environ["RANK"], options)))
    task = TrainingTask(parse_training(["--config-file", DEBUG, "SOLVER.MAX_ITER", "3"]))
    assert task() == 0
    assert ran == [("1", task.options)]
    assert not task.options.resume
    again, same = task.checkpoint()
    assert again == "again"
    assert same.options.resume


def test_errors_come_before_the_queue(submitit, monkeypatch, capsys):
    with pytest.raises(ValueError, match="at least one machine, one process"):
        submit(["--config-file", DEBUG], SlurmOptions(gpus_per_node=0))
    with pytest.raises(FileNotFoundError):
        submit(["--config-file", "none.yaml"], SlurmOptions())
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match=r"needs submitit: pip install"):
        submit(["--config-file", DEBUG], SlurmOptions())
    assert not submitit.made
    spec = importlib.util.spec_from_file_location("launch_slurm_tool", ROOT / "tools" / "launch_slurm.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.main(["--nodes", "0", "--", "--config-file", DEBUG]) == 1
    assert "at least one machine" in capsys.readouterr().err
