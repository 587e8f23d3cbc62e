"""A picture file of any kind made into an RGB picture of the model's size (Transfusion 4.1)."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tf_lightning.data.corpus import BadSample


def load_picture(file: bytes | Path, image_size: int) -> Image.Image:
    """An RGB picture of image_size x image_size pixels: the middle square, resized bicubically.

    Grey, palette and CMYK become RGB, transparency white, an animation its first frame; a camera's
    orientation is applied. Every picture that a model sees comes through here.

    Raises:
        BadSample: the file is no picture, is damaged, or is too large to be honest.
    """
    if isinstance(file, Path) and not file.is_file():  # a pipe would be waited for
        raise BadSample("missing picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(file) if isinstance(file, bytes) else file)
        image = to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadSample(f"picture of more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise BadSample("undecodable picture") from error
    except Exception as error:  # Pillow's readers raise of many kinds on damaged files
        fault = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise BadSample(f"{fault} picture") from error
    return ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode, on white where it is transparent."""
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        grey = (np.asarray(image) // 256).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
