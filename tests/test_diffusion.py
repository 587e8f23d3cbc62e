"""The forward process against diffusers."""

import pytest
import torch

from tf_lightning.diffusion import (
    add_noise,
    cosine_alphas_cumprod,
    diffusion_target,
    velocity,
)

TIMESTEPS = torch.tensor([0, 1, 250, 700, 999])


def reference(num_train_timesteps: int = 1000):
    from diffusers.schedulers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps, beta_schedule="squaredcos_cap_v2")


@pytest.mark.parametrize("num_train_timesteps", [10, 1000])
def test_alphas_cumprod_matches_diffusers(num_train_timesteps):
    expected = reference(num_train_timesteps).alphas_cumprod
    ours = cosine_alphas_cumprod(num_train_timesteps)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("ours, theirs", [(add_noise, "add_noise"), (velocity, "get_velocity")])
def test_noising_and_velocity_match_diffusers(ours, theirs):
    scheduler = reference()
    latents, noise = torch.randn(2, 5, 3, 4, 4)
    alpha_bar = scheduler.alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    expected = getattr(scheduler, theirs)(latents, noise, TIMESTEPS)
    torch.testing.assert_close(ours(latents, noise, alpha_bar), expected)


def test_the_schedule_ends_in_noise_alone():
    alphas_cumprod = cosine_alphas_cumprod()
    assert alphas_cumprod[0] > 0.999
    assert alphas_cumprod[-1] < 1e-6
    assert (alphas_cumprod.diff() < 0).all()


def test_latents_and_noise_are_read_back_from_the_noised_and_the_velocity():
    latents, noise = torch.randn(2, 4, 3, 4, 4)
    alpha_bar = torch.tensor([0.1, 0.5, 0.9, 0.99]).view(-1, 1, 1, 1)
    x_t, v = add_noise(latents, noise, alpha_bar), velocity(latents, noise, alpha_bar)
    torch.testing.assert_close(alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v, latents)
    torch.testing.assert_close((1 - alpha_bar).sqrt() * x_t + alpha_bar.sqrt() * v, noise)


def test_the_target_is_what_the_prediction_type_names():
    latents, noise = torch.randn(2, 1, 3, 4, 4)
    alpha_bar = torch.tensor(0.3)
    assert torch.equal(diffusion_target(latents, noise, alpha_bar, "epsilon"), noise)
    v = diffusion_target(latents, noise, alpha_bar, "v_prediction")
    assert torch.equal(v, velocity(latents, noise, alpha_bar))
