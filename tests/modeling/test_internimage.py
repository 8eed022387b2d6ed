"""InternImage: parameter counts, released key names, every block variant against a naive float64 network, training."""

import pytest
import torch
import torch.nn.functional as F
from backbone_cases import assert_checkpointing_changes_no_gradient
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from tolerances import assert_close
from torchvision.ops import deform_conv2d

from the_mask.config import load_config
from the_mask.modeling.backbones.common import DropPath
from the_mask.modeling.backbones.internimage import VARIANTS, InternImage

# Closed-form sums that match the released models' totals.
PARAMETERS = {
    "T": 28_769_520,
    "S": 48_502_560,
    "B": 94_909_920,
    "L": 218_952_370,
    "XL": 328_971_228,
    "H": 1_073_122_480,
    "G": 3_052_781_184,
}
TINY = ("MODEL.INTERNIMAGE.CHANNELS", "32", "MODEL.INTERNIMAGE.DEPTHS", "[1,1,2,1]")


def build(variant: str, *overrides: str) -> InternImage:
    cfg = load_config(None, ["MODEL.INTERNIMAGE.VARIANT", variant, *overrides])
    return BACKBONE_REGISTRY.get("build_internimage_backbone")(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameter_counts(variant):
    with torch.device("meta"):
        model = build(variant)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[variant]
    assert not list(model.buffers())


def test_tiny_without_layer_scale_matches_the_classification_file():
    with torch.device("meta"):
        model = build("T")
    scales = sum(p.numel() for name, p in model.named_parameters() if "gamma" in name)
    assert PARAMETERS["T"] - scales == 28_754_672


def released_keys(variant: str) -> set[str]:
    """Key names of the released segmentation checkpoints, below ``backbone.``."""
    v = VARIANTS[variant]
    pairs = ["patch_embed.conv1", "patch_embed.conv2", "patch_embed.norm1.1", "patch_embed.norm2.1"]
    single = []
    for i, depth in enumerate(v.depths):
        for j in range(depth):
            block = f"levels.{i}.blocks.{j}"
            pairs += [f"{block}.{part}" for part in ("norm1.0", "norm2.0", "mlp.fc1", "mlp.fc2")]
            dcn = ("dw_conv.0", "dw_conv.1.1", "offset", "mask", "input_proj", "output_proj")
            pairs += [f"{block}.dcn.{part}" for part in dcn]
            if variant in ("H", "G"):
                single += [f"{block}.dcn.center_feature_scale_proj_{leaf}" for leaf in ("weight", "bias")]
            else:
                single += [f"{block}.gamma1", f"{block}.gamma2"]
            if variant == "H":
                pairs += [f"{block}.res_post_norm1.0", f"{block}.res_post_norm2.0"]
        if variant in ("T", "H", "G"):
            pairs.append(f"levels.{i}.norm.0")
        if i < 3:
            single.append(f"levels.{i}.downsample.conv.weight")
            pairs.append(f"levels.{i}.downsample.norm.1")
    pairs += [f"levels.2.post_norms.{k}.0" for k in range({"H": 5, "G": 8}.get(variant, 0))]
    return {f"{stem}.{leaf}" for stem in pairs for leaf in ("weight", "bias")} | set(single)


@pytest.mark.parametrize("variant", PARAMETERS)
def test_released_keys(variant):
    with torch.device("meta"):
        model = build(variant)
    assert set(model.state_dict()) == released_keys(variant)


def naive_dcn(p: dict[str, torch.Tensor], x: torch.Tensor, groups: int, scale: float) -> torch.Tensor:
    """DCNv3 layer on [B,h,w,C] through torchvision's deform_conv2d with weights of one."""
    channels = x.shape[-1]

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    projected = linear("input_proj", x)
    weight = p["dw_conv.0.weight"]
    u = F.conv2d(x.permute(0, 3, 1, 2), weight, p["dw_conv.0.bias"], padding=weight.shape[-1] // 2, groups=channels)
    u = naive_norm(p, "dw_conv.1.1", u.permute(0, 2, 3, 1))
    u = 0.5 * u * (1 + torch.erf(u / 2**0.5))
    offset = linear("offset", u).unflatten(-1, (groups, 3, 3, 2))  # group, column i, row j, (x, y)
    weights = linear("mask", u).unflatten(-1, (groups, 9)).softmax(-1).unflatten(-1, (3, 3))
    steps = torch.arange(3, dtype=x.dtype) - 1
    dx = (scale - 1) * steps[:, None] + scale * offset[..., 0]
    dy = (scale - 1) * steps[None, :] + scale * offset[..., 1]
    # torchvision: row-major points, (y, x) order, channels first.
    their_offset = torch.stack([dy, dx], -1).transpose(-3, -2).flatten(3).permute(0, 3, 1, 2)
    their_weights = weights.transpose(-2, -1).flatten(3).permute(0, 3, 1, 2)
    ones = torch.ones(channels, 1, 3, 3, dtype=x.dtype)
    y = deform_conv2d(projected.permute(0, 3, 1, 2), their_offset, ones, padding=1, mask=their_weights)
    y = y.permute(0, 2, 3, 1)
    if "center_feature_scale_proj_weight" in p:
        blend = torch.sigmoid(u @ p["center_feature_scale_proj_weight"].T + p["center_feature_scale_proj_bias"])
        blend = blend.repeat_interleave(channels // groups, dim=-1)
        y = y * (1 - blend) + projected * blend
    return linear("output_proj", y)


def naive_norm(p: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def below(p: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in p.items() if key.startswith(prefix)}


def naive_block(p: dict[str, torch.Tensor], x: torch.Tensor, variant: str, groups: int) -> torch.Tensor:
    def mlp(v: torch.Tensor) -> torch.Tensor:
        v = v @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
        v = 0.5 * v * (1 + torch.erf(v / 2**0.5))
        return v @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]

    def dcn(v: torch.Tensor) -> torch.Tensor:
        return naive_dcn(below(p, "dcn."), v, groups, 2.0 if variant in ("L", "XL") else 1.0)

    for k, operator in ((1, dcn), (2, mlp)):
        norm = f"norm{k}.0"
        if variant == "T":  # scale, pre-norm
            x = x + p[f"gamma{k}"] * operator(naive_norm(p, norm, x))
        elif variant == "H":  # norms on both sides
            x = x + naive_norm(p, f"res_post_norm{k}.0", operator(naive_norm(p, norm, x)))
        elif variant == "G":  # post-norm without scale
            x = x + naive_norm(p, norm, operator(x))
        else:  # scale, post-norm
            x = x + p[f"gamma{k}"] * naive_norm(p, norm, operator(x))
    return x


def naive_network(p: dict[str, torch.Tensor], x: torch.Tensor, variant: str, depths, channels: int):
    x = F.conv2d(x, p["patch_embed.conv1.weight"], p["patch_embed.conv1.bias"], stride=2, padding=1)
    x = naive_norm(p, "patch_embed.norm1.1", x.permute(0, 2, 3, 1))
    x = (0.5 * x * (1 + torch.erf(x / 2**0.5))).permute(0, 3, 1, 2)
    x = F.conv2d(x, p["patch_embed.conv2.weight"], p["patch_embed.conv2.bias"], stride=2, padding=1)
    x = naive_norm(p, "patch_embed.norm2.1", x.permute(0, 2, 3, 1))
    outputs = []
    for i, depth in enumerate(depths):
        groups = channels * 2**i // (32 if variant in ("H", "G") else 16)
        for j in range(depth):
            x = naive_block(below(p, f"levels.{i}.blocks.{j}."), x, variant, groups)
            if i == 2 and variant in ("H", "G") and j in (5, 11):
                x = naive_norm(p, f"levels.2.post_norms.{j // 6}.0", x)
        if variant in ("T", "H", "G"):
            x = naive_norm(p, f"levels.{i}.norm.0", x)
        outputs.append(x.permute(0, 3, 1, 2))
        if i < 3:
            y = F.conv2d(x.permute(0, 3, 1, 2), p[f"levels.{i}.downsample.conv.weight"], stride=2, padding=1)
            x = naive_norm(p, f"levels.{i}.downsample.norm.1", y.permute(0, 2, 3, 1))
    return outputs


@pytest.mark.parametrize("variant", ["T", "S", "L", "H", "G"])
def test_equals_a_naive_float64_network(variant):
    # Blocks 5 and 11 of the third level are followed by a norm in H and G; block 12 is not.
    depths = (1, 2, 13, 1) if variant in ("H", "G") else (1, 2, 1, 1)
    model = build(variant, "MODEL.INTERNIMAGE.CHANNELS", "32", "MODEL.INTERNIMAGE.DEPTHS", str(list(depths)))
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        # Offsets, weights and blends are zero at the start, which would hide mistakes in them.
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 3, 29, 42, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected = naive_network(model.state_dict(), x, variant, depths, 32)
        features = model(x)
    for level, want in zip(("res2", "res3", "res4", "res5"), expected, strict=True):
        assert features[level].is_contiguous()
        assert_close(features[level], want, "network")


def test_published_drop_path_and_layer_scale():
    model = build("T")
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(0.2)
    assert rates == pytest.approx([0.2 * i / 29 for i in range(30)])
    assert {m.rate for m in build("T", "MODEL.INTERNIMAGE.DROP_PATH", "0.0").modules() if isinstance(m, DropPath)} == {
        0.0
    }
    small = build("S", *TINY, "MODEL.INTERNIMAGE.LAYER_SCALE", "1e-5")
    assert (small.levels[0].blocks[0].gamma1 == 1e-5).all()
    assert (build("S", *TINY).levels[0].blocks[0].gamma2 == 1.0).all()


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (40, 64)])
def test_any_input_size(size):
    model = build("T", *TINY).eval()
    features = model(torch.randn(1, 3, *size))
    for level, spec in model.output_shape().items():
        expected = (1, spec.channels, -(-size[0] // spec.stride), -(-size[1] // spec.stride))
        assert features[level].shape == expected
        assert features[level].isfinite().all()


def test_trains_a_few_steps():
    torch.manual_seed(0)
    model = build("T", *TINY, "MODEL.INTERNIMAGE.DROP_PATH", "0.0")
    head = torch.nn.Conv2d(256, 3, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(head(model(images)["res5"]).mean((2, 3)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.levels[0].blocks[0].dcn.offset.weight.abs().sum() > 0


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    plain = build("H", *TINY)
    lean = build("H", *TINY, "MODEL.INTERNIMAGE.CHECKPOINT", "True")
    assert_checkpointing_changes_no_gradient(plain, lean)


def test_checkpointing_keeps_fewer_activations():
    x = torch.randn(1, 3, 32, 32)
    kept = []
    for switch in ("False", "True"):
        model = build("T", *TINY, "MODEL.INTERNIMAGE.CHECKPOINT", switch)
        saved: dict[int, int] = {}

        def pack(t: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            features = model(x)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(size for pointer, size in saved.items() if pointer not in weights))
        del features
    assert kept[1] < 0.5 * kept[0]


def test_freeze_at():
    model = build("T", *TINY, "MODEL.BACKBONE.FREEZE_AT", "2").train()
    frozen = {".".join(name.split(".")[:2]) for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name in frozen if name.startswith("levels")} == {"levels.0"}
    assert not any(p.requires_grad for p in model.patch_embed.parameters())
    assert not model.levels[0].training
    assert model.levels[1].training


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"MODEL.INTERNIMAGE.VARIANT='M'.*XL"):
        build("M")
    with pytest.raises(ValueError, match=r"CHANNELS=40.*multiple of 16"):
        build("T", "MODEL.INTERNIMAGE.CHANNELS", "40")
    with pytest.raises(ValueError, match="DEPTHS"):
        build("T", "MODEL.INTERNIMAGE.DEPTHS", "[1,1]")
    with pytest.raises(ValueError, match=r"DROP_PATH=1\.5"):
        build("T", *TINY, "MODEL.INTERNIMAGE.DROP_PATH", "1.5")
