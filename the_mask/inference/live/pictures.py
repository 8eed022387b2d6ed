"""Frames from picture files: folders, single pictures, animations."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from the_mask.data.frame_files import files_by_stem
from the_mask.data.io import IMAGE_SUFFIXES, animation, count_pictures, read_image
from the_mask.inference.live.frame_source import DEFAULT_FPS, FrameSource, OnProblem, Position, TimedFrame, check_fps

# Files that FFmpeg would read without their EXIF orientation (pictures), or not at all (animated WebP).
PICTURE_SUFFIXES = (*IMAGE_SUFFIXES, ".gif", ".apng")


def open_folder(folder: Path, fps: Fraction | None, on_problem: OnProblem | None) -> FrameSource:
    """Open a folder of images in natural order (``f9`` before ``f10``), or its ``origin`` (a video of a VSPW tree).

    Raises:
        ValueError: no image, no readable image, two images of one frame, or, without ``on_problem``, an image in an
            unsupported format.
    """
    for place in (folder, folder / "origin"):
        found, problems = files_by_stem(place, IMAGE_SUFFIXES, "frame")
        if found:
            break
    for problem in problems:
        text = f"{problem.file}: {problem.message}"
        if on_problem is None or problem.kind == "repeated frame":
            raise ValueError(text)
        on_problem(text)
    if not found:
        raise ValueError(f"folder {folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return _open_files(list(found.values()), str(folder), folder, fps, on_problem)


def open_picture(path: Path, fps: Fraction | None, on_problem: OnProblem | None) -> FrameSource:
    """Open a single picture, or an animation with its stored times.

    Raises:
        ValueError: it cannot be read.
    """
    count = count_pictures(path)
    if count == 1 and path.suffix.lower() in IMAGE_SUFFIXES:
        return _open_files([path], str(path), path, fps, on_problem)

    def frames(after: float = -1.0) -> Iterator[TimedFrame]:
        seconds = 0.0
        for number, (image, shown) in enumerate(animation(path)):
            # Browsers also give pictures without a duration a default one.
            shown = 1 / float(fps or DEFAULT_FPS) if fps is not None or shown <= 0 else shown
            seconds = float(number / fps) if fps is not None else seconds
            if seconds + shown > after + 1e-6:
                yield TimedFrame(image, seconds, shown)
            seconds += shown

    position = Position(frames())
    first = position.first(f"animation {path} holds no picture")
    rate = fps or check_fps(1 / (first.duration or 1 / DEFAULT_FPS))

    def seek(seconds: float) -> None:
        position.move(frames(seconds))

    return FrameSource(
        str(path), position, rate, count, lambda: None, seek=seek, size=first.image.shape[:2], path=path
    )  # fmt: skip


def _open_files(
    images: list[Path], name: str, path: Path, fps: Fraction | None, on_problem: OnProblem | None
) -> FrameSource:
    rate = fps or DEFAULT_FPS

    def frames(start: int = 0) -> Iterator[TimedFrame]:
        for number in range(start, len(images)):
            try:
                image = read_image(images[number])
            except (ValueError, OSError) as error:
                if on_problem is None:
                    raise
                on_problem(f"skipped: {error}")
                continue
            yield TimedFrame(image, float(number / rate), float(1 / rate))

    position = Position(frames())
    first = position.first(f"{name} holds no image that can be read")

    def seek(seconds: float) -> None:
        position.move(frames(round(seconds * rate)))

    return FrameSource(
        name, position, rate, len(images), lambda: None, seek=seek, size=first.image.shape[:2], path=path
    )  # fmt: skip
