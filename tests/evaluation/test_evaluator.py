"""The streaming evaluator against the pure functions on whole videos."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from PIL import Image
from tree_fixtures import write_frame

from the_mask.data import register_video_tree
from the_mask.data.clips import Clip
from the_mask.data.io import apply_label_table, read_label_raw
from the_mask.evaluation import (
    VideoSemSegEvaluator,
    confusion_matrix,
    evaluate_predictions,
    iou_from_confusion,
    temporal_consistency,
)
from the_mask.evaluation.video_consistency import VideoConsistency, video_consistency
from the_mask.inference.sinks import LabelFolder

NAMES = ["sky", "road", "car", "tree"]
TABLE = [255, 0, 1, 2, 3, *[-1] * 250, 255]


@pytest.fixture(scope="module")
def dataset():
    name = "evaluator_toy"
    MetadataCatalog.get(name).set(
        stuff_classes=NAMES, stuff_colors=[[9, 9, 9]] * 4, ignore_label=255, label_table=TABLE
    )
    return name


@pytest.fixture(scope="module")
def sixteen_videos():
    """id -> (predictions, ground truth), uint8 [L, H, W]; sizes differ between videos."""
    rng = np.random.default_rng(5)
    videos = {}
    for number, length in enumerate((1, 2, 5, 8, 9, 12, 16, 17, 17, 18, 19, 20, 24, 30, 31, 40)):
        size = (4 + number % 3, 6)
        gt = np.repeat(rng.integers(0, 3, (1, *size)), length, axis=0)
        gt[rng.random(gt.shape) < 0.02] = 255
        pred = np.where((rng.random(gt.shape) < 0.02) | (gt == 255), rng.integers(0, 4, gt.shape), gt)
        videos[f"v{number:02d}"] = (pred.astype(np.uint8), gt.astype(np.uint8))
    return videos


def tiled(video_id, pred, gt, clip_length=1, stride=1, labelled=lambda index: True):
    """Clips of a video in blocks of clip_length*stride frames, the rest one by one, as (clip, maps)."""
    length, block = len(gt), clip_length * stride
    groups = []
    for start in range(0, length - block + 1, block):
        groups += [[start + i + k * stride for k in range(clip_length)] for i in range(stride)]
    groups += [[i] for i in range(length // block * block, length)]
    clips = []
    for group in groups:
        clip = Clip(
            video_id=video_id,
            frame_ids=[f"f{i:04d}" for i in group],
            file_names=[f"{video_id}/f{i:04d}.jpg" for i in group],
            frame_indices=group,
            labels=[torch.from_numpy(gt[i].astype(np.int64)) if labelled(i) else None for i in group],
            is_first=group is groups[0],
            is_last=group is groups[-1],
        )
        clips.append((clip, [torch.from_numpy(pred[i]) for i in group]))
    return clips


def run(evaluator, videos, clips_per_batch=3, **tiling):
    stream = [item for name, (pred, gt) in videos.items() for item in tiled(name, pred, gt, **tiling)]
    for start in range(0, len(stream), clips_per_batch):
        batch = stream[start : start + clips_per_batch]
        evaluator.process([clip for clip, _ in batch], [maps for _, maps in batch])
    return evaluator


def expected_figures(videos):
    confusion = sum(confusion_matrix(pred, gt, 4) for pred, gt in videos.values())
    report = iou_from_confusion(confusion)
    figures = {name: report[name] for name in ("mIoU", "mIoU_union", "fwIoU", "pACC", "mACC")}
    for mode, suffix in (("strict", ""), ("compat", "_compat")):
        meter = VideoConsistency((8, 16), mode)
        for pred, gt in videos.values():
            for p, g in zip(pred, gt, strict=True):
                meter.update(p, g)
            meter.end_video()
        figures |= {f"VC{n}{suffix}": value for n, value in meter.result().items()}
    return {name: 100 * value for name, value in figures.items()}


@pytest.mark.parametrize(("clip_length", "stride"), [(1, 1), (2, 3), (4, 3), (3, 1)])
def test_equals_the_pure_functions_in_any_tiling(dataset, sixteen_videos, clip_length, stride):
    evaluator = VideoSemSegEvaluator(dataset, max_pending=clip_length * stride)
    run(evaluator, sixteen_videos, clip_length=clip_length, stride=stride)
    frames = sum(len(gt) for _, gt in sixteen_videos.values())
    results = evaluator.evaluate(expected_frames=frames)["sem_seg"]
    for name, value in expected_figures(sixteen_videos).items():
        assert results[name] == pytest.approx(value, abs=1e-10), name
    assert 50 < results["VC8"] < 99
    assert math.isnan(results["IoU-tree"]) is False  # predicted, never true: a zero
    assert results["IoU-tree"] == 0
    assert "TC" not in results
    assert evaluator.totals.counts.videos == 16


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_give_the_bits_of_one(dataset, sixteen_videos, monkeypatch, world):
    whole = run(VideoSemSegEvaluator(dataset), sixteen_videos, clip_length=2, stride=3).evaluate()
    names = list(sixteen_videos)
    ranks = []
    for rank in range(world):
        share = {name: sixteen_videos[name] for name in names[rank::world]}
        ranks.append(run(VideoSemSegEvaluator(dataset), share, clip_length=2, stride=3))
    states = [evaluator.local_totals() for evaluator in ranks]
    monkeypatch.setattr(comm, "all_gather", lambda data, group=None: copy.deepcopy(states))
    for evaluator in ranks:
        assert str(evaluator.evaluate()) == str(whole)
        assert str(evaluator.evaluate()) == str(whole), "asking twice must not add twice"


def test_score_maps_are_understood(dataset, sixteen_videos):
    pred, gt = sixteen_videos["v08"]
    evaluator = VideoSemSegEvaluator(dataset)
    for clip, maps in tiled("v08", pred, gt):
        scores = [torch.nn.functional.one_hot(labels.long(), 4).permute(2, 0, 1).float() for labels in maps]
        evaluator.process([clip], [{"sem_seg": scores}])
    expected = expected_figures({"v08": (pred, gt)})
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == pytest.approx(expected["mIoU"])


def test_memory_is_bounded(dataset, sixteen_videos):
    pred, gt = sixteen_videos["v15"]
    evaluator = VideoSemSegEvaluator(dataset, max_pending=6)
    most = 0
    for clip, maps in tiled("v15", pred, gt, clip_length=2, stride=3):
        evaluator.process([clip], [maps])
        most = max(most, len(evaluator._video.early) if evaluator._video else 0)
    assert most <= 6
    evaluator = VideoSemSegEvaluator(dataset, max_pending=5)
    clips = tiled("v15", pred, gt)
    with pytest.raises(ValueError, match="frame 0 is still missing"):
        evaluator.process(*map(list, zip(*clips[1:8], strict=True)))


def test_saved_predictions_hold_raw_values(dataset, sixteen_videos, tmp_path):
    videos = {"v08": sixteen_videos["v08"]}
    sink = LabelFolder(tmp_path, [value + 1 for value in range(len(NAMES))])
    run(sink, videos)
    pred, _ = videos["v08"]
    files = sorted((tmp_path / "v08").iterdir())
    assert [file.name for file in files] == [f"f{i:04d}.png" for i in range(17)]
    for file, labels in zip(files, pred, strict=True):
        raw = read_label_raw(file)
        assert Image.open(file).mode == "L"
        assert (raw == labels + 1).all()
        assert (apply_label_table(raw, TABLE) == labels).all()


def test_more_than_256_raw_values_are_saved_in_16_bits(tmp_path):
    MetadataCatalog.get("evaluator_wide").set(
        stuff_classes=[f"c{i}" for i in range(300)], ignore_label=65535, label_table=list(range(300))
    )
    evaluator = VideoSemSegEvaluator("evaluator_wide")
    pred = np.full((1, 2, 2), 299, dtype=np.int32)
    gt = np.array([[[299, 65535], [255, 299]]], dtype=np.int32)
    for sink in (evaluator, LabelFolder(tmp_path, list(range(300)))):
        run(sink, {"v": (pred, gt)})
    assert (read_label_raw(tmp_path / "v" / "f0000.png") == 299).all()
    assert evaluator.evaluate()["sem_seg"]["pACC"] == pytest.approx(200 / 3)


def test_temporal_consistency_reads_the_frames(dataset, tmp_path):
    rng = np.random.default_rng(0)
    pred = rng.integers(0, 4, (2, 3, 8, 9)).astype(np.uint8)
    images = rng.integers(0, 256, (2, 3, 8, 9, 3)).astype(np.uint8)

    def flow(first, second):
        return np.ones((8, 9, 2)) * (first[0, 0, 0] % 3)

    for v in range(2):
        for i in range(3):
            (tmp_path / f"v{v}").mkdir(exist_ok=True)
            Image.fromarray(images[v, i]).save(tmp_path / f"v{v}" / f"f{i:04d}.png")

    def score(tc_videos):
        evaluator = VideoSemSegEvaluator(dataset, flow=flow, tc_videos=tc_videos)
        for v in range(2):
            for clip, maps in tiled(f"v{v}", pred[v], pred[v]):
                files = [str(tmp_path / f"v{v}" / f"{f}.png") for f in clip.frame_ids]
                evaluator.process([replace(clip, file_names=files)], [maps])
        return evaluator.evaluate()["sem_seg"]["TC"]

    assert score({"v0"}) == pytest.approx(100 * temporal_consistency(images[0], pred[0], 4, flow))
    assert score({"v1"}) == pytest.approx(100 * temporal_consistency(images[1], pred[1], 4, flow))
    assert score(None) not in (score({"v0"}), score({"v1"}))


def test_frames_without_labels_cut_windows_and_are_counted(dataset):
    maps = np.zeros((20, 2, 2), dtype=np.uint8)
    evaluator = VideoSemSegEvaluator(dataset)
    for clip, prediction in tiled("v", maps, maps, labelled=lambda index: index != 9):
        evaluator.process([clip], [prediction])
    evaluator.evaluate()
    counts = evaluator.totals.counts
    assert (counts.videos, counts.frames, counts.frames_without_labels) == (1, 20, 1)
    # Frames 0..8 hold 2 windows of 8, frames 10..19 hold 3.
    assert evaluator.totals.consistency["strict"].totals[8].windows == 5
    assert evaluator.totals.consistency["strict"].totals[16].windows == 0


def test_void_only_video_is_counted_and_leaves_nan(dataset):
    gt = np.full((3, 2, 2), 255, dtype=np.uint8)
    evaluator = run(VideoSemSegEvaluator(dataset), {"v": (np.zeros_like(gt), gt)})
    results = evaluator.evaluate()["sem_seg"]
    assert math.isnan(results["mIoU"])
    assert evaluator.totals.counts.frames_without_labelled_pixels == 3


def test_size_change_inside_a_video_starts_new_windows(dataset, caplog):
    evaluator = VideoSemSegEvaluator(dataset)
    for index in range(18):
        labels = np.zeros((2, 2 + index // 9), dtype=np.uint8)
        clip = {
            "video_id": "v", "frame_ids": [str(index)], "file_names": ["x"], "frame_indices": [index],
            "labels": [labels], "is_last": index == 17,
        }  # fmt: skip
        evaluator.process([clip], [[labels]])
    assert evaluator.evaluate()["sem_seg"]["pACC"] == 100
    assert evaluator.totals.consistency["strict"].totals[8].windows == 4
    assert "size changes" in caplog.text


def test_without_windows_there_is_no_vc(dataset, sixteen_videos):
    results = run(VideoSemSegEvaluator(dataset, windows=()), sixteen_videos).evaluate()["sem_seg"]
    assert "mIoU" in results
    assert not [name for name in results if name.startswith("VC")]


def test_lost_and_repeated_frames_are_errors(dataset, sixteen_videos):
    clips = tiled("v05", *sixteen_videos["v05"])
    evaluator = VideoSemSegEvaluator(dataset)
    for clip, maps in clips[:3] + clips[4:-1]:
        evaluator.process([clip], [maps])
    with pytest.raises(ValueError, match=r"video v05 ended without a prediction for frames \[3\]"):
        evaluator.evaluate()
    evaluator.reset()
    evaluator.process([clips[0][0]], [clips[0][1]])
    with pytest.raises(ValueError, match=r"frame 0 \(f0000\) is predicted twice"):
        evaluator.process([clips[0][0]], [clips[0][1]])
    with pytest.raises(ValueError, match="has 12 frames, but 1 were predicted"):
        evaluator.evaluate(expected_frames=12)


def test_bad_predictions_name_the_frame(dataset, sixteen_videos):
    clip, maps = tiled("v05", *sixteen_videos["v05"])[0]
    evaluator = VideoSemSegEvaluator(dataset)
    with pytest.raises(ValueError, match=r"video v05: 2 label maps for a clip of 1 frames"):
        evaluator.process([clip], [maps * 2])
    with pytest.raises(ValueError, match=r"frame f0000 .*prediction has shape"):
        evaluator.process([clip], [[maps[0][:-1]]])
    evaluator.reset()
    with pytest.raises(ValueError, match=r"v05/f0000\.jpg.*illegal class ids 200"):
        evaluator.process([clip], [[np.full(maps[0].shape, 200)]])
    with pytest.raises(ValueError, match="2 clips, but predictions for 1"):
        evaluator.process([clip, clip], [maps])


def test_report_is_logged(dataset, sixteen_videos, caplog):
    caplog.set_level("INFO")
    run(VideoSemSegEvaluator(dataset), sixteen_videos).evaluate()
    for words in ("16 videos", "VC16_compat", "TC: not computed", "leaves out 7 videos", "road"):
        assert words in caplog.text


def test_vc_of_vspw_reads_the_stored_values(tmp_path):
    """0 and 255 are both ignored, so train ids do not tell them apart; the masks are read again."""
    rng = np.random.default_rng(3)
    raw = np.where(rng.random((20, 6, 8)) < 0.97, 0, 255).astype(np.uint8)
    raw[:, :, 4:] = np.where(rng.random((20, 6, 4)) < 0.99, 1, 2)
    pred = (rng.random((20, 6, 8)) < 0.03).astype(np.uint8)
    for index in range(20):
        write_frame(tmp_path / "root/val/v", f"{index:02d}", np.zeros((6, 8, 3)), raw[index])
        path = tmp_path / f"out/v/{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pred[index]).save(path)
    register_video_tree("stored_values", tmp_path / "root", "val", ["one", "two"], {0: 255, 1: 0, 2: 1, 255: 255})
    figures = evaluate_predictions(tmp_path / "out", "stored_values", train_ids=True, progress=False)["sem_seg"]
    ids = np.where((raw == 0) | (raw == 255), 255, raw - 1)
    for n in (8, 16):
        assert figures[f"VC{n}_compat"] == pytest.approx(100 * video_consistency(pred, ids, n, "compat"))
        expected = video_consistency(pred, raw, n, "compat-vspw")
        assert expected != pytest.approx(video_consistency(pred, ids, n, "compat-vspw"), abs=1e-5)
        assert figures[f"VC{n}_compat-vspw"] == pytest.approx(100 * expected)
