"""check_dataset finds every planted defect and nothing else."""

import numpy as np
import pytest
from PIL import Image

from the_mask.data.check import check_dataset


def found(report):
    return sorted((problem.kind, problem.file.rsplit("data/", 1)[-1]) for problem in report.problems)


@pytest.fixture
def broken(make_tree, tmp_path):
    name = make_tree("check_broken", {"a": 4, "b": 3, "c": 2, "hollow": 0})
    data = tmp_path / name / "data"
    (data / "hollow" / "origin").mkdir(parents=True)
    (data / "a" / "mask" / "000.png").unlink()
    path = data / "a" / "origin" / "001.png"
    path.write_bytes(path.read_bytes()[:500])
    (data / "a" / "mask" / "002.png").write_bytes(b"")
    Image.fromarray(np.zeros((20, 40), np.uint8)).save(data / "a" / "mask" / "003.png")
    bad = np.zeros((24, 40), np.uint8)
    bad[0, :24] = 100
    Image.fromarray(bad).save(data / "b" / "mask" / "001.png")
    for kind, channels in (("origin", (3,)), ("mask", ())):
        Image.fromarray(np.zeros((24, 48, *channels), np.uint8)).save(data / "b" / kind / "002.png")
    Image.fromarray(np.zeros((24, 40), np.uint8)).save(data / "c" / "mask" / "009.png")
    return name


EXPECTED = [
    ("empty video", "hollow/origin"),
    ("label value", "b/mask/001.png"),
    ("mask without image", "c/mask/009.png"),
    ("missing mask", "a/origin/000.png"),
    ("size changes in video", "b/origin/002.png"),
    ("size mismatch", "a/mask/003.png"),
    ("unreadable image", "a/origin/001.png"),
    ("unreadable mask", "a/mask/002.png"),
]


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_defect_is_named(broken, jobs):
    report = check_dataset(broken, jobs=jobs)
    assert found(report) == EXPECTED
    assert not report.ok
    assert (report.videos, report.frames, report.masks, report.frames_checked) == (3, 9, 8, 9)
    (value,) = [p for p in report.problems if p.kind == "label value"]
    assert "[100] are not declared (2.5% of the pixels)" in value.message


def test_a_sound_set_has_no_problem_and_right_counts(make_tree, tmp_path):
    name = make_tree("check_sound", {"a": 3, "b": 2})
    report = check_dataset(name)
    assert report.ok
    assert report.sizes == {(24, 40): 5}
    raw = np.concatenate([np.array(Image.open(p)).ravel() for p in (tmp_path / name).rglob("mask/*.png")])
    assert report.class_pixels.tolist() == [(raw == value).sum() for value in (7, 8, 9)]
    assert report.ignored_pixels == (raw == 0).sum()


def test_reading_fewer_files_keeps_the_structure_checks(broken):
    report = check_dataset(broken, max_files=2)
    assert report.frames_checked == 2
    assert {"empty video", "missing mask", "mask without image"} <= {kind for kind, _ in found(report)}


def test_splits_without_masks_are_fine(make_tree, tmp_path):
    name = make_tree("check_unlabelled", {"a": 2}, require_labels=False)
    for path in list((tmp_path / name / "data" / "a" / "mask").iterdir()):
        path.unlink()
    report = check_dataset(name)
    assert report.ok
    assert report.masks == 0


def test_what_cannot_be_checked_raises(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'check_none'"):
        check_dataset("check_none")


def test_progress_sees_every_frame(make_tree):
    seen = []

    def progress(items, total):
        for item in items:
            seen.append(total)
            yield item

    check_dataset(make_tree("check_progress", {"a": 3}), progress=progress)
    assert seen == [3, 3, 3]
