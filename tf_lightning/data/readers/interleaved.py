"""Documents of text and images in any order: our JSON lines, OBELICS, MMC4 and MINT-1T.

The images of OBELICS, MMC4 and MINT-1T are downloaded separately, and some of them are always
missing. A missing or damaged image is left out of its document and counted.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, ImageSequence

from tf_lightning.data.documents import BadSample
from tf_lightning.data.images import MAX_BYTES, check_memory, to_rgb
from tf_lightning.data.readers.formats import file_format, refuse
from tf_lightning.data.readers.image_files import (
    ImagePathSource,
    OptionalImage,
    as_image_file,
    image_path,
)
from tf_lightning.data.readers.json_records import parse_object, parse_record, read_records
from tf_lightning.data.readers.tables import missing, read_parquet
from tf_lightning.data.readers.tars import by_extension, read_tar

Parts = list[str | OptionalImage]
OPTIONS = "images_key and texts_key"
MMC4 = "text_list", "image_info"


@dataclass(eq=False)
class InterleavedFiles(ImagePathSource):
    """Interleaved documents: a record of JSON, a row of parquet or a key of a tar.

    A record is {"parts": ["a text", {"text": "another"}, {"image": "a/b.png"}]}, that list itself,
    a document of MMC4 (`text_list`, `image_info`), or a document of OBELICS (`images`, `texts`). A
    parquet file has the columns of OBELICS. A tar has the files of MINT-1T (.json and .tiff).
    Missing images of MMC4, OBELICS and MINT-1T are left out of their documents and counted. JSON
    may be lines or one array, and compressed.

    Args:
        images: folder that paths of images are relative to; null: the folder of the file that
            contains the path. The image of a URL of OBELICS is in it under the URL's SHA-256.
        images_key: key or column of the images, as in OBELICS; null: "images".
        texts_key: key or column of the texts, as in OBELICS; null: "texts".
    """

    images_key: str | None = None
    texts_key: str | None = None

    NEW_ARGUMENTS: ClassVar[tuple[str, ...]] = ("images_key", "texts_key")

    @property
    def _keys(self) -> tuple[str, str]:
        return self.images_key or "images", self.texts_key or "texts"

    def samples(self, file: Path) -> Iterator[tuple[str, tuple[Path, Any]]]:
        """Yield the folder of the images with each record; see `FileSource.samples`."""
        match file_format(file):
            case "json":
                records = enumerate(read_records(file, is_part))
            case "parquet":
                columns = (*self._keys, "parts", *MMC4)
                records = enumerate(read_parquet(file, columns, OPTIONS))
            case "tar":
                records = read_tar(file)
            case _:
                raise refuse(file, "documents are read from .jsonl, .json, .parquet and .tar files")
        for key, record in records:
            yield str(key), (self.image_folder(file), record)

    def parts(self, sample: tuple[Path, Any]) -> list[str | Path | OptionalImage]:
        """List texts and images in order; see `ImageFileSource.parts`."""
        folder, record = sample
        if isinstance(record, list) and record and isinstance(record[0], tuple):
            return mint(record)
        content = parse_record(record)
        match content:
            case {"text_list": list()}:
                return mmc4(content, folder)
            case dict() if content.get("parts") is None or self._keys[1] in content:
                return obelics(content, folder, *self._keys)
        files = [
            value if modality == "text" else as_image_file(value, folder)
            for modality, value in parse_parts(content)
        ]
        return [file for file in files if file is not None]


def is_part(value: Any) -> bool:
    """Return whether a value is a part of a document: a text or an image."""
    return isinstance(value, str) or isinstance(value, dict) and set(value) in PARTS


PARTS = ({"text"}, {"image"})


def parse_parts(content: Any) -> list[tuple[str, Any]]:
    """Parse the parts of a line: ("text", the text) or ("image", path or content of the image).

    Raises:
        BadSample: the content has no parts, or one is neither text nor image.
    """
    parts = content.get("parts") if isinstance(content, dict) else content
    if not isinstance(parts, list):
        raise BadSample('line without "parts"')
    return [_parse_part(part) for part in parts if not _is_nothing(part)]


def _is_nothing(part: Any) -> bool:
    """Return whether a part stands for a missing one: null, or only empty values."""
    if isinstance(part, dict) and "image" in part or part == {"text": None}:
        return not any(part.get(key) for key in ("text", "image"))
    return part is None


def _parse_part(part: str | dict[str, Any]) -> tuple[str, Any]:
    match part:
        case str() as text:
            return "text", text
        case {"image": file, "text": str() as text} if file and text:
            raise BadSample("part that is both text and image")
        case {"text": str() as text} if text or not part.get("image"):
            return "text", text
        case {"image": str() | bytes() | dict() as file}:
            return "image", file
    raise BadSample("part that is neither text nor image")


def obelics(
    row: dict[str, Any], folder: Path, images_key: str = "images", texts_key: str = "texts"
) -> Parts:
    """Parse a document of OBELICS: lists `images` and `texts` of equal length.

    At each index at most one of the lists has an entry, and the other has None or "". An image is
    the content of a file, {"bytes": ...}, a path, or a URL. The image of a URL is the file whose
    name is the SHA-256 of the URL, in 64 hexadecimal digits without extension.
    """
    images, texts = row.get(images_key), row.get(texts_key)
    if not isinstance(images, list) or not isinstance(texts, list):
        wanted = ("parts", texts_key, images_key, "text_list")
        raise BadSample(missing("parts", row, wanted, OPTIONS))
    if len(images) != len(texts):
        raise BadSample("document whose images and texts differ in length")
    parts: Parts = []
    for image, text in zip(images, texts, strict=True):
        if isinstance(image, str) and "://" in image:
            image = hashlib.sha256(image.encode("utf-8", "replace")).hexdigest()
        file = as_image_file(image, folder)
        has_text = isinstance(text, str) and text != ""
        if file is not None and has_text:
            raise BadSample("document entry that is both text and image")
        if file is not None:
            parts.append(OptionalImage(file))
        elif has_text:
            parts.append(text)
        elif image or text not in (None, ""):
            raise BadSample("document entry that is neither text nor image")
    if not parts:
        raise BadSample("document without text and images")
    return parts


def mmc4(record: dict[str, Any], folder: Path) -> Parts:
    """Parse a document of MMC4: each image goes before the sentence that it matches best.

    An image without a name was not downloaded, and is left out.
    """
    try:
        before: dict[int, Parts] = {}
        for image in record["image_info"] or []:
            if not image["image_name"]:
                continue
            file = OptionalImage(image_path(image["image_name"], folder))
            before.setdefault(image["matched_text_index"], []).append(file)
        parts: Parts = []
        for number, sentence in enumerate(record["text_list"]):
            parts += [*before.pop(number, []), *([sentence + " "] if sentence else [])]
    except (KeyError, TypeError) as error:
        raise BadSample("document that is not in MMC4's layout") from error
    if before:
        raise BadSample("image that matches no sentence")
    return parts


def mint(members: list[tuple[str, bytes]]) -> Parts:
    """Parse a document of MINT-1T: .json as in OBELICS, and .tiff with a page for each image."""
    found = by_extension(members)
    record = parse_object(found.get("json", b""))
    tiff = found.get("tiff") or found.get("tif")
    pages = iter(_pages(tiff) if tiff else [])
    images = record.get("images")
    names = images if isinstance(images, list) else []
    files = [next(pages, b"") if name else None for name in names]
    if b"" in files or next(pages, None) is not None:
        raise BadSample("document with a wrong number of TIFF pages")
    return obelics({**record, "images": files}, Path())


def _pages(tiff: bytes) -> list[bytes]:
    """Convert the pages of a TIFF to PNG files."""
    files, num_bytes = [], 0
    try:
        opened = Image.open(io.BytesIO(tiff), formats=("TIFF",))
        with warnings.catch_warnings(action="ignore"), opened as pages:
            for page in ImageSequence.Iterator(pages):
                if page.width * page.height > Image.MAX_IMAGE_PIXELS:  # Pillow checks the first
                    raise BadSample(f"image of more than {Image.MAX_IMAGE_PIXELS:,} pixels")
                check_memory(page)
                files.append(io.BytesIO())
                to_rgb(page).save(files[-1], "PNG", compress_level=1)
                num_bytes += files[-1].tell()
                if num_bytes > MAX_BYTES:
                    raise BadSample(f"document with images of more than {MAX_BYTES:,} bytes")
    except BadSample:
        raise
    except Exception as error:  # Pillow raises errors of many types for damaged files
        raise BadSample("damaged image") from error
    return [file.getvalue() for file in files]
