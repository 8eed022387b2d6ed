"""the-mask segment: every kind of output holds what the model says, and what is wrong is said before it runs."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from the_mask import models
from the_mask.cli import main
from the_mask.config import load_config
from the_mask.data.clips import Clip
from the_mask.inference import StreamingSegmentor
from the_mask.inference.rendering.video_writer import open_source
from the_mask.inference.sinks import LabelFolder
from the_mask.inference.stream import build_random
from the_mask.weights.packing import pack_model
from the_mask.weights.pretrained import save_pretrained

CONFIG = "configs/debug/swiftnet_debug.yaml"
SIZES = ["INPUT.TEST.SHORT_EDGE", "64", "INPUT.TEST.LONG_EDGE", "96", "MODEL.DEVICE", "cpu"]
FRAMES = 4


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    torch.manual_seed(0)
    cfg = load_config(CONFIG, SIZES)
    cfg.MODEL.WEIGHTS = str(tmp_path_factory.mktemp("weights") / "model.pth")
    torch.save({"model": build_random(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    return cfg


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("frames")
    pictures = np.random.default_rng(0).integers(0, 256, (FRAMES, 48, 64, 3), dtype=np.uint8)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(path / f"{index}.png")
    return path


@pytest.fixture(scope="module")
def expected(cfg, folder):
    """Labels of the frames, by the Python interface."""
    segmentor = StreamingSegmentor(cfg)
    state, labels = segmentor.init_state(), []
    with open_source(folder) as source:
        for frame in source:
            found, state = segmentor.step(frame[0] if isinstance(frame, tuple) else frame, state)
            labels.append(found.numpy())
    return labels


def test_all_outputs_of_one_run(cfg, folder, expected, tmp_path, capsys):
    words = ["segment", str(folder), "--config", CONFIG, "--weights", cfg.MODEL.WEIGHTS]
    for output in ("out.mp4", "labels/", "shares.json"):
        words += ["-o", f"{tmp_path}/{output}"]
    assert main([*words, "--contact-sheet", str(tmp_path / "sheet.png"), *SIZES]) == 0
    assert f"{FRAMES} frames in" in capsys.readouterr().out
    with open_source(tmp_path / "out.mp4") as source:
        assert len(list(source)) == FRAMES
    files = sorted((tmp_path / "labels").glob("*.png"))
    assert len(json.loads((tmp_path / "labels/classes.json").read_text())["names"]) == 11
    assert [file.name for file in files] == [f"{i:08d}.png" for i in range(FRAMES)]
    for file, labels in zip(files, expected, strict=True):
        assert Image.open(file).mode == "L"
        assert np.array_equal(np.asarray(Image.open(file)), labels)
    table = json.loads((tmp_path / "shares.json").read_text())
    assert len(table["classes"]) == 11
    assert [row["frame"] for row in table["frames"]] == list(range(FRAMES))
    assert [row["seconds"] for row in table["frames"]] == pytest.approx([i / 15 for i in range(FRAMES)], abs=1e-5)
    for row, labels in zip(table["frames"], expected, strict=True):
        shares = [row["shares"].get(name, 0.0) for name in table["classes"]]
        assert shares == pytest.approx([(labels == i).mean() for i in range(11)], abs=1e-6)


def test_a_palette_does_not_change_the_ids(cfg, folder, expected, tmp_path):
    words = ["segment", str(folder), "-o", f"{tmp_path}/labels", "--palette", "--config", CONFIG]
    assert main([*words, "--weights", cfg.MODEL.WEIGHTS, *SIZES]) == 0
    first = Image.open(tmp_path / "labels" / "00000000.png")
    assert first.mode == "P"
    assert np.array_equal(np.asarray(first), expected[0])
    colors = np.asarray(load_class_colors(), np.uint8)
    assert np.array_equal(np.asarray(first.convert("RGB")), colors[expected[0]])


def load_class_colors():
    content = json.loads(Path("the_mask/data/categories/moving_shapes.json").read_text())
    return [entry["color"] for entry in sorted(content["categories"], key=lambda entry: entry["train_id"])]


def test_models_by_name_by_folder_and_by_default(cfg, folder, expected, tmp_path, monkeypatch, capsys):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setattr(models, "FOLDER", shelf)
    assert main(["segment", str(folder), "-o", f"{tmp_path}/none"]) == 1
    assert "no model comes with this installation" in capsys.readouterr().err
    pack_model(cfg, "small-one", folder=shelf)
    save_pretrained(cfg, tmp_path / "my-model")
    for number, words in enumerate(([], ["--model", "small-one"], ["--model", str(tmp_path / "my-model")])):
        output = tmp_path / str(number)
        assert main(["segment", str(folder), *words, "-o", f"{output}/", "MODEL.DEVICE", "cpu"]) == 0
        labels = [np.asarray(Image.open(file)) for file in sorted(output.glob("*.png"))]
        same = np.mean([a == b for a, b in zip(labels, expected, strict=True)])
        assert same == 1 if number == 2 else same > 0.99  # the others are stored in float16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "a.mp4", "-o", "b.mkv"], "one video at a time"),
        (["-o", "a.gif"], "expected a name that ends in .mp4"),
        (["-o", "a.png"], "or / (a folder of label maps); --contact-sheet writes a picture"),
        (["-o", "full"], "full holds PNGs already"),
        (["-o", "a.mp4", "--alpha", "2"], "--alpha 2.0"),
        (["-o", "a.mp4", "--model", "smal-one"], "no model 'smal-one'"),
        (["a.mp4"], "a.mp4: one INPUT at a time, outputs are given with -o"),
        (["b.mp4", "c.mp4", "-o", "a.mp4"], "b.mp4: one INPUT at a time"),
        (["-o", "a.mp4", "--max-frames", "-1"], "--max-frames -1: expected 1 or more"),
        (["-o", "a.mp4", "MODEL.DEVICE", "gpu"], "MODEL.DEVICE 'gpu': expected auto, cpu or cuda"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(cfg, folder, tmp_path, monkeypatch, capsys, words, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "1.png").touch()
    model = [] if "--model" in words else ["--config", str(Path(CONFIG).resolve()), "--weights", cfg.MODEL.WEIGHTS]
    monkeypatch.chdir(tmp_path)
    assert main(["segment", str(folder), *words, *model]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_label_maps_do_not_go_into_the_input(cfg, folder, tmp_path, capsys):
    words = ["--config", CONFIG, "--weights", cfg.MODEL.WEIGHTS, *SIZES]
    tree = tmp_path / "video"
    (tree / "origin").mkdir(parents=True)
    for file in folder.iterdir():
        Image.open(file).save(tree / "origin" / f"{file.stem}.jpg")
    for output in (tree, tree / "origin"):
        assert main(["segment", str(tree), "-o", f"{output}/", *words]) == 1
        assert "is the input, whose frames the label maps would be" in capsys.readouterr().err
    assert sorted(path.suffix for path in tree.rglob("*") if path.is_file()) == [".jpg"] * FRAMES


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_model_of_a_gpu_says_what_to_set(cfg, folder, tmp_path, capsys):
    words = ["segment", str(folder), "-o", f"{tmp_path}/a.mp4", "--config", CONFIG, "--weights", cfg.MODEL.WEIGHTS]
    assert main([*words, "MODEL.DEVICE", "cuda"]) == 1
    assert "no usable GPU; set MODEL.DEVICE cpu" in capsys.readouterr().err


def test_two_programs_do_not_share_a_label_folder(tmp_path):
    labels = [[np.zeros((2, 3), np.uint8)]]
    first, second, late = (LabelFolder.of_video(tmp_path / "labels", 11) for _ in range(3))
    first.process([Clip(frame_ids=["0"])], labels)
    with pytest.raises(ValueError, match="is being written by another process"):
        second.process([Clip(frame_ids=["0"])], labels)
    first.close()
    second.close()
    with pytest.raises(ValueError, match="holds PNGs already"):
        late.process([Clip(frame_ids=["1"])], labels)
    late.close()
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["0.png"]


def test_annotations_while_segmenting(cfg, folder, expected, tmp_path, capsys):
    """What annotation tools get holds what the model says; frames of a folder keep their pictures' names."""
    words = ["segment", str(folder), "--config", CONFIG, "--weights", cfg.MODEL.WEIGHTS, *SIZES]
    for form in ("coco", "cvat-masks", "label-studio"):
        words += ["--annotations", form, str(tmp_path / form)]
    assert main(words) == 0
    text = capsys.readouterr().out
    video = folder.name
    assert str(tmp_path / "coco" / f"{video}.json") in text
    coco = COCO(str(tmp_path / "coco" / f"{video}.json"))
    assert [coco.imgs[i + 1]["file_name"] for i in range(FRAMES)] == [f"{video}/{i}.png" for i in range(FRAMES)]
    for number, labels in enumerate(expected):
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[number + 1])):
            assert np.array_equal(coco.annToMask(annotation) > 0, labels == annotation["category_id"] - 1)
        assert len(coco.getAnnIds(imgIds=[number + 1])) == len(np.unique(labels))
    with zipfile.ZipFile(tmp_path / "cvat-masks" / f"{video}.zip") as archive:
        assert f"SegmentationClass/{FRAMES - 1}.png" in archive.namelist()
    tasks = json.loads((tmp_path / "label-studio/tasks.json").read_text())
    assert len(tasks) == FRAMES
    assert tasks[0]["predictions"][0]["model_version"] == CONFIG

    for change, message in [
        (["--annotations", "voc", str(tmp_path / "x")], "--annotations voc: expected one of coco"),
        (["--annotations", "coco", str(tmp_path / "coco")], "coco is there already and not empty"),
        ([], "no output: give -o, --annotations, or both"),
    ]:
        assert main(["segment", str(folder), "--config", CONFIG, *SIZES, *change]) == 1
        assert message in capsys.readouterr().err


def test_annotations_of_a_video_are_numbered(cfg, folder, tmp_path):
    words = ["segment", "--config", CONFIG, "--weights", cfg.MODEL.WEIGHTS]
    assert main([*words, str(folder), "-o", str(tmp_path / "my drive.mp4"), *SIZES]) == 0
    source = str(tmp_path / "my drive.mp4")
    given = ["--annotations", "cvat-masks", str(tmp_path / "a"), "--annotations", "coco", str(tmp_path / "b")]
    assert main([*words, source, *given, "--max-frames", "2", *SIZES]) == 0
    with zipfile.ZipFile(tmp_path / "a/my_drive.zip") as archive:
        assert archive.read("ImageSets/Segmentation/default.txt") == b"frame_000000\nframe_000001\n"
    images = json.loads((tmp_path / "b/my_drive.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["my_drive/00000000.png", "my_drive/00000001.png"]
