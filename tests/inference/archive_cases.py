"""What the tests of archives share: tiny videos, a model of a few lines, workers without processes."""

import json
import os
import signal
import time

import numpy as np
from PIL import Image
from toy_segmentor import ToySegmentor

from the_mask.inference.archive.dispatch import Event
from the_mask.inference.archive.manifest import read_manifest
from the_mask.inference.archive.results import Results
from the_mask.inference.archive.worker import VideoWorker, WorkerSetup
from the_mask.inference.rendering.render import Palette
from the_mask.inference.views import MultiView

PALETTE = Palette(["a", "b", "c"], [(255, 0, 0), (0, 255, 0), (0, 0, 255)])
MODEL = {"model": "toy"}


def make_frames(folder, frames=3, seed=0, size=(24, 32)):
    folder.mkdir(parents=True)
    pictures = np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


def make_archive(folder, count, frames=3, outputs=("labels", ".json")):
    """``count`` videos (folders of frames) and their manifest: for each video labels and shares."""
    lines = []
    for number in range(count):
        make_frames(folder / f"v{number}", frames, number)
        names = [f"v{number}{suffix}" if suffix.startswith(".") else f"{suffix}/v{number}/" for suffix in outputs]
        lines.append({"video": f"v{number}", "output": names})
    return write_manifest(folder / "videos.jsonl", lines)


def write_manifest(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" if not isinstance(line, str) else line for line in lines))
    return path


def setup_for(folder):
    return WorkerSetup(b"", PALETTE, str(folder), "toy", threads=1)


def records(folder):
    """Lines of the results after the header."""
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()][1:]


class ToyWorker(VideoWorker):
    """Has a model that needs no weights. A file ``<video>.kill`` has the next attempt at that video killed."""

    def start(self, setup, device=""):
        self._setup, self._segmentor = setup, MultiView(ToySegmentor().eval(), output="labels")
        return ""

    def segment(self, task, staging):
        marker = f"{task.video}.kill"
        if os.path.exists(marker):
            os.unlink(marker)
            os.makedirs(os.path.join(self._setup.folder, staging, "0"))  # something half done
            os.kill(os.getpid(), signal.SIGKILL)
        return super().segment(task, staging)


class SlowWorker(ToyWorker):
    """Takes some seconds for a video, so that there is time to kill it."""

    def segment(self, task, staging):
        time.sleep(2)
        return super().segment(task, staging)


class InlineWorkers:
    """Workers of this very process: what is submitted runs in wait()."""

    count = 1

    def __init__(self, setup):
        self._worker, self._events, self._jobs = ToyWorker(), [], []
        self._setup = setup

    def start(self, worker):
        self._worker.start(self._setup)
        self._events.append(Event(worker, "ready"))

    def submit(self, worker, task, staging):
        self._jobs.append((worker, task, staging))

    def wait(self, seconds):
        for worker, task, staging in self._jobs:
            self._events.append(Event(worker, "finished", outcome=self._worker.segment(task, staging)))
        events, self._events, self._jobs = self._events, [], []
        return events

    def close(self):
        pass


def opened(folder, manifest):
    return read_manifest(manifest), Results(folder, MODEL)
