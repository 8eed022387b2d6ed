"""Buffers are put back as they were, whoever changed them; torch does not count what batch norm does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from the_mask.engine.buffers import BufferCopies


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None), nn.InstanceNorm2d(3)])
        self.norms.append(nn.InstanceNorm2d(3, track_running_stats=True))
        self.register_buffer("rows", torch.zeros(2, 2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("grown", torch.zeros(1), persistent=False)
        self.register_buffer("none", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows[0] += 1
        self.replaced = self.replaced + 1
        self.grown = torch.cat([self.grown, self.grown[:1] + 1])
        for norm in self.norms:
            x = norm(x)
        return x


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_buffers_are_put_back(steps: int) -> None:
    torch.manual_seed(0)
    model, copies = Model(), BufferCopies()
    copies.take(model)
    for _ in range(steps):
        model(torch.randn(2, 3, 4, 4))
        copies.take(model)
    before = buffers(model)
    model(torch.randn(2, 3, 4, 4))
    assert not torch.equal(before["norms.0.running_mean"], model.norms[0].running_mean)
    copies.restore(model)
    assert_equal(before, buffers(model))
    model(torch.randn(2, 3, 4, 4))
    copies.restore(model)
    assert_equal(before, buffers(model))
