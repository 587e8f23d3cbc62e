"""The guided denoising loop, on diffusers' schedulers.

Shapes: n images, C x h x w latents.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from tf_lightning.errors import UserError

SAMPLERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)

Denoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def build_scheduler(sampler: str, num_train_timesteps: int, prediction_type: str):
    """A diffusers scheduler with the cosine schedule that training uses.

    No clipping (latents are not in [-1, 1]) and trailing spacing (the first step starts at pure
    noise): diffusers' defaults bias both.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler={sampler!r} must be one of {', '.join(SAMPLERS)}")
    import diffusers.schedulers as schedulers  # 2.5 s: only when sampling

    clip = {"clip_sample": False} if sampler in ("DDPMScheduler", "DDIMScheduler") else {}
    return getattr(schedulers, sampler)(
        num_train_timesteps=num_train_timesteps,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        **clip,
    )


def guide(cond: Tensor, uncond: Tensor, guidance_scale: float) -> Tensor:
    """uncond + s * (cond - uncond); 1 = no guidance (Classifier-free guidance Eq. 6, s = 1 + w)."""
    return uncond + guidance_scale * (cond - uncond)


@torch.no_grad()
def sample_latents(
    denoise: Denoiser,
    noise: Tensor,
    scheduler,
    *,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Turn noise into clean latents, x_{t-1} in place of x_t (Transfusion Sec. 3).

    Args:
        denoise: (x_t (n, C, h, w), t (n,) in [0, 1)) -> conditional and unconditional output.
        noise: standard normal, (n, C, h, w).
        scheduler: from `build_scheduler`.
        num_inference_steps: network evaluations.
        guidance_scale: 1 = off.
        generator: noise of the stochastic schedulers.
        progress: show a progress bar.

    Returns:
        Clean latents (n, C, h, w).
    """
    num_train_timesteps = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise UserError(
            f"num_inference_steps={num_inference_steps} must be from 1 to {num_train_timesteps}"
        )
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    draws_noise = "generator" in inspect.signature(scheduler.step).parameters
    randomness = {"generator": generator} if draws_noise else {}
    latents = noise * scheduler.init_noise_sigma
    for timestep in tqdm(scheduler.timesteps, desc="Denoising", disable=not progress):
        t = (timestep / num_train_timesteps).expand(len(latents))
        output = guide(*denoise(latents, t), guidance_scale)
        latents = scheduler.step(output, timestep, latents, **randomness).prev_sample
    return latents
