"""Start one or many processes: in place, with Detectron2's launcher, or under torchrun."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from detectron2.engine import DEFAULT_TIMEOUT
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from the_mask.engine.signals import SIGNALS, TrainingInterrupted
from the_mask.ops.threads import threads_per_process

# Errors that a user can fix; shown without a traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError)
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def plain_message(error: BaseException) -> str:
    """The message of an error; for an error of a data worker, which has its whole traceback, the last line."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        return text.strip().splitlines()[-1].partition(": ")[2]
    return text


def under_torchrun() -> bool:
    """Whether this process was started by torchrun (or a scheduler that sets its variables).

    Raises:
        ValueError: only some of its variables are set.
    """
    absent = [name for name in TORCHRUN_VARIABLES if name not in os.environ]
    if "LOCAL_RANK" not in os.environ and "RANK" not in os.environ:
        return False
    if absent:
        raise ValueError(
            f"RANK or LOCAL_RANK is set, but {', '.join(absent)} is not; start the processes with torchrun"
        )
    return True


def count_processes(num_gpus: int = 0, num_processes: int = 0, num_machines: int = 1, dist_url: str = "auto") -> int:
    """Number of processes of the whole job, from the arguments of :func:`launch` or from torchrun.

    Raises:
        ValueError: numbers that contradict each other, or more GPUs than available.
    """
    if under_torchrun():
        if num_machines > 1 or num_gpus > 1 or num_processes > 1:
            raise ValueError("torchrun already decides the number of processes: leave out --num-gpus and the like")
        return int(os.environ["WORLD_SIZE"])
    if num_gpus > 0 and num_processes > 0:
        raise ValueError("--num-gpus and --num-processes (on the CPU) exclude each other")
    if num_gpus > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus {num_gpus}: this machine has {torch.cuda.device_count()}; use --num-processes on the CPU"
        )
    if num_machines > 1 and dist_url == "auto":
        raise ValueError("several machines need --dist-url tcp://HOST:PORT of machine 0")
    return max(1, num_gpus, num_processes) * num_machines


def launch(
    main: Callable[..., Any],
    args: tuple[Any, ...] = (),
    *,
    num_gpus: int = 0,
    num_processes: int = 0,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    device: str = "",
) -> None:
    """Run ``main(*args)`` in the requested number of processes; under torchrun, in this process of its group.

    Args:
        main: importable function.
        args: its arguments, picklable.
        num_gpus: processes per machine, one per GPU (nccl).
        num_processes: processes per machine on the CPU (gloo); excludes ``num_gpus``.
        num_machines, machine_rank, dist_url: as in Detectron2; ``"auto"`` finds a free port on one machine.
        device: device of the models, ``"cpu"`` or ``"cuda"``; chooses gloo or nccl under torchrun. ``""``: automatic.

    Raises:
        ValueError: see :func:`count_processes`.
        TrainingInterrupted: the processes were stopped by Ctrl-C or SIGTERM.
    """
    world_size = count_processes(num_gpus, num_processes, num_machines, dist_url)
    if under_torchrun():
        _run_in_torchrun(main, args, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return
    if world_size == 1:
        main(*args)
        return
    if machine_rank == 0:
        _check_free(dist_url)
    processes = world_size // num_machines
    with _hidden_gpus(num_processes > 0), _forwarded_signals() as received:
        try:
            detectron2_launch(_worker, processes, num_machines, machine_rank, dist_url, (main, args, processes))
        except ProcessExitedException as error:
            signum = received[0] if received else (error.exit_code or 0) - 128
            if signum in SIGNALS:
                _join_children()
                raise TrainingInterrupted(signum) from error
            raise
        if received:
            raise TrainingInterrupted(received[0])


def _check_free(dist_url: str) -> None:
    """Raise a ValueError if a program listens at the port of ``tcp://HOST:PORT``, where the first process will."""
    address = urlsplit(dist_url)
    if address.scheme != "tcp" or not address.port:
        return
    with socket.socket(socket.AF_INET6 if ":" in (address.hostname or "") else socket.AF_INET) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind(("", address.port))
        except OSError as error:
            raise ValueError(
                f"--dist-url {dist_url}: port {address.port} cannot be used ({error.strerror}); name another, or auto"
            ) from error


def _worker(main: Callable[..., Any], args: tuple[Any, ...], local_processes: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_per_process(local_processes))
    try:
        main(*args)
    except TrainingInterrupted as interruption:
        leave_process_group()
        # An exit code is passed on, where Detectron2's launcher would print a traceback.
        sys.exit(interruption.exit_code)
    except USER_ERRORS as error:
        print(f"error (process {comm.get_rank()}): {plain_message(error)}", file=sys.stderr, flush=True)
        sys.exit(1)
    leave_process_group()


def leave_process_group() -> None:
    """End the threads of the process group.

    A gloo thread that drops its last tensor while Python shuts down aborts the process ("terminate called without an
    active exception"), see https://github.com/pytorch/pytorch/issues/190489.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    # Detectron2 keeps the group of this machine in a variable of its module, and that of all in a cache.
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    # What still refers to the group (DistributedDataParallel, hooks) is often part of a cycle.
    gc.collect()


def _run_in_torchrun(main: Callable[..., Any], args: tuple[Any, ...], device: str) -> None:
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    gpu = device.startswith("cuda")
    if gpu:
        if local_size > torch.cuda.device_count():
            raise ValueError(
                f"torchrun started {local_size} processes on this machine, which has {torch.cuda.device_count()} GPUs; "
                "set MODEL.DEVICE cpu to train on the CPU"
            )
        torch.cuda.set_device(local_rank)
    # The timeout is Detectron2's: an evaluation may keep one process busy for long.
    try:
        dist.init_process_group(backend="nccl" if gpu else "gloo", init_method="env://", timeout=DEFAULT_TIMEOUT)
    except dist.DistNetworkError as error:
        place = f"MASTER_ADDR {os.environ.get('MASTER_ADDR')}, MASTER_PORT {os.environ.get('MASTER_PORT')}"
        raise ValueError(f"the processes do not find each other at {place}: {error}") from error
    try:
        comm.create_local_process_group(local_size)
        comm.synchronize()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads_per_process(local_size))
        main(*args)
    finally:
        leave_process_group()


@contextmanager
def _hidden_gpus(hidden: bool) -> Iterator[None]:
    """Hide GPUs from child processes started inside the block, because Detectron2 uses nccl if it sees one."""
    if not hidden:
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


@contextmanager
def _forwarded_signals() -> Iterator[list[int]]:
    """Forward Ctrl-C and SIGTERM to the child processes and wait for them, so that they can save a checkpoint."""
    received: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for child in multiprocessing.active_children():
            if child.pid is not None and child.is_alive():
                os.kill(child.pid, signum)

    previous = {signum: signal.signal(signum, forward) for signum in SIGNALS}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _join_children() -> None:
    for child in multiprocessing.active_children():
        child.join()
