"""Base class of the sources that read files: held-out documents, fingerprints, shards.

Files may be remote (https://, s3://, gs://, hf://). Readers only see their copies in the cache of
`tf_lightning.remote`.
"""

import copy
import glob
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from PIL import Image

from tf_lightning.data.documents import BadSample, RawDocument, Skipped, Source, Split
from tf_lightning.data.readers.globs import find_files, without_logins
from tf_lightning.data.readers.ids import SampleIds
from tf_lightning.data.readers.local_or_remote import (
    file_size,
    file_version,
    local_file,
    local_path,
    refuse_web_page,
)
from tf_lightning.data.readers.snapshot import Snapshot
from tf_lightning.errors import UserError
from tf_lightning.ranges import Range, check_fields
from tf_lightning.remote.downloads import fetch_ahead
from tf_lightning.remote.listing import RemoteFile

SHARD_BYTES = 64_000_000  # total size of the files that one preparation shard reads


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
        for sample_id, sample in self._with_copies(self._samples(split)):
            for document in self._convert(sample):
                yield sample_id, document

    def _with_copies(self, samples: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Yield samples with their ids when the remote files that they name are in the cache."""
        return samples

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
                    if path is not file:
                        refuse_web_page(path)
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
        """Yield the items of `samples`, with the hash of the key in place of the key."""
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
        """The remote files of this source, which are listed once."""
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


def held_out(key: str, fraction: float) -> bool:
    """Return whether a document is in the validation split: a hash of its key below `fraction`."""
    return hash_of(key) < fraction * NUM_HASHES


NUM_HASHES = 2**32


def hash_of(key: str) -> int:
    """Return a hash of a key, from 0 to NUM_HASHES - 1, that is the same everywhere."""
    return zlib.crc32(key.encode("utf-8", "surrogatepass"))
