"""Tiny encoder-only models: ours, and transformers' with the same random weights."""

from dataclasses import replace

import pytest
import torch
from detectron2.modeling import build_model

import the_mask.modeling  # noqa: F401  (fills the registries)
from the_mask.config import load_config
from the_mask.data.clips import Clip
from the_mask.weights.converters import check, convert

WIDTH, DEPTH, HEADS, BLOCKS, QUERIES, CLASSES, SIDE = 48, 4, 4, 2, 6, 5, 64
NAMES = {
    "dinov2": "vit_small_patch14_reg4_dinov2",
    "dinov2-gated": "vit_giant_patch14_reg4_dinov2",
    "dinov3": "vit_small_patch16_dinov3_qkvb",
    "dinov3-gated": "vit_small_plus_patch16_dinov3_qkvb",
    "vit": "vit_tiny_patch16_224",
}


def tiny_config(kind="dinov2", *overrides):
    return load_config(
        None,
        [
            *("MODEL.DEVICE", "cpu"),
            *("MODEL.META_ARCHITECTURE", "EncoderSegmentor"),
            *("MODEL.BACKBONE.NAME", "build_vit_backbone"),
            *("MODEL.VIT.NAME", NAMES[kind]),
            *("MODEL.VIT.IMG_SIZE", SIDE),
            *("MODEL.VIT.WIDTH", WIDTH),
            *("MODEL.VIT.DEPTH", DEPTH),
            *("MODEL.VIT.HEADS", HEADS),
            *("MODEL.ENCODER.NUM_BLOCKS", BLOCKS),
            *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", QUERIES),
            *("MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 64),
            *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", CLASSES),
            *overrides,
        ],
    )


def randomize(model, seed=0):
    """Trained-like numbers: scales that let something through, offsets that go somewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("lambda1", "gamma", "gamma_1", "gamma_2")):
                parameter.copy_(0.5 + 0.1 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise * (0.7 / parameter[0].numel() ** 0.5))
            else:
                parameter.add_(0.1 * noise)
    return model


def tiny_segmentor(kind="dinov2", *overrides, seed=0):
    torch.manual_seed(seed)
    return randomize(build_model(tiny_config(kind, *overrides)), seed).eval()


def tiny_peer(kind, video=False, **more):
    """transformers' model of a kind, randomised, in eval mode; no attention masks at inference."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": SIDE,
        "patch_size": 16,
        "num_blocks": BLOCKS,
        "num_queries": QUERIES,
        "num_labels": CLASSES,
        **more,
    }
    if kind.startswith("dinov3"):
        if not hasattr(transformers, "EomtDinov3Config"):
            pytest.skip("transformers without eomt_dinov3")
        sizes |= {"intermediate_size": 4 * WIDTH, "use_gated_mlp": kind.endswith("gated"), "pos_embed_rescale": None}
        sizes |= {"layer_norm_eps": 1e-5}
        model = transformers.EomtDinov3ForUniversalSegmentation(transformers.EomtDinov3Config(**sizes))
        if kind.endswith("gated"):
            # Its config has one activation for encoder and heads; DINOv3's gate is a SiLU, EoMT's heads have GELUs.
            for layer in model.layers:
                layer.mlp.act_fn = torch.nn.SiLU()
    elif video:
        if not hasattr(transformers, "VideomtConfig"):
            pytest.skip("transformers without videomt")
        model = transformers.VideomtForUniversalSegmentation(transformers.VideomtConfig(**sizes))
    else:
        sizes |= {"use_swiglu_ffn": kind.endswith("gated")}
        model = transformers.EomtForUniversalSegmentation(transformers.EomtConfig(**sizes))
    model.attn_mask_probs.zero_()
    return randomize(model).eval()


def fill(ours, state):
    """Load a foreign state dict; every parameter must come from it, and nothing of it may be left."""
    result = check(convert(state))
    assert not result.unknown
    wanted = {name for name in ours.state_dict() if not name.startswith("criterion.")}
    assert set(result.state) == wanted
    ours.load_state_dict(result.state, strict=False)
    return result


def random_frames(count, height=SIDE, width=SIDE, seed=1):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def random_clip(frames, height=SIDE, width=SIDE, seed=0, labels=True):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8) for _ in range(frames)]
    clip = Clip(images, seed=seed, video_id=str(seed))
    if labels:
        coarse = torch.randint(CLASSES, (frames, 3, 3), generator=generator).float()
        grown = torch.nn.functional.interpolate(coarse[None], size=(height, width))[0].long()
        clip = replace(clip, labels=list(grown))
    return clip
