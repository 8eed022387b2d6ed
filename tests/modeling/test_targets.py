"""Targets of a clip against plain comparisons of label maps."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from the_mask.data.clips import Clip
from the_mask.modeling.mask.targets import build_targets, cell_counts, clip_targets


@settings(max_examples=40, deadline=None)
@given(
    frames=st.lists(st.booleans(), min_size=1, max_size=4),
    classes=st.integers(1, 6),
    pad=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    ignore=st.sampled_from([255, 65535]),
    seed=st.integers(0, 999),
)
def test_masks_equal_comparisons(frames, classes, pad, ignore, seed):
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for labelled in frames:
        label = torch.randint(classes, (5, 7), generator=generator)
        label[torch.rand(5, 7, generator=generator) < 0.4] = ignore
        maps.append(label if labelled else None)
    height, width = 5 + pad[0], 7 + pad[1]
    targets = clip_targets(maps, ignore, classes, (height, width))
    expected = sorted({c for m in maps if m is not None for c in m.unique().tolist()} - {ignore})
    assert targets.labels.tolist() == expected
    assert targets.labels.dtype == torch.int64
    assert targets.num_targets == len(expected)
    assert targets.masks().shape == (len(expected), len(maps), height, width)
    assert targets.index_map.dtype == torch.uint8
    for t, label in enumerate(maps):
        valid = torch.zeros(height, width, dtype=torch.bool)
        for n, label_class in enumerate(expected):
            want = torch.zeros(height, width, dtype=torch.bool)
            if label is not None:
                want[:5, :7] = label == label_class
                valid[:5, :7] = label != ignore
            assert torch.equal(targets.masks()[n, t], want)
            assert torch.equal(targets.mask(n, t), want)
        assert torch.equal(targets.valid()[t], valid)
        assert targets.has_valid[t] == bool(valid.any())
        assert targets.has_ignored[t] == (not bool(valid.all()))
    assert targets.supervised_frames(False) == [t for t, m in enumerate(maps) if m is not None]
    assert targets.supervised_frames(True) == [
        t for t, m in enumerate(maps) if m is not None and bool((m != ignore).any())
    ]


def test_many_targets_need_more_than_a_byte():
    label = torch.arange(400).view(20, 20)
    targets = clip_targets([label], 65535)
    assert targets.num_targets == 400
    assert targets.index_map.dtype == torch.int16
    assert torch.equal(targets.masks()[399, 0], label == 399)


def test_void_and_unlabelled_clips_have_no_targets():
    void = torch.full((4, 4), 255)
    targets = clip_targets([void, None], 255, 3)
    assert targets.num_targets == 0
    assert targets.masks().shape == (0, 2, 4, 4)
    assert targets.supervised_frames(True) == []
    assert targets.supervised_frames(False) == [0]
    assert clip_targets([None], 255, 3, (4, 4)).num_targets == 0


def test_bad_labels_name_the_clip():
    label = torch.zeros(3, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"'vspw/7 frames 1': labels \[9, 12\] are outside 0\.\.8"):
        clip_targets([torch.tensor([[9, 12, 1]])], 255, 9, name="vspw/7 frames 1")
    with pytest.raises(ValueError, match="label -1 is negative"):
        clip_targets([label - 1], 255, 9)
    with pytest.raises(ValueError, match="differ in size"):
        clip_targets([label, label[:2]], 255)
    with pytest.raises(ValueError, match="do not fit"):
        clip_targets([label], 255, size=(2, 3))
    with pytest.raises(ValueError, match="no frame has labels"):
        clip_targets([None, None], 255)
    with pytest.raises(ValueError, match="has no frames"):
        clip_targets([], 255)


def test_a_batch_is_padded_to_its_largest_clip():
    clips = [
        Clip(dataset="d", video_id="v", frame_ids=["a", "b"], labels=[torch.zeros(4, 6).long(), None]),
        Clip(labels=[torch.ones(5, 3).long()] * 2),
    ]
    first, second = build_targets(clips, 255, 2)
    assert first.index_map.shape == second.index_map.shape == (2, 5, 6)
    assert first.name == "d/v frames a, b"
    assert first.valid()[0].sum() == 24
    unlabelled = build_targets([Clip([torch.zeros(3, 8, 8)], [None])], 255)
    assert unlabelled[0].index_map.shape == (1, 8, 8)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    cells=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 99),
)
def test_cell_counts_equal_nearest_enlargement(size, cells, seed):
    index = torch.randint(4, size, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    counts = cell_counts(index, 4, cells)
    assert counts.shape == (4, cells[0] * cells[1])
    # Any function of the enlarged map, summed over one value's pixels, is the counts times the function of the cells.
    field = torch.randn(1, 1, *cells, generator=torch.Generator().manual_seed(seed))
    enlarged = F.interpolate(field, size=size, mode="nearest")[0, 0]
    for value in range(4):
        torch.testing.assert_close((counts[value] * field.flatten()).sum(), enlarged[index == value].sum())


def test_cell_counts_at_points_count_each_point_once():
    index = torch.tensor([[0, 1], [1, 0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    points = torch.tensor([[0.1, 0.1], [0.1, 0.1], [0.9, 0.1], [1.0, 1.0]])
    counts = cell_counts(index, 2, (2, 2), points)
    assert counts.tolist() == [[2.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]]
