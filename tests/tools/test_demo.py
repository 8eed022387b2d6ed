"""The demo: library part with a fake segmentor, command line with a tiny random model."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from the_mask.config import load_config
from the_mask.data.classes import load_class_list
from the_mask.data.io import read_image
from the_mask.inference import demo
from the_mask.inference.demo import DemoStyle, EvenSample, FrameAnnotator, palette_from_config, run_demo
from the_mask.inference.rendering.render import Palette
from the_mask.inference.rendering.video_writer import FrameSource, VideoWriter, open_source
from the_mask.inference.stream import build_random
from the_mask.modeling.stream import NO_HINTS, Stream

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "debug" / "the_mask_debug_video.yaml"
PALETTE = Palette(["left", "right"], [[250, 30, 30], [30, 30, 250]])


class Halves(Stream):
    """Left half class 0, right half class 1; counts the frames of the stream."""

    def __init__(self):
        self.streams = 0

    def init_state(self):
        self.streams += 1
        return self.new_state()

    def step(self, frame, state, hints=NO_HINTS):
        state = self.continue_state(state, frame.shape[:2])
        labels = np.zeros(frame.shape[:2], dtype=np.uint8)
        labels[:, frame.shape[1] // 2 :] = 1
        return torch.from_numpy(labels), state


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "frames"
    path.mkdir()
    for index in range(9):
        Image.fromarray(np.full((48, 64, 3), 10 * index, dtype=np.uint8)).save(path / f"{index}.png")
    return path


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("demo_tool", ROOT / "tools" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the debug model."""
    from detectron2.modeling import build_model

    import the_mask.modeling  # noqa: F401

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": build_model(load_config(CONFIG)).state_dict()}, path)
    return path


def test_run_demo(folder, tmp_path):
    output, sheet = tmp_path / "new" / "out.mp4", tmp_path / "new" / "sheet.png"
    segmentor = Halves()
    with open_source(folder) as source:
        report = run_demo(segmentor, source, PALETTE, output, contact_sheet=sheet, style=DemoStyle(alpha=1.0))
    assert (report.frames, report.interrupted, segmentor.streams) == (9, False, 1)
    frames = list(open_source(output))
    assert len(frames) == 9
    # 48 rows are shown five times as large, next to a legend of 180 pixels.
    assert frames[0].shape == (240, 320 + 180, 3)
    assert np.abs(frames[4][100, 60].astype(int) - [250, 30, 30]).max() < 25
    assert np.abs(frames[4][100, 260].astype(int) - [30, 30, 250]).max() < 25
    assert read_image(sheet).shape[1] > 4 * 320


def test_options(folder, tmp_path):
    style = DemoStyle(legend=False, show_input=True)
    with open_source(folder) as source:
        report = run_demo(Halves(), source, PALETTE, tmp_path / "out.mkv", style=style, max_frames=4)
    assert report.frames == 4
    frames = list(open_source(tmp_path / "out.mkv"))
    assert len(frames) == 4
    assert frames[0].shape[1] == 2 * 320 + 6
    assert np.abs(frames[3][100, :300].astype(int) - 30).max() < 20, "the input is shown as it is"


def test_what_was_done_is_kept(tmp_path):
    def frames():
        for _ in range(5):
            yield np.zeros((32, 32, 3), dtype=np.uint8)
        raise ValueError("frame 5 is broken")

    closed = []
    source = FrameSource("test", frames(), 10, None, lambda: closed.append(True))
    output = tmp_path / "out.mp4"
    with pytest.raises(ValueError, match=r"frame 5 is broken; the 5 frames before it are in .*out\.mp4"):
        run_demo(Halves(), source, PALETTE, output)
    assert len(list(open_source(output))) == 5


def test_frames_that_change_size(tmp_path):
    sizes = [(48, 64), (48, 64), (96, 64), (32, 32)]
    source = FrameSource("test", (np.zeros((*s, 3), dtype=np.uint8) for s in sizes), 10, 4, lambda: None)
    sheet = tmp_path / "sheet.png"
    assert run_demo(Halves(), source, PALETTE, tmp_path / "out.mp4", contact_sheet=sheet).frames == 4
    assert sheet.exists()


def test_legend_follows_the_screen_without_flicker():
    annotator = FrameAnnotator(PALETTE, DemoStyle(alpha=0), fps=4)
    frame = np.zeros((240, 240, 3), dtype=np.uint8)
    one, both = np.zeros((240, 240), dtype=np.uint8), np.zeros((240, 240), dtype=np.uint8)
    both[:100] = 1

    def blue(labels):
        legend = annotator.draw(frame, labels)[:, 240:]
        return (30, 30, 250) in {tuple(p) for p in legend.reshape(-1, 3)}

    assert [blue(x) for x in (one, both, one, one, one, one, one)] == [False, True, True, True, True, False, False]


@pytest.mark.parametrize("length", [0, 1, 5, 12, 13, 24, 25, 1000])
def test_even_sample(length):
    sample = EvenSample(12)
    for number in range(length):
        sample.add(number)
        assert len(sample._kept) <= 24
    items = sample.items()
    assert len(items) == min(length, 12)
    assert items == sorted(set(items))
    if length > 12:
        assert items[0] == 0
        assert items[-1] > 0.9 * length - 12
        gaps = np.diff(items)
        assert gaps.max() <= 2 * gaps.min() + 1


def test_palette_from_config():
    cfg = load_config(None, ["DATASETS.TEST", ("camvid_val",), "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 11])
    assert tuple(palette_from_config(cfg).names) == load_class_list("camvid").names
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    assert palette_from_config(cfg).names == ["class 0", "class 1", "class 2"]
    with pytest.raises(ValueError, match=r"camvid_val has 11 classes, but .*NUM_CLASSES is 3"):
        palette_from_config(cfg, "camvid_val")
    with pytest.raises(ValueError, match="unknown data set 'camvid'"):
        palette_from_config(cfg, "camvid")


def test_command_line(tool, folder, weights, tmp_path, capsys):
    output, sheet = tmp_path / "out.mp4", tmp_path / "sheet.png"
    arguments = ["--config-file", str(CONFIG), "--weights", str(weights), "--input", str(folder)]
    arguments += ["--output", str(output), "--contact-sheet", str(sheet), "--show-input", "MODEL.DEVICE", "cpu"]
    assert tool.main(arguments) == 0
    assert "9 frames in" in capsys.readouterr().out
    assert len(list(open_source(output))) == 9
    assert sheet.exists()


@pytest.mark.parametrize("more", [[], ["--asynchronous"]])
def test_propagated_model_on_a_folder_and_a_video(tool, folder, tmp_path, capsys, more):
    """Key segmentor and propagator through the engine, from frames and from the video that they make."""
    config = ROOT / "configs" / "debug" / "gsvnet_debug.yaml"
    torch.manual_seed(0)
    torch.save({"model": build_random(load_config(config)).state_dict()}, tmp_path / "weights.pth")
    video = tmp_path / "video.mp4"
    with VideoWriter(video) as writer, open_source(folder) as source:
        for frame in source:
            writer.write(frame)
    for number, given in enumerate((folder, video)):
        output = tmp_path / f"{number}.mp4"
        arguments = ["--config-file", str(config), "--weights", str(tmp_path / "weights.pth"), "--input", str(given)]
        arguments += ["--output", str(output), *more, "MODEL.DEVICE", "cpu", "MODEL.KEYFRAME.INTERVAL", "4"]
        assert tool.main(arguments) == 0
        printed = capsys.readouterr().out
        assert re.search(
            r"9 frames, [123] of them keyframes, in" if more else r"9 frames, 3 of them keyframes, in", printed
        )
        assert len(list(open_source(output))) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--input": "nowhere.mp4"}, "nowhere.mp4 is neither"),
        ({"--output": "out.gif"}, "expected a name that ends in .mp4"),
        ({"--weights": "nowhere.pth"}, "nowhere.pth"),
        ({"--weights": None}, "MODEL.WEIGHTS is empty"),
        ({"--alpha": "2"}, "--alpha 2.0"),
        ({"--dataset": "vspw_val"}, "vspw_val has 124 classes"),
        ({"--config-file": "nowhere.yaml"}, "nowhere.yaml does not exist"),
        ({"opts": ["MODEL.NOTHING", "1"]}, "unknown config key MODEL.NOTHING"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_one_clear_line(tool, folder, weights, tmp_path, capsys, change, message):
    options = {"--config-file": str(CONFIG), "--weights": str(weights), "--input": str(folder)}
    options |= {"--output": str(tmp_path / "out.mp4"), "opts": []}
    options |= {key: str(tmp_path / v) if key == "--output" else v for key, v in change.items()}
    opts = options.pop("opts")
    arguments = [word for key, value in options.items() if value is not None for word in (key, value)]
    assert tool.main([*arguments, *opts]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--output", "frames.mp4", "is a folder"),
        ("--output", "in.mp4", "is the input"),
        ("--contact-sheet", "sheet", "expected a name that ends in .png"),
    ],
)
def test_names_are_checked_before_a_model_is_built(tool, tmp_path, capsys, monkeypatch, option, value, message):
    monkeypatch.setattr("the_mask.inference.StreamingSegmentor", lambda *_, **__: pytest.fail("a model is built"))
    (tmp_path / "frames.mp4").mkdir()
    with VideoWriter(tmp_path / "in.mp4") as writer:
        writer.write(np.zeros((32, 32, 3), dtype=np.uint8))
    options = {"--config-file": CONFIG, "--input": tmp_path / "in.mp4", "--output": tmp_path / "out.mp4"}
    options[option] = tmp_path / value
    assert tool.main([str(word) for pair in options.items() for word in pair]) == 1
    assert message in capsys.readouterr().err


def test_broken_videos(tool, weights, tmp_path, capsys):
    arguments = ["--config-file", str(CONFIG), "--weights", str(weights), "--output", str(tmp_path / "out.mp4")]
    broken = tmp_path / "broken.mp4"
    with VideoWriter(broken) as writer:
        for _ in range(20):
            writer.write(np.zeros((32, 32, 3), dtype=np.uint8))
    broken.write_bytes(broken.read_bytes()[:200])
    assert tool.main([*arguments, "--input", str(broken)]) == 1
    assert "broken.mp4 cannot be opened" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert tool.main([*arguments, "--input", str(tmp_path / "empty")]) == 1
    assert "holds no image" in capsys.readouterr().err


def test_full_disk_leaves_no_file(folder, tmp_path, monkeypatch):
    def full(self, frame):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo.VideoWriter, "write", full)
    with open_source(folder) as source, pytest.raises(OSError, match="No space left"):
        run_demo(Halves(), source, PALETTE, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()
