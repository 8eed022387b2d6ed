"""The share of queries that get a target, per video and overall, which a second round of matching increases.

THE-Mask argues that with one round of matching fewer than 10 % of the queries learn a mask; this measures it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from detectron2.engine import HookBase
from detectron2.utils import comm
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from the_mask.data.files import atomic_write

if TYPE_CHECKING:
    from the_mask.engine.trainer import Trainer

logger = logging.getLogger(__name__)

FILE_STEM = "positive_queries"
_FIRST, _ALL, _CLAIM = (70, 110, 190), (225, 130, 45), (150, 40, 40)


@dataclass
class PositiveShares:
    """Sums over training clips, by video.

    Attributes:
        sums: [clips, sum of shares after round one, sum of shares after all rounds] by video; shares are 0..1.
    """

    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, clips: Iterable[Mapping[str, Any]]) -> None:
        """Add clips as listed in ``MaskCriterion.last_stats["videos"]``: ``dataset/video frames 1, 2``."""
        for clip in clips:
            video = clip["name"].split(" frames ")[0]
            self._add(video, [1, clip["positive_round1"], clip["positive_all"]])

    def merge(self, other: PositiveShares) -> None:
        """Add the sums of another process."""
        for video, sums in other.sums.items():
            self._add(video, sums)

    def _add(self, video: str, sums: list[float]) -> None:
        self.sums[video] = [a + b for a, b in zip(self.sums.get(video, [0, 0.0, 0.0]), sums, strict=True)]

    def per_video(self) -> dict[str, dict[str, float]]:
        """``clips`` and mean shares ``round1`` and ``all`` of each video, by name."""
        return {
            video: {"clips": clips, "round1": first / clips, "all": both / clips}
            for video, (clips, first, both) in sorted(self.sums.items())
        }

    def overall(self) -> dict[str, float]:
        """The same over all clips."""
        clips, first, both = (
            (sum(column) for column in zip(*self.sums.values(), strict=True)) if self.sums else (0, 0, 0)
        )
        return {"clips": clips, "round1": first / max(clips, 1), "all": both / max(clips, 1)}


def plot_shares(shares: PositiveShares, width: int = 640, height: int = 360) -> NDArray[np.uint8]:
    """Curves of both shares over the videos, sorted by the share of round one, with a line at 10 %.

    Returns:
        uint8 [height, width, 3].
    """
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    left, right, top, bottom = 46, width - 12, 34, height - 26
    videos = sorted(shares.per_video().values(), key=lambda video: (video["round1"], video["all"]))
    most = max([0.12, *(video["all"] for video in videos)]) * 1.05

    def y(share: float) -> float:
        return bottom - (bottom - top) * share / most

    for percent in range(0, int(100 * most) + 1, max(1, round(20 * most)) if most < 0.5 else 10):
        draw.line([(left, y(percent / 100)), (right, y(percent / 100))], fill=(225, 225, 225))
        draw.text((8, y(percent / 100) - 7), f"{percent} %", fill="black", font=font)
    draw.line([(left, y(0.1)), (right, y(0.1))], fill=_CLAIM)
    for key, color in (("all", _ALL), ("round1", _FIRST)):
        step = (right - left) / max(len(videos), 1)
        corners = [(left + step * (i + side), y(v[key])) for i, v in enumerate(videos) for side in (0, 1)]
        if corners:
            draw.line(corners, fill=color, width=2)
    total = shares.overall()
    draw.text((left, 8), f"round one: mean {total['round1']:.1%}", fill=_FIRST, font=font)
    draw.text((left + 170, 8), f"all rounds: mean {total['all']:.1%}", fill=_ALL, font=font)
    draw.text((left + 350, 8), "line: 10 %", fill=_CLAIM, font=font)
    draw.text(
        (left, bottom + 6), f"{len(videos)} videos, sorted; share of queries with a target", fill="black", font=font
    )
    return np.asarray(image)


class MatchingHook(HookBase):
    """Logs the matching mode when it changes, and writes ``positive_queries.json`` and ``.png`` to ``OUTPUT_DIR``.

    Does nothing for models without ``criterion.last_stats``.
    """

    trainer: Trainer

    def __init__(self, period: int) -> None:
        """
        Args:
            period: iterations between writes; 0 or less writes only at the end.
        """
        self.period = period
        self.shares = PositiveShares()
        self._mode = ""

    def after_step(self) -> None:
        stats = getattr(getattr(self.trainer.model, "criterion", None), "last_stats", None)
        if not stats:
            return
        if stats.get("mode", "") != self._mode:
            self._mode = stats["mode"]
            logger.info("loss from iteration %d on: %s", self.trainer.iter, self._mode)
        self.shares.add(stats.get("videos", ()))
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self.period > 0 and done % self.period == 0):
            self._write()

    def _write(self) -> None:
        total = PositiveShares()
        for shares in comm.all_gather(self.shares.sums):
            total.merge(PositiveShares(shares))
        if not comm.is_main_process() or not total.sums:
            return
        overall = total.overall()
        logger.info(
            "queries with a target: %.1f %% after round one, %.1f %% after all rounds (%d clips of %d videos)",
            100 * overall["round1"],
            100 * overall["all"],
            overall["clips"],
            len(total.sums),
        )
        self.trainer.checkpoints.ensure()
        folder = self.trainer.checkpoints.folder
        text = json.dumps({"overall": overall, "videos": total.per_video()}, indent=1)
        atomic_write(folder / f"{FILE_STEM}.json", text.encode())
        picture = plot_shares(total)
        atomic_write(folder / f"{FILE_STEM}.png", lambda stream: Image.fromarray(picture).save(stream, format="PNG"))
        self.trainer.storage.put_image(FILE_STEM, np.moveaxis(picture, -1, 0))

    def state_dict(self) -> dict[str, Any]:
        # Only of the first process. The others start from zero, which makes the means a little noisier.
        return {"sums": self.shares.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if comm.is_main_process():
            self.shares = PositiveShares(state["sums"])
