"""Small trainings for gpu_check.py: on one device against golden losses, and on several by DDP and FSDP2.

The network is made of the library's own layers and needs nothing but torch: an embedding, DCNv3, deformable attention
over two levels, and a classifier whose argmax goes through ``upsample_argmax``.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn import functional as F

import the_mask.ops as ops

GOLDEN = Path(__file__).resolve().parent / "results" / "gpu_check_golden.json"
STEPS, BATCH, CLASSES, WIDTH, SIDE = 12, 4, 5, 32, 32
# Relative tolerances: kernels round differently, and the differences grow over the steps.
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2}


class TinyNetwork(nn.Module):
    """[B, 3, 32, 32] -> logits [B, 5, 8, 8], and their labels at full size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.norm = nn.GroupNorm(4, WIDTH)
        self.deform = ops.DCNv3(WIDTH, groups=4)
        self.attend = ops.MSDeformAttn(WIDTH, num_levels=2, num_heads=4)
        self.classify = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.embed(images)).permute(0, 2, 3, 1).contiguous()
        x = x + self.deform(x)
        height, width = x.shape[1:3]
        coarse = F.avg_pool2d(x.permute(0, 3, 1, 2), 2)
        shapes = [(height, width), (coarse.shape[2], coarse.shape[3])]
        tokens = torch.cat([x.flatten(1, 2), coarse.flatten(2).transpose(1, 2)], dim=1)
        rows = (torch.arange(height, device=x.device) + 0.5) / height
        columns = (torch.arange(width, device=x.device) + 0.5) / width
        points = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).flatten(0, 1)
        reference = points[None, :, None].expand(len(x), -1, 2, -1)
        found = self.attend(x.flatten(1, 2), reference, tokens, shapes, None)
        return self.classify(x.flatten(1, 2) + found).transpose(1, 2).unflatten(2, (height, width))

    def labels(self, images: Tensor) -> Tensor:
        """Labels [32, 32] of the first image."""
        with torch.no_grad():
            return ops.upsample_argmax(self(images)[0], (SIDE, SIDE), (SIDE, SIDE), 4)


def make_network(device: torch.device) -> TinyNetwork:
    """The same weights everywhere: drawn on the CPU."""
    torch.manual_seed(0)
    network = TinyNetwork()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in network.parameters():
            # The default initialisation has offsets on whole pixels, where derivatives are discontinuous.
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.to(device)


def batch(step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images [B, 3, 32, 32] and labels [B, 8, 8] of a step: squares whose colour is their class."""
    generator = torch.Generator().manual_seed(100 + step)
    labels = torch.randint(0, CLASSES, (BATCH, 8, 8), generator=generator)
    colours = torch.linspace(-1, 1, CLASSES)[labels]
    images = colours[:, None].repeat(1, 3, 1, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = images + 0.3 * torch.randn(images.shape, generator=generator)
    return images.to(device), labels.to(device)


def train(device: torch.device, dtype: torch.dtype = torch.float32) -> list[float]:
    """Losses of the first steps."""
    network = make_network(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(STEPS):
        images, labels = batch(step, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(network(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert network.labels(batch(0, device)[0]).shape == (SIDE, SIDE)
    return losses


def check_training(device: torch.device) -> dict[str, Any]:
    """Train in float32 and bfloat16 and compare with the committed losses."""
    golden = json.loads(GOLDEN.read_text())["losses"]
    report: dict[str, Any] = {"golden": golden}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        losses = train(device, dtype)
        worst = max(abs(a - b) / abs(b) for a, b in zip(losses, golden, strict=True))
        report[name] = {"losses": losses, "worst_relative": worst, "tolerance": TOLERANCE[name]}
        report[name]["passed"] = worst <= TOLERANCE[name]
    report["passed"] = all(report[name]["passed"] for name in TOLERANCE)
    return report


def _worker(rank: int, world: int, port: int, backend: str, kind: str, folder: str) -> None:
    """One process of a parallel training; rank 0 writes the gathered gradients of one step."""
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(backend, rank=rank, world_size=world)
    try:
        network: Any = make_network(device)
        parameters = list(network.named_parameters())
        if kind == "ddp":
            network = nn.parallel.DistributedDataParallel(network)
        else:
            from torch.distributed.fsdp import fully_shard

            fully_shard(network, mesh=dist.device_mesh.init_device_mesh(device.type, (world,)))
            parameters = list(network.named_parameters())
        images, labels = batch(0, device)
        share = BATCH // world
        part = slice(rank * share, (rank + 1) * share)
        F.cross_entropy(network(images[part]), labels[part]).backward()
        grads = {}
        for name, parameter in parameters:
            grad: Any = parameter.grad
            grads[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).cpu()
        if rank == 0:
            torch.save(grads, Path(folder) / f"{kind}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def check_parallel(device: torch.device, kind: str, folder: Path) -> dict[str, Any]:
    """Compare the gradients of one step on several processes with those of one. One process per GPU, at most 4."""
    world = {1: 1, 2: 2, 3: 2}.get(torch.cuda.device_count(), 4) if device.type == "cuda" else 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.multiprocessing.spawn(_worker, (world, port, backend, kind, str(folder)), nprocs=world)
    found = torch.load(folder / f"{kind}.pt", weights_only=True)
    network = make_network(device)
    images, labels = batch(0, device)
    F.cross_entropy(network(images), labels).backward()
    worst = 0.0
    for name, parameter in network.named_parameters():
        expected = parameter.grad
        assert expected is not None
        error = (found[name] - expected.cpu()).abs().max() / expected.abs().max().clamp(min=1e-6).cpu()
        worst = max(worst, float(error))
    return {"processes": world, "worst_relative": worst, "passed": worst < 1e-3}
