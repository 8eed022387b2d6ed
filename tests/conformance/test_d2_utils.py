"""Documented behaviour of the other detectron2.utils in one process."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathHandler, PathManager
from detectron2.utils.registry import Registry, locate
from detectron2.utils.serialize import PicklableWrapper


def test_seed_all_rng(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")

    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()  # noqa: NPY002

    seed_all_rng(5)
    first = draws()
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    assert draws() == first
    assert os.environ["PYTHONHASHSEED"] == "5"
    seed_all_rng()
    one = draws()
    seed_all_rng()
    assert draws() != one


def test_comm_of_a_single_process() -> None:
    assert (comm.get_world_size(), comm.get_rank(), comm.get_local_rank(), comm.get_local_size()) == (1, 0, 0, 1)
    assert comm.is_main_process()
    assert comm.synchronize() is None
    assert comm.all_gather("x") == ["x"]
    assert comm.gather("x") == ["x"]
    assert comm.reduce_dict({"a": 1}) == {"a": 1}
    np.random.seed(0)  # noqa: NPY002
    expected = np.random.randint(2**31)  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    assert comm.shared_random_seed() == expected


def test_registry_and_locate() -> None:
    registry = Registry("CONFORMANCE")

    @registry.register()
    class Thing: ...

    assert registry.get("Thing") is Thing
    with pytest.raises(KeyError, match="CONFORMANCE"):
        registry.get("Other")
    with pytest.raises(AssertionError):
        registry.register(Thing)
    assert locate("torch.nn.Linear") is torch.nn.Linear
    with pytest.raises(ImportError):
        locate("torch.nn.NoSuchLayer")


def test_path_manager(tmp_path: Path) -> None:
    with PathManager.open(str(tmp_path / "a.txt"), "w") as file:
        file.write("text")
    assert PathManager.isfile(str(tmp_path / "a.txt"))
    assert PathManager.get_local_path(str(tmp_path / "a.txt")) == str(tmp_path / "a.txt")
    PathManager.mkdirs(str(tmp_path / "b" / "c"))
    assert PathManager.ls(str(tmp_path / "b")) == ["c"]


def test_path_manager_takes_further_handlers(tmp_path: Path) -> None:
    class Handler(PathHandler):
        def _get_supported_prefixes(self) -> list[str]:
            return ["conformance://"]

        def _get_local_path(self, path: str, **kwargs: object) -> str:
            return str(tmp_path / path.removeprefix("conformance://"))

    PathManager.register_handler(Handler())
    assert PathManager.get_local_path("conformance://x") == str(tmp_path / "x")


def test_picklable_wrapper() -> None:
    assert pickle.loads(pickle.dumps(PicklableWrapper(lambda x: x + 1)))(1) == 2
    twice = PicklableWrapper(PicklableWrapper(lambda x: x + 1))
    assert pickle.loads(pickle.dumps(twice))(1) == 2
    assert PicklableWrapper({"a": 1}).keys() == {"a"}
