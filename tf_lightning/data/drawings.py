"""What a model is trained on, drawn: documents with their pictures in place, and packed rows.

Shapes: B rows, T places a row.
"""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tf_lightning.batch import Batch

PAD, TEXT, SPECIAL, IMAGE, COPY = range(5)
KINDS = ("padding", "text", "<bos> <boi> <eoi> <eos>", "image", "clean copy")
# Two tones of each, for a document or an image and the next one.
TONES = np.array(
    [
        [(225, 225, 225), (225, 225, 225)],
        [(66, 113, 186), (118, 158, 219)],
        [(20, 20, 20), (20, 20, 20)],
        [(222, 128, 42), (242, 175, 105)],
        [(58, 150, 90), (120, 195, 145)],
    ],
    np.uint8,
)
LINE, STRIP, LABEL = 1024, 22, 18  # pixels: a line's width, a strip's height, of the words above it
COLUMN, PICTURE, GAP = 300, 128, 10
MAX_CHARACTERS = 500  # of a text
FONT = ImageFont.load_default(13)

Shown = tuple[str, list[str | Image.Image]]  # a title, texts and pictures in order


def kinds(batch: Batch, tokenizer) -> np.ndarray:
    """What each position holds, (B, T): PAD, TEXT, SPECIAL, IMAGE or COPY."""
    ids, image_ids = batch.input_ids.numpy(), batch.image_ids.numpy()
    specials = [tokenizer.bos_id, tokenizer.boi_id, tokenizer.eoi_id, tokenizer.eos_id]
    found = np.where(np.isin(ids, specials), SPECIAL, TEXT)
    found[image_ids >= 0] = IMAGE
    found[image_ids >= batch.num_images] = COPY
    found[batch.document_ids.numpy() < 0] = PAD
    return found


def draw_rows(batch: Batch, tokenizer, titles: Sequence[str]) -> Image.Image:
    """Each row as strips from left to right; a number stands where each document begins."""
    held, documents = kinds(batch, tokenizer), batch.document_ids.numpy()
    images = batch.image_ids.numpy()
    drawn = [
        _draw_row(*row, title) for *row, title in zip(held, documents, images, titles, strict=True)
    ]
    legend = _legend()
    page = Image.new("RGB", (LINE + 2 * GAP, sum(p.height for p in [legend, *drawn])), "white")
    top = 0
    for part in [legend, *drawn]:
        page.paste(part, (GAP, top))
        top += part.height
    return page


def _draw_row(
    held: np.ndarray, documents: np.ndarray, images: np.ndarray, title: str
) -> Image.Image:
    """One row of T positions, as many lines of LINE pixels as it takes."""
    width = max(1, LINE // len(held))  # of a position
    line = LINE // width
    height = STRIP + LABEL
    lines = -(-len(held) // line)
    page = Image.new("RGB", (LINE, LABEL + 4 + lines * (height + 4)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((0, 2), title, "black", FONT)
    tone = np.where(images >= 0, images, documents) % 2
    colours = TONES[held, tone]  # (T, 3)
    begins = np.flatnonzero(np.diff(documents, prepend=-2) != 0)
    for number in range(lines):
        here = slice(number * line, (number + 1) * line)
        top = LABEL + 4 + number * (height + 4)
        pixels = colours[None, here].repeat(STRIP, 0).repeat(width, 1)
        page.paste(Image.fromarray(pixels), (0, top + LABEL))
        free = 0  # where the next number may stand
        for begin in begins[(begins >= here.start) & (begins < here.stop)]:
            left = int(begin - here.start) * width
            draw.line((left, top + LABEL - 4, left, top + LABEL - 1), "black")
            if documents[begin] >= 0 and left >= free:
                label = str(documents[begin])
                draw.text((left, top + 1), label, "black", FONT)
                free = left + draw.textlength(label, FONT) + 4
    return page


def _legend() -> Image.Image:
    page = Image.new("RGB", (LINE, 34), "white")
    draw, left = ImageDraw.Draw(page), 0
    for tones, name in zip(TONES, KINDS, strict=True):
        for tone in tones:
            draw.rectangle((left, 10, left + 10, 22), tuple(tone.tolist()))
            left += 11
        draw.text((left + 4, 8), name, "black", FONT)
        left += 30 + round(draw.textlength(name, FONT))
    draw.text((left, 8), "0, 1, 2, ...: a document begins", "black", FONT)
    return page


def draw_documents(documents: Sequence[Shown], columns: int = 4) -> Image.Image:
    """A sheet of documents from top to bottom, each under its title, where there is most room."""
    cells = [_draw_document(*document) for document in documents]
    heights, places = [GAP] * columns, []
    for cell in cells:
        column = heights.index(min(heights))
        places.append((GAP + column * (COLUMN + GAP), heights[column]))
        heights[column] += cell.height + GAP
    page = Image.new("RGB", (GAP + columns * (COLUMN + GAP), max(heights)), "white")
    for cell, place in zip(cells, places, strict=True):
        page.paste(cell, place)
    return page


def _draw_document(title: str, parts: list[str | Image.Image]) -> Image.Image:
    pieces = [_draw_text(title, "dimgrey")]
    pieces += [_draw_text(p) if isinstance(p, str) else _enlarged(p) for p in parts]
    height = sum(piece.height + 4 for piece in pieces) + 8
    page = Image.new("RGB", (COLUMN, height), "white")
    ImageDraw.Draw(page).rectangle((0, 0, COLUMN - 1, height - 1), outline="silver")
    top = 6
    for piece in pieces:
        page.paste(piece, (8, top))
        top += piece.height + 4
    return page


def _enlarged(picture: Image.Image) -> Image.Image:
    """Its pixels as they are, where it is small."""
    scale = max(1, PICTURE // picture.width) * picture.width
    size = (
        min(scale, COLUMN - 16),
        round(picture.height * min(scale, COLUMN - 16) / picture.width),
    )
    return picture.resize(size, Image.Resampling.NEAREST)


def _draw_text(text: str, colour: str = "black") -> Image.Image:
    more = len(text) - MAX_CHARACTERS
    shown = text[:MAX_CHARACTERS] + (f" ... and {more:,} characters more" if more > 0 else "")
    lines = [row for line in shown.splitlines() for row in textwrap.wrap(line, 42) or [""]]
    page = Image.new("RGB", (COLUMN - 16, 17 * max(1, len(lines))), "white")
    ImageDraw.Draw(page).multiline_text((0, 0), "\n".join(lines), colour, FONT, spacing=3)
    return page
