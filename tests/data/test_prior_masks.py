"""Stored masks go through the geometry of their clip."""

import shutil

import numpy as np
import pytest
from PIL import Image

from the_mask.data import ClipMapper, get_records
from the_mask.data.augmentation import GeometryRange

TABLE = [255, -1, -1, -1, -1, -1, -1, 0, 1, 2]


def make_mapper(name, folder):
    ranges = GeometryRange((40, 24), (0.5, 2.0), crop=(20, 28))
    return ClipMapper(
        is_train=True, label_tables={name: TABLE}, dilations=[-2, -1], ranges=ranges, prior_masks=str(folder)
    )


def test_a_mask_equal_to_the_label_stays_equal(make_tree, tmp_path):
    name = make_tree("prior_same", {"v": 6})
    (record,) = get_records(name)
    folder = tmp_path / "masks"
    (folder / "v").mkdir(parents=True)
    for frame in record["frames"]:
        shutil.copy(frame["sem_seg_file_name"], folder / "v" / f"{frame['frame_id']}.png")
    flips = 0
    for seed in range(12):
        clip = make_mapper(name, folder)(record, seed)
        if clip is None:
            continue
        flips += 1
        assert len(clip.priors) == 3
        for prior, label in zip(clip.priors, clip.labels, strict=True):
            assert prior.dtype == label.dtype
            np.testing.assert_array_equal(prior.numpy(), label.numpy())
    assert flips > 6
    assert make_mapper(name, "")(record, 1).priors == ()


def test_missing_masks_and_masks_of_another_size_or_class_list_are_named(make_tree, tmp_path):
    name = make_tree("prior_bad", {"v": 3})
    (record,) = get_records(name)
    mapper = make_mapper(name, tmp_path / "masks")
    with pytest.raises(FileNotFoundError, match=r"masks/v/000\.png does not exist"):
        mapper(record, 0, reference=2)
    (tmp_path / "masks" / "v").mkdir(parents=True)
    for value, size, message in (
        (7, (24, 39), r"000\.png is 24x39 .* frame 24x40"),
        (3, (24, 40), r"000\.png holds label values \[3\]"),
    ):
        Image.fromarray(np.full(size, value, np.uint8)).save(tmp_path / "masks" / "v" / "000.png")
        with pytest.raises(ValueError, match=message):
            mapper(record, 0, reference=2)
