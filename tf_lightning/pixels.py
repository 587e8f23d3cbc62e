"""Pictures as the model sees them, and back.

Shapes: H x W pixels.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pixels(picture: Image.Image) -> Tensor:
    """A picture as (3, H, W) in [-1, 1]."""
    array = np.asarray(picture.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


def to_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] as a picture."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())
