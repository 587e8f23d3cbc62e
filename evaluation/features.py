"""Networks that turn images into the feature vectors compared by FID, KID and Inception Score.

Shapes: B images, F features, K classes. Every extractor is an `nn.Module` in evaluation mode that
maps uint8 images (B, 3, H, W) to `Features` and has `num_features`, `num_classes`, `name` and
`weights_hash`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorInceptionV3
from torchvision.transforms.functional import to_pil_image

from evaluation.open_clip_model import load_open_clip
from evaluation.weights import file_hash, inception_weights

INCEPTION = "inception-v3-compat"  # torch-fidelity's name of the network


class Features(NamedTuple):
    """Output of an extractor for a batch of images."""

    pooled: Tensor  # (B, F)
    logits: Tensor | None = None  # (B, K); None if the extractor does not classify


class Extractor(nn.Module):
    """A frozen network with the facts that identify it in a metric's protocol."""

    def __init__(
        self,
        network: nn.Module,
        *,
        num_features: int,
        name: str,
        weights_hash: str,
        num_classes: int = 0,
    ):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.num_features, self.num_classes = num_features, num_classes
        self.name, self.weights_hash = name, weights_hash

    def train(self, mode: bool = True) -> "Extractor":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Extract features of uint8 images (B, 3, H, W)."""
        return self.network(images)


class _Inception(nn.Module):
    def __init__(self, weights: str):
        super().__init__()
        self.inner = FeatureExtractorInceptionV3(INCEPTION, ["2048", "logits_unbiased"], weights)

    def forward(self, images: Tensor) -> Features:
        return Features(*self.inner(images))


class _OpenClipTower(nn.Module):
    def __init__(self, network: nn.Module, preprocess):
        super().__init__()
        self.inner, self.preprocess = network, preprocess

    def forward(self, images: Tensor) -> Features:
        inputs = torch.stack([self.preprocess(to_pil_image(image)) for image in images.cpu()])
        return Features(self.inner.encode_image(inputs.to(images.device)))


def inception(weights: str | None = None) -> Extractor:
    """Load torch-fidelity's InceptionV3: 2048 features, 1008 logits; it resizes to 299 x 299.

    Args:
        weights: file of the weights; None: torch.hub's cache, else a download.

    Raises:
        ValueError: the weights are absent or belong to another network.
    """
    file = inception_weights(weights)
    try:
        # torch-fidelity unpickles with weights_only=False, so read the file safely first.
        torch.load(file, map_location="cpu", weights_only=True)
        network = _Inception(str(file))
    except Exception as error:
        raise ValueError(
            f"{file} does not hold torch-fidelity's Inception weights "
            f"({type(error).__name__}); delete it and download it again"
        ) from error
    sizes = {"num_features": 2048, "num_classes": 1008}
    return Extractor(network, **sizes, name=INCEPTION, weights_hash=file_hash(file))


def open_clip_features(model: str, pretrained: str | None = None) -> Extractor:
    """Load the image tower of an open_clip model: its embedding without normalization, no logits.

    Args:
        model: a model name known to open_clip, or "local-dir:FOLDER".
        pretrained: tag or file of the weights.

    Raises:
        ValueError: see `load_open_clip`.
    """
    loaded = load_open_clip(model, pretrained)
    network = _OpenClipTower(loaded.network, loaded.preprocess)
    size = network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).pooled.shape[1]
    return Extractor(network, num_features=size, name=loaded.name, weights_hash=loaded.weights_hash)


def extractor_facts(extractor: Extractor) -> dict[str, str]:
    """Return the facts about an extractor that a metric's protocol records."""
    return {"extractor": extractor.name, "weights_hash": extractor.weights_hash}


def as_uint8(images: Tensor) -> Tensor:
    """Round images in [-1, 1] to the nearest of 256 levels; return uint8 images unchanged.

    Raises:
        ValueError: an image has values that are not finite.
    """
    if images.dtype == torch.uint8:
        return images
    broken = int((~images.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(images)} images contain NaN or infinity because the training "
            "diverged; use an earlier checkpoint or a lower learning rate"
        )
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
