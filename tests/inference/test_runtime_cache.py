"""The cache of graphs: damaged, of many processes, or not to be written; nothing of that stops a model."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from test_runtimes import assert_equal, run, streaming, video

from the_mask.inference.runtimes import RuntimeCache, choose, use_runtime


def writer(text: str, weights: str = "", calls: list[Path] | None = None) -> Callable[[Path], None]:
    """Writes a graph, with a file of weights like that of a large one."""

    def write(path: Path) -> None:
        if calls is not None:
            calls.append(path)
        path.write_text(text)
        if weights:
            path.with_name(f"{path.name}.data").write_text(weights)

    return write


def never(path: Path) -> None:
    """For graphs that are in the cache."""
    raise AssertionError("made again")


def test_weights_of_large_graphs_are_kept_and_checked(tmp_path: Path) -> None:
    path = RuntimeCache(tmp_path).graph("x", writer("graph", "weights"))
    data = path.with_name("x.onnx.data")
    assert RuntimeCache(tmp_path).graph("x", never) == path
    assert data.read_text() == "weights"
    data.write_text("Weights")
    RuntimeCache(tmp_path).graph("x", writer("graph", "weights"))
    assert data.read_text() == "weights"
    data.unlink()
    RuntimeCache(tmp_path).graph("x", writer("small"))
    assert sorted(os.listdir(tmp_path / "runtimes")) == ["x.onnx", "x.sha256"]
    data.write_text("of another graph")
    RuntimeCache(tmp_path).graph("x", writer("small"))
    assert sorted(os.listdir(tmp_path / "runtimes")) == ["x.onnx", "x.sha256"]


def test_old_graphs_go_with_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = RuntimeCache(tmp_path)
    os.utime(cache.graph("old", writer("graph", "w" * 100)), (1, 1))
    monkeypatch.setattr("the_mask.inference.runtimes.cache.MOST_BYTES", 60)
    cache.graph("new", writer("graph", "w" * 40))
    assert sorted(os.listdir(tmp_path / "runtimes")) == ["new.onnx", "new.onnx.data", "new.sha256"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Graphs are made once in each process, in a folder that goes with it."""
    (tmp_path / "file").touch()
    cache, calls = RuntimeCache(tmp_path / "file"), []
    path = cache.graph("x", writer("graph", calls=calls))
    assert cache.graph("x", never) == path
    cache.graph("y", writer("graph", calls=calls))
    cache.keep_choice("x", "eager", {})
    assert cache.choice("x") is None
    assert len(calls) == 2
    assert caplog.text.count("cannot be written") == 1
    assert "is not kept" in caplog.text


def test_a_graph_that_cannot_be_written_anywhere(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left .*x\.onnx"):
        RuntimeCache(tmp_path).graph("x", write)
    assert os.listdir(tmp_path / "runtimes") == []


def test_a_cache_that_can_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = RuntimeCache(tmp_path).graph("x", writer("graph"))

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError("read-only")

    for name in ("utime", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    assert RuntimeCache(tmp_path).graph("x", never) == path


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"runtime": []}', '{"runtime": {"a": 1}}', '{"runtime": null}', "NaN", "{", "\0", "é"]
)
def test_choices_of_other_kinds(tmp_path: Path, text: str) -> None:
    cache = RuntimeCache(tmp_path)
    cache.keep_choice("x", "eager", {"part": "p"})
    assert cache.choice("x") == "eager"
    (tmp_path / "runtimes/x.json").write_bytes(text.encode("latin-1"))
    assert cache.choice("x") is None


def test_what_a_killed_process_has_left_goes(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in (f"x.onnx.partial-{gone.pid}-1", f"y.onnx.partial-{gone.pid}-1"):
        (tmp_path / "runtimes" / name).mkdir(parents=True)
    RuntimeCache(tmp_path).graph("x", writer("graph"))
    assert sorted(os.listdir(tmp_path / "runtimes")) == ["x.onnx", "x.sha256", f"y.onnx.partial-{gone.pid}-1"]


def test_many_at_once(tmp_path: Path) -> None:
    """Whoever asks gets a whole graph; content differs as that of two exports may."""
    found: list[str] = []

    def ask(number: int) -> None:
        found.append(RuntimeCache(tmp_path).graph("x", writer(f"graph {number}" * 1000)).read_text())

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) <= {f"graph {number}" * 1000 for number in range(8)}
    RuntimeCache(tmp_path).graph("x", writer("graph"))
    assert sorted(os.listdir(tmp_path / "runtimes")) == ["x.onnx", "x.sha256"]


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="no onnxruntime")
def test_auto_without_a_cache_and_with_a_choice_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choose, "MEASURE_SECONDS", 0.01)
    segmentor, frames = streaming("swiftnet_debug"), video(1)
    expected = run(segmentor, frames)
    (tmp_path / "file").touch()
    report = use_runtime(segmentor.model, "auto", cache=RuntimeCache(tmp_path / "file"))
    assert_equal(run(segmentor, frames), expected)
    assert "onnxruntime" in next(iter(report.seconds.values()))

    monkeypatch.setattr(RuntimeCache, "choice", lambda cache, key: "onnxruntime")

    def damaged(path: Path) -> None:
        raise RuntimeError("a driver is gone")

    monkeypatch.setattr(choose, "OnnxRuntimeSession", damaged)
    caplog.set_level(logging.WARNING)
    report = use_runtime(segmentor.model, "auto", cache=RuntimeCache(tmp_path))
    assert_equal(run(segmentor, frames), expected)
    (chosen,) = report.chosen.values()
    assert chosen != "onnxruntime"
    assert caplog.text.count("a driver is gone") == 1

    monkeypatch.setattr(choose._Chooser, "_tried", lambda *_: None)
    use_runtime(segmentor.model, "auto", cache=RuntimeCache(tmp_path))
    with pytest.raises(RuntimeError, match="nothing can run image_logits"):
        run(segmentor, frames)
