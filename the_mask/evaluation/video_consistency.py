"""Video consistency (VC_n) of Miao et al., "VSPW" (CVPR 2021): is the prediction constant where the ground truth is?

Axes: ``L`` frames of a video, ``H W`` frame size, ``n`` window length.

For each window of n frames, G = pixels whose ground truth is the same in all n frames, and VC = |G and R| / |G|. The
score is the mean over all windows of all videos. The definition of R and the choice of windows depend on the mode:

=============  =========================  ========================  ==============================
               ``strict``                 ``compat``                ``compat-vspw``
=============  =========================  ========================  ==============================
source         the paper's formula        the script of CFFM        the script of VSPW
R              prediction is **correct**  prediction is constant    prediction is constant
void pixels    never in G                 void is one more label    each raw value (0, 255) is one
windows        all L-n+1                  the first L-n             the first L-n
short videos   scored when L >= n         left out when L <= 16,    scored when L > n
                                          for every n
=============  =========================  ========================  ==============================

CFFM (Sun et al., CVPR 2022), MRCFA (ECCV 2022) and work built on their code report ``compat``; the tables of VSPW
``compat-vspw``. Windows with an empty G are left out of the mean in all modes.

Instead of comparing n frames per window, each pixel stores the length of its current run; it belongs to a window that
ends at this frame if the run is at least n long. So a video takes one pass and a few maps of state, whatever n is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from the_mask.data.label_maps import LabelMap, as_label_array

Mode = Literal["strict", "compat", "compat-vspw"]
MODES: tuple[Mode, ...] = ("strict", "compat", "compat-vspw")
# CFFM's script drops videos that have no second window of 16 frames, before scoring any n.
COMPAT_MIN_FRAMES = 17
# Sums of window scores are stored as integer multiples of 2**-60, so that totals do not depend on the order of
# addition: any split of the videos over processes gives identical results.
_UNIT = 1 << 60


@dataclass
class WindowTotal:
    """Sums over windows of one length: ``score`` in units of 2**-60, ``windows`` scored, ``empty`` with an empty G."""

    score: int = 0
    windows: int = 0
    empty: int = 0

    def add(self, value: float) -> None:
        """Add the VC of one window; NaN means an empty G."""
        if np.isnan(value):
            self.empty += 1
        else:
            self.score += round(value * _UNIT)
            self.windows += 1

    def merge(self, other: WindowTotal) -> None:
        """Add the windows of another total."""
        self.score += other.score
        self.windows += other.windows
        self.empty += other.empty

    @property
    def mean(self) -> float:
        """Mean VC in 0..1; NaN without a single scored window."""
        return self.score / self.windows / _UNIT if self.windows else float("nan")


@dataclass
class _Runs:
    """State inside one video: previous maps, per-pixel run lengths, this video's totals."""

    frames: int = 0
    gt: NDArray[np.integer] | None = None
    pred: NDArray[np.integer] | None = None
    gt_run: NDArray[np.uint16] | None = None
    pred_run: NDArray[np.uint16] | None = None
    totals: dict[int, WindowTotal] = field(default_factory=dict)
    # If not strict: the newest window of each length, held back because the last window of a video is not counted.
    held: dict[int, float] = field(default_factory=dict)


class VideoConsistency:
    """Streaming VC over any number of videos. Frames must be in time order.

    State is bounded by one video's frame size: two label maps and two maps of run lengths.

    Args:
        windows: window lengths n, each with its own total.
        mode: ``"strict"``, ``"compat"`` or ``"compat-vspw"``, see the module's table.
        ignore_label: void value of the ground truth.
        min_frames: shorter videos are left out (and counted in ``skipped_videos``). ``None``: 17 in ``compat``, as
            CFFM's script; else 1.

    Raises:
        ValueError: no or non-positive window lengths, unknown mode.
    """

    def __init__(
        self,
        windows: Sequence[int] = (8, 16),
        mode: Mode = "strict",
        ignore_label: int = 255,
        min_frames: int | None = None,
    ) -> None:
        if not windows or any(n < 1 or n >= 1 << 16 for n in windows) or len(set(windows)) != len(windows):
            raise ValueError(f"VC windows {list(windows)}: expected different lengths in 1..65535")
        if mode not in MODES:
            raise ValueError(f"VC mode {mode!r}: expected one of {', '.join(MODES)}")
        self.windows = tuple(windows)
        self.mode = mode
        self.ignore_label = ignore_label
        self.min_frames = (COMPAT_MIN_FRAMES if mode == "compat" else 1) if min_frames is None else min_frames
        self.totals = {n: WindowTotal() for n in self.windows}
        self.skipped_videos = 0
        self._runs = self._new_runs()

    def _new_runs(self) -> _Runs:
        return _Runs(totals={n: WindowTotal() for n in self.windows})

    def update(self, pred: LabelMap, gt: LabelMap) -> dict[int, float]:
        """Add the next frame of the current video.

        Args:
            pred: class ids [H, W].
            gt: class ids [H, W], ``ignore_label`` for void; in ``compat-vspw`` raw label values.

        Returns:
            VC in 0..1 of the windows that end at this frame, by length (NaN: empty G). Except in ``strict``, the last
            window of a video is not counted in the end.

        Raises:
            ValueError: prediction, ground truth and the video's earlier frames differ in size.
        """
        pred_array, gt_array = as_label_array(pred, "prediction"), as_label_array(gt, "ground truth")
        runs = self._runs
        if pred_array.shape != gt_array.shape:
            raise ValueError(f"prediction has shape {pred_array.shape}, ground truth {gt_array.shape}")
        if runs.gt is not None and gt_array.shape != runs.gt.shape:
            raise ValueError(f"frame {runs.frames} has shape {gt_array.shape}, the video so far {runs.gt.shape}")
        self._advance(pred_array, gt_array)
        return self._score_windows()

    def _advance(self, pred: NDArray[np.integer], gt: NDArray[np.integer]) -> None:
        runs, longest = self._runs, max(self.windows)
        runs.gt_run = _constant_run(runs.gt_run, gt, runs.gt, longest)
        if self.mode == "strict":
            # Void never belongs to G, not even where it is constant.
            runs.gt_run[gt == self.ignore_label] = 0
            runs.pred_run = _correct_run(runs.pred_run, pred == gt, longest)
        else:
            runs.pred_run = _constant_run(runs.pred_run, pred, runs.pred, longest)
        # Copies: callers may reuse their buffers.
        runs.pred, runs.gt = pred.copy(), gt.copy()
        runs.frames += 1

    def _score_windows(self) -> dict[int, float]:
        runs, scores = self._runs, {}
        assert runs.gt_run is not None
        assert runs.pred_run is not None
        for n in self.windows:
            if runs.frames < n:
                continue
            common = runs.gt_run >= n
            pixels = int(np.count_nonzero(common))
            kept = int(np.count_nonzero(common & (runs.pred_run >= n)))
            value = kept / pixels if pixels else float("nan")
            scores[n] = value
            if self.mode != "strict":
                if n in runs.held:
                    runs.totals[n].add(runs.held[n])
                runs.held[n] = value
            else:
                runs.totals[n].add(value)
        return scores

    def end_video(self) -> None:
        """End the current video; the next frame starts a new one. Windows never cross the end of a video."""
        runs = self._runs
        if runs.frames >= self.min_frames:
            for n, total in runs.totals.items():
                self.totals[n].merge(total)
        elif runs.frames:
            self.skipped_videos += 1
        self._runs = self._new_runs()

    def merge(self, other: VideoConsistency) -> None:
        """Add the finished videos of another object with the same settings (e.g. of another process)."""
        if (self.windows, self.mode, self.min_frames) != (other.windows, other.mode, other.min_frames):
            raise ValueError("only accumulators of the same windows, mode and shortest video can be merged")
        for n in self.windows:
            self.totals[n].merge(other.totals[n])
        self.skipped_videos += other.skipped_videos

    def finished(self) -> VideoConsistency:
        """A small copy with only the finished videos, to send to another process."""
        clone = VideoConsistency(self.windows, self.mode, self.ignore_label, self.min_frames)
        clone.totals, clone.skipped_videos = copy.deepcopy(self.totals), self.skipped_videos
        return clone

    def result(self) -> dict[int, float]:
        """Mean VC in 0..1 over all windows of all finished videos, by length; NaN without a scored window."""
        return {n: total.mean for n, total in self.totals.items()}


def video_consistency(
    pred: LabelMap,
    gt: LabelMap,
    window: int,
    mode: Mode = "strict",
    ignore_label: int = 255,
    min_frames: int | None = None,
) -> float:
    """VC_n of one whole video.

    Args:
        pred: class ids [L, H, W].
        gt: class ids [L, H, W], ``ignore_label`` for void; in ``compat-vspw`` raw label values.
        window: n.
        mode, ignore_label, min_frames: as :class:`VideoConsistency`.

    Returns:
        Mean over the video's windows in 0..1; NaN without any window (short video, or no constant pixel).

    Raises:
        ValueError: shapes differ or are not [L, H, W]; bad window or mode.
    """
    pred_array, gt_array = as_label_array(pred, "prediction"), as_label_array(gt, "ground truth")
    if pred_array.shape != gt_array.shape or pred_array.ndim != 3:
        raise ValueError(f"expected two maps [L, H, W] of one shape, got {pred_array.shape} and {gt_array.shape}")
    meter = VideoConsistency((window,), mode, ignore_label, min_frames)
    for pred_frame, gt_frame in zip(pred_array, gt_array, strict=True):
        meter.update(pred_frame, gt_frame)
    meter.end_video()
    return meter.result()[window]


def _constant_run(
    run: NDArray[np.uint16] | None, labels: NDArray[np.integer], previous: NDArray[np.integer] | None, longest: int
) -> NDArray[np.uint16]:
    """Number of frames, up to this one, in which each pixel has had its current label.

    Saturated at the longest window, so that the counter cannot overflow.
    """
    if run is None or previous is None:
        return np.ones(labels.shape, dtype=np.uint16)
    return np.where(labels == previous, np.minimum(run, longest - 1), 0).astype(np.uint16) + np.uint16(1)


def _correct_run(run: NDArray[np.uint16] | None, correct: NDArray[np.bool_], longest: int) -> NDArray[np.uint16]:
    """Number of frames, up to this one, in which each pixel was predicted correctly without a break (saturated)."""
    if run is None:
        return correct.astype(np.uint16)
    return np.where(correct, np.minimum(run, longest - 1) + np.uint16(1), 0).astype(np.uint16)
