"""Rank, size and object exchange of the process group; all of it also works in a single process."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# The processes of this machine; made by create_local_process_group.
_LOCAL_PROCESS_GROUP: Any = None
_NO_LOCAL_GROUP = (
    "Local process group is not yet created! launch() does it; processes started in another way call "
    "comm.create_local_process_group(num_workers_per_machine) after torch.distributed.init_process_group()."
)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _is_distributed() else 1


def get_rank() -> int:
    """Return the rank of this process among all."""
    return dist.get_rank() if _is_distributed() else 0


@functools.lru_cache
def create_local_process_group(num_workers_per_machine: int) -> None:
    """Make the groups of processes that share a machine. Every process calls it, once, after the global group exists.

    Args:
        num_workers_per_machine: processes per machine, equal for all machines.
    """
    global _LOCAL_PROCESS_GROUP
    assert _LOCAL_PROCESS_GROUP is None
    world_size = get_world_size()
    assert world_size % num_workers_per_machine == 0, (world_size, num_workers_per_machine)
    my_machine = get_rank() // num_workers_per_machine
    for machine in range(world_size // num_workers_per_machine):
        first = machine * num_workers_per_machine
        group = dist.new_group(list(range(first, first + num_workers_per_machine)))
        if machine == my_machine:
            _LOCAL_PROCESS_GROUP = group


def get_local_process_group() -> Any:
    """Return the group of the processes on this machine."""
    assert _LOCAL_PROCESS_GROUP is not None, _NO_LOCAL_GROUP
    return _LOCAL_PROCESS_GROUP


def get_local_rank() -> int:
    """Return the rank of this process on its machine."""
    return dist.get_rank(group=get_local_process_group()) if _is_distributed() else 0


def get_local_size() -> int:
    """Return the number of processes on this machine."""
    return dist.get_world_size(group=get_local_process_group()) if _is_distributed() else 1


def is_main_process() -> bool:
    """Return whether this is rank 0."""
    return get_rank() == 0


def synchronize() -> None:
    """Wait for all processes."""
    if get_world_size() == 1:
        return
    if dist.get_backend() == dist.Backend.NCCL:
        # Without the device, NCCL guesses it and warns.
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


@functools.lru_cache
def _get_global_gloo_group() -> Any:
    """Return a group of all processes that moves CPU objects: NCCL alone cannot."""
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else dist.group.WORLD


def all_gather(data: Any, group: Any = None) -> list[Any]:
    """Return the picklable ``data`` of all ranks, in rank order, on every rank."""
    if get_world_size() == 1:
        return [data]
    group = _get_global_gloo_group() if group is None else group
    size = dist.get_world_size(group)
    if size == 1:
        return [data]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, data, group=group)
    return gathered


def gather(data: Any, dst: int = 0, group: Any = None) -> list[Any]:
    """Return the picklable ``data`` of all ranks, in rank order, on rank ``dst``; ``[]`` on the others."""
    if get_world_size() == 1:
        return [data]
    group = _get_global_gloo_group() if group is None else group
    size = dist.get_world_size(group=group)
    if size == 1:
        return [data]
    if dist.get_rank(group=group) != dst:
        dist.gather_object(data, None, dst=dst, group=group)
        return []
    gathered: list[Any] = [None] * size
    dist.gather_object(data, gathered, dst=dst, group=group)
    return gathered


def shared_random_seed() -> int:
    """Return a random number equal on all ranks: rank 0 draws it from numpy's global generator. All ranks call it."""
    return all_gather(int(np.random.randint(2**31)))[0]  # noqa: NPY002 - follows seed_all_rng


def reduce_dict(input_dict: dict[str, torch.Tensor], average: bool = True) -> dict[str, torch.Tensor]:
    """Add up scalar CUDA (or gloo CPU) tensors with the same keys over ranks; only rank 0 gets the result.

    Args:
        input_dict: name to scalar tensor, the same names on every rank.
        average: divide by the number of ranks.
    """
    world_size = get_world_size()
    if world_size < 2:
        return input_dict
    with torch.no_grad():
        # Sorted, so that the order agrees over ranks.
        names = sorted(input_dict)
        values = torch.stack([input_dict[name] for name in names], dim=0)
        dist.reduce(values, dst=0)
        if average and dist.get_rank() == 0:
            values /= world_size
        return dict(zip(names, values, strict=True))
