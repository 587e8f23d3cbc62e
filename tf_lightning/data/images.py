"""Load image files as RGB, and convert RGB to and from tensors.

Shapes: H x W pixels.
"""

import math
import os
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tf_lightning.data.buckets import Size, nearest_size
from tf_lightning.data.documents import BadSample

# Position of the crop along the side that is cropped, from 0 (left or top) to 1 (right or bottom).
CENTER = 0.5
CROP_POSITIONS = CENTER, 0.0, 1.0

CONTEXT = "context"  # key in an image's `info`: the image is read but never generated

# The formats that are opened. Pillow knows more, but some start other programs (EPS: Ghostscript)
# and the decoders of others are hardly tested against hostile files (PSD, BLP, FLI).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
IMAGE_MAGIC = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
    b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51",
)  # fmt: skip
# First bytes of files that are often met in place of an image.
OTHER_MAGIC = {
    b"8BPS": "PSD", b"%!PS": "EPS", b"\xc5\xd0\xd3\xc6": "EPS", b"%PDF": "PDF", b"<svg": "SVG",
    b"<!DOCTYPE html": "HTML", b"<html": "HTML", b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"PK\x03\x04": "ZIP", b"\x1a\x45\xdf\xa3": "video", b"BLP": "BLP", b"v/1\x01": "OpenEXR",
    b"DDS ": "DDS", b"\0\0\1\0": "ICO", b"{": "JSON", b"<?xml": "XML", b"#?RADIANCE": "HDR",
    b"version https://git-lfs": "a Git LFS pointer", b"\x93NUMPY": "NumPy", b"\x1f\x8b": "gzip",
}  # fmt: skip
MAX_BYTES = 2**29  # memory for the pixels of one image while it is converted
BYTES_PER_PIXEL = 4  # Pillow stores RGB like RGBA
# Bytes per pixel that decoders take at most, the result included, where they take more.
DECODER_BYTES = {"JPEG2000": 20, "WEBP": 17, "AVIF": 12, "TIFF": 8, "progressive JPEG": 11}

# The values of white in grayscale images of 32 bits: 8 to 16 bits, and the largest integers.
WHITES = *(2.0**bits - 1 for bits in (8, 10, 12, 14, 16)), 2.0**31 - 1, 2.0**32 - 1
OVERSHOOT = 1.5  # floats in [0, 1] may exceed 1 after resampling

TURNS = {  # EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class FileBytes(bytes):
    """Bytes of an image file, with the path and the offset they were read from."""

    def __new__(cls, content: bytes, path: Path, offset: int) -> "FileBytes":
        """Attach `path` and `offset` to the bytes."""
        file = super().__new__(cls, content)
        file.path, file.offset = path, offset
        return file

    def __getnewargs__(self) -> tuple[bytes, Path, int]:
        """Return the arguments that pickle passes to `__new__`."""
        return bytes(self), self.path, self.offset


def byte_range(file: bytes | Path) -> tuple[str, int, int] | None:
    """Return path, offset and number of bytes of an image file; None for plain bytes."""
    if isinstance(file, Path):
        return str(file.absolute()), 0, file.stat().st_size
    if isinstance(file, FileBytes):
        return str(file.path.absolute()), file.offset, len(file)
    return None


def is_image_file(start: bytes) -> bool:
    """Return whether a file has one of FORMATS, by its first bytes."""
    if start[:4] == b"RIFF":
        return start[8:12] == b"WEBP"
    if start[4:8] == b"ftyp":
        return start[8:12] in (b"avif", b"avis")
    return start.startswith(IMAGE_MAGIC) or (start[:1] == b"P" and start[1:3] in PPM_MAGIC)


PPM_MAGIC = {kind + space for kind in (b"2", b"3", b"5", b"6") for space in (b"\n", b" ", b"\r")}


def load_image(
    file: bytes | Path, image_size: int | Sequence[Size], crop: float = CENTER
) -> Image.Image:
    """Load an image file as an RGB image of a given size (Transfusion Sec. 4.1).

    The largest part with the size's aspect ratio is cropped and resized with a bicubic filter. The
    EXIF orientation is applied, transparent pixels become white, and an animation becomes its first
    frame. `file` is kept in `info["file"]` of the result.

    Args:
        file: content or path of the file, in one of FORMATS.
        image_size: side of a square in pixels; or the sizes (width, height) to choose from, of
            which the result has the one nearest to the image's aspect ratio.
        crop: position of the crop along the side that is cropped, from 0 to 1.

    Raises:
        BadSample: the file is missing, damaged, not an image of FORMATS, has too many pixels, or
            its values have no known range.
    """
    # Opening a named pipe would block. Unlike Path.is_file, this raises no error for a long name.
    if isinstance(file, Path) and not os.path.isfile(file):
        raise BadSample("missing image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
        check_memory(image)
        image.load()
        image = to_rgb(upright(image))
    except BadSample:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadSample(f"image of more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise BadSample(_not_an_image(file)) from error
    except PermissionError as error:
        raise BadSample("image that may not be read") from error
    except Exception as error:  # Pillow raises errors of many types for damaged files
        fault = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise BadSample(f"{fault} image") from error
    sizes = [(image_size, image_size)] if isinstance(image_size, int) else image_size
    size = nearest_size(image.size, sizes)
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BICUBIC, centering=(crop, crop))
    image.info["file"] = file  # unlike other attributes, info survives pickling
    return image


def check_memory(image: Image.Image) -> None:
    """Raise BadSample if converting an image takes more than MAX_BYTES; reads only its header."""
    copies = 1 if image.mode in ("L", "RGB") and not image.has_transparency_data else 3
    kind = "progressive JPEG" if image.info.get("progressive") else image.format
    limit = MAX_BYTES // max(BYTES_PER_PIXEL * copies, DECODER_BYTES.get(kind, 0))
    if image.width * image.height > limit:
        raise BadSample(f"{kind} image of mode {image.mode} with more than {limit:,} pixels")


def _not_an_image(file: bytes | Path) -> str:
    """Return the reason why no format of FORMATS was recognized."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            file = opened.read(64)
    if not file:
        return "empty image file"
    start = file[:64].lstrip(b" \t\r\n\xef\xbb\xbf")
    if start[4:8] == b"ftyp":
        kind = "HEIC" if start[8:10] in (b"he", b"mi", b"ms") else "video"
        return f"image file that is {kind}, not one of {', '.join(FORMATS)}"
    for magic, kind in OTHER_MAGIC.items():
        if start.startswith(magic):
            return f"image file that is {kind}, not one of {', '.join(FORMATS)}"
    return "undecodable image"


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation.

    Unlike `ImageOps.exif_transpose`, this writes no other tags back, since tags that Pillow cannot
    write would cost the image.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about other tags
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        turn = TURNS.get(orientation)
    except Exception:  # damaged tags: the pixels are good
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, on a white background.

    Raises:
        BadSample: the values of a grayscale image have no known range, or the mode has no RGB.
    """
    if image.mode.startswith("I") or image.mode == "F":  # convert() would clip at 255
        image = Image.fromarray(gray_values(np.asarray(image)))
    if image.mode == "La":  # premultiplied; convert() knows no other way to RGBA
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image.load()
    if image.mode == "LAB":
        raise BadSample("image of mode LAB; convert it to RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def gray_values(values: np.ndarray) -> np.ndarray:
    """Scale grayscale values of 16 or 32 bits to uint8, (H, W).

    Files do not say which value is white. For unsigned 16-bit integers it is 65,535, or 255 if no
    value is larger. For others it is the smallest of WHITES that no value exceeds; floats up to
    OVERSHOOT count as 1.

    Raises:
        BadSample: a value is negative, NaN or above all of WHITES.
    """
    if values.dtype.itemsize == 2:
        return (values // (1 if values.max() <= 255 else 256)).astype(np.uint8)
    is_float = values.dtype.kind == "f"
    low, high = float(values.min()), float(values.max())
    white = next((white for white in WHITES if high <= white), math.nan)
    white = 1.0 if is_float and high <= OVERSHOOT else white
    if not low >= (-0.01 * white if is_float else 0):  # also if either is NaN
        raise BadSample(f"{'float' if is_float else 'integer'} image with values of unknown range")
    return (values * (255 / white) + 0.5).clip(0, 255).astype(np.uint8)


def to_pixels(image: Image.Image) -> Tensor:
    """Convert an image to a float tensor (3, H, W) in [-1, 1]."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """Convert a tensor (3, H, W) in [-1, 1] to an RGB image; values outside are clamped."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())
