"""Comparison videos: panels in order, wrong pixels hatched, files named when missing."""

import numpy as np
import pytest
from PIL import Image

from the_mask.data import get_records, register_video_tree
from the_mask.data.io import read_image
from the_mask.inference.rendering import render
from the_mask.inference.rendering.comparison import compare_videos, read_frames
from the_mask.inference.rendering.video_writer import open_source

NAME = "comparison_toy"


@pytest.fixture
def tree(tmp_path):
    """Two videos of three frames; model "good" is right, model "bad" always says class 1."""
    truth = np.zeros((40, 60), dtype=np.uint8)
    truth[:, 30:] = 1
    truth[:5] = 255
    for video in ("a", "b"):
        for index in range(3):
            folders = {"set/val/%s/origin": np.full((40, 60, 3), 128, np.uint8), "set/val/%s/mask": truth}
            folders |= {"good/%s": truth, "bad/%s": np.ones_like(truth)}
            for folder, pixels in folders.items():
                path = tmp_path / (folder % video) / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    register_video_tree(NAME, tmp_path / "set", "val", ["left", "right"])
    return tmp_path


def test_frames_carry_everything(tree):
    record = get_records(NAME)[0]
    table = [0, 1, *[-1] * 253, 255]
    frames = list(read_frames(record, {"bad": tree / "bad"}, table))
    assert [frame.number for frame in frames] == [0, 1, 2]
    assert frames[0].predictions["bad"].min() == 1
    assert frames[0].truth[0, 0] == 255
    (tree / "bad" / "a" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"bad/a/1\.png"):
        list(read_frames(record, {"bad": tree / "bad"}, table))


def test_video_and_sheet(tree):
    video, sheet = tree / "out" / "v.mp4", tree / "out" / "sheet.png"
    folders = {"good": tree / "good", "bad": tree / "bad"}
    assert compare_videos(NAME, get_records(NAME), folders, video, sheet) == 6
    frames = list(open_source(video))
    assert len(frames) == 6
    # 40 rows are enlarged six times; four panels with gaps of six pixels, a title above, the legend below.
    assert frames[0].shape[1] == 4 * 360 + 3 * 6
    body = frames[0][-280:-60]
    panels = [body[:, i * 366 : i * 366 + 360].astype(int) for i in range(4)]
    assert np.abs(panels[0] - 128).max() < 12
    assert np.abs(panels[1] - panels[2]).mean() < 6, "a perfect prediction looks like the ground truth"
    assert (panels[3][:, :180].min(axis=2) > 150).mean() > 0.15, "wrong pixels are hatched"
    assert (panels[3][:, 190:].min(axis=2) > 150).mean() < 0.01, "right ones are not"
    assert read_image(sheet).shape[1] >= 4 * 300


def test_hatch_marks_only_the_given_pixels():
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    where = np.zeros((10, 15), dtype=bool)
    where[:, 5:] = True
    marked = render.hatch(image, where, period=4, strength=1.0)
    assert marked[:, :10].max() == 0
    assert (marked[:, 10:, 0] == 255).mean() == 0.5
    assert image.max() == 0
