"""What the denoiser learns: its forward process, its target, and what an image's error weighs.

Shapes: M images, C x h x w latents.
"""

import torch
from torch import Tensor, nn

from tf_lightning.diffusion import (
    NOISE_SCHEDULES,
    PREDICTION_TYPES,
    add_noise,
    alphas_cumprod,
    cosine_betas,
    diffusion_target,
    linear_betas,
    min_snr_weight,
    predicted_x_0,
)
from tf_lightning.errors import UserError
from tf_lightning.learned_sigma import VLB_WEIGHT, Posterior, posterior_tables, vlb_bits
from tf_lightning.losses import diffusion_loss_sum


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

    def network_times(self, t: Tensor) -> Tensor:
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
