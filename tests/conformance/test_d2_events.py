"""Documented behaviour of detectron2.utils.events and detectron2.utils.logger."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
    has_event_storage,
)
from detectron2.utils.logger import (
    create_small_table,
    log_every_n,
    log_every_n_seconds,
    log_first_n,
    setup_logger,
)


def test_storage_stack() -> None:
    assert not has_event_storage()
    with pytest.raises(AssertionError):
        get_event_storage()
    with EventStorage(5) as outer:
        assert get_event_storage() is outer
        assert (outer.iter, outer.iteration) == (5, 5)
        with EventStorage() as inner:
            assert get_event_storage() is inner
        assert get_event_storage() is outer
    assert not has_event_storage()


def test_scalars() -> None:
    with EventStorage(3) as storage:
        storage.put_scalar("a", torch.tensor(1.0))
        storage.put_scalars(b=2, c=3.0, smoothing_hint=False)
        with storage.name_scope("scope"), storage.name_scope("inner"):
            storage.put_scalar("a", 4)  # scopes do not add up
        storage.step()
        storage.put_scalar("a", 5, cur_iter=9)
        assert storage.latest() == {"a": (5.0, 9), "b": (2.0, 3), "c": (3.0, 3), "inner/a": (4.0, 3)}
        assert storage.history("a").values() == [(1.0, 3), (5.0, 9)]
        assert storage.smoothing_hints() == {"a": True, "b": False, "c": False, "inner/a": True}
        assert sorted(storage.histories()) == ["a", "b", "c", "inner/a"]
        with pytest.raises(AssertionError, match="smoothing_hint"):
            storage.put_scalar("a", 1, smoothing_hint=False)
        with pytest.raises(KeyError):
            storage.history("none")


def test_smoothing_counts_iterations_not_values() -> None:
    with EventStorage() as storage:
        for iteration, value in ((0, 1.0), (3, 2.0), (5, 3.0), (6, 9.0)):
            storage.put_scalar("x", value, cur_iter=iteration)
        storage.put_scalar("raw", 7.0, smoothing_hint=False)
        assert storage.count_samples("x", 3) == 2
        assert storage.latest_with_smoothing_hint(3) == {"x": (6.0, 6), "raw": (7.0, 0)}


def test_json_writer_writes_what_is_new(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    with EventStorage(4) as storage:
        writer = JSONWriter(str(file))
        storage.put_scalar("loss", 2.0)
        storage.put_scalar("nan", math.nan)
        writer.write()
        writer.write()
        storage.put_scalar("late", 1.0, cur_iter=6)
        storage.put_scalar("loss", 4.0, cur_iter=5)
        writer.write()
        writer.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [4, 5, 6] or [line["iteration"] for line in lines] == [4, 6, 5]
    by_iteration = {line["iteration"]: line for line in lines}
    assert sorted(by_iteration[4]) == ["iteration", "loss", "nan"]
    assert by_iteration[5] == {"iteration": 5, "loss": 3.0}  # the median of the window
    assert by_iteration[6] == {"iteration": 6, "late": 1.0}


def test_tensorboard_writer_clears_images_and_histograms(tmp_path: Path) -> None:
    with EventStorage() as storage:
        idle = TensorboardXWriter(str(tmp_path / "idle"))
        idle.close()
        assert not (tmp_path / "idle").exists()
        writer = TensorboardXWriter(str(tmp_path / "run"))
        storage.put_scalar("loss", 1.0)
        storage.put_image("image", np.zeros((3, 4, 4), np.uint8))
        storage.put_histogram("weights", torch.randn(10), bins=5)
        writer.write()
        writer.close()
        assert not storage._vis_data
        assert not storage._histograms
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"histograms": 0, "images": 0})
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == [1.0]
    assert len(events.Images("image")) == 1
    assert len(events.Histograms("weights")) == 1


@pytest.fixture
def messages() -> Iterator[list[str]]:
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("detectron2"), Keep()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_metric_printer(messages: list[str]) -> None:
    with EventStorage() as storage:
        printer = CommonMetricPrinter(max_iter=10)
        storage.put_scalar("total_loss", 1.23456)
        storage.put_scalar("other", 5)
        printer.write()
        assert "iter: 0  total_loss: 1.235  " in messages[-1]
        assert "other" not in messages[-1]
        assert "lr: N/A" in messages[-1]
        storage.step()
        storage.put_scalar("time", 0.5)
        storage.put_scalar("data_time", 0.125)
        storage.put_scalar("lr", 1e-4, smoothing_hint=False)
        printer.write()
        assert messages[-1].startswith(" eta: 0:00:04  iter: 1  total_loss: 1.235")
        assert "time: 0.5000  last_time: 0.5000  data_time: 0.1250  last_data_time: 0.1250" in messages[-1]
        assert "lr: 0.0001" in messages[-1]
        assert storage.latest()["eta_seconds"] == (4.0, 1)
        storage.put_scalar("[metric]mIoU", 0.25)
        printer.write()
        assert "total_loss: 1.235  [metric]mIoU: 0.25  time: " in messages[-1]
        count = len(messages)
        storage.iter = 10
        printer.write()
        assert len(messages) == count  # nothing after the last iteration


def test_event_writer_is_a_base() -> None:
    with pytest.raises(NotImplementedError):
        EventWriter().write()


def test_setup_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    logger = setup_logger(str(tmp_path / "logs"), color=False, name="_conformance")
    assert setup_logger(str(tmp_path / "logs"), color=False, name="_conformance") is logger
    assert (len(logger.handlers), logger.level, logger.propagate) == (2, logging.DEBUG, False)
    logger.getChild("part").warning("careful")
    assert out.getvalue().endswith("_conformance.part WARNING: careful\n")
    assert (tmp_path / "logs" / "log.txt").read_text() == out.getvalue()

    other = setup_logger(str(tmp_path / "logs" / "mine.log"), 2, name="_conformance2")
    other.info("from rank 2")
    assert out.getvalue().count("\n") == 1
    assert "from rank 2" in (tmp_path / "logs" / "mine.log.rank2").read_text()

    colourful = setup_logger(name="_conformance3", abbrev_name="c3")
    colourful.getChild("part").error("wrong")
    assert "c3.part" in out.getvalue()
    assert "ERROR" in out.getvalue()
    assert not setup_logger(name="_conformance4", configure_stdout=False).handlers


def test_log_limits(messages: list[str]) -> None:
    for _ in range(5):
        log_first_n(logging.INFO, "first", n=2, name="detectron2.test")
    assert messages == ["first"] * 2
    messages.clear()
    for index in range(4):
        log_first_n(logging.INFO, f"message {index % 2}", key="message", name="detectron2.test")
    assert messages == ["message 0", "message 1"]
    messages.clear()
    for index in range(7):
        log_every_n(logging.INFO, str(index), n=3, name="detectron2.test")
    assert messages == ["0", "3", "6"]
    messages.clear()
    for index in range(3):
        log_every_n_seconds(logging.INFO, str(index), n=100, name="detectron2.test")
    assert messages == ["0"]


def test_small_table() -> None:
    header, _, values = create_small_table({"mIoU": 12.3456, "n": 2}).splitlines()
    assert header.replace(" ", "") == "|mIoU|n|"
    assert values.replace(" ", "") == "|12.346|2|"
