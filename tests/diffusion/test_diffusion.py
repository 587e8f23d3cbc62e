"""Forward processes and conversions against diffusers and against each other."""

import pytest
import torch
from torch import Tensor

from tf_lightning.diffusion.process import (
    PREDICTION_TYPES,
    add_noise,
    alphas_cumprod,
    cosine_alphas_cumprod,
    diffusion_target,
    epsilon_from_x_0,
    flow_velocity,
    linear_betas,
    min_snr_weight,
    predicted_x_0,
    velocity,
)

TIMESTEPS = torch.tensor([0, 1, 250, 700, 999])


def reference(num_train_timesteps: int = 1000, beta_schedule: str = "squaredcos_cap_v2"):
    from diffusers.schedulers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps, beta_schedule=beta_schedule)


def ddpm(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t, (M, 1, 1, 1)."""
    alpha_bar = alpha_bar.view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def coefficients(prediction_type: str) -> tuple[Tensor, Tensor]:
    """Of the process that a prediction type goes with, from hardly to very noised."""
    t = torch.tensor([0.02, 0.3, 0.5, 0.8, 0.97]).view(-1, 1, 1, 1)
    return (1 - t, t) if prediction_type == "flow" else ddpm(1 - t)


@pytest.mark.parametrize("num_train_timesteps", [10, 1000])
def test_alphas_cumprod_matches_diffusers(num_train_timesteps):
    expected = reference(num_train_timesteps).alphas_cumprod
    ours = cosine_alphas_cumprod(num_train_timesteps)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-3)


def test_the_linear_schedule_matches_diffusers():
    expected = reference(beta_schedule="linear").alphas_cumprod
    torch.testing.assert_close(alphas_cumprod(linear_betas()), expected, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("ours, theirs", [(add_noise, "add_noise"), (velocity, "get_velocity")])
def test_noising_and_velocity_match_diffusers(ours, theirs):
    scheduler = reference()
    latents, noise = torch.randn(2, 5, 3, 4, 4)
    expected = getattr(scheduler, theirs)(latents, noise, TIMESTEPS)
    alpha_t, sigma_t = ddpm(scheduler.alphas_cumprod[TIMESTEPS])
    torch.testing.assert_close(ours(latents, noise, alpha_t, sigma_t), expected)


def test_noising_of_a_flow_matches_diffusers():
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    latents, noise = torch.randn(2, 3, 3, 4, 4)
    timesteps = scheduler.timesteps[[10, 500, 900]]
    t = (timesteps / 1000).view(-1, 1, 1, 1)
    expected = scheduler.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(add_noise(latents, noise, 1 - t, t), expected)


def test_the_flow_is_the_derivative_of_the_noised_by_t():
    latents, noise = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    later, earlier = (
        add_noise(latents, noise, 1 - t, t) for t in torch.tensor([0.4, 0.3]).double()
    )
    torch.testing.assert_close(flow_velocity(latents, noise), (later - earlier) / 0.1)


def test_the_schedule_ends_in_noise_alone():
    ours = cosine_alphas_cumprod()
    assert ours[0] > 0.999
    assert ours[-1] < 1e-6
    assert (ours.diff() < 0).all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_latents_and_noise_are_read_back_from_every_exact_prediction(prediction_type):
    alpha_t, sigma_t = coefficients(prediction_type)
    latents, noise = torch.randn(2, 5, 3, 4, 4)
    x_t = add_noise(latents, noise, alpha_t, sigma_t)
    output = diffusion_target(latents, noise, alpha_t, sigma_t, prediction_type)
    x_0 = predicted_x_0(x_t, output, alpha_t, sigma_t, prediction_type)
    torch.testing.assert_close(x_0, latents, atol=2e-5, rtol=1e-4)
    epsilon = epsilon_from_x_0(x_t, x_0, alpha_t, sigma_t)
    torch.testing.assert_close(epsilon, noise, atol=2e-4, rtol=1e-4)
    again = diffusion_target(x_0, epsilon, alpha_t, sigma_t, prediction_type)
    torch.testing.assert_close(again, output, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_any_output_stands_for_the_x_0_that_diffusers_reads_in_it(prediction_type):
    from diffusers.schedulers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=False
    )
    scheduler.set_timesteps(1000)
    x_t, output = torch.randn(2, 4, 3, 4, 4)
    timesteps = torch.tensor([0, 5, 300, 900])
    ours = predicted_x_0(x_t, output, *ddpm(scheduler.alphas_cumprod[timesteps]), prediction_type)
    for index, timestep in enumerate(timesteps.tolist()):
        step = scheduler.step(output[index], timestep, x_t[index])
        torch.testing.assert_close(ours[index], step.pred_original_sample)


def test_the_target_is_what_the_prediction_type_names():
    latents, noise = torch.randn(2, 1, 3, 4, 4)
    at = ddpm(torch.tensor(0.3))
    assert torch.equal(diffusion_target(latents, noise, *at, "epsilon"), noise)
    v = diffusion_target(latents, noise, *at, "v_prediction")
    assert torch.equal(v, velocity(latents, noise, *at))
    flow = diffusion_target(latents, noise, *at, "flow")
    assert torch.equal(flow, noise - latents)


# Min-SNR


def test_min_snr_weights_are_those_of_the_paper():
    from diffusers.training_utils import compute_snr

    scheduler = reference()
    snr = compute_snr(scheduler, TIMESTEPS)
    at = ddpm(scheduler.alphas_cumprod[TIMESTEPS])
    least = torch.minimum(snr, torch.tensor(5.0))
    for name, expected in (("epsilon", least / snr), ("v_prediction", least / (snr + 1))):
        weight = min_snr_weight(*at, 5.0, name).flatten()
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_weighted_error_is_the_clipped_snr_times_the_error_in_x_0(prediction_type):
    alpha_t, sigma_t = coefficients(prediction_type)
    latents, noise, error = torch.randn(3, 5, 3, 4, 4)
    x_t = add_noise(latents, noise, alpha_t, sigma_t)
    target = diffusion_target(latents, noise, alpha_t, sigma_t, prediction_type)
    x_0 = predicted_x_0(x_t, target + error, alpha_t, sigma_t, prediction_type)
    snr = (alpha_t / sigma_t) ** 2
    expected = snr.clamp(max=5.0) * (x_0 - latents) ** 2
    ours = min_snr_weight(alpha_t, sigma_t, 5.0, prediction_type) * error**2
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-4)


def test_a_clean_image_of_a_flow_weighs_nothing():
    zero = torch.zeros(1, 1, 1, 1)
    assert min_snr_weight(1 - zero, zero, 5.0, "flow") == 0
