"""Loaders: one stream whatever the workers, ranks and resumes; whole videos at test time; errors keep the file name."""

import itertools
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from PIL import Image

from the_mask.data import build_test_loader, build_train_loader, get_records
from the_mask.data.build import PackedRecords, TrainClips
from the_mask.data.mapper import ClipMapper
from the_mask.data.samplers import SampleKey, SampleStream


def take(loader, count):
    return list(itertools.islice(loader, count))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert (a.seed, a.video_id, a.frame_ids) == (b.seed, b.video_id, b.frame_ids)
        assert all(torch.equal(x, y) for x, y in zip(a.frames, b.frames))
        assert all(torch.equal(x, y) for x, y in zip(a.labels, b.labels))


def flat(batches):
    return [clip for batch in batches for clip in batch]


@pytest.fixture
def ranks(monkeypatch):
    """``ranks(rank, world)`` pretends to be one process of many."""

    def pretend(rank, world):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world)

    return pretend


def test_batches(make_tree, clip_cfg):
    name = make_tree("load_batches", {"a": 3, "b": 4, "c": 5})
    (batch,) = take(build_train_loader(clip_cfg(name)), 1)
    assert len(batch) == 4
    for clip in batch:
        assert [x.shape for x in clip.frames] == [(3, 20, 28)] * 2
        assert [x.shape for x in clip.labels] == [(20, 28)] * 2
        assert set(torch.cat([x.unique() for x in clip.labels]).tolist()) <= {0, 1, 2, 255}
    assert len({clip.seed for clip in batch}) == 4


def test_an_epoch_visits_each_item_once(make_tree, clip_cfg):
    name = make_tree("load_epoch", {"a": 3, "b": 4, "c": 5})
    videos = [c.video_id for c in flat(take(build_train_loader(clip_cfg(name)), 3))]
    assert all(sorted(videos[i : i + 3]) == ["a", "b", "c"] for i in range(0, 12, 3))
    loader = build_train_loader(clip_cfg(name, "INPUT.CLIP.ITEM", "frame"))
    assert loader.num_items == 12
    seen = [(c.video_id, c.frame_ids[c.reference]) for c in flat(take(loader, 3))]
    assert len(set(seen)) == 12


def test_worker_processes_change_nothing(make_tree, clip_cfg):
    name = make_tree("load_workers", {"a": 3, "b": 4, "c": 5})
    alone = take(build_train_loader(clip_cfg(name)), 5)
    helped = take(build_train_loader(clip_cfg(name, "DATALOADER.NUM_WORKERS", 2)), 5)
    assert_same(flat(alone), flat(helped))


def test_resuming_continues_the_stream_and_keeps_global_generators(make_tree, clip_cfg):
    name = make_tree("load_resume", {"a": 3, "b": 4, "c": 5})
    before = torch.get_rng_state()
    whole = take(build_train_loader(clip_cfg(name)), 6)
    assert torch.equal(before, torch.get_rng_state())
    assert_same(flat(whole[4:]), flat(take(build_train_loader(clip_cfg(name), start_iter=4), 2)))


def test_ranks_and_accumulation_share_one_stream(make_tree, clip_cfg, ranks):
    name = make_tree("load_ranks", {"a": 3, "b": 4, "c": 5})
    whole = flat(take(build_train_loader(clip_cfg(name)), 2))
    halves = []
    for rank in range(2):
        ranks(rank, 2)
        micro = take(build_train_loader(clip_cfg(name, "SOLVER.ACCUM_STEPS", 2)), 4)
        assert [len(batch) for batch in micro] == [1] * 4
        halves.append(flat(micro))
    assert_same(whole, halves[0][:2] + halves[1][:2] + halves[0][2:] + halves[1][2:])
    with pytest.raises(ValueError, match="IMS_PER_BATCH 3"):
        build_train_loader(clip_cfg(name, "SOLVER.IMS_PER_BATCH", 3))


def test_seeds(make_tree, clip_cfg):
    name = make_tree("load_seeds", {"a": 3, "b": 4, "c": 5})
    one, two = (flat(take(build_train_loader(clip_cfg(name, "SEED", s)), 1)) for s in (1, 2))
    assert [c.seed for c in one] != [c.seed for c in two]
    assert_same(one, flat(take(build_train_loader(clip_cfg(name, "SEED", 9), seed=1), 1)))
    assert len(take(build_train_loader(clip_cfg(name, "SEED", -1)), 1)[0]) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_keep_the_file_name(make_tree, clip_cfg, tmp_path, workers):
    name = make_tree(f"load_errors_{workers}", {"a": 1})
    (tmp_path / name / "data" / "a" / "origin" / "000.png").write_bytes(b"junk")
    loader = build_train_loader(clip_cfg(name, "DATALOADER.NUM_WORKERS", workers))
    with pytest.raises(ValueError, match=r"a.origin.000\.png cannot be read"):
        take(loader, 1)


def test_datasets_are_concatenated_when_their_classes_agree(make_tree, clip_cfg):
    first, second = make_tree("load_one", {"a": 2}), make_tree("load_two", {"b": 2}, table=[0, 1, 2, 255], seed=1)
    for frame in get_records(second)[0]["frames"]:
        Image.fromarray(np.array(Image.open(frame["sem_seg_file_name"])) % 3).save(frame["sem_seg_file_name"])
    batch = flat(take(build_train_loader(clip_cfg(first, "DATASETS.TRAIN", (first, second))), 1))
    assert {clip.dataset for clip in batch} == {first, second}
    other = make_tree("load_other", {"a": 1}, classes=["x", "y", "z"])
    with pytest.raises(ValueError, match=r"load_one \(3 classes\) and load_other \(3 classes\) have different"):
        build_train_loader(clip_cfg(first, "DATASETS.TRAIN", (first, other)))


def test_mismatches_between_data_and_model_are_found_early(make_tree, clip_cfg):
    name = make_tree("load_model", {"a": 1})
    with pytest.raises(ValueError, match=r"3 classes, but MODEL\.SEM_SEG_HEAD\.NUM_CLASSES is 54"):
        build_train_loader(clip_cfg(name, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 54))
    with pytest.raises(ValueError, match=r"ignores label 255, but .*IGNORE_VALUE is 254"):
        build_test_loader(clip_cfg(name, "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 254), name)
    with pytest.raises(ValueError, match="unknown data set 'load_modle'"):
        build_train_loader(clip_cfg("load_modle"))
    with pytest.raises(ValueError, match="no data set given"):
        build_train_loader(clip_cfg(name, "DATASETS.TRAIN", ()))
    with pytest.raises(ValueError, match="CLIPS_PER_BATCH 0"):
        build_test_loader(clip_cfg(name, "TEST.CLIPS_PER_BATCH", 0), name)
    with pytest.raises(ValueError, match="expected one of video, frame"):
        build_train_loader(clip_cfg(name, "INPUT.CLIP.ITEM", "image"))
    DatasetCatalog.register("load_bare", lambda: [{}])
    with pytest.raises(ValueError, match="load_bare has no stuff_classes"):
        build_test_loader(clip_cfg(name), "load_bare")


def test_drop_refuses_short_videos_at_once(make_tree, clip_cfg):
    name = make_tree("load_drop", {"long": 5, "short": 2})
    cfg = clip_cfg(name, "INPUT.CLIP.DILATIONS", [-3], "INPUT.CLIP.BOUNDARY", "drop")
    with pytest.raises(ValueError, match="video short of load_drop has 2 frames, too few"):
        build_train_loader(cfg)
    name = make_tree("load_drop_ok", {"long": 5})
    cfg = clip_cfg(name, "INPUT.CLIP.DILATIONS", [-3], "INPUT.CLIP.BOUNDARY", "drop", "INPUT.CLIP.ITEM", "frame")
    loader = build_train_loader(cfg)
    assert loader.num_items == 2
    assert {abs(a - b) for clip in flat(take(loader, 3)) for a, b in [clip.frame_indices]} == {3}


def void(root, video):
    for path in (root / "data" / video / "mask").iterdir():
        Image.fromarray(np.zeros((24, 40), np.uint8)).save(path)


def test_clips_without_labels_are_replaced_and_counted(make_tree, clip_cfg, tmp_path, caplog):
    name = make_tree("load_void", {"empty": 2, "full": 2})
    void(tmp_path / name, "empty")
    loader = build_train_loader(clip_cfg(name))
    with caplog.at_level(logging.WARNING, logger="the_mask"):
        clips = flat(take(loader, 4))
    assert {clip.video_id for clip in clips} == {"full"}
    assert loader.resampled == sum(clip.resampled for clip in clips) >= 8
    stream = SampleStream(2, seed=3)
    assert [clip.seed for clip in clips] == [stream[p].seed for p in range(16)]
    assert len([r for r in caplog.records if "only ignored pixels" in r.message]) == 1
    assert_same(clips, flat(take(build_train_loader(clip_cfg(name)), 4)))


def test_a_set_without_any_label_is_an_error_not_a_hang(make_tree, clip_cfg, tmp_path):
    name = make_tree("load_all_void", {"a": 1, "b": 1})
    for video in ("a", "b"):
        void(tmp_path / name, video)
    with pytest.raises(ValueError, match=r"50 clips in a row hold only ignored pixels.*load_all_void.*mask.000\.png"):
        take(build_train_loader(clip_cfg(name)), 1)


def test_videos_without_masks_are_reported_once(make_tree, clip_cfg, tmp_path, caplog):
    name = make_tree("load_unlabelled", {"a": 2, "b": 2}, require_labels=False)
    for path in list((tmp_path / name / "data" / "b" / "mask").iterdir()):
        path.unlink()
    with caplog.at_level(logging.WARNING, logger="the_mask"):
        loader = build_train_loader(clip_cfg(name))
    assert loader.num_items == 1
    assert "1 of 2 videos have no usable labelled frame: ['b']" in caplog.text
    for path in (tmp_path / name / "data" / "a" / "mask").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no labelled frame"):
        build_train_loader(clip_cfg(name))


def test_test_loader_gives_whole_videos_in_order(make_tree, clip_cfg):
    name = make_tree("load_test", {"a": 9, "b": 1, "c": 6})
    cfg = clip_cfg(name, "TEST.CLIP_LENGTH", 2, "TEST.CLIP_STRIDE", 3, "TEST.CLIPS_PER_BATCH", 2)
    batches = list(build_test_loader(cfg, name))
    for batch in batches:
        assert len(batch) <= 2
        assert len({(c.video_id, len(c.frames)) for c in batch}) == 1
    clips = flat(batches)
    assert [(c.video_id, c.frame_indices) for c in clips] == [
        ("a", (0, 3)), ("a", (1, 4)), ("a", (2, 5)), ("a", (6, 7)), ("a", (8,)), ("b", (0,)),
        ("c", (0, 3)), ("c", (1, 4)), ("c", (2, 5)),
    ]  # fmt: skip
    assert [c.video_id for c in clips if c.is_first] == ["a", "b", "c"]
    assert [c.frame_indices for c in clips if c.is_last] == [(8,), (0,), (2, 5)]
    assert all(c.labels[0].shape == (24, 40) == (c.height, c.width) for c in clips)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_test_loader_shards_by_video(make_tree, clip_cfg, ranks, world):
    lengths = {"a": 5, "b": 1, "c": 3, "d": 3}
    name = make_tree(f"load_shards_{world}", lengths)
    owners: dict[str, set[int]] = {}
    frames: list[tuple[str, int]] = []
    for rank in range(world):
        ranks(rank, world)
        for clip in flat(build_test_loader(clip_cfg(name, "TEST.CLIP_LENGTH", 2), name)):
            owners.setdefault(clip.video_id, set()).add(rank)
            frames += [(clip.video_id, i) for i in clip.frame_indices]
    assert all(len(who) == 1 for who in owners.values())
    assert sorted(frames) == sorted((v, i) for v, length in lengths.items() for i in range(length))


def test_packed_records_unpack():
    records = [{"video_id": str(i), "frames": [{"x": i}] * i} for i in range(5)]
    packed = PackedRecords(records)
    assert len(packed) == 5
    assert [packed[i] for i in range(5)] == records


def test_a_sample_can_be_asked_for_directly(make_tree, clip_cfg):
    name = make_tree("load_direct", {"a": 2})
    data = TrainClips(get_records(name), ClipMapper.from_config(clip_cfg(name), True, [name]))
    clip = data[SampleKey(item=0, seed=11, position=0)]
    assert (clip.seed, clip.resampled) == (11, 0)
