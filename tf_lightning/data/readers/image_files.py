"""Base classes of the sources that read documents with images from files."""

import base64
import hashlib
import os
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from tf_lightning.data.buckets import Size
from tf_lightning.data.documents import BadSample, Skipped, Split
from tf_lightning.data.images import CONTEXT, FileBytes, load_image
from tf_lightning.data.readers.files import UNEXPECTED, FileSource
from tf_lightning.data.readers.formats import MAX_SAMPLE
from tf_lightning.data.readers.local_or_remote import (
    copies,
    file_versions,
    is_in_cache,
    local_file,
    names_remote,
    read_bytes,
)
from tf_lightning.data.readers.snapshot import Snapshot
from tf_lightning.data.readers.tables import has_image_columns
from tf_lightning.ranges import PositiveInt
from tf_lightning.remote.cache import cached_path
from tf_lightning.remote.downloads import run_ahead
from tf_lightning.remote.urls import is_remote

IMAGES_AT_ONCE = 10_000  # images whose versions one request asks for


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
                yield from self._named_images(sample)

    def _named_images(self, sample: Any) -> list[Path]:
        """List the paths of the images that a sample names; a bad sample has none."""
        with suppress(BadSample, *UNEXPECTED):
            parts = [getattr(part, "file", part) for part in self.parts(sample)]
            return [part for part in parts if isinstance(part, Path)]
        return []

    def _with_copies(self, samples: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """See `FileSource`. Images are copied ahead."""
        if not any(map(names_remote, (self.paths, self.val_paths, self.images))):
            return samples
        return run_ahead(
            samples, lambda sample: copies(self._named_images(sample[1]), self.snapshot)
        )


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
