"""Documents in files: which files, which documents are held out, what identifies the content."""

import copy
import glob
import os
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tf_lightning.data.documents import BadSample, RawDocument, Skipped, Source, Split
from tf_lightning.data.images import load_image
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
    def samples(self, file: Path) -> Iterator[tuple]:
        """Key and raw content of each sample; BadSample ends the file.

        Samples of one key are held out together. Where the file itself says which split a sample
        is of, that is a third item.
        """

    @abstractmethod
    def document(self, sample: Any) -> list[str | Image.Image | Skipped]:
        """A sample made into a document; BadSample if it cannot be, Skipped for a part of it."""

    def documents(self, split: Split) -> Iterator[RawDocument | Skipped]:
        """As `Source.documents`."""
        for file in self.files(split):
            try:
                for key, sample, *said in self.samples(file):
                    if said == [split] if said else self._belongs(f"{file.name}/{key}", split):
                        yield from self._usable(sample)
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

    def _usable(self, sample: Any) -> Iterator[RawDocument | Skipped]:
        """The document of a sample, and what is left out of it."""
        try:
            parts = self.document(sample)
        except BadSample as error:
            parts = [Skipped(str(error))]
        yield from (part for part in parts if isinstance(part, Skipped))
        document = [part for part in parts if not isinstance(part, Skipped)]
        if document or not parts:
            yield document


@dataclass(frozen=True)
class OptionalImage:
    """A picture that its document can do without."""

    file: bytes | Path


class ImageFileSource(FileSource):
    """Documents with pictures; a reader adds `samples` and, where they are not yet that, `parts`.

    Args:
        paths: files or globs to train on.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of `paths`' documents held out, in [0, 1).
        image_size: side of the pictures in pixels.
    """

    def __init__(
        self,
        paths: str | list[str],
        val_paths: str | list[str] | None = None,
        val_fraction: float = 0.01,
        image_size: int = 256,
    ):
        super().__init__(paths, val_paths, val_fraction)
        self.image_size = image_size

    def parts(self, sample: Any) -> list[str | bytes | Path | OptionalImage]:
        """Texts and picture files of a sample; BadSample if it cannot be used."""
        return sample

    def document(self, sample: Any) -> list[str | Image.Image | Skipped]:
        """As `FileSource.document`."""
        return [part if isinstance(part, str) else self._load(part) for part in self.parts(sample)]

    def _load(self, file: bytes | Path | OptionalImage) -> Image.Image | Skipped:
        if not isinstance(file, OptionalImage):
            return load_image(file, self.image_size)
        try:
            return load_image(file.file, self.image_size)
        except BadSample as error:
            return Skipped(str(error))


class ImagePathSource(ImageFileSource):
    """Files that name their pictures.

    Args:
        paths: files or globs to train on.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of `paths`' documents held out, in [0, 1).
        image_size: side of the pictures in pixels.
        images: folder that the names begin from; None: that of the file itself.
    """

    def __init__(
        self,
        paths: str | list[str],
        val_paths: str | list[str] | None = None,
        val_fraction: float = 0.01,
        image_size: int = 256,
        images: str | None = None,
    ):
        super().__init__(paths, val_paths, val_fraction, image_size)
        self.images = images

    def folder(self, file: Path) -> Path:
        """Where the pictures are that a file names."""
        return Path(self.images).expanduser() if self.images else file.parent


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
    return zlib.crc32(key.encode("utf-8", "surrogatepass")) < fraction * 2**32
