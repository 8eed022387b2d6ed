"""Archives: every video has exactly one complete result, whatever happens to its workers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from archive_cases import (
    InlineWorkers,
    ToyWorker,
    make_archive,
    make_frames,
    opened,
    records,
    setup_for,
    write_manifest,
)

from the_mask.cli import main
from the_mask.config import load_config
from the_mask.inference.archive import make_workers, segment_archive
from the_mask.inference.archive.dispatch import FAILED_STARTS, Event
from the_mask.inference.archive.local import LocalWorkers
from the_mask.inference.archive.ray_cluster import room
from the_mask.inference.archive.worker import FAILURE, INPUT, MEMORY, Outcome, output_digest
from the_mask.inference.stream import build_random

CONFIG = str(Path("configs/debug/swiftnet_debug.yaml").resolve())
SIZES = ["INPUT.TEST.SHORT_EDGE", "64", "INPUT.TEST.LONG_EDGE", "96", "MODEL.DEVICE", "cpu"]


class Script:
    """Workers that answer as they are told: a list of outcomes per video, one for each attempt; None: it dies."""

    def __init__(self, folder, count=2, answers=None, starts=()):
        self.folder, self.count, self.answers, self.starts = folder, count, dict(answers or {}), list(starts)
        self.events, self.running, self.log, self.most, self.closed = [], {}, [], 0, False

    def start(self, worker):
        self.running.pop(worker, None)
        answer = self.starts.pop(0) if self.starts else "ready"
        self.events.append(Event(worker, answer, "no weights" if answer == "refused" else "exit code 1"))

    def submit(self, worker, task, staging):
        assert worker not in self.running
        self.running[worker] = task, staging
        self.most = max(self.most, len(self.running))
        self.log.append((Path(task.video).name, len(self.running)))

    def wait(self, seconds):
        if not self.events and self.running:
            worker = max(self.running)
            task, staging = self.running.pop(worker)
            answers = self.answers.get(Path(task.video).name, [])
            outcome = answers.pop(0) if answers else Outcome(frames=3)
            (self.folder / staging).mkdir()
            if outcome is None:
                return [Event(worker, "died", "killed by SIGKILL", memory=True)]
            if not outcome.error:
                for name in task.outputs:
                    (self.folder / name).parent.mkdir(exist_ok=True)
                    (self.folder / name).touch()
            return [Event(worker, "finished", outcome=outcome)]
        events, self.events = self.events, []
        return events

    def close(self):
        self.closed = True


def run(tmp_path, count, script, **options):
    manifest = make_archive(tmp_path / "in", count, 1, (".json",))
    tasks, results = opened(tmp_path / "out", manifest)
    summary = segment_archive(tasks, results, script, progress=False, **options)
    assert script.closed
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.endswith(".writing")]
    return summary


def test_one_video_at_a_time_for_each_worker(tmp_path):
    script = Script(tmp_path / "out", count=3)
    summary = run(tmp_path, 10, script)
    assert (summary.done, summary.failed, summary.frames) == (10, 0, 30)
    assert script.most == 3
    assert Counter(name for name, _ in script.log) == {f"v{i}": 1 for i in range(10)}
    assert {record["status"] for record in records(tmp_path / "out")} == {"done"}


def test_what_is_tried_again(tmp_path):
    bad, broken, full = Outcome("cut off", INPUT), Outcome("RuntimeError: x", FAILURE), Outcome("no memory", MEMORY)
    answers = {
        "v0": [bad, bad],
        "v1": [broken, None],
        "v2": [broken] * 9,
        "v3": [full],
        "v4": [None, None, None],
    }
    script = Script(tmp_path / "out", 2, answers)
    summary = run(tmp_path, 6, script, retries=2)
    found = {Path(r["video"]).name: (r["status"], r["attempts"], r.get("error", "")) for r in records(tmp_path / "out")}
    assert found.pop("v4")[2].startswith("its worker died: killed by SIGKILL; if memory ran out, try fewer workers")
    assert found == {
        "v0": ("failed", 1, "cut off"),
        "v1": ("done", 3, ""),
        "v2": ("failed", 3, "RuntimeError: x"),
        "v3": ("done", 2, ""),
        "v5": ("done", 1, ""),
    }
    assert (summary.done, summary.failed) == (3, 3)
    # What may have run out of memory has the machine to itself the next time.
    assert [running for name, running in script.log if name == "v3"][1:] == [1]
    assert [running for name, running in script.log if name == "v4"][1:] == [1, 1]


def test_workers_that_cannot_start(tmp_path):
    with pytest.raises(ValueError, match="no weights"):
        run(tmp_path, 2, Script(tmp_path / "out", starts=["refused"]))
    script = Script(tmp_path / "out", 1, starts=["died"] * FAILED_STARTS)
    with pytest.raises(ValueError, match="a worker dies before it can start: exit code 1"):
        segment_archive(*opened(tmp_path / "out", tmp_path / "in" / "videos.jsonl"), script, progress=False)
    script = Script(tmp_path / "out", 1, starts=["died"] * (FAILED_STARTS - 1))
    assert segment_archive(*opened(tmp_path / "out", tmp_path / "in" / "videos.jsonl"), script).done == 2


def test_outputs_that_are_not_here(tmp_path):
    class Elsewhere(Script):
        def wait(self, seconds):
            events = super().wait(seconds)
            (self.folder / "v0.json").unlink(missing_ok=True)
            return events

    with pytest.raises(ValueError, match="must be on a file system that all machines share"):
        run(tmp_path, 1, Elsewhere(tmp_path / "out"))
    assert records(tmp_path / "out") == []


def check_outputs(folder, count, frames):
    """Every video once, each output as its line says."""
    # A video whose workers were all killed is noted as failed, and done by the next run.
    lines = [line for line in records(folder) if line["status"] == "done"]
    assert sorted(Path(line["video"]).name for line in lines) == sorted(f"v{i}" for i in range(count))
    for line in lines:
        assert line["frames"] == frames
        assert line["sha256"] == {name: output_digest(folder / name) for name in line["output"]}
        name = Path(line["video"]).name
        assert len(list((folder / "labels" / name).glob("*.png"))) == frames
        assert (folder / "labels" / name / "classes.json").is_file()
        assert len(json.loads((folder / f"{name}.json").read_text())["frames"]) == frames
    assert not [path for path in folder.iterdir() if path.name.endswith(".writing")]
    return {Path(line["video"]).name: line["sha256"] for line in lines}


def test_killed_processes_lose_nothing(tmp_path):
    manifest = make_archive(tmp_path / "in", 3)
    tasks, results = opened(tmp_path / "one", manifest)
    segment_archive(tasks, results, InlineWorkers(setup_for(tmp_path / "one")), progress=False)
    expected = check_outputs(tmp_path / "one", 3, 3)
    (tmp_path / "in" / "v1.kill").touch()
    folder = tmp_path / "two"
    tasks, results = opened(folder, manifest)
    workers = LocalWorkers(setup_for(folder), 1, worker=ToyWorker)  # a process takes seconds to start
    summary = segment_archive(tasks, results, workers, progress=False)
    assert (summary.done, summary.failed) == (3, 0)
    assert check_outputs(folder, 3, 3) == expected
    attempts = {Path(line["video"]).name: line["attempts"] for line in records(folder)}
    assert attempts == {"v0": 1, "v1": 2, "v2": 1}
    assert not workers._processes


@pytest.mark.slow
def test_a_worker_ends_with_the_process_that_started_it(tmp_path):
    """Its pipe tells an idle one; a busy one watches its parent."""
    code = (
        "import sys, os, time\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from archive_cases import *\n"
        "from the_mask.inference.archive.local import LocalWorkers\n"
        "class Stuck(ToyWorker):\n"
        "    def start(self, setup, device=''):\n"
        "        os.write(1, f'{os.getpid()}\\n'.encode())\n"
        "        time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    LocalWorkers(setup_for('/nowhere'), 1, worker=Stuck).start(0)\n"
        "    time.sleep(600)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    for _ in range(200):
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the worker lives on")


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from archive_cases import *
from the_mask.inference.archive import segment_archive
from the_mask.inference.archive.local import LocalWorkers
if __name__ == "__main__":
    folder = Path({folder!r})
    tasks, results = opened(folder, {manifest!r})
    segment_archive(tasks, results, LocalWorkers(setup_for(folder), 2, worker=SlowWorker), progress=False)
"""


@pytest.mark.slow
def test_killed_at_random(tmp_path):
    """Workers and the process that leads them, at any moment, until the archive is done."""
    videos, frames, random_number = 24, 12, random.Random(0)
    folder, manifest = tmp_path / "out", make_archive(tmp_path / "in", videos, frames)
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.format(tests=str(Path(__file__).parent), folder=str(folder), manifest=str(manifest)))
    kills, finished = 0, False
    for _ in range(12):
        with subprocess.Popen([sys.executable, str(script)]) as driver:
            deadline = time.monotonic() + random_number.uniform(5, 20)
            while time.monotonic() < deadline and driver.poll() is None:
                time.sleep(random_number.uniform(0.2, 1.5))
                children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children")
                pids = children.read_text().split() if children.exists() else []
                if pids and random_number.random() < 0.2:
                    os.kill(int(random_number.choice(pids)), signal.SIGKILL)
                    kills += 1
            if driver.poll() is None:
                driver.kill()
                kills += 1
            elif driver.returncode == 0:
                finished = True
                break
    if not finished:
        subprocess.run([sys.executable, str(script)], check=True)
    assert kills >= 5
    found = check_outputs(folder, videos, frames)
    tasks, results = opened(tmp_path / "whole", manifest)
    segment_archive(tasks, results, InlineWorkers(setup_for(tmp_path / "whole")), progress=False)
    assert check_outputs(tmp_path / "whole", videos, frames) == found


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": build_random(load_config(CONFIG, SIZES)).state_dict()}, path)
    return str(path)


def test_the_command(tmp_path, weights, capsys, monkeypatch):
    """Same results as of one video; a damaged one is named and tried again, the others are not done twice."""
    model = ["--config", CONFIG, "--weights", weights]
    make_frames(tmp_path / "in" / "v0")
    (tmp_path / "in" / "damaged.mp4").write_bytes(b"no video" * 100)
    manifest = write_manifest(
        tmp_path / "in" / "videos.jsonl",
        [
            {"video": "v0", "output": ["v0.mp4", "labels/v0"], "options": {"palette": True}},
            {"video": "damaged.mp4", "output": "damaged"},
        ],
    )
    out = tmp_path / "out"
    words = ["segment", *model, "--manifest", str(manifest), "-o", str(out), "--workers", "1", "--threads", "1"]
    assert main([*words, *SIZES]) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 videos (3 frames)" in printed
    assert "videos.jsonl, line 2 failed: " in printed
    assert "1 failed; the same command tries them again" in printed
    assert str(tmp_path / "in" / "damaged.mp4") in printed
    one = tmp_path / "one"
    alone = ["segment", str(tmp_path / "in" / "v0"), *model, "-o", f"{one}/v0.mp4", "-o", f"{one}/labels/", "--palette"]
    assert main([*alone, *SIZES]) == 0
    assert output_digest(out / "labels" / "v0") == output_digest(one / "labels")
    assert (out / "v0.mp4").read_bytes() == (one / "v0.mp4").read_bytes()
    capsys.readouterr()
    manifest.write_text(manifest.read_text().splitlines(keepends=True)[0])
    assert main([*words, *SIZES]) == 0
    assert "0 of 1 videos (0 frames)" in (printed := capsys.readouterr().out)
    assert "1 were done before" in printed
    assert [(r["status"], r.get("frames")) for r in records(out)] == [("done", 3), ("failed", None)]
    assert main([*words, *SIZES, "INPUT.TEST.SHORT_EDGE", "32"]) == 1
    assert "has results of another model (config_sha256 differ)" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*words, *SIZES, "--engine", "ray"]) == 1
    assert 'pip install "the_mask[ray]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "a", "-o", "b"], "--manifest takes one -o"),
        (["-o", "a", "--contact-sheet", "x.png"], "--contact-sheet is for one video"),
        (["-o", "a", "--asynchronous"], "--asynchronous is for one video"),
        (["-o", "a", "--annotations", "cvat-masks", "x"], "--annotations is for one video"),
        ([], "--manifest takes one -o"),
        (["-o", "a", "--workers", "-1"], "--workers -1: expected 0 or more"),
        (["-o", "a", "drive.mp4"], "drive.mp4: --manifest names the inputs"),
        (["-o", "a"], "line 1: not JSON"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(tmp_path, weights, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path / "videos.jsonl", ["{\n"])
    model = ["--config", CONFIG, "--weights", weights]
    assert main(["segment", "--manifest", "videos.jsonl", *words, *model]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["videos.jsonl"]


def test_no_input(capsys):
    assert main(["segment", "-o", "a.mp4"]) == 1
    assert "INPUT is missing" in capsys.readouterr().err


def test_room_on_a_cluster():
    eight, two = {"CPU": 8.0}, {"CPU": 2.0}
    assert room([eight, two], 0, 0, False) == (2, 4)
    assert room([two, two], 0, 0, False) == (2, 2)
    assert room([eight, two], 3, 0, False) == (3, 2)
    assert room([eight, two], 2, 4, False) == (2, 4)
    assert room([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 2.0}], 0, 0, True) == (4, 4)
    assert room([{"CPU": 16.0, "GPU": 1.0}], 0, 2, True) == (1, 2)
    with pytest.raises(ValueError, match="2 nodes with 10 cores, room for 10 workers of 1 cores each, and 11"):
        room([eight, two], 11, 0, False)
    with pytest.raises(ValueError, match="room for 1 workers of 2 cores and a GPU each, and 2 are asked for"):
        room([{"CPU": 16.0, "GPU": 1.0}], 2, 2, True)
    with pytest.raises(ValueError, match="and 1 are asked for"):
        room([], 0, 0, False)


def test_unknown_engines(tmp_path):
    with pytest.raises(ValueError, match="engine 'spark': expected one of local, ray"):
        make_workers("spark", setup_for(tmp_path), 1, "cpu")
