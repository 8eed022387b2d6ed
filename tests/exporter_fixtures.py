"""Label maps that are exported, and their pictures; for the tests of exporters."""

import numpy as np
from PIL import Image

from the_mask.data.classes import make_class_list
from the_mask.data.exporters import FORMATS, LabelFrame

H, W = 13, 21
NAMES = ["road", "car", "tree & co"]
CLASSES = make_class_list(NAMES, colors=[(128, 64, 128), (0, 0, 142), (107, 142, 35)])
IGNORE = CLASSES.ignore_label


def label_map(seed, classes=3, size=(H, W), ignored=0.1):
    """Blocks of classes with some single pixels, and some without a class."""
    rng = np.random.default_rng(seed)
    labels = np.kron(rng.integers(0, classes, (4, 5)), np.ones((4, 5), int))[: size[0], : size[1]]
    labels = np.pad(labels, ((0, size[0] - labels.shape[0]), (0, size[1] - labels.shape[1])), mode="edge")
    spots = rng.random(size) < 0.1
    labels[spots] = rng.integers(0, classes, size)[spots]
    labels[rng.random(size) < ignored] = IGNORE if classes <= 255 else 65535
    return labels.astype(np.uint8 if classes <= 255 else np.int32)


def videos():
    """Two videos; the first one has a frame of nothing and one that lacks a class."""
    empty, half = np.full((H, W), IGNORE, np.uint8), label_map(7)
    half[half == 1] = 0
    return {"cam1/a": [label_map(0), empty, half], "b": [label_map(1), label_map(2)]}


def frames(given=None):
    """The frames of some videos."""
    for video, maps in (given or videos()).items():
        for number, labels in enumerate(maps):
            yield LabelFrame(video, f"{number:05d}", labels, f"{video}/{number:05d}.png")


def export(form, folder, given=None, classes=CLASSES, **options):
    with FORMATS[form](folder, classes, **options) as exporter:
        for frame in frames(given):
            exporter.write(frame)
    return exporter.report


def write_pictures(folder):
    """Pictures of :func:`videos`."""
    for video, maps in videos().items():
        (folder / video).mkdir(parents=True)
        for number, labels in enumerate(maps):
            Image.fromarray(np.zeros((*labels.shape, 3), np.uint8)).save(folder / video / f"{number:05d}.png")
    return folder
