"""Iterators over the rows of CSV and parquet; values of a row by the names of its columns."""

import csv
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import compute, parquet

from tf_lightning.data.documents import BadSample
from tf_lightning.data.readers.formats import (
    MAX_BYTES,
    MAX_SAMPLE,
    NOT_UTF_8,
    file_fault,
    file_format,
    read_lines,
)
from tf_lightning.data.readers.parquet_pages import check_pages, has_values, read_footer

MAX_ROW_VALUES = 2**20  # values in the lists of a row of parquet
ROWS_AT_ONCE = 64
BATCH_BYTES = 2**26  # of a batch of rows of a parquet file
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
            row = BadSample(NOT_UTF_8)
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
    """Iterate over the rows of a parquet file; only existing ones of `columns` are read.

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
        return BadSample(NOT_UTF_8)
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
    """Return a message such as "no caption: found alt, image; wanted one of text, caption"."""
    names = ", ".join(sorted(str(name)[:40] for name in found)[:24])
    text = f"no {what}: found {names or 'nothing'}; wanted one of {', '.join(wanted)}"
    return f"{text}; choose with {option}" if option else text
