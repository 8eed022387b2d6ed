"""Trees on disk become records; defects are named."""

import shutil

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from the_mask.data import get_class_names, get_records, register_all, register_video_tree
from the_mask.data.registry import natural_key, registered_tree
from the_mask.data.video_tree import scan_video_tree


def tree_of(name):
    tree = registered_tree(name)
    assert tree is not None
    return tree


def kinds(name):
    return [problem.kind for problem in scan_video_tree(tree_of(name)).problems]


def test_records_of_a_vspw_tree(make_tree, tmp_path):
    records = get_records(make_tree("tree_plain", {"v2": 3, "v1": 1}))
    assert [(r["dataset"], r["video_id"], len(r["frames"])) for r in records] == [
        ("tree_plain", "v2", 3),
        ("tree_plain", "v1", 1),
    ]
    folder = tmp_path / "tree_plain" / "data" / "v2"
    assert records[0]["frames"][1] == {
        "frame_id": "001",
        "file_name": str(folder / "origin" / "001.png"),
        "sem_seg_file_name": str(folder / "mask" / "001.png"),
    }


def test_metadata(make_tree):
    metadata = MetadataCatalog.get(make_tree("tree_meta", {"v": 1}))
    assert metadata.stuff_classes == ["sky", "road", "car"] == get_class_names("tree_meta")
    assert metadata.label_table == (255, -1, -1, -1, -1, -1, -1, 0, 1, 2)
    assert (metadata.ignore_label, metadata.evaluator_type) == (255, "video_sem_seg")
    assert len(metadata.stuff_colors) == 3
    assert metadata.dataset_root.endswith("tree_meta")


def test_dot_entries_foreign_files_and_windows_line_ends_are_skipped(make_tree, tmp_path):
    name = make_tree("tree_dots", {"a": 2, "b": 1})
    root = tmp_path / name
    (root / "data" / "a" / "origin" / "._000.png").write_bytes(b"x")
    (root / "data" / "a" / "mask" / ".DS_Store").write_bytes(b"x")
    (root / "data" / "a" / "origin" / "Thumbs.db").write_bytes(b"x")
    (root / "train.txt").write_bytes(b"a \r\n\r\nb\r\n")
    assert [(r["video_id"], len(r["frames"])) for r in get_records(name)] == [("a", 2), ("b", 1)]
    assert kinds(name) == []


def test_folder_layout_and_time_order(tmp_path):
    for stem in ("f9", "f10", "f100"):
        for kind in ("origin", "mask"):
            path = tmp_path / "root" / "val" / "seq" / kind / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    (tmp_path / "root" / "val" / ".hidden").mkdir()
    register_video_tree("tree_folders", tmp_path / "root", "val", ["a"])
    (record,) = get_records("tree_folders")
    assert record["video_id"] == "seq"
    assert [f["frame_id"] for f in record["frames"]] == ["f9", "f10", "f100"]


def test_natural_order():
    stems = ["b", "a10", "a9", "9", "10", "a", "0016E5_08000", "0016E5_07959", "0016E5_f07959"]
    assert sorted(stems, key=natural_key) == [
        "9", "10", "0016E5_07959", "0016E5_08000", "0016E5_f07959", "a", "a9", "a10", "b",
    ]  # fmt: skip


def test_missing_masks(make_tree, tmp_path):
    name = make_tree("tree_mask", {"v": 3})
    (tmp_path / name / "data" / "v" / "mask" / "001.png").unlink()
    with pytest.raises(ValueError, match=r"has 1 defects: .*v/origin/001\.png: no mask/001\.png .*the-mask check"):
        get_records(name)
    tree = tree_of(name)
    register_video_tree(name, tree.root, "train", tree.class_list, require_labels=False)
    assert [f["sem_seg_file_name"] is None for f in get_records(name)[0]["frames"]] == [False, True, False]


def test_empty_and_missing_videos(make_tree, tmp_path):
    name = make_tree("tree_empty", {"v": 1})
    root = tmp_path / name
    (root / "data" / "hollow" / "origin").mkdir(parents=True)
    (root / "train.txt").write_text("v\nhollow\nnowhere\nv\n")
    assert kinds(name) == ["repeated video", "empty video", "missing video"]
    with pytest.raises(ValueError, match=r"3 defects.*hollow.origin: holds no image.*nowhere"):
        get_records(name)
    (root / "train.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"train\.txt: names no video"):
        get_records(name)


def test_two_images_of_one_frame_and_orphan_masks(make_tree, tmp_path):
    name = make_tree("tree_twice", {"v": 2})
    folder = tmp_path / name / "data" / "v"
    Image.fromarray(np.zeros((24, 40), np.uint8)).save(folder / "mask" / "077.png")
    assert kinds(name) == ["mask without image"]
    assert len(get_records(name)) == 1  # an orphan mask harms nobody
    Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(folder / "origin" / "000.jpg")
    with pytest.raises(ValueError, match=r"000\.png: same frame as 000\.jpg"):
        get_records(name)


def test_missing_data_say_how_to_get_them(tmp_path):
    register_all(tmp_path / "nowhere")
    try:
        for name, script in (("moving_shapes_train", "make_moving_shapes.py"), ("camvid_val", "prepare_camvid.py")):
            with pytest.raises(FileNotFoundError, match=rf"{name}: folder .*nowhere.* does not exist; run .*{script}"):
                get_records(name)
        with pytest.raises(FileNotFoundError, match=r"VSPW_480p.*download"):
            get_records("vspw_train")
        (tmp_path / "nowhere" / "camvid").mkdir(parents=True)
        with pytest.raises(FileNotFoundError, match=r"neither .*test\.txt nor .*test/ exists"):
            get_records("camvid_test")
    finally:
        register_all()


def test_camvid_by_sequence(tmp_path):
    """A training sequence and the rest of the training set share nothing and are the whole together."""
    for sequence, frames in (("0001TP", 2), ("0006R0", 3), ("0016E5", 4)):
        for folder in ("origin", "mask"):
            (tmp_path / "camvid" / "train" / sequence / folder).mkdir(parents=True)
            for number in range(frames):
                image = Image.new("RGB" if folder == "origin" else "L", (6, 4))
                image.save(tmp_path / "camvid" / "train" / sequence / folder / f"{sequence}_{number}.png")
    register_all(tmp_path)
    try:
        lengths = {r["video_id"]: len(r["frames"]) for r in get_records("camvid_train")}
        for held_out in lengths:
            one, rest = get_records(f"camvid_{held_out}"), get_records(f"camvid_train_without_{held_out}")
            assert [r["video_id"] for r in one] == [held_out]
            assert {r["video_id"]: len(r["frames"]) for r in one + rest} == lengths
        single = get_records("camvid_train_frames")
        assert [len(r["frames"]) for r in single] == [1] * sum(lengths.values())
        assert len({r["video_id"] for r in single}) == len(single)
        shutil.rmtree(tmp_path / "camvid" / "train" / "0006R0")
        register_all(tmp_path)
        with pytest.raises(ValueError, match="camvid_0006R0 needs sequence 0006R0"):
            get_records("camvid_0006R0")
        assert len(get_records("camvid_train_without_0006R0")) == 2
    finally:
        register_all()


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"'camvid_trian' \(did you mean camvid_train\?\); known.*vspw_val"):
        get_records("camvid_trian")


def test_registering_again_replaces(make_tree):
    name = make_tree("tree_again", {"v": 1})
    make_tree(name, {"v": 1}, classes=["x", "y"], table=None)
    assert get_class_names(name) == ["x", "y"]


def test_a_foreign_name_is_not_replaced():
    DatasetCatalog.register("tree_foreign", list)
    with pytest.raises(AssertionError):
        register_video_tree("tree_foreign", ".", "train", ["a"])
    with pytest.raises(ValueError, match="holds no video"):
        get_records("tree_foreign")


def test_vspw_test_split_needs_no_masks(tmp_path):
    origin = tmp_path / "VSPW_480p" / "data" / "1001_x" / "origin"
    origin.mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(origin / "00000061.jpg")
    for split in ("test", "val"):
        (tmp_path / "VSPW_480p" / f"{split}.txt").write_text("1001_x\n")
    register_all(tmp_path)
    try:
        (record,) = get_records("vspw_test")
        assert record["frames"][0]["sem_seg_file_name"] is None
        with pytest.raises(ValueError, match=r"no mask/00000061\.png"):
            get_records("vspw_val")
    finally:
        register_all()
