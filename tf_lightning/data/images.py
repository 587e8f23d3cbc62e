"""Load image files as RGB, and convert RGB to and from tensors.

Shapes: H x W pixels.
"""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tf_lightning.data.documents import BadSample

# Position of the square crop along the longer side, from 0 (left or top) to 1 (right or bottom).
CENTER = 0.5
CROP_POSITIONS = CENTER, 0.0, 1.0


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


def load_image(file: bytes | Path, image_size: int, crop: float = CENTER) -> Image.Image:
    """Load an image file as an RGB image of image_size x image_size pixels (Transfusion Sec. 4.1).

    The largest square is cropped and resized with a bicubic filter. The EXIF orientation is
    applied, transparent pixels become white, and an animation becomes its first frame. `file` is
    kept in `info["file"]` of the result.

    Args:
        file: content or path of the file.
        image_size: side of the result in pixels.
        crop: position of the square along the longer side, from 0 to 1.

    Raises:
        BadSample: the file is missing, damaged, not an image, or has too many pixels.
    """
    if isinstance(file, Path) and not file.is_file():  # opening a named pipe would block
        raise BadSample("missing image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(file) if isinstance(file, bytes) else file)
        ImageOps.exif_transpose(image, in_place=True)
        image = to_rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadSample(f"image of more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise BadSample("undecodable image") from error
    except Exception as error:  # Pillow raises errors of many types for damaged files
        fault = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise BadSample(f"{fault} image") from error
    size = image_size, image_size
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BICUBIC, centering=(crop, crop))
    image.info["file"] = file  # unlike other attributes, info survives pickling
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, on a white background."""
    if image.mode.startswith("I"):  # 16-bit gray: convert() would clip it at 255
        gray = (np.asarray(image) // 256).clip(0, 255).astype(np.uint8)
        return Image.fromarray(gray).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def to_pixels(image: Image.Image) -> Tensor:
    """Convert an image to a float tensor (3, H, W) in [-1, 1]."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """Convert a tensor (3, H, W) in [-1, 1] to an RGB image; values outside are clamped."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())
