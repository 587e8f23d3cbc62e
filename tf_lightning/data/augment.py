"""Random changes of a training picture, so that a small set does not get learnt by heart.

Pictures are uint8 (H, W, 3).
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from tf_lightning.errors import UserError


@dataclass(frozen=True)
class Augment:
    """Which changes are made; the defaults are those of photographs.

    Attributes:
        flip: mirror left and right, half of the time.
        rotate: turn by 0, 90, 180 or 270 degrees.
        zoom: largest enlargement or reduction, >= 1; 1 = none. Its place is random too. What comes
            in from outside the picture repeats its edge.
        shuffle_colours: put red, green and blue in a random order.
    """

    flip: bool = True
    rotate: bool = False
    zoom: float = 1.0
    shuffle_colours: bool = False

    def __post_init__(self) -> None:
        if not self.zoom >= 1:
            raise UserError(f"zoom={self.zoom} must be 1 (none) or more; 1.4 is a good start")

    def __call__(self, picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A changed copy, of the same size."""
        if self.flip and random.random() < 0.5:
            picture = picture[:, ::-1]
        if self.rotate:
            picture = np.rot90(picture, random.integers(4))
        if self.zoom > 1:
            scale = self.zoom ** random.uniform(-1, 1)
            picture = zoomed(picture, scale, random.uniform(0, 1, size=2))
        if self.shuffle_colours:
            picture = picture[..., random.permutation(3)]
        return np.ascontiguousarray(picture)


def zoomed(picture: np.ndarray, scale: float, place: np.ndarray) -> np.ndarray:
    """A picture scaled by `scale` and cut or filled up to its size.

    Args:
        picture: uint8 (H, W, 3).
        scale: > 1 enlarges.
        place: where the window of H x W lies along the two free distances, (2,) in [0, 1].
    """
    height, width = picture.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    scaled = np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize(size, 3))  # bicubic
    missing = [max(0, a - b) for a, b in zip((height, width), scaled.shape, strict=False)]
    before = [round(float(p) * m) for p, m in zip(place, missing, strict=True)]
    pads = [(b, m - b) for b, m in zip(before, missing, strict=True)]
    scaled = np.pad(scaled, [*pads, (0, 0)], mode="edge")
    spare = [a - b for a, b in zip(scaled.shape, (height, width), strict=False)]
    top, left = (round(float(p) * s) for p, s in zip(place, spare, strict=True))
    return scaled[top : top + height, left : left + width]
