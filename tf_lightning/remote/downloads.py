"""Copies of remote files in the cache.

A copy is used as long as the file at the URL has the same size and version (ETag). A download that
was interrupted is resumed.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import BinaryIO, TypeVar

import fsspec

from tf_lightning.errors import UserError
from tf_lightning.files import report_full_disk
from tf_lightning.remote.cache import (
    cache_folder,
    cache_limit,
    cache_lock,
    cached_path,
    make_room,
    open_shared,
)
from tf_lightning.remote.http import get
from tf_lightning.remote.listing import THREADS, RemoteFile, stat, version_of
from tf_lightning.remote.requests import filesystem, request
from tf_lightning.remote.urls import HTTP, public_url, split_url

CHUNK = 2**24  # bytes of one request
MAX_SMALL = 2**30  # bytes of a file that is read into memory

Item = TypeVar("Item")


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


def fetch_ahead(files: Iterable[Path | RemoteFile]) -> Iterator[Path | RemoteFile]:
    """Yield files in order, while the small ones among the next files are copied into the cache.

    Raises:
        UserError: a file cannot be read, or was replaced after it was found.
    """
    return run_ahead(
        files, lambda file: [partial(copy_small, file)] if isinstance(file, RemoteFile) else []
    )


def copy_small(file: RemoteFile) -> None:
    """Copy a file into the cache if it is small and exists.

    Raises:
        UserError: it cannot be read, or was replaced after it was found.
    """
    if file.size is not None and file.size <= CHUNK:
        with suppress(FileNotFoundError), local_copy(file):
            pass


def run_ahead(
    items: Iterable[Item], tasks_of: Callable[[Item], Sequence[Callable[[], object]]]
) -> Iterator[Item]:
    """Yield items in order, each when its tasks are done; those of the next items run in threads.

    Args:
        items: the items; at most 2 * THREADS of them are held.
        tasks_of: returns the tasks of an item.
    """
    waiting: deque[tuple[Item, list[Future]]] = deque()
    num_tasks, pool = 0, ThreadPoolExecutor(THREADS)
    try:
        for item in items:
            tasks = [pool.submit(task) for task in tasks_of(item)]
            waiting.append((item, tasks))
            num_tasks += len(tasks)
            while waiting and (not num_tasks or max(num_tasks, len(waiting)) >= 2 * THREADS):
                item, tasks = waiting.popleft()
                num_tasks -= len(tasks)
                yield _done(item, tasks)
        while waiting:
            yield _done(*waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _done(item: Item, tasks: list[Future]) -> Item:
    """Return an item after its tasks have ended, or raise what one of them raised."""
    for task in tasks:
        task.result()
    return item


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
    copied = cache_folder() / "partial" / digest[:32]
    try:
        for folder in (path.parent, version.parent, copied.parent):
            folder.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or version.is_dir():
            raise IsADirectoryError
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(
            f"{file} needs a file where {cache_folder()} has a folder of the same name, or a "
            "folder where it has a file; check the URL, or name another cache with "
            "TF_LIGHTNING_CACHE"
        ) from error
    with make_room(str(file), file.size or 0):
        pass
    with report_full_disk(copied.parent):
        try:
            is_known = _fetch(file, copied)
        except FileNotFoundError:
            copied.unlink(missing_ok=True)
            raise
        if not is_known and not _is_same(file):
            copied.unlink(missing_ok=True)
            raise _replaced(file)
        if file.size is None:
            with make_room(str(file), copied.stat().st_size):
                pass
        # A process that is killed between these lines leaves a copy that is not used.
        version.unlink(missing_ok=True)
        os.replace(copied, path)
        version.write_text(_identity(file))


def _fetch(file: RemoteFile, copied: Path) -> bool:
    """Read a file from where its partial copy ends, in requests of CHUNK bytes.

    Returns:
        Whether each answer said that it is of this version.
    """
    fs, versions = filesystem(file.url), set()
    with open_shared(copied, "ab") as stream:
        begun = stream.tell() > 0
        while file.size is None or stream.tell() < file.size:
            request(file.url, _append, file, fs, stream, versions)
            stream.flush()
            if file.size is None:
                break
    return not begun and versions == {file.version} != {""}


def _append(
    file: RemoteFile, fs: fsspec.AbstractFileSystem, stream: BinaryIO, versions: set[str]
) -> None:
    """Append the next CHUNK bytes of a file to its copy, or write the whole file with one request.

    Args:
        file: the file.
        fs: the file system of its URL.
        stream: its copy.
        versions: receives the version that the answer says, "" if it says none.
    """
    start = stream.seek(0, os.SEEK_END)  # after what a failed attempt has written
    end = None if file.size is None else min(start + CHUNK, file.size)
    if split_url(file.url)[0] in HTTP:
        limit = cache_limit() if file.size is None else file.size

        def note(headers: Mapping[str, str]) -> None:
            versions.add(version_of(headers))

        get(fs, file.url, stream, start, end, limit, note)
    else:
        versions.add("")
        stream.write(_cat(file.url, fs, start, end))
    if file.size is not None and stream.tell() not in (end, file.size):
        stream.truncate(0)
        _explain_size(file)


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


def _read_range(
    file: RemoteFile, fs: fsspec.AbstractFileSystem, start: int, end: int
) -> bytes | None:
    """Read the bytes from start to end; None if the server only sends whole files."""
    if split_url(file.url)[0] in HTTP:
        stream = BytesIO()
        if not get(fs, file.url, stream, start, end):
            return None
        content = stream.getvalue()
    else:
        content = _cat(file.url, fs, start, end)
    if len(content) != end - start:
        _explain_size(file)
    return content


def _cat(url: str, fs: fsspec.AbstractFileSystem, start: int, end: int) -> bytes:
    """Read a range of bytes from an object store or from the hub."""
    # The file system of the hub would read ahead.
    options = {"cache_type": "none"} if split_url(url)[0] == "hf" else {}
    return fs.cat_file(fs._strip_protocol(url), start=start, end=end, **options)


def read_small(url: str) -> bytes:
    """Read a small file into memory.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or has more than MAX_SMALL bytes.
    """
    fs = filesystem(url)
    if split_url(url)[0] not in HTTP:
        return request(url, fs.cat_file, fs._strip_protocol(url))
    stream = BytesIO()
    request(url, get, fs, url, stream, limit=MAX_SMALL)
    if stream.tell() > MAX_SMALL:
        raise UserError(f"{public_url(url)} has more than {MAX_SMALL:,} bytes; check the URL")
    return stream.getvalue()


def _explain_size(file: RemoteFile) -> None:
    """Raise the error for an answer whose size differs from the expected one.

    Raises:
        UserError: the file was replaced.
        OSError: it was not, so the connection was closed early.
    """
    if not _is_same(file):
        raise _replaced(file)
    raise OSError("connection closed early")


def _is_same(file: RemoteFile) -> bool:
    """Ask whether a file still has the size and version that it had when it was found."""
    return stat([file.url]) == [file]
