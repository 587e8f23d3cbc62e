"""Text and pictures in any order from disk: our JSON lines, OBELICS, MMC4, MINT-1T.

Documents of web pages and of PDFs, text and pictures in turn: OBELICS, MMC4, MINT-1T.

Their pictures come from elsewhere and some are always missing: a document does without those.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence

from tf_lightning.data.documents import BadSample
from tf_lightning.data.images import to_rgb
from tf_lightning.data.mixture import Mixture
from tf_lightning.data.readers.captions import as_picture
from tf_lightning.data.readers.files import ImagePathSource, OptionalImage
from tf_lightning.data.readers.formats import (
    by_extension,
    file_format,
    parse_json,
    parse_object,
    read_lines,
    read_parquet,
    read_tar,
)
from tf_lightning.errors import UserError

Parts = list[str | OptionalImage]


def obelics(row: dict[str, Any], folder: Path) -> Parts:
    """Two lists of one length, `images` and `texts`: at each place one of them has something.

    A picture is its bytes, {"bytes": ...}, a name, or a URL; a URL's picture has the URL's SHA-256
    (64 hexadecimal digits) as its name, without extension.
    """
    images, texts = row.get("images"), row.get("texts")
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise BadSample("document without images and texts of one length")
    parts: Parts = []
    for image, text in zip(images, texts, strict=True):
        if isinstance(image, str) and "://" in image:
            image = hashlib.sha256(image.encode("utf-8", "replace")).hexdigest()
        picture = as_picture(image, folder)
        if (picture is None) == (not isinstance(text, str)):
            raise BadSample("place in a document that is not either text or picture")
        parts.append(text if picture is None else OptionalImage(picture))
    return parts


def mmc4(record: dict[str, Any], folder: Path) -> Parts:
    """Sentences `text_list`; each of `image_info` stands before the sentence it matches best."""
    try:
        before: dict[int, Parts] = {}
        for image in record["image_info"]:
            picture = OptionalImage(folder / image["image_name"])
            before.setdefault(image["matched_text_index"], []).append(picture)
        parts: Parts = []
        for number, sentence in enumerate(record["text_list"]):
            parts += [*before.pop(number, []), sentence + " "]
    except (KeyError, TypeError) as error:
        raise BadSample("document of another layout than MMC4's") from error
    if before:
        raise BadSample("picture that matches no sentence")
    return parts


def mint(files: list[tuple[str, bytes]]) -> Parts:
    """{key}.json with `images` and `texts`, in turn, and {key}.tiff, a page a picture."""
    found = by_extension(files)
    record = parse_object(found.get("json", b""))
    tiff = found.get("tiff") or found.get("tif")
    pages = iter(_pages(tiff) if tiff else [])
    images = record.get("images")
    names = images if isinstance(images, list) else []
    pictures = [name if name is None else next(pages, b"") for name in names]
    if b"" in pictures or next(pages, None) is not None:
        raise BadSample("document of other pictures than it names")
    return obelics({**record, "images": pictures}, Path())


def _pages(tiff: bytes) -> list[bytes]:
    """The pages of a TIFF, each a PNG."""
    files = []
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(tiff)) as pages:
            for page in ImageSequence.Iterator(pages):
                if page.width * page.height > Image.MAX_IMAGE_PIXELS:  # Pillow checks the first
                    raise BadSample(f"image of more than {Image.MAX_IMAGE_PIXELS:,} pixels")
                files.append(io.BytesIO())
                to_rgb(page).save(files[-1], "PNG", compress_level=1)
    except BadSample:
        raise
    except Exception as error:  # Pillow's readers raise of many kinds on damaged files
        raise BadSample("damaged image") from error
    return [file.getvalue() for file in files]


class InterleavedFiles(ImagePathSource):
    """A document a line of .jsonl (also .gz, .zst), a row of .parquet, or a key of a .tar.

    A line is {"parts": ["a text", {"text": "another"}, {"image": "a/b.png"}]} or that list itself,
    a document of MMC4 (`text_list`, `image_info`), or one of OBELICS (`images`, `texts`). A
    .parquet is OBELICS's, a .tar MINT-1T's (.json with .tiff). A document of these three does
    without its missing images, which are counted.

    Args:
        paths: files or globs to train on.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of `paths`' documents held out, in [0, 1).
        image_size: side of the pictures in pixels.
        images: folder that the names begin from; None: that of the file itself. OBELICS's pictures
            are in it under the SHA-256 of their URL.
    """

    def samples(self, file: Path) -> Iterator[tuple[str, tuple[Path, Any]]]:
        """As `FileSource.samples`: the pictures' folder with each line, row, or files of a key."""
        match file_format(file):
            case ".jsonl":
                records = enumerate(read_lines(file))
            case ".parquet":
                records = enumerate(read_parquet(file, ("images", "texts")))
            case ".tar":
                records = read_tar(file)
            case _:
                raise UserError(f"{file} is neither .jsonl, .parquet nor .tar; name other files")
        for key, record in records:
            yield str(key), (self.folder(file), record)

    def parts(self, sample: tuple[Path, Any]) -> list[str | Path | OptionalImage]:
        """Texts and pictures in order."""
        folder, record = sample
        if isinstance(record, list):
            return mint(record)
        content = parse_json(record) if isinstance(record, bytes) else record
        match content:
            case {"text_list": _}:
                return mmc4(content, folder)
            case {"texts": _}:
                return obelics(content, folder)
        return [part if what == "text" else folder / part for what, part in parse_parts(content)]


def parse_parts(content: Any) -> list[tuple[str, str]]:
    """The parts of a line in order: "text" or "image", and the text or the picture's file."""
    parts = content.get("parts") if isinstance(content, dict) else content
    if not isinstance(parts, list):
        raise BadSample('line without "parts"')
    return [_parse_part(part) for part in parts]


def _parse_part(part: str | dict[str, str]) -> tuple[str, str]:
    match part:
        case str() as text:
            return "text", text
        case {"text": str() as text}:
            return "text", text
        case {"image": str() as path}:
            return "image", path
    raise BadSample("part that is neither text nor image")


class InterleavedData(Mixture):
    """Interleaved documents alone.

    Args:
        paths: .jsonl, .parquet or .tar files, or globs.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of documents held out, in [0, 1).
        image_size: side of the pictures in pixels.
        images: folder that the names of pictures begin from; None: that of the file naming them.
        kwargs: as in Mixture.
    """

    def __init__(
        self,
        paths: str | list[str],
        val_paths: str | list[str] | None = None,
        val_fraction: float = 0.01,
        image_size: int = 256,
        images: str | None = None,
        **kwargs,
    ):
        source = InterleavedFiles(paths, val_paths, val_fraction, image_size, images)
        super().__init__(sources={"interleaved": source}, weights=None, **kwargs)
