"""Clip indices and tilings against hand-made cases, brute force and their defining properties."""

import itertools
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from the_mask.data.clips import BOUNDARIES, Clip, as_clips, clip_indices, clip_offsets, tile_video, valid_references

dilations_lists = st.lists(st.integers(-6, 6), min_size=1, max_size=5, unique=True)


def test_offsets_are_ordered_and_contain_the_reference():
    assert clip_offsets([-3]) == [-3, 0]
    assert clip_offsets([0]) == [0]
    assert clip_offsets([-3, -9, -6]) == [-9, -6, -3, 0]
    assert clip_offsets([2, -2]) == [-2, 0, 2]


@pytest.mark.parametrize("bad", [[], [-1, -1], [0, 0]])
def test_bad_dilations_are_refused(bad):
    with pytest.raises(ValueError, match="distinct offsets"):
        clip_offsets(bad)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((5, [-3], 10), [2, 5]),
        ((1, [-3], 10), [0, 1]),
        ((1, [-3], 10, "repeat_current"), [1, 1]),
        ((9, [-2, 2], 10), [7, 9, 9]),
        ((0, [-9, -6, -3], 1), [0, 0, 0, 0]),
        ((2, [-1], 5, "clamp", True), [3, 2]),
        ((4, [-1], 5, "clamp", True), [4, 4]),
    ],
)
def test_clip_indices_on_known_cases(args, expected):
    assert clip_indices(*args) == expected


def test_drop_refuses_to_leave_the_video():
    assert clip_indices(3, [-3], 4, "drop") == [0, 3]
    with pytest.raises(ValueError, match="offset -3 from frame 2 leaves the video of 4 frames"):
        clip_indices(2, [-3], 4, "drop")


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="expected one of clamp, repeat_current, drop"):
        clip_indices(0, [0], 1, "wrap")
    for reference, length in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="outside the video"):
            clip_indices(reference, [0], length)


@given(dilations_lists, st.integers(1, 15), st.data())
def test_clip_properties(dilations, length, data):
    reference = data.draw(st.integers(0, length - 1))
    boundary = data.draw(st.sampled_from(BOUNDARIES[:2]))
    reverse = data.draw(st.booleans())
    clip = clip_indices(reference, dilations, length, boundary, reverse)
    offsets = clip_offsets(dilations)
    assert len(clip) == len(offsets)
    assert all(0 <= i < length for i in clip)
    assert clip[offsets.index(0)] == reference
    for offset, index in zip(offsets, clip):
        wanted = reference - offset if reverse else reference + offset
        if 0 <= wanted < length:
            assert index == wanted
        elif boundary == "clamp":
            assert index == (0 if wanted < 0 else length - 1)
        else:
            assert index == reference
    if boundary == "clamp":
        assert clip == sorted(clip, reverse=reverse)


@given(dilations_lists, st.integers(1, 15), st.data())
def test_a_reversed_clip_is_the_clip_of_the_mirrored_video(dilations, length, data):
    reference = data.draw(st.integers(0, length - 1))
    mirrored = clip_indices(length - 1 - reference, dilations, length)
    assert clip_indices(reference, dilations, length, reverse=True) == [length - 1 - i for i in mirrored]


@given(dilations_lists, st.integers(0, 15))
def test_valid_references_are_those_that_drop_accepts(dilations, length):
    accepted = []
    for reference in range(length):
        if all(0 <= reference + d < length for d in dilations):
            accepted.append(reference)
            clip_indices(reference, dilations, length, "drop")
        else:
            with pytest.raises(ValueError, match="leaves the video"):
                clip_indices(reference, dilations, length, "drop")
    assert list(valid_references(dilations, length)) == accepted


def test_tiling_of_the_paper():
    assert tile_video(6, 2, 3) == [(0, 3), (1, 4), (2, 5)]
    assert tile_video(12, 4, 3) == [(0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11)]
    assert tile_video(9, 2, 3) == [(0, 3), (1, 4), (2, 5), (6, 7), (8,)]
    assert tile_video(3, 1, 3) == [(0,), (1,), (2,)]
    assert tile_video(3, 4, 3) == [(0, 1, 2)]
    assert tile_video(0, 4, 3) == []


@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 5))
def test_tiling_covers_each_frame_once(length, clip_length, stride):
    clips = tile_video(length, clip_length, stride)
    assert sorted(i for clip in clips for i in clip) == list(range(length))
    block = clip_length * stride
    for clip in clips:
        assert 1 <= len(clip) <= clip_length
        steps = {b - a for a, b in itertools.pairwise(clip)}
        if clip[0] < length // block * block:
            assert len(clip) == clip_length
            assert steps <= {stride}
            assert clip[0] // block == clip[-1] // block
        else:
            assert steps <= {1}


@pytest.mark.parametrize("args", [(5, 0, 1), (5, 1, 0), (-1, 1, 1)])
def test_bad_tilings_are_refused(args):
    with pytest.raises(ValueError, match="clip_length >= 1"):
        tile_video(*args)


def test_name_of_a_clip_for_messages():
    assert Clip(dataset="d", video_id="v", frame_ids=["a", "b"]).name == "d/v frames a, b"
    assert Clip().name == ""


def frames(count: int) -> list[Tensor]:
    return [torch.full((3, 4, 5), float(t)) for t in range(count)]


def test_a_clip_is_frozen_and_its_facts_have_one_length():
    clip = Clip(frames(2), [None, None], frame_ids=["a", "b"])
    assert len(clip) == 2
    assert clip.frame_ids == ("a", "b")
    with pytest.raises(FrozenInstanceError):
        clip.seed = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"clip 'd/v frames a': .*\{'labels': 2, 'frame_ids': 1\}"):
        Clip(labels=[None, None], frame_ids=["a"], dataset="d", video_id="v")
    assert len(Clip()) == 0


def test_window_cuts_every_fact_and_moves_the_reference():
    labels = [torch.full((4, 5), t) for t in range(4)]
    clip = Clip(frames(4), labels, frame_ids="abcd", frame_indices=range(4), reference=2, seed=7, video_id="v")
    part = clip.window(1, 3)
    assert [float(frame.mean()) for frame in part.frames] == [1, 2]
    assert [int(one.max()) for one in part.labels] == [1, 2]
    assert (part.frame_ids, part.frame_indices, part.priors) == (("b", "c"), (1, 2), ())
    assert (part.reference, part.seed, part.video_id) == (1, 7, "v")
    assert clip.window(0, 2).reference is None
    for start, stop in ((2, 2), (-1, 2), (0, 5)):
        with pytest.raises(ValueError, match="of 4 frames has no frames"):
            clip.window(start, stop)


def test_a_lengthened_clip_repeats_its_oldest_frame():
    clip = Clip(frames(2), frame_ids="ab", reference=1)
    longer = clip.lengthened(4)
    assert [float(frame.mean()) for frame in longer.frames] == [0, 0, 0, 1]
    assert (longer.frame_ids, longer.labels, longer.reference) == (("a", "a", "a", "b"), (), 3)
    assert clip.lengthened(1) is clip


def test_sizes_of_a_clip():
    clip = Clip(frames(2))
    assert clip.frame_size == clip.output_size == (4, 5)
    assert Clip(frames(1), height=40, width=50).output_size == (40, 50)
    with pytest.raises(ValueError, match=r"differ in size: \[\(2, 5\), \(4, 5\)\]"):
        Clip([*frames(1), torch.zeros(3, 2, 5)]).frame_size  # noqa: B018


def test_dicts_of_a_data_loader_become_clips():
    clip = Clip(frames(1))
    same, made = as_clips([clip, {"frames": frames(2), "seed": 3, "height": 8, "width": 9, "image_id": 4}])
    assert same is clip
    assert (len(made), made.seed, made.output_size) == (2, 3, (8, 9))
    with pytest.raises(ValueError, match=r"input 0 is no clip: it has the keys \['image', 'sem_seg'\], .*ClipMapper"):
        as_clips([{"image": 0, "sem_seg": 0}])


def test_a_clip_survives_a_worker_process():
    clip = pickle.loads(pickle.dumps(Clip(frames(2), [None, torch.ones(4, 5)], seed=2)))
    assert (len(clip), clip.seed, clip.labels[0]) == (2, 2, None)
    assert torch.equal(clip.frames[1], frames(2)[1])
