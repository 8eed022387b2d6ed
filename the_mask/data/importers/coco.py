"""COCO's JSON files and related formats: instances and stuff, panoptic, VIPSeg, YouTube-VIS and OVIS."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from the_mask.data.files import inside, read_json
from the_mask.data.importers.common import (
    NOTHING,
    Canvas,
    ImportReport,
    LabelledFrame,
    Labels,
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
        self.names = check_names([str(category["name"]) for category in categories], path)
        self.index = {category["id"]: i for i, category in enumerate(categories)}
        colors = [category.get("color") for category in categories]
        self.colors = [tuple(color) for color in colors] if all(colors) else None

    def __getitem__(self, category: Any) -> int:
        if category not in self.index:
            raise ValueError(f"{self.path}: an annotation has category {category}, which 'categories' does not list")
        return self.index[category]


def read_coco(source: Path, frames: Path | None = None) -> Labels:
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
            canvas = Canvas(int(image["height"]), int(image["width"]), report)
            for number, annotation in enumerate(annotations.get(image["id"], [])):
                where = f"{source}, picture {image['file_name']}, annotation {annotation.get('id', number)}"
                _draw(canvas, annotation.get("segmentation"), classes[annotation["category_id"]], where)
            video, name = split_name(str(image["file_name"]), source.stem)
            path = find_image(frames or source.parent, str(image["file_name"]), str(source))
            yield LabelledFrame(video, name, path, canvas.labels)

    return Labels(classes.names, classes.colors, read(), report)


def read_panoptic(source: Path, frames: Path | None = None, masks: Path | None = None) -> Labels:
    """Read COCO panoptic or Cityscapes-VPS: a JSON file and PNGs whose colour r + 256 g + 65536 b is a segment's id.

    Args:
        source: the JSON file.
        frames: folder of the pictures; the JSON's own by default.
        masks: folder of the PNGs; the JSON's name without suffix by default.

    Raises: see :func:`read_coco`.
    """
    content = read_json(source, "panoptic file")
    classes = _Categories(content, source)
    images = {image["id"]: str(image["file_name"]) for image in _list(content, "images", source, "id", "file_name")}
    annotations = _list(content, "annotations", source, "image_id", "file_name", "segments_info")

    def read() -> Iterator[LabelledFrame]:
        for annotation in sorted(annotations, key=lambda item: natural_key(str(item["file_name"]))):
            picture = images.get(annotation["image_id"])
            if picture is None:
                raise ValueError(f"{source}: annotation of {annotation['file_name']} has an unknown image_id")
            labels = _segments(masks or source.with_suffix(""), annotation, classes, source)
            video, name = split_name(picture, source.stem)
            yield LabelledFrame(video, name, find_image(frames or source.parent, picture, str(source)), labels)

    return Labels(classes.names, classes.colors, read())


def read_vipseg(source: Path, frames: Path | None = None, masks: Path | None = None) -> Labels:
    """Read VIPSeg: panoptic annotations listed by video.

    Args: as :func:`read_panoptic`; pictures and PNGs lie in a folder per video.

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
                image["id"]: str(image["file_name"])
                for image in _list(videos[video], "images", source, "id", "file_name")
            }
            for annotation in _list(entry, "annotations", source, "image_id", "file_name", "segments_info"):
                picture = images.get(annotation["image_id"])
                if picture is None:
                    raise ValueError(f"{source}: video {video} has no image {annotation['image_id']}")
                labels = _segments((masks or source.with_suffix("")) / video, annotation, classes, source)
                path = find_image((frames or source.parent) / video, picture, str(source))
                yield LabelledFrame(video, Path(picture).stem, path, labels)

    return Labels(classes.names, classes.colors, read())


def read_ytvis(source: Path, frames: Path | None = None) -> Labels:
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
            names = [str(name) for name in video["file_names"]]
            objects = annotations.get(video["id"], [])
            for item in objects:
                if len(item["segmentations"]) != len(names):
                    raise ValueError(
                        f"{source}: an object of video {video['id']} has {len(item['segmentations'])} masks for "
                        f"{len(names)} frames"
                    )
            for t, name in enumerate(names):
                canvas = Canvas(int(video["height"]), int(video["width"]), report)
                for item in objects:
                    where = f"{source}, video {video['id']}, frame {name}"
                    _draw(canvas, item["segmentations"][t], classes[item["category_id"]], where)
                folder, stem = split_name(name, str(video["id"]))
                image = find_image(frames or source.parent / "JPEGImages", name, str(source))
                yield LabelledFrame(folder, stem, image, canvas.labels)

    return Labels(classes.names, classes.colors, read(), report)


def _draw(canvas: Canvas, segmentation: Any, label: int, where: str) -> None:
    if not segmentation:
        return
    if isinstance(segmentation, Mapping):
        canvas.rle(segmentation, label, where)
    elif isinstance(segmentation, list) and all(isinstance(part, list) for part in segmentation):
        canvas.polygons(segmentation, label)
    else:
        raise ValueError(
            f"{where}: a segmentation is a list of polygons or a run-length code, got {segmentation!r:.80}"
        )


def _segments(folder: Path, annotation: Item, classes: _Categories, source: Path) -> np.ndarray:
    path = inside(folder, str(annotation["file_name"]))
    ids = read_image(path).astype(np.int64) @ np.array([1, 256, 65536])
    known = {int(segment["id"]): classes[segment["category_id"]] for segment in annotation["segments_info"]}
    values, inverse = np.unique(ids, return_inverse=True)
    unknown = [int(value) for value in values if value and int(value) not in known]
    if unknown:
        raise ValueError(f"{path}: segments {unknown[:5]} are not in the segments_info of {source}")
    return np.array([known.get(int(value), NOTHING) for value in values], np.int32)[inverse].reshape(ids.shape)


def _list(content: Item, key: str, path: Path, *fields: str) -> list[Any]:
    value = content.get(key)
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise ValueError(f"{path}: expected a list of objects under {key!r}; is it another kind of file?")
    for number, item in enumerate(value):
        absent = [field for field in fields if field not in item]
        if absent:
            raise ValueError(f"{path}: entry {number} of {key!r} has no {absent[0]!r}; is it another kind of file?")
    return value


def _by(content: Item, key: str, field: str, path: Path, *fields: str) -> dict[Any, list[Item]]:
    groups: dict[Any, list[Item]] = defaultdict(list)
    for item in _list(content, key, path, field, *fields):
        groups[item[field]].append(item)
    return groups
