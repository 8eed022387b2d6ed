"""Annotation tools that store shapes: LabelMe, Label Studio, CVAT's video tasks."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
from PIL import ImageColor

from the_mask.data.files import read_json, read_text
from the_mask.data.importers.common import (
    Canvas,
    ImportReport,
    LabelledFrame,
    Labels,
    check_names,
    class_index,
    find_image,
)
from the_mask.data.io import read_image
from the_mask.data.registry import natural_key


def read_labelme(source: Path, frames: Path | None = None, names: list[str] | None = None) -> Labels:
    """Read LabelMe: a JSON file per picture, with polygons, rectangles and circles.

    Args:
        source: folder; its sub-folders are videos.
        frames: folder of the pictures; by default that of the JSON files.
        names: classes in their order; by default all labels that occur, sorted.

    Raises:
        ValueError: a damaged file, a shape of another type, a label outside ``names``. FileNotFoundError: a picture is
            missing.
    """
    paths = sorted(source.rglob("*.json"), key=lambda path: [natural_key(p) for p in path.relative_to(source).parts])
    if not paths:
        raise FileNotFoundError(f"{source} holds no .json files of LabelMe")
    files = {path: _labelme_file(path) for path in paths}
    found = {str(shape["label"]) for content in files.values() for shape in content["shapes"]}
    classes, report = check_names(names or sorted(found), source), ImportReport()

    def read() -> Iterator[LabelledFrame]:
        for path, content in files.items():
            canvas = Canvas(int(content["imageHeight"]), int(content["imageWidth"]), report)
            for shape in content["shapes"]:
                label = class_index(classes, str(shape["label"]), str(path))
                canvas.polygons([_labelme_outline(shape, path)], label)
            relative = path.parent.relative_to(source)
            # Windows writes paths with "\".
            picture = str(content["imagePath"]).replace("\\", "/").rpartition("/")[2]
            image = find_image((frames or source) / relative, picture, str(path))
            video = relative.as_posix() if relative.parts else source.name
            yield LabelledFrame(video, path.stem, image, canvas.labels)

    return Labels(classes, None, read(), report)


def _labelme_file(path: Path) -> dict[str, Any]:
    content = read_json(path, "LabelMe file")
    absent = [key for key in ("shapes", "imagePath", "imageHeight", "imageWidth") if content.get(key) is None]
    shapes = content.get("shapes")
    if absent or not isinstance(shapes, list) or not all({"label", "points"} <= set(shape) for shape in shapes):
        raise ValueError(f"{path} is not a file of LabelMe: it lacks {', '.join(absent) or 'labels and points'}")
    return content


def _labelme_outline(shape: dict[str, Any], path: Path) -> list[float]:
    points, kind = np.asarray(shape["points"], float), shape.get("shape_type") or "polygon"
    if kind == "rectangle" and points.shape == (2, 2):
        (x0, y0), (x1, y1) = points
        points = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    elif kind == "circle" and points.shape == (2, 2):
        radius = float(np.hypot(*(points[1] - points[0])))
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        points = points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    elif kind != "polygon" or points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"{path}: shape {kind!r} of {len(points)} points; polygons, rectangles and circles are read")
    return [float(value) for value in points.reshape(-1)]


def read_label_studio(source: Path, frames: Path | None = None, names: list[str] | None = None) -> Labels:
    """Read Label Studio's JSON export: brush masks (in its run-length code) and polygons.

    Args:
        source: the JSON file, a list of tasks. Of a task the newest annotation that was not cancelled counts.
        frames: folder of the pictures; by default that of the JSON. For ``/data/upload/3/ab12cd34-f.jpg`` the last part
            is looked up, with and without the prefix of the upload.
        names: see :func:`read_labelme`.

    Raises: see :func:`read_labelme`.
    """
    try:
        tasks = json.loads(read_text(source, "Label Studio export"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    if not isinstance(tasks, list) or not all(isinstance(task, dict) and "annotations" in task for task in tasks):
        raise ValueError(f"{source} is not a JSON export of Label Studio (a list of tasks with 'annotations')")
    results = {number: _newest(task) for number, task in enumerate(tasks)}
    found = {label for items in results.values() for item in items for label in _ls_labels(item)}
    classes, report = check_names(names or sorted(found), source), ImportReport()

    def read() -> Iterator[LabelledFrame]:
        for number, task in enumerate(tasks):
            where = f"{source}, task {task.get('id', number)}"
            image = _ls_image(task, frames or source.parent, where)
            height, width = read_image(image).shape[:2]
            canvas = Canvas(height, width, report)
            for item in results[number]:
                _ls_draw(canvas, item, classes, where)
            yield LabelledFrame(source.stem, image.stem, image, canvas.labels if results[number] else None)

    return Labels(classes, None, read(), report)


def _newest(task: dict[str, Any]) -> list[dict[str, Any]]:
    done = [a for a in task["annotations"] if isinstance(a, dict) and not a.get("was_cancelled")]
    done.sort(key=lambda annotation: str(annotation.get("updated_at", "")))
    items = done[-1].get("result", []) if done else []
    return [item for item in items if item.get("type") in ("brushlabels", "polygonlabels")]


def _ls_labels(item: dict[str, Any]) -> list[str]:
    labels = item.get("value", {}).get(item["type"], [])
    return [str(label) for label in labels]


def _ls_image(task: dict[str, Any], folder: Path, where: str) -> Path:
    values = [value for value in task.get("data", {}).values() if isinstance(value, str)]
    for value in values:
        name = unquote(value.split("?")[-1].split("d=")[-1] if "d=" in value else value).rpartition("/")[2]
        prefix, _, rest = name.partition("-")
        for candidate in (name, rest if len(prefix) == 8 else ""):
            if candidate and (folder / candidate).is_file():
                return find_image(folder, candidate, where)
    raise FileNotFoundError(f"{where}: no picture of {values} is in {folder} (give its folder by --frames)")


def _ls_draw(canvas: Canvas, item: dict[str, Any], classes: list[str], where: str) -> None:
    labels = _ls_labels(item)
    if len(labels) != 1:
        raise ValueError(f"{where}: a region has {len(labels)} labels; expected one")
    label, value = class_index(classes, labels[0], where), item["value"]
    height, width = canvas.labels.shape
    if item["type"] == "polygonlabels":
        points = np.asarray(value["points"], float) / 100 * [width, height]
        canvas.polygons([[float(v) for v in points.reshape(-1)]], label)
        return
    size = (int(item.get("original_height", height)), int(item.get("original_width", width)))
    if size != (height, width):
        raise ValueError(f"{where}: a brush mask of {size[0]}x{size[1]} on a picture of {height}x{width}")
    try:
        alpha = decode_brush(value["rle"], 4 * height * width).reshape(height, width, 4)[..., 3]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: a brush mask cannot be read: {error}") from error
    canvas.mask(alpha > 0, label)


def decode_brush(code: list[int], expected: int) -> np.ndarray:
    """Decode Label Studio's run-length code, a bit stream stored as bytes, into uint8 values.

    The stream holds the number of values (32 bits), bits per value less one (5), and four bit widths less one (4 each);
    then runs: one bit (1: one value repeated, 0: values one by one), two bits that choose the width of the length, the
    length less one, and the value or values.

    Args:
        code: numbers 0..255.
        expected: number of values, checked before anything is unpacked.

    Raises:
        ValueError: damaged, or of another length.
    """
    bits = np.unpackbits(np.asarray(code, np.uint8))
    place = 0

    def take(count: int) -> int:
        nonlocal place
        if place + count > len(bits):
            raise ValueError("the run-length code ends too early")
        value = int("".join(map(str, bits[place : place + count])), 2) if count else 0
        place += count
        return value

    total, size = take(32), take(5) + 1
    if total != expected:
        raise ValueError(f"the run-length code is of {total} values, the picture has {expected}")
    widths = [take(4) + 1 for _ in range(4)]
    values = np.zeros(total, np.uint8)
    done = 0
    while done < total:
        repeated = take(1)
        length = take(widths[take(2)]) + 1
        if done + length > total:
            raise ValueError("the run-length code is longer than it says")
        if repeated:
            values[done : done + length] = take(size)
        else:
            for i in range(length):
                values[done + i] = take(size)
        done += length
    return values


def read_cvat_video(source: Path, frames: Path | None = None) -> Labels:
    """Read CVAT's XML 1.1 of a video task: tracks of polygons and masks. A polygon stays until its track changes it.

    Args:
        source: ``annotations.xml``.
        frames: folder of the frames, whose names end with their number in the task (``frame_000000.jpg``).

    Raises: see :func:`read_labelme`.
    """
    text = read_text(source, "CVAT file")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # CVAT writes none, and entities can grow without bound
        raise ValueError(f"{source} declares XML entities, which are not read")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{source} is not XML: {error}") from error
    labels = root.findall("./meta//labels/label")
    classes = check_names([label.findtext("name", "") for label in labels], source)
    colors = [label.findtext("color", "") for label in labels]
    folder = frames or source.parent / "images"
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    pictures = {number: path for path in paths if (number := _number(path)) is not None}
    if not pictures:
        raise FileNotFoundError(f"{folder} holds no numbered frames (give their folder by --frames)")
    shapes: dict[int, list[tuple[int, Any, int]]] = defaultdict(list)
    for track in root.findall("track"):
        label = class_index(classes, track.get("label", ""), str(source))
        keys = sorted((shape for shape in track if shape.tag in ("polygon", "mask")), key=_frame)
        ends = [_frame(shape) for shape in keys[1:]] + [max(pictures) + 1]
        for shape, end in zip(keys, ends, strict=True):
            first = _frame(shape)
            # A polygon is valid until the next one of its track; a mask only in its frame.
            last = end if shape.tag == "polygon" else first + 1
            if shape.get("outside") != "1":
                for number in range(first, last):
                    shapes[number].append((int(shape.get("z_order") or 0), shape, label))
    report = ImportReport()
    video = "".join(c if c.isalnum() else "_" for c in root.findtext("./meta/task/name") or source.stem)

    def read() -> Iterator[LabelledFrame]:
        for number in sorted(pictures):
            height, width = read_image(pictures[number]).shape[:2]
            canvas = Canvas(height, width, report)
            for _, shape, label in sorted(shapes[number], key=lambda item: item[0]):
                _cvat_draw(canvas, shape, label, f"{source}, frame {number}")
            yield LabelledFrame(video, f"{number:06d}", pictures[number], canvas.labels)

    shown = [ImageColor.getrgb(color)[:3] for color in colors] if all(colors) else None
    return Labels(classes, shown, read(), report)


def _frame(shape: ElementTree.Element) -> int:
    return int(shape.get("frame", ""))


def _cvat_draw(canvas: Canvas, shape: Any, label: int, where: str) -> None:
    height, width = canvas.labels.shape
    try:
        if shape.tag == "polygon":
            canvas.polygons([[float(v) for point in shape.get("points").split(";") for v in point.split(",")]], label)
            return
        runs = [int(run) for run in shape.get("rle").split(",")]
        left, top, w, h = (int(float(shape.get(name))) for name in ("left", "top", "width", "height"))
        if sum(runs) != w * h or left < 0 or top < 0 or left + w > width or top + h > height:
            raise ValueError(f"a mask of {w}x{h} at ({left}, {top}) with {sum(runs)} pixels")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: a shape cannot be read: {error}") from error
    inner = np.repeat(np.arange(len(runs)) % 2, runs).reshape(h, w).astype(bool)
    mask = np.zeros((height, width), bool)
    mask[top : top + h, left : left + w] = inner
    canvas.mask(mask, label)


def _number(path: Path) -> int | None:
    digits = path.stem[len(path.stem.rstrip("0123456789")) :]
    return int(digits) if digits.isdecimal() else None
