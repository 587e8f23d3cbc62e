"""Frozen networks that compare pictures: LPIPS, and the stages of a self-supervised ResNet.

Shapes: B pictures (B, 3, H, W) in [-1, 1]; both give one number, the mean over the pictures.
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

from tf_lightning.errors import UserError

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
