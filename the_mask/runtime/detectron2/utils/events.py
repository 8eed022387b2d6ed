"""``EventStorage`` collects the numbers of a training run; writers put them on the terminal or into files."""

from __future__ import annotations

import datetime
import functools
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from fvcore.common.history_buffer import HistoryBuffer

from .file_io import PathManager

__all__ = [
    "CommonMetricPrinter",
    "EventStorage",
    "EventWriter",
    "JSONWriter",
    "TensorboardXWriter",
    "get_event_storage",
    "has_event_storage",
]

_CURRENT_STORAGE_STACK: list[EventStorage] = []


def get_event_storage() -> EventStorage:
    """Return the innermost ``EventStorage`` in use; one must be."""
    assert _CURRENT_STORAGE_STACK, "get_event_storage() has to be called inside a 'with EventStorage(...)' context!"
    return _CURRENT_STORAGE_STACK[-1]


def has_event_storage() -> bool:
    """Return whether an ``EventStorage`` is in use."""
    return bool(_CURRENT_STORAGE_STACK)


class EventStorage:
    """Scalars, images and histograms by name, with the iteration they belong to. A context manager."""

    def __init__(self, start_iter: int = 0) -> None:
        self._history: defaultdict[str, HistoryBuffer] = defaultdict(HistoryBuffer)
        self._smoothing_hints: dict[str, bool] = {}
        self._latest_scalars: dict[str, tuple[float, int]] = {}
        self._iter = start_iter
        self._current_prefix = ""
        self._vis_data: list[tuple[str, Any, int]] = []
        self._histograms: list[dict[str, Any]] = []

    def put_image(self, img_name: str, img_tensor: Any) -> None:
        """Keep an image, uint8 or float in 0..1, [3,H,W] RGB, until the next ``clear_images``."""
        self._vis_data.append((img_name, img_tensor, self._iter))

    def put_scalar(self, name: str, value: Any, smoothing_hint: bool = True, cur_iter: int | None = None) -> None:
        """Add a number.

        Args:
            name: its name; the current ``name_scope`` is put before it.
            value: anything that ``float`` accepts.
            smoothing_hint: whether printers may show a median over a window; the same at every call for one name.
            cur_iter: iteration; the current one by default.
        """
        name = self._current_prefix + name
        cur_iter = self._iter if cur_iter is None else cur_iter
        value = float(value)
        self._latest_scalars[name] = (value, cur_iter)
        self._history[name].update(value, cur_iter)
        known = self._smoothing_hints.setdefault(name, smoothing_hint)
        assert known == smoothing_hint, f"Scalar {name} was put with a different smoothing_hint!"

    def put_scalars(self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **kwargs: Any) -> None:
        """Add several numbers, by keyword."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)

    def put_histogram(self, hist_name: str, hist_tensor: torch.Tensor, bins: int = 1000) -> None:
        """Keep the histogram of a tensor, in the form of tensorboard's ``add_histogram_raw``."""
        low, high = hist_tensor.min().item(), hist_tensor.max().item()
        counts = torch.histc(hist_tensor, bins=bins)
        edges = torch.linspace(start=low, end=high, steps=bins + 1, dtype=torch.float32)
        self._histograms.append(
            {
                "tag": hist_name,
                "min": low,
                "max": high,
                "num": len(hist_tensor),
                "sum": float(hist_tensor.sum()),
                "sum_squares": float(torch.sum(hist_tensor**2)),
                "bucket_limits": edges[1:].tolist(),
                "bucket_counts": counts.tolist(),
                "global_step": self._iter,
            }
        )

    def history(self, name: str) -> HistoryBuffer:
        """Return all values of a name.

        Raises:
            KeyError: nothing was put under it.
        """
        found = self._history.get(name)
        if found is None:
            raise KeyError(f"No history metric available for {name}!")
        return found

    def histories(self) -> dict[str, HistoryBuffer]:
        """Return the history of every name."""
        return self._history

    def latest(self) -> dict[str, tuple[float, int]]:
        """Return the last (value, iteration) of every name."""
        return self._latest_scalars

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """As ``latest``, with the median of the last values (at most ``window_size``) where the hint allows it."""
        return {
            name: (
                self._history[name].median(self.count_samples(name, window_size))
                if self._smoothing_hints[name]
                else value,
                iteration,
            )
            for name, (value, iteration) in self._latest_scalars.items()
        }

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """Return how many values of ``name`` were put within the last ``window_size`` iterations."""
        values = self._history[name].values()
        if not values:
            return 0
        last_iter = values[-1][1]
        return sum(last_iter - window_size < iteration <= last_iter for _, iteration in values)

    def smoothing_hints(self) -> dict[str, bool]:
        """Return the hint of every name."""
        return self._smoothing_hints

    def step(self) -> None:
        """Go to the next iteration, before or after the numbers of this one were put."""
        self._iter += 1

    @property
    def iter(self) -> int:
        """The current iteration; during training, the same as the trainer's."""
        return self._iter

    @iter.setter
    def iter(self, val: int) -> None:
        self._iter = int(val)

    @property
    def iteration(self) -> int:
        """The same as ``iter``, for old code."""
        return self._iter

    def __enter__(self) -> EventStorage:
        _CURRENT_STORAGE_STACK.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        assert _CURRENT_STORAGE_STACK[-1] is self
        _CURRENT_STORAGE_STACK.pop()

    @contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Put ``name/`` before the names of all scalars inside the context."""
        previous = self._current_prefix
        self._current_prefix = name.rstrip("/") + "/"
        yield
        # As upstream: not restored when the body raises.
        self._current_prefix = previous

    def clear_images(self) -> None:
        """Forget the images, after they were written."""
        self._vis_data = []

    def clear_histograms(self) -> None:
        """Forget the histograms, after they were written."""
        self._histograms = []


class EventWriter:
    """Base of what reads the current ``EventStorage``."""

    def write(self) -> None:
        """Write what is new."""
        raise NotImplementedError

    def close(self) -> None:
        """Release files."""


class JSONWriter(EventWriter):
    """One JSON object per line and iteration with news, e.g. ``{"iteration": 19, "loss": 0.4}``."""

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        """Append to ``json_file``; scalars are smoothed over ``window_size`` iterations where their hint allows it."""
        self._file_handle = PathManager.open(json_file, "a")
        self._window_size = window_size
        self._last_write = -1

    def write(self) -> None:
        storage = get_event_storage()
        by_iter: defaultdict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._last_write:
                by_iter[iteration][name] = value
        if by_iter:
            self._last_write = max(self._last_write, *by_iter)
        for iteration, scalars in by_iter.items():
            scalars["iteration"] = iteration
            self._file_handle.write(json.dumps(scalars, sort_keys=True) + "\n")
        self._file_handle.flush()
        try:
            os.fsync(self._file_handle.fileno())
        except AttributeError:
            # Not every handler of PathManager returns an object with a file number.
            return

    def close(self) -> None:
        self._file_handle.close()


class TensorboardXWriter(EventWriter):
    """Scalars, images and histograms as a tensorboard log."""

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs: Any) -> None:
        """Write into ``log_dir``; ``kwargs`` go to ``SummaryWriter``."""
        self._window_size = window_size
        self._log_dir = log_dir
        self._writer_args = kwargs
        self._last_write = -1

    @functools.cached_property
    def _writer(self) -> Any:
        # Late: tensorboard takes a second to import, and the file should exist only if something is written.
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._log_dir, **self._writer_args)

    def write(self) -> None:
        storage = get_event_storage()
        newest = self._last_write
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._last_write:
                self._writer.add_scalar(name, value, iteration)
                newest = max(newest, iteration)
        self._last_write = newest
        for name, image, iteration in storage._vis_data:
            self._writer.add_image(name, image, iteration)
        storage.clear_images()
        for histogram in storage._histograms:
            self._writer.add_histogram_raw(**histogram)
        storage.clear_histograms()

    def close(self) -> None:
        if "_writer" in self.__dict__:
            self._writer.close()


class CommonMetricPrinter(EventWriter):
    """One line with progress, losses, times, learning rate and memory."""

    def __init__(self, max_iter: int | None = None, window_size: int = 20) -> None:
        """Print medians over ``window_size`` iterations, and the time left until ``max_iter`` if that is given."""
        # Upstream's logger name in full, so that the short form "d2" applies to either runtime.
        self.logger = logging.getLogger("detectron2.utils.events")
        self._max_iter = max_iter
        self._window_size = window_size
        self._last_write: tuple[int, float] | None = None

    def _get_eta(self, storage: EventStorage) -> str | None:
        if self._max_iter is None:
            return None
        left = self._max_iter - storage.iter - 1
        try:
            seconds = storage.history("time").median(1000) * left
            storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
            return str(datetime.timedelta(seconds=int(seconds)))
        except KeyError:
            # No "time" yet: estimate by this printer's own clock.
            eta = None
            if self._last_write is not None:
                per_iter = (time.perf_counter() - self._last_write[1]) / (storage.iter - self._last_write[0])
                eta = str(datetime.timedelta(seconds=int(per_iter * left)))
            self._last_write = (storage.iter, time.perf_counter())
            return eta

    def write(self) -> None:
        storage = get_event_storage()
        iteration = storage.iter
        if iteration == self._max_iter:
            # The last call after training, when everything has been printed.
            return
        eta = self._get_eta(storage)
        losses = self._medians(storage, "loss")
        # What an evaluation or a model wants printed beside the losses.
        metrics = self._medians(storage, "[metric]")
        times = self._time(storage, "time") + self._time(storage, "data_time")
        lr = _latest_or_none(storage.histories(), "lr")
        memory = ""
        if torch.cuda.is_available():
            memory = f"max_mem: {torch.cuda.max_memory_allocated() / 1024.0 / 1024.0:.0f}M"
        # The spaces are upstream's, for programs that read logs.
        self.logger.info(
            f" {f'eta: {eta}  ' if eta else ''}iter: {iteration}  {losses}  {metrics}  {times}"
            f" lr: {'N/A' if lr is None else format(lr, '.5g')}  {memory}"
        )

    def _medians(self, storage: EventStorage, part_of_name: str) -> str:
        return "  ".join(
            f"{name}: {history.median(storage.count_samples(name, self._window_size)):.4g}"
            for name, history in storage.histories().items()
            if part_of_name in name
        )

    def _time(self, storage: EventStorage, name: str) -> str:
        history = storage.histories().get(name)
        if history is None:
            return ""
        average = history.avg(storage.count_samples(name, self._window_size))
        return f"{name}: {average:.4f}  last_{name}: {history.latest():.4f}  "


def _latest_or_none(histories: Mapping[str, HistoryBuffer], name: str) -> float | None:
    return histories[name].latest() if name in histories else None
