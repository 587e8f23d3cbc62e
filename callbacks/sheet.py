"""A contact sheet: pictures over their words, and files that are written whole or not at all."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from PIL import Image, ImageDraw, ImageFont

TILE_WIDTH = 250  # of a picture with its words
PICTURE = 128  # side of the picture


@dataclass(frozen=True)
class Tile:
    """A picture, the words below it, and whether they fit."""

    picture: Image.Image
    words: str
    right: bool


def contact_sheet(
    sections: Sequence[tuple[str, Sequence[Tile]]], columns: int = 6, font_size: int = 10
) -> Image.Image:
    """Sections of tiles, each under its title; words that do not fit their picture are red."""
    height, title_height = PICTURE + round(6.2 * font_size), 3 * font_size
    heights = [title_height + -(-len(tiles) // columns) * height for _, tiles in sections]
    page = Image.new("RGB", (columns * TILE_WIDTH, sum(heights)), "white")
    draw, top = ImageDraw.Draw(page), 0
    font = ImageFont.load_default(font_size)
    for (title, tiles), section_height in zip(sections, heights, strict=True):
        draw.text((12, top + font_size), title, "black", font)
        for number, tile in enumerate(tiles):
            row, column = divmod(number, columns)
            draw_tile(page, tile, column * TILE_WIDTH, top + title_height + row * height, font_size)
        top += section_height
    return page


def draw_tile(page: Image.Image, tile: Tile, left: int, top: int, font_size: int) -> None:
    """One tile with its upper left corner at (left, top)."""
    picture = tile.picture.resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    page.paste(picture, (left + (TILE_WIDTH - PICTURE) // 2, top))
    draw, colour = ImageDraw.Draw(page), "black" if tile.right else "red"
    lines = textwrap.wrap(tile.words, 380 // font_size) + ([] if tile.right else ["(wrong)"])
    for number, line in enumerate(lines):
        place = (left + TILE_WIDTH // 2, top + PICTURE + 6 + round(1.3 * font_size * number))
        draw.text(place, line, colour, ImageFont.load_default(font_size), anchor="ma")


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a whole PNG or nothing."""
    partial = path.with_name(path.name + ".partial")
    picture.save(partial, format="PNG")
    partial.replace(path)


def run_folder(trainer: L.Trainer) -> Path:
    """The run's folder while it trains; a folder of its own in it for an evaluation.

    To be asked on every rank at once: `log_dir` is rank zero's, sent to the others.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    folder = folder if trainer.state.fn == "fit" else folder / str(trainer.state.fn.value)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
