"""Losses of the autoencoders (Transfusion App. A): L1 + LPIPS + 0.5 GAN + 1e-6 KL.

The paper gives the weights but not the reductions. We use the reductions of latent diffusion
(Rombach 2022, App. G, and its code), from which the weights come: every loss is a mean per element
of the images. The paper's fifth term, 0.2 times the distance of MoCo features, is left out.

Shapes: B images of H x W pixels, C latent channels, h x w latents.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
from torchvision import models

from tf_lightning.autoencoder.network import at_least_float32
from tf_lightning.errors import UserError

MAX_GAN_SCALE = 1e4
LPIPS_WEIGHTS = {
    "vgg": models.VGG16_Weights.DEFAULT,
    "alex": models.AlexNet_Weights.DEFAULT,
    "squeeze": models.SqueezeNet1_1_Weights.DEFAULT,
}


# ------------------------------------------------------------------------------- reconstruction


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity (Zhang 2018), with torchmetrics' network.

    Args:
        network: "vgg" (as in VQGAN), "alex", or "squeeze", the smallest.

    Raises:
        UserError: torchvision's weights of the network cannot be loaded.
    """

    def __init__(self, network: Literal["vgg", "alex", "squeeze"] = "vgg"):
        super().__init__()
        url = LPIPS_WEIGHTS[network].url
        file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
        try:
            metric = LearnedPerceptualImagePatchSimilarity(net_type=network)
        except Exception as error:  # a failed download and a damaged file raise many types
            raise UserError(
                f"LPIPS cannot load its weights {file} ({type(error).__name__}): download {url} to "
                "that path, or train without LPIPS with lpips_weight: 0"
            ) from error
        self.net = metric.net.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the mean distance of image pairs (B, 3, H, W), >= 0; values are not clipped."""
        return self.net(images, others).float().mean()


class ReconstructionLoss:
    """L1 + lpips_weight * LPIPS, means over the images.

    This is not an `nn.Module`, so that a LightningModule that owns one neither saves nor optimizes
    its network.

    Args:
        lpips_weight: weight of LPIPS; 0 loads no network.
        lpips_network: "vgg", "alex" or "squeeze".

    Raises:
        UserError: the weights of LPIPS cannot be loaded.
    """

    def __init__(self, lpips_weight: float = 0.0, lpips_network: str = "vgg"):
        self.lpips_weight = lpips_weight
        self.lpips = LPIPS(lpips_network) if lpips_weight else None

    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
        if self.lpips is not None:
            self.lpips.to(device)

    def __call__(self, images: Tensor, reconstructed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of images (B, 3, H, W) in [-1, 1], and its unweighted terms by name."""
        loss = F.l1_loss(reconstructed, images)
        terms = {"loss_l1": loss}
        if self.lpips is not None:
            terms["loss_lpips"] = self.lpips(images, reconstructed)
            loss = loss + self.lpips_weight * terms["loss_lpips"]
        return loss, terms


# ---------------------------------------------------------------------------------- bottlenecks


def kl_loss(mean: Tensor, logvar: Tensor, num_elements: int) -> Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)) of an image, divided by its number of elements.

    Args:
        mean: mean of the posterior, (B, C, h, w).
        logvar: log variance of the posterior, (B, C, h, w).
        num_elements: number of elements of an image, 3 H W.
    """
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    return kl.flatten(1).sum(1).mean() / num_elements


def code_perplexity(counts: Tensor) -> Tensor:
    """Return exp(entropy) of the code frequencies: the effective number of codes in use.

    Args:
        counts: how often each code was used, (num_codes,).
    """
    frequencies = counts.double() / counts.sum().clamp(min=1)
    return torch.special.entr(frequencies).sum().exp()


# -------------------------------------------------------------------------------- discriminator


class PatchDiscriminator(nn.Module):
    """Convolutional classifier of overlapping patches, 70 x 70 pixels with three halvings.

    The discriminator of pix2pix (Isola 2017, Sec. 3.2.2 and App. 6.1.2) and VQGAN. It has instance
    norm instead of batch norm, so that the logits of an image depend on no other image and no other
    rank; at pix2pix's batch size of 1 both are equal.

    Args:
        width: channels of the first convolution; each further one doubles them, up to 8 * width.
        num_halvings: number of convolutions with stride 2.
    """

    def __init__(self, width: int = 64, num_halvings: int = 3):
        super().__init__()
        widths = [width * min(2**n, 8) for n in range(num_halvings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for number, (before, after) in enumerate(zip(widths, widths[1:], strict=False), 1):
            stride = 2 if number < num_halvings else 1
            layers += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),
                nn.InstanceNorm2d(after, affine=True),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from a normal distribution of standard deviation 0.02, as in pix2pix."""
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            if isinstance(layer, nn.InstanceNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 1, h, w) of images (B, 3, H, W) in [-1, 1]; higher means real."""
        return at_least_float32(self.layers(images))


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return (mean max(0, 1 - D(x)) + mean max(0, 1 + D(x'))) / 2.

    The hinge loss of Lim & Ye (2017) as VQGAN uses it.

    Args:
        real: logits of dataset images, any shape.
        fake: logits of reconstructions detached from the autoencoder, any shape.
    """
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def gan_loss(fake: Tensor) -> Tensor:
    """Return the autoencoder's adversarial loss -mean D(x') for logits of reconstructions."""
    return -fake.mean()


def last_layer_gradients(
    reconstruction_loss: Tensor, gan_loss: Tensor, last_weight: Tensor, factor: float = 1.0
) -> Tensor:
    """Return the gradients of both losses at the last layer, stacked, (2, *shape of the weight).

    Args:
        reconstruction_loss: scalar.
        gan_loss: scalar.
        last_weight: weight of the decoder's last convolution.
        factor: multiplies the losses in the backward pass, so that their gradients do not vanish in
            fp16; a power of two changes nothing else.
    """
    gradients = [
        torch.autograd.grad(factor * loss, last_weight, retain_graph=True)[0] / factor
        for loss in (reconstruction_loss, gan_loss)
    ]
    return torch.stack(gradients)


def gan_scale(gradients: Tensor) -> Tensor:
    """Return the factor that makes the GAN's gradient as large as the reconstruction's.

    |grad L_rec| / (|grad L_GAN| + 1e-4) at the last layer (VQGAN Eq. 7), at most 1e4, detached.
    VQGAN's text adds 1e-6 to the denominator; its code and later code bases add 1e-4.

    Args:
        gradients: see `last_layer_gradients`; of the mean losses of an optimizer step.
    """
    norms = [gradient.norm() for gradient in gradients]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=MAX_GAN_SCALE).detach()
