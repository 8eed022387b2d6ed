"""The moving average against its closed form."""

import pytest
import torch
from torch import nn

from the_mask.engine.ema import ExponentialMovingAverage


def _model(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    return _fill(model, value)


def _fill(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


@pytest.mark.parametrize("decay", [0.5, 0.9998])
def test_closed_form(decay: float) -> None:
    values = [1.0, -2.0, 0.5, 4.0, 3.0, -1.0]
    model = _model(values[0])
    ema = ExponentialMovingAverage(model, decay)
    expected = values[0]
    for n, value in enumerate(values[1:]):
        ema.update(_fill(model, value))
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * value
    assert torch.allclose(ema.average["0.weight"], torch.full((2, 2), expected))


def test_constants_and_counters() -> None:
    model = _model(0.1)
    ema = ExponentialMovingAverage(model, 0.99)
    for _ in range(50):
        model[1].num_batches_tracked += 1
        ema.update(model)
    assert torch.equal(ema.average["0.weight"], model[0].weight)  # frozen weights do not drift
    assert ema.average["1.num_batches_tracked"] == 50


def test_swap_and_return() -> None:
    model = _model(1.0)
    ema = ExponentialMovingAverage(model, 0.0)
    ema.decay = 0.9
    ema.update(_fill(model, 2.0))
    averaged = float(ema.average["0.weight"][0, 0])
    assert averaged == pytest.approx(1.9)  # decay of the first update is 1/10

    def fail_inside() -> None:
        with ema.applied_to(model):
            assert model[0].weight[0, 0].item() == pytest.approx(averaged)
            raise KeyError("evaluation failed")

    with pytest.raises(KeyError, match="evaluation failed"):
        fail_inside()
    assert torch.equal(model[0].weight, torch.full((2, 2), 2.0))
    assert ema.average["0.weight"][0, 0].item() == pytest.approx(averaged)


def test_half_precision_weights_are_averaged_in_float32() -> None:
    model = _model(1.0).bfloat16()
    ema = ExponentialMovingAverage(model, 0.999)
    assert ema.average["0.weight"].dtype == torch.float32
    with ema.applied_to(model):
        assert model[0].weight.dtype == torch.bfloat16
    assert ema.average["0.weight"].dtype == torch.float32


def test_state_round_trip() -> None:
    model = _model(1.0)
    ema = ExponentialMovingAverage(model, 0.9)
    ema.update(_fill(model, 5.0))
    other = ExponentialMovingAverage(_model(9.0), 0.9)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1
    assert torch.equal(other.average["0.weight"], ema.average["0.weight"])


def test_decay_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"EMA.DECAY 1.5"):
        ExponentialMovingAverage(_model(1.0), 1.5)
