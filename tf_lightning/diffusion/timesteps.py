"""Noise levels of a row's images, drawn from the randomness that is the row's own."""

import torch
from torch import Tensor


def row_generator(seed: int, row_id: int) -> torch.Generator:
    """Randomness that belongs to one row, whichever rank, worker or run meets it."""
    mixed = (seed * 0x9E3779B97F4A7C15 + row_id * 0xBF58476D1CE4E5B9 + 1) % 2**63
    return torch.Generator().manual_seed(mixed)


def shifted(t, shift: float):
    """Noise levels t in [0, 1], nearer pure noise where shift > 1 (Stable Diffusion 3 Eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def sample_timesteps(
    limits: list[float],
    generator: torch.Generator,
    shift: float = 1.0,
    distribution: str = "uniform",
) -> Tensor:
    """Noise levels (len(limits),), image k below limits[k], evenly spread over the row.

    One offset moves an even grid (Variational Diffusion Models, Sec. I.1): each u is uniform, and
    the row's mean loss varies less than with independent draws. "logit_normal" makes of each the
    sigmoid of a standard normal number (Stable Diffusion 3, Sec. 3.1). Then t is `shifted`: more
    than 1 spends more of the training near pure noise, 1 changes nothing.
    Images with a limit are there to be read, clean when it counts: theirs are uniform always.
    """
    count = len(limits)
    grid = torch.randperm(count, generator=generator) + torch.rand(1, generator=generator)
    uniform, limit = grid / max(count, 1), torch.tensor(limits)
    share = torch.special.ndtri(uniform).sigmoid() if distribution == "logit_normal" else uniform
    t = torch.where(limit < 1, uniform, shifted(share, shift))
    return t.clamp(max=1 - 2**-24) * limit  # 63 + 0.9999999 is 64 in fp32
