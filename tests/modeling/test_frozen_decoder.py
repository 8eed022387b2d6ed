"""PMT: a decoder on a frozen encoder, against its formulas; any backbone; features kept on disk."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encoder_cases import CLASSES, QUERIES, random_clip, randomize, tiny_config
from tolerances import assert_close
from torch.nn import functional as F

from the_mask.config import load_config
from the_mask.config.keys.encoder import FrozenDecoderOptions
from the_mask.modeling import feature_cache
from the_mask.modeling.build import build_segmentor
from the_mask.modeling.mask.frozen_decoder import FrozenDecoder

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
FROZEN = [
    *("MODEL.ENCODER.FROZEN.ENABLED", True),
    *("MODEL.ENCODER.FROZEN.LEVELS", [1, 3]),
    *("MODEL.ENCODER.FROZEN.BLOCKS", 2),
    *("MODEL.ENCODER.FROZEN.HEADS", 4),
    *("MODEL.ENCODER.FROZEN.HIDDEN", 32),
    *("MODEL.ENCODER.MASKED_ATTENTION", False),
]
VIDEO = ["MODEL.ENCODER.PROPAGATE", True, "MODEL.MASK_FORMER.MATCHING", "first-frame"]
STILL = [
    *("INPUT.RESIZE.MIN_SCALE", 1.0),
    *("INPUT.RESIZE.MAX_SCALE", 1.0),
    *("INPUT.CROP.ENABLED", False),
    *("INPUT.COLOR_JITTER", "none"),
]
RESNET = [
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone"),
    *("MODEL.RESNETS.DEPTH", 18),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.NORM", "BN"),
    *("MODEL.ENCODER.FROZEN.WIDTH", 48),
]


def frozen_segmentor(*overrides, kind="dinov2", seed=0):
    torch.manual_seed(seed)
    return randomize(build_segmentor(tiny_config(kind, *FROZEN, *overrides)), seed)


def reference(decoder, levels, grid, queries):
    """The decoder in float64, written out: levels, then blocks with rotary positions on the patches only."""
    total = 0
    for level, x in zip(decoder.levels, levels, strict=True):
        mean, var = level.norm.running_mean.double(), level.norm.running_var.double()
        x = (x.double() - mean) / (var + level.norm.eps).sqrt() * level.norm.weight + level.norm.bias
        first, _, last = level.mlp
        hidden = F.gelu(x @ first.weight.T.double() + first.bias)
        total = total + level.scale * (x + hidden @ last.weight.T.double() + last.bias)
    x = torch.cat([queries.double(), total], 1)
    heads, head = 4, x.shape[-1] // 4
    rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1 for n in grid)
    periods = 100.0 ** (torch.arange(head // 4, dtype=torch.float64) / (head // 4))
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(-1, 2)
    angle = (2 * torch.pi * place[:, :, None] / periods).flatten(1).repeat(1, 2)

    def turn(v):
        at = v.shape[2] - len(place)
        fixed, patches = v[:, :, :at], v[:, :, at:]
        a, b = patches.chunk(2, -1)
        return torch.cat([fixed, patches * angle.cos() + torch.cat([-b, a], -1) * angle.sin()], 2)

    for block in decoder.blocks:
        y = F.layer_norm(x, x.shape[-1:], block.norm1.weight.double(), block.norm1.bias.double(), block.norm1.eps)
        q, k, v = (y @ block.attn.qkv.weight.T.double()).chunk(3, -1)
        q, v = q + block.attn.q_bias, v + block.attn.v_bias
        q, k, v = (z.unflatten(2, (heads, head)).transpose(1, 2) for z in (q, k, v))
        weights = (turn(q) @ turn(k).transpose(2, 3) / head**0.5).softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(2) @ block.attn.proj.weight.T.double() + block.attn.proj.bias
        x = x + block.gamma_1 * y
        y = F.layer_norm(x, x.shape[-1:], block.norm2.weight.double(), block.norm2.bias.double(), block.norm2.eps)
        y = F.gelu(y @ block.mlp.fc1.weight.T.double() + block.mlp.fc1.bias)
        x = x + block.gamma_2 * (y @ block.mlp.fc2.weight.T.double() + block.mlp.fc2.bias)
    return x


def test_decoder_equals_its_formulas():
    decoder = randomize(FrozenDecoder([48, 48], QUERIES, 5, FrozenDecoderOptions(blocks=2, heads=4, hidden=32))).eval()
    generator = torch.Generator().manual_seed(3)
    for level in decoder.levels:
        level.norm.running_mean.copy_(torch.randn(48, generator=generator))
        level.norm.running_var.copy_(torch.rand(48, generator=generator) + 0.5)
    grid = (3, 5)
    levels = [torch.randn(2, 5 + 15, 48, generator=generator) for _ in range(2)]
    queries = torch.randn(2, QUERIES, 48, generator=generator)
    with torch.no_grad():
        tokens = decoder.join({"a": levels[0], "b": levels[1]}, grid)
        x = torch.cat([queries, tokens.values], 1)
        for block in decoder.blocks:
            x = block(x, rope=tokens.rotation)
        expected = reference(decoder, levels, grid, queries)
    assert_close(x, expected, "layer")


def test_levels_are_the_encoders_blocks_through_its_norm():
    model = frozen_segmentor().eval()
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.backbone(images)
        vit = model.backbone.model
        vit.dynamic_img_size = True
        wanted = vit.forward_intermediates(
            images, indices=[1, 3], norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
    assert list(found) == ["block1", "block3"]
    for own, (patches, prefix) in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(own, torch.cat([prefix, patches], 1))


@pytest.mark.parametrize("overrides", [[], VIDEO, RESNET, [*RESNET, *VIDEO]])
def test_only_the_decoder_trains_and_streams_equal_clips(overrides):
    model = frozen_segmentor(*overrides).train()
    frames = 3 if "MODEL.ENCODER.PROPAGATE" in overrides else 1
    assert not model.backbone.training
    losses = model([random_clip(frames, 48, 80, seed) for seed in range(2)])
    sum(losses.values()).backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.sem_seg_head.parameters())
    model.eval()
    clip = random_clip(3, 50, 70)
    (expected,) = model.score_maps([clip])
    assert expected.shape == (3, CLASSES, 13, 18)
    state = model.init_state()
    for frame, scores in zip(clip.frames, expected, strict=True):
        found, state = model.step(frame, state)
        assert torch.equal(found, scores)


def cached(folder, *overrides, seed=0, **kwargs):
    options = ["MODEL.FROZEN_FEATURES.CACHE", str(folder), *STILL, *overrides]
    return frozen_segmentor(*options, seed=seed, **kwargs).train()


@pytest.mark.parametrize("backbone", [[], RESNET])
def test_features_are_computed_once(tmp_path, backbone):
    model = cached(tmp_path, *VIDEO, *backbone)
    calls = []
    inner = model.backbone.res2 if backbone else model.backbone.model.blocks[0]
    inner.register_forward_hook(lambda *_: calls.append(1))
    clips = [random_clip(3, 48, 80, seed) for seed in range(2)]
    first = model(clips)
    assert (model.feature_cache.hits, model.feature_cache.misses) == (0, 6)
    ran = len(calls)
    again = model(clips)
    assert model.feature_cache.hits == 6
    assert len(calls) == ran, "the backbone ran again"
    assert all(torch.equal(first[name], again[name]) for name in first)
    # Close to what is computed without a cache, and evaluation does not read it.
    plain = frozen_segmentor(*VIDEO, *backbone).train()
    plain.load_state_dict(model.state_dict())
    for name, value in plain(clips).items():
        assert_close(value, first[name], "half inputs")
    clip = random_clip(2, 48, 80, 0)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.eval().score_maps([clip])[0], model.eval().score_maps([clip])[0])
    assert len(calls) > ran
    # A new run finds them; a half-written file of a killed one would not carry their name.
    other = cached(tmp_path, *VIDEO, *backbone)
    other.load_state_dict(model.state_dict())
    other(clips)
    assert (other.feature_cache.hits, other.feature_cache.misses) == (6, 0)


def test_other_weights_or_pixels_are_other_features(tmp_path):
    model = cached(tmp_path)
    clip = random_clip(1)
    model([clip])
    changed = cached(tmp_path, seed=1)
    changed([clip])
    assert changed.feature_cache.misses == 1
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2
    darker = replace(clip, frames=[clip.frames[0] // 2])
    model([darker])
    assert model.feature_cache.misses == 2


def test_folder_of_other_weights_is_refused(tmp_path):
    model = cached(tmp_path)
    folder = model.feature_cache.open(model.backbone)
    manifest = folder / feature_cache.MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "digest": "0" * 64}))
    with pytest.raises(ValueError, match="features of other weights"):
        cached(tmp_path)([random_clip(1)])
    manifest.write_text("{")
    with pytest.raises(ValueError, match=r"features\.json is not JSON.*delete its folder"):
        cached(tmp_path)([random_clip(1)])


def test_full_disk_and_limit(tmp_path, monkeypatch, caplog):
    model = cached(tmp_path)
    model.feature_cache.open(model.backbone)

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "atomic_write", full)
        with pytest.raises(ValueError, match=r"no space left.*MAX_GB"):
            model([random_clip(1)])
    small = cached(tmp_path, "MODEL.FROZEN_FEATURES.MAX_GB", 1e-9)
    small([random_clip(1, seed=4)])
    small([random_clip(1, seed=4)])
    assert small.feature_cache.hits == 0
    assert "MAX_GB" in caplog.text
    folder = small.feature_cache.open(small.backbone)
    assert not list(folder.glob("*.safetensors"))


def test_broken_file_is_named(tmp_path):
    model = cached(tmp_path)
    model([random_clip(1)])
    (path,) = model.feature_cache.open(model.backbone).glob("*.safetensors")
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=f"{path.name} is broken"):
        model([random_clip(1)])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["INPUT.CROP.ENABLED", True], "INPUT.CROP.ENABLED"),
        (["INPUT.RESIZE.MAX_SCALE", 2.0], "MAX_SCALE"),
        (["INPUT.COLOR_JITTER", "shared"], "COLOR_JITTER"),
        (["MODEL.ENCODER.FROZEN.ENABLED", False], "does not train at all"),
        (["MODEL.THE_MASK.FROZEN_EVAL", False], "FROZEN_EVAL"),
        (["MODEL.ENCODER.FROZEN.LEVELS", [1, 9]], "LEVELS"),
        (["MODEL.ENCODER.FROZEN.HEADS", 5], "multiple of 20"),
    ],
)
def test_bad_config(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        cached(tmp_path, *overrides)


def test_folder_that_cannot_be_made(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match=r"MODEL\.FROZEN_FEATURES\.CACHE"):
        cached(blocked / "cache")([random_clip(1)])


def test_large_model_trains_as_many_parameters_as_published():
    """PMT-L: about 55 M."""
    cfg = load_config(CONFIGS / "vspw" / "pmt_l.yaml", ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_segmentor(cfg)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == pytest.approx(55e6, rel=0.01)
