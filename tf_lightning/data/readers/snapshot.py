"""The remote files of a source as they were when the source first asked for them."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tf_lightning.remote import listing
from tf_lightning.remote.cache import cached_path, url_of
from tf_lightning.remote.listing import RemoteFile
from tf_lightning.remote.urls import HTTP, split_url

LIST = 20  # files of a folder; for more, the folder is listed, which takes fewer requests


class Snapshot:
    """Remote files by the paths of their copies in the cache.

    A preparation asks for each file once. What it reads afterwards must be the same version, also
    in the processes that it starts.
    """

    def __init__(self) -> None:
        self.files: dict[str, RemoteFile | None] = {}  # None: there is no such file
        self.listed: set[str] = set()  # folders all of whose files are in `files`
        self.found: dict[str, list[RemoteFile]] = {}

    def find(self, patterns: list[str]) -> list[list[RemoteFile]]:
        """List the files of each URL or glob of URLs; see `listing.find`."""
        unknown = [pattern for pattern in patterns if pattern not in self.found]
        for pattern, files in zip(unknown, listing.find_each(unknown), strict=True):
            self.found[pattern] = files
            self._add(files)
        return [self.found[pattern] for pattern in patterns]

    def stat(self, paths: Iterable[Path]) -> dict[Path, RemoteFile]:
        """Find the files whose copies would lie at paths in the cache; missing ones are left out.

        Raises:
            ValueError: a path leads above the host of its URL.
        """
        paths = list(paths)
        unknown: dict[Path, list[Path]] = defaultdict(list)
        for path in paths:
            if str(path) not in self.files and str(path.parent) not in self.listed:
                unknown[path.parent].append(path)
        asked = []
        for folder, inside in unknown.items():
            url = url_of(inside[0]).rpartition("/")[0]
            if len(inside) <= LIST or split_url(url)[0] in HTTP:
                asked += inside
            else:
                self._add(listing.list_folder(url))
                self.listed.add(str(folder))
        for path, file in zip(asked, listing.stat([*map(url_of, asked)]), strict=True):
            self.files.setdefault(str(path), file)  # another thread may have asked too
        found = ((path, self.files.get(str(path))) for path in paths)
        return {path: file for path, file in found if file}

    def _add(self, files: Iterable[RemoteFile]) -> None:
        self.files |= {str(cached_path(file.url)): file for file in files}
