"""CascadePSP: keys and shapes of the released network, its cascade, losses against float64, perturbed masks."""

import numpy as np
import pytest
import torch
from tolerances import approx, assert_close
from torch.nn import functional as F

from the_mask.config import load_config
from the_mask.modeling.refiners import CascadePSP, build_refiner, cascade_losses
from the_mask.modeling.refiners.losses import sobel_magnitude
from the_mask.modeling.refiners.perturb import mask_iou, perturb_mask, simplify_contours


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    network = CascadePSP(4, (1, 1, 1, 1)).eval()
    # Untrained, the masks' weights are 0 and the passes could not be told apart.
    torch.nn.init.normal_(network.feats.conv1.weight, std=0.2)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def test_the_released_network():
    """Names and shapes by the specification; the size of the released file is 259 MiB with optimiser-free weights."""
    with torch.device("meta"):
        network = CascadePSP()
    state = network.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["feats.conv1.weight"] == (64, 6, 7, 7)
    assert shapes["feats.layer4.2.conv3.weight"] == (2048, 512, 1, 1)
    assert shapes["feats.layer2.0.downsample.1.running_mean"] == (512,)
    assert [shapes[f"psp.stages.{i}.1.weight"] for i in range(4)] == [(2048, 2048, 1, 1)] * 4
    assert shapes["psp.bottleneck.weight"] == (1024, 10240, 1, 1)
    assert shapes["up_1.conv.2.weight"] == (512, 1024 + 256, 3, 3)
    assert shapes["up_2.conv.2.weight"] == (256, 512 + 64, 3, 3)
    assert shapes["up_3.conv.2.weight"] == (32, 256 + 3, 3, 3)
    assert shapes["up_3.shortcut.weight"] == (32, 256, 1, 1)
    assert shapes["up_1.conv2.5.bias"] == (512,)
    assert shapes["final_28.2.weight"] == shapes["final_56.2.weight"] == shapes["final_21.weight"] == (1, 32, 1, 1)
    assert shapes["final_11.weight"] == (32, 35, 1, 1)
    prefixes = {name.split(".")[0] for name in state}
    assert prefixes == {"feats", "psp", "up_1", "up_2", "up_3", "final_28", "final_56", "final_11", "final_21"}
    assert len(state) == 426
    assert sum(value.numel() * value.element_size() for value in state.values()) / 2**20 == pytest.approx(259, abs=1)
    # Output stride 8 with dilations 2 and 4, and the first block of each layer not dilated.
    for layer, dilation in ((network.feats.layer3, 2), (network.feats.layer4, 4)):
        assert [block.conv2.dilation[0] for block in layer] == [1] + [dilation] * (len(layer) - 1)
        assert layer[0].conv2.stride == (1, 1)


def test_the_cascade_by_hand(tiny):
    images, masks = torch.randn(2, 3, 24, 40), torch.rand(2, 1, 24, 40) * 2 - 1
    with torch.no_grad():
        outputs = tiny(images, masks)
        a8 = tiny.pass_8(images, masks, masks, masks)
        b8, b4 = tiny.pass_4(images, masks, a8.tanh(), a8.tanh())
        c8, c4, out = tiny.pass_1(images, masks, b8.tanh(), b4.tanh())
        refined, fourth = tiny.refine(images, masks)
    expected = {"a8": a8, "b8": b8, "b4": b4, "c8": c8, "c4": c4, "out": out}
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        assert value.shape == masks.shape
        torch.testing.assert_close(outputs[name], value)
    torch.testing.assert_close(refined, out.sigmoid())
    torch.testing.assert_close(fourth, c4.sigmoid())
    # The passes differ, and the shorter ones are the beginning of the longest.
    assert not torch.allclose(a8, b8)
    longest = tiny.pass_1(images, masks, a8.tanh(), a8.tanh())
    torch.testing.assert_close(longest[0], b8)
    torch.testing.assert_close(longest[1], b4)


def test_the_local_step_by_hand(tiny):
    images, masks, coarse = torch.randn(1, 3, 24, 40), torch.rand(1, 1, 24, 40), torch.rand(1, 1, 24, 40) * 2 - 1
    with torch.no_grad():
        out, _ = tiny.refine(images, masks, coarse)
        b8, b4 = tiny.pass_4(images, masks, coarse, coarse)
        expected = tiny.pass_1(images, masks, b8.tanh(), b4.tanh())[2].sigmoid()
    torch.testing.assert_close(out, expected)


def test_odd_sizes_are_padded_and_cropped(tiny):
    images, masks = torch.randn(1, 3, 21, 35), torch.rand(1, 1, 21, 35) * 2 - 1
    with torch.no_grad():
        outputs = tiny(images, masks)
        padded = tiny(F.pad(images, (0, 5, 0, 3)), F.pad(masks, (0, 5, 0, 3), value=-1.0))
    for name, value in outputs.items():
        assert value.shape == masks.shape
        torch.testing.assert_close(value, padded[name][..., :21, :35])


def test_batches_equal_single_crops(tiny):
    images, masks = torch.randn(3, 3, 16, 24), torch.rand(3, 1, 16, 24) * 2 - 1
    with torch.no_grad():
        together, _ = tiny.refine(images, masks)
        alone = torch.cat([tiny.refine(images[i : i + 1], masks[i : i + 1])[0] for i in range(3)])
    assert_close(together, alone, "network")


def test_a_new_network_ignores_the_masks():
    torch.manual_seed(0)
    network = CascadePSP(4, (1, 1, 1, 1)).eval()
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        first, second = network(images, torch.ones(1, 1, 16, 16)), network(images, -torch.ones(1, 1, 16, 16))
    assert torch.equal(first["out"], second["out"])


def test_losses_against_float64():
    generator = torch.Generator().manual_seed(0)
    outputs = {name: torch.randn(2, 1, 9, 7, generator=generator) for name in ("a8", "b8", "b4", "c8", "c4", "out")}
    truth = (torch.rand(2, 1, 9, 7, generator=generator) > 0.5).float()
    losses = cascade_losses(outputs, truth)
    entropies = dict(zip(("out", "a8", "b4", "b8", "c8", "c4"), (0, 1, 0.5, 1, 1, 0.5), strict=True))
    distances = dict(zip(("out", "a8", "b4", "b8", "c8", "c4"), (1, 0, 0.25, 0, 0, 0.25), strict=True))
    for name, logits in outputs.items():
        p = 1 / (1 + np.exp(-logits.double().numpy()))
        t = truth.double().numpy()
        entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
        expected = entropies[name] * entropy + distances[name] * (np.abs(p - t).mean() + ((p - t) ** 2).mean())
        assert losses[f"loss_{name}"].item() == approx(expected, "formula")
    edges = [slow_sobel(m.double().numpy()[:, 0]) for m in (outputs["out"].sigmoid(), truth)]
    assert losses["loss_gradient"].item() == approx(5 * np.abs(edges[0] - edges[1]).mean(), "sum")


def slow_sobel(maps):
    """Pixel by pixel: 3x3 mean, Sobel / 4, length; borders repeat."""
    kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]]) / 4
    result = np.zeros_like(maps)
    for index, image in enumerate(maps):
        padded = np.pad(image, 1, mode="edge")
        mean = np.array(
            [[padded[y : y + 3, x : x + 3].mean() for x in range(image.shape[1])] for y in range(len(image))]
        )
        padded = np.pad(mean, 1, mode="edge")
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                part = padded[y : y + 3, x : x + 3]
                result[index, y, x] = np.sqrt((part * kernel).sum() ** 2 + (part * kernel.T).sum() ** 2 + 1e-4)
    return result


def test_sobel_of_a_ramp():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    assert sobel_magnitude(ramp)[0, 0, 3, 3].item() == pytest.approx(2, abs=1e-3)


def blob(height=60, width=80):
    y, x = np.mgrid[:height, :width]
    ring = ((y - 30) / 20) ** 2 + ((x - 40) / 30) ** 2 < 1
    return ring & ~(((y - 30) ** 2 + (x - 40) ** 2) < 144)


@pytest.mark.parametrize("seed", range(5))
def test_perturbed_masks_are_worse_but_not_too_bad(seed):
    mask = blob()
    rough = perturb_mask(mask, np.random.default_rng(seed))
    assert rough.dtype == bool
    assert 0.6 < mask_iou(rough, mask) < 1
    assert (perturb_mask(mask, np.random.default_rng(seed)) == rough).all()
    assert mask_iou(perturb_mask(mask, np.random.default_rng(seed), 0.7), mask) < 0.7


def test_contours_keep_holes():
    large = np.kron(blob(), np.ones((4, 4), dtype=bool))
    simple = simplify_contours(large, np.random.default_rng(0))
    assert not simple[120, 160]
    assert 0.7 < mask_iou(simple, large) < 1


def test_masks_without_borders():
    empty = np.zeros((20, 30), dtype=bool)
    assert not perturb_mask(empty, np.random.default_rng(0)).any()
    full = perturb_mask(~empty, np.random.default_rng(0))
    assert full.mean() > 0.5
    assert mask_iou(empty, empty) == 1


def test_the_registry():
    cfg = load_config(None, ["MODEL.REFINER.WIDTH", 4, "MODEL.REFINER.BLOCKS", [1, 1, 1, 1]])
    assert build_refiner(cfg).feats.conv1.weight.shape[0] == 4
    cfg.MODEL.REFINER.NAME = "Other"
    with pytest.raises(ValueError, match=r"REFINER.NAME 'Other': known are CascadePSP"):
        build_refiner(cfg)
