"""Trains a refiner on perturbed masks of any labelled data set.

Axes: B crops, H W crop size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from numpy.typing import NDArray
from torch import Tensor, nn

from the_mask.data import get_records, read_image, read_label
from the_mask.inference.refine import normalised
from the_mask.modeling.refiners import build_refiner, cascade_losses
from the_mask.modeling.refiners.perturb import perturb_mask
from the_mask.weights.checkpoint import read_checkpoint, save_checkpoint

logger = logging.getLogger(__name__)
CHECKPOINT = "refiner_final.pth"
MAX_TRIES = 50
# A class must cover at least this share of the crop, and leave at least this share to others.
LEAST_SHARE = 0.02
Sample = tuple[Tensor, Tensor, Tensor]


class RefinerSamples:
    """Random crops of one class each: picture, perturbed mask, true mask. Sample ``n`` depends only on (seed, n).

    Args:
        frames: (image file, mask file, label table) per labelled frame.
        size: side of the crops, pixels.
        ignore_label: label of pixels without a class.
        seed: of all randomness.

    Raises:
        ValueError: no frames.
    """

    def __init__(
        self, frames: Sequence[tuple[str, str, Sequence[int]]], size: int, ignore_label: int = 255, seed: int = 0
    ) -> None:
        if not frames:
            raise ValueError("no labelled frames to train a refiner on (DATASETS.TRAIN)")
        self.frames = list(frames)
        self.size = size
        self.ignore_label = ignore_label
        self.seed = seed

    @classmethod
    def from_config(cls, cfg: CfgNode) -> RefinerSamples:
        """Build from the labelled frames of ``DATASETS.TRAIN``."""
        frames = [
            (frame["file_name"], frame["sem_seg_file_name"], tuple(MetadataCatalog.get(name).label_table))
            for name in cfg.DATASETS.TRAIN
            for record in get_records(name)
            for frame in record["frames"]
            if frame["sem_seg_file_name"] is not None
        ]
        return cls(frames, cfg.MODEL.REFINER.CROP, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE, max(cfg.SEED, 0))

    def __call__(self, number: int) -> Sample:
        """Normalised picture [3, S, S], coarse mask in {-1, 1} and true mask in {0, 1}, float [1, S, S] each.

        Raises:
            ValueError: 50 random crops in a row had no class with a border.
        """
        rng = np.random.default_rng([self.seed, number])
        for _ in range(MAX_TRIES):
            image_file, label_file, table = self.frames[int(rng.integers(len(self.frames)))]
            image, labels = read_image(image_file), read_label(label_file, table)
            found = self._crop(image, labels, rng)
            if found is None:
                continue
            picture, mask = found
            coarse = perturb_mask(mask, rng)
            pixels = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
            true, rough = (torch.from_numpy(m.astype(np.float32))[None] for m in (mask, coarse))
            return normalised(pixels), rough * 2 - 1, true
        raise ValueError(f"{MAX_TRIES} random crops in a row hold no class with a border, the last of {label_file}")

    def _crop(
        self, image: NDArray[np.uint8], labels: NDArray[np.integer], rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]] | None:
        """A random square crop, scaled to S and randomly mirrored, and the mask of a random class in it."""
        height, width = labels.shape
        side = int(rng.integers(max(min(height, width) // 3, 1), min(height, width) + 1))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        box = (slice(top, top + side), slice(left, left + side))
        part = labels[box]
        classes, counts = np.unique(part, return_counts=True)
        share = counts / part.size
        usable = classes[(classes != self.ignore_label) & (share >= LEAST_SHARE) & (share <= 1 - LEAST_SHARE)]
        if not len(usable):
            return None
        mask = (part == rng.choice(usable)).astype(np.uint8)
        shape = (self.size, self.size)
        picture = cv2.resize(image[box], shape, interpolation=cv2.INTER_LINEAR)
        scaled = cv2.resize(mask, shape, interpolation=cv2.INTER_NEAREST).astype(bool)
        if not scaled.any() or scaled.all():
            return None
        if rng.random() < 0.5:
            picture, scaled = picture[:, ::-1], scaled[:, ::-1]
        return np.ascontiguousarray(picture), np.ascontiguousarray(scaled)


def train_refiner(
    cfg: CfgNode, output: str | Path, resume: bool = False, log_period: int = 20, save_period: int = 1000
) -> dict[str, float]:
    """Train the refiner of ``MODEL.REFINER`` with Adam; write ``refiner_final.pth`` to ``output``.

    Resuming continues from the file, with the same samples as an uninterrupted run.

    Returns:
        Means over the last ``log_period`` iterations: ``loss``, and IoU with the truth, ``iou_coarse`` and
        ``iou_refined``.

    Raises:
        ValueError: no labelled frames. FloatingPointError: a loss that is not finite.
    """
    node = cfg.MODEL.REFINER
    samples = RefinerSamples.from_config(cfg)
    torch.manual_seed(max(cfg.SEED, 0))
    network = build_refiner(cfg).to(cfg.MODEL.DEVICE).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=node.LR, weight_decay=node.WEIGHT_DECAY)
    path = Path(output) / CHECKPOINT
    path.parent.mkdir(parents=True, exist_ok=True)
    start = 0
    if resume and path.is_file():
        state = read_checkpoint(path)
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = int(state["iteration"])
    history: list[dict[str, float]] = []
    for iteration in range(start, node.MAX_ITER):
        drops = sum(iteration >= share * node.MAX_ITER for share in node.STEPS)
        for group in optimizer.param_groups:
            group["lr"] = node.LR * 0.1**drops
        batch = [samples(iteration * node.BATCH + i) for i in range(node.BATCH)]
        history.append(_train_step(network, optimizer, batch, cfg.MODEL.DEVICE, iteration))
        history = history[-log_period:]
        if (iteration + 1) % log_period == 0 or iteration + 1 == node.MAX_ITER:
            means = {name: float(np.mean([row[name] for row in history])) for name in history[0]}
            logger.info("refiner %d/%d: %s", iteration + 1, node.MAX_ITER, means)
        if (iteration + 1) % save_period == 0 or iteration + 1 == node.MAX_ITER:
            state = {
                "model": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "iteration": iteration + 1,
            }
            save_checkpoint(path, state)
    return {name: float(np.mean([row[name] for row in history])) for name in history[0]} if history else {}


def _train_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, batch: Sequence[Sample], device: str, iteration: int
) -> dict[str, float]:
    images, coarse, truth = (torch.stack(part).to(device) for part in zip(*batch, strict=True))
    outputs = network(images, coarse)
    loss = torch.stack(list(cascade_losses(outputs, truth).values())).sum()
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the refiner's loss is {loss.item()} at iteration {iteration}; lower MODEL.REFINER.LR"
        )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {
        "loss": loss.item(),
        "iou_coarse": _iou(coarse > 0, truth > 0.5),
        "iou_refined": _iou(outputs["out"].detach() > 0, truth > 0.5),
    }


def _iou(first: Tensor, second: Tensor) -> float:
    """Mean IoU of pairs of masks [B, 1, H, W]."""
    intersection = (first & second).flatten(1).sum(1)
    return float((intersection / (first | second).flatten(1).sum(1).clamp(min=1)).mean())
