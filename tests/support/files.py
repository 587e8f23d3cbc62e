"""Encoded images and the files that hold them: tar, Parquet, JSON lines."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
from PIL import Image


def encoded_image(color="red", file_format: str = "PNG", size=(20, 16), mode: str = "RGB") -> bytes:
    """File content of an image of one color (name or RGB values); size is (width, height)."""
    file = io.BytesIO()
    Image.new("RGB", size, color).convert(mode).save(file, file_format)
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """Write a tar with these members, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    """Write rows as Parquet, in small row groups and with checksums that show damage."""
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, path, row_group_size=3, write_page_checksum=True)
    return path


def write_lines(path: Path, records: list) -> Path:
    """Write records as JSON lines, compressed if the suffix is .gz or .zst."""
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = pyarrow.compress(content, "zstd", asbytes=True)
    path.write_bytes(content)
    return path
