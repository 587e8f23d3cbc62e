"""The formats of MagicBrush become documents of image, instruction, image."""

import json

import numpy as np
import pytest
from PIL import Image

from support.files import encoded_image, write_lines, write_parquet
from tf_lightning.data import EditData, EditFiles
from tf_lightning.data.documents import Skipped

COLORS = ["red", "blue", "green"]


def turn(image: int, number: int, instruction: str) -> dict:
    """A turn as MagicBrush stores it: the first edits the input, the others the last output."""
    before = f"{image}-output{number - 1}.png" if number > 1 else f"{image}-input.png"
    mask = f"{image}-mask{number}.png"
    output = f"{image}-output{number}.png"
    return {"input": before, "mask": mask, "output": output, "instruction": instruction}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "7").mkdir(parents=True)
    for name, color in zip(("input", "output1", "output2"), COLORS, strict=True):
        (tmp_path / "images" / "7" / f"7-{name}.png").write_bytes(encoded_image(color))
    return tmp_path


def read(folder, turns, **options) -> list:
    (folder / "edit_turns.json").write_text(turns if isinstance(turns, str) else json.dumps(turns))
    source = EditFiles(
        f"{folder}/edit_turns.json", **{"val_fraction": 0, "image_size": 16} | options
    )
    return list(source.documents("train"))


def colors(document) -> list:
    """Replace each image of a document by the name of its color."""
    names = {Image.new("RGB", (1, 1), name).tobytes(): name for name in COLORS}
    return [p if isinstance(p, str) else names[np.asarray(p)[3, 3].tobytes()] for p in document]


def test_turns_of_a_folder_become_documents_in_order(folder):
    found = read(folder, [turn(7, 1, "make it blue "), turn(7, 2, "now green")])
    expected = [["red", "make it blue", "blue"], ["blue", "now green", "green"]]
    assert [colors(document) for document in found] == expected
    assert found[0][0].size == (16, 16)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([turn(7, 1, " ")], "edit without instruction"),
        ([turn(7, 3, "away with it")], "missing image"),
        ([{"input": "7-input.png", "instruction": "make it blue"}], "edit without image"),
        (["not a turn"], "edit without instruction"),
        ("{", "line that is not JSON"),
    ],
)
def test_a_bad_turn_is_skipped_with_a_reason(folder, turns, reason):
    assert read(folder, turns) == [Skipped(reason)]


def test_turns_of_one_image_are_held_out_together(folder):
    turns = [turn(image, number, "edit") for image in range(200) for number in (1, 2, 3)]
    (folder / "edit_turns.json").write_text(json.dumps(turns))
    source = EditFiles(f"{folder}/edit_turns.json", val_fraction=0.3)
    source.document = lambda sample: [sample[0].name]  # the image's key
    held, seen = ([image for (image,) in source.documents(split)] for split in ("val", "train"))
    assert len(held) + len(seen) == 600 and not set(held) & set(seen)
    assert 0.2 < len(held) / 600 < 0.4


def test_edits_of_one_image_in_json_lines_are_held_out_together(folder, tmp_path):
    picture = "images/7/7-input.png"
    edit = {"source_img": picture, "instruction": "make it", "target_img": picture}
    lines = [edit | {"img_id": f"{n // 4}", "instruction": f"{n // 4}"} for n in range(80)]
    file = write_lines(tmp_path / "edits.jsonl", [*lines, edit])
    source = EditFiles(str(file), val_fraction=0.5, image_size=16)
    train, val = ({d[1] for d in source.documents(split)} for split in ("train", "val"))
    assert train and val and not train & val


def test_keys_of_edits_may_be_in_upper_case(folder, tmp_path):
    names = "images/7/7-input.png", "now blue", "images/7/7-output1.png"
    edit = dict(zip(("Input_Image", "Instruction", "Edited_Image"), names, strict=True))
    source = EditFiles(
        str(write_lines(tmp_path / "a.jsonl", [edit])), val_fraction=0, image_size=16
    )
    assert [colors(d) for d in source.documents("train")] == [["red", "now blue", "blue"]]


def test_turns_of_a_parquet_file_become_the_same_documents(folder, tmp_path):
    image = lambda color: {"bytes": encoded_image(color), "path": f"{color}.png"}  # noqa: E731
    rows = [
        {"img_id": "7", "turn_index": 1, "source_img": image("red"), "mask_img": image("red"),
         "instruction": "make it blue", "target_img": image("blue")},
        {"img_id": "8", "turn_index": 1, "source_img": image("red"), "mask_img": None,
         "instruction": "and away", "target_img": None},
    ]  # fmt: skip
    write_parquet(tmp_path / "a.parquet", rows)
    source = EditFiles(f"{tmp_path}/a.parquet", val_fraction=0, image_size=16)
    document, bad = source.documents("train")
    assert colors(document) == ["red", "make it blue", "blue"]
    assert bad == Skipped("edit without image")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    (bad,) = EditFiles(f"{tmp_path}/b.parquet", val_fraction=0).documents("train")
    assert bad == Skipped("damaged file, read up to the damage")


def test_edits_are_served_as_rows(folder):
    (folder / "edit_turns.json").write_text(json.dumps([turn(7, 1, "make it blue")] * 8))
    data = EditData(
        f"{folder}/edit_turns.json", val_fraction=0, image_size=16, autoencoder="pixels",
        vocab_size=300, patch_size=8, row_length=64, batch_size=2, cache_dir=str(folder / "data"),
        caption_drop_prob=0.0,
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch.num_images % 2 == 0 and batch.num_images > 2
    assert data.corpora["train"]["edits"].layout().edits().all()
