"""Sine position encodings: parameter-free, exact for any size and number of frames.

Axes: C channels, T frames, h w feature size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

TEMPERATURE = 10000.0
EPSILON = 1e-6


def sine_axis(length: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Encode the positions of one axis.

    Position i (counted from 1) is scaled to 2*pi*i/(length + 1e-6), so that the axis spans (0, 2*pi] whatever its
    length; channel pairs (2j, 2j+1) hold sine and cosine at wavelength 10000^(2j/channels).

    Returns:
        [length, channels] float32. Source: released Mask2Former, ``PositionEmbeddingSine`` with ``normalize=True``.
    """
    if channels % 2:
        raise ValueError(f"sine position encoding needs an even number of channels per axis, got {channels}")
    # float32 throughout, as released: float64 would differ from official checkpoints' encodings in the last bits.
    position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
    position = position / (length + EPSILON) * (2 * math.pi)
    wavelength = TEMPERATURE ** (torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels)
    angle = position[:, None] / wavelength
    return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)


def sine_2d(height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Encode a feature map: the first C/2 channels encode y, the others x.

    Returns:
        [C, h, w] float32.
    """
    if channels % 4:
        raise ValueError(f"2-D sine position encoding needs a multiple of 4 channels, got {channels}")
    y = sine_axis(height, channels // 2, device).t()[:, :, None].expand(-1, -1, width)
    x = sine_axis(width, channels // 2, device).t()[:, None, :].expand(-1, height, -1)
    return torch.cat((y, x))


def sine_2d_clip(frames: int, height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Give every frame of a clip the same 2-D encoding: [T, C, h, w] float32."""
    return sine_2d(height, width, channels, device).expand(frames, -1, -1, -1)


def sine_3d_clip(frames: int, height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Encode a clip: the 2-D encoding of (y, x) plus an encoding of the frame's position over all C channels.

    A clip of one frame gets the constant offset of the angle 2*pi. Softmax attention ignores an offset that all keys
    share, so the frame axis matters only where frames are one key axis (``MaskedAttentionDecoder``, T > 1).

    Returns:
        [T, C, h, w] float32. Source: THE-Mask released code (spec section 3).
    """
    z = sine_axis(frames, channels, device)[:, :, None, None]
    return sine_2d(height, width, channels, device) + z


POSITION_ENCODINGS: dict[str, Callable[..., Tensor]] = {"sine2d": sine_2d_clip, "sine3d": sine_3d_clip}


def position_encoding(name: str) -> Callable[..., Tensor]:
    """Look up ``(frames, height, width, channels, device) -> [T, C, h, w]`` by its name in the config."""
    if name not in POSITION_ENCODINGS:
        choices = ", ".join(POSITION_ENCODINGS)
        raise ValueError(f"MODEL.MASK_FORMER.POSITION_ENCODING is {name!r}; expected one of {choices}")
    return POSITION_ENCODINGS[name]
