"""The two diffusion processes: DDPM and rectified flow (Transfusion Sec. 2.2).

A process adds noise to latents, x_t = alpha_t x_0 + sigma_t eps, defines the target and the loss of
the network, and builds the diffusers scheduler that samples from it.

    DDPM            alpha_t = sqrt(alpha_bar), sigma_t = sqrt(1 - alpha_bar), with alpha_bar of
                    timestep floor(t * num_train_timesteps)
    rectified flow  alpha_t = 1 - t, sigma_t = t (Rectified Flow Eq. 1, with time reversed)

The noise level t is in [0, 1), and 0 is clean.

Shapes: M images, C latent channels, h x w latent grid; t is (M,), and alpha_t and sigma_t are
(M, 1, 1, 1).
"""

import math
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Protocol

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
from tf_lightning.ranges import Positive, Range, check_arguments

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")
SDE = "-SDE"  # suffix of a sampler name: the stochastic variant of that solver
MIN_EPSILON_ALPHA = 0.015  # smallest alpha_t at which predicted noise is converted to x_0

NumTrainTimesteps = Annotated[int, Range(ge=2, note="1000 is usual")]
MinSNRGamma = Positive | None


class DiffusionProcess(Protocol):
    """Interface of a diffusion process for training and sampling."""

    prediction_type: str
    """One of PREDICTION_TYPES."""
    samplers: tuple[str, ...]
    """Names of the diffusers schedulers that can sample from it."""
    evenly_spaced_samplers: tuple[str, ...]
    """Samplers whose steps diffusers spaces evenly, so that `timestep_shift` must be 1."""
    default_sampler: str
    loss_definition: str
    """Definition of `loss_sum` per latent element, in words for reports."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t, (M, 1, 1, 1), of noise levels t (M,)."""

    def model_timesteps(self, t: Tensor) -> Tensor:
        """Return the noise level in [0, 1] that the network receives as its input, (M,)."""

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t of clean `latents` and standard normal `noise`, all (M, C, h, w)."""

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the target of the network's output at x_t, (M, C, h, w)."""

    def predicted_x_0(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """Convert the network's output at x_t to clean latents, all (M, C, h, w)."""

    def loss_sum(self, output: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the fp32 loss of the network's output at x_t, summed over latent elements.

        Args:
            output: (M, C, h, w), or (M, 2 C, h, w) with a learned variance.
            latents: clean latents, (M, C, h, w).
            noise: standard normal, (M, C, h, w).
            t: noise levels, (M,).
        """

    def build_scheduler(self, sampler: str, timestep_shift: float) -> Any:
        """Build the diffusers scheduler `sampler`, one of `samplers`.

        Two attributes are added to it. `num_levels`: timesteps per unit of t. `step_shift`: shift
        for `sampler.set_timesteps` to apply; 1 if the scheduler shifts.
        """


# ---------------------------------------------------------------- noise schedules


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


NOISE_SCHEDULES = {"cosine": cosine_betas, "linear": linear_betas}
DIFFUSERS_SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear"}


# ---------------------------------------------------------------- formulas


def add_noise(latents: Tensor, noise: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t eps; latents and noise are (M, C, h, w)."""
    return alpha_t * latents + sigma_t * noise


def velocity(latents: Tensor, noise: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """v = alpha_t eps - sigma_t x_0 (Progressive Distillation, App. D)."""
    return alpha_t * noise - sigma_t * latents


def min_snr_weight(alpha_t: Tensor, sigma_t: Tensor, gamma: float, x_0_error: Tensor) -> Tensor:
    """Weight of an image's squared error, shaped like alpha_t (Min-SNR Sec. 3.4).

    The squared error of x_0 has weight min(SNR, gamma), with SNR = alpha_t^2 / sigma_t^2.

    Args:
        alpha_t: (M, 1, 1, 1).
        sigma_t: (M, 1, 1, 1).
        gamma: upper limit of the weight.
        x_0_error: the error of x_0 that one unit of error of the network's output causes:
            sigma_t / alpha_t for epsilon, sigma_t for v and for the flow's velocity.
    """
    return (alpha_t / sigma_t).square().clamp(max=gamma) * x_0_error.square()


def diffusion_loss_sum(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error summed over latent elements, both (M, C, h, w) (Transfusion Eq. 3); fp32.

    `weight` (M, 1, 1, 1) multiplies the error of each image; None means 1.
    """
    if weight is None:
        return F.mse_loss(output.float(), target.float(), reduction="sum")
    return (weight * (output.float() - target.float()).square()).sum()


def squared_error(prediction: str, min_snr_gamma: float | None) -> str:
    """Name the mean of a squared error and its weight, if it has one."""
    weight = (
        "" if min_snr_gamma is None else f", times its min-SNR weight (gamma {min_snr_gamma:g})"
    )
    return f"mean squared error of {prediction} over latent elements{weight}"


# ---------------------------------------------------------------- processes


class DDPM(nn.Module):
    """Denoising diffusion in discrete timesteps (Ho et al. 2020); implements `DiffusionProcess`.

    It is a module only so that its tables move to the model's device; it has no parameters and
    adds nothing to a state dict.

    Args:
        prediction_type: "epsilon" or "v_prediction".
        noise_schedule: "cosine" or "linear".
        num_train_timesteps: number of timesteps of the schedule, at least 2.
        learned_sigma: the network outputs 2 C channels, and the second half predicts the variance
            of each denoising step (iDDPM).
        min_snr_gamma: weight the error of each image by min(SNR, gamma); None: no weighting.

    Raises:
        UserError: a value is out of range.
    """

    samplers = (
        "DDPMScheduler",
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",  # DPM-Solver++(2M)
        "DPMSolverMultistepScheduler" + SDE,  # SDE-DPM-Solver++(2M)
        "UniPCMultistepScheduler",
    )
    evenly_spaced_samplers = ("UniPCMultistepScheduler",)
    default_sampler = "DDIMScheduler"

    def __init__(
        self,
        prediction_type: str = "epsilon",
        noise_schedule: str = "cosine",
        num_train_timesteps: NumTrainTimesteps = 1000,
        learned_sigma: bool = False,
        min_snr_gamma: MinSNRGamma = None,
    ):
        super().__init__()
        check_arguments(DDPM.__init__, locals())
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"prediction_type={reprlib.repr(prediction_type)} must be one of {PREDICTION_TYPES}"
            )
        if noise_schedule not in NOISE_SCHEDULES:
            raise UserError(
                f"noise_schedule={reprlib.repr(noise_schedule)} must be one of "
                f"{tuple(NOISE_SCHEDULES)}"
            )
        self.prediction_type, self.noise_schedule = prediction_type, noise_schedule
        self.learned_sigma, self.min_snr_gamma = learned_sigma, min_snr_gamma
        betas = NOISE_SCHEDULES[noise_schedule](num_train_timesteps)
        self.register_buffer("alphas_cumprod", alphas_cumprod(betas), persistent=False)
        self.register_buffer("posterior", torch.stack(posterior_tables(betas)), persistent=False)

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps of the noise schedule."""
        return len(self.alphas_cumprod)

    def timesteps(self, t: Tensor) -> Tensor:
        """Timesteps (M,) in {0..num_train_timesteps-1} of noise levels (M,) in [0, 1)."""
        return (t * self.num_train_timesteps).long()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t, (M, 1, 1, 1)."""
        alpha_bar = self.alphas_cumprod[self.timesteps(t)].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def model_timesteps(self, t: Tensor) -> Tensor:
        """Return t rounded down to a timestep, as a share of all timesteps."""
        return self.timesteps(t) / self.num_train_timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t (DDPM Eq. 4)."""
        return add_noise(latents, noise, *self.coefficients(t))

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return eps or v."""
        if self.prediction_type == "epsilon":
            return noise
        return velocity(latents, noise, *self.coefficients(t))

    def predicted_x_0(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """(x_t - sigma_t eps) / alpha_t, or alpha_t x_t - sigma_t v."""
        alpha_t, sigma_t = self.coefficients(t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma_t * output) / alpha_t
        return alpha_t * x_t - sigma_t * output

    @property
    def loss_definition(self) -> str:
        """Squared error of the prediction, its weight, and the variational term."""
        error = squared_error(self.prediction_type, self.min_snr_gamma)
        if not self.learned_sigma:
            return error
        return f"{error}, plus {VLB_WEIGHT * self.num_train_timesteps:g} x the VLB in bits"

    def loss_sum(self, output: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Squared error, plus the variational term of a learned variance (iDDPM Eq. 16)."""
        prediction, v = output.chunk(2, dim=1) if self.learned_sigma else (output, None)
        loss = diffusion_loss_sum(prediction, self.target(latents, noise, t), self._weight(t))
        if v is None:
            return loss
        vlb = self._vlb_sum(latents, noise, prediction, v, t)
        return loss + VLB_WEIGHT * self.num_train_timesteps * vlb

    def _weight(self, t: Tensor) -> Tensor | None:
        if self.min_snr_gamma is None:
            return None
        alpha_t, sigma_t = self.coefficients(t)
        x_0_error = sigma_t / alpha_t if self.prediction_type == "epsilon" else sigma_t
        return min_snr_weight(alpha_t, sigma_t, self.min_snr_gamma, x_0_error)

    def _vlb_sum(
        self, latents: Tensor, noise: Tensor, prediction: Tensor, v: Tensor, t: Tensor
    ) -> Tensor:
        """Sum of the variational bound's terms at each image's timestep, in bits."""
        x_t = self.add_noise(latents, noise, t)
        x_0 = self.predicted_x_0(x_t, prediction.float(), t)
        timesteps = self.timesteps(t)
        posterior = Posterior(*self.posterior[:, timesteps].unflatten(1, (-1, 1, 1, 1)))
        last = (timesteps == 0).view(-1, 1, 1, 1)
        return vlb_bits(latents, x_t, x_0, v.float(), posterior, last).sum()

    def build_scheduler(self, sampler: str, timestep_shift: float = 1.0) -> Any:
        """Build a diffusers scheduler with the noise schedule of training.

        Two defaults of diffusers are changed because they bias samples of latents: nothing is
        clipped to [-1, 1], and the first step starts at the last timestep. With "epsilon" and the
        cosine schedule it starts a little earlier, see `_skip_pure_noise`. Only DDPMScheduler uses
        a learned variance (iDDPM Eq. 15); the other samplers ignore it.

        DDIM is built as DPM-Solver++ of order 1, which is the same update (DPM-Solver Sec. 4.1).
        diffusers' DDIMScheduler assumes a step of num_train_timesteps // num_inference_steps, which
        is wrong for a number of steps that does not divide the timesteps.
        """
        import diffusers.schedulers as schedulers  # takes 2.5 s, so only for sampling

        options: dict[str, Any] = {
            "beta_schedule": DIFFUSERS_SCHEDULES[self.noise_schedule],
            "prediction_type": self.prediction_type,
            "num_train_timesteps": self.num_train_timesteps,
            "timestep_spacing": "trailing",
        }
        name = sampler.removesuffix(SDE)
        if sampler == "DDPMScheduler":
            options["clip_sample"] = False
        if sampler == "DDIMScheduler":
            name, options["solver_order"] = "DPMSolverMultistepScheduler", 1
        if self.learned_sigma and sampler == "DDPMScheduler":
            options["variance_type"] = "learned_range"
        if sampler.endswith(SDE):
            options["algorithm_type"] = "sde-dpmsolver++"
        if self.prediction_type == "epsilon" and self.noise_schedule == "cosine":
            options |= self._skip_pure_noise()
        scheduler = getattr(schedulers, name)(**options)
        scheduler.num_levels, scheduler.step_shift = self.num_train_timesteps, timestep_shift
        return scheduler

    def _skip_pure_noise(self) -> dict[str, Any]:
        """Return scheduler options that skip the end of the cosine schedule.

        alpha_t is 5e-5 at the last timestep. Noise predicted there holds no information about the
        image, and converting it to x_0 divides its error by alpha_t, which ruins the samples of a
        small network. Sampling therefore starts where alpha_t is at least MIN_EPSILON_ALPHA.
        """
        betas = cosine_betas(self.num_train_timesteps)
        kept = betas[alphas_cumprod(betas) >= MIN_EPSILON_ALPHA**2]
        return {"trained_betas": kept.tolist(), "num_train_timesteps": len(kept)}


class RectifiedFlow(nn.Module):
    """Straight paths from latents to noise (Liu et al. 2022); implements `DiffusionProcess`.

    Args:
        num_train_timesteps: number of timesteps on which diffusers' schedulers count t, at least 2;
            training does not use it.
        min_snr_gamma: weight the error of each image by min(SNR, gamma); None: no weighting.

    Raises:
        UserError: a value is out of range.
    """

    prediction_type = "flow"
    samplers = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
    evenly_spaced_samplers = ()
    default_sampler = "FlowMatchEulerDiscreteScheduler"

    def __init__(
        self, num_train_timesteps: NumTrainTimesteps = 1000, min_snr_gamma: MinSNRGamma = None
    ):
        super().__init__()
        check_arguments(RectifiedFlow.__init__, locals())
        self.num_train_timesteps, self.min_snr_gamma = num_train_timesteps, min_snr_gamma

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t, (M, 1, 1, 1)."""
        sigma_t = t.view(-1, 1, 1, 1)
        return 1 - sigma_t, sigma_t

    def model_timesteps(self, t: Tensor) -> Tensor:
        """Return t itself."""
        return t

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t (Rectified Flow Eq. 1)."""
        return add_noise(latents, noise, *self.coefficients(t))

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """dx_t / dt = eps - x_0, the same at every t (Rectified Flow Eq. 1)."""
        return noise - latents

    def predicted_x_0(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """x_0 = x_t - sigma_t (eps - x_0)."""
        return x_t - self.coefficients(t)[1] * output

    @property
    def loss_definition(self) -> str:
        """Squared error of the velocity and its weight."""
        return squared_error("velocity", self.min_snr_gamma)

    def loss_sum(self, output: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Squared error of the velocity."""
        weight = None
        if self.min_snr_gamma is not None:
            alpha_t, sigma_t = self.coefficients(t)
            weight = min_snr_weight(alpha_t, sigma_t, self.min_snr_gamma, x_0_error=sigma_t)
        return diffusion_loss_sum(output, self.target(latents, noise, t), weight)

    def build_scheduler(self, sampler: str, timestep_shift: float = 1.0) -> Any:
        """Build a flow-matching scheduler of diffusers, which applies the shift itself."""
        import diffusers.schedulers as schedulers  # takes 2.5 s, so only for sampling

        scheduler = getattr(schedulers, sampler)(
            num_train_timesteps=self.num_train_timesteps, shift=timestep_shift
        )
        scheduler.num_levels, scheduler.step_shift = self.num_train_timesteps, 1.0
        return scheduler


def build_process(
    prediction_type: str = "epsilon",
    noise_schedule: str = "cosine",
    num_train_timesteps: int = 1000,
    learned_sigma: bool = False,
    min_snr_gamma: float | None = None,
) -> DDPM | RectifiedFlow:
    """Build RectifiedFlow for `prediction_type` "flow", and DDPM for the other types.

    Args:
        prediction_type: "epsilon", "v_prediction" or "flow".
        noise_schedule: see `DDPM`; leave the default for a flow.
        num_train_timesteps: see `DDPM` and `RectifiedFlow`.
        learned_sigma: see `DDPM`; leave the default for a flow.
        min_snr_gamma: see `DDPM` and `RectifiedFlow`.

    Raises:
        UserError: a value is out of range, or a flow is given an option of DDPM.
    """
    if prediction_type != "flow":
        return DDPM(
            prediction_type, noise_schedule, num_train_timesteps, learned_sigma, min_snr_gamma
        )
    if noise_schedule != "cosine":
        raise UserError(
            f"noise_schedule={noise_schedule!r} applies to DDPM only and a flow has none; leave it "
            "out"
        )
    if learned_sigma:
        raise UserError(
            "learned_sigma=true applies to DDPM only, not to prediction_type='flow'; set it to "
            "false, or use 'epsilon' or 'v_prediction'"
        )
    return RectifiedFlow(num_train_timesteps, min_snr_gamma)


def process_from_hparams(hparams: Mapping[str, Any]) -> DDPM | RectifiedFlow | None:
    """Build the process that a model's hyper-parameters describe.

    Args:
        hparams: hyper-parameters of `Transfusion`, for example a checkpoint's; missing ones have
            their default.

    Returns:
        The process, or None for a model whose images are discrete tokens.
    """
    if hparams.get("num_codes"):
        return None
    names = (
        "prediction_type",
        "noise_schedule",
        "num_train_timesteps",
        "learned_sigma",
        "min_snr_gamma",
    )
    return build_process(**{name: hparams[name] for name in names if name in hparams})
