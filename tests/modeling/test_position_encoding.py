"""Sine position encodings against a loop, transformers, and known values."""

import math

import pytest
import torch
from tolerances import assert_close
from transformers.models.mask2former.modeling_mask2former import Mask2FormerSinePositionEmbedding

from the_mask.modeling.mask.position_encoding import position_encoding, sine_2d, sine_2d_clip, sine_3d_clip, sine_axis


def loop_axis(position: int, length: int, channels: int) -> list[float]:
    """One position, counted from 1, in plain Python floats."""
    scaled = position / (length + 1e-6) * 2 * math.pi
    values = []
    for c in range(channels):
        angle = scaled / 10000 ** (2 * (c // 2) / channels)
        values.append(math.sin(angle) if c % 2 == 0 else math.cos(angle))
    return values


@pytest.mark.parametrize(("frames", "height", "width", "channels"), [(1, 1, 1, 4), (2, 3, 5, 8), (4, 2, 7, 12)])
def test_clip_encodings_equal_a_loop(frames, height, width, channels):
    plane = sine_2d_clip(frames, height, width, channels)
    volume = sine_3d_clip(frames, height, width, channels)
    assert plane.shape == volume.shape == (frames, channels, height, width)
    for t in range(frames):
        for y in range(height):
            for x in range(width):
                half = channels // 2
                expected = loop_axis(y + 1, height, half) + loop_axis(x + 1, width, half)
                assert_close(plane[t, :, y, x], torch.tensor(expected), "unit")
                z = loop_axis(t + 1, frames, channels)
                expected = [a + b for a, b in zip(expected, z, strict=True)]
                assert_close(volume[t, :, y, x], torch.tensor(expected), "unit")


def test_2d_equals_transformers():
    reference = Mask2FormerSinePositionEmbedding(num_position_features=16, normalize=True)
    expected = reference((2, 32, 5, 9), torch.device("cpu"), torch.float32, None)
    assert_close(sine_2d(5, 9, 32), expected[0], "unit")


@pytest.mark.parametrize(("frames", "angles"), [(1, [2 * math.pi]), (2, [math.pi, 2 * math.pi])])
def test_frame_axis_ends_at_two_pi(frames, angles):
    """Channel 0 is sin(angle) and channel 1 its cosine: one frame is at 2*pi, two are at pi and 2*pi."""
    encoding = sine_axis(frames, 8)
    recovered = torch.atan2(encoding[:, 0], encoding[:, 1]) % (2 * math.pi)
    distance = (recovered - torch.tensor(angles)).abs()
    assert torch.minimum(distance, 2 * math.pi - distance).max() < 1e-5


def test_one_frame_differs_from_the_image_encoding_by_a_constant():
    offset = sine_3d_clip(1, 4, 6, 16) - sine_2d_clip(1, 4, 6, 16)
    assert offset.abs().max() > 0.5
    assert_close(offset, offset[:, :, :1, :1].expand_as(offset), "unit")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="even number of channels"):
        sine_axis(4, 3)
    with pytest.raises(ValueError, match="multiple of 4"):
        sine_2d(2, 2, 6)
    with pytest.raises(ValueError, match=r"POSITION_ENCODING is 'learned'; expected one of sine2d, sine3d"):
        position_encoding("learned")
