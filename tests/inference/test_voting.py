"""Voting against brute force, and where masks come from."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from scipy.ndimage import label

from the_mask.config import load_config
from the_mask.inference.mask_generators import (
    SAM_SETTINGS,
    SavingMasks,
    StoredMasks,
    SuperpixelMasks,
    build_mask_generator,
    encode,
)
from the_mask.inference.superpixels import slic
from the_mask.inference.voting import MaskVoting, vote_masks


def slow_vote(labels, masks, classes, min_majority, scores):
    """The rule pixel by pixel; masks are bool arrays."""
    result = labels.copy()
    order = sorted(range(len(masks)), key=lambda i: (-int(masks[i].sum()), i))
    for index in order:
        pixels = [tuple(p) for p in np.argwhere(masks[index])]
        if not pixels:
            continue
        votes = [0.0] * classes
        for p in pixels:
            if scores is None:
                votes[labels[p]] += 1
            else:
                for c in range(classes):
                    votes[c] += float(scores[(c, *p)])
        winner = votes.index(max(votes))
        if votes[winner] >= min_majority * sum(votes):
            for p in pixels:
                result[p] = winner
    return result


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 7),
    st.sampled_from([0.0, 0.4, 0.5, 0.75, 1.0]),
    st.booleans(),
)
def test_voting_equals_brute_force(seed, height, width, count, min_majority, soft):
    rng = np.random.default_rng(seed)
    classes = 4
    labels = rng.integers(0, classes, (height, width)).astype(np.uint8)
    # Small frames and few sizes: equal areas, equal votes, empty and full masks all occur.
    masks = [rng.random((height, width)) < rng.choice([0, 0.3, 0.6, 1]) for _ in range(count)]
    scores = rng.integers(0, 4, (classes, height, width)).astype(np.float32) if soft else None
    before = labels.copy()
    result = vote_masks(labels, [encode(mask) for mask in masks], classes, min_majority, scores)
    assert (result == slow_vote(labels, masks, classes, min_majority, scores)).all()
    assert (labels == before).all()
    assert result.dtype == labels.dtype


def test_the_original_map_votes_and_small_masks_win():
    labels = np.array([[0, 0, 0, 0, 1, 1]], dtype=np.uint8)
    whole, right, pair = np.ones((1, 6), bool), np.zeros((1, 6), bool), np.zeros((1, 6), bool)
    right[0, 3:], pair[0, 2:4] = True, True
    # Whole: 0. Right half (0, 1, 1): 1, by the original map and not the one overwritten with 0. Pair (0, 0): 0.
    assert vote_masks(labels, [encode(m) for m in (pair, right, whole)], 2).tolist() == [[0, 0, 0, 0, 1, 1]]
    assert vote_masks(labels, [encode(m) for m in (right, whole)], 2).tolist() == [[0, 0, 0, 1, 1, 1]]


def test_no_masks_and_empty_masks():
    labels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert (vote_masks(labels, [], 6) == labels).all()
    assert (vote_masks(labels, [encode(np.zeros((2, 3), bool))], 6) == labels).all()


def test_bad_votes():
    labels = np.zeros((2, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"size \[3, 3\] for a frame of \[2, 3\]"):
        vote_masks(labels, [encode(np.ones((3, 3), bool))], 2)
    with pytest.raises(ValueError, match=r"MIN_MAJORITY 1\.5"):
        vote_masks(labels, [], 2, 1.5)
    with pytest.raises(ValueError, match="MIN_MAJORITY -1"):
        MaskVoting(SuperpixelMasks(), 2, -1)


def picture(height=40, width=60, seed=0):
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[:, width // 2 :] = (200, 60, 60)
    image[height // 3 : height // 2, 5:25] = (20, 200, 90)
    return np.clip(image + rng.integers(0, 12, image.shape), 0, 255).astype(np.uint8)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 60), st.integers(0, 100))
def test_superpixels_are_connected_and_cover_everything(height, width, segments, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    regions = slic(image, segments)
    assert regions.shape == (height, width)
    assert sorted(np.unique(regions)) == list(range(int(regions.max()) + 1))
    for region in np.unique(regions):
        assert label(regions == region)[1] == 1


def test_superpixels_follow_colours():
    image = picture()
    regions = slic(image, 60, 5.0)
    truth = np.zeros(image.shape[:2], dtype=int)
    truth[:, 30:] = 1
    truth[40 // 3 : 20, 5:25] = 2
    assert 20 <= regions.max() + 1 <= 120
    pure = sum(np.bincount(truth[regions == r]).max() for r in range(regions.max() + 1))
    assert pure / truth.size > 0.99


def test_superpixel_voting_cleans_a_noisy_map():
    image = picture()
    truth = np.zeros(image.shape[:2], dtype=np.uint8)
    truth[:, 30:] = 1
    truth[40 // 3 : 20, 5:25] = 2
    noisy = np.where(np.random.default_rng(1).random(truth.shape) < 0.2, 1, truth).astype(np.uint8)
    voting = MaskVoting(SuperpixelMasks(60, 5.0), 3)
    result = voting(image, torch.from_numpy(noisy), torch.zeros(3, 40, 60), None)
    assert (result.numpy() == truth).mean() > 0.99 > (noisy == truth).mean()
    scores = torch.nn.functional.one_hot(torch.from_numpy(noisy).long(), 3).permute(2, 0, 1).half()
    soft = MaskVoting(SuperpixelMasks(60, 5.0), 3, soft=True)
    assert torch.equal(soft(image, torch.from_numpy(noisy), scores, None), result)


def test_masks_from_files(tmp_path):
    masks = SuperpixelMasks(20).masks(picture(), None)
    saving = SavingMasks(SuperpixelMasks(20), tmp_path)
    saving.masks(picture(), ("v", "7"))
    stored = StoredMasks(tmp_path).masks(picture(), ("v", "7"))
    assert len(stored) == len(masks)
    assert all((coco.decode(a) == coco.decode(b)).all() for a, b in zip(stored, masks, strict=True))
    # SAM's own records, and uncompressed counts (column by column).
    record = [{"segmentation": {"size": [40, 60], "counts": [1, 2, 2397]}, "area": 2, "predicted_iou": 0.9}]
    (tmp_path / "v" / "8.json").write_text(json.dumps(record))
    (mask,) = StoredMasks(tmp_path).masks(picture(), ("v", "8"))
    assert np.argwhere(coco.decode(mask)).tolist() == [[1, 0], [2, 0]]
    (tmp_path / "v" / "9.json").write_text("[]")
    assert StoredMasks(tmp_path).masks(picture(), ("v", "9")) == []


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder of masks"):
        StoredMasks(tmp_path / "none")
    stored = StoredMasks(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"v.1\.json is missing"):
        stored.masks(picture(), ("v", "1"))
    with pytest.raises(ValueError, match="no name"):
        stored.masks(picture(), None)
    (tmp_path / "v").mkdir()
    for content in ("{", '[{"size": [40, 60]}]', "3", '[{"size": [2, 3], "counts": [6]}]', "[3]"):
        (tmp_path / "v" / "1.json").write_text(content)
        with pytest.raises(ValueError, match=r"mask file .*1\.json"):
            stored.masks(picture(), ("v", "1"))


def test_segment_anything_when_installed(tmp_path, monkeypatch):
    """With stand-ins for the packages: how they are called, and what becomes of their masks."""
    weights = tmp_path / "sam.pth"
    weights.touch()
    calls = []

    class Generator:
        def __init__(self, network, **settings):
            calls.append((network, settings))

        def generate(self, image):
            return [{"segmentation": encode(image[..., 0] > 100), "area": 1}]

    class Network:
        def __init__(self, **options):
            self.options = options

        def to(self, device):
            return ("network", self.options, device)

    sam = types.ModuleType("segment_anything")
    sam.sam_model_registry, sam.SamAutomaticMaskGenerator = {"vit_h": Network}, Generator
    monkeypatch.setitem(sys.modules, "segment_anything", sam)
    options = ["TEST.VOTING.MASKS", "sam", "TEST.VOTING.WEIGHTS", str(weights), "MODEL.DEVICE", "cpu"]
    (mask,) = build_mask_generator(load_config(None, options)).masks(picture(), None)
    assert (coco.decode(mask) == (picture()[..., 0] > 100)).all()
    assert calls == [(("network", {"checkpoint": str(weights)}, "cpu"), SAM_SETTINGS)]
    assert SAM_SETTINGS["points_per_side"] ** 2 + 4 * (SAM_SETTINGS["points_per_side"] // 2) ** 2 == 4096 + 4 * 1024

    build, automatic = types.ModuleType("sam2.build_sam"), types.ModuleType("sam2.automatic_mask_generator")
    build.build_sam2 = lambda config, checkpoint, device: (config, checkpoint, device)
    automatic.SAM2AutomaticMaskGenerator = Generator
    monkeypatch.setitem(sys.modules, "sam2", types.ModuleType("sam2"))
    monkeypatch.setitem(sys.modules, "sam2.build_sam", build)
    monkeypatch.setitem(sys.modules, "sam2.automatic_mask_generator", automatic)
    options[1] = "sam2"
    build_mask_generator(load_config(None, [*options, "TEST.VOTING.MODEL", "large.yaml"]))
    assert calls[-1][0] == ("large.yaml", str(weights), "cpu")


def test_segment_anything_when_missing(tmp_path, monkeypatch):
    weights = tmp_path / "sam.pth"
    options = ["TEST.VOTING.MASKS", "sam", "TEST.VOTING.WEIGHTS", str(weights)]
    with pytest.raises(FileNotFoundError, match=r"sam\.pth"):
        build_mask_generator(load_config(None, options))
    weights.touch()
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(ImportError, match="pip install segment-anything"):
        build_mask_generator(load_config(None, options))
    with pytest.raises(ValueError, match="MASKS 'fastsam'"):
        build_mask_generator(load_config(None, ["TEST.VOTING.MASKS", "fastsam"]))
