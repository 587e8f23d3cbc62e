"""The learned variance of a DDPM step and its loss, the variational bound (iDDPM Sec. 3.1).

The network outputs 2 C channels: its prediction, and v in about [-1, 1]. v interpolates the
log-variance of each element between log beta_tilde (v = -1) and log beta (v = 1), which are the
lower and upper bounds of the true log-variance.

Shapes: M images, C latent channels, h x w latent grid, T timesteps. Tables are (T,), and their
entries for each image (M, 1, 1, 1).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

VLB_WEIGHT = 0.001  # lambda of L_simple + lambda L_vlb (iDDPM Eq. 16)
BIN = 2 / 255  # width of the bins in which the last step is scored: one gray level in [-1, 1]


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0), with mean x_0_weight x_0 + x_t_weight x_t (DDPM Eq. 6, 7)."""

    x_0_weight: Tensor
    x_t_weight: Tensor
    log_variance: Tensor  # log beta_tilde; at t = 0, where beta_tilde is 0, the value of t = 1
    log_beta: Tensor


def posterior_tables(betas: Tensor) -> Posterior:
    """Compute the posterior at every timestep, (T,) fp32 each, from betas (T,) fp64."""
    alphas_cumprod = (1 - betas).cumprod(0)
    previous = torch.cat([betas.new_ones(1), alphas_cumprod[:-1]])
    variance = betas * (1 - previous) / (1 - alphas_cumprod)
    variance = torch.cat([variance[1:2], variance[1:]])
    tables = (
        betas * previous.sqrt() / (1 - alphas_cumprod),
        (1 - betas).sqrt() * (1 - previous) / (1 - alphas_cumprod),
        variance.log(),
        betas.log(),
    )
    return Posterior(*(table.float() for table in tables))


def learned_log_variance(v: Tensor, at: Posterior) -> Tensor:
    """log Sigma = u log beta + (1 - u) log beta_tilde, u = (v + 1) / 2 (iDDPM Eq. 15)."""
    u = (v + 1) / 2
    return u * at.log_beta + (1 - u) * at.log_variance


def normal_kl(mean_p: Tensor, log_variance_p: Tensor, mean_q: Tensor, log_variance_q: Tensor):
    """KL(p || q) of two normal distributions in nats, elementwise."""
    difference = log_variance_p - log_variance_q
    distance = (mean_p - mean_q).square() * torch.exp(-log_variance_q)
    return 0.5 * (difference.exp() - difference - 1 + distance)


def bin_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the mass of a normal distribution in the bin around x in nats, elementwise.

    This is DDPM's decoder (Eq. 13) without its open outermost bins, because latents are unbounded.
    """
    scale = torch.exp(-0.5 * log_variance)
    upper, lower = (torch.special.ndtr((x - mean + side) * scale) for side in (BIN / 2, -BIN / 2))
    return -(upper - lower).clamp(min=1e-12).log()


def vlb_bits(
    x_0: Tensor, x_t: Tensor, x_0_prediction: Tensor, v: Tensor, at: Posterior, last: Tensor
) -> Tensor:
    """Term of the variational bound at each image's timestep, in bits per element, (M, C, h, w).

    Args:
        x_0: clean latents, (M, C, h, w).
        x_t: noised latents, (M, C, h, w).
        x_0_prediction: clean latents that the network predicts, (M, C, h, w). No gradient passes
            through them: this loss trains the variance only.
        v: the network's second C channels, (M, C, h, w).
        at: the posterior at each image's timestep.
        last: (M, 1, 1, 1), True at timestep 0, whose term is the negative log-likelihood.
    """
    mean, predicted = (
        at.x_0_weight * x + at.x_t_weight * x_t for x in (x_0, x_0_prediction.detach())
    )
    log_variance = learned_log_variance(v, at)
    kl = normal_kl(mean, at.log_variance, predicted, log_variance)
    return torch.where(last, bin_nll(x_0, predicted, log_variance), kl) / math.log(2)
