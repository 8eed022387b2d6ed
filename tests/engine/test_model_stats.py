"""Counting models on the meta device, and the papers' numbers of parameters."""

from pathlib import Path

import pytest

from the_mask.config import config_names, load_config
from the_mask.engine.model_stats import BYTES_FROZEN, BYTES_TRAINED, model_stats, published

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = config_names()


# One config of each published number; the table of docs/model_zoo.md shows the others.
FIRST = {entry.pattern: name for name in reversed(NAMES) for entry in published(name)}


@pytest.mark.parametrize("name", sorted(set(FIRST.values())))
def test_sizes_are_the_published_ones(name):
    stats = model_stats(load_config(CONFIGS / f"{name}.yaml"), forward=False)
    for entry in published(name):
        assert entry.note or abs(entry.difference(stats)) <= 0.01, (entry, entry.found(stats))


def test_some_configs_are_published():
    found = [name for name in NAMES if published(name)]
    assert {"vspw/the_mask_mit_b0_video", "vspw/mask2former_r50", "vspw/mask2former_internimage_h_wide"} <= set(found)
    assert not published("debug/mask2former_debug")


def test_a_model_of_each_kind():
    single = model_stats(load_config(CONFIGS / "debug" / "the_mask_debug_1f.yaml"))
    assert single.frames == 1
    assert single.macs > 1e6
    assert single.state == BYTES_TRAINED * single.parameters
    frozen = load_config(CONFIGS / "debug" / "the_mask_debug_video.yaml", ["MODEL.THE_MASK.TRAINABLE", "['predictor']"])
    video = model_stats(frozen)
    assert video.frames == 2
    assert video.macs > 1.8 * single.macs
    assert BYTES_FROZEN * video.parameters < video.state < BYTES_TRAINED * video.parameters
    assert video.training_memory > video.state
    # Frames of a keyframe model differ.
    keyframe = model_stats(load_config(CONFIGS / "debug" / "gsvnet_debug.yaml"))
    assert keyframe.macs is None
    assert keyframe.training_memory is None


def test_activations_are_what_autograd_keeps():
    """More pixels, more kept; recomputation keeps less of the same network."""
    path = CONFIGS / "vspw" / "mask2former_internimage_t.yaml"
    small = [
        "MODEL.INTERNIMAGE.CHANNELS",
        16,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES",
        5,
        "INPUT.CROP.SIZE",
        "[128,128]",
    ]
    plain = model_stats(load_config(path, small))
    larger = model_stats(load_config(path, [*small[:-1], "[256,128]"]))
    recomputed = model_stats(load_config(path, [*small, "MODEL.INTERNIMAGE.CHECKPOINT", True]))
    assert 1.5 * plain.activations < larger.activations < 2.5 * plain.activations
    assert recomputed.activations < plain.activations
    assert recomputed.macs == plain.macs
