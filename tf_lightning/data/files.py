"""Documents in files: which files, which documents are held out, what identifies the content."""

import copy
import glob
import os
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tf_lightning.data.corpus import BadSample, RawDocument, Skipped, Source, Split
from tf_lightning.errors import UserError

SHARD_BYTES = 64_000_000  # of files that are prepared together


class FileSource(Source):
    """Documents of files; a reader adds `samples` and `document`.

    Args:
        paths: files or globs to train on.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of `paths`' documents held out, in [0, 1).
    """

    def __init__(
        self,
        paths: str | list[str],
        val_paths: str | list[str] | None = None,
        val_fraction: float = 0.01,
    ):
        self.paths, self.val_paths, self.val_fraction = paths, val_paths, val_fraction

    @abstractmethod
    def samples(self, file: Path) -> Iterator[tuple[str, Any]]:
        """Key, unique in the file, and raw content of each sample; BadSample ends the file."""

    @abstractmethod
    def document(self, sample: Any) -> RawDocument:
        """A sample made into a document; BadSample if it cannot be."""

    def documents(self, split: Split) -> Iterator[RawDocument | Skipped]:
        """As `Source.documents`."""
        for file in self.files(split):
            try:
                for key, sample in self.samples(file):
                    if self._belongs(f"{file.name}/{key}", split):
                        yield self._document_or_skipped(sample)
            except BadSample as error:
                yield Skipped(str(error))

    def fingerprint(self, split: Split) -> str:
        """As `Source.fingerprint`."""
        stats = [(str(file), file.stat()) for file in self.files(split)]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return repr((type(self).__name__, split, sorted(vars(self).items()), files))

    def files(self, split: Split) -> list[Path]:
        """The files a split is read from."""
        return find_files(self.val_paths if split == "val" and self.val_paths else self.paths)

    def shards(self, split: Split) -> list["FileSource"]:
        """Sources of some files each, whose documents one after another are this one's."""
        groups: list[list[str]] = [[]]
        num_bytes = 0
        for file in self.files(split):
            if num_bytes >= SHARD_BYTES:
                groups.append([])
                num_bytes = 0
            groups[-1].append(glob.escape(str(file)))
            num_bytes += file.stat().st_size
        return [self._of(group, split) for group in groups]

    def _of(self, files: list[str], split: Split) -> "FileSource":
        """This source with other files of a split."""
        source = copy.copy(self)
        if split == "val" and self.val_paths:
            source.val_paths = files
        else:
            source.paths = files
        return source

    def _belongs(self, key: str, split: Split) -> bool:
        return bool(self.val_paths) or held_out(key, self.val_fraction) == (split == "val")

    def _document_or_skipped(self, sample: Any) -> RawDocument | Skipped:
        try:
            return self.document(sample)
        except BadSample as error:
            return Skipped(str(error))


def find_files(paths: str | list[str]) -> list[Path]:
    """Files that paths or globs (`**` too) name, each glob's sorted.

    Raises:
        UserError: a path or glob matches no file.
    """
    files = []
    for path in [paths] if isinstance(paths, str) else paths:
        found = sorted(glob.glob(os.path.expanduser(path), recursive=True))
        found = [Path(name) for name in found if os.path.isfile(name)]
        if not found:
            raise UserError(f"no file matches {path!r}; give files or globs such as 'data/*.tar'")
        files += found
    return files


def held_out(key: str, fraction: float) -> bool:
    """Whether a document is for validation: the same answer wherever the file lies."""
    return zlib.crc32(key.encode()) < fraction * 2**32
