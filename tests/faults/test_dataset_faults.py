"""Imported data sets and exported annotations with a fault at each step: the complete folder, or none."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import exporter_fixtures
import numpy as np
import pytest
from injection import fail_everywhere, fill_everywhere, kill_everywhere
from PIL import Image

from the_mask.data.exporters import FORMATS
from the_mask.data.importers import import_dataset
from the_mask.data.importers.video import Sampling

SLOW = pytest.param(1, marks=pytest.mark.slow)
H, W = 6, 8


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)).save(path)


def labels(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 2, (H, W), dtype=np.uint8)).save(path)


def opened(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    """A video of five frames."""
    for number in range(5):
        yield np.full((H, W, 3), number, np.uint8), number / 10


# Sources: pictures that are copied; an archive, whose only video is cut in time; a video with two labelled frames.


def masks(folder: Path) -> None:
    for video in ("v", "w"):
        for number in range(2):
            picture(folder / f"source/frames/{video}/{number}.png", number)
            labels(folder / f"source/masks/{video}/{number}.png", number)


def import_masks(source: Path, out: Path) -> None:
    import_dataset(source / "masks", "ids", out, options={"frames": source / "frames", "names": ["a", "b"]})


def archive(folder: Path) -> None:
    box = [[0, 0, 4, 0, 4, 4, 0, 4]]
    content = {
        "images": [{"id": n, "file_name": f"v/{n}.png", "height": H, "width": W} for n in range(3)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [{"id": n, "image_id": n, "category_id": 1 + n % 2, "segmentation": box} for n in range(3)],
    }
    for number in range(3):
        picture(folder / f"{number}.png", number)
    with zipfile.ZipFile(folder / "source", "w") as file:
        file.writestr("a.json", json.dumps(content))
        for number in range(3):
            file.write(folder / f"{number}.png", f"v/{number}.png")
            (folder / f"{number}.png").unlink()
    (folder / "source").rename(folder / "source.zip")


def import_archive(source: Path, out: Path) -> None:
    import_dataset(source.with_suffix(".zip"), "coco", out)


def video(folder: Path) -> None:
    (folder / "source").mkdir()
    (folder / "source/v.mp4").touch()
    for number in (1, 3):
        labels(folder / f"source/masks/v/{number:04d}.png", number)


def import_video(source: Path, out: Path) -> None:
    import_dataset(
        source / "masks",
        "ids",
        out,
        options={"names": ["a", "b"]},
        video=source / "v.mp4",
        open_video=opened,
        sampling=Sampling(2),
    )


IMPORTS = {"masks": (masks, import_masks), "archive": (archive, import_archive), "video": (video, import_video)}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def once(write: Callable[[Path], None]) -> Callable[[Path], None]:
    """Run the command unless its folder exists, as a user does after an error."""
    return lambda folder: None if (folder / "out").exists() else write(folder)


def checker(whole: dict[str, str]) -> Callable[[Path, bool], None]:
    """The folder equals that of a run without faults or is absent; a complete run leaves nothing next to it."""

    def check(folder: Path, done: bool) -> None:
        if done or (folder / "out").exists():
            assert digests(folder / "out") == whole
        if done:
            assert [path.name for path in folder.iterdir() if path.name.startswith("out")] == ["out"]

    return check


def importing(kind: str, root: Path) -> tuple[Callable[[Path], None], ...]:
    """Action, check and preparation of :func:`fail_everywhere`."""
    prepare, run = IMPORTS[kind]

    def write(folder: Path) -> None:
        run(folder / "source", folder / "out")

    (root / "whole").mkdir()
    prepare(root / "whole")
    write(root / "whole")
    whole = digests(root / "whole/out")
    assert len(whole) >= 8
    return once(write), checker(whole), prepare


@pytest.mark.parametrize("every", [SLOW, 13])
@pytest.mark.parametrize("kind", IMPORTS)
def test_imports(tmp_path: Path, kind: str, every: int) -> None:
    action, check, prepare = importing(kind, tmp_path)
    assert fail_everywhere(action, check, prepare, tmp_path, every) > 30
    assert kill_everywhere(action, check, prepare, tmp_path, 2 * every) > 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", IMPORTS)
def test_imports_on_a_full_disk(tmp_path: Path, kind: str) -> None:
    assert fill_everywhere(*importing(kind, tmp_path), tmp_path) >= 5


def annotating(form: str, root: Path) -> tuple[Callable[[Path], None], ...]:
    """As :func:`importing`, for the files of an annotation tool."""

    def write(folder: Path) -> None:
        with FORMATS[form](folder / "out", exporter_fixtures.CLASSES) as exporter:
            for frame in exporter_fixtures.frames():
                exporter.write(frame)

    (root / "whole").mkdir()
    write(root / "whole")
    whole = digests(root / "whole/out")
    assert whole
    return once(write), checker(whole), lambda folder: None


@pytest.mark.parametrize("every", [SLOW, 7])
@pytest.mark.parametrize("form", FORMATS)
def test_annotations(tmp_path: Path, form: str, every: int) -> None:
    action, check, prepare = annotating(form, tmp_path)
    assert fail_everywhere(action, check, prepare, tmp_path, every) >= 10
    assert kill_everywhere(action, check, prepare, tmp_path, 2 * every) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_annotations_on_a_full_disk(tmp_path: Path, form: str) -> None:
    assert fill_everywhere(*annotating(form, tmp_path), tmp_path) >= 1
