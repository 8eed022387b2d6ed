"""moving_shapes: deterministic, complete, and such that neighbouring frames help."""

import hashlib
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from the_mask.data import get_records, load_class_list, register_all
from the_mask.data.datasets.moving_shapes import folder_name, version_of
from the_mask.data.io import read_image
from the_mask.data.shapes import (
    FAMILY_COLORS,
    SHAPES,
    WARM_COLD_COLORS,
    random_shape,
    shape_alpha,
    shape_color,
)
from the_mask.data.synthetic import (
    FIRST_SHAPE_VALUE,
    SceneSize,
    contact_sheet,
    make_moving_shapes,
    render_video,
    without_red_green,
)

SMALL = SceneSize(frames=3, height=48, width=64)


def digest(root):
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        assert make_moving_shapes(tmp_path / folder, 7, 2, 1, SMALL)
    make_moving_shapes(tmp_path / "three", 8, 2, 1, SMALL)
    first = digest(tmp_path / "one")
    assert first == digest(tmp_path / "two")
    other = digest(tmp_path / "three")
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first if name.endswith((".jpg", ".json")))


def test_the_tree_is_registered_and_complete(tmp_path):
    make_moving_shapes(tmp_path / "moving_shapes", 0, 2, 1, SMALL)
    register_all(tmp_path)
    try:
        train, val = get_records("moving_shapes_train"), get_records("moving_shapes_val")
        assert [(r["video_id"], len(r["frames"])) for r in train] == [("train_000", 3), ("train_001", 3)]
        assert [(r["video_id"], len(r["frames"])) for r in val] == [("val_000", 3)]
    finally:
        register_all()


def test_an_existing_tree_is_kept_or_refused(tmp_path):
    root = tmp_path / "moving_shapes"
    assert make_moving_shapes(root, 0, 1, 1, SMALL) is True
    before = digest(root)
    assert make_moving_shapes(root, 0, 1, 1, SMALL) is False
    with pytest.raises(FileExistsError, match="--force"):
        make_moving_shapes(root, 1, 1, 1, SMALL)
    assert digest(root) == before
    assert make_moving_shapes(root, 1, 1, 1, SMALL, force=True) is True
    assert json.loads((root / "moving_shapes.json").read_text())["seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["moving_shapes"]


def test_a_failure_leaves_nothing_half_written(tmp_path, monkeypatch):
    calls = []

    def full_disk(folder, video):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError("No space left on device")
        folder.mkdir(parents=True)

    monkeypatch.setattr("the_mask.data.synthetic._write_video", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_moving_shapes(tmp_path / "moving_shapes", 0, 2, 1, SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(0, 0, 1, SMALL), (0, 1, 1, SceneSize(0)), (0, 1, 1, SceneSize(3, 16, 64))])
def test_bad_sizes_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match="need >= 1 video per split"):
        make_moving_shapes(tmp_path / "x", *arguments)


def test_classes_match_the_class_list():
    names = load_class_list("moving_shapes").names
    assert names[FIRST_SHAPE_VALUE - 1 :] == SHAPES
    assert len(SHAPES) == 2 * len(FAMILY_COLORS) >= 8


@pytest.fixture(scope="module")
def videos():
    return [render_video(0, 0, number, SceneSize()) for number in range(10)]


def test_every_class_occurs_and_void_is_thin(videos):
    labels = np.stack([v.labels for v in videos])
    assert set(np.unique(labels)) == set(range(12))
    assert 0.001 < (labels == 0).mean() < 0.03
    assert 0.15 < (labels >= FIRST_SHAPE_VALUE).mean() < 0.6


def test_neighbours_show_what_a_frame_hides(videos):
    """A good part of the object pixels is hidden, and most of those are visible in place three frames away."""
    objects = hidden = resolved = 0
    for video in videos:
        for t in range(3, 21):
            shapes = video.labels[t] >= FIRST_SHAPE_VALUE
            lost = shapes & video.hidden[t]
            shown = [~video.hidden[n] & (video.labels[n] == video.labels[t]) for n in (t - 3, t + 3)]
            objects += shapes.sum()
            hidden += lost.sum()
            resolved += (lost & (shown[0] | shown[1])).sum()
    assert 0.08 < hidden / objects < 0.3
    assert resolved / hidden > 0.7


def test_frames_change_and_the_scene_stays(videos):
    for video in videos:
        same = (video.labels[1:] == video.labels[:-1]).mean()
        assert 0.75 < same < 0.999
        assert (np.abs(video.images[1:].astype(int) - video.images[:-1]).mean((1, 2, 3)) > 2).all()


def test_only_motion_tells_spinner_from_slider():
    u, v = np.meshgrid(np.linspace(-1, 1, 21), np.linspace(-1, 1, 21))
    slider, spinner = SHAPES.index("slider"), SHAPES.index("spinner")
    assert (shape_alpha(slider, u, v, 10) == shape_alpha(spinner, u, v, 10)).all()
    shapes = [random_shape(np.random.default_rng(1), k, np.zeros(2), np.ones(2) * 50, 96) for k in (slider, spinner)]
    painted = replace(shapes[1], color=shapes[0].color, grain=shapes[0].grain)
    assert (shape_color(shapes[0], u, v) == shape_color(painted, u, v)).all()
    assert shapes[0].angle(9) == shapes[0].angle(0)
    turned = abs(np.rad2deg(shapes[1].angle(3) - shapes[1].angle(0)))
    assert 25 < turned < 60  # and stays clear of the wheel's symmetry of 120 degrees


def test_outlines_are_distances_inside_the_unit_circle():
    u, v = np.meshgrid(np.linspace(-1.5, 1.5, 151), np.linspace(-1.5, 1.5, 151))
    areas = {}
    for kind, name in enumerate(SHAPES):
        alpha = shape_alpha(kind, u, v, 30.0)
        assert alpha[np.hypot(u, v) > 1.2].max() == 0
        areas[name] = alpha.mean() * 9
    assert areas["disk"] == pytest.approx(np.pi, rel=0.03)
    assert areas["ring"] == pytest.approx(np.pi * (1 - 0.16), rel=0.03)
    assert areas["square"] == pytest.approx(1.6**2, rel=0.03)
    assert areas["triangle"] == pytest.approx(3 * np.sqrt(3) / 4, rel=0.05)
    assert areas["star"] == pytest.approx(5 * 0.45 * np.sin(np.pi / 5), rel=0.05)


def test_shapes_stay_in_their_box():
    shape = random_shape(np.random.default_rng(2), 0, np.array([10.0, 5.0]), np.array([20.0, 9.0]), 96)
    path = np.array([shape.position(t) for t in range(300)])
    assert (path >= [10, 5]).all()
    assert (path <= [20, 9]).all()
    steps = np.abs(np.diff(path, axis=0))
    assert (steps <= np.abs(shape.velocity) + 1e-9).all()


def test_contact_sheet():
    assert contact_sheet(0, 2, SMALL, frames=3).shape == (4 * 48, 3 * 64, 3)


def test_a_spoiled_frame_of_version_3_does_not_tell_warm_from_cold():
    """Against OpenCV's red difference: clear frames have it, spoiled ones do not; blue difference and luma stay."""
    signs = {True: [], False: []}
    for number in range(6):
        video = render_video(0, 0, number, SceneSize(), version=3)
        for image, label, hidden, spoiled in zip(video.images, video.labels, video.hidden, video.spoiled, strict=True):
            red = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)[..., 1].astype(float)
            # Less the frame's own tint.
            red -= np.median(red)
            warm, cold = (
                red[(label >= FIRST_SHAPE_VALUE) & ((label - FIRST_SHAPE_VALUE) % 2 == member) & ~hidden]
                for member in (0, 1)
            )
            if min(len(warm), len(cold)) > 50:
                signs[bool(spoiled)].append(warm.mean() - cold.mean())
    assert min(len(found) for found in signs.values()) > 20
    assert np.mean(signs[False]) > 30
    assert abs(np.mean(signs[True])) < 4
    assert 0.4 < np.mean([render_video(0, 0, n, SceneSize(), 3).spoiled.mean() for n in range(6)]) < 0.6


def test_without_red_green_a_pair_has_one_colour_and_its_luma():
    weights = np.array([0.299, 0.587, 0.114])
    colors = WARM_COLD_COLORS[None].astype(np.float32)
    blind = without_red_green(colors)
    np.testing.assert_allclose(blind[:, ::2], blind[:, 1::2], atol=0.01)
    np.testing.assert_allclose(blind @ weights, colors @ weights, atol=0.01)
    assert np.abs(colors[:, ::2] - colors[:, 1::2]).max(-1).min() > 60
    assert WARM_COLD_COLORS.min() >= 0
    assert WARM_COLD_COLORS.max() <= 255


def test_versions_have_names_of_their_own(tmp_path):
    with pytest.raises(ValueError, match="no version 1; known: 2, 3"):
        make_moving_shapes(tmp_path / "x", 0, 1, 1, SMALL, version=1)
    assert [version_of(name) for name in ("moving_shapes_val", "moving_shapes_v3_val", "camvid_val")] == [2, 3, 2]
    for version in (2, 3):
        make_moving_shapes(tmp_path / folder_name(version), 0, 1, 1, SMALL, version=version)
    with pytest.raises(FileExistsError, match="--force"):
        make_moving_shapes(tmp_path / folder_name(2), 0, 1, 1, SMALL, version=3)
    register_all(tmp_path)
    try:
        old, new = (get_records(f"{folder_name(version)}_val")[0]["frames"][0]["file_name"] for version in (2, 3))
        assert old != new
        assert (read_image(old) != read_image(new)).any()
    finally:
        register_all()
