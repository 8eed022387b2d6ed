"""Small labelled pictures, and what an imported tree must hold; for the tests of importers."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from the_mask.data import get_records, import_dataset_modules

H, W = 12, 20
NAMES = ["road", "car"]
COLORS = [(128, 64, 128), (0, 0, 142)]


def truth(seed=0):
    """A label map with both classes and, as -1, nothing."""
    labels = np.full((H, W), -1, np.int32)
    labels[6:, :] = 0
    labels[3 + seed : 8, 4:11] = 1
    return labels


def picture(path, seed=0, size=(W, H)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def color_mask(labels, void=(0, 0, 0)):
    return np.array([*COLORS, void], np.uint8)[labels]


def check(output, expected, videos=None):
    """Compare the written masks with label maps by (video, frame), and read the tree as training would."""
    classes = json.loads((output / "classes.json").read_text())
    found = {}
    for path in output.glob("data/**/mask/*.png"):
        values = np.asarray(Image.open(path)).astype(np.int32)
        values[values == classes["ignore"]] = -1
        found[path.parent.parent.relative_to(output / "data").as_posix(), path.stem] = values
    assert found.keys() == expected.keys()
    for key, labels in expected.items():
        assert np.array_equal(found[key], labels), key
    import_dataset_modules([str(output / "dataset.py")])
    splits = [split for split in ("train", "val") if (output / f"{split}.txt").is_file()]
    records = [record for split in splits for record in get_records(f"{output.name}_{split}")]
    assert sum(len(record["frames"]) for record in records) == len(list(output.glob("data/**/origin/*")))
    return classes


def encoded(mask):
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def segments_png(path, labels, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros(labels.shape, np.int64)
    for label, identity in ids.items():
        values[labels == label] = identity
    Image.fromarray(np.stack([values % 256, values // 256 % 256, values // 65536], axis=-1).astype(np.uint8)).save(path)
