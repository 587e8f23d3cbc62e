"""Losses of the autoencoders: L1 + LPIPS + 0.5 GAN + 0.2 features + 1e-6 KL (Transfusion App. A).

The paper gives the weights, not the reductions: these are latent diffusion's (Rombach 2022, App. G,
and its code), from which the weights are. Everything is per element of the pictures.
Shapes: B pictures, C latent channels, patches of the discriminator's map in any shape.

How far a reconstruction is from its picture: L1, and what frozen networks see.

Frozen networks that compare pictures: LPIPS, and the stages of a self-supervised ResNet.

Shapes: B pictures (B, 3, H, W) in [-1, 1]; both give one number, the mean over the pictures.

The patch discriminator (pix2pix: Isola 2017, Sec. 3.2.2 and App. 6.1.2; VQGAN's too).
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from tf_lightning.autoencoder.network import at_least_float32
from tf_lightning.errors import UserError

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


LPIPS_WEIGHTS = {
    "vgg": models.VGG16_Weights.DEFAULT,
    "alex": models.AlexNet_Weights.DEFAULT,
    "squeeze": models.SqueezeNet1_1_Weights.DEFAULT,
}
STAGES = ("layer1", "layer2", "layer3", "layer4")
PREFIXES = ("module.", "encoder_q.", "base_encoder.", "backbone.", "teacher.")  # MoCo 2, 3, DINO
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class LPIPS(nn.Module):
    """Learned perceptual similarity (Zhang 2018), torchmetrics' network.

    Args:
        network: "vgg" (VQGAN's), "alex", or "squeeze", which is small.

    Raises:
        UserError: torchvision's weights of the network are not there and cannot be fetched.
    """

    def __init__(self, network: Literal["vgg", "alex", "squeeze"] = "vgg"):
        super().__init__()
        url = LPIPS_WEIGHTS[network].url
        file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
        try:
            metric = LearnedPerceptualImagePatchSimilarity(net_type=network)
        except Exception as error:  # the network's absence and damaged files have many kinds
            raise UserError(
                f"LPIPS needs the weights {file}, which do not load ({type(error).__name__}): "
                f"fetch {url} and put it there, or train without LPIPS by lpips_weight: 0"
            ) from error
        self.net = metric.net.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Mean distance, >= 0; reconstructions beyond [-1, 1] are taken as they are."""
        return self.net(images, others).float().mean()


class FeatureDistance(nn.Module):
    """Distance of a ResNet's four stages: the "0.2 L_ID" of Transfusion's App. A (MoCo v2).

    Features of unit length at each place, squared differences summed over channels, meaned over
    places, summed over stages: LPIPS without learned weights, as the paper gives no form.

    Args:
        path: a ResNet-18, -34 or -50 that was trained without labels, .safetensors or .pth, with
            torchvision's names: MoCo v2 and v3, and DINO's ResNet-50, as their authors offer them.

    Raises:
        UserError: the file is absent, damaged, or of another network.
    """

    def __init__(self, path: str):
        super().__init__()
        weights = read_backbone(path)
        depth = "resnet50" if "layer1.0.conv3.weight" in weights else "resnet18"
        if depth == "resnet18" and "layer1.2.conv1.weight" in weights:
            depth = "resnet34"
        network = getattr(models, depth)()
        del network.fc
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"feature_model {path} is no whole ResNet-18, -34 or -50") from error
        network.fc = nn.Identity()
        stages = create_feature_extractor(network.eval(), list(STAGES))
        self.stages = stages.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Sum over stages of the mean squared distance of unit vectors, in [0, 16]."""
        pairs = zip(self.features(images), self.features(others), strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).sum()

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit vectors (B, F, h, w) of each stage."""
        stages = self.stages(((images + 1) / 2 - self.mean) / self.std)
        return [F.normalize(stage.float(), dim=1) for stage in stages.values()]


def read_backbone(path: str) -> dict[str, Tensor]:
    """A ResNet's weights by torchvision's names, without what comes after its stages."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no feature_model at {path}; give a file, or feature_weight: 0")
    try:
        if file.suffix == ".safetensors":
            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
            weights = weights.get("state_dict", weights)
    except Exception as error:  # torch's readers raise of many kinds on bytes of other programs
        raise UserError(f"feature_model {path} is damaged or no file of weights") from error
    named = {}
    for name, weight in weights.items():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if name.startswith(("conv1.", "bn1.", *(f"{stage}." for stage in STAGES))):
            named[name] = weight
    return named


class ReconstructionLoss:
    """L1 + lpips_weight LPIPS + feature_weight features, means over the pictures.

    No `nn.Module`: a LightningModule that has one neither saves nor optimizes its networks.

    Args:
        lpips_weight: 0 loads no network.
        lpips_network: "vgg", "alex" or "squeeze".
        feature_weight: 0 loads no network.
        feature_model: file of a self-supervised ResNet.

    Raises:
        UserError: weights that are absent or damaged.
    """

    def __init__(
        self,
        lpips_weight: float = 0.0,
        lpips_network: str = "vgg",
        feature_weight: float = 0.0,
        feature_model: str | None = None,
    ):
        self.networks: dict[str, tuple[float, nn.Module]] = {}
        if lpips_weight:
            self.networks["loss_lpips"] = (lpips_weight, LPIPS(lpips_network))
        if feature_weight:
            self.networks["loss_features"] = (feature_weight, FeatureDistance(feature_model))

    def to(self, device: torch.device) -> None:
        """Move the networks."""
        for _, network in self.networks.values():
            network.to(device)

    def __call__(self, images: Tensor, made: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its terms without their weights, of pictures (B, 3, H, W) in [-1, 1]."""
        loss = F.l1_loss(made, images)
        terms = {"loss_l1": loss}
        for name, (weight, network) in self.networks.items():
            terms[name] = network(images, made)
            loss = loss + weight * terms[name]
        return loss, terms


class PatchDiscriminator(nn.Module):
    """Convolutions that judge overlapping patches, 70 x 70 pixels with three halvings.

    Instance norm, which pix2pix has at batch size 1, in place of batch norm: what is said of a
    picture then depends on no other picture and on no rank.

    Args:
        width: channels of the first convolution; they double up to eight times that.
        num_halvings: convolutions of stride 2.
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
        """Normal, spread 0.02, as in pix2pix."""
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            if isinstance(layer, nn.InstanceNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, h, w) of pictures (B, 3, H, W) in [-1, 1]; higher = real."""
        return at_least_float32(self.layers(images))
