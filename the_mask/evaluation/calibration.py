"""Temperatures for merging, which turn a model's scores into calibrated probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from the_mask.data.clips import Clip
from the_mask.data.video_tree import Record
from the_mask.evaluation.loop import feed, stream_videos
from the_mask.inference.merge import LEAST_SCORE
from the_mask.inference.sinks import Sink
from the_mask.modeling.stream import Stream

LIMITS = (0.02, 50.0)


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature, and the mean negative log-likelihood (nats per pixel) at 1 and at that temperature."""

    temperature: float
    loss_before: float
    loss_after: float


def fit_temperature(scores: NDArray[np.floating], labels: NDArray[np.integer]) -> Calibration:
    """Find the temperature T that minimises the cross-entropy of sum-to-one(scores ** (1 / T)).

    Args:
        scores: [N, K] >= 0 of N pixels.
        labels: [N] classes 0..K-1.

    Returns:
        The temperature, in 0.02..50. Source: Guo et al. 2017, applied to the logarithms of the scores.

    Raises:
        ValueError: no pixels, or shapes that do not fit.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(f"expected scores [N, K] and labels [N] with N > 0, got {scores.shape} and {labels.shape}")
    logits = np.log(np.maximum(scores.astype(np.float64), LEAST_SCORE))
    right = logits[np.arange(len(labels)), labels]
    shift = logits.max(axis=1)

    def loss(log_temperature: float) -> float:
        factor = np.exp(-log_temperature)
        total = np.log(np.exp((logits - shift[:, None]) * factor).sum(axis=1)) + shift * factor
        return float((total - right * factor).mean())

    found = minimize_scalar(loss, bounds=tuple(np.log(LIMITS)), method="bounded", options={"xatol": 1e-4})
    return Calibration(float(np.exp(found.x)), loss(0.0), float(found.fun))


class PixelSampler(Sink):
    """A sink for score maps [K, H, W] that keeps random labelled pixels of every labelled frame.

    Args:
        ignore_label: pixels with this label are not drawn.
        per_frame: largest number of pixels per frame.
        seed: seed of the random choice.
    """

    def __init__(self, ignore_label: int, per_frame: int = 500, seed: int = 0) -> None:
        self.ignore_label, self.per_frame = ignore_label, per_frame
        self.rng = np.random.default_rng(seed)
        self.scores: list[NDArray[np.float32]] = []
        self.labels: list[NDArray[np.int64]] = []

    def process(self, clips: Sequence[Clip], predictions: Sequence[Sequence[Any]]) -> None:
        """Draw pixels from the frames of some clips."""
        for clip, maps in zip(clips, predictions, strict=True):
            for labels, scores in zip(clip.labels, maps, strict=True):
                if labels is None:
                    continue
                truth = np.asarray(labels).reshape(-1)
                usable = np.flatnonzero(truth != self.ignore_label)
                chosen = self.rng.choice(usable, min(self.per_frame, len(usable)), replace=False)
                drawn = scores.flatten(1)[:, torch.from_numpy(chosen).to(scores.device)]
                self.scores.append(drawn.t().float().cpu().numpy())
                self.labels.append(truth[chosen].astype(np.int64))


def sample_pixels(
    stream: Stream, records: Sequence[Record], ignore_label: int, per_frame: int = 500, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores [N, K] and labels [N] of random labelled pixels of every labelled frame.

    Args:
        stream: output "scores", [K, H, W] at frame size.
        records: the videos.
        ignore_label, per_frame, seed: see :class:`PixelSampler`.
    """
    sampler = PixelSampler(ignore_label, per_frame, seed)
    feed(stream_videos(stream, records), [sampler])
    if not sampler.labels:
        raise ValueError("no labelled frame to fit a temperature on")
    return np.concatenate(sampler.scores), np.concatenate(sampler.labels)
