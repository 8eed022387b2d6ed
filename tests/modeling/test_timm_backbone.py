"""timm adapter: any family and size, equality with timm and with transformers' Swin, local weights, bad input."""

import pickle

import pytest
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from safetensors.torch import save_file
from tolerances import assert_close

from the_mask.config import load_config
from the_mask.modeling.backbones.timm_adapter import TimmBackbone

LEVELS = ("res2", "res3", "res4", "res5")


def build(name: str, *overrides: str) -> TimmBackbone:
    cfg = load_config(None, ["MODEL.TIMM.NAME", name, *overrides])
    return BACKBONE_REGISTRY.get("build_timm_backbone")(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("swin_tiny_patch4_window7_224", (96, 192, 384, 768)),
        ("swinv2_tiny_window8_256", (96, 192, 384, 768)),
        ("convnext_atto", (40, 80, 160, 320)),
        ("resnet18", (64, 128, 256, 512)),
        ("efficientnet_b0", (24, 40, 112, 320)),
        ("pvt_v2_b0", (32, 64, 160, 256)),
        ("vgg11", (256, 512, 512, 512)),
    ],
)
def test_families_at_an_odd_size(name, channels):
    model = build(name).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, 75, 101))
    assert tuple(features) == LEVELS
    shapes = model.output_shape()
    assert [shapes[level].channels for level in LEVELS] == list(channels)
    assert [shapes[level].stride for level in LEVELS] == [4, 8, 16, 32]
    for level in LEVELS:
        stride = shapes[level].stride
        assert features[level].shape[1] == shapes[level].channels
        for side, size in zip(features[level].shape[2:], (75, 101)):
            assert size // stride <= side <= -(-size // stride)
        assert features[level].isfinite().all()


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("swin_small_patch4_window7_224", (96, 192, 384, 768)),
        ("swin_base_patch4_window12_384", (128, 256, 512, 1024)),
        ("swin_large_patch4_window12_384.ms_in22k", (192, 384, 768, 1536)),
        ("convnext_tiny", (96, 192, 384, 768)),
        ("convnext_xlarge.fb_in22k", (256, 512, 1024, 2048)),
        ("resnet101", (256, 512, 1024, 2048)),
    ],
)
def test_large_models_on_the_meta_device(name, channels):
    with torch.device("meta"):
        model = build(name)
    assert [spec.channels for spec in model.output_shape().values()] == list(channels)
    # timm's own count of the classifier-less model; its last norm has no use here.
    with torch.device("meta"):
        whole = sum(p.numel() for p in timm.create_model(name.split(".")[0], num_classes=0).parameters())
    last_norm = 2 * channels[-1] if name.startswith(("swin", "convnext")) else 0
    assert sum(p.numel() for p in model.parameters()) == whole - last_norm


def to_transformers_swin(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys of TimmBackbone(swin) with output norms -> those of transformers' SwinBackbone."""
    leaves = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    out = {}
    for key, value in state.items():
        stem, leaf = key.rsplit(".", 1)
        parts = stem.split(".")
        if parts[0].startswith("norm"):
            out[f"hidden_states_norms.stage{int(parts[0][4:]) + 1}.{leaf}"] = value
        elif parts[1] == "patch_embed":
            name = {"proj": "patch_embeddings.projection", "norm": "norm"}[parts[2]]
            out[f"swin.embeddings.{name}.{leaf}"] = value
        elif parts[3] == "downsample":
            out[f"swin.encoder.layers.{int(parts[2]) - 1}.downsample.{parts[4]}.{leaf}"] = value
        else:
            block, rest = f"swin.encoder.layers.{parts[2]}.blocks.{parts[4]}", ".".join(parts[5:])
            if leaf == "relative_position_bias_table":
                out[f"{block}.attention.relative_position_bias.{leaf}"] = value
            elif rest == "attn.qkv":
                for name, third in zip("qkv", value.chunk(3)):
                    out[f"{block}.attention.{name}_proj.{leaf}"] = third
            else:
                out[f"{block}.{leaves[rest]}.{leaf}"] = value
    return out


@pytest.mark.parametrize("size", [(75, 101), (224, 64)])
def test_swin_equals_transformers_at_any_size(size):
    transformers = pytest.importorskip("transformers")
    model = build("swin_tiny_patch4_window7_224", "MODEL.TIMM.OUT_NORM", "LN").eval()
    peer = transformers.SwinBackbone(transformers.SwinConfig(out_features=[f"stage{i}" for i in range(1, 5)])).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    mapped = to_transformers_swin(model.state_dict())
    report = peer.load_state_dict(mapped, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) == {"swin.layernorm.weight", "swin.layernorm.bias"}
    x = torch.randn(2, 3, *size, generator=generator)
    with torch.no_grad():
        expected, features = peer(x).feature_maps, model(x)
    for level, want in zip(LEVELS, expected, strict=True):
        assert_close(features[level], want, "peer")


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18"])
def test_equals_plain_timm(name):
    model = build(name).eval()
    peer = timm.create_model(name, features_only=True, out_indices=model.levels).eval()
    # features_only renames "stages.0" to "stages_0".
    state = {
        key.replace("stages.", "stages_").replace("stem.", "stem_"): v for key, v in model.model.state_dict().items()
    }
    peer.load_state_dict(state)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, features = peer(x), model(x)
    for level, want in zip(LEVELS, expected, strict=True):
        torch.testing.assert_close(features[level], want)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"swin_tinny.*no such model.*swin_tiny_patch4_window7_224"):
        build("swin_tinny_patch4_window7_224")
    with pytest.raises(ValueError, match=r"unknown weights tag; known: .*swin_tiny_patch4_window7_224\.ms_in22k"):
        build("swin_tiny_patch4_window7_224.laion")
    with pytest.raises(ValueError, match="no such model"):
        build("hf-hub:someone/something")


def test_levels():
    model = build("resnet18", "MODEL.TIMM.OUT_INDICES", "[1,2,3,4]")
    assert model.levels == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"OUT_INDICES=\[0, 1, 2, 3\].*strides \[2, 4, 8, 16, 32\]"):
        build("resnet18", "MODEL.TIMM.OUT_INDICES", "[0,1,2,3]")
    with pytest.raises(ValueError, match="four levels of strides"):
        build("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="at least 32"):
        build("resnet18")(torch.zeros(1, 3, 31, 64))


def test_drop_path():
    model = build("convnext_atto", "MODEL.TIMM.DROP_PATH", "0.3")
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert max(rates) == pytest.approx(0.3)
    # timm's Swin has 0.1 by default; the key says 0.
    swin = build("swin_tiny_patch4_window7_224")
    assert not [m for m in swin.modules() if isinstance(m, timm.layers.DropPath) and m.drop_prob]
    with pytest.raises(ValueError, match=r"vgg11 has no stochastic depth"):
        build("vgg11", "MODEL.TIMM.DROP_PATH", "0.1")


def test_batch_norm_choices():
    frozen = build("efficientnet_b0", "MODEL.TIMM.NORM", "FrozenBN").train()
    assert not [name for name, _ in frozen.named_parameters() if ".bn" in name]
    assert "model.bn1.running_mean" in frozen.state_dict()
    synced = build("resnet18", "MODEL.TIMM.NORM", "SyncBN")
    assert isinstance(synced.model.bn1, torch.nn.SyncBatchNorm)
    with pytest.raises(ValueError, match="NORM='GN'"):
        build("resnet18", "MODEL.TIMM.NORM", "GN")
    with pytest.raises(ValueError, match="OUT_NORM='BN'"):
        build("resnet18", "MODEL.TIMM.OUT_NORM", "BN")


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_freeze_at(name):
    model = build(name, "MODEL.BACKBONE.FREEZE_AT", "2").train()
    features = model(torch.randn(2, 3, 64, 64))
    assert not features["res2"].requires_grad
    assert features["res3"].requires_grad
    modes = {m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert modes == ({False, True} if name == "resnet18" else set())
    with pytest.raises(ValueError, match="FREEZE_AT=7"):
        build(name, "MODEL.BACKBONE.FREEZE_AT", "7")


def test_freezing_a_family_without_stages():
    with pytest.raises(ValueError, match="efficientnet_b0 has no stem and four stages"):
        build("efficientnet_b0", "MODEL.BACKBONE.FREEZE_AT", "1")


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18"])
def test_checkpointing_changes_no_gradient(name):
    plain, lean = build(name).eval(), build(name, "MODEL.TIMM.CHECKPOINT", "True").eval()
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    grads = []
    for model in (plain, lean):
        sum(f.square().mean() for f in model(x).values()).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def whole_state(name: str) -> dict[str, torch.Tensor]:
    """State dict of a whole timm model, classifier included, with values that no initialisation gives."""
    with torch.device("meta"):
        model = timm.create_model(name)
    return {key: torch.full(value.shape, 0.01, dtype=torch.float16) for key, value in model.state_dict().items()}


def assert_loaded(path, name: str, state: dict[str, torch.Tensor], unused: set[str]) -> None:
    own = build(name, "MODEL.TIMM.WEIGHTS", str(path)).model.state_dict()
    assert set(state) - set(own) == unused
    for key, value in own.items():
        assert (value == state[key]).all(), key


ATTO_UNUSED = {f"head.{part}.{leaf}" for part in ("norm", "fc") for leaf in ("weight", "bias")}


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_local_weights(tmp_path, wrapper):
    state, path = whole_state("convnext_atto"), tmp_path / "atto.pth"
    torch.save({wrapper: state} if wrapper else state, path)
    assert_loaded(path, "convnext_atto", state, ATTO_UNUSED)


def test_local_safetensors(tmp_path):
    state, path = whole_state("convnext_atto"), tmp_path / "atto.safetensors"
    save_file(state, path)
    assert_loaded(path, "convnext_atto", state, ATTO_UNUSED)


def test_original_swin_layout(tmp_path):
    """Microsoft's files downsample at the end of a stage, name the head otherwise and hold index buffers."""
    state = whole_state("swin_tiny_patch4_window7_224")
    original = {}
    for key, value in state.items():
        parts = key.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        original[".".join(parts).replace("head.fc.", "head.")] = value
    original["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    original["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    path = tmp_path / "original.pth"
    torch.save({"model": original}, path)
    unused = {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    assert_loaded(path, "swin_tiny_patch4_window7_224", state, unused)


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_bad_weights(tmp_path, capsys):
    def load(path, name="convnext_atto"):
        build(name, "MODEL.TIMM.WEIGHTS", str(path))

    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        load(tmp_path / "nowhere.pth")
    good, state = tmp_path / "good.pth", whole_state("convnext_atto")
    torch.save(state, good)
    load(good)
    with pytest.raises(ValueError, match=r"does not fit ResNet: 100 keys missing"):
        load(good, "resnet18")
    with pytest.raises(ValueError, match="keys of other shape"):
        load(good, "convnext_femto")
    torch.save({**state, "adapter.weight": torch.zeros(1)}, good)
    with pytest.raises(ValueError, match=r"foreign, e\.g\. adapter\.weight"):
        load(good)
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(good.read_bytes()[:10_000])
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a safetensors file")
    evil = tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps({"model": Evil()}, protocol=2))
    for path in (truncated, broken, evil):
        with pytest.raises(ValueError, match=r"corrupt, truncated, or not a weights file|is refused: it is a pickle"):
            load(path)
    assert "must not run" not in capsys.readouterr().out
