"""JSON: single values, and iterators over the records of a file."""

import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tf_lightning.data.documents import BadSample
from tf_lightning.data.readers.formats import (
    BOM,
    DAMAGED_FILE,
    MAX_BYTES,
    NOT_UTF_8,
    STREAM_ERRORS,
    open_stream,
    read_lines,
    read_start,
    starts_json,
)

FIRST_LINE = 2**20  # bytes that are read to find out whether JSON has one record a line
CHUNK = 2**16  # characters of JSON that are read at once


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
    """Return why JSON cannot be parsed: it is not valid, or it exceeds a limit of the parser."""
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return NOT_UTF_8
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
    """Parse a record as `parse_record` does; it must be a JSON object.

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
        BadSample: the file is not JSON, or damaged after the values that were yielded.
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
