"""Class lists, label tables, colours."""

import numpy as np
import pytest

from the_mask.data.classes import ILLEGAL, ClassList, distinct_colors, load_class_list, make_class_list


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
    assert classes.legal_values == list(range(12))
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": []}, "distinct names"),
        ({"names": ["a", "a"]}, r"repeated: \['a'\]"),
        ({"names": ["a", "b"], "raw_values": [1]}, "2 classes need 2 PNG values"),
        ({"names": ["a", "b"], "raw_values": [1, 1]}, "must be distinct"),
        ({"names": ["a", "b"], "void_values": (1,)}, "must be distinct"),
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
    with pytest.raises(ValueError, match="at most 1728"):
        distinct_colors(2000)
