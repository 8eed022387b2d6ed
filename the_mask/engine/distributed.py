"""Small helpers for several processes, on CPU (gloo) and GPU (nccl)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from the_mask.weights.checkpoint import CheckpointWriteError

# The option was renamed in newer torch.
_PARAMETERS = inspect.signature(DistributedDataParallel.__init__).parameters
_BUFFER_OPTION = "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"


def wrap_distributed(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the model in DistributedDataParallel if there are several processes, else return it.

    Buffers are not broadcast (frozen norms and constants are equal anyway, batch norm uses its own statistics). Every
    trainable parameter must be used in every step, because unused parameters are not searched for.
    """
    if comm.get_world_size() == 1:
        return model
    # Detectron2 passes device_ids also on the CPU, which DistributedDataParallel refuses.
    device_ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    options: dict[str, Any] = {_BUFFER_OPTION: False, "device_ids": device_ids, "gradient_as_bucket_view": True}
    return DistributedDataParallel(model, find_unused_parameters=False, **options)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum of a tensor over all processes, in place."""
    if comm.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def write_on_main(write: Callable[[], object]) -> None:
    """Run ``write`` on the first process; all processes wait for it and all raise if it fails.

    Raises:
        CheckpointWriteError: as raised by ``write``.
    """
    problem = ""
    if comm.is_main_process():
        try:
            write()
        except CheckpointWriteError as error:
            problem = str(error)
    problem = comm.all_gather(problem)[0]
    if problem:
        raise CheckpointWriteError(problem)
