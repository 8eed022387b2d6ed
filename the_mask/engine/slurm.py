"""Runs a training as a SLURM job with submitit, which is optional."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from the_mask.engine.run import RunOptions, check, exit_code, run_processes


@dataclass(frozen=True)
class SlurmOptions:
    """Resources of the job.

    Attributes:
        nodes: number of machines.
        gpus_per_node: GPUs, and also processes, per machine, unless ``processes_per_node`` is set.
        processes_per_node: processes per machine; 0: one per GPU.
        cpus_per_process: cores per process.
        memory_gb: per machine; 0 takes the cluster's default.
        hours: time limit; when it is reached, the job is queued again and continues from its last checkpoint.
        partition: "" takes the cluster's default.
        name: name of the job.
        folder: folder of the logs.
        executor: "slurm"; or "local" (processes on this machine) or "debug" (in this process) for trying it out.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    processes_per_node: int = 0
    cpus_per_process: int = 8
    memory_gb: int = 0
    hours: float = 24.0
    partition: str = ""
    name: str = "the_mask"
    folder: Path = Path("output/slurm")
    executor: str = "slurm"

    @property
    def processes(self) -> int:
        """Processes per machine.

        Raises:
            ValueError: no process, or numbers below their minimum.
        """
        count = self.processes_per_node or self.gpus_per_node
        if count < 1 or self.nodes < 1 or self.hours <= 0 or self.cpus_per_process < 1:
            raise ValueError(
                f"--nodes {self.nodes}, --gpus-per-node {self.gpus_per_node}, --processes-per-node "
                f"{self.processes_per_node}, --cpus-per-process {self.cpus_per_process}, --hours {self.hours}: "
                "at least one machine, one process, one core and some time are needed"
            )
        return count

    def parameters(self) -> dict[str, Any]:
        """Arguments of submitit's ``update_parameters``."""
        found: dict[str, Any] = {
            "name": self.name,
            "nodes": self.nodes,
            "tasks_per_node": self.processes,
            "gpus_per_node": self.gpus_per_node,
            "cpus_per_task": self.cpus_per_process,
            "timeout_min": max(1, round(60 * self.hours)),
        }
        if self.memory_gb:
            found["mem_gb"] = self.memory_gb
        if self.partition:
            found["slurm_partition"] = self.partition
        return found


def parse_training(arguments: Sequence[str]) -> RunOptions:
    """Parse the arguments of ``the-mask train`` that are supported in a job."""
    parser = argparse.ArgumentParser(prog="launch_slurm.py ... --", add_help=False)
    for name in ("--config-file", "--model", "--data"):
        parser.add_argument(name, default="")
    for name in ("--resume", "--eval-only", "--trust-pickle", "--allow-unsafe-yaml", "--allow-remote-config"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("overrides", nargs=argparse.REMAINDER)
    return RunOptions(**vars(parser.parse_args(list(arguments))))


@dataclass
class TrainingTask:
    """The task of each process of the job."""

    options: RunOptions

    def __call__(self) -> int:
        """Join the group and train; returns the exit status."""
        from submitit.helpers import TorchDistributedEnvironment

        # RANK, WORLD_SIZE and the like, as torchrun sets them.
        TorchDistributedEnvironment().export(overwrite=True)
        return exit_code(lambda: run_processes(self.options))

    def checkpoint(self) -> Any:
        """Called by submitit at the time limit or on preemption: the same task again, with --resume."""
        from submitit.helpers import DelayedSubmission

        self.options.resume = True
        return DelayedSubmission(self)


def submit(training: Sequence[str], slurm: SlurmOptions) -> str:
    """Check the training's config, then queue it.

    Returns:
        One line of text about the job.

    Raises:
        ValueError, FileNotFoundError: bad options or config, found before anything is queued.
        ImportError: submitit is not installed.
    """
    options = parse_training(training)
    check(options, slurm.nodes * slurm.processes)
    try:
        import submitit
    except ImportError as error:
        raise ImportError("launching on SLURM needs submitit: pip install 'the_mask[slurm]'") from error
    slurm.folder.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(folder=slurm.folder, cluster=slurm.executor)
    executor.update_parameters(**slurm.parameters())
    job = executor.submit(TrainingTask(options))
    where = f"{slurm.nodes} x {slurm.processes} processes"
    return f"job {job.job_id}: {where}, at most {slurm.hours:g} h; logs in {slurm.folder}"
