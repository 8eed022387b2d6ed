"""Progress lines, the live bar, and metrics.json across resumes."""

import fcntl
import io
import json
import logging
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import pytest
from detectron2.utils.events import EventStorage

from the_mask.engine import writers
from the_mask.engine.logs import setup_logging
from the_mask.engine.writers import (
    LogWriter,
    ProgressBar,
    has_screen,
    prepare_metrics_file,
    progress_line,
    summarise_losses,
)


def test_auxiliary_losses_are_summed() -> None:
    losses = {"loss_ce": 1.0, "loss_mask": 2.0, "loss_ce_0": 3.0, "loss_mask_8": 4.0, "frame_loss_ce": 5.0}
    assert summarise_losses(losses) == {"loss_ce": 1.0, "loss_mask": 2.0, "frame_loss_ce": 5.0, "auxiliary": 7.0}
    assert summarise_losses({"loss_ce": 1.0}) == {"loss_ce": 1.0}


def _storage(iteration: int = 0) -> EventStorage:
    storage = EventStorage(iteration)
    for name, value in {
        "total_loss": 3.5,
        "loss_ce": 1.0,
        "loss_ce_0": 2.5,
        "lr": 1e-4,
        "time": 2.0,
        "data_time": 0.5,
        "grad_norm": 7.0,
    }.items():
        storage.put_scalar(name, value, smoothing_hint=name != "lr")
    return storage


def test_line() -> None:
    line = progress_line(_storage(9), 9, 100)
    assert line.startswith(
        "iter 10/100  loss 3.5  (ce 1  auxiliary 2.5)  grad 7  lr 0.0001  2.000 s/it (data 0.500)  eta 0:03:00  mem "
    )
    storage = EventStorage()
    storage.put_scalar("criterion/positive_round1", 0.083)
    storage.put_scalar("criterion/positive_all", 0.166)
    assert "positive 8.3% -> 16.6%" in progress_line(storage, 0, 5)
    assert progress_line(EventStorage(), 0, 5).startswith("iter 1/5  mem ")


def test_log_writer_writes_each_iteration_once(caplog: pytest.LogCaptureFixture) -> None:
    writer = LogWriter(10)
    with caplog.at_level("INFO", logger="the_mask"), _storage(4) as storage:
        writer.write()
        writer.write()
        storage.iter = 5  # an iteration that failed before it had a loss
        writer.write()
    assert [record.getMessage().split("  ")[0] for record in caplog.records] == ["iter 5/10"]
    assert caplog.records[0].progress


def test_memory_is_plausible() -> None:
    assert 20 < writers.peak_memory_mib() < 2**20


def test_screen_is_a_terminal_with_a_size() -> None:
    assert not has_screen(io.StringIO())
    leader, follower = pty.openpty()
    with os.fdopen(leader, "wb", 0), os.fdopen(follower, "w") as terminal:
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
        assert not has_screen(terminal)
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        assert has_screen(terminal)


def test_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metric lines go to the file only, other lines above the bar; afterwards all is as before."""
    console = io.StringIO()
    monkeypatch.setattr(sys, "stdout", console)
    setup_logging(tmp_path)
    logger = logging.getLogger("the_mask.engine.writers")
    screen = io.StringIO()
    bar = ProgressBar(start=2, total=4, stream=screen)
    logger.info("iter 3/4", extra={"progress": True})
    logger.info("checkpoint written")
    bar.step(None, None)
    bar.step(1.234, 0.01)
    bar.close()
    logger.info("afterwards", extra={"progress": True})
    shown = console.getvalue()
    assert "iter 3/4" not in shown
    assert "checkpoint written" in shown
    assert "afterwards" in shown
    assert "loss=1.234" in screen.getvalue()
    assert "lr=0.01" in screen.getvalue()
    assert "4/4" in screen.getvalue()
    log = (tmp_path / "log.txt").read_text()
    for text in ("iter 3/4", "checkpoint written", "afterwards"):
        assert text in log
    setup_logging(None, rank=1)


def _rows(*iterations: int) -> str:
    return "".join(json.dumps({"iteration": i, "loss": 0.1}) + "\n" for i in iterations)


def test_metrics_of_a_resumed_run_have_no_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(_rows(0, 1, 2, 3, 4) + '{"iteration": 5, "lo')
    assert prepare_metrics_file(tmp_path, 3) == path
    assert path.read_text() == _rows(0, 1, 2)


def test_metrics_of_an_older_run_are_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    assert prepare_metrics_file(tmp_path, 0) == path
    path.write_text(_rows(0, 1))
    prepare_metrics_file(tmp_path, 0)
    assert not path.exists()
    assert (tmp_path / "metrics.previous.json").read_text() == _rows(0, 1)


def test_logging_can_be_set_up_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path / "a")
    setup_logging(tmp_path / "b", rank=0)
    logging.getLogger("the_mask.engine").warning("once")
    setup_logging(None, rank=1)
    assert capsys.readouterr().out.count("WARNING once") == 1
    assert (tmp_path / "a" / "log.txt").read_text() == ""
    assert (tmp_path / "b" / "log.txt").read_text().count("once") == 1
