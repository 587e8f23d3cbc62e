"""Mean and standard deviation of latents, and the check that diffusion can use them.

Noise levels are shares of the variance of latents plus noise, so they are right only for latents
of about unit variance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from tf_lightning.errors import UserError

LOWEST_STD, HIGHEST_STD = 0.5, 2.0
# Fewer images, or images of about one colour, say little about the variance of latents.
MIN_IMAGES, MIN_PIXEL_STD = 48, 0.1
MAX_LATENT = 1000.0  # far above any latent of unit variance, far below float16's largest number


@dataclass
class Moments:
    """Running sums of values, over all but the channels.

    Attributes:
        num_values: values of each channel.
        total: their sum, (C,) float64.
        squares: the sum of their squares, (C,) float64.
    """

    num_values: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    @classmethod
    def merge(cls, recorded: list[dict]) -> "Moments":
        """Add up what `to_json` wrote."""
        counts = torch.tensor([part["count"] for part in recorded])
        mean, std = (
            torch.tensor([part[name] for part in recorded], dtype=torch.float64)
            for name in ("mean", "std")
        )
        count = counts.unsqueeze(1)
        squares = (count * (std.square() + mean.square())).sum(0)
        return cls(int(counts.sum()), (count * mean).sum(0), squares)

    def to_json(self) -> dict:
        """Return the count, and the mean and the standard deviation of each channel."""
        return {"count": self.num_values, "mean": self.mean.tolist(), "std": self.std.tolist()}

    def update(self, values: Tensor) -> None:
        """Add values (B, C, h, w)."""
        values = values.cpu().double().transpose(0, 1).flatten(1)
        self.num_values += values.shape[1]
        self.total = self.total + values.sum(1)
        self.squares = self.squares + values.square().sum(1)

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, (C,)."""
        return self.total / self.num_values

    @property
    def std(self) -> Tensor:
        """Standard deviation of each channel, (C,)."""
        return (self.squares / self.num_values - self.mean.square()).clamp(min=0).sqrt()

    @property
    def overall_std(self) -> float:
        """Standard deviation of the values of all channels together."""
        mean, square = self.mean.mean(), self.squares.mean() / self.num_values
        return math.sqrt(max(0.0, float(square - mean.square())))


def check_std(latents: Moments, pixels: Moments, num_images: int, warn: bool = True) -> None:
    """Refuse latents that are not of about unit variance; warn where there are too few to judge.

    Args:
        latents: of the normalized latents.
        pixels: of the images in [-1, 1].
        num_images: number of images.
        warn: warn if the latents are too few to be refused.

    Raises:
        UserError: the standard deviation is not from LOWEST_STD to HIGHEST_STD.
    """
    std = latents.overall_std
    if LOWEST_STD <= std <= HIGHEST_STD:
        return
    message = (
        f"the autoencoder's latents of {num_images:,} images have standard deviation {std:.3g}, "
        f"but diffusion needs about 1 (from {LOWEST_STD} to {HIGHEST_STD}); multiply "
        f"scaling_factor in the autoencoder's config.json by {1 / max(std, 1e-9):.3g}, or give it "
        "the latents_mean and latents_std of its training images"
    )
    alike = std < LOWEST_STD and pixels.overall_std < MIN_PIXEL_STD
    if num_images >= MIN_IMAGES and not alike:
        raise UserError(message)
    if warn:
        reason = "have nearly one color" if alike else f"are fewer than {MIN_IMAGES}"
        rank_zero_warn(f"{message} (this is not refused because the images {reason})")


def check_latents(latents: Tensor, image_name: Callable[[int], str]) -> None:
    """Refuse latents that are not finite or absurdly large.

    Args:
        latents: normalized latents, with the images as first dimension.
        image_name: returns the name of image i in the message.

    Raises:
        UserError: an image has such a latent.
    """
    largest = latents.abs().flatten(1).amax(1)  # NaN stays NaN
    wrong = (~(largest <= MAX_LATENT)).nonzero().flatten().tolist()
    if wrong:
        raise UserError(
            f"the latents of {image_name(wrong[0])} reach {float(largest[wrong[0]]):.3g}, but "
            f"latents of unit variance stay below {MAX_LATENT:,.0f}; check latents_std and "
            "scaling_factor in the autoencoder's config.json"
        )
