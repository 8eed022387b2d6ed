"""The prediction loop: every prediction to every sink, in order, whatever predicts."""

import contextlib
import itertools
import os

import numpy as np
import pytest
import torch
from PIL import Image
from tree_fixtures import write_frame

from the_mask.data import get_records, register_video_tree
from the_mask.data.clips import Clip
from the_mask.evaluation.loop import feed, stream_videos, unlabelled
from the_mask.inference.sinks import LabelFolder, Sink
from the_mask.modeling.freezing import evaluation_mode
from the_mask.modeling.stream import NO_HINTS, Stream

NAME = "loop_toy"
LENGTHS = {"a": 2, "b": 3}


class Counting(Stream):
    """A label map full of the number of the frame since the stream's start; keeps the names it was told."""

    num_classes = 5

    def __init__(self):
        self.names = []

    def init_state(self):
        return self.new_state()

    def step(self, frame, state, hints=NO_HINTS):
        assert not torch.is_grad_enabled()
        self.names.append(hints.name)
        labels = torch.full(frame.shape[:2], state["seen"], dtype=torch.uint8)
        return labels, {**self.continue_state(state, frame.shape[:2]), "seen": state["seen"] + 1}


class Recording(Sink):
    def __init__(self, log, name):
        self.log, self.name, self.closed = log, name, False

    def process(self, clips, predictions):
        for clip, maps in zip(clips, predictions, strict=True):
            for frame, labels, truth in zip(clip.frame_ids, maps, clip.labels, strict=True):
                known = None if truth is None else int(np.asarray(truth).max())
                self.log.append((self.name, clip.video_id, frame, int(labels.max()), known))

    def close(self):
        assert not self.closed
        self.closed = True


class Meter:
    frames = 0

    def update(self, count):
        self.frames += count


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for video, length in LENGTHS.items():
        for index in range(length):
            write_frame(root / "val" / video, f"{index:02d}", np.zeros((8, 9, 3)), np.full((8, 9), index + 1))
    register_video_tree(NAME, root, "val", [f"c{i}" for i in range(5)])
    return get_records(NAME)


def test_all_predictions_reach_all_sinks_in_order(records):
    stream, log, meter, ticks = Counting(), [], Meter(), []

    @contextlib.contextmanager
    def clock():
        ticks.append("in")
        yield

    sinks = [Recording(log, "first"), Recording(log, "second")]
    assert feed(stream_videos(stream, records, clock), sinks, meter) == meter.frames == 5
    frames = [(video, f"{index:02d}", index) for video, length in LENGTHS.items() for index in range(length)]
    assert log == [(sink, video, name, i, i + 1) for video, name, i in frames for sink in ("first", "second")]
    assert stream.names == [(video, name) for video, name, _ in frames]
    assert len(ticks) == 5
    assert all(sink.closed for sink in sinks)


def test_sinks_are_closed_after_an_error(records):
    def broken():
        yield from itertools.islice(stream_videos(Counting(), records), 2)
        raise ValueError("no more")

    sink = Recording([], "x")
    with pytest.raises(ValueError, match="no more"):
        feed(broken(), [sink])
    assert len(sink.log) == 2
    assert sink.closed


def test_without_ground_truth_no_mask_is_read(records):
    log = []
    feed(stream_videos(Counting(), unlabelled(records)), [Recording(log, "x")])
    assert [truth for *_, truth in log] == [None] * 5


def test_pngs(records, tmp_path):
    feed(stream_videos(Counting(), records), [LabelFolder(tmp_path, [7, 8, 9, 10, 11])])
    for video, length in LENGTHS.items():
        for index in range(length):
            assert (np.array(Image.open(tmp_path / video / f"{index:02d}.png")) == 7 + index).all()
    with pytest.raises(ValueError, match=r"\.\."):
        LabelFolder(tmp_path, [0]).process([Clip(video_id="..", frame_ids=["x"])], [[np.zeros((2, 2), np.uint8)]])


def test_modes_are_restored_after_an_error():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Dropout()).train()
    model[0].eval()
    with pytest.raises(KeyError), evaluation_mode(model):  # noqa: PT012
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, False, True]


@pytest.mark.parametrize(("flush", "files", "disks"), [("each", 6, 0), ("close", 0, 1), ("never", 0, 0)])
def test_when_label_maps_wait_for_the_disk(tmp_path, monkeypatch, flush, files, disks):
    calls = {"fsync": 0, "sync": 0}
    for name in calls:
        monkeypatch.setattr(os, name, lambda *_, name=name: calls.update({name: calls[name] + 1}))
    sink = LabelFolder.of_video(tmp_path, 2, flush=flush)
    for number in range(3):
        sink.process([Clip(frame_ids=[str(number)])], [[np.zeros((2, 2), np.uint8)]])
    assert calls == {"fsync": files, "sync": 0}  # a file and its folder
    sink.close()
    assert calls["sync"] == disks
