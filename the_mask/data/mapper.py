"""ClipMapper: makes a clip of tensors from a video record and a choice of frames.

Axes: T frames of a clip, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from the_mask.config.keys.input import COLOR_MODES
from the_mask.data import augmentation as aug
from the_mask.data.classes import ExplainValues, as_label_table
from the_mask.data.clips import BOUNDARIES, Clip, clip_indices, clip_offsets, valid_references
from the_mask.data.io import check_same_size, read_image, read_label
from the_mask.data.prior_masks import read_prior_mask
from the_mask.data.pseudo_clip import MotionRange, pseudo_clip, sample_motion
from the_mask.data.registry import Record
from the_mask.data.samplers import derive_seed


class ClipMapper:
    """Reads, augments and packs clips.

    Training: ``mapper(record, seed)`` or ``mapper(record, seed, reference)`` gives a random clip. Everything random
    depends on ``seed`` alone. Test: ``mapper.test_clip(record, indices)``.

    Labels of a training clip have the frames' size, those of a test clip the original one.
    """

    def __init__(
        self,
        *,
        is_train: bool,
        label_tables: Mapping[str, Sequence[int]],
        ignore_label: int = 255,
        dilations: Sequence[int] = (0,),
        boundary: str = "clamp",
        reverse_prob: float = 0.0,
        ranges: aug.GeometryRange | None = None,
        color_jitter: str = "none",
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        test_box: tuple[int, int] = (0, 0),
        size_multiple: int = 32,
        explain_values: Mapping[str, ExplainValues | None] | None = None,
        prior_masks: str = "",
        pseudo_motion: MotionRange | None = None,
    ) -> None:
        """
        Args:
            is_train: training or test clips.
            label_tables: raw PNG value -> train id, per data set name.
            explain_values: per data set name, see :class:`ClassList`.
            ignore_label: label of padding.
            pseudo_motion: makes training clips of single images by a random motion; None repeats the image.
            dilations, boundary, reverse_prob: see :mod:`the_mask.data.clips`.
            ranges: geometry to draw from (training).
            color_jitter: ``per_frame``, ``shared`` or ``none`` (training).
            pixel_mean: RGB, 0..255; its rounded value is the colour of padding.
            test_box: (long edge, short edge) that test frames are scaled to fit, 0 for no limit.
            size_multiple: test frames are stretched up to a multiple of this.
            prior_masks: folder of masks from an earlier run, given to training clips as ``priors``.

        Raises:
            ValueError: unknown boundary or colour mode, bad dilations.
        """
        if boundary not in BOUNDARIES:
            raise ValueError(f"INPUT.CLIP.BOUNDARY {boundary!r}: expected one of {', '.join(BOUNDARIES)}")
        if color_jitter not in COLOR_MODES:
            raise ValueError(f"INPUT.COLOR_JITTER {color_jitter!r}: expected one of {', '.join(COLOR_MODES)}")
        if pseudo_motion is not None and prior_masks:
            raise ValueError("INPUT.PSEUDO_CLIP moves images; INPUT.PRIOR_MASKS holds masks of unmoved ones: use one")
        self.offsets = clip_offsets(dilations)
        self.is_train = is_train
        self.label_tables = {name: as_label_table(table) for name, table in label_tables.items()}
        self.explain_values = dict(explain_values or {})
        self.ignore_label = ignore_label
        self.dilations = tuple(dilations)
        self.boundary = boundary
        self.reverse_prob = reverse_prob
        self.ranges = ranges or aug.GeometryRange(box=(0, 0))
        self.color_jitter = color_jitter
        self.fill = tuple(round(value) for value in pixel_mean)
        self.test_box = test_box
        self.size_multiple = size_multiple
        self.prior_masks = prior_masks
        self.pseudo_motion = pseudo_motion

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool, dataset_names: Sequence[str]) -> ClipMapper:
        """The mapper for some registered data sets, configured by ``cfg.INPUT``."""
        resize, crop = cfg.INPUT.RESIZE, cfg.INPUT.CROP
        if cfg.INPUT.RANDOM_FLIP not in ("horizontal", "none"):
            raise ValueError(f"INPUT.RANDOM_FLIP {cfg.INPUT.RANDOM_FLIP!r}: expected horizontal or none")
        if crop.ENABLED and crop.TYPE != "absolute":
            raise ValueError(f"INPUT.CROP.TYPE {crop.TYPE!r}: only absolute pixels are supported")
        return cls(
            is_train=is_train,
            label_tables={name: MetadataCatalog.get(name).label_table for name in dataset_names},
            explain_values={name: MetadataCatalog.get(name).get("explain_values") for name in dataset_names},
            ignore_label=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            dilations=cfg.INPUT.CLIP.DILATIONS,
            boundary=cfg.INPUT.CLIP.BOUNDARY,
            reverse_prob=cfg.INPUT.CLIP.REVERSE_PROB,
            ranges=aug.GeometryRange(
                box=(resize.LONG_EDGE, resize.SHORT_EDGE),
                scale=(resize.MIN_SCALE, resize.MAX_SCALE),
                crop=tuple(crop.SIZE) if crop.ENABLED else None,
                max_category_share=crop.SINGLE_CATEGORY_MAX_AREA,
                flip_prob=0.0 if cfg.INPUT.RANDOM_FLIP == "none" else 0.5,
            ),
            color_jitter=cfg.INPUT.COLOR_JITTER,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            test_box=(cfg.INPUT.TEST.LONG_EDGE, cfg.INPUT.TEST.SHORT_EDGE),
            size_multiple=cfg.INPUT.TEST.SIZE_MULTIPLE,
            prior_masks=cfg.INPUT.PRIOR_MASKS,
            pseudo_motion=_motion_range(cfg) if is_train and cfg.INPUT.PSEUDO_CLIP.ENABLED else None,
        )

    def is_pseudo(self, record: Record) -> bool:
        """Whether training clips of this record are made from a single image."""
        return self.pseudo_motion is not None and len(record["frames"]) == 1

    def references(self, record: Record, reverse: bool = False) -> list[int]:
        """Labelled frames that may be the reference of a training clip, played forwards or backwards.

        With ``drop``, only those whose whole clip exists. Otherwise these are preferred, as in the released code; if
        there are none, every labelled frame is allowed.
        """
        labelled = [i for i, frame in enumerate(record["frames"]) if frame["sem_seg_file_name"] is not None]
        if self.is_pseudo(record):
            return labelled
        whole = self._whole(record, reverse)
        inside = [i for i in labelled if i in whole]
        return inside if inside or self.boundary == "drop" else labelled

    def _whole(self, record: Record, reverse: bool) -> range:
        """References whose whole clip exists when played in this direction."""
        dilations = [-d for d in self.dilations] if reverse else self.dilations
        return valid_references(dilations, len(record["frames"]))

    def __call__(self, record: Record, seed: int, reference: int | None = None) -> Clip | None:
        """A training clip.

        Args:
            record: one video.
            seed: source of everything random.
            reference: index of the reference frame; None draws one of :meth:`references`.

        Returns:
            The clip, or None when every label of it is ignored after cropping.

        Raises:
            ValueError, FileNotFoundError: unreadable or mismatching files, illegal labels, or a video that is too
                short.
        """
        rng = np.random.default_rng(derive_seed(seed, 0))
        length = len(record["frames"])
        pseudo = self.is_pseudo(record)
        reverse = bool(rng.random() < self.reverse_prob)
        if reverse and self.boundary == "drop" and not pseudo:
            # A given reference, or sparse labels, may allow a whole clip in one direction only.
            whole = self._whole(record, True)
            reverse = reference in whole if reference is not None else bool(self.references(record, True))
        if reference is None:
            choices = self.references(record, reverse)
            if not choices:
                raise ValueError(
                    f"video {record['video_id']} of {record['dataset']} ({length} frames) has no labelled frame whose "
                    f"whole clip (offsets {self.offsets}) exists; set INPUT.CLIP.BOUNDARY to clamp"
                )
            reference = choices[int(rng.integers(len(choices)))]
        if pseudo:
            indices = [0] * len(self.offsets)
            images, labels = self._read_pseudo(record, seed)
        else:
            indices = clip_indices(reference, self.dilations, length, self.boundary, reverse)
            images, labels = self._read(record, indices)

        position = self.offsets.index(0)
        geometry = aug.sample_geometry(rng, labels[position], images[0].shape[:2], self.ranges, self.ignore_label)
        labels = [None if x is None else aug.transform_label(x, geometry, self.ignore_label) for x in labels]
        if all(x is None or (x == self.ignore_label).all() for x in labels):
            return None
        frames = [aug.transform_image(x, geometry) for x in images]
        if self.color_jitter != "none":
            shared = self.color_jitter == "shared"
            for t in range(len(frames)):
                color_rng = np.random.default_rng(derive_seed(seed, 1, 0 if shared else t))
                frames[t] = aug.apply_color_jitter(frames[t], aug.sample_color_jitter(color_rng))
        return replace(
            self._describe(record, indices),
            frames=[_image_tensor(aug.pad_image(x, geometry.padded, self.fill)) for x in frames],
            labels=[None if x is None else _label_tensor(x) for x in labels],
            priors=self._priors(record, indices, images[0].shape[:2], geometry) if self.prior_masks else (),
            padding=geometry.valid,
            seed=seed,
            reference=position,
        )

    def _priors(
        self, record: Record, indices: Sequence[int], size: tuple[int, int], geometry: aug.Geometry
    ) -> list[torch.Tensor]:
        """Masks of :attr:`prior_masks` for some frames, transformed with the clip's geometry."""
        name = record["dataset"]
        tables = self.label_tables[name], self.explain_values.get(name)
        masks = [
            read_prior_mask(self.prior_masks, record["video_id"], record["frames"][i]["frame_id"], size, *tables)
            for i in indices
        ]
        return [_label_tensor(aug.transform_label(mask, geometry, self.ignore_label)) for mask in masks]

    def test_clip(self, record: Record, indices: Sequence[int], is_first: bool = True, is_last: bool = True) -> Clip:
        """A test clip: frames at network size, labels at original size.

        Frames are scaled once, straight to the fitted size rounded up to ``size_multiple``.
        """
        images, labels = self._read(record, indices)
        height, width = images[0].shape[:2]
        size = aug.round_up(aug.fit_size(height, width, self.test_box), self.size_multiple)
        return replace(
            self._describe(record, indices),
            frames=[_image_tensor(aug.resize_image(x, size)) for x in images],
            labels=[None if x is None else _label_tensor(x) for x in labels],
            padding=size,
            height=height,
            width=width,
            is_first=is_first,
            is_last=is_last,
        )

    def _describe(self, record: Record, indices: Sequence[int]) -> Clip:
        frames = [record["frames"][i] for i in indices]
        return Clip(
            dataset=record["dataset"],
            video_id=record["video_id"],
            frame_ids=[f["frame_id"] for f in frames],
            file_names=[f["file_name"] for f in frames],
            mask_file_names=[f["sem_seg_file_name"] for f in frames],
            frame_indices=indices,
        )

    def _read_pseudo(self, record: Record, seed: int) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
        """Images and labels of a clip, made from the only frame of a record."""
        assert self.pseudo_motion is not None
        (image,), (label,) = self._read(record, [0])
        assert label is not None
        motion = sample_motion(np.random.default_rng(derive_seed(seed, 3)), self.pseudo_motion)
        images, labels = pseudo_clip(image, label, self.offsets, motion, self.fill, self.ignore_label)
        return images, [*labels]

    def _read(self, record: Record, indices: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
        """Images uint8 [H,W,3] and labels [H,W] of some frames; a frame that occurs twice is read once."""
        images: dict[int, np.ndarray] = {}
        labels: dict[int, np.ndarray | None] = {}
        for index in indices:
            if index in images:
                continue
            frame = record["frames"][index]
            images[index] = read_image(frame["file_name"])
            labels[index] = None
            if frame["sem_seg_file_name"] is not None:
                name = record["dataset"]
                label = read_label(frame["sem_seg_file_name"], self.label_tables[name], self.explain_values.get(name))
                check_same_size(images[index], label, frame["file_name"], frame["sem_seg_file_name"])
                labels[index] = label
            first = images[indices[0]]
            if images[index].shape != first.shape:
                raise ValueError(
                    f"frames of one video differ in size: {record['frames'][indices[0]]['file_name']} is "
                    f"{first.shape[0]}x{first.shape[1]}, {frame['file_name']} is "
                    f"{images[index].shape[0]}x{images[index].shape[1]}"
                )
        return [images[i] for i in indices], [labels[i] for i in indices]


def _motion_range(cfg: CfgNode) -> MotionRange:
    keys = cfg.INPUT.PSEUDO_CLIP
    return MotionRange(keys.MAX_SHIFT, keys.MAX_ROTATION, keys.MAX_SHEAR, keys.MAX_ZOOM)


def _image_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 [H,W,3] -> uint8 [3,H,W], a copy."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _label_tensor(label: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(label.astype(np.int64))
