"""Forward processes of the image half, and what a denoiser may predict (Transfusion Sec. 2.2).

x_t = alpha_t x_0 + sigma_t eps, at an image's noise level t in [0, 1), 0 = clean:
    DDPM            alpha_t = sqrt(alpha_bar), sigma_t = sqrt(1 - alpha_bar), alpha_bar of timestep
                    floor(t * num_train_timesteps)
    rectified flow  alpha_t = 1 - t, sigma_t = t (Rectified Flow Eq. 1, its time reversed)

Shapes: M images, C x h x w latents; alpha_t and sigma_t are (M, 1, 1, 1).
"""

import math

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")
NOISE_SCHEDULES = ("cosine", "linear")


def cosine_betas(num_train_timesteps: int = 1000) -> Tensor:
    """beta_t of the cosine schedule, (num_train_timesteps,) fp64 (iDDPM Eq. 17)."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = range(num_train_timesteps)
    ratio = [
        alpha_bar((i + 1) / num_train_timesteps) / alpha_bar(i / num_train_timesteps) for i in steps
    ]
    return torch.tensor([min(1 - r, 0.999) for r in ratio], dtype=torch.float64)


def linear_betas(num_train_timesteps: int = 1000) -> Tensor:
    """beta_t from 1e-4 to 0.02, (num_train_timesteps,) fp64 (DDPM Sec. 4)."""
    return torch.linspace(1e-4, 0.02, num_train_timesteps, dtype=torch.float64)


def alphas_cumprod(betas: Tensor) -> Tensor:
    """alpha_bar_t = prod (1 - beta_s), s <= t, (num_train_timesteps,) fp32 (DDPM Eq. 4)."""
    return (1 - betas).cumprod(0).float()


def cosine_alphas_cumprod(num_train_timesteps: int = 1000) -> Tensor:
    """alpha_bar_t of the cosine schedule, (num_train_timesteps,) fp32."""
    return alphas_cumprod(cosine_betas(num_train_timesteps))


def add_noise(latents: Tensor, noise: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t eps; latents and noise (M, C, h, w)."""
    return alpha_t * latents + sigma_t * noise


def velocity(latents: Tensor, noise: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """v = alpha_t eps - sigma_t x_0 (Progressive Distillation, App. D)."""
    return alpha_t * noise - sigma_t * latents


def flow_velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """dx_t / dt = eps - x_0, the same all the way (Rectified Flow Eq. 1)."""
    return noise - latents


def epsilon_from_x_0(x_t: Tensor, x_0: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Eps = (x_t - alpha_t x_0) / sigma_t, for sigma_t > 0."""
    return (x_t - alpha_t * x_0) / sigma_t


def x_0_from_epsilon(x_t: Tensor, epsilon: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """x_0 = (x_t - sigma_t eps) / alpha_t, for alpha_t > 0."""
    return (x_t - sigma_t * epsilon) / alpha_t


def x_0_from_v(x_t: Tensor, v: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """x_0 = alpha_t x_t - sigma_t v, where alpha_t^2 + sigma_t^2 = 1 (DDPM)."""
    return alpha_t * x_t - sigma_t * v


def x_0_from_flow(x_t: Tensor, flow: Tensor, sigma_t: Tensor) -> Tensor:
    """x_0 = x_t - sigma_t (eps - x_0), where alpha_t + sigma_t = 1 (rectified flow)."""
    return x_t - sigma_t * flow


def diffusion_target(
    latents: Tensor, noise: Tensor, alpha_t: Tensor, sigma_t: Tensor, prediction_type: str
) -> Tensor:
    """What the network has to output at x_t, (M, C, h, w)."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return velocity(latents, noise, alpha_t, sigma_t)
    return flow_velocity(latents, noise)


def predicted_x_0(
    x_t: Tensor, output: Tensor, alpha_t: Tensor, sigma_t: Tensor, prediction_type: str
) -> Tensor:
    """The clean latents that a network's output at x_t stands for, (M, C, h, w)."""
    if prediction_type == "epsilon":
        return x_0_from_epsilon(x_t, output, alpha_t, sigma_t)
    if prediction_type == "v_prediction":
        return x_0_from_v(x_t, output, alpha_t, sigma_t)
    return x_0_from_flow(x_t, output, sigma_t)


def min_snr_weight(alpha_t: Tensor, sigma_t: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weight of an image's squared error (Min-SNR Sec. 3.4), like alpha_t.

    The error in x_0 counts min(SNR, gamma), SNR = alpha_t^2 / sigma_t^2. One unit of error of the
    output is sigma_t / alpha_t of x_0 for epsilon, sigma_t for v and for the flow, so the weights
    are min(SNR, gamma) / SNR, min(SNR, gamma) / (SNR + 1) and min(SNR, gamma) sigma_t^2.
    """
    error = sigma_t / alpha_t if prediction_type == "epsilon" else sigma_t
    return (alpha_t / sigma_t).square().clamp(max=gamma) * error.square()
