"""Files at URLs such as https://, s3://, gs:// and hf://: found with fsspec, copied into a cache.

The copy of a file lies at CACHE/files/SCHEME/HOST/PATH, so it keeps the names of its folders. A
copy is used as long as the file at the URL has the same size and version (ETag). If the cache grows
beyond its limit, the files that were used least recently are removed, but none that is being read.

A URL may contain a password, a signature or another secret. `public_url` has none of them;
messages, folders and everything that is stored are made of it. For the same reason no error of
fsspec is shown or chained, because its text may quote the URL.
"""

import errno
import hashlib
import os
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedIOBase
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

import fsspec
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info

from tf_lightning.errors import UserError
from tf_lightning.files import report_full_disk

try:
    import fcntl
except ImportError:  # Windows, which does not remove files that are open
    fcntl = None

CHUNK = 2**24  # bytes of one request
THREADS = 16  # requests at a time that ask for sizes and versions
ATTEMPTS = 12  # of a request that fails for a reason that may pass
PATIENCE = 6  # attempts, after some seconds, before a person is told
FIRST_DELAY, LONGEST_DELAY = 0.1, 20.0  # seconds before the next attempt; 43 to 86 in all
CACHE_GB = 50.0
KEPT = 0.9  # share of the limit that stays when room is made, so that it is seldom made

# The packages that pip installs with tf-lightning[EXTRA], by scheme.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
HTTP = ("http", "https")
# Errors of requests that are wrong in themselves, such as a name that cannot be one on the hub.
MISTAKES = ValueError, TypeError, LookupError, NotImplementedError
# Values of an info of fsspec that change with the content of a file, in order of preference.
VERSIONS = (
    "ETag", "etag", "blob_id", "md5Hash", "generation", "Last-Modified", "LastModified", "mtime",
    "updated", "created",
)  # fmt: skip
# Parameters of a query that sign a URL. They differ each time the same file is signed.
SIGNATURE_PREFIXES = ("x-amz-", "x-goog-")
SIGNATURES = (
    "awsaccesskeyid", "googleaccessid", "signature", "expires", "policy",
    "key-pair-id", "token", "access_token", "sig", "se", "sp", "sv", "sr", "st", "spr", "sks",
    "skv", "ske", "skt", "skoid", "sktid",
)  # fmt: skip
HIDDEN_QUERY = re.compile("sha256=[0-9a-f]{12}")  # what `public_url` writes for a query
# Errors of the disk that a file is copied to.
DISK_ERRORS = errno.ENOSPC, errno.EDQUOT, errno.EROFS


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


# URLs


def is_remote(path: object) -> bool:
    """Return whether a path is a URL."""
    return isinstance(path, str) and "://" in path


def split_url(url: str) -> tuple[str, str, str, str]:
    """Split a URL into scheme, host with login and port, path without leading "/", and query."""
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    host, _, path = rest.partition("/")
    query = ""
    if scheme in HTTP:  # "?" and "#" are characters of the names in object stores
        path, _, query = path.partition("#")[0].partition("?")
    return scheme, host, path, query


def public_url(url: str) -> str:
    """Return a URL without login and query.

    A hash stands for the query without its signature. Any parameter may hold a secret, so none is
    shown.
    """
    scheme, host, path, query = split_url(url)
    rest = _hash_query(query)
    return f"{scheme}://{host.rpartition('@')[2]}/{path}" + (f"?sha256={rest}" if rest else "")


# A URL in a text such as a command; the next one may follow after a comma.
URL = re.compile(r"""[A-Za-z][\w+.-]*://(?:(?!,\s*[A-Za-z][\w+.-]*://)[^\s'"])+""")


def hide_logins(text: str) -> str:
    """Return a text, such as a command, whose URLs are as of `public_url`."""

    def hide(found: re.Match) -> str:
        url = found[0].rstrip("]}")  # of a list or a dict
        is_public = "@" not in url and ("?" not in url or "?sha256=" in url)
        return (url if is_public else public_url(url)) + found[0][len(url) :]

    return URL.sub(hide, text)


def _hash_query(query: str) -> str:
    items = sorted(parse_qsl(query, keep_blank_values=True))
    rest = [(key, value) for key, value in items if not _signs(key.lower())]
    return hashlib.sha256(urlencode(rest).encode()).hexdigest()[:12] if rest else ""


def _signs(key: str) -> bool:
    return key in SIGNATURES or key.startswith(SIGNATURE_PREFIXES)


# Requests


def filesystem(url: str) -> fsspec.AbstractFileSystem:
    """Return fsspec's file system for a URL.

    Raises:
        UserError: there is none for its scheme, its package is not installed, or the URL was
            written without its query.
    """
    scheme, _, _, query = split_url(url)
    if HIDDEN_QUERY.fullmatch(query):
        raise UserError(
            f"{url} has a hash instead of its query, which may hold a secret and is never written; "
            "give the URL with its query"
        )
    options = {"headers": {"Accept-Encoding": "identity"}} if scheme in HTTP else {}
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False, **options)
    except ImportError:
        extra = EXTRAS.get(scheme)
        package = f"'tf-lightning[{extra}]'" if extra else f"the package of fsspec for {scheme}"
        raise UserError(
            f"{public_url(url)} needs a package that is not installed; pip install {package}"
        ) from None
    except ValueError:
        raise UserError(
            f"{public_url(url)} has the unknown scheme {scheme!r}; give a local path, or a URL "
            "that begins with https://, s3://, gs:// or hf://datasets/"
        ) from None


def request(url: str, function: Callable, *arguments, **options) -> Any:
    """Call a function of a file system, and again after a growing pause while it fails.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: access is refused, or every attempt failed.
        OSError: the disk of the copy is full or read-only.
    """
    delay = FIRST_DELAY
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function(*arguments, **options)
        except UserError:
            raise
        except Exception as error:
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise
            # fsspec raises FileNotFoundError for any failure of HTTP, and OSError for those of S3.
            if isinstance(error, OSError) and isinstance(error.__cause__, Exception):
                error = error.__cause__
            if isinstance(error, FileNotFoundError) or _status(error) in (404, 410):
                raise FileNotFoundError(public_url(url)) from None
            _check_access(url, error)
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{public_url(url)} could not be read in {ATTEMPTS} attempts "
                    f"({_kind(error)}); check the URL and the network, and run it again"
                ) from None
            if attempt == PATIENCE:
                rank_zero_info(f"{public_url(url)} cannot be read ({_kind(error)}); trying again.")
        time.sleep(delay * random.uniform(0.5, 1))
        delay = min(2 * delay, LONGEST_DELAY)


def _status(error: Exception) -> int | None:
    """Return the HTTP status of an error of any file system."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    names = (error, "status"), (response, "status_code"), (error, "code")  # aiohttp, hub, gcsfs
    values = (getattr(holder, name, None) for holder, name in names)
    return next((int(value) for value in values if str(value).isdigit()), None)


def _kind(error: Exception) -> str:
    """Name an error without its text, which may quote the URL."""
    status = _status(error)
    return f"HTTP status {status}" if status else type(error).__name__


def _check_access(url: str, error: Exception) -> None:
    """Raise UserError if a request that failed with this error would fail again.

    Raises:
        UserError: access is refused, there are no credentials, or the URL is wrong.
    """
    scheme, status, kind = split_url(url)[0], _status(error), type(error).__name__
    if "Credential" in kind:
        raise UserError(
            f"{public_url(url)} needs credentials and there are none; {_how_to_log_in(scheme)}"
        ) from None
    if isinstance(error, PermissionError) or status in (401, 403):
        raise UserError(
            f"access to {public_url(url)} is refused{f' with HTTP status {status}' * bool(status)};"
            f" {_how_to_log_in(scheme)}"
        ) from None
    if "Offline" in kind:
        raise UserError(
            f"{public_url(url)} cannot be read while HF_HUB_OFFLINE is set; unset it"
        ) from None
    refused = status and 400 <= status < 500 and status not in (408, 425, 429)
    if refused or isinstance(error, MISTAKES):
        raise UserError(
            f"{public_url(url)} cannot be read ({_kind(error)}); check the URL"
        ) from None


def _how_to_log_in(scheme: str) -> str:
    match EXTRAS.get(scheme, scheme):
        case "s3":
            return (
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a "
                "public bucket"
            )
        case "gs":
            return "log in with `gcloud auth application-default login`"
        case "hf":
            return (
                "check the name, accept the data set's terms on the hub if it has any, and log in "
                "with `hf auth login` or HF_TOKEN"
            )
    return "check the URL and the login or signature in it"


# Finding files


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
    """Return the options that ask a file system anew; that of the hub keeps its own listing."""
    return {"refresh": True} if split_url(url)[0] == "hf" else {}


def _in_threads(function: Callable, values: Sequence) -> list:
    if not values:
        return []
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
    version = next((str(info[name]) for name in VERSIONS if info.get(name)), "")
    return RemoteFile(url, info["size"], version)


# The cache


def cache_folder() -> Path:
    """Return the folder of the cache: TF_LIGHTNING_CACHE, or ~/.cache/tf_lightning."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("TF_LIGHTNING_CACHE") or os.path.join(caches, "tf_lightning")
    return Path(folder).expanduser().absolute()


def cache_limit() -> int:
    """Return the largest size of the cache in bytes, from TF_LIGHTNING_CACHE_GB.

    Raises:
        UserError: it is not a positive number.
    """
    text = os.environ.get("TF_LIGHTNING_CACHE_GB") or str(CACHE_GB)
    with suppress(ValueError, OverflowError):
        if (limit := int(float(text) * 1e9)) > 0:
            return limit
    raise UserError(f"TF_LIGHTNING_CACHE_GB={text} must be a number above 0, such as {CACHE_GB}")


# The logins in the URLs that this process was given, by scheme and host.
_logins: dict[tuple[str, str], str] = {}


def cached_path(url: str) -> Path:
    """Return where the copy of a file lies in the cache, whether it is there or not.

    Raises:
        UserError: the path of the URL leads above its host.
    """
    scheme, host, path, query = split_url(url)
    login, at, host = host.rpartition("@")
    if at:
        _logins[scheme, host] = login + at
    names = [name for name in (unquote(path) if scheme in HTTP else path).split("/") if name]
    if not {".", ".."}.isdisjoint(names):
        raise UserError(f"{public_url(url)} has '.' or '..' as a folder; leave it out")
    rest = _hash_query(query)
    host = quote(f"{host}?{rest}" if rest else host, safe="")
    return cache_folder().joinpath("files", scheme, host, *names)


def url_of(path: Path) -> str | None:
    """Return the URL of the file whose copy would lie at a path; None outside of the cache.

    Raises:
        ValueError: the path leads above the host of a URL.
    """
    root = cache_folder() / "files"
    if not path.is_relative_to(root):
        return None
    names = Path(os.path.normpath(path)).relative_to(root).parts  # raises ValueError
    if len(names) < 3 or names[:2] != path.relative_to(root).parts[:2]:
        raise ValueError("path above the host of its URL")
    scheme, host = names[0], unquote(names[1]).partition("?")[0]
    rest = "/".join(names[2:])
    rest = quote(rest) if scheme in HTTP else rest
    return f"{scheme}://{_logins.get((scheme, host), '')}{host}/{rest}"


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
        with lock(path):
            if not _has_copy(path, version, file):
                _download(file, path, version)
        try:
            stream = _open_shared(path, "rb")
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


def lock(path: Path) -> FileLock:
    """Return a lock for changing a file; files share 256 locks."""
    locks = cache_folder() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / hashlib.sha256(str(path).encode()).hexdigest()[:2])


def _open_shared(path: Path, mode: str) -> BufferedIOBase:
    """Open a file and keep it from being removed from the cache until it is closed."""
    stream = path.open(mode)
    if fcntl:
        fcntl.flock(stream, fcntl.LOCK_SH)
    return stream


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
    with _open_shared(partial, "ab") as stream:
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


def read_file(url: str) -> bytes:
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
    """Say why a file has another size than it should.

    Raises:
        UserError: it was replaced.
        OSError: it was not, so the connection was closed early.
    """
    if _stat(file.url) != file:
        raise _replaced(file)
    raise OSError("connection closed early")


@contextmanager
def make_room(name: str, size: int) -> Iterator[None]:
    """Remove the files that were used least recently if `size` more bytes would exceed the limit.

    Only one process at a time runs its block, so that a file of this size can be added there.

    Args:
        name: what needs the room, for a message.
        size: in bytes.

    Raises:
        UserError: the size alone is above the limit.
    """
    folder, limit = cache_folder(), cache_limit()
    if size > limit:
        raise UserError(
            f"{name} has {size:,} bytes, and the cache may hold {limit:,}; set "
            "TF_LIGHTNING_CACHE_GB to a larger number"
        )
    folder.mkdir(parents=True, exist_ok=True)
    sum_file = folder / "used"  # the size of the cache, or more
    with FileLock(folder / "used.lock", poll_interval=0.005):
        try:
            used = int(sum_file.read_text())
        except (OSError, ValueError):  # missing, or its writer was killed
            used = limit
        if used + size > limit:
            used = _remove_oldest(KEPT * limit - size)
        sum_file.write_text(str(used + size))
        yield


def _remove_oldest(limit: float) -> int:
    """Remove the files that were used least recently while all have more bytes than a limit.

    Returns:
        The size of the files that are left.
    """
    found = []
    for kind in ("files", "partial", "corpora"):
        for above, _, names in os.walk(cache_folder() / kind):
            for name in names:
                with suppress(OSError):
                    status = os.stat(os.path.join(above, name))
                    found.append((status.st_mtime_ns, status.st_size, Path(above, name)))
    used = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if used <= limit:
            break
        used -= size * _remove(path)
    return used


def _remove(path: Path) -> bool:
    """Remove a file of the cache unless it is in use; return whether it was removed."""
    try:
        with path.open("rb") as stream:
            if fcntl:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        if not fcntl:
            path.unlink()
        return True
    except OSError:
        return False
