"""Samplers: exact models sample their distribution, and steps equal those of diffusers' loop."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tf_lightning.diffusion.process import (
    DDPM,
    RectifiedFlow,
    alphas_cumprod,
    build_process,
    cosine_betas,
)
from tf_lightning.diffusion.sampler import (
    SAMPLERS,
    DenoisingState,
    build_scheduler,
    set_timesteps,
)
from tf_lightning.errors import UserError
from tf_lightning.generation.sampling import SamplingConfig

# diffusers 0.42 raises this warning with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MEAN, STD = 1.5, 0.6
ALPHAS_CUMPROD = alphas_cumprod(cosine_betas())
PAIRS = [(sampler, kind) for sampler in DDPM.samplers for kind in ("epsilon", "v_prediction")]
PAIRS += [(sampler, "flow") for sampler in RectifiedFlow.samplers]
SHIFTED = [pair for pair in PAIRS if pair[0] not in DDPM.evenly_spaced_samplers]


def exact_output(x_t: Tensor, t: float, prediction_type: str) -> Tensor:
    """The best prediction for latents of Normal(MEAN, STD), in closed form."""
    if prediction_type == "flow":
        a, b = torch.tensor(1 - t), torch.tensor(t)
    else:
        alpha_bar = ALPHAS_CUMPROD[round(1000 * t)]
        a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    gain = (x_t - a * MEAN) / (a**2 * STD**2 + b**2)
    noise, latents = b * gain, MEAN + a * STD**2 * gain
    velocities = {"epsilon": noise, "v_prediction": a * noise - b * latents}
    return velocities.get(prediction_type, noise - latents)


@pytest.mark.parametrize(("sampler", "kind"), PAIRS)
def test_the_reported_evaluations_are_those_of_the_network(sampler, kind):
    calls = []

    def model(x_t: Tensor, t: float) -> Tensor:
        calls.append(t)
        return torch.zeros_like(x_t)

    denoised(sampler, kind, model, torch.randn(1, 1, 1, 1), 6)
    used = SamplingConfig(sampler=sampler, num_inference_steps=6).used("image")
    assert used["nfe"] == len(calls) == (11 if "Heun" in sampler else 6)


def denoised(
    sampler: str, kind: str, model, noise: Tensor, steps: int, shift: float = 1.0
) -> Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(len(noise))]
    scheduler = build_scheduler(build_process(kind), sampler, shift)
    trajectory = DenoisingState(noise, scheduler, steps, generators)
    while not trajectory.finished:
        trajectory.step(model(trajectory.x_t, trajectory.t))
    return trajectory.x_t


@pytest.mark.parametrize(
    ("sampler", "kind", "shift"),
    [(*pair, 1.0) for pair in PAIRS] + [(*pair, 1.6) for pair in SHIFTED],
)
def test_an_exact_model_samples_its_distribution(sampler, kind, shift):
    """250 steps as in the paper; the values of an image are independent samples."""
    noise = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = denoised(sampler, kind, lambda x, t: exact_output(x, t, kind), noise, 250, shift)
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert latents.std().item() == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize(("sampler", "kind"), PAIRS)
@pytest.mark.parametrize("steps", [25, 150, 600])
def test_the_mean_of_the_samples_does_not_depend_on_the_number_of_steps(sampler, kind, steps):
    """With few steps, and with numbers that do not divide the timesteps."""
    noise = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = denoised(sampler, kind, lambda x, t: exact_output(x, t, kind), noise, steps)
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.03)


def model(x_t: Tensor, t: float) -> Tensor:
    """A smooth function of x_t and t."""
    return torch.tanh(x_t + 0.3) * (1 + t)


def diffusers_own_loop(sampler: str, kind: str, noise: Tensor, steps: int) -> Tensor:
    """The loop of diffusers' pipelines, with the scheduler options that its docs recommend."""
    import diffusers.schedulers as schedulers

    if kind == "flow":
        scheduler = getattr(schedulers, sampler)()
    else:
        more = {"clip_sample": False} if sampler in ("DDPMScheduler", "DDIMScheduler") else {}
        more |= {"algorithm_type": "sde-dpmsolver++"} if sampler.endswith("-SDE") else {}
        more |= {"num_train_timesteps": 1000, "timestep_spacing": "trailing"}
        if kind == "epsilon":
            betas = cosine_betas()[:990].tolist()  # the last alpha is 0.0155
            more |= {"num_train_timesteps": 990, "trained_betas": betas}
        scheduler = getattr(schedulers, sampler.removesuffix("-SDE"))(
            beta_schedule="squaredcos_cap_v2", prediction_type=kind, **more
        )
    if sampler == "FlowMatchEulerDiscreteScheduler":  # Stable Diffusion 3's and Flux's pipelines
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    else:
        scheduler.set_timesteps(steps)
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    generators = [torch.Generator().manual_seed(i) for i in range(len(noise))]
    draws = sampler == "DDPMScheduler" or sampler.endswith("-SDE")
    random = {"generator": generators} if draws else {}
    for timestep in scheduler.timesteps:
        scaled = latents
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(latents, timestep)
        output = model(scaled, timestep.item() / 1000)
        latents = scheduler.step(output, timestep, latents, **random, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("steps", [1, 2, 10])  # DDIM of diffusers needs divisors of 990 and 1000
@pytest.mark.parametrize(("sampler", "kind"), PAIRS)
def test_steps_equal_those_of_diffusers_loop(sampler, kind, steps):
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = denoised(sampler, kind, model, noise, steps)
    torch.testing.assert_close(ours, diffusers_own_loop(sampler, kind, noise, steps))


@pytest.mark.parametrize("sampler", DDPM.samplers)
def test_schedulers_use_the_noise_schedule_of_training_and_start_at_its_last_timestep(sampler):
    scheduler = build_scheduler(DDPM("v_prediction"), sampler)
    torch.testing.assert_close(scheduler.alphas_cumprod, ALPHAS_CUMPROD, atol=2e-6, rtol=1e-3)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == 999
    assert len(scheduler.timesteps) == 20


@pytest.mark.parametrize("sampler", DDPM.samplers)
def test_an_error_in_epsilon_is_not_amplified_at_pure_noise(sampler):
    """With steps from the last timestep, the same error gives a standard deviation over 100."""
    noise = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    error = 0.02 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    model = lambda x, t: exact_output(x, t, "epsilon") + error  # noqa: E731
    latents = denoised(sampler, "epsilon", model, noise, 50)
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.1)
    assert latents.std().item() < 2 * STD


@pytest.mark.parametrize(
    ("kind", "schedule", "first"),
    [("v_prediction", "cosine", 999), ("epsilon", "linear", 999), ("epsilon", "cosine", 989)],
)
def test_only_epsilon_with_the_cosine_schedule_skips_the_last_timesteps(kind, schedule, first):
    scheduler = build_scheduler(DDPM(kind, schedule), "DDPMScheduler")
    scheduler.set_timesteps(250)
    assert scheduler.timesteps[0] == first


@pytest.mark.parametrize(
    ("sampler", "kind", "levels"),
    [
        ("DDIMScheduler", "v_prediction", [0.999, 0.799, 0.599, 0.399, 0.199]),
        ("DDIMScheduler", "epsilon", [0.989, 0.791, 0.593, 0.395, 0.197]),
        ("FlowMatchEulerDiscreteScheduler", "flow", [1.0, 0.8, 0.6, 0.4, 0.2]),
    ],
)
def test_the_model_is_called_once_a_step_at_its_noise_level(sampler, kind, levels):
    seen = []
    denoised(sampler, kind, lambda x, t: seen.append(t) or x, torch.randn(2, 1, 2, 2), 5)
    assert seen == pytest.approx(levels)


@pytest.mark.parametrize(("sampler", "kind"), SHIFTED)
@pytest.mark.parametrize("shift", [0.4, 2.5])
def test_shifted_steps_are_at_stable_diffusion_3s_noise_levels(sampler, kind, shift):
    seen, steps = [], 20
    denoised(sampler, kind, lambda x, t: seen.append(t) or x, torch.randn(2, 1, 2, 2), steps, shift)
    top = {"epsilon": 0.99}.get(kind, 1.0)  # epsilon is not predicted above
    even = top - top * np.arange(steps) / steps
    if sampler == "FlowMatchHeunDiscreteScheduler":  # its last step is at 0.001, shifted
        last = shift / 1000 / (1 + (shift - 1) / 1000)
        even, seen = np.linspace(1, last, steps), [seen[0], *seen[1::2]]
    share = even / top
    expected = top * shift * share / (1 + (shift - 1) * share)
    off = 0.001 if kind != "flow" else 0.0  # the lowest of 1,000 levels is 0
    assert seen == pytest.approx(expected - off, abs=6e-4 if off else 1e-5)


@pytest.mark.parametrize(("sampler", "kind"), SHIFTED)
@pytest.mark.parametrize("shift", [0.4, 1.0, 2.5])
def test_the_largest_number_of_shifted_steps_has_distinct_levels(sampler, kind, shift):
    scheduler = build_scheduler(build_process(kind), sampler, shift)
    steps = int(
        scheduler.config.num_train_timesteps * (min(shift, 1 / shift) if kind != "flow" else 1)
    )
    set_timesteps(scheduler, steps)
    levels = scheduler.timesteps[::2] if "Heun" in sampler else scheduler.timesteps
    assert (levels[1:] < levels[:-1]).all() and levels[-1] >= 0
    with pytest.raises(UserError, match=f"num_inference_steps={steps + 1} must be from 1 to"):
        set_timesteps(scheduler, steps + 1)


@pytest.mark.parametrize("sampler", DDPM.evenly_spaced_samplers)
def test_a_shift_is_refused_for_evenly_spaced_samplers(sampler):
    with pytest.raises(UserError, match=f"timestep_shift=2 does not fit {sampler}.* one of DDPM"):
        build_scheduler(DDPM("v_prediction"), sampler, timestep_shift=2)


def test_denoising_states_leave_the_scheduler_as_it_was():
    scheduler = build_scheduler(DDPM(), "UniPCMultistepScheduler")
    noise = torch.randn(2, 1, 4, 4)
    first, second = (DenoisingState(part, scheduler, 5, []) for part in noise.split(1))
    while not first.finished:  # in turn, as sequences that began at different times
        first.step(model(first.x_t, first.t))
        second.step(model(second.x_t, second.t))
    together = denoised("UniPCMultistepScheduler", "epsilon", model, noise, 5)
    torch.testing.assert_close(torch.cat([first.x_t, second.x_t]), together)


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_number_of_steps_out_of_range_is_refused(steps):
    scheduler = build_scheduler(DDPM(), "DDIMScheduler")
    with pytest.raises(UserError, match=f"num_inference_steps={steps} must be from 1 to 990"):
        set_timesteps(scheduler, steps)


def test_an_unknown_sampler_is_refused():
    with pytest.raises(UserError, match="sampler='Euler' is not a sampler for .* one of DDPM"):
        build_scheduler(DDPM(), "Euler")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_a_sampler_that_does_not_fit_the_process_is_refused(sampler, kind):
    if (sampler, kind) in PAIRS:
        assert build_scheduler(build_process(kind), sampler)
        return
    with pytest.raises(UserError, match=f"'{sampler}' does not fit a model that predicts '{kind}'"):
        build_scheduler(build_process(kind), sampler)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_default_sampler_fits(kind):
    assert build_scheduler(build_process(kind))
