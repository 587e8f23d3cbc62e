"""Documents of text and images in any order: our JSON lines, OBELICS, MMC4 and MINT-1T.

The images of OBELICS, MMC4 and MINT-1T are downloaded separately, and some of them are always
missing. A missing or damaged image is left out of its document and counted.
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
from tf_lightning.data.readers.files import ImagePathSource, OptionalImage, as_image_file
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


class InterleavedFiles(ImagePathSource):
    """Interleaved documents: a line of .jsonl (also .gz, .zst), a row of .parquet or a key of .tar.

    A line of .jsonl is {"parts": ["a text", {"text": "another"}, {"image": "a/b.png"}]}, that list
    itself, a document of MMC4 (`text_list`, `image_info`), or a document of OBELICS (`images`,
    `texts`). A .parquet file has the columns of OBELICS. A .tar has the files of MINT-1T (.json and
    .tiff). Missing images of MMC4, OBELICS and MINT-1T are left out of their documents and counted.

    Args:
        images: folder that paths of images are relative to; null: the folder of the file that
            contains the path. The image of a URL of OBELICS is in it under the URL's SHA-256.
    """

    def samples(self, file: Path) -> Iterator[tuple[str, tuple[Path, Any]]]:
        """Yield the folder of the images with each line, row or key; see `FileSource.samples`."""
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
            yield str(key), (self.image_folder(file), record)

    def parts(self, sample: tuple[Path, Any]) -> list[str | Path | OptionalImage]:
        """List texts and images in order; see `ImageFileSource.parts`."""
        folder, record = sample
        if isinstance(record, list):
            return mint(record)
        content = parse_json(record) if isinstance(record, bytes) else record
        match content:
            case {"text_list": _}:
                return mmc4(content, folder)
            case {"texts": _}:
                return obelics(content, folder)
        return [
            value if modality == "text" else folder / value
            for modality, value in parse_parts(content)
        ]


def parse_parts(content: Any) -> list[tuple[str, str]]:
    """Parse the parts of a line: ("text", the text) or ("image", the path of the image).

    Raises:
        BadSample: the content has no parts, or one is neither text nor image.
    """
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


def obelics(row: dict[str, Any], folder: Path) -> Parts:
    """Parse a document of OBELICS: lists `images` and `texts` of equal length.

    At each index one of the lists has an entry and the other has None. An image is the content of a
    file, {"bytes": ...}, a path, or a URL. The image of a URL is the file whose name is the SHA-256
    of the URL, in 64 hexadecimal digits without extension.
    """
    images, texts = row.get("images"), row.get("texts")
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise BadSample("document whose images and texts differ in length")
    parts: Parts = []
    for image, text in zip(images, texts, strict=True):
        if isinstance(image, str) and "://" in image:
            image = hashlib.sha256(image.encode("utf-8", "replace")).hexdigest()
        file = as_image_file(image, folder)
        if (file is None) == (not isinstance(text, str)):
            raise BadSample("document entry that is not either text or image")
        parts.append(text if file is None else OptionalImage(file))
    return parts


def mmc4(record: dict[str, Any], folder: Path) -> Parts:
    """Parse a document of MMC4: each image goes before the sentence that it matches best."""
    try:
        before: dict[int, Parts] = {}
        for image in record["image_info"]:
            file = OptionalImage(folder / image["image_name"])
            before.setdefault(image["matched_text_index"], []).append(file)
        parts: Parts = []
        for number, sentence in enumerate(record["text_list"]):
            parts += [*before.pop(number, []), sentence + " "]
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
    files = [name if name is None else next(pages, b"") for name in names]
    if b"" in files or next(pages, None) is not None:
        raise BadSample("document with a wrong number of TIFF pages")
    return obelics({**record, "images": files}, Path())


def _pages(tiff: bytes) -> list[bytes]:
    """Convert the pages of a TIFF to PNG files."""
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
    except Exception as error:  # Pillow raises errors of many types for damaged files
        raise BadSample("damaged image") from error
    return [file.getvalue() for file in files]
