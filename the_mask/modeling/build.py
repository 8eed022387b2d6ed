"""A config's model, laid out in memory as the config asks."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn


def build_segmentor(cfg: CfgNode) -> nn.Module:
    """Detectron2's ``build_model``, with ``MODEL.CHANNELS_LAST`` on top.

    Values do not depend on the layout beyond rounding, and neither do checkpoints; only speed does.
    """
    model: nn.Module = build_model(cfg)
    # Convolutions pass the layout of their weights on to their outputs, so converting the weights is enough.
    return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model
