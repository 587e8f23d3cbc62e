"""Variants of formats that are often met: nothing of a file is lost without being counted."""

import gzip
import json

import pytest

from support.files import encoded_image, write_lines, write_parquet, write_tar
from support.training_datasets import shown
from tf_lightning.data import ChatFiles, EditFiles, InterleavedFiles, TextFiles
from tf_lightning.data.documents import Skipped
from tf_lightning.data.readers.captions import caption_source

RED = encoded_image("red")
CAT = [["a cat", "<red>"]]


def read(source) -> list:
    documents = source.documents("train")
    return [found if isinstance(found, Skipped) else shown(found) for found in documents]


def captions(path) -> list:
    return read(caption_source(str(path), val_fraction=0, image_size=16))


def table(folder, content: str) -> list:
    (folder / "a.png").write_bytes(RED)
    (folder / "metadata.csv").write_text(content)
    return captions(folder)


def test_a_row_with_a_comma_in_its_caption_is_not_cut(tmp_path):
    found = table(tmp_path, "file_name,text\na.png,a cat, red\na.png,a cat,\na.png,a cat\n")
    assert found[1:] == 2 * CAT and "put quotes around texts" in found[0].reason


def test_spaces_before_delimiters_and_empty_first_lines_are_accepted(tmp_path):
    assert table(tmp_path, "\nfile_name , text\na.png , a cat\n") == CAT


def test_a_caption_in_brackets_is_a_caption(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"image": RED, "captions": "{red} cat"}])
    assert captions(tmp_path) == [["{red} cat", "<red>"]]


@pytest.mark.parametrize("beside", ["README.txt", "notes.csv", "LICENSE.json"])
def test_other_files_in_a_folder_of_images_and_texts_say_nothing(beside, tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / beside).write_text("k,v\n1,2\n")
    assert captions(tmp_path) == CAT


@pytest.mark.parametrize("name", ["a.TXT", "a.txt", "a.CAPTION"])
def test_suffixes_may_be_upper_case(name, tmp_path):
    (tmp_path / "a.PNG").write_bytes(RED)
    (tmp_path / name).write_text("a cat")
    assert captions(tmp_path) == CAT


@pytest.mark.parametrize("name", ["a.json", "b.csv.gz", "train/metadata.csv"])
def test_tables_are_found_in_a_folder(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    (file.parent / "a.png").write_bytes(RED)
    rows = b"image,caption\na.png,a cat\n"
    if name == "a.json":
        rows = json.dumps([{"image": "a.png", "caption": "a cat"}]).encode()
    file.write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)
    assert captions(tmp_path) == CAT


@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz", "0.tgz"])
@pytest.mark.parametrize("folder", [".", "part"])
def test_tars_are_found_in_a_folder(folder, name, tmp_path):
    (tmp_path / folder).mkdir(exist_ok=True)
    tar = write_tar(tmp_path / "plain", {"a.png": RED, "a.txt": b"a cat"}).read_bytes()
    (tmp_path / "plain").unlink()
    (tmp_path / folder / name).write_bytes(tar if name == "0.tar" else gzip.compress(tar))
    assert captions(tmp_path) == CAT


def interleaved(folder, record, name="a.jsonl") -> list:
    (folder / "a.png").write_bytes(RED)
    write = write_parquet if name.endswith("parquet") else write_lines
    write(folder / name, [record])
    return read(InterleavedFiles(str(folder / name), val_fraction=0, image_size=16))


def test_a_part_with_an_empty_text_keeps_its_image(tmp_path):
    parts = [{"text": "x", "image": None}, {"text": "", "image": "a.png"}, {"image": "None"}]
    assert interleaved(tmp_path, {"parts": parts}) == [["x", "<red>"]]
    both = interleaved(tmp_path, {"parts": [{"text": "x", "image": "a.png"}]})
    assert both == [Skipped("part that is both text and image")]


def test_our_parts_and_documents_of_mmc4_may_be_in_parquet(tmp_path):
    parts = [{"text": "x", "image": None}, {"text": None, "image": {"bytes": RED}}]
    assert interleaved(tmp_path, {"parts": parts}, "a.parquet") == [["x", "<red>"]]
    info = [{"image_name": "a.png", "matched_text_index": 1}]
    mmc4 = {"text_list": ["x", "y"], "image_info": info}
    assert interleaved(tmp_path, mmc4, "b.parquet") == [["x ", "<red>", "y "]]


def test_null_in_a_document_of_mmc4_costs_one_sentence(tmp_path):
    assert interleaved(tmp_path, {"text_list": ["x", None], "image_info": None}) == [["x "]]


def test_keys_of_edits_may_be_in_any_case_and_null_beside_others(tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    record = {"Source_Img": "a.png", "instruction": None, "Edit_Prompt": "e", "TARGET": "a.png"}
    write_lines(tmp_path / "a.jsonl", [record])
    source = EditFiles(str(tmp_path / "a.jsonl"), val_fraction=0, image_size=16)
    assert read(source) == [["<red>", "e", "<red>"]]


def test_prompt_and_completion_may_be_lists_of_messages(tmp_path):
    question, reply = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    lists = {"prompt": [question], "completion": [reply]}
    write_lines(tmp_path / "a.jsonl", [lists, {"query": "q", "response": "a"}])
    source = ChatFiles(str(tmp_path / "a.jsonl"), val_fraction=0)
    assert read(source) == 2 * [["<|user|>\nq\n<|assistant|>\n", "a"]]


def test_a_text_that_is_null_is_not_a_missing_key(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": None}])
    source = TextFiles(str(tmp_path / "a.jsonl"), val_fraction=0)
    assert read(source) == [Skipped("record without text")]
