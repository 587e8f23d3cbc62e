"""The cache of remote files, which keeps its size below a limit.

The copy of a file lies at CACHE/files/SCHEME/HOST/PATH, so it keeps the names of its folders. If
the cache grows beyond its limit, the files that were used least recently are removed, but none that
is being read.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedIOBase
from pathlib import Path
from urllib.parse import quote, unquote

from filelock import FileLock

from tf_lightning.errors import UserError
from tf_lightning.remote.urls import HTTP, public_url, query_hash, split_url

try:
    import fcntl
except ImportError:  # Windows, which does not remove files that are open
    fcntl = None

CACHE_GB = 50.0
KEPT = 0.9  # share of the limit that files keep when some are removed, so that this is rare


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
    rest = query_hash(query)
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


def cache_lock(path: Path) -> FileLock:
    """Return a lock for changing a file; files share 256 locks.

    Raises:
        UserError: the folder of the cache cannot be created.
    """
    locks = cache_folder() / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {cache_folder()} cannot be created ({error.strerror}); name another "
            "one with TF_LIGHTNING_CACHE"
        ) from error
    return FileLock(locks / hashlib.sha256(str(path).encode()).hexdigest()[:2])


def open_shared(path: Path, mode: str) -> BufferedIOBase:
    """Open a file and keep it from being removed from the cache until it is closed."""
    stream = path.open(mode)
    if fcntl:
        fcntl.flock(stream, fcntl.LOCK_SH)
    return stream


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
