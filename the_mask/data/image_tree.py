"""Data sets of single images, and of snippets around single labelled frames: their layout on disk.

An image and its mask have the same path below their folders once the two suffixes are cut off:
``images/a/7.jpg`` and ``masks/a/7.png``, or ``a/x_leftImg8bit.png`` and ``a/x_gtFine_labelTrainIds.png``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from the_mask.data.classes import ClassList
from the_mask.data.frame_files import unread_files
from the_mask.data.registry import (
    IMAGE_SUFFIXES,
    MASK_SUFFIX,
    DataTree,
    Problem,
    TreeScan,
    natural_key,
    register_tree,
)
from the_mask.data.video_tree import as_class_list


def files_by_key(
    folder: Path, suffixes: Sequence[str], others: list[tuple[str, Path]] | None = None
) -> tuple[dict[str, Path], list[tuple[Path, Path]]]:
    """Files below a folder with one of ``suffixes``, in any case. Links are followed, hidden entries left out.

    Args:
        folder: searched with its sub-folders.
        suffixes: ends of names.
        others: receives the files with other suffixes, with the keys they would have.

    Returns:
        Files by key (path below the folder, with ``/``, without the suffix), in natural order; and pairs of files with
        the same key.
    """
    found: dict[str, Path] = {}
    twice = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = Path(parent).relative_to(folder).as_posix()
        for name in sorted(names):
            suffix = next((s for s in suffixes if name.lower().endswith(s.lower())), None)
            if name.startswith("."):
                continue
            key = Path(name).stem if suffix is None else name[: len(name) - len(suffix)]
            key = key if prefix == "." else f"{prefix}/{key}"
            path = Path(parent, name)
            if suffix is None:
                if others is not None:
                    others.append((key, path))
            elif key in found:
                twice.append((found[key], path))
            else:
                found[key] = path
    return {key: found[key] for key in sorted(found, key=natural_key)}, twice


@dataclass(frozen=True)
class ImageTree(DataTree):
    """Images and masks in two parallel folders. Every image is a video of one frame, whose id is its path.

    Attributes:
        image_dir: folder of the images, searched with its sub-folders.
        label_dir: folder of the masks; None for a split without any.
        image_suffix: end of the image files' names; "" takes every usual image type.
        label_suffix: end of the masks' names.
        other_suffixes: suffixes of files in ``label_dir`` that are not masks.
    """

    image_dir: Path = field(kw_only=True)
    label_dir: Path | None = field(kw_only=True, default=None)
    image_suffix: str = field(kw_only=True, default="")
    label_suffix: str = field(kw_only=True, default=MASK_SUFFIX)
    other_suffixes: tuple[str, ...] = field(kw_only=True, default=())

    def scan(self) -> TreeScan:
        """Raises FileNotFoundError when a folder is missing, or masks are required and there is none."""
        scan = TreeScan()
        images = self._files(self.image_dir, self.image_suffix, scan)
        masks = self._masks(scan, images)
        if not images:
            wanted = f"*{self.image_suffix}" if self.image_suffix else "image"
            scan.problems.append(Problem("empty split", str(self.image_dir), f"holds no {wanted}"))
        for key, path in images.items():
            mask = masks.pop(key, None)
            if mask is None and self.require_labels:
                text = f"no mask {self.label_dir}/{key}{self.label_suffix}"
                scan.problems.append(Problem("missing mask", str(path), text))
            stem = key.rpartition("/")[2]
            frame = {"frame_id": stem, "file_name": str(path), "sem_seg_file_name": str(mask) if mask else None}
            scan.records.append({"dataset": self.name, "video_id": key, "frames": [frame]})
        for path in masks.values():
            scan.problems.append(Problem("mask without image", str(path), f"belongs to no image in {self.image_dir}"))
        return scan

    def _files(
        self, folder: Path, suffix: str, scan: TreeScan, what: str = "frame", expected: Collection[str] = ()
    ) -> dict[str, Path]:
        if not folder.is_dir():
            raise self.missing(f"folder {folder} does not exist")
        suffixes = [suffix] if suffix else IMAGE_SUFFIXES
        others: list[tuple[str, Path]] = []
        files, twice = files_by_key(folder, suffixes, others)
        for first, second in twice:
            scan.problems.append(Problem(f"repeated {what}", str(second), f"same name as {first}"))
        if suffix in ("", MASK_SUFFIX) and self.image_dir != self.label_dir:
            # With a specific suffix such as _leftImg8bit.png, other files in the folder are fine.
            scan.problems += unread_files(others, files, [*files, *expected], suffixes, what)
        return files

    def _masks(self, scan: TreeScan, images: Collection[str] = ()) -> dict[str, Path]:
        if self.label_dir is None:
            return {}
        masks = self._files(self.label_dir, self.label_suffix, scan, "mask", images)
        masks = {key: path for key, path in masks.items() if not path.name.endswith(self.other_suffixes)}
        if not masks and self.require_labels:
            raise self.missing(f"{self.label_dir} holds no *{self.label_suffix}")
        return masks


@dataclass(frozen=True)
class SnippetTree(ImageTree):
    """Videos around single labelled frames: the images of ``image_dir`` are ``<name>_<frame number><image_suffix>``.

    Snippets are found from the masks' names, so a sequence that spans several snippets is cut at the right places. A
    video is the run of consecutive frames around the labelled one, at most ``before`` and ``after`` of them.

    Attributes:
        before, after: frames of a snippet before and after the labelled one.
    """

    before: int = field(kw_only=True, default=0)
    after: int = field(kw_only=True, default=0)

    def scan(self) -> TreeScan:
        """Raises FileNotFoundError when a folder is missing or there is no mask."""
        scan = TreeScan()
        images = self._files(self.image_dir, self.image_suffix, scan)
        for key, mask in self._masks(scan).items():
            match = re.fullmatch(r"(.*_)(\d+)", key)
            if match is None:
                text = f"expected a name <sequence>_<frame number>{self.label_suffix}"
                scan.problems.append(Problem("unexpected name", str(mask), text))
                continue
            prefix, digits = match[1], match[2]
            numbers = range(max(0, int(digits) - self.before), int(digits) + self.after + 1)
            keys = [f"{prefix}{number:0{len(digits)}d}" for number in numbers]
            present = [name for name in keys if name in images]
            if key not in images:
                text = f"its image {self.image_dir}/{key}{self.image_suffix} is missing"
                scan.problems.append(Problem("missing frame", str(mask), text))
                continue
            start, end = keys.index(present[0]), keys.index(present[-1]) + 1
            if len(present) < end - start:
                absent = next(name for name in keys[start:end] if name not in images)
                text = (
                    f"the snippet has a gap: {absent}{self.image_suffix} is missing, frames before and after it exist"
                )
                scan.problems.append(Problem("missing frame", str(images[key]), text))
                continue
            frames = [
                {
                    "frame_id": name.rpartition("/")[2],
                    "file_name": str(images[name]),
                    "sem_seg_file_name": str(mask) if name == key else None,
                }
                for name in present
            ]
            scan.records.append({"dataset": self.name, "video_id": key, "frames": frames})
        return scan


def register_image_tree(
    name: str,
    image_dir: str | Path,
    label_dir: str | Path | None,
    classes: ClassList | Sequence[str],
    label_table: Sequence[int] | Mapping[int, int] | None = None,
    *,
    image_suffix: str = "",
    label_suffix: str = MASK_SUFFIX,
    require_labels: bool = True,
    fix: str = "",
) -> ImageTree:
    """Register a data set of images with ``DatasetCatalog`` and ``MetadataCatalog``. Nothing is read before it is used.

    Registering the same name again with this function replaces it.

    Args:
        name: catalogue name, e.g. ``"mine_train"``.
        image_dir: folder of the images; sub-folders are searched too.
        label_dir: folder of the masks; None when there are none.
        classes, label_table, require_labels, fix: as for ``register_video_tree``.
        image_suffix: end of the image files' names, e.g. ``_leftImg8bit.png``; "" takes every usual image type.
        label_suffix: end of the masks' names, e.g. ``_gtFine_labelTrainIds.png``.

    Raises:
        ValueError: bad class list or label table.
    """
    image_dir = Path(image_dir)
    tree = ImageTree(
        name,
        image_dir,
        image_dir.name,
        as_class_list(classes, label_table),
        require_labels and label_dir is not None,
        fix,
        image_dir=image_dir,
        label_dir=None if label_dir is None else Path(label_dir),
        image_suffix=image_suffix,
        label_suffix=label_suffix,
    )
    register_tree(tree)
    return tree
