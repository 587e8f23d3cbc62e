"""Folders of prepared corpora, on a disk or in an object store.

A folder in an object store is a copy of an encoded folder. Its files are fetched in blocks when
they are needed, and kept in the cache of remote files. manifest.json has the checksum of each
block.
"""

import hashlib
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from tf_lightning.data.corpus.manifest import MANIFEST, FileBlocks, parse_manifest
from tf_lightning.errors import UserError
from tf_lightning.files import atomic_file
from tf_lightning.remote import (
    cache_folder,
    is_remote,
    lock,
    make_room,
    public_url,
    read_file,
    read_range,
)

ATTEMPTS = 3  # times that a block is fetched while its checksum is wrong
CONNECTIONS = 16  # blocks that a process fetches at the same time
GROUP = 1000  # blocks in a folder of the cache


def open_folder(path: str | Path) -> "Folder":
    """Open an encoded folder.

    Raises:
        UserError: the URL of a remote folder has a login or a query.
    """
    if not is_remote(path):
        return LocalFolder(Path(path))
    url = str(path).rstrip("/")
    if public_url(url) != url:
        raise UserError(
            f"{public_url(url)} is given with a login or a query, which would be stored with the "
            "run; leave it out, and log in as the object store expects it"
        )
    return RemoteFolder(url)


def open_corpus_folder(path: str | Path) -> "Folder":
    """Open the folder of a corpus; a remote one lies in a copy of an encoded folder."""
    root, _, name = str(path).rstrip("/").rpartition("/")
    return open_folder(root).folder(name) if is_remote(path) else LocalFolder(Path(path))


@dataclass(frozen=True)
class LocalFolder:
    """A folder on a disk."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def remedy(self) -> str:
        """What to do if the folder is damaged."""
        return "delete the folder and run the command again"

    def folder(self, name: str) -> "LocalFolder":
        """Return a folder in this one."""
        return LocalFolder(self.path / name)

    def folders(self) -> list[str]:
        """List the names of the folders in this one; none if it is missing."""
        return sorted(path.name for path in self.path.glob("*/"))

    def file(self, name: str) -> Path:
        """Return the path of a file, which may be missing."""
        return self.path / name

    def array(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        """Map a file as an array; an empty file cannot be mapped and gives an empty array.

        Raises:
            ValueError: the file has another size.
        """
        if 0 in shape:
            return np.empty(shape, dtype)
        check_size(self.file(name).stat().st_size, dtype, shape)
        mapped = np.memmap(self.file(name), dtype, "r", shape=shape)
        return np.asarray(mapped)  # plain arrays slice faster


@dataclass(frozen=True)
class RemoteFolder:
    """An encoded folder in an object store, or a folder in it.

    Attributes:
        root: URL of the encoded folder, which has manifest.json.
        name: name of a folder in it; empty: the encoded folder itself.

    Raises:
        UserError: (of the methods) a file cannot be read, or is damaged.
    """

    root: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.root}/{self.name}".rstrip("/")

    @property
    def remedy(self) -> str:
        """What to do if the content is damaged although the checksums of its blocks are right."""
        return f"delete the copies in {self._find('')[1]} and run the command again"

    def folder(self, name: str) -> "RemoteFolder":
        """Return a folder in this one."""
        return RemoteFolder(self.root, name)

    def folders(self) -> list[str]:
        """List the names of the folders in this one."""
        parts = (name.split("/") for name in read_manifest(self.root)[0])
        return sorted({folder for folder, *names in parts if names})

    def file(self, name: str) -> Path:
        """Return the path of the copy of a file; it is missing if the folder has no such file."""
        known, copy = self._find(name)
        if known and not copy.exists():
            with lock(copy):
                if not copy.exists():
                    self._copy_whole(name, known, copy)
        with suppress(OSError):
            os.utime(copy)  # what was used last stays in the cache
        return copy

    def array(self, name: str, dtype: type, shape: tuple[int, ...]) -> "RemoteArray | np.ndarray":
        """Return a file as an array whose items are fetched when they are read.

        Raises:
            ValueError: the file has another size.
        """
        if 0 in shape:
            return np.empty(shape, dtype)
        known, _ = self._find(name)
        check_size(known.size if known else 0, dtype, shape)
        return RemoteArray(self, name, np.dtype(dtype), shape[1:], shape[0])

    def read(self, name: str, first: int, end: int) -> bytes:
        """Read the bytes `first` to `end` - 1 of a file."""
        known, copy = self._find(name)
        content = []
        for number in range(first // known.block, -(-end // known.block)):
            start, stop = known.limits(number)
            part = slice(max(first, start) - start, min(end, stop) - start)
            content.append(self._read_block(name, number, part))
        return b"".join(content)

    def fetch(self, name: str, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch what is missing of these ranges of bytes into the cache, in parallel."""
        known, copy = self._find(name)
        numbers = {
            number
            for first, end in ranges
            for number in range(first // known.block, -(-end // known.block))
        }
        missing = sorted(n for n in numbers if not block_path(copy, n).exists())
        if len(missing) > 1:
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                list(pool.map(lambda number: self._read_block(name, number, slice(0, 0)), missing))

    def _find(self, name: str) -> tuple[FileBlocks | None, Path]:
        """Return what the manifest has on a file, if it lists it, and the path of its copy."""
        files, digest = read_manifest(self.root)
        name = f"{self.name}/{name}" if self.name else name
        return files.get(name), cache_folder() / "corpora" / digest / name

    def _read_block(self, name: str, number: int, part: slice) -> bytes:
        """Read a part of a block from the cache; a block that is missing is fetched."""
        known, copy = self._find(name)
        path = block_path(copy, number)
        if (found := read_part(path, part)) is not None:
            return found
        with lock(path):
            if (found := read_part(path, part)) is not None:  # fetched by another process
                return found
            content = self._fetch_block(name, known, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            with make_room(str(self), len(content)), atomic_file(path) as partial:
                partial.write_bytes(content)
        return content[part]

    def _copy_whole(self, name: str, known: FileBlocks, copy: Path) -> None:
        """Copy a file; blocks that an earlier process has fetched are not fetched again."""
        partial = copy.with_name(f"{copy.name}.partial")
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not partial.exists():
            with make_room(str(self), known.size), partial.open("wb") as file:
                file.truncate(known.size)
        with partial.open("r+b") as file, ThreadPoolExecutor(CONNECTIONS) as pool:
            missing = []
            for number in range(len(known.checks)):
                content = file.read(known.block)
                if not known.is_block(number, content):
                    missing.append(number)
            fetched = pool.map(lambda number: self._fetch_block(name, known, number), missing)
            for number, content in zip(missing, fetched, strict=True):
                file.seek(known.limits(number)[0])
                file.write(content)
        os.replace(partial, copy)

    def _fetch_block(self, name: str, known: FileBlocks, number: int) -> bytes:
        """Fetch a block and check it."""
        url = f"{self}/{name}"
        for _ in range(ATTEMPTS):
            try:
                content = read_range(url, known.size, *known.limits(number))
            except FileNotFoundError:
                raise UserError(
                    f"{url} is missing, but {MANIFEST} lists it; upload the whole folder again"
                ) from None
            if known.is_block(number, content):
                return content
        raise UserError(
            f"block {number:,} of {url} does not have the checksum that {MANIFEST} lists; upload "
            "the whole folder again"
        )


Folder = LocalFolder | RemoteFolder


@dataclass(frozen=True)
class RemoteArray:
    """An array in a remote file. An item, or a slice of items, is read into memory.

    Attributes:
        folder: the folder of the file.
        name: name of the file.
        dtype: type of the numbers.
        item_shape: shape of an item.
        length: number of items.
    """

    folder: RemoteFolder
    name: str
    dtype: np.dtype
    item_shape: tuple[int, ...]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, where: int | slice) -> np.ndarray:
        first, end = (where.start, where.stop) if isinstance(where, slice) else (where, where + 1)
        content = self.folder.read(self.name, *self.limits(first, end))
        array = np.frombuffer(content, self.dtype).reshape(-1, *self.item_shape)
        return array if isinstance(where, slice) else array[0]

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch the items `first` to `end` - 1 of each range into the cache, in parallel."""
        self.folder.fetch(self.name, [self.limits(*limits) for limits in ranges])

    def limits(self, first: int, end: int) -> tuple[int, int]:
        """Return the range of bytes of items `first` to `end` - 1."""
        size = math.prod(self.item_shape) * self.dtype.itemsize
        return first * size, end * size


@cache
def read_manifest(root: str) -> tuple[dict[str, FileBlocks], str]:
    """Read the manifest of a remote folder; return the files by name, and a hash of all of them.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        content = read_file(f"{root}/{MANIFEST}")
    except FileNotFoundError:
        raise UserError(
            f"there is no {MANIFEST} in {root}; upload a folder that `tf-lightning prepare "
            "--data.encoded DIR` has written to its end"
        ) from None
    try:
        return parse_manifest(content), hashlib.sha256(content).hexdigest()[:16]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{root}/{MANIFEST} is damaged; upload the folder again") from error


def check_size(size: int, dtype: type, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless an array of this shape has this number of bytes."""
    if size != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError("the size of a file differs from corpus.json")


def block_path(copy: Path, number: int) -> Path:
    """Return where a block of a file lies in the cache."""
    return copy.with_name(f"{copy.name}.blocks") / str(number // GROUP) / str(number)


def read_part(path: Path, part: slice) -> bytes | None:
    """Read a part of a file, and note that it was used; None if it is missing or shorter."""
    try:
        with path.open("rb") as file:
            file.seek(part.start)
            content = file.read(part.stop - part.start)
        os.utime(path)
    except FileNotFoundError:  # also if it was removed to make room
        return None
    return content if len(content) == part.stop - part.start else None
