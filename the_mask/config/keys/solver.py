"""Keys of optimiser, schedule, precision and checkpoints."""

from __future__ import annotations

from the_mask.config.options import Options, one_of, within

OPTIMIZERS = ("ADAMW", "SGD")
SCHEDULES = ("WarmupPolyLR", "PolyLRWithFloor")
WARMUP_METHODS = ("linear", "constant")
CLIP_TYPES = ("full_model", "norm", "value")
DECAY_MODES = ("none", "layer", "stage", "vit")
# Of a backbone.
NUM_STAGES = 4


class SolverOptions(Options, group="SOLVER"):
    """Optimiser, schedule, precision, checkpoints and logs."""

    optimizer: str = one_of(*OPTIMIZERS)
    base_lr: float = within(0.0001, least=0)
    # Iterations of the training.
    max_iter: int = within(40000, least=1)
    # Clips of an iteration, over all processes. A clip of the smallest size takes kilobytes: beyond 65536, memory is
    # gone before the first iteration.
    ims_per_batch: int = within(16, least=1, most=65536)
    weight_decay: float = 0.05
    # Weight decay of norms, and of embeddings and position tables.
    weight_decay_norm: float = 0.0
    weight_decay_embed: float = 0.0
    # Weight decay of other vectors: layer scales, and biases without a WEIGHT_DECAY_BIAS; None: as weights.
    weight_decay_vector: float | None = None
    # Substrings of parameter names without any weight decay.
    no_decay: tuple[str, ...] = ()
    backbone_multiplier: float = 0.1
    # After the warm-up, with p = (1 - iter/MAX_ITER)^POLY_LR_POWER and end = POLY_LR_END, BASE_LR times
    # "WarmupPolyLR": max(p, end), or "PolyLRWithFloor": (1 - end) * p + end.
    lr_scheduler_name: str = one_of(*SCHEDULES)
    poly_lr_power: float = within(0.9, least=0)
    poly_lr_end: float = within(0.0, 0, 1)
    # The warm-up starts at WARMUP_FACTOR times the rate.
    warmup_iters: int = within(0, least=0)
    warmup_factor: float = within(0.001, 0, 1)
    warmup_method: str = one_of(*WARMUP_METHODS)
    # Above 0: two stages, as EoMT. The backbone is frozen for WARMUP_ITERS, then warms up for this many iterations,
    # and every part decays from the end of its own warm-up.
    backbone_warmup_iters: int = within(0, least=0)
    # Batches whose gradients are added up before one optimiser step; IMS_PER_BATCH counts all of them.
    accum_steps: int = within(1, 1, 65536)
    # Periodic checkpoints kept (0: all); the best and the last are always kept.
    checkpoint_keep: int = within(2, least=0)
    # Metric that chooses model_best.pth; "" keeps no best checkpoint.
    checkpoint_best: str = "mIoU"
    # torch.set_float32_matmul_precision; "" leaves torch's setting.
    float32_precision: str = one_of("", "highest", "high", "medium", key="FLOAT32_PRECISION")
    # torch.use_deterministic_algorithms.
    deterministic: bool = False
    # Iterations between log lines.
    log_period: int = within(20, least=1)
    # Besides TensorBoard: any of "wandb", "mlflow", "trackio", each an extra of the package. See docs/tracking.md.
    trackers: tuple[str, ...] = ()


class LayerDecayOptions(Options, group="SOLVER.LR_DECAY"):
    """Learning rates that fall from the head to the stem, on top of BACKBONE_MULTIPLIER."""

    # "none", "layer" (per block), "vit" (per block of a plain transformer) or "stage"; see engine/layer_decay.py.
    mode: str = one_of(*DECAY_MODES)
    # From one layer or stage to the one below.
    rate: float = 1.0
    # "stage" only: steps from head to stem; 0 counts the stages, ConvNeXt is published with 12.
    num_layers: int = 0
    # Two quirks of the InternImage release: the k-th extra norm of the third level takes the rate of that level's k-th
    # block instead of the block that it follows; and the mask decoder's queries, level, class and mask embeddings that
    # of the stem, although they start untrained.
    quirk_extra_norms: bool = False
    quirk_queries: bool = False

    def check(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"SOLVER.LR_DECAY.RATE {self.rate}: expected a number above 0, at most 1")
        if self.num_layers and (self.mode != "stage" or self.num_layers < NUM_STAGES):
            raise ValueError(
                f"SOLVER.LR_DECAY.NUM_LAYERS {self.num_layers}: expected 0 (counted), or with MODE stage a number >= "
                f"{NUM_STAGES}"
            )


class ClipGradientsOptions(Options, group="SOLVER.CLIP_GRADIENTS"):
    """Clipping of gradients."""

    enabled: bool = True
    # "full_model": one L2 norm over all parameters.
    clip_type: str = one_of(*CLIP_TYPES)
    clip_value: float = 0.01


class AmpOptions(Options, group="SOLVER.AMP"):
    """Mixed precision on any device."""

    # "bf16" or "fp16"; SOLVER.AMP.ENABLED switches it on.
    precision: str = one_of("bf16", "fp16")


class EmaOptions(Options, group="SOLVER.EMA"):
    """Running mean of the weights."""

    enabled: bool = False
    decay: float = within(0.9998, 0, 1)
