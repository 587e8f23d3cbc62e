"""Losses of the autoencoders: L1 + LPIPS + 0.5 GAN + 0.2 features + 1e-6 KL (Transfusion App. A).

The paper gives the weights, not the reductions: these are latent diffusion's (Rombach 2022, App. G,
and its code), from which the weights are. Everything is per element of the pictures.
Shapes: B pictures, C latent channels, patches of the discriminator's map in any shape.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_GAN_SCALE = 1e4


def kl_loss(mean: Tensor, logvar: Tensor, num_elements: int) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of a picture, by the picture's elements.

    Args:
        mean: of the posterior, (B, C, h, w).
        logvar: its log variance, same shape.
        num_elements: 3 H W of a picture.
    """
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    return kl.flatten(1).sum(1).mean() / num_elements


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge: (mean max(0, 1 - D(x)) + mean max(0, 1 + D(x'))) / 2 (VQGAN's form of Lim & Ye 2017).

    Args:
        real: logits of true pictures.
        fake: logits of reconstructions, which carry no gradient to the autoencoder.
    """
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def gan_loss(fake: Tensor) -> Tensor:
    """What the autoencoder gains by being taken for real: -mean D(x')."""
    return -fake.mean()


def gan_scale(reconstruction_loss: Tensor, gan_loss: Tensor, last_weight: Tensor) -> Tensor:
    """How much of the GAN's gradient equals the reconstruction's at the last layer (VQGAN Eq. 7).

    |grad L_rec| / (|grad L_GAN| + 1e-4), at most 1e4; a constant to the gradient. VQGAN's text adds
    1e-6, its code and all that came of it 1e-4.

    Args:
        reconstruction_loss: scalar.
        gan_loss: scalar.
        last_weight: of the decoder's last convolution.
    """
    norms = [
        torch.autograd.grad(loss, last_weight, retain_graph=True)[0].norm()
        for loss in (reconstruction_loss, gan_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=MAX_GAN_SCALE).detach()


def code_perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of how often each code occurs, counts (num_codes,): as many are in even use."""
    share = counts.double() / counts.sum().clamp(min=1)
    return torch.special.entr(share).sum().exp()
