"""Frames become a normalised batch: against the plain formulation, bit by bit."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from the_mask.config import load_config
from the_mask.data.clips import Clip
from the_mask.inference.stream import build_random

CONFIG = Path(__file__).parents[2] / "configs" / "debug" / "gsvnet_debug.yaml"


@pytest.mark.parametrize("sizes", [[(64, 96)], [(50, 70), (64, 33)]])
@pytest.mark.parametrize("frames", [1, 3])
def test_stack_is_normalised_and_padded(sizes, frames):
    model = build_random(load_config(CONFIG)).segmentor
    torch.manual_seed(0)
    clips = [Clip([torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in range(frames)]) for size in sizes]
    batch, length = model.stack(clips)
    height, width = batch.shape[2:]
    assert length == frames
    assert height % model.size_divisibility == width % model.size_divisibility == 0
    assert all(height >= h and width >= w for h, w in sizes)
    expected = []
    for clip in clips:
        for frame in clip.frames:
            plain = (frame.float() - model.pixel_mean) / model.pixel_std
            expected.append(F.pad(plain, (0, width - plain.shape[-1], 0, height - plain.shape[-2])))
    assert torch.equal(batch, torch.stack(expected))
    assert batch.is_contiguous()
