"""Trackers: each writes offline what metrics.json has, read back by its own means; mistakes are said early."""

import importlib.util
import json
import struct
import time

import pytest
from detectron2.utils.events import EventStorage

from the_mask.config import load_config
from the_mask.engine import trackers
from the_mask.engine.trackers import RUNS, TRACKERS, TrackerWriter, flat, open_trackers, tracker_problems
from the_mask.engine.validate import validate

CONFIG = {"SOLVER": {"BASE_LR": 0.1, "STEPS": (3, 4)}, "SEED": 1}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")


class Recorder:
    def __init__(self):
        self.lines, self.finished = [], False

    def log(self, figures, iteration):
        self.lines.append((iteration, dict(figures)))

    def finish(self):
        self.finished = True


def train(writers, first, last):
    """Iterations ``first`` to ``last``, written after every second."""
    with EventStorage(first) as storage:
        for iteration in range(first, last):
            storage.iter = iteration
            storage.put_scalar("total_loss", 10.0 - iteration, smoothing_hint=False)
            if iteration % 2:
                if iteration == 3:
                    storage.put_scalar("sem_seg/mIoU", 42.5, smoothing_hint=False)
                for writer in writers:
                    writer.write()
        for writer in writers:
            writer.write()
            writer.close()


def test_each_figure_is_sent_once_with_its_iteration():
    recorder = Recorder()
    train([TrackerWriter(recorder)], 0, 5)
    assert recorder.lines == [
        (1, {"total_loss": 9.0}),
        (3, {"total_loss": 7.0, "sem_seg/mIoU": 42.5}),
        (4, {"total_loss": 6.0}),
    ]
    assert recorder.finished


def test_configs_are_flat():
    assert dict(flat(CONFIG)) == {"SOLVER.BASE_LR": 0.1, "SOLVER.STEPS": (3, 4), "SEED": 1}


def test_a_resumed_training_goes_on_in_its_run(tmp_path, monkeypatch):
    opened = []

    def fake(folder, config, run_id):
        opened.append(run_id)
        tracker = Recorder()
        tracker.id = run_id or f"run{len(opened)}"
        return tracker

    monkeypatch.setitem(trackers.TRACKERS, "wandb", fake)
    for resumed in (False, True, False):
        open_trackers(["wandb"], tmp_path, CONFIG, resumed)
    assert opened == [None, "run1", None]
    assert json.loads((tmp_path / RUNS).read_text()) == {"wandb": "run3"}
    assert open_trackers([], tmp_path / "other", CONFIG, False) == []
    assert not (tmp_path / "other").exists()


def test_unknown_and_absent_ones_are_named(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    first, second = tracker_problems(["neptune", "wandb"])
    assert first == "SOLVER.TRACKERS 'neptune': expected mlflow, trackio, wandb"
    assert second == "SOLVER.TRACKERS 'wandb' is not installed: pip install \"the_mask[wandb]\""
    cfg = load_config("configs/debug/the_mask_debug_1f.yaml", ["SOLVER.TRACKERS", "['neptune']", "MODEL.DEVICE", "cpu"])
    with pytest.raises(ValueError, match=r"SOLVER\.TRACKERS 'neptune'"):
        validate(cfg)


def run_twice(name, folder):
    train(open_trackers([name], folder, CONFIG, resumed=False), 0, 4)
    train(open_trackers([name], folder, CONFIG, resumed=True), 4, 6)


EXPECTED = {1: 9.0, 3: 7.0, 5: 5.0}


def stored_records(data):
    """Messages of a .wandb file: a header of 7 bytes, then LevelDB's log format: blocks of 32 KiB, records in parts."""
    place, parts = 7, []
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield b"".join(parts)
            parts = []


def wandb_figures(folder):
    """Losses by iteration in the files of W&B's offline runs, and the names and ids of the runs."""
    from wandb.proto import wandb_internal_pb2

    found, names = {}, set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in stored_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.display_name:
                names.add((record.run.display_name, record.run.run_id))
            row = {
                (item.nested_key[0] if item.nested_key else item.key): item.value_json for item in record.history.item
            }
            if "total_loss" in row:
                found[int(row["_step"])] = json.loads(row["total_loss"])
    return found, names


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb", reason="extra wandb is not installed")
    folder = tmp_path / "my run"
    folder.mkdir()
    run_twice("wandb", folder)
    # W&B's own process may write the last records after the run has been finished, on a busy machine.
    deadline = time.monotonic() + 30
    while (found := wandb_figures(folder))[0] != EXPECTED and time.monotonic() < deadline:
        time.sleep(0.2)
    figures, names = found
    assert figures == EXPECTED
    assert [name for name, _ in names] == ["my run"], "one run, also after resuming"


def test_mlflow_offline(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="extra mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="extra mlflow is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my run"
    folder.mkdir()
    run_twice("mlflow", folder)
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("the_mask").experiment_id])
    assert run.info.run_name == "my run"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"SOLVER.BASE_LR": "0.1", "SOLVER.STEPS": "(3, 4)", "SEED": "1"}
    assert {m.step: m.value for m in client.get_metric_history(run.info.run_id, "total_loss")} == EXPECTED
    assert [path.name for path in tmp_path.iterdir()] == ["my run"]


def test_trackio_offline(tmp_path, monkeypatch):
    # Not importorskip: Trackio chooses its folder when it is imported.
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("extra trackio is not installed")
    import sqlite3

    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    run_twice("trackio", folder)
    found = {}
    for path in (folder / "trackio").rglob("*.db"):
        with sqlite3.connect(path) as database:
            rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
        found |= {(name, step): json.loads(metrics) for name, step, metrics in rows}
    assert {step: row["total_loss"] for (_, step), row in found.items()} == EXPECTED
    assert {name for name, _ in found} == {"run"}


def test_every_tracker_is_an_extra():
    tomllib = pytest.importorskip("tomllib")
    with open("pyproject.toml", "rb") as stream:
        assert TRACKERS.keys() <= tomllib.load(stream)["project"]["optional-dependencies"].keys()
