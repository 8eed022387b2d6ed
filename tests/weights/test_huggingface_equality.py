"""Same weights, same outputs: Hugging Face's Mask2Former and SegFormer files, loaded by our converters, against theirs.

Their models write the files themselves (``save_pretrained``), so the names are those of the published ones.
"""

from dataclasses import replace

import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from tolerances import assert_close
from torch import nn
from torch.nn import functional as F

import the_mask.modeling  # noqa: F401
from the_mask.config import load_config
from the_mask.data.clips import Clip
from the_mask.weights import load_weights
from the_mask.weights.converters import check, convert

transformers = pytest.importorskip("transformers")

CLASSES = 7
STAGES = [f"stage{i}" for i in range(1, 5)]


def randomize(model, seed=0):
    """Trained-like numbers: norms that do something, offsets that go somewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


def huggingface_mask2former(kind, **sizes):
    if kind == "swin":
        backbone = transformers.SwinConfig(out_features=STAGES)
    else:
        backbone = transformers.ResNetConfig(out_features=STAGES)
    config = transformers.Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES, **sizes)
    return randomize(transformers.Mask2FormerForUniversalSegmentation(config))


def our_mask2former(kind, *overrides):
    swin = [
        *("MODEL.BACKBONE.NAME", "build_timm_backbone"),
        *("MODEL.TIMM.NAME", "swin_tiny_patch4_window7_224"),
        *("MODEL.TIMM.OUT_NORM", "LN"),
    ]
    backbone = swin if kind == "swin" else ["MODEL.RESNETS.NORM", "FrozenBN"]
    common = ["MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", CLASSES]
    return build_model(load_config(None, [*common, *backbone, *overrides])).eval()


def assert_same_outputs(kind, folder, size, sizes, overrides):
    theirs = huggingface_mask2former(kind, **sizes)
    theirs.save_pretrained(folder)
    ours = our_mask2former(kind, *overrides)
    report = load_weights(ours, folder / "model.safetensors", strict=True)
    assert not report.unexpected
    assert not report.mismatched
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(pixel_values=x)
        found = ours.sem_seg_head(ours.backbone(x))
    for name, peer in (("pred_logits", "class_queries_logits"), ("pred_masks", "masks_queries_logits")):
        want = getattr(expected, peer)
        got = found[name].squeeze(2) if name == "pred_masks" else found[name]
        assert want.abs().max() > 0.1
        # 1e-4 of the largest value: masks are sums of 256 products.
        assert_close(got, want, "peer", largest=True)
    assert "as its release computes: MODEL.MASK_FORMER.MERGE_AT input" in report.notes
    ours.options = replace(ours.options, merge_at="input")
    # The released semantic inference on their maps: masks enlarged to the padded input, merged, cut to the frame.
    height, width = size[0] - 5, size[1] - 7
    frame = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(4))
    images, _ = ours.stack([Clip([frame])])
    assert images.shape[-2:] == size
    with torch.no_grad():
        maps = theirs(pixel_values=images)
        masks = F.interpolate(maps.masks_queries_logits, size=size, mode="bilinear", align_corners=False)
        classes = maps.class_queries_logits.softmax(dim=-1)[..., :-1]
        merged = torch.einsum("bqc,bqhw->bchw", classes, masks.sigmoid())[0, :, :height, :width]
        (scores,) = ours.score_maps([Clip([frame])])
    assert ours.score_stride == 1
    assert_close(scores[0], merged, "sample")
    agree = ours.predict([Clip([frame])])[0][0] == merged.argmax(dim=0)
    assert agree.float().mean() > 0.999


SMALL = {
    "hidden_dim": 64,
    "feature_size": 64,
    "mask_feature_size": 64,
    "encoder_feedforward_dim": 96,
    "dim_feedforward": 80,
    "num_queries": 9,
    "encoder_layers": 2,
    "decoder_layers": 5,
}
OUR_SMALL = [
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 64),
    *("MODEL.SEM_SEG_HEAD.MASK_DIM", 64),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 2),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD", 96),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", 64),
    *("MODEL.MASK_FORMER.DIM_FEEDFORWARD", 80),
    *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 9),
    *("MODEL.MASK_FORMER.DEC_LAYERS", 5),
]


@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_mask2former_with_a_small_head(kind, tmp_path):
    """The whole Swin-T or R50, a narrow head of few layers."""
    assert_same_outputs(kind, tmp_path, (64, 96), SMALL, OUR_SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_mask2former_at_full_size(kind, tmp_path):
    """Swin-T and R50 with 100 queries and 9 layers, on a frame whose sides are no multiples of 32."""
    assert_same_outputs(kind, tmp_path, (256, 320), {}, ())


@pytest.mark.parametrize("variant", ["B0", "B1"])
def test_segformer_encoder(variant, tmp_path):
    widths = {"B0": [32, 64, 160, 256], "B1": [64, 128, 320, 512]}[variant]
    config = transformers.SegformerConfig(hidden_sizes=widths, num_labels=CLASSES)
    theirs = randomize(transformers.SegformerForSemanticSegmentation(config))
    theirs.save_pretrained(tmp_path)
    cfg = load_config(None, ["MODEL.BACKBONE.NAME", "build_mit_backbone", "MODEL.MIT.VARIANT", variant])
    ours = nn.ModuleDict({"backbone": build_backbone(cfg)}).eval()
    report = load_weights(ours, tmp_path / "model.safetensors", strict=True)
    assert not report.unexpected
    assert all(name.startswith("decode_head.") for name in report.ignored)
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs.segformer(x, output_hidden_states=True).hidden_states
        found = ours["backbone"](x)
    for level, want in zip(("res2", "res3", "res4", "res5"), expected, strict=True):
        assert_close(found[level], want, "peer")


def test_names_in_memory_convert_like_those_on_disk(tmp_path):
    """Newer releases rename in memory; a ``state_dict()`` saved by torch has those names."""
    theirs = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=CLASSES))
    swin = transformers.SwinConfig(embed_dim=24, num_heads=[1, 2, 4, 8], out_features=STAGES)
    mask2former = transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(backbone_config=swin, num_labels=CLASSES, **SMALL)
    )
    from safetensors.torch import load_file

    for model in (theirs, mask2former):
        model.save_pretrained(tmp_path)
        disk = check(convert(load_file(tmp_path / "model.safetensors"))).state
        memory = check(convert(model.state_dict())).state
        assert set(disk) == set(memory)
        assert all(torch.equal(disk[name], value) for name, value in memory.items())
