"""Counting models on the meta device, and the papers' numbers of parameters."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from the_mask.config import config_names, load_config
from the_mask.engine.model_stats import BYTES_FROZEN, BYTES_TRAINED, custom_flops, model_stats, published
from the_mask.ops import DCNv3, MSDeformAttn

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


def macs(module, *inputs):
    counter = FlopCounterMode(display=False, custom_mapping=custom_flops())
    with counter, torch.no_grad():
        module.requires_grad_(False)(*inputs)
    return counter.get_total_flops() // 2


def test_operators_are_counted():
    with torch.device("meta"):
        attention = MSDeformAttn(32, 2, 4, 3)
        queries, tokens = torch.empty(2, 11, 32), torch.empty(2, 5 * 7 + 2 * 3, 32)
        reference = torch.empty(2, 11, 2, 2)
        convolution, x = DCNv3(32, groups=4), torch.empty(2, 6, 5, 32)
    samples = 2 * 11 * 4 * 2 * 3
    linear = 2 * 11 * 32 * (48 + 24 + 32) + 2 * 41 * 32 * 32
    assert macs(attention, queries, reference, tokens, [(5, 7), (2, 3)]) == linear + 5 * samples * 8
    positions = 2 * 6 * 5
    linear = positions * 32 * (4 * 18 + 4 * 9 + 32 + 32) + positions * 9 * 32
    assert macs(convolution, x) == linear + 5 * positions * 9 * 32


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
