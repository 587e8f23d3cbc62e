"""Line plots without a plotting library: one panel a metric, drawn by Pillow."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

PANEL = (360, 260)  # width, height
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 36, 40  # of the axes in a panel
COLUMNS = 3
LABEL = 50  # width of a number below a panel
COLOURS = ("steelblue", "darkorange", "seagreen", "crimson")

Line = Sequence[tuple[float, float]]


def line_plots(lines: Mapping[str, Line | Mapping[str, Line]], x_label: str) -> Image.Image:
    """A page of panels, each with its title, its line or several with names, and their values."""
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
    """One panel with its upper left corner at `corner`; at most four lines."""
    draw, (left, top), (width, height) = ImageDraw.Draw(page), corner, PANEL
    points = [point for line in lines.values() for point in sorted(line)]
    xs, ys = zip(*points, strict=True)
    across = scale(xs, left + LEFT, left + width - RIGHT)
    up = scale(ys, top + height - BOTTOM, top + TOP)
    draw.text((left + width / 2, top + 8), title, "black", anchor="ma")
    box = (left + LEFT - 8, top + TOP - 8, left + width - RIGHT + 8, top + height - BOTTOM + 8)
    draw.rectangle(box, outline="grey")
    draw.text((left + width / 2, top + height - 18), x_label, "black", anchor="ma")
    placed, start = list(zip(across, up, strict=True)), 0
    for place, ((name, line), colour) in enumerate(zip(lines.items(), COLOURS, strict=False)):
        mine, start = placed[start : start + len(line)], start + len(line)
        draw.line(mine, colour, 2)
        for x, y in mine:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        draw.text((left + width - RIGHT, top + TOP + 12 * place), name, colour, anchor="ra")
    free = left + width
    for value, x in sorted(zip(xs, across, strict=True), reverse=True):  # the last has its label
        if x <= free:
            draw.text((x, top + height - BOTTOM + 10), f"{value:.4g}", "black", anchor="ma")
            free = x - LABEL
    for value, y in {min(ys): max(up), max(ys): min(up)}.items():
        draw.text((left + LEFT - 12, y), f"{value:.5g}", "black", anchor="rm")


def scale(values: Sequence[float], low: float, high: float) -> list[float]:
    """Values mapped linearly so that the least is at `low` and the greatest at `high`."""
    least, spread = min(values), max(values) - min(values)
    return [low + (high - low) * ((value - least) / spread if spread else 0.5) for value in values]
