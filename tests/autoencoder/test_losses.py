"""The losses of autoencoders against diffusers, torch and closed forms."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.distributions import Normal, kl_divergence

from tf_lightning.autoencoder.losses import (
    MAX_GAN_SCALE,
    code_perplexity,
    discriminator_loss,
    gan_loss,
    gan_scale,
    kl_loss,
    last_layer_gradients,
)


def test_kl_equals_diffusers_and_torch():
    parameters = torch.randn(3, 8, 4, 4)
    posterior = DiagonalGaussianDistribution(parameters)
    loss = kl_loss(posterior.mean, posterior.logvar, num_elements=192)
    torch.testing.assert_close(loss, posterior.kl().mean() / 192)
    q, p = Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)
    torch.testing.assert_close(loss, kl_divergence(q, p).sum((1, 2, 3)).mean() / 192)


def test_kl_of_the_prior_is_zero():
    assert kl_loss(torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2), 12) == 0


@pytest.mark.parametrize(
    ("real", "fake", "loss"), [(2.0, -2.0, 0.0), (0.0, 0.0, 1.0), (-1.0, 3.0, 3.0), (0.5, -3, 0.25)]
)
def test_discriminator_loss_is_the_hinge_loss(real, fake, loss):
    given = torch.full((2, 1, 3, 3), real), torch.full((2, 1, 3, 3), float(fake))
    assert discriminator_loss(*given).item() == pytest.approx(loss)


def test_gan_loss_is_minus_the_mean_logit():
    fake = torch.tensor([1.0, -3.0], requires_grad=True)
    gan_loss(fake).backward()
    assert gan_loss(fake) == 1 and fake.grad.tolist() == [-0.5, -0.5]


def test_gan_scale_equalizes_gradient_norms_at_the_last_layer():
    layer = nn.Linear(3, 2, bias=False)
    x = torch.randn(5, 3)
    reconstruction, gan = layer(x).square().mean(), 7 * layer(x).sin().mean()
    scale = gan_scale(last_layer_gradients(reconstruction, gan, layer.weight))
    assert not scale.requires_grad
    # By hand: d mean(y^2) / dW = 2 y^T x / 10, d 7 mean(sin y) / dW = 7 cos(y)^T x / 10.
    y = layer(x).detach()
    wanted = (2 * y.T @ x / 10).norm() / (7 * y.cos().T @ x / 10).norm()
    torch.testing.assert_close(scale, wanted, rtol=1e-3, atol=0)
    (scale * gan).backward()
    gan_norm = layer.weight.grad.norm()
    layer.weight.grad = None
    layer(x).square().mean().backward()
    torch.testing.assert_close(gan_norm, layer.weight.grad.norm(), rtol=1e-3, atol=0)


def test_gan_scale_has_a_limit():
    weight = torch.ones(1, requires_grad=True)
    gradients = last_layer_gradients(1e3 * weight.sum(), 0 * weight.sum(), weight)
    assert gan_scale(gradients) == MAX_GAN_SCALE


def test_code_perplexity_is_exp_of_the_entropy():
    assert code_perplexity(torch.tensor([5, 5, 0, 5, 0])).item() == pytest.approx(3)
    assert code_perplexity(torch.tensor([7, 0, 0])).item() == 1
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert code_perplexity(torch.tensor([3, 1])).item() == pytest.approx(math.exp(entropy))
