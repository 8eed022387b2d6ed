"""Class lists, label tables, colours."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from the_mask.config import load_config
from the_mask.data import register_video_tree
from the_mask.data.class_names import check_classes
from the_mask.data.classes import (
    ILLEGAL,
    ClassList,
    as_label_table,
    distinct_colors,
    load_class_list,
    make_class_list,
)
from the_mask.data.io import apply_label_table


@pytest.mark.parametrize(("name", "count"), [("vspw", 124), ("camvid", 11), ("moving_shapes", 11)])
def test_shipped_lists(name, count):
    classes = load_class_list(name)
    assert len(classes.names) == len(set(classes.names)) == count
    assert len(set(classes.colors)) == count
    assert sorted(t for t in classes.label_table if t not in (ILLEGAL, 255)) == list(range(count))
    assert all(name == name.strip() and name for name in classes.names)


def test_vspw_void_rules():
    table = load_class_list("vspw").label_table
    assert table[0] == table[253] == table[255] == 255
    assert list(table[1:125]) == list(range(124))
    assert set(table[125:253]) == {ILLEGAL}
    names = load_class_list("vspw").names
    assert (names[0], names[60], names[123]) == ("wall", "person", "train")


def test_camvid_void_rules():
    classes = load_class_list("camvid")
    assert list(classes.label_table) == [*range(11), 255]
    assert classes.names[3] == "road"


def test_unknown_list_names_the_known():
    with pytest.raises(
        ValueError, match=r"no class list 'vspv'; known: ade20k150, camvid, cityscapes19, coco_stuff164k, moving"
    ):
        load_class_list("vspv")


def test_own_list_by_default_maps_values_to_themselves():
    classes = make_class_list(["a", "b"])
    assert classes.label_table[:2] == (0, 1)
    assert classes.label_table[255] == 255
    assert set(classes.label_table[2:255]) == {ILLEGAL}


def test_more_than_255_classes_move_the_ignore_label():
    classes = make_class_list([f"c{i}" for i in range(300)], raw_values=range(1, 301), void_values=(0,))
    assert classes.ignore_label == 65535
    assert classes.label_table[0] == 65535
    assert classes.label_table[300] == 299
    plain = make_class_list([f"c{i}" for i in range(300)])
    assert plain.label_table[255] == 255, "a class like any other"
    assert plain.label_table[65535] == plain.ignore_label == 65535


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": []}, "distinct names"),
        ({"names": ["a", "a"]}, r"repeated: \['a'\]"),
        ({"names": ["a", "b"], "raw_values": [1]}, "2 classes need 2 PNG values"),
        ({"names": ["a", "b"], "raw_values": [1, 1]}, "must be distinct"),
        ({"names": ["a", "b"], "void_values": (1,)}, r"must be distinct.* used twice: \[1\]"),
        ({"names": ["a"], "raw_values": [70000]}, r"0\.\.65535"),
        ({"names": ["a", "b"], "colors": [(0, 0, 0)]}, "need 2 colours"),
    ],
)
def test_bad_lists_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_class_list(**arguments)


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match=r"label_table maps to \[2\]"):
        ClassList(("a", "b"), ((0, 0, 1), (0, 1, 0)), (0, 1, 2))


def test_colors_are_distinct_and_stable():
    colors = np.array(distinct_colors(150))
    assert distinct_colors(20) == distinct_colors(150)[:20]
    gaps = np.abs(colors[:, None] - colors[None]).max(-1) + 999 * np.eye(len(colors))
    assert gaps.min() >= 20
    assert distinct_colors(124) == load_class_list("vspw").colors
    many = distinct_colors(65_535)
    assert len(set(many)) == 65_535
    assert many[:2000] == distinct_colors(2000)
    with pytest.raises(ValueError, match="at most 262144"):
        distinct_colors(262_145)


def test_a_mapping_means_value_to_id():
    colors = ((0, 0, 1), (0, 1, 0))
    assert ClassList(("a", "b"), colors, {0: 1, 1: 0}).label_table == (1, 0)
    assert as_label_table({2: 0, 255: 1})[2::253] == (0, 1)
    assert set(as_label_table({2: 0, 255: 1})[3:255]) == {ILLEGAL}
    assert as_label_table(np.array([1, 0], np.uint8)) == as_label_table(range(1, -1, -1)) == (1, 0)
    tree = register_video_tree("mapped", "nowhere", "train", ["a", "b"], {0: 1, 1: 0, 7: 255})
    assert tree.class_list.label_table == (1, 0, -1, -1, -1, -1, -1, 255)
    assert apply_label_table(np.array([[0, 1]]), {0: 1, 1: 0}).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    "table",
    [
        [0.0, 1.0],
        {0: 0.5},
        {"0": 0},
        {0.0: 0},
        [True, False],
        {0, 1},
        "01",
        3,
        {-1: 0},
        {70000: 0},
        np.zeros((2, 2), int),
    ],
)
def test_other_tables_are_refused(table):
    for use in (as_label_table, lambda t: register_video_tree("x", "nowhere", "train", ["a", "b"], t)):
        with pytest.raises(ValueError, match=r"label_table.*(expected whole numbers in a list|lie in 0\.\.65535)"):
            use(table)


@pytest.mark.parametrize("names", [("road"), {"road": 0}, {0: "road", 1: "car"}, {"road", "car"}, [1, 2], ["a", ""], 3])
def test_other_class_lists_are_refused(names):
    for use in (make_class_list, lambda n: register_video_tree("x", "nowhere", "train", n)):
        with pytest.raises(ValueError, match=r"expected a list of names, such as \[\"road\", \"car\"\]"):
            use(names)


@pytest.mark.parametrize("color", [(0, 0), (0, 0, 0, 0), (0, 0, 256), (0.5, 0, 0), "red"])
def test_other_colours_are_refused(color):
    with pytest.raises(ValueError, match="colour"):
        make_class_list(["a"], colors=[color])


def test_metadata_of_others_is_checked():
    """Whoever fills the catalogue by hand may take another type."""
    DatasetCatalog.register("by_hand", list)
    MetadataCatalog.get("by_hand").set(stuff_classes={0: "a", 1: "b"}, label_table=[0, 1], ignore_label=255)
    try:
        cfg = load_config(None, ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2])
        with pytest.raises(ValueError, match="expected a list of names"):
            check_classes(cfg, ["by_hand"])
    finally:
        DatasetCatalog.remove("by_hand")
        MetadataCatalog.remove("by_hand")
