"""The denoising loop: exact models give their distribution back, and diffusers' own loop agrees."""

import pytest
import torch
from torch import Tensor

from tf_lightning.diffusion import cosine_alphas_cumprod
from tf_lightning.errors import UserError
from tf_lightning.sampler import SAMPLERS, build_scheduler, guide, sample_latents

# diffusers 0.42 on numpy 2: its own affair
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MEAN, STD = 1.5, 0.6
ALPHAS_CUMPROD = cosine_alphas_cumprod()


def exact_output(x_t: Tensor, t: Tensor, prediction_type: str) -> Tensor:
    """The best prediction for latents of Normal(MEAN, STD), in closed form."""
    alpha_bar = ALPHAS_CUMPROD[(1000 * t).round().long()].view(-1, 1, 1, 1)
    a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    gain = (x_t - a * MEAN) / (a**2 * STD**2 + b**2)
    noise, latents = b * gain, MEAN + a * STD**2 * gain
    return noise if prediction_type == "epsilon" else a * noise - b * latents


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_exact_model_gives_its_distribution_back(sampler, prediction_type):
    def denoise(x_t, t):
        output = exact_output(x_t, t, prediction_type)
        return output, output

    generator = torch.Generator().manual_seed(0)
    latents = sample_latents(
        denoise,
        torch.randn(64, 4, 8, 8, generator=generator),
        build_scheduler(sampler, 1000, prediction_type),
        num_inference_steps=200,
        generator=generator,
    )
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert latents.std().item() == pytest.approx(STD, rel=0.03)


def test_the_loop_equals_diffusers_own_with_guidance():
    def model(x_t, t, condition):
        return torch.tanh(x_t + condition) * (1 + t.view(-1, 1, 1, 1))

    noise = torch.randn(3, 2, 4, 4)
    ours = sample_latents(
        lambda x_t, t: (model(x_t, t, 0.5), model(x_t, t, 0.0)),
        noise,
        build_scheduler("DDIMScheduler", 1000, "v_prediction"),
        num_inference_steps=10,
        guidance_scale=3.0,
    )

    from diffusers.schedulers import DDIMScheduler

    scheduler = DDIMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
        timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    theirs = noise
    for timestep in scheduler.timesteps:
        t = torch.full((3,), timestep / 1000)
        uncond, cond = model(theirs, t, 0.0), model(theirs, t, 0.5)
        theirs = scheduler.step(uncond + 3 * (cond - uncond), timestep, theirs).prev_sample
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_schedulers_use_the_schedule_of_training_and_start_at_its_last_step(sampler):
    scheduler = build_scheduler(sampler, 1000, "epsilon")
    torch.testing.assert_close(scheduler.alphas_cumprod, ALPHAS_CUMPROD, atol=2e-6, rtol=1e-3)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == 999
    assert len(scheduler.timesteps) == 20


def test_the_model_is_called_once_a_step_with_its_noise_level():
    seen = []

    def denoise(x_t, t):
        seen.append(t)
        return x_t, x_t

    scheduler = build_scheduler("DDIMScheduler", 1000, "epsilon")
    sample_latents(denoise, torch.randn(2, 1, 2, 2), scheduler, num_inference_steps=5)
    torch.testing.assert_close(
        torch.stack(seen), torch.tensor([0.999, 0.799, 0.599, 0.399, 0.199]).view(5, 1).repeat(1, 2)
    )


def test_guidance_extrapolates_from_unconditional_to_conditional():
    cond, uncond = torch.tensor([3.0]), torch.tensor([1.0])
    assert [guide(cond, uncond, s).item() for s in (0, 1, 2.5)] == [1, 3, 6]


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_number_of_steps_out_of_range_is_refused(steps):
    scheduler = build_scheduler("DDIMScheduler", 1000, "epsilon")
    with pytest.raises(UserError, match=f"num_inference_steps={steps} must be from 1 to 1000"):
        sample_latents(None, torch.randn(1, 1, 2, 2), scheduler, num_inference_steps=steps)


def test_an_unknown_sampler_is_refused():
    with pytest.raises(UserError, match="sampler='Euler' must be one of DDPMScheduler, "):
        build_scheduler("Euler", 1000, "epsilon")
