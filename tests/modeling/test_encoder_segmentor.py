"""Encoder-only segmentors against transformers' EoMT, EoMT-DINOv3 and VidEoMT, and streams against clips."""

import copy

import pytest
import torch
from encoder_cases import (
    BLOCKS,
    CLASSES,
    QUERIES,
    SIDE,
    fill,
    random_clip,
    random_frames,
    randomize,
    tiny_peer,
    tiny_segmentor,
)
from tolerances import assert_close

from the_mask.modeling.backbones import plain_vit
from the_mask.modeling.mask import encoder_head
from the_mask.modeling.mask.encoder_head import EncoderHead

VIDEO = ("MODEL.ENCODER.PROPAGATE", True, "MODEL.ENCODER.MASKED_ATTENTION", False)


def close(found, expected, operation="layer"):
    found, expected = found.detach(), expected.detach()
    assert expected.abs().max() > 0.05
    assert_close(found, expected, operation, largest=True)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2-gated", "dinov3", "dinov3-gated"])
def test_image_model_equals_transformers(kind):
    peer, ours = tiny_peer(kind), tiny_segmentor(kind, seed=5)
    fill(ours, peer.state_dict())
    images = random_frames(2)
    with torch.no_grad():
        expected, found = peer(images), ours.predictions(images, 1)
    close(found["pred_logits"][:, 0], expected.class_queries_logits)
    close(found["pred_masks"][:, :, 0], expected.masks_queries_logits)


@pytest.mark.parametrize("grid", [(5, 3), (1, 4), (6, 1)])
@pytest.mark.parametrize("patch", [8, 32])
def test_masks_in_bands_equal_the_modules_in_float64(monkeypatch, grid, patch):
    """Patches are upscaled a few rows at a time; each row needs its neighbours in the 3x3 convolutions."""
    head = randomize(EncoderHead(16, 4, CLASSES, patch, 1)).eval()
    generator = torch.Generator().manual_seed(0)
    queries, patches = (torch.randn(2, n, 16, generator=generator) for n in (4, grid[0] * grid[1]))
    exact = copy.deepcopy(head).double()
    pixels = patches.double().transpose(1, 2).unflatten(2, grid)
    for block in exact.upscale:
        pixels = block.conv2(torch.nn.functional.gelu(block.conv1(pixels)))
        pixels = block.norm(pixels.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    expected = torch.einsum("nqd,ndhw->nqhw", exact.mask_head(queries.double()), pixels)
    close(head.predict(queries, patches, grid)[1], expected)
    row = grid[1] * 16 * 4 * 4 ** len(head.upscale)
    for rows in (0, 1, 2, 4, 9):
        monkeypatch.setattr(encoder_head, "BAND_BYTES", rows * row)
        with torch.no_grad():
            found = head.predict(queries, patches, grid)[1]
        close(found, expected)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_gradients_equal_transformers_with_attention_masks_in_training(kind):
    peer, ours = tiny_peer(kind), tiny_segmentor(kind, seed=5)
    fill(ours, peer.state_dict())
    peer.attn_mask_probs.fill_(1.0)
    peer.train()
    ours.train()
    images = random_frames(2)
    expected, found = peer(images), ours.predictions(images, 1, aux=True)
    assert len(found["aux_outputs"]) == BLOCKS
    weights = torch.randn(expected.masks_queries_logits.shape, generator=torch.Generator().manual_seed(2))
    (expected.class_queries_logits.square().sum() + (weights * expected.masks_queries_logits).sum()).backward()
    (found["pred_logits"].square().sum() + (weights * found["pred_masks"][:, :, 0]).sum()).backward()
    close(found["pred_masks"][:, :, 0], expected.masks_queries_logits)
    pairs = {
        "backbone.model.patch_embed.proj.weight": None,
        "sem_seg_head.q.weight": peer.query.weight,
        "sem_seg_head.class_head.weight": peer.class_predictor.weight,
        "sem_seg_head.mask_head.2.bias": peer.mask_head.fc2.bias,
        "sem_seg_head.upscale.0.conv1.weight": peer.upscale_block.block[0].conv1.weight,
        "sem_seg_head.upscale.1.conv2.weight": peer.upscale_block.block[1].conv2.weight,
        "backbone.model.norm.weight": peer.layernorm.weight,
        "backbone.model.blocks.0.mlp.fc2.weight": None,
        "backbone.model.blocks.3.norm1.bias": peer.layers[3].norm1.bias,
    }
    first = peer.layers[0].mlp
    pairs["backbone.model.blocks.0.mlp.fc2.weight"] = (first.down_proj if kind == "dinov3" else first.fc2).weight
    patches = peer.embeddings.patch_embeddings
    pairs["backbone.model.patch_embed.proj.weight"] = getattr(patches, "projection", patches).weight
    parameters = dict(ours.named_parameters())
    for name, theirs in pairs.items():
        close(parameters[name].grad, theirs.grad)


@pytest.mark.parametrize("number", range(BLOCKS))
def test_attention_masks_change_what_the_blocks_see(number):
    ours = tiny_segmentor().train()
    images = random_frames(1)
    ours._probabilities = [0.0] * BLOCKS
    plain = ours.predictions(images, 1)["pred_masks"]
    ours._probabilities = [float(i == number) for i in range(BLOCKS)]
    assert not torch.allclose(ours.predictions(images, 1)["pred_masks"], plain)
    torch.testing.assert_close(ours.eval().predictions(images, 1)["pred_masks"], plain)


def test_video_model_equals_transformers_for_several_clips():
    peer, ours = tiny_peer("dinov2", video=True), tiny_segmentor("dinov2", *VIDEO, seed=5)
    fill(ours, peer.state_dict())
    clips, frames = 2, 5
    images = random_frames(clips * frames)
    with torch.no_grad():
        expected = peer(images.unflatten(0, (clips, frames)))
        found = ours.predictions(images, frames)
    # Theirs are stacked frame by frame.
    logits = expected.class_queries_logits.unflatten(0, (frames, clips)).transpose(0, 1)
    masks = expected.masks_queries_logits.unflatten(0, (frames, clips)).permute(1, 2, 0, 3, 4)
    assert found["pred_masks"].shape == (clips, QUERIES, frames, SIDE // 4, SIDE // 4)
    close(found["pred_logits"], logits)
    close(found["pred_masks"], masks)


def test_queries_carried_through_the_norm():
    """NORM_QUERIES against transformers' own layers, put together by hand: they have no such model."""
    peer = tiny_peer("dinov2", video=True)
    ours = tiny_segmentor("dinov2", *VIDEO, "MODEL.ENCODER.NORM_QUERIES", True, seed=5)
    fill(ours, peer.state_dict())
    images = random_frames(3)
    with torch.no_grad():
        hidden = peer.embeddings(images)
        first = len(peer.layers) - BLOCKS
        for layer in peer.layers[:first]:
            hidden = layer(hidden)
        queries, masks = peer.query.weight[None], []
        for t in range(3):
            x = torch.cat([queries, hidden[t : t + 1]], 1)
            for layer in peer.layers[first:]:
                x = layer(x)
            x = peer.layernorm(x)
            masks.append(peer.predict(x)[0])
            queries = peer.query_updater(x[:, :QUERIES]) + peer.query.weight
        found = ours.predictions(images, 3)["pred_masks"][0]
    close(found, torch.cat(masks).transpose(0, 1))


def test_video_gradients_equal_transformers():
    peer, ours = tiny_peer("dinov2", video=True), tiny_segmentor("dinov2", *VIDEO, seed=5)
    fill(ours, peer.state_dict())
    images = random_frames(5)
    expected, found = peer(images[None]), ours.train().predictions(images, 5)
    # Of the last frame only: the gradient goes back through all queries.
    expected.masks_queries_logits[-1].square().sum().backward()
    found["pred_masks"][:, :, -1].square().sum().backward()
    close(ours.sem_seg_head.query_updater.weight.grad, peer.query_updater.weight.grad)
    close(ours.sem_seg_head.q.weight.grad, peer.query.weight.grad)
    theirs = peer.embeddings.patch_embeddings.projection.weight.grad
    close(ours.backbone.model.patch_embed.proj.weight.grad, theirs)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "vit"])
@pytest.mark.parametrize("mode", ["per-frame", "causal-mean"])
@pytest.mark.parametrize("size", [(64, 64), (50, 83), (16, 16)])
def test_stream_equals_clip_bit_for_bit(kind, mode, size):
    ours = tiny_segmentor(kind, *VIDEO, "TEST.CLASS_LOGITS", mode)
    clip = random_clip(4, *size)
    (expected,) = ours.score_maps([clip])
    state = ours.init_state()
    for t, frame in enumerate(clip.frames):
        before = copy.deepcopy(state)
        scores, new = ours.step(frame, state)
        assert torch.equal(scores, expected[t])
        assert all(torch.equal(state[k], before[k]) for k in state if isinstance(state[k], torch.Tensor))
        state = new
    assert state["seen"] == 4
    assert expected.shape == (4, CLASSES, -(-size[0] // 4), -(-size[1] // 4))


def test_class_logits_are_averaged_as_asked():
    clip = random_clip(3)
    models = {
        mode: tiny_segmentor("dinov2", *VIDEO, "TEST.CLASS_LOGITS", mode)
        for mode in ("per-frame", "causal-mean", "whole-video")
    }
    for model in models.values():
        model.load_state_dict(models["per-frame"].state_dict())
    scores = {mode: model.score_maps([clip])[0] for mode, model in models.items()}
    images, _ = models["per-frame"].stack([clip])
    with torch.no_grad():
        raw = models["per-frame"].predictions(images, 3)
    logits, masks = raw["pred_logits"][0].double(), raw["pred_masks"][0].double()

    def expected(classes, t):
        return torch.einsum("qk,qhw->khw", classes.softmax(-1)[:, :-1], masks[:, t].sigmoid()).float()

    for t in range(3):
        close(scores["per-frame"][t], expected(logits[t], t))
        close(scores["causal-mean"][t], expected(logits[: t + 1].mean(0), t))
        close(scores["whole-video"][t], expected(logits.mean(0), t))
    assert not torch.allclose(scores["per-frame"][2], scores["causal-mean"][2])
    with pytest.raises(ValueError, match="whole-video needs the whole video"):
        models["whole-video"].step(clip.frames[0], models["whole-video"].init_state())


def test_clips_and_streams_do_not_depend_on_their_batch():
    ours = tiny_segmentor("dinov2", *VIDEO)
    clips = [random_clip(3, seed=seed) for seed in range(3)]
    together = ours.score_maps(clips)
    for clip, scores in zip(clips, together, strict=True):
        close(scores, ours.score_maps([clip])[0])
    states = [ours.init_state() for _ in clips]
    for t in range(3):
        scores, states = ours.step_many([clip.frames[t] for clip in clips], states)
        for expected, found in zip(together, scores, strict=True):
            close(found, expected[t])


def test_a_new_size_starts_the_stream_anew():
    ours = tiny_segmentor("dinov2", *VIDEO)
    _, state = ours.step(random_clip(1).frames[0], ours.init_state())
    frame = random_clip(1, 32, 48).frames[0]
    fresh, _ = ours.step(frame, ours.init_state())
    scores, state = ours.step(frame, state)
    assert torch.equal(scores, fresh)
    assert (state["resets"], state["seen"], list(state["size"])) == (1, 1, [32, 48])
    with pytest.raises(ValueError, match="init_state"):
        ours.step(frame, {"size": []})


def test_image_model_takes_frames_of_a_stream_for_themselves():
    ours = tiny_segmentor("dinov3")
    clip = random_clip(2)
    state = ours.init_state()
    for frame, expected in zip(clip.frames, ours.score_maps([clip])[0], strict=True):
        scores, state = ours.step(frame, state)
        assert torch.equal(scores, expected)
    assert not ours.looks_back


@pytest.mark.parametrize("kind", ["dinov2", "dinov2-gated", "dinov3", "dinov3-gated", "vit"])
@pytest.mark.parametrize("frames", [1, 3])
def test_every_kind_trains_with_all_sets_weighted(kind, frames):
    video = VIDEO if frames > 1 else ()
    ours = tiny_segmentor(kind, *video, "MODEL.MASK_FORMER.MATCHING", "first-frame", "MODEL.THE_MASK.ROUNDS", 2).train()
    losses = ours([random_clip(frames, 48, 80, seed) for seed in range(2)])
    for name in ("loss_ce", "loss_mask", "loss_dice", "loss_mask_secondary", "loss_dice_secondary"):
        assert {name, *(f"{name}_{i}" for i in range(BLOCKS))} <= set(losses)
    assert all(value > 0 for name, value in losses.items() if "secondary" not in name)
    sum(losses.values()).backward()
    without = [name for name, p in ours.named_parameters() if p.grad is None or not p.grad.any()]
    # Prefix tokens and the like all take part; nothing is left out.
    assert not without


def test_annealing_follows_the_iteration():
    ours = tiny_segmentor("dinov2", "SOLVER.MAX_ITER", 100)
    ours.set_iteration(0)
    assert ours.sem_seg_head.attn_mask_probs.tolist() == [1.0, 1.0]
    # Two blocks: they fall from 1/4 to 1/2 and from 1/2 to 3/4.
    ours.set_iteration(37)
    assert ours.sem_seg_head.attn_mask_probs.tolist() == pytest.approx([0.52**0.9, 1.0])
    ours.set_iteration(75)
    assert ours.sem_seg_head.attn_mask_probs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.VIT.PATCH_SIZE", 14, "MODEL.VIT.IMG_SIZE", 70), "PATCH_SIZE=14"),
        (("MODEL.VIT.IMG_SIZE", 8), "smaller than one patch"),
        (("MODEL.ENCODER.NUM_BLOCKS", 9), "NUM_BLOCKS is 9"),
        (("TEST.CLASS_LOGITS", "mean"), "TEST.CLASS_LOGITS"),
        (("MODEL.ENCODER.ANNEAL_START", [0.1]), "ANNEAL_START has 1"),
        (("MODEL.ENCODER.ANNEAL_START", [0.5, 0.6], "MODEL.ENCODER.ANNEAL_END", [0.4, 0.9]), "0 <= start < end"),
        (("MODEL.VIT.NAME", "resnet18"), "not a plain vision transformer|cannot be taken apart"),
        (("MODEL.VIT.NAME", "beit_base_patch16_224"), "cannot be taken apart|not a plain vision transformer"),
        (("MODEL.BACKBONE.NAME", "build_resnet_backbone"), "build_vit_backbone"),
    ],
)
def test_bad_config(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_segmentor("dinov2", *overrides)


def test_bad_input():
    ours = tiny_segmentor()
    with pytest.raises(ValueError, match=r"8x40 pixels is smaller than one patch"):
        ours.score_maps([random_clip(1, 8, 40)])
    with pytest.raises(ValueError, match="does not carry its queries on"):
        ours.train()([random_clip(2)])
    video = tiny_segmentor("dinov2", *VIDEO, "TEST.CLASS_LOGITS", "whole-video")
    image = torch.zeros(1, 1, 3, 64, 64).expand(1, 10**9, 3, 64, 64)
    with pytest.raises(ValueError, match="1000000000 frames of 64x64"):
        video._whole_video_scores(image)


def test_timm_that_is_too_old(monkeypatch):
    for version in ("1.0.22", "1.0.23.dev0", "1.1.0", "2.0"):
        plain_vit.check_timm(version)
    for version in ("1.0.21", "1.0.9", "0.9.16"):
        with pytest.raises(ValueError, match=rf"timm {version} is too old.*timm>=1\.0\.22"):
            plain_vit.check_timm(version)
    monkeypatch.setattr(plain_vit, "LEAST_TIMM", (99, 0, 0))
    with pytest.raises(ValueError, match="too old"):
        tiny_segmentor()


def test_scores_merged_at_the_input_equal_the_released_order():
    clip = random_clip(1, 50, 83)
    ours = tiny_segmentor("dinov2", "MODEL.MASK_FORMER.MERGE_AT", "input")
    images, _ = ours.stack([clip])
    with torch.no_grad():
        raw = ours.predictions(images, 1)
    masks = torch.nn.functional.interpolate(raw["pred_masks"][0, :, 0][None], scale_factor=4, mode="bilinear")[0]
    classes = raw["pred_logits"][0, 0].softmax(-1)[:, :-1]
    expected = torch.einsum("qk,qhw->khw", classes, masks.sigmoid())[:, :50, :83]
    close(ours.score_maps([clip])[0][0], expected)
    assert torch.equal(ours.step(clip.frames[0], ours.init_state())[0], ours.score_maps([clip])[0][0])
    with pytest.raises(ValueError, match="MERGE_AT input"):
        ours.step_queries(clip.frames[0], ours.init_state())
    assert not ours.has_queries
