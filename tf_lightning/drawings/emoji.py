"""Emoji of a color font as two sources of documents: captioned images, and edits.

An emoji is a symbol that the font draws in colors, such as "rocket". A person or a hand may have
one of Unicode's five skin tones, and some people one of its hair styles. Each emoji is drawn in
several sizes on several backgrounds. Its caption is its name in Python's `unicodedata`.
"""

import hashlib
import random
import sys
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import permutations, product
from pathlib import Path
from typing import Annotated, NamedTuple

from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps, features

from tf_lightning.data.documents import AnyText, BadSample, RawDocument, Split
from tf_lightning.data.readers.files import held_out
from tf_lightning.drawings.safe_xml import parse_xml
from tf_lightning.errors import UserError
from tf_lightning.ranges import PositiveInt, Range, check_fields

# Fonts of Debian and other systems, of macOS, and of Windows, with a size that each of them has.
SYSTEM_FONTS = {"NotoColorEmoji.ttf": 109, "Apple Color Emoji.ttc": 160, "seguiemj.ttf": 160}
FONT_SIZES = range(160, 15, -1)  # tried in this order: a font of bitmaps may have a single size
SYMBOLS = [c for c in map(chr, range(sys.maxunicode)) if unicodedata.category(c) in ("So", "Sm")]
JOINER = "\u200d"
MISSING = chr(sys.maxunicode)  # no character, so a font draws its sign for a missing glyph
TONES = {
    "\U0001f3fb": "light",
    "\U0001f3fc": "medium-light",
    "\U0001f3fd": "medium",
    "\U0001f3fe": "medium-dark",
    "\U0001f3ff": "dark",
}
HAIR = {  # part of a caption, instruction of an edit
    "\U0001f9b0": ("red hair", "make the hair red"),
    "\U0001f9b1": ("curly hair", "make the hair curly"),
    "\U0001f9b3": ("white hair", "make the hair white"),
    "\U0001f9b2": ("bald", "remove the hair"),
}

SIZES = {"small": 0.55, "large": 0.95}
BACKGROUNDS = ["white", "black", "skyblue", "pink"]
SizeInImage = Annotated[float, Range(gt=0, le=1)]


class Emoji(NamedTuple):
    """A symbol with a skin tone and a hair style, one character each; "" for none."""

    symbol: str
    tone: str = ""
    hair: str = ""

    @property
    def text(self) -> str:
        """The characters that a font draws as one glyph."""
        return self.symbol + self.tone + (JOINER + self.hair if self.hair else "")

    @property
    def name(self) -> str:
        """The name, such as "waving hand sign, dark skin tone"."""
        tone = f", {TONES[self.tone]} skin tone" if self.tone else ""
        hair = f", {HAIR[self.hair][0]}" if self.hair else ""
        return unicodedata.name(self.symbol).lower() + tone + hair


class Style(NamedTuple):
    """Names of the size and of the background color that an emoji is drawn with."""

    size: str
    background: str


@dataclass(frozen=True)
class EmojiCaptions:
    """Documents [caption, image] of every emoji in every size and on every background.

    A held-out symbol is drawn in training in other sizes or on other backgrounds. A held-out skin
    tone or hair style of a symbol is not drawn in training at all, but others of the symbol are.

    Args:
        font: file of a color font; null: the emoji font of the system.
        image_size: side of the square images in pixels.
        sizes: side of the emoji as a share of the image's side, in (0, 1], by the word that the
            caption has for it.
        backgrounds: color names, such as "white" and "skyblue".
        val_fraction: share of the compositions to hold out, in [0, 1).
        annotations: XML file of the Unicode CLDR with names and keywords, such as
            /usr/share/unicode/cldr/common/annotations/en.xml; each epoch draws one of an emoji's
            Unicode name, CLDR name and keywords. null: the Unicode name alone.
    """

    font: str | None = None
    image_size: PositiveInt = 64
    sizes: dict[str, SizeInImage] = field(default_factory=lambda: dict(SIZES))
    backgrounds: list[str] = field(default_factory=lambda: list(BACKGROUNDS))
    val_fraction: Annotated[float, Range(ge=0, lt=1)] = 0.1
    annotations: str | None = None

    def __post_init__(self) -> None:
        _check(self)

    def documents(self, split: Split) -> Iterator[RawDocument]:
        """Yield the documents of a split, in order."""
        font = EmojiFont(self.font)
        words = read_annotations(self.annotations) if self.annotations else {}
        for emoji in (emoji for family in font.families() for emoji in family):
            names = [emoji.name, *words.get(emoji.text, ())]
            for style, image in _images(self, font.draw(emoji.text)).items():
                if _split(self, emoji, style) == split:
                    texts = [f"{name}, {style.size}, on {style.background}" for name in names]
                    yield [AnyText(texts), image]

    def fingerprint(self, split: Split) -> str:
        """Identify the documents of a split: equal documents have equal fingerprints."""
        words = read_annotations(self.annotations) if self.annotations else {}
        return _fingerprint(self, split, zlib.crc32(repr(words).encode()))


@dataclass(frozen=True)
class EmojiEdits:
    """Documents [image, instruction, edited image] that change the skin tone or the hair.

    The compositions of `EmojiCaptions` with the same arguments are held out: no training document
    has one of them, and each edited image of a validation document is one of them.

    Args:
        font: file of a color font; null: the emoji font of the system.
        image_size: side of the square images in pixels.
        sizes: side of the emoji as a share of the image's side, in (0, 1], by name.
        backgrounds: color names, such as "white" and "skyblue".
        val_fraction: share of the compositions to hold out, in [0, 1).
    """

    font: str | None = None
    image_size: PositiveInt = 64
    sizes: dict[str, SizeInImage] = field(default_factory=lambda: dict(SIZES))
    backgrounds: list[str] = field(default_factory=lambda: list(BACKGROUNDS))
    val_fraction: Annotated[float, Range(ge=0, lt=1)] = 0.1

    def __post_init__(self) -> None:
        _check(self)

    def documents(self, split: Split) -> Iterator[RawDocument]:
        """Yield the documents of a split, in order."""
        font = EmojiFont(self.font)
        for family in font.families():
            if len(family) == 1:
                continue
            drawn = {emoji: _images(self, font.draw(emoji.text)) for emoji in family}
            for before, after in permutations(family, 2):
                instruction = edit_instruction(before, after)
                for style in drawn[before] if instruction else ():
                    splits = [_split(self, emoji, style) for emoji in (before, after)]
                    if splits == ["train", split]:
                        yield [drawn[before][style], instruction, drawn[after][style]]

    def fingerprint(self, split: Split) -> str:
        """Identify the documents of a split: equal documents have equal fingerprints."""
        return _fingerprint(self, split)


def edit_instruction(before: Emoji, after: Emoji) -> str | None:
    """Return the instruction that changes one emoji of a family to another; None if none does."""
    if before.hair == after.hair and after.tone:
        return f"make the skin tone {TONES[after.tone]}"
    if before.tone == after.tone and after.hair:
        return HAIR[after.hair][1]
    return None


class EmojiFont:
    """The emoji of a color font.

    Args:
        file: path of the font; None: the emoji font of the system.

    Raises:
        UserError: there is no such font, it cannot be read, or Pillow cannot join characters.
    """

    def __init__(self, file: str | None):
        if not features.check("raqm"):
            raise UserError(
                "Pillow draws skin tones only with the library FriBiDi; install it (Debian: "
                "apt install libfribidi0, macOS: brew install fribidi, Windows: fribidi.dll)"
            )
        self.path = Path(file).expanduser() if file else find_system_font()
        self.font = open_font(self.path)

    def families(self) -> list[list[Emoji]]:
        """List every symbol that is drawn in colors, each with its skin tones and hair styles.

        An emoji that looks like another one is left out. The order is random but always the same,
        so that the first documents are of all kinds.

        Raises:
            UserError: there are none.
        """
        seen = {self._look(MISSING)}
        families = [self._family(symbol, seen) for symbol in SYMBOLS if self._has_colors(symbol)]
        if not any(families):
            raise UserError(
                f"the font {self.path} draws no emoji in colors; give a color font with bitmaps or "
                "COLR version 0, such as NotoColorEmoji.ttf"
            )
        random.Random(0).shuffle(families)
        return families

    def draw(self, text: str, color: str = "black") -> Image.Image:
        """Draw a text as an RGBA image; `color` is for glyphs without colors."""
        left, top, right, bottom = self.font.getbbox(text)
        image = Image.new("RGBA", (max(1, round(right - left)), max(1, round(bottom - top))))
        ImageDraw.Draw(image).text((-left, -top), text, color, self.font, embedded_color=True)
        # Drawn on transparent black, colors are premultiplied with their opacity.
        return Image.frombytes("RGBa", image.size, image.tobytes()).convert("RGBA")

    def _has_colors(self, symbol: str) -> bool:
        """Return whether a symbol is drawn, in colors that do not depend on the text color."""
        image = self.draw(symbol, "red")
        if image.getbbox() is None:
            return False
        return image.tobytes() == self.draw(symbol, "blue").tobytes()

    def _family(self, symbol: str, seen: set[bytes]) -> list[Emoji]:
        """List a symbol and its variants, and add digests of their pixels to `seen`."""
        tones = [tone for tone in ("", *TONES) if self._is_one(Emoji(symbol, tone))]
        hair = [style for style in ("", *HAIR) if self._is_one(Emoji(symbol, hair=style))]
        family = []
        for emoji in (Emoji(symbol, *parts) for parts in product(tones, hair)):
            look = self._look(emoji.text)
            if look not in seen and self._is_one(emoji):
                family.append(emoji)
            seen.add(look)
        return family

    def _look(self, text: str) -> bytes:
        """Return a digest of the pixels of a text."""
        return hashlib.sha256(self.draw(text).tobytes()).digest()

    def _is_one(self, emoji: Emoji) -> bool:
        """Return whether the font has one glyph for an emoji, not one for each of its parts."""
        return self.font.getlength(emoji.text) < 1.5 * self.font.getlength(emoji.symbol)


def find_system_font() -> Path:
    """Return the file of the system's emoji font.

    Raises:
        UserError: there is none.
    """
    for name, size in SYSTEM_FONTS.items():
        with suppress(OSError):
            return Path(ImageFont.truetype(name, size).path)
    raise UserError(
        "no emoji font was found; install one (Debian, Ubuntu: apt install fonts-noto-color-emoji, "
        "macOS: Apple Color Emoji, Windows: Segoe UI Emoji, others: the package of "
        "NotoColorEmoji.ttf) or give the file of one as `font`"
    )


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    """Open a font at the first of FONT_SIZES that it has.

    Raises:
        UserError: the file is not a font of any of these sizes.
    """
    if not path.is_file():
        raise UserError(f"font={str(path)!r} is not a file; give a font such as NotoColorEmoji.ttf")
    for size in FONT_SIZES:
        with suppress(OSError):
            return ImageFont.truetype(path, size)
    raise UserError(
        f"{path} is not a font of {FONT_SIZES[-1]} to {FONT_SIZES[0]} pixels; give a font such as "
        "NotoColorEmoji.ttf"
    )


def read_annotations(file: str) -> dict[str, list[str]]:
    """Read the name and the keywords of each emoji from an annotation file of the Unicode CLDR.

    Raises:
        UserError: the file has no annotations.
    """
    try:
        found = parse_xml(Path(file).read_bytes()).findall("annotations/annotation")
    except (BadSample, OSError) as error:
        raise UserError(f"annotations={file!r} cannot be read: {error}") from error
    if not found:
        raise UserError(f"{file} has no annotations; give a file such as annotations/en.xml")
    words: dict[str, list[str]] = {}
    for element in found:
        text = (element.text or "").replace(" | ", ", ")
        words.setdefault(element.get("cp", ""), []).append(text)
    return words


def _split(source: EmojiCaptions | EmojiEdits, emoji: Emoji, style: Style) -> Split:
    """Return the split of a composition: a variant in all styles, a plain symbol in each style."""
    is_variant = emoji.tone or emoji.hair
    key = emoji.text if is_variant else " ".join((emoji.text, *style))
    return "val" if held_out(key, source.val_fraction) else "train"


def _images(source: EmojiCaptions | EmojiEdits, glyph: Image.Image) -> dict[Style, Image.Image]:
    """Draw a glyph in the middle of an RGB image, in each size and on each background."""
    images = {}
    for size, share in source.sizes.items():
        side = max(1, round(share * source.image_size))
        resized = ImageOps.contain(glyph, (side, side), Image.Resampling.LANCZOS)
        corner = tuple((source.image_size - length) // 2 for length in resized.size)
        for background in source.backgrounds:
            image = Image.new("RGBA", (source.image_size,) * 2, background)
            image.alpha_composite(resized, corner)
            images[Style(size, background)] = image.convert("RGB")
    return images


def _check(source: EmojiCaptions | EmojiEdits) -> None:
    check_fields(source)
    for name in ("sizes", "backgrounds"):
        if not getattr(source, name):
            raise UserError(f"{name} is empty; give at least one")
    for color in source.backgrounds:
        try:
            ImageColor.getrgb(color)
        except ValueError as error:
            raise UserError(
                f"backgrounds has {color!r}, which is not a color; give names such as 'skyblue'"
            ) from error


def _fingerprint(source: EmojiCaptions | EmojiEdits, split: Split, *more: int) -> str:
    # The code and the tables of names are included because they determine the documents.
    font = EmojiFont(source.font).path
    with font.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    parts = (
        type(source).__name__,
        split,
        digest,
        source.image_size,
        source.sizes,
        source.backgrounds,
        source.val_fraction,
        *more,
        unicodedata.unidata_version,
        zlib.crc32(Path(__file__).read_bytes()),
    )
    return " ".join(map(str, parts))
