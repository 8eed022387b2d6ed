"""The masked-attention decoder and its layers against torch, transformers, and hand-made cases."""

import pytest
import torch
from decoder_cases import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch import nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerTransformerModule

from the_mask.config import load_config
from the_mask.modeling.mask.mask_decoders import build_mask_decoder
from the_mask.modeling.mask.mask_decoders.base import (
    attention_mask,
    mask_logits,
    mask_logits_of_layers,
    shrink_mask_features,
)
from the_mask.modeling.mask.mask_decoders.layers import MultiheadAttention, unblock_empty_rows


def build(in_channels=(32, 32, 32), **changes):
    keys = {**SMALL, **{"MODEL.MASK_FORMER." + key: value for key, value in changes.items()}}
    cfg = load_config(overrides=[str(x) for pair in keys.items() for x in pair])
    torch.manual_seed(0)
    decoder = build_mask_decoder(cfg, in_channels).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def inputs(frames, channels=32, seed=3):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(frames, channels, h, w, generator=generator) for h, w in ((2, 3), (4, 6), (8, 12))]
    return maps, torch.randn(frames, 32, 16, 24, generator=generator)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_torch(masked):
    torch.manual_seed(0)
    ours, theirs = MultiheadAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 3, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    allowed = torch.rand(2, 3, 5) < 0.5 if masked else None
    blocked = None
    if allowed is not None:
        allowed[..., 0] = True
        blocked = (~allowed).repeat_interleave(4, dim=0)
    expected, _ = theirs(query, key, value, attn_mask=blocked)
    assert_close(ours(query, key, value, allowed), expected, "sum")


def test_attention_dropout_acts_in_training_only():
    torch.manual_seed(0)
    attention = MultiheadAttention(16, 4, dropout=0.5)
    x = torch.randn(1, 6, 16)
    assert not torch.equal(attention(x, x, x), attention(x, x, x))
    attention.eval()
    assert torch.equal(attention(x, x, x), attention(x, x, x))


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_unblocking_opens_exactly_the_empty_rows(rows, columns, seed):
    allowed = torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.3
    opened = unblock_empty_rows(allowed)
    for before, after in zip(allowed.flatten(0, 1), opened.flatten(0, 1), strict=True):
        assert torch.equal(after, before if before.any() else torch.ones_like(before))


def test_mask_logits_equal_einsum():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 8, 4, 5, generator=generator)
    per_clip = torch.randn(2, 6, 8, generator=generator)
    per_frame = torch.randn(2, 3, 6, 8, generator=generator)
    expected = torch.einsum("bqc,btchw->bqthw", per_clip, features)
    assert_close(mask_logits(per_clip, features), expected, "layer")
    expected = torch.einsum("btqc,btchw->bqthw", per_frame, features)
    assert_close(mask_logits(per_frame, features), expected, "layer")


@pytest.mark.parametrize("matched", [0, 2, 6])
def test_mask_logits_of_layers_equal_einsum(matched):
    """Values and gradients, where only some masks of some layers are used."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 8, 4, 5), (2, 6, 8), (2, 3, 6, 8), (2, 6, 8)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    upstream = torch.randn(2, 6, 3, 4, 5, generator=generator)
    upstream[:, matched:] = 0
    results = []
    for dtype in (torch.float32, torch.float64):
        features, *embeddings = leaves = [value.to(dtype).requires_grad_() for value in values]
        if dtype == torch.float32:
            masks = mask_logits_of_layers(embeddings, features)
        else:
            forms = ["bqc,btchw->bqthw", "btqc,btchw->bqthw", "bqc,btchw->bqthw"]
            masks = [torch.einsum(form, one, features) for form, one in zip(forms, embeddings, strict=True)]
        used = sum((mask * upstream.to(dtype)).sum() for mask in masks[:2])
        gradients = torch.autograd.grad(used, leaves, allow_unused=True, materialize_grads=True)
        results.append([*masks, *gradients])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, "network")


def test_gradients_of_masks_that_are_not_numbers_are_kept():
    features, embeddings = torch.randn(1, 1, 8, 2, 3, requires_grad=True), torch.randn(1, 4, 8, requires_grad=True)
    (mask,) = mask_logits_of_layers([embeddings], features)
    upstream = torch.zeros_like(mask)
    upstream[0, 1, 0, 0, 0] = float("nan")
    found = torch.autograd.grad(mask, embeddings, upstream)[0]
    assert found.isnan().all(2).tolist() == [[False, True, False, False]]


def test_attention_mask_equals_resized_masks():
    """Resizing the features first gives the mask that the paper gets by resizing the masks."""
    maps, mask_features = inputs(4)
    embeddings = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(5))
    small = shrink_mask_features(mask_features, maps, 2)
    for level, x in enumerate(maps):
        masks = torch.einsum("bqc,btchw->btqhw", embeddings, mask_features.unflatten(0, (2, 2)))
        resized = F.interpolate(masks.flatten(0, 1), size=x.shape[-2:], mode="bilinear", align_corners=False)
        expected = (resized.sigmoid() >= 0.5).flatten(2).unflatten(0, (2, 2))
        assert torch.equal(attention_mask(embeddings, small[level]), expected)


def to_transformers(state):
    """Our state dict under transformers' names; its self-attention keeps three separate projections."""
    renamed = {}
    for name, value in state.items():
        for ours, theirs in (
            ("query_feat", "queries_features"),
            ("query_embed", "queries_embedder"),
            ("input_proj.", "input_projections."),
            ("decoder_norm", "decoder.layernorm"),
        ):
            name = name.replace(ours, theirs)
        if name.startswith("mask_embed.layers."):
            _, _, index, kind = name.split(".")
            name = f"decoder.mask_predictor.mask_embedder.{index}.0.{kind}"
        if name.startswith("transformer_"):
            block, index, rest = name.split(".", 2)
            kind = block.removeprefix("transformer_").removesuffix("_layers")
            if rest.startswith("norm."):
                norm = {"self_attention": "self_attn_layer_norm", "cross_attention": "cross_attn_layer_norm"}
                rest = rest.replace("norm", norm.get(kind, "final_layer_norm"))
            rest = rest.replace("multihead_attn", "cross_attn").replace("linear", "fc")
            name = f"decoder.layers.{index}.{rest}"
        if ".self_attn.in_proj_" in name:
            base, kind = name.split("in_proj_")
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{base}{part}_proj.{kind}"] = chunk
        elif not name.startswith("class_embed"):
            renamed[name] = value
    return renamed


@pytest.mark.parametrize("channels", [32, 20])
def test_equals_transformers(channels):
    """All prediction sets; 20 channels exercise the input projections."""
    ours = build((channels,) * 3)
    config = Mask2FormerConfig(
        hidden_dim=32,
        mask_feature_size=32,
        num_attention_heads=4,
        dim_feedforward=48,
        num_queries=7,
        decoder_layers=5,
        feature_size=channels,
        pre_norm=False,
    )
    theirs = Mask2FormerTransformerModule(channels, config).eval()
    missing, unexpected = theirs.load_state_dict(to_transformers(ours.state_dict()))
    assert not missing
    assert not unexpected
    maps, mask_features = inputs(2, channels)
    with torch.no_grad():
        outputs = ours(maps, mask_features, 1, aux=True)
        expected = theirs(maps, mask_features, output_hidden_states=True)
        logits = [ours.class_embed(x.transpose(0, 1)) for x in expected.intermediate_hidden_states]
    sets = [*outputs["aux_outputs"], outputs]
    assert len(sets) == len(expected.masks_queries_logits) == len(logits) == 5
    for got, masks, classes in zip(sets, expected.masks_queries_logits, logits, strict=True):
        assert_close(got["pred_masks"][:, :, 0], masks, "peer")
        assert_close(got["pred_logits"], classes, "peer")


def test_parameter_count_of_the_one_frame_decoder():
    cfg = load_config(overrides=["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "124"])
    decoder = build_mask_decoder(cfg, [256] * 3)
    assert sum(p.numel() for p in decoder.parameters()) == 14_490_749


def test_shapes_and_auxiliary_outputs():
    decoder = build()
    maps, mask_features = inputs(6)
    outputs = decoder(maps, mask_features, 3, aux=True)
    assert len(outputs["aux_outputs"]) == 4
    for prediction in [outputs, *outputs["aux_outputs"]]:
        assert prediction["pred_logits"].shape == (2, 7, 6)
        assert prediction["pred_masks"].shape == (2, 7, 3, 16, 24)
    plain = decoder(maps, mask_features, 3)
    assert plain["aux_outputs"] == []
    torch.testing.assert_close(plain["pred_masks"], outputs["pred_masks"])


def test_a_repeated_frame_changes_nothing():
    """Doubling the key axis leaves every softmax average as it was (2-D encoding: both copies have equal keys)."""
    decoder = build()
    maps, mask_features = inputs(1)
    one = decoder(maps, mask_features, 1)
    two = decoder([m.repeat(2, 1, 1, 1) for m in maps], mask_features.repeat(2, 1, 1, 1), 2)
    assert_close(two["pred_logits"], one["pred_logits"], "layer")
    assert_close(two["pred_masks"], one["pred_masks"].repeat(1, 1, 2, 1, 1), "peer")


@pytest.mark.parametrize(("encoding", "same"), [("sine2d", True), ("sine3d", False)])
def test_frame_order_matters_with_the_3d_encoding_only(encoding, same):
    decoder = build(POSITION_ENCODING=encoding)
    maps, mask_features = inputs(3)
    order = torch.tensor([2, 0, 1])
    straight = decoder(maps, mask_features, 3)
    shuffled = decoder([m[order] for m in maps], mask_features[order], 3)
    assert torch.allclose(shuffled["pred_masks"], straight["pred_masks"][:, :, order], atol=1e-4) is same


def test_clips_of_a_batch_do_not_mix():
    decoder = build(POSITION_ENCODING="sine3d")
    maps, mask_features = inputs(4)
    batch = decoder(maps, mask_features, 2)
    second = decoder([m[2:] for m in maps], mask_features[2:], 2)
    assert_close(batch["pred_masks"][1:], second["pred_masks"], "peer")


def test_last_frame_only():
    decoder = build()
    maps, mask_features = inputs(6)
    whole = decoder(maps, mask_features, 3)
    last = decoder(maps, mask_features, 3, last_frame_only=True)
    assert torch.equal(last["pred_logits"], whole["pred_logits"])
    assert_close(last["pred_masks"], whole["pred_masks"][:, :, 2:], "layer")


def test_blocked_queries_stay_finite():
    """All mask logits negative: every attention row is empty and must be opened."""
    decoder = build()
    maps, mask_features = inputs(1)
    with torch.no_grad():
        decoder.mask_embed.layers[-1].weight.zero_()
        decoder.mask_embed.layers[-1].bias.fill_(-1.0)
    outputs = decoder(maps, mask_features.abs(), 1)
    assert (outputs["pred_masks"] < 0).all()
    assert torch.isfinite(outputs["pred_logits"]).all()


def test_masks_gate_attention():
    """A query whose mask covers one cell must not see changes elsewhere in the first layer's map."""
    decoder = build(DEC_LAYERS=2, POSITION_ENCODING="sine2d")
    maps, _ = inputs(1)
    mask_features = -torch.ones(1, 32, 16, 24)
    mask_features[..., :8, :8] = 1.0  # exactly the first cell of the 2x3 map
    with torch.no_grad():
        decoder.mask_embed.layers[-1].weight.zero_()
        decoder.mask_embed.layers[-1].bias.fill_(1.0)
    changed = [maps[0].clone(), *maps[1:]]
    changed[0][..., 1, :] += 5.0
    assert torch.equal(decoder(maps, mask_features)["pred_logits"], decoder(changed, mask_features)["pred_logits"])
    changed[0][..., 0, 0] += 5.0
    assert not torch.equal(decoder(maps, mask_features)["pred_logits"], decoder(changed, mask_features)["pred_logits"])


def test_pre_norm_and_forced_projection():
    decoder = build(PRE_NORM=True, ENFORCE_INPUT_PROJ=True)
    assert {"input_proj.0.weight", "input_proj.2.bias"} <= set(decoder.state_dict())
    maps, mask_features = inputs(2)
    outputs = decoder(maps, mask_features)
    assert torch.isfinite(outputs["pred_masks"]).all()
    assert not torch.allclose(
        outputs["pred_logits"], build(ENFORCE_INPUT_PROJ=True)(maps, mask_features)["pred_logits"], atol=1e-3
    )


def test_every_parameter_gets_a_gradient():
    decoder = build((20, 20, 20)).train()
    maps, mask_features = inputs(2, 20)
    outputs = decoder(maps, mask_features, 2, aux=True)
    sum(
        (o["pred_logits"].square().mean() + o["pred_masks"].square().mean()) for o in [outputs, *outputs["aux_outputs"]]
    ).backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ["MaskedAttentionDecoder", "TemporalAggregationDecoder"])
def test_can_be_exported(name):
    decoder = build(TRANSFORMER_DECODER_NAME=name, DEC_LAYERS=2)
    maps, mask_features = inputs(2)
    program = torch.export.export(decoder, (maps, mask_features, 2))
    outputs = program.module()(maps, mask_features, 2)
    expected = decoder(maps, mask_features, 2)
    assert_close(outputs["pred_masks"], expected["pred_masks"], "peer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NHEADS": 5}, r"HIDDEN_DIM \(32\) must be a multiple of MODEL.MASK_FORMER.NHEADS \(5\)"),
        ({"HIDDEN_DIM": 30, "NHEADS": 2}, r"HIDDEN_DIM is 30; position encoding needs a multiple of 4"),
        ({"DEC_LAYERS": 1}, r"DEC_LAYERS 1: expected a number in 2..1024"),
        ({"TRANSFORMER_DECODER_NAME": "Unknown"}, r"'Unknown'; registered are MaskedAttentionDecoder, Temporal"),
        ({"POSITION_ENCODING": "none"}, r"POSITION_ENCODING 'none': expected one of 'sine2d', 'sine3d'"),
    ],
)
def test_bad_configs_name_their_key(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_incomplete_clips_are_refused():
    maps, mask_features = inputs(3)
    with pytest.raises(ValueError, match="3 stacked frames do not form clips of 2 frames"):
        build()(maps, mask_features, 2)
