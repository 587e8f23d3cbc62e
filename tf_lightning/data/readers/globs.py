"""The files that paths, URLs, globs and brace ranges match."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tf_lightning.data.readers.formats import format_by_name, is_ignored
from tf_lightning.data.readers.snapshot import Snapshot
from tf_lightning.errors import UserError
from tf_lightning.remote.cache import cached_path
from tf_lightning.remote.listing import RemoteFile
from tf_lightning.remote.urls import HTTP, is_remote, public_url, split_url

MAX_EXPANDED = 1_000_000  # paths that a pattern with braces stands for


def names_folder(path: str) -> bool:
    """Return whether a path is a local folder, or a URL that is taken for a folder.

    That is one on the hub or in an object store, without wildcards and without a known suffix.
    """
    if not is_remote(path):
        return Path(path).expanduser().is_dir()
    if split_url(path)[0] in HTTP or any(sign in path for sign in "*?[{"):
        return False
    return format_by_name(Path(path.rstrip("/"))) is None


def find_files(
    paths: str | list[str | RemoteFile], snapshot: Snapshot | None = None
) -> list[Path | RemoteFile]:
    """List the files of paths, URLs, globs (`**` included) and brace ranges, sorted in each glob.

    Files that macOS and file managers put beside the real ones are left out.

    Raises:
        UserError: a path or glob matches no file.
    """
    files: list[Path | RemoteFile] = []
    for path in [paths] if isinstance(paths, str) else paths:
        if isinstance(path, RemoteFile):
            files.append(path)
        elif is_remote(path):
            files += _find_remote(expand_braces(path), snapshot or Snapshot())
        else:
            files += _find_local(path)
    return files


def _find_local(path: str) -> list[Path]:
    found = _glob(path)
    files = _files_among(found)
    expanded = expand_braces(path)
    if not found and expanded != [path]:
        return [file for one in expanded for file in _find_local(one)]
    if not files:
        raise UserError(_no_file(path, found))
    return files


def matching_files(pattern: str) -> list[Path]:
    """List the local files that a glob matches, as `find_files`; [] if there are none.

    Raises:
        UserError: a link leads back to a folder that contains it.
    """
    return _files_among(_glob(pattern))


def _files_among(names: list[str]) -> list[Path]:
    return [Path(name) for name in names if os.path.isfile(name) and not is_ignored(name)]


def _glob(pattern: str) -> list[str]:
    """Return the paths that a glob matches, sorted.

    Raises:
        UserError: a link leads back to a folder that contains it, so that `**` would match each
            file many times.
    """
    found, folders = [], set()
    for name in glob.iglob(os.path.expanduser(pattern), recursive=True):
        folder = os.path.dirname(name)
        if "**" in pattern and folder not in folders and _leads_back(folder):
            raise UserError(f"{folder!r} is a link to a folder above it; remove the link")
        folders.add(folder)
        found.append(name)
    return sorted(found)


def _leads_back(folder: str) -> bool:
    """Return whether a folder is a link to one that its path leads through, perhaps over links."""
    if not os.path.islink(folder):
        return False
    target = os.path.realpath(folder)
    above = {os.path.realpath(parent) for parent in Path(folder).parents}
    return any(Path(parent).is_relative_to(target) for parent in above)


def _find_remote(patterns: list[str], snapshot: Snapshot) -> list[RemoteFile]:
    for pattern in patterns:
        scheme, _, path, _ = split_url(pattern)
        if scheme in HTTP and path.endswith("/"):
            url = public_url(pattern)
            raise UserError(
                f"{url} is a folder of a web server; name its files, such as {url}metadata.jsonl"
            )
    files = []
    for pattern, found in zip(patterns, snapshot.find(patterns), strict=True):
        kept = [file for file in found if not is_ignored(str(cached_path(file.url)))]
        if not kept:
            url = public_url(pattern)
            message = f"no file matches {url}; check the URL"
            if "*" not in url and format_by_name(Path(url)) is None:
                message += f", or give a glob such as '{url}/*.tar' for the files in a folder"
            raise UserError(message)
        files += kept
    return files


def expand_braces(pattern: str) -> list[str]:
    """Expand {a,b} and {00..99} as a shell does.

    Raises:
        UserError: the pattern stands for more than MAX_EXPANDED paths.
    """
    patterns, done = [pattern], []
    while patterns:
        first = patterns.pop()
        group = BRACES.search(first)
        if not group:
            done.append(first)
            continue
        items = _brace_items(group)
        if len(items) + len(patterns) + len(done) > MAX_EXPANDED:
            raise UserError(
                f"{without_logins(pattern)} stands for more than {MAX_EXPANDED:,} files; give a "
                "smaller range"
            )
        begin, end = first[: group.start()], first[group.end() :]
        patterns += [f"{begin}{item}{end}" for item in reversed(items)]
    return list(dict.fromkeys(done))


BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")


def _brace_items(group: re.Match) -> Iterable[str]:
    first, last, listed = group.groups()
    if listed is not None:
        return listed.split(",")
    width = max(map(len, (first, last))) if "0" in (first[0], last[0]) else 0
    numbers = range(int(first), int(last) + 1) or range(int(first), int(last) - 1, -1)
    if len(numbers) > MAX_EXPANDED:
        return range(MAX_EXPANDED + 1)
    return [f"{number:0{width}d}" for number in numbers]


def _no_file(path: str, found: list[str]) -> str:
    """Return a message about a path without files, with what to give instead."""
    if found and os.path.isdir(found[0]):
        readable = os.access(found[0], os.R_OK | os.X_OK)
        names = [n for n in os.listdir(found[0]) if n[0] != "."] if readable else []
        suffixes = Counter(Path(name).suffix for name in names)
        suffix = suffixes.most_common(1)[0][0] if suffixes else ""
        return f"{path!r} is a folder; give the files in it, such as '{found[0]}/*{suffix}'"
    if not glob.has_magic(path):
        return f"there is no file or folder {path!r}; check the path"
    return f"no file matches {path!r}; check the path, or give a glob such as 'data/*.tar'"


def without_logins(value: Any) -> Any:
    """Replace the URLs in an argument by their `public_url`."""
    if isinstance(value, list):
        return [without_logins(item) for item in value]
    return public_url(value) if is_remote(value) else value
