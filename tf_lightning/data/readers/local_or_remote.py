"""Local and remote files alike. The path of a remote file is that of its copy in the cache."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tf_lightning.data.documents import BadSample
from tf_lightning.data.readers.snapshot import Snapshot
from tf_lightning.errors import UserError
from tf_lightning.remote.cache import cached_path, url_of
from tf_lightning.remote.downloads import copy_small, local_copy
from tf_lightning.remote.listing import RemoteFile
from tf_lightning.remote.urls import is_remote, public_url


def is_in_cache(path: Path) -> bool:
    """Return whether a path stands for a remote file."""
    try:
        return url_of(path) is not None
    except ValueError:
        return False


def is_file(path: Path, snapshot: Snapshot) -> bool:
    """Return whether there is a local or remote file."""
    return bool(snapshot.stat([path])) if is_in_cache(path) else os.path.isfile(path)


def read_bytes(path: Path, snapshot: Snapshot) -> bytes:
    """Read a local or remote file that exists."""
    file = snapshot.stat([path])[path] if is_in_cache(path) else path
    with local_file(file) as copied:
        return copied.read_bytes()


def copies(paths: Iterable[Path], snapshot: Snapshot) -> list[Callable[[], None]]:
    """Return functions that copy the small remote files among these into the cache."""
    return [partial(_copy, path, snapshot) for path in paths if is_in_cache(path)]


def _copy(path: Path, snapshot: Snapshot) -> None:
    if file := snapshot.stat([path]).get(path):
        copy_small(file)


def names_remote(paths: str | list[str | RemoteFile] | None) -> bool:
    """Return whether a URL or a remote file is among the paths of a source."""
    listed = paths if isinstance(paths, list) else [paths]
    return any(isinstance(path, RemoteFile) or is_remote(path) for path in listed)


def local_path(file: Path | RemoteFile) -> Path:
    """Return the path of a local file, or of the copy of a remote one."""
    return cached_path(file.url) if isinstance(file, RemoteFile) else file


def file_versions(paths: list[Path], snapshot: Snapshot) -> Iterator[str]:
    """Yield a line for each local or remote file that changes when the file does."""
    remote = snapshot.stat(path for path in paths if is_in_cache(path))
    for path in paths:
        try:
            if file := remote.get(path):
                yield f"{file} {file.size} {file.version}"
            elif is_in_cache(path):
                yield f"{public_url(url_of(path))} missing"
            else:
                size, time = file_version(path)
                yield f"{path} {size} {time}"
        except (OSError, ValueError):
            yield f"{path!r} missing"


@contextmanager
def local_file(file: Path | RemoteFile) -> Iterator[Path]:
    """Yield the path of a local file, or of the copy of a remote one.

    Raises:
        UserError: a remote file cannot be read, or was replaced during the preparation.
    """
    if isinstance(file, Path):
        yield file
        return
    with ExitStack() as stack:
        try:
            path = stack.enter_context(local_copy(file))
        except FileNotFoundError as error:
            raise UserError(f"{file} was removed during the preparation; run it again") from error
        yield path


def refuse_web_page(copied: Path) -> None:
    """Check that a server has sent a file, and not a web page such as an error message.

    Raises:
        BadSample: it has sent a web page.
    """
    with copied.open("rb") as stream:
        start = stream.read(1000).lstrip().lower()
    if copied.suffix not in (".html", ".htm") and start.startswith((b"<!doctype html", b"<html")):
        raise BadSample(
            "web page in place of the file; check its URL, and name the files in a folder, such as "
            "FOLDER/metadata.jsonl"
        )


def file_size(file: Path | RemoteFile) -> int:
    """Return the size of a file in bytes; 0 if the server of a remote one does not say it."""
    return (file.size or 0) if isinstance(file, RemoteFile) else file.stat().st_size


def file_version(file: Path | RemoteFile) -> tuple[int | None, int | str]:
    """Return size and time of a local file, or size and ETag of a remote one."""
    if isinstance(file, RemoteFile):
        return file.size, file.version
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns
