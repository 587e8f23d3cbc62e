"""Checkpoint files that are whole, on the disk, and unchanged: written at once, with a checksum.

A checkpoint is a zip archive of torch.save. The checksum is the archive's comment, so that other
programs read the file as before: the last 16 bytes are the comment's length (2 bytes) and
"crc32:" with eight hexadecimal digits. It covers all bytes of the file as torch wrote it. A CRC-32
finds every change of a few bits and all but one in 4 billion others.

The checksum takes about as long as writing or reading a file that is in memory, so another thread
computes it at the same time. torch holds Python's lock while it reads or writes a tensor; hence
that thread calls `zlib.crc32`, which needs no lock, with much data at a time.
"""

import ctypes
import errno
import mmap
import os
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils._pytree import tree_leaves

from tf_lightning.files import atomic_file, remove

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed anyway
    fcntl = None

LABEL = b"crc32:"
COMMENT_SIZE = len(LABEL) + 8
NO_COMMENT = b"\0\0"  # the comment's length, the last bytes that torch writes
TRAILER_SIZE = len(NO_COMMENT) + COMMENT_SIZE
ARCHIVE = b"PK\3\4"  # the first bytes of an archive
END_OF_ARCHIVE, END_SIZE = b"PK\5\6", 22  # the record at the end of an archive without comment
BLOCK = 64 << 20  # bytes whose checksum one call computes
SMALL = 1 << 20  # bytes that are not worth another thread
SEND_SIZE = 16 << 20  # bytes after which a file is sent to the disk while more is written
KEEP_SIZE = 1  # mode of Linux's fallocate that leaves the size of the file as it is
SETTLED = 2 * 10**9  # nanoseconds; file systems may give two changes within these the same time
POLYNOMIAL = 0xEDB88320  # of CRC-32, its lowest power in the highest bit

unchanged: set[tuple] = set()  # see `remember`


class DamagedFile(Exception):
    """The content of a checkpoint differs from what was written."""


# ---------------------------------------------------------------- writing


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint with its checksum; the file appears whole, when it is on the disk.

    It is written beside its final name. Partial files of killed processes are removed there.

    Raises:
        UserError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    with atomic_file(path) as partial, partial.open("wb", buffering=0) as file:
        lock_if_possible(file)
        reserve(file, num_bytes(checkpoint))
        with ThreadPoolExecutor(1) as thread:
            writer = ChecksumWriter(file, thread)
            torch.save(checkpoint, writer)
        file.seek(-len(NO_COMMENT), os.SEEK_END)
        write_all(file, memoryview(trailer(writer.checksum)))
        os.fsync(file.fileno())
    sync_folder(path.parent)


class ChecksumWriter:
    """A file that computes a checksum while it is written, and sends its content to the disk.

    Args:
        file: an unbuffered file.
        thread: computes checksums.
    """

    def __init__(self, file: BinaryIO, thread: ThreadPoolExecutor):
        self.file, self.thread = file, thread
        self.checksum = 0
        self.num_written = self.num_sent = 0

    def write(self, data: memoryview | bytes) -> int:
        """Write all of `data`, which torch may change afterwards."""
        data = memoryview(data)
        if len(data) < SMALL:  # another thread would begin too late
            self.checksum = zlib.crc32(data, self.checksum)
            write_all(self.file, data)
        else:
            checksum = self.thread.submit(zlib.crc32, data, self.checksum)
            try:
                write_all(self.file, data)
            finally:
                self.checksum = checksum.result()
        self.num_written += len(data)
        if self.num_written - self.num_sent >= SEND_SIZE:
            self.send()
        return len(data)

    def send(self) -> None:
        """Begin to move what was written from memory to the disk, without waiting (Linux)."""
        if hasattr(os, "posix_fadvise"):
            size = self.num_written - self.num_sent
            os.posix_fadvise(self.file.fileno(), self.num_sent, size, os.POSIX_FADV_DONTNEED)
        self.num_sent = self.num_written

    def flush(self) -> None:
        """Do nothing, as the file has no buffer."""


def num_bytes(checkpoint: object) -> int:
    """Return the size of the memory of all tensors, shared memory once."""
    tensors = [leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, torch.Tensor)]
    storages = [t.untyped_storage() for t in tensors if t.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def reserve(file: BinaryIO, size: int) -> None:
    """Reserve space on the disk, which is faster than finding it for each block.

    File systems that cannot do it are left alone; `os.posix_fallocate` would write every block.

    Raises:
        OSError: the disk has less space.
    """
    if shutil.disk_usage(file.fileno()).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if sys.platform == "linux" and size:
        start, end = ctypes.c_int64(0), ctypes.c_int64(size)
        ctypes.CDLL(None).fallocate(file.fileno(), KEEP_SIZE, start, end)


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Write all bytes; one call writes at most 2 GB, and less if the disk becomes full."""
    while data:
        data = data[file.write(data) :]


def trailer(checksum: int) -> bytes:
    """Return the archive's comment with its length."""
    return COMMENT_SIZE.to_bytes(2, "little") + LABEL + b"%08x" % checksum


def remove_leftovers(folder: Path) -> None:
    """Remove the partial checkpoints of killed processes, but not those that are being written.

    `partial_path` removes those of its own machine only; a lock tells it of other machines too.
    """
    for left in folder.glob(".*.ckpt.*.partial"):
        with suppress(OSError):
            if not left.is_symlink():
                with opened(left) as descriptor:
                    lock(descriptor)
            remove(left)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file or a folder for reading; yield its descriptor."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def lock(file: BinaryIO | int) -> None:
    """Lock a file, or the descriptor of a file or folder, until it is closed.

    Raises:
        OSError: another process has locked it, or the file system has no locks.
    """
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock_if_possible(file: BinaryIO | int) -> None:
    """Lock a file or folder that this process has made, if the file system has locks."""
    with suppress(OSError):
        lock(file)


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk."""
    if os.name != "nt":  # Windows cannot open folders
        with opened(folder) as descriptor:
            os.fsync(descriptor)


# ---------------------------------------------------------------- reading


def load_checkpoint(path: Path, mmap: bool = False) -> Any:
    """Load a checkpoint to the CPU, without running code that it contains, and check its checksum.

    Args:
        path: the file; one without a checksum, of an older version, is loaded as it is.
        mmap: leave tensors in the file until they are used; saves memory if few are needed.

    Raises:
        DamagedFile: the content is not what was written.
    """
    path = path.resolve()  # a link may get another target meanwhile
    with verified(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def check(path: Path) -> None:
    """Raise DamagedFile unless the content of a file has its checksum, or it has none."""
    with verified(path):
        pass


@contextmanager
def verified(path: Path) -> Iterator[None]:
    """Verify a file's checksum during the block, unless this process did so since it was written.

    Raises:
        DamagedFile: the content is not what was written; an error of the block is its cause.
    """
    with path.open("rb") as file:
        before = identity(file)
        if before in unchanged:
            yield
            return
        check_members(file, path)
        found = stored_trailer(file, path)
        if not found:
            yield
            return
        with FileChecksum(file, os.fstat(file.fileno()).st_size - TRAILER_SIZE) as checksum:
            error = None
            try:
                yield
            except Exception as raised:
                error = raised
            if found != trailer(zlib.crc32(NO_COMMENT, checksum.result())):
                raise DamagedFile(f"{path} does not have its checksum") from error
            if error:
                raise error
        remember(file, before)


def verify(path: Path, size: int, checksum: int) -> None:
    """Raise DamagedFile unless a file has a size and a CRC-32 that were recorded elsewhere.

    A file that this process has verified is not read again, unless it was written since.
    """
    with path.open("rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise DamagedFile(f"{path.name} has {found:,} bytes instead of {size:,}")
        before = (*identity(file), checksum)
        if before in unchanged:
            return
        found = file_checksum(path) if size else 0
        if found != checksum:
            raise DamagedFile(f"{path.name} does not have its checksum")
        remember(file, before)


def remember(file: BinaryIO, verified: tuple[int, ...]) -> None:
    """Remember that a file was verified, if a later version would differ in its times.

    Args:
        file: the file.
        verified: identity of the file before it was read, and the recorded checksum if there is
            one.
    """
    is_settled = time.time_ns() - os.fstat(file.fileno()).st_ctime_ns > SETTLED
    now = identity(file)
    if is_settled and now == verified[: len(now)]:
        unchanged.add(verified)


def identity(file: BinaryIO) -> tuple[int, ...]:
    """Return numbers that change when the content of a file does."""
    s = os.fstat(file.fileno())
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def stored_trailer(file: BinaryIO, path: Path) -> bytes:
    """Return the comment of a file with its length; nothing for a file of an older version.

    Raises:
        DamagedFile: an archive has no end.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - TRAILER_SIZE, 0))
    found = file.read(TRAILER_SIZE)
    if found[len(NO_COMMENT) :].startswith(LABEL):
        return found
    file.seek(0)
    is_archive = file.read(2) == ARCHIVE[:2]  # also if almost all of it is cut off
    file.seek(max(size - END_SIZE, 0))
    end = file.read(END_SIZE)
    if is_archive and not (end.startswith(END_OF_ARCHIVE) and end.endswith(NO_COMMENT)):
        raise DamagedFile(f"{path} has no end")
    return b""


def check_members(file: BinaryIO, path: Path) -> None:
    """Refuse an archive that torch.save did not write; torch.load would unpack it without a limit.

    Raises:
        DamagedFile: a member is compressed or is there twice, or the members share bytes.
    """
    file.seek(0)
    if file.read(len(ARCHIVE)) != ARCHIVE:  # the format before torch 1.6, or no checkpoint
        return
    try:
        members = zipfile.ZipFile(file).infolist()
    except Exception as error:  # zipfile raises many types for damaged archives
        raise DamagedFile(f"{path} is a damaged archive ({error})") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise DamagedFile(f"{path} is compressed, which torch.save never does")
    if len({member.filename for member in members}) < len(members):
        raise DamagedFile(f"{path} has two members of one name")
    if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
        raise DamagedFile(f"{path} has members larger than the file")


def file_checksum(path: Path) -> int:
    """Return the CRC-32 of a file that is not empty."""
    with path.open("rb") as file:
        with FileChecksum(file, os.fstat(file.fileno()).st_size) as checksum:
            return checksum.result()


class FileChecksum:
    """The checksum of the first bytes of a file, which two threads compute together.

    One thread begins at once; the caller's joins it in `result`.

    Args:
        file: the file, not empty.
        size: number of bytes.
    """

    def __init__(self, file: BinaryIO, size: int):
        self.size = max(size, 0)
        # A mapped file is read without a copy, and so without Python's lock between two blocks.
        self.content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.starts = iter(range(0, self.size, BLOCK))
        self.checksums: dict[int, int] = {}
        self.pool = ThreadPoolExecutor(1)

    def __enter__(self) -> "FileChecksum":
        self.other = self.pool.submit(self.compute)
        return self

    def __exit__(self, *error: object) -> None:
        for _ in self.starts:  # leave none to the other thread
            pass
        self.pool.shutdown()
        self.content.release()

    def compute(self) -> None:
        """Compute the checksums of blocks that no other thread has taken."""
        for start in self.starts:
            end = min(start + BLOCK, self.size)
            self.checksums[start] = zlib.crc32(self.content[start:end])

    def result(self) -> int:
        """Compute the remaining blocks and return the checksum of all."""
        self.compute()
        self.other.result()
        starts = sorted(self.checksums)
        return reduce(
            lambda crc, start: combine(crc, self.checksums[start], min(BLOCK, self.size - start)),
            starts,
            0,
        )


def combine(first: int, second: int, size: int) -> int:
    """Return the CRC-32 of two blocks, one after the other, from that of each.

    Appending `size` bytes multiplies the CRC of the first block by x^(8 size), modulo the CRC's
    polynomial; see crc32_combine of zlib.

    Args:
        first: CRC-32 of the first block.
        second: CRC-32 of the second block.
        size: size of the second block in bytes.
    """
    power, square = 1 << 31, 1 << 23  # x^0 and x^8
    while size:
        power = multiply(power, square) if size & 1 else power
        square, size = multiply(square, square), size >> 1
    return multiply(first, power) ^ second


def multiply(a: int, b: int) -> int:
    """Multiply polynomials with bits as coefficients, modulo POLYNOMIAL."""
    product = 0
    for bit in range(31, -1, -1):
        product ^= b if a >> bit & 1 else 0
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product
