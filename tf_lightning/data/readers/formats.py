"""Iterators over the records of a file: lines, JSON, rows of CSV and parquet, samples of a tar.

Files are read as streams, and .gz and .zst files are decompressed on the way. If a file is damaged,
its iterator yields the records before the damage and then raises BadSample. Members of a tar are
never unpacked to disk, their names are only used as keys, and links and devices are ignored, so a
tar cannot refer to other files.
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
from pyarrow import parquet

from tf_lightning.data.documents import BadSample
from tf_lightning.data.images import FileBytes

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
MAX_BYTES = 2**28  # largest record; a larger one is a sign of damage or a decompression bomb
ROWS_AT_ONCE = 64

DAMAGED_FILE = "damaged file, read up to the damage"
DAMAGED_TAR = "damaged tar, read up to the damage"


def file_format(file: Path) -> str:
    """Return the suffix without compression in lower case: ".jsonl" for "a.jsonl.zst"."""
    return (file.with_suffix("") if file.suffix in COMPRESSED else file).suffix.lower()


def open_stream(file: Path) -> io.BufferedReader:
    """Open a file as a stream of decompressed bytes."""
    stream = pyarrow.input_stream(str(file), compression=COMPRESSED.get(file.suffix))
    return io.BufferedReader(stream)


def read_bytes(file: Path) -> bytes:
    """Read and decompress a whole file."""
    try:
        with open_stream(file) as stream:
            return stream.read()
    except (OSError, pyarrow.ArrowException) as error:
        raise BadSample("damaged file") from error


def read_lines(file: Path) -> Iterator[bytes]:
    """Iterate over the lines of a file."""
    empty = True
    try:
        with open_stream(file) as stream:
            while line := stream.readline(MAX_BYTES + 1):
                if len(line) > MAX_BYTES:
                    raise BadSample(f"line longer than {MAX_BYTES:,} bytes")
                yield line
                empty = False
    except (OSError, pyarrow.ArrowException) as error:
        raise BadSample(DAMAGED_FILE) from error
    if empty and file.suffix in COMPRESSED:  # truncated in its header, which raises no error
        raise BadSample(DAMAGED_FILE)


def read_csv(file: Path) -> Iterator[dict[str, str]]:
    """Iterate over the rows of a CSV file whose first line names the columns."""
    try:
        with io.TextIOWrapper(open_stream(file), "utf-8-sig", newline="") as lines:
            yield from csv.DictReader(lines)
    except (OSError, pyarrow.ArrowException, csv.Error, UnicodeDecodeError) as error:
        raise BadSample(DAMAGED_FILE) from error


def read_parquet(file: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of a parquet file, with those of `columns` that it has."""
    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as table:
            found = [name for name in columns if name in table.schema_arrow.names]
            if not found:
                raise BadSample("parquet file without the expected columns")
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=found):
                yield from batch.to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise BadSample(DAMAGED_FILE) from error


def parse_json(content: str | bytes) -> Any:
    """Parse a JSON value.

    Raises:
        BadSample: the content is not JSON.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSample("line that is not JSON") from error


def parse_object(line: str | bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        BadSample: the line is not a JSON object.
    """
    record = parse_json(line)
    if not isinstance(record, dict):
        raise BadSample("line that is not a JSON object")
    return record


def read_tar(file: Path) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Iterate over the samples of a WebDataset tar: key, and (extension, content) of each file.

    The files of a sample have the same key and are next to each other.
    """
    try:
        with tarfile.open(file) as tar:
            for key, group in groupby(_plain_files(tar), key=lambda m: split_name(m.name)[0]):
                yield key, [(split_name(m.name)[1], _read(tar, m, file)) for m in group]
            tar.fileobj.seek(tar.offset)
            # A tar ends with blocks of zeros. tarfile silently accepts a truncated header, or the
            # end of the file, in their place.
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise BadSample(DAMAGED_TAR)
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise BadSample(DAMAGED_TAR) from error


def by_extension(files: list[tuple[str, bytes]]) -> dict[str, bytes]:
    """Map the extensions of a sample's files to their contents.

    Raises:
        BadSample: two files have the same extension, so it is unknown which one is right.
    """
    found = dict(files)
    if len(found) < len(files):
        raise BadSample("two files with the same name")
    return found


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name: "00000/000012.png" -> key "00000/000012", extension "png"."""
    folder, _, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}/{key}", extension.lower()


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, file: Path) -> bytes:
    content = tar.extractfile(member).read()
    if isinstance(tar.fileobj, io.BufferedReader):
        return FileBytes(content, file, member.offset_data)
    return content  # offsets in a compressed tar are not offsets of the file


def _plain_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if not 0 <= member.size <= MAX_BYTES:  # a negative size would loop forever
            raise BadSample(DAMAGED_TAR)
        if member.isfile():
            yield member
