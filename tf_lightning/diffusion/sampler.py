"""Denoise images step by step with diffusers' schedulers.

Shapes: n images, C x h x w latents.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tf_lightning.diffusion.process import DDPM, DiffusionProcess, RectifiedFlow
from tf_lightning.diffusion.timesteps import shift_timesteps
from tf_lightning.errors import UserError

SAMPLERS = DDPM.samplers + RectifiedFlow.samplers


def resolve_sampler(
    process: DiffusionProcess, sampler: str | None = None, timestep_shift: float = 1.0
) -> str:
    """Return the name of the sampler to use: the given one, or the default of the process.

    Args:
        process: the model's diffusion process.
        sampler: name of a diffusers scheduler; None: the default.
        timestep_shift: shift of the denoising steps; 1 is none.

    Raises:
        UserError: the sampler is unknown, or does not fit the process or the shift.
    """
    sampler = sampler or process.default_sampler
    if sampler not in process.samplers:
        known = "does not fit" if sampler in SAMPLERS else "is not a sampler for"
        raise UserError(
            f"sampler={sampler!r} {known} a model that predicts {process.prediction_type!r}; "
            f"it must be one of {', '.join(process.samplers)}"
        )
    if timestep_shift != 1 and sampler in process.evenly_spaced_samplers:
        able = [name for name in process.samplers if name not in process.evenly_spaced_samplers]
        raise UserError(
            f"timestep_shift={timestep_shift} does not fit {sampler}, whose steps are even; use 1, "
            f"or one of {', '.join(able)}"
        )
    return sampler


def build_scheduler(
    process: DiffusionProcess, sampler: str | None = None, timestep_shift: float = 1.0
) -> Any:
    """Build a diffusers scheduler that samples from a process.

    Args:
        process: the model's diffusion process.
        sampler: one of `process.samplers`; None: `process.default_sampler`.
        timestep_shift: values above 1 spend more steps near pure noise (Stable Diffusion 3
            Eq. 23).

    Raises:
        UserError: as `resolve_sampler`.
    """
    return process.build_scheduler(
        resolve_sampler(process, sampler, timestep_shift), timestep_shift
    )


def set_timesteps(scheduler, num_inference_steps: int) -> None:
    """Set the scheduler's timesteps. Timesteps stay on the CPU to avoid a device sync.

    Raises:
        UserError: there are too few or too many steps.
    """
    num_train_timesteps, shift = scheduler.config.num_train_timesteps, scheduler.step_shift
    most = int(num_train_timesteps * min(shift, 1 / shift))  # more would repeat a timestep
    if not 1 <= num_inference_steps <= most:
        why = f" with timestep_shift={shift}" if shift != 1 else ""
        raise UserError(f"num_inference_steps={num_inference_steps} must be from 1 to {most}{why}")
    levels = np.linspace(1, 0, num_inference_steps, endpoint=False)
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        # Equal steps from 1 to 0; the scheduler's own grid spends a step on the last thousandth.
        scheduler.set_timesteps(sigmas=levels)
    elif shift != 1:
        places = num_train_timesteps * shift_timesteps(levels, shift)
        scheduler.set_timesteps(timesteps=np.round(places).astype(int) - 1)
    else:
        scheduler.set_timesteps(num_inference_steps)


class DenoisingState:
    """Images that are denoised together; each step replaces x_t by x_{t-1} (Transfusion Sec. 3).

    Attributes:
        x_t: the images at the present noise level, (n, C, h, w).
    """

    def __init__(
        self,
        noise: Tensor,
        scheduler,
        num_inference_steps: int,
        generators: Sequence[torch.Generator],
    ):
        """Start from noise.

        Args:
            noise: standard normal, (n, C, h, w).
            scheduler: from `build_scheduler`; it is copied.
            num_inference_steps: denoising steps. Heun's method evaluates the network twice in each
                step but the last.
            generators: one for each image, for schedulers that draw noise.
        """
        self.scheduler = deepcopy(scheduler)
        set_timesteps(self.scheduler, num_inference_steps)
        self.timesteps = self.scheduler.timesteps.tolist()
        algorithm = scheduler.config.get("algorithm_type", "")
        draws_noise = type(scheduler).__name__ == "DDPMScheduler" or algorithm.startswith("sde")
        self.randomness = {"generator": list(generators)} if draws_noise else {}
        self.done = 0
        self.x_t = noise

    @property
    def t(self) -> float:
        """Noise level of x_t, in [0, 1]."""
        return self.timesteps[self.done] / self.scheduler.num_levels

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.done == len(self.timesteps)

    def step(self, output: Tensor) -> None:
        """Make a step with the network's output at (x_t, t), (n, C, h, w) or (n, 2 C, h, w)."""
        if self.scheduler.config.get("variance_type") != "learned_range":
            output = output[:, : self.x_t.shape[1]]
        timestep = self.scheduler.timesteps[self.done]
        self.x_t = self.scheduler.step(output, timestep, self.x_t, **self.randomness).prev_sample
        self.done += 1
