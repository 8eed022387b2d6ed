"""ClipMapper: content, one geometry per clip, determinism, errors that name files."""

import numpy as np
import pytest
import torch
from PIL import Image

from the_mask.data import ClipMapper, get_records
from the_mask.data.augmentation import GeometryRange

TABLE = [255, -1, -1, -1, -1, -1, -1, 0, 1, 2]


def mapper(name, is_train=True, **kwargs):
    return ClipMapper(is_train=is_train, label_tables={name: TABLE}, **kwargs)


def stored(frame):
    """Image [3,H,W] and train ids [H,W] of a frame, read without the library."""
    image = np.array(Image.open(frame["file_name"])).transpose(2, 0, 1)
    mask = np.array(Image.open(frame["sem_seg_file_name"])).astype(int)
    return image, np.where(mask == 0, 255, mask - 7)


def test_without_augmentation_a_clip_holds_the_files(make_tree):
    name = make_tree("map_plain", {"v": 6})
    (record,) = get_records(name)
    clip = mapper(name, dilations=[-3], ranges=GeometryRange((0, 0), flip_prob=0.0))(record, 5, reference=4)
    assert clip.frame_ids == ("001", "004")
    assert clip.frame_indices == (1, 4)
    assert (clip.dataset, clip.video_id, clip.reference, clip.seed) == (name, "v", 1, 5)
    assert clip.padding == (24, 40)
    for t, index in enumerate((1, 4)):
        image, label = stored(record["frames"][index])
        assert clip.file_names[t] == record["frames"][index]["file_name"]
        assert clip.frames[t].dtype == torch.uint8
        assert clip.labels[t].dtype == torch.int64
        assert (clip.frames[t].numpy() == image).all()
        assert (clip.labels[t].numpy() == label).all()


def test_a_clip_of_one_frame_is_an_image(make_tree):
    name = make_tree("map_image", {"v": 1})
    (record,) = get_records(name)
    clip = mapper(name, ranges=GeometryRange((0, 0), flip_prob=0.0))(record, 0)
    assert len(clip.frames) == len(clip.labels) == 1
    assert clip.frame_ids == ("000",)


def test_a_clip_depends_on_its_seed_only(make_tree):
    name = make_tree("map_seed", {"v": 9})
    (record,) = get_records(name)
    ranges = GeometryRange((40, 24), (0.5, 2.0), crop=(20, 28), max_category_share=0.75)
    make = mapper(name, dilations=[-3], ranges=ranges, color_jitter="per_frame", reverse_prob=0.5)
    again = mapper(name, dilations=[-3], ranges=ranges, color_jitter="per_frame", reverse_prob=0.5)
    drawn = [make(record, seed) for seed in range(12)]
    np.random.seed(0)  # noqa: NPY002 - the global generators must not matter
    torch.manual_seed(1)
    for seed in reversed(range(12)):
        clip = again(record, seed)
        assert clip.frame_ids == drawn[seed].frame_ids
        assert all(torch.equal(a, b) for a, b in zip(clip.frames, drawn[seed].frames))
        assert all(torch.equal(a, b) for a, b in zip(clip.labels, drawn[seed].labels))
    assert len({tuple(clip.frame_ids) for clip in drawn}) > 3


def test_all_frames_share_one_geometry(make_tree):
    name = make_tree("map_geometry", {"v": 1})  # clamped: every frame of the clip is the same file
    (record,) = get_records(name)
    ranges = GeometryRange((40, 24), (0.5, 2.0), crop=(20, 28))
    for seed in range(8):
        clip = mapper(name, dilations=[-2, -1], ranges=ranges)(record, seed)
        assert all(torch.equal(clip.frames[0], x) for x in clip.frames)
        assert all(torch.equal(clip.labels[0], x) for x in clip.labels)
        assert all(x.shape == (3, 20, 28) for x in clip.frames)


def test_the_reference_frame_judges_the_crop(make_tree, tmp_path):
    name = make_tree("map_judge", {"v": 2})
    checker = np.full((24, 40), 7, np.uint8)
    checker[:, 30:] = 8  # crops of width 10 are diverse near column 30 only
    for stem, mask in (("000", np.full((24, 40), 9, np.uint8)), ("001", checker)):
        Image.fromarray(mask).save(tmp_path / name / "data" / "v" / "mask" / f"{stem}.png")
    (record,) = get_records(name)
    ranges = GeometryRange((0, 0), crop=(24, 10), max_category_share=0.75)
    clips = [mapper(name, dilations=[-1], ranges=ranges)(record, seed, reference=1) for seed in range(30)]
    assert all(len(clip.labels[0].unique()) == 1 for clip in clips)
    assert sum(len(clip.labels[1].unique()) == 2 for clip in clips) >= 20


def test_color_modes(make_tree):
    name = make_tree("map_color", {"v": 1})
    (record,) = get_records(name)

    def clips(mode):
        make = mapper(name, dilations=[-1], ranges=GeometryRange((0, 0), flip_prob=0.0), color_jitter=mode)
        return [make(record, seed).frames for seed in range(10)]

    assert all(torch.equal(a, b) for a, b in clips("none"))
    assert all(torch.equal(a, b) for a, b in clips("shared"))
    assert sum(torch.equal(a, b) for a, b in clips("per_frame")) <= 3
    plain = torch.from_numpy(stored(record["frames"][0])[0])
    assert sum(torch.equal(a, plain) for a, _ in clips("shared")) <= 3


def test_padding_has_the_mean_colour_and_no_label(make_tree):
    name = make_tree("map_pad", {"v": 1})
    (record,) = get_records(name)
    ranges = GeometryRange((0, 0), crop=(30, 50))
    clip = mapper(name, ranges=ranges, color_jitter="per_frame", pixel_mean=(10.4, 20.6, 30))(record, 3)
    assert clip.padding == (24, 40)
    for region in ((slice(24, 30), slice(0, 50)), (slice(0, 30), slice(40, 50))):
        assert (clip.frames[0].permute(1, 2, 0)[region] == torch.tensor([10, 21, 30])).all()
        assert (clip.labels[0][region] == 255).all()


def test_references_are_whole_clips_when_there_are_any(make_tree):
    name = make_tree("map_reference", {"long": 6, "short": 2})
    long, short = get_records(name)
    make = mapper(name, dilations=[-3])
    assert make.references(long) == [3, 4, 5]
    assert make.references(long, reverse=True) == [0, 1, 2]
    assert make.references(short) == [0, 1]
    drop = mapper(name, dilations=[-3], boundary="drop", reverse_prob=0.5)
    assert drop.references(short) == []
    with pytest.raises(ValueError, match=r"video short of map_reference \(2 frames\) .* clamp"):
        drop(short, 0)
    pairs = {tuple(drop(long, seed).frame_indices) for seed in range(60)}
    assert pairs == {(0, 3), (1, 4), (2, 5), (3, 0), (4, 1), (5, 2)}
    # A reference that is whole in one direction only is played in that direction.
    assert {tuple(drop(long, seed, reference=5).frame_indices) for seed in range(20)} == {(2, 5)}
    assert {tuple(make(short, seed).frame_indices) for seed in range(20)} == {(0, 0), (0, 1)}


def test_unlabelled_frames_have_no_label(make_tree, tmp_path):
    name = make_tree("map_sparse", {"v": 5}, require_labels=False)
    for stem in ("000", "001", "003", "004"):
        (tmp_path / name / "data" / "v" / "mask" / f"{stem}.png").unlink()
    (record,) = get_records(name)
    clip = mapper(name, dilations=[-2])(record, 0)
    assert clip.frame_indices == (0, 2)
    assert clip.labels[0] is None
    assert clip.labels[1] is not None
    reverse = mapper(name, dilations=[-2], reverse_prob=1.0)(record, 0)
    assert reverse.frame_indices == (4, 2)


def test_a_clip_without_labels_is_none(make_tree, tmp_path):
    name = make_tree("map_void", {"v": 2})
    for path in (tmp_path / name / "data" / "v" / "mask").iterdir():
        Image.fromarray(np.zeros((24, 40), np.uint8)).save(path)
    (record,) = get_records(name)
    assert mapper(name)(record, 0) is None


def test_test_clips_keep_original_labels(make_tree):
    name = make_tree("map_test", {"v": 3}, size=(30, 50))
    (record,) = get_records(name)
    clip = mapper(name, is_train=False, test_box=(40, 24), size_multiple=16).test_clip(record, (0, 2), True, False)
    assert [x.shape for x in clip.frames] == [(3, 32, 48)] * 2  # 24x40 fits, stretched up to a multiple of 16
    assert [x.shape for x in clip.labels] == [(30, 50)] * 2
    assert (clip.height, clip.width, clip.padding) == (30, 50, (32, 48))
    assert (clip.is_first, clip.is_last, clip.frame_indices) == (True, False, (0, 2))
    assert (clip.labels[1].numpy() == stored(record["frames"][2])[1]).all()
    native = mapper(name, is_train=False, size_multiple=1).test_clip(record, (1,))
    assert (native.frames[0].numpy() == stored(record["frames"][1])[0]).all()


def test_bad_files_are_named(make_tree, tmp_path):
    name = make_tree("map_bad", {"v": 3})
    folder = tmp_path / name / "data" / "v"
    (record,) = get_records(name)
    make = mapper(name)
    Image.fromarray(np.zeros((24, 39), np.uint8)).save(folder / "mask" / "000.png")
    with pytest.raises(ValueError, match=r"origin.000\.png is 24x40 .*mask.000\.png is 24x39"):
        make(record, 0, reference=0)
    Image.fromarray(np.full((24, 40), 3, np.uint8)).save(folder / "mask" / "000.png")
    with pytest.raises(ValueError, match=r"mask.000\.png holds label values \[3\]; allowed: 0, 7\.\.9"):
        make(record, 0, reference=0)
    (folder / "origin" / "001.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"origin.001\.png cannot be read"):
        make(record, 0, reference=1)
    (folder / "origin" / "001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"origin.001\.png does not exist"):
        make(record, 0, reference=1)


def test_frames_of_one_video_have_one_size(make_tree, tmp_path):
    name = make_tree("map_sizes", {"v": 2})
    folder = tmp_path / name / "data" / "v"
    for kind, channels in (("origin", (3,)), ("mask", ())):
        Image.fromarray(np.zeros((20, 40, *channels), np.uint8)).save(folder / kind / "001.png")
    with pytest.raises(ValueError, match=r"differ in size: .*000\.png is 24x40, .*001\.png is 20x40"):
        mapper(name, dilations=[-1])(get_records(name)[0], 0, reference=1)


def test_from_config(make_tree, clip_cfg):
    name = make_tree("map_cfg", {"v": 5})
    cfg = clip_cfg(name, "INPUT.CLIP.DILATIONS", [-4, -2], "INPUT.COLOR_JITTER", "shared", "INPUT.RANDOM_FLIP", "none")
    made = ClipMapper.from_config(cfg, True, [name])
    assert made.offsets == [-4, -2, 0]
    assert made.ranges == GeometryRange((40, 24), (0.5, 2.0), (20, 28), 0.75, 0.0)
    assert made.fill == (124, 116, 104)
    clip = made(get_records(name)[0], 1)
    assert clip is not None
    assert clip.frames[0].shape == (3, 20, 28)
    off = ClipMapper.from_config(clip_cfg(name, "INPUT.CROP.ENABLED", False), True, [name])
    assert off.ranges.crop is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("INPUT.CLIP.BOUNDARY", "wrap"), "INPUT.CLIP.BOUNDARY 'wrap'"),
        (("INPUT.COLOR_JITTER", "some"), "INPUT.COLOR_JITTER 'some'"),
        (("INPUT.RANDOM_FLIP", "vertical"), "INPUT.RANDOM_FLIP 'vertical'"),
        (("INPUT.CROP.TYPE", "relative"), "INPUT.CROP.TYPE 'relative'"),
        (("INPUT.CLIP.DILATIONS", [-1, -1]), "distinct offsets"),
    ],
)
def test_bad_settings_are_refused(make_tree, clip_cfg, override, message):
    name = make_tree("map_settings", {"v": 1})
    with pytest.raises(ValueError, match=message):
        ClipMapper.from_config(clip_cfg(name, *override), True, [name])
