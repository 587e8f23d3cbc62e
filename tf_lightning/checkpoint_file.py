"""Checkpoint files that are whole, on the disk, and unchanged: written at once, with a checksum.

A checkpoint is a zip archive of torch.save. The checksum is the archive's comment, so that other
programs read the file as before: the last 16 bytes are the comment's length (2 bytes) and
"crc32:" with eight hexadecimal digits. It covers all bytes of the file as torch wrote it. A CRC-32
finds every change of a few bits and all but one in 4 billion others.
"""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tf_lightning.files import atomic_file

LABEL = b"crc32:"
COMMENT_SIZE = len(LABEL) + 8
NO_COMMENT = b"\0\0"  # the comment's length, the last bytes that torch writes
TRAILER_SIZE = len(NO_COMMENT) + COMMENT_SIZE
END_OF_ARCHIVE, END_SIZE = b"PK\5\6", 22  # the record at the end of an archive without comment
CHUNK = 1 << 20  # bytes


class DamagedFile(Exception):
    """The content of a checkpoint is not what was written."""


def trailer(checksum: int) -> bytes:
    """Return the archive's comment with its length."""
    return COMMENT_SIZE.to_bytes(2, "little") + LABEL + b"%08x" % checksum


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint with its checksum; the file appears whole, when it is on the disk.

    It is written beside its final name. What killed writes left there is removed.

    Raises:
        UserError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".*.ckpt.*.partial"):
        left.unlink(missing_ok=True)
    with atomic_file(path) as partial:
        torch.save(checkpoint, partial)
        with partial.open("r+b") as file:
            size = partial.stat().st_size - len(NO_COMMENT)
            checksum = checksum_of(file, size)
            file.seek(size)
            file.write(trailer(checksum))
            file.flush()
            os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk."""
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path, mmap: bool = False) -> Any:
    """Load a checkpoint to the CPU, without running code that it contains, and check its checksum.

    Args:
        path: the file; one without a checksum, of an older version, is loaded as it is.
        mmap: leave tensors in the file until they are used; saves memory if few are needed.

    Raises:
        DamagedFile: the content is not what was written.
    """
    with ThreadPoolExecutor(1) as pool:  # reads the file at the same time as torch
        checked = pool.submit(check, path)
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception:
            checked.result()  # rather says that the file is damaged
            raise
        checked.result()
    return checkpoint


def check(path: Path) -> None:
    """Raise DamagedFile unless the content of a file has its checksum, or it has none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        is_archive = file.read(2) == END_OF_ARCHIVE[:2]
        file.seek(max(size - TRAILER_SIZE, 0))
        found = file.read()
        if found[len(NO_COMMENT) :].startswith(LABEL):
            if found != trailer(checksum_of(file, size - TRAILER_SIZE)):
                raise DamagedFile(f"{path} does not have its checksum")
        elif is_archive:
            file.seek(max(size - END_SIZE, 0))
            end = file.read()
            if not (end.startswith(END_OF_ARCHIVE) and end.endswith(NO_COMMENT)):
                raise DamagedFile(f"{path} has no end")


def checksum_of(file: BinaryIO, size: int) -> int:
    """Compute the checksum of the first bytes of a file, as torch wrote it."""
    file.seek(0)
    buffer, checksum = memoryview(bytearray(CHUNK)), 0
    while size:
        count = file.readinto(buffer[: min(CHUNK, size)])
        checksum, size = zlib.crc32(buffer[:count], checksum), size - count
    return zlib.crc32(NO_COMMENT, checksum)
