"""The fast linear layer against float64, and where it is not taken."""

import pytest
import torch
from torch import nn

from the_mask.ops import fast_linear as module
from the_mask.ops.fast_linear import FastLinear, fast_linear, speed_up_linears, uses_onednn


@pytest.fixture
def onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(module, "uses_onednn", lambda: True)


@pytest.mark.parametrize("shape", [(5, 8), (2, 7, 8), (1, 8), (2, 3, 4, 8), (3, 0, 8)])
@pytest.mark.parametrize("biased", [True, False])
def test_values(onednn, shape, biased):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(shape, generator=generator), torch.randn(6, 8, generator=generator)
    b = torch.randn(6, generator=generator) if biased else None
    with torch.no_grad():
        found = fast_linear(x, w, b)
    expected = x.double() @ w.double().t() + (0 if b is None else b.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    strided = torch.randn(8, 12, generator=generator).t()[::2]
    with torch.no_grad():
        found = fast_linear(x, strided, b)
    torch.testing.assert_close(found, nn.functional.linear(x, strided, b), rtol=1e-5, atol=1e-5)


def test_where_the_usual_layer_runs(onednn, monkeypatch):
    layer = FastLinear(8, 6)
    x = torch.randn(4, 8)
    called = []
    real = torch.nn.functional.linear
    monkeypatch.setattr(module.F, "linear", lambda *a: called.append(1) or real(*a))
    layer(x).sum().backward()  # gradients
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer.double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            layer.float()(x)
        assert len(called) == 3
        layer(x)
        assert len(called) == 3, "the fast path was not taken"


def test_export_sees_the_usual_layer(onednn):
    model = nn.Sequential(nn.Linear(8, 6)).eval()
    speed_up_linears(model)
    assert isinstance(model[0], FastLinear)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(4, 8),))
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("mkldnn" in target for target in targets)


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
