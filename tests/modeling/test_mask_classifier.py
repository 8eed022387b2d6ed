"""MaskClassifier: state-dict names, losses, score maps, freezing, stage 2, and bad input."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from tolerances import assert_close
from torch.nn import functional as F

import the_mask.modeling
from the_mask.config import load_config
from the_mask.config.keys.mask_former import MaskOptions
from the_mask.data.clips import Clip
from the_mask.modeling import stage1_to_stage2

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "debug"
ONE, VIDEO = "the_mask_debug_1f", "the_mask_debug_video"


def build(name=ONE, seed=0, **changes):
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "9"]
    for key, value in changes.items():
        overrides += [key, str(value)]
    torch.manual_seed(seed)
    return build_model(load_config(CONFIGS / f"{name}.yaml", overrides))


def make_clip(frames=1, height=64, width=64, seed=0, classes=9, **extra):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (frames, height // 16 + 1, width // 16 + 1), generator=generator)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :height, :width]
    return Clip(
        torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator).unbind(),
        labels.unbind(),
        dataset="toy",
        video_id=f"v{seed}",
        frame_ids=[f"{t:04d}" for t in range(frames)],
        file_names=[f"v{seed}/{t:04d}.jpg" for t in range(frames)],
        padding=(height, width),
        seed=seed,
        **extra,
    )


def official_names():
    """State-dict names of the official R50 Mask2Former, written out from the table of the spec (section 9)."""
    norm = ["weight", "bias", "running_mean", "running_var"]
    names = ["backbone.stem.conv1.weight", *(f"backbone.stem.conv1.norm.{n}" for n in norm)]
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            for conv in ("conv1", "conv2", "conv3", *(["shortcut"] if block == 0 else [])):
                prefix = f"backbone.res{stage}.{block}.{conv}"
                names += [f"{prefix}.weight", *(f"{prefix}.norm.{n}" for n in norm)]

    def both(prefix):
        return [f"{prefix}.weight", f"{prefix}.bias"]

    pixel = "sem_seg_head.pixel_decoder."
    for level in range(3):
        names += both(f"{pixel}input_proj.{level}.0") + both(f"{pixel}input_proj.{level}.1")
    names.append(f"{pixel}transformer.level_embed")
    for layer in range(6):
        prefix = f"{pixel}transformer.encoder.layers.{layer}."
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            names += both(f"{prefix}self_attn.{part}")
        for part in ("norm1", "linear1", "linear2", "norm2"):
            names += both(prefix + part)
    names += both(f"{pixel}mask_features")
    for part in ("adapter_1", "layer_1"):
        names += [f"{pixel}{part}.weight", *both(f"{pixel}{part}.norm")]

    predictor = "sem_seg_head.predictor."
    for layer in range(9):
        for kind, attention in (("self", "self_attn"), ("cross", "multihead_attn")):
            prefix = f"{predictor}transformer_{kind}_attention_layers.{layer}."
            names += [f"{prefix}{attention}.in_proj_weight", f"{prefix}{attention}.in_proj_bias"]
            names += both(f"{prefix}{attention}.out_proj") + both(f"{prefix}norm")
        for part in ("linear1", "linear2", "norm"):
            names += both(f"{predictor}transformer_ffn_layers.{layer}.{part}")
    names += both(f"{predictor}decoder_norm") + both(f"{predictor}class_embed")
    names += [f"{predictor}{name}.weight" for name in ("query_feat", "query_embed", "level_embed")]
    for layer in range(3):
        names += both(f"{predictor}mask_embed.layers.{layer}")
    return [*names, "criterion.empty_weight"]


def test_names_are_those_of_the_official_checkpoints():
    model = build_model(load_config(overrides=["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "50"]))
    expected = official_names()
    # The number of entries in the official ADE20K R50 model.
    assert len(expected) == len(set(expected)) == 558
    assert set(model.state_dict()) == set(expected)


@pytest.mark.parametrize("name", [ONE, VIDEO, "mask2former_debug"])
def test_training_gives_finite_losses_and_gradients(name):
    model = build(name, **{"MODEL.THE_MASK.TRAINABLE": []})
    frames = 2 if name == VIDEO else 1
    losses = model([make_clip(frames, seed=s) for s in range(2)])
    expected = {"loss_ce", "loss_mask", "loss_dice"}
    if name != "mask2former_debug":
        expected |= {"loss_mask_secondary", "loss_dice_secondary"}
    expected |= {f"{x}_{i}" for x in expected for i in range(2)}
    if name == VIDEO:
        expected |= {f"frame_{x}" for x in expected}
    assert set(losses) == expected
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []


@pytest.mark.parametrize("name", [VIDEO, ONE])
def test_the_matcher_of_first_frames_is_a_key_of_the_mask(name):
    """A target of the second frame only is matched after those of the first; one frame has one order."""
    clip = make_clip(2 if name == VIDEO else 1, seed=3)
    losses = {}
    for matching in ("clip", "first-frame"):
        torch.manual_seed(0)
        model = build(name, **{"MODEL.MASK_FORMER.MATCHING": matching, "MODEL.THE_MASK.TRAINABLE": []})
        assert model.criterion.options.matching == matching
        losses[matching] = model([clip])
    one, other = losses.values()
    assert set(one) == set(other)
    assert any(key.endswith("_secondary") for key in one)
    assert all(torch.isfinite(value) for value in other.values())
    sum(other.values()).backward()
    same = [key for key in one if torch.equal(one[key], other[key])]
    assert len(same) == len(one) if name == ONE else len(same) < len(one)


def test_losses_depend_on_the_seed_of_the_clip_only():
    model = build()
    clips = [make_clip(seed=s) for s in range(2)]
    first = model(clips)
    torch.manual_seed(99)
    again = model(clips)
    assert all(torch.equal(first[k], again[k]) for k in first)
    other = model([replace(clip, seed=clip.seed + 7) for clip in clips])
    assert not torch.equal(first["loss_mask"], other["loss_mask"])


def test_deep_supervision_can_be_switched_off():
    losses = build(**{"MODEL.MASK_FORMER.DEEP_SUPERVISION": False})([make_clip()])
    assert not [name for name in losses if name[-1].isdigit()]


def test_unlabelled_frames_and_void_clips_keep_the_graph():
    model = build(VIDEO)
    partly = make_clip(2)
    partly = replace(partly, labels=[None, partly.labels[1]])
    void = replace(make_clip(2, seed=1), labels=[torch.full((64, 64), 255)] * 2)
    for clips in ([partly, void], [void]):
        total = sum(model(clips).values())
        assert torch.isfinite(total)
        total.backward()


def test_iteration_drives_the_warm_up():
    model = build(**{"MODEL.THE_MASK.WARMUP_ITERS": 10})
    model.set_iteration(9)
    assert "loss_mask_secondary" not in model([make_clip()])
    model.set_iteration(10)
    assert "loss_mask_secondary" in model([make_clip()])


def test_eval_output_contract():
    model = build(VIDEO).eval()
    clip = make_clip(2, 64, 96)
    clip = replace(clip, height=50, width=71)
    (output,) = model([clip])
    (scores,) = model.score_maps([clip])
    (labels,) = model.predict([clip])
    assert scores.shape == (2, 9, 16, 24)
    assert len(output["sem_seg"]) == len(labels) == 2
    for full, label in zip(output["sem_seg"], labels, strict=True):
        assert full.shape == (9, 50, 71)
        assert label.dtype == torch.uint8
        best = full.topk(2, dim=0).values
        clear = best[0] - best[1] > 1e-5
        assert torch.equal(label[clear].long(), full.argmax(0)[clear])


def test_scores_combine_both_branches():
    model = build(VIDEO).eval()
    clip = make_clip(2)
    (both,) = model.score_maps([clip])
    model.options = MaskOptions(clip_score_weight=1.0)
    (clip_only,) = model.score_maps([clip])
    model.options = MaskOptions(clip_score_weight=0.0)
    (frame_only,) = model.score_maps([clip])
    assert not torch.allclose(clip_only, frame_only, atol=1e-3)
    torch.testing.assert_close(both, (clip_only + frame_only) / 2)


def test_a_clip_does_not_depend_on_its_batch():
    """Other sizes and lengths in the batch; sizes that need padding."""
    model = build(VIDEO).eval()
    clips = [
        make_clip(2, 64, 64, seed=0),
        make_clip(1, 50, 70, seed=1),
        make_clip(2, 64, 64, seed=2),
        make_clip(3, 33, 90, seed=3),
    ]
    together = model.score_maps(clips)
    for clip, scores in zip(clips, together, strict=True):
        (alone,) = model.score_maps([clip])
        height, width = clip.frames[0].shape[-2:]
        assert scores.shape == (len(clip.frames), 9, -(-height // 4), -(-width // 4))
        assert_close(scores, alone, "layer")


@pytest.mark.parametrize("name", [ONE, VIDEO])
def test_merging_at_the_input_as_released(name):
    """Masks are enlarged to the padded input, merged, cut, and only then resized to the frame."""
    model = build(name, **{"MODEL.MASK_FORMER.MERGE_AT": "input", "TEST.CLIP_LENGTH": 1}).eval()
    clip = replace(make_clip(1, 50, 70), height=75, width=105)
    images, _ = model.stack([clip])
    assert images.shape[-2:] == (64, 96)
    with torch.no_grad():
        outputs = model.sem_seg_head(model.backbone(images), 1)
    branches = [(outputs["pred_logits"][0], outputs["pred_masks"][0, :, 0])]
    if name == VIDEO:
        branches.append((outputs["frame"]["pred_logits"][0, 0], outputs["frame"]["pred_masks"][0, :, 0]))
    expected = 0
    for logits, masks in branches:
        large = F.interpolate(masks[None], size=(64, 96), mode="bilinear", align_corners=False)[0].sigmoid()
        expected = expected + torch.einsum("qc,qhw->chw", logits.softmax(-1)[:, :-1], large) / len(branches)
    expected = expected[:, :50, :70]
    (scores,) = model.score_maps([clip])
    assert model.score_stride == 1
    assert_close(scores[0], expected, "layer")
    (output,) = model([clip])
    resized = F.interpolate(expected[None], size=(75, 105), mode="bilinear", align_corners=False)[0]
    assert_close(output["sem_seg"][0], resized, "layer")
    streamed, _ = model.step(clip.frames[0], model.init_state())
    assert_close(streamed, scores[0], "layer")
    with pytest.raises(ValueError, match="MERGE_AT input: set it to mask"):
        model.step_queries(clip.frames[0], model.init_state())


def test_unknown_place_of_merging():
    with pytest.raises(ValueError, match=r"MERGE_AT 'output': expected one of 'mask', 'input'"):
        build(**{"MODEL.MASK_FORMER.MERGE_AT": "output"})


def test_normalisation_and_padding():
    model = build()
    images, frames = model.stack([make_clip(2, 40, 64), make_clip(2, 64, 33, seed=1)])
    assert frames == 2
    assert images.shape == (4, 3, 64, 64)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    pixel = make_clip(2, 40, 64).frames[1][:, 39, 63].float()
    torch.testing.assert_close(images[1, :, 39, 63], (pixel - mean) / std)
    assert not images[:2, :, 40:].any()
    assert not images[2:, :, :, 33:].any()


def test_padded_training_equals_labels_padded_with_ignore():
    """What the model pads at the bottom and right is ignored by the losses, like the mapper's padding."""
    model = build()
    small = make_clip(1, 48, 64)
    mean = model.pixel_mean.expand(3, 16, 64)
    frame, labels = small.frames[0].float(), small.labels[0]
    large = replace(
        small, frames=[torch.cat([frame, mean], 1)], labels=[torch.cat([labels, torch.full((16, 64), 255)])]
    )
    a, b = model([small]), model([large])
    for name, value in a.items():
        assert_close(value, b[name], "layer")


def test_bf16_autocast_trains_and_predicts():
    model = build(VIDEO)
    with torch.autocast("cpu", torch.bfloat16):
        total = sum(model([make_clip(2)]).values())
        total.backward()
        assert torch.isfinite(total)
        (scores,) = model.eval().score_maps([make_clip(2)])
    (exact,) = model.score_maps([make_clip(2)])
    assert scores.dtype == torch.float32
    assert (scores - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_stage_2_trains_the_predictor_only():
    model = build(VIDEO)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("predictor" in name for name in trainable)
    assert all(p.requires_grad for p in model.sem_seg_head.predictor.parameters())
    sum(model([make_clip(2)]).values()).backward()
    assert all(p.grad is None for p in model.backbone.parameters())


def test_frozen_modules_stay_in_eval_mode():
    model = build(VIDEO)
    for _ in range(2):
        assert model.training
        assert model.sem_seg_head.training
        assert model.sem_seg_head.predictor.temporal_layer.dropout.training
        assert not any(m.training for m in model.backbone.modules())
        assert not any(m.training for m in model.sem_seg_head.pixel_decoder.modules())
        model.eval()
        assert not any(m.training for m in model.modules())
        model.train()
    awake = build(VIDEO, **{"MODEL.THE_MASK.FROZEN_EVAL": False})
    assert all(m.training for m in awake.modules())


def test_a_fully_frozen_model_still_computes_losses():
    model = build(ONE)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train()
    assert model.training
    assert "loss_ce_0" in model([make_clip()])


def test_unknown_trainable_part_is_an_error():
    with pytest.raises(ValueError, match=r"TRAINABLE has 'predicter', which is in no .*backbone, .*sem_seg_head"):
        build(VIDEO, **{"MODEL.THE_MASK.TRAINABLE": ["predicter"]})


def test_stage_2_starts_from_a_stage_1_model():
    stage1, stage2 = build(ONE), build(VIDEO, seed=1)
    missing, unexpected = stage2.load_state_dict(stage1_to_stage2(stage1.state_dict()), strict=False)
    assert not unexpected
    assert missing
    assert all(name.startswith("sem_seg_head.predictor.temporal_layer.") for name in missing)
    assert torch.equal(stage2.backbone.stem.conv1.weight, stage1.backbone.stem.conv1.weight)
    with pytest.raises(ValueError, match=r"already has sem_seg_head.predictor.frame_class_embed"):
        stage1_to_stage2(stage2.state_dict())


def test_scores_that_are_not_finite_name_the_files():
    model = build(VIDEO).eval()
    with torch.no_grad():
        model.sem_seg_head.predictor.class_embed.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"toy/v4 frames 0000, 0001 \(v4/0000.jpg, v4/0001.jpg\) are not finite"):
        model.predict([make_clip(2, seed=4)])
    with pytest.raises(ValueError, match="frame 0 of a stream are not finite"):
        model.step(make_clip().frames[0], model.init_state())


def test_batches_that_cannot_be_stacked_are_errors():
    model = build()
    with pytest.raises(ValueError, match=r"clips of one length >= 1, got lengths \[1, 2\]"):
        model([make_clip(1), make_clip(2)])
    first, second = make_clip(2).frames
    mixed = replace(make_clip(2), frames=[first, second[:, :32]])
    with pytest.raises(ValueError, match=r"frames of clip 'toy/v0 .* differ in size: \[\(32, 64\), \(64, 64\)\]"):
        model([mixed])
    with pytest.raises(ValueError, match="clip 'toy/v0 frames 0000' has no frames"):
        model.eval()([replace(make_clip(1), frames=[], labels=[])])


def test_labels_outside_the_classes_are_an_error():
    clip = make_clip()
    clip.labels[0][3, 4] = 77
    with pytest.raises(ValueError, match=r"toy/v0 frames 0000.*77"):
        build()([clip])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("TEST.CLIP_LENGTH", 0, r"TEST.CLIP_LENGTH \(0\)"),
        ("MODEL.THE_MASK.CLIP_SCORE_WEIGHT", 1.5, "CLIP_SCORE_WEIGHT 1.5: expected a number in 0..1"),
    ],
)
def test_bad_configs_name_their_key(key, value, message):
    with pytest.raises(ValueError, match=message):
        build(**{key: value})


def test_registries_hold_the_parts():
    from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY

    assert META_ARCH_REGISTRY.get("MaskClassifier") is the_mask.modeling.MaskClassifier
    assert SEM_SEG_HEADS_REGISTRY.get("MaskClassificationHead") is the_mask.modeling.MaskClassificationHead
