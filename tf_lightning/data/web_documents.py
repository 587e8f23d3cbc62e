"""Documents of web pages and of PDFs, text and pictures in turn: OBELICS, MMC4, MINT-1T.

Their pictures come from elsewhere and some are always missing: a document does without those.
"""

import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence

from tf_lightning.data.caption_rows import as_picture
from tf_lightning.data.corpus import BadSample
from tf_lightning.data.files import Spare
from tf_lightning.data.images import to_rgb
from tf_lightning.data.records import parse_object
from tf_lightning.data.tars import by_extension

Parts = list[str | Spare]


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
        parts.append(text if picture is None else Spare(picture))
    return parts


def mmc4(record: dict[str, Any], folder: Path) -> Parts:
    """Sentences `text_list`; each of `image_info` stands before the sentence it matches best."""
    try:
        before: dict[int, Parts] = {}
        for image in record["image_info"]:
            picture = Spare(folder / image["image_name"])
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
                    raise BadSample(f"picture of more than {Image.MAX_IMAGE_PIXELS:,} pixels")
                files.append(io.BytesIO())
                to_rgb(page).save(files[-1], "PNG", compress_level=1)
    except BadSample:
        raise
    except Exception as error:  # Pillow's readers raise of many kinds on damaged files
        raise BadSample("damaged picture") from error
    return [file.getvalue() for file in files]
