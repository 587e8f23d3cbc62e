"""Planted faults are found among many documents, and the others are not."""

from array import array

import numpy as np
import pytest
from PIL import Image

from support.files import encoded_image, write_lines
from support.sources import GreyImages
from tf_lightning.data import CaptionFolders, CaptionRows, EditFiles
from tf_lightning.data.documents import AnyText, Skipped, identified
from tf_lightning.data.quality import (
    COPY,
    LONG,
    LOOKALIKE,
    NO_LETTERS,
    REPEAT,
    SMALL,
    WRITING,
    Lines,
    Quality,
    digest,
    image_file_size,
    script_of,
)

GREEK, RUSSIAN, CHINESE, JAPANESE = "κόκκινος κύκλος", "красный круг", "红色的圆圈", "赤い円です"


def picture(seed: int, size=(96, 96), coarse: int = 6) -> Image.Image:
    colors = np.random.default_rng(seed).integers(0, 256, (coarse, coarse, 3), np.uint8)
    return Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC)


def save(path, image: Image.Image, text: str | None = None, **options) -> None:
    image.save(path, **options)
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")


def measured(source, name: str = "s", **options) -> Quality:
    quality = Quality(getattr(source, "image_size", None), **options)
    for split in ("train", "val"):
        for one, document in identified(name, source, split):
            quality.add(split, one, document)
    return quality


def found(quality: Quality, folder) -> dict[str, set[str]]:
    """The file names of each kind of findings."""
    names: dict[str, set[str]] = {}
    for finding in quality.findings():
        names.setdefault(finding.kind, set()).add(finding.id.rpartition("/")[2])
    return names


def test_planted_faults_are_found_and_nothing_else(tmp_path):
    for n in range(120):
        save(tmp_path / f"{n:03}.png", picture(n), f"a picture of thing {n}")
    for n in range(0, 30, 5):
        save(tmp_path / f"copy{n:03}.png", picture(n), f"a picture of thing {n}")
        save(tmp_path / f"near{n:03}.jpg", picture(n), f"a picture of thing {n}", quality=60)
        save(tmp_path / f"renamed{n:03}.png", picture(n), f"quite another text {n}")
        smaller = picture(n).resize((48, 48), Image.Resampling.BICUBIC)
        save(tmp_path / f"resized{n:03}.png", smaller, f"a picture of thing {n}")
    for n, text in enumerate((GREEK, RUSSIAN, CHINESE, JAPANESE)):
        save(tmp_path / f"script{n}.png", picture(900 + n), text)
    for n in range(3):
        save(tmp_path / f"tiny{n}.png", picture(700 + n, (20, 31)), f"small thing {n}")
        save(tmp_path / f"long{n}.png", picture(800 + n, (300, 90)), f"long thing {n}")
    source = CaptionFolders(f"{tmp_path}/*.*", image_size=64, val_fraction=0)
    quality = measured(source)
    seeds = [f"{n:03}" for n in range(0, 30, 5)]
    assert found(quality, tmp_path) == {
        COPY: {f"copy{n}.png" for n in seeds},
        LOOKALIKE: {f"near{n}.jpg" for n in seeds}
        | {f"renamed{n}.png" for n in seeds}
        | {f"resized{n}.png" for n in seeds},
        WRITING: {f"script{n}.png" for n in range(4)},
        SMALL: {f"tiny{n}.png" for n in range(3)},
        LONG: {f"long{n}.png" for n in range(3)},
    }
    reasons = {f.id.rpartition("/")[2]: f.reason for f in quality.findings()}
    assert reasons["copy005.png"] == f"copy of {tmp_path}/005.png"
    assert reasons["renamed005.png"] == f"same image as {tmp_path}/005.png, with another text"
    assert reasons["near005.jpg"].startswith(f"looks like {tmp_path}/005.png (")
    assert reasons["script1.png"] == "text in the Cyrillic writing system"
    assert reasons["tiny1.png"] == "small image of 20 x 31 pixels"
    assert reasons["long2.png"] == "long image of 300 x 90 pixels"
    assert quality.smallest(1) == [(20, 31, f"{tmp_path}/tiny0.png")]


def test_a_held_out_document_that_repeats_a_training_document_is_named_apart(tmp_path):
    for n in range(6):
        save(tmp_path / f"train{n}.png", picture(n), f"thing {n}")
    save(tmp_path / "val0.png", picture(0), "thing 0")
    save(tmp_path / "val1.jpg", picture(1), "thing 1", quality=70)
    for n in (2, 3):  # the second repeats a held-out document
        save(tmp_path / f"val{n}.png", picture(100), "thing 100")
    source = CaptionFolders(f"{tmp_path}/train*", val_paths=f"{tmp_path}/val*", image_size=64)
    quality = measured(source)
    assert found(quality, tmp_path) == {REPEAT: {"val0.png", "val1.jpg"}, COPY: {"val3.png"}}
    assert next(f for f in quality.findings() if f.kind == REPEAT).reason == (
        f"copy of {tmp_path}/train0.png"
    )
    assert (quality.num["train"], quality.num["val"]) == (6, 4)


def test_several_captions_of_one_image_file_are_no_duplicates(tmp_path):
    save(tmp_path / "a.png", picture(0))
    save(tmp_path / "b.png", picture(0))
    rows = [("a.png", "one"), ("a.png", "two"), ("a.png", "two"), ("b.png", "three")]
    lines = [{"file_name": name, "text": text} for name, text in rows]
    write_lines(tmp_path / "metadata.jsonl", lines)
    quality = measured(CaptionRows(f"{tmp_path}/metadata.jsonl", image_size=64, val_fraction=0))
    assert [(f.kind, f.id.rpartition(":")[2]) for f in quality.findings()] == [
        (COPY, "a.png#3"), (LOOKALIKE, "b.png")
    ]  # fmt: skip
    assert quality.shared == 2


def test_the_two_images_of_an_edit_are_no_duplicates_but_a_repeated_edit_is(tmp_path):
    for n in range(4):
        save(tmp_path / f"{n}.png", picture(n))
        save(tmp_path / f"copy{n}.png", picture(n))
    pairs = [("0", "1"), ("0", "0"), ("0", "2"), ("1", "0"), ("copy0", "copy2")]
    records = [
        {"source_img": f"{a}.png", "instruction": f"change {n}", "target_img": f"{b}.png"}
        for n, (a, b) in enumerate(pairs)
    ]
    write_lines(tmp_path / "edits.jsonl", records)
    quality = measured(EditFiles(f"{tmp_path}/edits.jsonl", image_size=64, val_fraction=0))
    assert [(f.kind, f.id.rpartition(":")[2]) for f in quality.findings()] == [(LOOKALIKE, "4")]


def test_repeated_texts_are_copies(tmp_path):
    quality = Quality()
    texts = ["one", "two", "one", AnyText(["two", "three"]), AnyText(["two", "three"])]
    for number, text in enumerate(texts):
        quality.add("train", f"s:{number}", [text])
    quality.add("train", "s:bad", Skipped("bad"))
    assert [(f.id, f.reason) for f in quality.findings()] == [
        ("s:2", "copy of s:0"), ("s:4", "copy of s:3")
    ]  # fmt: skip
    assert list(quality.characters) == [3, 3, 3, 3, 5, 3, 5]
    assert quality.skipped == {"bad": 1} and quality.num["train"] == 5


def test_a_source_without_documents_has_no_findings():
    assert Quality().findings() == []


def test_drawn_images_have_no_size_of_a_file():
    quality = measured(GreyImages(num_documents=5, num_val=0))
    assert not quality.sizes and quality.smallest(3) == []
    assert {finding.kind for finding in quality.findings()} == {LOOKALIKE}  # the next grey


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red circle.", "Latin"), ("Ein roter Kreis über ß", "Latin"), (GREEK, "Greek"),
        (RUSSIAN, "Cyrillic"), (CHINESE, "Han"), (JAPANESE, "Japanese"), ("원", "Hangul"),
        ("دائرة حمراء", "Arabic"), ("ＡＢＣ", "Latin"), ("12 + 3!", NO_LETTERS), ("", NO_LETTERS),
        ("photo of 东京塔 at night", "Latin"),
    ],
)  # fmt: skip
def test_the_writing_system_of_a_text_is_that_of_most_letters(text, expected):
    assert script_of(text) == expected


def test_a_writing_system_is_unusual_below_a_tenth_of_the_documents_with_letters():
    for num_han, expected in ((1, 1), (2, 2), (3, 0)):
        quality = Quality()
        for n in range(22):
            quality.add("train", str(n), [f"text {n}" if n >= num_han else CHINESE * (n + 1)])
        for n in range(30):
            quality.add("train", f"n{n}", [str(n)])
        assert sum(f.kind == WRITING for f in quality.findings()) == expected, num_han


def test_the_size_of_a_file_is_that_after_its_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert image_file_size(tmp_path / "a.jpg") == (30, 40)
    assert image_file_size(encoded_image(size=(7, 5))) == (7, 5)


def test_texts_are_read_back_in_any_order():
    lines = Lines()
    texts = ["a", "", "käse\ud800", "x" * 5000]
    for text in texts:
        lines.append(text)
    assert [lines[n] for n in (3, 0, 2, 1)] == [texts[n] for n in (3, 0, 2, 1)]
    lines.append("later")
    assert lines[4] == "later" and lines[0] == "a"


def test_contents_are_not_confused_when_they_are_divided_otherwise():
    assert digest([b"ab", b"c"]) != digest([b"a", b"bc"]) and digest([]) == 0


def arrays_in(*owners: object) -> list[array]:
    """All arrays among the attributes, also those in dicts."""
    found = [value for owner in owners for value in vars(owner).values()]
    found += [item for value in found if isinstance(value, dict) for item in value.values()]
    return [value for value in found if isinstance(value, array)]


def test_a_measured_document_takes_little_memory(tmp_path):
    """Documents of a text and an image in a file, no two of which are alike."""
    quality, count = Quality(8), 60
    for n in range(count):
        image = picture(n, (8, 8))
        image.info["file"] = tmp_path / f"{n}.png"
        image.save(image.info["file"])
        quality.add("train", f"s:train:{n}", [f"text {n}", image])
    arrays = arrays_in(quality, quality.ids, quality.lookalikes)
    assert len(quality.lookalikes.numbers) > 50 and len(quality.sizes) == 2 * count
    assert 100 * count < sum(len(x) * x.itemsize for x in arrays) <= 170 * count
