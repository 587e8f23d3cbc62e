"""Denoising step by step, on diffusers' schedulers.

Shapes: n images, C x h x w latents.
"""

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor

from tf_lightning.diffusion.process import alphas_cumprod, cosine_betas
from tf_lightning.diffusion.timesteps import shifted
from tf_lightning.errors import UserError

SMALLEST_ALPHA = 0.015  # the error of predicted noise is divided by it

SDE = "-SDE"  # behind the name: that solver of the diffusion SDE, which draws noise each step
NOISE_SAMPLERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",  # DPM-Solver++(2M)
    "DPMSolverMultistepScheduler" + SDE,  # SDE-DPM-Solver++(2M)
    "UniPCMultistepScheduler",
)
FLOW_SAMPLERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
EVEN_SAMPLERS = ("DDIMScheduler", "UniPCMultistepScheduler")  # diffusers cannot space their steps
SAMPLERS = NOISE_SAMPLERS + FLOW_SAMPLERS


BETA_SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear"}  # diffusers' names


def fitting_sampler(
    sampler: str | None, prediction_type: str, timestep_shift: float = 1.0
) -> str | None:
    """The sampler named, or DDIM, or Euler for flow, where none is; of "codes", none.

    Raises:
        UserError: the sampler is unknown, or does not fit the prediction type or the shift.
    """
    if prediction_type == "codes":
        check_not_denoising(sampler, timestep_shift)
        return None
    fitting = FLOW_SAMPLERS if prediction_type == "flow" else NOISE_SAMPLERS
    if sampler is None:
        sampler = FLOW_SAMPLERS[0] if prediction_type == "flow" else "DDIMScheduler"
    if sampler not in fitting:
        known = "does not fit" if sampler in SAMPLERS else "is no sampler for"
        raise UserError(
            f"sampler={sampler!r} {known} a model that predicts {prediction_type!r}; "
            f"it must be one of {', '.join(fitting)}"
        )
    check_timestep_shift(sampler, timestep_shift)
    return sampler


def check_timestep_shift(sampler: str, timestep_shift: float) -> None:
    """Refuse a shift that leaves hardly a step, or that the sampler cannot have."""
    if not 0.01 <= timestep_shift <= 100:
        raise UserError(
            f"timestep_shift={timestep_shift} must be from 0.01 to 100; 1 changes nothing"
        )
    if timestep_shift != 1 and sampler in EVEN_SAMPLERS:
        able = ", ".join(name for name in NOISE_SAMPLERS if name not in EVEN_SAMPLERS)
        raise UserError(
            f"timestep_shift={timestep_shift} does not fit {sampler}, whose steps are even; use 1, "
            f"or one of {able}"
        )


def check_not_denoising(
    sampler: str | None,
    timestep_shift: float,
    interval: Sequence[float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> None:
    """Refuse what only denoising has."""
    for name, given, off in (
        ("sampler", sampler, None),
        ("timestep_shift", timestep_shift, 1.0),
        ("guidance_interval", tuple(interval), (0.0, 1.0)),
        ("guidance_rescale", rescale, 0.0),
    ):
        if given != off:
            raise UserError(
                f"{name}={given} is of denoising and this model draws codes; leave it out"
            )


def build_scheduler(
    sampler: str | None,
    num_train_timesteps: int,
    prediction_type: str,
    noise_schedule: str = "cosine",
    learned_sigma: bool = False,
    timestep_shift: float = 1.0,
):
    """A diffusers scheduler for what the network predicts.

    For "epsilon" and "v_prediction", training's noise schedule without clipping (latents are not
    in [-1, 1]) and with trailing spacing (the first step starts at pure noise): diffusers' defaults
    bias both. Only "epsilon" of the cosine schedule starts where some of the image is left, says
    `above_pure_noise`. For "flow", x_t = (1 - t) x_0 + t eps and the velocity eps - x_0. A learned
    variance is that of DDPM's steps (iDDPM Eq. 15); the other samplers have none. `timestep_shift` is
    that of Stable Diffusion 3 (Eq. 23): more of the steps near pure noise if it is more than 1.

    Raises:
        UserError: as `fitting_sampler`.
    """
    sampler = fitting_sampler(sampler, prediction_type, timestep_shift)
    import diffusers.schedulers as schedulers  # 2.5 s: only when sampling

    build = getattr(schedulers, sampler.removesuffix(SDE))
    if prediction_type == "flow":
        scheduler = build(num_train_timesteps=num_train_timesteps, shift=timestep_shift)
        scheduler.num_levels, scheduler.step_shift = num_train_timesteps, 1.0  # it shifts itself
        return scheduler
    own = {"clip_sample": False} if sampler in ("DDPMScheduler", "DDIMScheduler") else {}
    if learned_sigma and sampler == "DDPMScheduler":
        own["variance_type"] = "learned_range"
    if sampler.endswith(SDE):
        own["algorithm_type"] = "sde-dpmsolver++"
    own |= {"timestep_spacing": "trailing", "num_train_timesteps": num_train_timesteps}
    if prediction_type == "epsilon" and noise_schedule == "cosine":
        own |= above_pure_noise(sampler, num_train_timesteps)
    scheduler = build(
        beta_schedule=BETA_SCHEDULES[noise_schedule], prediction_type=prediction_type, **own
    )
    scheduler.num_levels, scheduler.step_shift = num_train_timesteps, timestep_shift
    return scheduler


def above_pure_noise(sampler: str, num_train_timesteps: int) -> dict:
    """What makes a scheduler start above the cosine schedule's end, where alpha is 5e-5.

    The noise that is predicted there says nothing of the image, and its error is divided by alpha:
    a small network's pictures were lost in it. DDIM's steps are all as long in diffusers, so it
    starts one step below the end; the others where alpha is at least SMALLEST_ALPHA, whatever the
    number of steps.
    """
    if sampler == "DDIMScheduler":
        return {"timestep_spacing": "leading"}
    betas = cosine_betas(num_train_timesteps)
    kept = betas[alphas_cumprod(betas) >= SMALLEST_ALPHA**2]
    return {"trained_betas": kept.tolist(), "num_train_timesteps": len(kept)}


def set_timesteps(scheduler, num_inference_steps: int) -> None:
    """Plan the steps; their noise levels stay on the CPU, where reading them waits for nobody.

    Raises:
        UserError: there are too few or too many of them.
    """
    num_train_timesteps, shift = scheduler.config.num_train_timesteps, scheduler.step_shift
    most = int(num_train_timesteps * min(shift, 1 / shift))  # more would meet a noise level twice
    if not 1 <= num_inference_steps <= most:
        why = f" with timestep_shift={shift}" if shift != 1 else ""
        raise UserError(f"num_inference_steps={num_inference_steps} must be from 1 to {most}{why}")
    levels = np.linspace(1, 0, num_inference_steps, endpoint=False)
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        # Equal steps from 1 to 0; the scheduler's own grid spends one on the last thousandth.
        scheduler.set_timesteps(sigmas=levels)
    elif shift != 1:
        places = num_train_timesteps * shifted(levels, shift)
        scheduler.set_timesteps(timesteps=np.round(places).astype(int) - 1)
    else:
        scheduler.set_timesteps(num_inference_steps)


class Trajectory:
    """Images on their way from noise to latents together: x_{t-1} replaces x_t (Sec. 3).

    Attributes:
        x_t: the images as they are now, (n, C, h, w).
    """

    def __init__(
        self,
        noise: Tensor,
        scheduler,
        num_inference_steps: int,
        generators: Sequence[torch.Generator],
    ):
        """Start.

        Args:
            noise: standard normal, (n, C, h, w).
            scheduler: from `build_scheduler`, whose `num_levels` t counts in; it is copied.
            num_inference_steps: network evaluations (Heun's method: two a step, one at the last).
            generators: noise of the stochastic schedulers, one an image.
        """
        self.scheduler = deepcopy(scheduler)
        set_timesteps(self.scheduler, num_inference_steps)
        self.timesteps = self.scheduler.timesteps.tolist()
        algorithm = scheduler.config.get("algorithm_type", "")
        draws = type(scheduler).__name__ == "DDPMScheduler" or algorithm.startswith("sde")
        self.randomness = {"generator": list(generators)} if draws else {}
        self.done = 0
        self.x_t = noise

    @property
    def t(self) -> float:
        """Noise level of x_t, in [0, 1]."""
        return self.timesteps[self.done] / self.scheduler.num_levels

    @property
    def finished(self) -> bool:
        """Whether x_t is clean."""
        return self.done == len(self.timesteps)

    def step(self, output: Tensor) -> None:
        """Move on by the network's output at (x_t, t), (n, C, h, w) or (n, 2 C, h, w)."""
        if self.scheduler.config.get("variance_type") != "learned_range":
            output = output[:, : self.x_t.shape[1]]
        timestep = self.scheduler.timesteps[self.done]
        self.x_t = self.scheduler.step(output, timestep, self.x_t, **self.randomness).prev_sample
        self.done += 1
