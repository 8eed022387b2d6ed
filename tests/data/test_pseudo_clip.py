"""Pseudo-clips against scipy's warps, landmarks followed by hand, and as the mapper and the loader give them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from the_mask.data import ClipMapper, build_train_loader, get_records
from the_mask.data.pseudo_clip import (
    Motion,
    MotionRange,
    forward_matrix,
    inverse_matrix,
    pseudo_clip,
    sample_motion,
    warp_image,
    warp_label,
)
from the_mask.data.samplers import derive_seed

HEIGHT, WIDTH = 40, 64
LARGE = MotionRange(0.2, 25.0, 15.0, 0.4)
FILL = (124, 116, 104)


def draw(seed: int) -> np.ndarray:
    """A target-to-source matrix."""
    return inverse_matrix(forward_matrix(sample_motion(np.random.default_rng(seed), LARGE), 1.0, HEIGHT, WIDTH))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_labels_equal_scipy_nearest(seed: int, dtype: type) -> None:
    label = np.random.default_rng(seed).integers(0, 200, (HEIGHT, WIDTH)).astype(dtype)
    source = draw(seed)
    # scipy counts rows first and takes what lies outside by half a pixel or more from nowhere.
    padded = np.pad(label, 40, constant_values=255)
    linear, offset = source[::-1, [1, 0]], source[::-1, 2]
    rows_columns = linear @ np.stack(np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")).reshape(2, -1)
    points = (rows_columns.T + offset).T + 40
    expected = ndimage.map_coordinates(padded, points, order=0, mode="constant", cval=255).reshape(HEIGHT, WIDTH)
    found = warp_label(label, source, 255)
    assert found.dtype == dtype
    assert (found != expected).mean() < 0.002  # a sample on the border of two pixels may fall to either
    assert (found == 255).any()
    assert (found != 255).mean() > 0.4


@pytest.mark.parametrize("seed", range(4))
def test_images_equal_scipy_bilinear(seed: int) -> None:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.uniform(0, 255, (HEIGHT, WIDTH, 3)), (3, 3, 0))
    image = (255 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint8)
    source = draw(seed)
    found = warp_image(image, source, FILL)
    linear, offset = source[::-1, [1, 0]], source[::-1, 2]
    for channel in range(3):
        padded = np.pad(image[..., channel].astype(float), 40, constant_values=FILL[channel])
        # The matrix for the padded array: both sides moved by 40.
        shifted = offset + 40 - linear @ np.full(2, 40)
        expected = ndimage.affine_transform(padded, linear, shifted, order=1, cval=FILL[channel])[40:-40, 40:-40]
        # OpenCV places samples on a grid of 1/32 pixel.
        assert np.abs(found[..., channel] - expected).max() < 6


def test_a_landmark_moves_as_the_parameters_say() -> None:
    """Rotation by 90 degrees about the centre of a square, then a shift: followed by hand, without matrices."""
    size = 21
    label = np.zeros((size, size), np.uint8)
    label[10, 15] = 7  # five pixels right of the centre
    motion = Motion(shift=(2 / size, -3 / size), rotation=math.pi / 2, shear=0.0, log_zoom=0.0)
    _, labels = pseudo_clip(np.zeros((size, size, 3), np.uint8), label, [0, 4], motion, FILL, 255)
    # y points down, so a positive turn goes from right to below: (10, 15) -> (15, 10); then 2 right and 3 up.
    assert np.argwhere(labels[1] == 7).tolist() == [[12, 12]]
    doubled = Motion(shift=(0.0, 0.0), rotation=0.0, shear=0.0, log_zoom=math.log(2))
    _, labels = pseudo_clip(np.zeros((size, size, 3), np.uint8), label, [-1, 0, 1], doubled, FILL, 255)
    assert labels[2][10, 20] == 7
    assert np.array_equal(labels[1], label)
    assert (labels[0] == 255).sum() > size**2 / 2  # half the size


def test_frames_share_one_uniform_motion() -> None:
    motion = sample_motion(np.random.default_rng(0), LARGE)
    image = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    label = np.random.default_rng(2).integers(0, 9, (HEIGHT, WIDTH)).astype(np.uint8)
    images, labels = pseudo_clip(image, label, [-4, -2, 0, 1], motion, FILL, 255)
    assert images[2] is image
    half = inverse_matrix(forward_matrix(motion, -0.5, HEIGHT, WIDTH))
    assert np.array_equal(labels[1], warp_label(label, half, 255))
    assert np.array_equal(images[1], warp_image(image, half, FILL))
    images, labels = pseudo_clip(image, label, [0], motion, FILL, 255)
    assert len(images) == len(labels) == 1


def test_draws_stay_in_their_ranges() -> None:
    motions = [sample_motion(np.random.default_rng(seed), LARGE) for seed in range(200)]
    for values, limit in (
        ([m.shift[0] for m in motions], 0.2),
        ([m.rotation for m in motions], math.radians(25)),
        ([m.shear for m in motions], math.radians(15)),
        ([m.log_zoom for m in motions], math.log(1.4)),
    ):
        assert 0.9 * limit < max(values) <= limit
        assert -limit <= min(values) < -0.9 * limit


@pytest.mark.parametrize(("field", "value"), [("shift", -0.1), ("rotation", 181.0), ("shear", 90.0), ("zoom", -0.5)])
def test_impossible_ranges_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"INPUT.PSEUDO_CLIP.MAX_{field.upper()} {value}"):
        MotionRange(**{field: value})


PSEUDO = ("INPUT.PSEUDO_CLIP.ENABLED", True, "INPUT.CLIP.DILATIONS", [-4, -2], "INPUT.CLIP.BOUNDARY", "drop")


def test_mapper_makes_clips_of_images_and_only_of_them(make_tree, clip_cfg) -> None:
    cfg = clip_cfg(make_tree("pseudo_mixed", {"image": 1, "video": 6}), *PSEUDO)
    mapper = ClipMapper.from_config(cfg, True, ["pseudo_mixed"])
    image, video = get_records("pseudo_mixed")
    clip = mapper(image, seed=5)
    assert clip.frame_ids == ("000",) * 3
    assert clip.reference == 2
    assert not torch.equal(clip.frames[0], clip.frames[2])
    assert not torch.equal(clip.labels[0], clip.labels[1])
    assert len(set(mapper(video, seed=5).frame_ids)) == 3
    again, other = mapper(image, seed=5), mapper(image, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(clip.frames + clip.labels, again.frames + again.labels))
    assert not torch.equal(clip.labels[0], other.labels[0])
    test = ClipMapper.from_config(cfg, False, ["pseudo_mixed"])
    assert not test.is_pseudo(image)


def test_mapper_applies_one_geometry_after_the_motion(make_tree, clip_cfg) -> None:
    """Without scaling, cropping, mirroring and colours, a clip is the motion of the image alone."""
    name = make_tree("pseudo_plain", {"image": 1})
    off = ("INPUT.CROP.ENABLED", False, "INPUT.RANDOM_FLIP", "none", "INPUT.COLOR_JITTER", "none")
    off += ("INPUT.RESIZE.MIN_SCALE", 1.0, "INPUT.RESIZE.MAX_SCALE", 1.0)
    mapper = ClipMapper.from_config(clip_cfg(name, *PSEUDO, *off), True, [name])
    (record,) = get_records(name)
    clip = mapper(record, seed=11)
    (image,), (label,) = mapper._read(record, [0])
    motion = sample_motion(np.random.default_rng(derive_seed(11, 3)), MotionRange())
    images, labels = pseudo_clip(image, label, [-4, -2, 0], motion, mapper.fill, 255)
    for frame, expected in zip(clip.frames, images, strict=True):
        assert np.array_equal(frame.permute(1, 2, 0).numpy(), expected)
    for found, expected in zip(clip.labels, labels, strict=True):
        assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("item", ["video", "frame"])
def test_loader(make_tree, clip_cfg, item: str) -> None:
    name = make_tree(f"pseudo_loader_{item}", {"a": 1, "b": 1})
    cfg = clip_cfg(name, *PSEUDO, "INPUT.CLIP.ITEM", item)
    batch = next(iter(build_train_loader(cfg)))
    assert all(len(clip.frames) == 3 for clip in batch)
    cfg.INPUT.PSEUDO_CLIP.ENABLED = False
    with pytest.raises(ValueError, match=r"has 1 frames, too few .* or INPUT.PSEUDO_CLIP for data sets of images"):
        build_train_loader(cfg)
    cfg.INPUT.CLIP.BOUNDARY = "clamp"
    repeated = next(iter(build_train_loader(cfg)))[0]
    assert torch.equal(repeated.labels[0], repeated.labels[2])


def test_stored_masks_do_not_move_along() -> None:
    with pytest.raises(ValueError, match=r"INPUT.PSEUDO_CLIP moves images; INPUT.PRIOR_MASKS"):
        ClipMapper(is_train=True, label_tables={}, prior_masks="masks", pseudo_motion=MotionRange())
