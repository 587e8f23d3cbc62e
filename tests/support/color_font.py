"""A small color font: squares in the colors of COLR version 0, and one glyph without colors."""

from pathlib import Path

from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from tf_lightning.drawings.emoji import HAIR, TONES

EM = 1_000
ROCKET, HAND, WOMAN, GRAY = "\U0001f680", "\U0001f44b", "\U0001f469", "\u2b1b"
COLORS = {  # by the text that is drawn as a square of this color
    ROCKET: (255, 0, 0),
    HAND: (255, 255, 0),
    WOMAN: (0, 255, 0),
    **{HAND + tone: (50 * n, 40 * n, 30 * n) for n, tone in enumerate(TONES, 1)},
    **{f"{WOMAN}\u200d{hair}": (0, 60 * n, 255) for n, hair in enumerate(HAIR)},
}


def write_color_font(path: Path, colors: dict[str, tuple[int, int, int]] | None = None) -> Path:
    """Write the font; `colors` are the emoji that it has (default: COLORS)."""
    colors = COLORS if colors is None else colors
    parts = sorted({part for text in colors for part in text} | {GRAY, "\u200d", *TONES, *HAIR})
    names = {text: "g" + "_".join(f"{ord(part):x}" for part in text) for text in [*parts, *colors]}
    glyphs = [".notdef", "square", *dict.fromkeys(names.values())]
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, EM), (EM, EM), (EM, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square, empty = pen.glyph(), TTGlyphPen(None).glyph()
    font = FontBuilder(EM, isTTF=True)
    font.setupGlyphOrder(glyphs)
    font.setupCharacterMap({ord(part): names[part] for part in parts})
    blank = {".notdef", names["\u200d"]}
    font.setupGlyf({glyph: empty if glyph in blank else square for glyph in glyphs})
    joiner = names["\u200d"]
    font.setupHorizontalMetrics({g: (0 if g == joiner else EM, 0) for g in glyphs})
    font.setupHorizontalHeader(ascent=EM, descent=0)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    if colors:
        font.setupCOLR({names[text]: [("square", i)] for i, text in enumerate(colors)}, version=0)
        font.setupCPAL([[(*(c / 255 for c in color), 1.0) for color in colors.values()]])
    joined = [
        f"sub {' '.join(names[part] for part in text)} by {names[text]};"
        for text in colors
        if len(text) > 1
    ]
    if joined:
        rules = f"feature ccmp {{ {' '.join(joined)} }} ccmp;"
        addOpenTypeFeaturesFromString(font.font, rules)
    font.save(path)
    return path
