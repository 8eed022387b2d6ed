"""The fast linear layer against float64, and where it is not taken."""

import copy
from pathlib import Path

import pytest
import torch
from detectron2.layers import Conv2d
from timm.layers import Mlp
from tolerances import assert_close
from torch import nn

from the_mask.config import load_config
from the_mask.inference.stream import build_random
from the_mask.modeling.backbones.plain_vit import GeluMlp, fuse_gelu
from the_mask.modeling.fast_layers import speed_up_layers
from the_mask.ops import MSDeformAttn, decomposed, use
from the_mask.ops import fast_linear as module
from the_mask.ops.fast_linear import FastConv2d, FastLinear, fast_linear, fast_product, uses_onednn
from the_mask.ops.inference import softmax_of_few

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "debug"


def take_small_ones(monkeypatch):
    monkeypatch.setattr(module, "LEAST_PRODUCT", 1)
    monkeypatch.setattr(module, "LEAST_CONVOLUTION", 1)
    monkeypatch.setattr(module, "LEAST_TRAINED", 1)


@pytest.fixture
def onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(module, "uses_onednn", lambda: True)
    take_small_ones(monkeypatch)


@pytest.mark.parametrize("shape", [(5, 8), (2, 7, 8), (1, 8), (2, 3, 4, 8), (3, 0, 8)])
@pytest.mark.parametrize("biased", [True, False])
def test_values(onednn, shape, biased):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(shape, generator=generator), torch.randn(6, 8, generator=generator)
    b = torch.randn(6, generator=generator) if biased else None
    with torch.no_grad():
        found = fast_linear(x, w, b)
    expected = x.double() @ w.double().t() + (0 if b is None else b.double())
    assert_close(found, expected, "layer")
    with torch.no_grad():
        found = fast_linear(x, w, b, gelu=True)
    assert_close(found, nn.functional.gelu(expected), "layer")
    assert_close(fast_linear(x, w.requires_grad_(), b, gelu=True), nn.functional.gelu(expected), "layer")
    strided = torch.randn(8, 12, generator=generator).t()[::2]
    with torch.no_grad():
        found = fast_linear(x, strided, b)
    assert_close(found, nn.functional.linear(x, strided, b), "layer")


def test_where_the_usual_layer_runs(onednn, monkeypatch):
    layer = FastLinear(8, 6)
    x = torch.randn(4, 8)
    called = []
    real = torch.nn.functional.linear
    monkeypatch.setattr(module.F, "linear", lambda *a: called.append(1) or real(*a))
    for grad in (True, False):
        called.clear()
        with torch.set_grad_enabled(grad):
            layer.double()(x.double())
            with torch.autocast("cpu", torch.bfloat16):
                layer.float()(x)
            assert len(called) == 2
            layer(x)
            assert len(called) == 2, "the fast path was not taken"
    monkeypatch.setattr(module, "LEAST_TRAINED", 4 * 8 * 6 + 1)
    layer(x)
    assert len(called) == 3, "with gradients, small products take the usual layer"


def test_subclasses_of_tensor_take_the_usual_layer(onednn, monkeypatch):
    class Marked(torch.Tensor):
        pass

    called = []
    monkeypatch.setattr(module, "_by_onednn", lambda *a, real=module._by_onednn: called.append(1) or real(*a))
    layer, x = FastLinear(8, 6), torch.randn(4, 8)
    layer(x.as_subclass(Marked)).sum().backward()
    assert not called
    layer(x).sum().backward()
    assert len(called) == 2, "the layer, and the gradient of its weight"


@pytest.mark.parametrize("shape", [(5, 8), (2, 7, 8), (1, 8)])
@pytest.mark.parametrize("learns", ["all", "x", "weight", "bias"])
def test_gradients(onednn, shape, learns):
    """First and second derivatives against float64, of the arguments that learn."""
    generator = torch.Generator().manual_seed(0)
    values = {"x": torch.randn(shape, generator=generator), "weight": torch.randn(6, 8, generator=generator)}
    values["bias"] = torch.randn(6, generator=generator)
    upstream = torch.randn(*shape[:-1], 6, generator=generator)

    def derivatives(dtype):
        x, weight, bias = (v.to(dtype).requires_grad_(learns in ("all", n)) for n, v in values.items())
        leaves = [v for v in (x, weight, bias) if v.requires_grad]
        out = fast_linear(x, weight, bias)
        first = torch.autograd.grad(out.tanh(), leaves, upstream.to(dtype), create_graph=True)
        return [out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    with torch.profiler.profile() as profile:
        found = derivatives(torch.float32)
    assert [event.key for event in profile.key_averages() if "_linear_pointwise" in event.key]
    for one, other in zip(found, derivatives(torch.float64), strict=True):
        assert_close(one, other, "network")


@pytest.mark.parametrize("shape", [(5, 8), (2, 7, 8)])
def test_results_with_gradients_may_change_in_place(onednn, shape):
    x, weight = torch.randn(shape), torch.randn(6, 8)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        out = fast_linear(leaf, weight.to(dtype)).relu_()
        results.append([out, *torch.autograd.grad(out.square().sum(), leaf)])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, "network")


def test_changing_a_result_in_place_copies_nothing(onednn):
    """The gradient of a view changed in place would copy all of it, as ``CopySlices``."""
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(6, 8)
    assert "CopySlices" not in str(fast_linear(x, weight).relu_().grad_fn.next_functions)
    layer = nn.Conv2d(8, 6, 1)
    speed_up_layers(nn.Sequential(layer))
    assert "CopySlices" not in str(layer(torch.randn(2, 8, 3, 4)).relu_().grad_fn.next_functions)


@pytest.mark.parametrize(
    "shapes", [((2, 1, 3, 8), (2, 4, 8, 5)), ((3, 8), (4, 8, 5)), ((2, 3, 8), (8, 5)), ((3, 8), (8, 5))]
)
def test_product_gradients(onednn, shapes):
    """First and second derivatives against float64."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    results = []
    for dtype in (torch.float32, torch.float64):
        x, y = (v.to(dtype).requires_grad_() for v in (a, b))
        out = fast_product(x, y)
        assert (type(out.grad_fn).__name__ == "_ProductBackward") == (dtype == torch.float32), (
            "the fast path was not taken"
        )
        first = torch.autograd.grad(out.square().sum(), (x, y), create_graph=True)
        results.append([out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, y))])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, "network")


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_pointwise_convolutions(onednn, biased, layout):
    """Against float64, in the layout of the input."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 6, 1, bias=biased), torch.randn(2, 8, 5, 4).to(memory_format=layout)
    exact = copy.deepcopy(layer).double()
    speed_up_layers(nn.Sequential(layer))
    results = []
    with torch.profiler.profile() as profile:
        for convolution, dtype in ((layer, torch.float32), (exact, torch.float64)):
            leaf = x.to(dtype).requires_grad_()
            out = convolution(leaf)
            assert out.is_contiguous(memory_format=layout)
            results.append([out, *torch.autograd.grad(out.tanh().sum(), [leaf, *convolution.parameters()])])
    assert sum(event.key == "aten::conv2d" for event in profile.events()) == 1, "the fast path was not taken"
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape
        assert_close(one, other, "network")


def test_export_sees_the_usual_layer(onednn):
    model = nn.Sequential(nn.Linear(8, 6)).eval()
    speed_up_layers(model)
    assert isinstance(model[0], FastLinear)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(4, 8),))
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("mkldnn" in target for target in targets)


def test_mlps_of_vision_transformers(onednn):
    torch.manual_seed(0)
    exact = Mlp(8, 16, drop=0.5, norm_layer=nn.LayerNorm).eval()
    other = Mlp(8, 16, act_layer=nn.ReLU)
    blocks = [nn.ModuleDict({"mlp": copy.deepcopy(exact)}), nn.ModuleDict({"mlp": other}), nn.Identity()]
    for block in blocks[:2]:
        block.mlp = block["mlp"]
    fuse_gelu(blocks)
    mlp = blocks[0].mlp
    assert type(mlp) is GeluMlp
    assert type(other) is Mlp
    x = torch.randn(3, 5, 8)
    with torch.no_grad(), torch.profiler.profile() as profile:
        found = mlp(x)
    assert not [event.key for event in profile.key_averages() if event.key == "aten::gelu"]
    assert_close(found, exact.double()(x.double()), "layer")
    torch.manual_seed(1)
    trained = mlp.train()(x)
    torch.manual_seed(1)
    assert_close(trained, exact.float().train()(x), "layer")


@pytest.mark.parametrize(
    "shapes", [((3, 8), (8, 50)), ((2, 4, 3, 8), (2, 4, 8, 5)), ((2, 1, 3, 8), (2, 4, 8, 5)), ((1, 3, 8), (8, 5))]
)
def test_product(onednn, shapes):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    expected = torch.einsum("...mk,...kn->...mn", a.double(), b.double())
    strided = a.mT.contiguous().mT
    for x, y in ((a, b), (strided, b), (a, b.mT.contiguous().mT)):
        with torch.no_grad(), torch.profiler.profile() as profile:
            found = fast_product(x, y)
        assert [event.key for event in profile.key_averages() if "_linear_pointwise" in event.key]
        assert_close(found, expected, "layer")
    assert_close(fast_product(a.requires_grad_(), b), expected, "layer")


@pytest.mark.parametrize("kind", ["plain", "norm"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pointwise_convolutions_in_one_thread(onednn, monkeypatch, kind, layout):
    torch.manual_seed(0)
    if kind == "plain":
        layer = nn.Conv2d(8, 6, 1)
    else:
        layer = Conv2d(8, 6, 1, bias=False, norm=nn.GroupNorm(2, 6), activation=nn.functional.relu)
    model = nn.Sequential(layer, nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 1, stride=2), nn.Conv2d(6, 6, 1, groups=2)).eval()
    keys = list(model.state_dict())
    x = torch.randn(2, 8, 9, 7).to(memory_format=layout)
    expected = copy.deepcopy(model).double()(x.double())
    speed_up_layers(model)
    assert [isinstance(module, FastConv2d) for module in model] == [True, False, False, False]
    assert list(model.state_dict()) == keys
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    called = []
    real = torch.mkldnn_convolution
    monkeypatch.setattr(torch, "mkldnn_convolution", lambda *a: called.append(1) or real(*a))
    with torch.no_grad():
        found = model(x)
    assert called == [1]
    assert_close(found, expected, "network")
    model(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize(("rows", "taken"), [(255, False), (256, True)])
def test_small_products_take_the_usual_layer(monkeypatch, rows, taken):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(module, "uses_onednn", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x, w = torch.randn(rows, 64), torch.randn(64, 64)
    image, kernel = torch.randn(1, 128, rows, 1), nn.Conv2d(128, 128, 1)
    speed_up_layers(model := nn.Sequential(kernel))
    calls = (lambda: fast_linear(x, w), lambda: fast_product(x, w), lambda: model(image))
    with torch.no_grad(), torch.profiler.profile() as profile:
        for call in calls:
            call()
    keys = [event.key for event in profile.key_averages()]
    assert sum("_linear_pointwise" in key for key in keys) == taken
    assert ("aten::mkldnn_convolution" in keys) == taken


def test_softmax_of_few():
    x = 50 * torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))
    x[0, 0] = -1e30
    with torch.no_grad():
        found = softmax_of_few(x, torch.float32)
    assert_close(found, x.double().softmax(-1), "sum")
    assert softmax_of_few(x.bfloat16(), torch.float32).dtype == torch.float32
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad(softmax_of_few(leaf, dtype).square().sum(), leaf, create_graph=True)[0])
        gradients.append(torch.autograd.grad(gradients[-1].square().sum(), leaf)[0])
    assert_close(gradients[0], gradients[2], "sum")
    assert_close(gradients[1], gradients[3], "sum")


@pytest.mark.parametrize("batch", [1, 2])
def test_shared_reference_points(onednn, batch):
    torch.manual_seed(0)
    layer = MSDeformAttn(16, 2, 4, 3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    shapes = [(5, 4), (3, 2)]
    query, value = torch.randn(batch, 7, 16), torch.randn(batch, 26, 16)
    reference = torch.rand(1, 7, 2, 2)
    with use("reference"):
        expected = layer.double()(query.double(), reference.double().expand(batch, -1, -1, -1), value.double(), shapes)
    layer.float()
    with torch.no_grad():
        found = layer(query, layer.spread(reference), value, shapes)
    assert_close(found, expected, "network")
    trained = layer(query, layer.spread(reference), value, shapes)
    assert_close(trained, expected, "network")
    gradients = torch.autograd.grad(trained.square().sum(), list(layer.parameters()))
    layer.double()
    with use("reference"):
        again = layer(query.double(), reference.double().expand(batch, -1, -1, -1), value.double(), shapes)
    for one, other in zip(gradients, torch.autograd.grad(again.square().sum(), list(layer.parameters())), strict=True):
        assert_close(one, other, "network")


def test_tracers_and_standard_operators_see_the_usual_layer(onednn):
    model = nn.Sequential(nn.Linear(8, 6)).eval()
    speed_up_layers(model)
    x = torch.randn(4, 8)
    with torch.no_grad():
        graph = torch.jit.trace(model, x).inlined_graph
        with decomposed(), torch.profiler.profile() as profile:
            model(x)
    assert "mkldnn" not in str(graph)
    assert not [event.key for event in profile.key_averages() if "_linear_pointwise" in event.key]


@pytest.mark.parametrize("name", ["mask2former_debug", "the_mask_debug_video", "videomt_debug"])
def test_segmentors_take_it_in_eval_mode(monkeypatch, name):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    torch.manual_seed(0)
    model = build_random(load_config(CONFIGS / f"{name}.yaml", ["MODEL.DEVICE", "cpu"]))
    assert not [child for child in model.modules() if type(child) is nn.Linear]
    assert name == "videomt_debug" or [child for child in model.modules() if isinstance(child, FastConv2d)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    take_small_ones(monkeypatch)
    frame = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(0)).byte()
    results = []
    for choice in (False, True):
        monkeypatch.setattr(module, "uses_onednn", lambda choice=choice: choice)
        results.append(model.step(frame, model.init_state())[0])
    assert_close(*results, "runtime")
    model.train()
    assert model.eval().state_dict().keys() == model.state_dict().keys()


def test_choice(monkeypatch):
    uses_onednn.cache_clear()
    assert not uses_onednn("blas")
    monkeypatch.setattr(module, "is_amd", lambda: False)
    assert not uses_onednn("auto")
    with pytest.raises(ValueError, match="THE_MASK_LINEAR='fast'"):
        uses_onednn("fast")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="without oneDNN"):
        uses_onednn("onednn")
    uses_onednn.cache_clear()
