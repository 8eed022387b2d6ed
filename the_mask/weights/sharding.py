"""Models larger than one device's memory: parameters, gradients and optimiser state sharded over processes (FSDP2).

A sharded tensor is split along its first axis, so the whole tensor is the concatenation of all processes' parts. For a
checkpoint, every process writes its own parts, in the usual checkpoint format, and reading joins them. So a training
can be resumed with any number of processes, or without sharding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.utils import comm
from torch import Tensor, nn

from the_mask.config.keys.model import MODES
from the_mask.modeling.backbones.internimage import InternImageBlock
from the_mask.modeling.backbones.mit import MiTBlock
from the_mask.modeling.mask.mask_decoders.layers import CrossAttentionLayer, FFNLayer, SelfAttentionLayer
from the_mask.modeling.mask.pixel_decoders.ms_deform_attn import DeformableEncoderLayer
from the_mask.weights.checkpoint import PARTS, CheckpointWriteError, new_token, part_path, save_checkpoint

# Modules that are gathered one at a time; everything outside them is gathered with the whole model. List only modules
# that are used by calling them, and whose parameters are not read by other modules.
UNITS: tuple[type[nn.Module], ...] = (
    InternImageBlock,
    MiTBlock,
    BottleneckBlock,
    DeformableEncoderLayer,
    CrossAttentionLayer,
    SelfAttentionLayer,
    FFNLayer,
)
TIMM_UNITS = ("SwinTransformerBlock", "SwinTransformerV2Block", "ConvNeXtBlock")


def wants_sharding(cfg: CfgNode) -> bool:
    """Whether the model of this run is sharded: if configured, and with several processes.

    Raises:
        ValueError: an unknown mode, or one that does not work with the precision or the memory layout.
    """
    mode = cfg.MODEL.PARALLEL
    if mode not in MODES:
        raise ValueError(f"MODEL.PARALLEL={mode!r}: must be one of {', '.join(MODES)}")
    if mode == "fsdp2" and cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "fp16":
        raise ValueError("MODEL.PARALLEL fsdp2 goes with SOLVER.AMP.PRECISION bf16 or without AMP, not with fp16")
    if mode == "fsdp2" and cfg.MODEL.CHANNELS_LAST:
        raise ValueError("MODEL.PARALLEL fsdp2 shards contiguous weights only: turn MODEL.CHANNELS_LAST off")
    return mode == "fsdp2" and comm.get_world_size() > 1


def shard_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Shard a model over all processes, in place; must be called before its optimiser is built.

    The weights of the first process are used, as in DistributedDataParallel.
    """
    # FSDP and sharded tensors take half a second to import, and every model is loaded through this module.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for value in (*model.parameters(), *model.buffers()):
        dist.broadcast(value.data, 0)
    mesh = init_device_mesh(device.type, (comm.get_world_size(),))
    units = [m for m in model.modules() if isinstance(m, UNITS) or _timm_unit(m)]
    for module in units:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)  # in place: the model's class becomes a subclass
    return model


def _timm_unit(module: nn.Module) -> bool:
    # Avoid importing timm for models that do not use it.
    return any(base.__name__ in TIMM_UNITS and base.__module__.startswith("timm.") for base in type(module).__mro__)


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard_model` has been applied."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def whole(value: Tensor) -> Tensor:
    """Gather a tensor that may be sharded; all processes must gather the same tensors in the same order."""
    return value.full_tensor() if _is_sharded_tensor(value) else value  # type: ignore[attr-defined]


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict of gathered tensors, on every process."""
    return {name: whole(value.detach()) for name, value in model.state_dict().items()}


def like(value: Tensor, target: Tensor) -> Tensor:
    """Shard a whole tensor like ``target`` (if that is sharded), without communication."""
    if not _is_sharded_tensor(target) or _is_sharded_tensor(value):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    source = value.to(target.device)
    return distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)


def _is_sharded_tensor(value: Any) -> bool:
    # Without the module there can be no such tensor.
    sharded = sys.modules.get("torch.distributed.tensor")
    return sharded is not None and isinstance(value, sharded.DTensor)


def load_whole(model: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> None:
    """``model.load_state_dict`` for whole tensors and a model that may be sharded."""
    ours = model.state_dict()
    model.load_state_dict(
        {name: like(value, ours[name]) if name in ours else value for name, value in state.items()}, strict=strict
    )


def own_parts(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a checkpoint into its unsharded content and this process's parts of sharded tensors.

    Returns:
        The same nested dictionary with each sharded tensor replaced by an empty one, and the parts by path.
    """
    parts: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(child, f"{path}/{key}") for key, child in value.items()}
        if _is_sharded_tensor(value):
            if not (len(value.placements) == 1 and value.placements[0].is_shard(0)):
                raise ValueError(f"{path} is divided as {value.placements}, not along its first axis")
            parts[path] = value.to_local().detach().cpu().clone()
            return torch.empty(0)
        return value

    return walk(state, ""), parts


def write_parts(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Write this process's parts of a checkpoint next to ``path``; a collective call.

    Returns:
        The state that the first process still has to write to ``path``; unchanged if nothing is sharded.

    Raises:
        CheckpointWriteError: on any process, as raised by ``save_checkpoint``.
    """
    rest, parts = own_parts(state)
    if not parts:
        return state
    count, token = comm.get_world_size(), comm.all_gather(new_token())[0]
    problem = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(part_path(path, comm.get_rank(), count, token), {"parts": parts})
    except OSError as error:
        problem = str(error)
    problems = [text for text in comm.all_gather(problem) if text]
    if problems:
        # Tell the other processes about the error here, so that they do not wait for ever.
        raise CheckpointWriteError(problems[0])
    return {**rest, PARTS: {"count": count, "paths": list(parts), "token": token}}


def gathered_copy(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """An unsharded copy for evaluation, where processes run independently; ``build`` makes an empty model."""
    copy = build()
    copy.load_state_dict(whole_state(model))
    return copy
