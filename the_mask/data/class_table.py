"""Tables of classes and their colours: CSV ``class, r, g, b``, and the JSON files of data sets."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from the_mask.data.files import parse_count, parse_json, read_text

Color = tuple[int, int, int]
# Names, in lower case, that mean no class.
NO_CLASS = frozenset({"void", "ignore", "unlabelled", "unlabeled"})


def is_no_class(name: str) -> bool:
    """Whether a name means "no class", such as ``void`` and Mapillary's ``void--unlabeled``."""
    return name.rpartition("--")[2].strip().lower() in NO_CLASS


def as_color(value: Any, where: str) -> Color:
    """A colour of a JSON file.

    Raises:
        ValueError: no list of three whole numbers 0..255; it starts with ``where``.
    """
    if not isinstance(value, list) or len(value) != 3 or not all(type(v) is int and 0 <= v <= 255 for v in value):
        raise ValueError(f"{where} has the color {value!r:.80}; expected red, green, blue, each 0..255")
    return value[0], value[1], value[2]


def read_class_table(path: Path) -> list[tuple[str, Color]]:
    """Names and colours of classes, in order.

    Args:
        path: CSV ``class, r, g, b``, with or without a header; or JSON: a list of objects with ``name`` and ``color``,
            such a list under ``labels`` (Mapillary Vistas) or ``categories`` (COCO panoptic), or ``names`` and
            ``colors`` (:func:`the_mask.data.importers.import_dataset`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged; the file and the place in it are named.
    """
    return _read_json(path) if path.suffix.lower() == ".json" else _read_csv(path)


def _read_csv(path: Path) -> list[tuple[str, Color]]:
    try:
        rows = [row for row in csv.reader(read_text(path, "table of classes").splitlines()) if row]
    except csv.Error as error:
        raise ValueError(f"table of classes {path} is not CSV: {error}") from error
    result = []
    for number, row in enumerate(rows):
        cells = [cell.strip() for cell in row]
        color = [value for cell in cells[1:4] if (value := parse_count(cell, 255)) is not None]
        if len(color) < 3:
            if number == 0:  # the header
                continue
            raise ValueError(
                f"{path}, line {number + 1}: expected class, r, g, b with numbers 0..255, got {str(row)[:200]}"
            )
        result.append((cells[0], (color[0], color[1], color[2])))
    return result


def _read_json(path: Path) -> list[tuple[str, Color]]:
    content = parse_json(read_text(path, "table of classes"), f"table of classes {path}")
    entries: Any = content
    if isinstance(content, Mapping):
        names, colors = content.get("names"), content.get("colors")
        if isinstance(names, list) and isinstance(colors, list) and len(names) == len(colors):
            entries = [{"name": name, "color": color} for name, color in zip(names, colors, strict=True)]
        else:
            entries = content.get("labels", content.get("categories"))
    if not isinstance(entries, list):
        raise ValueError(f"table of classes {path}: expected a list of objects with 'name' and 'color'")
    result = []
    for number, entry in enumerate(entries):
        name, color = (entry.get("name"), entry.get("color")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(name, str) or not name:
            raise ValueError(f"table of classes {path}, entry {number}: expected an object with 'name' and 'color'")
        result.append((name, as_color(color, f"table of classes {path}, entry {number}")))
    return result
