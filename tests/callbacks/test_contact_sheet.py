"""Contact sheets are legible: large text, separate words, marks that do not rely on color."""

import numpy as np
from PIL import Image, ImageFont

from callbacks.contact_sheet import (
    FONT_SIZE,
    IMAGE_SIZE,
    MARGIN,
    MARK_SIZE,
    RIGHT,
    TILE_WIDTH,
    TITLE_SIZE,
    WRONG,
    Tile,
    contact_sheet,
    mark,
    words_width,
    wrap,
)

LINE = round(1.25 * FONT_SIZE)


def tiles(count: int, right: bool | None = None, caption: str = "a blue image") -> list[Tile]:
    return [Tile(Image.new("RGB", (64, 64), "blue"), caption, right)] * count


def share_of(image: Image.Image, color: tuple[int, int, int]) -> float:
    return (np.asarray(image.convert("RGB")) == color).all(-1).mean()


def caption_ink(caption: str) -> np.ndarray:
    """Ink of a sheet's only caption, (height, width) bool."""
    sheet = np.asarray(contact_sheet([("", tiles(1, caption=caption))], columns=1))
    bottom = np.flatnonzero((sheet == (0, 0, 255)).all(-1).any(1)).max()
    return (sheet[bottom + 1 :] < 128).all(-1)


def test_a_section_has_a_title_and_rows_of_tiles():
    sheet = contact_sheet([("first", tiles(7)), ("second", tiles(1))])
    title = round(2 * 1.25 * TITLE_SIZE)
    row = IMAGE_SIZE + MARGIN + round(1.75 * LINE)
    assert sheet.size == (5 * TILE_WIDTH, (title + 2 * row) + (title + row))
    assert share_of(sheet, (0, 0, 255)) * sheet.width * sheet.height == 8 * IMAGE_SIZE**2


def test_longer_captions_and_titles_have_more_room():
    short = contact_sheet([("title", tiles(1))], columns=1)
    long = contact_sheet([("title", tiles(1, caption="a blue image " * 3))], columns=1)
    assert long.height == short.height + LINE
    assert contact_sheet([("title " * 9, tiles(1))], columns=1).height > short.height + TITLE_SIZE


def test_text_is_at_least_20_pixels():
    assert FONT_SIZE >= 20 and TITLE_SIZE >= 20
    rows = np.flatnonzero(caption_ink("bp").any(1))
    assert rows.max() - rows.min() + 1 >= 18  # from the top of the b to the bottom of the p


def test_the_space_between_words_is_wider_than_between_letters():
    def gaps(caption: str) -> list[int]:
        columns = np.flatnonzero(caption_ink(caption).any(0))
        return sorted(np.diff(columns) - 1)

    between_letters = gaps("isan")[-1]
    assert gaps("is an")[-1] >= max(between_letters + 3, 0.25 * FONT_SIZE)
    assert gaps("is an")[-2] <= between_letters


def test_lines_are_as_full_as_fits_and_keep_every_word():
    font = ImageFont.load_default(FONT_SIZE)
    text = "there is a purple triangle left of an orange square"
    lines = wrap(text, 200, font)
    assert [word for line in lines for word in line] == text.split()
    assert all(words_width(line, font) <= 200 for line in lines)
    for line, following in zip(lines, lines[1:], strict=False):
        assert words_width([*line, following[0]], font) > 200
    assert wrap("an unbreakableword", 20, font) == [["an"], ["unbreakableword"]]
    assert wrap("", 200, font) == []


def test_right_and_wrong_differ_in_shape_and_unknown_has_no_mark():
    right, wrong = (np.asarray(mark(right)) for right in (True, False))
    assert right.shape == wrong.shape == (MARK_SIZE, MARK_SIZE, 4)
    white = [(image[..., :3] > 200).all(-1) & (image[..., 3] > 200) for image in (right, wrong)]
    assert (white[0] ^ white[1]).sum() > 0.05 * MARK_SIZE**2  # the strokes differ
    sheets = {kind: contact_sheet([("", tiles(1, kind))], 1) for kind in (True, False, None)}
    assert share_of(sheets[True], RIGHT) > 0 == share_of(sheets[True], WRONG)
    assert share_of(sheets[False], WRONG) > 0 == share_of(sheets[False], RIGHT)
    assert share_of(sheets[None], RIGHT) == share_of(sheets[None], WRONG) == 0


def test_the_caption_of_a_wrong_tile_is_red():
    sheet = np.asarray(contact_sheet([("", tiles(1, False))], 1))
    below = sheet[-2 * LINE :]
    assert (below == WRONG).all(-1).sum() > 50 and not (below == 0).all(-1).any()
