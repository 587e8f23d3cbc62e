"""The content of a file decides how it is read, and a message names what was found and wanted."""

import bz2
import gzip
import io
import json
import lzma
import tarfile

import pyarrow
import pytest

from support import training_datasets
from support.files import encoded_image, write_lines, write_parquet, write_tar
from support.training_datasets import shown
from tf_lightning.data import (
    CaptionFolders,
    CaptionRows,
    CaptionTars,
    ChatFiles,
    EditData,
    EditFiles,
    ImageCaptionData,
    InterleavedFiles,
    TextData,
    TextFiles,
)
from tf_lightning.data.documents import Skipped
from tf_lightning.data.readers.formats import file_format
from tf_lightning.errors import UserError

JPEG = {color: encoded_image(color, "JPEG") for color in ("red", "lime", "blue")}
BOM = "\ufeff"


def read(source) -> list:
    found = source.documents("train")
    return [part if isinstance(part, Skipped) else shown(part) for part in found]


def tar(folder, names, **options) -> list:
    """Read a tar with these members; a name tells its content by color or extension."""
    path = write_tar(folder / "a.tar", names)
    return read(CaptionTars(str(path), val_fraction=0, image_size=16, **options))


def captions(paths, **options) -> list:
    data = ImageCaptionData(
        paths, val_fraction=0, image_size=16, autoencoder="pixels", cache_dir="none", **options
    )
    return read(data.sources["captions"])


RED, LIME = ["red", "<red>"], ["lime", "<lime>"]


def test_files_of_macos_in_a_tar_are_ignored(tmp_path):
    files = {}
    for number, color in enumerate(("red", "lime")):
        for name, content in (f"{number}.jpg", JPEG[color]), (f"{number}.txt", color.encode()):
            files |= {f"./a/._{name}": b"\0\5\x16\7", f"./a/{name}": content}
            files |= {f"__MACOSX/a/{name}": b"\0\5\x16\7", "./a/.DS_Store": b"\0"}
    assert tar(tmp_path, files) == [RED, LIME]


def test_files_of_macos_in_a_folder_are_ignored(tmp_path):
    (tmp_path / "__MACOSX").mkdir()
    for name in ("a.txt", "._a.txt", "__MACOSX/b.txt", ".DS_Store"):
        (tmp_path / name).write_text(name)
    paths = [f"{tmp_path}/**/*", f"{tmp_path}/._*", f"{tmp_path}/a.txt"]
    with pytest.raises(UserError, match="no file matches"):
        TextFiles(paths[1:2]).files("train")
    assert [file.name for file in TextFiles(paths[:1]).files("train")] == ["a.txt"]


@pytest.mark.parametrize("packed", [".tar", ".tar.gz"])
def test_the_files_of_a_sample_need_not_be_next_to_each_other(packed, tmp_path):
    files = {f"{n}.jpg": JPEG[color] for n, color in enumerate(JPEG)}
    files |= {f"{n}.txt": color.encode() for n, color in enumerate(JPEG)}
    path = write_tar(tmp_path / "a.tar", files)
    if packed == ".tar.gz":
        path = tmp_path / "a.tar.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    source = CaptionTars(str(path), val_fraction=0, image_size=16)
    assert read(source) == [[color, f"<{color}>"] for color in JPEG]


def test_samples_of_the_same_name_stay_apart(tmp_path):
    """Two tars that were joined have the same names again."""
    one = {"0.jpg": JPEG["red"], "0.txt": b"red", "1.jpg": JPEG["lime"], "1.txt": b"lime"}
    path = write_tar(tmp_path / "a.tar", one)
    other = write_tar(tmp_path / "b.tar", {"0.jpg": JPEG["blue"], "0.txt": b"blue"})
    end = path.read_bytes().rstrip(b"\0")
    path.write_bytes(end + bytes(-len(end) % 512) + other.read_bytes())
    found = read(CaptionTars(str(path), val_fraction=0, image_size=16))
    assert found == [RED, LIME, ["blue", "<blue>"]]


def test_a_file_with_the_name_of_another_costs_the_sample(tmp_path):
    """All images come first, so the text of 0 would be that of 2."""
    colors = ("red", "lime", "blue")
    names = [*(f"{n}.jpg" for n in range(3)), "2.txt", "1.txt", "2.txt"]
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        contents = [*map(JPEG.get, colors), *(color.encode() for color in colors)]
        for name, content in zip(names, contents, strict=True):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    source = CaptionTars(str(tmp_path / "a.tar"), val_fraction=0, image_size=16)
    found = read(source)
    assert LIME in found and Skipped("two files with the same name") in found
    assert all(sample == LIME or isinstance(sample, Skipped) for sample in found)


def test_dots_in_the_names_of_a_tar(tmp_path):
    dates = {f"IMG_22.0{n}.{kind}": content for n, color in enumerate(("red", "lime"))
             for kind, content in (("jpg", JPEG[color]), ("txt", color.encode()))}  # fmt: skip
    assert tar(tmp_path, dates) == [RED, LIME]
    assert tar(tmp_path, {"0.input.jpg": JPEG["red"], "0.outputs.txt": b"red"}) == [RED]


@pytest.mark.parametrize(
    ("image", "caption", "content"),
    [
        ("JPEG", "TXT", b"red"),
        ("Png", "caption", b"red"),
        ("webp", "json", b'{"caption": "red"}'),
        ("bin", "txt", b"red"),  # recognized by its content
        ("tiff", "json", b'{"title": "red"}'),
        ("avif", "text", b"\xef\xbb\xbfred"),
    ],
)
def test_extensions_of_a_tar(image, caption, content, tmp_path):
    kind = {"bin": "JPEG", "caption": "PNG"}.get(image, image.upper())
    files = {f"0.{image}": encoded_image("red", kind), f"0.{caption}": content}
    assert tar(tmp_path, files) == [RED]


def test_keys_of_a_tar_can_be_chosen(tmp_path):
    files = {"0.a.png": encoded_image("red"), "0.jpg": JPEG["lime"], "0.txt": b"short",
             "0.json": b'{"long": "red", "caption": "none"}'}  # fmt: skip
    found = tar(tmp_path, files, image_key="png", caption_key="long")
    assert found == [["red", "<red>"]]
    (skipped,) = tar(tmp_path, {"0.jpg": JPEG["red"], "0.json": b'{"words": "red"}'})
    assert skipped.reason.startswith("no caption: found words; wanted one of text, caption")
    assert skipped.reason.endswith("choose with caption_key")


def test_all_captions_of_a_list_are_kept(tmp_path):
    files = {"0.jpg": JPEG["red"], "0.json": b'{"captions": ["red", "", "a red one"]}'}
    path = write_tar(tmp_path / "a.tar", files)
    ((caption, _),) = CaptionTars(str(path), val_fraction=0).documents("train")
    assert caption.texts == ("red", "a red one")
    rows = [{"image": JPEG["red"], "caption": ["red", "a red one"]}]
    file = write_parquet(tmp_path / "a.parquet", rows)
    ((caption, _),) = CaptionRows(str(file), val_fraction=0).documents("train")
    assert caption.texts == ("red", "a red one")


def test_coco_captions_of_an_image_are_one_document(tmp_path):
    training_datasets.write_images(tmp_path)
    notes = [{"image_id": n % 2, "caption": f"{n}"} for n in range(6)] + [
        {"image_id": 7, "caption": "of no image"},
        {"image_id": 8, "caption": "of two images"},
    ]
    images = [{"id": 0, "file_name": "red.png"}, {"id": "1", "file_name": "lime.png"},
              {"id": 8, "file_name": "red.png"}, {"id": 8, "file_name": "lime.png"}]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({"annotations": notes, "images": images}, indent=1))
    data = ImageCaptionData(str(tmp_path / "a.json"), val_fraction=0, cache_dir="none")
    red, lime, *skipped = data.sources["captions"].documents("train")
    assert red[0].texts == ("0", "2", "4") and lime[0].texts == ("1", "3", "5")
    assert [shown(document)[1] for document in (red, lime)] == ["<red>", "<lime>"]
    assert [s.reason.split(",")[0] for s in skipped] == ["caption without image",
                                                        "id of two images"]  # fmt: skip


# Folders and tables


@pytest.fixture
def beside(tmp_path):
    """img2dataset's output "files": each image with a text file beside it."""
    folder = tmp_path / "00000"
    folder.mkdir()
    for number, color in enumerate(("red", "lime")):
        (folder / f"{number}.png").write_bytes(encoded_image(color))
        (folder / f"{number}.txt").write_text(BOM + color)
        (folder / f"{number}.json").write_text(json.dumps({"caption": color}))
    return folder


@pytest.mark.parametrize("path", ["/*.png", "/*", "", "/../**/*"])
def test_images_with_a_text_file_beside_each(path, beside):
    assert captions(f"{beside}{path}") == [RED, LIME]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cc.tsv", "filepath\ttitle\n00000/0.png\tred\n00000/1.png\tlime\n"),
        ("captions.txt", "image,caption\n00000/0.png,red\n00000/1.png,lime\n"),
        ("results.csv", "image_name| comment_number| comment\n00000/0.png| 0| red\n"
                        "00000/1.png| 0| lime"),
        ("a.jsonl", '{"IMAGE": "00000\\\\0.png", "TEXT": "red"}\n'
                    '{"IMAGE": "00000/1.png", "TEXT": "lime"}'),
        ("a.csv", BOM + "file_name;text\r\n00000/0.png;red\r\n00000/1.png;lime\r\n"),
        ("a.json", '[{"image": "00000/0.png", "text": "red"},'
                   ' {"image": "00000/1.png", "text": "lime"}]'),
        ("a.jsonl", BOM + '{"path": "00000/0.png", "prompt": "red"}\n\n'
                    '{"path": "00000/1.png", "prompt": "lime"}'),
    ],
)  # fmt: skip
def test_tables_of_captions(name, content, beside):
    (beside.parent / name).write_text(content)
    assert captions(str(beside.parent / name)) == [RED, LIME]


def test_a_column_given_twice_is_refused(beside):
    (beside.parent / "a.csv").write_text("image,text,text\n00000/0.png,red,lime\n")
    assert captions(f"{beside.parent}/a.csv") == [Skipped("table with two columns 'text'")]


def test_annotations_without_captions_name_their_keys(tmp_path):
    content = {"images": [{"id": 1, "file_name": "a.png"}],
               "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}] * 3}  # fmt: skip
    (tmp_path / "instances.json").write_text(json.dumps(content))
    (skipped,) = captions(f"{tmp_path}/instances.json")
    assert skipped.reason.startswith("no caption: found bbox, image_id; wanted one of caption")


def test_columns_can_be_chosen(beside):
    rows = [{"where": "00000/0.png", "fr": "rouge", "text": "red"}]
    file = write_lines(beside.parent / "a.jsonl", rows)
    assert captions(str(file), image_key="where", caption_key="fr") == [["rouge", "<red>"]]
    (skipped,) = captions(str(file))
    assert skipped.reason.startswith("no image: found fr, text, where; wanted one of image, jpg")


@pytest.mark.parametrize(
    ("value", "reason"),
    [("https://a.b/c.jpg", "image that is only a URL; download the images"),
     ("None", "caption without image"), ("x" * 5000, "missing image"), ("a\0b", "missing image")],
)  # fmt: skip
def test_images_that_are_not_there(value, reason, tmp_path):
    (skipped,) = captions(str(write_lines(tmp_path / "a.jsonl", [{"image": value, "text": "a"}])))
    assert skipped.reason.startswith(reason)


@pytest.mark.parametrize("reader", [CaptionTars, TextFiles, ChatFiles, EditFiles, InterleavedFiles])
def test_a_folder_of_images_is_refused_by_name(reader, beside):
    with pytest.raises(UserError, match="0.png is an image; .*reads? "):
        list(reader(f"{beside}/*.png").documents("train"))
    with pytest.raises(UserError, match="is a folder; give the files in it, such as"):
        list(reader(str(beside)).documents("train"))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PK\3\4rest", "a ZIP archive"), (b"version https://git-lfs.github.com", "a Git LFS"),
        (b"<!DOCTYPE html><html>", "an HTML page"), (b"ARROW1", "an Arrow file"),
    ],
)  # fmt: skip
def test_files_of_other_formats_are_named(content, kind, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"a.txt is {kind}"):
        list(TextFiles(str(tmp_path / "a.txt")).documents("train"))


# Text


@pytest.mark.parametrize("text", ['[{"text": "one"}, {"text": "two"}]',
                                  '{"text": "one"}\n{"text": "two"}',
                                  '[\n {\n  "text": "one"\n },\n {\n  "text": "two"\n }\n]\n',
                                  '[\n{"text": "one"},\n{"text": "two"}\n]',
                                  BOM + '{"text": "one"}\n{"text": "two"}'])  # fmt: skip
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a"])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst", ".xz", ".bz2", "plain .gz"])
def test_json_of_texts(text, name, packed, tmp_path):
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress,
            ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True)}  # fmt: skip
    file = tmp_path / (name + packed.removeprefix("plain "))
    file.write_bytes(pack.get(packed, bytes)(text.encode()))
    assert read(TextFiles(str(file), val_fraction=0)) == [["one"], ["two"]]


def test_a_long_array_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("tf_lightning.data.readers.json_records.CHUNK", 50)
    texts = [f"text {n} é \u2028 {'x' * (7 * n % 300)}" for n in range(200)]
    records = [{"text": text, "number": n * 10**6} for n, text in enumerate(texts)]
    (tmp_path / "a.json").write_text(json.dumps(records, ensure_ascii=False))
    source = TextFiles(str(tmp_path / "a.json"), val_fraction=0)
    assert read(source) == [[text] for text in texts]
    content = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(content[: len(content) // 2])
    *found, damage = read(source)
    assert found == [[text] for text in texts[: len(found)]] and len(found) > 50
    assert damage == Skipped("damaged file, read up to the damage")


def test_text_that_begins_like_json_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("[Verse 1]\nOnce upon a time")
    (tmp_path / "b.txt").write_text("[1] A reference\n{x} is a set")
    source = TextFiles(f"{tmp_path}/*.txt", val_fraction=0)
    assert read(source) == [["[Verse 1]\nOnce upon a time"], ["[1] A reference\n{x} is a set"]]


def test_a_long_text_is_read_in_pieces_of_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("tf_lightning.data.readers.formats.MAX_BYTES", 40)
    lines = [f"line {n} é\n" for n in range(20)]
    (tmp_path / "a.txt").write_text("".join(lines))
    pieces = read(TextFiles(str(tmp_path / "a.txt"), val_fraction=0))
    assert "".join(text for (text,) in pieces) == "".join(lines) and len(pieces) > 4
    assert all(len(text.encode()) <= 40 and text.endswith("\n") for (text,) in pieces)


def test_a_byte_order_mark_is_dropped_and_utf_16_named(tmp_path):
    (tmp_path / "a.txt").write_text(BOM + "Once")
    (tmp_path / "b.txt").write_text("Once", encoding="utf-16")
    found = read(TextFiles(f"{tmp_path}/*.txt", val_fraction=0))
    assert found == [["Once"], Skipped("text in UTF-16; save it as UTF-8")]


# Documents and edits


def test_places_with_nothing_are_left_out(tmp_path):
    training_datasets.write_images(tmp_path)
    lines = [
        {"images": [None, None, "red.png", None], "texts": ["See:", None, None, "red"]},
        {"images": ["", "red.png", ""], "texts": ["See:", "", "red"]},
        {"parts": ["See:", None, {"image": None}, {"image": "red.png"}, {"text": None}, "red"]},
    ]
    file = write_lines(tmp_path / "a.jsonl", lines)
    assert read(InterleavedFiles(str(file), val_fraction=0)) == [["See:", "<red>", "red"]] * 3


def test_columns_of_documents_can_be_chosen(tmp_path):
    rows = [{"pics": [None, encoded_image("red")], "words": ["See:", None]}]
    file = write_parquet(tmp_path / "a.parquet", rows)
    source = InterleavedFiles(str(file), val_fraction=0, images_key="pics", texts_key="words")
    assert read(source) == [["See:", "<red>"]]
    (skipped,) = read(InterleavedFiles(str(file), val_fraction=0))
    assert skipped.reason.startswith("no column: found pics, words; wanted one of images, texts")


@pytest.mark.parametrize("form", ["one line", "lines", "array", "one document"])
def test_json_of_documents(form, tmp_path):
    training_datasets.write_images(tmp_path)
    documents = [["See:", {"image": "red.png"}], ["See:", {"image": "lime.png"}]]
    content = {"one line": json.dumps(documents), "array": json.dumps(documents, indent=1),
               "lines": "\n".join(map(json.dumps, documents)),
               "one document": json.dumps(documents[0])}[form]  # fmt: skip
    (tmp_path / "a.json").write_text(content)
    found = read(InterleavedFiles(str(tmp_path / "a.json"), val_fraction=0))
    expected = [["See:", "<red>"], ["See:", "<lime>"]]
    assert found == (expected[:1] if form == "one document" else expected)


@pytest.mark.parametrize(
    "keys",
    [("original_image", "edit_prompt", "edited_image"), ("a", "b", "c"),
     ("src_img", "edited_prompt_list", "edited_img")],
)  # fmt: skip
def test_edits_of_other_columns(keys, tmp_path):
    said = ["make it lime", "lime!"] if keys[1].endswith("list") else "make it lime"
    row = dict(zip(keys, (JPEG["red"], said, JPEG["lime"]), strict=True))
    file = write_parquet(tmp_path / "a.parquet", [row])
    names = ("source_key", "instruction_key", "target_key")
    options = dict(zip(names, keys, strict=True)) if keys == ("a", "b", "c") else {}
    data = EditData(str(file), val_fraction=0, cache_dir="none", **options)
    assert read(data.sources["edits"]) == [["<red>", "make it lime", "<lime>"]]


GOOD = {"instruction": "x", "input_images": ["red.png"], "output_image": "blue.png"}


@pytest.mark.parametrize(
    "row",
    [
        GOOD | {"input_images": "red.png"},
        GOOD | {"output_images": "blue.png", "output_image": None},
    ],
)
def test_one_image_need_not_be_in_a_list(row, tmp_path):
    training_datasets.write_images(tmp_path)
    found = read(EditFiles(str(write_lines(tmp_path / "a.jsonl", [row])), val_fraction=0))
    assert found == [["<red>", "x", "<blue>"]]


@pytest.mark.parametrize(
    "row",
    [
        GOOD | {"instruction": f"<|image_{'9' * 5000}|>"},
        {"image_list": [JPEG["red"], JPEG["lime"]], "instruction_list": [5]},
        {"image_list": 5, "instruction_list": [["x"]]},
        {"image_list": [JPEG["red"]] * 2, "instruction_list": "one letter"},
        {"source_img": 3, "instruction": {"a": 1}, "target_img": [2.5]},
    ],
)
def test_an_edit_of_other_types_is_counted(row, tmp_path):
    training_datasets.write_images(tmp_path)
    file = tmp_path / "a.jsonl"
    if "image_list" in row or "source_img" in row:
        write_parquet(tmp_path / "a.parquet", [row])
        file = tmp_path / "a.parquet"
    else:
        write_lines(file, [row])
    found = read(EditFiles(str(file), val_fraction=0))
    assert len(found) == 1 and (isinstance(found[0], Skipped) or found[0][1] == row["instruction"])


def test_an_instruction_that_is_a_text_is_not_cut_to_a_letter(tmp_path):
    row = {"image_list": [JPEG["red"], JPEG["lime"]], "instruction_list": ["make it lime"]}
    file = write_parquet(tmp_path / "a.parquet", [row])
    assert read(EditFiles(str(file), val_fraction=0)) == [["<red>", "make it lime", "<lime>"]]


def test_keys_of_text_can_be_chosen(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"body": "one", "text": 3}])
    data = TextData(str(file), val_fraction=0, text_key="body", cache_dir="none")
    assert read(data.sources["text"]) == [["one"]]
    (skipped,) = read(TextFiles(str(file), val_fraction=0))
    assert skipped == Skipped("text that is of type int")
    (tmp_path / "a.csv").write_text("id,text\n1,one\n")
    assert read(TextFiles(f"{tmp_path}/a.csv", val_fraction=0)) == [["one"]]


def test_the_format_is_read_from_the_content(tmp_path):
    files = {
        "tar": write_tar(tmp_path / "a.jpg", {"0.txt": b"red"}),
        "parquet": write_parquet(tmp_path / "b.txt", [{"text": "a"}]),
        "json": write_lines(tmp_path / "c.txt", [{"text": "a"}]),
    }
    (tmp_path / "d.tar").write_bytes(JPEG["red"])
    assert {kind: file_format(file) for kind, file in files.items()} == dict(
        zip(files, files, strict=True)
    )
    assert file_format(tmp_path / "d.tar") == "image"


def test_new_arguments_leave_the_fingerprint_of_older_corpora(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    plain = TextFiles(f"{tmp_path}/a.jsonl").fingerprint("train")
    assert "text_key" not in plain
    assert TextFiles(f"{tmp_path}/a.jsonl", text_key="b").fingerprint("train") != plain


def test_images_beside_texts_are_read_by_their_own_source(beside):
    source = CaptionFolders(f"{beside}/*", val_fraction=0, caption_key="caption")
    assert read(source) == [RED, LIME]
