"""Forward process and targets of the image half (Transfusion Sec. 2.2).

t in [0, 1) is an image's noise level; DDPM's timestep is floor(t * num_train_timesteps), 0 = clean.

Shapes: M images, C x h x w latents.
"""

import math

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction")


def cosine_alphas_cumprod(num_train_timesteps: int = 1000) -> Tensor:
    """alpha_bar_t of the cosine schedule, (num_train_timesteps,) fp32 (iDDPM Eq. 17)."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = range(num_train_timesteps)
    ratio = [
        alpha_bar((i + 1) / num_train_timesteps) / alpha_bar(i / num_train_timesteps) for i in steps
    ]
    betas = torch.tensor([min(1 - r, 0.999) for r in ratio], dtype=torch.float64)
    return (1 - betas).cumprod(0).float()


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (DDPM Eq. 4); all (M, C, h, w)."""
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def velocity(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Progressive Distillation, App. D)."""
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents


def diffusion_target(
    latents: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str
) -> Tensor:
    """What the network has to output at x_t, (M, C, h, w)."""
    return noise if prediction_type == "epsilon" else velocity(latents, noise, alpha_bar)
