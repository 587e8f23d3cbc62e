"""The trainable networks: the paper's size, a VQ's losses in closed form, and noise by row."""

import pytest
import torch
from diffusers import AutoencoderKL

from tf_lightning.autoencoder.network import (
    AutoencoderConfig,
    add_latent_noise,
    build_autoencoder,
    channel_std,
    decode_latents,
    encode_posterior,
    encode_vq,
    quantize,
    row_noise,
)
from tf_lightning.errors import UserError

SMALL = {"channels": (4, 8), "layers_per_block": 1, "norm_groups": 2, "mid_attention": False}


def small_vq(**config):
    torch.manual_seed(0)
    return build_autoencoder(AutoencoderConfig(**SMALL, num_codes=11, code_dim=3, **config))


@pytest.mark.parametrize("codes", [{}, {"latent_channels": 256, "num_codes": 16_384}])
def test_defaults_have_about_the_papers_86_million_parameters(codes):
    config = AutoencoderConfig(**codes)
    with torch.device("meta"):
        network = build_autoencoder(config)
    count = sum(weight.numel() for weight in network.parameters())
    assert config.downsample == 8
    assert 83e6 < count < 88e6


def test_the_posterior_equals_diffusers():
    network = build_autoencoder(AutoencoderConfig(**SMALL))
    assert isinstance(network, AutoencoderKL)
    images = torch.randn(2, 3, 8, 8)
    posterior, theirs = encode_posterior(network, images), network.encode(images).latent_dist
    noise = torch.randn_like(theirs.mean)
    torch.testing.assert_close(posterior.mean, theirs.mean)
    torch.testing.assert_close(posterior.sample(noise), theirs.mean + theirs.std * noise)


def test_codes_are_the_nearest_and_both_losses_have_the_right_weights():
    network = small_vq()
    with torch.no_grad():
        network.quantize.embedding.weight.normal_()
    encoded = torch.randn(2, 3, 4, 4, requires_grad=True)
    codes = quantize(network, encoded)
    rows = encoded.permute(0, 2, 3, 1).reshape(-1, 3)
    codebook = network.quantize.embedding.weight
    nearest = (rows[:, None] - codebook).square().sum(-1).argmin(1)
    assert torch.equal(codes.ids.flatten(), nearest) and codes.ids.shape == (2, 4, 4)
    picked = codebook[nearest]
    torch.testing.assert_close(codes.loss, 1.25 * (rows - picked).square().mean())
    codes.loss.backward()
    # d/dz of 0.25 |z - sg(e)|^2, and d/de of 1.0 |sg(z) - e|^2, means over N elements.
    difference = (rows - picked).detach()
    commitment = 0.25 * 2 * difference / difference.numel()
    torch.testing.assert_close(encoded.grad.permute(0, 2, 3, 1).reshape(-1, 3), commitment)
    moved = torch.zeros_like(codebook).index_add(0, nearest, -2 * difference / difference.numel())
    torch.testing.assert_close(codebook.grad, moved)


def test_quantization_has_the_straight_through_gradient():
    network = small_vq()
    encoded = torch.randn(1, 3, 2, 2, requires_grad=True)
    direction = torch.randn(1, 3, 2, 2)
    (quantize(network, encoded).latents * direction).sum().backward()
    torch.testing.assert_close(encoded.grad, direction)


def test_decoding_codes_equals_diffusers():
    network = small_vq()
    images = torch.randn(2, 3, 8, 8)
    ours = decode_latents(network, quantize(network, encode_vq(network, images)).latents)
    torch.testing.assert_close(ours, network(images).sample)


def test_latent_noise_is_in_standard_deviations_of_a_channel():
    mean = torch.randn(2, 2, 64, 64) * torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)
    strength, noise = torch.tensor([0.0, 2.0]), torch.randn_like(mean)
    noised = add_latent_noise(mean, channel_std(mean), strength, noise)
    added = (noised - mean).std((2, 3))
    torch.testing.assert_close(added, torch.tensor([[0.0, 0.0], [2.0, 10.0]]), rtol=0.05, atol=0)


def test_row_noise_depends_on_the_row_only():
    like = torch.zeros(3, 2, 4, 4)
    whole = row_noise(like, torch.tensor([5, 6, 7]), seed=1)
    part = row_noise(like[:1], torch.tensor([6]), seed=1)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[1], b[0])
    noise, more, share = row_noise(torch.zeros(200, 2, 8, 8), torch.arange(200), seed=1)
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), more.flatten()]))[0, 1]) < 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert share.mean().item() == pytest.approx(0.5, abs=0.06)


def test_inconsistent_sizes_are_refused():
    with pytest.raises(UserError, match="norm_groups=32"):
        AutoencoderConfig(channels=(48, 64))
    with pytest.raises(UserError, match="num_codes=1"):
        AutoencoderConfig(num_codes=1)
