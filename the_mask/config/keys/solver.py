"""Keys of optimiser, schedule, precision and checkpoints."""

from __future__ import annotations

from detectron2.config import CfgNode

from the_mask.config.allowed import one_of, within

OPTIMIZERS = ("ADAMW", "SGD")
SCHEDULES = ("WarmupPolyLR", "PolyLRWithFloor")
WARMUP_METHODS = ("linear", "constant")
CLIP_TYPES = ("full_model", "norm", "value")
DECAY_MODES = ("none", "layer", "stage", "vit")


def add_keys(cfg: CfgNode) -> None:
    """Add them to ``cfg``, in place."""
    cfg.SOLVER.OPTIMIZER = one_of(*OPTIMIZERS)
    cfg.SOLVER.BASE_LR = within(1e-4, least=0)
    # Iterations of the training.
    cfg.SOLVER.MAX_ITER = within(cfg.SOLVER.MAX_ITER, least=1)
    # Clips of an iteration, over all processes. A clip of the smallest size takes kilobytes: beyond 65536, memory is
    # gone before the first iteration.
    cfg.SOLVER.IMS_PER_BATCH = within(cfg.SOLVER.IMS_PER_BATCH, least=1, most=65536)
    cfg.SOLVER.WEIGHT_DECAY = 0.05
    # Weight decay of norms, and of embeddings and position tables.
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0
    # Weight decay of other vectors: layer scales, and biases without a WEIGHT_DECAY_BIAS; None: as weights.
    cfg.SOLVER.WEIGHT_DECAY_VECTOR = None
    # Substrings of parameter names without any weight decay.
    cfg.SOLVER.NO_DECAY = []
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    # Learning rates that fall from the head to the stem (on top of BACKBONE_MULTIPLIER): "none", "layer" (per block),
    # "vit" (per block of a plain transformer) or "stage"; see the_mask/engine/layer_decay.py.
    cfg.SOLVER.LR_DECAY = CfgNode()
    cfg.SOLVER.LR_DECAY.MODE = one_of(*DECAY_MODES)
    cfg.SOLVER.LR_DECAY.RATE = 1.0
    # "stage" only: steps from head to stem; 0 counts the stages, ConvNeXt is published with 12.
    cfg.SOLVER.LR_DECAY.NUM_LAYERS = 0
    # Two quirks of the InternImage release: extra norms of the third level take the rate of its first blocks, and the
    # mask decoder's queries, level, class and mask embeddings that of the stem.
    cfg.SOLVER.LR_DECAY.QUIRK_EXTRA_NORMS = False
    cfg.SOLVER.LR_DECAY.QUIRK_QUERIES = False
    # After the warm-up, with p = (1 - iter/MAX_ITER)^POLY_LR_POWER and end = POLY_LR_END, BASE_LR times
    # "WarmupPolyLR": max(p, end), or "PolyLRWithFloor": (1 - end) * p + end.
    cfg.SOLVER.LR_SCHEDULER_NAME = one_of(*SCHEDULES)
    cfg.SOLVER.POLY_LR_POWER = within(0.9, least=0)
    cfg.SOLVER.POLY_LR_END = within(0.0, 0, 1)
    # The warm-up starts at WARMUP_FACTOR times the rate.
    cfg.SOLVER.WARMUP_ITERS = within(0, least=0)
    cfg.SOLVER.WARMUP_FACTOR = within(cfg.SOLVER.WARMUP_FACTOR, 0, 1)
    cfg.SOLVER.WARMUP_METHOD = one_of(*WARMUP_METHODS)
    # Above 0: two stages, as EoMT. The backbone stands still for WARMUP_ITERS, then warms up for this many iterations,
    # and every part decays from the end of its own warm-up.
    cfg.SOLVER.BACKBONE_WARMUP_ITERS = within(0, least=0)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    # "full_model": one L2 norm over all parameters.
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = one_of(*CLIP_TYPES)
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.01
    # Mixed precision on any device: "bf16" or "fp16".
    cfg.SOLVER.AMP.PRECISION = one_of("bf16", "fp16")
    # Batches whose gradients are added up before one optimiser step; IMS_PER_BATCH counts all of them.
    cfg.SOLVER.ACCUM_STEPS = within(1, 1, 65536)
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = within(0.9998, 0, 1)
    # Periodic checkpoints kept (0: all); the best and the last are always kept.
    cfg.SOLVER.CHECKPOINT_KEEP = within(2, least=0)
    # Metric that chooses model_best.pth; "" keeps no best checkpoint.
    cfg.SOLVER.CHECKPOINT_BEST = "mIoU"
    # torch.set_float32_matmul_precision; "" leaves torch's setting.
    cfg.FLOAT32_PRECISION = one_of("", "highest", "high", "medium")
    # torch.use_deterministic_algorithms.
    cfg.SOLVER.DETERMINISTIC = False
    # Iterations between log lines.
    cfg.SOLVER.LOG_PERIOD = within(20, least=1)
    # Beside TensorBoard: any of "wandb", "mlflow", "trackio", each an extra of the package. See docs/tracking.md.
    cfg.SOLVER.TRACKERS = []
