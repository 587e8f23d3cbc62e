"""Forward processes of the image half, and what a denoiser may predict (Transfusion Sec. 2.2).

x_t = alpha_t x_0 + sigma_t eps, at an image's noise level t in [0, 1), 0 = clean:
    DDPM            alpha_t = sqrt(alpha_bar), sigma_t = sqrt(1 - alpha_bar), alpha_bar of timestep
                    floor(t * num_train_timesteps)
    rectified flow  alpha_t = 1 - t, sigma_t = t (Rectified Flow Eq. 1, its time reversed)

Shapes: M images, C x h x w latents; alpha_t and sigma_t are (M, 1, 1, 1).

What the denoiser learns: its forward process, its target, and what an image's error weighs.

Shapes: M images, C x h x w latents.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tf_lightning.diffusion.learned_variance import (
    VLB_WEIGHT,
    Posterior,
    posterior_tables,
    vlb_bits,
)
from tf_lightning.errors import UserError

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


def diffusion_loss_sum(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error summed over latent elements, both (M, C, h, w) (Transfusion Eq. 3); fp32.

    `weight` (M, 1, 1, 1) is that of each image's error; None: 1.
    """
    if weight is None:
        return F.mse_loss(output.float(), target.float(), reduction="sum")
    return (weight * (output.float() - target.float()).square()).sum()


class Objective(nn.Module):
    """DDPM (epsilon or v) or rectified flow; a module only so that its tables move with the model.

    Args:
        prediction_type: "epsilon", "v_prediction" or "flow".
        noise_schedule: "cosine" or "linear", of DDPM; a flow has none.
        num_train_timesteps: steps of that schedule.
        learned_sigma: the network outputs 2 C channels, of which the second half learn the
            variance of a DDPM step.
        min_snr_gamma: weight images by min(SNR, gamma); None: all alike.
    """

    def __init__(
        self,
        prediction_type: str = "epsilon",
        noise_schedule: str = "cosine",
        num_train_timesteps: int = 1000,
        learned_sigma: bool = False,
        min_snr_gamma: float | None = None,
    ):
        super().__init__()
        check(prediction_type, noise_schedule, num_train_timesteps, learned_sigma, min_snr_gamma)
        self.prediction_type, self.min_snr_gamma = prediction_type, min_snr_gamma
        self.learned_sigma = learned_sigma
        betas = {"cosine": cosine_betas, "linear": linear_betas}[noise_schedule](
            num_train_timesteps
        )
        self.register_buffer("alphas_cumprod", alphas_cumprod(betas), persistent=False)
        self.register_buffer("posterior", torch.stack(posterior_tables(betas)), persistent=False)

    def timesteps(self, t: Tensor) -> Tensor:
        """DDPM's timesteps (M,) in {0..num_train_timesteps-1} of noise levels (M,) in [0, 1)."""
        return (t * len(self.alphas_cumprod)).long()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, (M, 1, 1, 1)."""
        if self.prediction_type == "flow":
            sigma_t = t.view(-1, 1, 1, 1)
            return 1 - sigma_t, sigma_t
        alpha_bar = self.alphas_cumprod[self.timesteps(t)].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def model_timesteps(self, t: Tensor) -> Tensor:
        """What the network is told of t (M,): a flow's t itself, or the share of DDPM's steps."""
        if self.prediction_type == "flow":
            return t
        return self.timesteps(t) / len(self.alphas_cumprod)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, (M, C, h, w)."""
        return add_noise(latents, noise, *self.coefficients(t))

    def loss_sum(self, output: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The loss of the network's output at x_t, summed over latent elements; fp32.

        Args:
            output: (M, C, h, w), or (M, 2 C, h, w) with a learned sigma.
            latents: x_0, (M, C, h, w).
            noise: eps, (M, C, h, w).
            t: noise levels, (M,).
        """
        alpha_t, sigma_t = self.coefficients(t)
        prediction, v = output.chunk(2, dim=1) if self.learned_sigma else (output, None)
        target = diffusion_target(latents, noise, alpha_t, sigma_t, self.prediction_type)
        weight = None
        if self.min_snr_gamma is not None:
            weight = min_snr_weight(alpha_t, sigma_t, self.min_snr_gamma, self.prediction_type)
        loss = diffusion_loss_sum(prediction, target, weight)
        if v is None:
            return loss
        x_t = add_noise(latents, noise, alpha_t, sigma_t)
        x_0 = predicted_x_0(x_t, prediction.float(), alpha_t, sigma_t, self.prediction_type)
        return loss + VLB_WEIGHT * len(self.alphas_cumprod) * self._vlb(latents, x_t, x_0, v, t)

    def _vlb(self, latents: Tensor, x_t: Tensor, x_0: Tensor, v: Tensor, t: Tensor) -> Tensor:
        timesteps = self.timesteps(t)
        at = Posterior(*self.posterior[:, timesteps].unflatten(1, (-1, 1, 1, 1)))
        last = (timesteps == 0).view(-1, 1, 1, 1)
        return vlb_bits(latents, x_t, x_0, v.float(), at, last).sum()


def check(
    prediction_type: str,
    noise_schedule: str,
    num_train_timesteps: int,
    learned_sigma: bool,
    min_snr_gamma: float | None,
) -> None:
    """Refuse what there is no such objective of."""
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"prediction_type={prediction_type!r} must be one of {PREDICTION_TYPES}")
    if noise_schedule not in NOISE_SCHEDULES:
        raise UserError(f"noise_schedule={noise_schedule!r} must be one of {NOISE_SCHEDULES}")
    if num_train_timesteps < 2:
        raise UserError(f"num_train_timesteps={num_train_timesteps} must be at least 2")
    if prediction_type == "flow" and noise_schedule != "cosine":
        raise UserError(
            f"noise_schedule={noise_schedule!r} is of DDPM and a flow has none; leave it out"
        )
    if prediction_type == "flow" and learned_sigma:
        raise UserError(
            "learned_sigma=true is of DDPM's steps and prediction_type='flow' has none; "
            "use 'epsilon' or 'v_prediction'"
        )
    if min_snr_gamma is not None and min_snr_gamma <= 0:
        raise UserError(f"min_snr_gamma={min_snr_gamma} must be above 0; 5 is usual")
