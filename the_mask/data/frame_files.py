"""Which files of a folder are frames or masks, and which would silently be left out."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from the_mask.data.registry import Problem, natural_key, visible


def files_by_stem(
    folder: Path, suffixes: Sequence[str], what: str, stems: Collection[str] = ()
) -> tuple[dict[str, Path], list[Problem]]:
    """Visible files of a folder by stem, in natural order, and the files that would silently be left out.

    Args:
        folder: need not exist.
        suffixes: suffixes that are read, in upper or lower case.
        what: "frame" or "mask", for the problems.
        stems: names that files of this folder are expected to have.

    Returns:
        stem -> file; and problems of kind ``repeated <what>`` (two files of one stem) and ``unread <what>``.
    """
    found: dict[str, Path] = {}
    problems, others = [], []
    for path in visible(folder):
        if path.suffix.lower() not in suffixes:
            others.append((path.stem, path))
        elif path.stem in found:
            problems.append(Problem(f"repeated {what}", str(path), f"same {what} as {found[path.stem].name}"))
        else:
            found[path.stem] = path
    problems += unread_files(others, found, [*found, *stems], suffixes, what)
    return {stem: found[stem] for stem in sorted(found, key=natural_key)}, problems


def unread_files(
    others: Iterable[tuple[str, Path]],
    found: Collection[str],
    expected: Iterable[str],
    suffixes: Sequence[str],
    what: str,
) -> list[Problem]:
    """Problems of unread files (name without suffix, path) that look like a frame or mask.

    Such a file does not share its name with a file of ``found`` (so it is not a sidecar), and has the suffix of an
    image, or a name like those ``expected`` except for its digits.
    """
    shapes = {re.sub(r"\d+", "0", name) for name in expected}
    problems = []
    for name, path in others:
        image = (mimetypes.guess_type(path.name)[0] or "").startswith("image/")
        if name not in found and (image or re.sub(r"\d+", "0", name) in shapes) and path.is_file():
            text = f"is not read: its suffix is none of {', '.join(suffixes)}; convert it, or move it elsewhere"
            problems.append(Problem(f"unread {what}", str(path), text))
    return problems
