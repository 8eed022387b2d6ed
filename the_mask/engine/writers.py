"""Output of a training: a progress bar on a terminal, log lines, and curves on disk."""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import torch
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from tqdm import tqdm

from the_mask.data.files import atomic_write, parse_json

logger = logging.getLogger(__name__)

METRICS = "metrics.json"
# Number of iterations over which scalars are smoothed.
WINDOW = 20
# Losses of the auxiliary prediction sets end in their number: loss_ce_0 ... loss_ce_8.
_AUXILIARY = re.compile(r"_\d+$")


def peak_memory_mib() -> float:
    """Peak memory of this process in MiB: of the CUDA allocator when a GPU is in use, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def summarise_losses(losses: dict[str, float]) -> dict[str, float]:
    """Losses for a single line: those of the final prediction set, and the sum of all auxiliary ones.

    Args:
        losses: loss terms by name (without their total).
    """
    final = {name: value for name, value in losses.items() if not _AUXILIARY.search(name)}
    auxiliary = [value for name, value in losses.items() if _AUXILIARY.search(name)]
    return {**final, "auxiliary": sum(auxiliary)} if auxiliary else final


def progress_line(storage: EventStorage, iteration: int, max_iter: int, window: int = WINDOW) -> str:
    """One line of text about a finished iteration; scalars are smoothed by the median of a window.

    Args:
        storage: storage of the training.
        iteration: index of the iteration, from 0.
        max_iter: number of iterations of the whole training.
        window: number of iterations for the median.
    """
    histories = storage.histories()
    smooth = {name: history.median(window) for name, history in histories.items()}
    terms = {name: value for name, value in smooth.items() if name.startswith(("loss_", "frame_loss_"))}
    parts = [f"iter {iteration + 1}/{max_iter}"]
    if "total_loss" in smooth:
        parts.append(f"loss {smooth['total_loss']:.4g}")
    shown = summarise_losses(terms)
    if shown:
        parts.append("(" + "  ".join(f"{name.replace('loss_', '')} {value:.3g}" for name, value in shown.items()) + ")")
    shares = [smooth.get(f"criterion/positive_{name}") for name in ("round1", "all")]
    if None not in shares:
        parts.append("positive " + " -> ".join(f"{share:.1%}" for share in shares))
    if "grad_norm" in smooth:
        parts.append(f"grad {smooth['grad_norm']:.3g}")
    if "lr" in histories:
        parts.append(f"lr {histories['lr'].latest():.3g}")
    if "time" in smooth:
        parts.append(f"{smooth['time']:.3f} s/it (data {smooth.get('data_time', 0.0):.3f})")
        remaining = (max_iter - iteration - 1) * histories["time"].median(1000)
        parts.append(f"eta {datetime.timedelta(seconds=round(remaining))}")
    parts.append(f"mem {peak_memory_mib():.0f} MiB")
    return "  ".join(parts)


class LogWriter(EventWriter):
    """Writes :func:`progress_line` to the log, with ``progress=True``, so that a progress bar can replace it."""

    def __init__(self, max_iter: int, start_iter: int = 0) -> None:
        self._max_iter = max_iter
        self._last = start_iter - 1

    def write(self) -> None:
        storage = get_event_storage()
        finished = storage.latest().get("total_loss", (0.0, -1))[1]
        if self._last < finished:
            self._last = finished
            logger.info("%s", progress_line(storage, finished, self._max_iter), extra={"progress": True})


class MetricsWriter(EventWriter):
    """Appends the latest scalars to ``metrics.json``, one JSON object per line and iteration, smoothed by medians.

    As Detectron2's writer, but it appends to an existing file, and opens a new one if the file was deleted.
    """

    def __init__(self, path: Path, window: int = WINDOW) -> None:
        self._path = path
        self._window = window
        #: last iteration in the file
        self.last = int(max((i for i in map(_iteration_of, _lines(path)) if i < float("inf")), default=-1))
        self._stream = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)

    def write(self) -> None:
        storage = get_event_storage()
        by_iteration: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self._window).items():
            if iteration > self.last:
                by_iteration.setdefault(iteration, {})[name] = value
        if not by_iteration:
            return
        if os.fstat(self._stream.fileno()).st_nlink == 0:
            logger.warning("%s was deleted during the run: a new one is begun", self._path)
            self._stream.close()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        try:
            for iteration, scalars in sorted(by_iteration.items()):
                self._stream.write(json.dumps({**scalars, "iteration": iteration}, sort_keys=True) + "\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise OSError(error.errno, f"cannot write ({error.strerror})", str(self._path)) from error
        self.last = max(by_iteration)

    def close(self) -> None:
        self._stream.close()


def has_screen(stream: TextIO) -> bool:
    """Whether a progress bar can be drawn on a stream: a terminal with a known size (containers often have 0 x 0)."""
    if not stream.isatty():
        return False
    try:
        size = os.get_terminal_size(stream.fileno())
    except OSError:
        return False
    return size.columns >= 40 and size.lines >= 2


class _AboveBar:
    """A stream that prints above a progress bar."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        tqdm.write(text, file=self._stream, end="")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def _not_progress(record: logging.LogRecord) -> bool:
    return not getattr(record, "progress", False)


class ProgressBar:
    """Progress bar with rate, ETA, loss, learning rate and memory; console log lines are printed above it."""

    def __init__(self, start: int, total: int, stream: TextIO | None = None) -> None:
        self._bar = tqdm(total=total, initial=start, unit="it", dynamic_ncols=True, file=stream or sys.stderr)
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []
        for handler in _console_handlers(("the_mask", "detectron2", "fvcore", "")):
            self._redirected.append((handler, handler.stream))
            handler.setStream(_AboveBar(handler.stream))
            handler.addFilter(_not_progress)

    def step(self, loss: float | None, lr: float | None) -> None:
        """Advance by one iteration."""
        shown = {"mem": f"{peak_memory_mib():.0f}M"}
        if lr is not None:
            shown = {"lr": f"{lr:.2g}", **shown}
        if loss is not None:
            shown = {"loss": f"{loss:.4g}", **shown}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(1)

    def close(self) -> None:
        """Remove the redirection, and leave the finished bar on the screen."""
        self._bar.close()
        for handler, stream in self._redirected:
            handler.removeFilter(_not_progress)
            handler.setStream(stream)
        self._redirected = []


def _console_handlers(names: Iterable[str]) -> list[logging.StreamHandler[Any]]:
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    console = [h for h in handlers if isinstance(h, logging.StreamHandler) and h.stream in (sys.stdout, sys.stderr)]
    return list(dict.fromkeys(console))


def prepare_metrics_file(folder: Path, start_iter: int, anew_from: int | None = None) -> Path:
    """Prepare ``metrics.json`` for a run that starts at an iteration.

    A resumed run drops the lines that the interrupted run wrote after its checkpoint, so the curve has each iteration
    once. A new run moves an older file to ``metrics.previous.json``.

    Args:
        folder: folder of the run.
        start_iter: its first iteration.
        anew_from: first iteration that is written again; None: ``start_iter``.

    Returns:
        The path of the file.
    """
    path = folder / METRICS
    if not path.is_file() or path.stat().st_size == 0:
        return path
    if start_iter == 0:
        path.replace(folder / "metrics.previous.json")
        return path
    kept = [line for line in _lines(path) if _iteration_of(line) < (start_iter if anew_from is None else anew_from)]
    text = "".join(f"{line}\n" for line in kept)
    atomic_write(path, text.encode())
    return path


def recorded_names(folder: Path, iteration: int) -> set[str]:
    """Names of the scalars in ``metrics.json`` for an iteration."""
    lines = [parse_json(line) for line in _lines(folder / METRICS) if _iteration_of(line) == iteration]
    return {name for scalars in lines for name in scalars}


def _lines(path: Path) -> list[str]:
    # Damaged bytes only affect their line, which is dropped.
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _iteration_of(line: str) -> float:
    """Iteration of a metrics line; infinity for a line that was cut off by a kill."""
    try:
        scalars = parse_json(line)
    except ValueError:
        return float("inf")
    iteration = scalars.get("iteration") if isinstance(scalars, dict) else None
    return iteration if isinstance(iteration, int) else float("inf")
