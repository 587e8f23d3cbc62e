"""The patch discriminator against a second implementation, and its receptive field."""

import torch
import torch.nn.functional as F

from tf_lightning.autoencoder.losses import PatchDiscriminator


def by_hand(state: dict, images):
    """The 70 x 70 network of pix2pix, C64-C128-C256-C512, with functional calls."""
    weights = [w for name, w in state.items() if w.ndim == 4]
    vectors = {name: w for name, w in state.items() if w.ndim == 1}
    x = F.leaky_relu(F.conv2d(images, weights[0], vectors["layers.0.bias"], 2, 1), 0.2)
    for number, (weight, stride) in enumerate(zip(weights[1:4], (2, 2, 1), strict=True)):
        x = F.conv2d(x, weight, stride=stride, padding=1)
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
        scale, shift = (vectors[f"layers.{3 * number + 3}.{n}"] for n in ("weight", "bias"))
        x = (x - mean) / (var + 1e-5).sqrt() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        x = F.leaky_relu(x, 0.2)
    return F.conv2d(x, weights[4], vectors["layers.11.bias"], 1, 1)


def test_discriminator_equals_pix2pix():
    torch.manual_seed(0)
    network = PatchDiscriminator()
    assert [w.shape[0] for w in network.state_dict().values() if w.ndim == 4] == [
        *(64, 128, 256, 512, 1)
    ]
    images = torch.randn(2, 3, 64, 64)
    logits = network(images)
    assert logits.shape == (2, 1, 6, 6)
    torch.testing.assert_close(logits, by_hand(network.state_dict(), images))


def test_the_receptive_field_is_seventy_pixels():
    layers = [layer for layer in PatchDiscriminator().layers if isinstance(layer, torch.nn.Conv2d)]
    seen = 1
    for layer in reversed(layers):
        seen = seen * layer.stride[0] + layer.kernel_size[0] - layer.stride[0]
    assert seen == 70


def test_the_logits_of_an_image_depend_on_no_other_image():
    network = PatchDiscriminator(width=8)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(network(images)[:1], network(images[:1]))
    assert not list(network.buffers())
