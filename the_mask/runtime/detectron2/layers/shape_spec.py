"""What a module needs to know about its input before it sees any."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ShapeSpec:
    """Channels, size and stride (input pixels per feature pixel) of a feature map; ``None`` is unknown."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None
