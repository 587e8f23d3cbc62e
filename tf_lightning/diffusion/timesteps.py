"""Noise levels of the images in a row, drawn from a random generator that belongs to the row."""

import torch
from torch import Tensor


def row_generator(seed: int, row_id: int) -> torch.Generator:
    """Build the random generator of a row: the same on every rank, worker and resumed run."""
    mixed = (seed * 0x9E3779B97F4A7C15 + row_id * 0xBF58476D1CE4E5B9 + 1) % 2**63
    return torch.Generator().manual_seed(mixed)


def shift_timesteps(t, shift: float):
    """Move noise levels towards pure noise if shift > 1 (Stable Diffusion 3 Eq. 23).

    Args:
        t: noise levels in [0, 1]: a number, an array or a tensor.
        shift: above 0; 1 changes nothing.
    """
    return shift * t / (1 + (shift - 1) * t)


def sample_timesteps(
    limits: list[list[float]],
    generator: torch.Generator,
    shift: float = 1.0,
    distribution: str = "uniform",
) -> Tensor:
    """Sample noise levels of the images in a row, (number of images,).

    Each level is uniform by itself. The images of a document are independent, because later ones
    are denoised given the earlier ones (Transfusion draws each t by itself). The first images of
    all documents are spread evenly over the row, as are the second ones, and so on: one random
    offset shifts an even grid (Variational Diffusion Models, Sec. I.1). So the mean loss of a row
    varies less than with independent samples.

    Images with a limit below 1 are read by a later part and are clean at generation, so their
    levels are always uniform and not shifted.

    Args:
        limits: for each document, the upper limit of each image's noise level, in (0, 1].
        generator: random generator of the row.
        shift: see `shift_timesteps`; 1 changes nothing.
        distribution: "uniform", or "logit_normal": the sigmoid of a standard normal number (Stable
            Diffusion 3, Sec. 3.1).
    """
    limit = torch.tensor([limit for document in limits for limit in document])
    place = torch.tensor([place for document in limits for place in range(len(document))])
    uniform = torch.empty_like(limit)
    for number in range(max(map(len, limits), default=0)):
        count = int((place == number).sum())
        grid = torch.randperm(count, generator=generator) + torch.rand(1, generator=generator)
        uniform[place == number] = grid / count
    level = torch.special.ndtri(uniform).sigmoid() if distribution == "logit_normal" else uniform
    t = torch.where(limit < 1, uniform, shift_timesteps(level, shift))
    return t.clamp(max=1 - 2**-24) * limit  # below 1 in fp32 too: 63 + 0.9999999 rounds to 64
