"""Storage format of the images of a corpus."""

from dataclasses import dataclass

import numpy as np

from tf_lightning.errors import UserError

# Data types in the file and in memory.
STORED_LATENTS, STORED_CODES = (np.float16, np.float32), (np.uint32, np.int64)


@dataclass(frozen=True)
class ImageStorageSpec:
    """The form in which a corpus stores each image.

    Attributes:
        hflip: also store a horizontally flipped copy; training draws one of the two.
        moments: store mean and standard deviation of the posterior, for training on samples.
        lazy: store only the position of the image file, which is read when the image is needed.
        crops: number of crops in {1, 2, 3}: the center, then the ends of the side that is cropped.
        max_aspect_ratio: longer side of an image divided by the shorter at most; 1: all images have
            one size.
    """

    hflip: bool = False
    moments: bool = False
    lazy: bool = False
    crops: int = 1
    max_aspect_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.crops not in (1, 2, 3):
            raise UserError(
                f"crops={self.crops} must be 1 (the center), 2 or 3 (also the ends of the longer "
                "side)"
            )

    @classmethod
    def from_json(cls, values: dict) -> "ImageStorageSpec":
        """Read what `to_json` wrote."""
        names = {"mirrored": "hflip", "in_place": "lazy"}
        return cls(**{names.get(name, name): value for name, value in values.items()})

    def to_json(self) -> dict:
        """Convert to the keys of corpus.json; they are part of the corpus's hash."""
        values = {
            "mirrored": self.hflip,
            "moments": self.moments,
            "in_place": self.lazy,
            "crops": self.crops,
        }
        # Corpora of images of one size have the same hash as in older versions.
        return values | ({"max_aspect_ratio": self.max_aspect_ratio} if self.has_shapes else {})

    @property
    def has_shapes(self) -> bool:
        """Whether images may differ in shape, so that the shape of each is stored."""
        return self.max_aspect_ratio > 1

    @property
    def shape(self) -> tuple[int, int]:
        """Number of views and of stored statistics of an image, (V, S)."""
        return (1 + self.hflip) * self.crops, 1 + self.moments

    def draw_view(self, random: np.random.Generator | None) -> tuple[int, int]:
        """Draw whether to flip (0 or 1) and the number of the crop; (0, 0) without generator."""
        if random is None:
            return 0, 0
        flipped = int(self.hflip and random.random() < 0.5)
        return flipped, int(random.integers(self.crops)) if self.crops > 1 else 0


def draw_latents(stored: np.ndarray, random: np.random.Generator | None) -> np.ndarray:
    """Sample latents (C, h, w) from stored moments (2, C, h, w).

    Without a generator or a standard deviation, (1, C, h, w), the mean is returned.
    """
    mean, *std = stored
    if random is None or not std:
        return mean
    return mean + std[0] * random.standard_normal(mean.shape, dtype=np.float32)
