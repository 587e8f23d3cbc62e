"""The learned variance against diffusers, torch's distributions and closed forms."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from tf_lightning.diffusion.learned_variance import (
    Posterior,
    bin_nll,
    learned_log_variance,
    normal_kl,
    posterior_tables,
    vlb_bits,
)
from tf_lightning.diffusion.process import (
    DDPM,
    NOISE_SCHEDULES,
    alphas_cumprod,
    cosine_betas,
)
from tf_lightning.diffusion.sampler import DenoisingState, build_scheduler

T = 700


def at(timestep: int = T) -> Posterior:
    return Posterior(*(table[timestep] for table in posterior_tables(cosine_betas())))


def test_the_posterior_is_the_product_of_two_gaussians():
    """Bayes' rule for q(x_{t-1} | x_t, x_0): precisions add. This derives DDPM Eq. 7 again."""
    alpha_bars = (1 - cosine_betas()).cumprod(0)
    beta, previous = cosine_betas()[T].item(), alpha_bars[T - 1].item()
    forward, prior = (1 - beta) / beta, 1 / (1 - previous)  # precisions in x_{t-1}
    variance = 1 / (forward + prior)
    posterior = at()
    assert posterior.log_variance.item() == pytest.approx(math.log(variance), rel=1e-5)
    x_0_weight = variance * prior * math.sqrt(previous)
    assert posterior.x_0_weight.item() == pytest.approx(x_0_weight, rel=1e-5)
    x_t_weight = variance * math.sqrt(1 - beta) / beta
    assert posterior.x_t_weight.item() == pytest.approx(x_t_weight, rel=1e-5)


def test_all_tables_are_finite_although_the_last_step_has_no_variance():
    tables = posterior_tables(cosine_betas())
    assert all(table.isfinite().all() for table in tables)
    assert tables.log_variance[0] == tables.log_variance[1]
    assert tables.x_0_weight[0].item() == pytest.approx(1)
    assert tables.x_t_weight[0].item() == 0


def test_the_log_variance_equals_diffusers_learned_range():
    from diffusers.schedulers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    v = torch.linspace(-1, 1, 5)
    expected = scheduler._get_variance(T, predicted_variance=v)
    torch.testing.assert_close(learned_log_variance(v, at()), expected, atol=1e-4, rtol=1e-4)


def test_normal_kl_equals_torchs():
    mean_p, mean_q, log_p, log_q = torch.randn(4, 50, dtype=torch.float64)
    expected = kl_divergence(Normal(mean_p, (log_p / 2).exp()), Normal(mean_q, (log_q / 2).exp()))
    torch.testing.assert_close(normal_kl(mean_p, log_p, mean_q, log_q), expected)


def test_the_masses_of_all_bins_sum_to_one():
    bins = torch.arange(-300, 301, dtype=torch.float64) * 2 / 255
    zero = torch.tensor(0.0, dtype=torch.float64)
    mass = (-bin_nll(bins, zero + 0.013, zero + math.log(0.2**2))).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-6)


def test_the_true_posterior_has_no_kl_and_the_last_step_is_scored_by_its_likelihood():
    x_0, x_t = torch.randn(2, 2, 1, 3, 3)
    tables = torch.stack(posterior_tables(cosine_betas()))[:, [0, T]].view(4, 2, 1, 1, 1)
    smallest = torch.full_like(x_0, -1.0)  # beta_tilde itself
    last = torch.tensor([True, False]).view(2, 1, 1, 1)
    bits = vlb_bits(x_0, x_t, x_0, smallest, Posterior(*tables), last)
    torch.testing.assert_close(bits[1], torch.zeros_like(bits[1]), atol=1e-5, rtol=0)
    scale = (0.5 * tables[2, 0]).exp().item()
    mass = math.erf(1 / 255 / scale / math.sqrt(2))
    torch.testing.assert_close(
        bits[0], torch.full_like(bits[0], -math.log2(mass)), rtol=1e-3, atol=1e-6
    )


# Sampling with a learned variance

MEAN, STD = 1.5, 0.6


def exact_step(x_t: Tensor, t: int, previous: int) -> Tensor:
    """Output of a perfect network for latents of Normal(MEAN, STD) in closed form: eps and v.

    x_previous given x_t is normal. Its variance is beta_tilde plus the variance of x_0 given x_t
    times the squared weight of x_0 in the mean. v interpolates the logarithm of this variance
    between log beta_tilde and log beta.
    """
    alpha_bars = alphas_cumprod(cosine_betas()).double()
    alpha, before = alpha_bars[t], alpha_bars[previous] if previous >= 0 else 1.0
    gain = (x_t - alpha.sqrt() * MEAN) / (alpha * STD**2 + 1 - alpha)
    variance_x_0 = STD**2 * (1 - alpha) / (alpha * STD**2 + 1 - alpha)
    beta = 1 - alpha / before
    smallest = torch.as_tensor((1 - before) / (1 - alpha) * beta).clamp(min=1e-20)
    weight = torch.as_tensor(before).sqrt() * beta / (1 - alpha)
    share = ((smallest + weight**2 * variance_x_0).log() - smallest.log()) / (beta / smallest).log()
    return torch.cat([(1 - alpha).sqrt() * gain, (2 * share - 1).expand_as(x_t)], 1).float()


def sampled(learned_sigma: bool, steps: int = 10) -> Tensor:
    """Sample 64 x 256 values in few steps with a perfect network."""
    noise = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = build_scheduler(DDPM(learned_sigma=learned_sigma), "DDPMScheduler")
    generators = [torch.Generator().manual_seed(i) for i in range(64)]
    trajectory = DenoisingState(noise, scheduler, steps, generators)
    while not trajectory.finished:
        t, following = (trajectory.timesteps + [-1])[trajectory.done :][:2]
        trajectory.step(exact_step(trajectory.x_t, t, following))
    return trajectory.x_t


def test_a_perfect_variance_makes_few_steps_exact():
    """The last step too adds the predicted variance, although its beta_tilde is 0."""
    learned, fixed = sampled(True), sampled(False)
    assert learned.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert learned.std().item() == pytest.approx(STD, rel=0.02)
    assert fixed.std().item() < 0.9 * STD


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_step_has_the_mean_and_variance_that_the_loss_assumes(kind, schedule):
    """Compare one step of a scheduler with the tables of the loss."""
    process = DDPM(kind, schedule, learned_sigma=True)
    scheduler = build_scheduler(process, "DDPMScheduler")
    x_t, output = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    v = torch.rand(1, 3, 4, 4) * 2 - 1
    steps = scheduler.config.num_train_timesteps
    trajectory = DenoisingState(x_t, scheduler, steps, [torch.Generator().manual_seed(5)])
    trajectory.done = steps - 1 - T
    trajectory.step(torch.cat([output, v], 1))
    betas = NOISE_SCHEDULES[schedule]()
    posterior = Posterior(*(table[T] for table in posterior_tables(betas)))
    x_0 = process.predicted_x_0(x_t, output, torch.tensor([(T + 0.5) / 1000]))
    mean = posterior.x_0_weight * x_0 + posterior.x_t_weight * x_t
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    expected = mean + (learned_log_variance(v, posterior) / 2).exp() * noise
    torch.testing.assert_close(trajectory.x_t, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_samplers_without_a_learned_variance_ignore_it(sampler):
    x_t, output = torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
    drawn = []
    for given in (output, output[:, :3]):
        scheduler = build_scheduler(DDPM(learned_sigma=True), sampler)
        trajectory = DenoisingState(x_t, scheduler, 5, [])
        while not trajectory.finished:
            trajectory.step(given)
        drawn.append(trajectory.x_t)
    assert torch.equal(*drawn)
