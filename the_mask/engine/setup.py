"""Set-up before the first iteration: seed, library flags, logging, record of config and environment."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from the_mask.data.files import atomic_write
from the_mask.engine.logs import setup_logging
from the_mask.engine.memory import keep_freed_memory
from the_mask.env import environment_report

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"


def with_seed(cfg: CfgNode) -> CfgNode:
    """A frozen copy of a config with its ``SEED`` set; a negative seed is replaced by a random one."""
    cfg = cfg.clone()
    if cfg.SEED < 0:
        cfg.defrost()
        # Not from the global generators, which may have been seeded on purpose.
        cfg.SEED = comm.all_gather(random.SystemRandom().randrange(2**31))[0]
        logger.info("SEED %d was drawn; it is recorded in the checkpoints", cfg.SEED)
    cfg.freeze()
    return cfg


def set_library_flags(cfg: CfgNode) -> None:
    """Set deterministic algorithms, cuDNN benchmark and TF32 as configured.

    With ``SOLVER.DETERMINISTIC``, torch only warns if it has no deterministic algorithm (some CUDA backward passes).
    """
    deterministic = cfg.SOLVER.DETERMINISTIC
    if deterministic:
        # Read by cuBLAS when its first handle is created.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not deterministic
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
        torch.backends.cudnn.allow_tf32 = cfg.FLOAT32_PRECISION != "highest"


def setup(cfg: CfgNode) -> None:
    """Create ``OUTPUT_DIR``, start logging, record the environment and the config, set library and memory flags.

    Args:
        cfg: written to ``OUTPUT_DIR/config.yaml`` by the first process.
    """
    folder = Path(cfg.OUTPUT_DIR)
    setup_logging(folder, comm.get_rank())
    set_library_flags(cfg)
    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
    if not comm.is_main_process():
        return
    logger.info("environment:\n%s", environment_report())
    text = cfg.dump()
    atomic_write(folder / CONFIG_FILE, text.encode())
    world, device = comm.get_world_size(), cfg.MODEL.DEVICE
    logger.info("%d process(es) on %s; config written to %s", world, device, folder / CONFIG_FILE)
