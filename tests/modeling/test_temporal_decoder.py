"""The temporal aggregation decoder against a slow float64 reading of the spec, and its invariants."""

import pytest
import torch
from decoder_cases import SMALL
from tolerances import assert_close
from torch import nn
from torch.nn import functional as F

from the_mask.config import load_config
from the_mask.modeling.mask.mask_decoders import RELEASED_NAMES, build_mask_decoder, rename_released, stage1_to_stage2
from the_mask.modeling.mask.position_encoding import sine_3d_clip

OPTIONS = {
    **SMALL,
    "MODEL.MASK_FORMER.POSITION_ENCODING": "sine3d",
    # Every part acts from the start.
    "MODEL.THE_MASK.TEMPORAL_INIT": "xavier",
}


def build(name="TemporalAggregationDecoder", in_channels=(32, 32, 32), base=OPTIONS, noise=True, **changes):
    keys = {**base, "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": name}
    keys |= {"MODEL." + key: value for key, value in changes.items()}
    cfg = load_config(overrides=[str(x) for pair in keys.items() for x in pair])
    torch.manual_seed(0)
    decoder = build_mask_decoder(cfg, in_channels).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if noise and parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def inputs(frames, seed=3):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(frames, 32, h, w, generator=generator) for h, w in ((2, 3), (4, 6), (8, 12))]
    return maps, torch.randn(frames, 32, 16, 24, generator=generator)


class SlowDecoder:
    """Spec section 3, one clip, frame by frame, float64, torch's own attention. Reads parameters by name."""

    def __init__(self, decoder, heads):
        self.p = {name: value.detach().double() for name, value in decoder.state_dict().items()}
        self.heads = heads
        self.layers = len(decoder.transformer_ffn_layers)

    def attend(self, name, query, key, value, blocked=None):
        dim = query.shape[-1]
        attention = nn.MultiheadAttention(dim, self.heads).double()
        attention.load_state_dict({k[len(name) + 1 :]: v for k, v in self.p.items() if k.startswith(name + ".")})
        return attention(query, key, value, attn_mask=blocked)[0]

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.p[name + ".weight"], self.p[name + ".bias"])

    def linear(self, name, x):
        return x @ self.p[name + ".weight"].t() + self.p[name + ".bias"]

    def ffn(self, name, x):
        return self.linear(name + ".linear2", self.linear(name + ".linear1", x).relu())

    def mlp(self, name, x):
        for i in range(3):
            x = self.linear(f"{name}.layers.{i}", x)
            x = x.relu() if i < 2 else x
        return x

    def heads_of(self, clip, frames, features):
        z = self.norm("decoder_norm", clip)
        embedding = self.mlp("mask_embed", z)
        result = {
            "logits": self.linear("class_embed", z),
            "masks": torch.stack([torch.einsum("qc,chw->qhw", embedding, f) for f in features], 1),
            "frame_logits": [],
            "frame_masks": [],
        }
        for query, feature in zip(frames, features, strict=True):
            z = self.norm("frame_norm", query)
            result["frame_logits"].append(self.linear("frame_class_embed", z))
            result["frame_masks"].append(torch.einsum("qc,chw->qhw", self.mlp("frame_mask_embed", z), feature))
        result["frame_logits"] = torch.stack(result["frame_logits"])
        result["frame_masks"] = torch.stack(result["frame_masks"], 1)
        return result

    def __call__(self, maps, mask_features):
        tl = "temporal_layer."
        features, count = mask_features.double(), mask_features.shape[0]
        e, x = self.p["query_embed.weight"], self.p["query_feat.weight"]
        values, keys = [], []  # [level][frame]
        for level, m in enumerate(maps):
            tokens = m.double().flatten(2).transpose(1, 2) + self.p["level_embed.weight"][level]
            position = sine_3d_clip(count, m.shape[2], m.shape[3], m.shape[1]).double().flatten(2).transpose(1, 2)
            values.append(tokens)
            keys.append(tokens + position)

        clip = self.norm(tl + "clip_self_norm", x + self.attend(tl + "clip_self_attn", x + e, x + e, x))
        shared = self.norm(tl + "frame_self_norm", x + self.attend(tl + "frame_self_attn", x + e, x + e, x))
        frames = []
        for t in range(count):
            key, value = torch.cat([k[t] for k in keys]), torch.cat([v[t] for v in values])
            f = shared + self.attend(tl + "frame_cross_attn", shared + e, key, value)
            f = self.norm(tl + "frame_cross_norm", f)
            frames.append(self.norm(tl + "frame_ffn_norm", f + self.ffn(tl + "frame_ffn", f)))

        outputs = [self.heads_of(clip, frames, features)]
        for i in range(self.layers):
            level = i % len(maps)
            for t in range(count):
                mask = outputs[-1]["masks"][:, t][None]
                mask = F.interpolate(mask, size=maps[level].shape[-2:], mode="bilinear", align_corners=False)
                blocked = mask.sigmoid()[0].flatten(1) < 0.5
                blocked[blocked.all(dim=1)] = False
                f, name = frames[t], f"transformer_cross_attention_layers.{i}"
                attended = self.attend(name + ".multihead_attn", f + e, keys[level][t], values[level][t], blocked)
                f = self.norm(name + ".norm", f + attended)
                name = f"transformer_self_attention_layers.{i}"
                f = self.norm(name + ".norm", f + self.attend(name + ".self_attn", f + e, f + e, f))
                name = f"transformer_ffn_layers.{i}"
                frames[t] = self.norm(name + ".norm", f + self.ffn(name, f))
            scores = torch.stack([self.linear(tl + "frame_score", f) for f in frames]).softmax(0)
            summary = sum(a * self.linear(tl + "frame_value", f) for a, f in zip(scores, frames, strict=True))
            clip = self.norm(tl + "combine_norm", clip + summary)
            clip = self.norm(tl + "clip_ffn_norm", clip + self.ffn(tl + "clip_ffn", clip))
            outputs.append(self.heads_of(clip, frames, features))
        return outputs


@pytest.mark.parametrize("init", ["identity", "xavier"])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_equals_the_slow_oracle(frames, init):
    decoder = build(**{"THE_MASK.TEMPORAL_INIT": init})
    maps, mask_features = inputs(2 * frames)
    with torch.no_grad():
        outputs = decoder(maps, mask_features, frames, aux=True)
    clip_sets = [*outputs["aux_outputs"], outputs]
    frame_sets = [*outputs["frame"]["aux_outputs"], outputs["frame"]]
    slow = SlowDecoder(decoder, heads=4)
    for b in range(2):
        part = slice(b * frames, (b + 1) * frames)
        expected = slow([m[part] for m in maps], mask_features[part])
        assert len(expected) == len(clip_sets) == len(frame_sets) == 5
        for want, clip, frame in zip(expected, clip_sets, frame_sets, strict=True):
            for got, name in (
                (clip["pred_logits"], "logits"),
                (clip["pred_masks"], "masks"),
                (frame["pred_logits"], "frame_logits"),
                (frame["pred_masks"], "frame_masks"),
            ):
                assert_close(got[b], want[name], "masks")


def test_parameter_count_of_the_video_decoder():
    """Spec: 17,681,661, less 514 of a linear layer that the released code never reads."""
    decoder = build(base={}, in_channels=[256] * 3, **{"SEM_SEG_HEAD.NUM_CLASSES": 124})
    assert sum(p.numel() for p in decoder.parameters()) == 17_681_661 - 514
    assert sum(p.numel() for p in decoder.temporal_layer.parameters()) == 2_960_899 - 514


def test_weights_of_frames():
    """Weights sum to 1 over frames; a single frame has weight 1 exactly."""
    layer = build().temporal_layer
    frames = torch.randn(2, 3, 7, 32)
    weights = layer.frame_weights(frames)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 7, 1))
    assert torch.equal(layer.frame_weights(frames[:, :1]), torch.ones(2, 1, 7, 1))


def test_permuting_frames_permutes_outputs_without_position():
    decoder = build()
    decoder.position = lambda t, h, w, c, device: torch.zeros(t, c, h, w)
    maps, mask_features = inputs(3)
    order = torch.tensor([2, 0, 1])
    straight = decoder(maps, mask_features, 3)
    shuffled = decoder([m[order] for m in maps], mask_features[order], 3)
    assert_close(shuffled["pred_logits"], straight["pred_logits"], "peer")
    for branch in (lambda o: o, lambda o: o["frame"]):
        expected = branch(straight)["pred_masks"][:, :, order]
        assert_close(branch(shuffled)["pred_masks"], expected, "masks")
    expected = straight["frame"]["pred_logits"][:, order]
    assert_close(shuffled["frame"]["pred_logits"], expected, "peer")


def test_the_frame_axis_of_the_encoding_has_no_effect():
    """Each frame attends to its own keys only, and softmax ignores a constant added to all keys of a frame."""
    volume, plane = build(), build(**{"MASK_FORMER.POSITION_ENCODING": "sine2d"})
    maps, mask_features = inputs(3)
    a, b = volume(maps, mask_features, 3), plane(maps, mask_features, 3)
    assert_close(a["pred_logits"], b["pred_logits"], "peer")
    assert_close(a["frame"]["pred_masks"], b["frame"]["pred_masks"], "masks")


def test_frame_queries_start_from_their_own_frame_only():
    layer = build().temporal_layer
    keys = torch.randn(1, 2, 10, 32)
    other = keys.clone()
    other[:, 1] += 1
    features, position = torch.randn(7, 32), torch.randn(7, 32)
    clip, frames = layer.start(features, position, keys, keys)
    clip_other, frames_other = layer.start(features, position, other, other)
    assert torch.equal(clip, clip_other)
    assert torch.equal(frames[:, 0], frames_other[:, 0])
    assert not torch.allclose(frames[:, 1], frames_other[:, 1], atol=1e-3)


def test_identity_start_begins_where_stage_1_ended():
    """With learned queries of mean 0 and variance 1 the first two sets of the frame branch are those of stage 1."""
    stage1 = build("MaskedAttentionDecoder", noise=False)
    with torch.no_grad():
        weight = stage1.query_feat.weight
        weight.copy_(F.layer_norm(weight, weight.shape[-1:]))
    maps, mask_features = inputs(1)
    expected = stage1(maps, mask_features, 1, aux=True)
    far = {}
    for init in ("identity", "xavier"):
        stage2 = build(noise=False, **{"THE_MASK.TEMPORAL_INIT": init})
        stage2.load_state_dict(stage1_to_stage2(stage1.state_dict()), strict=False)
        got = stage2(maps, mask_features, 1, aux=True)
        if init == "identity":
            for want, have in zip(expected["aux_outputs"][:2], got["frame"]["aux_outputs"][:2], strict=True):
                assert_close(have["pred_logits"][:, 0], want["pred_logits"], "peer")
                assert_close(have["pred_masks"], want["pred_masks"], "masks")
        far[init] = (got["pred_logits"] - expected["pred_logits"]).square().mean()
    assert far["identity"] < 0.25 * far["xavier"]


def test_unknown_initialisation():
    with pytest.raises(ValueError, match="TEMPORAL_INIT 'zeros': expected one of 'identity', 'xavier'"):
        build(**{"THE_MASK.TEMPORAL_INIT": "zeros"})


def test_last_frame_only():
    decoder = build()
    maps, mask_features = inputs(4)
    whole = decoder(maps, mask_features, 2)
    last = decoder(maps, mask_features, 2, last_frame_only=True)
    assert_close(last["pred_masks"], whole["pred_masks"][:, :, 1:], "layer")
    for name, expected in (
        ("pred_masks", whole["frame"]["pred_masks"][:, :, 1:]),
        ("pred_logits", whole["frame"]["pred_logits"][:, 1:]),
    ):
        assert_close(last["frame"][name], expected, "layer")


def test_dropout_acts_in_training_only():
    decoder = build()
    maps, mask_features = inputs(2)
    assert torch.equal(decoder(maps, mask_features, 2)["pred_logits"], decoder(maps, mask_features, 2)["pred_logits"])
    decoder.train()
    first = decoder(maps, mask_features, 2)["pred_logits"]
    assert not torch.equal(first, decoder(maps, mask_features, 2)["pred_logits"])
    still = build(**{"THE_MASK.TEMPORAL_DROPOUT": 0.0}).train()
    assert torch.equal(still(maps, mask_features, 2)["pred_logits"], still(maps, mask_features, 2)["pred_logits"])


def test_every_parameter_gets_a_gradient():
    decoder = build(in_channels=(20, 20, 20)).train()
    maps, mask_features = inputs(2)
    outputs = decoder([m[:, :20] for m in maps], mask_features, 2, aux=True)
    total = torch.zeros(())
    for branch in (outputs, outputs["frame"]):
        for o in [branch, *branch["aux_outputs"]]:
            total = total + o["pred_logits"].square().mean() + o["pred_masks"].square().mean()
    total.backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_stage_2_starts_from_copies_of_the_stage_1_heads():
    stage1, stage2 = build("MaskedAttentionDecoder"), build()
    state = stage1.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    started = stage1_to_stage2(state)
    assert set(state) == set(before)
    missing, unexpected = stage2.load_state_dict(started, strict=False)
    assert not unexpected
    assert missing
    assert {name.split(".")[0] for name in missing} == {"temporal_layer"}
    loaded = stage2.state_dict()
    for name, value in before.items():
        assert torch.equal(loaded[name], value)
        head, _, rest = name.partition(".")
        copies = {"decoder_norm": "frame_norm", "class_embed": "frame_class_embed", "mask_embed": "frame_mask_embed"}
        if head in copies:
            copied = f"{copies[head]}.{rest}"
            assert torch.equal(loaded[copied], value)
            assert started[copied].data_ptr() != started[name].data_ptr()


def test_stage_2_start_keeps_prefixes_and_other_entries():
    state = {f"sem_seg_head.predictor.{k}": v for k, v in build("MaskedAttentionDecoder").state_dict().items()}
    state["backbone.stem.conv1.weight"] = torch.zeros(1)
    started = stage1_to_stage2(state)
    assert "sem_seg_head.predictor.frame_norm.weight" in started
    assert started["backbone.stem.conv1.weight"] is state["backbone.stem.conv1.weight"]
    assert len(started) == len(state) + 2 + 2 + 6


def test_stage_2_start_refuses_other_checkpoints():
    state = build().state_dict()
    with pytest.raises(ValueError, match=r"already has frame_class_embed.bias .*INIT_FROM_STAGE1"):
        stage1_to_stage2(state)
    with pytest.raises(ValueError, match=r"has no decoder_norm, class_embed, mask_embed .*conv1.weight"):
        stage1_to_stage2({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="first names: none"):
        stage1_to_stage2({})


def test_released_names_cover_the_whole_decoder():
    """Every released name has a place here and every place is filled; spec section 9, end of the table."""
    ours = set(build().state_dict())
    temporal = "deformabel_transformer_cross_attention_layers."
    attention = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    released = {f"{temporal}{a}.{x}" for a in ("self_attn", "self_attn_box", "cross_attn") for x in attention}
    linears = [f"norm{i}{box}" for i in (1, 2, 3) for box in ("", "_box")]
    linears += [f"linear{i}{box}" for i in (1, 2) for box in ("", "_box")]
    linears += ["time_attention", "time_attention_weights", "reference_points"]
    heads = ["decoder_norm1", "decoder_norm2", "class_embed", "class_embed_aux"]
    heads += [f"{m}.layers.{i}" for m in ("mask_embed", "mask_embed_aux") for i in range(3)]
    released |= {f"{x}.{kind}" for x in [temporal + n for n in linears] + heads for kind in ("weight", "bias")}
    released |= {f"{x}.weight" for x in ("query_feat", "query_embed", "level_embed")}
    released |= {name for name in ours if name.startswith("transformer_")}
    renamed = [rename_released(name) for name in released]
    assert renamed.count(None) == 2
    assert sorted(name for name in renamed if name) == sorted(ours)
    assert sum(v is None for v in RELEASED_NAMES.values()) == 1
