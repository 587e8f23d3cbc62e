"""Networks that turn pictures into the feature vectors that FID, KID and Inception Score compare.

Shapes: B pictures, F features, K classes. Every extractor is an `nn.Module` in evaluation mode,
uint8 (B, 3, H, W) -> Features, with `num_features`, `num_classes`, `name` and `weights_hash`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorInceptionV3
from torchvision.transforms.functional import to_pil_image

from evaluation.open_clip_model import load_open_clip
from evaluation.weights import file_hash, inception_weights


class Features(NamedTuple):
    """What an extractor sees in a batch of pictures."""

    pooled: Tensor  # (B, F)
    logits: Tensor | None = None  # (B, K), of extractors that classify


class Extractor(nn.Module):
    """A frozen network with what a metric's protocol says of it."""

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
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """uint8 (B, 3, H, W) -> Features."""
        return self.network(images)


class _Inception(nn.Module):
    def __init__(self, weights: str):
        super().__init__()
        self.inner = FeatureExtractorInceptionV3(NAME, ["2048", "logits_unbiased"], weights)

    def forward(self, images: Tensor) -> Features:
        return Features(*self.inner(images))


class _OpenClipTower(nn.Module):
    def __init__(self, network: nn.Module, preprocess):
        super().__init__()
        self.inner, self.preprocess = network, preprocess

    def forward(self, images: Tensor) -> Features:
        pictures = torch.stack([self.preprocess(to_pil_image(image)) for image in images.cpu()])
        return Features(self.inner.encode_image(pictures.to(images.device)))


NAME = "inception-v3-compat"


def inception(weights: str | None = None) -> Extractor:
    """torch-fidelity's InceptionV3: 2048 features, 1008 logits; it resizes to 299 x 299 itself.

    Args:
        weights: file; without it the usual cache (`torch.hub`) or the network.

    Raises:
        ValueError: the weights are absent, or are not this network's.
    """
    file = inception_weights(weights)
    try:
        # torch-fidelity unpickles with weights_only=False: read it safely first.
        torch.load(file, map_location="cpu", weights_only=True)
        network = _Inception(str(file))
    except Exception as error:
        raise ValueError(
            f"{file} is not torch-fidelity's Inception weights "
            f"({type(error).__name__}); delete it and fetch it again"
        ) from error
    sizes = {"num_features": 2048, "num_classes": 1008}
    return Extractor(network, **sizes, name=NAME, weights_hash=file_hash(file))


def open_clip_features(model: str, pretrained: str | None = None) -> Extractor:
    """The image tower of an open_clip model: its embedding, not normalised; no logits.

    Args:
        model: a name that open_clip knows, or "local-dir:FOLDER".
        pretrained: tag or file of the weights.

    Raises:
        ValueError: as `load_open_clip`.
    """
    loaded = load_open_clip(model, pretrained)
    network = _OpenClipTower(loaded.network, loaded.preprocess)
    size = network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).pooled.shape[1]
    return Extractor(network, num_features=size, name=loaded.name, weights_hash=loaded.weights_hash)


def facts_of(extractor: Extractor) -> dict[str, str]:
    """What a metric's protocol says of its extractor."""
    return {"extractor": extractor.name, "weights_hash": extractor.weights_hash}


def as_uint8(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] as the nearest of the 256 levels; uint8 pictures are returned as given.

    Raises:
        ValueError: values that are not finite.
    """
    if images.dtype == torch.uint8:
        return images
    broken = int((~images.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(images)} pictures hold NaN or infinity; the weights that drew "
            "them have diverged, go back to an earlier checkpoint or lower the learning rate"
        )
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
