"""Class lists: names, colours and the table from raw PNG label values to train ids.

A label table is a list indexed by the raw value stored in a mask PNG. Its entries are train ids ``0..K-1``, the
ignore label, or :data:`ILLEGAL` for a value that must not occur. Values past its end are illegal too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from numbers import Integral
from pathlib import Path

import numpy as np

Color = tuple[int, int, int]
# (values that occur in some masks, number of masks) -> what the masks seem to be; "" when nothing is wrong with them.
ExplainValues = Callable[[Collection[int], int], str]
CATEGORIES_DIR = Path(__file__).resolve().parent / "categories"
ILLEGAL = -1
# Of a 16-bit mask.
LARGEST_VALUE = 65535
# A grid of 64 levels of each channel.
FINE_COLORS = 64**3


@dataclass(frozen=True)
class ClassList:
    """K classes of a dataset.

    Attributes:
        names: K names, index = train id.
        colors: K colours (r, g, b), 0..255.
        label_table: raw PNG value -> train id, ``ignore_label`` or :data:`ILLEGAL`.
        ignore_label: the train id that stands for "no class"; 255, or 65535 when K > 255.
        explain_values: recognises masks of a related data set by their values; a module-level function, so that it can
            be sent to worker processes.
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    label_table: tuple[int, ...]
    ignore_label: int = 255
    explain_values: ExplainValues | None = None

    def __post_init__(self) -> None:
        # The class is frozen; the arguments may be lists, arrays or a mapping.
        object.__setattr__(self, "names", as_names(self.names))
        object.__setattr__(self, "colors", _as_colors(self.colors))
        object.__setattr__(self, "label_table", as_label_table(self.label_table))
        num = len(self.names)
        if not num or len(set(self.names)) != num:
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"a class list needs distinct names, got {num} names, repeated: {twice}")
        if len(self.colors) != num:
            raise ValueError(f"{num} classes need {num} colours, got {len(self.colors)}")
        if not num <= self.ignore_label <= 65535:
            raise ValueError(f"ignore_label {self.ignore_label} must lie in {num}..65535, outside the train ids")
        bad = sorted({t for t in self.label_table if t not in (ILLEGAL, self.ignore_label) and not 0 <= t < num})
        if bad:
            raise ValueError(f"label_table maps to {bad}; allowed: 0..{num - 1}, {self.ignore_label}, {ILLEGAL}")


def load_class_list(name: str, explain_values: ExplainValues | None = None) -> ClassList:
    """Read ``categories/<name>.json``; ``explain_values`` as in :class:`ClassList`.

    Raises:
        ValueError: no such file; the message lists the known names.
    """
    path = CATEGORIES_DIR / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in CATEGORIES_DIR.glob("*.json"))
        raise ValueError(f"no class list {name!r}; known: {', '.join(known)}")
    content = json.loads(path.read_text(encoding="utf-8"))
    categories = sorted(content["categories"], key=lambda c: c["train_id"])
    class_list = make_class_list(
        [c["name"] for c in categories],
        raw_values=[c["label_png"] for c in categories],
        void_values=content["void_label_png"],
        colors=[tuple(c["color"]) for c in categories],
    )
    return replace(class_list, explain_values=explain_values)


def make_class_list(
    names: Sequence[str],
    raw_values: Sequence[int] | None = None,
    void_values: Sequence[int] | None = None,
    colors: Sequence[tuple[int, int, int]] | None = None,
) -> ClassList:
    """Build a class list from names and the PNG value of each class.

    Args:
        names: K class names; their order gives the train ids.
        raw_values: PNG value of each class; ``None`` means value = train id.
        void_values: PNG values that are ignored; ``None`` means the ignore label: 255, or 65535 above 255 names.
        colors: K colours; ``None`` draws :func:`distinct_colors`.

    Raises:
        ValueError: a PNG value is used twice or lies outside 0..65535, or an argument has the wrong type.
    """
    names = as_names(names)
    num = len(names)
    ignore_label = 255 if num <= 255 else 65535
    raw_values = list(range(num)) if raw_values is None else _as_integers(raw_values, "raw_values")
    void_values = [ignore_label] if void_values is None else _as_integers(void_values, "void_values")
    if len(raw_values) != num:
        raise ValueError(f"{num} classes need {num} PNG values, got {len(raw_values)}")
    used = [*raw_values, *void_values]
    if len(set(used)) != len(used) or min(used) < 0 or max(used) > 65535:
        twice = sorted(value for value, count in Counter(used).items() if count > 1)
        raise ValueError(
            f"PNG values must be distinct and lie in 0..65535, got {num} classes with {str(raw_values)[:200]}, void "
            f"{str(void_values)[:200]}{f', used twice: {twice[:5]}' if twice else ''}"
        )
    table = [ILLEGAL] * (max(used) + 1)
    for train_id, raw in enumerate(raw_values):
        table[raw] = train_id
    for raw in void_values:
        table[raw] = ignore_label
    return ClassList(
        names=names,
        colors=tuple(distinct_colors(num) if colors is None else colors),
        label_table=tuple(table),
        ignore_label=ignore_label,
    )


def as_names(names: Sequence[str]) -> tuple[str, ...]:
    """Class names as a tuple.

    Raises:
        ValueError: not a list of names. A single string would be one class per letter; a mapping or set has no order.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name.strip() for name in names):
        hint = "; its values, in order, are list(classes.values())" if isinstance(names, Mapping) else ""
        raise ValueError(f'classes {names!r}: expected a list of names, such as ["road", "car"]{hint}')
    return tuple(names)


def as_label_table(table: Sequence[int] | Mapping[int, int], what: str = "label_table") -> tuple[int, ...]:
    """A label table as a tuple: index = value stored in a mask, entry = train id, ignore label or :data:`ILLEGAL`.

    Args:
        table: such a list (or array of one axis), or a mapping from value to train id; other values are then illegal.
        what: name for errors.

    Raises:
        ValueError: another type, or entries that are not whole numbers.
    """
    if not isinstance(table, Mapping):
        entries = _as_integers(table, f"{what} (a list: index = value in the mask, entry = train id; or a mapping)")
    else:
        values = _as_integers(list(table), f"values of the mapping {what}")
        ids = _as_integers(list(table.values()), f"train ids of the mapping {what}")
        if values and not 0 <= min(values) <= max(values) <= LARGEST_VALUE:
            raise ValueError(f"{what}: values in masks lie in 0..{LARGEST_VALUE}, got {min(values)}..{max(values)}")
        entries = [ILLEGAL] * (max(values, default=-1) + 1)
        for value, train_id in zip(values, ids, strict=True):
            entries[value] = train_id
    if len(entries) > LARGEST_VALUE + 1:
        raise ValueError(f"{what} has {len(entries)} entries; values in masks lie in 0..{LARGEST_VALUE}")
    return tuple(entries)


def _as_integers(values: Sequence[int], what: str) -> list[int]:
    """A list of whole numbers; floats, booleans, strings and sets are refused."""
    is_list = isinstance(values, list | tuple | range) or (isinstance(values, np.ndarray) and values.ndim == 1)
    if not is_list or not all(isinstance(value, Integral) and not isinstance(value, bool) for value in values):
        raise ValueError(f"{what}: expected whole numbers in a list, got {values!r}")
    return [int(value) for value in values]


def _as_colors(colors: Sequence[Sequence[int]]) -> tuple[tuple[int, int, int], ...]:
    result = []
    for color in colors:
        red, green, blue, *more = [*_as_integers(color, "colour"), -1, -1, -1][: max(len(color), 3)]
        if more or min(red, green, blue) < 0 or max(red, green, blue) > 255:
            raise ValueError(f"colour {color!r}: expected (red, green, blue), each 0..255")
        result.append((red, green, blue))
    return tuple(result)


@lru_cache(maxsize=16)
def distinct_colors(num: int) -> tuple[Color, ...]:
    """``num`` clearly different colours, the same on every call. A shorter list is the start of a longer one.

    Greedy farthest-point choice in CIE L*a*b* (D65) over a grid of RGB values, away from black and white, which
    overlays and void regions use. After 1,726 the grid is empty; the rest are those of a finer one, different but not
    clearly so.

    Raises:
        ValueError: more than 262,144.
    """
    if num > FINE_COLORS:
        raise ValueError(f"at most {FINE_COLORS} distinct colours, asked for {num}")
    levels = np.linspace(0, 255, 12)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = _rgb_to_lab(rgb)
    anchors = _rgb_to_lab(np.array([[0.0, 0, 0], [255, 255, 255]]))
    distance = ((lab[:, None] - anchors) ** 2).sum(-1).min(1)
    chosen: list[Color] = []
    for _ in range(min(num, len(rgb) - len(anchors))):
        best = int(distance.argmax())
        red, green, blue = (round(v) for v in rgb[best])
        chosen.append((red, green, blue))
        distance = np.minimum(distance, ((lab - lab[best]) ** 2).sum(-1))
    return (*chosen, *islice(_fine_colors(set(chosen)), num - len(chosen)))


def _fine_colors(taken: Container[Color]) -> Iterator[Color]:
    """Colours of a grid of 64 levels that are not ``taken``."""
    for number in range(FINE_COLORS):
        # An odd step, near the golden ratio of the range: each colour is met once, and neighbours differ much.
        index = number * 162_019 % FINE_COLORS
        color = (4 * (index & 63) + 1, 4 * (index >> 6 & 63) + 1, 4 * (index >> 12) + 1)
        if color not in taken:
            yield color


def _rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB 0..255 [..., 3] to CIE L*a*b* (D65)."""
    value = rgb / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)
