"""An archive run with a fault at each step: files with their final names are complete, and the records are true."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from injection import fail_everywhere, kill_everywhere

sys.path.append(str(Path(__file__).resolve().parents[1] / "inference"))

from archive_cases import InlineWorkers, make_archive, opened, setup_for

from the_mask.inference.archive import segment_archive
from the_mask.inference.archive.worker import output_digest

VIDEOS, FRAMES = 2, 2


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return make_archive(tmp_path / "in", VIDEOS, FRAMES, ("labels", ".json", ".mp4"))


def segment(manifest: Path, folder: Path) -> None:
    tasks, results = opened(folder / "out", manifest)
    workers = InlineWorkers(setup_for(folder / "out"))
    summary = segment_archive(tasks, results, workers, retries=0, progress=False)
    if summary.failed:  # the fault hit the worker, which records it and goes on
        raise OSError(str(summary.errors))


def check(folder: Path, done: bool) -> None:
    out = folder / "out"
    for labels in out.glob("labels/*"):
        assert len(list(labels.glob("*.png"))) == FRAMES
    for table in out.glob("*.json"):
        assert len(json.loads(table.read_text())["frames"]) == FRAMES
    lines = (out / "results.jsonl").read_text().splitlines()[1:] if (out / "results.jsonl").exists() else []
    noted = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            assert line == lines[-1]
            assert not done
            continue
        if record["status"] == "done":
            noted.append(record["video"])
            assert record["sha256"] == {name: output_digest(out / name) for name in record["output"]}
    assert len(set(noted)) == len(noted)
    if done:
        assert len(noted) == VIDEOS
        # An empty folder may be left where that cannot be removed; the next run tries again.
        left = [path for path in out.iterdir() if path.name.endswith(".writing")]
        assert not [path for folder in left for path in folder.rglob("*") if not path.is_dir()]


def test_errors_of_the_disk(tmp_path: Path, manifest: Path) -> None:
    assert fail_everywhere(lambda folder: segment(manifest, folder), check, lambda folder: None, tmp_path, 7) > 30


@pytest.mark.slow
def test_errors_of_the_disk_at_every_step(tmp_path: Path, manifest: Path) -> None:
    assert fail_everywhere(lambda folder: segment(manifest, folder), check, lambda folder: None, tmp_path) > 30


@pytest.mark.alone
def test_kills(tmp_path: Path, manifest: Path) -> None:
    assert kill_everywhere(lambda folder: segment(manifest, folder), check, lambda folder: None, tmp_path, 11) > 30


@pytest.mark.slow
@pytest.mark.alone
def test_kills_at_every_step(tmp_path: Path, manifest: Path) -> None:
    assert kill_everywhere(lambda folder: segment(manifest, folder), check, lambda folder: None, tmp_path) > 30
