"""What is measured of the samples: each measure hands them to metrics of `evaluation`.

A number's name is `<metric>[<label>]`. The label says the protocol, so that nobody takes a figure
of the embedded world's own judge for one of Inception or CLIP ViT-L.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics import Metric
from torchvision.transforms.functional import pil_to_tensor

from callbacks.prompts import OpenPicture, PromptSet, square
from callbacks.sampling import Kind, SampleBatch
from evaluation import clip_score
from evaluation.bleu import BLEU4
from evaluation.cider import CIDEr
from evaluation.features import Extractor, Features, inception, open_clip_features
from evaluation.fid import FID
from evaluation.image_scores import ImageScores
from evaluation.inception_score import InceptionScore
from evaluation.kid import KID
from tf_lightning import shapes

SHAPES_CLIP = Path(shapes.__file__).parent / "assets" / "shapes-clip"
REAL_BATCH = 64


class SampleMetric(ABC):
    """Something measured of samples; every rank updates it with its own share.

    `of` says which samples; `protocol` has what each number depends on beside the samples, by its
    name.
    """

    kind: Kind
    protocol: dict[str, dict]

    def open(self, prompts: PromptSet) -> None:  # noqa: B027 - most load nothing
        """Load what is needed for these prompts.

        Raises:
            ValueError: something is absent or does not fit.
        """

    @abstractmethod
    def to(self, device: torch.device) -> "SampleMetric":
        """Move networks and sums."""

    @abstractmethod
    def update(self, sampled: SampleBatch) -> None:
        """Add samples."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The numbers by their names, of all ranks' samples.

        Raises:
            ValueError: too few samples.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget the samples."""


class ImageQuality(SampleMetric):
    """FID, KID and Inception Score: one pass of one network over the drawn pictures.

    Args:
        label: names the protocol in the brackets.
        extractor: "shapes" for the embedded world's own, "inception", or an open_clip model.
        weights: file of Inception's weights, or tag or file of open_clip's; None: as they come.
        scores: which of "fid", "kid" and "inception_score".
        references: folder where the real pictures' statistics are kept; None: in memory.
        kid_subset_size: pictures in a subset of KID, at most as many as are drawn.
        splits: of the Inception Score.
    """

    kind: Kind = "generated"

    def __init__(
        self,
        label: str = "shapes",
        extractor: str = "shapes",
        weights: str | None = None,
        scores: Sequence[Literal["fid", "kid", "inception_score"]] = ("fid",),
        references: str | None = None,
        kid_subset_size: int = 1000,
        splits: int = 10,
    ):
        self.label, self.extractor, self.weights = label, extractor, weights
        self.names, self.references = list(scores), references
        self.kid_subset_size, self.splits = kid_subset_size, splits

    def open(self, prompts: PromptSet) -> None:
        """Load the network and the reference, if its file is there."""
        extractor = load_extractor(self.extractor, self.weights)
        self.image_size = prompts.image_size
        self.scores = ImageScores(
            extractor, [self._build(name, extractor, prompts.facts) for name in self.names]
        )

    def _build(self, score: str, extractor: Extractor, about: dict) -> FID | KID | InceptionScore:
        name = f"{score}[{self.label}]"
        if score == "inception_score":
            return InceptionScore(extractor, name, splits=self.splits)
        file = f"{score}-{self.label}.safetensors"
        reference = Path(self.references, file) if self.references else None
        if score == "kid":
            size = self.kid_subset_size
            return KID(extractor, name, reference, real_facts=about, subset_size=size)
        return FID(extractor, name, reference, real_facts=about)

    def to(self, device: torch.device) -> "ImageQuality":
        """Move the network and the sums."""
        self.device = device
        self.scores.to(device)
        return self

    @property
    def needs_real(self) -> bool:
        """Whether the real pictures' statistics are still to be made."""
        return self.scores.needs_real

    def see_real(self, pictures: Sequence[OpenPicture]) -> None:
        """Add this rank's share of the real pictures."""
        for start in range(0, len(pictures), REAL_BATCH):
            opened = [open_picture() for open_picture in pictures[start : start + REAL_BATCH]]
            self.scores.update(self._tensor(opened), real=True)

    def keep_real(self) -> None:
        """They were all, on every rank."""
        self.scores.keep_real()

    def update(self, sampled: SampleBatch) -> None:
        """Add drawn pictures, at the size of the real ones."""
        self.scores.update(self._tensor(sampled.images), real=False)

    def _tensor(self, pictures: Sequence[Image.Image]) -> Tensor:
        if self.image_size:
            pictures = [square(picture, self.image_size) for picture in pictures]
        return torch.stack([pil_to_tensor(picture) for picture in pictures]).to(self.device)

    def compute(self) -> dict[str, float]:
        """One number a score."""
        return self.scores.compute()

    def reset(self) -> None:
        """Forget the drawn pictures."""
        self.scores.reset()

    @property
    def protocol(self) -> dict[str, dict]:
        """By name."""
        return self.scores.protocol


def load_extractor(name: str, weights: str | None) -> Extractor:
    """The network of `ImageQuality`."""
    if name == "inception":
        return inception(weights)
    if name != "shapes":
        return open_clip_features(name, weights)
    tower = open_clip_features(f"local-dir:{SHAPES_CLIP}")
    return Extractor(
        UnitLength(tower),
        num_features=tower.num_features,
        name="shapes-clip, length sqrt(F)",
        weights_hash=tower.weights_hash,
    )


class UnitLength(nn.Module):
    """Features (B, F) scaled to length sqrt(F): as CLIP compares them, at an ordinary scale."""

    def __init__(self, tower: Extractor):
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Features:
        """uint8 (B, 3, H, W) -> Features."""
        pooled = self.tower(images).pooled
        return Features(F.normalize(pooled) * pooled.shape[1] ** 0.5)


class CLIPScore(SampleMetric):
    """CLIP score: how well drawn pictures fit their prompts.

    Args:
        label: names the protocol in the brackets.
        model: "shapes" for the embedded world's own, else as open_clip names it.
        pretrained: tag or file of the weights.
        prefix: put before every prompt.
        scale: of the cosine.
    """

    kind: Kind = "generated"

    def __init__(
        self,
        label: str = "shapes",
        model: str = "shapes",
        pretrained: str | None = None,
        prefix: str = "",
        scale: float = 100.0,
    ):
        self.name = f"clip_score[{label}]"
        self.arguments = {"pretrained": pretrained, "prefix": prefix, "scale": scale}
        self.model = model

    def open(self, prompts: PromptSet) -> None:
        """Load the model."""
        path = f"local-dir:{SHAPES_CLIP}" if self.model == "shapes" else self.model
        self.score = clip_score.CLIPScore(path, name=self.name, **self.arguments)
        self.score.facts["model"] = "shapes-clip" if self.model == "shapes" else self.model

    def to(self, device: torch.device) -> "CLIPScore":
        """Move the model and the sums."""
        self.score.to(device)
        return self

    def update(self, sampled: SampleBatch) -> None:
        """Add drawn pictures with their prompts."""
        pixels = sampled.pixels.to(self.score.device)
        self.score.update(pixels, [prompt.text for prompt in sampled.prompts])

    def compute(self) -> dict[str, float]:
        """One number."""
        return {self.name: float(self.score.compute())}

    def reset(self) -> None:
        """Forget the pairs."""
        self.score.reset()

    @property
    def protocol(self) -> dict[str, dict]:
        """By name."""
        return {self.name: self.score.protocol}


class CaptionScores(SampleMetric):
    """CIDEr-D and BLEU-4 of the captions written for the prompts' pictures.

    Args:
        label: names the protocol in the brackets.
    """

    kind: Kind = "captioned"

    def __init__(self, label: str = "shapes"):
        self.scores: list[Metric] = [CIDEr(f"cider[{label}]"), BLEU4(f"bleu4[{label}]")]

    def to(self, device: torch.device) -> "CaptionScores":
        """Move the sums."""
        self.scores = [score.to(device) for score in self.scores]
        return self

    def update(self, sampled: SampleBatch) -> None:
        """Add written captions with their pictures' own."""
        for score in self.scores:
            score.update(sampled.captions, [prompt.references for prompt in sampled.prompts])

    def compute(self) -> dict[str, float]:
        """Two numbers."""
        return {score.name: float(score.compute()) for score in self.scores}

    def reset(self) -> None:
        """Forget the captions."""
        for score in self.scores:
            score.reset()

    @property
    def protocol(self) -> dict[str, dict]:
        """By name."""
        return {score.name: score.protocol for score in self.scores}
