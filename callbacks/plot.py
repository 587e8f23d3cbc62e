"""Line plots without a plotting library: one panel a metric, drawn by Pillow."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

PANEL = (360, 260)  # width, height
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 36, 40  # of the axes in a panel
COLUMNS = 3
MOST_LABELS = 6  # below a panel

Line = Sequence[tuple[float, float]]


def line_plots(lines: Mapping[str, Line], x_label: str) -> Image.Image:
    """A page of panels, each with its title, its points and their values."""
    width, height = PANEL
    columns = min(COLUMNS, len(lines))
    page = Image.new("RGB", (columns * width, -(-len(lines) // columns) * height), "white")
    for number, (title, line) in enumerate(lines.items()):
        row, column = divmod(number, columns)
        draw_panel(page, (column * width, row * height), title, line, x_label)
    return page


def draw_panel(
    page: Image.Image, corner: tuple[int, int], title: str, line: Line, x_label: str
) -> None:
    """One panel with its upper left corner at `corner`."""
    draw, (left, top), (width, height) = ImageDraw.Draw(page), corner, PANEL
    xs, ys = zip(*sorted(line), strict=True)
    across = scale(xs, left + LEFT, left + width - RIGHT)
    up = scale(ys, top + height - BOTTOM, top + TOP)
    draw.text((left + width / 2, top + 8), title, "black", anchor="ma")
    box = (left + LEFT - 8, top + TOP - 8, left + width - RIGHT + 8, top + height - BOTTOM + 8)
    draw.rectangle(box, outline="grey")
    draw.text((left + width / 2, top + height - 18), x_label, "black", anchor="ma")
    points = list(zip(across, up, strict=True))
    draw.line(points, "steelblue", 2)
    every = -(-len(xs) // MOST_LABELS)
    for number, ((x, y), value) in enumerate(zip(points, xs, strict=True)):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), "steelblue")
        if (len(xs) - 1 - number) % every == 0:  # the last always has its label
            draw.text((x, top + height - BOTTOM + 10), f"{value:g}", "black", anchor="ma")
    for value, y in {min(ys): max(up), max(ys): min(up)}.items():
        draw.text((left + LEFT - 12, y), f"{value:.5g}", "black", anchor="rm")


def scale(values: Sequence[float], low: float, high: float) -> list[float]:
    """Values mapped linearly so that the least is at `low` and the greatest at `high`."""
    least, spread = min(values), max(values) - min(values)
    return [low + (high - low) * ((value - least) / spread if spread else 0.5) for value in values]
