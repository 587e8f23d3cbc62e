"""A contact sheet: sections of images with their captions and a mark for right or wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

TILE_WIDTH = 224  # pixels of an image with its caption
IMAGE_SIZE = 192  # longer side of the image within its tile, in pixels
MARGIN = 8  # pixels between a caption and the tile's edges
FONT_SIZE, TITLE_SIZE = 20, 24  # pixels
LINE_HEIGHT = 1.25  # unit: font size
WORD_SPACE = 0.3  # unit: font size; the font's own space is so narrow that words run together
RIGHT, WRONG = (0, 130, 60), (200, 0, 0)  # colors of the marks
MARK_SIZE = 28  # diameter of a mark, in pixels; it is centered on the image's upper right corner

Font = ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Tile:
    """An image, its caption, and whether the two match (None: unknown)."""

    image: Image.Image
    caption: str
    right: bool | None = None


def contact_sheet(sections: Sequence[tuple[str, Sequence[Tile]]], columns: int = 5) -> Image.Image:
    """Draw sections of tiles below each other, each under its title.

    A tile that is right has a white check mark on a green disc. One that is wrong has a white cross
    on a red disc and a red caption. If neither is known, it has no mark.

    Args:
        sections: title and tiles of each section.
        columns: tiles in a row.
    """
    parts = [draw_section(title, tiles, columns) for title, tiles in sections]
    page = Image.new("RGB", (columns * TILE_WIDTH, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    return page


def draw_section(title: str, tiles: Sequence[Tile], columns: int) -> Image.Image:
    """Draw a title and rows of tiles, which leave room for the longest caption."""
    font, title_font = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(TITLE_SIZE)
    width, num_rows = columns * TILE_WIDTH, -(-len(tiles) // columns)
    title_lines = wrap(title, width - 4 * MARGIN, title_font)
    captions = [wrap(tile.caption, TILE_WIDTH - 2 * MARGIN, font) for tile in tiles]
    title_height = round((len(title_lines) + 1) * LINE_HEIGHT * TITLE_SIZE)
    num_lines = max(map(len, captions), default=0)
    row_height = IMAGE_SIZE + MARGIN + round((num_lines + 0.75) * LINE_HEIGHT * FONT_SIZE)
    section = Image.new("RGB", (width, title_height + num_rows * row_height), "white")
    for number, words in enumerate(title_lines):
        top = round((number + 0.5) * LINE_HEIGHT * TITLE_SIZE)
        draw_words(section, (2 * MARGIN, top), words, title_font, "black")
    for number, (tile, lines) in enumerate(zip(tiles, captions, strict=True)):
        row, column = divmod(number, columns)
        corner = (column * TILE_WIDTH, title_height + row * row_height)
        draw_tile(section, corner, tile, lines, font)
    return section


def draw_tile(
    page: Image.Image, corner: tuple[int, int], tile: Tile, lines: Sequence[list[str]], font: Font
) -> None:
    """Draw a tile and the lines of its caption, with its upper left corner at `corner` (x, y)."""
    x, y = corner
    left = x + (TILE_WIDTH - IMAGE_SIZE) // 2
    image = ImageOps.contain(tile.image, (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    right, down = ((IMAGE_SIZE - side) // 2 for side in image.size)
    page.paste(image, (left + right, y + down))
    if tile.right is not None:
        disc = mark(tile.right)
        page.paste(disc, (left + IMAGE_SIZE - MARK_SIZE // 2, y - MARK_SIZE // 2), disc)
    color = WRONG if tile.right is False else "black"
    for number, words in enumerate(lines):
        line_left = x + (TILE_WIDTH - words_width(words, font)) / 2
        top = y + IMAGE_SIZE + MARGIN + round(number * LINE_HEIGHT * FONT_SIZE)
        draw_words(page, (line_left, top), words, font, color)


def mark(right: bool) -> Image.Image:
    """A disc with a check mark or a cross, RGBA, drawn at four times its size to smooth it."""
    size = 4 * MARK_SIZE
    disc = Image.new("RGBA", (size, size), (*(RIGHT if right else WRONG), 0))
    draw = ImageDraw.Draw(disc)
    draw.ellipse((0, 0, size - 1, size - 1), RIGHT if right else WRONG)
    check = [[(0.27, 0.53), (0.43, 0.69), (0.74, 0.34)]]
    cross = [[(0.32, 0.32), (0.68, 0.68)], [(0.32, 0.68), (0.68, 0.32)]]
    for stroke in check if right else cross:
        points = [(size * x, size * y) for x, y in stroke]
        draw.line(points, "white", round(0.11 * size), "curve")
    return disc.resize((MARK_SIZE, MARK_SIZE), Image.Resampling.LANCZOS)


def wrap(text: str, width: float, font: Font) -> list[list[str]]:
    """Break a text into lines of words, each at most `width` pixels wide unless it is one word."""
    lines: list[list[str]] = []
    for word in text.split():
        if lines and words_width([*lines[-1], word], font) <= width:
            lines[-1].append(word)
        else:
            lines.append([word])
    return lines


def words_width(words: Sequence[str], font: Font) -> float:
    """Width of a line of words, in pixels."""
    return sum(map(font.getlength, words)) + (len(words) - 1) * WORD_SPACE * font.size


def draw_words(
    page: Image.Image,
    corner: tuple[float, float],
    words: Sequence[str],
    font: Font,
    color: str | tuple[int, int, int],
) -> None:
    """Draw a line of words from left to right, with its upper left corner at `corner` (x, y)."""
    x, y = corner
    draw = ImageDraw.Draw(page)
    for word in words:
        draw.text((x, y), word, color, font)
        x += font.getlength(word) + WORD_SPACE * font.size
