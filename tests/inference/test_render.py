"""Overlays, legends, panels and sheets: pixels where they are known, sizes and order elsewhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from the_mask.inference.rendering import render
from the_mask.inference.rendering.render import Palette

PALETTE = Palette(["sky", "road", "a_class_with_a_very_long_name_indeed"], [[10, 20, 200], [200, 10, 10], [0, 255, 0]])
SEEDS = st.integers(0, 99)
HALVES = np.array([[0, 0, 1, 1], [0, 0, 255, 1]])


def test_colorize_known_pixels():
    picture = render.colorize(HALVES, PALETTE)
    assert picture.dtype == np.uint8
    assert picture[0, 0].tolist() == [10, 20, 200]
    assert picture[1, 3].tolist() == [200, 10, 10]
    assert picture[1, 2].tolist() == [0, 0, 0]


def test_colorize_names_labels_without_a_colour():
    with pytest.raises(ValueError, match=r"labels \[-1, 3\] have no colour; allowed: 0\.\.2 and 255"):
        render.colorize(np.array([[0, 3, -1]]), PALETTE)


def test_wide_ignore_label():
    palette = Palette([str(i) for i in range(300)], (np.arange(900).reshape(300, 3) % 256).tolist(), ignore_label=65535)
    picture = render.colorize(np.array([[299, 255, 65535]], dtype=np.int32), palette)
    assert picture.tolist() == [[[897 % 256, 898 % 256, 899 % 256], [765 % 256, 766 % 256, 767 % 256], [0, 0, 0]]]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.floats(0, 1), st.integers(0, 2**31))
def test_overlay_is_the_weighted_mean(height, width, alpha, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    labels = rng.choice([0, 1, 2, 255], (height, width))
    result = render.overlay(image, labels, PALETTE, alpha, borders=False)
    for y in range(height):
        for x in range(width):
            if labels[y, x] == 255:
                assert (result[y, x] == image[y, x]).all()
            else:
                expected = (1 - alpha) * image[y, x] + alpha * np.array(PALETTE.colors[labels[y, x]], dtype=float)
                assert np.abs(result[y, x] - expected).max() <= 0.51


def test_overlay_extremes_and_bad_alpha():
    image = np.full((2, 4, 3), 100, dtype=np.uint8)
    assert (render.overlay(image, HALVES, PALETTE, 0) == image).all()
    with pytest.raises(ValueError, match=r"alpha 1\.5"):
        render.overlay(image, HALVES, PALETTE, 1.5)


def test_borders_are_darker_and_only_between_classes():
    border = render.class_borders(HALVES)
    assert border.tolist() == [[False, True, True, False], [False, True, True, False]]
    image = np.full((2, 4, 3), 100, dtype=np.uint8)
    plain, bordered = (render.overlay(image, HALVES, PALETTE, 0.5, borders) for borders in (False, True))
    assert (plain[~border] == bordered[~border]).all()
    assert (bordered[border] < plain[border]).all()


def test_labels_of_another_size_are_resized_by_centres():
    labels = np.array([[0, 1], [2, 255]])
    assert render.resize_labels(labels, 4, 4).tolist() == np.kron(labels, np.ones((2, 2), dtype=int)).tolist()
    assert render.resize_labels(np.arange(9).reshape(3, 3), 1, 1).tolist() == [[4]]
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    assert render.overlay(image, labels, PALETTE, 1.0, borders=False)[3, 0].tolist() == [0, 255, 0]


def test_present_classes():
    labels = np.zeros((10, 10), dtype=np.uint8)
    labels[0, :2], labels[1] = 2, 255
    assert render.present_classes(labels, 3) == [0, 2]
    assert render.present_classes(labels, 3, min_share=0.05) == [0]


def test_legend_shows_only_the_given_classes_and_keeps_its_size():
    one = render.legend_column([1], PALETTE, 100, 120)
    assert one.shape == (100, 120, 3)
    shown = {tuple(pixel) for pixel in one.reshape(-1, 3)}
    assert (200, 10, 10) in shown
    assert (10, 20, 200) not in shown
    assert render.legend_column([], PALETTE, 100, 120).shape == (100, 120, 3)
    tiny = render.legend_column(list(range(3)), PALETTE, 30, 60)
    assert tiny.shape == (30, 60, 3), "what does not fit is counted, not drawn outside"


def test_legend_rows_wrap():
    wide, narrow = (render.legend_rows([0, 1, 2], PALETTE, width) for width in (900, 120))
    assert wide.shape[1] == 900
    assert narrow.shape[1] == 120
    assert narrow.shape[0] > 2 * wide.shape[0] - 20
    for picture in (wide, narrow):
        assert {(10, 20, 200), (200, 10, 10), (0, 255, 0)} <= {tuple(p) for p in picture.reshape(-1, 3)}


def test_side_by_side_keeps_the_pictures():
    first, second = np.full((20, 30, 3), 50, dtype=np.uint8), np.full((20, 40, 3), 90, dtype=np.uint8)
    row = render.side_by_side([first, second], ["first", "a title that is far too long for its picture"], gap=4)
    assert row.shape[1] == 30 + 4 + 40
    assert (row[-20:, :30] == first).all()
    assert (row[-20:, 34:] == second).all()
    assert row[:-20].max() > 200, "titles are written"
    with pytest.raises(ValueError, match="2 pictures and 1 titles"):
        render.side_by_side([first, second], ["x"])
    with pytest.raises(ValueError, match="one height"):
        render.side_by_side([first, second[:-1]])


def test_contact_sheet_layout():
    cells = [[np.full((10, 16, 3), 20 * (3 * r + c) + 40, dtype=np.uint8) for c in range(3)] for r in range(2)]
    plain = render.contact_sheet(cells, gap=2)
    assert plain.shape == (10 * 2 + 2 + 4, 16 * 3 + 4 + 4, 3)
    for r in range(2):
        for c in range(3):
            y, x = 2 + r * 12, 2 + c * 18
            assert (plain[y : y + 10, x : x + 16] == cells[r][c]).all()
    footer = render.legend_rows([0], PALETTE, 60)
    sheet = render.contact_sheet(cells, ["a", "b", "c"], ["one", "two"], footer)
    assert sheet.shape[0] > plain.shape[0] + footer.shape[0]
    with pytest.raises(ValueError, match="2 rows and 1 row titles"):
        render.contact_sheet(cells, row_titles=["one"])


def test_enlarge():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert render.enlarge(image, 1) is image
    assert render.enlarge(image, 3).shape == (6, 6, 3)


def test_palette_needs_a_colour_per_class():
    with pytest.raises(ValueError, match="2 class names, but 1 colours"):
        Palette(["a", "b"], [[0, 0, 0]])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(0.01, 1),
    st.sampled_from([np.uint8, np.int32]),
    st.integers(0, 99),
)
def test_overlay_with_borders_and_ignored_pixels(height, width, alpha, kind, seed):
    """Against the same in float64, for labels of one byte (counted and coloured by OpenCV) and of more."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    before = image.copy()
    labels = rng.choice([0, 1, 2, 255], (height, width)).astype(kind)
    result = render.overlay(image, labels, PALETTE, alpha)
    shown = (labels != 255)[..., None]
    colors = np.vstack([PALETTE.colors, np.zeros((253, 3))])[labels]
    expected = image + shown * alpha * (colors - image)
    expected[render.class_borders(labels)] *= 1 - 0.6 * alpha
    assert np.abs(result - expected).max() <= 1.01
    np.testing.assert_array_equal(image, before)


def test_counts_of_bytes_and_of_other_labels_agree():
    labels = np.random.default_rng(0).choice([0, 3, 7, 255], (37, 41))
    for kind in (np.uint8, np.int32):
        assert render.present_classes(labels.astype(kind), 8) == [0, 3, 7]
        assert render.present_classes(labels.astype(kind)[:, ::2], 4) == [0, 3]
