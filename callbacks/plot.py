"""Line plots drawn with Pillow, without a plotting library: one panel for each metric."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

PANEL = (480, 340)  # width, height
LEFT, RIGHT, TOP, BOTTOM = 100, 32, 56, 68  # margins of the axes in a panel
COLUMNS = 3
FONT_SIZE, TITLE_SIZE = 16, 20  # pixels
LINE_HEIGHT = 20  # of the names of lines, in pixels
GAP = 12  # smallest distance of the numbers below a panel, in pixels
COLORS = ("steelblue", "darkorange", "seagreen", "crimson")

Line = Sequence[tuple[float, float]]


def line_plots(lines: Mapping[str, Line | Mapping[str, Line]], x_label: str) -> Image.Image:
    """Draw a page of panels, each with its title and one line or several named lines.

    Args:
        lines: points (x, y) of each panel's line, or of its named lines, by the panel's title.
        x_label: label of all horizontal axes.
    """
    width, height = PANEL
    columns = min(COLUMNS, len(lines))
    page = Image.new("RGB", (columns * width, -(-len(lines) // columns) * height), "white")
    for number, (title, line) in enumerate(lines.items()):
        row, column = divmod(number, columns)
        named = line if isinstance(line, Mapping) else {"": line}
        draw_panel(page, (column * width, row * height), title, named, x_label)
    return page


def draw_panel(
    page: Image.Image,
    corner: tuple[int, int],
    title: str,
    lines: Mapping[str, Line],
    x_label: str,
) -> None:
    """Draw a panel of at most four lines with its upper left corner at `corner`."""
    draw, (left, top), (width, height) = ImageDraw.Draw(page), corner, PANEL
    points = [point for line in lines.values() for point in sorted(line)]
    xs, ys = zip(*points, strict=True)
    x_pixels = scale(xs, left + LEFT, left + width - RIGHT)
    y_pixels = scale(ys, top + height - BOTTOM, top + TOP)
    font, title_font = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(TITLE_SIZE)
    draw.text((left + width / 2, top + 14), title, "black", title_font, anchor="ma")
    box = (left + LEFT - 8, top + TOP - 8, left + width - RIGHT + 8, top + height - BOTTOM + 8)
    draw.rectangle(box, outline="gray")
    draw.text((left + width / 2, top + height - 28), x_label, "black", font, anchor="ma")
    pixels, start = list(zip(x_pixels, y_pixels, strict=True)), 0
    for number, ((name, line), color) in enumerate(zip(lines.items(), COLORS, strict=False)):
        line_pixels, start = pixels[start : start + len(line)], start + len(line)
        draw.line(line_pixels, color, 2)
        for x, y in line_pixels:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), color)
        name_corner = (left + width - RIGHT, top + TOP + LINE_HEIGHT * number)
        draw.text(name_corner, name, color, font, anchor="ra")
    free = math.inf  # right end of the room for the next number
    # From right to left, so that the last number always has room.
    for value, x in sorted(zip(xs, x_pixels, strict=True), reverse=True):
        label = f"{value:.4g}"
        half = font.getlength(label) / 2
        if x + half <= free:
            draw.text((x, top + height - BOTTOM + 14), label, "black", font, anchor="ma")
            free = x - half - GAP
    for value, y in {min(ys): max(y_pixels), max(ys): min(y_pixels)}.items():
        draw.text((left + LEFT - 12, y), f"{value:.5g}", "black", font, anchor="rm")


def scale(values: Sequence[float], low: float, high: float) -> list[float]:
    """Map values linearly, the smallest to `low` and the largest to `high`; equal ones between."""
    least, spread = min(values), max(values) - min(values)
    return [low + (high - low) * ((value - least) / spread if spread else 0.5) for value in values]
