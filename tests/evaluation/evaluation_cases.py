"""What tests of evaluation and prediction share: a tiny model of three classes, on a data set of the caller's."""

from pathlib import Path

import the_mask.modeling  # noqa: F401  fills the registries
from the_mask.config import load_config

CONFIG = Path(__file__).parents[2] / "configs" / "debug" / "the_mask_debug_1f.yaml"


def small_config(dataset, *changes):
    options = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "DATASETS.TEST", (dataset,), "DATALOADER.NUM_WORKERS", 0]
    options += ["INPUT.TEST.LONG_EDGE", 96, "INPUT.TEST.SHORT_EDGE", 64, "MODEL.DEVICE", "cpu"]
    return load_config(CONFIG, [*options, *changes])
