"""Folders of prepared corpora, on a disk or in an object store.

A folder in an object store is a copy of an encoded folder. Its files are fetched in blocks when
they are needed, and kept in the cache of remote files. manifest.json has the checksum of each
block.
"""

import hashlib
import math
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from tf_lightning.data.corpus.manifest import MANIFEST, FileBlocks, parse_manifest
from tf_lightning.errors import UserError
from tf_lightning.files import atomic_file, report_full_disk
from tf_lightning.remote.cache import cache_folder, cache_lock, make_room
from tf_lightning.remote.downloads import read_range, read_small
from tf_lightning.remote.urls import is_remote, public_url

ATTEMPTS = 3  # times that a block is fetched while its checksum is wrong
CONNECTIONS = 16  # blocks that a process fetches at the same time
GROUP = 1000  # blocks in a folder of the cache
NOTED = 60.0  # seconds after which another use of a block is noted


def open_folder(path: str | Path) -> "Folder":
    """Open an encoded folder.

    Raises:
        UserError: the URL of a remote folder has a login or a query.
    """
    if not is_remote(path):
        return LocalFolder(Path(path))
    url = str(path).rstrip("/")
    if public_url(url).rstrip("/") != url:
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
        """Advice in the error message for a damaged folder."""
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
        """Advice in the error message for content that is damaged although its checksums fit."""
        return f"delete the copies in {self._copies()} and run the command again"

    def folder(self, name: str) -> "RemoteFolder":
        """Return a folder in this one."""
        return RemoteFolder(self.root, f"{self.name}/{name}".lstrip("/"))

    def folders(self) -> list[str]:
        """List the names of the folders in this one."""
        parts = (name.split("/") for name in read_manifest(self.root)[0])
        return sorted({folder for folder, *names in parts if names})

    def file(self, name: str) -> Path:
        """Return the path of the copy of a file; it is missing if the folder has no such file."""
        file = self._file(name)
        return file.whole() if file else self._copies() / name

    def array(self, name: str, dtype: type, shape: tuple[int, ...]) -> "RemoteArray | np.ndarray":
        """Return a file as an array whose items are fetched when they are read.

        Raises:
            ValueError: the file has another size.
        """
        if 0 in shape:
            return np.empty(shape, dtype)
        file = self._file(name)
        check_size(file.blocks.size if file else 0, dtype, shape)
        return RemoteArray(file, np.dtype(dtype), shape)

    def _copies(self) -> Path:
        """Return the folder of the cache for this folder with this content."""
        return cache_folder() / "corpora" / read_manifest(self.root)[1] / self.name

    def _file(self, name: str) -> "RemoteCopy | None":
        """Return a file that the manifest lists."""
        blocks = read_manifest(self.root)[0].get(f"{self.name}/{name}".lstrip("/"))
        return blocks and RemoteCopy(f"{self}/{name}", self._copies() / name, blocks)


Folder = LocalFolder | RemoteFolder


@dataclass(frozen=True)
class RemoteCopy:
    """A remote file and its copy in the cache: some blocks, or the whole file.

    Attributes:
        url: URL of the file.
        path: path of the whole copy.
        blocks: the blocks with their checksums.

    Raises:
        UserError: (of the methods) a block cannot be read, or is damaged.
    """

    url: str
    path: Path
    blocks: FileBlocks

    def whole(self) -> Path:
        """Return the path of a whole copy, which is made if it is missing."""
        if not self.path.exists():
            with cache_lock(self.path):
                if not self.path.exists():
                    self._copy_whole()
        with suppress(FileNotFoundError):
            os.utime(self.path)  # recently used files stay in the cache
        return self.path

    def read(self, first: int, end: int) -> bytes:
        """Read the bytes `first` to `end` - 1."""
        content = []
        for number in self.blocks.numbers(first, end):
            start, stop = self.blocks.limits(number)
            content.append(self.read_block(number, max(first - start, 0), min(end, stop) - start))
        return b"".join(content)

    def read_block(self, number: int, first: int = 0, end: int = 0) -> bytes:
        """Read the bytes `first` to `end` - 1 of a block, which is fetched if it is missing.

        With `end` = 0, nothing is read and the block is only fetched.
        """
        path = self.block_path(number)
        if (found := read_part(path, first, end)) is not None:
            return found
        with cache_lock(Path(path)):
            if (found := read_part(path, first, end)) is not None:  # fetched by another process
                return found
            content = self._fetch(number)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with make_room(self.url, len(content)), atomic_file(Path(path)) as partial:
                partial.write_bytes(content)
        return content[first:end]

    def block_path(self, number: int) -> str:
        """Return where a block lies in the cache."""
        return f"{self.path}.blocks/{number // GROUP}/{number}"

    def _copy_whole(self) -> None:
        """Copy the file; blocks that an earlier process has fetched are not fetched again."""
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        if not partial.exists():
            with make_room(self.url, self.blocks.size), partial.open("wb") as file:
                file.truncate(self.blocks.size)  # it counts with its full size from now on
        with (
            report_full_disk(partial.parent),
            partial.open("r+b") as file,
            ThreadPoolExecutor(CONNECTIONS) as pool,
        ):
            contents = iter(lambda: file.read(self.blocks.size_of_block), b"")
            wrong = [n for n, content in enumerate(contents) if not self.blocks.fits(n, content)]
            for number, content in zip(wrong, pool.map(self._fetch, wrong), strict=True):
                file.seek(self.blocks.limits(number)[0])
                file.write(content)
        os.replace(partial, self.path)

    def _fetch(self, number: int) -> bytes:
        """Fetch a block and check it."""
        for _ in range(ATTEMPTS):
            try:
                content = read_range(self.url, self.blocks.size, *self.blocks.limits(number))
            except FileNotFoundError:
                raise UserError(
                    f"{self.url} is missing, but {MANIFEST} lists it; upload the whole folder again"
                ) from None
            if self.blocks.fits(number, content):
                return content
        raise UserError(
            f"block {number:,} of {self.url} does not have the checksum that {MANIFEST} lists; "
            "upload the whole folder again"
        )


class RemoteArray:
    """An array in a remote file. An item, or a slice of items, is read into memory.

    Args:
        file: the file.
        dtype: type of the numbers.
        shape: shape of the array.
    """

    def __init__(self, file: RemoteCopy, dtype: np.dtype, shape: tuple[int, ...]):
        self.file, self.dtype, self.shape = file, dtype, shape
        self.item_bytes = math.prod(shape[1:]) * dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: int | slice) -> np.ndarray:
        first, end = (where.start, where.stop) if isinstance(where, slice) else (where, where + 1)
        content = self.file.read(first * self.item_bytes, end * self.item_bytes)
        array = np.frombuffer(content, self.dtype).reshape(-1, *self.shape[1:])
        return array if isinstance(where, slice) else array[0]

    def blocks(self, first: int, end: int) -> list[tuple[RemoteCopy, int]]:
        """List the blocks of items `first` to `end` - 1, for `fetch`."""
        numbers = self.file.blocks.numbers(first * self.item_bytes, end * self.item_bytes)
        return [(self.file, number) for number in numbers]


def fetch(blocks: Iterable[tuple[RemoteCopy, int]]) -> None:
    """Fetch the blocks that the cache does not have, in parallel."""
    unique = {file.block_path(number): (file, number) for file, number in blocks}
    missing = [block for path, block in unique.items() if not os.path.exists(path)]
    if len(missing) > 1:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(lambda block: block[0].read_block(block[1]), missing))


@cache
def read_manifest(root: str) -> tuple[dict[str, FileBlocks], str]:
    """Read the manifest of a remote folder; return the files by name, and a hash of all of them.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        content = read_small(f"{root}/{MANIFEST}")
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


def read_part(path: str, first: int, end: int) -> bytes | None:
    """Read a part of a file, and note that it was used; None if it is missing or shorter."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(first)
            content = file.read(end - first)
            last_use = os.fstat(file.fileno()).st_mtime
        if time.time() - last_use > NOTED:
            os.utime(path)
    except FileNotFoundError:  # also if it was removed to make room
        return None
    return content if len(content) == end - first else None
