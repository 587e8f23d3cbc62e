"""Iterators over the records of a file: lines, JSON, rows of CSV and parquet, samples of a tar.

The first bytes of a file decide what it is; its suffix is asked only where they do not. Files are
read as streams and decompressed on the way (gz, zst, bz2, xz). If a file is damaged, its iterator
yields the records before the damage and then raises BadSample. Members of a tar are never unpacked
to disk, their names are only used as keys, and links and devices are ignored, so a tar cannot refer
to other files.

Every record has a limit that is checked before it is read, so that small hostile files cannot fill
the memory.
"""

import csv
import io
import json
import lzma
import re
import sys
import tarfile
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import compute, parquet

from tf_lightning.data.documents import BadSample
from tf_lightning.data.images import FileBytes, is_image_file
from tf_lightning.data.readers.parquet_pages import check_pages, has_values, read_footer
from tf_lightning.errors import UserError

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz", ".tgz": "gzip"}
COMPRESSION_MAGIC = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\0": "xz",
}  # fmt: skip
START = 2**16  # bytes that are read to find out what a file is
FIRST_LINE = 2**20  # bytes that are read to find out whether JSON has one record a line
MAX_BYTES = 2**24  # of a line or a JSON value; parsed JSON takes up to 20 times as much
MAX_RATIO = 100  # of decompressed to compressed bytes of a file of more than MAX_BYTES
MAX_SAMPLE = 2**27  # bytes of all files of a sample in a tar, or of a row of parquet
MAX_ROW_VALUES = 2**20  # values in the lists of a row of parquet
MAX_MEMBERS = 2**20  # files in a tar
MAX_HEADER = 2**20  # bytes of a name or of extended attributes in a tar
ROWS_AT_ONCE = 64
BATCH_BYTES = 2**26  # of a batch of rows of a parquet file
CHUNK = 2**16  # characters of JSON that are read at once

BOM = b"\xef\xbb\xbf"
UTF_16 = b"\xff\xfe", b"\xfe\xff"
DAMAGED_FILE = "damaged file, read up to the damage"
DAMAGED_TAR = "damaged tar, read up to the damage"

# Kinds of files

SUFFIXES = {
    "tar": (".tar", ".tgz"),
    "parquet": (".parquet",),
    "json": (".json", ".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "text": (".txt", ".text", ".md"),
    "image": (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
              ".ppm", ".pgm", ".avif", ".jp2"),
}  # fmt: skip
OTHER_FORMATS = {
    b"version https://git-lfs": "a Git LFS pointer, whose content `git lfs pull` fetches",
    b"<!DOCTYPE html": "an HTML page", b"<html": "an HTML page",
    b"PK\x03\x04": "a ZIP archive, which must be unpacked",
    b"ARROW1": "an Arrow file", b"\x89HDF": "an HDF5 file", b"\x93NUMPY": "a NumPy file",
    b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a RAR archive", b"%PDF": "a PDF file",
    b"SQLite format 3": "an SQLite database", b"\x80\x02}": "a pickle", b"\x80\x04\x95": "a pickle",
}  # fmt: skip


def file_format(file: Path) -> str:
    """Return the format of a file: a key of SUFFIXES, or a description of any other format.

    The format is read from the content. The suffix decides for empty and damaged files, and between
    plain text and tables.
    """
    start = read_start(file)
    text = start.removeprefix(BOM).lstrip()
    if start[:4] == b"PAR1":
        return "parquet"
    if is_tar_header(start[: tarfile.BLOCKSIZE]):
        return "tar"
    if is_image_file(start):
        return "image"
    for magic, description in OTHER_FORMATS.items():
        if text.startswith(magic):
            return description
    named = format_by_name(file)
    if named != "csv" and starts_json(text):
        return "json"
    return named or "text"


def format_by_name(file: Path) -> str | None:
    """Return the format that the suffix of a file stands for: a key of SUFFIXES, or None."""
    packed = file.suffix.lower() in (".gz", ".zst", ".bz2", ".xz")
    suffix = (file.with_suffix("") if packed else file).suffix.lower()
    return next((kind for kind, known in SUFFIXES.items() if suffix in known), None)


def is_tar_header(block: bytes) -> bool:
    """Return whether a block of 512 bytes is the header of a tar's member; it has a checksum."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def starts_json(text: bytes) -> bool:
    """Return whether a text begins with a line of JSON, or with an array or object over lines."""
    if text[:1] not in (b"{", b"["):
        return False
    line = re.split(rb"[\r\n]", text, maxsplit=1)[0].rstrip()
    try:
        found, end = json.JSONDecoder().raw_decode(line.decode("utf-8", "replace"))
    except json.JSONDecodeError as error:  # incomplete at the end of the line: it goes on below it
        return error.pos >= len(line.decode("utf-8", "replace")) or len(line) > START // 2
    except (ValueError, RecursionError):
        return True
    return end == len(line.decode("utf-8", "replace")) and isinstance(found, dict | list)


def refuse(file: Path, known: str) -> UserError:
    """Return the error for a file of a format that a source does not read."""
    kind = file_format(file)
    names = {"tar": "a tar", "parquet": "a parquet file", "json": "a JSON file",
             "text": "plain text", "csv": "a CSV file", "image": "an image"}  # fmt: skip
    return UserError(f"{file} is {names.get(kind, kind)}; {known}")


# Bytes and text


def compression(file: Path) -> str | None:
    """Return the codec of a file, or None if it is not compressed.

    A file that is named as compressed but begins with text was decompressed on its way, for example
    by a browser; any other is damaged, and its codec will say so.
    """
    with file.open("rb") as raw:
        start = raw.read(6)
    for magic, codec in COMPRESSION_MAGIC.items():
        if start.startswith(magic):
            return codec
    is_text = start.removeprefix(BOM).lstrip()[:1] in (b"{", b"[")
    return None if is_text else COMPRESSED.get(file.suffix.lower())


def open_stream(file: Path) -> io.BufferedReader:
    """Open a file as a stream of decompressed bytes.

    Reading raises BadSample after more bytes than data is known to expand to.
    """
    codec = compression(file)
    if codec is None:
        return io.BufferedReader(pyarrow.input_stream(str(file), compression=None))
    stream = (
        lzma.open(file) if codec == "xz" else pyarrow.input_stream(str(file), compression=codec)
    )
    return io.BufferedReader(_Limited(stream, max(MAX_BYTES, MAX_RATIO * file.stat().st_size)))


class _Limited(io.RawIOBase):
    """A stream that ends with BadSample after `limit` bytes."""

    def __init__(self, stream: Any, limit: int):
        self.stream, self.left = stream, limit

    def readable(self) -> bool:
        """Return True; BufferedReader asks."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Read up to len(buffer) bytes."""
        content = self.stream.read(len(buffer))
        self.left -= len(content)
        if self.left < 0:
            raise BadSample(f"file that expands more than {MAX_RATIO} times")
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Close the stream below."""
        self.stream.close()
        super().close()


STREAM_ERRORS = (OSError, EOFError, lzma.LZMAError, pyarrow.ArrowException)


def read_start(file: Path, size: int = START) -> bytes:
    """Read the first bytes of a file; none if it is damaged or may not be read."""
    try:
        with open_stream(file) as stream:
            return stream.read(size)
    except STREAM_ERRORS:
        return b""


def decode_text(content: bytes) -> str:
    """Decode UTF-8, without the byte order mark that some editors write.

    Raises:
        BadSample: the content is not UTF-8.
    """
    if content.startswith(UTF_16):
        raise BadSample("text in UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("text that is not UTF-8") from error


def file_fault(error: Exception) -> BadSample:
    """Say why a file, or the rest of it, cannot be read."""
    if isinstance(error, PermissionError):
        return BadSample("file that may not be read")
    if isinstance(error, pyarrow.ArrowNotImplementedError):
        return BadSample("file in a form that pyarrow does not read")
    return BadSample(DAMAGED_FILE)


def read_lines(file: Path) -> Iterator[bytes | BadSample]:
    """Iterate over the lines of a file, without a byte order mark.

    A BadSample stands for a line of more than MAX_BYTES.
    """
    first, too_long = True, False
    try:
        with _open_lines(file) as stream:
            while line := stream.readline(MAX_BYTES + 1):
                line = line if isinstance(line, bytes) else line.encode("latin-1")
                if first and line.startswith(UTF_16):
                    raise BadSample("text in UTF-16; save it as UTF-8")
                if len(line) > MAX_BYTES and not too_long:
                    yield BadSample(f"line longer than {MAX_BYTES:,} bytes")
                elif not too_long:
                    yield line.removeprefix(BOM) if first else line
                first, too_long = False, len(line) > MAX_BYTES
    except STREAM_ERRORS as error:
        raise file_fault(error) from error
    if first and compression(file):  # truncated in its header, which raises no error
        raise BadSample(DAMAGED_FILE)


def _open_lines(file: Path) -> io.BufferedReader | io.TextIOWrapper:
    """Open a file for reading lines that end in LF, or in CR if there is no LF in its start."""
    start, stream = read_start(file), open_stream(file)
    if b"\r" not in start or b"\n" in start:
        return stream
    return io.TextIOWrapper(stream, "latin-1", newline="\r")


def read_text(file: Path) -> Iterator[str | BadSample]:
    """Read a text file: whole, or in pieces of whole lines if it has more than MAX_BYTES.

    A BadSample stands for a piece that is not UTF-8, and for a line of more than MAX_BYTES.
    """
    piece: list[bytes] = []
    size = 0
    for line in read_lines(file):
        if isinstance(line, BadSample):
            yield line
            line = b""
        if size + len(line) > MAX_BYTES:
            yield _decode_piece(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if size or not piece:  # an empty file is an empty document
        yield _decode_piece(piece)


def _decode_piece(lines: list[bytes]) -> str | BadSample:
    try:
        return decode_text(b"".join(lines))
    except BadSample as error:
        return error


# JSON


def parse_json(content: str | bytes) -> Any:
    """Parse a JSON value.

    Raises:
        BadSample: the content is not JSON, has a key twice, or is more than can be parsed.
    """
    try:
        return json.loads(content, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise BadSample(_json_fault(error)) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of the members of a JSON object, of which no two may have the same key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise BadSample(f"JSON object with two values of {twice[:40]!r}")
    return found


def _json_fault(error: Exception, otherwise: str = "line that is not JSON") -> str:
    """Say what is wrong with JSON that cannot be parsed, and whether it is only our limit."""
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "text that is not UTF-8"
    if not isinstance(error, json.JSONDecodeError) and "digits" in str(error):
        return f"JSON with an integer of more than {sys.get_int_max_str_digits():,} digits"
    return otherwise


def parse_record(record: Any) -> Any:
    """Parse a line of JSON; return a record that is parsed already.

    Raises:
        BadSample: the line is not JSON, or a BadSample stands for the record.
    """
    if isinstance(record, BadSample):
        raise record
    return parse_json(record) if isinstance(record, bytes) else record


def parse_object(record: Any) -> dict[str, Any]:
    """Do what `parse_record` does for a JSON object.

    Raises:
        BadSample: the record is not a JSON object.
    """
    record = parse_record(record)
    if not isinstance(record, dict):
        raise BadSample("line that is not a JSON object")
    return record


def read_records(file: Path, is_part: Callable[[Any], bool] = lambda item: False) -> Iterator[Any]:
    """Iterate over JSON records: the lines of a file as bytes, or the parsed items of one array.

    An array may be on one line or on several. So may the only object of a file; if it has a list of
    objects under one of LIST_KEYS, these are the records.

    Args:
        file: the file.
        is_part: whether an item is part of a record; an array of parts is one record.
    """
    if not is_one_value(file):
        lines = read_lines(file)
        yield from (line for line in lines if isinstance(line, BadSample) or line.strip())
        return
    parts: list = []  # of the only record, which is an array
    members: dict[str, Any] = {}  # of the only record, which is an object
    has_records, size = False, 0
    for key, value in json_items(file):
        if key is None and not parts and not is_part(value):
            yield value
        elif key in LIST_KEYS and isinstance(value, dict) and not is_part(value):
            has_records = True
            yield value
        else:
            size += len(json.dumps(value))
            if size > MAX_BYTES:
                raise BadSample(f"JSON value longer than {MAX_BYTES:,} bytes")
            if key is None:
                parts.append(value)
            elif isinstance(members.get(key), list):
                members[key].append(value)
            else:
                members[key] = value
    if parts or members and not has_records:
        yield parts or members


LIST_KEYS = ("data", "rows", "records", "examples")
ONE_LIST = re.compile(rb'\{\s*"(?:%b)"\s*:\s*\[\s*\{' % "|".join(LIST_KEYS).encode())


def is_one_value(file: Path) -> bool:
    """Return whether a JSON file is one array, or one object over several lines."""
    lines = (
        line for line in read_start(file, FIRST_LINE).removeprefix(BOM).splitlines() if line.strip()
    )
    first, second = next(lines, b"").rstrip(), next(lines, b"")
    if first[:1] not in (b"[", b"{"):
        return False
    if not second:  # the only line, or the beginning of a long one
        return first[:1] == b"[" or bool(ONE_LIST.match(first))
    if first == b"[":
        return True
    return not _is_json(first) and not _is_json(second) and starts_json(first)


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


JSON_SPACE = re.compile(r"[ \t\n\r]*")


class _JsonReader:
    """Decodes a stream of JSON value by value."""

    def __init__(self, stream: io.TextIOBase):
        self.stream, self.buffer, self.place, self.at_end = stream, "", 0, False
        self.decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)

    def peek(self) -> str:
        """Return the next character that is not a space; "" at the end."""
        while True:
            self.place = JSON_SPACE.match(self.buffer, self.place).end()
            if self.place < len(self.buffer) or self.at_end:
                return self.buffer[self.place : self.place + 1]
            self._fill(CHUNK)

    def take(self, expected: str) -> str:
        """Consume the next character, which must be one of `expected`."""
        found = self.peek()
        if not found or found not in expected:
            raise BadSample(DAMAGED_FILE)
        self.place += 1
        return found

    def value(self) -> Any:
        """Decode the next value."""
        self.peek()
        while True:
            try:
                found, end = self.decoder.raw_decode(self.buffer, self.place)
            except json.JSONDecodeError as error:
                failure = error
            else:
                if end < len(self.buffer) or self.at_end:  # a number may go on
                    self.place = end
                    return found
                failure = None
            if self.at_end:
                raise BadSample(DAMAGED_FILE) from failure
            if len(self.buffer) - self.place > MAX_BYTES:
                raise BadSample(f"JSON value longer than {MAX_BYTES:,} bytes")
            self._fill(max(CHUNK, len(self.buffer) - self.place))  # doubles, so retries are few

    def _fill(self, size: int) -> None:
        more = self.stream.read(size)
        self.buffer, self.place = self.buffer[self.place :] + more, 0
        self.at_end = not more


def json_items(file: Path) -> Iterator[tuple[str | None, Any]]:
    """Iterate over the items of a JSON array as (None, item), or over an object's (key, value).

    If the value of a key is an array, an empty list is yielded for it and then each of its items.

    Raises:
        BadSample: the file is not JSON, or damaged after what was yielded.
    """
    try:
        with io.TextIOWrapper(open_stream(file), "utf-8-sig") as stream:
            reader = _JsonReader(stream)
            if reader.peek() == "[":
                yield from ((None, item) for item in _array(reader))
            else:
                yield from _object(reader)
            if reader.peek():
                raise BadSample(DAMAGED_FILE)
    except (ValueError, RecursionError, *STREAM_ERRORS) as error:
        raise BadSample(_json_fault(error, DAMAGED_FILE)) from error


def _array(reader: _JsonReader) -> Iterator[Any]:
    reader.take("[")
    if reader.peek() == "]":
        reader.take("]")
        return
    more = ","
    while more == ",":
        yield reader.value()
        more = reader.take(",]")


def _object(reader: _JsonReader) -> Iterator[tuple[str, Any]]:
    reader.take("{")
    more = "" if reader.peek() == "}" else ","
    keys: set[str] = set()
    while more == ",":
        key = reader.value()
        if key in keys:
            raise BadSample(f"JSON object with two values of {key[:40]!r}")
        keys.add(key)
        reader.take(":")
        if reader.peek() == "[":
            yield key, []
            yield from ((key, item) for item in _array(reader))
        else:
            yield key, reader.value()
        more = reader.take(",}")


# Tables


SURPLUS = "row with more fields than the header; put quotes around texts that contain {!r}"
QUOTES = 'row whose quotes do not match; write a quote inside of a text as ""'
MAX_READ_AGAIN = 4 * MAX_BYTES  # characters of a table that are read again after wrong quotes


def read_csv(file: Path) -> Iterator[dict[str, str] | BadSample]:
    """Iterate over the rows of a CSV or TSV file whose first line names the columns.

    A BadSample stands for a row that is not UTF-8, whose quotes do not match, or that has more
    fields than there are columns, most often a text that contains the delimiter: its end would be
    lost.
    """
    lines = (
        line if isinstance(line, BadSample) else line.decode("utf-8", "surrogateescape")
        for line in read_lines(file)
    )
    header = next((line for line in lines if isinstance(line, BadSample) or line.strip()), "")
    if isinstance(header, BadSample):
        raise header
    delimiter = max("\t,;|", key=header.count)
    rows = _csv_rows(chain([header], lines), delimiter)
    written = next(rows, [])
    if isinstance(written, BadSample):
        raise written
    names = [name.strip() for name in written]
    check_unique(names)
    padded = names != written  # there are spaces before delimiters
    for row in rows:
        if isinstance(row, BadSample):
            yield row
        elif any(row[len(names) :]):
            yield BadSample(SURPLUS.format(delimiter))
        elif row:
            row += [None] * (len(names) - len(row))
            yield {
                name: value.strip() if padded and value else value
                for name, value in zip(names, row, strict=False)
            }


def _csv_rows(lines: Iterator[str | BadSample], delimiter: str) -> Iterator[list[str] | BadSample]:
    """Split the lines of a table into rows.

    A quote that is not closed would swallow the rows after it. If the quotes of a row do not match,
    a BadSample stands for its first line, and the next row begins with the line after it.
    """
    csv.field_size_limit(2 * MAX_BYTES)
    again: deque[str | BadSample] = deque()
    taken: list[str] = []  # lines of the current row

    def take() -> Iterator[str]:
        size = 0
        while (line := again.popleft() if again else next(lines, None)) is not None:
            if isinstance(line, BadSample):
                raise line
            size = size + len(line) if taken else len(line)
            taken.append(line)
            if size > MAX_BYTES:
                raise csv.Error
            yield line

    def reader() -> Iterator[list[str]]:
        return csv.reader(take(), delimiter=delimiter, skipinitialspace=True, strict=True)

    rows, left = reader(), MAX_READ_AGAIN
    while True:
        taken.clear()
        try:
            row = next(rows)
            "".join(row).encode()
        except StopIteration:
            return
        except UnicodeEncodeError:
            row = BadSample("text that is not UTF-8")
        except BadSample as error:  # in place of a line
            row, rows = error, reader()
        except csv.Error:
            left -= sum(map(len, taken[1:]))
            if left < 0:
                raise BadSample("table with many unclosed quotes, read up to them") from None
            again.extendleft(reversed(taken[1:]))
            row, rows = BadSample(QUOTES), reader()
        yield row


PARQUET_ERRORS = (OSError, ValueError, LookupError, TypeError, pyarrow.ArrowException)


def read_parquet(
    file: Path, columns: Iterable[str], option: str = ""
) -> Iterator[dict[str, Any] | BadSample]:
    """Iterate over the rows of a parquet file, with those of `columns` that it has.

    Other columns are None, so that a message about a missing one can name them. A BadSample stands
    for a row whose values cannot be converted, such as text that is not UTF-8.

    Args:
        file: the file.
        columns: names of the columns.
        option: argument of the source that chooses a column, for the message.

    Raises:
        BadSample: it has none of the columns, or is damaged.
    """
    try:
        with ExitStack() as stack:
            table = stack.enter_context(open_parquet(file))
            names, columns = table.schema_arrow.names, list(columns)
            found = [name for name in names if name in columns or name.lower() in columns]
            if not found:
                raise BadSample(missing("column", names, columns, option))
            check_unique(found)
            others = dict.fromkeys(name for name in names if name not in found)
            largest, shared = check_pages(file, table, found)
            # Rows may share a value, so that each of them has one of a page's size.
            rows = max(1, min(ROWS_AT_ONCE, BATCH_BYTES // max(largest, 1)))
            if shared:
                table = stack.enter_context(open_parquet(file, read_dictionary=shared))
            for batch in table.iter_batches(rows, columns=found):
                for number in range(len(batch)):
                    yield _row(batch.slice(number, 1), others)
    except PARQUET_ERRORS as error:
        raise file_fault(error) from error


def open_parquet(file: Path, **options) -> parquet.ParquetFile:
    """Open a parquet file for reading it page by page."""
    options |= {"page_checksum_verification": True, "buffer_size": 2**20, "pre_buffer": False}
    return parquet.ParquetFile(file, **options)


def check_unique(names: Iterable[str]) -> None:
    """Raise BadSample if a table has two columns of one name: it is unknown which one is right."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise BadSample(f"table with two columns {str(twice[0])[:40]!r}")


def first_present(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    """Return the value of the first name that a row has, in any case; None if it has none."""
    names = list(names)
    for name in names:
        if row.get(name) is not None:
            return row[name]
    lower = {key.lower(): value for key, value in row.items() if isinstance(key, str)}
    return next((lower[name] for name in names if lower.get(name) is not None), None)


def column_names(file: Path) -> list[str]:
    """Return the columns of a parquet file; none if it is damaged."""
    try:
        return parquet.read_schema(file).names
    except (OSError, ValueError, pyarrow.ArrowException):
        return []


def has_image_columns(file: Path) -> bool:
    """Return whether a parquet file has columns of bytes with values in them, which are images."""
    if file_format(file) != "parquet":
        return False
    try:
        columns = parquet.read_metadata(file).schema
        with file.open("rb") as stream:
            groups = read_footer(stream)
        of_bytes = [
            index
            for index in range(len(columns))
            if "BYTE_ARRAY" in columns.column(index).physical_type
            and columns.column(index).logical_type.type == "NONE"
        ]
        return any(has_values(group[index]) for group in groups for index in of_bytes)
    except PARQUET_ERRORS:
        return True


def _row(batch: pyarrow.RecordBatch, others: dict[str, None]) -> dict[str, Any] | BadSample:
    sizes = [_size(column) for column in batch.columns]
    if sum(n for n, _ in sizes) > MAX_ROW_VALUES or sum(size for _, size in sizes) > MAX_SAMPLE:
        return BadSample(f"row of more than {MAX_SAMPLE:,} bytes or {MAX_ROW_VALUES:,} values")
    try:
        return batch.to_pylist()[0] | others
    except UnicodeDecodeError:
        return BadSample("text that is not UTF-8")
    except (ValueError, OverflowError, pyarrow.ArrowException) as error:
        return BadSample(f"row that cannot be converted ({type(error).__name__})")


def _size(column: pyarrow.Array) -> tuple[int, int]:
    """Count the values of a column that become Python objects, and their bytes."""
    if pyarrow.types.is_dictionary(column.type):  # each use of a value becomes a copy of it
        values = column.dictionary
        if pyarrow.types.is_primitive(values.type):
            return len(column), column.nbytes
        lengths = compute.binary_length(values).take(column.indices)
        return len(column), compute.sum(lengths).as_py() or 0
    if pyarrow.types.is_nested(column.type):
        flat = column.flatten()
        sizes = [_size(part) for part in (flat if isinstance(flat, list) else [flat])]
        return len(column) + sum(n for n, _ in sizes), sum(size for _, size in sizes)
    return len(column), column.nbytes


def missing(what: str, found: Iterable[str], wanted: Iterable[str], option: str = "") -> str:
    """Say that nothing has one of the wanted names: "no caption: found ..., wanted one of ..."."""
    names = ", ".join(sorted(str(name)[:40] for name in found)[:24])
    text = f"no {what}: found {names or 'nothing'}; wanted one of {', '.join(wanted)}"
    return f"{text}; choose with {option}" if option else text


# Tars

IGNORED = (".DS_Store", "Thumbs.db", "desktop.ini")  # written by file managers
TAR_ERRORS = (tarfile.TarError, ValueError, zlib.error, RecursionError, *STREAM_ERRORS)

Member = tuple[str, int, int]  # name, offset, bytes
TarSample = list[tuple[str, bytes]]  # extension and content of each file


def is_ignored(name: str) -> bool:
    """Return whether a file was written by a file manager or by macOS's tar, beside the real one.

    macOS stores the attributes of NAME in "._NAME".
    """
    *folders, base = name.split("/")
    return base.startswith("._") or base in IGNORED or "__MACOSX" in folders


class _TarStream:
    """A stream that can be sought forward, and refuses to read more than a header's limit at once.

    tarfile reads the names and attributes of members whole, however long the header says they are.
    """

    def __init__(self, stream: io.BufferedReader):
        self.stream, self.place, self.limit = stream, 0, MAX_HEADER

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        if size > self.limit:
            raise BadSample(f"tar with a header or file of more than {self.limit:,} bytes")
        content = self.stream.read(size)
        self.place += len(content)
        return content

    def tell(self) -> int:
        """Return the number of bytes before the next one."""
        return self.place

    def seek(self, place: int) -> None:
        """Skip to a later position."""
        if self.stream.seekable():
            self.place = self.stream.seek(place)
        while self.place < place:
            content = self.stream.read(min(place - self.place, 2**20))
            if not content:
                return
            self.place += len(content)


def read_tar(file: Path) -> Iterator[tuple[str, TarSample | BadSample]]:
    """Iterate over the samples of a WebDataset tar: key, and (extension, content) of each file.

    The names of a sample's files are equal up to the first dot of the last component
    (webdataset's rule), or up to the last dot if several samples are equal up to the first. Images
    and their texts may lie in two folders. The files need not be next to each other, but a
    compressed tar is then held in memory in part.
    """
    members, damage = list_members(file)
    samples = _join_folders(group_members(members))
    read = _read_compressed if compression(file) else _read_plain
    yield from read(file, samples)
    if damage:
        raise damage


def list_members(file: Path) -> tuple[list[Member], BadSample | None]:
    """List the files in a tar up to its damage, and the damage."""
    members: list[Member] = []
    try:
        with open_stream(file) as stream:
            counted = _TarStream(stream)
            tar = tarfile.open(fileobj=counted, mode="r:")
            for member in tar:
                tar.members = []  # tarfile would keep all of them
                if not 0 <= member.size:  # a negative size would loop forever
                    raise BadSample(DAMAGED_TAR)
                if member.isreg() and not member.issparse() and not is_ignored(member.name):
                    members.append((member.name, member.offset_data, member.size))
                if len(members) > MAX_MEMBERS:
                    raise BadSample(f"tar of more than {MAX_MEMBERS:,} files")
            counted.seek(tar.offset)
            # A tar ends with blocks of zeros. tarfile silently accepts a truncated header, or the
            # end of the file, in their place.
            if counted.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise BadSample(DAMAGED_TAR)
    except BadSample as damage:
        return members, damage
    except TAR_ERRORS:
        return members, BadSample(DAMAGED_TAR)
    return members, None


def group_members(members: list[Member]) -> list[tuple[str, list[tuple[str, Member]]]]:
    """Group the files of a tar by sample, in the order of their first files.

    Returns:
        Key, and (extension, member) of each file, for each sample.
    """
    groups: dict[str, list[list[tuple[str, Member]]]] = {}  # by key up to the first dot
    order: list[tuple[str, list]] = []
    latest = None
    for member in members:
        key, extension = split_name(unicodedata.normalize("NFC", member[0]))  # macOS writes NFD
        rounds = groups.setdefault(key, [])
        # A name that comes again, not next to its sample, begins another sample of the same key.
        again = latest != key and rounds and extension in dict(rounds[-1])
        if not rounds or again:
            rounds.append([])
            order.append((key, rounds[-1]))
        rounds[-1].append((extension, member))
        latest = key
    return [sample for key, files in order for sample in _split_group(key, files)]


def _split_group(
    key: str, files: list[tuple[str, Member]]
) -> Iterator[tuple[str, list[tuple[str, Member]]]]:
    """Split the files of a key at the last dots of their names if their extensions are not unique.

    "a.1.jpg, a.1.txt, a.2.jpg, a.2.txt" are two samples, "a.input.jpg, a.output.txt" are one, and
    so are "a.jpg, a.caption1.txt, a.caption2.txt", whose extensions are left whole.
    """
    short = [(extension.rpartition(".")[2], member) for extension, member in files]
    if len(dict(short)) == len(short) or all("." not in extension for extension, _ in files):
        yield key, short
        return
    parts: dict[str, list[tuple[str, Member]]] = {}
    for extension, member in files:
        middle, _, last = extension.rpartition(".")
        parts.setdefault(f"{key}.{middle}" if middle else key, []).append((last, member))
    others = [part for name, part in parts.items() if name != key]
    if len(others) < len(parts) and all(len(p) == 1 and not _is_image(p) for p in others):
        yield key, files
    else:
        yield from parts.items()


def _is_image(files: list[tuple[str, Member]]) -> bool:
    return any(f".{extension}" in SUFFIXES["image"] for extension, _ in files)


# Names of folders of a tar that only say what kind of files they have.
KIND_FOLDERS = (
    "images", "image", "imgs", "img", "jpg", "png", "captions", "caption", "texts", "text", "txt",
    "prompts", "json",
)  # fmt: skip


def _join_folders(samples: list[tuple[str, list]]) -> list[tuple[str, list]]:
    """Join "images/0.jpg" and "captions/0.txt" if no sample has an image and a text without it."""
    if any(len({_is_image([file]) for file in files}) > 1 for _, files in samples):
        return samples
    joined: dict[tuple[str, ...], tuple[str, list]] = {}
    for key, files in samples:
        *folders, base = key.split("/")
        common = *(name for name in folders if name.lower() not in KIND_FOLDERS), base
        joined.setdefault(common, (key, []))[1].extend(files)
    return list(joined.values())


def _read_plain(file: Path, samples: list) -> Iterator[tuple[str, TarSample | BadSample]]:
    """Read the files of each sample at their offsets."""
    with file.open("rb") as stream:
        for key, files in samples:
            if sum(size for _, (_, _, size) in files) > MAX_SAMPLE:
                yield key, BadSample(f"files of more than {MAX_SAMPLE:,} bytes")
                continue
            contents = []
            for extension, (_, offset, size) in files:
                stream.seek(offset)
                content = FileBytes(_exactly(stream.read(size), size), file, offset)
                contents.append((extension, content))
            yield key, contents


def _read_compressed(file: Path, samples: list) -> Iterator[tuple[str, TarSample | BadSample]]:
    """Read all files in their order; a sample is complete with its last one."""
    places = sorted(
        (offset, size, number, index)
        for number, (_, files) in enumerate(samples)
        for index, (_, (_, offset, size)) in enumerate(files)
    )
    held: dict[int, dict[int, bytes]] = {}  # contents of incomplete samples
    num_bytes = 0
    with open_stream(file) as raw:
        stream = _TarStream(raw)
        stream.limit = MAX_SAMPLE
        for offset, size, number, index in places:
            key, files = samples[number]
            num_bytes += size
            if num_bytes > MAX_SAMPLE:
                raise BadSample("compressed tar whose samples are too large or not sorted by name")
            try:
                stream.seek(offset)
                content = _exactly(stream.read(size), size)
            except TAR_ERRORS as error:
                raise BadSample(DAMAGED_TAR) from error
            held.setdefault(number, {})[index] = content
            if len(held[number]) == len(files):
                contents = held.pop(number)
                num_bytes -= sum(map(len, contents.values()))
                yield key, [(extension, contents[i]) for i, (extension, _) in enumerate(files)]


def _exactly(content: bytes, size: int) -> bytes:
    if len(content) != size:
        raise BadSample(DAMAGED_TAR)
    return content


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
