"""CLIP score: how well images match their captions according to an open_clip model."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchvision.transforms.functional import to_pil_image

from evaluation.features import as_uint8
from evaluation.open_clip_model import load_open_clip


class CLIPScore(Metric):
    """Mean over pairs of max(scale * cos(image, caption), 0) (Hessel 2021).

    Higher is better. Published numbers differ in model, prefix and scale: Hessel uses ViT-B-32,
    "A photo depicts " and 2.5; many papers use ViT-L-14, no prefix and 100.

    Args:
        model: a model name known to open_clip ("ViT-L-14"), or "local-dir:FOLDER" with
            open_clip_config.json and open_clip_model.safetensors.
        pretrained: tag ("openai") or file of the weights; None with a folder.
        prefix: text put before every caption.
        scale: factor of the cosine.
        name: name of the metric in logs.

    Raises:
        ValueError: the model is unknown, or its weights are absent and cannot be downloaded.
    """

    higher_is_better = True
    full_state_update = False

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        prefix: str = "",
        scale: float = 100.0,
        name: str = "clip_score",
    ):
        super().__init__()
        loaded = load_open_clip(model, pretrained)
        self.network, self.preprocess = loaded.network, loaded.preprocess
        self.tokenizer = loaded.tokenizer
        self.name, self.prefix, self.scale = name, prefix, scale
        self.facts = {
            "metric": "clip_score",
            "model": loaded.name,
            "weights_hash": loaded.weights_hash,
            "prefix": prefix,
            "scale": scale,
        }
        self.add_state("total", torch.tensor(0.0).double(), "sum")
        self.add_state("count", torch.tensor(0), "sum")
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        """Add pairs of an image and a caption.

        Args:
            images: (B, 3, H, W), uint8 in [0, 255] or float in [-1, 1].
            captions: B texts.
        """
        scores = self.cosines(images, captions).double() * self.scale
        self.total += scores.clamp(min=0).sum()
        self.count += len(scores)

    def cosines(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each image's embedding with its caption's embedding, (B,)."""
        inputs = [self.preprocess(to_pil_image(image)) for image in as_uint8(images).cpu()]
        tokens = self.tokenizer([self.prefix + caption for caption in captions])
        image_features = self.network.encode_image(torch.stack(inputs).to(self.device))
        text_features = self.network.encode_text(tokens.to(self.device))
        return F.cosine_similarity(image_features, text_features)

    def compute(self) -> Tensor:
        """Return the mean, a float64 scalar.

        Raises:
            ValueError: no pair was added.
        """
        if not self.count:
            raise ValueError(f"{self.name} was given no image; give it at least one")
        self.counts = {"num_pairs": int(self.count)}
        return self.total / self.count

    @property
    def protocol(self) -> dict:
        """Settings of the metric, and the number of pairs at the last `compute`."""
        return {**self.facts, **self.counts}
