"""Text of public corpora, compressed or in tables, is read as a stream."""

import gzip
import tracemalloc

import pyarrow
import pytest

from support import training_datasets
from support.files import write_parquet
from tf_lightning.data import TextFiles
from tf_lightning.data.documents import Skipped
from tf_lightning.data.readers.formats import read_lines

TEXTS = [f"text {n}, with a\nline end and 三" for n in range(200)]


def read(file, **options) -> list:
    return list(TextFiles(str(file), val_fraction=0, **options).documents("train"))


@pytest.mark.parametrize(
    "write",
    [
        training_datasets.c4,
        training_datasets.dolma,
        lambda folder, texts: training_datasets.dolma(folder, texts, ".zst"),
        lambda folder, texts: training_datasets.dolma(folder, texts, ""),
        training_datasets.fineweb,
    ],
    ids=["C4", "Dolma gz", "Dolma zst", "jsonl", "FineWeb"],
)
def test_all_documents_are_read_in_order(write, tmp_path):
    file = write(tmp_path, TEXTS)
    assert read(file) == [[text] for text in TEXTS]
    held = TextFiles(str(file), val_fraction=0.2)
    both = [document for split in ("train", "val") for document in held.documents(split)]
    assert sorted(both) == sorted([text] for text in TEXTS)


def test_a_compressed_txt_file_is_one_document(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo"))
    assert read(tmp_path / "a.txt.gz") == [["one\ntwo"]]


def test_all_members_of_a_gzip_file_are_read(tmp_path):
    parts = [gzip.compress(b'{"text": "%d"}\n' % n) for n in range(5)]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(parts))
    assert read(tmp_path / "a.jsonl.gz") == [[str(n)] for n in range(5)]


@pytest.mark.parametrize("size", [0, 3, 8])
@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_compressed_file_truncated_in_its_header_is_counted(packed, size, tmp_path):
    file = training_datasets.dolma(tmp_path, TEXTS, packed)
    file.write_bytes(file.read_bytes()[:size])
    assert read(file) == [Skipped("damaged file, read up to the damage")]


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_truncated_file_is_read_up_to_the_damage(packed, tmp_path):
    texts = [f"{n * 7919 % 10007} {n * 104729 % 99991}" for n in range(20_000)]
    file = training_datasets.dolma(tmp_path, texts, packed)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    found = read(file)
    assert found[-1] == Skipped("damaged file, read up to the damage")
    assert len(found) > 1000 and found[:-1] == [[text] for text in texts[: len(found) - 1]]


def test_a_parquet_file_without_text_is_skipped(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"words": "x", "id": 1}])
    wanted = "text, content, raw_content"
    reason = f"no column: found id, words; wanted one of {wanted}; choose with text_key"
    assert read(tmp_path / "a.parquet") == [Skipped(reason)]
    assert read(tmp_path / "a.parquet", text_key="words") == [["x"]]
    write_parquet(tmp_path / "b.parquet", [{"text": None}, {"text": "good"}])
    bad, good = read(tmp_path / "b.parquet")
    assert isinstance(bad, Skipped) and good == ["good"]


@pytest.mark.parametrize("packed", [".gz", ".zst", ""])
def test_lines_are_read_as_a_stream(packed, tmp_path):
    """Only one buffer of eleven million bytes is in memory at a time."""
    file = training_datasets.dolma(tmp_path, ["0123456789" * 10] * 50_000, packed)
    held = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    count = sum(pyarrow.total_allocated_bytes() - held < 2_000_000 for _ in read_lines(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 50_000 and peak < 1_000_000


def test_a_line_longer_than_the_limit_is_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("tf_lightning.data.readers.formats.MAX_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + b"x" * 1000 + b"\n")
    assert read(tmp_path / "a.jsonl") == [["a"], Skipped("line longer than 100 bytes")]
