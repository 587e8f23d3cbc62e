"""Points are plotted at the pixels of their values."""

import numpy as np
from PIL import ImageColor

from callbacks.plot import (
    BOTTOM,
    FONT_SIZE,
    LEFT,
    PANEL,
    RIGHT,
    TITLE_SIZE,
    TOP,
    line_plots,
    scale,
)


def test_values_map_linearly_onto_pixels():
    assert scale([1.0, 2.0, 5.0], 0, 100) == [0, 25, 100]
    assert scale([3.0, 3.0], 0, 10) == [5, 5]


def test_each_metric_has_a_panel_with_a_dot_at_each_point():
    lines = {"fid": [(5.0, 10.0), (1.0, 30.0)], "clip": [(1.0, 2.0)], "a": [(0, 0)], "b": [(0, 0)]}
    page = line_plots(lines, "guidance scale")
    width, height = PANEL
    assert page.size == (3 * width, 2 * height)
    pixels = np.asarray(page)
    blue = ImageColor.getrgb("steelblue")
    first, last = (LEFT, TOP), (width - RIGHT, height - BOTTOM)  # 30 at 1, 10 at 5
    single = (width + (LEFT + width - RIGHT) // 2, (TOP + height - BOTTOM) // 2)
    for x, y in (first, last, single):
        assert tuple(pixels[y, x]) == blue
    assert tuple(pixels[TOP + 5, width - RIGHT]) != blue


def test_the_lines_of_a_panel_share_its_axes():
    page = line_plots({"fid": {"one": [(1.0, 30.0), (5.0, 20.0)], "two": [(5.0, 10.0)]}}, "steps")
    pixels, (width, height) = np.asarray(page), PANEL
    blue, orange = ImageColor.getrgb("steelblue"), ImageColor.getrgb("darkorange")
    middle = (TOP + height - BOTTOM) // 2
    assert tuple(pixels[TOP, LEFT]) == tuple(pixels[middle, width - RIGHT]) == blue
    assert tuple(pixels[height - BOTTOM, width - RIGHT]) == orange


def test_numbers_below_a_panel_do_not_overlap_and_include_the_last():
    def labels(xs):
        page = np.asarray(line_plots({"fid": [(x, 0.0) for x in xs]}, ""))
        return (page[PANEL[1] - BOTTOM + 12 : PANEL[1] - BOTTOM + 36] < 128).all(2).any(0)

    last = labels([1.0, 2.0])
    assert (labels([1.0, 1.99, 2.0]) == last).all() and last.any()
    assert labels([1.0, 1.5, 2.0]).sum() > last.sum()


def test_titles_and_numbers_are_drawn_in_their_font_sizes():
    page = np.asarray(line_plots({"H": [(0, 0.0)]}, ""))
    dark = (page < 128).all(2)

    def ink_height(rows, columns):
        return dark[rows, columns].any(1).sum()

    # A capital letter and a digit are about 0.7 of the font size high.
    assert 0.6 <= ink_height(slice(0, TOP - 9), slice(None)) / TITLE_SIZE <= 0.8
    below = slice(PANEL[1] - BOTTOM + 12, PANEL[1] - BOTTOM + 36)
    assert 0.6 <= ink_height(below, slice(None)) / FONT_SIZE <= 0.8
    assert 0.6 <= ink_height(slice(TOP, -BOTTOM), slice(0, LEFT - 9)) / FONT_SIZE <= 0.8
    assert TITLE_SIZE > FONT_SIZE >= 16
