"""CVAT's XML 1.1: "CVAT for images" and "CVAT for video"."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import ImageColor

from the_mask.data.files import parse_count, read_text
from the_mask.data.importers.common import (
    Canvas,
    ImportReport,
    LabelledFrame,
    Labels,
    Pictures,
    canvas_on,
    check_names,
    class_index,
    find_image,
    frame_number,
    split_name,
)
from the_mask.data.io import IMAGE_SUFFIXES
from the_mask.data.registry import natural_key

Element = ElementTree.Element
# Shapes that say which pixels they cover.
AREAS = ("polygon", "mask")
OTHERS = ("box", "polyline", "points", "ellipse", "cuboid", "skeleton")


class _Span(NamedTuple):
    """A shape in the frames first..last-1."""

    first: int
    last: int
    z: int
    shape: Element
    label: int


def read_cvat_images(source: Path, frames: Path | Pictures | None = None) -> Labels:
    """Read CVAT's "CVAT for images 1.1": polygons and masks by picture, the higher z-order drawn later.

    Args:
        source: ``annotations.xml``.
        frames: folder of the images; ``images`` next to the XML by default. An image's subfolder is its video.

    Raises: see :func:`the_mask.data.importers.shapes.read_labelme`.
    """
    root = _parse(source)
    classes, colors = _labels(root, source)
    report = ImportReport()
    images = root.findall("image")
    if not images:
        raise ValueError(f'{source} holds no <image>; is it "CVAT for video" (cvat-video)?')
    title = _title(root, source)

    def read() -> Iterator[LabelledFrame]:
        for image in sorted(images, key=lambda image: natural_key(image.get("name", ""))):
            name = image.get("name", "")
            path = find_image(frames or source.parent / "images", name, str(source))
            where = f"{source}, picture {name}"
            size = (image.get("height"), image.get("width"))
            canvas = canvas_on(path, _numbers(size, where), where, report)
            shapes = []
            for shape in image:
                if _is_area(shape, report):
                    label = class_index(classes, shape.get("label", ""), where)
                    shapes.append((_integer(shape, "z_order", where, "0"), shape, label))
            _draw_all(canvas, shapes, where)
            video, stem = split_name(name, title)
            yield LabelledFrame(video, stem, path, canvas.labels)

    return Labels(classes, colors, read(), report)


def read_cvat_video(source: Path, frames: Path | Pictures | None = None) -> Labels:
    """Read CVAT's "CVAT for video 1.1": tracks of polygons and masks. A polygon stays until its track changes it.

    Args:
        source: ``annotations.xml``.
        frames: folder of the frames, whose names end with their number in the video (``frame_000000.jpg``); ``images``
            next to the XML by default. All of them are labelled; of a video only the frames that have a shape.

    Raises: see :func:`the_mask.data.importers.shapes.read_labelme`.
    """
    root = _parse(source)
    classes, colors = _labels(root, source)
    if root.find("image") is not None:
        raise ValueError(f'{source} holds <image>; is it "CVAT for images" (cvat-images)?')
    report = ImportReport()
    spans = sorted(_spans(root, classes, source, report), key=lambda span: span.first)
    pictures: dict[int, Path] = {}
    if isinstance(frames, Path) or frames is None:
        folder = frames or source.parent / "images"
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in paths:
            number = frame_number(path.stem) if path.suffix.lower() in IMAGE_SUFFIXES else None
            if number is not None and pictures.setdefault(number, path) != path:
                raise ValueError(f"{path} and {pictures[number].name} are both frame {number}")
        if not pictures:
            raise FileNotFoundError(f"{folder} holds no numbered frames (give their folder by --frames)")
    numbers: Iterable[int] = sorted(pictures) or _task_frames(root, spans, source)
    video = _title(root, source)
    sizes = tuple(root.findtext(f"./meta/task/original_size/{side}") for side in ("height", "width"))
    size = _numbers(sizes, str(source))

    def read() -> Iterator[LabelledFrame]:
        for number, active in _sweep(spans, numbers):
            where = f"{source}, frame {number}"
            if not isinstance(frames, Path) and frames is not None:
                path = frames.find(f"{video}/{number:06d}", where)
            else:
                path = pictures[number]
            canvas = canvas_on(path, size, where, report)
            _draw_all(canvas, [(span.z, span.shape, span.label) for span in active], where)
            yield LabelledFrame(video, f"{number:06d}", path, canvas.labels)

    return Labels(classes, colors, read(), report)


def _parse(source: Path) -> Element:
    text = read_text(source, "CVAT file")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # CVAT writes none, and entities can grow without bound
        raise ValueError(f"{source} declares XML entities, which are not read")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{source} is not XML: {error}") from error


def _labels(root: Element, source: Path) -> tuple[list[str], list[tuple[int, int, int]] | None]:
    labels = root.findall("./meta//labels/label")
    classes = check_names([label.findtext("name", "") for label in labels], source)
    texts = [label.findtext("color", "") for label in labels]
    if not all(texts):
        return classes, None
    colors = []
    for name, text in zip(classes, texts, strict=True):
        try:
            red, green, blue = ImageColor.getrgb(text)[:3]
        except ValueError as error:
            raise ValueError(f"{source}: class {name} has the colour {text!r}, expected #rrggbb") from error
        colors.append((red, green, blue))
    return classes, colors


def _title(root: Element, source: Path) -> str:
    name = next((text for path in ("task", "job", "project") if (text := root.findtext(f"./meta/{path}/name"))), "")
    return "".join(c if c.isalnum() else "_" for c in name or source.stem)


def _spans(root: Element, classes: list[str], source: Path, report: ImportReport) -> Iterator[_Span]:
    end = _meta(root, "stop_frame", source)
    keys_by_track = []
    for number, track in enumerate(root.findall("track")):
        where = f"{source}, track {track.get('id', number)}"
        label = class_index(classes, track.get("label", ""), where)
        keys = [(_integer(shape, "frame", where), shape) for shape in track if _is_area(shape, report)]
        keys_by_track.append((where, label, sorted(keys, key=lambda key: key[0])))
    last_key = max((keys[-1][0] for _, _, keys in keys_by_track if keys), default=0)
    for where, label, keys in keys_by_track:
        ends = [after for after, _ in keys[1:]] + [max(last_key, end or 0) + 1]
        for (first, shape), after in zip(keys, ends):
            if shape.get("outside") != "1":
                # A polygon is valid until the next one of its track; a mask only in its frame.
                last = after if shape.tag == "polygon" else first + 1
                yield _Span(first, last, _integer(shape, "z_order", where, "0"), shape, label)


def _task_frames(root: Element, spans: list[_Span], source: Path) -> Iterator[int]:
    """Numbers of the task's frames that have a shape, ascending; a task may take every nth frame of its video."""
    start = _meta(root, "start_frame", source) or 0
    step = _meta(root, "frame_filter", source, "step=") or 1
    following = start
    for span in spans:
        first = max(following, span.first)
        for number in range(first + (start - first) % step, span.last, step):
            yield number
            following = number + 1


def _meta(root: Element, name: str, source: Path, prefix: str = "") -> int | None:
    text = (root.findtext(f"./meta/task/{name}") or "").strip()
    if not text:
        return None
    value = parse_count(text.removeprefix(prefix))
    if value is None:
        raise ValueError(f"{source}: {name} is {text[:80]!r}, expected {prefix or 'a '}number")
    return value


def _numbers(size: tuple[str | None, ...], where: str) -> tuple[int, int] | None:
    """Height and width from texts, None if they are not given."""
    height, width = (text or "" for text in size)
    if not height and not width:
        return None
    size_found = parse_count(height), parse_count(width)
    if size_found[0] is None or size_found[1] is None:
        raise ValueError(f"{where}: a picture of {height[:80]!r}x{width[:80]!r}, expected numbers")
    return size_found[0], size_found[1]


def _sweep(spans: list[_Span], numbers: Iterable[int]) -> Iterator[tuple[int, list[_Span]]]:
    """Of every number the spans that hold it, in the file's order."""
    place, active = 0, list[tuple[int, _Span]]()
    for number in numbers:
        while place < len(spans) and spans[place].first <= number:
            active.append((place, spans[place]))
            place += 1
        active = [(order, span) for order, span in active if span.last > number]
        yield number, [span for _, span in active]


def _is_area(shape: Element, report: ImportReport) -> bool:
    if shape.tag in OTHERS:
        report.noticed[f"shapes of kind {shape.tag}, left out"] += 1
    return shape.tag in AREAS


def _integer(shape: Element, name: str, where: str, default: str = "") -> int:
    text = shape.get(name) or default
    try:
        value = int(text)
    except ValueError as error:
        raise ValueError(f"{where}: a shape has {name} {text!r}, expected a number") from error
    if name == "frame" and value < 0:
        raise ValueError(f"{where}: a shape has frame {value}")
    return value


def _draw_all(canvas: Canvas, shapes: list[tuple[int, Element, int]], where: str) -> None:
    for _, shape, label in sorted(shapes, key=lambda item: item[0]):
        _draw(canvas, shape, label, where)


def _draw(canvas: Canvas, shape: Element, label: int, where: str) -> None:
    height, width = canvas.labels.shape
    try:
        if shape.tag == "polygon":
            points = [point.split(",") for point in shape.attrib["points"].split(";")]
            if not all(len(point) == 2 for point in points):
                raise ValueError("a point has no two coordinates")
            canvas.polygons([[float(value) for point in points for value in point]], label, where)
            return
        runs = [int(run) for run in shape.attrib["rle"].split(",")]
        left, top, w, h = (int(float(shape.attrib[name])) for name in ("left", "top", "width", "height"))
        if min(runs) < 0 or sum(runs) != w * h or min(left, top, w, h) < 0 or left + w > width or top + h > height:
            raise ValueError(
                f"a mask of {w}x{h} at ({left}, {top}) with {sum(runs)} pixels, in a picture of {width}x{height}"
            )
    except KeyError as error:
        raise ValueError(f"{where}: a {shape.tag} has no {error}") from error
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: a {shape.tag} cannot be read: {error}") from error
    inner = np.repeat(np.arange(len(runs)) % 2, runs).reshape(h, w).astype(bool)
    mask = np.zeros((height, width), bool)
    mask[top : top + h, left : left + w] = inner
    canvas.mask(mask, label)
