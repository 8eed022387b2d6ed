"""Two real processes compute the loss and the gradients of one."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from criterion_cases import leaves, make_criterion, make_label, make_outputs, make_targets
from tolerances import assert_close

from the_mask.modeling.mask.targets import clip_targets


def batch():
    """A clip of six classes in two frames, and one of two classes in one: unequal shares of every normaliser."""
    targets = make_targets(frames=2, void=0.2)
    targets[1] = clip_targets([make_label(1, classes=2), None], 255)
    return make_outputs(frames=2, frame_branch=True), targets, [3, 4]


def one_clip(outputs, b):
    """Outputs of clip b alone, as leaves of their own."""
    cut = lambda s: {k: s[k][b : b + 1].detach().requires_grad_() for k in ("pred_logits", "pred_masks")}  # noqa: E731
    part = {**cut(outputs), "aux_outputs": [cut(a) for a in outputs["aux_outputs"]]}
    if "frame" in outputs:
        part["frame"] = one_clip(outputs["frame"], b)
    return part


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    outputs, targets, seeds = batch()
    part = one_clip(outputs, rank)
    result = make_criterion(rounds=2)(part, targets[rank : rank + 1], seeds[rank : rank + 1])
    gradients = torch.autograd.grad(sum(result.values()), leaves(part))
    torch.save(({k: v.detach() for k, v in result.items()}, gradients), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.skipif(sys.platform == "win32", reason="file rendezvous")
def test_two_gloo_processes_equal_one(tmp_path: Path):
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    (first, gradients0), (second, gradients1) = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    outputs, targets, seeds = batch()
    whole = make_criterion(rounds=2)(outputs, targets, seeds)
    for name, value in whole.items():
        assert_close((first[name] + second[name]) / 2, value.detach(), "sum")
    for want, g0, g1 in zip(
        torch.autograd.grad(sum(whole.values()), leaves(outputs)), gradients0, gradients1, strict=True
    ):
        # DistributedDataParallel averages over ranks.
        assert_close(torch.cat([g0, g1]) / 2, want, "sum")
