"""Sizes of the pages of a parquet file, read from their headers before Arrow decompresses them.

Arrow allocates what the header of a page says, and the sizes in the footer need not agree with it.
Both are structs of Thrift's compact protocol; see
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
The footer is read here too, since pyarrow ends the process at some damage of it.
"""

import os
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import parquet

from tf_lightning.data.documents import BadSample

MAX_PAGES = 2**27  # decompressed bytes of the largest pages of all columns that are read
# The same for pages that are compressed at most MAX_RATIO times, so that the file is large itself:
# pyarrow writes 1,024 images into one page, whatever their size.
MAX_STORED_PAGES, MAX_RATIO = 2**29, 8
MAX_LIST_VALUES = 2**24  # values of a column of lists in a row group; all may belong to one row
MAX_FOOTER_VALUES = 2**21
MAX_MISCOUNT = 100  # bytes by which old writers gave a column too little (PARQUET-816)

# Types of Thrift's compact protocol.
TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
INTEGERS = 4, 5, 6  # of 16, 32 and 64 bits, all stored as varints
MAX_DEPTH = 12
MAX_BINARY = 2**12  # bytes of a value that is kept; longer ones are skipped

# Numbers of fields: of the footer, a row group, a column in it, its metadata, its statistics; of
# the header of a page.
ROW_GROUPS, COLUMNS, METADATA = 4, 1, 3
PHYSICAL_TYPE, NUM_VALUES, COMPRESSED, DATA, DICTIONARY, STATISTICS = 1, 5, 7, 9, 11, 12
NULL_COUNT = 3
PAGE_TYPE, PAGE_SIZE, PACKED_PAGE_SIZE = 1, 2, 3
DICTIONARY_PAGE, BYTE_ARRAY = 2, 6  # types of a page and of a column


def check_pages(
    file: Path, table: parquet.ParquetFile, names: Iterable[str]
) -> tuple[int, list[str]]:
    """Check that some columns can be read in little memory.

    Args:
        file: the parquet file.
        table: the same file, opened.
        names: names of the columns.

    Returns:
        The decompressed bytes of the largest page, and the paths of the columns of lists whose rows
        may be much larger than their pages, because they name a value many times.

    Raises:
        BadSample: reading the columns would take too much memory.
        ValueError, LookupError, TypeError: a header is damaged.
    """
    names, largest, shared = tuple(names), 0, {}
    columns = [table.schema.column(index) for index in range(len(table.schema))]
    with file.open("rb") as stream:
        for group in read_footer(stream):
            sizes, packed = [], 0
            for column, chunk in zip(columns, group, strict=True):
                if not any(f"{column.path}.".startswith(f"{name}.") for name in names):
                    continue
                is_list = column.max_repetition_level > 0
                if is_list and chunk[NUM_VALUES] > MAX_LIST_VALUES:
                    raise BadSample(
                        f"parquet with more than {MAX_LIST_VALUES:,} values of lists in a row "
                        "group; write smaller row groups"
                    )
                pages = list(_pages(stream, chunk))
                dictionary = max((page.size for page in pages if page.is_dictionary), default=0)
                widest = max(pages, default=Page(0, 0, False))
                largest = max(largest, widest.size)
                # The values of a dictionary are copied out of their page.
                sizes.append(dictionary + widest.size)
                packed += widest.packed * (2 if widest.is_dictionary else 1)
                if is_list and dictionary * chunk[NUM_VALUES] > MAX_PAGES:
                    shared[column.path] = chunk[PHYSICAL_TYPE] == BYTE_ARRAY
            limit = MAX_PAGES if sum(sizes) > MAX_RATIO * packed else MAX_STORED_PAGES
            if sum(sizes) > limit:
                raise BadSample(
                    f"parquet with pages of more than {limit:,} bytes; write it with smaller ones, "
                    "as with pyarrow's write_batch_size and data_page_size"
                )
    return largest, [path for path, is_bytes in shared.items() if is_bytes]


def read_footer(stream: BufferedReader) -> list[list[dict[int, Any]]]:
    """Read the metadata of the columns of each row group, by the numbers of their fields.

    Raises:
        ValueError, LookupError, TypeError: the footer is damaged.
    """
    stream.seek(-8, os.SEEK_END)
    size = int.from_bytes(stream.read(4), "little")
    stream.seek(-8 - size, os.SEEK_END)
    footer = _Thrift(stream).struct()
    return [[column[METADATA] for column in group[COLUMNS]] for group in footer[ROW_GROUPS]]


def has_values(chunk: dict[int, Any]) -> bool:
    """Return whether a column has a value that is not null in a row group, or may have one."""
    return chunk.get(STATISTICS, {}).get(NULL_COUNT, 0) < chunk[NUM_VALUES]


class Page(NamedTuple):
    """Decompressed and compressed bytes of a page, and whether it is a dictionary."""

    size: int
    packed: int
    is_dictionary: bool


def _pages(stream: BufferedReader, chunk: dict[int, Any]) -> Iterator[Page]:
    """Yield the pages of a column in a row group."""
    place, dictionary = chunk[DATA], chunk.get(DICTIONARY, 0)
    if 0 < dictionary < place:
        place = dictionary
    end = place + chunk[COMPRESSED]
    while place < end:
        stream.seek(place)
        header = _Thrift(stream).struct()
        size, packed = header[PAGE_SIZE], header[PACKED_PAGE_SIZE]
        if size < 0 or not 0 <= packed <= end - place + MAX_MISCOUNT:
            raise ValueError("page of a negative size, or one that is larger than its column")
        yield Page(size, packed, header.get(PAGE_TYPE) == DICTIONARY_PAGE)
        place = stream.tell() + packed


class _Thrift:
    """Reads values of Thrift's compact protocol; IndexError at the end of the file."""

    def __init__(self, stream: BufferedReader):
        self.stream, self.left = stream, MAX_FOOTER_VALUES

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Read a struct; return the values by the numbers of their fields."""
        found, field = {}, 0
        while kind := self.byte():
            field = field + (kind >> 4) if kind >> 4 else self.integer()
            kind &= 15
            found[field] = kind == TRUE if kind in (TRUE, FALSE) else self.value(kind, depth + 1)
        return found

    def value(self, kind: int, depth: int) -> Any:
        """Read a value of a type; None if it is too long to be kept."""
        self.left -= 1
        if depth > MAX_DEPTH or self.left < 0:
            raise ValueError("metadata with too many values")
        if kind in INTEGERS:
            return self.integer()
        if kind == STRUCT:
            return self.struct(depth)
        if kind in (LIST, SET):
            head = self.byte()
            count = self.varint() if head >> 4 == 15 else head >> 4
            return [self.value(head & 15, depth + 1) for _ in range(count)]
        if kind in (TRUE, FALSE, BYTE):  # in a list, a truth value is a byte
            return self.byte()
        if kind not in (BINARY, DOUBLE):
            raise ValueError(f"value of type {kind}")
        size = self.varint() if kind == BINARY else 8
        if size <= MAX_BINARY:
            return self.stream.read(size)
        self.stream.seek(size, os.SEEK_CUR)
        return None

    def byte(self) -> int:
        """Read a byte."""
        return self.stream.read(1)[0]

    def varint(self) -> int:
        """Read an integer in pieces of seven bits, the lowest first."""
        value = shift = 0
        while (byte := self.byte()) >= 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("integer of more than 64 bits")
        return value | byte << shift

    def integer(self) -> int:
        """Read a signed integer, in which the sign is the last bit."""
        value = self.varint()
        return (value >> 1) ^ -(value & 1)
