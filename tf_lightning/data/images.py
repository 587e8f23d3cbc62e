"""A picture file of any kind made into an RGB picture of the model's size (Transfusion 4.1).

Pictures as the model sees them, and back.

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

CENTER = 0.5  # of the longer side
CROP_POSITIONS = CENTER, 0.0, 1.0  # where squares are cut from a picture


class FileBytes(bytes):
    """The bytes of a picture's file, and where they lie: at `offset` of `path`."""

    def __new__(cls, content: bytes, path: Path, offset: int) -> "FileBytes":
        """Bytes that know their place."""
        stored = super().__new__(cls, content)
        stored.path, stored.offset = path, offset
        return stored

    def __getnewargs__(self) -> tuple[bytes, Path, int]:
        """For another process."""
        return bytes(self), self.path, self.offset


def byte_range(file: bytes | Path) -> tuple[str, int, int] | None:
    """File, first byte and number of bytes of a picture; None of bytes that know no place."""
    if isinstance(file, Path):
        return str(file.absolute()), 0, file.stat().st_size
    return (
        (str(file.path.absolute()), file.offset, len(file)) if isinstance(file, FileBytes) else None
    )


def load_image(file: bytes | Path, image_size: int, crop: float = CENTER) -> Image.Image:
    """An RGB picture of image_size x image_size pixels: the largest square, resized bicubically.

    Grey, palette and CMYK become RGB, transparency white, an animation its first frame; a camera's
    orientation is applied. Every picture that a model sees comes through here. Its file
    stays in `info`.

    Args:
        file: its bytes or its name.
        image_size: pixels.
        crop: where along the longer side the square lies, from 0 to 1.

    Raises:
        BadSample: the file is no picture, is damaged, or is too large to be honest.
    """
    if isinstance(file, Path) and not file.is_file():  # a pipe would be waited for
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
    except Exception as error:  # Pillow's readers raise of many kinds on damaged files
        fault = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise BadSample(f"{fault} image") from error
    size = image_size, image_size
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BICUBIC, centering=(crop, crop))
    image.info["file"] = file  # of all attributes, the one that travels to another process
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode, on white where it is transparent."""
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        grey = (np.asarray(image) // 256).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def to_pixels(picture: Image.Image) -> Tensor:
    """A picture as (3, H, W) in [-1, 1]."""
    array = np.asarray(picture.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] as a picture."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())
