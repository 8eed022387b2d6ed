"""Documented behaviour of detectron2.engine.launch and detectron2.utils.comm over two gloo processes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from tolerances import assert_close
from torch import nn

from the_mask.engine.launch import leave_process_group


def batch() -> torch.Tensor:
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def work(folder: str) -> None:
    rank = comm.get_rank()
    found: dict[str, object] = {
        "identity": (comm.get_world_size(), rank, comm.get_local_rank(), comm.get_local_size()),
        "main": comm.is_main_process(),
        "backend": dist.get_backend(),
        "all_gather": comm.all_gather({"rank": rank}),
        "gather": comm.gather(rank),
        "gather_to_1": comm.gather(rank, dst=1),
        "local_group": comm.get_local_process_group() is not None,
    }
    np.random.seed(rank)  # noqa: NPY002
    found["seed"] = comm.shared_random_seed()
    reduced = comm.reduce_dict({"a": torch.tensor(rank + 1.0), "b": torch.tensor(2.0)})
    total = comm.reduce_dict({"a": torch.tensor(rank + 1.0)}, average=False)
    if rank == 0:
        found["mean"] = {name: value.item() for name, value in reduced.items()}
        found["sum"] = total["a"].item()
    for mode in ("", "N"):
        norm = NaiveSyncBatchNorm(3, stats_mode=mode)
        x = batch()[2 * rank : 2 * rank + 2].requires_grad_()
        y = norm(x)
        y.pow(3).sum().backward()
        found[f"norm{mode}"] = {"y": y.detach(), "grad": x.grad, "mean": norm.running_mean}
    # An empty batch on one rank.
    norm = NaiveSyncBatchNorm(3, stats_mode="N")
    norm(batch()[: 3 * (1 - rank)])
    found["empty"] = norm.running_mean
    comm.synchronize()
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    # launch leaves the groups to the exit of the process, where a thread of gloo that still runs may abort it.
    comm.synchronize()
    leave_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    launch(work, 2, dist_url="auto", args=(str(folder),))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_ranks(results: list[dict]) -> None:
    assert [r["identity"] for r in results] == [(2, 0, 0, 2), (2, 1, 1, 2)]
    assert [r["main"] for r in results] == [True, False]
    assert {r["backend"] for r in results} == {"gloo"}
    assert all(r["local_group"] for r in results)


def test_exchange_of_objects(results: list[dict]) -> None:
    assert [r["all_gather"] for r in results] == [[{"rank": 0}, {"rank": 1}]] * 2
    assert [r["gather"] for r in results] == [[0, 1], []]
    assert [r["gather_to_1"] for r in results] == [[], [0, 1]]
    np.random.seed(0)  # noqa: NPY002
    assert [r["seed"] for r in results] == [np.random.randint(2**31)] * 2  # noqa: NPY002


def test_reduce_dict(results: list[dict]) -> None:
    assert (results[0]["mean"], results[0]["sum"]) == ({"a": 1.5, "b": 2.0}, 3.0)


@pytest.mark.parametrize("mode", ["", "N"])
def test_naive_sync_batchnorm_is_batchnorm_of_the_whole_batch(results: list[dict], mode: str) -> None:
    x = batch().requires_grad_()
    y = nn.BatchNorm2d(3)(x)
    y.pow(3).sum().backward()
    both = [r[f"norm{mode}"] for r in results]
    assert_close(torch.cat([r["y"] for r in both]), y.detach(), "network")
    assert_close(torch.cat([r["grad"] for r in both]), x.grad, "peer")
    for result in both:
        torch.testing.assert_close(result["mean"], 0.1 * batch().mean(dim=(0, 2, 3)))


def test_naive_sync_batchnorm_with_an_empty_rank(results: list[dict]) -> None:
    for result in results:
        torch.testing.assert_close(result["empty"], 0.1 * batch()[:3].mean(dim=(0, 2, 3)))


def fill(path: str) -> None:
    Path(path).write_text(str(comm.get_world_size()))


def test_one_process_runs_here(tmp_path: Path) -> None:
    launch(fill, 1, args=(str(tmp_path / "out"),))
    assert (tmp_path / "out").read_text() == "1"


def test_auto_url_is_for_one_machine() -> None:
    with pytest.raises(AssertionError, match="auto"):
        launch(fill, 2, num_machines=2, dist_url="auto", args=("",))
