"""Keys of models that are divided among processes."""

from __future__ import annotations

from detectron2.config import CfgNode

from the_mask.config.allowed import one_of

MODES = ("none", "fsdp2")


def add_keys(cfg: CfgNode) -> None:
    """Add them to ``cfg``, in place."""
    # "none": every process has the whole model (DistributedDataParallel). "fsdp2": parameters, gradients and optimiser
    # state are divided among the processes, and so are checkpoints.
    cfg.MODEL.PARALLEL = one_of(*MODES)
