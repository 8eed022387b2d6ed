"""evaluate_dataset with small fake models on a small tree."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn
from tree_fixtures import write_frame

import the_mask.modeling  # noqa: F401  fills the registries
from the_mask.config import load_config
from the_mask.data import register_video_tree
from the_mask.data.io import read_label, read_label_raw
from the_mask.engine import launch
from the_mask.evaluation import evaluate, evaluate_dataset, loop, progress, video_consistency
from the_mask.modeling.stream import NO_HINTS, Stream

NAME = "evaluate_toy"
LENGTHS = {"a": 7, "b": 20}
SIZE = (20, 30)


class Oracle(nn.Module):
    """Predicts from the picture: the grey level tells the class. Frozen part in eval mode, the rest training."""

    def __init__(self):
        super().__init__()
        self.free, self.frozen = nn.Dropout(), nn.Sequential(nn.BatchNorm2d(1))
        self.calls = []
        self.frozen.eval()

    def predict(self, clips):
        assert not any(module.training for module in self.modules())
        self.calls.append([clip.frame_indices for clip in clips])
        return [[self.label(frame, clip) for frame in clip.frames] for clip in clips]

    @staticmethod
    def label(frame, clip):
        small = torch.nn.functional.interpolate(frame[None].float(), (clip.height, clip.width), mode="nearest")
        return (small[0, 0] / 80).round().clamp(0, 2).to(torch.uint8)


class Remembering(Stream):
    """The streaming twin of Oracle; remembers the frames of the running video."""

    def __init__(self):
        self.videos = []

    def init_state(self):
        self.videos.append(0)
        return self.new_state()

    def step(self, frame, state, hints=NO_HINTS):
        self.videos[-1] += 1
        assert state["seen"] == self.videos[-1] - 1
        labels = torch.from_numpy(np.round(frame[..., 0] / 80).clip(0, 2).astype(np.uint8))
        return labels, {**state, "seen": state["seen"] + 1}


@pytest.fixture
def cfg(tmp_path):
    rng = np.random.default_rng(0)
    for video, length in LENGTHS.items():
        labels = np.kron(rng.integers(0, 3, (4, 5)), np.ones((5, 6), dtype=np.int64))
        for index in range(length):
            labels = np.where(rng.random(SIZE) < 0.01, rng.integers(0, 3, SIZE), labels)
            write_frame(tmp_path / "set" / "val" / video, f"{index:02d}", labels * 80, labels)
    register_video_tree(NAME, tmp_path / "set", "val", ["one", "two", "three"])
    return make_config()


def make_config():
    options = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "DATASETS.TEST", (NAME,), "DATALOADER.NUM_WORKERS", 0]
    options += ["INPUT.TEST.LONG_EDGE", 0, "INPUT.TEST.SHORT_EDGE", 0, "INPUT.TEST.SIZE_MULTIPLE", 1]
    return load_config(None, options)


def test_figures_equal_the_pure_functions(cfg, tmp_path):
    root = tmp_path / "set" / "val"
    results = evaluate_dataset(cfg, Oracle(), NAME)["sem_seg"]
    assert results["mIoU"] == 100
    truth = {v: np.stack([read_label(root / v / "mask" / f"{i:02d}.png", range(3)) for i in range(n)])
             for v, n in LENGTHS.items()}  # fmt: skip
    assert results["VC16"] == pytest.approx(100 * video_consistency(truth["b"], truth["b"], 16))


@pytest.mark.parametrize(("length", "stride", "batch"), [(1, 1, 4), (2, 3, 1), (2, 3, 3), (4, 2, 2)])
def test_tilings_and_batches_change_nothing(cfg, length, stride, batch):
    reference = evaluate_dataset(cfg, Oracle(), NAME)
    cfg.TEST.CLIP_LENGTH, cfg.TEST.CLIP_STRIDE, cfg.TEST.CLIPS_PER_BATCH = length, stride, batch
    model = Oracle()
    assert evaluate_dataset(cfg, model, NAME) == reference
    assert max(len(call) for call in model.calls) == batch


def test_streaming_gives_the_same_and_resets_for_each_video(cfg, monkeypatch):
    reference = evaluate_dataset(cfg, Oracle(), NAME)
    stream = Remembering()
    monkeypatch.setattr(loop, "build_stream", lambda cfg, model, names: stream)
    cfg.TEST.STREAMING = True
    assert evaluate_dataset(cfg, Oracle(), NAME) == reference
    assert stream.videos == list(LENGTHS.values())


def test_the_real_stream_gives_what_the_real_model_gives_on_single_frames(cfg):
    debug = load_config(Path(__file__).parents[2] / "configs" / "debug" / "the_mask_debug_1f.yaml")
    debug.merge_from_list(["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "DATASETS.TEST", (NAME,), "MODEL.DEVICE", "cpu"])
    debug.merge_from_list(["INPUT.TEST.LONG_EDGE", 96, "INPUT.TEST.SHORT_EDGE", 64])
    torch.manual_seed(0)
    model = build_model(debug)
    tiled = evaluate_dataset(debug, model, NAME)
    debug.TEST.STREAMING = True
    assert str(evaluate_dataset(debug, model, NAME)) == str(tiled)
    assert 0 < tiled["sem_seg"]["pACC"] < 100


def evaluate_in_a_process(root, path):
    """What each of two processes runs: register the data again, evaluate, leave the figures in a file."""
    register_video_tree(NAME, root / "set", "val", ["one", "two", "three"])
    results = evaluate_dataset(make_config(), Oracle(), NAME)
    (path / f"{comm.get_rank()}.txt").write_text(str(results))


@pytest.mark.slow
def test_two_real_processes_equal_one(cfg, tmp_path):
    launch(evaluate_in_a_process, (tmp_path, tmp_path), num_processes=2)
    expected = str(evaluate_dataset(cfg, Oracle(), NAME))
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [expected] * 2


def test_predictions_are_saved(cfg, tmp_path):
    cfg.TEST.SAVE_PREDICTIONS = str(tmp_path / "out")
    evaluate_dataset(cfg, Oracle(), NAME)
    for video, length in LENGTHS.items():
        files = sorted((tmp_path / "out" / video).iterdir())
        assert len(files) == length
        truth = read_label_raw(tmp_path / "set" / "val" / video / "mask" / "03.png")
        assert (read_label_raw(files[3]) == truth).all()


def test_a_report_is_saved(cfg, tmp_path):
    pytest.importorskip("jinja2")
    cfg.OUTPUT_DIR = str(tmp_path / "run7")
    cfg.TEST.SAVE_REPORT = str(tmp_path / "new" / "report.html")
    figures = evaluate_dataset(cfg, Oracle(), NAME)["sem_seg"]
    page = (tmp_path / "new" / "report.html").read_text()
    assert "run7" in page
    assert f"{figures['mIoU']:.2f}" in page
    for video in LENGTHS:
        assert video in page


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_restored_even_after_an_error(cfg, fails):
    model = Oracle()
    if fails:
        model.predict = lambda clips: [][0]
        with pytest.raises(IndexError):
            evaluate_dataset(cfg, model, NAME)
    else:
        evaluate_dataset(cfg, model, NAME)
    assert model.training
    assert model.free.training
    assert not model.frozen.training
    assert not model.frozen[0].training


def test_wrapped_model(cfg):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert evaluate_dataset(cfg, Wrapper(Oracle()), NAME)["sem_seg"]["mIoU"] == 100


def test_wrong_number_of_classes(cfg):
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
    with pytest.raises(ValueError, match=r"NUM_CLASSES|classes"):
        evaluate_dataset(cfg, Oracle(), NAME)


def test_temporal_consistency_from_config(cfg, tmp_path, monkeypatch):
    cfg.TEST.TC_FLOW_WEIGHTS = str(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        evaluate_dataset(cfg, Oracle(), NAME)
    pairs = []

    def flow(first, second):
        pairs.append(first.shape)
        return np.zeros((*first.shape[:2], 2))

    monkeypatch.setattr(evaluate, "raft_flow", lambda path, device: flow)
    results = evaluate_dataset(cfg, Oracle(), NAME)["sem_seg"]
    assert 50 < results["TC"] < 100
    assert len(pairs) == sum(LENGTHS.values()) - len(LENGTHS)
    pairs.clear()
    cfg.TEST.TC_MAX_VIDEOS = 1
    evaluate_dataset(cfg, Oracle(), NAME)
    assert len(pairs) == LENGTHS["a"] - 1


def test_time_per_frame_is_logged(cfg, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    evaluate_dataset(cfg, Oracle(), NAME)
    assert f"{NAME}: 27 frames in" in caplog.text
    assert "s/frame" in caplog.text
    assert "5/27 frames" in caplog.text
