"""Batch norms that get a single value per channel, such as those after global pooling in a batch of one clip."""

from __future__ import annotations

from functools import partial

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def name_single_values(cfg: CfgNode, model: nn.Module) -> None:
    """Make a batch norm that gets one value per channel raise a helpful error; torch's names neither norm nor batch.

    Does nothing if every process has more than one clip per step, or if norms are computed over all processes.
    """
    solver, processes = cfg.SOLVER, comm.get_world_size()
    if processes * solver.ACCUM_STEPS < solver.IMS_PER_BATCH:
        return
    batch = f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}, {processes} process(es), ACCUM_STEPS {solver.ACCUM_STEPS}"
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not (isinstance(module, nn.SyncBatchNorm) and processes > 1):
            module.register_forward_pre_hook(partial(_refuse, name, batch))


def _refuse(name: str, batch: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
    if module.training and inputs[0].numel() == inputs[0].shape[1]:
        raise ValueError(
            f"batch norm {name} gets a single value per channel, with no variance: a step has one clip per process "
            f"({batch}). Give each process two clips, or choose another norm, such as MODEL.SEM_SEG_HEAD.NORM GN"
        )
