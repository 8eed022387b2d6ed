"""The worker: holds the model and segments one video after the other into complete outputs."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from the_mask.data.files import file_digest, inside, sync_file, sync_folder
from the_mask.data.plugins import import_dataset_modules
from the_mask.inference.archive.manifest import LABELS, SHARES, VIDEO, VideoTask, output_kind
from the_mask.inference.demo import DemoReport, DemoStyle, check_outputs, run_demo
from the_mask.inference.live.sources import open_source
from the_mask.inference.rendering.render import Palette
from the_mask.inference.runtimes import prepare_stream
from the_mask.inference.sinks import ClassShares, LabelFolder, Sink, write_classes
from the_mask.inference.stream import StreamingSegmentor
from the_mask.weights.reading import locate_weights

logger = logging.getLogger(__name__)
# Kinds of failures: not worth another attempt, maybe a lack of memory, anything else.
INPUT, MEMORY, FAILURE = "input", "memory", "failure"
# An outcome keeps this many of the lines about damage in its video.
PROBLEMS_KEPT = 20
# Messages of torch's CPU allocator, which has no exception type of its own.
NO_MEMORY = ("not enough memory", "can't allocate memory")


@dataclass(frozen=True)
class WorkerSetup:
    """Settings shared by all workers.

    Attributes:
        config: the model's config, of :meth:`packed`.
        palette: names and colours of its classes.
        folder: of the outputs; an absolute path that all workers can reach.
        model: the model's name, for tables.
        backend, precision, calibrate: of :func:`the_mask.inference.runtimes.prepare_stream`.
        trust_pickle: of :func:`the_mask.weights.load_weights`.
        threads: of each worker on the CPU.
    """

    config: bytes
    palette: Palette
    folder: str
    model: str
    backend: str = "eager"
    precision: str = "float32"
    calibrate: str | None = None
    trust_pickle: bool = False
    threads: int = 1

    @staticmethod
    def packed(cfg: CfgNode) -> bytes:
        """A config as bytes, for :attr:`cfg` in a process that has imported the_mask."""
        own = cfg.clone()
        own.defrost()
        own.MODEL.WEIGHTS = str(locate_weights(own.MODEL.WEIGHTS).absolute()) if own.MODEL.WEIGHTS else ""
        return pickle.dumps(own)

    @property
    def cfg(self) -> CfgNode:
        """The config."""
        return pickle.loads(self.config)  # of the process that has started this one


@dataclass(frozen=True)
class Outcome:
    """Result of an attempt at a video.

    Attributes:
        error: message; "" on success.
        kind: of the error.
        frames: number of segmented frames.
        seconds: time of the attempt.
        digests: SHA-256 of each output by name; of a folder, see :func:`output_digest`.
        problems: lines about damage that was skipped, the first :data:`PROBLEMS_KEPT` of them.
        worker: host and process.
    """

    error: str = ""
    kind: str = ""
    frames: int = 0
    seconds: float = 0.0
    digests: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    worker: str = ""


class VideoWorker:
    """One process, one model, one video at a time."""

    def __init__(self) -> None:
        self._setup: WorkerSetup | None = None
        self._segmentor: Any = None

    def start(self, setup: WorkerSetup, device: str = "") -> str:
        """Build the model.

        Args:
            setup: see there.
            device: in place of ``MODEL.DEVICE``.

        Returns:
            "", or a message for the user.
        """
        torch.set_num_threads(setup.threads)
        cfg = setup.cfg
        if device:
            cfg.MODEL.DEVICE = device
        try:
            import_dataset_modules(cfg.DATASETS.IMPORT)
            self._segmentor = StreamingSegmentor(cfg, trust_pickle=setup.trust_pickle)
            prepare_stream(self._segmentor, setup.backend, setup.precision, setup.calibrate)
        except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
            return f"{socket.gethostname()}: {error}"
        self._setup = setup
        return ""

    def segment(self, task: VideoTask, staging: str) -> Outcome:
        """Segment a video; its outputs appear under their names when all of them are complete.

        Args:
            task: what to do.
            staging: name of a folder in the output folder, used only by this attempt. Removing it cancels the attempt.
        """
        assert self._setup is not None
        start = time.perf_counter()
        problems: list[str] = []
        place = f"{socket.gethostname()}:{os.getpid()}"
        try:
            report, digests = segment_one(self._segmentor, self._setup, task, staging, problems)
        except (MemoryError, torch.OutOfMemoryError) as error:
            return Outcome(str(error) or "out of memory", MEMORY, worker=place)
        except (ValueError, FileNotFoundError) as error:
            text = str(error)
            for path, name in zip(_staged(self._setup, task, staging), task.outputs, strict=True):
                text = text.replace(str(path), name)
            return Outcome(text, INPUT, problems=problems[:PROBLEMS_KEPT], worker=place)
        except Exception as error:  # the boundary between videos
            logger.warning("%s failed", task.video, exc_info=True)
            kind = MEMORY if any(text in str(error) for text in NO_MEMORY) else FAILURE
            return Outcome(f"{type(error).__name__}: {error}", kind, worker=place)
        return Outcome(
            frames=report.frames,
            seconds=round(time.perf_counter() - start, 3),
            digests=digests,
            problems=problems[:PROBLEMS_KEPT],
            worker=place,
        )


def segment_one(
    segmentor: StreamingSegmentor, setup: WorkerSetup, task: VideoTask, staging: str, problems: list[str]
) -> tuple[DemoReport, dict[str, str]]:
    """Segment a video into ``staging``, then give its outputs their names.

    Raises:
        ValueError, FileNotFoundError: something is wrong with the video.
        OSError: something is wrong with the disk, or the attempt was called off.
    """
    targets = [inside(setup.folder, name) for name in task.outputs]
    place = Path(setup.folder, staging)
    place.mkdir()
    staged = _staged(setup, task, staging)
    options, palette = task.options, setup.palette
    style = DemoStyle(alpha=options.alpha, legend=options.legend, show_input=options.show_input)
    video: Path | None = None
    sinks: list[Sink] = []
    for name, path in zip(task.outputs, staged, strict=True):
        kind = output_kind(name)
        if kind == VIDEO:
            video = path
        elif kind == SHARES:
            facts = {"model": setup.model, "input": task.video}
            sinks.append(ClassShares(path, list(palette.names), facts))
        elif kind == LABELS:
            colors = palette.colors if options.palette else None
            # publish() flushes the whole folder once.
            sinks.append(LabelFolder.of_video(path, len(palette.names), colors, flush="never"))
    with open_source(task.video, options.fps, on_problem=problems.append) as source:
        if source.live:
            raise ValueError(f"{task.video} is live: an archive is made of videos that can be read again")
        check_outputs(source, palette, video, None, style)
        report = run_demo(
            segmentor,
            source,
            palette,
            video,
            sinks=sinks,
            style=style,
            max_frames=options.max_frames,
            progress=False,
            audio=options.audio,
            stoppable=False,
        )
    write_classes(sinks, palette.names, palette.colors, palette.ignore_label)
    for sink in sinks:
        if isinstance(sink, LabelFolder) and len(list(sink.folder.glob("*.png"))) != report.frames:
            # The folder was taken away meanwhile, and has come back with a part of the frames.
            raise OSError(f"{sink.folder} has lost frames: the attempt was called off")
    digests = {name: output_digest(path) for name, path in zip(task.outputs, staged, strict=True)}
    publish(staged, targets, place)
    return report, digests


def _staged(setup: WorkerSetup, task: VideoTask, staging: str) -> list[Path]:
    """Paths of the outputs while they are written."""
    return [Path(setup.folder, staging, str(number), Path(name).name) for number, name in enumerate(task.outputs)]


def publish(staged: Sequence[Path], targets: Sequence[Path], place: Path) -> None:
    """Move complete files and folders to their names. At every moment each name is absent or complete.

    Older outputs are removed before the first new one is moved, so that all outputs are from the same run.

    Args:
        staged: their temporary paths.
        targets: their final paths, on the same file system.
        place: the folder of ``staged``; replaced outputs are moved there.
    """
    for path in staged:
        if path.is_file():
            sync_file(path)
    if any(path.is_dir() for path in staged):
        # Once, since a folder has a file for each frame.
        os.sync()
    for number, target in enumerate(targets):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            os.rename(target, place / f"old{number}")
    for path, target in zip(staged, targets, strict=True):
        os.rename(path, target)
        sync_folder(target.parent)


def output_digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of a line ``<SHA-256>  <name>`` for each file in it, sorted by name."""
    if path.is_file():
        return file_digest(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file_digest(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
