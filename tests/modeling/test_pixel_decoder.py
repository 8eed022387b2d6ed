"""The deformable pixel decoder against transformers' Mask2Former, and its contract."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from tolerances import assert_close
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

from the_mask.config import load_config
from the_mask.modeling.mask.pixel_decoders import build_pixel_decoder
from the_mask.modeling.mask.pixel_decoders.ms_deform_attn import cell_centres

CHANNELS = {"res2": 8, "res3": 12, "res4": 16, "res5": 20}
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
SHAPE = {name: ShapeSpec(channels=CHANNELS[name], stride=STRIDES[name]) for name in CHANNELS}
SMALL = {
    "CONVS_DIM": 32,
    "MASK_DIM": 24,
    "TRANSFORMER_ENC_LAYERS": 2,
    "TRANSFORMER_ENC_NHEADS": 4,
    "TRANSFORMER_ENC_DIM_FEEDFORWARD": 48,
}


def build(shape=SHAPE, **changes):
    cfg = load_config(
        overrides=[str(x) for key, value in {**SMALL, **changes}.items() for x in (f"MODEL.SEM_SEG_HEAD.{key}", value)]
    )
    torch.manual_seed(0)
    return build_pixel_decoder(cfg, shape).eval()


def shake(module):
    """Move every parameter away from its initial zeros and ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def features(frames=2, height=64, width=96, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(frames, CHANNELS[name], -(-height // s), -(-width // s), generator=generator)
        for name, s in STRIDES.items()
    }


def to_transformers(name: str) -> str:
    """Our parameter name in transformers' pixel decoder."""
    for ours, theirs in (
        ("transformer.level_embed", "level_embed"),
        ("transformer.encoder.", "encoder."),
        ("input_proj.", "input_projections."),
        ("mask_features.", "mask_projection."),
        (".norm1.", ".self_attn_layer_norm."),
        (".norm2.", ".final_layer_norm."),
        (".linear1.", ".fc1."),
        (".linear2.", ".fc2."),
        ("adapter_1.weight", "adapter_1.0.weight"),
        ("layer_1.weight", "layer_1.0.weight"),
        ("_1.norm.", "_1.1."),
    ):
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("size", [(64, 96), (70, 50)])
def test_equals_transformers(size):
    ours = shake(build())
    config = Mask2FormerConfig(
        feature_size=32, mask_feature_size=24, encoder_layers=2, encoder_feedforward_dim=48, num_attention_heads=4
    )
    theirs = Mask2FormerPixelDecoder(config, list(CHANNELS.values())).eval()
    missing, unexpected = theirs.load_state_dict({to_transformers(k): v for k, v in ours.state_dict().items()})
    assert not missing
    assert not unexpected
    maps = features(2, *size)
    with torch.no_grad():
        mask_features, scales = ours(maps)
        expected = theirs(list(maps.values()))
    assert_close(mask_features, expected.mask_features, "peer")
    assert len(scales) == 3
    for a, b in zip(scales, expected.multi_scale_features, strict=True):
        assert_close(a, b, "peer")


def test_description_matches_the_maps():
    decoder = build()
    mask_features, maps = decoder(features(3, 64, 96))
    assert decoder.out_strides == [32, 16, 8]
    assert decoder.out_channels == [m.shape[1] for m in maps] == [32, 32, 32]
    assert [tuple(m.shape[-2:]) for m in maps] == [(64 // s, 96 // s) for s in decoder.out_strides]
    assert mask_features.shape == (3, 24, 64 // decoder.mask_stride, 96 // decoder.mask_stride) == (3, 24, 16, 24)


def test_frames_do_not_mix():
    decoder = shake(build())
    maps = features(3)
    whole, _ = decoder(maps)
    for t in range(3):
        alone, _ = decoder({name: x[t : t + 1] for name, x in maps.items()})
        assert_close(whole[t : t + 1], alone, "layer")


def test_without_fpn_and_with_two_fpn_steps():
    coarse = build(IN_FEATURES=["res3", "res4", "res5"])
    assert coarse.mask_stride == 8
    assert coarse(features())[0].shape[-2:] == (8, 12)
    two = build(DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES=["res4", "res5"])
    names = {name.split(".")[0] for name in two.state_dict()}
    assert {"adapter_1", "layer_1", "adapter_2", "layer_2"} <= names
    # As in the released code, number 1 is the finest map.
    assert two.state_dict()["adapter_1.weight"].shape[1] == CHANNELS["res2"]
    mask_features, maps = two(features())
    assert mask_features.shape[-2:] == (16, 24)
    assert [tuple(m.shape[-2:]) for m in maps] == [(2, 3), (4, 6)]


def test_every_parameter_gets_a_gradient():
    decoder = shake(build()).train()
    mask_features, maps = decoder(features())
    (mask_features.square().mean() + sum(m.square().mean() for m in maps)).backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_in_mixed_precision(dtype):
    decoder = shake(build())
    maps = features()
    with torch.no_grad():
        exact, _ = decoder(maps)
        with torch.autocast("cpu", dtype):
            half, _ = decoder(maps)
    assert torch.isfinite(half).all()
    error = (half.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_cell_centres():
    centres = cell_centres([(1, 2), (2, 1)])
    torch.testing.assert_close(centres, torch.tensor([[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"CONVS_DIM": 40}, r"CONVS_DIM is 40; GroupNorm needs a multiple of 32"),
        ({"TRANSFORMER_ENC_NHEADS": 5}, r"CONVS_DIM \(32\) .*TRANSFORMER_ENC_NHEADS \(5\)"),
        ({"IN_FEATURES": ["res1"]}, r"IN_FEATURES is \['res1'\]; the backbone gives .*res2"),
        ({"PIXEL_DECODER_NAME": "FPN"}, r"'FPN'; registered are MSDeformAttnPixelDecoder"),
    ],
)
def test_bad_configs_name_their_key(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
