"""Keys of starting from the weights of another class set."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_keys(cfg: CfgNode) -> None:
    """Add them to ``cfg``, in place."""
    # Class layers of MODEL.WEIGHTS for another class set start anew. True: rows of same-named classes are copied.
    cfg.MODEL.INIT_CLASSES_BY_NAME = False
    # Data set whose classes MODEL.WEIGHTS has, for files that do not say so themselves (other programs' files).
    cfg.MODEL.WEIGHTS_CLASSES = ""
    # Weights whose classes are as many but named otherwise are refused by evaluations and resumed runs. False: only
    # the number counts, e.g. for a data set whose classes were renamed.
    cfg.MODEL.CHECK_CLASS_NAMES = True
