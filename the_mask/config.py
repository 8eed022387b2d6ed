"""Every configuration key of the_mask on top of Detectron2's, its default, and one line of meaning."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg


def add_the_mask_config(cfg: CfgNode) -> None:
    """Add the keys of the_mask to a Detectron2 config, in place."""
    _add_input(cfg)
    _add_mask_former(cfg)
    _add_the_mask(cfg)
    _add_backbones(cfg)
    _add_solver(cfg)
    _add_test(cfg)


def _add_input(cfg: CfgNode) -> None:
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    # "auto" is resolved to "cuda" or "cpu" by load_config.
    cfg.MODEL.DEVICE = "auto"

    cfg.INPUT.CLIP = CfgNode()
    # Offsets of the other frames of a training clip from its reference frame; the reference is appended unless
    # 0 is in the list. [0] is a clip of one frame, [-3] is (r-3, r).
    cfg.INPUT.CLIP.DILATIONS = [0]
    # Probability that a training clip is read backwards in time.
    cfg.INPUT.CLIP.REVERSE_PROB = 0.5
    # What an offset outside the video becomes: "clamp" (nearest frame), "repeat_current" (the reference frame),
    # or "drop" (only references whose whole clip exists are sampled; a video too short for it is an error).
    cfg.INPUT.CLIP.BOUNDARY = "clamp"
    # What one item of an epoch is: a "video" (a random clip of it) or a labelled "frame".
    cfg.INPUT.CLIP.ITEM = "video"

    cfg.INPUT.RESIZE = CfgNode()
    # Training frames are scaled, ratio kept, to fit this box (long edge, short edge; pixels) times u~U[MIN, MAX].
    cfg.INPUT.RESIZE.LONG_EDGE = 853
    cfg.INPUT.RESIZE.SHORT_EDGE = 480
    cfg.INPUT.RESIZE.MIN_SCALE = 0.5
    cfg.INPUT.RESIZE.MAX_SCALE = 2.0

    cfg.INPUT.CROP.ENABLED = True
    # Crops are always absolute pixels, (height, width); smaller frames are padded at the bottom and right.
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = [480, 480]
    # A crop is redrawn (at most 10 times) while one class covers more than this share of its labelled pixels.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.75
    # Photometric distortion of training frames: "per_frame", "shared" by the clip, or "none".
    cfg.INPUT.COLOR_JITTER = "per_frame"

    cfg.INPUT.TEST = CfgNode()
    # Test frames are scaled, ratio kept, to fit this box (pixels); 0 keeps the native size.
    cfg.INPUT.TEST.LONG_EDGE = 853
    cfg.INPUT.TEST.SHORT_EDGE = 480
    # Both sides are then stretched up to a multiple of this.
    cfg.INPUT.TEST.SIZE_MULTIPLE = 32


def _add_mask_former(cfg: CfgNode) -> None:
    # Names and values are those of the Detectron2 Mask2Former for semantic segmentation.
    cfg.MODEL.META_ARCHITECTURE = "MaskClassifier"
    cfg.MODEL.MASK_FORMER = CfgNode()
    cfg.MODEL.MASK_FORMER.DEEP_SUPERVISION = True
    cfg.MODEL.MASK_FORMER.NO_OBJECT_WEIGHT = 0.1
    cfg.MODEL.MASK_FORMER.CLASS_WEIGHT = 2.0
    cfg.MODEL.MASK_FORMER.MASK_WEIGHT = 5.0
    cfg.MODEL.MASK_FORMER.DICE_WEIGHT = 5.0
    cfg.MODEL.MASK_FORMER.NHEADS = 8
    cfg.MODEL.MASK_FORMER.DROPOUT = 0.0
    cfg.MODEL.MASK_FORMER.DIM_FEEDFORWARD = 2048
    # One more than the number of decoder layers: the initial queries are supervised too.
    cfg.MODEL.MASK_FORMER.DEC_LAYERS = 10
    cfg.MODEL.MASK_FORMER.PRE_NORM = False
    cfg.MODEL.MASK_FORMER.HIDDEN_DIM = 256
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 100
    cfg.MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ = False
    # Inputs are padded at the bottom and right to a multiple of this when the mapper has not done so.
    cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY = 32
    # "MaskedAttentionDecoder" or "TemporalAggregationDecoder".
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = "MaskedAttentionDecoder"
    cfg.MODEL.MASK_FORMER.TRAIN_NUM_POINTS = 12544
    cfg.MODEL.MASK_FORMER.OVERSAMPLE_RATIO = 3.0
    cfg.MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO = 0.75
    # Leave IGNORE_VALUE pixels out of mask costs and mask losses. False reproduces the released code, where they
    # count as background of every mask.
    cfg.MODEL.MASK_FORMER.VALID_MASK = True
    # Position encoding of the mask decoder's keys: "sine2d" (image Mask2Former) or "sine3d" (THE-Mask).
    cfg.MODEL.MASK_FORMER.POSITION_ENCODING = "sine2d"

    cfg.MODEL.SEM_SEG_HEAD.NAME = "MaskClassificationHead"
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 255
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 256
    cfg.MODEL.SEM_SEG_HEAD.MASK_DIM = 256
    cfg.MODEL.SEM_SEG_HEAD.NORM = "GN"
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "MSDeformAttnPixelDecoder"
    cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 6
    cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_NHEADS = 8
    cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD = 1024
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4

    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    # Training from scratch is the default; configs that start from ImageNet freeze the stem themselves.
    cfg.MODEL.BACKBONE.FREEZE_AT = 0


def _add_the_mask(cfg: CfgNode) -> None:
    cfg.MODEL.THE_MASK = CfgNode()
    # Rounds of Hungarian matching: 1 is Mask2Former, 2 is THE-Mask.
    cfg.MODEL.THE_MASK.ROUNDS = 1
    # Cost of the rounds after the first: "full" or "bce" (the released one-frame matcher).
    cfg.MODEL.THE_MASK.SECOND_ROUND_COST = "full"
    # L_s = CLASS*CE + PRIMARY_WEIGHT*(MASK*BCE + DICE*Dice)
    #     + SECONDARY_WEIGHT*(SECONDARY_MASK*BCE + SECONDARY_DICE*Dice)
    cfg.MODEL.THE_MASK.PRIMARY_WEIGHT = 1.0
    cfg.MODEL.THE_MASK.SECONDARY_WEIGHT = 0.5
    cfg.MODEL.THE_MASK.SECONDARY_MASK_WEIGHT = 0.5
    cfg.MODEL.THE_MASK.SECONDARY_DICE_WEIGHT = 0.5
    # Points per secondary mask; 0 takes every pixel of the ground truth, as released (exact, and no more memory).
    cfg.MODEL.THE_MASK.SECONDARY_NUM_POINTS = 0
    # Weight of the frame branch beside the clip branch (temporal decoder only).
    cfg.MODEL.THE_MASK.FRAME_WEIGHT = 0.25
    # Iterations of plain one-round training before the hierarchical loss, and what drives them: "iteration", or
    # "reference", the released code, which never leaves the warm-up when WARMUP_ITERS > 0.
    cfg.MODEL.THE_MASK.WARMUP_ITERS = 0
    cfg.MODEL.THE_MASK.WARMUP_MODE = "iteration"
    # Final map = CLIP_SCORE_WEIGHT * clip branch + (1 - CLIP_SCORE_WEIGHT) * frame branch.
    cfg.MODEL.THE_MASK.CLIP_SCORE_WEIGHT = 0.5
    # Dropout of the temporal layer.
    cfg.MODEL.THE_MASK.TEMPORAL_DROPOUT = 0.1
    # Stage 2: start from a one-frame checkpoint in MODEL.WEIGHTS (heads and norm are copied to both branches).
    cfg.MODEL.THE_MASK.INIT_FROM_STAGE1 = False
    # Substrings of the parameter names that stay trainable; [] trains everything. Stage 2 uses ["predictor"].
    cfg.MODEL.THE_MASK.TRAINABLE = []
    # Keep modules without a trainable parameter in eval mode while training.
    cfg.MODEL.THE_MASK.FROZEN_EVAL = True


def _add_backbones(cfg: CfgNode) -> None:
    # build_mit_backbone: SegFormer's encoder, "B0" ... "B5".
    cfg.MODEL.MIT = CfgNode()
    cfg.MODEL.MIT.VARIANT = "B0"
    # Stochastic depth of the last block; it rises linearly from 0.
    cfg.MODEL.MIT.DROP_PATH = 0.1
    # Recompute activations of each block in the backward pass to save memory.
    cfg.MODEL.MIT.CHECKPOINT = False

    # build_internimage_backbone: "T", "S", "B", "L", "XL", "H" or "G".
    cfg.MODEL.INTERNIMAGE = CfgNode()
    cfg.MODEL.INTERNIMAGE.VARIANT = "T"
    # Stochastic depth of the last block; None takes the variant's published segmentation value.
    cfg.MODEL.INTERNIMAGE.DROP_PATH = None
    # Initial value of the layer scales of the variants that have them (1.0 for segmentation, 1e-5 for ImageNet).
    cfg.MODEL.INTERNIMAGE.LAYER_SCALE = 1.0
    cfg.MODEL.INTERNIMAGE.CHECKPOINT = False
    # Smaller relatives of a variant, for tests: width of the first level (0: the variant's) and blocks per level.
    cfg.MODEL.INTERNIMAGE.CHANNELS = 0
    cfg.MODEL.INTERNIMAGE.DEPTHS = []

    # build_timm_backbone: any hierarchical model of timm that has strides 4, 8, 16 and 32.
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.NAME = "swin_tiny_patch4_window7_224"
    # Download timm's weights (needs the network). WEIGHTS, a local file in any layout timm reads, wins over it.
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.TIMM.WEIGHTS = ""
    # Feature levels (timm's numbering) that become res2..res5; [] finds strides 4, 8, 16, 32.
    cfg.MODEL.TIMM.OUT_INDICES = []
    cfg.MODEL.TIMM.DROP_PATH = 0.0
    # "LN" adds a LayerNorm to every output, as Mask2Former and UperNet do on Swin and ConvNeXt; "" does not.
    cfg.MODEL.TIMM.OUT_NORM = ""
    # Batch norms of the model: "" leaves them, "FrozenBN" freezes, "SyncBN" synchronises them.
    cfg.MODEL.TIMM.NORM = ""
    cfg.MODEL.TIMM.CHECKPOINT = False

    # build_beit_backbone: a timm BEiT with a four-level pyramid made from the outputs of OUT_INDICES' blocks.
    cfg.MODEL.BEIT = CfgNode()
    cfg.MODEL.BEIT.NAME = "beit_large_patch16_224"
    # Side (pixels) of the square that the position tables are for; windows of this size are exact.
    cfg.MODEL.BEIT.IMG_SIZE = 512
    # As MODEL.TIMM's; position tables of another size are resized.
    cfg.MODEL.BEIT.PRETRAINED = False
    cfg.MODEL.BEIT.WEIGHTS = ""
    cfg.MODEL.BEIT.OUT_INDICES = [7, 11, 15, 23]
    cfg.MODEL.BEIT.DROP_PATH = 0.2
    # Norm of the pyramid.
    cfg.MODEL.BEIT.NORM = "SyncBN"
    cfg.MODEL.BEIT.CHECKPOINT = False


def _add_solver(cfg: CfgNode) -> None:
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.BASE_LR = 1e-4
    cfg.SOLVER.WEIGHT_DECAY = 0.05
    # Weight decay of norms, and of embeddings and position tables.
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    # The only schedule: warm-up, then (1 - iter/MAX_ITER)^POLY_LR_POWER down to POLY_LR_END * BASE_LR.
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupPolyLR"
    cfg.SOLVER.POLY_LR_POWER = 0.9
    cfg.SOLVER.POLY_LR_END = 0.0
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    # "full_model": one L2 norm over all parameters.
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.01
    # Mixed precision on any device: "bf16" or "fp16".
    cfg.SOLVER.AMP.PRECISION = "bf16"
    # Batches whose gradients are added up before one optimiser step; IMS_PER_BATCH counts all of them.
    cfg.SOLVER.ACCUM_STEPS = 1
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.9998
    # Periodic checkpoints kept (0: all); the best and the last are always kept.
    cfg.SOLVER.CHECKPOINT_KEEP = 2
    # Metric that chooses model_best.pth; "" keeps no best checkpoint.
    cfg.SOLVER.CHECKPOINT_BEST = "mIoU"
    # torch.use_deterministic_algorithms.
    cfg.SOLVER.DETERMINISTIC = False
    # Iterations between log lines.
    cfg.SOLVER.LOG_PERIOD = 20


def _add_test(cfg: CfgNode) -> None:
    # Clips of this many frames, CLIP_STRIDE apart, tile every test video; each frame is predicted once.
    cfg.TEST.CLIP_LENGTH = 1
    cfg.TEST.CLIP_STRIDE = 1
    # Clips per forward pass.
    cfg.TEST.CLIPS_PER_BATCH = 1
    # Feed videos frame by frame through StreamingSegmentor instead of tiled clips.
    cfg.TEST.STREAMING = False
    # Window lengths of video consistency.
    cfg.TEST.VC_WINDOWS = [8, 16]
    # Weights of torchvision's RAFT for temporal consistency (TC); "" leaves TC out.
    cfg.TEST.TC_FLOW_WEIGHTS = ""
    # TC over the first this many videos (the official VSPW script: 100); 0 takes all.
    cfg.TEST.TC_MAX_VIDEOS = 0
    # Folder for predictions as VSPW-style PNGs; "" saves none.
    cfg.TEST.SAVE_PREDICTIONS = ""


def load_config(
    config_file: str | Path | None = None, overrides: Sequence[str] = (), allow_unsafe: bool = False
) -> CfgNode:
    """Read a YAML config on top of all defaults, apply ``KEY VALUE`` overrides, resolve ``MODEL.DEVICE: auto``.

    Args:
        config_file: YAML file; its ``_BASE_`` is read first. ``None`` gives the defaults.
        overrides: flat list ``[KEY, VALUE, ...]``.
        allow_unsafe: let YAML construct arbitrary Python objects. Off: such a file is an error.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: unknown key, value of another type, odd number of overrides, invalid or unsafe YAML, or a file of
            another config version.
    """
    cfg = get_cfg()
    add_the_mask_config(cfg)
    if config_file is not None:
        _merge_file(cfg, Path(config_file), allow_unsafe)
    _merge_overrides(cfg, list(overrides))
    if cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    return cfg


def _merge_file(cfg: CfgNode, path: Path, allow_unsafe: bool) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    try:
        cfg.merge_from_file(str(path), allow_unsafe=allow_unsafe)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{path}: YAML that builds Python objects is refused (see --allow-unsafe-yaml): {error}"
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    except AssertionError as error:
        # Detectron2 compares VERSION with its own by an assertion.
        raise ValueError(f"{path}: its config version does not fit this program's, {cfg.VERSION}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path}: {_explain_key(cfg, error)}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: _BASE_ leads back to a file that is being read") from error
    except ValueError as error:
        raise ValueError(f"{path}: {_without_node(error)}") from error
    except (AttributeError, TypeError) as error:
        # yacs takes for granted that it got a dict.
        raise ValueError(f"{path}: a config is a mapping of config keys to values ({error})") from error


def _merge_overrides(cfg: CfgNode, overrides: list[str]) -> None:
    if len(overrides) % 2:
        raise ValueError(f"overrides come as KEY VALUE pairs, got an odd number of words: {overrides}")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, AssertionError) as error:
            raise ValueError(f"override {key} {value}: {_explain_key(cfg, error, key)}") from error
        except ValueError as error:
            raise ValueError(f"override {key} {value}: {_without_node(error)}") from error


def _without_node(error: ValueError) -> str:
    """Cut the whole config out of yacs' message about a value where a group of keys belongs."""
    text = str(error)
    return re.sub(r" with values \(.*\) for", " for", text, flags=re.DOTALL) if "\n" in text else text


def _explain_key(cfg: CfgNode, error: Exception, key: str | None = None) -> str:
    """Say which config key is unknown and which known ones look like it."""
    key = key or str(error).strip("'\"").removeprefix("Non-existent config key: ")
    close = difflib.get_close_matches(key, list(_flat_keys(cfg)), n=3)
    return f"unknown config key {key}" + (f"; did you mean {', '.join(close)}?" if close else "")


def _flat_keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _flat_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
