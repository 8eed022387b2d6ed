"""The manifest of an archive: a JSON object per line, ``{"video": ..., "output": ..., "options": {...}}``.

``video`` is a file, a folder of frames or a URL; a relative path is relative to the manifest's folder. ``output`` is a
name in the output folder, or a list of such names: ``.mp4``, ``.mkv``, ``.mov`` or ``.avi`` for the annotated video,
``.json`` for the share of each class, a name without a suffix (or with "/" at its end) for a folder of label PNGs.
``options`` are fields of :class:`VideoOptions`; the defaults come from the command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from the_mask.data.files import TEMPORARY, read_text, relative_name
from the_mask.inference.demo import AUDIO
from the_mask.inference.live.frame_source import check_fps
from the_mask.inference.rendering.video_writer import VideoWriter

KEYS = ("video", "output", "options")
RESULTS = "results.jsonl"
LABELS, SHARES, VIDEO = "labels", "shares", "video"


@dataclass(frozen=True)
class VideoOptions:
    """How one video is read and shown; the options of ``the-mask segment``.

    Attributes:
        alpha: 0 shows the frame only, 1 the class colours only.
        legend: a column with the classes on screen.
        show_input: show the original frame next to the segmentation.
        palette: store colours with the ids in label PNGs.
        fps: replaces the frame rate of the input; None keeps it.
        audio: "copy" or "drop" the input's sound.
        max_frames: 0 takes all.
    """

    alpha: float = 0.55
    legend: bool = True
    show_input: bool = False
    palette: bool = False
    fps: float | None = None
    audio: str = "copy"
    max_frames: int = 0

    def replaced(self, given: Mapping[str, Any]) -> VideoOptions:
        """A copy with some options replaced.

        Raises:
            ValueError: an unknown name, or a value of another type or out of range.
        """
        for name, value in given.items():
            if name not in CHECKS:
                raise ValueError(f"unknown option {name!r}: expected some of {', '.join(CHECKS)}")
            fits, expected = CHECKS[name]
            if not fits(value):
                raise ValueError(f"option {name} is {json.dumps(value)}: expected {expected}")
        return dataclasses.replace(self, **given)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rate(value: Any) -> bool:
    if not _number(value):
        return value is None
    try:
        check_fps(value)
    except ValueError:
        return False
    return True


_TRUTH: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, bool), "true or false")
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alpha": (lambda value: _number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "legend": _TRUTH,
    "show_input": _TRUTH,
    "palette": _TRUTH,
    "fps": (_rate, "frames per second above 0, at most 10000, or null"),
    "audio": (lambda value: value in AUDIO, f"one of {', '.join(AUDIO)}"),
    "max_frames": (lambda value: type(value) is int and value >= 0, "a whole number, 0 for all"),
}


@dataclass(frozen=True)
class VideoTask:
    """One line of a manifest.

    Attributes:
        line: its number, from 1.
        video: path or URL.
        outputs: normalised names in the output folder; :func:`output_kind` tells what each is.
        options: of this video.
    """

    line: int
    video: str
    outputs: tuple[str, ...]
    options: VideoOptions

    @property
    def key(self) -> str:
        """SHA-256 of everything that the results depend on besides the model."""
        content = [self.video, sorted(self.outputs), dataclasses.asdict(self.options)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def output_kind(name: str) -> str:
    """What an output is by its name: an annotated video, a table of class shares, or a folder of labels.

    Raises:
        ValueError: another suffix.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if not suffix:
        return LABELS
    if suffix == ".json":
        return SHARES
    if suffix not in VideoWriter.FORMATS:
        raise ValueError(
            f"output {name!r}: expected a name that ends in {', '.join(VideoWriter.FORMATS)} (video), .json (class "
            "shares), or one without a suffix (folder of label PNGs)"
        )
    return VIDEO


def read_manifest(path: str | Path, defaults: VideoOptions | None = None) -> list[VideoTask]:
    """All videos of a manifest; every line is checked before any work is done. Empty lines are skipped.

    Args:
        path: JSON lines in UTF-8.
        defaults: for options that a line does not have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: names the file and the line: no JSON, an unknown or missing key, a value of another type, an output
            outside the folder, or one that is, or is inside, the output of another line; or no line at all.
    """
    path, defaults = Path(path), defaults or VideoOptions()
    tasks: list[VideoTask] = []
    lines_of: dict[str, int] = {}
    for number, text in enumerate(read_text(path, "manifest").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            task = _task(number, text, path.parent, defaults)
            for name in task.outputs:
                if name in lines_of:
                    raise ValueError(f"output {name!r} is that of line {lines_of[name]} too")
                lines_of[name] = number
        except ValueError as error:
            raise ValueError(f"manifest {path}, line {number}: {error}") from error
        tasks.append(task)
    if not tasks:
        raise ValueError(f"manifest {path} has no line")
    for name, number in lines_of.items():
        for parent in PurePosixPath(name).parents:
            if str(parent) in lines_of:
                raise ValueError(
                    f"manifest {path}, line {number}: output {name!r} lies in output {str(parent)!r} of line "
                    f"{lines_of[str(parent)]}"
                )
    return tasks


def _task(number: int, text: str, folder: Path, defaults: VideoOptions) -> VideoTask:
    entry = _json_object(text)
    strange = [key for key in entry if key not in KEYS]
    if strange:
        raise ValueError(f"unknown key {strange[0]!r}: expected {', '.join(KEYS)}")
    video = entry.get("video")
    if not isinstance(video, str) or not video or not _is_path(video):
        raise ValueError(f'"video" is {json.dumps(video)}: expected a path or URL')
    given = entry.get("output")
    outputs = [given] if isinstance(given, str) else given
    if not isinstance(outputs, list) or not outputs or not all(isinstance(name, str) for name in outputs):
        raise ValueError(f'"output" is {json.dumps(given)}: expected a name in the output folder, or a list of names')
    options = entry.get("options", {})
    if not isinstance(options, dict):
        raise ValueError(f'"options" is {json.dumps(options)}: expected an object')
    if "://" not in video:
        video = str((folder / video).absolute())
    return VideoTask(number, video, _outputs(outputs), defaults.replaced(options))


def _is_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half a character
        return False


def _json_object(text: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"key {key!r} is given twice")
            found[key] = value
        return found

    try:
        entry = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(entry, dict):
        raise ValueError(f"a line holds an object {{...}}, got {text.strip()[:60]}")
    return entry


def _outputs(given: list[str]) -> tuple[str, ...]:
    names = []
    for text in given:
        name = relative_name(text, "output")
        first = name.split("/")[0]
        if first == RESULTS or (first.startswith(".") and first.endswith((".lock", TEMPORARY))):
            raise ValueError(f"output {text!r}: this name is used by the run itself")
        if text.endswith("/") and output_kind(name) != LABELS:
            raise ValueError(f"output {text!r} is a folder of label PNGs: leave its suffix out")
        names.append(name)
    if sum(output_kind(name) == VIDEO for name in names) > 1:
        raise ValueError(f"outputs {', '.join(given)}: one video at a time")
    return tuple(names)
