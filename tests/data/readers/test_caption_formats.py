"""Captioned images in public formats: each image keeps its own caption."""

import json

import pytest

from support import training_datasets
from support.files import encoded_image, write_lines, write_parquet, write_tar
from support.training_datasets import COLORS, shown
from tf_lightning.data import CaptionJson, CaptionRows, CaptionTars, ImageCaptionData
from tf_lightning.data.documents import Skipped

PAIRS = [[color, f"<{color}>"] for color in COLORS]


def read(source, split="train") -> list:
    documents = source.documents(split)
    return [found if isinstance(found, Skipped) else shown(found) for found in documents]


def rows(file, images=None) -> list:
    return read(CaptionRows(str(file), val_fraction=0, image_size=16, images=images))


def from_json(file, images=None, **options) -> CaptionJson:
    return CaptionJson(str(file), images=images, image_size=16, **{"val_fraction": 0} | options)


def test_img2dataset_tars_are_read(tmp_path):
    file = training_datasets.img2dataset(tmp_path)
    assert read(CaptionTars(str(file), val_fraction=0, image_size=16)) == PAIRS


@pytest.mark.parametrize("caption", ["txt", "text", "caption", "json"])
@pytest.mark.parametrize("image", ["jpg", "jpeg", "png", "webp", "image"])
def test_every_extension_of_a_tar_is_recognized(image, caption, tmp_path):
    words = json.dumps({"caption": "blue"}) if caption == "json" else "blue"
    files = {f"0.{image}": encoded_image("blue"), f"0.{caption}": words.encode()}
    source = CaptionTars(str(write_tar(tmp_path / "a.tar", files)), val_fraction=0, image_size=16)
    assert read(source) == [["blue", "<blue>"]]


def test_two_images_with_the_same_key_are_skipped(tmp_path):
    files = {"0.png": encoded_image("blue"), "0.PNG": encoded_image("red"), "0.txt": b"blue"}
    source = CaptionTars(str(write_tar(tmp_path / "a.tar", files)), val_fraction=0)
    assert read(source) == [Skipped("two files with the same name")]


def test_a_folder_with_a_metadata_file_is_read(tmp_path):
    training_datasets.write_images(tmp_path / "train")
    named = [{"file_name": f"{color}.png", "text": color} for color in COLORS]
    lines = "".join(f"{row['file_name']},{row['text']}\n" for row in named)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\n" + lines)
    write_lines(tmp_path / "train" / "metadata.jsonl", named)
    write_parquet(tmp_path / "train" / "metadata.parquet", named)
    for kind in ("csv", "jsonl", "parquet"):
        assert rows(tmp_path / "train" / f"metadata.{kind}") == PAIRS


@pytest.mark.parametrize(
    "keys", [("path", "prompt"), ("img_path", "prompt"), ("image", "caption")]
)  # Show-o2, JourneyDB and others
def test_json_lines_may_name_images_in_another_folder(keys, tmp_path):
    images = training_datasets.write_images(tmp_path / "elsewhere")
    lines = [dict(zip(keys, (f"{color}.png", color), strict=True)) for color in COLORS]
    assert rows(write_lines(tmp_path / "a.jsonl", lines), str(images)) == PAIRS


def test_parquet_files_of_the_hub_and_of_img2dataset_are_read(tmp_path):
    hub = [{"image": {"bytes": encoded_image(c), "path": f"{c}.png"}, "text": c} for c in COLORS]
    assert rows(write_parquet(tmp_path / "hub.parquet", hub)) == PAIRS
    own = [
        {"key": c, "jpg": encoded_image(c, "JPEG"), "txt": c, "status": "success"} for c in COLORS
    ]
    own.append({"key": "x", "jpg": None, "txt": "gone", "status": "failed_to_download"})
    found = rows(write_parquet(tmp_path / "own.parquet", own))
    assert found == [*PAIRS, Skipped("caption without image")]


def test_all_captions_of_bagel_are_kept(tmp_path):
    found = rows(training_datasets.bagel_captions(tmp_path))
    assert found == PAIRS
    assert [words.texts for words, _ in found] == [(color, f"{color}!") for color in COLORS]


def test_bad_rows_are_skipped_with_a_reason(tmp_path):
    training_datasets.write_images(tmp_path)
    lines = [{"file_name": "red.png", "text": "red"}, {"file_name": "none.png", "text": "x"},
             {"text": "alone"}, {"file_name": "red.png"}, {"file_name": "red.png", "text": 3},
             ["red.png"], {"path": ".", "text": "a folder"}]  # fmt: skip
    found = rows(write_lines(tmp_path / "a.jsonl", lines))
    assert found[0] == ["red", "<red>"]
    reasons = [skipped.reason for skipped in found[1:]]
    assert reasons[::3] == ["missing image", "image without caption"]
    assert reasons[1].startswith("no image: found text; wanted one of image, jpg")
    assert reasons[2].startswith("no caption: found file_name; wanted one of text, caption")
    assert reasons[2].endswith("choose with caption_key")
    assert reasons[4:] == ["line that is not a JSON object", "missing image"]


def test_coco_captions_of_one_image_are_held_out_together(tmp_path):
    file, images = training_datasets.coco(tmp_path)
    found = read(from_json(file, str(images)))
    assert found == PAIRS  # both captions of an image are the same
    source = from_json(file, str(images), val_fraction=0.5)
    train, val = ({words for words, _ in read(source, split)} for split in ("train", "val"))
    assert train and val and not train & val and train | val == set(COLORS)


@pytest.mark.parametrize("name", ["captions.txt", "captions.jsonl"])
def test_rows_of_one_image_in_a_table_are_held_out_together(name, tmp_path):
    rows_of = [(f"{n}.png", f"{n} in words {k}") for n in range(40) for k in range(5)]
    lines = "".join(f"{image},{caption}\n" for image, caption in rows_of)
    (tmp_path / "captions.txt").write_text("image,caption\n" + lines)
    objects = [dict(zip(("image", "caption"), row, strict=True)) for row in rows_of]
    write_lines(tmp_path / "captions.jsonl", objects)
    for n in range(40):
        (tmp_path / f"{n}.png").write_bytes(encoded_image("red"))
    source = CaptionRows(f"{tmp_path}/{name}", val_fraction=0.5, image_size=16)
    train, val = (
        {str(caption).split()[0] for caption, _ in source.documents(split)}
        for split in ("train", "val")
    )
    assert train and val and not train & val and len(train | val) == 40


def test_other_keys_are_read_from_coco_and_karpathy(tmp_path):
    training_datasets.write_images(tmp_path)
    coco, karpathy = (
        {"images": [{"id": 7, "url": "red.png"}], "annotations": [{"image_id": 7, "en": "red"}]},
        {"images": [{"url": "red.png", "split": "train", "sentences": [{"en": "red"}]}]},
    )
    for layout in (coco, karpathy):
        (tmp_path / "captions.json").write_text(json.dumps(layout))
        source = from_json(tmp_path / "captions.json", image_key="url", caption_key="en")
        assert read(source) == [["red", "<red>"]]


def test_karpathys_file_names_the_splits(tmp_path):
    source = from_json(training_datasets.karpathy(tmp_path), val_fraction=0.9)
    splits = {0: "train", 1: "train", 2: "val", 3: "test"}
    for split in ("train", "val"):
        expected = [pair for n, pair in enumerate(PAIRS) if splits[n % 4] == split]
        assert read(source, split) == expected


def test_an_unknown_split_is_counted(tmp_path):
    file = training_datasets.karpathy(tmp_path)
    file.write_text(file.read_text().replace("restval", "restvai"))
    found = [document for split in ("train", "val") for document in read(from_json(file), split)]
    assert found.count(Skipped("image of an unknown split")) == 2


def test_llava_conversations_have_an_image_at_each_marker(tmp_path):
    training_datasets.write_images(tmp_path / "train2017")
    talk = lambda *said: [  # noqa: E731
        {"from": who, "value": words}
        for who, words in zip(["human", "gpt"] * 2, said, strict=False)
    ]
    records = [
        {"id": "1", "image": "train2017/red.png",
         "conversations": talk("<image>\nWhich color?", "Red.", "Sure?", "Yes.")},
        {"id": "2", "image": ["train2017/red.png", "train2017/blue.png"],
         "conversations": talk("Compare <image> and <image>", "Red and blue.")},
        {"id": "3", "conversations": talk("Hello", "Hi")},
        {"id": "4", "image": "train2017/red.png", "conversations": talk("No mark", "?")},
        {"id": "5", "image": "train2017/red.png"},
    ]  # fmt: skip
    (tmp_path / "llava_v1_5_mix665k.json").write_text(json.dumps(records))
    *found, other = read(from_json(tmp_path / "llava_v1_5_mix665k.json"))
    assert found == [
        ["<|user|>\n", "<red>", "Which color?\n<|assistant|>\n", "Red.",
         "<|user|>\nSure?\n<|assistant|>\n", "Yes."],
        ["<|user|>\nCompare ", "<red>", " and ", "<blue>", "\n<|assistant|>\n", "Red and blue."],
        ["<|user|>\nHello\n<|assistant|>\n", "Hi"],
        Skipped("conversation with a wrong number of <image> markers"),
    ]  # fmt: skip
    assert other.reason.startswith("no caption: found id, image; wanted one of text")


@pytest.mark.parametrize("content", ["{", "3", '{"annotations": []}', '{"images": [{}]}'])
def test_json_of_another_format_is_skipped(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    (found,) = read(from_json(tmp_path / "a.json"))
    assert isinstance(found, Skipped)


def test_the_data_module_chooses_the_source_by_suffix(tmp_path):
    kinds = {"a.tar": CaptionTars, "a.jsonl.gz": CaptionRows, "a.json": CaptionJson}
    for name, kind in kinds.items():  # of files that are absent
        (source,) = ImageCaptionData(
            [str(tmp_path / name)], cache_dir=str(tmp_path)
        ).sources.values()
        assert type(source) is kind


def test_the_data_module_reads_a_folder_of_images_and_metadata(tmp_path):
    folder = training_datasets.write_images(tmp_path / "my_pictures [1]")
    named = [{"file_name": f"{color}.png", "text": color} for color in COLORS]
    write_lines(folder / "metadata.jsonl", named)
    tar = training_datasets.img2dataset(tmp_path)
    for paths in (str(folder), [str(folder)]):
        data = ImageCaptionData(
            paths, val_paths=str(tmp_path), val_fraction=0, image_size=16, cache_dir=str(tmp_path)
        )
        (source,) = data.sources.values()
        assert read(source) == PAIRS and source.files("val") == [tar]
