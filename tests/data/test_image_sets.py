"""COCO-Stuff, ADE20K and Cityscapes on tiny trees laid out and labelled as the releases are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image

from the_mask.config import load_config
from the_mask.data import build_test_loader, build_train_loader, get_records, load_class_list, register_all
from the_mask.data.check import check_dataset
from the_mask.data.datasets import register_cityscapes, register_coco_stuff
from the_mask.data.image_tree import files_by_key, register_image_tree
from the_mask.data.io import read_label

# Names of some COCO-Stuff classes by their COCO category id, from the label list of the release.
COCO_IDS = {1: "person", 11: "fire hydrant", 13: "stop sign", 25: "giraffe", 27: "backpack", 90: "toothbrush"}
COCO_IDS |= {92: "banner", 93: "blanket", 106: "clouds", 157: "sky-other", 169: "tree", 182: "wood"}
HIGHEST, NUM_CLASSES = 181, 171


@pytest.fixture
def root(tmp_path: Path):
    """All data sets under ``tmp_path``; afterwards at their usual place again."""
    register_all(tmp_path)
    yield tmp_path
    register_all()


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def picture(rng: np.random.Generator, height: int = 12, width: int = 16) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def coco_mask(values: list[int], height: int = 12, width: int = 16) -> np.ndarray:
    """A mask with vertical stripes of the given values."""
    stripes = np.array(values, np.uint8)[np.arange(width) * len(values) // width]
    return np.tile(stripes, (height, 1))


def write_coco(root: Path, split: str, masks: list[np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    for number, mask in enumerate(masks):
        stem = f"{number + 9:012d}"
        write(root / "coco_stuff164k/images" / f"{split}2017" / f"{stem}.jpg", picture(rng, *mask.shape))
        write(root / "coco_stuff164k/annotations" / f"{split}2017" / f"{stem}.png", mask)


def test_coco_table_closes_the_gaps_and_shifts_nothing_else() -> None:
    classes = load_class_list("coco_stuff164k")
    assert len(classes.names) == NUM_CLASSES
    for coco_id, name in COCO_IDS.items():
        assert classes.names[classes.label_table[coco_id - 1]] == name
    legal = [value for value in range(HIGHEST + 1) if classes.label_table[value] != -1]
    assert len(legal) == NUM_CLASSES
    # Independent rule: the train id is the rank among the values that occur.
    assert [classes.label_table[value] for value in legal] == list(range(NUM_CLASSES))
    assert classes.label_table[255] == 255


def test_coco_person_is_a_class_and_the_last_class_is_used(root: Path) -> None:
    """``reduce_zero_label`` would ignore class 0, move every other one down and never give 170."""
    write_coco(root, "train", [coco_mask([0, 181, 255, 12])])
    record = get_records("coco_stuff164k_train")[0]
    table = MetadataCatalog.get("coco_stuff164k_train").label_table
    label = read_label(record["frames"][0]["sem_seg_file_name"], table)
    assert label[0].tolist() == [0] * 4 + [170] * 4 + [255] * 4 + [11] * 4
    names = MetadataCatalog.get("coco_stuff164k_train").stuff_classes
    assert [names[0], names[170], names[11]] == ["person", "wood", "stop sign"]


def test_coco_records_are_videos_of_one_frame(root: Path) -> None:
    write_coco(root, "val", [coco_mask([0]), coco_mask([181])])
    # Files of other programs next to the masks are not masks.
    write(root / "coco_stuff164k/annotations/val2017/000000000009_labelTrainIds.png", coco_mask([0]))
    records = get_records("coco_stuff164k_val")
    assert [record["video_id"] for record in records] == ["000000000009", "000000000010"]
    assert all(len(record["frames"]) == 1 for record in records)
    assert Path(records[0]["frames"][0]["sem_seg_file_name"]).name == "000000000009.png"
    report = check_dataset("coco_stuff164k_val")
    assert report.ok
    assert (report.class_pixels[0], report.class_pixels[170]) == (12 * 16, 12 * 16)


def test_labels_of_the_10k_release_are_recognised(root: Path) -> None:
    write_coco(root, "train", [coco_mask([0, 1, 5]), coco_mask([11, 82, 171])])
    with pytest.raises(ValueError, match=r"COCO-Stuff 10k .*values \[11, 82\] do not occur.*stuffthingmaps"):
        get_records("coco_stuff164k_train")
    kinds = {problem.kind for problem in check_dataset("coco_stuff164k_train").problems}
    assert kinds == {"foreign masks", "label value"}


def test_labels_of_the_10k_release_without_a_telling_value(root: Path) -> None:
    """Sixteen masks that hold neither 255 nor one of the ten classes above 171."""
    write_coco(root, "train", [coco_mask([0, 1 + number]) for number in range(9)] + [coco_mask([0, 30])] * 7)
    with pytest.raises(ValueError, match=r"COCO-Stuff 10k .*16 masks hold nothing above 30, and no 255"):
        get_records("coco_stuff164k_train")
    write_coco(root, "train", [coco_mask([0, 255])])
    assert len(get_records("coco_stuff164k_train")) == 16


def test_converted_labels_are_recognised(root: Path) -> None:
    write_coco(root, "train", [coco_mask([11, 170, 255])])
    with pytest.raises(ValueError, match=r"converted to train ids .*values \[11\]"):
        get_records("coco_stuff164k_train")


def test_a_late_10k_mask_is_explained_in_training_too(root: Path) -> None:
    """The masks that are probed at the start are fine, another one is not."""
    write_coco(root, "train", [coco_mask([0, 181, 255])] * 40)
    write(root / "coco_stuff164k/annotations/train2017/000000000010.png", coco_mask([1, 70]))
    cfg = load_config(None, ["DATASETS.TRAIN", "('coco_stuff164k_train',)", "DATALOADER.NUM_WORKERS", "0"])
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = NUM_CLASSES, 20, 0
    cfg.INPUT.CROP.SIZE, cfg.INPUT.RESIZE.LONG_EDGE, cfg.INPUT.RESIZE.SHORT_EDGE = [8, 8], 16, 12
    batches = iter(build_train_loader(cfg))
    with pytest.raises(ValueError, match=r"000000000010.png holds label values \[70\].*COCO-Stuff 10k"):
        [next(batches) for _ in range(2)]


def test_ade20k_zero_is_ignored(root: Path) -> None:
    rng = np.random.default_rng(0)
    write(root / "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg", picture(rng))
    write(root / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png", coco_mask([0, 1, 13, 150]))
    report = check_dataset("ade20k150_val")
    assert report.ok
    assert report.ignored_pixels == 48
    names = MetadataCatalog.get("ade20k150_val").stuff_classes
    assert {names[i]: n for i, n in enumerate(report.class_pixels) if n} == {"wall": 48, "person": 48, "flag": 48}


def write_cityscapes(root: Path, labelled: list[str], frames: list[str]) -> None:
    rng = np.random.default_rng(0)
    for name in labelled:
        path = root / "cityscapes/gtFine/train" / f"{name}_gtFine_labelTrainIds.png"
        write(path, coco_mask([0, 18, 255]))
        write(path.with_name(path.name.replace("labelTrainIds", "labelIds")), coco_mask([7, 33, 4]))
        write(root / "cityscapes/leftImg8bit/train" / f"{name}_leftImg8bit.png", picture(rng))
    for name in frames:
        write(root / "cityscapes/leftImg8bit_sequence/train" / f"{name}_leftImg8bit.png", picture(rng))


def test_cityscapes_images(root: Path) -> None:
    write_cityscapes(root, ["aachen/aachen_000000_000019", "bochum/bochum_000000_000313"], [])
    report = check_dataset("cityscapes_train")
    assert report.ok
    assert report.videos == 2
    records = get_records("cityscapes_train")
    assert [record["video_id"] for record in records] == ["aachen/aachen_000000_000019", "bochum/bochum_000000_000313"]
    assert records[0]["frames"][0]["sem_seg_file_name"].endswith("aachen_000000_000019_gtFine_labelTrainIds.png")


def test_cityscapes_snippets_are_cut_around_the_labelled_frame(root: Path) -> None:
    """One city numbers its frames on over two snippets; the other starts anew in each sequence."""
    frames = [f"bochum/bochum_000000_{number:06d}" for number in range(294, 354)]
    frames += [f"aachen/aachen_000007_{number:06d}" for number in range(30)]
    labelled = ["aachen/aachen_000007_000019", "bochum/bochum_000000_000313", "bochum/bochum_000000_000343"]
    write_cityscapes(root, labelled, frames)
    records = get_records("cityscapes_sequence_train")
    assert [record["video_id"] for record in records] == labelled
    for record, first in zip(records, (0, 294, 324), strict=True):
        numbers = [int(frame["frame_id"].rpartition("_")[2]) for frame in record["frames"]]
        assert numbers == list(range(first, first + 30))
        with_mask = [i for i, frame in enumerate(record["frames"]) if frame["sem_seg_file_name"] is not None]
        assert with_mask == [19]
    assert check_dataset("cityscapes_sequence_train").ok


def test_cityscapes_memory_is_the_frames_before(root: Path) -> None:
    write_cityscapes(root, ["ulm/ulm_000003_000019"], [f"ulm/ulm_000003_{number:06d}" for number in range(10, 30)])
    cfg = load_config(None, ["DATASETS.TRAIN", "('cityscapes_sequence_train',)", "DATALOADER.NUM_WORKERS", "0"])
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = 19, 1, 0
    cfg.INPUT.CLIP.DILATIONS, cfg.INPUT.CLIP.REVERSE_PROB = [-4, -2], 0.0
    cfg.INPUT.CROP.SIZE, cfg.INPUT.RESIZE.LONG_EDGE, cfg.INPUT.RESIZE.SHORT_EDGE = [8, 8], 16, 12
    clip = next(iter(build_train_loader(cfg)))[0]
    assert clip.frame_ids == ("ulm_000003_000015", "ulm_000003_000017", "ulm_000003_000019")
    assert [label is not None for label in clip.labels] == [False, False, True]
    cfg.TEST.CLIP_LENGTH = 4
    clips = [clip for batch in build_test_loader(cfg, "cityscapes_sequence_train") for clip in batch]
    assert sum(len(clip.frames) for clip in clips) == 20


def test_cityscapes_validation_snippets_end_with_the_labelled_frame(root: Path) -> None:
    write_cityscapes(root, ["ulm/ulm_000003_000019"], [f"ulm/ulm_000003_{number:06d}" for number in range(30)])
    for folder in ("gtFine", "leftImg8bit_sequence"):
        (root / "cityscapes" / folder / "train").rename(root / "cityscapes" / folder / "val")
    record = get_records("cityscapes_sequence_val")[0]
    assert len(record["frames"]) == 20
    assert record["frames"][-1]["sem_seg_file_name"] is not None
    register_cityscapes(root / "cityscapes", before=2)
    assert [f["frame_id"][-2:] for f in get_records("cityscapes_sequence_val")[0]["frames"]] == ["17", "18", "19"]


@pytest.mark.parametrize(
    ("absent", "message"),
    [(19, "its image .*ulm_000003_000019_leftImg8bit.png is missing"), (7, "gap: ulm/ulm_000003_000007_leftImg8bit")],
)
def test_incomplete_snippets_are_named(root: Path, absent: int, message: str) -> None:
    numbers = [number for number in range(30) if number != absent]
    write_cityscapes(root, ["ulm/ulm_000003_000019"], [f"ulm/ulm_000003_{number:06d}" for number in numbers])
    with pytest.raises(ValueError, match=message):
        get_records("cityscapes_sequence_train")


def test_snippet_labels_need_a_frame_number(root: Path) -> None:
    write_cityscapes(root, ["ulm/ulm"], ["ulm/ulm_000003_000001"])
    with pytest.raises(ValueError, match=r"expected a name <sequence>_<frame number>_gtFine_labelTrainIds.png"):
        get_records("cityscapes_sequence_train")


def test_label_ids_instead_of_train_ids_are_recognised(root: Path) -> None:
    write_cityscapes(root, ["ulm/ulm_000003_000019"], [])
    folder = root / "cityscapes/gtFine/train/ulm"
    (folder / "ulm_000003_000019_gtFine_labelIds.png").replace(folder / "ulm_000003_000019_gtFine_labelTrainIds.png")
    with pytest.raises(ValueError, match=r"Values \[33\] look like label ids.*prepare_cityscapes.py"):
        get_records("cityscapes_train")


def test_missing_sets_say_how_to_get_them(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"coco_stuff164k_train: folder .*train2017 does not exist; unpack"):
        get_records("coco_stuff164k_train")
    write_cityscapes(root, ["ulm/ulm_000003_000019"], [])
    (root / "cityscapes/gtFine/train/ulm/ulm_000003_000019_gtFine_labelTrainIds.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no \*_gtFine_labelTrainIds.png; .*prepare_cityscapes.py"):
        get_records("cityscapes_train")


def test_own_image_tree(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for stem in ("b/10", "b/9", "a/7"):
        write(tmp_path / "pictures" / f"{stem}.png", picture(rng))
    for stem in ("b/10", "b/9", "c/1"):
        write(tmp_path / "masks" / f"{stem}_seg.png", coco_mask([0, 1]))
    folders = (tmp_path / "pictures", tmp_path / "masks")
    register_image_tree("own_images", *folders, ["one", "two"], label_suffix="_seg.png", require_labels=False)
    records = get_records("own_images")
    assert [record["video_id"] for record in records] == ["a/7", "b/9", "b/10"]
    assert [record["frames"][0]["sem_seg_file_name"] is None for record in records] == [True, False, False]
    report = check_dataset("own_images")
    assert [problem.kind for problem in report.problems] == ["mask without image"]
    register_image_tree("own_images", *folders, ["one", "two"], label_suffix="_seg.png")
    with pytest.raises(ValueError, match=r"7.png: no mask .*masks/a/7_seg.png"):
        get_records("own_images")
    register_image_tree("own_images", folders[0], None, ["one", "two"])
    assert all(record["frames"][0]["sem_seg_file_name"] is None for record in get_records("own_images"))


def test_images_are_called_by_their_paths(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a/7.png", "b/7.png", "c/8.png", "c/8.jpg"):
        write(tmp_path / "pictures" / name, picture(rng))
    register_image_tree("own_twins", tmp_path / "pictures", None, ["one"])
    assert [problem.kind for problem in check_dataset("own_twins").problems] == ["repeated frame"]
    with pytest.raises(ValueError, match=r"8.png: same name as .*8.jpg"):
        get_records("own_twins")
    (tmp_path / "pictures/c/8.jpg").unlink()
    assert [record["video_id"] for record in get_records("own_twins")] == ["a/7", "b/7", "c/8"]


def test_files_are_found_through_links(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/x_A.PNG", coco_mask([0]))
    write(tmp_path / "here/.hidden/y_A.png", coco_mask([0]))
    (tmp_path / "here/link").symlink_to(tmp_path / "elsewhere")
    files, twice = files_by_key(tmp_path / "here", ["_a.png"])
    assert list(files) == ["link/x"]
    assert not twice


def test_registered_names_have_their_classes() -> None:
    register_coco_stuff("nowhere")
    for name, number in (("coco_stuff164k", 171), ("ade20k150", 150), ("cityscapes", 19), ("cityscapes_sequence", 19)):
        for split in ("train", "val"):
            metadata = MetadataCatalog.get(f"{name}_{split}")
            assert len(metadata.stuff_classes) == len(metadata.stuff_colors) == number
    register_all()
