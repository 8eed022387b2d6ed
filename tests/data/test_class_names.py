"""One rule for the classes of a config, one for "the same classes"."""

from __future__ import annotations

from pathlib import Path

import pytest

from the_mask.config import load_config
from the_mask.data import register_video_tree
from the_mask.data.class_names import check_classes, config_classes, describe_difference, same_classes
from the_mask.weights.class_sets import ClassSets


@pytest.fixture
def cfg(tmp_path: Path):
    """A config of two classes: an unknown set and one of 124 classes stand before the one that tells."""
    for name, classes in {"names_xy": "xy", "names_XY": "XY", "names_yx": "yx", "names_xz": "xz"}.items():
        register_video_tree(name, tmp_path, "train", list(classes))
    cfg = load_config(None, ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2"])
    cfg.DATASETS.TRAIN = ("unknown", "vspw_train", "names_xy")
    cfg.DATASETS.TEST = ("names_XY",)
    return cfg


def test_spelling_is_free_and_order_is_not() -> None:
    assert same_classes(["Traffic light", "b"], ["traffic_light ", "B"])
    assert not same_classes(["a", "b"], ["b", "a"])
    assert not same_classes(["a"], ["a", "b"])
    assert describe_difference("abc", "cab") == (
        "the same 3 classes in another order: 0 is 'c', in the model 'a', 1 is 'a', in the model 'b', 2 is 'b', in the "
        "model 'c'"
    )
    assert describe_difference("ab", "ac") == "1 of 2 classes have another name: 1 is 'c', in the model 'b'"


def test_classes_of_a_config(cfg) -> None:
    assert config_classes(cfg) == ("x", "y")
    assert config_classes(cfg, cfg.DATASETS.TEST) == ("X", "Y")
    cfg.MODEL.WEIGHTS_CLASSES = "names_yx"
    assert ClassSets.from_config(cfg) == ClassSets(("x", "y"), ("y", "x"))
    assert ClassSets.of_use(cfg, ["names_XY"]) == ClassSets(("X", "Y"), ("y", "x"), assumed=("x", "y"))
    assert ClassSets.of_use(cfg, ["unknown"]).model == ("x", "y")
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    assert config_classes(cfg) is None
    cfg.MODEL.WEIGHTS_CLASSES = "coco_stuf164k_train"
    with pytest.raises(ValueError, match="did you mean coco_stuff164k_train"):
        ClassSets.from_config(cfg)


@pytest.mark.parametrize(
    ("test", "said"),
    [("names_yx", "the same 2 classes in another order"), ("names_xz", "1 of 2 classes have another name")],
)
def test_every_data_set_is_compared_not_the_first_alone(cfg, test: str, said: str) -> None:
    cfg.DATASETS.TEST = ("names_XY", test)
    for names in (None, cfg.DATASETS.TEST):
        with pytest.raises(ValueError, match=rf"names_\w+ \(2 classes\) and {test} \(2 classes\).*{said}"):
            config_classes(cfg, names)
    with pytest.raises(ValueError, match=said):
        check_classes(cfg, ["names_xy", test])
    cfg.MODEL.CHECK_CLASS_NAMES = False
    assert config_classes(cfg) == ("x", "y")
    check_classes(cfg, ["names_xy", test])
    # Two training sets are no question of names: the model would learn both orders.
    cfg.DATASETS.TRAIN = ("names_xy", test)
    for names in (None, cfg.DATASETS.TRAIN):
        with pytest.raises(ValueError, match=said):
            config_classes(cfg, names)
    with pytest.raises(ValueError, match=said):
        check_classes(cfg, cfg.DATASETS.TRAIN)
