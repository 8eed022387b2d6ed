"""Weights of other programs' layouts."""

from __future__ import annotations

import pytest
from converter_cases import R50, noise, segmentor, timm_backbone
from torch import Tensor


@pytest.fixture(scope="session")
def swin() -> dict[str, Tensor]:
    """Weights of a Swin-T in timm's names."""
    return noise(timm_backbone("swin_tiny_patch4_window7_224").state_dict())


@pytest.fixture(scope="session")
def small_state() -> dict[str, Tensor]:
    """Weights of a narrow Mask2Former R50."""
    return noise(segmentor(*R50).state_dict())
