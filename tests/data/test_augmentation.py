"""Augmentation against PIL, torch, exact fractions, and a slow colour oracle."""

import colorsys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from the_mask.data import augmentation as aug

sides = st.integers(1, 70)


def resized(label, size):
    """A whole label map at another size."""
    return aug.transform_label(label, aug.Geometry(size, (0, 0, *size), False, size), 255)


@given(st.integers(1, 400), st.integers(1, 400))
def test_nearest_index_is_exact(source, target):
    expected = [int((Fraction(2 * i + 1, 2) * source / target) // 1) for i in range(target)]
    assert aug.nearest_exact_index(source, target).tolist() == expected


@settings(max_examples=60)
@given(sides, sides, sides, sides, st.integers(0, 2**32 - 1))
def test_label_resize_equals_pil_and_torch(height, width, new_height, new_width, seed):
    label = np.random.default_rng(seed).integers(0, 5, (height, width)).astype(np.uint8)
    ours = resized(label, (new_height, new_width))
    by_torch = F.interpolate(torch.from_numpy(label)[None, None].float(), (new_height, new_width), mode="nearest-exact")
    by_pil = np.array(Image.fromarray(label).resize((new_width, new_height), Image.Resampling.NEAREST))
    # Where a centre falls on a cell border in exact arithmetic, floating point may go either way.
    ties = np.zeros((new_height, new_width), bool)
    ties[[(2 * i + 1) * height % (2 * new_height) == 0 for i in range(new_height)]] = True
    ties[:, [(2 * i + 1) * width % (2 * new_width) == 0 for i in range(new_width)]] = True
    assert ((ours == by_torch[0, 0].numpy()) | ties).all()
    assert ((ours == by_pil) | ties).all()


def test_label_resize_of_a_blob_map_and_the_plain_nearest_it_replaces():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 6, (14, 19)).repeat(7, 0).repeat(7, 1)[:97, :131].astype(np.uint8)
    ours = resized(label, (64, 80))
    assert (ours == np.array(Image.fromarray(label).resize((80, 64), Image.Resampling.NEAREST))).all()
    plain = F.interpolate(torch.from_numpy(label)[None, None].float(), (64, 80), mode="nearest")[0, 0].numpy()
    assert (ours != plain).mean() > 0.02


def test_label_resize_keeps_wide_ids():
    label = np.array([[0, 300], [65535, 7]], np.int32)
    assert resized(label, (4, 4)).tolist() == label.repeat(2, 0).repeat(2, 1).tolist()


@pytest.mark.parametrize("size", [(31, 57), (80, 40), (17, 100), (48, 64)])
def test_image_resize_is_bilinear_without_antialiasing(size):
    image = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    expected = F.interpolate(tensor, size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
    assert np.abs(aug.resize_image(image, size) - expected).max() <= 1.5


@pytest.mark.parametrize(
    ("size", "box", "scale", "expected"),
    [
        ((480, 853), (853, 480), 1.0, (480, 853)),
        ((1080, 1920), (853, 480), 1.0, (480, 853)),
        ((1920, 1080), (853, 480), 1.0, (853, 480)),  # portrait: the long edge is the height
        ((360, 480), (853, 480), 1.0, (480, 640)),
        ((360, 480), (0, 180), 1.0, (180, 240)),
        ((360, 480), (240, 0), 1.0, (180, 240)),
        ((360, 480), (0, 0), 0.5, (180, 240)),
        ((10, 1000), (100, 100), 0.1, (1, 10)),
    ],
)
def test_fit_size(size, box, scale, expected):
    height, width = size
    assert aug.fit_size(height, width, box, scale) == expected


def test_round_up():
    assert aug.round_up((480, 853), 32) == (480, 864)


def coordinates(height, width):
    """An image and a label that both say where each pixel came from."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y, x, 0 * y], -1).astype(np.uint8), (y * width + x).astype(np.int32)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_image_and_label_undergo_the_same_geometry(seed):
    image, label = coordinates(20, 30)
    ranges = aug.GeometryRange((0, 0), (1.0, 1.0), crop=(16, 40))  # crops rows, pads columns
    geometry = aug.sample_geometry(np.random.default_rng(seed), None, (20, 30), ranges, 65535)
    assert geometry.valid == (16, 30)
    moved = aug.pad_image(aug.transform_image(image, geometry), geometry.padded, (9, 8, 7))
    moved_label = aug.transform_label(label, geometry, 65535)
    assert moved.shape == (16, 40, 3)
    assert moved_label.shape == (16, 40)
    inside = moved_label != 65535
    assert inside[:, :30].all()
    assert not inside[:, 30:].any()
    assert (moved[:, 30:] == (9, 8, 7)).all()
    assert (moved[inside][:, 0] == moved_label[inside] // 30).all()
    assert (moved[inside][:, 1] == moved_label[inside] % 30).all()
    assert (np.diff(moved[0, :30, 1].astype(int)) == (-1 if geometry.flip else 1)).all()


@given(st.integers(0, 2**32 - 1), st.integers(5, 60), st.integers(5, 60))
@settings(max_examples=60)
def test_geometry_stays_inside(seed, height, width):
    ranges = aug.GeometryRange((64, 32), (0.5, 2.0), crop=(24, 32))
    g = aug.sample_geometry(np.random.default_rng(seed), None, (height, width), ranges, 255)
    top, left, h, w = g.crop
    assert (h, w) == (min(24, g.resized[0]), min(32, g.resized[1]))
    assert 0 <= top <= g.resized[0] - h
    assert 0 <= left <= g.resized[1] - w
    assert g.padded == (24, 32)


def test_without_crop_nothing_is_cut_or_padded():
    g = aug.sample_geometry(np.random.default_rng(0), None, (20, 30), aug.GeometryRange((60, 40)), 255)
    assert g.resized == g.valid == g.padded == (40, 60)


def test_crop_and_flip_and_scale_cover_their_ranges():
    ranges = aug.GeometryRange((0, 0), (0.5, 2.0), crop=(8, 8))
    drawn = [aug.sample_geometry(np.random.default_rng(s), None, (20, 20), ranges, 255) for s in range(400)]
    heights = [g.resized[0] for g in drawn]
    assert min(heights) <= 11
    assert max(heights) >= 39
    assert 0.4 < np.mean([g.flip for g in drawn]) < 0.6
    fixed = aug.GeometryRange((0, 0), crop=(8, 8))
    crops = [aug.sample_geometry(np.random.default_rng(s), None, (20, 20), fixed, 255).crop for s in range(400)]
    assert {c[0] for c in crops} == {c[1] for c in crops} == set(range(13))
    # Rows and columns are drawn independently, not along a diagonal.
    shares = np.array([(g.crop[0] / max(g.resized[0] - 8, 1), g.crop[1] / max(g.resized[1] - 8, 1)) for g in drawn])
    assert abs(np.corrcoef(shares.T)[0, 1]) < 0.2


@pytest.mark.parametrize(
    ("label", "diverse"),
    [
        ([0, 0, 0, 1], False),  # 75 % is too much
        ([0, 0, 1, 1], True),
        ([0, 0, 255, 1, 1, 255], True),
        ([0, 255, 255, 255], False),
        ([255, 255], False),
    ],
)
def test_diversity(label, diverse):
    assert aug.is_diverse(np.array([label], np.uint8), 0.75, 255) is diverse


def test_crops_are_redrawn_until_diverse_at_most_ten_times():
    label = np.zeros((10, 100), np.uint8)
    label[:, 45:55] = 1  # diverse crops of 10 columns are rare
    ranges = aug.GeometryRange((0, 0), crop=(10, 10), max_category_share=0.75)
    plain = aug.GeometryRange((0, 0), crop=(10, 10), max_category_share=1.0)

    def diverse_share(r):
        crops = [aug.sample_geometry(np.random.default_rng(s), label, (10, 100), r, 255).crop for s in range(300)]
        return np.mean([aug.is_diverse(label[:, c[1] : c[1] + 10], 0.75, 255) for c in crops])

    single = diverse_share(plain)
    assert 0.05 < single < 0.35
    assert diverse_share(ranges) == pytest.approx(1 - (1 - single) ** 10, abs=0.12)


def test_an_undiverse_frame_still_gets_a_crop():
    label = np.full((30, 30), 255, np.uint8)
    ranges = aug.GeometryRange((0, 0), crop=(10, 10), max_category_share=0.75)
    assert aug.sample_geometry(np.random.default_rng(0), label, (30, 30), ranges, 255).valid == (10, 10)


@pytest.mark.parametrize("size", [(33, 47), (90, 61)])
def test_cropped_label_equals_resize_then_crop(size):
    label = np.random.default_rng(2).integers(0, 9, (50, 60)).astype(np.uint8)
    g = aug.Geometry(size, (3, 5, 20, 30), False, (20, 30))
    expected = resized(label, size)[3:23, 5:35]
    assert (aug.transform_label(label, g, 255) == expected).all()


def slow_jitter(pixel, jitter):
    """The distortion of one RGB pixel in floating point, steps unrounded."""
    value = np.clip(np.array(pixel, float) + jitter.brightness, 0, 255)
    if jitter.contrast_first:
        value = np.clip(value * jitter.contrast, 0, 255)
    h, s, v = colorsys.rgb_to_hsv(*(value / 255))
    value = 255 * np.array(colorsys.hsv_to_rgb((h + jitter.hue / 180) % 1, min(s * jitter.saturation, 1), v))
    return value if jitter.contrast_first else np.clip(value * jitter.contrast, 0, 255)


def test_color_jitter_follows_the_float_oracle():
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    for _ in range(30):
        brightness, contrast, saturation = rng.uniform(-32, 32), *rng.uniform(0.5, 1.5, 2)
        jitter = aug.ColorJitter(brightness, contrast, bool(rng.random() < 0.5), saturation, int(rng.integers(-18, 19)))
        expected = np.array([[slow_jitter(p, jitter) for p in row] for row in image])
        # 8-bit HSV has 180 hues: neighbouring hues differ by up to 8.5 grey levels, times the contrast.
        error = np.abs(aug.apply_color_jitter(image, jitter) - expected)
        assert error.max() < 16
        assert error.mean() < 3


@pytest.mark.parametrize(
    ("jitter", "pixel", "expected"),
    [
        (aug.ColorJitter(), (10, 20, 30), (10, 20, 30)),
        (aug.ColorJitter(brightness=-20), (10, 20, 30), (0, 0, 10)),
        (aug.ColorJitter(contrast=1.5), (10, 200, 30), (15, 255, 45)),
        (aug.ColorJitter(contrast=1.5, contrast_first=False), (10, 200, 30), (15, 255, 45)),
        (aug.ColorJitter(brightness=20, contrast=0.5), (10, 100, 250), (15, 60, 128)),
        (aug.ColorJitter(saturation=0.5), (200, 100, 100), (200, 150, 150)),
        (aug.ColorJitter(saturation=1.5), (100, 100, 100), (100, 100, 100)),
        (aug.ColorJitter(hue=-18), (255, 0, 0), (255, 0, 153)),
    ],
)
def test_color_jitter_on_known_pixels(jitter, pixel, expected):
    image = np.full((2, 3, 3), pixel, np.uint8)
    assert np.abs(aug.apply_color_jitter(image, jitter)[1, 2].astype(int) - expected).max() <= 1
    assert image[0, 0].tolist() == list(pixel)  # the input is left alone


def test_color_jitter_draws_as_specified():
    drawn = [aug.sample_color_jitter(np.random.default_rng(s)) for s in range(800)]
    for name, neutral, low, high in (
        ("brightness", 0.0, -32, 32),
        ("contrast", 1.0, 0.5, 1.5),
        ("saturation", 1.0, 0.5, 1.5),
        ("hue", 0, -18, 18),
    ):
        values = np.array([getattr(j, name) for j in drawn], float)
        assert 0.42 < (values != neutral).mean() < 0.58
        assert low <= values.min() < low + 0.1 * (high - low)
        assert high >= values.max() > high - 0.1 * (high - low)
    assert 0.4 < np.mean([j.contrast_first for j in drawn]) < 0.6
