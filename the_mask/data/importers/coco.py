"""COCO's JSON files and related formats: instances and stuff, panoptic, VIPSeg, YouTube-VIS and OVIS."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from the_mask.data.class_table import as_color
from the_mask.data.files import inside, read_json
from the_mask.data.importers.common import (
    NOTHING,
    Canvas,
    ImportReport,
    LabelledFrame,
    Labels,
    Pictures,
    canvas_on,
    check_names,
    find_image,
    split_name,
)
from the_mask.data.io import read_image
from the_mask.data.registry import natural_key

Item = Mapping[str, Any]


class _Categories:
    """The classes of a file, in its order."""

    def __init__(self, content: Item, path: Path) -> None:
        categories = _list(content, "categories", path, "id", "name")
        self.path = path
        self.names = check_names([category["name"] for category in categories], path)
        self.index = {category["id"]: i for i, category in enumerate(categories)}
        if len(self.index) < len(categories):
            raise ValueError(f"{path}: two categories have one id")
        colors = [category.get("color") for category in categories]
        self.colors = [as_color(color, f"{path}: a category") for color in colors] if all(colors) else None

    def __getitem__(self, category: Any) -> int:
        if category not in self.index:
            raise ValueError(f"{self.path}: an annotation has category {category}, which 'categories' does not list")
        return self.index[category]


def read_coco(source: Path, frames: Path | Pictures | None = None) -> Labels:
    """Read COCO instances or stuff: polygons and run-length codes, drawn in the file's order.

    Args:
        source: the JSON file.
        frames: folder of the pictures; the JSON's own by default. A picture's sub-folder is its video.

    Raises:
        ValueError: another kind of file, an unknown category, a damaged code. FileNotFoundError: a picture is missing.
    """
    content = read_json(source, "COCO file")
    classes, report = _Categories(content, source), ImportReport()
    annotations = _by(content, "annotations", "image_id", source, "category_id")

    def read() -> Iterator[LabelledFrame]:
        images = _list(content, "images", source, "id", "file_name", "height", "width")
        for image in sorted(images, key=lambda item: natural_key(str(item["file_name"]))):
            where = f"{source}, picture {image['file_name']}"
            video, name = split_name(image["file_name"], source.stem)
            path = find_image(frames or source.parent, image["file_name"], str(source))
            canvas = canvas_on(path, (image["height"], image["width"]), where, report)
            for number, annotation in enumerate(annotations.get(image["id"], [])):
                place = f"{where}, annotation {annotation.get('id', number)}"
                _draw(canvas, annotation.get("segmentation"), classes[annotation["category_id"]], place)
            yield LabelledFrame(video, name, path, canvas.labels)

    return Labels(classes.names, classes.colors, read(), report)


def read_panoptic(source: Path, frames: Path | Pictures | None = None, masks: Path | None = None) -> Labels:
    """Read COCO panoptic: a JSON file and PNGs whose colour r + 256 g + 65536 b is a segment's id.

    Args:
        source: the JSON file.
        frames: folder of the pictures; the JSON's own by default.
        masks: folder of the PNGs; the JSON's name without suffix by default.

    Raises: see :func:`read_coco`.
    """
    return _read_panoptic(source, frames, masks, lambda picture: split_name(picture, source.stem))


def read_cityscapes_vps(source: Path, frames: Path | Pictures | None = None, masks: Path | None = None) -> Labels:
    """Read Cityscapes-VPS: COCO panoptic with all pictures in one folder; names begin with the video's number.

    Args: as :func:`read_panoptic`.

    Raises: see :func:`read_coco`.
    """
    return _read_panoptic(source, frames, masks, lambda picture: (picture.split("_")[0], Path(picture).stem))


def _read_panoptic(
    source: Path, frames: Path | Pictures | None, masks: Path | None, name_of: Callable[[str], tuple[str, str]]
) -> Labels:
    content = read_json(source, "panoptic file")
    classes = _Categories(content, source)
    images = {image["id"]: image["file_name"] for image in _list(content, "images", source, "id", "file_name")}
    annotations = []
    for annotation in _list(content, "annotations", source, "image_id", "file_name", "segments_info"):
        if annotation["image_id"] not in images:
            raise ValueError(f"{source}: annotation of {annotation['file_name']} has an unknown image_id")
        annotations.append((images[annotation["image_id"]], annotation))

    def read() -> Iterator[LabelledFrame]:
        for picture, annotation in sorted(annotations, key=lambda item: natural_key(item[0])):
            labels = _segments(masks or source.with_suffix(""), annotation, classes, source)
            video, name = name_of(picture)
            yield LabelledFrame(video, name, find_image(frames or source.parent, picture, str(source)), labels)

    return Labels(classes.names, classes.colors, read())


def read_vipseg(source: Path, frames: Path | Pictures | None = None, masks: Path | None = None) -> Labels:
    """Read VIPSeg: panoptic annotations listed by video.

    Args: as :func:`read_panoptic`; images and PNGs are in one folder per video.

    Raises: see :func:`read_coco`.
    """
    content = read_json(source, "VIPSeg file")
    classes = _Categories(content, source)
    videos = {str(video["video_id"]): video for video in _list(content, "videos", source, "video_id", "images")}

    def read() -> Iterator[LabelledFrame]:
        for entry in _list(content, "annotations", source, "video_id", "annotations"):
            video = str(entry["video_id"])
            if video not in videos:
                raise ValueError(f"{source}: annotations of video {video}, which 'videos' does not list")
            images = {
                image["id"]: image["file_name"] for image in _list(videos[video], "images", source, "id", "file_name")
            }
            for annotation in _list(entry, "annotations", source, "image_id", "file_name", "segments_info"):
                picture = images.get(annotation["image_id"])
                if picture is None:
                    raise ValueError(f"{source}: video {video} has no image {annotation['image_id']}")
                labels = _segments((masks or source.with_suffix("")) / video, annotation, classes, source)
                path = find_image(frames or source.parent, f"{video}/{picture}", str(source))
                yield LabelledFrame(video, Path(picture).stem, path, labels)

    return Labels(classes.names, classes.colors, read())


def read_ytvis(source: Path, frames: Path | Pictures | None = None) -> Labels:
    """Read YouTube-VIS or OVIS: run-length codes (or polygons) of every object in every frame.

    Args:
        source: the JSON file.
        frames: folder of the pictures; ``JPEGImages`` next to the JSON by default.

    Raises: see :func:`read_coco`.
    """
    content = read_json(source, "YouTube-VIS file")
    classes, report = _Categories(content, source), ImportReport()
    annotations = _by(content, "annotations", "video_id", source, "category_id", "segmentations")

    def read() -> Iterator[LabelledFrame]:
        for video in _list(content, "videos", source, "id", "file_names", "height", "width"):
            names = video["file_names"]
            if not all(isinstance(name, str) for name in names):
                raise ValueError(f"{source}: video {video['id']} has file_names that are no texts")
            objects = annotations.get(video["id"], [])
            for item in objects:
                if len(item["segmentations"]) != len(names):
                    raise ValueError(
                        f"{source}: an object of video {video['id']} has {len(item['segmentations'])} masks for "
                        f"{len(names)} frames"
                    )
            for t, name in enumerate(names):
                where = f"{source}, video {video['id']}, frame {name}"
                folder, stem = split_name(name, str(video["id"]))
                image = find_image(frames or source.parent / "JPEGImages", name, str(source))
                canvas = canvas_on(image, (video["height"], video["width"]), where, report)
                for item in objects:
                    _draw(canvas, item["segmentations"][t], classes[item["category_id"]], where)
                yield LabelledFrame(folder, stem, image, canvas.labels)

    return Labels(classes.names, classes.colors, read(), report)


def _draw(canvas: Canvas, segmentation: Any, label: int, where: str) -> None:
    if not segmentation:
        return
    if isinstance(segmentation, Mapping):
        canvas.rle(segmentation, label, where)
    elif isinstance(segmentation, list) and all(isinstance(part, list) for part in segmentation):
        canvas.polygons(segmentation, label, where)
    else:
        raise ValueError(
            f"{where}: a segmentation is a list of polygons or a run-length code, got {segmentation!r:.80}"
        )


def _segments(folder: Path, annotation: Item, classes: _Categories, source: Path) -> np.ndarray:
    path = inside(folder, annotation["file_name"], where=str(source))
    if not path.is_file():
        raise FileNotFoundError(
            f"{source} names the mask {annotation['file_name']}, which is not in {folder} (give its folder by --masks)"
        )
    ids = read_image(path).astype(np.int64) @ np.array([1, 256, 65536])
    parts = _list(annotation, "segments_info", source, "id", "category_id")
    known = {part["id"]: classes[part["category_id"]] for part in parts}
    values, inverse = np.unique(ids, return_inverse=True)
    unknown = [int(value) for value in values if value and int(value) not in known]
    if unknown:
        raise ValueError(f"{path}: segments {unknown[:5]} are not in the segments_info of {source}")
    return np.array([known.get(int(value), NOTHING) for value in values], np.int32)[inverse].reshape(ids.shape)


# What fields are, wherever they occur.
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "image_id", "video_id", "category_id"), (int, str)),
    **dict.fromkeys(("file_name", "name"), (str,)),
    **dict.fromkeys(("file_names", "segmentations", "segments_info", "images", "annotations"), (list,)),
    **dict.fromkeys(("height", "width"), (int, float)),
}


def _list(content: Item, key: str, path: Path, *fields: str) -> list[Any]:
    """The objects of a list; each has the fields, of their kinds."""
    value = content.get(key)
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise ValueError(f"{path}: expected a list of objects under {key!r}; is it another kind of file?")
    for number, item in enumerate(value):
        for field in fields:
            if field not in item:
                raise ValueError(f"{path}: entry {number} of {key!r} has no {field!r}; is it another kind of file?")
            if not isinstance(item[field], KINDS[field]) or isinstance(item[field], bool):
                raise ValueError(f"{path}: entry {number} of {key!r} has {field} {item[field]!r:.80}")
    return value


def _by(content: Item, key: str, field: str, path: Path, *fields: str) -> dict[Any, list[Item]]:
    groups: dict[Any, list[Item]] = defaultdict(list)
    for item in _list(content, key, path, field, *fields):
        groups[item[field]].append(item)
    return groups
