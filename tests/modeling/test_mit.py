"""MiT: parameter counts, official key names, equality with transformers' Segformer, any input size, freezing."""

import pytest
import torch
from backbone_cases import assert_checkpointing_changes_no_gradient
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from tolerances import assert_close

from the_mask.config import load_config
from the_mask.modeling.backbones.common import DropPath, drop_path, drop_path_rates
from the_mask.modeling.backbones.mit import REDUCTIONS, VARIANTS, MixTransformer

# SegFormer paper, table 6, without the classifier; exact sums of the released files.
PARAMETERS = {
    "B0": 3_319_392,
    "B1": 13_151_424,
    "B2": 24_196_288,
    "B3": 44_072_128,
    "B4": 60_842_688,
    "B5": 81_443_008,
}


def build(*overrides: str) -> MixTransformer:
    cfg = load_config(None, ["MODEL.BACKBONE.NAME", "build_mit_backbone", *overrides])
    return BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameter_counts(variant):
    with torch.device("meta"):
        model = build("MODEL.MIT.VARIANT", variant)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[variant]
    assert not list(model.buffers())


def official_keys(variant: str) -> set[str]:
    """Key names of the released mit_b*.pth, without its classification head."""
    keys = set()
    for s, depth in enumerate(VARIANTS[variant].depths, start=1):
        stems = [f"patch_embed{s}.proj", f"patch_embed{s}.norm", f"norm{s}"]
        for i in range(depth):
            block = f"block{s}.{i}"
            parts = ["norm1", "norm2", "attn.q", "attn.kv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.dwconv.dwconv"]
            if REDUCTIONS[s - 1] > 1:
                parts += ["attn.sr", "attn.norm"]
            stems += [f"{block}.{part}" for part in parts]
        keys |= {f"{stem}.{leaf}" for stem in stems for leaf in ("weight", "bias")}
    return keys


@pytest.mark.parametrize("variant", ["B0", "B3"])
def test_official_keys(variant):
    with torch.device("meta"):
        model = build("MODEL.MIT.VARIANT", variant)
    assert set(model.state_dict()) == official_keys(variant)


def test_norm_epsilons():
    eps = {name: m.eps for name, m in build().named_modules() if isinstance(m, torch.nn.LayerNorm)}
    for name, value in eps.items():
        assert value == (1e-5 if name.startswith("patch_embed") or name.endswith("attn.norm") else 1e-6), name


def to_segformer(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our (official) keys -> those of transformers' SegformerModel, where q, k and v are three matrices."""
    leaves = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.q": "attention.q_proj",
        "attn.proj": "attention.o_proj",
        "attn.sr": "attention.sequence_reduction.sequence_reduction",
        "attn.norm": "attention.sequence_reduction.layer_norm",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
    }
    out = {}
    for key, value in state.items():
        head, *rest, leaf = key.split(".")
        kind, stage = head[:-1], f"stages.{int(head[-1]) - 1}"
        if kind == "norm":
            out[f"{stage}.layer_norm.{leaf}"] = value
        elif kind == "patch_embed":
            name = {"proj": "proj", "norm": "layer_norm"}[rest[0]]
            out[f"{stage}.patch_embeddings.{name}.{leaf}"] = value
        elif rest[1:] == ["attn", "kv"]:
            for name, half in zip(("k_proj", "v_proj"), value.chunk(2)):
                out[f"{stage}.blocks.{rest[0]}.attention.{name}.{leaf}"] = half
        else:
            out[f"{stage}.blocks.{rest[0]}.{leaves['.'.join(rest[1:])]}.{leaf}"] = value
    return out


@pytest.mark.parametrize(("variant", "size"), [("B0", (75, 101)), ("B1", (64, 96))])
def test_equals_transformers_segformer(variant, size):
    transformers = pytest.importorskip("transformers")
    shape = VARIANTS[variant]
    config = transformers.SegformerConfig(
        depths=list(shape.depths), hidden_sizes=list(shape.dims), sr_ratios=list(REDUCTIONS)
    )
    peer = transformers.SegformerModel(config).eval()
    model = build("MODEL.MIT.VARIANT", variant).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        # Large enough for every branch to matter, norms included.
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs = {key.removeprefix("encoder."): key for key in peer.state_dict()}
    mapped = to_segformer(model.state_dict())
    assert set(mapped) == set(theirs)
    peer.load_state_dict({theirs[key]: value for key, value in mapped.items()})
    # Segformer uses 1e-5 everywhere; the released code does not (see test_norm_epsilons).
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            (target,) = to_segformer({f"{name}.weight": torch.zeros(1)})
            peer.get_submodule(theirs[target].removesuffix(".weight")).eps = module.eps
    x = torch.randn(2, 3, *size, generator=generator)
    with torch.no_grad():
        expected = peer(x, output_hidden_states=True).hidden_states[-4:]
        features = model(x)
    for level, want in zip(("res2", "res3", "res4", "res5"), expected, strict=True):
        assert_close(features[level], want, "peer")


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (40, 64)])
def test_any_input_size(size):
    model = build()
    features = model(torch.randn(1, 3, *size))
    for level, spec in model.output_shape().items():
        expected = (1, spec.channels, -(-size[0] // spec.stride), -(-size[1] // spec.stride))
        assert features[level].shape == expected
        assert features[level].isfinite().all()


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    plain = build("MODEL.MIT.DROP_PATH", "0.5")
    lean = build("MODEL.MIT.DROP_PATH", "0.5", "MODEL.MIT.CHECKPOINT", "True")
    assert_checkpointing_changes_no_gradient(plain, lean)


def test_freeze_at():
    model = build("MODEL.BACKBONE.FREEZE_AT", "2").train()
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed1", "block1", "norm1"}
    assert not model.block1.training
    assert model.block2.training
    with pytest.raises(ValueError, match="FREEZE_AT=6"):
        build("MODEL.BACKBONE.FREEZE_AT", "6")


def test_unknown_variant():
    with pytest.raises(ValueError, match=r"MODEL.MIT.VARIANT='B9'.*B0"):
        build("MODEL.MIT.VARIANT", "B9")


def test_drop_path_rates_are_linear_over_all_blocks():
    assert drop_path_rates((2, 1), 0.4) == [[0.0, 0.2], [0.4]]
    assert drop_path_rates((1,), 0.4) == [[0.0]]
    model = build("MODEL.MIT.DROP_PATH", "0.7")
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(20_000, 3)
    y = drop_path(x, 0.3, training=True)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert (y == y[:, :1]).all()
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    assert drop_path(x, 0.3, training=False) is x
    with pytest.raises(ValueError, match=r"DROP_PATH=1\.0"):
        build("MODEL.MIT.DROP_PATH", "1.0")
