"""Base classes of the sources that read files: globs, held-out documents, fingerprints, shards."""

import base64
import copy
import glob
import hashlib
import os
import unicodedata
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from PIL import Image

from tf_lightning.data.buckets import Size
from tf_lightning.data.documents import BadSample, RawDocument, Skipped, Source, Split
from tf_lightning.data.images import CONTEXT, load_image
from tf_lightning.data.readers.formats import is_ignored
from tf_lightning.data.readers.ids import SampleIds
from tf_lightning.data.readers.tables import has_image_columns
from tf_lightning.errors import UserError
from tf_lightning.ranges import PositiveInt, Range, check_fields

SHARD_BYTES = 64_000_000  # total size of the files that one preparation shard reads


@dataclass(eq=False)
class FileSource(Source):
    """Source that reads documents from files. A subclass implements `samples` and `document`.

    Args:
        paths: files or globs to train on.
        val_paths: files or globs to validate on; null: hold out a share of `paths`.
        val_fraction: share of the documents to hold out if `val_paths` is null, in [0, 1). If it is
            above 0, at least one document of two or more is held out, and one is trained on.
    """

    paths: str | list[str]
    val_paths: str | list[str] | None = None
    val_fraction: Annotated[float, Range(ge=0, lt=1)] = 0.01

    # A higher number makes all corpora of the source be prepared again.
    VERSION: ClassVar[int] = 1
    # Arguments that corpora prepared by older versions do not know; they are not part of the
    # fingerprint while they have their default.
    NEW_ARGUMENTS: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_fields(self)

    @abstractmethod
    def samples(self, file: Path) -> Iterator[tuple]:
        """Yield (key, sample) for each sample of a file; a BadSample stands for one to be skipped.

        The split of a sample is a hash of the file's name and the key, so samples with the same key
        are held out together. Yield (key, sample, split) if the file itself names the split.

        Raises:
            BadSample: the rest of the file cannot be read.
        """

    @abstractmethod
    def document(self, sample: Any) -> list[str | Image.Image | Skipped]:
        """Convert a sample to a document; `Skipped` stands for a part that is left out.

        Raises:
            BadSample: the sample cannot be used.
        """

    def documents(self, split: Split) -> Iterator[RawDocument | Skipped]:
        """See `Source.documents`."""
        for _, document in self.identified(split):
            yield document

    def identified(self, split: Split) -> Iterator[tuple[str, RawDocument | Skipped]]:
        """Yield each document with its id; see `documents.identified` and `SampleIds`."""
        for sample_id, sample in self._samples(split):
            for document in self._convert(sample):
                yield sample_id, document

    def num_samples(self, split: Split) -> int | None:
        """Count the samples without converting them; None if the files are large."""
        if sum(file.stat().st_size for file in self.files(split)) > SHARD_BYTES:
            return None
        return sum(1 for _ in self._samples(split))

    def _samples(self, split: Split) -> Iterator[tuple[str, Any]]:
        """Yield (id, sample) of a split; a BadSample stands for the unreadable rest of a file."""
        for file in self.files(split):
            ids = SampleIds(file)
            try:
                for key, sample, *named in self.samples(file):
                    sample_id = ids.next(key, sample)
                    if named == [split] if named else self._in_split(f"{file.name}/{key}", split):
                        yield sample_id, sample
            except (BadSample, *UNEXPECTED) as error:
                yield ids.name, BadSample(reason(error))

    def _in_split(self, key: str, split: Split) -> bool:
        if self.val_paths:
            return True
        whole = getattr(self, "_whole", self)
        return (hash_of(key) < whole._held_out_below) == (split == "val")

    @cached_property
    def _held_out_below(self) -> float:
        """The limit of the hashes of held-out documents.

        It is the share `val_fraction` of all hashes. If that would leave a split without a usable
        document, the documents with the lowest hash are held out, or those with the highest hash
        are trained on. Reading stops at the first usable document of each split.
        """
        limit = self.val_fraction * NUM_HASHES
        lowest, highest = NUM_HASHES, -1  # hashes of usable documents
        for value, sample, *named in self._hashed_samples() if limit else ():
            if named or lowest < limit <= highest:
                return limit
            if not lowest <= value <= highest and self._is_usable(sample):
                lowest, highest = min(lowest, value), max(highest, value)
        if highest <= lowest:  # there is one document at most
            return 0
        return min(max(limit, lowest + 1), highest)

    def _hashed_samples(self) -> Iterator[tuple]:
        """Yield what `samples` yields, with the hash of the key in place of the key."""
        for file in self.files("train"):
            with suppress(BadSample, *UNEXPECTED):
                for key, *sample in self.samples(file):
                    yield hash_of(f"{file.name}/{key}"), *sample

    def _is_usable(self, sample: Any) -> bool:
        return not all(isinstance(found, Skipped) for found in self._convert(sample))

    def fingerprint(self, split: Split) -> str:
        """See `Source.fingerprint`."""
        stats = [(str(file), file.stat()) for file in self.files(split)]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        defaults = {field.name: field.default for field in fields(self)}
        arguments = [
            (name, value)
            for name, value in sorted(vars(self).items())
            if name[0] != "_" and not (name in self.NEW_ARGUMENTS and value == defaults[name])
        ]
        version = [self.VERSION] if self.VERSION > 1 else []
        return repr((type(self).__name__, split, arguments, files, *version))

    def files(self, split: Split) -> list[Path]:
        """List the files that a split is read from."""
        return find_files(self.val_paths if split == "val" and self.val_paths else self.paths)

    def shards(self, split: Split) -> list["FileSource"]:
        """Divide the files among sources of about SHARD_BYTES each, in the same order."""
        groups: list[list[str]] = [[]]
        num_bytes = 0
        for file in self.files(split):
            if num_bytes >= SHARD_BYTES:
                groups.append([])
                num_bytes = 0
            groups[-1].append(glob.escape(str(file)))
            num_bytes += file.stat().st_size
        return [self._with_files(group, split) for group in groups]

    def _with_files(self, files: list[str], split: Split) -> "FileSource":
        """Copy this source with other files for a split."""
        source = copy.copy(self)
        source._whole = getattr(self, "_whole", self)
        if split == "val" and self.val_paths:
            source.val_paths = files
        else:
            source.paths = files
        return source

    def _convert(self, sample: Any) -> list[RawDocument | Skipped]:
        """List the skipped parts of a sample, then its document unless nothing is left of it."""
        try:
            if isinstance(sample, BadSample):
                raise sample
            parts = self.document(sample)
        except (BadSample, *UNEXPECTED) as error:
            return [Skipped(reason(error))]
        skipped = [part for part in parts if isinstance(part, Skipped)]
        if not skipped:
            return [parts]
        document = [part for part in parts if not isinstance(part, Skipped)]
        return [*skipped, document] if document else skipped


# Errors of a reader at unexpected content. The sample is skipped.
UNEXPECTED = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RecursionError,
    TypeError, ValueError,
)  # fmt: skip


def reason(error: Exception) -> str:
    """Return the reason for which a sample is skipped.

    Raises:
        UserError: the error is a mistake in the arguments, which concerns all samples.
    """
    if isinstance(error, UserError):
        raise error
    return str(error) if isinstance(error, BadSample) else f"sample with a {type(error).__name__}"


@dataclass(frozen=True)
class OptionalImage:
    """An image file that is left out of its document if it is missing or damaged."""

    file: bytes | Path


@dataclass(frozen=True)
class ContextImage:
    """An image file that is read in its document but never generated, such as one in a question."""

    file: bytes | Path


@dataclass(eq=False)
class ImageFileSource(FileSource):
    """File source of documents with images. A subclass implements `samples` and `parts`.

    Args:
        image_size: side of the square images in pixels; with the data's `max_aspect_ratio`, of a
            square that has about their area.

    Attributes:
        image_sizes: aspect-ratio buckets, to the nearest of which an image is cropped. A `Mixture`
            with `max_aspect_ratio` sets them; empty: all images are square.
    """

    image_size: PositiveInt = 256
    image_sizes: ClassVar[tuple[Size, ...]] = ()

    def parts(self, sample: Any) -> list[str | bytes | Path | OptionalImage | ContextImage]:
        """List the texts and image files of a sample in order; by default the sample itself.

        Raises:
            BadSample: the sample cannot be used.
        """
        return sample

    def document(self, sample: Any) -> list[str | Image.Image | Skipped]:
        """See `FileSource.document`."""
        return [part if isinstance(part, str) else self._load(part) for part in self.parts(sample)]

    def _load(self, file: bytes | Path | OptionalImage | ContextImage) -> Image.Image | Skipped:
        size = self.image_sizes or self.image_size
        if isinstance(file, ContextImage):
            image = load_image(file.file, size)
            image.info[CONTEXT] = True
            return image
        if not isinstance(file, OptionalImage):
            return load_image(file, size)
        try:
            return load_image(file.file, size)
        except BadSample as error:
            return Skipped(str(error))


@dataclass(eq=False)
class ImagePathSource(ImageFileSource):
    """Image source whose files may contain paths of images.

    Args:
        images: folder that paths of images are relative to; null: the folder of the file that
            contains the path.
    """

    images: str | None = None

    def image_folder(self, file: Path) -> Path:
        """Return the folder that the image paths in a file are relative to."""
        return Path(self.images).expanduser() if self.images else file.parent

    def image_digest(self, split: Split) -> str:
        """Hash the names, sizes and times of the image files that the split's files name.

        It changes when an image is added, replaced or removed. Images in parquet files are covered
        by `fingerprint`.
        """
        digest = hashlib.sha256()
        for file in self.files(split):
            for path in () if has_image_columns(file) else self.image_paths(file):
                try:
                    stat = os.stat(path)
                    digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
                except (OSError, ValueError):
                    digest.update(f"{path!r} missing\n".encode())
        return digest.hexdigest()

    def image_paths(self, file: Path) -> Iterator[Path]:
        """Yield the paths of the images that a file names; bad samples have none."""
        with suppress(BadSample, *UNEXPECTED):
            for _, sample, *_ in self.samples(file):
                with suppress(BadSample, *UNEXPECTED):
                    parts = [getattr(part, "file", part) for part in self.parts(sample)]
                    yield from (part for part in parts if isinstance(part, Path))


def as_image_file(value: Any, folder: Path) -> bytes | Path | None:
    """Convert the image field of a record to an image file; None if it holds no image.

    Args:
        value: a path relative to `folder`, the content of a file, a data URL, or a dict {"bytes",
            "path"} as on the Hugging Face hub; a list of one of them.
        folder: folder that paths are relative to.

    Raises:
        BadSample: the field is the URL of an image that was not downloaded, several images, or of
            another type.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value or None
    if value is None or value != value or value in NO_IMAGE:
        return None
    if isinstance(value, list) and value and isinstance(value[0], str | bytes | dict):
        raise BadSample(f"{len(value)} images in place of one")
    if not isinstance(value, str):
        raise BadSample(f"image of type {type(value).__name__}, not a file or its name")
    if value.startswith("data:"):
        return _decode_data_url(value)
    if value.startswith(("http://", "https://")):
        raise BadSample("image that is only a URL; download the images, such as with img2dataset")
    return _find(folder / value.removeprefix("file://").replace("\\", "/"))  # paths of Windows


NO_IMAGE = ("", "None", "none", "null", "nan", [], {})  # written for a missing image


def _find(path: Path) -> Path:
    """Return the path with its accents composed or decomposed, as macOS does, if that is a file."""
    if str(path).isascii() or os.path.isfile(path):
        return path
    forms = (Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
    return next((form for form in forms if os.path.isfile(form)), path)


def _decode_data_url(url: str) -> bytes:
    try:
        return base64.b64decode(url.partition(",")[2], validate=True)
    except ValueError as error:
        raise BadSample("damaged image") from error


def find_files(paths: str | list[str]) -> list[Path]:
    """List the files that paths or globs match (`**` included), sorted within each glob.

    Files that macOS and file managers put beside the real ones are left out.

    Raises:
        UserError: a path or glob matches no file.
    """
    files = []
    for path in [paths] if isinstance(paths, str) else paths:
        found = sorted(glob.glob(os.path.expanduser(path), recursive=True))
        names = [name for name in found if os.path.isfile(name) and not is_ignored(name)]
        if not names:
            raise UserError(_no_file(path, found))
        files += [Path(name) for name in names]
    return files


def _no_file(path: str, found: list[str]) -> str:
    """Say what a path without files is, and what to give instead."""
    if found and os.path.isdir(found[0]):
        readable = os.access(found[0], os.R_OK | os.X_OK)
        names = [n for n in os.listdir(found[0]) if n[0] != "."] if readable else []
        suffixes = Counter(Path(name).suffix for name in names)
        suffix = suffixes.most_common(1)[0][0] if suffixes else ""
        return f"{path!r} is a folder; give the files in it, such as '{found[0]}/*{suffix}'"
    return f"no file matches {path!r}; check the path, or give a glob such as 'data/*.tar'"


def held_out(key: str, fraction: float) -> bool:
    """Return whether a document is in the validation split: a hash of its key below `fraction`."""
    return hash_of(key) < fraction * NUM_HASHES


NUM_HASHES = 2**32


def hash_of(key: str) -> int:
    """Return a hash of a key, from 0 to NUM_HASHES - 1, that is the same everywhere."""
    return zlib.crc32(key.encode("utf-8", "surrogatepass"))
