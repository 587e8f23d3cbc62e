"""The records of a file one after another: lines, parsed JSON, rows of CSV and parquet.

Files are read as streams, .gz and .zst unpacked on the way. A file that is damaged is read as far
as it goes and then ends in BadSample.

The samples of a WebDataset tar, read in place: nothing is unpacked to disk.

What is no plain file (links, devices, folders) is passed over, and names serve only as keys, so a
member cannot reach outside.
"""

import csv
import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow

from tf_lightning.data.documents import BadSample
from tf_lightning.data.images import FileBytes

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
MAX_BYTES = 2**28  # of one record; more is damage, or a bomb
ROWS_AT_ONCE = 64


def file_format(file: Path) -> str:
    """The suffix under the compression's: ".jsonl" of "a.jsonl.zst"."""
    return (file.with_suffix("") if file.suffix in COMPRESSED else file).suffix.lower()


def open_stream(file: Path) -> io.BufferedReader:
    """A file's bytes, unpacked."""
    stream = pyarrow.input_stream(str(file), compression=COMPRESSED.get(file.suffix))
    return io.BufferedReader(stream)


def read_bytes(file: Path) -> bytes:
    """All of a file."""
    try:
        with open_stream(file) as stream:
            return stream.read()
    except (OSError, pyarrow.ArrowException) as error:
        raise BadSample("damaged file") from error


def read_lines(file: Path) -> Iterator[bytes]:
    """The lines of a file."""
    empty = True
    try:
        with open_stream(file) as stream:
            while line := stream.readline(MAX_BYTES + 1):
                if len(line) > MAX_BYTES:
                    raise BadSample(f"line of more than {MAX_BYTES:,} bytes")
                yield line
                empty = False
    except (OSError, pyarrow.ArrowException) as error:
        raise BadSample("damaged file, read as far as it goes") from error
    if empty and file.suffix in COMPRESSED:  # torn off in its head, which raises nothing
        raise BadSample("damaged file, read as far as it goes")


def read_csv(file: Path) -> Iterator[dict[str, str]]:
    """The rows of a table whose first line names the columns."""
    try:
        with io.TextIOWrapper(open_stream(file), "utf-8-sig", newline="") as lines:
            yield from csv.DictReader(lines)
    except (OSError, pyarrow.ArrowException, csv.Error, UnicodeDecodeError) as error:
        raise BadSample("damaged file, read as far as it goes") from error


def read_parquet(file: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, of these columns as many as it has."""
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as table:
            found = [name for name in columns if name in table.schema_arrow.names]
            if not found:
                raise BadSample("parquet file of other columns")
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=found):
                yield from batch.to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise BadSample("damaged file, read as far as it goes") from error


def parse_json(content: str | bytes) -> Any:
    """A JSON value; BadSample if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSample("line that is not JSON") from error


def parse_object(line: str | bytes) -> dict[str, Any]:
    """A JSON object; BadSample if it is none."""
    record = parse_json(line)
    if not isinstance(record, dict):
        raise BadSample("line that is not a JSON object")
    return record


DAMAGED = "damaged tar, read as far as it goes"


def read_tar(file: Path) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Key of each sample, and the extension and content of its files.

    The files of a key stand one after another, as WebDataset has it.
    """
    try:
        with tarfile.open(file) as tar:
            for key, group in groupby(_plain_files(tar), key=lambda m: split_name(m.name)[0]):
                yield key, [(split_name(m.name)[1], _read(tar, m, file)) for m in group]
            tar.fileobj.seek(tar.offset)
            # Behind the last member stand blocks of zeros. tarfile takes a torn header, or the end
            # of the file, for them and says nothing.
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise BadSample(DAMAGED)
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise BadSample(DAMAGED) from error


def by_extension(files: list[tuple[str, bytes]]) -> dict[str, bytes]:
    """A sample's files; BadSample where two have one name, as then neither is known to be right."""
    found = dict(files)
    if len(found) < len(files):
        raise BadSample("two files of one name")
    return found


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a tar's file: "00000/000012.png" -> "00000/000012", "png"."""
    folder, _, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}/{key}", extension.lower()


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, file: Path) -> bytes:
    content = tar.extractfile(member).read()
    packed = not isinstance(tar.fileobj, io.BufferedReader)  # has no place that could be read alone
    return content if packed else FileBytes(content, file, member.offset_data)


def _plain_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if not 0 <= member.size <= MAX_BYTES:  # a negative size would be read again and again
            raise BadSample(DAMAGED)
        if member.isfile():
            yield member
