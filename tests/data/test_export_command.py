"""`the-mask annotations`: from PNGs on disk to files of other tools, and what is wrong with them by name."""

import csv
import json
import zipfile

import numpy as np
import pytest
from exporter_fixtures import CLASSES, NAMES, H, W, export, videos, write_pictures
from PIL import Image

from the_mask.cli import annotations_, run_command
from the_mask.data import exporters
from the_mask.data.exporters import FORMATS


@pytest.fixture
def pictures(tmp_path):
    """Folder of pictures of :func:`videos`."""
    return write_pictures(tmp_path / "pictures")


def write_predictions(folder):
    for video, maps in videos().items():
        (folder / video).mkdir(parents=True)
        for number, labels in enumerate(maps):
            Image.fromarray(labels).save(folder / video / f"{number:05d}.png")
    return folder


def test_command(tmp_path, pictures, capsys):
    assert set(annotations_.FORMATS) == set(FORMATS)
    source = write_predictions(tmp_path / "predictions")
    words = ["annotations", str(source), "--format", "coco", "--output", str(tmp_path / "out")]
    assert run_command(words[0], words[1:]) == 1
    assert "does not say what its classes are: give --classes or --dataset" in capsys.readouterr().err
    table = tmp_path / "table.csv"
    with open(table, "w", newline="") as file:
        rows = [(name, *color) for name, color in zip(NAMES, CLASSES.colors)]
        csv.writer(file).writerows([["class", "r", "g", "b"], *rows, ["void", 0, 0, 0]])
    assert run_command(words[0], [*words[1:], "--classes", str(table), "--frames", str(pictures)]) == 0
    text = capsys.readouterr().out
    assert "2 videos, 5 frames" in text
    assert str(tmp_path / "out/cam1/a.json") in text
    export("coco", tmp_path / "direct")
    for name in ("cam1/a.json", "b.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    (pictures / "b/00001.png").unlink()
    words[-1] = str(tmp_path / "out2")
    assert run_command(words[0], [*words[1:], "--classes", str(table), "--frames", str(pictures)]) == 1
    error = capsys.readouterr().err
    assert "00001.png: " in error
    assert "holds no picture b/00001.*" in error
    Image.new("RGB", (W, H + 2)).save(pictures / "b/00001.png")
    words[-1] = str(tmp_path / "out3")
    assert run_command(words[0], [*words[1:], "--classes", str(table), "--frames", str(pictures)]) == 1
    assert f"b/00001.png is 13x21 (height x width), its picture {pictures}/b/00001.png 15x21" in capsys.readouterr().err


def test_damaged_predictions(tmp_path, capsys):
    source = write_predictions(tmp_path / "predictions")
    words = [str(source), "--format", "coco", "--classes", ",".join(NAMES), "--output"]
    (source / "b/00000.png").write_bytes((source / "b/00000.png").read_bytes()[:40])
    assert run_command("annotations", [*words, str(tmp_path / "a")]) == 1
    assert "b/00000.png cannot be read, it is truncated" in capsys.readouterr().err
    Image.fromarray(np.full((H, W), 7, np.uint8)).save(source / "b/00000.png")
    assert run_command("annotations", [*words, str(tmp_path / "c")]) == 1
    assert "b/00000.png holds label values [7]; allowed: 0..2, 255" in capsys.readouterr().err
    assert run_command("annotations", [str(tmp_path / "no"), *words[1:], str(tmp_path / "d")]) == 1
    assert "no does not exist" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert run_command("annotations", [str(tmp_path / "none"), *words[1:], str(tmp_path / "d")]) == 1
    assert "none holds no PNGs of predictions" in capsys.readouterr().err
    words[words.index(",".join(NAMES))] = "road,road"
    assert run_command("annotations", [*words, str(tmp_path / "e")]) == 1
    assert "repeated: ['road']" in capsys.readouterr().err


def test_classes_of_a_folder(tmp_path):
    source = write_predictions(tmp_path / "predictions")
    assert exporters.stored_classes(source) is None
    (source / "classes.json").write_text(json.dumps({"names": NAMES, "colors": CLASSES.colors, "ignore": 255}))
    assert exporters.stored_classes(source) == CLASSES
    (source / "classes.json").write_text(json.dumps({"names": ["a", "a"], "colors": [[1, 2, 3], [4, 5, 6]]}))
    with pytest.raises(ValueError, match=r"classes.json: a class list needs distinct names"):
        exporters.stored_classes(source)
    (source / "classes.json").unlink()
    (source / "predictions.json").write_text(json.dumps({"dataset": "camvid_val", "values": "raw"}))
    assert len(exporters.stored_classes(source).names) == 11
    # VSPW's masks hold class + 1.
    raw = exporters.dataset_classes("vspw_val", "raw")
    assert raw.label_table[1] == 0
    with pytest.raises(ValueError, match="unknown data set 'vspw_vla'"):
        exporters.dataset_classes("vspw_vla")


def test_video_frames_of_cvat(tmp_path, capsys):
    source = write_predictions(tmp_path / "predictions")
    words = [str(source), "--format", "cvat-masks", "--classes", ",".join(NAMES), "--output", str(tmp_path / "out")]
    assert run_command("annotations", [*words, "--video-task"]) == 0
    with zipfile.ZipFile(tmp_path / "out/b.zip") as archive:
        assert "SegmentationClass/frame_000001.png" in archive.namelist()
