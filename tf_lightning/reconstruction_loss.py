"""How far a reconstruction is from its picture: L1, and what frozen networks see."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tf_lightning.perceptual import LPIPS, FeatureDistance


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
