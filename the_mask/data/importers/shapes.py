"""Annotation tools that store shapes as JSON: LabelMe, Label Studio."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from the_mask.data.files import inside, parse_json, read_json, read_text
from the_mask.data.importers.common import (
    Canvas,
    ImportReport,
    LabelledFrame,
    Labels,
    Pictures,
    as_points,
    canvas_on,
    check_names,
    class_index,
    find_image,
    frame_number,
)
from the_mask.data.io import read_embedded_mask
from the_mask.data.registry import natural_key


def read_labelme(source: Path, frames: Path | Pictures | None = None, names: list[str] | None = None) -> Labels:
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
    found = {shape["label"] for content in files.values() for shape in content["shapes"]}
    classes, report = check_names(names or sorted(found), source), ImportReport()

    def read() -> Iterator[LabelledFrame]:
        for path, content in files.items():
            relative = path.parent.relative_to(source)
            # Windows writes paths with "\".
            picture = content["imagePath"].replace("\\", "/").rpartition("/")[2]
            image = find_image(frames or source, (relative / picture).as_posix(), str(path))
            canvas = canvas_on(image, (content["imageHeight"], content["imageWidth"]), str(path), report)
            for shape in content["shapes"]:
                label = class_index(classes, shape["label"], str(path))
                if shape.get("shape_type") == "mask":
                    canvas.mask(_labelme_mask(shape, canvas.labels.shape, path), label)
                else:
                    canvas.polygons([_labelme_outline(shape, path)], label, str(path))
            video = relative.as_posix() if relative.parts else source.name
            yield LabelledFrame(video, path.stem, image, canvas.labels)

    return Labels(classes, None, read(), report)


def _labelme_file(path: Path) -> dict[str, Any]:
    content = read_json(path, "LabelMe file")
    absent = [key for key in ("shapes", "imagePath", "imageHeight", "imageWidth") if content.get(key) is None]
    shapes = content.get("shapes")
    good = isinstance(shapes, list) and isinstance(content.get("imagePath"), str)
    if absent or not good:
        raise ValueError(f"{path} is not a file of LabelMe: it lacks {', '.join(absent) or 'a list of shapes'}")
    for number, shape in enumerate(shapes or []):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or "points" not in shape:
            raise ValueError(f"{path} is not a file of LabelMe: shape {number} lacks a label or points")
    return content


def _labelme_points(shape: dict[str, Any], path: Path) -> np.ndarray:
    pairs = shape["points"]
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{path}: points of a shape are no pairs of numbers: {pairs!r:.80}")
    return as_points(pairs, str(path))


def _labelme_outline(shape: dict[str, Any], path: Path) -> list[float]:
    points, kind = _labelme_points(shape, path), shape.get("shape_type") or "polygon"
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        points = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    elif kind == "circle" and len(points) == 2:
        radius = float(np.hypot(*(points[1] - points[0])))
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        points = points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    elif kind != "polygon":
        raise ValueError(
            f"{path}: shape {kind!r} of {len(points)} points; polygons, rectangles, circles and masks are read"
        )
    return [float(value) for value in points.reshape(-1)]


def _labelme_mask(shape: dict[str, Any], size: tuple[int, ...], path: Path) -> np.ndarray:
    """The mask of LabelMe's AI tools: a PNG of the box between two points, both of which belong to it."""
    points = _labelme_points(shape, path)
    if len(points) != 2 or not np.isfinite(points).all():
        raise ValueError(f"{path}: a mask of {len(points)} points; expected its first and its last corner")
    (left, top), (right, bottom) = points.round().astype(int).tolist()
    if min(left, top) < 0 or right >= size[1] or bottom >= size[0]:
        raise ValueError(f"{path}: a mask from ({left}, {top}) to ({right}, {bottom}) leaves the picture")
    try:
        content = base64.b64decode(shape.get("mask") or "", validate=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: a mask cannot be read: {error}") from error
    mask = np.zeros(size, bool)
    inner = read_embedded_mask(content, str(path), (bottom - top + 1, right - left + 1))
    mask[top : bottom + 1, left : right + 1] = inner
    return mask


def read_label_studio(source: Path, frames: Path | Pictures | None = None, names: list[str] | None = None) -> Labels:
    """Read Label Studio's JSON export: brush masks (in its run-length code) and polygons.

    Args:
        source: the JSON file, a list of tasks. Of a task the newest annotation that was not cancelled counts.
        frames: folder of the pictures; by default that of the JSON. For ``/data/upload/3/ab12cd34-f.jpg`` the last part
            is looked up, with and without the prefix of the upload.
        names: see :func:`read_labelme`.

    Tasks of ``the-mask annotations`` belong to the video that they name, others to one called as the file.

    Raises: see :func:`read_labelme`.
    """
    tasks = parse_json(read_text(source, "Label Studio export"), str(source))
    if not isinstance(tasks, list) or not all(
        isinstance(task, dict) and isinstance(task.get("annotations"), list) and isinstance(task.get("data"), dict)
        for task in tasks
    ):
        raise ValueError(f"{source} is not a JSON export of Label Studio (a list of tasks with 'data', 'annotations')")
    report = ImportReport()
    results = [_newest(task, f"{source}, task {task.get('id', n)}", report) for n, task in enumerate(tasks)]
    found = {label for items in results for item in items for label in item["value"][item["type"]]}
    classes = check_names(names or sorted(found), source)

    def read() -> Iterator[LabelledFrame]:
        ordered = [(_ls_video(task, source), number, task) for number, task in enumerate(tasks)]
        # Tasks come in the order of their ids; the frames of a video must come together.
        firsts = {video: number for video, number, _ in reversed(ordered)}
        for video, number, task in sorted(ordered, key=lambda item: firsts[item[0]]):
            where = f"{source}, task {task.get('id', number)}"
            image = _ls_image(task, frames or source.parent, where)
            items = results[number]
            size = (items[0].get("original_height"), items[0].get("original_width")) if items else (None, None)
            canvas = canvas_on(image, None if size == (None, None) else size, where, report)
            for item in items:
                _ls_draw(canvas, item, classes, where)
            yield LabelledFrame(video, image.stem, image, canvas.labels if items else None)

    return Labels(classes, None, read(), report)


def _newest(task: dict[str, Any], where: str, report: ImportReport) -> list[dict[str, Any]]:
    """The regions of the newest annotation that say which pixels they cover."""
    done = [a for a in task["annotations"] if isinstance(a, dict) and not a.get("was_cancelled")]
    done.sort(key=lambda annotation: str(annotation.get("updated_at", "")))
    items = done[-1].get("result", []) if done else []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{where}: an annotation's result is no list of regions")
    kept = []
    for item in items:
        kind, value = item.get("type"), item.get("value")
        if kind in ("brushlabels", "polygonlabels"):
            labels = value.get(kind) if isinstance(value, dict) else None
            if not isinstance(labels, list) or len(labels) != 1 or not isinstance(labels[0], str):
                raise ValueError(f"{where}: a region has the labels {labels!r:.80}; expected one")
            kept.append(item)
        elif str(kind).endswith("labels"):
            report.noticed[f"regions of kind {kind}, left out"] += 1
    return kept


def _ls_video(task: dict[str, Any], source: Path) -> str:
    """The video of a task that the-mask annotations has written; else the name of the export."""
    data = task["data"]
    ours = isinstance(data.get("video"), str) and isinstance(data.get("frame"), str)
    return data["video"] if ours and data["video"] else source.stem


def _ls_image(task: dict[str, Any], frames: Path | Pictures, where: str) -> Path:
    data = task.get("data", {})
    if not isinstance(frames, Path):
        # As the-mask annotations writes tasks; or else by the picture's name.
        texts = [data.get("frame"), *data.values()]
        names = [Path(_ls_name(text)).stem for text in texts if isinstance(text, str) and text]
        name = next((name for name in names if frame_number(name) is not None), str(names))
        return frames.find(f"{data.get('video') or ''}/{name}".lstrip("/"), where)
    values = [value for value in data.values() if isinstance(value, str)]
    for value in values:
        path = _ls_name(value)
        name = path.rpartition("/")[2]
        prefix, _, rest = name.partition("-")
        # A picture's folder counts if it is there: frames of two videos may have one name.
        for candidate in (path, *(path.split("/", n)[-1] for n in range(1, path.count("/"))), name):
            if _is_picture(frames, candidate.strip("/")):
                return find_image(frames, candidate.strip("/"), where)
        if len(prefix) == 8 and _is_picture(frames, rest):
            return find_image(frames, rest, where)
    raise FileNotFoundError(f"{where}: no picture of {values} is in {frames} (give its folder by --frames)")


def _is_picture(frames: Path, name: str) -> bool:
    try:
        return inside(frames, name).is_file()
    except ValueError:  # no name that a file can have, or of another folder
        return False


def _ls_name(url: str) -> str:
    """The path in a task's address: of a query ``?d=``, or of the address itself."""
    parts = urlsplit(url)
    local = parse_qs(parts.query).get("d")
    return local[0] if local else unquote(parts.path)


def _ls_draw(canvas: Canvas, item: dict[str, Any], classes: list[str], where: str) -> None:
    value = item["value"]
    label = class_index(classes, value[item["type"]][0], where)
    height, width = canvas.labels.shape
    if item["type"] == "polygonlabels":
        points = as_points(value.get("points"), where) / 100 * [width, height]
        canvas.polygons([points.reshape(-1).tolist()], label, where)
        return
    size = (item.get("original_height", height), item.get("original_width", width))
    if size != (height, width):
        raise ValueError(f"{where}: a brush mask of {size[0]}x{size[1]} on a picture of {height}x{width}")
    code = value.get("rle")
    if not isinstance(code, list) or not all(type(byte) is int and 0 <= byte < 256 for byte in code):
        raise ValueError(f"{where}: a brush mask cannot be read: its code is no list of numbers 0..255")
    try:
        alpha = decode_brush(code, 4 * height * width).reshape(height, width, 4)[..., 3]
    except ValueError as error:
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
    if size > 8:
        raise ValueError(f"the run-length code has values of {size} bits, expected at most 8")
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
