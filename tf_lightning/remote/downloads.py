"""Copies of remote files in the cache.

A copy is used as long as the file at the URL has the same size and version (ETag). A download that
was interrupted is resumed.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedIOBase
from itertools import islice
from pathlib import Path

import fsspec

from tf_lightning.errors import UserError
from tf_lightning.files import report_full_disk
from tf_lightning.remote.cache import cache_folder, cache_lock, cached_path, make_room, open_shared
from tf_lightning.remote.listing import THREADS, RemoteFile, stat
from tf_lightning.remote.requests import filesystem, request
from tf_lightning.remote.urls import HTTP, split_url

CHUNK = 2**24  # bytes of one request


@contextmanager
def local_copy(file: RemoteFile) -> Iterator[Path]:
    """Yield the path of a copy of a file, which stays in the cache while the block runs.

    A download that was interrupted, also by the end of its process, is resumed.

    Raises:
        FileNotFoundError: the file no longer exists.
        UserError: it was replaced after it was found, cannot be read, or does not fit into the
            cache.
    """
    path, folder = cached_path(file.url), cache_folder()
    version = folder / "versions" / path.relative_to(folder / "files")
    while True:
        with cache_lock(path):
            if not _has_copy(path, version, file):
                _download(file, path, version)
        try:
            stream = open_shared(path, "rb")
        except FileNotFoundError:  # another process has just removed it
            continue
        with stream:
            if _is_at(path, stream):
                os.utime(path)
                yield path
                if not _is_at(path, stream):
                    raise _replaced(file)
                return


def fetch_ahead(files: Sequence[Path | RemoteFile]) -> Iterator[Path | RemoteFile]:
    """Yield files in order, while the small ones among the next files are copied into the cache.

    Raises:
        UserError: a file cannot be read, or was replaced after it was found.
    """
    if all(isinstance(file, Path) for file in files):
        yield from files
        return
    rest, waiting, pool = iter(files), deque(), ThreadPoolExecutor(THREADS)
    try:
        while True:
            for file in islice(rest, 2 * THREADS - len(waiting)):
                waiting.append((file, pool.submit(_copy_small, file)))
            if not waiting:
                return
            file, copied = waiting.popleft()
            copied.result()
            yield file
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _copy_small(file: Path | RemoteFile) -> None:
    if isinstance(file, RemoteFile) and file.size is not None and file.size <= CHUNK:
        with suppress(FileNotFoundError), local_copy(file):
            pass


def _is_at(path: Path, stream: BufferedIOBase) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _has_copy(path: Path, version: Path, file: RemoteFile) -> bool:
    """Return whether the cache has this version of a file."""
    try:
        return path.is_file() and version.read_text() == _identity(file)
    except (OSError, UnicodeDecodeError):
        return False


def _identity(file: RemoteFile) -> str:
    return f"{file} {file.size} {file.version}"


def _replaced(file: RemoteFile) -> UserError:
    return UserError(f"{file} was replaced while it was in use; run the command again")


def _download(file: RemoteFile, path: Path, version: Path) -> None:
    """Copy a file into the cache."""
    digest = hashlib.sha256(_identity(file).encode()).hexdigest()
    partial = cache_folder() / "partial" / digest[:32]
    for folder in (path.parent, version.parent, partial.parent):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UserError(
                f"{file} has a folder of the same name as another file of {cache_folder()}; "
                "delete that folder, or name another one with TF_LIGHTNING_CACHE"
            ) from error
    with make_room(str(file), file.size or 0):
        pass
    with report_full_disk(partial.parent):
        try:
            _fetch(file, partial)
        except FileNotFoundError:
            partial.unlink(missing_ok=True)
            raise
        if stat([file.url]) != [file]:
            partial.unlink(missing_ok=True)
            raise _replaced(file)
        if file.size is None:
            with make_room(str(file), partial.stat().st_size):
                pass
        # A process that is killed between these lines leaves a copy that is not used.
        version.unlink(missing_ok=True)
        os.replace(partial, path)
        version.write_text(_identity(file))


def _fetch(file: RemoteFile, partial: Path) -> None:
    """Read a file from where its partial copy ends, in requests of CHUNK bytes."""
    fs = filesystem(file.url)
    with open_shared(partial, "ab") as stream:
        while file.size is None or (start := stream.tell()) < file.size:
            content = None
            if file.size is not None:
                end = min(start + CHUNK, file.size)
                content = request(file.url, _read_range, file, fs, start, end)
            if content is None:  # the server only sends whole files
                return request(file.url, _fetch_whole, file, fs, partial)
            stream.write(content)
            stream.flush()


def read_range(url: str, size: int, start: int, end: int) -> bytes:
    """Read the bytes `start` to `end` - 1 of a file of known size.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or its server only sends whole files.
    """
    file = RemoteFile(url, size, "")
    content = request(url, _read_range, file, filesystem(url), start, end)
    if content is None:
        raise UserError(
            f"the server of {file} only sends whole files; use one that sends ranges of bytes"
        )
    return content


def read_small(url: str) -> bytes:
    """Read a small file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read.
    """
    fs = filesystem(url)
    return request(url, fs.cat_file, fs._strip_protocol(url))


def _read_range(
    file: RemoteFile, fs: fsspec.AbstractFileSystem, start: int, end: int
) -> bytes | None:
    """Read the bytes from start to end; None if the server only sends whole files."""
    name = fs._strip_protocol(file.url)
    if split_url(file.url)[0] not in HTTP:
        content = fs.cat_file(name, start=start, end=end)
    else:  # cat_file would read all of a file from a server that only sends whole files
        with fs.open(name, block_size=CHUNK, cache_type="none", size=file.size) as stream:
            stream.seek(start)
            try:
                content = stream.read(end - start)
            except ValueError:
                return None
    if len(content) != end - start:
        _check_same(file)
    return content


def _fetch_whole(file: RemoteFile, fs: fsspec.AbstractFileSystem, partial: Path) -> None:
    """Read a file with one request."""
    fs.get_file(fs._strip_protocol(file.url), str(partial))
    if file.size not in (None, partial.stat().st_size):
        _check_same(file)


def _check_same(file: RemoteFile) -> None:
    """Raise the error for a file whose size differs from the expected one.

    Raises:
        UserError: it was replaced.
        OSError: it was not, so the connection was closed early.
    """
    if stat([file.url]) != [file]:
        raise _replaced(file)
    raise OSError("connection closed early")
