"""Emoji of a small color font are drawn, named, split and edited as declared."""

import io
import pickle
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import yaml
from fontTools.ttLib import TTFont
from PIL import Image, ImageColor, ImageFont, features

from support.color_font import COLORS, HAND, ROCKET, WOMAN, write_color_font
from tf_lightning.cli.main import main
from tf_lightning.drawings.emoji import (
    HAIR,
    TONES,
    Emoji,
    EmojiCaptions,
    EmojiEdits,
    EmojiFont,
    find_system_font,
)
from tf_lightning.errors import UserError

SIZES = {"tiny": 0.25, "huge": 0.75}
BACKGROUNDS = ["white", "navy", "pink"]
STYLES = {"image_size": 32, "sizes": SIZES, "backgrounds": BACKGROUNDS, "val_fraction": 0.3}
NAMES = {
    "rocket": ROCKET,
    "woman": WOMAN,
    "waving hand sign": HAND,
    **{f"waving hand sign, {word} skin tone": HAND + tone for tone, word in TONES.items()},
    "woman, red hair": WOMAN + "\u200d\U0001f9b0",
    "woman, curly hair": WOMAN + "\u200d\U0001f9b1",
    "woman, white hair": WOMAN + "\u200d\U0001f9b3",
    "woman, bald": WOMAN + "\u200d\U0001f9b2",
}


@pytest.fixture(scope="module")
def font(tmp_path_factory) -> str:
    return str(write_color_font(tmp_path_factory.mktemp("font") / "squares.ttf"))


@pytest.fixture(scope="module")
def captions(font) -> dict[str, dict[str, bytes]]:
    """Captions and pixels of each split."""
    source = EmojiCaptions(font, **STYLES)
    return {
        split: {text: image.tobytes() for text, image in source.documents(split)}
        for split in ("train", "val")
    }


@pytest.fixture(scope="module")
def edits(font) -> dict[str, list[tuple[bytes, str, bytes]]]:
    source = EmojiEdits(font, **STYLES)
    return {
        split: [(a.tobytes(), text, b.tobytes()) for a, text, b in source.documents(split)]
        for split in ("train", "val")
    }


def square(name: str, size: str, background: str) -> bytes:
    """An emoji of the small font as it should look: a square in the middle of an image."""
    side = round(32 * SIZES[size])
    pixels = np.full((32, 32, 3), ImageColor.getrgb(background), np.uint8)
    middle = slice((32 - side) // 2, (32 + side) // 2)
    pixels[middle, middle] = COLORS[NAMES[name]]
    return pixels.tobytes()


def drawn() -> dict[str, bytes]:
    """Every caption with the pixels that it should have."""
    return {
        f"{name}, {size}, on {background}": square(name, size, background)
        for name in NAMES
        for size in SIZES
        for background in BACKGROUNDS
    }


def test_every_emoji_is_drawn_in_every_size_and_on_every_background(captions):
    assert captions["train"] | captions["val"] == drawn()


def test_a_document_is_in_one_split(captions):
    assert not captions["train"].keys() & captions["val"].keys()
    assert not set(captions["train"].values()) & set(captions["val"].values())


def test_a_plain_emoji_is_held_out_in_a_style_and_a_variant_in_all_of_them(captions):
    styles = {name: set() for name in NAMES}
    for split, texts in captions.items():
        for text in texts:
            styles[text.rpartition(",")[0].rpartition(",")[0]].add(split)
    variants = {name for name in NAMES if ", " in name}
    assert all(len(styles[name]) == 1 for name in variants)
    assert {"val"} in [styles[name] for name in variants]
    assert all(styles[name] == {"train", "val"} for name in NAMES.keys() - variants)


def test_an_edit_shows_what_its_instruction_says(edits):
    names = {pixels: text.rsplit(", ", 2) for text, pixels in drawn().items()}
    results = {f"make the skin tone {tone}": f"{tone} skin tone" for tone in TONES.values()}
    results |= {instruction: hair for hair, instruction in HAIR.values()}
    seen = set()
    for before, instruction, after in edits["train"] + edits["val"]:
        (old, *style), (new, *new_style) = names[before], names[after]
        assert style == new_style and old != new
        assert old.split(",")[0] == new.split(",")[0]
        assert new.endswith(f", {results[instruction]}")
        seen.add(instruction)
    assert seen == results.keys()


def test_no_edit_of_training_shows_a_held_out_image(captions, edits):
    held_out = set(captions["val"].values())
    assert not held_out & {image for a, _, b in edits["train"] for image in (a, b)}
    assert not held_out & {before for before, _, _ in edits["val"]}
    assert {after for _, _, after in edits["val"]} <= held_out
    assert len(edits["val"]) > 5


def test_every_pair_of_variants_is_edited_in_each_style(font):
    """6 x 5 ordered pairs of hands less those to the plain one, and the same of hair."""
    source = EmojiEdits(font, **STYLES | {"val_fraction": 0.0})
    assert len(list(source.documents("train"))) == (25 + 16) * 6
    assert not list(source.documents("val"))


def test_the_name_of_an_emoji_has_its_skin_tone_and_its_hair():
    both = Emoji(WOMAN, "\U0001f3ff", "\U0001f9b0")
    assert both.name == "woman, dark skin tone, red hair"
    assert both.text == WOMAN + "\U0001f3ff\u200d\U0001f9b0"
    for tone in TONES:
        assert unicodedata.name(tone).startswith("EMOJI MODIFIER FITZPATRICK")


def test_documents_repeat(font, captions):
    source = pickle.loads(pickle.dumps(EmojiCaptions(font, **STYLES)))
    again = {text: image.tobytes() for text, image in source.documents("train")}
    assert list(again.items()) == list(captions["train"].items())


@pytest.mark.parametrize("kind", [EmojiCaptions, EmojiEdits])
def test_the_fingerprint_depends_on_all_that_determines_the_documents(kind, font, tmp_path):
    fewer = write_color_font(tmp_path / "fewer.ttf", {HAND: COLORS[HAND]})
    moved = tmp_path / "moved.ttf"
    moved.write_bytes(Path(font).read_bytes())
    first = kind(font, **STYLES).fingerprint("train")
    changes = {"image_size": 16, "sizes": {"tiny": 0.25}, "backgrounds": ["white"]}
    prints = [kind(font, **STYLES | {name: new}) for name, new in changes.items()]
    prints += [kind(str(fewer), **STYLES), kind(font, **STYLES | {"val_fraction": 0.2})]
    others = [first, kind(font, **STYLES).fingerprint("val")]
    others += [source.fingerprint("train") for source in prints]
    assert len(set(others)) == 7
    assert kind(str(moved), **STYLES).fingerprint("train") == first


def annotations(path: Path, head: str = "") -> str:
    lines = [
        f'<annotation cp="{ROCKET}">launch | space</annotation>',
        f'<annotation cp="{ROCKET}" type="tts">ship</annotation>',
    ]
    path.write_text(f"{head}<ldml><annotations>{''.join(lines)}</annotations></ldml>")
    return str(path)


def test_keywords_of_the_cldr_are_further_captions(font, tmp_path):
    options = {**STYLES, "annotations": annotations(tmp_path / "en.xml"), "val_fraction": 0.0}
    source = EmojiCaptions(font, **options)
    texts = [text for text, _ in source.documents("train")]
    (rocket,) = [text for text in texts if text == "rocket, tiny, on pink"]
    assert rocket.texts == tuple(f"{n}, tiny, on pink" for n in ("rocket", "launch, space", "ship"))
    assert sum(hasattr(text, "texts") for text in texts) == 6
    plain = EmojiCaptions(font, **options | {"annotations": None})
    assert source.fingerprint("train") != plain.fingerprint("train")


def test_bad_annotations_are_refused(font, tmp_path):
    for content in ("<ldml/>", "no xml"):
        (tmp_path / "bad.xml").write_text(content)
        source = EmojiCaptions(font, annotations=str(tmp_path / "bad.xml"))
        with pytest.raises(UserError, match=r"bad\.xml"):
            next(source.documents("train"))
    entity = '<!DOCTYPE ldml [<!ENTITY a "aaaa">]>'
    source = EmojiCaptions(font, annotations=annotations(tmp_path / "entity.xml", entity))
    with pytest.raises(UserError, match="declares entities"):
        next(source.documents("train"))


def test_fonts_that_cannot_be_used_are_refused(font, tmp_path, monkeypatch):
    mono = write_color_font(tmp_path / "mono.ttf", {})
    (tmp_path / "text.ttf").write_text("no font")
    for file, message in {
        mono: "draws no emoji in colors; give a color font",
        tmp_path / "text.ttf": "is not a font of 16 to 160 pixels; give",
        tmp_path / "none.ttf": "is not a file; give a font",
    }.items():
        with pytest.raises(UserError, match=message):
            next(EmojiCaptions(str(file)).documents("train"))
    monkeypatch.setattr(features, "check", lambda feature: False)
    with pytest.raises(UserError, match="FriBiDi; install it"):
        next(EmojiCaptions(font).documents("train"))


def test_the_fonts_of_the_three_systems_are_found_by_themselves(font, monkeypatch):
    asked = []

    def installed(name, size):
        asked.append(name)
        if name != "seguiemj.ttf":
            raise OSError("cannot open resource")
        return truetype(font, size)

    truetype = ImageFont.truetype
    monkeypatch.setattr(ImageFont, "truetype", installed)
    assert find_system_font() == Path(font)
    assert asked == ["NotoColorEmoji.ttf", "Apple Color Emoji.ttc", "seguiemj.ttf"]


def test_a_system_without_an_emoji_font_is_told_what_to_install(monkeypatch):
    def missing(*_):
        raise OSError("cannot open resource")

    monkeypatch.setattr(ImageFont, "truetype", missing)
    with pytest.raises(UserError, match="apt install fonts-noto-color-emoji, macOS: .* Windows: "):
        find_system_font()


@pytest.mark.parametrize("kind", [EmojiCaptions, EmojiEdits])
def test_arguments_out_of_range_are_refused(kind):
    for options, message in [
        ({"sizes": {"none": 0.0}}, "sizes="),
        ({"sizes": {}}, "sizes is empty"),
        ({"backgrounds": []}, "backgrounds is empty"),
        ({"backgrounds": ["bleu"]}, "'bleu', which is not a color"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"image_size": 0}, "image_size=0"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            kind(**options)


def system_font() -> Path | None:
    try:
        return find_system_font()
    except UserError:
        return None


@pytest.mark.skipif(system_font() is None, reason="needs an emoji font")
def test_the_emoji_of_the_system_have_the_pixels_that_the_font_stores():
    path = system_font()
    stored = TTFont(path, lazy=True, fontNumber=0)
    if "CBDT" not in stored:
        pytest.skip("compares with the bitmaps of CBDT")
    face, bitmaps = "\U0001f600", stored["CBDT"].strikeData[0]
    png = bitmaps[stored.getBestCmap()[ord(face)]].imageData
    drawn, expected = EmojiFont(None).draw(face), Image.open(io.BytesIO(png)).convert("RGBA")
    for color in ("white", "black"):
        pixels = [
            np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, color), image), int)
            for image in (drawn, expected)
        ]
        assert abs(pixels[0] - pixels[1]).max() <= 2  # FreeType rounds premultiplied colors


def test_inspect_counts_and_shows_the_emoji(font, captions, edits, tmp_path, capsys):
    options = {"font": font, **STYLES}
    sources = {
        name: {"class_path": f"tf_lightning.drawings.emoji.{kind}", "init_args": options}
        for name, kind in {"captions": "EmojiCaptions", "edits": "EmojiEdits"}.items()
    }
    data = {"sources": sources, "autoencoder": "pixels", "row_length": 128}
    data |= {"cache_dir": str(tmp_path / "data")}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    small = ["--model.patch_size", "8", "--model.transformer.vocab_size", "300"]
    main(["inspect", "-c", str(tmp_path / "data.yaml"), "-o", str(tmp_path), *small])
    report = capsys.readouterr().out
    for split in ("train", "val"):
        assert f"captions {split}: {len(captions[split])} documents" in report
        assert f"{2 * len(edits[split]):,} images of 16 patches" in report
    assert Image.open(tmp_path / "documents.png").width > 1000
