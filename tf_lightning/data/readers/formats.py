"""The format of a file, and its content as a stream of bytes, of lines or of texts.

The first bytes of a file determine its format. Its suffix counts only where they do not suffice.
Files are read as streams and decompressed on the way (gz, zst, bz2, xz). If a file is damaged,
iterators over its records yield those before the damage and then raise BadSample.

Every record has a limit that is checked before it is read, so that small hostile files cannot fill
the memory.
"""

import io
import json
import lzma
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from tf_lightning.data.documents import BadSample
from tf_lightning.data.images import is_image_file
from tf_lightning.errors import UserError
from tf_lightning.remote.cache import url_of
from tf_lightning.remote.urls import public_url

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz", ".tgz": "gzip"}
COMPRESSION_MAGIC = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\0": "xz",
}  # fmt: skip
START = 2**16  # bytes that are read to recognize a format
MAX_BYTES = 2**24  # of a line or a JSON value; parsed JSON takes up to 20 times as much
MAX_RATIO = 100  # of decompressed to compressed bytes of a file of more than MAX_BYTES
MAX_SAMPLE = 2**27  # bytes of all files of a sample in a tar, or of a row of parquet
MAX_MEMBERS = 2**20  # files in a tar
MAX_HEADER = 2**20  # bytes of a name or of extended attributes in a tar

BOM = b"\xef\xbb\xbf"
UTF_16 = b"\xff\xfe", b"\xfe\xff"
DAMAGED_FILE = "damaged file, read up to the damage"
NOT_UTF_8, IN_UTF_16 = "text that is not UTF-8", "text in UTF-16; save it as UTF-8"

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
# Suffixes of images that are not read, but counted.
OTHER_IMAGES = ".heic", ".heif", ".jxl", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw"
OTHER_FORMATS = {
    b"version https://git-lfs": "a Git LFS pointer, whose content `git lfs pull` fetches",
    b"<!DOCTYPE html": "an HTML page", b"<html": "an HTML page",
    b"PK\x03\x04": "a ZIP archive, which must be unpacked",
    b"ARROW1": "an Arrow file", b"\x89HDF": "an HDF5 file", b"\x93NUMPY": "a NumPy file",
    b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a RAR archive", b"%PDF": "a PDF file",
    b"SQLite format 3": "an SQLite database", b"\x80\x02}": "a pickle", b"\x80\x04\x95": "a pickle",
}  # fmt: skip
IGNORED = (".DS_Store", "Thumbs.db", "desktop.ini")  # written by file managers


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


def may_be_image(file: Path) -> bool:
    """Return whether a file is an image, or has the suffix of one in a format that is not read."""
    return file.suffix.lower() in OTHER_IMAGES or file_format(file) == "image"


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
    """Return the error for a file, or a copy of a remote one, of a format that is not read."""
    url = url_of(file)
    kind = file_format(file)
    names = {"tar": "a tar", "parquet": "a parquet file", "json": "a JSON file",
             "text": "plain text", "csv": "a CSV file", "image": "an image"}  # fmt: skip
    return UserError(f"{public_url(url) if url else file} is {names.get(kind, kind)}; {known}")


def is_ignored(name: str) -> bool:
    """Return whether a file was written by a file manager or by macOS's tar, beside the real one.

    macOS stores the attributes of NAME in "._NAME".
    """
    *folders, base = name.split("/")
    return base.startswith("._") or base in IGNORED or "__MACOSX" in folders


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
        raise BadSample(IN_UTF_16)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(NOT_UTF_8) from error


def file_fault(error: Exception) -> BadSample:
    """Return the reason why a file, or the rest of it, cannot be read."""
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
                    raise BadSample(IN_UTF_16)
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
