"""A batch of one clip and a batch norm behind global pooling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from the_mask.config import load_config
from the_mask.engine.batch_norm import name_single_values


def pooled() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))


def test_the_norm_and_the_batch_are_named() -> None:
    cfg = load_config(None, ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.ACCUM_STEPS", 2])
    model = pooled().train()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.zeros(1, 3, 4, 4))
    name_single_values(cfg, model)
    with pytest.raises(ValueError, match=r"batch norm 3 gets a single value per channel.*IMS_PER_BATCH 2, 1 process"):
        model(torch.zeros(1, 3, 4, 4))
    # Two clips, and a norm that only evaluates, are fine.
    model(torch.zeros(2, 3, 4, 4))
    model.eval()(torch.zeros(1, 3, 4, 4))


def test_larger_batches_are_not_watched() -> None:
    model = pooled()
    name_single_values(load_config(None, ["SOLVER.IMS_PER_BATCH", 2]), model)
    assert not any(module._forward_pre_hooks for module in model.modules())
