"""JSON lines of texts and image files become documents in the same order."""

import json

import numpy as np
import pytest
from PIL import Image

from tf_lightning.data import InterleavedData, InterleavedFiles


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for color in ("red", "blue"):
        Image.new("RGB", (20, 16), color).save(tmp_path / "images" / f"{color}.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"<html>")
    return tmp_path


def read(folder, lines: list) -> list:
    written = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "a.jsonl").write_text("\n".join(written))
    source = InterleavedFiles([f"{folder}/*.jsonl"], val_fraction=0, image_size=16)
    return list(source.documents("train"))


RED, BLUE = {"image": "images/red.png"}, {"image": "images/blue.png"}


def test_parts_keep_their_order(folder):
    ((red, text, blue),) = read(folder, [{"parts": [RED, {"text": "make it blue"}, BLUE]}])
    assert text == "make it blue"
    assert np.asarray(red)[0, 0].tolist() == [255, 0, 0]
    assert np.asarray(blue)[0, 0].tolist() == [0, 0, 255]
    assert red.size == blue.size == (16, 16)


def test_a_bare_list_and_bare_strings_are_accepted(folder):
    (document, text) = read(folder, [["see", RED], ["only", "text"]])
    assert document[0] == "see"
    assert document[1].size == (16, 16)
    assert text == ["only", "text"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line that is not JSON"),
        ({"text": "no parts"}, "no parts: found text; wanted one of parts, texts, images"),
        (3, 'line without "parts"'),
        ([{"image": "images/none.png"}], "missing image"),
        ([{"image": "images/bad.png"}], "image file that is HTML, not one of JPEG"),
        (["text", 3], "part that is neither text nor image"),
        ([{"audio": "a.wav"}], "part that is neither text nor image"),
    ],
)
def test_bad_lines_are_skipped_with_a_reason(folder, line, reason):
    bad, good = read(folder, [line, ["good"]])
    assert bad.reason.startswith(reason) and good == ["good"]


def test_edits_are_packed_in_their_order(folder):
    lines = [[RED, f"make it blue {n}", BLUE] for n in range(20)]
    read(folder, lines)
    data = InterleavedData(
        [f"{folder}/a.jsonl"],
        val_paths=[f"{folder}/a.jsonl"],
        image_size=16,
        autoencoder="pixels",
        patch_size=8,
        row_length=64,
        vocab_size=300,
        image_first_prob=1.0,
        caption_drop_prob=0.0,
        cache_dir=str(folder / "cache"),
    )
    data.prepare_data()
    data.setup()
    red, text, blue = data.corpora["train"]["interleaved"].document(3)
    assert data.tokenizer.decode(text.tolist()) == "make it blue 3"
    assert red[:, 0, 0].tolist() == pytest.approx([1, -1, -1])
    assert blue[:, 0, 0].tolist() == pytest.approx([-1, -1, 1])
    batch = next(iter(data.train_dataloader()))
    assert batch.num_images == 2 * (batch.document_ids.amax(1) + 1).sum()
