"""Folders of captioned images: every layout is recognized, also several in one folder."""

import pytest
from PIL import Image

from support.files import encoded_image, write_lines, write_parquet
from support.training_datasets import shown
from tf_lightning.data import CaptionFolders, CaptionRows, ImageFiles, NamedImages
from tf_lightning.data.documents import Skipped
from tf_lightning.data.mixture import texts, with_buckets
from tf_lightning.data.readers.caption_source import SeveralLayouts, caption_source
from tf_lightning.data.readers.name_captions import caption_of_name
from tf_lightning.data.readers.source_report import report_source
from tf_lightning.errors import UserError

RED, BLUE, LIME = (encoded_image(color) for color in ("red", "blue", "lime"))


def write(folder, files: dict[str, bytes | str | list]):
    """Write files by name; a list is written as JSON lines."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            write_lines(file, content)
        else:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def source(folder, **options):
    return caption_source(str(folder), **{"val_fraction": 0, "image_size": 16} | options)


def read(source, split="train") -> list:
    found = source.documents(split)
    return [one.reason if isinstance(one, Skipped) else shown(one) for one in found]


TABLE = {"a/1.png": RED, "a/metadata.jsonl": [{"file_name": "1.png", "text": "a table"}]}
BESIDE = {"b/1.png": BLUE, "b/1.txt": "a text"}
NAMES = {"c/a_name_01.png": LIME, "c/cats/IMG_1234.png": RED}
PAIRS = [["a table", "<red>"], ["a text", "<blue>"], ["a name", "<lime>"], ["cats", "<red>"]]


@pytest.mark.parametrize(
    ("files", "expected", "kind"),
    [
        (TABLE, PAIRS[:1], CaptionRows),
        (BESIDE, PAIRS[1:2], CaptionFolders),
        (NAMES, PAIRS[2:], NamedImages),
        (TABLE | BESIDE, PAIRS[:2], SeveralLayouts),
        (TABLE | NAMES, [PAIRS[0], *PAIRS[2:]], SeveralLayouts),
        (BESIDE | NAMES, PAIRS[1:], SeveralLayouts),
        (TABLE | BESIDE | NAMES, PAIRS, SeveralLayouts),
    ],
)
def test_a_folder_may_have_any_layouts(files, expected, kind, tmp_path):
    found = source(write(tmp_path, files))
    assert type(found) is kind and read(found) == expected
    assert read(source(write(tmp_path, {"README.md": "# about"}))) == expected
    assert read(source(f"{tmp_path}/")) == expected


def test_layouts_mixed_in_one_folder_give_each_image_one_caption(tmp_path):
    rows = [{"file_name": "1.png", "text": "a table"}]
    files = {"1.png": RED, "1.txt": "left out", "2.png": BLUE, "2.txt": "a text", "3.png": LIME}
    found = source(write(tmp_path, files | {"metadata.jsonl": rows}))
    assert read(found) == PAIRS[:2]
    report = "\n".join(report_source("captions", found))
    assert f"1 image not named by the table and left out, such as {tmp_path}/3.png" in report
    assert f'"a text" is {tmp_path}/2.png' in report


def test_a_metadata_file_below_another_one_is_read(tmp_path):
    rows = [{"file_name": "2.png", "text": "a text"}]
    below = {"sub/2.png": BLUE, "sub/metadata.jsonl": rows}
    top = [{"file_name": "1.png", "text": "a table"}]
    assert read(source(write(tmp_path, {"1.png": RED, "metadata.jsonl": top} | below))) == PAIRS[:2]
    write(tmp_path, {"metadata.jsonl": [*top, {"file_name": "sub/2.png", "text": "a text"}]})
    assert read(source(tmp_path)) == PAIRS[:2]  # named twice, read once


def test_a_folder_of_one_layout_has_the_fingerprint_of_its_glob(tmp_path):
    write(tmp_path, {f"x/{name}": content for name, content in TABLE.items()})
    write(tmp_path, {f"y/{name}": content for name, content in BESIDE.items()})
    options = {"val_fraction": 0.1, "image_size": 16}
    for folder, known in {
        "x/a": CaptionRows(f"{tmp_path}/x/a/metadata.jsonl", **options),
        "x": CaptionRows(f"{tmp_path}/x/**/metadata.jsonl", **options),
        "y": CaptionFolders(f"{tmp_path}/y/**/*", **options),
    }.items():
        made = source(tmp_path / folder, **options)
        assert made.fingerprint("train") == known.fingerprint("train")


@pytest.mark.parametrize(
    ("key", "expected"),
    [("file_name", "a name"), ("folder_name", "cc"), (None, "a name")],
)
def test_file_or_folder_names_are_chosen(key, expected, tmp_path):
    folder = write(tmp_path, {"cc/a_name.png": LIME})
    assert read(source(folder, caption_key=key)) == [[expected, "<lime>"]]


def test_names_of_files_in_globs_are_captions(tmp_path):
    write(tmp_path, NAMES)
    assert read(source(f"{tmp_path}/c/**/*.png")) == [["a name", "<lime>"], ["cats", "<red>"]]


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("black_cat_on_sofa", "black cat on sofa"),
        ("black-cat-001", "black cat"),
        ("black cat, asleep (3)", "black cat, asleep"),
        ("IMG_1234_beach", "beach"),
        ("2021-05-03 birthday party", "birthday party"),
        ("photo of a cat", "photo of a cat"),
        ("cat2", "cat"),
        ("mp3", "mp3"),
        ("猫", "猫"),
        *((name, None) for name in ("IMG_1234", "DSC0001", "_DSC0001", "000123", "img (2)")),
        *((name, None) for name in ("P1010001", "n01440764_18", "PXL_20230101_123456789")),
        ("Screenshot 2024-01-02 at 10.11.12", None),
        ("WhatsApp Image 2024-01-02 at 10.11.12", None),
        ("8f14e45f-ceea-467a-9575-2ef5a1b3d2aa", None),
    ],
)
def test_names_with_words_are_captions_and_numbers_are_not(name, caption):
    assert caption_of_name(name) == caption


BAD = [
    ({}, "has no files; put images with captions into it"),
    (
        {"1.txt": "a cat", "2.txt": "a dog"},
        "has no image, and .*; it has 2 other files, such as 1.txt: put",
    ),
    ({"IMG_1.png": RED, "7.png": RED}, "has no captions: it has 2 images with names such as 7.png"),
]


@pytest.mark.parametrize(("files", "message"), BAD)
def test_a_folder_without_captions_is_a_user_error(files, message, tmp_path):
    with pytest.raises(UserError, match=f"the folder .* {message}"):
        source(write(tmp_path, files))


def test_buckets_hold_for_every_layout(tmp_path):
    wide = encoded_image("red", size=(64, 32))
    files = {name: wide if name.endswith(".png") else x for name, x in (TABLE | BESIDE).items()}
    square = source(write(tmp_path, files))
    buckets = with_buckets(square, 4, 2)
    for found, size in ((square, (16, 16)), (buckets, (24, 12))):
        assert {image.size for _, image in found.documents("train")} == {size}
    assert square.fingerprint("train") != buckets.fingerprint("train")


def test_names_without_words_are_counted(tmp_path):
    found = read(source(write(tmp_path, NAMES | {"0001.png": RED})))
    assert found[0].startswith("image whose name is a number or a code")
    assert found[1:] == PAIRS[2:]


@pytest.mark.parametrize(
    ("files", "key", "message"),
    [
        (
            {"metadata.jsonl": [{"file_name": "1.png", "text": "a"}]},
            None,
            "the only document .* is unusable .1 missing image.; put the images where the captions",
        ),
        (TABLE, "alt", "no caption: found file_name, text; wanted one of alt; choose with caption"),
    ],
)
def test_missing_images_and_columns_end_in_one_sentence(files, key, message, tmp_path):
    found = source(write(tmp_path, files), caption_key=key)
    with pytest.raises(UserError, match=message):
        list(texts({"captions": found}))


def test_validation_paths_may_have_other_layouts(tmp_path):
    write(tmp_path, TABLE | BESIDE)
    found = source(tmp_path / "a", val_paths=str(tmp_path / "b"), val_fraction=0.5)
    assert read(found) == PAIRS[:1] and read(found, "val") == PAIRS[1:2]
    shards = [shard for split in ("train", "val") for shard in found.shards(split)]
    assert [read(shard, split) for shard, split in zip(shards, ("train", "val"), strict=True)] == [
        PAIRS[:1],
        PAIRS[1:2],
    ]
    assert found.num_samples("val") == 1 and found.image_size == 16
    before = found.fingerprint("train"), found.image_digest("train")
    (tmp_path / "a" / "1.png").write_bytes(encoded_image("blue", size=(30, 30)))
    assert (found.fingerprint("train"), found.image_digest("train")) != before


def test_images_of_formats_that_are_not_read_are_counted(tmp_path):
    write(tmp_path, {"a cat.heic": b"\0\0\0\x18ftypheic", "a dog.png": RED})
    for found in (source(tmp_path), ImageFiles(str(tmp_path), val_fraction=0, image_size=16)):
        (reason,) = [x.reason for x in found.documents("train") if isinstance(x, Skipped)]
        assert reason.startswith("image file that is HEIC, not one of JPEG, PNG")


def test_a_table_in_parquet_and_images_of_every_mode_are_read(tmp_path):
    modes = {"L": "L", "LA": "LA", "P": "P", "RGBA": "RGBA", "1": "1", "I;16": "I;16"}
    for number, mode in enumerate(modes.values()):
        Image.new(mode, (20 + number, 30)).save(tmp_path / f"{number}.png")
    Image.new("CMYK", (20, 30)).save(tmp_path / "6.jpg")
    names = [f"{n}.png" for n in range(6)] + ["6.jpg"]
    write_parquet(tmp_path / "metadata.parquet", [{"file_name": n, "text": n} for n in names])
    found = list(source(tmp_path).documents("train"))
    assert [(text, image.mode, image.size) for text, image in found] == [
        (name, "RGB", (16, 16)) for name in names
    ]
