"""Tables of classes and their colours: ``class, r, g, b`` as CSV."""

from __future__ import annotations

import csv
from pathlib import Path

from the_mask.data.files import read_text

Color = tuple[int, int, int]
# Names, in lower case, that mean no class.
NO_CLASS = frozenset({"void", "ignore", "unlabelled", "unlabeled"})


def read_class_table(path: Path) -> list[tuple[str, Color]]:
    """Rows of a CSV file ``class, r, g, b``, with or without a head.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged line; it is named.
    """
    colors: list[tuple[str, Color]] = []
    try:
        rows = [row for row in csv.reader(read_text(path, "table of classes").splitlines()) if row]
    except csv.Error as error:
        raise ValueError(f"table of classes {path} is not CSV: {error}") from error
    for number, row in enumerate(rows):
        cells = [cell.strip() for cell in row]
        if len(cells) < 4 or not all(cell.isdecimal() and int(cell) < 256 for cell in cells[1:4]):
            if number == 0:  # the head
                continue
            raise ValueError(f"{path}, line {number + 1}: expected class, r, g, b with numbers 0..255, got {row}")
        colors.append((cells[0], (int(cells[1]), int(cells[2]), int(cells[3]))))
    return colors
