"""prepare_camvid sorts the release by sequence and refuses a damaged one."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from the_mask.data import get_records, register_all

SCRIPT = Path(__file__).resolve().parents[2] / "datasets" / "prepare_camvid.py"
STEMS = {
    "train": ["0001TP_006720", "0001TP_006690", "0006R0_f00930", "0016E5_00390"],
    "val": ["0016E5_07961", "0016E5_07959"],
    "test": ["Seq05VD_f00030", "Seq05VD_f00000", "0001TP_008550"],
}


@pytest.fixture
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def release(tmp_path):
    rng = np.random.default_rng(0)
    source = tmp_path / "release"
    for split, stems in STEMS.items():
        for folder in (split, f"{split}annot"):
            (source / folder).mkdir(parents=True)
        for number, stem in enumerate(stems):
            suffix = "jpg" if number % 2 else "png"
            Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(source / split / f"{stem}.{suffix}")
            Image.fromarray(rng.integers(0, 12, (12, 16), dtype=np.uint8)).save(
                source / f"{split}annot" / f"{stem}.png"
            )
    return source


def test_names(script):
    split_name = script["split_name"]
    assert split_name("0001TP_006690") == ("0001TP", 6690)
    assert split_name("0006R0_f00930") == ("0006R0", 930)
    assert split_name("0016E5_07959") == ("0016E5", 7959)
    assert split_name("Seq05VD_f00000") == ("Seq05VD", 0)
    with pytest.raises(ValueError, match="expected <sequence>_<frame number>"):
        split_name("frame12")


@pytest.mark.parametrize("link", ["copy", "symlink", "hardlink"])
def test_the_tree_is_registered(script, release, tmp_path, link):
    counts = script["prepare_camvid"](release, tmp_path / "camvid", link)
    assert sum(counts.values()) == 9
    assert counts["train", "0001TP"] == 2
    register_all(tmp_path)
    try:
        train, val, test = (get_records(f"camvid_{split}") for split in ("train", "val", "test"))
    finally:
        register_all()
    assert [r["video_id"] for r in train] == ["0001TP", "0006R0", "0016E5"]
    assert [f["frame_id"] for f in train[0]["frames"]] == ["0001TP_006690", "0001TP_006720"]
    assert [f["frame_id"] for f in val[0]["frames"]] == ["0016E5_07959", "0016E5_07961"]
    assert [(r["video_id"], len(r["frames"])) for r in test] == [("0001TP", 1), ("Seq05VD", 2)]
    frame = train[0]["frames"][0]
    assert Path(frame["file_name"]).is_symlink() == (link == "symlink")
    assert Path(frame["file_name"]).read_bytes() == (release / "train" / "0001TP_006690.jpg").read_bytes()
    assert Path(frame["sem_seg_file_name"]).read_bytes() == (release / "trainannot" / "0001TP_006690.png").read_bytes()


def test_the_test_split_is_optional(script, release, tmp_path):
    (release / "test").rename(tmp_path / "elsewhere")
    counts = script["prepare_camvid"](release, tmp_path / "camvid")
    assert {split for split, _ in counts} == {"train", "val"}


def test_all_defects_are_named_and_nothing_is_written(script, release, tmp_path, capsys):
    (release / "trainannot" / "0001TP_006690.png").unlink()
    (release / "val" / "0016E5_07961.png").unlink()
    Image.fromarray(np.zeros((12, 15), np.uint8)).save(release / "trainannot" / "0006R0_f00930.png")
    Image.fromarray(np.full((12, 16), 12, np.uint8)).save(release / "trainannot" / "0016E5_00390.png")
    (release / "valannot" / "0016E5_07959.png").write_bytes(b"x")
    (release / "test" / "Seq05VD_f00030.png").rename(release / "test" / "strange.png")
    (release / "testannot" / "Seq05VD_f00030.png").rename(release / "testannot" / "strange.png")
    assert script["main"](["--source", str(release), "--output", str(tmp_path / "camvid")]) == 1
    err = capsys.readouterr().err
    for text in (
        "6 defects",
        "0001TP_006690.jpg: no mask trainannot/0001TP_006690.png",
        "0016E5_07961.png: no image in val/",
        "12x15",
        "0016E5_00390.png holds values [12]; allowed: 0..11",
        "0016E5_07959.png cannot be read",
        "strange.png: strange: expected <sequence>_<frame number>",
    ):
        assert text in err
    assert not (tmp_path / "camvid").exists()


def test_missing_source_and_existing_output(script, release, tmp_path, capsys):
    assert script["main"](["--source", str(tmp_path / "none"), "--output", str(tmp_path / "camvid")]) == 1
    assert "--source takes the folder" in capsys.readouterr().err
    arguments = ["--source", str(release), "--output", str(tmp_path / "camvid")]
    assert script["main"](arguments) == 0
    assert "9 frames" in capsys.readouterr().out
    assert script["main"](arguments) == 1
    assert "--force" in capsys.readouterr().err
    assert script["main"]([*arguments, "--force", "--link", "symlink"]) == 0
    with pytest.raises(ValueError, match="expected one of copy"):
        script["prepare_camvid"](release, tmp_path / "x", "move")
