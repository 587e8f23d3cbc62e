"""Metrics of samples: each passes generated images or captions to metrics of `evaluation`.

A value is named `<metric>[<label>]`. The label names the protocol, so that a value of the shapes
world's own CLIP is not mistaken for one of Inception or CLIP ViT-L.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics import Metric
from torchvision.transforms.functional import pil_to_tensor

from callbacks.prompts import OpenImage, Prompt, PromptSet, center_crop_resize
from callbacks.sampling import Kind, SampleBatch
from evaluation import clip_score
from evaluation.bleu import BLEU4
from evaluation.cider import CIDEr
from evaluation.compute import compute_each
from evaluation.features import Extractor, Features, inception, open_clip_features
from evaluation.fid import FID
from evaluation.image_scores import ImageScores
from evaluation.inception_score import InceptionScore
from evaluation.kid import KID
from tf_lightning import shapes
from tf_lightning.errors import UserError
from tf_lightning.folders import check_writable
from tf_lightning.ranges import Positive, PositiveInt, Range, check_arguments

SHAPES_CLIP = Path(shapes.__file__).parent / "assets" / "shapes-clip"
REAL_BATCH = 64  # real images whose features are extracted together


class SampleMetric(ABC):
    """A metric of generated images or captions; each rank updates it with its own samples.

    `kind` is the kind of samples and `names` are the names of the values. `protocol` maps the name
    of each value to everything it depends on beside the samples.
    """

    kind: Kind
    names: list[str]
    protocol: dict[str, dict]

    def open(self, prompts: PromptSet) -> None:  # noqa: B027 - most metrics load nothing
        """Load the networks and reference files for a prompt set.

        Raises:
            ValueError: a file is missing or does not fit the prompt set.
        """

    def check(  # noqa: B027 - most metrics fit any prompts
        self, prompts: Sequence[Prompt], num_real: Callable[[], int], batch_size: int
    ) -> None:
        """Refuse prompts that this metric cannot score; called after `open`, before any sampling.

        Args:
            prompts: all prompts; one image or caption is generated for each.
            num_real: counts the real images.
            batch_size: prompts that are sampled together.

        Raises:
            ValueError: there are too few prompts or images, or they lack what the metric needs.
        """

    @abstractmethod
    def to(self, device: torch.device) -> "SampleMetric":
        """Move networks and sums to a device."""

    @abstractmethod
    def update(self, batch: SampleBatch) -> None:
        """Add samples."""

    @abstractmethod
    def compute(self) -> tuple[dict[str, float], list[str]]:
        """Return the values over the samples of all ranks by name, and why others are missing."""

    @abstractmethod
    def reset(self) -> None:
        """Remove all samples."""


class ImageQuality(SampleMetric):
    """FID, KID and Inception Score from one pass of one network over the generated images.

    Args:
        label: name of the protocol in brackets.
        extractor: network of the features: "shapes" for the CLIP of the shapes world,
            "inception", or an open_clip model.
        weights: file of Inception's weights, or tag or file of the open_clip model's; None: the
            default weights.
        scores: which of "fid", "kid" and "inception_score" to compute.
        references: folder for the statistics of the real images; None: keep them in memory.
        kid_subset_size: images in a subset of KID, from 2 to the number of prompts.
        splits: number of splits of the Inception Score, from 1 to the number of prompts.
    """

    kind: Kind = "generated"

    def __init__(
        self,
        label: str = "shapes",
        extractor: str = "shapes",
        weights: str | None = None,
        scores: Sequence[Literal["fid", "kid", "inception_score"]] = ("fid",),
        references: str | None = None,
        kid_subset_size: Annotated[int, Range(ge=2)] = 1000,
        splits: PositiveInt = 10,
    ):
        check_arguments(ImageQuality.__init__, locals())
        if len({*scores}) != len(scores):
            raise UserError(f"scores={list(scores)} names a score twice; name each once")
        self.label, self.extractor, self.weights = label, extractor, weights
        self.score_names, self.references = list(scores), references
        self.names = [f"{score}[{label}]" for score in scores]
        self.kid_subset_size, self.splits = kid_subset_size, splits

    def open(self, prompts: PromptSet) -> None:
        """Load the network, and the reference files that exist."""
        extractor = load_extractor(self.extractor, self.weights)
        self.image_size = prompts.image_size
        self.scores = ImageScores(
            extractor, [self._build(name, extractor, prompts.facts) for name in self.score_names]
        )

    def check(
        self, prompts: Sequence[Prompt], num_real: Callable[[], int], batch_size: int
    ) -> None:
        """Refuse fewer images than the scores need, and a folder that cannot be written."""
        needs_real = bool({"fid", "kid"} & {*self.score_names})
        counts = {"generated": len(prompts)}
        if needs_real:
            kept = [m.reference.statistics for m in self.scores.reference_metrics]
            found = None if None in kept else min(int(statistics["count"]) for statistics in kept)
            counts["real"] = num_real() if found is None else found
        if self.references and self.needs_real:
            check_writable(Path(self.references))
        least = {"fid": 2, "kid": self.kid_subset_size, "inception_score": self.splits}
        option = {"kid": "lower kid_subset_size", "inception_score": "lower splits"}
        for score in self.score_names:
            compared = counts if score != "inception_score" else {"generated": len(prompts)}
            for kind, count in compared.items():
                if count < least[score]:
                    remedy = f"{option[score]} or " if score in option else ""
                    raise UserError(
                        f"{score}[{self.label}] needs {least[score]} {kind} images but there are "
                        f"{count}; {remedy}give it more"
                    )

    def _build(self, score: str, extractor: Extractor, facts: dict) -> FID | KID | InceptionScore:
        name = f"{score}[{self.label}]"
        if score == "inception_score":
            return InceptionScore(extractor, name, splits=self.splits)
        file = f"{score}-{self.label}.safetensors"
        reference = Path(self.references, file) if self.references else None
        if score == "kid":
            size = self.kid_subset_size
            return KID(extractor, name, reference, real_facts=facts, subset_size=size)
        return FID(extractor, name, reference, real_facts=facts)

    def to(self, device: torch.device) -> "ImageQuality":
        """Move the network and the sums to a device."""
        self.device = device
        self.scores.to(device)
        return self

    @property
    def needs_real(self) -> bool:
        """Whether the statistics of the real images must be computed."""
        return self.scores.needs_real

    def add_real(self, images: Sequence[OpenImage]) -> None:
        """Add this rank's share of the real images."""
        for start in range(0, len(images), REAL_BATCH):
            opened = [open_image() for open_image in images[start : start + REAL_BATCH]]
            self.scores.update(self._tensor(opened), real=True)

    def keep_real(self) -> None:
        """Fix the real images' statistics; call on every rank after its share was added."""
        self.scores.keep_real()

    def update(self, batch: SampleBatch) -> None:
        """Add generated images, resized to the size of the real ones."""
        self.scores.update(self._tensor(batch.images), real=False)

    def _tensor(self, images: Sequence[Image.Image]) -> Tensor:
        """Convert images to uint8 (n, 3, H, W)."""
        if self.image_size:
            images = [center_crop_resize(image, self.image_size) for image in images]
        first, *others = sorted({image.size for image in images})
        if others:
            sizes = " and ".join("{} x {}".format(*size) for size in (first, others[-1]))
            raise UserError(
                f"{' and '.join(self.names)} cannot compare images of different sizes, such as "
                f"{sizes}; use prompts that resize them, or remove the metric"
            )
        return torch.stack([pil_to_tensor(image) for image in images]).to(self.device)

    def compute(self) -> tuple[dict[str, float], list[str]]:
        """Return one value for each score."""
        return self.scores.compute()

    def reset(self) -> None:
        """Remove the generated images."""
        self.scores.reset()

    @property
    def protocol(self) -> dict[str, dict]:
        """Protocol of each score, by name."""
        return self.scores.protocol


def load_extractor(name: str, weights: str | None) -> Extractor:
    """Load the network of `ImageQuality`.

    Raises:
        ValueError: the network is unknown, its weights are absent and cannot be downloaded, or
            weights are given for "shapes".
    """
    if name == "shapes" and weights:
        raise UserError(
            f"weights={weights} has no effect with extractor=shapes, which has weights of its own; "
            "leave it out, or give another extractor"
        )
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
    """Scales features (B, F) to length sqrt(F): CLIP compares directions only.

    At this length a feature has a mean square of 1.
    """

    def __init__(self, tower: Extractor):
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Features:
        """Extract features of uint8 images (B, 3, H, W)."""
        pooled = self.tower(images).pooled
        return Features(F.normalize(pooled) * pooled.shape[1] ** 0.5)


class CLIPScore(SampleMetric):
    """CLIP score: how well generated images match their prompts.

    Args:
        label: name of the protocol in brackets.
        model: "shapes" for the CLIP of the shapes world, or an open_clip model.
        pretrained: tag or file of the weights.
        prefix: text put before every prompt.
        scale: factor of the cosine.
    """

    kind: Kind = "generated"

    def __init__(
        self,
        label: str = "shapes",
        model: str = "shapes",
        pretrained: str | None = None,
        prefix: str = "",
        scale: Positive = 100.0,
    ):
        check_arguments(CLIPScore.__init__, locals())
        self.name = f"clip_score[{label}]"
        self.names = [self.name]
        self.arguments = {"pretrained": pretrained, "prefix": prefix, "scale": scale}
        self.model = model

    def open(self, prompts: PromptSet) -> None:
        """Load the model."""
        path = f"local-dir:{SHAPES_CLIP}" if self.model == "shapes" else self.model
        self.score = clip_score.CLIPScore(path, name=self.name, **self.arguments)
        self.score.facts["model"] = "shapes-clip" if self.model == "shapes" else self.model

    def to(self, device: torch.device) -> "CLIPScore":
        """Move the model and the sums to a device."""
        self.score.to(device)
        return self

    def update(self, batch: SampleBatch) -> None:
        """Add generated images with their prompts."""
        pixels = batch.pixels.to(self.score.device)
        self.score.update(pixels, [prompt.text for prompt in batch.prompts])

    def compute(self) -> tuple[dict[str, float], list[str]]:
        """Return the score."""
        return compute_each([self.score])

    def reset(self) -> None:
        """Remove all pairs."""
        self.score.reset()

    @property
    def protocol(self) -> dict[str, dict]:
        """Protocol of the score, by name."""
        return {self.name: self.score.protocol}


class CaptionScores(SampleMetric):
    """CIDEr-D and BLEU-4 of the captions generated for the prompts' images.

    Args:
        label: name of the protocol in brackets.
    """

    kind: Kind = "captioned"

    def __init__(self, label: str = "shapes"):
        self.scores: list[Metric] = [CIDEr(f"cider[{label}]"), BLEU4(f"bleu4[{label}]")]
        self.names = [score.name for score in self.scores]

    def check(
        self, prompts: Sequence[Prompt], num_real: Callable[[], int], batch_size: int
    ) -> None:
        """Refuse prompts without reference captions."""
        missing = sum(not prompt.references for prompt in prompts)
        if missing:
            raise UserError(
                f"{' and '.join(self.names)} need reference captions, which {missing} of "
                f"{len(prompts)} prompts lack; use other prompts or remove CaptionScores"
            )

    def to(self, device: torch.device) -> "CaptionScores":
        """Move the sums to a device."""
        self.scores = [score.to(device) for score in self.scores]
        return self

    def update(self, batch: SampleBatch) -> None:
        """Add generated captions with the reference captions of their images."""
        for score in self.scores:
            score.update(batch.captions, [prompt.references for prompt in batch.prompts])

    def compute(self) -> tuple[dict[str, float], list[str]]:
        """Return both scores, by name."""
        return compute_each(self.scores)

    def reset(self) -> None:
        """Remove all captions."""
        for score in self.scores:
            score.reset()

    @property
    def protocol(self) -> dict[str, dict]:
        """Protocol of both scores, by name."""
        return {score.name: score.protocol for score in self.scores}
