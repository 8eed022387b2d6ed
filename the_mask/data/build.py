"""Loaders: endless training batches, and test clips of whole videos. Both yield lists of clips."""

from __future__ import annotations

import itertools
import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from the_mask.config.keys.input import ITEM_KINDS
from the_mask.data.class_names import check_classes
from the_mask.data.class_pixels import warn_about_classes
from the_mask.data.clips import Clip, tile_video, valid_references
from the_mask.data.mapper import ClipMapper
from the_mask.data.registry import Record, get_records
from the_mask.data.samplers import SampleKey, TrainBatchSampler, derive_seed, shard_videos

MAX_RESAMPLES = 50
logger = logging.getLogger(__name__)


class PackedRecords:
    """Records kept as one byte array, so that worker processes share the memory."""

    def __init__(self, records: Sequence[Record]) -> None:
        blobs = [pickle.dumps(record, protocol=-1) for record in records]
        self._ends = np.cumsum([len(blob) for blob in blobs])
        self._bytes = np.frombuffer(b"".join(blobs), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        start = self._ends[index - 1] if index else 0
        return pickle.loads(self._bytes[start : self._ends[index]].tobytes())


class TrainClips(Dataset[Clip]):
    """Training clips by sample key. A clip without any label is replaced by one of another item, counted in
    ``resampled``; which one depends on the sample's seed only.
    """

    def __init__(self, records: Sequence[Record], mapper: ClipMapper, item: str = "video") -> None:
        """
        Args:
            records: the videos.
            mapper: training mapper.
            item: ``video`` (an item is a random clip of a video) or ``frame`` (the clip around one labelled frame).

        Raises:
            ValueError: unknown ``item``; under boundary ``drop`` a video too short for the clip; no labelled frame.
        """
        if item not in ITEM_KINDS:
            raise ValueError(f"INPUT.CLIP.ITEM {item!r}: expected one of {', '.join(ITEM_KINDS)}")
        self.mapper = mapper
        self.items: list[tuple[int, int | None]] = []
        for number, record in enumerate(records):
            length = len(record["frames"])
            pseudo = mapper.is_pseudo(record)
            if mapper.boundary == "drop" and not pseudo and not valid_references(mapper.dilations, length):
                raise ValueError(
                    f"video {record['video_id']} of {record['dataset']} has {length} frames, too few for a clip with "
                    f"offsets {mapper.offsets} under INPUT.CLIP.BOUNDARY drop; use clamp"
                    + (", or INPUT.PSEUDO_CLIP for data sets of images" if length == 1 else "")
                )
            if item == "frame":
                self.items += [(number, i) for i in self._frame_items(record)]
            elif mapper.references(record):
                self.items.append((number, None))
        used = {number for number, _ in self.items}
        if len(used) < len(records):
            skipped = [record["video_id"] for number, record in enumerate(records) if number not in used]
            logger.warning(
                "%d of %d videos have no usable labelled frame: %s", len(skipped), len(records), skipped[:10]
            )
        if not self.items:
            raise ValueError("the training data hold no labelled frame")
        self.records = PackedRecords(records)

    def _frame_items(self, record: Record) -> list[int]:
        if self.mapper.boundary == "drop":
            return self.mapper.references(record)
        return [i for i, frame in enumerate(record["frames"]) if frame["sem_seg_file_name"] is not None]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: SampleKey) -> Clip:
        item, seed = key.item, key.seed
        for attempt in range(MAX_RESAMPLES):
            video, reference = self.items[item]
            clip = self.mapper(self.records[video], seed, reference)
            if clip is not None:
                return replace(clip, seed=key.seed, resampled=attempt)
            seed = derive_seed(key.seed, 2, attempt)
            item = seed % len(self.items)
        record = self.records[self.items[key.item][0]]
        raise ValueError(
            f"{MAX_RESAMPLES} clips in a row hold only ignored pixels, the first in video {record['video_id']} of "
            f"{record['dataset']} ({record['frames'][0]['sem_seg_file_name']}, ...); check masks and label table"
        )


class TestClips(Dataset[Clip]):
    """Test clips of some videos in order. Each video is tiled so that every frame is predicted once."""

    __test__ = False  # not a test class

    def __init__(
        self, records: Sequence[Record], mapper: ClipMapper, videos: Sequence[int], clip_length: int, stride: int
    ) -> None:
        self.mapper = mapper
        self.records = PackedRecords(records)
        self.clips: list[tuple[int, tuple[int, ...], bool, bool]] = []
        for video in videos:
            tiles = tile_video(len(records[video]["frames"]), clip_length, stride)
            self.clips += [(video, tile, i == 0, i == len(tiles) - 1) for i, tile in enumerate(tiles)]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Clip:
        video, tile, is_first, is_last = self.clips[index]
        return self.mapper.test_clip(self.records[video], tile, is_first, is_last)

    def batches(self, clips_per_batch: int) -> list[list[int]]:
        """Indices of consecutive clips, at most ``clips_per_batch``; a batch has clips of one video and length."""
        groups = itertools.groupby(range(len(self)), key=lambda i: (self.clips[i][0], len(self.clips[i][1])))
        batches = []
        for _, group in groups:
            members = list(group)
            batches += [members[s : s + clips_per_batch] for s in range(0, len(members), clips_per_batch)]
        return batches


class TrainLoader:
    """Endless iterable of micro-batches; reports once when clips without labels were replaced."""

    def __init__(self, loader: DataLoader[Clip], num_items: int) -> None:
        self.loader = loader
        self.num_items = num_items
        self.resampled = 0

    def __iter__(self) -> Iterator[list[Clip]]:
        batches = iter(self.loader)
        try:
            yield from map(self._count, batches)
        finally:
            # After an error the traceback keeps the iterator alive. Collected later, each of its workers ends only
            # after a time-out.
            stop = getattr(batches, "_shutdown_workers", None)
            if stop is not None:
                stop()

    def _count(self, batch: list[Clip]) -> list[Clip]:
        """Count replaced clips; log the first."""
        replaced = sum(clip.resampled for clip in batch)
        if replaced and not self.resampled:
            names = [clip.video_id for clip in batch if clip.resampled]
            logger.warning(
                "A sampled clip held only ignored pixels and was replaced (by one of video %s). Further ones are only "
                "counted, in the loader's `resampled`.",
                ", ".join(names),
            )
        self.resampled += replaced
        return batch


def build_train_loader(
    cfg: CfgNode, start_iter: int = 0, seed: int | None = None, mapper: ClipMapper | None = None
) -> TrainLoader:
    """Endless loader of this rank's micro-batches (lists of clips) over ``cfg.DATASETS.TRAIN``.

    A micro-batch has IMS_PER_BATCH / processes / ACCUM_STEPS clips; iteration i of the run consists of the ACCUM_STEPS
    micro-batches number i·ACCUM_STEPS, ... What is in them depends on (seed, iteration) only.

    Args:
        cfg: config.
        start_iter: first iteration, to resume.
        seed: seed of the order and of all augmentation; None takes ``cfg.SEED``, or a random one if that is negative.
        mapper: makes the clips, also in other processes; None takes that of the config.

    Raises:
        ValueError: no or unknown data set, class lists that disagree with each other or with the model, bad batch size.
        FileNotFoundError: a data set is missing.
    """
    names = list(cfg.DATASETS.TRAIN)
    check_classes(cfg, names)
    by_name = {name: get_records(name) for name in names}
    if comm.is_main_process():
        for name in names:
            warn_about_classes(name, by_name[name])
    records = [record for name in names for record in by_name[name]]
    dataset = TrainClips(records, mapper or ClipMapper.from_config(cfg, True, names), cfg.INPUT.CLIP.ITEM)
    if seed is None:
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    sampler = TrainBatchSampler(
        len(dataset),
        cfg.SOLVER.IMS_PER_BATCH,
        seed,
        comm.get_rank(),
        comm.get_world_size(),
        cfg.SOLVER.ACCUM_STEPS,
        start_iter,
    )
    return TrainLoader(_loader(cfg, dataset, sampler), len(dataset))


def build_test_loader(cfg: CfgNode, dataset_name: str, records: Sequence[Record] | None = None) -> DataLoader[Clip]:
    """Loader of this rank's test clips: whole videos in order, tiled by ``cfg.TEST.CLIP_LENGTH`` and ``CLIP_STRIDE``.

    Yields lists of at most ``cfg.TEST.CLIPS_PER_BATCH`` clips of one video. Each video is on one rank; a rank without
    videos gets an empty loader.

    Args:
        cfg: config.
        dataset_name: registered data set.
        records: the videos to load; default: all.

    Raises:
        ValueError: unknown data set, or a class list that disagrees with the model.
        FileNotFoundError: the data set is missing.
    """
    check_classes(cfg, [dataset_name])
    if cfg.TEST.CLIPS_PER_BATCH < 1:
        raise ValueError(f"TEST.CLIPS_PER_BATCH {cfg.TEST.CLIPS_PER_BATCH} must be at least 1")
    records = get_records(dataset_name) if records is None else records
    shards = shard_videos([len(record["frames"]) for record in records], comm.get_world_size())
    dataset = TestClips(
        records,
        ClipMapper.from_config(cfg, False, [dataset_name]),
        shards[comm.get_rank()],
        cfg.TEST.CLIP_LENGTH,
        cfg.TEST.CLIP_STRIDE,
    )
    return _loader(cfg, dataset, dataset.batches(cfg.TEST.CLIPS_PER_BATCH))


def _loader(cfg: CfgNode, dataset: Dataset[Clip], batches: TrainBatchSampler | list[list[int]]) -> DataLoader[Clip]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_identity,
        worker_init_fn=_start_worker,
        # Each new iterator draws a base seed. Its own generator leaves torch's global RNG untouched.
        generator=torch.Generator().manual_seed(0),
    )


def _identity(batch: list[Clip]) -> list[Clip]:
    return batch


def _start_worker(worker_id: int) -> None:
    """One thread per worker. All randomness comes from sample seeds, so no RNG is seeded here."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
