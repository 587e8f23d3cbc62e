"""Variants of formats that are often met: nothing of a file is lost without being counted."""

import gzip
import json
import unicodedata

import pyarrow
import pyarrow.parquet as parquet
import pytest

from support.files import encoded_image, write_lines, write_parquet, write_tar
from support.training_datasets import shown
from tf_lightning.data import CaptionRows, ChatFiles, EditFiles, InterleavedFiles, TextFiles
from tf_lightning.data.documents import AnyText, Skipped
from tf_lightning.data.readers import formats, json_records, tables
from tf_lightning.data.readers.caption_source import caption_source

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


QUOTES = 'row whose quotes do not match; write a quote inside of a text as ""'


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (['a.png,"a cat', "a.png,a cat"], [QUOTES, "a cat"]),  # open to the end of the file
        (['a.png,"a cat', 'a.png,"a cat"', "a.png,a cat"], [QUOTES, "a cat", "a cat"]),
        (['a.png,"a "big" cat"', "a.png,a cat"], [QUOTES, "a cat"]),
        (['a.png,"a', 'cat"', "a.png,a cat"], ["a\ncat", "a cat"]),  # of two lines
        (['a.png,a 5" cat', 'a.png,"a ""big"" cat"'], ['a 5" cat', 'a "big" cat']),
        (["a.png,\udce9", "a.png,a cat"], ["text that is not UTF-8", "a cat"]),
        (["a.png", "a.png,a cat"], ["image without caption", "a cat"]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_quote_that_is_not_closed_costs_one_row(rows, expected, end, tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    content = end.join(["file_name,text", *rows, ""]).encode("utf-8", "surrogateescape")
    (tmp_path / "metadata.csv").write_bytes(content)
    found = [x.reason if isinstance(x, Skipped) else x[0] for x in captions(tmp_path)]
    assert found == [x if x == QUOTES else x.replace("\n", end) for x in expected]


def test_lines_longer_than_the_limit_cost_only_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_BYTES", 40)
    long = "b" * 50
    for name, line in {"a.csv": "text\n{}\na\n", "a.txt": "{}\na\n"}.items():
        (tmp_path / name).write_text(line.format(long))
        source = TextFiles(str(tmp_path / name), val_fraction=0)
        assert [str(x) for x in source.documents("train")][-1] in ("['a']", "['a\\n']")
        assert "line longer than 40 bytes" in str(list(source.documents("train"))[0])
    write_lines(tmp_path / "a.jsonl", [{"text": long}, {"text": "a"}])
    skipped, good = TextFiles(f"{tmp_path}/a.jsonl", val_fraction=0).documents("train")
    assert skipped.reason == "line longer than 40 bytes" and good == ["a"]


def test_a_table_of_open_quotes_is_not_read_again_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_READ_AGAIN", 1000)
    found = table(tmp_path, "file_name,text\n" + 'a.png,"b",""",\n' * 200)
    assert found[-1].reason == "table with many unclosed quotes, read up to them"


def test_a_missing_column_is_told_with_all_that_are_there(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"URL": "http://a.b/c.jpg", "TEXT": "a cat"}])
    (found,) = captions(tmp_path)
    assert found.reason.startswith("no image: found TEXT, URL; wanted one of image, jpg")


def test_images_in_columns_of_other_types(tmp_path):
    stored = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    image = {"bytes": RED, "path": None}
    columns = {
        "struct": pyarrow.array([image], stored),
        "list of one": pyarrow.array([[image]], pyarrow.list_(stored)),
        "large": pyarrow.array([RED], pyarrow.large_binary()),
        "dictionary": pyarrow.array([RED]).dictionary_encode(),
    }
    for name, column in columns.items():
        text = pyarrow.array(["a cat"], pyarrow.large_string())
        parquet.write_table(pyarrow.table({"image": column, "text": text}), tmp_path / "a.parquet")
        assert captions(tmp_path) == CAT, name
    for value, reason in {
        "two": ([RED, RED], "2 images in place of one"),
        "pixels": ([1, 2], "image of type list, not a file or its name"),
    }.values():
        write_parquet(tmp_path / "a.parquet", [{"images": value, "text": "a cat"}])
        assert [found.reason for found in captions(tmp_path)] == [reason]


def test_images_that_a_parquet_file_only_names_are_noticed_when_they_change(tmp_path):
    stored = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for content in (None, RED):
        image = pyarrow.array([{"bytes": content, "path": "a.png"}], stored)
        table = pyarrow.table({"image": image, "text": ["a cat"]})
        parquet.write_table(table, tmp_path / "a.parquet")
        digests = []
        for size in (8, 9):
            (tmp_path / "a.png").write_bytes(encoded_image("red", size=(size, 8)))
            digests.append(CaptionRows(f"{tmp_path}/a.parquet").image_digest("train"))
        assert (digests[0] != digests[1]) is (content is None)


def test_names_with_accents_are_found_in_either_form(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é a.png") for form in ("NFC", "NFD"))
    (tmp_path / decomposed).write_bytes(RED)
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": composed, "text": "a cat"}])
    assert captions(tmp_path) == CAT
    write_tar(tmp_path / "a.tar", {decomposed: RED, composed.replace("png", "txt"): b"a cat"})
    assert captions(tmp_path / "a.tar") == CAT


TALK = {"conversations": [{"from": "human", "value": "<image>\nwhat?"},
                          {"from": "gpt", "value": "a cat"}]}  # fmt: skip


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"images/0.png": RED, "captions/0.txt": b"a cat"}, CAT),
        ({"a/img/0.png": RED, "a/text/0.txt": b"a cat"}, CAT),
        ({"0.png": RED, "0.json": json.dumps(TALK).encode()},
         [["<|user|>\n", "<red>", "what?\n<|assistant|>\n", "a cat"]]),
    ],
)  # fmt: skip
def test_layouts_of_tars(files, expected, tmp_path):
    assert captions(write_tar(tmp_path / "a.tar", files)) == expected


def test_texts_and_images_of_different_folders_are_not_joined(tmp_path):
    found = captions(write_tar(tmp_path / "a.tar", {"cats/0.png": RED, "dogs/0.txt": b"a dog"}))
    assert [type(one) for one in found] == [Skipped, Skipped]


def test_several_captions_in_files_of_a_tar(tmp_path):
    names = "0.png", "0.caption1.txt", "0.caption2.txt", "1.png", "1.a.txt", "1.b.txt"
    contents = RED, b"a cat", b"one cat", RED, b"a dog", b"one dog"
    file = write_tar(tmp_path / "a.tar", dict(zip(names, contents, strict=True)))
    source = caption_source(str(file), val_fraction=0, image_size=16)
    texts = [document[0] for document in source.documents("train")]
    assert [text.texts for text in texts] == [("a cat", "one cat"), ("a dog", "one dog")]


def test_a_conversation_in_a_tar_does_not_read_other_files(tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    part = {"type": "image_url", "image_url": {"url": str(tmp_path / "red.png")}}
    said = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a cat"}]
    (found,) = captions(write_tar(tmp_path / "a.tar", {"0.json": json.dumps(said).encode()}))
    assert found.reason == "conversation in a tar that names an image outside of it"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"data": [{"text": "a"}, {"text": "b"}]}', ["a", "b"]),
        (json.dumps({"version": 1, "rows": [{"text": "a"}, {"text": "b"}]}, indent=1), ["a", "b"]),
        ('{"text": ["a", "b"]}\n{"text": "c"}', ["a\nb", "c"]),
        ('{"text": "a"}\r{"text": "b"}\r', ["a", "b"]),
        ('{"text": "a", "text": "b"}', ["JSON object with two values of 'text'"]),
        ("[" * 100_000, ["JSON nested too deeply"]),
        ('{"n": ' + "9" * 5000 + "}", ["JSON with an integer of more than 4,300 digits"]),
        (b'{"text": "\xe9"}', ["text that is not UTF-8"]),
        ("", []),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_variants_of_json(content, expected, suffix, tmp_path):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / f"a.{suffix}").write_bytes(content)
    found = TextFiles(f"{tmp_path}/a.{suffix}", val_fraction=0).documents("train")
    assert [x.reason if isinstance(x, Skipped) else x[0] for x in found] == expected


def test_the_only_record_of_a_file_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "MAX_BYTES", 400)
    parts = [{"text": "a" * 50}] * 20
    for content in ({"parts": parts}, parts):
        (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
        (found,) = InterleavedFiles(f"{tmp_path}/a.json", val_fraction=0).documents("train")
        assert found.reason == "JSON value longer than 400 bytes"


def test_an_instruction_of_omnigen_may_be_a_list(tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    images = {"input_images": ["a.png"], "output_image": "a.png"}
    wordings = ["make it red", "red, please"], ["only one"], ["<|image_1|> red", "red"]
    file = write_lines(tmp_path / "a.jsonl", [images | {"instruction": w} for w in wordings])
    several, one, marked = EditFiles(str(file), val_fraction=0, image_size=16).documents("train")
    assert isinstance(several[1], AnyText) and several[1].texts == tuple(wordings[0])
    assert one[1] == "only one" and "several wordings" in marked.reason


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def deny(file):
        raise PermissionError

    file = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    monkeypatch.setattr(formats, "open_stream", deny)
    (found,) = TextFiles(str(file), val_fraction=0).documents("train")
    assert found.reason == "file that may not be read"


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
