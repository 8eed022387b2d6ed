"""Documented behaviour of detectron2.checkpoint."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
        self.head = nn.Linear(3, 1)
        self.register_buffer("pixel_mean", torch.zeros(3))


class TwoBackbones(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 3)
        self.teacher = nn.ModuleDict({"backbone": nn.Linear(2, 3)})


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_save_and_resume(tmp_path: Path) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer)
    assert not checkpointer.has_checkpoint()
    checkpointer.save("first", iteration=7)
    assert (tmp_path / "last_checkpoint").read_text() == "first.pth"
    assert checkpointer.has_checkpoint()

    other = Model()
    other_optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
    extra = DetectionCheckpointer(other, str(tmp_path), optimizer=other_optimizer).resume_or_load("", resume=True)
    assert same(model, other)
    assert extra["iteration"] == 7
    assert other_optimizer.param_groups[0]["lr"] == 3.0

    third = Model()
    DetectionCheckpointer(third, str(tmp_path)).resume_or_load("", resume=False)
    assert not same(model, third)
    DetectionCheckpointer(third).load(str(tmp_path / "first.pth"))
    assert same(model, third)


def test_only_ranks_that_may_save_do(tmp_path: Path) -> None:
    DetectionCheckpointer(Model(), str(tmp_path), save_to_disk=False).save("first")
    assert not list(tmp_path.iterdir())


def test_bare_state_dict(tmp_path: Path) -> None:
    model, other = Model(), Model()
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    DetectionCheckpointer(other).load(str(tmp_path / "bare.pth"))
    assert same(model, other)


def test_differences_are_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = Model().state_dict()
    del state["head.bias"], state["pixel_mean"]
    state["head.weight"] = torch.zeros(7)
    state["surplus"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "odd.pth")
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(Model()).load(str(tmp_path / "odd.pth"))
    for name in ("head.{bias, weight}", "'head.weight'", "surplus"):
        assert name in caplog.text
    assert "pixel_mean" not in caplog.text  # a constant from the config, not a weight


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        DetectionCheckpointer(Model()).load(str(tmp_path / "none.pth"))
    assert DetectionCheckpointer(Model()).load("") == {}


def test_keys_are_matched_by_their_ends(tmp_path: Path) -> None:
    model, other = Model(), Model()
    state = {k.removeprefix("backbone."): v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    torch.save(state, tmp_path / "part.pth")
    DetectionCheckpointer(other).load(str(tmp_path / "part.pth") + "?matching_heuristics=True")
    assert same(model.backbone, other.backbone)
    assert not same(model.head, other.head)
    with pytest.raises(ValueError, match="query"):
        DetectionCheckpointer(other).load(str(tmp_path / "part.pth") + "?other=True")


def test_pickle_of_numpy_arrays(tmp_path: Path) -> None:
    model, other = Model(), Model()
    arrays = {k.removeprefix("backbone."): v.numpy() for k, v in model.backbone.state_dict(prefix="backbone.").items()}
    content = {"model": arrays, "__author__": "test", "matching_heuristics": True}
    (tmp_path / "part.pkl").write_bytes(pickle.dumps(content))
    DetectionCheckpointer(other).load(str(tmp_path / "part.pkl"))
    assert same(model.backbone, other.backbone)


def test_one_key_for_two_places_is_an_error(tmp_path: Path) -> None:
    torch.save({"backbone.weight": torch.ones(3, 2)}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match="multiple keys"):
        DetectionCheckpointer(TwoBackbones()).load(str(tmp_path / "two.pth") + "?matching_heuristics=True")
