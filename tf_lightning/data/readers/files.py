"""Base classes of the sources that read files: globs, held-out documents, fingerprints, shards.

Files may be remote (https://, s3://, gs://, hf://). Readers only see their copies in the cache of
`tf_lightning.remote`.
"""

import base64
import copy
import glob
import hashlib
import os
import re
import unicodedata
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

from PIL import Image

from tf_lightning.data.buckets import Size
from tf_lightning.data.documents import BadSample, RawDocument, Skipped, Source, Split
from tf_lightning.data.images import CONTEXT, FileBytes, load_image
from tf_lightning.data.readers.formats import MAX_SAMPLE, format_by_name, is_ignored
from tf_lightning.data.readers.ids import SampleIds
from tf_lightning.data.readers.snapshot import Snapshot
from tf_lightning.data.readers.tables import has_image_columns
from tf_lightning.errors import UserError
from tf_lightning.ranges import PositiveInt, Range, check_fields
from tf_lightning.remote import (
    HTTP,
    RemoteFile,
    cached_path,
    fetch_ahead,
    is_remote,
    local_copy,
    public_url,
    split_url,
    url_of,
)

SHARD_BYTES = 64_000_000  # total size of the files that one preparation shard reads
MAX_EXPANDED = 1_000_000  # paths that a pattern with braces stands for
IMAGES_AT_ONCE = 10_000  # images whose versions one request asks for


@dataclass(eq=False)
class FileSource(Source):
    """Source that reads documents from files. A subclass implements `samples` and `document`.

    Args:
        paths: files to train on: local paths, URLs (https://, s3://, gs://, hf://datasets/...),
            globs or brace ranges such as 'shard-{000..099}.tar'.
        val_paths: files to validate on, as `paths`; null: hold out a share of `paths`.
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
        """Count the samples without converting them; None if the files are large or remote."""
        files = self.files(split)
        is_local = all(isinstance(file, Path) for file in files)
        if not is_local or sum(map(file_size, files)) > SHARD_BYTES:
            return None
        return sum(1 for _ in self._samples(split))

    def _samples(self, split: Split) -> Iterator[tuple[str, Any]]:
        """Yield (id, sample) of a split; a BadSample stands for the unreadable rest of a file."""
        for file in fetch_ahead(self.files(split)):
            ids = SampleIds(local_path(file), str(file))
            try:
                with local_file(file) as path:
                    for key, sample, *named in self.samples(path):
                        sample_id, name = ids.next(key, sample), f"{file.name}/{key}"
                        if named == [split] if named else self._in_split(name, split):
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
            try:
                with local_file(file) as path:
                    for key, *sample in self.samples(path):
                        yield hash_of(f"{file.name}/{key}"), *sample
            except (BadSample, *UNEXPECTED) as error:
                reason(error)  # raises mistakes in the arguments

    def _is_usable(self, sample: Any) -> bool:
        return not all(isinstance(found, Skipped) for found in self._convert(sample))

    def fingerprint(self, split: Split) -> str:
        """See `Source.fingerprint`. It has the sizes and ETags of remote files."""
        files = [(str(file), *file_version(file)) for file in self.files(split)]
        defaults = {field.name: field.default for field in fields(self)}
        arguments = [
            (name, without_logins(value))
            for name, value in sorted(vars(self).items())
            if name[0] != "_" and not (name in self.NEW_ARGUMENTS and value == defaults[name])
        ]
        version = [self.VERSION] if self.VERSION > 1 else []
        return repr((type(self).__name__, split, arguments, files, *version))

    def files(self, split: Split) -> list[Path | RemoteFile]:
        """List the files that a split is read from."""
        paths = self.val_paths if split == "val" and self.val_paths else self.paths
        return find_files(paths, self.snapshot)

    @property
    def snapshot(self) -> Snapshot:
        """The remote files of this source, which are asked for once."""
        return vars(self).setdefault("_snapshot", Snapshot())

    def shards(self, split: Split) -> list["FileSource"]:
        """Divide the files among sources of about SHARD_BYTES each, in the same order."""
        groups: list[list[str | RemoteFile]] = [[]]
        num_bytes = 0
        for file in self.files(split):
            if num_bytes >= SHARD_BYTES:
                groups.append([])
                num_bytes = 0
            groups[-1].append(glob.escape(str(file)) if isinstance(file, Path) else file)
            num_bytes += file_size(file)
        return [self._with_files(group, split) for group in groups]

    def _with_files(self, files: list[str | RemoteFile], split: Split) -> "FileSource":
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
        try:
            content = image_content(getattr(file, "file", file), self.snapshot)
            image = load_image(content, self.image_sizes or self.image_size)
        except BadSample as error:
            if isinstance(file, OptionalImage):
                return Skipped(str(error))
            raise
        if isinstance(file, ContextImage):
            image.info[CONTEXT] = True
        return image


@dataclass(eq=False)
class ImagePathSource(ImageFileSource):
    """Image source whose files may contain paths of images.

    Args:
        images: folder that paths of images are relative to, local or a URL; null: the folder of the
            file that contains the path.
    """

    images: str | None = None

    def image_folder(self, file: Path) -> Path:
        """Return the folder that the image paths in a file are relative to."""
        if self.images and is_remote(self.images):
            return cached_path(self.images)
        return Path(self.images).expanduser() if self.images else file.parent

    def image_digest(self, split: Split) -> str:
        """Hash the names, sizes and times or ETags of the image files that the split's files name.

        It changes when an image is added, replaced or removed. Images in parquet files are covered
        by `fingerprint`.
        """
        digest = hashlib.sha256()
        for file in self.files(split):
            with local_file(file) as path:
                images = iter(()) if has_image_columns(path) else self.image_paths(path)
                while several := list(islice(images, IMAGES_AT_ONCE)):
                    for line in file_versions(several, self.snapshot):
                        digest.update(f"{line}\n".encode())
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
    return image_path(value.removeprefix("file://").replace("\\", "/"), folder)  # as on Windows


NO_IMAGE = ("", "None", "none", "null", "nan", [], {})  # written for a missing image


def image_path(name: str, folder: Path) -> Path:
    """Return the path of an image that a file names.

    Raises:
        BadSample: a remote file names an image that is not below the same host or bucket.
    """
    if not is_in_cache(folder / "image"):
        return _find(folder / name)
    if not is_in_cache(folder / name):
        raise BadSample("image outside of the host or bucket of the file that names it")
    return Path(os.path.normpath(folder / name))


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


def image_content(file: bytes | Path, snapshot: Snapshot) -> bytes | Path:
    """Return the bytes of a remote image, whose copy may not stay in the cache; others unchanged.

    Raises:
        BadSample: there is no such file, or it is too large.
    """
    if isinstance(file, FileBytes) and is_in_cache(file.path):
        return bytes(file)
    if not isinstance(file, Path) or not is_in_cache(file):
        return file
    found = snapshot.stat([file]).get(file)
    if found is None:
        raise BadSample("missing image")
    if (found.size or 0) > MAX_SAMPLE:
        raise BadSample(f"image file of more than {MAX_SAMPLE:,} bytes")
    return read_bytes(file, snapshot)


# Local and remote files. The path of a remote file is that of its copy in the cache.


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


def file_size(file: Path | RemoteFile) -> int:
    """Return the size of a file in bytes; 0 if the server of a remote one does not say it."""
    return (file.size or 0) if isinstance(file, RemoteFile) else file.stat().st_size


def file_version(file: Path | RemoteFile) -> tuple[int | None, int | str]:
    """Return size and time of a local file, or size and ETag of a remote one."""
    if isinstance(file, RemoteFile):
        return file.size, file.version
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def without_logins(value: Any) -> Any:
    """Replace the URLs in an argument by their `public_url`."""
    if isinstance(value, list):
        return [without_logins(item) for item in value]
    return public_url(value) if is_remote(value) else value


def is_folder(path: str) -> bool:
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
            raise UserError(f"{folder!r} is a link to a folder that contains it; remove the link")
        folders.add(folder)
        found.append(name)
    return sorted(found)


def _leads_back(folder: str) -> bool:
    """Return whether a folder is a link to one that contains the link."""
    if not os.path.islink(folder):
        return False
    above = os.path.realpath(os.path.dirname(folder))
    return Path(above).is_relative_to(os.path.realpath(folder))


def _find_remote(patterns: list[str], snapshot: Snapshot) -> list[RemoteFile]:
    files = []
    for pattern, found in zip(patterns, snapshot.find(patterns), strict=True):
        kept = [file for file in found if not is_ignored(str(cached_path(file.url)))]
        if not kept:
            url = public_url(pattern)
            raise UserError(
                f"no file matches {url}; check the URL, or give a glob such as '{url}/*.tar' for "
                "the files in a folder"
            )
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
