"""Pages of parquet are measured before they are decompressed, and rows before conversion."""

import os
import struct

import pyarrow
import pytest
from pyarrow import parquet

from support.files import encoded_image
from tf_lightning.data import CaptionRows, InterleavedFiles, TextFiles
from tf_lightning.data.documents import Skipped
from tf_lightning.data.readers import parquet_pages, tables
from tf_lightning.data.readers.parquet_pages import check_pages

TEXTS = ["a" * size for size in (10, 20_000, 300, 70_000)]


def pages(file, names=("text",)) -> tuple[int, list[str]]:
    with parquet.ParquetFile(file) as table:
        return check_pages(file, table, names)


def reasons(source) -> list:
    found = source.documents("train")
    return [one.reason if isinstance(one, Skipped) else "read" for one in found]


@pytest.mark.parametrize("codec", ["none", "zstd", "snappy", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("statistics", [True, False])
def test_the_largest_page_is_found(codec, version, statistics, tmp_path):
    """A plain page holds its values, each after four bytes of its length."""
    options = {"data_page_version": version, "write_statistics": statistics, "compression": codec}
    options |= {"use_dictionary": False, "data_page_size": 1, "write_batch_size": 1}
    table = pyarrow.table({"text": TEXTS, "other": ["b" * 10**6] * 4})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2, **options)
    largest, shared = pages(tmp_path / "a.parquet")
    assert 70_004 <= largest < 70_100 and shared == []


def test_a_dictionary_page_counts(tmp_path):
    table = pyarrow.table({"text": TEXTS})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert pages(tmp_path / "a.parquet")[0] == sum(map(len, TEXTS)) + 4 * len(TEXTS)


def test_a_page_is_refused_by_its_header_although_the_footer_says_less(tmp_path):
    file = tmp_path / "a.parquet"
    options = {"use_dictionary": False, "compression": "zstd", "write_statistics": False}
    parquet.write_table(pyarrow.table({"text": ["a" * 1000] * 5}), file, **options)
    content = bytearray(file.read_bytes())
    size = 5 * 1004 + 6  # and the definition levels
    at = content.index(zigzag(size), 4)
    assert at < 12  # the second field of the header
    content[at : at + 2] = zigzag(8000)
    file.write_bytes(content)
    assert pages(file)[0] == 8000  # what Arrow would allocate


def test_a_page_that_is_larger_than_its_column_is_refused(tmp_path):
    """Arrow would allocate the compressed bytes, too."""
    file = tmp_path / "a.parquet"
    options = {"use_dictionary": False, "compression": "none", "write_statistics": False}
    parquet.write_table(pyarrow.table({"text": ["a" * 1000] * 5}), file, **options)
    content, size = bytearray(file.read_bytes()), zigzag(5 * 1004 + 6)
    at = content.index(size, content.index(size, 4) + 2)  # the third field of the header
    content[at : at + 2] = zigzag(8000)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="larger than its column"):
        pages(file)


def zigzag(value: int) -> bytes:
    return struct.pack("BB", 2 * value & 127 | 128, 2 * value >> 7)


def test_pages_over_the_limit_are_refused_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_pages, "MAX_PAGES", 60_000)
    source = TextFiles(f"{tmp_path}/a.parquet", val_fraction=0)
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    (found,) = reasons(source)
    assert found.startswith("parquet with pages of more than 60,000 bytes; write it with smaller")
    random = [os.urandom(len(text) // 2).hex() for text in TEXTS]  # compressed less than 8 times
    parquet.write_table(pyarrow.table({"text": random}), tmp_path / "a.parquet")
    assert reasons(source) == ["read"] * 4
    monkeypatch.setattr(parquet_pages, "MAX_STORED_PAGES", 100_000)
    assert "pages of more than 100,000 bytes" in reasons(source)[0]


def test_lists_of_many_values_are_refused(tmp_path, monkeypatch):
    table = pyarrow.table({"images": [[None] * 50], "texts": [["a"] * 50]})
    parquet.write_table(table, tmp_path / "a.parquet")
    source = InterleavedFiles(f"{tmp_path}/a.parquet", val_fraction=0, image_size=16)
    assert reasons(source) == ["read"]
    monkeypatch.setattr(tables, "MAX_ROW_VALUES", 99)
    assert "or 99 values" in reasons(source)[0]
    monkeypatch.setattr(parquet_pages, "MAX_LIST_VALUES", 49)
    assert "more than 49 values of lists" in reasons(source)[0]


def test_a_value_that_a_list_names_many_times_is_not_copied(tmp_path, monkeypatch):
    image = encoded_image(size=(8, 8)) + os.urandom(2000)
    table = pyarrow.table({"images": [[image] * 3, [image] * 40], "texts": [[""] * 3, [""] * 40]})
    parquet.write_table(table, tmp_path / "a.parquet")
    monkeypatch.setattr(parquet_pages, "MAX_PAGES", 10_000)
    assert pages(tmp_path / "a.parquet", ["images"])[1] == ["images.list.element"]
    monkeypatch.setattr(tables, "MAX_SAMPLE", 10_000)
    source = InterleavedFiles(f"{tmp_path}/a.parquet", val_fraction=0, image_size=16)
    assert reasons(source) == ["read", "row of more than 10,000 bytes or 1,048,576 values"]


def test_rows_that_share_a_large_value_are_read_one_at_a_time(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        parquet.ParquetFile, "iter_batches", lambda self, rows, columns: asked.append(rows) or []
    )
    monkeypatch.setattr(tables, "BATCH_BYTES", 20_000)
    image = encoded_image() + os.urandom(5000)
    table = pyarrow.table({"image": [image] * 50, "text": ["a"] * 50})
    parquet.write_table(table, tmp_path / "a.parquet")
    list(CaptionRows(f"{tmp_path}/a.parquet", val_fraction=0).documents("train"))
    assert asked == [20_000 // (len(image) + 4)]
