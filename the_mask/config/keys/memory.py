"""Keys of class memories, multi-stage inference and distillation."""

from __future__ import annotations

import math

from the_mask.config.keys.context import FRAMES
from the_mask.config.options import Options, one_of, within

INITS = ("first_seen_mean", "random_pixel", "file")
RESOLUTIONS = ("labels", "features")
LOOKUPS = ("hard", "soft")


class ClassMemoryOptions(Options, group="MODEL.BLOCKS.CLASS_MEMORY"):
    """Block class_memory."""

    # Rows per class.
    prototypes: int = within(1, least=1)
    # What a class's row starts from: "first_seen_mean", "random_pixel" (paper) or "file" (then INIT_FILE: one tensor
    # [K, C] or [K, prototypes, C] as .pth or .safetensors).
    init: str = one_of(*INITS)
    init_file: str = ""
    # Rows are updated from features enlarged to the "labels" (paper), or from "features" with the labels at their
    # centres (much cheaper).
    update_res: str = one_of(*RESOLUTIONS)
    # Weight of the new value: MOMENTUM * ((1 - FLOOR) (1 - t / MAX_ITER)^POWER + FLOOR); POWER 0 is constant.
    momentum: float = 0.9
    momentum_power: float = 0.9
    momentum_floor: float = 0.01
    # Where the block's first classifier is the prior: its "hard" labels (paper) or "soft" probabilities.
    lookup: str = one_of(*LOOKUPS)
    # Weight of the first classifier's loss.
    stage1_weight: float = 0.4
    # Weight of the loss that has the decoder's last classifier tell the class of every row (MCIBI: 1.0; needs a decoder
    # as wide as the rows), from this share of SOLVER.MAX_ITER on.
    memory_loss: float = 0.0
    memory_loss_start: float = 0.0


class StageCountOptions(Options, group="TEST.STAGES"):
    """Multi-stage inference."""

    # After the normal pass (stage 0), this many passes that read the masks of the one before.
    count: int = within(0, least=0)
    # Stage k reads stage k-1's mask of the "same_frame" or of the "previous_frame".
    frame: str = one_of(*FRAMES)
    # Folder of stored masks (TEST.SAVE_PREDICTIONS of another run) to use as stage 0; "" runs it.
    masks: str = ""


class DistillationOptions(Options, group="MODEL.DISTILLATION"):
    """META_ARCHITECTURE DistilledSegmentor: the model of this config learns from a frozen teacher."""

    # The same config with this META_ARCHITECTURE is the student.
    student_architecture: str = "ClipSegmentor"
    # Config file of the teacher, KEY VALUE pairs on top of it, and its weights (needed for training only). Any family.
    teacher_config: str = ""
    teacher_options: tuple[str, ...] = ()
    teacher_weights: str = ""
    # Weight and temperature of the pixel-wise term: cross-entropy against the teacher's probabilities.
    pixel_weight: float = 10.0
    temperature: float = 1.0
    # Weight of the pairwise term (differences of cosine affinities between regions); 0 leaves it out, which a teacher
    # other than a ClipSegmentor needs.
    pair_weight: float = 0.5
    # Regions are max-pooled windows of this share of the map per side.
    pair_scale: float = 0.5
    # Backbone level that the pairwise term compares, or "main": what the classifiers read.
    pair_level: str = "res5"

    def check(self) -> None:
        if min(self.pixel_weight, self.pair_weight) < 0 or self.pixel_weight + self.pair_weight == 0:
            raise ValueError(
                f"MODEL.DISTILLATION: PIXEL_WEIGHT {self.pixel_weight} and PAIR_WEIGHT {self.pair_weight} must be >= "
                "0, and one of them > 0"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"MODEL.DISTILLATION.TEMPERATURE {self.temperature}: expected a number > 0")
        if not 0 < self.pair_scale <= 1:
            raise ValueError(f"MODEL.DISTILLATION.PAIR_SCALE {self.pair_scale}: expected a share in 0..1, above 0")
