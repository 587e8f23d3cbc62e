"""Remote files with their sizes and versions, and how they are found."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tf_lightning.remote.cache import cached_path
from tf_lightning.remote.requests import filesystem, request
from tf_lightning.remote.urls import HTTP, public_url, split_url

THREADS = 16  # requests at a time that ask for sizes and versions
# Values of an info of fsspec that change with the content of a file, in order of preference.
VERSIONS = (
    "ETag", "etag", "blob_id", "md5Hash", "generation", "Last-Modified", "LastModified", "mtime",
    "updated", "created",
)  # fmt: skip


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL as it was when it was found. `str` gives its `public_url`.

    Attributes:
        url: may contain a password or a signature.
        size: in bytes; None if the server does not say it.
        version: changes with the content of the file, such as its ETag; "" if there is nothing.
    """

    url: str = field(repr=False)
    size: int | None
    version: str

    def __str__(self) -> str:
        return public_url(self.url)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return cached_path(self.url).name


def find(pattern: str) -> list[RemoteFile]:
    """List the files that a URL or a glob of URLs matches, sorted by their paths; [] if none.

    A glob of https:// needs a server that lists its folders.

    Raises:
        UserError: access is refused, or the server cannot be reached.
    """
    scheme, _, path, _ = split_url(pattern)
    if not any(sign in path for sign in ("*[" if scheme in HTTP else "*?[")):
        file = _stat(pattern)
        return [file] if file else []
    fs = filesystem(pattern)
    try:
        infos = request(
            pattern, fs.glob, fs._strip_protocol(pattern), detail=True, **_anew(pattern)
        )
    except FileNotFoundError:
        return []
    names = sorted(name for name, info in infos.items() if info["type"] == "file")
    urls = [fs.unstrip_protocol(name) for name in names]
    if scheme in HTTP:  # the listing has no sizes
        return [file for file in stat(urls) if file]
    return [_remote_file(url, infos[name]) for url, name in zip(urls, names, strict=True)]


def find_each(patterns: Sequence[str]) -> list[list[RemoteFile]]:
    """Call `find` for several patterns at a time."""
    return _in_threads(find, patterns)


def stat(urls: Sequence[str]) -> list[RemoteFile | None]:
    """Ask for sizes and versions of files, several at a time; None for a URL without a file."""
    return _in_threads(_stat, urls)


def list_folder(url: str) -> list[RemoteFile]:
    """List the files in a folder of an object store or of the hub; [] if there is none."""
    fs = filesystem(url)
    try:
        infos = request(url, fs.ls, fs._strip_protocol(url), detail=True, **_anew(url))
    except FileNotFoundError:
        return []
    return [
        _remote_file(fs.unstrip_protocol(info["name"]), info)
        for info in infos
        if info["type"] == "file"
    ]


def _anew(url: str) -> dict[str, bool]:
    """Return the options that bypass the listing cache of the hub's file system."""
    return {"refresh": True} if split_url(url)[0] == "hf" else {}


def _in_threads(function: Callable, values: Sequence) -> list:
    if len(values) < 2:
        return [*map(function, values)]
    with ThreadPoolExecutor(min(THREADS, len(values))) as pool:
        return list(pool.map(function, values))


def _stat(url: str) -> RemoteFile | None:
    fs = filesystem(url)
    options = _anew(url)
    if options:
        options["expand_info"] = True  # has the version
    try:
        info = request(url, fs.info, fs._strip_protocol(url), **options)
    except FileNotFoundError:
        return None
    return _remote_file(url, info) if info["type"] == "file" else None


def _remote_file(url: str, info: dict) -> RemoteFile:
    return RemoteFile(url, info["size"], version_of(info))


def version_of(info: Mapping[str, Any]) -> str:
    """Return the version that an info of fsspec, or the headers of an answer, say; "" if none."""
    return next((str(info[name]) for name in VERSIONS if info.get(name)), "")
