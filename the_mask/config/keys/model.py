"""Keys of all models: what is built, where it runs, and which classes its weights have."""

from __future__ import annotations

from the_mask.config.options import Options, one_of

MODES = ("none", "fsdp2")


class ModelOptions(Options, group="MODEL"):
    """What is built, and where it runs."""

    # "MaskClassifier", "EncoderSegmentor", "ClipSegmentor", "DistilledSegmentor" or "PropagatedSegmentor".
    meta_architecture: str = "MaskClassifier"
    # "auto" is resolved to "cuda" or "cpu" by load_config.
    device: str = "auto"
    # Statistics of the pixels, RGB.
    pixel_mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, ...] = (58.395, 57.12, 57.375)
    # Weights and feature maps with channels last in memory: changes results by rounding only. Faster with SOLVER.AMP on
    # a CPU with AMX.
    channels_last: bool = False
    # "none": every process has the whole model (DistributedDataParallel). "fsdp2": parameters, gradients and optimiser
    # state are divided among the processes, and so are checkpoints.
    parallel: str = one_of(*MODES)
    # Class layers of MODEL.WEIGHTS for other classes are not loaded. True: rows of classes of the same name are copied.
    init_classes_by_name: bool = False
    # Data set whose classes MODEL.WEIGHTS has, for files that do not say so themselves (other programs' files).
    weights_classes: str = ""
    # Weights whose classes are as many but named otherwise are refused by evaluations and resumed runs. False: only
    # the number counts, e.g. for a data set whose classes were renamed. Training sets always need the same names.
    check_class_names: bool = True


class FrozenFeatureOptions(Options, group="MODEL.FROZEN_FEATURES"):
    """Features of a frozen backbone, of any model, kept between the epochs of a training."""

    # Their folder; "" computes them every time.
    cache: str = ""
    # Most that the folder of one backbone may take, GiB.
    max_gb: float = 20.0
