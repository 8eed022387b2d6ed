"""Keys of class memories: priors, multi-stage inference, and of distillation."""

from __future__ import annotations

from detectron2.config import CfgNode

from the_mask.config.allowed import one_of, within

INITS = ("first_seen_mean", "random_pixel", "file")
RESOLUTIONS = ("labels", "features")
LOOKUPS = ("hard", "soft")
FRAMES = ("same_frame", "previous_frame")


def add_keys(cfg: CfgNode) -> None:
    """Add them to ``cfg``, in place."""
    # MODEL.CONTEXT.PRIOR may also be "previous_prediction" (of the frame before), "stage1" (of the block's own first
    # classifier) or "stored_masks" (of INPUT.PRIOR_MASKS in training, TEST.STAGES.MASKS in tests).
    # Share of SOLVER.MAX_ITER in which the ground truth stands in for the prior.
    cfg.MODEL.CONTEXT.PRIOR_GT_WARMUP = within(0.1, 0, 1)
    # Hand on class probabilities (True) or labels (False, as in the paper) of the previous frame.
    cfg.MODEL.CONTEXT.PRIOR_SOFT = False
    # Whose stored mask is read: "same_frame" or "previous_frame".
    cfg.MODEL.CONTEXT.STORED_FRAME = one_of(*FRAMES)

    # Block class_memory. Rows per class.
    cfg.MODEL.BLOCKS.CLASS_MEMORY = CfgNode()
    cfg.MODEL.BLOCKS.CLASS_MEMORY.PROTOTYPES = within(1, least=1)
    # What a class's row starts from: "first_seen_mean", "random_pixel" (paper) or "file" (then INIT_FILE: one tensor
    # [K, C] or [K, prototypes, C] as .pth or .safetensors).
    cfg.MODEL.BLOCKS.CLASS_MEMORY.INIT = one_of(*INITS)
    cfg.MODEL.BLOCKS.CLASS_MEMORY.INIT_FILE = ""
    # Rows are updated from features enlarged to the "labels" (paper), or from "features" with the labels at their
    # centres (much cheaper).
    cfg.MODEL.BLOCKS.CLASS_MEMORY.UPDATE_RES = one_of(*RESOLUTIONS)
    # Weight of the new value: MOMENTUM * ((1 - FLOOR) (1 - t / MAX_ITER)^POWER + FLOOR); POWER 0 is constant.
    cfg.MODEL.BLOCKS.CLASS_MEMORY.MOMENTUM = 0.9
    cfg.MODEL.BLOCKS.CLASS_MEMORY.MOMENTUM_POWER = 0.9
    cfg.MODEL.BLOCKS.CLASS_MEMORY.MOMENTUM_FLOOR = 0.01
    # Where the block's first classifier is the prior: its "hard" labels (paper) or "soft" probabilities.
    cfg.MODEL.BLOCKS.CLASS_MEMORY.LOOKUP = one_of(*LOOKUPS)
    # Weight of the first classifier's loss.
    cfg.MODEL.BLOCKS.CLASS_MEMORY.STAGE1_WEIGHT = 0.4
    # Weight of the loss that has the decoder's last classifier tell the class of every row (MCIBI: 1.0; needs a decoder
    # as wide as the rows), from this share of SOLVER.MAX_ITER on.
    cfg.MODEL.BLOCKS.CLASS_MEMORY.MEMORY_LOSS = 0.0
    cfg.MODEL.BLOCKS.CLASS_MEMORY.MEMORY_LOSS_START = 0.0

    # Multi-stage inference: after the normal pass (stage 0), this many passes that read the masks of the one before.
    cfg.TEST.STAGES = CfgNode()
    cfg.TEST.STAGES.COUNT = within(0, least=0)
    # Stage k reads stage k-1's mask of the "same_frame" or of the "previous_frame".
    cfg.TEST.STAGES.FRAME = one_of(*FRAMES)
    # Folder of stored masks (TEST.SAVE_PREDICTIONS of another run) that stand for stage 0; "" runs it.
    cfg.TEST.STAGES.MASKS = ""

    # META_ARCHITECTURE DistilledSegmentor: the model of this config learns from a frozen teacher.
    cfg.MODEL.DISTILLATION = CfgNode()
    # The same config with this META_ARCHITECTURE is the student.
    cfg.MODEL.DISTILLATION.STUDENT_ARCHITECTURE = "ClipSegmentor"
    # Config file of the teacher, KEY VALUE pairs on top of it, and its weights (needed for training only).
    cfg.MODEL.DISTILLATION.TEACHER_CONFIG = ""
    cfg.MODEL.DISTILLATION.TEACHER_OPTIONS = []
    cfg.MODEL.DISTILLATION.TEACHER_WEIGHTS = ""
    # Weight and temperature of the pixel-wise term: cross-entropy against the teacher's probabilities.
    cfg.MODEL.DISTILLATION.PIXEL_WEIGHT = 10.0
    cfg.MODEL.DISTILLATION.TEMPERATURE = 1.0
    # Weight of the pairwise term (differences of cosine affinities between regions); 0 leaves it out.
    cfg.MODEL.DISTILLATION.PAIR_WEIGHT = 0.5
    # Regions are max-pooled windows of this share of the map per side.
    cfg.MODEL.DISTILLATION.PAIR_SCALE = 0.5
    # Backbone level that the pairwise term compares, or "main": what the classifiers read.
    cfg.MODEL.DISTILLATION.PAIR_LEVEL = "res5"
