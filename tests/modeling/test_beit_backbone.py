"""BEiT pyramid: equality with timm at the trained and at smaller sizes, position tables, weights of another size."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from scipy.optimize import brentq
from tolerances import assert_close

from the_mask.config import load_config
from the_mask.modeling.backbones.beit import BeitPyramid, relative_position_index, resize_position_table

BASE = "beit_base_patch16_224"
LEVELS = ("res2", "res3", "res4", "res5")


def build(image_size: int, *overrides: str) -> BeitPyramid:
    cfg = load_config(
        None,
        [
            *("MODEL.BEIT.NAME", BASE, "MODEL.BEIT.IMG_SIZE", str(image_size), "MODEL.BEIT.DROP_PATH", "0.0"),
            *("MODEL.BEIT.OUT_INDICES", "[0,1,2,3]", "MODEL.BEIT.NORM", "BN", *overrides),
        ],
    )
    return BACKBONE_REGISTRY.get("build_beit_backbone")(cfg, ShapeSpec(channels=3))


@pytest.fixture(scope="module")
def model() -> BeitPyramid:
    """For 96 pixels (6 patches per side), with weights that make every part matter."""
    model = build(96).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def naive_pyramid(model: BeitPyramid, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    p = model.fpn.state_dict()
    x = F.conv_transpose2d(outputs[0], p["0.0.weight"], p["0.0.bias"], stride=2)
    x = F.batch_norm(x, p["0.1.running_mean"], p["0.1.running_var"], p["0.1.weight"], p["0.1.bias"])
    x = F.conv_transpose2d(0.5 * x * (1 + torch.erf(x / 2**0.5)), p["0.3.weight"], p["0.3.bias"], stride=2)
    y = F.conv_transpose2d(outputs[1], p["1.weight"], p["1.bias"], stride=2)
    return [x, y, outputs[2], F.max_pool2d(outputs[3], 2, ceil_mode=True)]


def timm_outputs(state: dict[str, torch.Tensor], size: int, x: torch.Tensor) -> list[torch.Tensor]:
    peer = timm.create_model(BASE, img_size=size, num_classes=0, init_values=1.0).eval()
    report = peer.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    return peer.forward_intermediates(x, indices=[0, 1, 2, 3], stop_early=True, intermediates_only=True)


@pytest.mark.parametrize("size", [96, 64])
def test_equals_timm(model, size):
    """At 64 pixels (4 patches) timm needs a smaller table: the middle of ours, as offsets are at most 3."""
    state = dict(model.model.state_dict())
    grid = size // 16
    for key, table in state.items():
        if key.endswith("relative_position_bias_table"):
            offsets, extra = table[:121].unflatten(0, (11, 11)), table[121:]
            cut = slice(5 - (grid - 1), 5 + grid)
            state[key] = torch.cat([offsets[cut, cut].flatten(0, 1), extra])
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = model(x)
        expected = naive_pyramid(model, timm_outputs(state, size, x))
    for level, want in zip(LEVELS, expected, strict=True):
        assert_close(features[level], want, "peer")


def test_position_index_against_loops():
    height, width, trained = 5, 2, 3
    index = relative_position_index(height, width, trained, torch.device("cpu"))
    assert index.shape == (11, 11)
    for a in range(10):
        for b in range(10):
            dy, dx = a // width - b // width, a % width - b % width
            row = max(-2, min(2, dy)) + 2
            assert index[a + 1, b + 1] == row * 5 + dx + 2
    assert (index[0, 1:] == 25).all()
    assert (index[1:, 0] == 26).all()
    assert index[0, 0] == 27


@pytest.mark.parametrize("size", [(1, 1), (40, 70), (96, 130)])
def test_any_input_size(model, size):
    with torch.no_grad():
        features = model(torch.randn(1, 3, *size))
    for level, spec in model.output_shape().items():
        assert features[level].shape == (1, 768, -(-size[0] // spec.stride), -(-size[1] // spec.stride))
        assert features[level].isfinite().all()


def test_parameters_of_the_published_size():
    cfg = load_config(None, [])
    with torch.device("meta"):
        model = BACKBONE_REGISTRY.get("build_beit_backbone")(cfg, ShapeSpec(channels=3))
    c, table = 1024, (63 * 63 + 3) * 16
    attention = 3 * c * c + 2 * c + c * c + c  # q and v biases only
    block = attention + 2 * 4 * c * c + 5 * c + 2 * 2 * c + 2 * c + table
    trunk = 24 * block + 3 * 16 * 16 * c + c + c
    pyramid = 3 * (4 * c * c + c) + 2 * c
    assert sum(p.numel() for p in model.parameters()) == trunk + pyramid
    assert model.model.blocks[0].attn.relative_position_bias_table.shape == (3972, 16)
    assert [spec.channels for spec in model.output_shape().values()] == [1024] * 4
    assert [b.drop_path1.drop_prob for b in model.model.blocks[1:]] == pytest.approx(
        [0.2 * i / 23 for i in range(1, 24)]
    )


def surface(y, x, head):
    """A cubic polynomial, which cubic splines reproduce exactly, different for each head."""
    return 1 + 0.3 * y - 0.2 * x * y + 0.01 * (head + 1) * x**3 - 0.02 * y**2 * x


def test_resized_table_on_a_known_surface():
    ratio = brentq(lambda q: (q**13 - 1) / (q - 1) - 31, 1.01, 1.5)
    steps = np.cumsum(ratio ** np.arange(13))
    at = np.concatenate([-steps[::-1], [0], steps])
    grid = np.stack([surface(at[:, None], at[None, :], head) for head in range(2)], -1).reshape(-1, 2)
    extra = torch.tensor([[7.0, 8.0], [9.0, 10.0], [11.0, 12.0]], dtype=torch.float64)
    resized = resize_position_table(torch.cat([torch.from_numpy(grid), extra]), 32)
    assert resized.shape == (3972, 2)
    assert (resized[-3:] == extra).all()
    wanted = np.arange(-31, 32)
    expected = np.stack([surface(wanted[:, None], wanted[None, :], head) for head in range(2)], -1)
    # The bisection of the released code stops at 1e-6 in q.
    np.testing.assert_allclose(resized[:-3].numpy(), expected.reshape(-1, 2), rtol=1e-3, atol=1e-1)
    middle = slice(31 - 8, 31 + 9)
    inner = resized[:-3].numpy().reshape(63, 63, 2)[middle, middle]
    np.testing.assert_allclose(inner, expected[middle, middle], rtol=1e-3, atol=1e-3)


def test_resizing_to_the_same_and_to_a_smaller_size():
    table = torch.randn(11 * 11 + 3, 4)
    assert (resize_position_table(table, 6) == table).all()
    smaller = resize_position_table(table, 2)
    assert (smaller[:-3].view(3, 3, 4) == table[:-3].view(11, 11, 4)[4:7, 4:7]).all()
    assert (smaller[-3:] == table[-3:]).all()
    with pytest.raises(ValueError, match="table of 100 rows"):
        resize_position_table(torch.zeros(100, 4), 6)


def test_weights_of_another_size(tmp_path):
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in timm.create_model(BASE, img_size=64).state_dict().items()}
    unused = tuple(f"blocks.{i}." for i in range(4, 12))
    shapes = {key: shape for key, shape in shapes.items() if not key.startswith(unused)}
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator).half() for key, shape in shapes.items()}
    path = tmp_path / "beit.pth"
    torch.save({"model": state}, path)
    loaded = build(96, "MODEL.BEIT.WEIGHTS", str(path)).model.state_dict()
    key = "blocks.1.attn.relative_position_bias_table"
    for name, value in loaded.items():
        expected = resize_position_table(state[name], 6) if "relative_position" in name else state[name]
        assert (value == expected).all(), name
    assert loaded[key].shape == (11 * 11 + 3, 12)
    torch.testing.assert_close(loaded[key][60], state[key][24].float())  # the middle, offset zero


def test_checkpointing_changes_no_gradient():
    plain, lean = build(32), build(32, "MODEL.BEIT.CHECKPOINT", "True")
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 48)
    grads = []
    for model in (plain, lean):
        sum(f.square().mean() for f in model(x).values()).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(g is not None for g in grads[0])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_freeze_at():
    model = build(32, "MODEL.BACKBONE.FREEZE_AT", "2").train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    prefixes = ("model.patch_embed.", "model.cls_token", "model.blocks.0.")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    assert not model.model.blocks[0].training
    assert model.model.blocks[1].training
    assert (model.model.blocks[1].gamma_1 == 1e-6).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.BEIT.NAME", "vit_base_patch16_224"), r"must be one of timm's beit"),
        (("MODEL.BEIT.NAME", "beit_bse_patch16_224"), r"nearest names: .*beit_base_patch16_224"),
        (("MODEL.BEIT.IMG_SIZE", "100"), r"IMG_SIZE=100: must be a multiple of 16"),
        (("MODEL.BEIT.OUT_INDICES", "[1,2,3]"), r"four rising block numbers in 0\.\.11"),
        (("MODEL.BEIT.OUT_INDICES", "[1,2,3,12]"), r"four rising block numbers in 0\.\.11"),
    ],
)
def test_bad_input(overrides, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build(32, *overrides)
