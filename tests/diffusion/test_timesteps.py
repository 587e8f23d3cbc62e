"""Sampled noise levels against their distributions."""

import math

import pytest
import torch
from scipy import stats

from tf_lightning.diffusion.timesteps import row_generator, sample_timesteps


def test_noise_levels_are_uniform_below_their_limits():
    limits = [1.0, 0.5, 1.0, 0.25]
    t = torch.stack([sample_timesteps([limits], row_generator(0, row)) for row in range(2000)])
    for column, limit in zip(t.T, limits, strict=True):
        assert stats.kstest(column.numpy(), stats.uniform(scale=limit).cdf).pvalue > 1e-3
        assert 0 <= column.min() and column.max() < limit


def test_unshifted_noise_levels_are_uniform():
    t = torch.stack(
        [sample_timesteps([[1.0]] * 4, row_generator(0, r), shift=3) for r in range(2000)]
    )
    uniform = t / (3 - 2 * t)  # the inverse of t = 3 u / (1 + 2 u)
    assert stats.kstest(uniform.flatten().numpy(), stats.uniform().cdf).pvalue > 1e-3


def test_logit_normal_levels_are_sigmoids_of_normal_numbers_and_can_be_shifted():
    def draw(row, shift):
        return sample_timesteps([[1.0]] * 4, row_generator(0, row), shift, "logit_normal")

    t = torch.stack([draw(row, 1.0) for row in range(2000)])
    assert stats.kstest(t.logit().flatten().numpy(), "norm").pvalue > 1e-3
    shifted = torch.stack([draw(row, 3.0) for row in range(20)])
    torch.testing.assert_close(shifted.logit(), t[:20].logit() + math.log(3))


@pytest.mark.parametrize("largest", [False, True])
def test_extreme_logit_normal_levels_are_finite(monkeypatch, largest):
    share = torch.tensor([1 - 2**-24 if largest else 0.0])
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: share)
    t = sample_timesteps([[1.0]] * 64, torch.Generator(), distribution="logit_normal")
    assert t.isfinite().all() and 0 <= t.min() and t.max() < 1


def test_the_noise_levels_of_a_row_are_evenly_spread():
    t = sample_timesteps([[1.0]] * 8, row_generator(3, 5)).sort().values
    assert torch.allclose(t.diff(), torch.full((7,), 1 / 8), atol=1e-6)


def test_a_noise_level_never_rounds_up_to_its_limit(monkeypatch):
    largest = torch.tensor([1 - 2**-24])
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: largest)
    assert sample_timesteps([[1.0]] * 64, torch.Generator()).max() < 1
    assert sample_timesteps([[1.0]] * 64, torch.Generator(), shift=3).max() < 1


def test_images_with_a_limit_have_uniform_levels_for_every_distribution():
    limits = [[0.5], [1.0]] * 4
    draw = lambda row: sample_timesteps(limits, row_generator(0, row), 3.0, "logit_normal")  # noqa: E731
    t = torch.stack([draw(row) for row in range(2000)])
    limited, free = t[:, 0::2], t[:, 1::2]
    assert limited.max() <= 0.5
    shares = torch.histc(limited / 0.5, bins=10, min=0, max=1) / limited.numel()
    torch.testing.assert_close(shares, torch.full((10,), 0.1), atol=0.02, rtol=0)
    assert free.median() == pytest.approx(0.75, abs=0.02)  # 3 u / (1 + 2 u) at u = 1/2


def test_the_images_of_a_document_are_independent_and_those_of_a_row_are_evenly_spread():
    """The correlation of u and of (u1 - u2) modulo 1 with uniform numbers; both are uniform."""
    documents = [[1.0, 1.0]] * 2
    t = torch.stack([sample_timesteps(documents, row_generator(0, row)) for row in range(4000)])
    first, second = t[:, 0::2], t[:, 1::2]
    for one, other in ((first[:, 0], second[:, 0]), (first[:, 1], second[:, 0])):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.05
        assert stats.kstest(((one - other) % 1).numpy(), stats.uniform().cdf).pvalue > 1e-3
    for same in (first, second):
        torch.testing.assert_close((same[:, 0] - same[:, 1]).abs(), torch.full((4000,), 0.5))


def test_rows_of_documents_with_one_image_keep_their_noise_levels():
    """One permutation and one offset, in this order."""
    generator = row_generator(3, 5)
    expected = (torch.randperm(4, generator=generator) + torch.rand(1, generator=generator)) / 4
    documents = [[1.0], [], [1.0], [1.0], [1.0]]
    assert torch.equal(sample_timesteps(documents, row_generator(3, 5)), expected)
