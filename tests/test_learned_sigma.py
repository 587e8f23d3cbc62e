"""The variational term against diffusers, torch's distributions and closed forms."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tf_lightning.diffusion import cosine_betas
from tf_lightning.learned_sigma import (
    Posterior,
    bin_nll,
    learned_log_variance,
    normal_kl,
    posterior_tables,
    vlb_bits,
)

T = 700


def at(timestep: int = T) -> Posterior:
    return Posterior(*(table[timestep] for table in posterior_tables(cosine_betas())))


def test_the_posterior_is_the_product_of_its_two_gaussians():
    """q(x_{t-1} | x_t, x_0) by Bayes: precisions add (a second derivation of DDPM Eq. 7)."""
    alphas_cumprod = (1 - cosine_betas()).cumprod(0)
    beta, previous = cosine_betas()[T].item(), alphas_cumprod[T - 1].item()
    forward, prior = (1 - beta) / beta, 1 / (1 - previous)  # precisions in x_{t-1}
    variance = 1 / (forward + prior)
    posterior = at()
    assert posterior.log_variance.item() == pytest.approx(math.log(variance), rel=1e-5)
    x_0_weight = variance * prior * math.sqrt(previous)
    assert posterior.x_0_weight.item() == pytest.approx(x_0_weight, rel=1e-5)
    x_t_weight = variance * math.sqrt(1 - beta) / beta
    assert posterior.x_t_weight.item() == pytest.approx(x_t_weight, rel=1e-5)


def test_no_table_is_infinite_though_the_last_step_has_no_variance():
    tables = posterior_tables(cosine_betas())
    assert all(table.isfinite().all() for table in tables)
    assert tables.log_variance[0] == tables.log_variance[1]
    assert tables.x_0_weight[0].item() == pytest.approx(1)
    assert tables.x_t_weight[0].item() == 0


def test_the_log_variance_is_diffusers_learned_range():
    from diffusers.schedulers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    v = torch.linspace(-1, 1, 5)
    expected = scheduler._get_variance(T, predicted_variance=v)
    torch.testing.assert_close(learned_log_variance(v, at()), expected, atol=1e-4, rtol=1e-4)


def test_divergences_are_torchs():
    mean_p, mean_q, log_p, log_q = torch.randn(4, 50, dtype=torch.float64)
    expected = kl_divergence(Normal(mean_p, (log_p / 2).exp()), Normal(mean_q, (log_q / 2).exp()))
    torch.testing.assert_close(normal_kl(mean_p, log_p, mean_q, log_q), expected)


def test_the_bins_hold_all_the_mass():
    bins = torch.arange(-300, 301, dtype=torch.float64) * 2 / 255
    zero = torch.tensor(0.0, dtype=torch.float64)
    mass = (-bin_nll(bins, zero + 0.013, zero + math.log(0.2**2))).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-6)


def test_the_true_posterior_has_no_divergence_and_the_last_step_is_scored_by_its_likelihood():
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
