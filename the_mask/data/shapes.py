"""The shapes of moving_shapes: motion, outline and texture.

Local coordinates (u, v) are in units of the shape's radius, so that every outline lies within the unit circle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Pairs of look-alikes: (0, 1), (2, 3), ... The order is the same as in the class list, after the background classes.
SHAPES = ("disk", "ring", "square", "striped_square", "triangle", "star", "slider", "spinner")
# Base colour (RGB) of each pair.
FAMILY_COLORS = np.array([[205.0, 88, 58], [70, 96, 200], [64, 158, 84], [176, 84, 170]])
# What a red-green-blind camera sees no difference in: RGB of equal luma and blue-yellow difference (BT.601).
RED_GREEN = np.array([1.402, -0.714136, 0.0])
# Base colour of each shape in version 3: of a pair one is warm, one is cold, and without RED_GREEN they are equal.
_FAMILIES_WITHOUT_RED_GREEN = np.array([[125.0, 139, 54], [110, 96, 181], [190, 190, 190], [100, 95, 127]])
WARM_COLD_COLORS = np.stack(
    [family + sign * 45 * RED_GREEN for family in _FAMILIES_WITHOUT_RED_GREEN for sign in (1, -1)]
)
SPINNER = SHAPES.index("spinner")


@dataclass(frozen=True)
class Shape:
    """One moving object; positions and radius in world pixels, angles in radians."""

    kind: int
    radius: float
    start: np.ndarray
    velocity: np.ndarray
    low: np.ndarray
    high: np.ndarray
    angle0: float
    spin: float
    sway: float
    color: np.ndarray
    grain: float

    def position(self, t: int) -> np.ndarray:
        """World position [2] at frame t: uniform motion, reflected at the borders of the visible world."""
        span = self.high - self.low
        travelled = (self.start + self.velocity * t - self.low) % (2 * span)
        return self.low + np.where(travelled > span, 2 * span - travelled, travelled)

    def angle(self, t: int) -> float:
        return self.angle0 + self.spin * t + self.sway * np.sin(0.35 * t + self.angle0)


def random_shape(
    rng: np.random.Generator,
    kind: int,
    low: np.ndarray,
    high: np.ndarray,
    height: int,
    color: np.ndarray | None = None,
) -> Shape:
    """A shape of the given kind in the world box ``low``..``high``; sizes and speeds scale with the frame height.

    Brightness and tint are drawn around ``color`` [3], by default that of the pair.
    """
    base = FAMILY_COLORS[kind // 2] if color is None else color
    heading = rng.uniform(0, 2 * np.pi)
    speed = height * rng.uniform(0.006, 0.026)
    is_wheel = SHAPES[kind] in ("slider", "spinner")
    return Shape(
        kind=kind,
        radius=height * rng.uniform(0.115, 0.2),
        start=rng.uniform(low, high),
        velocity=speed * np.array([np.cos(heading), 0.6 * np.sin(heading)]),
        low=low,
        high=high,
        angle0=rng.uniform(0, 2 * np.pi),
        # A three-bladed wheel looks the same after 120 degrees. At 9..16 degrees per frame the rotation stays visible
        # between neighbouring frames and between frames three apart.
        spin=rng.choice([-1, 1]) * np.deg2rad(rng.uniform(9, 16)) if kind == SPINNER else 0.0,
        sway=0.0 if is_wheel else rng.uniform(0, 0.35),
        color=base * rng.uniform(0.8, 1.2) + rng.normal(0, 12, 3),
        grain=rng.uniform(4, 9),
    )


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - 1


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(u, v) - 0.7) - 0.3


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.8


def _polygon(points: int, inner: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Signed distance to the edges of a regular star: tips on the unit circle, notches at radius ``inner``."""

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        half = np.pi / points
        theta = np.abs((np.arctan2(v, u) + half) % (2 * half) - half)  # folded: tip at 0, notch at half
        r = np.hypot(u, v)
        x, y = r * np.cos(theta), r * np.sin(theta)
        notch = inner * np.array([np.cos(half), np.sin(half)])
        edge = notch - np.array([1.0, 0.0])
        normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
        return (x - 1) * normal[0] + y * normal[1]

    return distance


_OUTLINES: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    _circle,
    _ring,
    _square,
    _square,
    _polygon(3, 0.5),
    _polygon(5, 0.45),
    _circle,
    _circle,
)


def shape_alpha(kind: int, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Coverage 0..1 of each pixel by the shape; ``radius`` in pixels sets the width of the soft edge (one pixel)."""
    return (0.5 - _OUTLINES[kind](u, v) * radius).clip(0, 1)


def shape_color(shape: Shape, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Texture, float32 [...,3] (0..255), fixed to the shape's local coordinates."""
    name = SHAPES[shape.kind]
    shade = 1.0 - 0.16 * (u * 0.5 + v) + 0.01 * shape.grain * np.sin(shape.grain * u + 2) * np.sin(shape.grain * v)
    if name == "striped_square":
        shade = shade * np.where((u * 2.4) % 1 < 0.42, 0.62, 1.08)
    elif name in ("slider", "spinner"):
        blade = (np.arctan2(v, u) / (2 * np.pi) * 3) % 1 < 0.5
        shade = shade * np.where(blade, 1.18, 0.6)
    return (shade[..., None] * shape.color).clip(0, 255).astype(np.float32)
