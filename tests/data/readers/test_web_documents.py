"""Interleaved documents and edits in public formats keep the order of their parts."""

import io
import json

import pytest
from PIL import Image

from support import training_datasets
from support.files import encoded_image, write_lines, write_parquet, write_tar
from support.training_datasets import COLORS, shown
from tf_lightning.data import EditFiles, InterleavedFiles
from tf_lightning.data.documents import Skipped

DOCUMENTS = [["See:", f"<{color}>", color] for color in COLORS]


def read(file, images=None, kind=InterleavedFiles) -> list:
    source = kind(str(file), val_fraction=0, image_size=16, images=images and str(images))
    found = source.documents("train")
    return [part if isinstance(part, Skipped) else shown(part) for part in found]


def test_obelics_images_are_found_by_their_urls(tmp_path):
    assert read(*training_datasets.obelics(tmp_path)) == DOCUMENTS


def test_obelics_images_in_the_file_itself(tmp_path):
    images = {color: {"bytes": encoded_image(color), "path": None} for color in COLORS}
    file = write_parquet(tmp_path / "a.parquet", training_datasets.obelics_rows(images))
    assert read(file) == DOCUMENTS


def test_a_missing_image_is_left_out_of_its_document_and_counted(tmp_path):
    file, images = training_datasets.obelics(tmp_path)
    next(images.iterdir()).unlink()
    found = read(file, images)
    assert len(found) == len(COLORS) + 1
    assert found.count(Skipped("missing image")) == 1
    (text,) = [part for part in found if part not in DOCUMENTS and isinstance(part, list)]
    assert text[0] == "See:" and text[1] in COLORS and len(text) == 2


@pytest.mark.parametrize(
    ("images", "texts"), [(["a.png"], ["both"]), ([None], [None]), ([None, None], ["one"])]
)
def test_images_and_texts_that_do_not_match_are_skipped(images, texts, tmp_path):
    lines = [{"images": images, "texts": texts}, {"images": [None], "texts": ["good"]}]
    bad, good = read(write_lines(tmp_path / "a.jsonl", lines))
    assert isinstance(bad, Skipped) and good == ["good"]


def test_mmc4_images_precede_their_sentence(tmp_path):
    images = training_datasets.write_images(tmp_path / "images")
    expected = [["See: ", f"<{color}>", f"{color} "] for color in COLORS]
    assert read(training_datasets.mmc4(tmp_path), images) == expected


def test_mint_pages_are_the_images_in_order(tmp_path):
    names = list(COLORS)
    pairs = zip(names, names[1:] + names[:1], strict=True)
    expected = [[f"<{one}>", one, f"<{two}>", two] for one, two in pairs]
    assert read(training_datasets.mint(tmp_path)) == expected


def test_a_mint_document_with_a_wrong_number_of_pages_is_skipped(tmp_path):
    record = json.dumps({"images": ["page_0_image_1", "page_0_image_2"], "texts": [None, None]})
    files = {"a.json": record.encode(), "a.tiff": encoded_image("red", "TIFF"), "b.json": b"{"}
    found = read(write_tar(tmp_path / "a.tar", files))
    assert found == [
        Skipped("document with a wrong number of TIFF pages"),
        Skipped("line that is not JSON"),
    ]


def test_pages_of_every_mode_are_read_and_bombs_refused(tmp_path, monkeypatch):
    pages = [Image.new("CMYK", (16, 16), (0, 255, 255, 0)), Image.new("L", (40, 40), 255)]
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    record = json.dumps({"images": ["a", "b", None], "texts": [None, None, "end"]}).encode()
    tar = write_tar(tmp_path / "a.tar", {"a.json": record, "a.tiff": file.getvalue()})
    assert read(tar) == [["<red>", "<None>", "end"]]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read(tar) == [Skipped("image of more than 1,000 pixels")]


def edits(file, images=None) -> list:
    return read(file, images, EditFiles)


def test_omnigen_and_omnigen2_edits_are_read(tmp_path):
    training_datasets.write_images(tmp_path / "images")
    lines = [
        {"task_type": "edit", "instruction": "make it blue", "input_images": ["red.png"],
         "output_image": "blue.png"},
        {"instruction": "Put <img><|image_2|></img> before <img><|image_1|></img>",
         "input_images": ["red.png", "lime.png"], "output_images": ["cyan.png"]},
        {"task_type": "t2i", "instruction": "a red one", "input_images": None,
         "output_image": "red.png"},
        {"instruction": "and <|image_3|>", "input_images": ["red.png"], "output_image": "red.png"},
        {"instruction": "nothing comes", "input_images": ["red.png"]},
        {"instruction": None, "input_images": ["red.png"], "output_image": "red.png"},
    ]  # fmt: skip
    assert edits(write_lines(tmp_path / "a.jsonl", lines), tmp_path / "images") == [
        ["<red>", "make it blue", "<blue>"],
        ["Put", "<lime>", "before", "<red>", "<cyan>"],
        ["a red one", "<red>"],
        Skipped("instruction with wrong image placeholders"),
        Skipped("edit without image"),
        Skipped("edit without instruction"),
    ]


def test_bagel_chains_of_edits_are_read(tmp_path):
    images = [encoded_image(color) for color in ("red", "lime", "blue")]
    said = [["make it lime", "lime, please"], ["make it blue"]]
    rows = [{"image_list": images, "instruction_list": said}] * 8
    rows += [{"image_list": images[:1], "instruction_list": said}]
    *found, bad = edits(write_parquet(tmp_path / "a.parquet", rows))
    assert isinstance(bad, Skipped)
    assert {document[1] for document in found} == {said[0][0]}
    source = EditFiles(f"{tmp_path}/a.parquet", val_fraction=0, image_size=16)
    assert next(source.documents("train"))[1].texts == tuple(said[0])
    rest = {(a, b, c, d) for a, _, b, c, d in found}
    assert rest == {("<red>", "<lime>", "make it blue", "<blue>")}
