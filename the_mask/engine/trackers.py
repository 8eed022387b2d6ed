"""Experiment trackers in addition to TensorBoard: Weights & Biases, MLflow and Trackio, with one interface.

``SOLVER.TRACKERS`` lists them. Each is an optional package, imported when a training starts. It writes to
``OUTPUT_DIR`` without network access, unless its own environment variables say otherwise (``WANDB_MODE``,
``MLFLOW_TRACKING_URI``, ``TRACKIO_SPACE_ID``). A resumed training continues the same run of the tracker.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from detectron2.utils.events import EventWriter, get_event_storage

from the_mask.data.files import read_json, write_json
from the_mask.data.schema import Each, check_schema

logger = logging.getLogger(__name__)
RUNS = "trackers.json"
PROJECT = "the_mask"


class Tracker(Protocol):
    """An open run of a tracker."""

    def log(self, figures: Mapping[str, float], iteration: int) -> None:
        """Log the figures of a finished iteration, counted from 0; iterations never decrease."""

    def finish(self) -> None:
        """Close the run and flush everything to disk."""


class _Wandb:
    def __init__(self, folder: Path, config: dict[str, Any], run_id: str | None) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or "offline"
        project = os.environ.get("WANDB_PROJECT") or PROJECT
        # A run's folder is named after its id and the second: one that is resumed at once would overwrite itself.
        while run_id and list(folder.glob(f"wandb/*-{time.strftime('%Y%m%d_%H%M%S')}-{run_id}")):
            time.sleep(0.1)
        self._run = wandb.init(
            project=project, name=folder.name, dir=str(folder), config=config, mode=mode, id=run_id, resume="allow"
        )
        self.id = self._run.id

    def log(self, figures: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(figures), step=iteration)

    def finish(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, folder: Path, config: dict[str, Any], run_id: str | None) -> None:
        import mlflow
        from mlflow.tracking import MlflowClient

        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        self._client = MlflowClient(address)
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
            experiment = self._client.get_experiment_by_name(name)
            # Otherwise the folder of artifacts is created in the working directory.
            place = None if "MLFLOW_TRACKING_URI" in os.environ else (folder / "mlartifacts").resolve().as_uri()
            key = experiment.experiment_id if experiment else self._client.create_experiment(name, place)
            run_id = self._client.create_run(key, run_name=folder.name).info.run_id
            for name, value in config.items():
                self._client.log_param(run_id, name, str(value)[: mlflow.utils.validation.MAX_PARAM_VAL_LENGTH])
        self.id = run_id

    def log(self, figures: Mapping[str, float], iteration: int) -> None:
        for name, value in figures.items():
            self._client.log_metric(self.id, name, value, step=iteration)

    def finish(self) -> None:
        self._client.set_terminated(self.id)


class _Trackio:
    def __init__(self, folder: Path, config: dict[str, Any], run_id: str | None) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
        import trackio

        if Path(trackio.TRACKIO_DIR) != Path(os.environ["TRACKIO_DIR"]):  # it was imported before
            logger.warning("Trackio keeps one folder per process: this run goes to %s", trackio.TRACKIO_DIR)
        self.id = run_id or folder.name
        self._trackio = trackio
        space = os.environ.get("TRACKIO_SPACE_ID")
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        trackio.init(project=project, name=self.id, config=config, resume="allow", space_id=space, embed=False)

    def log(self, figures: Mapping[str, float], iteration: int) -> None:
        self._trackio.log(dict(figures), step=iteration)

    def finish(self) -> None:
        self._trackio.finish()


# Name in SOLVER.TRACKERS, which is also the name of the package and of the extra.
TRACKERS: dict[str, Callable[[Path, dict[str, Any], str | None], Any]] = {
    "mlflow": _MLflow,
    "trackio": _Trackio,
    "wandb": _Wandb,
}


def tracker_problems(names: Iterable[str]) -> list[str]:
    """Problems with the value of ``SOLVER.TRACKERS``: unknown names, packages that are not installed."""
    problems = []
    for name in names:
        if name not in TRACKERS:
            problems.append(f"SOLVER.TRACKERS {name!r}: expected {', '.join(TRACKERS)}")
        elif importlib.util.find_spec(name) is None:
            problems.append(f'SOLVER.TRACKERS {name!r} is not installed: pip install "the_mask[{name}]"')
    return problems


def open_trackers(
    names: Iterable[str], folder: Path, config: Mapping[str, Any], resumed: bool, last: int = -1
) -> list[EventWriter]:
    """Open writers to trackers.

    Args:
        names: keys of :data:`TRACKERS`.
        folder: ``OUTPUT_DIR``; its last part is the name of the run.
        config: nested config; stored flat, as ``SOLVER.BASE_LR`` and so on.
        resumed: continue the runs of an earlier training in this folder.
        last: last iteration whose figures are already in those runs.
    """
    path = folder / RUNS
    runs = known_runs(path) if resumed and path.is_file() else {}
    writers: list[EventWriter] = []
    for name in names:
        tracker = TRACKERS[name](folder.resolve(), dict(flat(config)), runs.get(name))
        runs[name] = tracker.id
        writers.append(TrackerWriter(tracker, last))
    if writers:
        write_json(path, runs)
    return writers


def known_runs(path: Path) -> dict[str, str]:
    """Read the run ids that a training has stored, by tracker.

    Raises:
        ValueError: the file is damaged.
    """
    runs = read_json(path, "runs of trackers")
    check_schema(runs, Each(dict, str), f"{path} is damaged (delete it to begin new runs)")
    return runs


class TrackerWriter(EventWriter):
    """Sends new scalars to a tracker, smoothed as in ``metrics.json``."""

    def __init__(self, tracker: Tracker, last: int = -1, window: int = 20) -> None:
        self._tracker, self._window, self._last = tracker, window, last

    def write(self) -> None:
        news: defaultdict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self._window).items():
            if iteration > self._last:
                news[iteration][name] = float(value)
        for iteration in sorted(news):
            self._tracker.log(news[iteration], iteration)
            self._last = iteration

    def close(self) -> None:
        self._tracker.finish()


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """``("SOLVER.BASE_LR", 0.1)`` for each value of a nested config."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
