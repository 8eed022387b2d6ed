"""Parameter groups on small modules and on a real model, optimiser state by name, clipping against plain formulas."""

import re
from pathlib import Path

import pytest
import torch
from engine_fakes import CONFIGS, FakeModel, fake_cfg
from torch import nn

import the_mask.modeling  # noqa: F401
from the_mask.config import load_config
from the_mask.engine.optimizer import (
    ParameterRule,
    build_optimizer,
    clip_gradients,
    load_optimizer_state,
    named_settings,
    optimizer_state,
    parameter_groups,
    set_learning_rate,
)

RULE = ParameterRule(weight_decay=0.05, weight_decay_norm=0.02, weight_decay_embed=0.01, backbone_multiplier=0.1)


class LayerNorm2d(nn.Module):
    """A norm that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(4, 2))
        self.level_embed = nn.Parameter(torch.zeros(3, 2))
        self.norm_like = LayerNorm2d()
        self.linear = nn.Linear(2, 2)
        self.table = nn.Embedding(4, 2)
        self.group = nn.GroupNorm(1, 2)


def settings(model: nn.Module, rule: ParameterRule = RULE) -> dict[str, tuple[float, float]]:
    return {name: (s.lr_multiplier, s.weight_decay) for name, _, s in named_settings(model, rule)}


def test_rules_on_a_small_module() -> None:
    model = nn.ModuleDict({"backbone": Odd(), "head": Odd()})
    expected = {
        "relative_position_bias_table": 0.0,
        "level_embed": 0.01,
        "norm_like.weight": 0.02,
        "linear.weight": 0.05,
        "linear.bias": 0.05,
        "table.weight": 0.01,
        "group.weight": 0.02,
        "group.bias": 0.02,
    }
    assert settings(model) == {
        f"{part}.{name}": (factor, decay)
        for part, factor in (("backbone", 0.1), ("head", 1.0))
        for name, decay in expected.items()
    }


def test_bias_decay_of_its_own() -> None:
    rule = ParameterRule(weight_decay=0.05, weight_decay_norm=0.02, weight_decay_bias=0.0)
    found = settings(Odd(), rule)
    assert found["linear.bias"] == (1.0, 0.0)
    assert found["group.bias"] == (1.0, 0.02)


def test_frozen_and_shared_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    groups = parameter_groups(model, RULE)
    assert [name for group in groups for name in group["names"]] == ["0.weight", "0.bias"]
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model.requires_grad_(False), RULE)


@pytest.mark.parametrize("config", ["debug/mask2former_debug.yaml", "debug/the_mask_debug_video.yaml"])
def test_groups_of_a_real_model(config: str) -> None:
    """The oracle goes by names alone, as published state dicts spell them."""
    from detectron2.modeling import build_model

    cfg = load_config(CONFIGS / config, ["MODEL.DEVICE", "cpu", "SOLVER.BACKBONE_MULTIPLIER", 0.1])
    model = build_model(cfg)
    norm = re.compile(r"norm|pixel_decoder\.input_proj\.\d\.1\.")
    embedding = re.compile(r"level_embed|query_feat|query_embed")
    expected = {
        name: (
            0.1 if name.startswith("backbone.") else 1.0,
            0.0 if norm.search(name) or embedding.search(name) else 0.05,
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert settings(model, ParameterRule.from_config(cfg)) == expected
    groups = build_optimizer(cfg, model).param_groups
    assert len(groups) == len(set(expected.values()))
    assert sum(len(group["params"]) for group in groups) == len(expected)
    assert all(group["lr"] == group["lr_multiplier"] * cfg.SOLVER.BASE_LR for group in groups)


def test_learning_rate_keeps_multipliers(tmp_path: Path) -> None:
    optimizer = build_optimizer(fake_cfg(tmp_path), FakeModel())
    set_learning_rate(optimizer, 0.5)
    assert {group["lr_multiplier"]: group["lr"] for group in optimizer.param_groups} == {0.1: 0.05, 1.0: 0.5}


def test_unknown_optimizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SOLVER.OPTIMIZER 'LION'.*ADAMW, SGD"):
        build_optimizer(fake_cfg(tmp_path, "SOLVER.OPTIMIZER", "LION"), FakeModel())


def _stepped(cfg, model: FakeModel) -> torch.optim.Optimizer:
    optimizer = build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    return optimizer


def test_state_survives_another_grouping(tmp_path: Path) -> None:
    cfg, model = fake_cfg(tmp_path), FakeModel()
    saved = optimizer_state(_stepped(cfg, model))
    assert "lr" not in str(saved["state"].keys())
    other = build_optimizer(fake_cfg(tmp_path, "SOLVER.BACKBONE_MULTIPLIER", 1.0, "SOLVER.WEIGHT_DECAY", 0.0), model)
    load_optimizer_state(other, saved)
    assert len(other.param_groups) == 1
    assert {group["weight_decay"] for group in other.param_groups} == {0.0}
    for name, parameter in model.named_parameters():
        assert torch.equal(other.state[parameter]["exp_avg"], saved["state"][name]["exp_avg"])


def test_foreign_state_is_refused(tmp_path: Path) -> None:
    cfg, model = fake_cfg(tmp_path), FakeModel()
    saved = optimizer_state(_stepped(cfg, model))
    sgd = build_optimizer(fake_cfg(tmp_path, "SOLVER.OPTIMIZER", "SGD"), model)
    with pytest.raises(ValueError, match="written by AdamW, this run uses SGD"):
        load_optimizer_state(sgd, saved)
    model.head.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 parameters with state are not trained here \['head.bias'\]"):
        load_optimizer_state(build_optimizer(cfg, model), saved)


def _gradients() -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.tensor([3.0, 0.0, 4.0])
    parameters[1].grad = torch.full((2, 2), 6.0)
    return parameters  # the last one has no gradient


def test_full_model_clipping() -> None:
    parameters = _gradients()
    norm = clip_gradients(parameters, "full_model", 2.0)
    assert float(norm) == pytest.approx(13.0)  # sqrt(25 + 144)
    assert torch.allclose(parameters[0].grad, torch.tensor([3.0, 0.0, 4.0]) * 2 / 13)
    assert torch.allclose(parameters[1].grad, torch.full((2, 2), 12 / 13))
    small = _gradients()
    clip_gradients(small, "full_model", 20.0)
    assert torch.equal(small[0].grad, torch.tensor([3.0, 0.0, 4.0]))


def test_other_clipping() -> None:
    parameters = _gradients()
    assert clip_gradients(parameters, "norm", 2.5) is None
    assert torch.allclose(parameters[0].grad, torch.tensor([1.5, 0.0, 2.0]))
    assert torch.allclose(parameters[1].grad, torch.full((2, 2), 1.25))
    parameters = _gradients()
    clip_gradients(parameters, "value", 3.5)
    assert torch.equal(parameters[0].grad, torch.tensor([3.0, 0.0, 3.5]))
    with pytest.raises(ValueError, match="CLIP_TYPE 'all'"):
        clip_gradients(parameters, "all", 1.0)
