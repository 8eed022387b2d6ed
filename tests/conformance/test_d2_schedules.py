"""Documented behaviour of detectron2.solver: warm-up in front of a schedule."""

from __future__ import annotations

import pytest
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler


def multi_step() -> MultiStepParamScheduler:
    return MultiStepParamScheduler([1.0, 0.1, 0.01], milestones=[10, 15], num_updates=20)


def test_linear_warmup_then_the_schedule_itself() -> None:
    schedule = WarmupParamScheduler(multi_step(), 0.001, 5 / 20)
    values = [schedule(i / 20) for i in range(20)]
    assert values[:5] == pytest.approx([0.001 + 0.999 * i / 5 for i in range(5)])
    assert values[5:] == pytest.approx([1.0] * 5 + [0.1] * 5 + [0.01] * 5)


def test_constant_warmup() -> None:
    schedule = WarmupParamScheduler(multi_step(), 0.001, 5 / 20, "constant")
    assert [schedule(i / 20) for i in range(6)] == pytest.approx([0.001] * 5 + [1.0])


def test_warmup_ends_where_the_schedule_is_by_then() -> None:
    cosine = CosineParamScheduler(1.0, 0.0)
    schedule = WarmupParamScheduler(cosine, 0.0, 0.5)
    assert schedule(0.25) == pytest.approx(0.5 * cosine(0.5))
    assert schedule(0.75) == pytest.approx(cosine(0.75))
    squeezed = WarmupParamScheduler(cosine, 0.0, 0.5, rescale_interval=True)
    assert squeezed(0.25) == pytest.approx(0.5)
    assert squeezed(0.75) == pytest.approx(cosine(0.5))


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="warmup"):
        WarmupParamScheduler(multi_step(), 0.001, 0.25, "quadratic")
